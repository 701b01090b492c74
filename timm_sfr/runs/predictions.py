"""What a model said of every image of a split: kept on the device while it is validated, written as ``predictions.csv``.

Shape suffixes: B batch, n images, K classes.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from timm_sfr.utils.errors import UserError
from timm_sfr.utils.files import replace_atomically

PREDICTIONS = "predictions.csv"
COLUMNS = ("index", "file", "target", "prediction", "confidence")


@dataclass
class Predictions:
    """Of every image, in the order of the split: its class, the predicted one, and its probability.

    Attributes:
        parts: Targets, predictions and confidences, (3, B) a batch, on the device.
    """

    parts: list[Tensor] = field(default_factory=list)

    def add(self, target: Tensor, prediction: Tensor, confidence: Tensor) -> None:
        """Keeps a batch: three tensors (B,); nothing waits for the device."""
        # Classes as floats are exact up to 2^24.
        self.parts.append(torch.stack([target.float(), prediction.float(), confidence.float()]))

    def rows(self) -> np.ndarray:
        """(n, 3): target, prediction, confidence."""
        return torch.cat(self.parts, 1).T.cpu().numpy() if self.parts else np.zeros((0, 3), np.float32)


@dataclass(frozen=True)
class Judged:
    """``predictions.csv``, read.

    Attributes:
        files: Name of each image's file, or its number; (n,).
        target: Its class, (n,).
        prediction: The predicted class, (n,).
        confidence: The probability of that class, (n,).
    """

    files: list[str]
    target: np.ndarray
    prediction: np.ndarray
    confidence: np.ndarray

    @property
    def hits(self) -> np.ndarray:
        """Whether each image's class was predicted, (n,)."""
        return self.target == self.prediction

    def confusion(self, classes: int, most: int = 200) -> tuple[np.ndarray, int]:
        """Counts of images of class i that were called j, and how many classes share a row and column: 1 up to `most`.

        With more classes neighbours are counted together, n at a time: (K / n, K / n).
        """
        share = -(-classes // most)
        size = -(-classes // share)
        codes = self.target // share * size + self.prediction // share
        return np.bincount(codes, minlength=size**2).reshape(size, size), share

    def by_class(self, classes: int) -> tuple[np.ndarray, np.ndarray]:
        """Images of each class, and how many of them were right, both (K,)."""
        return tuple(np.bincount(chosen, minlength=classes) for chosen in (self.target, self.target[self.hits]))

    def wrong(self) -> list[tuple[int, int, int]]:
        """Which class was called which other one, and how often, the most frequent first."""
        wrong = np.stack([self.target, self.prediction], 1)[~self.hits]
        pairs, counts = np.unique(wrong, axis=0, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return [(int(i), int(j), int(n)) for (i, j), n in zip(pairs[order], counts[order], strict=True)]

    def calibration(self, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Images, mean confidence and accuracy of every bin of equal width, each (bins,); nan where a bin is empty."""
        place = np.minimum((self.confidence * bins).astype(int), bins - 1)
        count = np.bincount(place, minlength=bins)
        some = np.where(count > 0, count, np.nan)
        confidence = np.bincount(place, self.confidence, minlength=bins) / some
        return count, confidence, np.bincount(place, self.hits, minlength=bins) / some

    def mistakes(self, count: int) -> list[int]:
        """Indices of the `count` wrong predictions of the highest confidence, the surest first."""
        wrong = np.flatnonzero(~self.hits)
        return wrong[np.argsort(-self.confidence[wrong], kind="stable")][:count].tolist()


def write_predictions(path: Path, rows: np.ndarray, name: Callable[[int], str]) -> None:
    """Writes rows (n, 3) as a CSV file, whole; `name` gives the file of an image by its index."""

    def write(fresh: Path) -> None:
        with fresh.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for index, (target, prediction, confidence) in enumerate(rows.tolist()):
                writer.writerow((index, name(index), int(target), int(prediction), f"{confidence:.8g}"))

    replace_atomically(path, write)


def read_predictions(path: Path, classes: int = 10**7) -> Judged:
    """What `write_predictions` wrote, of `classes` classes at most.

    Raises:
        UserError: if it is not that.
    """
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file))
        files = [row["file"] for row in rows]
        target, prediction = (np.array([int(row[name]) for row in rows], dtype=int) for name in COLUMNS[2:4])
        # A model that has diverged has no probabilities: nan.
        confidence = np.nan_to_num(np.array([float(row["confidence"]) for row in rows], dtype=np.float32))
        if min(target.min(), prediction.min()) < 0 or max(target.max(), prediction.max()) >= classes:
            raise ValueError(f"expected classes from 0 to {classes - 1}")
        if not ((confidence >= 0) & (confidence <= 1)).all():
            raise ValueError("expected probabilities")
    except (OSError, KeyError, TypeError, ValueError, OverflowError, csv.Error) as error:
        raise UserError(f"{path.name} is not what a run wrote: {error}") from error
    return Judged(files, target, prediction, confidence)


ECE_BINS = 15
