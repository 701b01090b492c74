"""Many-to-one channel matching: the C_d channels of a deep layer teach the C_s channels of a shallow one.

Shape suffixes: B batch, N nodes (locations), D deep channels C_d, S shallow channels C_s.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_sfr.method.transport import transport_plan
from timm_sfr.utils.errors import UserError

CHANNEL_METHODS = ("groups", "transport", "projection")


def group_channels(deep: Tensor, channels: int) -> Tensor:
    """Averages contiguous bins of deep channels: (B, N, C_d) to (B, N, C_s).

    With C_d >= C_s, output channel i is the mean of the deep channels floor(i C_d / C_s) .. ceil((i+1) C_d / C_s) - 1
    (adaptive bins: neighbours share a channel where C_d is no multiple of C_s); C_d = C_s is the identity.
    With C_d < C_s, deep channel floor(i C_d / C_s) is repeated.

    Args:
        deep: Deep local features, (B, N, C_d).
        channels: C_s, the number of channels to produce.
    """
    count = deep.shape[-1]
    if count == channels:
        return deep
    if count > channels:
        return F.adaptive_avg_pool1d(deep, channels)
    return deep[..., torch.arange(channels, device=deep.device) * count // channels]


def channel_correlation(shallow: Tensor, deep: Tensor) -> Tensor:
    """Pearson correlation of every shallow with every deep channel over the batch and the nodes: (C_s, C_d).

        R_ij = mean_{b,n} s_i d_j,  s and d standardised over (b, n); 0 for a constant channel.

    Args:
        shallow: (B, N, C_s), on the same N nodes as `deep`.
        deep: (B, N, C_d).
    """
    shallow, deep = (_standardise(x.flatten(0, 1)) for x in (shallow, deep))
    return shallow.T @ deep / len(shallow)


def transport_channels(deep: Tensor, shallow: Tensor, solver: str = "sinkhorn") -> Tensor:
    """Finds which deep channels teach which shallow one by optimal transport: (B, N, C_d) to (B, N, C_s).

        T = argmin_{T in U(1/C_s, 1/C_d)} <T, 1 - R>,      matched_i = C_s * sum_j T_ij d_j

    with R the channels' correlations on this batch (`channel_correlation`), so that each shallow channel takes
    C_d / C_s channels' worth of deep mass and no order of channels is assumed. T is a constant (no gradient). Under
    several processes each solves for its own part of the batch.

    Args:
        deep: Deep local features, (B, N, C_d).
        shallow: Shallow local features on the same nodes, (B, N, C_s).
        solver: `transport_plan`'s solver.
    """
    if shallow.shape[:2] != deep.shape[:2]:
        raise UserError(
            f"channel transport needs both taps on the same nodes; got shallow {tuple(shallow.shape)} and deep "
            f"{tuple(deep.shape)} as (batch, nodes, channels)"
        )
    with torch.no_grad():
        cost = 1 - channel_correlation(shallow.float(), deep.float())
        plan = transport_plan(cost[None], solver=solver)[0]
    return deep @ (plan.T * shallow.shape[-1]).to(deep.dtype)


def match_channels(deep: Tensor, channels: int, method: str = "groups", *, shallow: Tensor | None = None) -> Tensor:
    """Matches the deep layer's channels to the shallow layer's, several to one: (B, N, C_d) to (B, N, C_s).

    Args:
        deep: Deep local features, (B, N, C_d).
        channels: C_s.
        method: ``"groups"`` (`group_channels`) or ``"transport"`` (`transport_channels`). ``"projection"`` is learned
            on the shallow side and is no function of `deep` alone: see `timm_sfr.method.losses.ChannelProjection`.
        shallow: The shallow local features on the same nodes, (B, N, C_s); ``"transport"`` needs them.

    Raises:
        UserError: for an unknown method, or ``"transport"`` without `shallow`.
    """
    if method == "groups":
        return group_channels(deep, channels)
    if method == "transport":
        if shallow is None or shallow.shape[-1] != channels:
            got = None if shallow is None else tuple(shallow.shape)
            raise UserError(
                f"method='transport' needs shallow=(B, N, {channels}) features to correlate with; got {got}"
            )
        return transport_channels(deep, shallow)
    if method == "projection":
        raise UserError("method='projection' maps the shallow side up to C_d: use timm_sfr.method.losses.ChannelProjection")
    raise UserError(f"unknown channel method {method!r}: expected one of {', '.join(CHANNEL_METHODS)}")


def _standardise(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    deviation = centred.square().mean(0).sqrt()
    # A dead (constant) channel correlates with nothing; dividing by its zero deviation would make a NaN.
    return torch.where(deviation > 1e-6, centred / deviation.clamp_min(1e-6), 0.0)


class ChannelProjection(nn.Module):
    """Learned 1x1 maps from each shallow tap's channels to the deep tap's; used in training and thrown away after it."""

    def __init__(self, shallow_channels: tuple[int, ...], deep_channels: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(channels, deep_channels, bias=False) for channels in shallow_channels)

    def forward(self, shallow: list[Tensor]) -> list[Tensor]:
        """(B, N_s, C_s) to (B, N_s, C_d) for every tap s."""
        return [project(x.to(project.weight.dtype)) for project, x in zip(self.maps, shallow, strict=True)]
