"""Runs the documents' commands, each in a fork of one process that has imported everything: a command starts at once.

``python doc_server.py SOCKET`` serves. The commands themselves (``python``, ``timm-sfr``, ...) are copies of a small client that
hands its words, folder, environment and streams over. What needs hardware, a network or hours is parsed, by the real parser.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

from warm import become

ROOT = Path(__file__).resolve().parent.parent
CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as link:
    link.connect({address!r})
    asked = json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(link, [len(asked).to_bytes(8, "big")], [0, 1, 2])
    link.sendall(asked)
    status = link.recv(1)
sys.exit(status[0] if status else 134)
"""
# Of an option given twice the last one counts: so these cut a training short, and nothing is edited.
DIGITS = ("--epochs", "1", "--report-interval", "0", "-j", "0", "--device", "cpu", "--img-size", "8")
IMAGES = ("--epochs", "1", "--report-interval", "0", "-j", "0", "--device", "cpu", "-b", "32", "--img-size", "64")
IMPORTED = ("accelerate.commands.launch", "datasets", "matplotlib.figure", "onnx", "onnxruntime", "onnxscript", "ot",
            "torchvision", "webdataset", "timm_sfr.cli.main", "train_sfr")  # fmt: skip
SHORT_TEST = ("--lr-low", "1e-4", "--lr-high", "1", "--lr-updates", "20")


def train(words: list[str]) -> int:
    """``train_sfr.py`` and ``timm-sfr train``, cut short."""
    from timm_sfr.cli.train import parse
    from train_sfr import main

    if "--resume" in words and "auto" not in words:
        return main(words)
    config, _ = parse(words)
    if "--dataset-download" in words:  # needs a network
        return 0
    shorter = DIGITS if config.data.dataset == "digits" else IMAGES
    if config.model.input_size is not None:  # in the place of --img-size
        shorter = shorter[:-2]
    return main([*words, *shorter])


def python(words: list[str]) -> int:
    """``python``: a script or a module."""
    if words[:2] == ["-m", "venv"]:
        return subprocess.call([sys.executable, "-m", "venv", "--without-pip", *words[2:]])
    sys.path.insert(0, os.getcwd())
    if words[0] == "train_sfr.py":
        assert Path(words[0]).is_file()
        return train(words[1:])
    assert words[0] == "-m", f"no rule for python {words}"
    sys.argv = words[1:]
    sys.modules.pop(words[1], None)  # which the server has imported: runpy would warn
    if not words[1].startswith("benchmarks."):
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return 0
    found = importlib.util.find_spec(words[1])  # they take hours, and write into the documents
    assert found is not None and found.origin, words[1]
    if "add_argument" not in Path(found.origin).read_text():
        assert not words[2:], f"{words[1]} takes no options"
        return 0
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, *args, **kwargs):
        parse(parser, *args, **kwargs)
        raise SystemExit(0)

    argparse.ArgumentParser.parse_args = parse_and_stop
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    raise AssertionError(f"{words[1]} has parsed nothing")


def timm_sfr(words: list[str]) -> int:
    """``timm-sfr VERB``."""
    from timm_sfr.cli.main import main

    if words[0] == "lr-find":
        return main([*words, *SHORT_TEST, *IMAGES])
    return train(words[1:]) if words[0] == "train" else main(words)


def launched(script: str, words: list[str]) -> int:
    """A training in several processes: its options are right, and its script is there."""
    from timm_sfr.cli.train import parse

    assert script == "train_sfr.py" and Path(script).is_file(), script
    parse(words)
    return 0


def accelerate(words: list[str]) -> int:
    """``accelerate launch``: parsed."""
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch", words
    asked = launch_command_parser().parse_args(words[1:])
    assert asked.multi_gpu
    return launched(asked.training_script, asked.training_script_args)


def torchrun(words: list[str]) -> int:
    """``torchrun``: parsed; run where DOCS_SLOW allows it."""
    from torch.distributed.run import get_args_parser

    asked = get_args_parser().parse_args(words)
    if os.environ.get("DOCS_SLOW") and asked.nnodes == "1:1":
        return subprocess.call([sys.executable, "-m", "torch.distributed.run", *words, *DIGITS])
    return launched(asked.training_script, asked.training_script_args)


