"""The feature loss: transport costs between a shallow and a deep layer's local features, and `FeatureLoss` over all taps.

Shapes: B images in the batch, N shallow nodes, M deep nodes, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from timm_sfr.method.channels import match_channels
from timm_sfr.method.config import MARGINALS, SFRConfig
from timm_sfr.method.sinkhorn import cost_matrix, cross_marginals, entropic, entropic_self, unit
from timm_sfr.method.transport import transport_plan, triton_for
from timm_sfr.utils.errors import UserError

PLANS = ("emd", "grid")
ENTROPY = 0.3  # the default of `sinkhorn_divergence`: eps in units of the mean cost within a set


def emd_l2(
    shallow: Tensor,
    deep: Tensor,
    *,
    weights: str = "uniform",
    solver: str = "auto",
    matching: str = "emd",
) -> Tensor:
    """Returns the squared distance between two sets of local features under their optimal transport plan, a scalar.

        C_ij = ||u_i - v_j||^2,    P* = argmin_{P in U(a, b)} <P, C>,    L = mean over the batch of <P*, C>

    u_i and v_j are the unit-length shallow and deep features, a and b their node weights, and U(a, b) is the set of
    non-negative matrices with row sums a and column sums b. `deep` and P* are constants. The gradient through C alone
    is the exact gradient of the transport cost at fixed marginals (envelope theorem). Computed in float32 with autocast
    off.

    Args:
        shallow: Shallow local features, (B, N, C).
        deep: Deep local features matched to the shallow channels, (B, M, C).
        weights: Node weights a, b: ``"uniform"``, or ``"cross"`` (`cross_marginals`).
        solver: The solver, as in `transport_plan`.
        matching: ``"emd"``, or ``"grid"``, the ablation: P = diag(a) on a common grid (plain l2; identity / N for uniform
            weights).

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
            a, _ = _marginals(u, v, weights)
            return (a * (u - v).square().sum(-1)).sum(-1).mean()
        triton = triton_for((*u.shape[:2], v.shape[1]), u.device) if solver == "triton" else None
        if triton:
            return triton.transport_costs(u, v, *_marginals(u, v, weights)).mean()
        cost = cost_matrix(u, v)
        a, b = (
            cross_marginals(u, v) if weights == "cross" else (None, None)
        )  # None: equal masses, which some solvers solve exactly
        return (transport_plan(cost, a, b, solver) * cost).sum((1, 2)).mean()


def sinkhorn_divergence(shallow: Tensor, deep: Tensor, *, weights: str = "uniform", entropy: float = ENTROPY) -> Tensor:
    """Returns the debiased entropic transport cost between two sets of local features, a scalar; 0 for equal sets.

        W(x, y) = min_{P in U(a, b)} <P, C> + eps KL(P | a b^T),     C_ij = ||x_i - y_j||^2
        L = mean over the batch of W(u, v) - W(u, u) / 2 - W(v, v) / 2

    u and v are the unit-length shallow and deep features, a and b the node weights of x and y, and U(a, b) is the set
    of non-negative matrices with row sums a and column sums b. eps is a constant of each image: `entropy` times the
    average of the mean cost within u and the mean cost within v. As eps goes to 0, L becomes `emd_l2`; for a large eps
    it is the squared distance of the means. In between, the plan pairs nodes softly, and -W(u, u) / 2 prevents this
    softness from contracting the shallow nodes. `deep`, eps and the plans are constants. The gradient through the
    costs alone is exact at this eps (envelope theorem). Computed in float32 with autocast off. From Feydy et al., AISTATS 2019
    (arXiv 1810.08278).

    Args:
        shallow: Shallow local features, (B, N, C).
        deep: Deep local features matched to the shallow channels, (B, M, C).
        weights: Node weights a, b: ``"uniform"``, or ``"cross"`` (`cross_marginals`).
        entropy: eps in units of the mean cost within a set; positive. Below about 0.1 the solver's updates are too few, and
            the result is too large; use `emd_l2`.

    Raises:
        UserError: if shapes or options do not fit.
    """
    _check_nodes(shallow, deep)
    if weights not in MARGINALS or entropy <= 0:
        raise UserError(f"expected weights in {MARGINALS} and entropy > 0; got {weights!r}, {entropy}")
    return divergences(shallow, deep, weights, entropy)[0].mean()


