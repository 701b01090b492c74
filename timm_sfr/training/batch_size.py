"""``--batch-size auto``: finds the largest power of two whose training step fits the device's memory."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import find_executable_batch_size

from timm_sfr.config import RunConfig
from timm_sfr.training.devices import CUBLAS_FULL
from timm_sfr.training.optimizer import create_optimizer
from timm_sfr.utils.errors import UserError
from timm_sfr.utils.seeding import random_state_kept

MOST = 4096  # images per process: no larger batch is tried
STEPS = 2  # the first makes the optimizer's state, the second needs room beside it


def power_of_two(number: int) -> int:
    """Returns the largest power of two that is at most `number`; 1 for a smaller number."""
    return 1 << max(0, number.bit_length() - 1)


def largest(step: Callable[[int], None], most: int) -> int:
    """Returns the largest power of two, `most` or smaller, for which ``step(size)`` does not run out of memory.

    Starts at `most` and halves, by Accelerate's `find_executable_batch_size`: it knows the errors of CUDA, ROCm, XPU, MPS and
    the CPU's allocator that mean too little memory, frees the cached blocks after each, and lets any other error pass. cuBLAS
    has an error of its own if its workspace does not fit, which Accelerate does not know.
    Raises UserError if not even one image fits.
    """
    first = power_of_two(most)
    halves = (first >> times for times in itertools.count(1))

    def attempt(batch_size: int) -> int:
        try:
            step(batch_size)
        except RuntimeError as error:
            if CUBLAS_FULL not in str(error):
                raise
            raise torch.OutOfMemoryError("CUDA out of memory.") from error
        return batch_size

    try:
        return find_executable_batch_size(attempt, first, lambda: next(halves))()
    except RuntimeError as error:
        if "reached zero" not in str(error):
            raise
        raise UserError(
            "batch-size: not even one image fits the device's memory; use a smaller --img-size or model, "
            "--grad-checkpointing, or --mixed-precision bf16"
        ) from error


def has_own_memory(device: torch.device) -> bool:
    """Returns whether the device has memory of its own to probe: on a CPU, the system would swap, or end the process."""
    return device.type != "cpu"


def probe_batch(config: RunConfig, accelerator: Any, task: Any, batch: Callable[[int], tuple[Any, Any]], most: int) -> int:
    """Returns the largest power of two, `most` or smaller, whose training step fits on every process's device.

    A step is forward, backward and update of the whole task, at the run's precision, on random images. The processes probe
    on their own, and agree on the smallest result. Weights, statistics, sums and random numbers are as before afterwards.
    Accelerate must not have wrapped the task yet. `batch` makes that many random images, and their targets, on the device.
    """
    with undone(task):
        found = largest(lambda size: _train(config, accelerator, task, batch, size), most)
    sizes = torch.tensor([found], device=accelerator.device)
    return int(accelerator.gather(sizes).min())


@contextlib.contextmanager
def undone(task: torch.nn.Module) -> Iterator[None]:
    """A context that restores the parameters, buffers and gradients of `task`, and all random numbers, at its end."""
    tensors = [*task.parameters(), *task.buffers()]
    kept = [tensor.detach().cpu().clone() for tensor in tensors]  # not on the device: it needs all its memory
    device = next(task.parameters()).device
    devices = [] if device.type == "cpu" else [device]
    try:
        with random_state_kept(), torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            yield
    finally:
        with torch.no_grad():
            for tensor, before in zip(tensors, kept, strict=True):
                tensor.copy_(before)
        for parameter in task.parameters():
            parameter.grad = None


def _train(config: RunConfig, accelerator: Any, task: Any, batch: Callable[[int], tuple[Any, Any]], size: int) -> None:
    """Makes `STEPS` training steps on batches of `size` random images."""
    module = task.trainable_module
    optimizer = create_optimizer(config.optim, module, lr=1e-3)
    # What training holds beside a step: the moving average, DDP's copy of the gradients, and the next batch.
    copies = int(config.optim.model_ema) + int(accelerator.num_processes > 1)
    held = {"copies": [[torch.empty_like(parameter) for parameter in module.parameters()] for _ in range(copies)]}
    task.train()
    for _ in range(STEPS):
        images, target = batch(size)
        held["next"] = torch.empty_like(images)
        with accelerator.autocast():
            loss = task(images, target)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
