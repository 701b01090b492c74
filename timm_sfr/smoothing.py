"""Dynamic label smoothing: y~ = (1 - eps_t) y + eps_t q, as pure functions on batches.

Shape suffixes: B batch, K classes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SOURCES = ("uniform", "classes")
SCHEDULES = ("constant", "ramp", "confidence")

# `own_epsilon`: the right class is to be this many times as likely as any other; the most that is ever smoothed; and the
# passes over the images after which most of it is.
ODDS, MOST, PASSES = 100, 0.5, 32
# Above this many classes the class table is not chosen by itself: it and the sums for the next one take 8 K^2 bytes, and a
# checkpoint within an epoch holds the sums of every process.
TABLE_CLASSES = 1024


def soft_targets(target: Tensor, num_classes: int) -> Tensor:
    """Targets as distributions, float32 (B, K): one-hot for class indices (B,), unchanged for mixtures (B, K)."""
    return F.one_hot(target, num_classes).float() if target.ndim == 1 else target.float()


def ramp(epsilon: float, epoch: int, epochs: int) -> float:
    """eps_t of the ``ramp`` schedule: from 0 in the first epoch to `epsilon` in the last, linearly."""
    return epsilon * min(1.0, epoch / (epochs - 1)) if epochs > 1 else epsilon


def own_epsilon(num_classes: int, epochs: int | None = None) -> float:
    """The smoothing that suits K classes and T passes over the images, without asking for it.

        eps = min(1/2, K / (K + 99)) (1 - exp(-(T / 32)^3))

    The first factor: smoothed uniformly by K / (K + 99), the target makes the right class 100 times as probable as any
    other, whatever K is (10 classes: 0.09; 100 and more: 0.5). The second: smoothing slows learning down, which costs
    accuracy where training is short and keeps a network from learning its images by heart where it is long (16 passes:
    0.12 of the first factor, 48: 0.97). docs/results.md has the runs behind the constants.

    Args:
        num_classes: K.
        epochs: T; None for a run that is long or of unknown length.
    """
    passes = 1.0 if epochs is None else 1 - math.exp(-((epochs / PASSES) ** 3))
    return min(MOST, num_classes / (num_classes + ODDS - 1)) * passes


def confidence(logits: Tensor, epsilon: float) -> Tensor:
    """eps of the ``confidence`` schedule, (B,): larger where the model is surer; a constant (no gradient).

    eps_i = epsilon (max_k p_ik - 1/K) / (1 - 1/K), so 0 for a uniform prediction and `epsilon` for a certain one.

    Args:
        logits: (B, K).
        epsilon: The largest smoothing.
    """
    floor = 1 / logits.shape[-1]
    top = logits.detach().float().softmax(-1).amax(-1)
    return epsilon * (top - floor).clamp_min(0) / max(1 - floor, floor)


def smooth(target: Tensor, epsilon: Tensor | float, q: Tensor) -> Tensor:
    """Smoothed targets (1 - eps) y + eps q, (B, K); each row sums to 1 where those of `target` and `q` do.

    Args:
        target: y as distributions, (B, K).
        epsilon: A number, or one value per sample (B,).
        q: What to smooth towards, (B, K) or (K,).
    """
    if isinstance(epsilon, Tensor) and epsilon.ndim == 1:
        epsilon = epsilon[:, None]
    return target + epsilon * (q - target)


def right_predictions(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What each sample adds to its class's mean prediction: nothing where the model is wrong.

    A mixture (mixup, CutMix) counts for its largest class.

    Args:
        logits: (B, K).
        target: Distributions, (B, K).

    Returns:
        The class (B,), softmax(logits) or 0 where wrong (B, K), and 1 or 0 where wrong (B,).
    """
    prediction = logits.detach().float().softmax(-1)
    label = target.argmax(-1)
    # A prediction that is not finite is none: it would stay in the sums after its step was skipped.
    right = (prediction.argmax(-1) == label) & prediction.isfinite().all(-1)
    return label, torch.where(right[:, None], prediction, 0.0), right.float()


def update_table(table: Tensor, sums: Tensor, counts: Tensor) -> Tensor:
    """The class table after an epoch, (K, K): mean predictions where a class has any, the old row where it has none."""
    fresh = sums / counts[:, None].clamp_min(1)
    return torch.where(counts[:, None] > 0, fresh / fresh.sum(-1, keepdim=True).clamp_min(1e-12), table)
