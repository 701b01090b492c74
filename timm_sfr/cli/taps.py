"""``timm-sfr taps MODEL``: shows what SFR would tap in a model, as a table and as a picture."""

from __future__ import annotations

import json
import math
import time
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from timm_sfr.cli.parser import given
from timm_sfr.cli.verbs import TAPS
from timm_sfr.config import RunConfig
from timm_sfr.data.transforms import preprocessing
from timm_sfr.method.channels import ChannelProjection
from timm_sfr.method.config import SFRConfig
from timm_sfr.method.feature_loss import FeatureLoss
from timm_sfr.method.probe import Feature, probe
from timm_sfr.method.taps import TapPlan, choose_taps
from timm_sfr.models.loading import new_model
from timm_sfr.runs.records import recorded
from timm_sfr.utils.console import aligned, counted, sides
from timm_sfr.utils.errors import UserError

ROUNDS = 5  # timed runs of a loss, after one to warm up


@dataclass(frozen=True)
class TapRow:
    """One tap.

    Attributes:
        role: ``"shallow"`` or ``"deep"``.
        index: Its place among the features, from 0, as ``--sfr-taps`` takes it.
        stage: Number of its grid among the network's grids, 1 for the finest.
        module: The tapped module.
        channels: C.
        reduction: Stride: image pixels per location, along a side.
        grid: Locations H x W of the feature map.
        nodes: Number of matched locations, after pooling.
        match: How the deep channels teach this tap's; empty for the deep tap.
        milliseconds: Time that its loss adds to a step on this machine, forward and backward; 0 for the deep tap.
    """

    role: str
    index: int
    stage: int
    module: str
    channels: int
    reduction: int
    grid: tuple[int, int]
    nodes: int
    match: str
    milliseconds: float


def describe(plan: TapPlan, features: list[Feature], config: SFRConfig, batch: int) -> list[TapRow]:
    """Returns a row for each tap of `plan`; the losses are timed on random features.

    Args:
        plan: The taps.
        features: All features of the model.
        config: SFR's options.
        batch: Batch size for the timing.
    """
    stages = list(dict.fromkeys(feature.grid for feature in features))
    *grids, deep_grid = plan.node_grids(config.max_nodes, config.common_grid)
    deep = plan.deep
    rows = []
    for tap, grid in zip(plan.shallow, grids, strict=True):
        cost = _milliseconds(tap, grid, deep, deep_grid, config, batch)
        match = _match(deep.channels, tap.channels, config.channels)
        rows.append(_row("shallow", tap, stages, grid, match, cost))
    return [*rows, _row("deep", deep, stages, deep_grid, "", 0.0)]


def taps_table(plan: TapPlan, rows: list[TapRow], batch: int, matching: str) -> str:
    """Returns the rows as a table, followed by the rule that chose the taps and the total cost."""
    lines = [("tap", "index", "module", "channels", "grid", "stride", "nodes", "deep channels teach", "ms a step")]
    for row in rows:
        cost = f"{row.milliseconds:.2f}" if row.role == "shallow" else ""
        grid = f"{row.grid[0]}x{row.grid[1]}"
        lines.append((row.role, str(row.index), row.module, str(row.channels), grid, str(row.reduction), str(row.nodes),
                      row.match, cost))  # fmt: skip
    total = sum(row.milliseconds for row in rows)
    size = "x".join(map(str, plan.input_size))
    where = f"at {size}: {plan.why}; taken by {plan.mechanism}"
    cost = (f"locations matched by {matching}; that takes {total:.1f} ms for a batch of {batch} here, "
            f"{counted(torch.get_num_threads(), 'CPU thread')}")  # fmt: skip
    return "\n".join([*aligned(lines), where, cost])


