"""Which features of a model SFR taps, and taking them in one forward pass.

`choose_taps` measures every feature of the model once (a probe) and picks one deep tap and the shallow taps before it;
`TappedModel` is the module that training runs: images to logits and tapped nodes.

Shape suffixes: B batch, C channels, H x W locations, N nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from timm_sfr.errors import UserError, near_matches

MIN_NODES = 4  # transport over fewer locations matches nothing
ISOTROPIC_TAPS = 3


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
class TapPlan:
    """The chosen taps: shallow ones in order of depth, then the deep one; `print` it for a table.

    Attributes:
        shallow: Shallow taps.
        deep: The deep tap.
        input_size: The probed image size (C, H, W).
        why: The rule that chose them.
    """

    shallow: tuple[Feature, ...]
    deep: Feature
    input_size: tuple[int, int, int]
    why: str

    @property
    def indices(self) -> list[int]:
        """What ``forward_intermediates(indices=...)`` takes."""
        return [tap.index for tap in (*self.shallow, self.deep)]

    def node_grids(self, max_nodes: int, common: bool = False) -> list[tuple[int, int]]:
        """The grid that each tap, shallow ones first, is pooled to before matching.

        A tap of at most `max_nodes` locations keeps its grid. The deep tap's grid is halved until it fits, and a larger
        shallow tap is pooled to that grid; with `common`, every shallow tap is.
        """
        deep = self.deep.grid
        while deep[0] * deep[1] > max_nodes:
            deep = (max(1, deep[0] // 2), max(1, deep[1] // 2))
        keep = [not common and tap.nodes <= max_nodes for tap in self.shallow]
        return [tap.grid if kept else deep for tap, kept in zip(self.shallow, keep, strict=True)] + [deep]

    def __str__(self) -> str:
        rows = [("tap", "index", "module", "channels", "grid", "stride")]
        for role, tap in [*(("shallow", tap) for tap in self.shallow), ("deep", self.deep)]:
            grid = f"{tap.grid[0]}x{tap.grid[1]}"
            rows.append((role, str(tap.index), tap.module, str(tap.channels), grid, str(tap.stride)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*table, f"at {'x'.join(map(str, self.input_size))}: {self.why}"])


def choose_taps(
    model: nn.Module, input_size: Sequence[int] | None = None, taps: Sequence[int | str] | None = None
) -> TapPlan:
    """Chooses the taps of a timm model, at one image size, by a probe of all its features.

    The deep tap is the last feature with at least 4 locations. The shallow taps lie strictly before it: the last
    feature of each coarser stage from stride 4 on (of every stage, in networks that start at stride 1), or, where no
    stage is coarser (ViT, mixers), features at evenly spaced depths.

    Args:
        model: A timm classifier; its mode, weights and statistics are left as they are.
        input_size: (C, H, W) of the training images; the model's own if None.
        taps: Overrides the choice: features by index or module name, shallow ones first and the deep one last.

    Raises:
        UserError: if the model has no tappable features, the image is too small, or `taps` names none of them.
    """
    size = tuple(int(n) for n in input_size or resolve_model_data_config(model)["input_size"])
    features = probe(model, size)
    if taps is not None:
        chosen = [_find(features, tap) for tap in taps]
        if (
            len(chosen) < 2
            or any(tap.index >= chosen[-1].index for tap in chosen[:-1])
            or 0 in {t.nodes for t in chosen}
        ):
            raise UserError(
                f"sfr_taps: expected one or more shallow taps and then a deeper one; got {list(taps)}. {_listing(features)}"
            )
        shallow = tuple(sorted(chosen[:-1], key=lambda tap: tap.index))
        return TapPlan(shallow, chosen[-1], size, "as given")
    matchable = [feature for feature in features if feature.nodes >= MIN_NODES]
    if not matchable:
        raise UserError(
            f"img_size: at {size[1]}x{size[2]} no feature of {_name(model)} has the {MIN_NODES} locations that matching "
            f"needs; use larger images or a model for small ones (such as resnet20_cifar). {_listing(features)}"
        )
    deep = matchable[-1]
    earlier = [feature for feature in features if feature.index < deep.index and feature.nodes >= MIN_NODES]
    finest = 1 if features[0].stride == 1 else 4
    coarser = {tap.grid: tap for tap in earlier if tap.nodes > deep.nodes and tap.stride >= finest}
    if coarser:
        return TapPlan(tuple(coarser.values()), deep, size, "last feature of each coarser stage, and of the deepest")
    level = [tap for tap in earlier if tap.grid == deep.grid]
    if level:
        steps = ISOTROPIC_TAPS + 1
        spaced = {max(0, (len(level) + 1) * step // steps - 1): None for step in range(1, steps)}
        return TapPlan(tuple(level[i] for i in spaced), deep, size, "evenly spaced depths, and the last")
    raise UserError(
        f"{_name(model)} has no usable shallow tap at {size[1]}x{size[2]}: its deep tap is feature {deep.index} and no "
        f"earlier one from stride {finest} on is left; use larger images or name taps with sfr_taps. {_listing(features)}"
    )


def probe(model: nn.Module, input_size: tuple[int, int, int]) -> list[Feature]:
    """Measures every feature of `model` in one pass, in evaluation mode, with batch 2; restores the modes.

    Raises:
        UserError: if the model does not take the size, has no ``forward_intermediates``, returns something else than
            one 4-D map a feature, or if ``forward_head`` of the final features differs from ``model(x)``.
    """
    info = getattr(model, "feature_info", None)
    if info is None or not hasattr(model, "forward_intermediates") or not hasattr(model, "forward_head"):
        raise UserError(
            f"{_name(model)} has no feature_info with forward_intermediates and forward_head: SFR needs a timm classifier"
        )
    entries = [dict(entry) for entry in info]
    modes = {module: module.training for module in model.modules()}
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, *input_size, generator=generator).to(parameter.device, parameter.dtype)
    try:
        model.eval()
        with torch.no_grad():
            logits, maps = forward_taps(model, image, list(range(len(entries))))
            plain = model(image)
    except (RuntimeError, AssertionError, ValueError, IndexError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"img_size: {_name(model)} does not take {'x'.join(map(str, input_size))} images: {reason}"
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not isinstance(plain, Tensor) or plain.ndim != 2:
        raise UserError(f"{_name(model)} must return one tensor of logits (batch, classes); got {_describe(plain)}")
    if not torch.allclose(logits, plain, rtol=1e-3, atol=1e-4 * max(1.0, float(plain.abs().max()))):
        raise UserError(f"{_name(model)}: forward_intermediates and forward_head do not give the logits of model(x)")
    if len(maps) != len(entries) or any(not isinstance(x, Tensor) or x.ndim != 4 for x in maps):
        raise UserError(f"{_name(model)}: expected {len(entries)} maps (B, C, H, W) from forward_intermediates; "
                        f"got {[_describe(x) for x in maps]}")  # fmt: skip
    found = []
    for index, (entry, x) in enumerate(zip(entries, maps, strict=True)):
        _, channels, height, width = x.shape
        stride = round(input_size[1] / max(1, height))
        found.append(Feature(index, str(entry.get("module", index)), channels, (height, width), stride))
    return found


def forward_taps(model: Any, x: Tensor, indices: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Logits (B, K) and the features `indices`, each (B, C, H, W), in one pass over images (B, C, H, W)."""
    # stop_early and norm off: the final features must be whole, and some heads fail without.
    final, maps = model.forward_intermediates(
        x, indices=indices, norm=False, stop_early=False, intermediates_only=False, output_fmt="NCHW"
    )
    return model.forward_head(final), maps


