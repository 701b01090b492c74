"""What a run will take, in time and memory: measured before it begins on a few images of its own shape.

The steps are real but for the update: nothing that training goes on from is changed by them (`untouched`), and no
process waits for another in them. What is estimated:

    epoch = steps * (step + update / accumulated + loading) + validation + writing
    peak  = what is held now + gradients + the optimizer's state + batch * what an image keeps for its backward pass
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.data import DataLoader

from timm_sfr.config import RunConfig
from timm_sfr.method.smoothing import default_warmup
from timm_sfr.method.task import SFRTask
from timm_sfr.training.progress import VALIDATION
from timm_sfr.training.tasks import FeatureTask, LogitTask, TokenTask
from timm_sfr.utils.console import clock
from timm_sfr.utils.seeding import random_state_kept

if TYPE_CHECKING:
    from timm_sfr.training.trainer import Trainer

KNOWN = (SFRTask, ClassificationTask, LogitTask, TokenTask, FeatureTask)
WRITTEN = 150e6  # bytes a second in which checkpoints are written, flushed and hashed


@dataclass(frozen=True)
class Estimate:
    """What a run will take."""

    parameters: int
    images: int
    updates: int
    epochs: int
    seconds: float | None = None
    memory: float | None = None
    model_rate: float | None = None  # images a second, of one process
    loading_rate: float | None = None
    gpu: bool = False

    def __str__(self) -> str:
        text = (
            f"estimate: {self.parameters / 1e6:.2f} M parameters, {self.images} images, {self.updates} updates in "
            f"{self.epochs} epoch{'s' if self.epochs > 1 else ''}"
        )
        if self.seconds is None or self.memory is None:
            return f"{text}; time and memory are not measured for this kind of run"
        each = self.seconds / max(1, self.epochs)
        pace = f"{each:.1f} s" if each < 60 else clock(each)
        held = f"{self.memory / 2**30:.1f} GiB" if self.memory >= 2**30 else f"{self.memory / 2**20:.0f} MiB"
        return f"{text}; about {clock(self.seconds)} ({pace} an epoch) and {held} of {'GPU ' if self.gpu else ''}memory"

    @property
    def slow_loading(self) -> str | None:
        """A note where the images come much slower than the model takes them."""
        if self.model_rate is None or self.loading_rate is None or self.loading_rate > 0.7 * self.model_rate:
            return None
        return (f"note: loading gives about {self.loading_rate:.0f} images/s and the model takes {self.model_rate:.0f}: more "
                "--workers, images stored smaller, or --cache-dataset would help")  # fmt: skip


def estimate(trainer: Trainer) -> Estimate:
    """What is left of a run: counts, and time and memory where they can be measured without changing the training.

    All processes come here and none waits for another. Where something fails here, the training will say what.
    """
    config, steps = trainer.config, len(trainer.batches)
    epochs = trainer.schedule.epochs - trainer.start_epoch
    updates = trainer.updates_before(trainer.schedule.epochs, 0) - trainer.updates
    parameters = sum(parameter.numel() for parameter in trainer.exported_model().parameters())
    counts = Estimate(parameters, steps * trainer.global_batch, updates, epochs)
    several = trainer.accelerator.num_processes > 1
    # Tasks that are not ours may hold more than their buffers; synchronised BatchNorm would wait for the others; and a
    # compiled teacher would be compiled for these shapes too.
    waits = several and any(isinstance(module, nn.SyncBatchNorm) for module in trainer.task.modules())
    compiled = config.teacher.model_name is not None and config.engine.torchcompile is not None
    if type(trainer.task) not in KNOWN or waits or compiled:
        return counts
    batches = epochs * steps - trainer.start_step
    try:
        found = measure(trainer, batches)
    except (RuntimeError, ValueError, OSError) as error:  # the training will say what it is, in its own words
        if isinstance(error, torch.OutOfMemoryError):  # compiled, a step may take less than this one did
            error.__traceback__ = None  # whose frames hold what was computed
            torch.cuda.empty_cache()
        return counts
    size, workers = config.data.batch_size, config.data.workers
    cpu = trainer.accelerator.device.type == "cpu"
    own = max(1, cores() // trainer.accelerator.num_processes)
    waiting = rate = 0.0
    if found.sample is not None:
        loaders = min(workers, own) if workers > 0 else 1
        rate = loaders / found.sample
        # Without loading processes the model waits; on a CPU they may have to share the cores with it.
        loading = size * found.sample / loaders
        shared = workers == 0 or (cpu and torch.get_num_threads() >= own)
        waiting = loading if shared else max(0.0, loading - found.step)
    batch = found.step + waiting + found.update / config.optim.grad_accum_steps
    validations = epochs / config.engine.val_interval
    per_image = (VALIDATION * found.step + waiting) / size
    scored = validations * per_image * _images(trainer.val_loader) / trainer.accelerator.num_processes
    copies = 2 + states(config.optim.opt) + (trainer.task.has_ema())
    writing = epochs * (0.03 + 4 * parameters * copies / WRITTEN)
    return Estimate(
        *(counts.parameters, counts.images, counts.updates, counts.epochs),
        seconds=batches * batch + scored + writing,
        memory=found.memory,
        model_rate=size / found.step,
        loading_rate=rate or None,
        gpu=not cpu,
    )


def foresee(trainer: Trainer) -> None:
    """Says what looks wrong in the options, and what the run will take."""
    say = trainer.workspace.say
    for line in advice(trainer.config, circumstances(trainer, cores())):
        say(line)
    found = estimate(trainer)
    say(str(found), "estimate", **asdict(found))
    if found.slow_loading:
        say(found.slow_loading)


def _images(loader: Any) -> int:
    """How many images a loader of validation gives; 0 where that is not known."""
    dataset = getattr(loader, "dataset", None)
    return len(dataset) if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") else 0


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


# Optimizers by what their names hold, first match: the usual rate at a batch of 256, how it moves with the batch (the power),
# and by which factor it may be lower or higher without a word. SGD: Goyal et al., arXiv 1706.02677; the adaptive ones: the
# recipes of timm's and of the papers' (AdamW 5e-4 to 1e-3, LAMB 5e-3, Lion a tenth of AdamW's, RMSprop 0.016).
RATES = {
    "lamb": (5e-3, 0.5, 1000, 20),
    "lion": (1e-4, 0.5, 1000, 20),
    "rmsprop": (1.6e-2, 0.5, 5000, 20),
    "ada": (1e-3, 0.5, 1000, 20),
    "sgd": (0.1, 1.0, 2000, 30),
    "momentum": (0.1, 1.0, 2000, 30),
    "nesterov": (0.1, 1.0, 2000, 30),
}


UNKNOWN = ("adagrad", "adadelta", "adafactor")  # theirs are of another kind


FAR = 1.8  # times the size of the pretrained weights, or less than a part


FEW = 32  # images: below, the rate is not usually lowered any more


SMALL = 64  # pixels: below this there are architectures of our own


@dataclass(frozen=True)
class Circumstances:
    """What a run is besides its options.

    Attributes:
        model: The model.
        images: Training images; None for a stream that does not say.
        global_batch: Images of an update, on all processes.
        lr: The rate after warm-up.
        epochs: Of the schedule.
        cores: That this process may use.
        processes: On this machine.
    """

    model: nn.Module
    images: int | None
    global_batch: int
    lr: float
    epochs: int
    cores: int
    processes: int = 1


def advice(config: RunConfig, run: Circumstances) -> list[str]:
    """The lines, none for a run where nothing looks wrong; `config` as it is resolved."""
    found = [
        _size(config, run),
        _reduction(config, run),
        _batch(run),
        _rate(config, run),
        _warmup(config, run),
        *_odd(config, run),
    ]
    return [f"warning: {line}" for line in found if line]


def _size(config: RunConfig, run: Circumstances) -> str | None:
    """Pretrained weights see objects at the scale that they were trained at."""
    own, size = (getattr(run.model, "pretrained_cfg", None) or {}).get("input_size"), config.model.img_size
    if not config.model.pretrained or not own or size is None or own[-1] / FAR < size < own[-1] * FAR:
        return None
    return (f"img-size: {size} px is far from the {own[-1]} px that the pretrained weights of {config.model.model} were trained "
            f"at; --img-size {own[-1]}, or near it, makes use of them")  # fmt: skip


def _reduction(config: RunConfig, run: Circumstances) -> str | None:
    """Stems made for 224 pixels leave nothing of small images."""
    size, end = config.model.img_size, total_reduction(run.model)
    if size is None or end is None or size > SMALL or size // end[0] > (2 if end[1] else 1):
        return None
    grid = max(1, size // end[0])
    return (f"model: images of {size} px end as {grid}x{grid} in {config.model.model}, which divides them by {end[0]}: it is "
            f"made for larger ones; for small images take --model {_instead(config.model.model or '')}")  # fmt: skip


def total_reduction(model: nn.Module) -> tuple[int, bool] | None:
    """By what a timm model divides its images, and whether it does so at once (ViT, mixers); None where it does not say."""
    info = getattr(model, "feature_info", None)
    info = getattr(info, "info", info)
    if not isinstance(info, (list, tuple)) or not info or not all(isinstance(one, dict) for one in info):
        return None
    reductions = [int(one.get("reduction") or 0) for one in info]
    return (max(reductions), min(reductions) == max(reductions)) if min(reductions) > 0 else None


def _instead(name: str) -> str:
    if name.startswith(("mobile", "efficient", "mnas", "tiny", "lcnet")):
        return "mobilenetv2_cifar or resnet20_cifar"
    wide = "wrn_16_2_cifar" if name.startswith(("wide", "wrn")) else "resnet56_cifar"
    return f"resnet18_cifar (11 M parameters), {wide} or resnet20_cifar (0.3 M)"


def _batch(run: Circumstances) -> str | None:
    if run.images is None or run.global_batch <= run.images:
        return None
    return (f"batch-size: an update would take {run.global_batch} images and the training split has {run.images}; lower "
            "--batch-size or --grad-accum-steps")  # fmt: skip


def usual_rate(opt: str, batch: int, momentum: float = 0.9) -> tuple[float, float, float] | None:
    """The usual learning rate of an optimizer at a batch, and the lowest and highest that pass; None where none is usual."""
    name = opt.lower()
    if any(word in name for word in UNKNOWN):
        return None
    for word, (rate, power, below, above) in RATES.items():
        if word in name:
            if word == "sgd":
                rate *= (1 - momentum) / 0.1  # a step is 1 / (1 - momentum) gradients long in the end
            rate *= (max(batch, FEW) / 256) ** power
            return rate, rate / below, rate * above
    return None


def _rate(config: RunConfig, run: Circumstances) -> str | None:
    optim = config.optim
    usual = usual_rate(optim.opt, run.global_batch, min(optim.momentum, 0.99))
    if usual is None or run.lr == 0 or usual[1] <= run.lr <= usual[2]:
        return None
    far, end = ("above", "may well diverge") if run.lr > usual[2] else ("below", "will learn very little")
    return (f"lr: {run.lr:.2g} is far {far} what {optim.opt} usually takes at {run.global_batch} images an update, about "
            f"{usual[0]:.1g}; the run {end}; give --lr {usual[0]:.1g}")  # fmt: skip


def _warmup(config: RunConfig, run: Circumstances) -> str | None:
    optim, sfr = config.optim, config.sfr
    if optim.sched != "none" and not optim.warmup_prefix and (optim.warmup_epochs or 0) >= run.epochs:
        return (f"warmup-epochs: {optim.warmup_epochs} of {run.epochs} epochs: the learning rate never gets to {run.lr:.2g}; "
                f"--warmup-epochs {default_warmup(run.epochs)} is usual")  # fmt: skip
    if sfr.enabled and sfr.weight > 0 and (sfr.warmup_epochs or 0) >= run.epochs:
        return (f"sfr-warmup-epochs: {sfr.warmup_epochs} of {run.epochs} epochs: lambda never gets to {sfr.weight:g}; "
                f"--sfr-warmup-epochs {default_warmup(run.epochs)} is usual")  # fmt: skip
    return None


def _odd(config: RunConfig, run: Circumstances) -> list[str | None]:
    """Values that are taken without a word and do something else than they say."""
    crop, decay, workers = config.model.crop_pct, config.optim.layer_decay, config.data.workers * run.processes
    found: list[str | None] = []
    if crop is not None and not 0 < crop <= 1:
        found.append(f"crop-pct: expected a share above 0 and up to 1; got {crop:g}, which timm takes in a way of its own "
                     "(0 as 0.875); leave it out for the model's")  # fmt: skip
    if decay is not None and not 0 < decay <= 1:
        found.append(f"layer-decay: expected above 0 and up to 1, usually 0.5 to 0.9; with {decay:g} the layers next to the "
                     "images would learn fastest, or not at all")  # fmt: skip
    if workers > run.cores:
        found.append(f"workers: {workers} loading processes for {run.cores} core{'s' if run.cores > 1 else ''}; "
                     f"--workers {max(1, run.cores // run.processes)} is enough")  # fmt: skip
    sfr = config.sfr
    if sfr.enabled and sfr.weight > 0 and sfr.solver != "auto" and sfr.matching != "emd":
        found.append(f"sfr-solver: {sfr.solver} solves the plans of --sfr-matching emd; with {sfr.matching} it has no effect")
    elif config.sfr.solver == "triton" and next(run.model.parameters()).device.type != "cuda":
        found.append("sfr-solver: triton runs on CUDA alone; sinkhorn, the same in PyTorch, takes its place here")
    return found


def circumstances(trainer: Any, cores: int) -> Circumstances:
    """Those of a trainer that is ready."""
    data, accelerator = trainer.batches, trainer.accelerator
    sampler = getattr(data, "sampler", None)
    return Circumstances(
        model=trainer.exported_model(),
        images=getattr(sampler, "count", trainer.config.data.train_num_samples),
        global_batch=trainer.global_batch * trainer.config.optim.grad_accum_steps,
        lr=trainer.config.optim.lr,
        epochs=trainer.schedule.epochs,
        cores=cores,
        processes=accelerator.num_processes,
    )
