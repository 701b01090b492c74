"""Costs, masses and entropic transport plans."""

from __future__ import annotations

import torch
from torch import Tensor

MARGINALS = ("uniform", "cross")


# Pairs of updates of `entropic`: enough at the entropy that `sinkhorn_divergence` takes (its gradient is within 5 %, tested).
ENTROPIC_UPDATES = 8


# A local feature whose largest entry is below this carries no direction: it counts as zero rather than being blown up,
# and no gradient of 1 / ||x|| overflows fp16.
_DEAD = 1e-6


# `sinkhorn`'s pairs of updates, level by level; the entropy weight of the first; how far an update goes.
UPDATES, EPS, RELAXATION = (3, 4, 6), 0.08, 1.6


# Over-relaxation alone can run away on hard marginals: no update goes further past its goal than a factor e^(0.6 * 3).
STRETCH = 3.0


# Keeps every pair of nodes possible, so that no row or column loses the last way to place its mass; in units of the
# geometric mean of the two masses, squared.
FLOOR = 1e-20


def unit(x: Tensor) -> Tensor:
    """Local features scaled to unit length along the last axis, in float32: x / ||x||, and 0 for an all-zero one.

    Dividing by the largest entry first keeps the squares inside float32's range for any finite input, fp16's largest
    values and tiny ones included. A zero feature stays zero and gets no gradient.
    """
    x = x.float()
    scale = x.detach().abs().amax(-1, keepdim=True)
    x = x / scale.clamp_min(1e-12)
    # The clamp matters only for all-zero features: any other has norm >= 1 after the division.
    # Asked this way round NaN is no dead feature, and stays to be seen.
    return torch.where(scale <= _DEAD, 0.0, x * x.square().sum(-1, keepdim=True).clamp_min(1e-6).rsqrt())


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


def sinkhorn(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    updates: tuple[int, ...] = UPDATES,
    eps: float = EPS,
    relaxation: float = RELAXATION,
) -> Tensor:
    """Nearly optimal plans by entropic transport whose entropy halves from level to level: (B, N, M).

    With K = the cost less its row and column minima (which changes no optimal plan), scaled to mean 1, the first level
    scales G = exp(-K / eps) to the marginals by Sinkhorn's updates, each a vector times a matrix:

        f_i <- f_i + w (log a_i - log sum_j G_ij e^{g_j} - f_i),    g likewise,    P_ij = e^{f_i} G_ij e^{g_j}

    and every further level starts from G_ij = P_ij^2 / (a_i b_j). Squaring halves the entropy weight, since P is
    exp((phi + psi - K) / eps) for some phi and psi, and takes in the potentials found so far; so float32 holds any
    level, and only the first takes the exponential of a matrix. Up to row and column scalings that is the proximal step
    of IPOT (Xie et al., UAI 2020, arXiv 1802.04307) with a proximal weight equal to the entropy weight. The number of
    updates is fixed: nothing synchronises, no graph breaks.

    Two things make so few enough. The minima are off, so that eps is measured against the differences that decide the
    plan. Over-relaxation (arXiv 1711.01851) takes each update w times as far, but for the last, which meets the column
    masses. docs/performance.md has the gaps to the optimum and the time.

    Args:
        cost: (B, N, M), float32, finite.
        a: (B, N), positive, at least 1e-25.
        b: (B, M), likewise.
        updates: Pairs of updates, level by level.
        eps: Entropy weight of the first level, in units of the mean of K.
        relaxation: w, in [1, 2).
    """
    plan = cost - cost.amin(2, keepdim=True)
    plan = plan.sub_(plan.amin(1, keepdim=True))
    # A constant cost has mean 0 here and any plan is optimal: the clamp keeps 0 / 0 away.
    plan = plan.mul_(-1 / (eps * plan.mean((1, 2), keepdim=True).clamp_min(1e-12))).exp_()
    log_a, log_b = a.log()[:, None], b.log()[:, None]
    f, g = log_a, log_b
    # In place from here on: fresh memory for a product costs more than the product. The turned copy is there because a
    # row vector times a matrix is several times as fast as a matrix times a column vector.
    turned = torch.empty_like(plan.transpose(1, 2), memory_format=torch.contiguous_format)
    for level, count in enumerate(updates):
        if level > 0:
            plan = plan.mul_((f - log_a / 2).exp_().transpose(1, 2)).mul_((g - log_b / 2).exp_())
            plan = plan.mul_(plan)
            f, g = torch.zeros_like(f), torch.zeros_like(g)
        plan = plan.clamp_min_(FLOOR)
        turned.copy_(plan.transpose(1, 2))
        for step in range(count):
            last = level == len(updates) - 1 and step == count - 1
            f = _relaxed(f, log_a - torch.bmm(g.exp(), turned).log_(), relaxation)
            g = _relaxed(g, log_b - torch.bmm(f.exp(), plan).log_(), 1.0 if last else relaxation)
    plan = plan.mul_(f.exp_().transpose(1, 2)).mul_(g.exp_())
    # The columns are met, and shrinking rows cannot make them too heavy: half of `round_plan`, in place, is enough.
    return _spread(_shrink(plan, a), a, b)


