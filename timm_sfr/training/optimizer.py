"""The optimizer and the learning-rate schedule of a run, made by timm's factories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import PlateauLRScheduler, create_scheduler_v2
from torch import nn

from timm_sfr.config import OptimConfig
from timm_sfr.method.smoothing import default_warmup
from timm_sfr.utils.errors import UserError, near_matches


def learning_rate(config: OptimConfig, global_batch: float) -> float:
    """Returns lr if it is set; else lr_base scaled with the global batch, as timm does.

    The scale is linear, or by default the square root for adaptive optimizers.
    """
    if config.lr is not None:
        return config.lr
    adaptive = any(part in config.opt.lower() for part in ("ada", "lamb"))
    ratio = global_batch / config.lr_base_size
    return config.lr_base * (
        ratio**0.5 if (config.lr_base_scale or ("sqrt" if adaptive else "linear")) == "sqrt" else ratio
    )


def create_optimizer(config: OptimConfig, module: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Returns timm's optimizer for the parameters of `module`.

    Raises:
        UserError: if timm does not accept the name or the arguments.
    """
    arguments: dict[str, Any] = dict(config.opt_kwargs or {})
    if config.opt_eps is not None:
        arguments["eps"] = config.opt_eps
    if config.opt_betas is not None:
        arguments["betas"] = config.opt_betas
    try:
        return create_optimizer_v2(
            module,
            opt=config.opt,
            lr=lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            layer_decay=config.layer_decay,
            layer_decay_min_scale=config.layer_decay_min_scale,
            layer_decay_no_opt_scale=config.layer_decay_no_opt_scale,
            **arguments,
        )
    except (ValueError, AssertionError, TypeError, KeyError) as error:
        hint = near_matches(config.opt, list_optimizers())
        raise UserError(f"opt: timm cannot make the optimizer {config.opt!r}: {error}{hint}") from error


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
        """Returns the state for a checkpoint, with what timm's own state omits: counters, and the rates without noise.

        None if not needed.
        """
        if not self.remembers:
            return None
        return {**self.scheduler.lr_scheduler.state_dict(), "restore_lr": self.scheduler.restore_lr}

    def resume(self, epoch: int, updates: int, state: dict[str, Any] | None) -> None:
        """Sets the rate that follows `updates` updates and `epoch` epochs.

        timm's schedules depend on these counts only, so a resumed run may get more epochs. Plateau also needs its
        `state`.
        """
        if self.remembers and state is not None:
            self.scheduler.restore_lr = state.get("restore_lr")
            self.scheduler.lr_scheduler.load_state_dict({key: state[key] for key in state if key != "restore_lr"})
        elif self.scheduler is not None:
            # At the very start, an uninterrupted run has not stepped yet, and its rate has no noise.
            if epoch > 0:
                self.scheduler.step(epoch)
            if updates > 0:
                self.scheduler.step_update(num_updates=updates)

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

    Noise on the rate depends on `seed` and on the number of the update or epoch.

    Raises:
        UserError: if timm does not have the schedule or cannot make it.
    """
    warmup = default_warmup(config.epochs) if config.warmup_epochs is None else config.warmup_epochs
    try:
        scheduler, epochs = create_scheduler_v2(
            optimizer,
            sched=config.sched,
            num_epochs=config.epochs,
            warmup_epochs=warmup,
            warmup_lr=config.warmup_lr,
            warmup_prefix=config.warmup_prefix,
            min_lr=config.min_lr,
            cooldown_epochs=config.cooldown_epochs,
            decay_epochs=config.decay_epochs,
            decay_milestones=list(config.decay_milestones),
            decay_rate=config.decay_rate,
            patience_epochs=config.patience_epochs,
            noise=config.lr_noise,
            noise_pct=config.lr_noise_pct,
            noise_std=config.lr_noise_std,
            noise_seed=seed,
            cycle_mul=config.lr_cycle_mul,
            cycle_decay=config.lr_cycle_decay,
            cycle_limit=config.lr_cycle_limit,
            k_decay=config.lr_k_decay,
            decay_fn=config.lr_decay_fn,
            stable_timescale=config.lr_stable_timescale,
            plateau_mode="min" if eval_metric == "loss" else "max",
            step_on_epochs=not config.sched_on_updates or config.sched == "plateau",
            updates_per_epoch=updates_per_epoch,
        )
    except (ValueError, AssertionError) as error:
        raise UserError(f"sched: timm cannot make the schedule {config.sched!r}: {error}") from error
    return Schedule(scheduler, epochs)
