"""Non-finite losses, found before they reach the weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from timm_sfr.errors import UserError

# The terms of the loss, logged as they are optimised: loss = task_loss + sfr_weight * sfr_loss.
TERMS = ("loss", "task_loss", "sfr_loss", "sfr_weight", "smoothing")


class FiniteGuard:
    """Finds a non-finite loss before the update, without making the device wait.

    The terms travel to the host while the backward pass runs; `check` waits for that copy alone.
    """

    def __init__(self, device: torch.device) -> None:
        self.pinned = torch.zeros(len(TERMS), pin_memory=True) if device.type == "cuda" else None
        self.event = torch.cuda.Event() if device.type == "cuda" else None
        self.values = torch.zeros(len(TERMS))

    def watch(self, terms: Tensor) -> None:
        """Takes the terms of a batch, (len(TERMS),)."""
        if self.pinned is None or self.event is None:
            self.values = terms
            return
        self.values = self.pinned.copy_(terms, non_blocking=True)
        self.event.record()

    def check(self, where: str, kept: str) -> None:
        """Raises UserError if a term was not finite."""
        if self.event is not None:
            self.event.synchronize()
        values = dict(zip(TERMS, self.values.tolist(), strict=True))
        bad = [name for name in ("task_loss", "sfr_loss", "loss") if not math.isfinite(values[name])]
        if bad:
            raise UserError(
                f"non-finite loss at {where}: {bad[0]} is {values[bad[0]]}; stopped before the update, {kept}; try a lower "
                "--lr, --clip-grad 1, or --mixed-precision bf16 in place of fp16"
            )
