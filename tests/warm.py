"""Commands of Python in processes of their own that need not import torch again: forks of one that has.

A test's command then starts in a quarter of a second instead of six, and is else what it was: its own process, environment,
folder and streams, run from its file, ended by the interpreter. Our own modules are never imported beforehand.

``python warm.py MODULE...`` serves: it reads a command as a line of JSON, and answers its process and then its exit status.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

SLOW = ("torch", "torch._dynamo", "torchvision.transforms", "sklearn.datasets", "sklearn.model_selection", "scipy.stats",
        "matplotlib.figure", "matplotlib.backends.backend_agg", "jinja2", "psutil", "yaml", "safetensors.torch")  # fmt: skip
# They read the Hub's address from the environment when they are imported.
HUB = ("huggingface_hub.hf_api", "timm", "accelerate")
AT_IMPORT = ("OMP_", "MKL_", "TORCH", "PYTHON", "MALLOC", "GLIBC", "LD_", "CUDA", "NCCL", "TRITON", "PATH", "VIRTUAL_ENV")


class Warm:
    """A server, started when it is first asked."""

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        self.modules, self.environment = modules, dict(environment)
        self.server: subprocess.Popen | None = None

    def run(
        self, words: Sequence[str], environment: Mapping[str, str], folder: Path, timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """``python WORDS``; as ``subprocess.run`` with its output captured as text."""
        if self.server is None:
            self.server = subprocess.Popen(
                [sys.executable, __file__, *self.modules],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self.environment,
            )  # fmt: skip
        with tempfile.TemporaryDirectory() as place:
            said = [Path(place, name) for name in ("stdout", "stderr")]
            asked = [list(words), dict(environment), str(folder), *map(str, said)]
            print(json.dumps(asked), file=self.server.stdin, flush=True)
            process = int(self.server.stdout.readline())
            ready, _, _ = select.select([self.server.stdout], [], [], timeout)
            if not ready:
                os.kill(process, signal.SIGKILL)
            status = int(self.server.stdout.readline())
            texts = [path.read_text() for path in said]
        if not ready:
            raise subprocess.TimeoutExpired(list(words), timeout, *texts)
        return subprocess.CompletedProcess(list(words), status, *texts)

    def close(self) -> None:
        """Ends the server."""
        if self.server is not None:
            self.server.kill()
            self.server.wait()
            self.server.stdin.close(), self.server.stdout.close()
            self.server = None


def can_start(words: Sequence[str], environment: Mapping[str, str], started: Mapping[str, str]) -> bool:
    """Whether a fork is the same as a new process: a command of ours, and no change of what is read at a process's start."""
    ours = words[1].endswith(".py") or words[1] == "-c" or (words[1] == "-m" and words[2].startswith("timm_sfr"))
    if words[0] != sys.executable or not ours:
        return False
    changed = {name for name in {*environment, *started} if environment.get(name) != started.get(name)}
    return not any(name.startswith(AT_IMPORT) for name in changed)


def serve() -> list:
    """Answers until its input ends; returns only in a process that is to run something, with what was asked."""
    for line in sys.stdin:
        asked = json.loads(line)
        process = os.fork()
        if process == 0:
            return asked
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
    sys.exit()


def become(environment: Mapping[str, str], folder: str, out: str, err: str) -> None:
    """Makes this process what a new one would be."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for target, path in enumerate((os.devnull, out, err)):
        opened = os.open(path, os.O_RDONLY if target == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, target)
        os.close(opened)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  as long as the process
    tempfile.tempdir = None


def execute(words: list[str]) -> None:
    """``python WORDS``."""
    sys.argv = words[1:] if words[0] in ("-m", "-c") else words
    if words[0] == "-m":
        sys.path[0] = os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.path[0] = ""
        sys.argv[0] = "-c"
        exec(compile(words[1], "<string>", "exec"), sys.modules["__main__"].__dict__)
    else:
        sys.path[0] = str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    for module in sys.argv[1:]:
        importlib.import_module(module)
    assert threading.active_count() == 1, "a fork has only the thread that forks"
    command, *rest = serve()
    become(*rest)
    execute(command)
