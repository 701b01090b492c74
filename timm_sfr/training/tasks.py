"""The task of a run: `create_task` makes SFR's, timm's plain one, or timm's distillation from a `Teacher` with named terms.

With a teacher, L_cls  becomes  w_cls L_cls(z, y~) + w_kd L_kd

logit    L_kd = T^2 KL(softmax(z_teacher / T) || softmax(z / T)), mean over the batch
token    the same with the logits of the student's distillation head; hard: cross-entropy with argmax z_teacher
feature  L_kd = mean (W f - f_teacher)^2 over the features before the classifier; W where their widths differ, learned
"""

from __future__ import annotations

from typing import Any

import torch
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
from timm.utils import unwrap_model
from torch import Tensor, nn

from timm_sfr.method.classification import ClassificationLoss, flat_target, jsd_terms, soft_targets
from timm_sfr.method.config import LossForm, SFRConfig
from timm_sfr.method.probe import model_name
from timm_sfr.method.smoothing import DynamicLabelSmoothing, SmoothedLoss, smooth
from timm_sfr.method.task import EpochTask, SFRTask
from timm_sfr.models.teacher import PreLogits, Teacher
from timm_sfr.utils.errors import UserError


class PlainLoss(nn.Module):
    """The classification loss in float32 with constant uniform smoothing, for class indices or mixtures of classes.

    Args:
        smoothing: eps; the targets are (1 - eps) y + eps / K; of several labels, (1 - eps) y + eps / 2.
        form: The form of the loss; by default cross-entropy.
    """

    def __init__(self, smoothing: float, form: LossForm | None = None) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.criterion = ClassificationLoss(form or LossForm())
        self.splits = self.criterion.form.splits

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Returns a scalar for logits (B, K) and targets (B,) or (B, K)."""
        criterion = self.criterion
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            if not criterion.form.bce and criterion.class_weights is None:
                return nn.functional.cross_entropy(logits, target, label_smoothing=self.smoothing)
            classes = logits.shape[-1]
            uniform = logits.new_full((classes,), flat_target(classes, criterion.form))
            return criterion(logits, smooth(soft_targets(target, classes), self.smoothing, uniform), target)


class PlainTask(EpochTask, ClassificationTask):
    """timm's `ClassificationTask` as an `EpochTask`; if its loss has views, they add their JSD to that of the first view."""

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Returns the loss, the logits, and with views the terms of `jsd_terms`, for images (B, C, H, W)."""
        splits = getattr(self.criterion, "splits", 0)
        if not splits:
            return super().forward(input, target)
        logits = self.trainable_module(input)
        clean = len(logits) // splits
        terms = jsd_terms(self.criterion(logits[:clean], target[:clean]), logits, splits)
        return {"loss": terms["task_loss"], "output": logits, **terms}


class _Taught(EpochTask):
    """Gives timm's distillation tasks our names of the terms: loss = cls_weight * cls_loss + kd_weight * kd_loss."""

    task_loss_weight: float
    distill_loss_weight: float
    cls_weight: Tensor
    kd_weight: Tensor

    def weigh(self) -> TrainingTask:
        """Puts the weights that timm's task has resolved on the device, so that they need not be sent at every step."""
        for name, value in (("cls_weight", self.task_loss_weight), ("kd_weight", self.distill_loss_weight)):
            self.register_buffer(name, torch.tensor(float(value), device=self.device), persistent=False)
        return self

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Returns timm's loss, the logits, the raw terms and their weights, for images (B, C, H, W) and their targets."""
        result = super().forward(input, target)
        return {
            "loss": result["loss"],
            "output": result["output"],
            "task_loss": result["loss"],
            "cls_loss": result["task_loss"],
            "cls_weight": self.cls_weight,
            "kd_loss": result["kd_loss"] if "kd_loss" in result else result["distill_loss"],
            "kd_weight": self.kd_weight,
        }


class LogitTask(_Taught, LogitDistillationTask):
    """timm's `LogitDistillationTask` with named terms."""


class TokenTask(_Taught, TokenDistillationTask):
    """timm's `TokenDistillationTask` with named terms."""


class FeatureTask(_Taught, FeatureDistillationTask):
    """timm's `FeatureDistillationTask` with named terms."""

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """Returns the plain student, also if the trained module is compiled."""
        module = self.get_trainable_module(ema=ema) if module is None else module
        return None if module is None else unwrap_model(module).student


def create_task(
    model: nn.Module,
    sfr: SFRConfig,
    input_size: tuple[int, int, int],
    device: torch.device,
    teacher: Teacher | None = None,
    loss: LossForm | None = None,
) -> TrainingTask:
    """Returns an `SFRTask`, on top of timm's distillation task if there is a teacher; one of timm's tasks if SFR is off.

    Raises UserError if the model cannot be tapped, or does not support the teacher's type of distillation.
    """
    model, base = model.to(device), None
    criterion: nn.Module = PlainLoss(sfr.plain_smoothing, loss).to(device)
    if teacher is not None:
        if sfr.enabled:
            criterion = SmoothedLoss(DynamicLabelSmoothing(int(model.num_classes), *sfr.smoothing_form, loss))
        base = distillation_task(model, teacher, criterion, input_size, device)
    if sfr.enabled:
        return SFRTask(model, sfr, input_size=input_size, base=base, loss=loss, device=device, verbose=False)
    return base or PlainTask(model, criterion, device=device, verbose=False)


def distillation_task(
    model: nn.Module,
    teacher: Teacher,
    criterion: nn.Module,
    input_size: tuple[int, int, int],
    device: torch.device,
) -> TrainingTask:
    """Returns timm's distillation task for a student, with `criterion` as the loss on the labels.

    Raises UserError if the type of distillation needs a distillation head or features that a model does not have.
    """
    config = teacher.config
    kind: Any
    if config.distill_type == "feature":
        kind, options = FeatureTask, _widths(model, teacher, input_size)
    elif config.distill_type == "logit":
        kind, options = LogitTask, {"loss_type": config.loss_type, "temperature": config.temperature}
    elif hasattr(model, "set_distilled_training"):
        kind, options = TokenTask, {"distill_type": config.token_distill_type, "temperature": config.temperature}
    else:
        raise UserError(
            f"kd-distill-type: {model_name(model)} has no distillation head; use a student such as "
            "deit_tiny_distilled_patch16_224, or --kd-distill-type logit"
        )
    weights = {"task_loss_weight": config.task_loss_weight, "distill_loss_weight": config.distill_loss_weight}
    task = kind(model, teacher, criterion, **options, **weights, device=device, verbose=False)
    teacher.facts |= {name: getattr(task, name) for name in weights}
    return task.weigh()


def _widths(model: nn.Module, teacher: Teacher, input_size: tuple[int, int, int]) -> dict[str, int]:
    """Returns the measured feature widths of student and teacher; raises UserError if the options say otherwise."""
    found = {
        "student_feature_dim": PreLogits(model).width(input_size, "student"),
        "teacher_feature_dim": PreLogits(teacher.model).width(teacher.input_size, "teacher"),
    }
    for name, width in found.items():
        given = getattr(teacher.config, name)
        if given is not None and given != width:
            raise UserError(f"kd-{name.replace('_', '-')}: expected {width}, as measured; got {given}; leave the option out")
    return found
