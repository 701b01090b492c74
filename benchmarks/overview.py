"""The small tables at the top of docs/results.md: SFR and what it is compared with, one column for each set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

from benchmarks.pages import markdown
from benchmarks.presets import PRESETS
from timm_sfr.cli.compare import spread

Rows = Iterable[dict[str, str]]


@dataclass(frozen=True)
class Column:
    """One set of the comparison under its title; `epochs` None are those of the preset."""

    title: str
    set: str
    preset: str = "cpu"
    split: str = "val"
    epochs: int | None = None

    def scores(self, rows: Rows, method: str) -> dict[int, float]:
        """Returns top-1 at the last epoch of one method, by seed."""
        epochs = self.epochs or PRESETS[self.preset][self.set].epochs
        wanted = (self.preset, self.set, self.split, str(epochs), method)
        found = (row for row in rows if tuple(row[key] for key in ("preset", "set", "split", "epochs", "method")) == wanted)
        return {int(row["seed"]): float(row["top1"]) for row in found}


SETS = ("tin100-3k", "cifar10-2k", "tin100-6k")
PEERS = {
    "ce": "cross-entropy", "ls": "label smoothing 0.1", "ls-0.5": "label smoothing 0.5", "ols": "OLS", "cskd": "CS-KD",
    "byot": "BYOT", "deepsup": "deep supervision", "pskd": "PS-KD", "tfkd": "Tf-KD", "tffd": "Tf-FD",
    "dlb": "DLB (twice the time)",
}  # fmt: skip
PARTS = {
    "sfr:smoothing=0": "no smoothing",
    "sfr:matching=grid": "no plan (same place instead)",
    "sfr:matching=gaussian": "no plan (Gaussians instead)",
    "sfr:channels=projection": "no many-to-one (a learned projection instead)",
    "sfr:weight=0": "smoothing alone",
    "sfr:matching=grid,smoothing=0": "many-to-one alone",
    "sfr:channels=projection,smoothing=0": "the plan alone",
    "ce": "none: cross-entropy",
}
FULL = (
    Column("all 50,000 images of CIFAR-10", "cifar10-full", "full"),
    Column("all 50,000 images of 100 classes of Tiny ImageNet", "tin100-full", "full"),
)
# The same network on other images and other networks on the same images, held-out: which network the feature loss helps.
NETWORKS = (
    Column("CIFAR-10, 200 a class; one block a stage, 1.15 M", "cifar10-2k", split="heldout"),
    Column("the same images; `resnet20_cifar` with one block a stage", "cifar10-2k-three", "regimes", "heldout"),
    Column("the same images; `resnet20_cifar`", "cifar10-2k-deep", "regimes", "heldout"),
    Column("the same images; `wrn_16_2_cifar`", "cifar10-2k-wrn", "regimes", "heldout"),
    Column("Tiny ImageNet, 30 a class; `resnet20_cifar`", "tin100-3k-deep", "regimes", "heldout"),
    Column("all of CIFAR-10, 10 epochs; one block a stage, 1.15 M", "cifar10-full-small", "regimes", "heldout"),
    Column("all of CIFAR-10, 10 epochs; `resnet20_cifar`", "cifar10-full", "full", "heldout", 10),
)
WEIGHTS = {
    "sfr:weight=0": "no feature loss", "sfr:weight=0.1": "a tenth of its weight", "sfr:weight=0.3": "0.3 of its weight",
    "sfr:taps=[0,2]": "without the second of two shallow taps", "sfr:taps=[0,1,3]": "without the third of three shallow taps",
}  # fmt: skip
OTHER = (
    Column("60 images a class, 48 epochs", "tin100-6k", epochs=48),
    Column("mixup and CutMix", "tin100-3k-mix", "regimes"),
    Column("twice as wide", "tin100-3k-wide", "regimes"),
    Column("a narrow network", "tin100-narrow-250", "narrow"),
    Column("fine-tuning, 200 a class", "cifar10-2k-finetune", "regimes"),
    Column("fine-tuning, 1,000 a class", "cifar10-10k-finetune", "regimes"),
)
# Each table by its label: its columns, and its rows as method and title.
OVERVIEWS: dict[str, tuple[Sequence[Column], dict[str, str]]] = {
    "overview-val": ([Column(name, name) for name in SETS], PEERS),
    "overview-part2": (
        [Column(name, name, split="val-part2") for name in SETS],
        {name: PEERS[name] for name in ("ls", "ols", "cskd", "byot")},
    ),
    "overview-parts": ([Column(name, name) for name in SETS], PARTS),
    "overview-full": (FULL, {name: PEERS[name] for name in ("ce", "ls", "byot", "cskd")}),
    "overview-networks": (NETWORKS, WEIGHTS),
    "overview-other": (OTHER, {name: PEERS[name] for name in ("ce", "ls")}),
}


def overview(rows: Rows, columns: Sequence[Column], methods: dict[str, str]) -> str:
    """Returns a Markdown table of mean top-1: SFR first, then each method with SFR's difference to it in brackets.

    ± is half the 95 % t-interval. Differences are paired by seed; a number after them counts the pairs if they are not five.
    """
    rows = list(rows)
    ours = [column.scores(rows, "sfr") for column in columns]
    lines = [["**SFR**", *(f"**{spread(list(one.values()), 1)}**" + _count(one) if one else "" for one in ours)]]
    for method, title in methods.items():
        cells = []
        for column, own in zip(columns, ours, strict=True):
            theirs = column.scores(rows, method)
            gains = [own[seed] - theirs[seed] for seed in sorted(own.keys() & theirs.keys())]
            value = f"{mean(theirs.values()):.1f}" if theirs else ""
            cells.append(f"{value} ({spread(gains, 1, '+')}{_count(gains)})" if gains else value)
        lines.append([title, *cells])
    return markdown(["", *(column.title for column in columns)], [line for line in lines if any(line[1:])])


def _count(values: Sequence | dict) -> str:
    return f"; {len(values)}" if len(values) != 5 else ""
