"""Several processes: what one of them does for all, and restarts by torchrun."""

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
