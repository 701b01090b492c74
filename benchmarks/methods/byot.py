"""BYOT, "Be Your Own Teacher" (Zhang et al., ICCV 2019, arXiv 1905.08094), and deep supervision, its control."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.methods.peer import Mapped, PeerTask, kl


class Heads(nn.Module):
    """A classifier on every shallow tap: a strided convolution to the deep tap's channels, pooling, a linear map.

    At a stride above 3 it does not see all of a map. The authors' heads, chains of separable convolutions of stride 2, do;
    here they were worse, and twice as slow (docs/results.md).
    """

    def __init__(self, model: nn.Module, input_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.mapped = Mapped(model, input_size)
        plan = self.mapped.plan
        channels = plan.deep.channels
        self.adapters = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(tap.channels, channels, 3, max(1, tap.grid[0] // plan.deep.grid[0]), 1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            )
            for tap in plan.shallow
        )
        self.classifiers = nn.ModuleList(nn.Linear(channels, model.num_classes) for _ in plan.shallow)

    @property
    def model(self) -> nn.Module:
        """The plain timm model."""
        return self.mapped.model

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Logits (B, K), the heads' logits [(B, K)], and pooled features [(B, C_d)], the deep tap's last."""
        logits, maps = self.mapped(x)
        features = [adapt(tap).mean((2, 3)) for adapt, tap in zip(self.adapters, maps, strict=False)]
        heads = [classify(feature) for classify, feature in zip(self.classifiers, features, strict=True)]
        return logits, heads, [*features, maps[-1].mean((2, 3))]


class BYOT(PeerTask):
    """L = CE(z, y) + sum_i (1 - alpha) CE(z_i, y) + alpha T^2 KL(sg z || z_i) + beta ||F_i - sg F||^2

    over the heads i, the squared distance summed over the C_d pooled features; alpha = beta = 0 is deep supervision. T^2
    keeps the soft term's gradients to scale (Hinton et al.); the authors' code is without.
    """

    def __init__(
        self,
        model: nn.Module,
        input_size: tuple[int, int, int],
        device: Any,
        alpha: float = 0.3,
        beta: float = 0.03,
        temperature: float = 3.0,
    ) -> None:
        super().__init__(Heads(model, input_size), device)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Images (B, C, H, W) and class indices (B,) to the loss and the logits."""
        logits, heads, features = self.trainable_module(input)
        loss = F.cross_entropy(logits.float(), target)
        deep = features[-1].detach().float()
        for head, feature in zip(heads, features, strict=False):
            loss = loss + (1 - self.alpha) * F.cross_entropy(head.float(), target)
            loss = loss + self.alpha * kl(logits, head, self.temperature)
            loss = loss + self.beta * (feature.float() - deep).square().sum(1).mean()
        return {"loss": loss, "output": logits}
