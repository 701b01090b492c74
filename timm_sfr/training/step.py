"""The parts of a training step that the run and the learning-rate range test share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.utils import dispatch_clip_grad
from torch import Tensor

from timm_sfr.config import ModelConfig, OptimConfig


def image_dtype(config: ModelConfig) -> torch.dtype:
    """Returns the type of the model's weights, and of the images that it takes."""
    return getattr(torch, config.model_dtype or "float32")


def augment(
    image: Tensor, target: Tensor, erase: Callable[[Tensor], Tensor] | None, mixup: Any, channels_last: bool
) -> tuple[Tensor, Tensor]:
    """Returns a batch after timm's mixup and random erasing, if any, in its memory layout; timm's loader has the same order.

    These are images (B, C, H, W), and class indices (B,), or distributions (B, K) after mixup.
    """
    if channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    if mixup is not None:
        image, target = mixup(image, target)
    return (image if erase is None else erase(image)), target


def clip_gradients(optim: OptimConfig, accelerator: Any, task: Any) -> None:
    """Clips the gradients of the task's parameters as the options say."""
    if optim.clip_grad is None:
        return
    accelerator.unscale_gradients()
    parameters = task.get_clip_parameters(exclude_head="agc" in optim.clip_mode)
    dispatch_clip_grad(parameters, optim.clip_grad, mode=optim.clip_mode)
