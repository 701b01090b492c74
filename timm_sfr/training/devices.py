"""The machine of a run: devices and precision, memory allocator, and explanations of its failures."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, TorchDynamoPlugin

from timm_sfr.config import RunConfig
from timm_sfr.training.trackers import chosen
from timm_sfr.utils.console import logger
from timm_sfr.utils.errors import UserError, first_line
from timm_sfr.utils.processes import join_restarted_cpu_processes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt, from <malloc.h>
_MAX_INT = 2**31 - 1  # mallopt takes an int
CUBLAS_FULL = "CUBLAS_STATUS_ALLOC_FAILED"  # in cuBLAS's own error if its workspace does not fit into the GPU's memory
# What Accelerate's configuration may ask for by these variables, and does not go with whole weights on every process.
SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
}


def keep_freed_blocks() -> bool:
    """Makes glibc reuse freed blocks of any size; returns whether it was set.

    By default glibc maps every block of 32 MiB or more from the system and returns it when it is freed. Each batch then
    pays the page faults of its large activations again: 13 % of a step of ``resnet18_cifar`` on 128 images of 32 pixels
    (docs/performance.md). Does nothing if environment variables configure the allocator or another allocator is loaded.
    """
    if "GLIBC_TUNABLES" in os.environ or "LD_PRELOAD" in os.environ:
        return False
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
        ctypes.CDLL(None).gnu_get_libc_version  # noqa: B018  other C libraries have a mallopt that does nothing
    except (AttributeError, OSError, TypeError):  # no glibc: macOS, musl, Windows
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _MAX_INT) and mallopt(_TRIM_THRESHOLD, _MAX_INT))


def explained(error: Exception, kept: str) -> UserError | None:
    """Returns a one-line error if the machine or the options caused `error`, with what the run has `kept`; otherwise None."""
    error = _worker_error(error)
    text = first_line(error)
    if text.startswith("Caught ") and "DataLoader worker" in text:  # torch's copy of the process's own error and traceback
        return UserError(f"data: a loading process failed: {str(error).strip().splitlines()[-1]}; {kept}")
    # The pipe of a dead process may break before torch notices that the process has ended.
    if "DataLoader worker" in text or isinstance(error, (ConnectionError, EOFError)):
        return UserError(f"data: a loading process died: {text.rstrip('.')}; {kept}; if memory ran out, lower --workers")
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or CUBLAS_FULL in text:
        return UserError(f"out of memory: {text}; {kept}; lower --batch-size (and raise --grad-accum-steps), or use "
                         "--grad-checkpointing")  # fmt: skip
    if "more than 1 value per channel" in text:
        return UserError("batch-size: BatchNorm needs more than one value per channel; raise --batch-size, or use larger images")
    if any(word in text for word in ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")):
        return UserError(f"another process of this run has ended; see its output; {kept}")
    return None


def check_environment(mixed_precision: str | None) -> None:
    """Raises UserError if Accelerate's configuration, in environment variables, asks for something that a run cannot do.

    Accelerate itself leaves FSDP aside on CPUs, and divides the loss by its own number of accumulation steps. The precision
    that the options ask for overrides the configuration's.
    """
    for name, what in SHARDING.items():
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "y", "on"):
            raise UserError(
                f"accelerate: its configuration asks for {what} ({name}); validation, moving average and checkpoints need whole "
                "weights on every process; use accelerate launch --multi_gpu or torchrun, and to save memory --mixed-precision "
                "bf16, --grad-checkpointing, or a lower --batch-size with --grad-accum-steps"
            )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        raise UserError(
            f"accelerate: its configuration asks for {steps} gradient accumulation steps "
            "(ACCELERATE_GRADIENT_ACCUMULATION_STEPS); leave them out there, and use --grad-accum-steps"
        )
    if mixed_precision is None and os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp8":
        raise UserError(
            "accelerate: its configuration asks for fp8, which replaces the model's layers, and the exported weights have to "
            "fit timm's; use --mixed-precision bf16"
        )


@contextlib.contextmanager
def explained_errors(kept: Callable[[], str]) -> Iterator[None]:
    """A context that raises a one-line error for a failure that the machine or the options caused; `kept` as in `explained`."""
    try:
        yield
    except (RuntimeError, ValueError, ConnectionError, EOFError) as error:
        explanation = None if isinstance(error, UserError) else explained(error, kept())
        if explanation is None:
            raise
        raise explanation from error


def precision(config: RunConfig) -> str | None:
    """Returns Accelerate's name of the precision; ``amp`` is fp16, or bf16 on the CPU."""
    if config.model.low_precision:
        return "no"
    if config.engine.mixed_precision != "amp":
        return config.engine.mixed_precision
    return "bf16" if config.engine.device == "cpu" or not torch.accelerator.is_available() else "fp16"


