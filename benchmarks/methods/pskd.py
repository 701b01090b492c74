"""PS-KD, progressive self-knowledge distillation (Kim et al., ICCV 2021, arXiv 2006.12000)."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.methods.peer import Logits, PeerTask, autocast
from timm_sfr.method.smoothing import soft_targets


class PSKD(PeerTask):
    """L = CE(z, (1 - a_t) y + a_t softmax(z_{t-1})), a_t = alpha t / T, with z_{t-1} of the model one epoch ago.

    That model is a copy without gradients, which sees the same images: one more forward pass from the second epoch on. Code
    that keeps each image's prediction from its last pass in place of the model saves that pass.
    """

    def __init__(self, model: nn.Module, device: Any, alpha: float = 0.8) -> None:
        super().__init__(Logits(model), device)
        self.alpha = alpha
        self.before: list[nn.Module] = []  # in a list: no part of this task's parameters

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Images (B, C, H, W) and targets (B,) or (B, K) to the loss and the logits."""
        logits = self.trainable_module(input)
        y = soft_targets(target, logits.shape[1])
        if self.before:
            with torch.no_grad(), autocast(input.device):
                share = self.alpha * (self.epoch + 1) / self.epochs
                y = y + share * (self.before[0](input).float().softmax(-1) - y)
        return {"loss": F.cross_entropy(logits.float(), y), "output": logits}

    def end_epoch(self) -> None:
        """Keeps the model as it is now for the next epoch."""
        self.before = [copy.deepcopy(self.get_eval_model()).eval().requires_grad_(False)]
