"""The classification loss L_cls of a batch: cross-entropy, or binary cross-entropy of each class; and the JSD of views.

Shapes: B images in the batch, K classes, V views of each image.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_sfr.method.config import LossForm
from timm_sfr.utils.errors import UserError

JSD_WEIGHT = 12.0  # of AugMix (arXiv 1912.02781) and timm


def soft_targets(target: Tensor, num_classes: int) -> Tensor:
    """Returns targets as distributions, (B, K) float32: one-hot for class indices (B,), unchanged for mixtures (B, K)."""
    return F.one_hot(target, num_classes).float() if target.ndim == 1 else target.float()


def check_dense(target: Tensor, form: LossForm) -> None:
    """Raises UserError if an image may have several labels and the targets are not dense, (B, K)."""
    if form.multi_label and target.ndim != 2:
        raise UserError(f"expected dense targets (B, K), 0 or 1 for each class; got the shape {tuple(target.shape)}")


def flat_target(num_classes: int, form: LossForm) -> float:
    """Returns the target that says nothing of a class, towards which labels are smoothed: 1/K; of several labels, 1/2."""
    return 1 / 2 if form.multi_label else 1 / num_classes


def sample_losses(logits: Tensor, target: Tensor, form: LossForm, pos_weight: Tensor | None = None) -> Tensor:
    """Returns the loss of each sample, (B,), without class weights.

        cross-entropy         l_i = -sum_k y_ik log softmax(z_i)_k
        binary cross-entropy  l_i = mean_k -(p y_ik log s_ik + (1 - y_ik) log(1 - s_ik)),  s = sigmoid(z), p = `pos_weight`

    With ``bce_sum``, the sum over the classes replaces the mean. With a threshold, y_ik becomes 1 if it is above, else 0.

    Args:
        logits: z, (B, K) float32.
        target: y, class indices (B,) or distributions (B, K); for several labels, 0 to 1 for each class.
        form: Which of the two.
        pos_weight: A scalar; None is 1.
    """
    if not form.bce:
        return F.cross_entropy(logits, target, reduction="none")
    y = soft_targets(target, logits.shape[-1]).to(logits.dtype)
    if form.bce_target_thresh is not None:
        y = (y > form.bce_target_thresh).to(logits.dtype)
    losses = F.binary_cross_entropy_with_logits(logits, y, pos_weight=pos_weight, reduction="none")
    return losses.sum(-1) if form.bce_sum else losses.mean(-1)


def weighted_mean(losses: Tensor, target: Tensor, class_weights: Tensor) -> Tensor:
    """Returns sum_i w_i l_i / sum_i w_i, a scalar, with w_i = sum_k y_ik w_k: a mixture has the mixture of the weights.

    For cross-entropy and class indices, this is ``torch.nn.functional.cross_entropy(..., weight=class_weights)``.

    Args:
        losses: l, (B,).
        target: y before smoothing, class indices (B,) or mixtures (B, K).
        class_weights: w, (K,).
    """
    weights = class_weights[target] if target.ndim == 1 else target.to(class_weights.dtype) @ class_weights
    return (weights * losses).sum() / weights.sum().clamp_min(1e-12)  # a batch may consist of classes of weight 0


def jensen_shannon(logits: Tensor, splits: int) -> Tensor:
    """Returns the Jensen-Shannon divergence of the predictions for the views of an image, mean over the images; a scalar.

        JSD = mean over images and views v of KL(p_v || m),     m = mean_v p_v, not below 1e-7

    Args:
        logits: (V B, K), the first B of the first view, and so on; p_v is their softmax.
        splits: V; UserError if it does not divide the number of logits.
    """
    if len(logits) % splits:
        raise UserError(f"expected a batch of {splits} views of each image, one after the other; got {len(logits)} images")
    with torch.autocast(logits.device.type, enabled=False):
        # Not torch's kl_div of probabilities: its gradient is not finite where a probability is 0 in float32.
        log_p = logits.float().log_softmax(-1).view(splits, -1, logits.shape[-1])
        p = log_p.exp()
        log_m = p.mean(0).clamp(1e-7, 1).log()
        return (p * (log_p - log_m)).sum() / len(logits)


def jsd_terms(cls_loss: Tensor, logits: Tensor, splits: int) -> dict[str, Tensor]:
    """Returns the terms of the loss on views: task_loss = cls_loss + jsd_weight * jsd_loss.

    `cls_loss` is L_cls on the first view, a scalar; `logits` and `splits` are those of `jensen_shannon`.
    """
    jsd, weight = jensen_shannon(logits, splits), cls_loss.new_full((), JSD_WEIGHT)
    return {"task_loss": cls_loss + weight * jsd, "cls_loss": cls_loss, "jsd_loss": jsd, "jsd_weight": weight}


class Float32Buffers(nn.Module):
    """A module whose own buffers stay in float32 when it, or a module around it, is converted to another type."""

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Float32Buffers:
        before = dict(self._buffers)
        super()._apply(fn, *args, **kwargs)
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.dtype != before[name].dtype:
                self._buffers[name] = before[name].to(buffer.device)  # not `buffer.float()`, which has been rounded
        return self


class ClassificationLoss(Float32Buffers):
    """L_cls of a batch in one `LossForm`: the mean of `sample_losses`, or with class weights their `weighted_mean`."""

    class_weights: Tensor | None
    pos_weight: Tensor | None

    def __init__(self, form: LossForm) -> None:
        super().__init__()
        self.form = form
        weights, positive = form.class_weights, form.bce_pos_weight
        weights = None if weights is None else torch.tensor([float(weight) for weight in weights])
        # Neither belongs into a checkpoint: both come from the options and the data.
        self.register_buffer("class_weights", weights, persistent=False)
        self.register_buffer("pos_weight", None if positive is None else torch.tensor(float(positive)), persistent=False)

    def forward(self, logits: Tensor, smoothed: Tensor, target: Tensor) -> Tensor:
        """Returns the loss, a scalar.

        Args:
            logits: (B, K) float32, outside autocast.
            smoothed: What the loss is computed against: distributions (B, K), or class indices (B,).
            target: The targets before smoothing, which choose the weights: class indices (B,) or mixtures (B, K).

        Raises:
            UserError: for several labels with class indices.
        """
        check_dense(target, self.form)
        if self.class_weights is None and not self.form.bce:
            return F.cross_entropy(logits, smoothed)
        losses = sample_losses(logits, smoothed, self.form, self.pos_weight)
        return losses.mean() if self.class_weights is None else weighted_mean(losses, target, self.class_weights)

    def scores(self, logits: Tensor) -> Tensor:
        """Returns numbers (B, K) whose softmax is the model's prediction: for BCE, sigmoid(z)_k / sum_j sigmoid(z)_j."""
        return F.logsigmoid(logits) if self.form.bce else logits
