"""Dynamic label smoothing, y~ = (1 - eps_t) y + eps_t q: pure functions on batches, and modules that hold the state.

y is the target, q what it is smoothed towards, and eps_t the strength at time t. Shapes: B images in the batch, K classes.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from timm_sfr.method.classification import ClassificationLoss, Float32Buffers, check_dense, flat_target, soft_targets
from timm_sfr.method.config import SCHEDULES, SOURCES, LossForm
from timm_sfr.utils.errors import UserError

# Of `own_epsilon`: how many times as probable as any other class the target makes the right one; the largest eps; the passes
# over the images after which eps reaches 63 % of its full value; and the parameters per bit of the labels from which on eps
# has its full value.
ODDS, MOST, PASSES, CAPACITY = 100, 0.5, 32, 16
# Above this many classes, the class table must be asked for: the table and the sums for the next one take 8 K^2 bytes, and a
# checkpoint within an epoch holds the sums of every process.
TABLE_CLASSES = 1024


def ramp(epsilon: float, epoch: int, epochs: int) -> float:
    """Returns eps_t of the ``ramp`` schedule: linear from 0 in epoch 0 to `epsilon` in the last of `epochs` epochs."""
    return epsilon * min(1.0, epoch / (epochs - 1)) if epochs > 1 else epsilon


def own_epsilon(num_classes: int, epochs: float | None = None, capacity: float | None = None) -> float:
    """Returns the smoothing eps that the method chooses itself, for K classes, T passes over the images and capacity r.

        eps = min(1/2, K / (K + 99)) (1 - exp(-(T / 32)^3)) min(1, sqrt(r / 16))

    The first factor asks for the same margin at every K: smoothed uniformly by K / (K + 99), the target makes the right
    class 100 times as probable as any other. That is 0.09 for 10 classes, capped at 1/2 from 99 on. The other factors
    reflect that smoothing prevents the network from memorising its images, and otherwise slows learning. Passes: 0.12 at
    16 of them and 0.97 at 48. Capacity: a network with few parameters per bit of its labels is too small to memorise them.
    docs/results.md has the runs behind the constants.

    Args:
        num_classes: K.
        epochs: T. None if it is long or unknown: its factor is then 1.
        capacity: r, `label_capacity`. None if it is unknown: its factor is then 1.
    """
    passes = 1.0 if epochs is None else 1 - math.exp(-((epochs / PASSES) ** 3))
    memory = 1.0 if capacity is None else min(1.0, math.sqrt(capacity / CAPACITY))
    return min(MOST, num_classes / (num_classes + ODDS - 1)) * passes * memory


def label_capacity(parameters: int, images: float, num_classes: int) -> float:
    """Returns r = P / (N log2 K), a network's P parameters per bit of the labels of its N training images; K is at least 2."""
    return parameters / (max(images, 1) * math.log2(num_classes))


def confidence(logits: Tensor, epsilon: float) -> Tensor:
    """Returns eps of the ``confidence`` schedule for each sample i, (B,); a constant (no gradient).

        eps_i = epsilon (max_k p_ik - 1/K) / (1 - 1/K)

    p_ik is the model's probability of class k for sample i, from logits (B, K). eps_i is 0 for a uniform prediction and
    `epsilon` for a certain one.
    """
    floor = 1 / logits.shape[-1]
    top = logits.detach().float().softmax(-1).amax(-1)
    return epsilon * (top - floor).clamp_min(0) / max(1 - floor, floor)


def smooth(target: Tensor, epsilon: Tensor | float, q: Tensor) -> Tensor:
    """Returns the smoothed targets (1 - eps) y + eps q, (B, K). Each row sums to 1 if the rows of `target` and `q` do.

    Args:
        target: y, distributions (B, K).
        epsilon: eps, a number or one value per sample (B,).
        q: The distributions to smooth towards, (B, K) or (K,).
    """
    if isinstance(epsilon, Tensor) and epsilon.ndim == 1:
        epsilon = epsilon[:, None]
    return target + epsilon * (q - target)


