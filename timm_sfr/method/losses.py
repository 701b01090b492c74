"""Thin modules and the EMD-l2 loss over the pure functions of transport, channels and smoothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from timm_sfr.method.channels import match_channels
from timm_sfr.method.config import SFRConfig
from timm_sfr.method.sinkhorn import MARGINALS, cost_matrix, cross_marginals, entropic, entropic_self, unit
from timm_sfr.method.transport import transport_plan, triton_for
from timm_sfr.utils.errors import UserError

PLANS = ("emd", "grid")
ENTROPY = 0.3  # of `sinkhorn_divergence`


def emd_l2(
    shallow: Tensor,
    deep: Tensor,
    *,
    weights: str = "uniform",
    solver: str = "auto",
    matching: str = "emd",
) -> Tensor:
    """The squared distance between two sets of local features under their optimal transport plan; a scalar.

        C_ij = ||u_i - v_j||^2,    P* = argmin_{P in U(a, b)} <P, C>,    L = mean over the batch of <P*, C>

    with u, v the unit-length features. `deep` is a constant, and so is P*: the gradient through C alone is the exact
    gradient of the transport cost at fixed marginals (envelope theorem). Computed in float32 outside autocast.

    Args:
        shallow: Shallow local features, (B, N, C).
        deep: Deep local features matched to the shallow channels, (B, M, C).
        weights: Node weights a, b: ``"uniform"``, or ``"cross"`` (`cross_marginals`).
        solver: `transport_plan`'s solver.
        matching: ``"emd"``, or ``"grid"``: P the identity / N on a common grid (plain l2, the ablation); the row
            weights then come from `weights`.

    Raises:
        UserError: if shapes or options do not fit.
    """
    _check_nodes(shallow, deep)
    if weights not in MARGINALS or matching not in PLANS:
        raise UserError(f"expected weights in {MARGINALS} and matching in {PLANS}; got {weights!r}, {matching!r}")
    with torch.autocast(shallow.device.type, enabled=False):
        u, v = unit(shallow), unit(deep.detach())
        if matching == "grid":
            if u.shape != v.shape:
                raise UserError(f"grid matching needs equal node counts; got {u.shape[1]} and {v.shape[1]}")
            a = cross_marginals(u, v)[0] if weights == "cross" else _even(u)
            return (a * (u - v).square().sum(-1)).sum(-1).mean()
        a, b = cross_marginals(u, v) if weights == "cross" else (None, None)
        triton = triton_for((*u.shape[:2], v.shape[1]), u.device) if solver == "triton" else None
        if triton:
            a, b = (_even(u), _even(v)) if a is None or b is None else (a, b)
            return triton.transport_costs(u, v, a, b).mean()
        cost = cost_matrix(u, v)
        return (transport_plan(cost, a, b, solver) * cost).sum((1, 2)).mean()


def sinkhorn_divergence(shallow: Tensor, deep: Tensor, *, weights: str = "uniform", entropy: float = ENTROPY) -> Tensor:
    """The debiased transport cost between two sets of local features; a scalar, 0 where the sets are equal.

        W(x, y) = min_{P in U(a, b)} <P, C> + eps KL(P | a b^T),     C_ij = ||x_i - y_j||^2
        L = mean over the batch of W(u, v) - W(u, u) / 2 - W(v, v) / 2

    with u, v the unit-length features and eps = `entropy` times the mean cost within u and within v (a constant). For
    eps to 0 it is `emd_l2`; for a large eps it is the squared distance of the means alone. In between, the plan pairs
    nodes softly, and -W(u, u) / 2 keeps that softness from drawing the shallow nodes together. `deep` is a constant, and so
    are the plans: the gradient through the costs is the exact one (envelope theorem). Computed in float32 outside autocast.
    After Feydy et al., AISTATS 2019 (arXiv 1810.08278).

    Args:
        shallow: Shallow local features, (B, N, C).
        deep: Deep local features matched to the shallow channels, (B, M, C).
        weights: Node weights a, b: ``"uniform"``, or ``"cross"`` (`cross_marginals`).
        entropy: eps, in units of the mean cost within a set.

    Raises:
        UserError: if shapes or options do not fit.
    """
    _check_nodes(shallow, deep)
    if weights not in MARGINALS or entropy <= 0:
        raise UserError(f"expected weights in {MARGINALS} and entropy > 0; got {weights!r}, {entropy}")
    return divergences(shallow, deep, weights, entropy)[0].mean()


def divergences(
    shallow: Tensor, deep: Tensor, weights: str = "uniform", entropy: float = ENTROPY
) -> tuple[Tensor, Tensor]:
    """`sinkhorn_divergence` image by image, (B,), and the plan between the two sets, (B, N, M)."""
    with torch.autocast(shallow.device.type, enabled=False):
        u, v = unit(shallow), unit(deep.detach())
        a, b = cross_marginals(u, v) if weights == "cross" else (_even(u), _even(v))
        across, within_u, within_v = cost_matrix(u, v), cost_matrix(u, u), cost_matrix(v, v)
        with torch.no_grad():
            # The clamp is for sets whose nodes are all the same: any plan is optimal then.
            eps = (entropy / 2 * (within_u.mean((1, 2)) + within_v.mean((1, 2)))).clamp_min(1e-6)
            plan = entropic(across, a, b, eps)
            plan_u, plan_v = entropic_self(within_u, a, eps), entropic_self(within_v, b, eps)
        value = _entropic_cost(plan, across, a, b, eps)
        return value - (_entropic_cost(plan_u, within_u, a, a, eps) + _entropic_cost(plan_v, within_v, b, b, eps)) / 2, plan


def _entropic_cost(plan: Tensor, cost: Tensor, a: Tensor, b: Tensor, eps: Tensor) -> Tensor:
    """<P, C> + eps KL(P | a b^T) with P a constant, (B,)."""
    with torch.no_grad():
        divergence = torch.xlogy(plan, plan / (a[:, :, None] * b[:, None, :])).sum((1, 2))
    return (plan * cost).sum((1, 2)) + eps * divergence


def gaussian_l2(shallow: Tensor, deep: Tensor, *, weights: str = "uniform") -> Tensor:
    """The transport cost between two sets of local features, each taken as a diagonal Gaussian; a scalar.

        L = mean over the batch of ||mu_u - mu_v||^2 + ||sigma_u - sigma_v||^2

    with u, v the unit-length features and mu, sigma (C) their means and deviations over the nodes: W_2^2 between
    N(mu_u, diag sigma_u^2) and N(mu_v, diag sigma_v^2), which needs no plan and is at most `emd_l2`. `deep` is a
    constant. Computed in float32 outside autocast. The distance is WKD-F's (Lv et al., NeurIPS 2024, arXiv 2412.08139).

    Args:
        shallow: Shallow local features, (B, N, C).
        deep: Deep local features matched to the shallow channels, (B, M, C).
        weights: Node weights of the moments: ``"uniform"``, or ``"cross"`` (`cross_marginals`).

    Raises:
        UserError: if shapes or options do not fit.
    """
    _check_nodes(shallow, deep)
    if weights not in MARGINALS:
        raise UserError(f"expected weights in {MARGINALS}; got {weights!r}")
    with torch.autocast(shallow.device.type, enabled=False):
        u, v = unit(shallow), unit(deep.detach())
        a, b = cross_marginals(u, v) if weights == "cross" else (None, None)
        (mean_u, sigma_u), (mean_v, sigma_v) = _moments(u, a), _moments(v, b)
        return ((mean_u - mean_v).square() + (sigma_u - sigma_v).square()).sum(-1).mean()


def _even(x: Tensor) -> Tensor:
    """Equal weights (B, N) of the nodes of x (B, N, C)."""
    return x.new_full(x.shape[:2], 1 / x.shape[1])


def _moments(x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Means and deviations (B, C) of x (B, N, C) over its nodes, weighted by (B, N) if given."""
    share = _even(x) if weights is None else weights
    mean = (share[:, :, None] * x).sum(1)
    # 1e-8 keeps the root's gradient finite for a channel that is the same everywhere.
    return mean, ((share[:, :, None] * (x - mean[:, None]).square()).sum(1) + 1e-8).sqrt()


