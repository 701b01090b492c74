"""Dynamic label smoothing: y~ = (1 - eps_t) y + eps_t q, as pure functions on batches.

Shape suffixes: B batch, K classes.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from timm_sfr.utils.errors import UserError

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


def default_warmup(epochs: int) -> int:
    """Epochs over which rate, lambda and smoothing rise where no option says so: a fifth of them, at most 5."""
    return min(5, epochs // 5)


class DynamicLabelSmoothing(nn.Module):
    """Soft cross-entropy against targets smoothed dynamically: L = -sum_k y~_k log softmax(z)_k, mean over the batch.

        y~ = (1 - eps_t) y + eps_t q

    Args:
        num_classes: K.
        epsilon: The smoothing eps. None: eps finds its own strength (`timm_sfr.method.smoothing.own_epsilon`), and rises to it
            over the first fifth of the epochs, at most 5 of them; without `set_epoch` it is at most 0.1. A number is
            timm's ``--smoothing``; 0 is plain cross-entropy.
        source: q. ``"uniform"``: 1/K. ``"classes"``: the model's mean prediction for the sample's class over the
            samples it got right in the last epoch that had any (uniform until then); for a mixture, the mixture of q.
            None: ``"classes"`` where eps finds its own strength and K is at most 1,024, else ``"uniform"``.
        schedule: eps_t of a given eps. ``"constant"``; ``"ramp"``: from 0 to eps over training; ``"confidence"``: per
            sample, larger where the model is surer.

    The class table is a (K, K) buffer; `end_epoch` renews it, summed over all processes.

    Raises:
        UserError: if an option is out of bounds, or a schedule is given without an epsilon.
    """

    epsilon_t: Tensor
    table: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(
        self,
        num_classes: int,
        epsilon: float | None = None,
        source: str | None = None,
        schedule: str = "constant",
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise UserError(f"label smoothing needs at least 2 classes; got num_classes={num_classes}")
        if epsilon is not None and not 0 <= epsilon < 1:
            raise UserError(f"expected smoothing in [0, 1); got {epsilon}")
        if source not in (None, *SOURCES) or schedule not in SCHEDULES:
            raise UserError(
                f"expected source in {SOURCES} and schedule in {SCHEDULES}; got {source!r}, {schedule!r}"
            )
        if epsilon is None and schedule != "constant":
            raise UserError(f"schedule {schedule!r} moves an epsilon that is given, as --smoothing 0.1; none is")
        self.num_classes, self.epsilon, self.schedule = num_classes, epsilon, schedule
        own = epsilon is None and num_classes <= TABLE_CLASSES
        self.source = source or ("classes" if own else "uniform")
        # Until `set_epoch` says how long the run is, no more than what timm takes.
        own_now = min(0.1, own_epsilon(num_classes))
        now = own_now if epsilon is None else 0.0 if schedule == "ramp" else epsilon
        self.register_buffer("epsilon_t", torch.tensor(now))
        rows = num_classes if self.source == "classes" else 0
        self.register_buffer("table", torch.full((rows, num_classes), 1 / num_classes))
        self.register_buffer("sums", torch.zeros(rows, num_classes), persistent=False)
        self.register_buffer("counts", torch.zeros(rows), persistent=False)

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Sets eps_t for epoch `epoch` of `epochs`."""
        if self.epsilon is None:
            warmup = default_warmup(epochs)
            now = own_epsilon(self.num_classes, epochs) * min(1.0, (epoch + 1) / (warmup + 1))
        else:
            now = ramp(self.epsilon, epoch, epochs) if self.schedule == "ramp" else self.epsilon
        self.epsilon_t.fill_(now)

    def describe(self, epochs: int) -> str:
        """The form and the size of the smoothing in a run of `epochs` epochs, in a few words."""
        if self.epsilon is None:
            towards = "by class" if self.source == "classes" else self.source
            return f"up to {own_epsilon(self.num_classes, epochs):.2g} {towards}"
        return f"{self.epsilon:g} {self.source} {self.schedule}"

    def targets(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The smoothed targets y~ (B, K) and the mean eps of the batch (a scalar).

        Args:
            logits: (B, K); only the ``confidence`` schedule looks at them, as constants.
            target: Class indices (B,) or mixtures (B, K).
        """
        y = soft_targets(target, self.num_classes)
        epsilon = confidence(logits, self.epsilon) if self.schedule == "confidence" else self.epsilon_t
        # A matrix product makes the q of a mixture the mixture of its classes' q.
        q = y @ self.table if self.source == "classes" else y.new_full((self.num_classes,), 1 / self.num_classes)
        return smooth(y, epsilon, q), epsilon.mean()

    def forward(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The loss (a scalar) and the mean eps of the batch (a scalar); in training, adds the batch to the table's sums.

        Args:
            logits: (B, K).
            target: Class indices (B,) or mixtures (B, K).
        """
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            if self.epsilon == 0:
                return F.cross_entropy(logits, target), self.epsilon_t
            with torch.no_grad():
                smoothed, epsilon = self.targets(logits, target)
                if self.source == "classes" and self.training:
                    label, predictions, right = right_predictions(logits, soft_targets(target, self.num_classes))
                    self.sums.index_add_(0, label, predictions)
                    self.counts.index_add_(0, label, right)
            return F.cross_entropy(logits, smoothed), epsilon

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Sums the epoch's predictions over all processes and makes them the table of the next epoch."""
        if self.source != "classes":
            return
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.sums)
            dist.all_reduce(self.counts)
        self.table.copy_(update_table(self.table, self.sums, self.counts))
        self.sums.zero_()
        self.counts.zero_()


class SmoothedLoss(nn.Module):
    """Dynamic label smoothing as the criterion of a base task: `SFRTask` over that task then moves it and logs its eps.

    Attributes:
        smoothing: What smooths.
        epsilon: The mean eps of the last batch, a scalar.
    """

    def __init__(self, smoothing: DynamicLabelSmoothing) -> None:
        super().__init__()
        self.smoothing, self.epsilon = smoothing, smoothing.epsilon_t

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss alone, a scalar, of logits (B, K) and class indices (B,) or mixtures (B, K)."""
        loss, self.epsilon = self.smoothing(logits, target)
        return loss
