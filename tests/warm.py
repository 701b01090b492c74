"""Commands of Python in processes of their own that need not import torch again: forks of one that has.

A test's command then starts in a quarter of a second instead of six, and is else what it was: its own process, environment,
folder and streams, run from its file, ended by the interpreter. Our own modules are never imported beforehand. All forks of one
server share the seed of Python's hashes: tests with launchers, signals and COLD=1 have processes of other seeds.

``python warm.py`` serves: it reads a command as a line of JSON, and answers its process and then its exit status.
"""

from __future__ import annotations

import contextlib
import gc
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
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

SLOW = ("torch", "torch._dynamo", "torchvision.transforms", "sklearn.datasets", "sklearn.model_selection", "scipy.stats",
        "matplotlib.figure", "matplotlib.backends.backend_agg", "jinja2", "psutil", "yaml", "safetensors.torch",
        "huggingface_hub.hf_api", "timm", "accelerate")  # fmt: skip
HUB = ("HF_", "NO_PROXY")  # read again by `read_hub_settings`
# Read by nothing in SLOW when it is imported; sklearn sets KMP_ itself, in this process and in the server.
LATER = (*HUB, "WANDB_", "TRACKIO_", "TIMM_SFR_", "PYTEST_", "KMP_")


class Warm:
    """A server, started when it is first asked."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        self.server: subprocess.Popen | None = None

    def run(
        self, words: Sequence[str], environment: Mapping[str, str], folder: Path, timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """``python WORDS``; as ``subprocess.run`` with its output captured as text."""
        process = None
        try:
            with tempfile.TemporaryDirectory() as place:
                said = [Path(place, name) for name in ("stdout", "stderr")]
                self._ask([list(words), dict(environment), str(folder), *map(str, said)])
                process = self._answer(300)  # its imports, on a busy machine
                status = self._answer(timeout)
                texts = [path.read_text() for path in said]
        except BaseException as error:  # nothing of this command may be taken for an answer to the next
            self.close()
            if process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            if isinstance(error, TimeoutError):
                raise subprocess.TimeoutExpired(list(words), timeout) from error
            raise
        return subprocess.CompletedProcess(list(words), status, *texts)

    def _ask(self, command: list) -> None:
        if self.server is None:
            self.server = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=self.environment,
            )  # fmt: skip
        self.server.stdin.write(json.dumps(command).encode() + b"\n")

    def _answer(self, timeout: float) -> int:
        """The next number that the server says."""
        line, end = b"", time.monotonic() + timeout
        while not line.endswith(b"\n"):
            if not select.select([self.server.stdout], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError
            byte = self.server.stdout.read(1)  # no more: what follows is another answer
            assert byte, "the server has ended"
            line += byte
        return int(line)

    def close(self) -> None:
        """Ends the server."""
        if self.server is not None:
            self.server.kill()
            self.server.wait()
            self.server.stdin.close(), self.server.stdout.close()
            self.server = None


def read_hub_settings() -> None:
    """Makes huggingface_hub, which reads the environment when it is imported, read it again."""
    constants = importlib.import_module("huggingface_hub.constants")
    before = {name: value for name, value in vars(constants).items() if name.isupper()}
    importlib.reload(constants)
    changed = {name: value for name, value in before.items() if vars(constants)[name] != value}
    copies = [module for name, module in list(sys.modules.items()) if name.startswith("huggingface_hub.")]
    for name in changed:
        for module in copies:
            if name in vars(module):
                setattr(module, name, vars(constants)[name])
    importlib.import_module("huggingface_hub.hf_api").api.endpoint = constants.ENDPOINT
    importlib.import_module("huggingface_hub.utils").close_session()  # it keeps connections, and knows of proxies


def can_start(words: Sequence[str], environment: Mapping[str, str], started: Mapping[str, str]) -> bool:
    """Whether a fork is the same as a new process: a command of ours, and no change of what is read at a process's start."""
    ours = words[1].endswith(".py") or words[1] == "-c" or (words[1] == "-m" and words[2].startswith("timm_sfr"))
    if words[0] != sys.executable or not ours:
        return False
    changed = {name for name in {*environment, *started} if environment.get(name) != started.get(name)}
    return all(name.startswith(LATER) for name in changed)


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


def become(environment: Mapping[str, str], folder: str, streams: Sequence[int]) -> None:
    """Makes this fork what a new process would be, with these descriptors for its three standard streams."""
    os.environ.clear()
    os.environ.update(environment)
    read_hub_settings()
    os.chdir(folder)
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  as long as the process
    tempfile.tempdir = None
    np.random.seed()


def execute(words: list[str]) -> None:
    """``python WORDS``."""
    sys.argv = words[1:] if words[0] in ("-m", "-c") else words
    if words[0] == "-m":
        sys.path[0] = os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.path[0] = ""
        sys.argv[0] = "-c"
        sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec", dont_inherit=True), sys.modules["__main__"].__dict__)
    else:
        sys.path[0] = str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    for module in SLOW:
        importlib.import_module(module)
    assert threading.active_count() == 1, "a fork has only the thread that forks"
    gc.freeze()  # a fork that ends need not look through all these modules
    command, given, place, *said = serve()
    written = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    become(given, place, [os.open(os.devnull, os.O_RDONLY), *(os.open(path, written) for path in said)])
    execute(command)