def pip(words: list[str]) -> int:
    """``pip install``: what is named here exists; nothing is installed."""
    from packaging.requirements import Requirement

    extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    assert words.pop(0) == "install", words
    for word in words:
        if re.fullmatch(r"\.(\[.*\])?", word):
            assert "-e" in words
            wanted = set(word[2:-1].split(",")) - {""}
            missing = wanted - set(re.findall(r"^(\w+) = ", extras, re.MULTILINE))
            assert not missing, f"pyproject.toml has no extra {missing}"
        elif word not in ("-e", "--no-deps", "-q", "--upgrade"):
            Requirement(word)
    return 0


def pytest(words: list[str]) -> int:
    """``pytest``: this very suite; what is named is there."""
    assert all((ROOT / word).exists() for word in words if "/" in word), words
    return 0


def hf(words: list[str]) -> int:
    """``hf``: the command exists; it would ask for a token."""
    from huggingface_hub.cli.hf import main

    sys.argv = ["hf", *words, "--help"]
    main()
    return 0


def git(words: list[str]) -> int:
    """``git clone``: the files that a clone has, as links."""
    assert words[:2] == ["clone", "REPOSITORY"] and len(words) == 3, words
    checkout(Path(words[2]))
    return 0


def checkout(place: Path) -> None:
    """Links to all that is in the repository."""
    place.mkdir()
    for path in ROOT.iterdir():
        if not path.name.startswith("."):
            (place / path.name).symlink_to(path)


def srun(words: list[str]) -> int:
    """``srun``: on one host of it."""
    return subprocess.call(words)


def scontrol(words: list[str]) -> int:
    """``scontrol show hostnames``."""
    assert words[:2] == ["show", "hostnames"], words
    os.write(1, b"host0\nhost1\nhost2\nhost3\n")  # whole, before `head` goes away
    return 0


def docker(words: list[str]) -> int:
    """``docker``: its file is there; what runs in the image are commands of ours with right options."""
    if words[0] == "build":
        assert words[words.index("-t") + 1] == "timm_sfr" and Path(words[words.index("-f") + 1]).is_file()
        return 0
    place = words.index("timm_sfr")
    asked = words[place + 1 :]
    if "--entrypoint" in words[:place]:
        assert words[words.index("--entrypoint") + 1] == "accelerate"
        return accelerate([word.replace("/opt/timm_sfr/train_sfr.py", "train_sfr.py") for word in asked])
    assert words[0] == "run" and asked[0] == "train", words
    return launched("train_sfr.py", asked[1:])


def mkdocs(words: list[str]) -> int:
    """``mkdocs``: tests/test_site.py builds."""
    from mkdocs.__main__ import cli

    cli.main([*words, "--help"], standalone_mode=False)
    return 0


def page(words: list[str]) -> int:
    """Python blocks of one page, in one namespace: reads JSON lines of [name, code], answers each with an empty line or why."""
    sys.path.insert(0, os.getcwd())
    space = {"__name__": "__main__"}
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a block prints is not an answer
    for line in sys.stdin:
        name, code = json.loads(line)
        try:
            exec(compile(code, name, "exec"), space)
            said = ""
        except BaseException:
            said = traceback.format_exc()
        sys.stdout.flush()
        print(json.dumps(said), file=answers, flush=True)
    return 0


RULES = {"python": python, "python3": python, "timm-sfr": timm_sfr, "accelerate": accelerate,
         "torchrun": torchrun, "pip": pip, "pytest": pytest, "hf": hf, "git": git, "srun": srun, "scontrol": scontrol,
         "mkdocs": mkdocs, "docker": docker, "doc-page": page}  # fmt: skip


def install(folder: Path, address: str) -> None:
    """Puts the commands into `folder`, for PATH."""
    folder.mkdir()
    for name in RULES:
        (folder / name).write_text(CLIENT.format(python=sys.executable, address=address))
        (folder / name).chmod(0o755)


def answer(link: socket.socket) -> None:
    """Runs what a client asks for, in this process, which ends with it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, _, _ = socket.recv_fds(link, 8, 3)
    asked = b""
    while len(asked) < int.from_bytes(size, "big"):
        asked += link.recv(1 << 20)
    name, words, folder, env = json.loads(asked)
    become(env, folder, streams)
    sys.argv = [name, *words]
    status = 1
    try:
        status = RULES[name](words)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    link.send(bytes([status or 0]))
    os._exit(0)


def main(address: str) -> None:
    """Serves for good."""
    for module in IMPORTED:
        importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as place:
        place.bind(address)
        place.listen(16)
        print("ready", flush=True)
        while True:
            link, _ = place.accept()
            if os.fork() == 0:
                place.close()
                answer(link)
            link.close()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(sys.argv[1])
