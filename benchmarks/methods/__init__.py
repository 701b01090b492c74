"""The methods of the comparison, by name. Each makes a `TrainingTask` from (model, input size, device)."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

import yaml
from timm.task import TrainingTask
from torch import nn

from benchmarks.methods.byot import BYOT
from benchmarks.methods.cskd import CSKD
from benchmarks.methods.dlb import DLB
from benchmarks.methods.pskd import PSKD
from benchmarks.methods.sliced import SlicedLoss
from benchmarks.methods.tffd import TfFD
from benchmarks.methods.tfkd import TfKDReg
from timm_sfr import SFRTask
from timm_sfr.method.config import SFRConfig
from timm_sfr.training.tasks import PlainLoss, PlainTask
from timm_sfr.utils.errors import UserError, near_matches


class Maker(Protocol):
    """Makes a task over a model, and reports its options."""

    def __call__(self, model: nn.Module, size: tuple[int, int, int], device: Any) -> TrainingTask:
        """Returns the task over `model`."""

    def recorded(self) -> dict[str, Any]:
        """Returns all options with their values, for the record of a run."""


class Plain:
    """Makes tasks of cross-entropy with constant uniform smoothing."""

    def __init__(self, smoothing: float) -> None:
        self.smoothing = smoothing

    def __call__(self, model: nn.Module, size: tuple[int, int, int], device: Any) -> TrainingTask:
        """Returns the task over `model`."""
        return PlainTask(model.to(device), PlainLoss(self.smoothing), device=device, verbose=False)

    def recorded(self) -> dict[str, Any]:
        """Returns the smoothing."""
        return {"peer": {"smoothing": self.smoothing}}


def _only(options: dict[str, Any], known: Iterable[str], kind: str) -> None:
    known = sorted(known)
    if unknown := sorted(options.keys() - set(known)):
        hint = near_matches(unknown[0], known)
        raise TypeError(f"unknown option {', '.join(unknown)}{hint}; {kind} has {', '.join(known)}")


class SFR:
    """Makes SFR tasks. `options` override SFR's defaults, and `loss` replaces the feature loss if it is given."""

    def __init__(self, loss: Callable[[], nn.Module] | None = None, **options: Any) -> None:
        _only(options, {field.name for field in dataclasses.fields(SFRConfig)} - {"enabled"}, "SFR")
        self.config, self.loss = SFRConfig(**options), loss

    def __call__(self, model: nn.Module, size: tuple[int, int, int], device: Any) -> TrainingTask:
        """Returns the task over `model`."""
        task = SFRTask(model.to(device), self.config, input_size=size, device=device, verbose=False)
        if self.loss is not None:
            task.feature_loss = self.loss()
        return task

    def recorded(self) -> dict[str, Any]:
        """Returns SFR's configuration."""
        return {"sfr": dataclasses.asdict(self.config)}


class Peer:
    """Makes tasks of a peer; `options` override its published ones."""

    def __init__(self, kind: Callable[..., TrainingTask], **options: Any) -> None:
        parameters = inspect.signature(kind).parameters
        known = {name: item.default for name, item in parameters.items() if item.default is not item.empty}
        _only(options, known, kind.__name__)
        if wrong := [name for name, value in options.items() if type(value) not in (int, float)]:
            raise TypeError(f"{wrong[0]}: expected a number; got {options[wrong[0]]!r}")
        self.kind, self.options = kind, known | options

    def __call__(self, model: nn.Module, size: tuple[int, int, int], device: Any) -> TrainingTask:
        """Returns the task over `model`; only a peer that uses feature maps needs the size."""
        sized = {"input_size": size} if "input_size" in inspect.signature(self.kind).parameters else {}
        return self.kind(model, device=device, **sized, **self.options)

    def recorded(self) -> dict[str, Any]:
        """Returns the options, including the published ones."""
        return {"peer": self.options}


# SFR's earlier defaults: no plan and a constant smoothing. Methods that were measured with them keep them.
EARLIER: dict[str, Any] = {
    "weight": 1.0, "channels": "groups", "matching": "gaussian", "weights": "uniform", "solver": "sinkhorn", "max_nodes": 49,
    "smoothing": 0.1, "smoothing_source": "uniform", "smoothing_schedule": "constant",
}  # fmt: skip
gaussian = partial(SFR, **EARLIER | {"smoothing": 0.0})
emd = partial(SFR, **EARLIER | {"matching": "emd", "smoothing": 0.0})
smooth = partial(SFR, **EARLIER | {"weight": 0.0})  # SFR's smoothing alone

METHODS: dict[str, Maker] = {
    "ce": Plain(0.0),
    "ls": Plain(0.1),
    "ls-0.5": Plain(0.5),
    "deepsup": Peer(BYOT, alpha=0.0, beta=0.0),
    "byot": Peer(BYOT),
    "tffd": Peer(TfFD),
    "cskd": Peer(CSKD),
    "pskd": Peer(PSKD),
    "ols": smooth(smoothing=0.5, smoothing_source="classes", smoothing_schedule="constant"),
    "dlb": Peer(DLB),
    "tfkd": Peer(TfKDReg),
    "sfr": SFR(),
    "sfr-gaussian-ls": SFR(**EARLIER),
    "sfr-ls-0.5": gaussian(smoothing=0.5, smoothing_source="uniform", smoothing_schedule="constant"),
    "sfr-ols": gaussian(smoothing=0.5, smoothing_source="classes", smoothing_schedule="constant"),
    "sfr-gaussian": gaussian(),
    "sfr-gaussian-0.3": gaussian(weight=0.3),
    "sfr-gaussian-3": gaussian(weight=3.0),
    "sfr-gaussian-projection": gaussian(channels="projection"),
    "sfr-emd": emd(),
    "sfr-emd-0.1": emd(weight=0.1),
    "sfr-emd-0.3": emd(weight=0.3),
    "sfr-emd-exact": emd(solver="exact"),
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

# The second half of a method's batches has, for each image, another image of its class or a second view of it.
COMPANIONS = {"cskd": "classmates", "dlb": "views"}


def find(name: str) -> Maker:
    """Returns the method with that name; ``METHOD:OPTION=VALUE,...`` is SFR or a peer with other options.

    Raises:
        UserError: for an unknown method or option.
    """
    if name in METHODS:
        return METHODS[name]
    kind, _, words = name.partition(":")
    made: Callable[..., Maker] | None = {"sfr": SFR, "sliced": partial(SFR, SlicedLoss)}.get(kind)
    if isinstance(METHODS.get(kind), Peer):
        made = partial(Peer, METHODS[kind].kind)
    if kind in METHODS and made is None:
        raise UserError(f"methods: {kind!r} has no options; got {name!r}")
    if made is None or not words:
        known = ", ".join(METHODS)
        raise UserError(
            f"methods: expected any of {known}, or METHOD:OPTION=VALUE,...; got {name!r}{near_matches(name, METHODS)}"
        )
    try:
        options = yaml.safe_load("{" + words.replace("=", ": ") + "}")
        if fixed := sorted({"enabled", "loss"} & options.keys()):
            raise TypeError(f"{fixed[0]} is not an option of the comparison")
        return made(**options)
    except (TypeError, yaml.YAMLError) as error:
        raise UserError(f"methods: {name!r}: {error}") from error