def make_accelerator(config: RunConfig) -> Accelerator:
    """Returns Accelerate's object for devices, processes and precision.

    Raises UserError if the device does not support the precision, a tracker is not installed, or `check_environment` does.
    """
    engine, trackers = config.engine, chosen(config.engine.report_to)
    check_environment(engine.mixed_precision)
    # Without `cpu`, Accelerate treats each of torchrun's processes on a machine without a GPU as the only one.
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    cpu = engine.device == "cpu" or (several and not torch.accelerator.is_available())
    if cpu and several:
        join_restarted_cpu_processes()
    _choose_device(engine.device, several)
    kind = precision(config)
    if engine.mixed_precision == "amp" and kind == "bf16" and os.environ.get("RANK", "0") == "0":
        logger.info("note: --amp is bf16 here, because the run is on the CPU")
    try:
        compiled = TorchDynamoPlugin(engine.torchcompile, engine.torchcompile_mode) if engine.torchcompile else None
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=kind,
            dynamo_plugin=compiled,
            log_with=trackers or None,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=engine.ddp_bb)],
            project_config=ProjectConfiguration(logging_dir="."),  # `Trackers` sets the run's folder later
        )
    except (ValueError, ImportError) as error:
        if "already been initialized" in str(error):
            raise UserError(
                f"mixed-precision: this Python process has trained at another precision than {engine.mixed_precision!r}, "
                "and accelerate keeps the first one; use a new process, or the same precision"
            ) from error
        if "backend" in str(error).lower():
            raise UserError(f"torchcompile: {error}; inductor is the usual backend") from error
        raise UserError(
            f"mixed-precision: {error}; --mixed-precision no always works, bf16 works on CPUs and recent GPUs"
        ) from error
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # Accelerate would silently continue in float32.
        raise UserError("mixed-precision: fp16 needs a GPU and this run is on the CPU; use bf16 or no")
    return accelerator


def _choose_device(name: str | None, several: bool) -> None:
    """Makes Accelerate take the device that ``--device`` names, or raises UserError; of several processes, each has its own."""
    kind, _, index = (name or "cpu").partition(":")
    if kind == "cpu":
        return
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if here is None or here.type != kind:
        raise UserError(f"device: expected {'cpu' if here is None else f'cpu or {here.type}'}, which this machine has; got "
                        f"{name!r}; leave the option out for the best one")  # fmt: skip
    if index and int(index) >= torch.accelerator.device_count():
        raise UserError(f"device: this machine has {torch.accelerator.device_count()} of {kind}, counted from 0; got {name!r}")
    if index and several and os.environ.get("RANK", "0") == "0":
        logger.info(f"note: --device {name} has no number here: each process has a device of its own")
    elif index:
        torch.accelerator.set_device_index(int(index))


def _worker_error(error: Exception) -> Exception:
    """Returns torch's own error for a dead loading process in place of the broken pipe.

    torch raises it from a signal handler, sometimes a moment later, so this function waits for it.
    """
    if not isinstance(error, (ConnectionError, EOFError)):
        return error
    try:
        time.sleep(2)
    except RuntimeError as worker_error:
        return worker_error
    return error
