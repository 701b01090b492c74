"""Chooses the features that SFR taps: `choose_taps` measures all features of a model and picks one deep and some shallow."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from timm.data import resolve_input_data_config
from torch import nn

from timm_sfr.method.probe import INTERMEDIATES, Feature, model_name, probe
from timm_sfr.utils.console import aligned
from timm_sfr.utils.errors import UserError, near_matches

MIN_NODES = 4  # transport needs at least this many locations to match anything
UNMATCHED = (1, 1)  # the grid of every tap at a size that leaves too few locations
ISOTROPIC_TAPS = 3  # shallow taps of a model whose features all have the same grid
LISTED = 60  # most features that an error message lists
Choice = tuple[tuple[Feature, ...], Feature, str]  # shallow, deep, why


@dataclass(frozen=True)
class TapPlan:
    """The chosen taps: the shallow ones in order of depth, then the deep one. `print` shows them as a table.

    Attributes:
        shallow: The shallow taps.
        deep: The deep tap.
        input_size: The probed image size (C, H, W).
        why: The rule that chose the taps.
        mechanism: How to get the features: ``"forward_intermediates"`` or ``"hooks"``.
        num_classes: Width of the logits, K.
    """

    shallow: tuple[Feature, ...]
    deep: Feature
    input_size: tuple[int, int, int]
    why: str
    mechanism: str = INTERMEDIATES
    num_classes: int = 0

    @property
    def taps(self) -> tuple[Feature, ...]:
        """All taps, the shallow ones first."""
        return (*self.shallow, self.deep)

    @property
    def modules(self) -> list[str]:
        """Names of the tapped modules."""
        return [tap.module for tap in self.taps]

    @property
    def indices(self) -> list[int]:
        """Indices of the taps, for ``forward_intermediates(indices=...)``."""
        return [tap.index for tap in self.taps]

    def node_grids(self, max_nodes: int, common: bool = False) -> list[tuple[int, int]]:
        """Returns the grid that each tap is pooled to at `input_size`, shallow taps first (`node_grids`)."""
        return node_grids([tap.grid for tap in self.taps], max_nodes, common)

    def __str__(self) -> str:
        rows = [("tap", "index", "module", "channels", "grid", "stride")]
        for role, tap in [*(("shallow", tap) for tap in self.shallow), ("deep", self.deep)]:
            grid = f"{tap.grid[0]}x{tap.grid[1]}"
            rows.append((role, str(tap.index), tap.module, str(tap.channels), grid, str(tap.stride)))
        how = "" if self.mechanism == INTERMEDIATES else f", taken by {self.mechanism}"
        return "\n".join([*aligned(rows), f"at {'x'.join(map(str, self.input_size))}: {self.why}{how}"])


def node_grids(grids: Sequence[tuple[int, int]], max_nodes: int, common: bool = False) -> list[tuple[int, int]]:
    """Returns the grid that each tap is pooled to before matching, shallow taps first.

    A tap with at most `max_nodes` locations keeps its grid. A larger deep tap's grid is halved until it fits, with no side
    below 2 (7 x 7 becomes 3 x 3, then 2 x 2). Larger shallow taps are pooled to the resulting deep grid. If a tap has fewer
    than 4 locations, or a side shorter than the grid that it would be pooled to, nothing can be matched, and all grids are
    1 x 1.

    Args:
        grids: The taps' own grids, (H, W), the deep one last.
        max_nodes: The most locations of a tap; at least 4.
        common: Whether all taps are pooled to the deep tap's grid.
    """
    deep = grids[-1]
    while deep[0] * deep[1] > max_nodes:
        deep = (min(deep[0], max(2, deep[0] // 2)), min(deep[1], max(2, deep[1] // 2)))
    pooled = [grid if not common and grid[0] * grid[1] <= max_nodes else deep for grid in grids[:-1]] + [deep]
    matchable = all(
        own[0] * own[1] >= MIN_NODES and own[0] >= to[0] and own[1] >= to[1] for own, to in zip(grids, pooled, strict=True)
    )
    return pooled if matchable else [UNMATCHED] * len(grids)


def choose_taps(model: nn.Module, input_size: Sequence[int] | None = None, taps: Sequence[int | str] | None = None) -> TapPlan:
    """Chooses the taps of a model for one image size after probing all its features.

    The deep tap is the last feature with at least 4 locations. The shallow taps come strictly before it:

    - The last feature of each earlier stage with more locations and a stride of at least 4 (any stride in networks for
      small images, which start at stride 1 and end before 16).
    - If no earlier stage has more locations (ViT, mixers): features at evenly spaced depths.
    - If one module returns several features (the parallel branches of CrossViT and CoaT): the last feature of each grid in
      the modules before the deep one.

    Args:
        model: A timm classifier, or any other module from images to logits. Its mode, weights and statistics do not change.
        input_size: (C, H, W) of the training images; by default a timm model's own.
        taps: Overrides the choice. Features by index, by module name, or by ``stageK``, the last feature of the K-th grid,
            counted from 1 for the finest; the shallow ones first and the deep one last.

    Raises:
        UserError: if the model has no features to tap, the images are too small, or `taps` does not fit the features.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if input_size is None and not getattr(model, "pretrained_cfg", None):
        raise UserError(f"input_size: {model_name(model)} does not say what images it takes; pass (channels, height, width)")
    size = tuple(int(n) for n in input_size or resolve_input_data_config(model, {})["input_size"])
    probed = probe(model, size)
    if taps is None and not getattr(model, "feature_info", None):
        outer = [feature for feature in probed.features if feature.module.count(".") < 2]
        raise UserError(
            f"sfr_taps: {model_name(model)} has no feature_info that lists its features; name its taps, shallow ones first "
            f"and the deep one last{_example(model, outer, size)}. {_listing(probed.features)}"
        )
    features = probed.features
    shallow, deep, why = _by_rule(model, features, size) if taps is None else _as_given(features, taps)
    return TapPlan(shallow, deep, size, why, probed.mechanism, probed.num_classes)


