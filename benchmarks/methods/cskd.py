"""CS-KD, class-wise self-knowledge distillation (Yun et al., CVPR 2020, arXiv 2003.13964)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.methods.peer import Logits, PeerTask, kl


class CSKD(PeerTask):
    """L = CE(z(x), y) + lambda T^2 KL(sg z(x') || z(x)), where x' is a random image of the class of x.

    The second half of a batch has the partners x', so a step needs twice the forward passes.
    """

    def __init__(self, model: nn.Module, device: Any, temperature: float = 4.0, weight: float = 1.0) -> None:
        super().__init__(Logits(model), device)
        self.temperature, self.weight = temperature, weight

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Returns the loss and the logits, for images and their partners (2B, C, H, W) and the images' classes (B,)."""
        images, partners = input.chunk(2)
        logits = self.trainable_module(images)
        with torch.no_grad():
            others = self.trainable_module(partners)
        loss = F.cross_entropy(logits.float(), target) + self.weight * kl(others, logits, self.temperature)
        return {"loss": loss, "output": logits}
