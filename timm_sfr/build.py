"""Makes the parts of a run from its configuration, all with timm's factories: model, task, optimizer, schedule, mixing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.data import Mixup, resolve_input_data_config
from timm.models import load_checkpoint, resolve_model_input_args
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import PlateauLRScheduler, create_scheduler_v2
from timm.task import ClassificationTask, TrainingTask
from torch import nn

from timm_sfr.distill import distillation_task
from timm_sfr.loader import Preprocessing
from timm_sfr.method.config import SFRConfig
from timm_sfr.method.probe import MISFITS
from timm_sfr.method.smoothing import DynamicLabelSmoothing, SmoothedLoss, default_warmup
from timm_sfr.method.task import SFRTask
from timm_sfr.pretrained import base_folder, check_dtypes
from timm_sfr.sections import AugConfig, ModelConfig, OptimConfig
from timm_sfr.teacher import Teacher
from timm_sfr.utils.errors import HubError, UserError, brief, near_matches, near_paths

DEFAULT_MODEL = "resnet18"


def create_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """The timm model with `num_classes` outputs at the configured input.

    Raises:
        UserError: for a name that timm lacks (with near matches), or arguments or weights that do not fit the model.
    """
    name = source = config.model or DEFAULT_MODEL
    plain = name.split(".")[0]
    folder = None
    if ":" in name or (not timm.is_model(plain) and Path(name).is_dir()):
        try:
            folder = base_folder(name, config.pretrained)
        except HubError as error:  # which would say that a finished run was not published
            raise UserError(str(error)) from error
        source = f"local-dir:{folder}"
    elif not timm.is_model(plain):
        hint = near_matches(plain, timm.list_models()) or "; timm.list_models() lists them"
        raise UserError(f"model: timm has no model {name!r}{hint}")
    arguments = {"drop_rate": config.drop, "drop_path_rate": config.drop_path, **(config.model_kwargs or {})}
    request = {"img_size": config.img_size, "in_chans": config.in_chans}
    try:
        model = timm.create_model(
            pretrained=config.pretrained,
            **resolve_model_input_args(source, request, num_classes=num_classes, **arguments),
        )
        if folder is not None and config.pretrained:
            check_dtypes(folder, model, name)
        if config.initial_checkpoint:
            _load(model, config.initial_checkpoint)
        if config.grad_checkpointing:
            model.set_grad_checkpointing(True)
    except UserError:
        raise
    except (*MISFITS, OSError, SafetensorError, UnpicklingError, EOFError) as error:
        raise UserError(f"model: cannot create {name!r}: {brief(error)}") from error
    if folder is not None and name.startswith(("hf-hub:", "hf_hub:")):
        model.pretrained_cfg["hf_hub_id"] = name.split(":", 1)[1]  # where the folder came from
    if getattr(model, "num_classes", 0) != num_classes:
        raise UserError(f"model: {name!r} has no classifier for {num_classes} classes")
    return model


def _load(model: nn.Module, path: str) -> None:
    """Loads a file of weights, by timm, and nothing but tensors out of it.

    Raises:
        UserError: if it is missing or holds anything else.
    """
    if not Path(path).is_file():
        raise UserError(f"initial-checkpoint: no such file: {path!r}{near_paths(path)}")
    try:
        load_checkpoint(model, path)
    except Exception as error:
        if not isinstance(error, UnpicklingError) and "weights_only" not in str(error):
            raise
        raise UserError(
            f"initial-checkpoint: {path!r} is no file of weights, or holds more than tensors, numbers and texts, and is not "
            "unpickled; convert it to safetensors where you trust it"
        ) from error


def preprocessing(config: ModelConfig, model: nn.Module) -> Preprocessing:
    """timm's data configuration for this model as it was made, with what the options override.

    Raises:
        UserError: for means or deviations that do not fit its channels.
    """
    names = ("in_chans", "img_size", "mean", "std", "interpolation", "crop_pct")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    try:
        resolved = resolve_input_data_config(model, given)
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"mean and std: expected one value, or one per channel; got {config.mean} and {config.std}"
        ) from error
    return Preprocessing(**{name: _tuple(resolved[name]) for name in Preprocessing.__dataclass_fields__})


def create_task(
    model: nn.Module,
    sfr: SFRConfig,
    input_size: tuple[int, int, int],
    device: torch.device,
    teacher: Teacher | None = None,
) -> TrainingTask:
    """An `SFRTask`, over timm's distillation task where there is a teacher; one of timm's own tasks where SFR is off.

    Raises:
        UserError: if the model cannot be tapped, or cannot be taught as the teacher's options say.
    """
    model, base = model.to(device), None
    if teacher is not None:
        classes = int(model.num_classes)
        dynamic = SmoothedLoss(DynamicLabelSmoothing(classes, *sfr.smoothing_form)) if sfr.enabled else None
        base = distillation_task(model, teacher, dynamic or PlainLoss(sfr.plain_smoothing), input_size, device)
    if sfr.enabled:
        return SFRTask(model, sfr, input_size=input_size, base=base, device=device, verbose=False)
    return base or ClassificationTask(model, PlainLoss(sfr.plain_smoothing), device=device, verbose=False)


class PlainLoss(nn.Module):
    """Cross-entropy with constant uniform smoothing, of class indices or mixtures: PyTorch's own, in float32."""

    def __init__(self, smoothing: float) -> None:
        super().__init__()
        self.smoothing = smoothing

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """A scalar from logits (B, K) and targets (B,) or (B, K)."""
        return nn.functional.cross_entropy(logits.float(), target, label_smoothing=self.smoothing)


