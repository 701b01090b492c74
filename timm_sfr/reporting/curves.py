"""The curves of one run or of several: which columns of summary.csv share axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from timm_sfr.runs.records import TERMS, Run
from timm_sfr.runs.scores import MULTILABEL, PERCENT, TITLES, shown_percents

BLUE, ORANGE, GREEN, PURPLE, RED, GREY = "#3b82c4", "#e07b39", "#3f9c66", "#9467bd", "#d1495b", "#8a8f98"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, "#2a9d9d", "#b5892e", GREY)

# The curves that compare runs: a column of summary.csv, and its title.
SHARED = (
    ("train_loss", "training loss"), ("val_loss", "validation loss"), ("val_top1", "validation top-1, %"),
    ("val_top5", "validation top-5, %"),
    *((f"val_{name}", f"validation {TITLES[name]}, %") for name in PERCENT[MULTILABEL]),
    *((term.name, term.title) for term in TERMS[1:] if term.title),
    ("lr", "learning rate"), ("images_per_second", "training images/s"),
)  # fmt: skip
# The panels of one run: file name, title, and the columns of summary.csv that share the axes.
PANELS = (
    ("loss", "loss", (("train_loss", "training", BLUE), ("val_loss", "validation", ORANGE),
                      ("task_loss", "training, task term", GREY))),
    ("features", "feature loss", (("sfr_loss", "raw", ORANGE), ("weighted", "weighted by λ", GREEN))),
    ("terms", "parts of the task term", (("cls_loss", "classification, raw", BLUE), ("kd_loss", "distillation, raw", GREEN),
                                         ("jsd_loss", "JSD of the views, raw", PURPLE))),
    ("score", "validation score, %", (("val_top1", "top-1", BLUE), ("val_top5", "top-5", GREY),
                                          ("val_map", "mAP", BLUE), ("val_micro_f1", "micro F1", GREEN),
                                          ("val_macro_f1", "macro F1", PURPLE), ("val_sample_f1", "sample F1", GREY))),
    ("lr", "learning rate", (("lr", "learning rate", PURPLE),)),
    ("lambda", "weight λ of the feature loss", (("sfr_weight", "λ", ORANGE),)),
    ("smoothing", "smoothing ε", (("smoothing", "ε", RED),)),
    ("speed", "training images/s", (("images_per_second", "images/s", GREEN),)),
)  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """One line of a panel."""

    label: str  # in the legend; the run's name if runs are compared
    epochs: Sequence[float]  # from 1
    values: Sequence[float]  # one per epoch
    colour: str
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves that share axes."""

    name: str
    title: str  # with the unit
    curves: list[Curve]


def own_panels(run: Run) -> list[Panel]:
    """Returns the panels of one run, without top-5 where it says nothing (few classes)."""
    panels, hidden = [], set(PERCENT[run.task]) - set(shown_percents(run.task, run.options.get("num_classes") or 1))
    for name, title, columns in PANELS:
        lines = [
            Curve(label, *run.column(column), colour, column in ("weighted", "task_loss"))
            for column, label, colour in columns
            if _has_data(run, column) and column.removeprefix("val_") not in hidden
        ]
        if lines:
            panels.append(Panel(name, title, lines))
    return panels


def shared_panels(runs: Sequence[tuple[str, Run]]) -> list[Panel]:
    """Returns panels that overlay the curves of several runs, given as (label, run); those that differ come first."""
    places = {label: place for place, label in enumerate(dict.fromkeys(label for label, _ in runs))}
    # After as many labels as there are colours, the lines are dashed.
    looks = {label: (COLOURS[place % len(COLOURS)], place // len(COLOURS) % 2 == 1) for label, place in places.items()}
    panels = [
        Panel(column, title, [Curve(label, *run.column(column), *looks[label]) for label, run in runs])
        for column, title in SHARED
        if any(_has_data(run, column) for _, run in runs)
    ]
    return sorted(panels, key=lambda panel: len({tuple(curve.values) for curve in panel.curves}) == 1)


def _has_data(run: Run, column: str) -> bool:
    """Returns whether a column is worth plotting; without SFR, its terms are always 0."""
    values = run.column(column)[1]
    return any(values) if column in ("sfr_loss", "weighted", "sfr_weight", "smoothing") else bool(values)
