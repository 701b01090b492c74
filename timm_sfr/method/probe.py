"""The features that a model lets SFR tap: measured once (`probe`), and taken in one forward pass with the logits.

timm's models hand them out through ``forward_intermediates``; any other module through forward hooks (`Hooks`).

Shape suffixes: B batch, K classes, C channels, H x W locations, N tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import PatchDropout
from torch import Tensor, nn

from timm_sfr.utils.errors import UserError, first_line

INTERMEDIATES, HOOKS = "forward_intermediates", "hooks"
PREFIX_TOKENS = 5  # class and register tokens that may come before a map's tokens
# What a model raises where an image or an argument does not suit it.
MISFITS = (RuntimeError, AssertionError, ValueError, IndexError, TypeError, KeyError, AttributeError, ArithmeticError)


@dataclass(frozen=True)
class Feature:
    """One tappable feature, as measured: channels C and the grid H x W at the probed image size."""

    index: int
    module: str
    channels: int
    grid: tuple[int, int]
    stride: int

    @property
    def nodes(self) -> int:
        """Locations, H x W."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Probed:
    """What a probe found.

    Attributes:
        features: Every feature, by its index; in the order in which the model computes them.
        mechanism: How they are taken: ``"forward_intermediates"`` or ``"hooks"``.
        num_classes: Width of the logits, K.
    """

    features: list[Feature]
    mechanism: str
    num_classes: int


def forward_taps(model: Any, x: Tensor, indices: Sequence[int]) -> tuple[Any, list[Tensor]]:
    """Logits (B, K) and the features `indices`, each (B, C, H, W), in one pass of a timm model over images (B, C, H, W)."""
    final, maps = forward_final(model, x, indices)
    return model.forward_head(final), maps