def create_mixup(aug: AugConfig, num_classes: int) -> Mixup | None:
    """timm's mixup and CutMix, on batches on the device; smoothing is left to the loss."""
    if not aug.mixes:
        return None
    return Mixup(
        mixup_alpha=aug.mixup,
        cutmix_alpha=aug.cutmix,
        cutmix_minmax=aug.cutmix_minmax,
        prob=aug.mixup_prob,
        switch_prob=aug.mixup_switch_prob,
        mode=aug.mixup_mode,
        label_smoothing=0.0,
        num_classes=num_classes,
    )


def learning_rate(config: OptimConfig, global_batch: int) -> float:
    """lr, or lr_base scaled with the global batch: linearly, or by the square root for adaptive optimizers, as timm."""
    if config.lr is not None:
        return config.lr
    adaptive = any(part in config.opt.lower() for part in ("ada", "lamb"))
    ratio = global_batch / config.lr_base_size
    return config.lr_base * (
        ratio**0.5 if (config.lr_base_scale or ("sqrt" if adaptive else "linear")) == "sqrt" else ratio
    )


def create_optimizer(config: OptimConfig, module: nn.Module, lr: float) -> torch.optim.Optimizer:
    """timm's optimizer over the trainable module's parameters.

    Raises:
        UserError: for a name or arguments that timm does not take.
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
            **arguments,
        )
    except (ValueError, AssertionError, TypeError, KeyError) as error:
        hint = near_matches(config.opt, list_optimizers())
        raise UserError(f"opt: timm cannot make the optimizer {config.opt!r}: {error}{hint}") from error


@dataclass(frozen=True)
class Schedule:
    """timm's scheduler, stepped by hand: once per update whatever the number of processes (never `prepare` it)."""

    scheduler: Any
    epochs: int

    @property
    def remembers(self) -> bool:
        """Whether the rate depends on more than the count: on how the scores went (plateau)."""
        return isinstance(self.scheduler, PlateauLRScheduler)

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps: the counters that timm's own state leaves out too."""
        return self.scheduler.lr_scheduler.state_dict() if self.remembers else None

    def resume(self, epoch: int, updates: int, state: dict[str, Any] | None) -> None:
        """Sets the rate for the update after `updates` ones and `epoch` epochs.

        timm's schedules are functions of that count alone, so that a resumed run may be given more epochs; plateau
        is not, and takes its `state`.
        """
        if self.remembers and state is not None:
            self.scheduler.lr_scheduler.load_state_dict(state)
        elif self.scheduler is not None:
            self.scheduler.step(epoch)
            self.scheduler.step_update(num_updates=updates)

    def after_update(self, updates: int) -> None:
        """Sets the rate for the update after the first `updates` ones."""
        if self.scheduler is not None:
            self.scheduler.step_update(num_updates=updates)

    def after_epoch(self, epoch: int, metric: float | None) -> None:
        """Sets the rate for the epoch after epoch `epoch`; plateau looks at the metric."""
        if self.scheduler is not None:
            self.scheduler.step(epoch + 1, metric)


def create_schedule(
    config: OptimConfig, optimizer: torch.optim.Optimizer, updates_per_epoch: int, eval_metric: str = "top1"
) -> Schedule:
    """timm's schedule for `optimizer` and the number of epochs it takes (with cooldown and cycles).

    Raises:
        UserError: for a schedule that timm does not have or cannot make.
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
            plateau_mode="min" if eval_metric == "loss" else "max",
            step_on_epochs=not config.sched_on_updates or config.sched == "plateau",
            updates_per_epoch=updates_per_epoch,
        )
    except (ValueError, AssertionError) as error:
        raise UserError(f"sched: timm cannot make the schedule {config.sched!r}: {error}") from error
    return Schedule(scheduler, epochs)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
