"""Tf-KD-reg, teacher-free distillation by a hand-made teacher (Yuan et al., CVPR 2020, arXiv 1909.11723)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.methods.peer import Logits, PeerTask, kl
from timm_sfr.method.smoothing import soft_targets


class TfKDReg(PeerTask):
    """L = (1 - alpha) CE(z, y) + alpha T^2 KL(p^d_T || softmax(z / T)).

    The teacher p^d gives the right class the probability `right` and shares the rest evenly among the others. It is softened
    like the student: p^d_T = softmax(log p^d / T). This is the paper's equation with Hinton's T^2. The authors' code softens p^d
    instead of its logarithm and does not soften the student, which is label smoothing of about alpha.
    """

    def __init__(self, model: nn.Module, device: Any, alpha: float = 0.1, temperature: float = 20.0, right: float = 0.99) -> None:
        super().__init__(Logits(model), device)
        self.alpha, self.temperature, self.right = alpha, temperature, right

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Returns the loss and the logits for images (B, C, H, W) and targets (B,) or (B, K)."""
        logits = self.trainable_module(input)
        classes = logits.shape[1]
        y = soft_targets(target, classes)
        teacher = ((1 - self.right) / (classes - 1) * (1 - y) + self.right * y).log()
        loss = (1 - self.alpha) * F.cross_entropy(logits.float(), target)
        return {"loss": loss + self.alpha * kl(teacher, logits, self.temperature), "output": logits}
