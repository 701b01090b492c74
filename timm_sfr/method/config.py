"""The options of SFR."""

from __future__ import annotations

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
class SFRConfig(Checked):
    """Options of Self-Feature Regularization; docs/method.md explains each of them."""

    prefix: ClassVar[str] = "sfr_"

    enabled: bool = option(True, "Self-Feature Regularization (--no-sfr: plain training)", name="sfr")
    weight: float = option(1.0, "lambda, the weight of the feature loss; 0 leaves only the smoothing", low=0)
    warmup_epochs: int | None = option(
        None, "epochs over which lambda rises (default: a fifth of the epochs, at most 5)", low=0
    )
    decay_epochs: int = option(0, "last epochs over which lambda falls towards 0", low=0)
    taps: tuple[str, ...] | None = option(
        None,
        "features to tap, shallow ones first and the deep one last, by index, module name or stageK (default: chosen from "
        "feature_info)",
    )
    channels: str = option("groups", "how deep channels match shallow ones", choices=CHANNEL_METHODS)
    matching: str = option(
        "divergence",
        "how locations match: by a soft transport plan, debiased (the Sinkhorn divergence); by the optimal plan; as Gaussians; "
        "or the same grid cell",
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