def right_predictions(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what each sample adds to the mean prediction of its class, for logits (B, K) and distributions (B, K).

    A wrong prediction adds nothing. A mixture (mixup, CutMix) counts for its largest class.

    Returns:
        The class (B,); softmax(logits) if right, otherwise 0, (B, K); and 1 if right, otherwise 0, (B,).
    """
    prediction = logits.detach().float().softmax(-1)
    label = target.argmax(-1)
    # A non-finite prediction counts as wrong: it would stay in the sums even when its step is skipped.
    right = (prediction.argmax(-1) == label) & prediction.isfinite().all(-1)
    return label, torch.where(right[:, None], prediction, 0.0), right.float()


def update_table(table: Tensor, sums: Tensor, counts: Tensor) -> Tensor:
    """Returns the class table after an epoch, (K, K): a class's mean prediction, or its old row if it has none.

    `sums` (K, K) and `counts` (K,) are the sum and the number of the right predictions of each class.
    """
    fresh = sums / counts[:, None].clamp_min(1)
    return torch.where(counts[:, None] > 0, fresh / fresh.sum(-1, keepdim=True).clamp_min(1e-12), table)


def warmup_epochs(epochs: int, given: int | None = None) -> int:
    """Returns the warm-up of learning rate, lambda and smoothing: `given`, or else a fifth of `epochs`, at most 5."""
    return min(5, epochs // 5) if given is None else given


class DynamicLabelSmoothing(Float32Buffers):
    """The classification loss against dynamically smoothed targets: L_cls(z, y~), by default cross-entropy.

        y~ = (1 - eps_t) y + eps_t q

    y (B, K) is the target, z (B, K) the logits, q the distribution to smooth towards, eps_t the strength at time t.

    Args:
        num_classes: K.
        epsilon: The smoothing eps. None: `timm_sfr.method.smoothing.own_epsilon` chooses it, and eps_t rises to it over
            the first fifth of the epochs, at most 5 of them. Without `set_epoch` it is at most 0.1. A number is timm's
            ``--smoothing``; 0 is plain cross-entropy.
        source: q. ``"uniform"``: 1/K. ``"classes"``: the model's mean prediction for the sample's class over the
            samples that it classified correctly in the last epoch that had any (uniform until then); for a mixture,
            the mixture of q. None: ``"classes"`` if `epsilon` is None and K is at most 1,024, otherwise ``"uniform"``.
            Of several labels, q is 1/2 for each class, and there is no class table.
        schedule: How a given eps varies. ``"constant"``; ``"ramp"``: from 0 to eps over training; ``"confidence"``: per
            sample, larger where the model is more certain.
        loss: The form of L_cls; by default cross-entropy. With binary cross-entropy, a prediction is
            sigmoid(z)_k / sum_j sigmoid(z)_j. It says nothing of views: give this module the logits that it is to score.
            With several labels (`LossForm.multi_label`), each class is a decision between two, so `epsilon` None is
            `own_epsilon` of 2 classes: at most 0.02.

    The class table is a (K, K) buffer. `end_epoch` renews it from the predictions of all processes.

    Attributes:
        passes: Passes over the images in an epoch, 1 unless set; `own_epsilon` counts passes, not epochs.
        capacity: The network's `label_capacity`, for `own_epsilon`; None until `set_capacity`.

    Raises:
        UserError: if an option is out of bounds, a schedule is given without an epsilon, there is not one weight for each
            class, or several labels are to have a class table or a confidence.
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
        loss: LossForm | None = None,
    ) -> None:
        super().__init__()
        if epsilon is not None and not 0 <= epsilon < 1:
            raise UserError(f"expected smoothing in [0, 1); got {epsilon}")
        if source not in (None, *SOURCES) or schedule not in SCHEDULES:
            raise UserError(f"expected source in {SOURCES} and schedule in {SCHEDULES}; got {source!r}, {schedule!r}")
        if epsilon is None and schedule != "constant":
            raise UserError(f"schedule: {schedule!r} needs a given epsilon, such as 0.1 (--smoothing 0.1); got None")
        self.num_classes, self.epsilon, self.schedule, self.passes = num_classes, epsilon, schedule, 1.0
        self.capacity: float | None = None
        weights = loss.class_weights if loss is not None else None
        if weights is not None and len(weights) != num_classes:
            raise UserError(f"class_weights: expected {num_classes}, one for each class; got {len(weights)}")
        self.criterion = ClassificationLoss(loss or LossForm())
        multi_label = self.criterion.form.multi_label
        if multi_label and (source == "classes" or schedule == "confidence"):
            raise UserError(f"several labels have no class table and no confidence; got source={source!r}, schedule={schedule!r}")
        # How many classes exclude each other: of several labels, each is there or not.
        self.choices = 2 if multi_label else num_classes
        if self.choices < 2:
            raise UserError(f"label smoothing needs at least 2 classes that exclude each other; got num_classes={num_classes}")
        own = epsilon is None and num_classes <= TABLE_CLASSES and not multi_label
        self.source = source or ("classes" if own else "uniform")
        # Until `set_epoch` gives the length of the run, use at most timm's default.
        own_now = min(0.1, own_epsilon(self.choices))
        now = own_now if epsilon is None else 0.0 if schedule == "ramp" else epsilon
        self.register_buffer("epsilon_t", torch.tensor(now))
        rows = num_classes if self.source == "classes" else 0
        self.register_buffer("table", torch.full((rows, num_classes), 1 / num_classes))
        self.register_buffer("sums", torch.zeros(rows, num_classes), persistent=False)
        self.register_buffer("counts", torch.zeros(rows), persistent=False)

    def set_capacity(self, parameters: int, images: float) -> None:
        """Sets `capacity` for a network with `parameters` that trains on `images`; not of several labels, which it ignores."""
        if not self.criterion.form.multi_label:
            self.capacity = label_capacity(parameters, images, self.num_classes)

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Sets eps_t for epoch `epoch` (from 0) of `epochs`."""
        now = self.strength(epochs)
        if self.epsilon is None:
            now *= min(1.0, (epoch + 1) / (warmup_epochs(epochs) + 1))
        elif self.schedule == "ramp":
            now = ramp(now, epoch, epochs)
        self.epsilon_t.fill_(now)

    def strength(self, epochs: int) -> float:
        """Returns the largest eps of a run of `epochs` epochs."""
        return own_epsilon(self.choices, epochs * self.passes, self.capacity) if self.epsilon is None else self.epsilon

    def describe(self, epochs: int) -> str:
        """Returns a few words on the strength and the form of the smoothing in a run of `epochs` epochs."""
        if self.epsilon is None:
            towards = "by class" if self.source == "classes" else self.source
            return f"up to {self.strength(epochs):.2g} {towards}"
        return f"{self.epsilon:g} {self.source} {self.schedule}"

    def targets(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the smoothed targets y~ (B, K) and the mean eps of the batch (a scalar), with the arguments of `forward`.

        Only the ``confidence`` schedule uses the logits, as constants.
        """
        check_dense(target, self.criterion.form)
        y = soft_targets(target, self.num_classes)
        epsilon = confidence(self.criterion.scores(logits), self.epsilon) if self.schedule == "confidence" else self.epsilon_t
        # By the matrix product, q of a mixture is the mixture of its classes' q.
        flat = flat_target(self.num_classes, self.criterion.form)
        q = y @ self.table if self.source == "classes" else y.new_full((self.num_classes,), flat)
        return smooth(y, epsilon, q), epsilon.mean()

    def forward(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the loss and the mean eps of the batch, two scalars. In training, adds the batch to the table's sums.

        Args:
            logits: (B, K).
            target: Class indices (B,) or mixtures (B, K).
        """
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            if self.epsilon == 0:
                return self.criterion(logits, target, target), self.epsilon_t
            with torch.no_grad():
                smoothed, epsilon = self.targets(logits, target)
                if self.source == "classes" and self.training:
                    scores = self.criterion.scores(logits)
                    label, predictions, right = right_predictions(scores, soft_targets(target, self.num_classes))
                    self.sums.index_add_(0, label, predictions)
                    self.counts.index_add_(0, label, right)
            return self.criterion(logits, smoothed, target), epsilon

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Renews the class table for the next epoch from the epoch's predictions, summed over all processes."""
        if self.source != "classes":
            return
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.sums)
            dist.all_reduce(self.counts)
        self.table.copy_(update_table(self.table, self.sums, self.counts))
        self.sums.zero_()
        self.counts.zero_()


class SmoothedLoss(nn.Module):
    """Dynamic label smoothing as the criterion of a base task; the `SFRTask` over that task then varies and logs its eps."""

    def __init__(self, smoothing: DynamicLabelSmoothing) -> None:
        super().__init__()
        self.smoothing, self.epsilon = smoothing, smoothing.epsilon_t  # the mean eps of the last batch, a scalar

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Returns the loss, a scalar, for logits (B, K) and class indices (B,) or mixtures (B, K)."""
        loss, self.epsilon = self.smoothing(logits, target)
        return loss