def divergences(shallow: Tensor, deep: Tensor, weights: str = "uniform", entropy: float = ENTROPY) -> tuple[Tensor, Tensor]:
    """Returns the `sinkhorn_divergence` of each image, (B,), and the plans between the two sets, (B, N, M)."""
    with torch.autocast(shallow.device.type, enabled=False):
        u, v = unit(shallow), unit(deep.detach())
        a, b = _marginals(u, v, weights)
        across, within_u, within_v = cost_matrix(u, v), cost_matrix(u, u), cost_matrix(v, v)
        with torch.no_grad():
            # If all nodes of both sets are equal, any plan is optimal; the clamp prevents a division by zero.
            eps = (entropy / 2 * (within_u.mean((1, 2)) + within_v.mean((1, 2)))).clamp_min(1e-6)
            plan = entropic(across, a, b, eps)
            plan_u, plan_v = entropic_self(within_u, a, eps), entropic_self(within_v, b, eps)
        value = _entropic_cost(plan, across, a, b, eps)
        return value - (_entropic_cost(plan_u, within_u, a, a, eps) + _entropic_cost(plan_v, within_v, b, b, eps)) / 2, plan


def gaussian_l2(shallow: Tensor, deep: Tensor, *, weights: str = "uniform") -> Tensor:
    """Returns the transport cost between two sets of local features, each modelled as a diagonal Gaussian; a scalar.

        L = mean over the batch of ||mu_u - mu_v||^2 + ||sigma_u - sigma_v||^2

    u and v are the unit-length shallow and deep features; mu and sigma (C) are their means and standard deviations over
    the nodes. This is W_2^2 between N(mu_u, diag sigma_u^2) and N(mu_v, diag sigma_v^2). It needs no plan and is at most
    `emd_l2`. `deep` is a constant. Computed in float32 with autocast off. The distance is that of WKD-F (Lv et al.,
    NeurIPS 2024, arXiv 2412.08139).

    Args:
        shallow: Shallow local features, (B, N, C).
        deep: Deep local features matched to the shallow channels, (B, M, C).
        weights: Node weights of the means and deviations: ``"uniform"``, or ``"cross"`` (`cross_marginals`).

    Raises:
        UserError: if shapes or options do not fit.
    """
    _check_nodes(shallow, deep)
    if weights not in MARGINALS:
        raise UserError(f"expected weights in {MARGINALS}; got {weights!r}")
    with torch.autocast(shallow.device.type, enabled=False):
        u, v = unit(shallow), unit(deep.detach())
        a, b = _marginals(u, v, weights)
        (mean_u, sigma_u), (mean_v, sigma_v) = _moments(u, a), _moments(v, b)
        return ((mean_u - mean_v).square() + (sigma_u - sigma_v).square()).sum(-1).mean()


class FeatureLoss(nn.Module):
    """The feature loss of SFR, (1/S) sum_s L_feat(f_s, sg f_d), over the shallow taps s = 1..S and the deep tap d.

    sg is stop-gradient. L_feat is `sinkhorn_divergence`, `emd_l2` or `gaussian_l2`, as the option `matching` selects.
    """

    def __init__(self, config: SFRConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, shallow: list[Tensor], deep: Tensor) -> Tensor:
        """Returns the loss, a scalar, of S shallow taps (B, N_s, C_s), projected if needed, and the deep tap (B, M, C_d).

        Computed in float32 with autocast off.
        """
        with torch.autocast(deep.device.type, enabled=False):
            # In this layout, the channels of all images are averaged several times as fast on CPUs.
            deep = deep.detach().float().transpose(1, 2).contiguous().transpose(1, 2)
            total = deep.new_zeros(())
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


def _entropic_cost(plan: Tensor, cost: Tensor, a: Tensor, b: Tensor, eps: Tensor) -> Tensor:
    """Returns <P, C> + eps KL(P | a b^T), (B,), with the plan P (B, N, M) as a constant."""
    with torch.no_grad():
        divergence = torch.xlogy(plan, plan / (a[:, :, None] * b[:, None, :])).sum((1, 2))
    return (plan * cost).sum((1, 2)) + eps * divergence


def _marginals(u: Tensor, v: Tensor, weights: str) -> tuple[Tensor, Tensor]:
    """Returns the node weights a (B, N) and b (B, M) of u (B, N, C) and v (B, M, C)."""
    if weights == "cross":
        return cross_marginals(u, v)
    return u.new_full(u.shape[:2], 1 / u.shape[1]), v.new_full(v.shape[:2], 1 / v.shape[1])


def _moments(x: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the means and standard deviations (B, C) of x (B, N, C) over its nodes, with weights (B, N)."""
    mean = (share[:, :, None] * x).sum(1)
    # 1e-8 keeps the gradient of the square root finite for a constant channel.
    return mean, ((share[:, :, None] * (x - mean[:, None]).square()).sum(1) + 1e-8).sqrt()


def _check_nodes(shallow: Tensor, deep: Tensor) -> None:
    if shallow.ndim != 3 or deep.ndim != 3 or shallow.shape[0] != deep.shape[0] or shallow.shape[2] != deep.shape[2]:
        raise UserError(
            "expected shallow (batch, nodes, channels) and deep (batch, nodes, channels) with equal batch and channels; "
            f"got {tuple(shallow.shape)} and {tuple(deep.shape)}"
        )