def forward_final(model: Any, x: Tensor, indices: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """The same with what a timm model's ``forward_head`` takes in the place of the logits."""
    # stop_early and norm off: the final features must be whole, and some heads fail without.
    return model.forward_intermediates(
        x, indices=list(indices), norm=False, stop_early=False, intermediates_only=False, output_fmt="NCHW"
    )


class Hooks:
    """Takes the outputs of some modules in the model's own forward pass.

    The hooks stay on the model, and are idle outside `forward`; a deep copy of model and hooks is whole again.

    Args:
        model: Any module.
        names: Its modules whose outputs are taken.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.names, self.taken = list(names), [_Taken() for _ in names]
        self.handles = [
            model.get_submodule(name).register_forward_hook(tap.keep)
            for name, tap in zip(names, self.taken, strict=True)
        ]

    def forward(self, model: nn.Module, x: Tensor) -> tuple[Any, list[Tensor]]:
        """Logits (B, K) and the modules' outputs as maps (B, C, H, W), for images (B, C, H, W).

        Raises:
            UserError: if a module did not run exactly once, or its output is no map.
        """
        logits, outputs = self.outputs(model, x)
        for name, values in zip(self.names, outputs, strict=True):
            if len(values) != 1:
                raise UserError(
                    f"sfr_taps: {name!r} ran {len(values)} times in one pass; expected a module that runs once"
                )
        maps = [as_map(values[0], x, name) for name, values in zip(self.names, outputs, strict=True)]
        for name, tap in zip(self.names, maps, strict=True):
            if tap.requires_grad or not (torch.is_grad_enabled() and model.training):
                continue
            if any(parameter.requires_grad for parameter in model.get_submodule(name).parameters()):
                raise UserError(
                    f"sfr_taps: {name!r} gives no gradient, as under reentrant checkpointing; checkpoint it with "
                    "use_reentrant=False"
                )
        return logits, maps

    def outputs(self, model: nn.Module, x: Tensor) -> tuple[Any, list[list[Any]]]:
        """What the model gives, and what each of the modules gave, as often as it ran."""
        for tap in self.taken:
            tap.armed, tap.values = True, []
        try:
            result = model(x)
            return result, [tap.values for tap in self.taken]
        finally:
            for tap in self.taken:
                tap.armed, tap.values = False, []

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for handle in self.handles:
            handle.remove()


class _Taken:
    """One module's outputs; idle unless armed, so that a plain pass of the same model keeps nothing alive."""

    def __init__(self) -> None:
        self.armed = False
        self.values: list[Any] = []

    def keep(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.armed:
            self.values.append(output)


def as_map(output: Any, images: Tensor, name: str = "") -> Tensor:
    """A module's output as a map (B, C, H, W), for `images` (B, C', H', W').

    Takes (B, C, H, W); (B, H, W, C), told apart by the images' aspect; and tokens (B, N, C) that fill a grid of that
    aspect, after up to 5 class or register tokens.

    Raises:
        UserError: for anything else.
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
        "or tokens (B, N, C) of a grid of the images' aspect"
    )


def probe(model: nn.Module, input_size: tuple[int, int, int]) -> Probed:
    """Measures every feature of `model` in one pass, in evaluation mode, with batch 2; restores the modes.

    A timm model's are those of its ``feature_info``: through ``forward_intermediates`` where, for each of them, it gives
    one map, and ``forward_head`` of the final features gives the logits of ``model(x)``; else through hooks on the modules
    that ``feature_info`` names. Any other module's are all of its modules that run once and give a map.
    Works on the meta device too, where values cannot be compared.

    Raises:
        UserError: if the model does not take the size, is no classifier, or has no features.
    """
    for module in model.modules():
        if isinstance(module, PatchDropout) and module.prob > 0:
            raise UserError(
                f"patch_drop_rate: {model_name(model)} drops patches in training, so that its features are no maps; make it "
                "with patch_drop_rate 0"
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
        raise UserError(
            f"{model_name(model)} cannot be tapped: {reason}, and no module of it runs once and gives a map"
        )
    return Probed(_features(names, maps, input_size), HOOKS, logits.shape[1])


def count_classes(model: nn.Module, input_size: tuple[int, int, int] | None) -> int:
    """Width of the model's logits: what it says, or else what it gives for images of `input_size` (C, H, W).

    Raises:
        UserError: if neither is known, or it is no classifier.
    """
    known = getattr(model, "num_classes", None)
    if known is not None:
        return int(known)
    if input_size is None:
        raise UserError(
            f"input_size: {model_name(model)} does not say how many classes it has; give (channels, height, width)"
        )
    with _evaluating(model):
        return _logits(model, _images(model, input_size)).shape[1]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module has its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _images(model: nn.Module, input_size: tuple[int, int, int]) -> Tensor:
    """Two images of `input_size` (C, H, W), on the model's device and of its type; the global random state stays."""
    like = next(model.parameters(), torch.empty(0))
    return torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)


def _logits(model: nn.Module, image: Tensor) -> Tensor:
    size = "x".join(map(str, image.shape[1:]))
    if getattr(model, "num_classes", None) == 0:
        raise UserError(
            f"{model_name(model)} has no classifier (num_classes=0), which SFR trains: make it with num_classes, or take a "
            "model that has one"
        )
    try:
        logits = model(image)
    except MISFITS as error:
        raise UserError(f"img_size: {model_name(model)} does not take {size} images: {first_line(error)}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise UserError(
            f"{model_name(model)} must return one tensor of logits (batch, classes); got {described(logits)}; make it with "
            "its global pooling and its classifier"
        )
    return logits


def _intermediates(model: Any, image: Tensor, plain: Tensor, count: int) -> tuple[list[Tensor] | None, str]:
    """All features of a timm model, or None and why they cannot be taken so."""
    try:
        logits, maps = forward_taps(model, image, range(count))
    except MISFITS as error:
        return None, f"its forward_intermediates fails ({first_line(error)})"
    if len(maps) != count or any(not isinstance(x, Tensor) or x.ndim != 4 for x in maps):
        given = [described(x) for x in maps]
        return None, f"its forward_intermediates gives {given}, expected {count} maps (B, C, H, W)"
    # An untrained net's logits hardly depend on the image: what must agree is the difference between two images, too.
    moved = 1e-3 * (plain[0] - plain[1]).abs().max() + 1e-6 * plain.abs().max()
    if not plain.is_meta and not torch.all((logits - plain).abs() <= moved):
        return None, "its forward_intermediates and forward_head do not give the logits of model(x)"
    return maps, ""


def _hooked(model: nn.Module, image: Tensor, only: list[str] | None) -> tuple[list[str], list[Tensor]]:
    """Names and maps of the modules, of `only` if given, that run once and give a map; in the order in which they finish."""
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    names = list(modules) if only is None else [name for name in only if name in modules]
    order: dict[str, list[Any]] = {}
    # A dictionary keeps the order of first completion; a list as value shows who ran more than once.
    handles = [
        modules[name].register_forward_hook(lambda _, __, out, name=name: order.setdefault(name, []).append(out))
        for name in names
    ]
    try:
        model(image)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, Tensor] = {}
    for name, values in order.items():
        try:
            if len(values) == 1:
                found[name] = as_map(values[0], image)
        except UserError:
            continue
    return list(found), list(found.values())


def _features(names: list[str], maps: list[Tensor], input_size: tuple[int, int, int]) -> list[Feature]:
    found = []
    for index, (name, x) in enumerate(zip(names, maps, strict=True)):
        _, channels, height, width = x.shape
        found.append(Feature(index, name, channels, (height, width), round(input_size[1] / max(1, height))))
    return found


def model_name(model: nn.Module) -> str:
    """What a message calls the model."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return config.get("architecture") or type(model).__name__


def described(x: Any) -> str:
    """A tensor's shape, or a thing's type."""
    return str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__
