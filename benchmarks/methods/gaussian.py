"""Diagonal-Gaussian feature matching: SFR's frame with WKD-F's distance (Lv et al., NeurIPS 2024, arXiv 2412.08139)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from timm_sfr.channels import group_channels
from timm_sfr.transport import unit


def gaussian_distance(shallow: Tensor, deep: Tensor) -> Tensor:
    """W_2^2 between diagonal Gaussians: ||mu_s - mu_d||^2 + ||sigma_s - sigma_d||^2, mean over the batch; a scalar.

    mu and sigma are the means and deviations of the unit-length local features over the nodes; deep is a constant.

    Args:
        shallow: (B, N, C).
        deep: (B, M, C).
    """
    (mean_s, sigma_s), (mean_d, sigma_d) = (_moments(unit(x)) for x in (shallow, deep.detach()))
    return ((mean_s - mean_d).square() + (sigma_s - sigma_d).square()).sum(1).mean()


class GaussianLoss(nn.Module):
    """(1/S) sum_s W_2^2(f_s, sg f_d) with channels matched by `groups`; stands in for SFR's feature loss."""

    def forward(self, shallow: list[Tensor], deep: Tensor) -> Tensor:
        """A scalar from S shallow taps (B, N_s, C_s) and the deep tap (B, M, C_d)."""
        with torch.autocast(deep.device.type, enabled=False):
            terms = [gaussian_distance(x, group_channels(deep.float(), x.shape[-1])) for x in shallow]
        return torch.stack(terms).mean()


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean(1)
    # 1e-8 keeps the root's gradient finite for a channel that is the same everywhere.
    return mean, ((x - mean[:, None]).square().mean(1) + 1e-8).sqrt()
