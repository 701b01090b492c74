"""A few real steps of a run, timed and weighed before it begins, which leave all that it goes on from as it was."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.data import DataLoader

from timm_sfr.utils.seeding import random_state_kept

if TYPE_CHECKING:
    from timm_sfr.engine import Trainer

FEW = 4  # images of the first steps
SHARE, LEAST, MOST = 0.03, 0.2, 2.5  # of the run's time goes into the steps, at least and at most so many seconds
LATER = 128 * 2**20  # bytes that a process grows by besides: validation, writing, the report; found on five models
SAMPLES, LOADING = 32, 0.3  # samples that are loaded to time it, in at most so many seconds
STATES = {
    "sgd": 1,
    "nesterov": 1,
    "momentum": 1,
    "lion": 1,
    "lars": 1,
    "muon": 1,
    "rmsprop": 2,
}  # arrays a parameter; else 2


@dataclass(frozen=True)
class Measured:
    """What was measured on this process.

    Attributes:
        step: Seconds of a batch's forward and backward pass.
        update: Seconds of an update of the weights.
        sample: Seconds in which one loading process loads an image; None where that was not tried.
        memory: Bytes at the peak.
    """

    step: float
    update: float
    sample: float | None
    memory: float


def measure(trainer: Trainer, batches: int) -> Measured:
    """Times real steps on growing parts of a batch, as many as a small part of so many `batches` allows."""
    size, began = trainer.config.data.batch_size, time.perf_counter()
    _reset_peak(trainer.accelerator.device)
    with untouched(trainer):
        few = min(size, FEW)
        kept = _Kept(trainer.task)
        with kept:
            _step(trainer, few)
        small = _step(trainer, few)
        held = _held(trainer.accelerator.device)  # with what libraries load when first used
        budget = min(MOST, max(LEAST, SHARE * small / few * size * batches))
        part = min(size, int(budget / 3 / small * few))
        seconds, of = small, few
        if part > few:
            _reset_peak(trainer.accelerator.device)
            _step(trainer, part)  # the first of a shape prepares its kernels
            times = [_step(trainer, part)]
            while time.perf_counter() - began + times[0] < budget and len(times) < 5:
                times.append(_step(trainer, part))
            seconds, of = sorted(times)[len(times) // 2], part
        update = _update(trainer)
        sample = _loading(trainer)
    memory = _peak(trainer, held, kept.bytes / few, kept.largest / few, of)
    each = seconds / of
    if of > few:  # what a step takes whatever its size is not to be counted for every image
        each = min(each, max(0.5 * each, (seconds - small) / (of - few)))
    return Measured(seconds + each * (size - of), update, sample, memory)


@contextlib.contextmanager
def untouched(trainer: Trainer) -> Iterator[None]:
    """Puts back, whatever is run inside, all that training goes on from: statistics, class table, modes, random numbers.

    The task is without its wrapper inside, so that no process waits for another. Weights and gradients are for those
    inside to leave alone.
    """
    task, module = trainer.task, trainer.task.trainable_module
    buffers = [(owner, name, tensor, tensor.clone())
               for owner in task.modules() for name, tensor in owner._buffers.items() if tensor is not None]  # fmt: skip
    modes = [(owner, owner.training) for owner in task.modules()]
    devices = [trainer.accelerator.device] if trainer.accelerator.device.type == "cuda" else []
    with random_state_kept(), torch.random.fork_rng(devices):
        task.trainable_module = unwrap_model(module)
        task.train()
        try:
            yield
        finally:
            task.trainable_module = module
            with torch.no_grad():
                for owner, name, tensor, value in buffers:
                    owner._buffers[name] = tensor.copy_(value)
            for owner, mode in modes:
                owner.training = mode


class _Kept(saved_tensors_hooks):
    """Counts the bytes that a forward pass keeps for the backward pass, besides the weights."""

    def __init__(self, task: nn.Module) -> None:
        self.seen = {parameter.untyped_storage().data_ptr() for parameter in task.parameters()}
        self.alive: list[Tensor] = []  # else their places would be used again, and counted once
        self.bytes = self.largest = 0
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.alive.append(tensor.detach())
            self.bytes, self.largest = self.bytes + storage.nbytes(), max(self.largest, storage.nbytes())
        return tensor

    def __exit__(self, *_: Any) -> None:
        super().__exit__(*_)
        self.alive = []


def _step(trainer: Trainer, count: int) -> float:
    """Seconds of a forward and a backward pass over so many random images; no gradient is kept anywhere."""
    device, prep = trainer.accelerator.device, trainer.prep
    draw = torch.Generator().manual_seed(0)
    image = torch.randn(count, *prep.input_size, generator=draw).to(device)
    target = torch.randint(0, trainer.config.model.num_classes or 2, (count,), generator=draw).to(device)
    if trainer.config.model.channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    if trainer.mixup is not None:
        target = nn.functional.one_hot(target, trainer.config.model.num_classes or 2).float()
    parameters = [parameter for parameter in trainer.task.parameters() if parameter.requires_grad]
    _wait(device)
    began = time.perf_counter()
    loss = trainer.task(image, target)["loss"]
    # Not backward(): what wraps the module in training would take part in it, and wait for the other processes.
    torch.autograd.grad(loss, parameters, allow_unused=True)
    _wait(device)
    return time.perf_counter() - began


def _update(trainer: Trainer) -> float:
    """Seconds of an update: so many passes over the weights, one of which is timed."""
    optim = trainer.config.optim
    weights = [
        parameter.detach() for parameter in trainer.task.trainable_module.parameters() if parameter.requires_grad
    ]
    passes = (4 if states(optim.opt) == 1 else 9) + 1 + 2 * optim.model_ema + 2 * (optim.clip_grad is not None)
    _wait(trainer.accelerator.device)
    began = time.perf_counter()
    for weight in weights:
        weight.mul(0.5)
    _wait(trainer.accelerator.device)
    return passes * (time.perf_counter() - began)


def _loading(trainer: Trainer) -> float | None:
    """Seconds of loading a sample, where samples have numbers and none fails."""
    with contextlib.suppress(Exception):  # the training will meet it, and say what it is
        return _timed_loading(trainer)
    # The error's frames hold the loading process in a cycle; the training's own would inherit it, and complain at its end.
    gc.collect()
    return None


def _timed_loading(trainer: Trainer) -> float | None:
    """Seconds of loading a sample; a loading process tries it where training has such."""
    batches, data = trainer.batches, trainer.config.data
    samples, sampler = getattr(batches, "samples", None), getattr(batches, "sampler", None)
    if samples is None or sampler is None:
        return None
    keys = sampler.keys(trainer.start_epoch)[:SAMPLES]
    if data.workers == 0:
        samples[keys[0]]
        began, done = time.perf_counter(), 0
        while done < len(keys) and (done < 2 or time.perf_counter() - began < LOADING):
            samples.__getitems__(keys[done : done + 4])
            done += 4
        return (time.perf_counter() - began) / done
    # In a process of its own, as later: what a reader opens here, its children would share.
    loader = DataLoader(samples, 4, sampler=keys, num_workers=1, prefetch_factor=1, collate_fn=len,
                        worker_init_fn=trainer.batches.loader.worker_init_fn, generator=torch.Generator())  # fmt: skip
    loaded = iter(loader)
    next(loaded)
    began, done = time.perf_counter(), 0
    for count in loaded:
        done += count
        if time.perf_counter() - began > LOADING:
            break
    # One batch may have been on its way when the clock started.
    return (time.perf_counter() - began) / max(1, done) if done else None


def _peak(trainer: Trainer, held: float, kept: float, largest: float, count: int) -> float:
    """Bytes at the peak of a step: by what an image keeps, on a CPU; by the allocator's own count, on a GPU."""
    size, optim = trainer.config.data.batch_size, trainer.config.optim
    weights = sum(p.numel() * p.element_size() for p in trainer.task.trainable_module.parameters() if p.requires_grad)
    fixed = held + weights * (1 + states(optim.opt))
    if trainer.accelerator.device.type == "cuda":
        step = torch.cuda.max_memory_allocated(trainer.accelerator.device) - held - weights
        return fixed + max(0.0, step) * size / count
    image = math.prod(trainer.prep.input_size)
    return fixed + LATER + size * (kept + 2 * largest + 3 * 4 * image)


def states(name: str) -> int:
    """Arrays that an optimizer keeps for each of the weights."""
    return next((count for word, count in STATES.items() if word in name.lower()), 2)


def cores() -> int:
    """Cores that this process may use."""
    return len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else psutil.cpu_count() or 1


def _held(device: torch.device) -> float:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()
