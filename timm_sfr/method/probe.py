"""Measures the features of a model that SFR can tap (`probe`), and returns them with the logits in one forward pass.

timm models return their features through ``forward_intermediates``; other modules need forward hooks (`Hooks`).

Shapes: B images in the batch, K classes, C channels, H x W locations, N tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import PatchDropout, PatchDropoutWithIndices
from torch import Tensor, nn

from timm_sfr.utils.errors import UserError, first_line

INTERMEDIATES, HOOKS = "forward_intermediates", "hooks"
PREFIX_TOKENS = 5  # most class and register tokens before the tokens of a map
# The exceptions that models raise for an unsuitable image or argument.
MISFITS = (RuntimeError, AssertionError, ValueError, IndexError, TypeError, KeyError, AttributeError, ArithmeticError)


@dataclass(frozen=True)
class Feature:
    """One tappable feature, measured at the probed image size."""

    index: int  # its place in the order of computation, from 0; for a timm model, its index in feature_info
    module: str  # name of the module that returns it
    channels: int  # C
    grid: tuple[int, int]  # its locations, (H, W)
    stride: int  # image pixels per location, rounded

    @property
    def nodes(self) -> int:
        """Number of locations, H x W."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Probed:
    """The result of `probe`."""

    features: list[Feature]  # all, by index: in the order in which the model computes them
    mechanism: str  # how to get them: INTERMEDIATES or HOOKS
    num_classes: int  # width of the logits, K


class Hooks:
    """Records the outputs of some modules during the model's own forward pass.

    The hooks stay on the model and are idle outside `forward`. A deep copy of the model together with its hooks works too.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.names, self.taken = list(names), [_Recorder() for _ in names]
        self.handles = [
            model.get_submodule(name).register_forward_hook(recorder.record)
            for name, recorder in zip(names, self.taken, strict=True)
        ]

    def forward(self, model: nn.Module, x: Tensor) -> tuple[Any, list[Tensor]]:
        """Returns the logits (B, K) and the modules' outputs as maps (B, C, H, W), for images `x` (B, C, H, W).

        Raises UserError if a module did not run exactly once, its output is not a map, or the map has no gradient in training.
        """
        for recorder in self.taken:
            recorder.armed, recorder.values = True, []
        try:
            logits = model(x)
            outputs = [recorder.values for recorder in self.taken]
        finally:
            for recorder in self.taken:
                recorder.armed, recorder.values = False, []
        maps = []
        for name, values in zip(self.names, outputs, strict=True):
            if len(values) != 1:
                raise UserError(f"sfr_taps: {name!r} ran {len(values)} times in one pass; expected a module that runs once")
            maps.append(as_map(values[0], x, name))
            if maps[-1].requires_grad or not (torch.is_grad_enabled() and model.training):
                continue
            if any(parameter.requires_grad for parameter in model.get_submodule(name).parameters()):
                raise UserError(
                    f"sfr_taps: {name!r} gives no gradient, as under reentrant checkpointing; checkpoint it with "
                    "use_reentrant=False"
                )
        return logits, maps

    def remove(self) -> None:
        """Removes the hooks from the model."""
        for handle in self.handles:
            handle.remove()


def forward_taps(model: Any, x: Tensor, indices: Sequence[int]) -> tuple[Any, list[Tensor]]:
    """Returns a timm model's logits (B, K) and the features `indices`, each (B, C, H, W), for images `x` (B, C, H, W)."""
    final, maps = forward_final(model, x, indices)
    return model.forward_head(final), maps


