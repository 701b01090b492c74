"""The options of SFR."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from timm_sfr.utils.errors import UserError
from timm_sfr.utils.options import Checked, option

# The names that the options take. Nothing here imports torch: the command line reads its options from this file.
CHANNEL_METHODS = ("groups", "transport", "projection")
MARGINALS = ("uniform", "cross")
SOLVERS = ("auto", "sinkhorn", "exact", "triton")
SOURCES = ("uniform", "classes")
SCHEDULES = ("constant", "ramp", "confidence")


@dataclass(frozen=True)
class LossForm:
    """The form of the classification loss L_cls; `timm_sfr.method.classification` has the formulas.

    Attributes:
        bce: Binary cross-entropy of each class, in place of cross-entropy.
        bce_sum: Sum it over the classes, in place of their mean.
        bce_target_thresh: Makes its targets 1 above this value, otherwise 0; None leaves them as they are.
        bce_pos_weight: Weight of its positive part; None is 1.
        splits: The number of views of each image in a batch, one view after the other, if their Jensen-Shannon divergence
            is a part of the loss; otherwise 0.
        class_weights: A weight for each class; None for equal ones.
        multi_label: Targets are dense, (B, K) from 0 to 1: an image may have any number of classes, each a decision of its
            own by binary cross-entropy.

    Raises:
        UserError: if the values contradict each other.
    """

    bce: bool = False
    bce_sum: bool = False
    bce_target_thresh: float | None = None
    bce_pos_weight: float | None = None
    splits: int = 0
    class_weights: tuple[float, ...] | None = None
    multi_label: bool = False

    def __post_init__(self) -> None:
        if not self.bce and (self.bce_sum, self.bce_target_thresh, self.bce_pos_weight) != (False, None, None):
            raise UserError("bce: it is off, and options of it are given; expected bce=True")
        if self.bce_pos_weight is not None and not 0 < self.bce_pos_weight < math.inf:
            raise UserError(f"bce_pos_weight: expected more than 0; got {self.bce_pos_weight}")
        if self.splits == 1 or self.splits < 0 or (self.bce and self.splits):
            raise UserError(f"splits: expected 0, or 2 or more views and no bce; got {self.splits}")
        if self.multi_label and not (self.bce and self.class_weights is None):
            raise UserError("multi_label: expected bce=True and no class_weights, because each class is a decision of its own")
        weights = self.class_weights
        if weights is not None and not (all(0 <= one < math.inf for one in weights) and any(weights)):
            raise UserError(f"class_weights: expected numbers of at least 0, not all 0; got {weights}")
        if weights is not None:
            object.__setattr__(self, "class_weights", tuple(weights))

    def balance(self, num_classes: int) -> float:
        """Returns the factor of lambda that keeps the feature loss in proportion to L_cls.

        Averaged over K classes, binary cross-entropy and its gradient are K times smaller than summed: the factor is then
        1/K, otherwise 1.
        """
        return 1 / num_classes if self.bce and not self.bce_sum else 1.0

    def describe(self) -> str:
        """Returns a few words on the form; an empty string for plain cross-entropy."""
        words = [("multi-label " if self.multi_label else "") + "BCE"] if self.bce else []
        words += [f"JSD of {self.splits} views"] if self.splits else []
        words += ["class weights"] if self.class_weights is not None else []
        return " with ".join(words)


@dataclass(frozen=True)
class SFRConfig(Checked):
    """Options of Self-Feature Regularization; docs/method.md explains each of them."""

    prefix: ClassVar[str] = "sfr_"

    enabled: bool = option(True, "Self-Feature Regularization (--no-sfr: plain training)", name="sfr")
    weight: float = option(1.0, "lambda, the weight of the feature loss; 0 leaves only the smoothing", low=0)
    warmup_epochs: int | None = option(None, "epochs over which lambda rises (default: a fifth of the epochs, at most 5)", low=0)
    decay_epochs: int = option(0, "last epochs over which lambda falls towards 0", low=0)
    taps: tuple[str, ...] | None = option(
        None,
        "features to tap, shallow ones first and the deep one last, by index, module name or stageK (default: chosen from "
        "feature_info)",
    )
    channels: str = option("groups", "how deep channels match shallow ones", choices=CHANNEL_METHODS)
    matching: str = option(
        "divergence",
        "how locations are matched: divergence (soft, debiased transport plan), emd (optimal plan), gaussian (means and "
        "deviations only), grid (same cell)",
        choices=("divergence", "emd", "gaussian", "grid"),
    )
    weights: str = option("uniform", "weights of the locations", choices=MARGINALS)
    solver: str = option(
        "auto",
        "transport solver of emd; auto: exact for up to 4 locations, else sinkhorn; triton: sinkhorn as one program per "
        "problem, on CUDA",
        choices=SOLVERS,
    )
    max_nodes: int = option(16, "most locations a tap may have before it is average-pooled", low=4)
    smoothing: float | None = option(
        None,
        "label smoothing, a constant epsilon (default: chosen by SFR; 0.1 with --no-sfr)",
        name="smoothing",
        low=0,
    )
    smoothing_source: str | None = option(
        None,
        "what SFR smooths towards (default: uniform if --smoothing is given or there are more than 1,024 classes, else classes)",
        choices=SOURCES,
    )
    smoothing_schedule: str = option("constant", "how the epsilon of --smoothing changes", choices=SCHEDULES)

    @property
    def common_grid(self) -> bool:
        """Whether all taps need the deep tap's grid, so that a location is the same place in both."""
        return self.matching == "grid" or self.channels == "transport"

    @property
    def smoothing_form(self) -> tuple[float | None, str | None, str]:
        """Arguments of `DynamicLabelSmoothing` after the number of classes."""
        return self.smoothing, self.smoothing_source, self.smoothing_schedule

    @property
    def plain_smoothing(self) -> float:
        """The constant smoothing of training without SFR; timm's default (0.1) if none is given."""
        return 0.1 if self.smoothing is None else self.smoothing

    def check(self) -> None:
        """Checks that the smoothing is below 1, and that a schedule comes with an epsilon."""
        if self.smoothing is not None and self.smoothing >= 1:
            raise UserError(f"smoothing: expected a value in [0, 1); got {self.smoothing}")
        if self.enabled and self.smoothing is None and self.smoothing_schedule != "constant":
            raise UserError(
                f"sfr_smoothing_schedule: {self.smoothing_schedule} needs a given epsilon; got None; add --smoothing 0.1, or "
                "omit the schedule"
            )
