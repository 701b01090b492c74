"""Discrete optimal transport: cost, marginals, plan; each a pure function on batches.

Shape suffixes: B batch, N shallow nodes (rows), M deep nodes (columns), C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from timm_sfr.errors import UserError

SOLVERS = ("sinkhorn", "exact")
MARGINALS = ("uniform", "cross")

# A local feature whose largest entry is below this carries no direction: it counts as zero rather than being blown up,
# and no gradient of 1 / ||x|| overflows fp16.
_DEAD = 1e-6


def unit(x: Tensor) -> Tensor:
    """Local features scaled to unit length along the last axis, in float32: x / ||x||, and 0 for an all-zero one.

    Dividing by the largest entry first keeps the squares inside float32's range for any finite input, fp16's largest
    values and tiny ones included. A zero feature stays zero and gets no gradient.
    """
    x = x.float()
    scale = x.detach().abs().amax(-1, keepdim=True)
    x = x / scale.clamp_min(1e-12)
    # The clamp matters only for all-zero features: any other has norm >= 1 after the division.
    return torch.where(scale > _DEAD, x * x.square().sum(-1, keepdim=True).clamp_min(1e-6).rsqrt(), 0.0)


def cost_matrix(u: Tensor, v: Tensor) -> Tensor:
    """Squared distances C_ij = ||u_i - v_j||^2: (B, N, C) and (B, M, C) to (B, N, M).

    Expanded as ||u||^2 + ||v||^2 - 2 u.v, one batched matrix product; clamped at 0, below which rounding may take it.
    """
    products = torch.baddbmm(v.square().sum(-1)[:, None, :], u, v.transpose(1, 2), alpha=-2)
    return (products + u.square().sum(-1)[:, :, None]).clamp_min(0)


def uniform_marginals(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Equal weights a (B, N) = 1/N and b (B, M) = 1/M for a cost of shape (B, N, M)."""
    batch, rows, columns = cost.shape
    return cost.new_full((batch, rows), 1 / rows), cost.new_full((batch, columns), 1 / columns)