def forward_final(model: Any, x: Tensor, indices: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Like `forward_taps`, but returns the input of ``forward_head`` instead of the logits."""
    # With stop_early, the final features would be incomplete; with norm, some models fail.
    return model.forward_intermediates(
        x, indices=list(indices), norm=False, stop_early=False, intermediates_only=False, output_fmt="NCHW"
    )


def as_map(output: Any, images: Tensor, name: str = "") -> Tensor:
    """Returns a module's output as a map (B, C, H, W), for `images` (B, C', H', W').

    Accepts (B, C, H, W); (B, H, W, C), recognised by the images' aspect ratio; and tokens (B, N, C) that fill a grid of
    that aspect ratio after up to 5 class or register tokens. Raises UserError for any other output.
    """
    x, (batch, _, height, width) = output, images.shape
    if isinstance(x, Tensor) and x.ndim == 4 and len(x) == batch:
        first, last = (abs(h * width - w * height) for h, w in (x.shape[1:3], x.shape[2:4]))
        if min(first, last) <= max(height, width):  # within one location
            return x if last <= first else x.permute(0, 3, 1, 2)
    if isinstance(x, Tensor) and x.ndim == 3 and len(x) == batch:
        for prefix in range(PREFIX_TOKENS + 1):
            tokens = x.shape[1] - prefix
            rows = round((tokens * height / width) ** 0.5) if tokens > 0 else 0
            if rows and tokens % rows == 0 and rows * width == tokens // rows * height:
                return x[:, prefix:].transpose(1, 2).unflatten(2, (rows, tokens // rows))
    raise UserError(
        f"sfr_taps: {name!r} gives {described(x)} for {tuple(images.shape)} images; expected a map (B, C, H, W), (B, H, W, C), "
        "or tokens (B, N, C) on a grid with the images' aspect ratio"
    )


def probe(model: nn.Module, input_size: tuple[int, int, int]) -> Probed:
    """Measures every feature of `model` in one pass, in evaluation mode, with batch size 2; restores the modes afterwards.

    The features of a timm model are those of its ``feature_info``. ``forward_intermediates`` is used if it returns one map
    for each of them and ``forward_head`` turns the final features into the logits of ``model(x)``. Otherwise hooks are used
    on the modules that ``feature_info`` names. The features of any other module are the outputs of all its submodules that
    run once and return a map. The probe also works on the meta device, where it cannot compare values.

    Raises UserError if the model does not accept the image size, is not a classifier, or has no features.
    """
    for module in model.modules():
        dropout = isinstance(module, (PatchDropout, PatchDropoutWithIndices)) and module.prob > 0
        if dropout or getattr(module, "patch_drop_rate", 0):  # the second: Hiera
            raise UserError(
                f"patch_drop_rate: {model_name(model)} drops patches in training, so its features are not maps; create it with "
                "patch_drop_rate=0"
            )
    image = _images(model, input_size)
    with _evaluating(model):
        logits = _logits(model, image)
        info = [dict(entry) for entry in getattr(model, "feature_info", None) or []]
        reason = "it has no feature_info with forward_intermediates and forward_head"
        if info and hasattr(model, "forward_intermediates") and hasattr(model, "forward_head"):
            maps, reason = _intermediates(model, image, logits, len(info))
            if maps is not None:
                names = [str(entry.get("module", index)) for index, entry in enumerate(info)]
                return Probed(_features(names, maps, input_size), INTERMEDIATES, logits.shape[1])
        names, maps = _hooked(model, image, [str(entry.get("module")) for entry in info] or None)
    if not maps:
        raise UserError(f"{model_name(model)} cannot be tapped: {reason}, and none of its modules runs once and returns a map")
    return Probed(_features(names, maps, input_size), HOOKS, logits.shape[1])


def check_input(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Returns the width of the logits for images of `input_size` (C, H, W); raises UserError if the model does not take them."""
    with _evaluating(model):
        return _logits(model, _images(model, input_size)).shape[1]


def count_classes(model: nn.Module, input_size: tuple[int, int, int] | None) -> int:
    """Returns the width of the logits: ``model.num_classes``, or as measured on images of `input_size` (C, H, W).

    Raises UserError if neither is known, or the model is not a classifier.
    """
    known = getattr(model, "num_classes", None)
    if known is not None:
        return int(known)
    if input_size is None:
        raise UserError(f"input_size: {model_name(model)} does not say how many classes it has; pass (channels, height, width)")
    return check_input(model, input_size)


