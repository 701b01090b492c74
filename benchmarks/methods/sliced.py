"""SFR with transport in each channel separately. In one dimension, sorting both sides gives the optimal plan."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from timm_sfr.method.channels import group_channels
from timm_sfr.method.sinkhorn import unit


def sliced_distance(shallow: Tensor, deep: Tensor) -> Tensor:
    """Returns sum_c mean_n (sort(u_c)_n - sort(v_c)_n)^2, averaged over the batch: W_2^2 of each channel, summed.

    u and v are unit-length local features; `deep` is a constant. The value lies between `gaussian_l2` and `emd_l2`.

    Args:
        shallow: (B, N, C).
        deep: (B, N, C).
    """
    u, v = unit(shallow), unit(deep.detach())
    return (u.sort(1).values - v.sort(1).values).square().mean(1).sum(-1).mean()


class SlicedLoss(nn.Module):
    """The feature loss (1/S) sum_s L(f_s, sg f_d), where L is `sliced_distance` and `groups` matches the channels."""

    def forward(self, shallow: list[Tensor], deep: Tensor) -> Tensor:
        """Returns the loss, a scalar, of S shallow taps (B, N, C_s) and the deep tap (B, N, C_d)."""
        with torch.autocast(deep.device.type, enabled=False):
            terms = [sliced_distance(x, group_channels(deep.float(), x.shape[-1])) for x in shallow]
        return torch.stack(terms).mean()