def cross_marginals(u: Tensor, v: Tensor, floor: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Cross-reference weights: a node weighs more the better it agrees with the other layer's mean node.

        a_i = (max(u_i . mean_j v_j, 0) + floor) / sum,    b_j = (max(v_j . mean_i u_i, 0) + floor) / sum

    Each sums to 1 and is a constant (no gradient). After DeepEMD (Zhang et al., CVPR 2020, arXiv 2003.06777).

    Args:
        u: (B, N, C).
        v: (B, M, C).
        floor: Keeps every node in the problem.

    Returns:
        a (B, N) and b (B, M).
    """
    u, v = u.detach(), v.detach()
    a = (u @ v.mean(1)[:, :, None])[..., 0].clamp_min(0) + floor
    b = (v @ u.mean(1)[:, :, None])[..., 0].clamp_min(0) + floor
    return a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)


def transport_plan(cost: Tensor, a: Tensor | None = None, b: Tensor | None = None, solver: str = "sinkhorn") -> Tensor:
    """The plan that moves mass a onto mass b at the least cost: P* = argmin_{P in U(a, b)} <P, C>, (B, N, M).

    U(a, b) holds the non-negative matrices with row sums a and column sums b. The plan is a constant (no gradient),
    computed outside autocast: ``"sinkhorn"`` in float32 (close to the optimum, batched, compiles), ``"exact"`` in
    float64 on the CPU (POT's network simplex, one problem at a time: the oracle).

    Args:
        cost: (B, N, M), any finite values.
        a: Row masses, (B, N), summing to 1; uniform if None.
        b: Column masses, (B, M), summing to 1; uniform if None.
        solver: ``"sinkhorn"`` or ``"exact"``.

    Raises:
        UserError: if the shapes do not fit, or for an unknown solver.
    """
    if cost.ndim != 3:
        raise UserError(f"expected a cost of shape (batch, rows, columns); got {tuple(cost.shape)}")
    if a is None or b is None:
        even_a, even_b = uniform_marginals(cost)
        a, b = even_a if a is None else a, even_b if b is None else b
    if a.shape != cost.shape[:2] or b.shape != (cost.shape[0], cost.shape[2]):
        raise UserError(
            f"marginals do not fit the cost {tuple(cost.shape)}: expected a {tuple(cost.shape[:2])} and b "
            f"{(cost.shape[0], cost.shape[2])}; got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if solver not in SOLVERS:
        raise UserError(f"unknown solver {solver!r}: expected one of {', '.join(SOLVERS)}")
    solve = sinkhorn if solver == "sinkhorn" else exact
    with torch.no_grad(), torch.autocast(cost.device.type, enabled=False):
        return solve(cost.detach().float(), a.detach().float(), b.detach().float()).to(cost.dtype)


def exact(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Optimal plans by POT's network simplex (`ot.emd`), in NumPy float64, one problem at a time: (B, N, M)."""
    import ot  # only here: it takes a second, a fifth of this package's import

    costs, rows, columns = (x.double().cpu().numpy() for x in (cost, a, b))
    # The simplex wants equal masses to float64 precision; float32 sums to 1 only to 1e-7.
    rows, columns = rows / rows.sum(-1, keepdims=True), columns / columns.sum(-1, keepdims=True)
    plans = [torch.from_numpy(ot.emd(*problem)) for problem in zip(rows, columns, costs, strict=True)]
    return torch.stack(plans).to(cost)


def sinkhorn(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    iterations: int = 24,
    eps_first: float = 0.3,
    eps_last: float = 0.01,
    relaxation: float = 1.5,
) -> Tensor:
    """Nearly optimal plans by annealed entropic transport in the log domain, rounded onto the marginals: (B, N, M).

    With K = the cost less its row and column minima (which changes no optimal plan), scaled to mean 1:

        f_i = eps (log a_i - log sum_j exp((g_j - K_ij) / eps)),    g likewise,    P_ij = exp((f_i + g_j - K_ij) / eps)

    where eps falls geometrically from `eps_first` to `eps_last` over a fixed number of iterations, so that nothing
    depends on the data: no synchronisation, no graph break. Two things make so few iterations enough. Taking the
    minima off first measures eps against the differences that decide the plan. Over-relaxation (arXiv 1711.01851) takes
    each update `relaxation` times as far, but for the last, which meets the column masses. docs/method.md has the gaps
    with and without.

    Args:
        cost: (B, N, M), float32, finite.
        a: (B, N), positive.
        b: (B, M), positive.
        iterations: Pairs of updates.
        eps_first: Entropy weight at the first iteration, in units of the mean of K.
        eps_last: The same from the third last iteration on.
        relaxation: Length of a step against the plain one, in [1, 2).
    """
    cost = cost - cost.amin(2, keepdim=True)
    cost = cost - cost.amin(1, keepdim=True)
    # A constant cost has mean 0 here and any plan is optimal: the clamp keeps 0 / 0 away.
    cost = cost / cost.mean((1, 2), keepdim=True).clamp_min(1e-12)
    log_a, log_b = a.log(), b.log()
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    eps = eps_last
    for step in range(iterations):
        eps = eps_first * (eps_last / eps_first) ** min(1.0, step / max(1, iterations - 3))
        stretch = relaxation if step < iterations - 1 else 1.0
        f = f + stretch * (eps * (log_a - torch.logsumexp((g[:, None, :] - cost) / eps, 2)) - f)
        g = g + stretch * (eps * (log_b - torch.logsumexp((f[:, :, None] - cost) / eps, 1)) - g)
    return round_plan(((f[:, :, None] + g[:, None, :] - cost) / eps).exp(), a, b)


def round_plan(plan: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The nearest cheap plan with exactly the marginals a and b: shrink what is too much, spread what is missing.

    Algorithm 2 of Altschuler, Weed and Rigollet (NeurIPS 2017, arXiv 1705.09634).

    Args:
        plan: (B, N, M), non-negative.
        a: (B, N).
        b: (B, M).
    """
    tiny = torch.finfo(plan.dtype).tiny  # a row or column without mass has nothing to shrink
    plan = plan * (a / plan.sum(2).clamp_min(tiny)).clamp_max(1)[:, :, None]
    plan = plan * (b / plan.sum(1).clamp_min(tiny)).clamp_max(1)[:, None, :]
    missing_a, missing_b = (a - plan.sum(2)).clamp_min(0), (b - plan.sum(1)).clamp_min(0)
    share = missing_b / missing_b.sum(1, keepdim=True).clamp_min(tiny)
    return plan + missing_a[:, :, None] * share[:, None, :]
