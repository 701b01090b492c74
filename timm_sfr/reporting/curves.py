"""The curves of a run, or of several over each other: which columns of summary.csv share which axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from timm_sfr.runs.records import TERMS, Run

BLUE, ORANGE, GREEN, PURPLE, RED, GREY = "#3b82c4", "#e07b39", "#3f9c66", "#9467bd", "#d1495b", "#8a8f98"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, "#2a9d9d", "#b5892e", GREY)

# What is compared between runs: a column of summary.csv, and its title.
SHARED = (
    ("train_loss", "training loss"), ("val_loss", "validation loss"), ("val_top1", "validation top-1, %"),
    ("val_top5", "validation top-5, %"), *((term.name, term.title) for term in TERMS[1:] if term.title),
    ("lr", "learning rate"), ("images_per_second", "training images/s"),
)  # fmt: skip
# What the curves of one run show: file name, title, and the columns of summary.csv that share the axes.
PANELS = (
    ("loss", "loss", (("train_loss", "training", BLUE), ("val_loss", "validation", ORANGE),
                      ("task_loss", "training, task term", GREY))),
    ("features", "feature loss", (("sfr_loss", "raw", ORANGE), ("weighted", "weighted by λ", GREEN))),
    ("teacher", "labels and teacher", (("cls_loss", "loss of the labels, raw", BLUE), ("kd_loss", "distillation, raw", GREEN))),
    ("score", "validation score, %", (("val_top1", "top-1", BLUE), ("val_top5", "top-5", GREY))),
    ("lr", "learning rate", (("lr", "learning rate", PURPLE),)),
    ("sfr", "weight λ and smoothing ε", (("sfr_weight", "λ", ORANGE), ("smoothing", "ε", RED))),
    ("speed", "training images/s", (("images_per_second", "images/s", GREEN),)),
)  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """One line of a panel.

    Attributes:
        label: What it is; a run's name where several are compared.
        epochs: Epochs, from 1.
        values: As many values.
        colour: Its colour.
        dashed: Whether the line is.
    """

    label: str
    epochs: Sequence[float]
    values: Sequence[float]
    colour: str
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """One set of axes of curves.

    Attributes:
        name: Its file's name.
        title: What it shows, with the unit.
        curves: What is drawn.
    """

    name: str
    title: str
    curves: list[Curve]


def own_panels(run: Run) -> list[Panel]:
    """The curves of one run."""
    panels = []
    for name, title, columns in PANELS:
        lines = [
            Curve(label, *run.column(column), colour, column in ("weighted", "task_loss"))
            for column, label, colour in columns
            if _says(run, column)
        ]
        if lines:
            panels.append(Panel(name, title, lines))
    return panels


def shared_panels(runs: Sequence[tuple[str, str, Run]]) -> list[Panel]:
    """The same curves of several runs over each other: (label, colour, run)."""
    return [
        Panel(column, title, [Curve(who, *run.column(column), colour) for who, colour, run in runs])
        for column, title in SHARED
        if any(_says(run, column) for _, _, run in runs)
    ]


def _says(run: Run, column: str) -> bool:
    """Whether a column has anything to show: without SFR its terms are 0 throughout."""
    values = run.column(column)[1]
    return any(values) if column in ("sfr_loss", "weighted", "sfr_weight", "smoothing") else bool(values)
