"""The options of a teacher: timm's of knowledge distillation, under its names, with its defaults and meanings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from timm_sfr.utils.errors import UserError
from timm_sfr.utils.options import Checked, option, outside_name


def in_words(distill_type: str, token_distill_type: str) -> tuple[str, bool]:
    """A kind of distillation in words, and whether it has a temperature."""
    kind = f"{token_distill_type} token" if distill_type == "token" else distill_type
    return kind, kind not in ("hard token", "feature")


@dataclass(frozen=True)
class KDConfig(Checked):
    """A teacher beside SFR (with --no-sfr: alone), as timm's knowledge distillation has it."""

    prefix: ClassVar[str] = "kd_"

    model_name: str | None = option(
        None, "the teacher: a run's folder, hf-hub:USER/NAME, a zoo name, or any timm name, of the same classes"
    )
    distill_type: str = option(
        "logit",
        "what is distilled: the logits, the features before the classifier, or the logits into the distillation head of a "
        "student that has one (deit_*_distilled_*)",
        choices=("logit", "feature", "token"),
    )
    loss_type: str = option("kl", "loss of logit distillation", choices=("kl",))
    distill_loss_weight: float | None = option(
        None,
        "weight of the distillation loss (default: 1; where only --task-loss-weight is given, 1 minus that)",
        name="distill_loss_weight",
    )
    task_loss_weight: float | None = option(
        None, "weight of the classification loss (default: 1)", name="task_loss_weight"
    )
    temperature: float = option(4.0, "temperature of the softmax in distillation")
    token_distill_type: str = option(
        "soft",
        "token distillation: KL divergence, or cross-entropy with the teacher's argmax",
        choices=("soft", "hard"),
    )

    student_feature_dim: int | None = option(None, "width of the student's features (default: measured)")
    teacher_feature_dim: int | None = option(None, "width of the teacher's features (default: measured)")

    def check(self) -> None:
        """Nothing without a teacher; weights non-negative, the temperature positive."""
        changed = [outside_name(item, self.prefix) for item in dataclasses.fields(self)
                   if getattr(self, item.name) != item.default]  # fmt: skip
        if self.model_name is None and changed:
            raise UserError(
                f"{changed[0].replace('_', '-')}: it is for a teacher, and there is none; give --kd-model-name too"
            )
        if self.model_name is not None and not self.model_name.strip():
            raise UserError("kd-model-name: expected the name or the folder of a teacher; got an empty word")
        self.at_least(1, "student_feature_dim", "teacher_feature_dim")
        self.at_least(0, "distill_loss_weight", "task_loss_weight")
        if not self.temperature > 0:
            raise UserError(f"kd-temperature: expected more than 0; got {self.temperature}")
        if self.distill_loss_weight is None and (self.task_loss_weight or 0) > 1:
            raise UserError(
                f"task-loss-weight: alone it leaves 1 minus itself to the distillation, and {self.task_loss_weight:g} leaves "
                "less than nothing; expected at most 1, or --distill-loss-weight too"
            )
        if self.token_distill_type != "soft" and self.distill_type != "token":
            raise UserError("kd-token-distill-type: it is for --kd-distill-type token")
        if self.distill_type != "feature" and {self.student_feature_dim, self.teacher_feature_dim} != {None}:
            raise UserError("kd-student-feature-dim and kd-teacher-feature-dim: they are for --kd-distill-type feature")
