"""The machine that a run is on: its devices and precision, its allocator, and what it says when it gives out."""

from __future__ import annotations

import ctypes
import os
import time

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from timm_sfr.config import RunConfig
from timm_sfr.training.trackers import chosen
from timm_sfr.utils.errors import UserError, first_line
from timm_sfr.utils.processes import join_restarted_cpu_processes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's names, <malloc.h>
_MOST = 2**31 - 1  # mallopt takes an int


def keep_freed_blocks() -> bool:
    """Lets glibc use freed blocks of any size again; True where it has been told to.

    By default glibc maps every block of 32 MiB and more anew from the system and gives it back when it is freed, so that
    each batch pays the page faults of its large activations again: 13 % of a step of ``resnet18_cifar`` on 128 images of
    32 pixels (docs/performance.md). Environment variables that set the allocator, and other allocators, are left alone.
    """
    if "GLIBC_TUNABLES" in os.environ or "LD_PRELOAD" in os.environ:
        return False
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
        ctypes.CDLL(None).gnu_get_libc_version  # noqa: B018  others have a mallopt of that name that does nothing
    except (AttributeError, OSError, TypeError):  # no glibc: macOS, musl, Windows
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _MOST) and mallopt(_TRIM_THRESHOLD, _MOST))


def _last_word(error: Exception) -> Exception:
    """What torch says of a loading process whose pipe broke: its end is signalled a moment later, wherever we are then."""
    if not isinstance(error, (ConnectionError, EOFError)):
        return error
    try:
        for _ in range(20):
            time.sleep(0.1)
    except RuntimeError as said:
        return said
    return error


def explained(error: Exception, kept: str) -> UserError | None:
    """The error in one line where it is of the machine or the options, not of the code; None where it is."""
    error = _last_word(error)
    text = first_line(error)
    # Its pipe may break before torch notices that it is gone.
    if "DataLoader worker" in text or isinstance(error, (ConnectionError, EOFError)):
        return UserError(
            f"data: a loading process died: {text.rstrip('.')}; {kept}; where memory ran out, lower --workers"
        )
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return UserError(f"out of memory: {text}; {kept}; lower --batch-size (and raise --grad-accum-steps), or give "
                         "--grad-checkpointing")  # fmt: skip
    if "more than 1 value per channel" in text:
        return UserError(
            "batch-size: BatchNorm needs more than one value a channel; raise --batch-size, or take larger images"
        )
    if any(word in text for word in ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")):
        return UserError(f"another process of this run has ended; see what it said; {kept}")
    return None


def make_accelerator(config: RunConfig) -> Accelerator:
    """Accelerate's devices, processes and precision.

    Raises:
        UserError: if the device cannot compute in the asked precision, or a tracker is not installed.
    """
    engine, trackers = config.engine, chosen(config.engine.report_to)
    # Without this word Accelerate would take each of torchrun's processes on a machine without a GPU for the only one.
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    cpu = engine.device == "cpu" or (several and not torch.accelerator.is_available())
    if cpu and several:
        join_restarted_cpu_processes()
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=engine.mixed_precision,
            dynamo_backend=engine.torchcompile,
            log_with=trackers or None,
            project_config=ProjectConfiguration(logging_dir="."),  # `Trackers` gives the run's folder, once it is known
        )
    except (ValueError, ImportError) as error:
        if "already been initialized" in str(error):
            raise UserError(
                f"mixed-precision: this Python process has trained at another precision than {engine.mixed_precision!r}, "
                "and accelerate keeps the first; train in a new process, or at the same precision"
            ) from error
        if "backend" in str(error).lower():
            raise UserError(f"torchcompile: {error}; inductor is the usual one") from error
        raise UserError(
            f"mixed-precision: {error}; --mixed-precision no always works, bf16 works on CPUs and recent GPUs"
        ) from error
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # Accelerate would go on in float32 without a word.
        raise UserError("mixed-precision: fp16 needs a GPU and this run is on the CPU; use bf16 or no")
    return accelerator
