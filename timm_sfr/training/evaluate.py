"""Validation: exact sums over the images, each counted once, and the scores computed from them.

Shape suffixes: B batch, V views of an image, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.task.evaluator import MultiLabelClassificationEvaluator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from timm_sfr.data.transforms import Preprocessing, plain_view
from timm_sfr.runs.predictions import ECE_BINS, Predictions

WRONG = 1e4  # a logit that stands for a prediction as wrong as can be


class Scores:
    """Validation sums on the device: images, loss, top-1, top-5 and the calibration bins."""

    by_class = None

    def __init__(self, device: torch.device) -> None:
        # float64 counts exactly and sums many losses accurately; Apple's GPUs do not have it.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(5, dtype=dtype, device=device)
        self.bins = torch.zeros(3, ECE_BINS, dtype=dtype, device=device)

    def add(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Adds a batch of logits (B, K) and class indices (B,); returns the predicted classes (B,) and probabilities (B,).

        An image with a logit that is not finite counts as wrong, with probability 0, and makes the loss not finite.
        """
        logits = logits.float()
        finite = logits.isfinite().all(1)
        order = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = (order == target[:, None]) & finite[:, None]
        loss = F.cross_entropy(logits, target, reduction="sum")
        counts = torch.stack([loss.new_tensor(len(target)), loss, hits[:, 0].sum(), hits.sum(), (~finite).sum()])
        self.sums += counts.to(self.sums.dtype)
        confidence = logits.softmax(1).amax(1).where(finite, 0)
        bins = (confidence * ECE_BINS).long().clamp_max(ECE_BINS - 1)
        rows = torch.stack([torch.ones_like(confidence), confidence, hits[:, 0].float()])
        self.bins.index_add_(1, bins, rows.to(self.bins.dtype))
        return order[:, 0], confidence

    def result(self) -> dict[str, float]:
        """Returns ``images``, ``loss``, ``top1`` and ``top5`` (percent), ``ece``, and ``nonfinite``: images with such logits.

        ECE = sum_b (n_b / n) |accuracy_b - confidence_b| over 15 bins of equal width (Guo et al., arXiv 1706.04599).
        """
        images, loss, top1, top5, nonfinite = self.sums.tolist()
        count = max(images, 1)
        gap = (self.bins[2] - self.bins[1]).abs().sum().item() / count
        return {
            "images": int(images),
            "loss": loss / count,
            "top1": 100 * top1 / count,
            "top5": 100 * top5 / count,
            "ece": gap,
            "nonfinite": int(nonfinite),
        }


class LabelScores:
    """Validation of images with several labels, by timm's `MultiLabelClassificationEvaluator`, on all logits at the end.

    From the probability `threshold` on, a class counts as predicted.
    """

    def __init__(self, device: torch.device, threshold: float) -> None:
        self.evaluator = MultiLabelClassificationEvaluator(device, threshold=threshold)
        self.nonfinite = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, logits: Tensor, target: Tensor) -> None:
        """Adds a batch of logits and labels, 0 or 1, both (B, K).

        For an image with a logit that is not finite, every label counts as wrong, and the loss is not finite.
        """
        logits = logits.float()
        finite = logits.isfinite().all(1)
        self.nonfinite += (~finite).sum()
        self.evaluator.update(logits.where(finite[:, None], (1 - 2 * target) * WRONG), target)

    def result(self) -> dict[str, float]:
        """Returns ``images``, ``loss``, ``map``, ``micro_f1``, ``macro_f1``, ``sample_f1`` (percent), and ``nonfinite``.

        ``loss`` is the binary cross-entropy, mean over images and classes. ``map`` is the mean over the classes of the average
        precision. Classes without positives count as 0, as in timm.
        """
        found, nonfinite = self.evaluator.compute(), int(self.nonfinite)
        loss = math.nan if nonfinite else found["loss"]
        return {"images": self.evaluator.num_samples, **found, "loss": loss, "nonfinite": nonfinite}

    def by_class(self) -> np.ndarray:
        """Returns the scores of each class, (K, 5): images that have it; AP, precision, recall and F1 in percent."""
        from sklearn.metrics import average_precision_score, precision_recall_fscore_support  # slow to import

        evaluator = self.evaluator
        logits, target = (torch.cat(parts).numpy() for parts in (evaluator.outputs, evaluator.targets))
        predicted = torch.from_numpy(logits).sigmoid().numpy() >= evaluator.threshold
        precision, recall, f1, images = precision_recall_fscore_support(target, predicted, average=None, zero_division=0)
        ap = [average_precision_score(target[:, k], logits[:, k]) if images[k] else 0.0 for k in range(len(images))]
        return np.stack([images, *(100 * np.asarray(values) for values in (ap, precision, recall, f1))], 1)