def _check_nodes(shallow: Tensor, deep: Tensor) -> None:
    if shallow.ndim != 3 or deep.ndim != 3 or shallow.shape[0] != deep.shape[0] or shallow.shape[2] != deep.shape[2]:
        raise UserError(
            "expected shallow (batch, nodes, channels) and deep (batch, nodes, channels) with equal batch and channels; "
            f"got {tuple(shallow.shape)} and {tuple(deep.shape)}"
        )


class FeatureLoss(nn.Module):
    """(1/S) sum_s L_feat(f_s, sg f_d): the feature part of SFR, over all shallow taps. Holds options only.

    L_feat is `sinkhorn_divergence`, `emd_l2` with the plan that the options name, or `gaussian_l2`.
    """

    def __init__(self, config: SFRConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, shallow: list[Tensor], deep: Tensor) -> Tensor:
        """A scalar from S shallow taps (B, N_s, C_s), already projected if any, and the deep tap (B, M, C_d)."""
        deep = deep.detach()
        total = deep.new_zeros((), dtype=torch.float32)
        for features in shallow:
            total = total + self._distance(features, self._match(features, deep))
        return total / len(shallow)

    def _distance(self, shallow: Tensor, deep: Tensor) -> Tensor:
        config = self.config
        if config.matching == "divergence":
            return sinkhorn_divergence(shallow, deep, weights=config.weights)
        if config.matching == "gaussian":
            return gaussian_l2(shallow, deep, weights=config.weights)
        return emd_l2(shallow, deep, weights=config.weights, solver=config.solver, matching=config.matching)

    def _match(self, shallow: Tensor, deep: Tensor) -> Tensor:
        method = "groups" if self.config.channels == "projection" else self.config.channels
        return match_channels(deep, shallow.shape[-1], method, shallow=shallow.detach())


