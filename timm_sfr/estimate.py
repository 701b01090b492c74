"""What a run will take, in time and memory: measured before it begins on a few images of its own shape.

The steps are real but for the update: nothing that training goes on from is changed by them (`untouched`), and no
process waits for another in them. What is estimated:

    epoch = steps * (step + update / accumulated + loading) + validation + writing
    peak  = what is held now + gradients + the optimizer's state + batch * what an image keeps for its backward pass
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from timm.task import ClassificationTask
from torch import nn

from timm_sfr.advice import advice, circumstances
from timm_sfr.distill import FeatureTask, LogitTask, TokenTask
from timm_sfr.measure import cores, measure, states
from timm_sfr.method.task import SFRTask
from timm_sfr.progress import VALIDATION
from timm_sfr.utils.console import clock

if TYPE_CHECKING:
    from timm_sfr.engine import Trainer

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