def new_scores(device: torch.device, threshold: float | None) -> Scores | LabelScores:
    """Returns the sums of a validation; with a `threshold`, an image may have several labels."""
    return Scores(device) if threshold is None else LabelScores(device, threshold)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    prep: Preprocessing,
    accelerator: Any,
    seen: Predictions | None = None,
    watch: Callable[[Iterable], Iterable] = iter,
    threshold: float | None = None,
) -> dict[str, float]:
    """Returns the scores of `model` over the whole split, the same on every process.

    For an indexed split, Accelerate has prepared the loader: each process reads its part, and `gather_for_metrics` drops
    the images repeated to make the parts even. Of a stream, each process reads its part too, and only the sums are added up.

    Args:
        model: The model.
        loader: The validation batches.
        prep: Normalises the images.
        accelerator: Accelerate's.
        seen: Collects the prediction for every image; for a stream, only for the images of this process.
        watch: Wraps the loader, to count its batches.
        threshold: If an image may have several labels, the probability from which on one counts as predicted.
    """
    scores = new_scores(accelerator.device, threshold)
    for logits, target in _outputs(model, loader, prep, accelerator, watch):
        found = scores.add(logits[:, 0], target)
        if seen is not None and found is not None:
            seen.add(target, *found)
    if seen is not None:
        seen.by_class = scores.by_class
    return _result(scores, loader, accelerator)


@torch.inference_mode()
def evaluate_views(
    model: nn.Module,
    loader: DataLoader,
    prep: Preprocessing,
    accelerator: Any,
    watch: Callable[[Iterable], Iterable] = iter,
    threshold: float | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the scores on the plain view of every image, and those of test-time augmentation.

    The logits of test-time augmentation are the mean of those of all views, as in timm. The arguments are those of
    `evaluate`; the loader's images are (B, V, C, H, W).
    """
    plain, augmented = (new_scores(accelerator.device, threshold) for _ in range(2))
    for logits, target in _outputs(model, loader, prep, accelerator, watch):
        plain.add(logits[:, plain_view(logits.shape[1])], target)
        augmented.add(logits.float().mean(1), target)
    return _result(plain, loader, accelerator), _result(augmented, loader, accelerator)


def _outputs(
    model: nn.Module,
    loader: DataLoader,
    prep: Preprocessing,
    accelerator: Any,
    watch: Callable[[Iterable], Iterable],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the logits (B, V, K) of the images' V views, and their classes (B,): of all processes, unless it is a stream."""
    dtype = next(model.parameters()).dtype
    model.eval()
    for images, target in watch(loader):
        images, target = images.to(accelerator.device), target.to(accelerator.device)
        views = images.unbind(1) if images.dim() == 5 else (images,)
        with accelerator.autocast():
            logits = torch.stack([model(prep.normalize(view).to(dtype)) for view in views], 1)
        yield (logits, target) if _streamed(loader) else accelerator.gather_for_metrics((logits, target))


def _result(scores: Any, loader: DataLoader, accelerator: Any) -> dict[str, float]:
    """Returns the scores, of all processes also if each has read its own part of a stream (whose images have one label)."""
    if _streamed(loader):
        scores.sums, scores.bins = accelerator.reduce((scores.sums, scores.bins), reduction="sum")
    return scores.result()


def _streamed(loader: DataLoader) -> bool:
    return isinstance(loader.dataset, torch.utils.data.IterableDataset)
