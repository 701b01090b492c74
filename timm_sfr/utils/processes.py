"""Starting as many CPU processes as ``accelerate launch --cpu --num_processes N`` was asked for.

Accelerate starts one process for that line unless MPI is installed (huggingface/accelerate issue 2741). We start the N
processes with torch's own launcher, which Accelerate then recognises.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch.distributed as dist
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import broadcast_object_list
from filelock import FileLock

from timm_sfr.utils.errors import UserError


def cpu_processes(command: Sequence[str]) -> int:
    """How many processes an ``accelerate launch --cpu`` command line asks for; 1 for any other command."""
    words = list(command)
    module = ("accelerate.commands.launch", "/accelerate/commands/launch.py")  # python -m, on which it is also called
    starts = [
        place for place, word in enumerate(words)
        if word.endswith(module) or (word == "launch" and any("accelerate" in before for before in words[:place]))
    ]  # fmt: skip
    if not starts:
        return 1
    try:
        asked = launch_command_parser().parse_known_args(words[starts[0] + 1 :])[0]
    except SystemExit:  # argparse's way to say that it does not understand the line
        return 1
    if not asked.cpu or asked.multi_gpu or asked.mpirun_hostfile or (asked.num_machines or 1) > 1:
        return 1
    return asked.num_processes or 1


def start_cpu_processes(script: str, arguments: Sequence[str]) -> int | None:
    """Runs `script` in the processes that our parent, ``accelerate launch``, was asked for and did not start.

    Returns:
        Their exit status, or None where there is nothing to do: another launcher, or one process.
    """
    if "WORLD_SIZE" in os.environ or os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true":
        return None
    try:
        parent = psutil.Process().parent()
        count = cpu_processes(parent.cmdline()) if parent is not None else 1
    except psutil.Error:
        return None
    if count < 2:
        return None
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    with subprocess.Popen([*launcher, script, *arguments]) as child:
        # The processes finish their update and keep a checkpoint; this one waits for them, and hands on what only it got.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, frame: child.send_signal(number))
        above = os.getppid()
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return child.wait(timeout=1)
            if os.getppid() != above:  # accelerate has been killed alone, and would leave the processes to themselves
                child.send_signal(signal.SIGTERM)
                return child.wait()


def restarts() -> int:
    """How many times torchrun has started these processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launch_id() -> str | None:
    """What tells this launch of torchrun's from others, the same after a restart; None where nothing does."""
    known = os.environ.get("TORCHELASTIC_RUN_ID")
    if known is None or known != "none":
        return known
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        return None  # each host has a launcher of its own
    with contextlib.suppress(psutil.Error):
        launcher = psutil.Process().parent()
        return None if launcher is None else f"{launcher.pid}-{launcher.create_time()}"
    return None


def join_restarted_cpu_processes() -> None:
    """Joins CPU processes that torchrun has started again, under names of their own in its store.

    That store outlives a restart, and gloo would find the addresses of the processes that have died.
    """
    if restarts() == 0 or dist.is_initialized():
        return
    size = int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, is_master=False)
    own = dist.PrefixStore(f"timm_sfr-restart-{restarts()}", store)
    dist.init_process_group("gloo", store=own, rank=int(os.environ["RANK"]), world_size=size)


Result = TypeVar("Result")


def on_main(accelerator: Any, work: Callable[[], Any]) -> Any:
    """What `work` gives on the main process, on every process.

    Raises:
        UserError: on every process, if it fails there.
    """
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = work()
        except UserError as error:
            answer[1] = error
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def one_at_a_time(accelerator: Any, work: Callable[[], Result]) -> Result:
    """What `work` gives on each process, one after another on a machine: what the first downloads is there for the others.

    A lock on a file, not a barrier: those who wait at a barrier give up after the ten minutes that NCCL allows.
    """
    if accelerator.num_processes == 1:
        return work()
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()  # a user may have no name, in a container
    with FileLock(Path(tempfile.gettempdir()) / f"timm_sfr-{user}.lock"):
        return work()
