"""Helpers for runs with several processes: work by one process for all, and restarts by torchrun."""

from __future__ import annotations

import contextlib
import getpass
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from filelock import FileLock

from timm_sfr.utils.errors import UserError

Result = TypeVar("Result")


def cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else psutil.cpu_count() or 1


def restarts() -> int:
    """Returns how many times torchrun has restarted these processes."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def hosts() -> int:
    """Returns the number of torchrun's launchers, one a host."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def launch_id() -> str | None:
    """Returns an identifier of this torchrun launch, which stays the same after a restart; None if there is none."""
    known = os.environ.get("TORCHELASTIC_RUN_ID")
    if known is None or known != "none":
        return known
    if hosts() > 1:
        return None  # each host has its own launcher
    with contextlib.suppress(psutil.Error):
        launcher = psutil.Process().parent()
        return None if launcher is None else f"{launcher.pid}-{launcher.create_time()}"
    return None


def join_restarted_cpu_processes() -> None:
    """Joins the CPU processes that torchrun has restarted, with a new prefix for their names in its store.

    The store outlives a restart, and without the prefix gloo would find the addresses of the dead processes.
    """
    if restarts() == 0 or dist.is_initialized():
        return
    size = int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, is_master=False)
    own = dist.PrefixStore(f"timm_sfr-restart-{restarts()}", store)
    dist.init_process_group("gloo", store=own, rank=int(os.environ["RANK"]), world_size=size)


def on_main(accelerator: Any, work: Callable[[], Any]) -> Any:
    """Runs `work` on the main process and returns its result on every process.

    Raises:
        UserError: on every process, if `work` raises it on the main process.
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
    """Runs `work` on each process, one at a time per machine, so that the others find what the first has downloaded.

    This uses a file lock instead of a barrier, because NCCL barriers time out after ten minutes.
    """
    if accelerator.num_processes == 1:
        return work()
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()  # in a container, a user may have no name
    with FileLock(Path(tempfile.gettempdir()) / f"timm_sfr-{user}.lock"):
        return work()
