"""The tasks, and the scores of each: their names, titles, and the one that chooses the best model. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CLASSIFICATION, MULTILABEL = "classification", "multilabel"
TASKS = (CLASSIFICATION, MULTILABEL)
# The scores in percent by their names, the main one first. Every task has a loss too.
PERCENT = {CLASSIFICATION: ("top1", "top5"), MULTILABEL: ("map", "micro_f1", "macro_f1", "sample_f1")}
TITLES = {
    "top1": "top-1",
    "top5": "top-5",
    "map": "mAP",
    "micro_f1": "micro F1",
    "macro_f1": "macro F1",
    "sample_f1": "sample F1",
}
METRICS = (*TITLES, "loss")


def task_of(options: Mapping[str, Any]) -> str:
    """Returns the task of a run with these options; runs of versions that had only one do not name it."""
    return options.get("task") or CLASSIFICATION


def metrics_of(task: str) -> tuple[str, ...]:
    """Returns the names of a task's scores that may choose the best model; the first one does by default."""
    return (*PERCENT[task], "loss")


def recorded_scores(task: str) -> tuple[str, ...]:
    """Returns the names of the scores that a run records of a split."""
    return (*metrics_of(task), "ece") if task == CLASSIFICATION else metrics_of(task)


def shown_percents(task: str, num_classes: int | None) -> tuple[str, ...]:
    """Returns the scores in percent that say anything: with up to five classes, the top-5 does not."""
    return tuple(name for name in PERCENT[task] if name != "top5" or (num_classes or 1000) > 5)
