"""The optimizer and the learning-rate schedule of a run, made by timm's factories."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import PlateauLRScheduler, create_scheduler_v2, scheduler_kwargs
from torch import nn

from timm_sfr.config import OptimConfig
from timm_sfr.method.smoothing import warmup_epochs
from timm_sfr.method.tapped_model import TappedModel
from timm_sfr.utils.errors import UserError, near_matches

# What a plateau knows of the scores so far.
PLATEAU = {"best", "num_bad_epochs", "cooldown_counter", "last_epoch", "_last_lr"}


def learning_rate(config: OptimConfig, global_batch: float) -> float:
    """Returns lr if it is set and not 0; else lr_base times the share of the global batch, or its root, as in timm."""
    if config.lr:  # 0 stands for lr_base too, as in timm
        return config.lr
    adaptive = any(part in config.opt.lower() for part in ("ada", "lamb"))
    scale = config.lr_base_scale or ("sqrt" if adaptive else "linear")
    ratio = global_batch / config.lr_base_size
    return config.lr_base * (ratio**0.5 if scale == "sqrt" else ratio)


def create_optimizer(config: OptimConfig, module: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Returns timm's optimizer for the parameters of `module`.

    Raises UserError if timm does not accept the name or the arguments, or if it needs second derivatives.
    """
    arguments, further = {**optimizer_kwargs(config), "lr": lr}, dict(config.opt_kwargs or {})
    for name in {"eps", "betas"} & arguments.keys():  # --opt-eps and --opt-betas win
        further.pop(name, None)
    patterns = further.get("fallback_list")
    if isinstance(patterns, str):  # timm would take its letters for patterns
        further["fallback_list"] = patterns = [patterns]
    if patterns and isinstance(module, TappedModel):
        further["fallback_list"] = module.names_here(patterns)
    try:
        optimizer = create_optimizer_v2(module, **arguments, **further)
    except (ValueError, AssertionError, TypeError, KeyError) as error:
        known = list_optimizers()
        hint = "" if config.opt.lower() in known else near_matches(config.opt, known)
        raise UserError(f"opt: timm cannot make the optimizer {config.opt!r}: {error}{hint}") from error
    if getattr(optimizer, "is_second_order", False):
        raise UserError(
            f"opt: {config.opt!r} needs second derivatives, which are not computed here; choose another, such as adamw"
        )
    return optimizer


def base_rate(groups: list[dict[str, Any]]) -> float:
    """Returns the learning rate of an optimizer's groups, without the factor of a layer (``--layer-decay``)."""
    return groups[0]["lr"] / groups[0].get("lr_scale", 1.0)


@dataclass(frozen=True)
class Schedule:
    """timm's scheduler, stepped once per update on any number of processes. Accelerate must not `prepare` it."""

    scheduler: Any
    epochs: int

    @property
    def remembers(self) -> bool:
        """Whether the rate depends on the scores so far (plateau) and not only on the number of updates and epochs."""
        return isinstance(self.scheduler, PlateauLRScheduler)

    def state(self) -> dict[str, Any] | None:
        """Returns the state for a checkpoint, None if not needed: with the counters and the rates that timm's own omits."""
        if not self.remembers:
            return None
        return {**self.scheduler.lr_scheduler.state_dict(), "restore_lr": self.scheduler.restore_lr}

    def resume(self, epoch: int, updates: int, state: dict[str, Any] | None, own_rate: bool = True) -> None:
        """Sets the rate that follows `updates` updates and `epoch` epochs.

        timm's schedules depend on these counts only, so a resumed run may get more epochs. Plateau also needs its `state`, and
        the optimizer's saved rate unless it has its `own_rate`, that of the options.
        """
        if self.remembers and not own_rate:
            self.scheduler.restore_lr = None if state is None else state.get("restore_lr")
        elif self.scheduler is not None:
            # At the very start, an uninterrupted run has not stepped yet, and its rate has no noise.
            if epoch > 0:
                if self.remembers:  # it sets the rate in its warm-up only
                    self.scheduler.update_groups(self.scheduler.base_values)
                self.scheduler.step(epoch)
            if updates > 0:
                self.scheduler.step_update(num_updates=updates)
        if self.remembers and state is not None:
            # Its patience, factor and bounds are those of the options, which may have changed.
            self.scheduler.lr_scheduler.load_state_dict({key: state[key] for key in PLATEAU & state.keys()})

    def after_update(self, updates: int) -> None:
        """Sets the rate that follows `updates` updates."""
        if self.scheduler is not None:
            self.scheduler.step_update(num_updates=updates)

    def after_epoch(self, epoch: int, metric: float | None) -> None:
        """Sets the rate that follows epoch `epoch`; plateau uses `metric`."""
        if self.scheduler is not None:
            self.scheduler.step(epoch + 1, metric)


def create_schedule(
    config: OptimConfig,
    optimizer: torch.optim.Optimizer,
    updates_per_epoch: int,
    eval_metric: str = "top1",
    seed: int = 42,
) -> Schedule:
    """Returns timm's schedule for `optimizer`, with its number of epochs (including cooldown and cycles).

    Noise on the rate depends on `seed` and on the number of the update or epoch. Raises UserError if timm does not have the
    schedule or cannot make it.
    """
    arguments = {
        **scheduler_kwargs(config, decreasing_metric=eval_metric == "loss"),
        "warmup_epochs": warmup_epochs(config.epochs, config.warmup_epochs),
        "decay_milestones": list(config.decay_milestones),
        "noise_seed": seed,
        "step_on_epochs": not config.sched_on_updates or config.sched == "plateau",
        "updates_per_epoch": updates_per_epoch,
    }
    try:
        with warnings.catch_warnings():
            # timm warns that a resumed run forgets the plateau's scores. Our checkpoints have them.
            warnings.filterwarnings("ignore", "PlateauLRScheduler is deprecated", FutureWarning)
            scheduler, epochs = create_scheduler_v2(optimizer, **arguments)
    except (ValueError, AssertionError) as error:
        raise UserError(f"sched: timm cannot make the schedule {config.sched!r}: {error}") from error
    if scheduler is None:  # timm's schedules multiply by the layers' factors; without one, nothing else does
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
    return Schedule(scheduler, epochs)