def entropic(cost: Tensor, a: Tensor, b: Tensor, eps: Tensor, updates: int = ENTROPIC_UPDATES) -> Tensor:
    """Plans of entropic transport at a fixed entropy: `argmin_{P in U(a, b)} <P, C> + eps KL(P | a b^T)`, (B, N, M).

    By Sinkhorn's updates on exp(-C / eps), the cost less its row and column minima, which leaves the plan as it is and
    keeps every exponent of a row or column near 0. Meant for an eps of a tenth of the cost's spread or more, where a
    few updates are enough; the last one meets the column masses.

    Args:
        cost: (B, N, M), float32, finite.
        a: (B, N), positive.
        b: (B, M), positive.
        eps: (B,), positive, in the units of the cost.
        updates: Pairs of updates.
    """
    kernel = cost - cost.amin(2, keepdim=True)
    kernel = (kernel - kernel.amin(1, keepdim=True)).div_(-eps[:, None, None]).exp_().clamp_min_(FLOOR)
    turned = kernel.transpose(1, 2).contiguous()
    a, b = a[:, None], b[:, None]
    f, g = a, b
    for step in range(updates):
        g = b / torch.bmm(f, kernel)
        if step < updates - 1:
            f = a / torch.bmm(g, turned)
    plan = kernel.mul_(f.transpose(1, 2)).mul_(g)
    # What few updates leave undone in the rows is spread, as in `sinkhorn`.
    return _spread(_shrink(plan, a[:, 0]), a[:, 0], b[:, 0])


def entropic_self(cost: Tensor, a: Tensor, eps: Tensor, updates: int = ENTROPIC_UPDATES) -> Tensor:
    """`entropic` of a set with itself: for a symmetric cost of zero diagonal and b = a; the plan is symmetric too, (B, N, N).

    One vector does for both sides, f <- sqrt(f a / (K f)), and the averaging makes it converge faster.
    """
    kernel = cost.div(-eps[:, None, None]).exp_().clamp_min_(FLOOR)
    a = a[:, None]
    f = a
    for _ in range(updates):
        f = (f * a / torch.bmm(f, kernel)).sqrt()
    return kernel.mul_(f.transpose(1, 2)).mul_(f)


def _relaxed(old: Tensor, goal: Tensor, relaxation: float) -> Tensor:
    """old + relaxation * (goal - old), but no further past the goal than `STRETCH` allows."""
    return goal if relaxation == 1 else goal.add((goal - old).clamp_(-STRETCH, STRETCH), alpha=relaxation - 1)


def round_plan(plan: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The nearest cheap plan with exactly the marginals a and b: shrink what is too much, spread what is missing.

    Algorithm 2 of Altschuler, Weed and Rigollet (NeurIPS 2017, arXiv 1705.09634).

    Args:
        plan: (B, N, M), non-negative.
        a: (B, N).
        b: (B, M).
    """
    plan = _shrink(plan.clone(), a)
    # Columns are rows of the turned view.
    plan = _shrink(plan.transpose(1, 2), b).transpose(1, 2)
    return _spread(plan, a, b)


def _shrink(plan: Tensor, a: Tensor) -> Tensor:
    """Rows (B, N, M) of more than a (B, N) scaled down to it, in place."""
    tiny = torch.finfo(plan.dtype).tiny  # a row without mass has nothing to shrink
    return plan.mul_((a / plan.sum(2).clamp_min(tiny)).clamp_max(1)[:, :, None])


def _spread(plan: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Adds what rows lack to what columns lack, in proportion, in place: (B, N, M)."""
    tiny = torch.finfo(plan.dtype).tiny  # where nothing is missing
    missing_a, missing_b = (a - plan.sum(2)).clamp_min(0), (b - plan.sum(1)).clamp_min(0)
    share = missing_b / missing_b.sum(1, keepdim=True).clamp_min(tiny)
    return plan.addcmul_(missing_a[:, :, None], share[:, None, :])
