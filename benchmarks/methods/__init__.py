"""The methods of the comparison by name: each makes a `TrainingTask` from (model, input size, device)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import yaml
from timm.task import ClassificationTask, TrainingTask
from torch import nn

from benchmarks.methods.byot import BYOT
from benchmarks.methods.cskd import CSKD
from benchmarks.methods.dlb import DLB
from benchmarks.methods.pskd import PSKD
from benchmarks.methods.sliced import SlicedLoss
from benchmarks.methods.tffd import TfFD
from benchmarks.methods.tfkd import TfKDReg
from timm_sfr import SFRTask
from timm_sfr.build import PlainLoss
from timm_sfr.config import SFRConfig
from timm_sfr.errors import UserError, near_matches

Maker = Callable[[nn.Module, tuple[int, int, int], Any], TrainingTask]


def plain(smoothing: float) -> Maker:
    """Cross-entropy with constant uniform smoothing."""
    return lambda model, size, device: ClassificationTask(
        model.to(device), PlainLoss(smoothing), device=device, verbose=False
    )


def sfr(**options: Any) -> Maker:
    """SFR with these options over its defaults."""
    return lambda model, size, device: SFRTask(
        model.to(device), SFRConfig(**options), input_size=size, device=device, verbose=False
    )


def sliced(**options: Any) -> Maker:
    """SFR with transport channel by channel."""

    def make(model: nn.Module, size: tuple[int, int, int], device: Any) -> TrainingTask:
        task = sfr(**options)(model, size, device)
        task.feature_loss = SlicedLoss()
        return task

    return make


def tapped(kind: Callable[..., TrainingTask], **options: Any) -> Maker:
    """A peer that looks at feature maps."""
    return lambda model, size, device: kind(model, size, device, **options)


def logits(kind: Callable[..., TrainingTask]) -> Maker:
    """A peer that looks at logits alone."""
    return lambda model, size, device: kind(model, device)


# Every form but "sfr" says all its options, so that its figures stay its own when a default changes.
gaussian = partial(sfr, matching="gaussian", weight=1.0, smoothing=0.0)
emd = partial(sfr, matching="emd", weight=1.0, smoothing=0.0)
smooth = partial(sfr, weight=0.0)  # SFR's smoothing alone

METHODS: dict[str, Maker] = {
    "ce": plain(0.0),
    "ls": plain(0.1),
    "deepsup": tapped(BYOT, alpha=0.0, beta=0.0),
    "byot": tapped(BYOT),
    "tffd": tapped(TfFD),
    "cskd": logits(CSKD),
    "pskd": logits(PSKD),
    "ols": smooth(smoothing=0.5, smoothing_source="classes", smoothing_schedule="constant"),
    "dlb": logits(DLB),
    "tfkd": logits(TfKDReg),
    "sfr": sfr(),
    "sfr-gaussian": gaussian(),
    "sfr-gaussian-0.3": gaussian(weight=0.3),
    "sfr-gaussian-3": gaussian(weight=3.0),
    "sfr-gaussian-projection": gaussian(channels="projection"),
    "sfr-emd": emd(),
    "sfr-emd-0.1": emd(weight=0.1),
    "sfr-emd-0.3": emd(weight=0.3),
    "sfr-emd-2x2": emd(max_nodes=4),
    "sfr-emd-cross": emd(weights="cross"),
    "sfr-emd-channel-transport": emd(channels="transport"),
    "sfr-emd-projection": emd(channels="projection"),
    "sfr-emd-ls": emd(smoothing=0.1, smoothing_source="uniform", smoothing_schedule="constant"),
    "sfr-emd-classes-ramp": emd(smoothing=0.1, smoothing_source="classes", smoothing_schedule="ramp"),
    "sfr-grid": emd(matching="grid"),
    "smooth-ramp": smooth(smoothing_source="uniform", smoothing_schedule="ramp"),
    "smooth-confidence": smooth(smoothing_source="uniform", smoothing_schedule="confidence"),
    "smooth-classes": smooth(smoothing_source="classes", smoothing_schedule="constant"),
    "smooth-classes-ramp": smooth(smoothing_source="classes", smoothing_schedule="ramp"),
}


def find(name: str) -> Maker:
    """The method of that name; ``sfr:OPTION=VALUE,...`` is SFR with these options over its defaults.

    Raises:
        UserError: for an unknown method or option.
    """
    if name in METHODS:
        return METHODS[name]
    kind, _, words = name.partition(":")
    made = {"sfr": sfr, "sliced": sliced}.get(kind)
    if made is None or not words:
        known = ", ".join(METHODS)
        raise UserError(
            f"methods: expected any of {known}, or sfr:OPTION=VALUE,...; got {name!r}{near_matches(name, METHODS)}"
        )
    try:
        options = yaml.safe_load("{" + words.replace("=", ": ") + "}")
        SFRConfig(**options)
    except (TypeError, yaml.YAMLError) as error:
        raise UserError(f"methods: {name!r}: {error}") from error
    return made(**options)
