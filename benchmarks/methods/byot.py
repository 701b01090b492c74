"""BYOT, "Be Your Own Teacher" (Zhang et al., ICCV 2019, arXiv 1905.08094), and deep supervision, its control."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.methods.peer import Mapped, PeerTask, kl


class Heads(nn.Module):
    """A classifier on every shallow tap: a strided convolution to the deep tap's channels, pooling, and a linear map.

    With a stride above 3, the convolution skips parts of the map. The authors' heads are chains of separable convolutions with
    stride 2, which see the whole map. Here they were worse, and twice as slow (docs/results.md).
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
        """Returns the logits (B, K), the heads' logits [(B, K)], and the pooled features [(B, C_d)], the deep tap's last."""
        logits, maps = self.mapped(x)
        features = [adapt(tap).mean((2, 3)) for adapt, tap in zip(self.adapters, maps, strict=False)]
        heads = [classify(feature) for classify, feature in zip(self.classifiers, features, strict=True)]
        return logits, heads, [*features, maps[-1].mean((2, 3))]


class BYOT(PeerTask):
    """L = CE(z, y) + sum_i (1 - alpha) CE(z_i, y) + alpha T^2 KL(sg z || z_i) + beta ||F_i - sg F||^2

    with the sum over the heads i. The squared distance is a sum over the C_d pooled features. alpha = beta = 0 is deep
    supervision. The factor T^2 makes the size of the soft term's gradients independent of T (Hinton et al.); the authors'
    code omits it.
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
        """Returns the loss and the logits for images (B, C, H, W) and class indices (B,)."""
        logits, heads, features = self.trainable_module(input)
        loss = F.cross_entropy(logits.float(), target)
        deep = features[-1].detach().float()
        for head, feature in zip(heads, features, strict=False):
            loss = loss + (1 - self.alpha) * F.cross_entropy(head.float(), target)
            loss = loss + self.alpha * kl(logits, head, self.temperature)
            loss = loss + self.beta * (feature.float() - deep).square().sum(1).mean()
        return {"loss": loss, "output": logits}
