"""The common parts of the peers: one pass that returns logits and feature maps, and a task around it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, is_initialized
from timm.utils import unwrap_model
from torch import Tensor, nn

from timm_sfr.method.probe import forward_taps
from timm_sfr.method.taps import choose_taps
from timm_sfr.method.task import EpochTask


class Mapped(nn.Module):
    """Maps images (B, C, H, W) to logits (B, K) and the maps of SFR's taps, each (B, C_t, H_t, W_t), the deep one last."""

    def __init__(self, model: nn.Module, input_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.plan = choose_taps(model, input_size)
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Returns the logits and the maps from one pass."""
        return forward_taps(self.model, x, self.plan.indices)


class Logits(nn.Module):
    """The model without feature maps, as the attribute `model` that every peer's module has."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits (B, K)."""
        return self.model(x)


class PeerTask(EpochTask):
    """A task over `module`; its attribute ``model`` is the plain timm model, which is evaluated and saved."""

    def __init__(self, module: nn.Module, device: Any) -> None:
        super().__init__(device=device, verbose=False)
        self.trainable_module: nn.Module = module.to(device)
        self.epoch, self.epochs = 0, 1

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Stores the current epoch and the number of epochs."""
        self.epoch, self.epochs = epoch, epochs

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """Returns the plain timm model."""
        module = self.get_trainable_module(ema=ema) if module is None else module
        return None if module is None else unwrap_model(module).model


def autocast(device: torch.device) -> torch.autocast:
    """Returns an autocast context with the precision that Accelerate gives the trained module, for a second model."""
    precision = AcceleratorState().mixed_precision if is_initialized() else "no"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """Returns T^2 KL(softmax(sg teacher / T) || softmax(student / T)) for logits (B, K), the mean over the batch."""
    target = (teacher.detach().float() / temperature).softmax(-1)
    log_student = (student.float() / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(log_student, target, reduction="batchmean")
