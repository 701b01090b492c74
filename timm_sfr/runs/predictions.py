"""A model's predictions for all images of a split: kept on the device during validation, written to ``predictions.csv``.

If an image may have several classes, ``classes.csv`` has the scores of each class instead.

Shape suffixes: B batch, n images, K classes.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from timm_sfr.utils.errors import UserError
from timm_sfr.utils.files import replace_atomically

PREDICTIONS = "predictions.csv"
CLASS_SCORES = "classes.csv"
COLUMNS = ("index", "file", "target", "prediction", "confidence")
CLASS_COLUMNS = ("index", "class", "images", "ap", "precision", "recall", "f1")
ECE_BINS = 15


@dataclass
class Predictions:
    """Collects each image's class, predicted class and its probability, in the order of the split.

    If an image may have several classes, `by_class` returns the scores of each class instead, as `write_class_scores` takes
    them.
    """

    parts: list[Tensor] = field(default_factory=list)  # (3, B) per batch, on the device: targets, predictions, confidences
    by_class: Callable[[], np.ndarray] | None = None

    def add(self, target: Tensor, prediction: Tensor, confidence: Tensor) -> None:
        """Adds a batch, three tensors (B,), without waiting for the device."""
        # float32 holds class indices exactly up to 2^24.
        self.parts.append(torch.stack([target.float(), prediction.float(), confidence.float()]))

    def rows(self) -> np.ndarray:
        """Returns an array (n, 3): target, prediction, confidence."""
        return torch.cat(self.parts, 1).T.cpu().numpy() if self.parts else np.zeros((0, 3), np.float32)


@dataclass(frozen=True)
class PredictionTable:
    """The contents of ``predictions.csv``."""

    files: list[str]  # the file name of each image, or its number, (n,)
    target: np.ndarray  # its class, (n,)
    prediction: np.ndarray  # the predicted class, (n,)
    confidence: np.ndarray  # the probability of the predicted class, (n,)

    @property
    def hits(self) -> np.ndarray:
        """Whether each prediction is correct, (n,)."""
        return self.target == self.prediction

    def confusion(self, classes: int, most: int = 200) -> tuple[np.ndarray, int]:
        """Returns the confusion matrix and the number n of neighbouring classes that share a row and a column.

        Entry (i, j) counts the images of class i that were predicted as j. Up to `most` classes n is 1 and the matrix is
        (K, K); with more classes it is (K / n, K / n), rounded up.
        """
        share = -(-classes // most)
        size = -(-classes // share)
        codes = self.target // share * size + self.prediction // share
        return np.bincount(codes, minlength=size**2).reshape(size, size), share

    def by_class(self, classes: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the number of images of each class and how many of them were predicted correctly, both (K,)."""
        return tuple(np.bincount(chosen, minlength=classes) for chosen in (self.target, self.target[self.hits]))

    def wrong(self) -> list[tuple[int, int, int]]:
        """Returns the wrong predictions as (class, predicted class, count), the most frequent first."""
        wrong = np.stack([self.target, self.prediction], 1)[~self.hits]
        pairs, counts = np.unique(wrong, axis=0, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return [(int(i), int(j), int(n)) for (i, j), n in zip(pairs[order], counts[order], strict=True)]

    def calibration(self, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the image count, mean confidence and accuracy of bins of equal width, each (bins,); nan in empty bins."""
        index = np.minimum((self.confidence * bins).astype(int), bins - 1)
        count = np.bincount(index, minlength=bins)
        divisor = np.where(count > 0, count, np.nan)
        confidence = np.bincount(index, self.confidence, minlength=bins) / divisor
        return count, confidence, np.bincount(index, self.hits, minlength=bins) / divisor

    def mistakes(self, count: int) -> list[int]:
        """Returns the indices of the `count` wrong predictions with the highest confidence, the most confident first."""
        wrong = np.flatnonzero(~self.hits)
        return wrong[np.argsort(-self.confidence[wrong], kind="stable")][:count].tolist()


def write_predictions(path: Path, rows: np.ndarray, name: Callable[[int], str]) -> None:
    """Writes rows (n, 3) to a CSV file, atomically; `name` returns an image's file name for its index."""
    lines = (
        (index, name(index), int(target), int(prediction), f"{confidence:.8g}")
        for index, (target, prediction, confidence) in enumerate(rows.tolist())
    )
    _write(path, COLUMNS, lines)


def read_predictions(path: Path, classes: int = 10**7) -> PredictionTable:
    """Reads a file of `write_predictions` with at most `classes` classes; raises UserError if its contents are invalid."""
    try:
        rows = _read(path)
        files = [row["file"] for row in rows]
        target, prediction = (np.array([int(row[name]) for row in rows], dtype=int) for name in COLUMNS[2:4])
        # A diverged model outputs nan instead of probabilities.
        confidence = np.nan_to_num(np.array([float(row["confidence"]) for row in rows], dtype=np.float32))
        if min(target.min(), prediction.min()) < 0 or max(target.max(), prediction.max()) >= classes:
            raise ValueError(f"expected classes from 0 to {classes - 1}")
        if not ((confidence >= 0) & (confidence <= 1)).all():
            raise ValueError("expected probabilities from 0 to 1")
    except (OSError, KeyError, TypeError, ValueError, OverflowError, csv.Error) as error:
        raise UserError(f"cannot read {path.name}: {error}") from error
    return PredictionTable(files, target, prediction, confidence)


def write_class_scores(path: Path, scores: np.ndarray, names: Sequence[str]) -> None:
    """Writes the scores of each class, (K, 5), to a CSV file: images, then AP, precision, recall and F1 in percent."""
    lines = (
        (index, name, int(images), *(f"{value:.8g}" for value in percents))
        for index, (name, (images, *percents)) in enumerate(zip(names, scores.tolist(), strict=True))
    )
    _write(path, CLASS_COLUMNS, lines)


def read_class_scores(path: Path) -> list[dict[str, Any]]:
    """Reads a file of `write_class_scores`, or raises UserError: a row for each class, with numbers, but for its name."""
    try:
        return [{key: row[key] if key == "class" else float(row[key]) for key in CLASS_COLUMNS} for row in _read(path)]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read {path.name}: {error}") from error


def _write(path: Path, columns: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    """Writes a CSV file atomically; file names may have any bytes."""

    def write(fresh: Path) -> None:
        with fresh.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(lines)

    replace_atomically(path, write)


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))