def _as_given(features: list[Feature], taps: Sequence[int | str]) -> Choice:
    chosen = [_find(features, tap) for tap in taps]
    small = [tap.module for tap in chosen if tap.nodes < MIN_NODES]
    if small:
        raise UserError(
            f"sfr_taps: {', '.join(small)} has fewer than the {MIN_NODES} locations that matching needs; use larger images, or "
            f"other taps. {_listing(features)}"
        )
    deeper = len(chosen) > 1 and all(tap.index < chosen[-1].index for tap in chosen[:-1])
    if not deeper or len({tap.index for tap in chosen}) < len(chosen):
        raise UserError(
            f"sfr_taps: expected one or more shallow taps, each once, and then a deeper one; got {list(taps)}. "
            f"{_listing(features)}"
        )
    return tuple(sorted(chosen[:-1], key=lambda tap: tap.index)), chosen[-1], "as given"


def _by_rule(model: nn.Module, features: list[Feature], size: tuple[int, int, int]) -> Choice:
    matchable = [feature for feature in features if feature.nodes >= MIN_NODES]
    if not matchable:
        raise UserError(
            f"img_size: at {size[1]}x{size[2]} no feature of {model_name(model)} has the {MIN_NODES} locations that matching "
            f"needs; use larger images or a model for small ones (such as resnet20_cifar). {_listing(features)}"
        )
    deep = matchable[-1]
    depth = {name: place for place, name in enumerate(dict.fromkeys(feature.module for feature in features))}
    earlier = [tap for tap in features if depth[tap.module] < depth[deep.module] and tap.nodes >= MIN_NODES]
    if len(depth) < len(features) and earlier:
        # One module returns several features: parallel branches, listed one after the other.
        ends = {tap.grid: tap for tap in earlier}
        return tuple(ends.values()), deep, "parallel branches: last feature of each grid before the deepest module"
    small = features[0].stride == 1 and features[-1].stride < 16  # for small images: no stem to skip
    finest = 1 if small else 4
    finer = {tap.grid: tap for tap in earlier if tap.nodes > deep.nodes and tap.stride >= finest}
    if finer:
        return tuple(finer.values()), deep, "last feature of each earlier, finer stage, and of the deepest"
    level = [tap for tap in earlier if tap.grid == deep.grid]
    if level:
        steps = ISOTROPIC_TAPS + 1
        spaced = {max(0, (len(level) + 1) * step // steps - 1): None for step in range(1, steps)}
        return tuple(level[i] for i in spaced), deep, "evenly spaced depths, and the last"
    raise UserError(
        f"{model_name(model)} has no usable shallow tap at {size[1]}x{size[2]}: its deep tap is feature {deep.index} and no "
        f"earlier one from stride {finest} on is left; use larger images or name taps with sfr_taps. {_listing(features)}"
    )


def _example(model: nn.Module, features: list[Feature], size: tuple[int, int, int]) -> str:
    """Returns ``", for example (...)"`` with the taps that the rule would choose, as a starting point for the user."""
    with contextlib.suppress(UserError, IndexError):
        shallow, deep, _ = _by_rule(model, features, size)
        return f", for example {tuple(tap.module for tap in (*shallow, deep))}"
    return ""


def _find(features: list[Feature], tap: int | str) -> Feature:
    # Names come before indices because the modules of a Sequential are named "0", "1", ...
    by_name = {feature.module: feature for feature in features}
    if isinstance(tap, str) and tap in by_name:
        return by_name[tap]
    for feature in features:
        if str(tap) in (str(feature.index), str(feature.index - len(features))):
            return feature
    grids = dict.fromkeys(sorted((feature.grid for feature in features), reverse=True))
    stages = {f"stage{number}": grid for number, grid in enumerate(grids, 1)}
    if tap in stages:
        return [feature for feature in features if feature.grid == stages[tap]][-1]
    hint = near_matches(str(tap), [feature.module for feature in features])
    raise UserError(f"sfr_taps: no feature {tap!r}{hint or '.'} {_listing(features)}")


def _listing(features: list[Feature]) -> str:
    shown = features if len(features) <= LISTED else [f for f in features if f.module.count(".") < 2][:LISTED]
    cells = [f"{f.index} {f.module} ({f.channels}, {f.grid[0]}x{f.grid[1]})" for f in shown]
    return "Features: " + ", ".join(cells + ["..."] * (len(shown) < len(features)))
