"""Computes how SFR matches features: which deep locations and channels teach which shallow ones.

Shape suffixes: B images, N shallow nodes, M deep nodes, S shallow channels, D deep channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from timm_sfr.method.channels import ChannelProjection, channel_correlation, group_channels, match_channels
from timm_sfr.method.config import SFRConfig
from timm_sfr.method.feature_loss import divergences, gaussian_l2
from timm_sfr.method.sinkhorn import cost_matrix, cross_marginals, uniform_marginals, unit
from timm_sfr.method.tapped_model import TappedModel
from timm_sfr.method.taps import TapPlan
from timm_sfr.method.transport import transport_plan
from timm_sfr.utils.errors import UserError


@dataclass(frozen=True)
class TapMatch:
    """How the deep tap is matched to one shallow tap on a batch of images.

    Attributes:
        module: The shallow tap.
        grid: Its grid of locations (H, W) after pooling, N = H W.
        deep_grid: The deep tap's grid, with M locations.
        plan: (B, N, M): the share of the mass that deep location j sends to shallow location i. Each row sums to the weight
            of its location. None if the training compared moments, which pair no locations.
        distance: (B,): the loss of each image: the mean squared distance of the features under the plan, <P, C>, between
            0 and 4; the divergence; or the distance of the moments.
        channels: (S, D): how much deep channel j teaches shallow channel i; each row sums to 1.
    """

    module: str
    grid: tuple[int, int]
    deep_grid: tuple[int, int]
    plan: Tensor | None
    distance: Tensor
    channels: Tensor

    @property
    def stays(self) -> float | None:
        """Percent of the mass that stays at the same location; None if the grids differ or there is no plan."""
        if self.plan is None or self.grid != self.deep_grid:
            return None
        return 100 * float(self.plan.diagonal(dim1=1, dim2=2).sum(1).mean())


@torch.no_grad()
def tap_matches(
    model: nn.Module, taps: TapPlan, config: SFRConfig, images: Tensor, projection: ChannelProjection | None = None
) -> list[TapMatch]:
    """Returns one `TapMatch` per shallow tap on normalised `images` (B, 3, H, W).

    The plan is the one in the training loss: the plan of `sinkhorn_divergence` or `emd_l2` with the options' weights and
    solver, the identity for ``matching="grid"``, and none for ``"gaussian"``. Without the learned maps `projection` for
    ``channels="projection"``, channels are matched by groups. The `model` is the plain one, in evaluation mode.
    """
    grids = taps.node_grids(config.max_nodes, config.common_grid)
    tapped = TappedModel(model, taps, config)
    try:
        _, nodes = tapped(images)
    finally:
        if tapped.hooks is not None:  # they are on the caller's model
            tapped.hooks.remove()
    deep, found = nodes[-1].float(), []
    for index, (tap, grid, shallow) in enumerate(zip(taps.shallow, grids, nodes, strict=False)):
        shallow = shallow.float()
        weights, matched = _channels(shallow, deep, config, projection, index)
        student = projection.maps[index](shallow) if projection is not None else shallow
        plan, distance = _locations(student, matched, config)
        found.append(TapMatch(tap.module, grid, grids[-1], plan, distance, weights.cpu()))
    return found


def _locations(student: Tensor, matched: Tensor, config: SFRConfig) -> tuple[Tensor | None, Tensor]:
    """Returns the loss's plan (B, N, M), if it has one, and its distance (B,) for each image."""
    if config.matching == "gaussian":
        pairs = zip(student.split(1), matched.split(1), strict=True)
        return None, torch.stack([gaussian_l2(*pair, weights=config.weights) for pair in pairs]).cpu()
    if config.matching == "divergence":
        distance, plan = divergences(student, matched, config.weights)
        return plan.cpu(), distance.cpu()
    u, v = unit(student), unit(matched)
    cost = cost_matrix(u, v)
    a, b = cross_marginals(u, v) if config.weights == "cross" else (None, None)
    if config.matching == "grid":
        plan = torch.diag_embed(uniform_marginals(cost)[0] if a is None else a)
    elif config.matching == "emd":
        plan = transport_plan(cost, a, b, config.solver)
    else:
        raise UserError(f"the report cannot draw the matching {config.matching!r}")
    return plan.cpu(), (plan * cost).sum((1, 2)).cpu()


def _channels(
    shallow: Tensor, deep: Tensor, config: SFRConfig, projection: ChannelProjection | None, index: int
) -> tuple[Tensor, Tensor]:
    """Returns the weights (S, D) of deep channels for shallow ones, and the matched deep features (B, M, S or D)."""
    count = shallow.shape[-1]
    if config.channels == "projection" and projection is not None:
        weights = projection.maps[index].weight.detach().abs().T
        return weights / weights.sum(1, keepdim=True).clamp_min(1e-12), deep
    if config.channels == "transport":
        plan = transport_plan(1 - channel_correlation(shallow, deep)[None])[0]
        return plan * count, match_channels(deep, count, "transport", shallow=shallow)
    if config.channels not in ("groups", "projection"):
        raise ValueError(f"the report cannot draw the channel matching {config.channels!r}")
    # Grouping the identity, whose rows are single deep channels, gives each one's weights.
    weights = group_channels(torch.eye(deep.shape[-1], device=deep.device)[None], count)[0].T
    return weights, group_channels(deep, count)
