"""DLB, self-distillation from the last mini-batch (Shen et al., CVPR 2022, arXiv 2203.16172)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.methods.peer import Logits, PeerTask, kl


class DLB(PeerTask):
    """L = CE over this batch and the last one + alpha T^2 KL(sg z_{t-1}(last) || z_t(last)).

    The next step repeats each batch as a second augmented view. The logits of its first view, from the previous step, teach
    the second view. So a step needs twice the passes. The second half of a batch has the second views.
    """

    def __init__(self, model: nn.Module, device: Any, alpha: float = 1.0, temperature: float = 3.0) -> None:
        super().__init__(Logits(model), device)
        self.alpha, self.temperature = alpha, temperature
        self.last: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Returns the loss and the first view's logits, for two views of the images (2B, C, H, W) and class indices (B,)."""
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