def picture(plan: TapPlan, features: list[Feature], rows: list[TapRow], name: str, path: Path) -> None:
    """Draws the features by depth, with the taps coloured and an arrow from the deep tap to each shallow one.

    Raises:
        UserError: if the file cannot be written, or matplotlib does not support its type.
    """
    from matplotlib.figure import Figure  # imported here because it is slow to import
    from matplotlib.patches import Rectangle

    tapped = {row.module: row for row in rows}
    shown = [feature for feature in features if feature.module in tapped or len(features) <= 12]
    figure = Figure(figsize=(max(6, 1.5 * len(shown)), 4.2))
    axes = figure.add_subplot()
    places = {feature.module: index for index, feature in enumerate(shown)}
    for index, feature in enumerate(shown):
        row = tapped.get(feature.module)
        height = 0.25 + 0.75 * (feature.grid[0] / max(one.grid[0] for one in shown)) ** 0.5
        width = 0.2 + 0.5 * (feature.channels / max(one.channels for one in shown)) ** 0.5
        colour = "#d0d4da" if row is None else "#e8833a" if row.role == "deep" else "#3b76af"
        axes.add_patch(Rectangle((index - width / 2, -height / 2), width, height, color=colour))
        text = f"{feature.module}\n{feature.channels} x {feature.grid[0]}x{feature.grid[1]}"
        axes.text(index, -0.62, text, ha="center", va="top", fontsize=8)
    for row in rows[:-1]:
        start, end = places[rows[-1].module], places[row.module]
        arrow = {"arrowstyle": "->", "connectionstyle": "arc3,rad=0.3", "color": "#e8833a"}
        axes.annotate("", (end, 0.5), (start, 0.5), arrowprops=arrow)
        text = f"{row.match}\n{row.nodes} nodes"
        axes.text(end, -0.98, text, ha="center", va="top", fontsize=7, color="#3b76af")
    axes.set(xlim=(-0.8, len(shown) - 0.2), ylim=(-1.4, 0.8 + 0.15 * len(shown)))
    axes.axis("off")
    title = f"{name} at {sides(*plan.input_size[1:])} pixels: the deep tap (orange) teaches the shallow ones (blue)"
    axes.set_title(title, fontsize=9)
    try:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise UserError(f"picture: cannot write {str(path)!r}: {error}") from error


def run(args: Namespace) -> int:
    """Runs the command; returns 0."""
    kept = ("sfr", "sfr_weight", "batch_size", *(name for name in TAPS if name.startswith("sfr_")))
    own = recorded(args.model, kept)
    config = RunConfig.from_flat({"dataset": "none", "model": args.model, **own, **given(args, TAPS)})
    model: nn.Module = new_model(config.model, 10)
    size = preprocessing(config.model, model).input_size
    plan, features = choose_taps(model, size, config.sfr.taps), probe(model, size).features
    batch = config.data.batch
    rows = describe(plan, features, config.sfr, batch)
    if args.picture is not None:
        picture(plan, features, rows, args.model, args.picture)
    if args.json:
        taps = [asdict(row) for row in rows]
        print(json.dumps({"model": args.model, "input_size": size, "why": plan.why, "taps": taps}))
    else:
        print(taps_table(plan, rows, batch, config.sfr.matching))
        if not (config.sfr.enabled and config.sfr.weight):
            print("this run has no feature loss; these are the taps that it would have")
    return 0


def _row(role: str, tap: Feature, stages: list[Any], grid: tuple[int, int], match: str, cost: float) -> TapRow:
    place = stages.index(tap.grid) + 1
    return TapRow(role, tap.index, place, tap.module, tap.channels, tap.stride, tap.grid, grid[0] * grid[1], match, cost)


def _match(deep: int, shallow: int, method: str) -> str:
    if method == "projection":
        return f"{shallow} projected to {deep}"
    if deep == shallow and method == "groups":
        return f"{deep} to {shallow}, one to one"
    if deep < shallow:
        return f"{deep} to {shallow}, each for {math.ceil(shallow / deep)}"
    return f"{deep} to {shallow}, {deep / shallow:.3g} to 1" + ", by correlation" * (method == "transport")


def _milliseconds(
    tap: Feature, grid: tuple[int, int], deep: Feature, deep_grid: tuple[int, int], config: SFRConfig, batch: int
) -> float:
    """Returns the median time of one tap's loss with its gradient, in milliseconds."""
    shallow = torch.randn(batch, grid[0] * grid[1], tap.channels, requires_grad=True)
    teacher = torch.randn(batch, deep_grid[0] * deep_grid[1], deep.channels)
    loss = FeatureLoss(config)
    project = ChannelProjection((tap.channels,), deep.channels) if config.channels == "projection" else list
    times = []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        loss(project([shallow]), teacher).backward()
        times.append(time.perf_counter() - started)
    return 1e3 * median(times[1:])
