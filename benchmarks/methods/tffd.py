"""Tf-FD, teacher-free feature distillation (Li, ECCV 2022)."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.methods.peer import Mapped, PeerTask


def intra(x: Tensor) -> Tensor:
    """Returns the mean squared distance between the more and the less salient half of the channels of a map (B, C, H, W).

    A channel's salience is the mean of its values, scaled to unit length over the locations. Gradients flow into both halves.
    """
    salience = F.normalize(x.detach().flatten(2), dim=2).mean((0, 2))
    order = salience.argsort(descending=True, stable=True)
    half = x.shape[1] // 2
    return F.mse_loss(x[:, order[:half]], x[:, order[half : 2 * half]])


def inter(shallow: Tensor, deep: Tensor) -> Tensor:
    """Returns the mean squared distance of two maps' common channels on the deep map's grid; the deep map is a constant."""
    shallow, deep = shallow.float(), deep.detach().float()
    channels = min(shallow.shape[1], deep.shape[1])
    return F.mse_loss(F.adaptive_avg_pool2d(shallow, deep.shape[2:])[:, :channels], deep[:, :channels])


class TfFD(PeerTask):
    """L = CE(z, y) + r(t) (lambda_intra sum_l intra(F_l) + lambda_inter sum_{l<m} inter(F_l, F_m)), r rising to 1.

    r rises during the first twelfth of the epochs, as in the authors' 20 of 240. The authors have published the sums both as
    here and divided by 3.
    """

    def __init__(
        self,
        model: nn.Module,
        input_size: tuple[int, int, int],
        device: Any,
        weight_intra: float = 8e-4,
        weight_inter: float = 5e-4,
        warmup: float = 20 / 240,
    ) -> None:
        super().__init__(Mapped(model, input_size), device)
        self.weight_intra, self.weight_inter, self.warmup = weight_intra, weight_inter, warmup

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Returns the loss and the logits for images (B, C, H, W) and class indices (B,)."""
        logits, maps = self.trainable_module(input)
        maps = [x.float() for x in maps]
        extra = self.weight_intra * sum(map(intra, maps))
        extra = extra + self.weight_inter * sum(inter(*pair) for pair in combinations(maps, 2))
        share = min(1.0, (self.epoch + 1) / max(1, round(self.warmup * self.epochs)))
        return {"loss": F.cross_entropy(logits.float(), target) + share * extra, "output": logits}