def to_nodes(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Average-pools a map to `grid` and lists its locations: (B, C, H, W) to (B, N, C)."""
    if x.shape[-2:] != grid:
        x = F.adaptive_avg_pool2d(x, grid)
    return x.flatten(2).transpose(1, 2)


class TappedModel(nn.Module):
    """What training runs and DDP wraps: images (B, C, H, W) to logits (B, K) and tapped nodes [(B, N_t, C_t)].

    `model` is the plain timm model, whose state dict is what gets exported; `projection`, if any, is the learned
    channel map of the shallow taps, used in training only.
    """

    def __init__(
        self,
        model: nn.Module,
        indices: list[int],
        grids: list[tuple[int, int]],
        projection: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.projection = projection
        self.indices, self.grids = indices, grids

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, K), and the nodes of the shallow taps and then of the deep one."""
        if not self.indices:
            return self.model(x), []
        logits, maps = forward_taps(self.model, x, self.indices)
        nodes = [to_nodes(tap, grid) for tap, grid in zip(maps, self.grids, strict=True)]
        if self.projection is not None:
            nodes = [*self.projection(nodes[:-1]), nodes[-1]]
        return logits, nodes

    def no_weight_decay(self) -> set[str]:
        """The model's own list, so that timm's optimizer factory finds it through the wrapper."""
        names = getattr(self.model, "no_weight_decay", set)()
        return {f"model.{name}" for name in names}

    def group_matcher(self, coarse: bool = False) -> Any:
        """The model's own layer groups under its names here, for timm's layer-wise learning rates."""
        matcher = self.model.group_matcher(coarse=coarse)
        if callable(matcher):
            return lambda name: matcher(name.removeprefix("model."))
        return {group: _prefixed(patterns) for group, patterns in matcher.items()}


def _prefixed(patterns: Any) -> Any:
    """timm's group patterns (a regex, or (regex, order) pairs) with ``model.`` allowed before every name."""
    if isinstance(patterns, str):
        return "|".join(
            rf"^model\.{part[1:]}" if part.startswith("^") else rf"^model\.{part}" for part in patterns.split("|")
        )
    return [(_prefixed(pattern), *rest) for pattern, *rest in patterns]


def _find(features: list[Feature], tap: int | str) -> Feature:
    for feature in features:
        if str(tap) in (str(feature.index), feature.module, str(feature.index - len(features))):
            return feature
    hint = near_matches(str(tap), [feature.module for feature in features])
    raise UserError(f"sfr_taps: no feature {tap!r}{hint or '.'} {_listing(features)}")


def _listing(features: list[Feature]) -> str:
    cells = (f"{f.index} {f.module} ({f.channels}, {f.grid[0]}x{f.grid[1]})" for f in features)
    return "Features: " + ", ".join(cells)


def _name(model: nn.Module) -> str:
    config = getattr(model, "pretrained_cfg", None) or {}
    return config.get("architecture") or type(model).__name__


def _describe(x: Any) -> str:
    return str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__