def model_name(model: nn.Module) -> str:
    """Returns the model's name for messages: its timm architecture, or its class."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return config.get("architecture") or type(model).__name__


def described(x: Any) -> str:
    """Returns the shape of a tensor, or the type name of anything else."""
    return str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__


class _Recorder:
    """Records the outputs of one module while armed; otherwise idle, so that an ordinary pass keeps no tensors alive."""

    def __init__(self) -> None:
        self.armed = False
        self.values: list[Any] = []

    def record(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.armed:
            self.values.append(output)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model in evaluation mode without gradients, and restores each module's mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _images(model: nn.Module, input_size: tuple[int, int, int]) -> Tensor:
    """Returns two random images (2, C, H, W) of the model's device and dtype; leaves the global random state alone."""
    like = next(model.parameters(), torch.empty(0))
    return torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)


def _logits(model: nn.Module, image: Tensor) -> Tensor:
    size = "x".join(map(str, image.shape[1:]))
    if getattr(model, "num_classes", None) == 0:
        raise UserError(
            f"{model_name(model)} has no classifier (num_classes=0), and SFR trains classifiers; create it with num_classes, or "
            "choose a model that has one"
        )
    try:
        logits = model(image)
    except MISFITS as error:
        raise UserError(f"img_size: {model_name(model)} does not take {size} images: {first_line(error)}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise UserError(
            f"{model_name(model)} must return one tensor of logits (batch, classes); got {described(logits)}; create "
            "it with its global pooling and its classifier"
        )
    return logits


def _intermediates(model: Any, image: Tensor, plain: Tensor, count: int) -> tuple[list[Tensor] | None, str]:
    """Returns all `count` features of a timm model through ``forward_intermediates``, or None and why that fails.

    `plain` are the logits (B, K) of ``model(image)``, which the features must lead to.
    """
    try:
        logits, maps = forward_taps(model, image, range(count))
    except MISFITS as error:
        return None, f"its forward_intermediates fails ({first_line(error)})"
    if len(maps) != count or any(not isinstance(x, Tensor) or x.ndim != 4 for x in maps):
        given = [described(x) for x in maps]
        return None, f"its forward_intermediates returns {given}, expected {count} maps (B, C, H, W)"
    # The logits of an untrained network hardly depend on the image, so the tolerance is relative to the difference between
    # the two images.
    tolerance = 1e-3 * (plain[0] - plain[1]).abs().max() + 1e-6 * plain.abs().max()
    if not plain.is_meta and not torch.all((logits - plain).abs() <= tolerance):
        return None, "its forward_intermediates and forward_head do not return the logits of model(x)"
    return maps, ""


def _hooked(model: nn.Module, image: Tensor, only: list[str] | None) -> tuple[list[str], list[Tensor]]:
    """Returns names and maps of the modules (of `only` if given) that run once and return a map, in order of completion."""
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    order: dict[str, list[Any]] = {}
    # The dictionary keeps the order of first completion; the lists show which modules ran more than once.
    handles = [
        modules[name].register_forward_hook(lambda _, __, out, name=name: order.setdefault(name, []).append(out))
        for name in only or modules
        if name in modules
    ]
    try:
        model(image)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, Tensor] = {}
    for name, values in order.items():
        if len(values) == 1:
            with contextlib.suppress(UserError):
                found[name] = as_map(values[0], image)
    return list(found), list(found.values())


def _features(names: list[str], maps: list[Tensor], input_size: tuple[int, int, int]) -> list[Feature]:
    found = []
    for index, (name, x) in enumerate(zip(names, maps, strict=True)):
        _, channels, height, width = x.shape
        found.append(Feature(index, name, channels, (height, width), round(input_size[1] / max(1, height))))
    return found
