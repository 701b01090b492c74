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
    """L = CE(z, (1 - a_t) y + a_t softmax(z_{t-1})), a_t = alpha t / T, with z_{t-1} from the previous epoch's model.

    That model is a copy without gradients that sees the same images. So a step needs one more forward pass from the second
    epoch on. Other code stores each image's last prediction instead of the model, which saves that pass.
    """

    def __init__(self, model: nn.Module, device: Any, alpha: float = 0.8) -> None:
        super().__init__(Logits(model), device)
        self.alpha = alpha
        self.before: list[nn.Module] = []  # in a list, so that its parameters are not the task's

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Returns the loss and the logits for images (B, C, H, W) and targets (B,) or (B, K)."""
        logits = self.trainable_module(input)
        y = soft_targets(target, logits.shape[1])
        if self.before:
            with torch.no_grad(), autocast(input.device):
                share = self.alpha * (self.epoch + 1) / self.epochs
                y = y + share * (self.before[0](input).float().softmax(-1) - y)
        return {"loss": F.cross_entropy(logits.float(), y), "output": logits}

    def end_epoch(self) -> None:
        """Copies the model for the next epoch."""
        self.before = [copy.deepcopy(self.get_eval_model()).eval().requires_grad_(False)]
