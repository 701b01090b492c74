"""Many-to-one channel matching: the C_d channels of a deep layer teach the C_s channels of a shallow one.

Shapes: B images in the batch, N nodes (locations), C_d deep channels, C_s shallow channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_sfr.method.config import CHANNEL_METHODS
from timm_sfr.method.transport import transport_plan
from timm_sfr.utils.errors import UserError


def group_channels(deep: Tensor, channels: int) -> Tensor:
    """Averages contiguous bins of deep channels: (B, N, C_d) to (B, N, C_s).

    For C_d > C_s, output channel i is the mean of the deep channels floor(i C_d / C_s) to ceil((i + 1) C_d / C_s) - 1.
    If C_d is not a multiple of C_s, neighbouring bins share a channel. For C_d = C_s, this is the identity.
    For C_d < C_s, output channel i is the deep channel floor(i C_d / C_s), so deep channels repeat.

    Args:
        deep: Deep local features, (B, N, C_d).
        channels: C_s, the number of output channels.
    """
    count = deep.shape[-1]
    if count == channels:
        return deep
    if count > channels:
        return F.adaptive_avg_pool1d(deep, channels).contiguous()
    return deep[..., torch.arange(channels, device=deep.device) * count // channels]


def channel_correlation(shallow: Tensor, deep: Tensor) -> Tensor:
    """Returns the Pearson correlation of each shallow channel with each deep channel, (C_s, C_d).

        R_ij = mean over b, n of s_bni d_bnj

    with s and d the shallow and deep features, each channel standardised over the images b and the nodes n. A constant
    channel has correlation 0.

    Args:
        shallow: (B, N, C_s), on the same N nodes as `deep`.
        deep: (B, N, C_d).
    """
    shallow, deep = (_standardise(x.flatten(0, 1)) for x in (shallow, deep))
    return shallow.T @ deep / len(shallow)


def transport_channels(deep: Tensor, shallow: Tensor, solver: str = "sinkhorn") -> Tensor:
    """Finds by optimal transport which deep channels teach which shallow channel: (B, N, C_d) to (B, N, C_s).

        T = argmin_{T in U(1/C_s, 1/C_d)} <T, 1 - R>,      matched_i = C_s * sum_j T_ij d_j

    R (C_s, C_d) holds the channels' correlations on this batch (`channel_correlation`). U(1/C_s, 1/C_d) is the set of
    non-negative (C_s, C_d) matrices with row sums 1/C_s and column sums 1/C_d. d_j is deep channel j, and matched_i is
    the output channel that teaches shallow channel i. Each shallow channel takes the mass of C_d / C_s deep channels,
    and the order of the channels does not matter. T is a constant (no gradient). In distributed training, each process
    solves this on its own part of the batch.

    Args:
        deep: Deep local features, (B, N, C_d).
        shallow: Shallow local features on the same nodes, (B, N, C_s).
        solver: The solver, as in `transport_plan`.

    Raises:
        UserError: if the taps do not have the same batch and nodes.
    """
    if shallow.shape[:2] != deep.shape[:2]:
        raise UserError(
            f"channel transport needs both taps on the same nodes; got shallow {tuple(shallow.shape)} and deep "
            f"{tuple(deep.shape)} as (batch, nodes, channels)"
        )
    with torch.no_grad(), torch.autocast(shallow.device.type, enabled=False):
        cost = 1 - channel_correlation(shallow.float(), deep.float())
        plan = transport_plan(cost[None], solver=solver)[0]
    return deep @ (plan.T * shallow.shape[-1]).to(deep.dtype)


def match_channels(deep: Tensor, channels: int, method: str = "groups", *, shallow: Tensor | None = None) -> Tensor:
    """Matches the deep layer's channels to the shallow layer's, many to one: (B, N, C_d) to (B, N, C_s).

    Args:
        deep: Deep local features, (B, N, C_d).
        channels: C_s, the number of shallow channels.
        method: ``"groups"`` (`group_channels`) or ``"transport"`` (`transport_channels`). ``"projection"`` is not accepted
            here: it is a learned map on the shallow side (`timm_sfr.method.channels.ChannelProjection`).
        shallow: Shallow local features on the same nodes, (B, N, C_s). Only ``"transport"`` needs them.

    Raises:
        UserError: for an unknown method, ``"projection"``, or ``"transport"`` without a fitting `shallow`.
    """
    if method == "groups":
        return group_channels(deep, channels)
    if method == "transport":
        if shallow is None or shallow.shape[-1] != channels:
            got = None if shallow is None else tuple(shallow.shape)
            raise UserError(f"method='transport' needs shallow=(B, N, {channels}) features to correlate with; got {got}")
        return transport_channels(deep, shallow)
    if method == "projection":
        raise UserError("method='projection' maps the shallow side up to C_d: use timm_sfr.method.channels.ChannelProjection")
    raise UserError(f"unknown channel method {method!r}: expected one of {', '.join(CHANNEL_METHODS)}")


class ChannelProjection(nn.Module):
    """Learned 1x1 maps from the channels of each shallow tap to those of the deep tap. They are discarded after training."""

    def __init__(self, shallow_channels: tuple[int, ...], deep_channels: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(channels, deep_channels, bias=False) for channels in shallow_channels)

    def forward(self, shallow: list[Tensor]) -> list[Tensor]:
        """Maps each shallow tap s from (B, N_s, C_s) to (B, N_s, C_d)."""
        return [project(x.to(project.weight.dtype)) for project, x in zip(self.maps, shallow, strict=True)]


def _standardise(x: Tensor) -> Tensor:
    """Returns x (B * N, C) with mean 0 and variance 1 in each channel; 0 in a constant channel."""
    centred = x - x.mean(0)
    deviation = centred.square().mean(0).sqrt()
    # A constant (dead) channel gets 0: dividing by its standard deviation of zero would give NaN.
    return torch.where(deviation > 1e-6, centred / deviation.clamp_min(1e-6), 0.0)
