"""DLB, self-distillation from the last mini-batch (Shen et al., CVPR 2022, arXiv 2203.16172)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.methods.peer import Logits, PeerTask, kl


class DLB(PeerTask):
    """L = CE over this batch and the last one + alpha T^2 KL(sg z_{t-1}(last) || z_t(last)).

    Each batch is seen again in the next step, as another augmented view, and taught by the logits that its
    first view had before that step's update: twice the passes. The batches carry the second views behind the images.
    """

    def __init__(self, model: nn.Module, device: Any, alpha: float = 1.0, temperature: float = 3.0) -> None:
        super().__init__(Logits(model), device)
        self.alpha, self.temperature = alpha, temperature
        self.last: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Two views of the images (2B, C, H, W) and class indices (B,) to the loss and the first view's logits."""
        images, again = input.chunk(2)
        logits = self.trainable_module(images)
        loss = F.cross_entropy(logits.float(), target)
        if self.last is not None:
            view, classes, teacher = self.last
            replayed = self.trainable_module(view)
            loss = (loss + F.cross_entropy(replayed.float(), classes)) / 2
            loss = loss + self.alpha * kl(teacher, replayed, self.temperature)
        self.last = again, target, logits.detach()
        return {"loss": loss, "output": logits}
