"""Costs, node weights and entropic transport plans, as pure functions on batches.

Shapes: B problems in the batch, N shallow nodes (rows), M deep nodes (columns), C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Pairs of updates in `entropic`. At the entropy of `sinkhorn_divergence` and uniform weights they keep its gradient
# within 5 % (tested).
ENTROPIC_UPDATES = 8
# Of `sinkhorn`: pairs of updates per level, the entropy weight of the first level, and the over-relaxation w.
UPDATES, EPS, RELAXATION = (4, 6, 8), 0.08, 1.6
# Over-relaxation can diverge on hard marginals, so no update goes past its goal by more than a factor of e^(0.6 * 3).
STRETCH = 3.0
# The least entry of the matrix G that the updates scale; from the second level on, G_ij = P_ij^2 / (a_i b_j). It keeps every
# pair of nodes possible, so that no row or column loses its last place for mass.
FLOOR = 1e-20
# A local feature whose largest entry is at most this has no usable direction. It counts as zero: scaling it up would amplify
# noise, and the gradient of 1 / ||x|| would overflow fp16.
_DEAD = 1e-6


def unit(x: Tensor) -> Tensor:
    """Scales local features to unit length along the last axis: x / ||x|| in float32, of the same shape (..., C).

    x is divided by its largest entry first, so that the squares stay within float32's range for any finite input,
    including fp16's largest and smallest values. A feature whose entries are all at most 1e-6 in magnitude becomes
    zero and gets no gradient.
    """
    return _Unit.apply(x.float())


class _Unit(torch.autograd.Function):
    """`unit` of float32 features u = x / ||x||, with its gradient (g - u (u . g)) / ||x|| in closed form.

    It takes half the time of the gradient that autograd derives operation by operation.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True)
        inverse = 1 / scale.clamp_min(1e-12)
        x = x * inverse
        # The clamp matters only for dead features: any other has a norm of at least 1 after the division.
        # `scale <= _DEAD` is false for NaN, so NaN stays visible.
        length = torch.where(scale <= _DEAD, 0.0, x.square().sum(-1, keepdim=True).clamp_min(1e-6).rsqrt())
        u = x * length
        ctx.save_for_backward(u, length * inverse)
        return u

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # The scale is a constant here, so a second derivative would be wrong. PyTorch's `once_differentiable` does not see
        # those of `torch.autograd.grad`. A compiled backward pass refuses them itself.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("SFR's feature loss has no second derivatives (create_graph=True)")
        u, inverse = ctx.saved_tensors
        return (gradient - u * (u * gradient).sum(-1, keepdim=True)) * inverse


def cost_matrix(u: Tensor, v: Tensor) -> Tensor:
    """Returns the squared distances C_ij = ||u_i - v_j||^2 (B, N, M) of u (B, N, C) and v (B, M, C), which `unit` has scaled.

    Computed as ||u_i||^2 + ||v_j||^2 - 2 u_i . v_j with one batched matrix product. Rounding can make this negative, so it
    is clamped at 0. The squared lengths, 1 or 0, are constants: no change of the features that `unit` scales moves them.
    """
    with torch.no_grad():
        lengths_u, lengths_v = u.square().sum(-1), v.square().sum(-1)
    products = torch.baddbmm(lengths_v[:, None, :], u, v.transpose(1, 2), alpha=-2)
    return (products + lengths_u[:, :, None]).clamp_min(0)


def uniform_marginals(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Returns equal weights a (B, N) = 1/N and b (B, M) = 1/M for a cost of shape (B, N, M)."""
    batch, rows, columns = cost.shape
    return cost.new_full((batch, rows), 1 / rows), cost.new_full((batch, columns), 1 / columns)


def cross_marginals(u: Tensor, v: Tensor, floor: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Returns cross-reference weights: the better a node agrees with the other layer's mean node, the more it weighs.

        a_i = (max(u_i . mean_j v_j, 0) + floor) / Z_a,    b_j = (max(v_j . mean_i u_i, 0) + floor) / Z_b

    Z_a and Z_b make a and b sum to 1. Both are constants (no gradient). From DeepEMD (Zhang et al., CVPR 2020,
    arXiv 2003.06777).

    Args:
        u: Shallow features of unit length, (B, N, C).
        v: Deep features of unit length, (B, M, C).
        floor: Keeps every weight positive.

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
    """Returns nearly optimal transport plans P, (B, N, M), by entropic transport; each level halves the entropy weight.

    K is the cost minus its row and column minima (which changes no optimal plan), scaled to mean 1. The first level
    scales G = exp(-K / eps) to the marginals a and b. Sinkhorn's updates, each a vector times a matrix, alternate:

        f_i <- f_i + w (log a_i - log sum_j G_ij e^{g_j} - f_i)
        g_j <- g_j + w (log b_j - log sum_i e^{f_i} G_ij - g_j)        P_ij = e^{f_i} G_ij e^{g_j}

    Every further level starts from G_ij = P_ij^2 / (a_i b_j) and f = g = 0. P_ij is exp((phi_i + psi_j - K_ij) / eps) for
    some potentials phi and psi, so squaring it halves the entropy weight and keeps the potentials found so far. Any level
    therefore fits in float32, and only the first takes the exponential of a matrix. Up to row and column scalings, this is
    the proximal step of IPOT (Xie et al., UAI 2020, arXiv 1802.04307) with a proximal weight equal to the entropy weight.
    The number of updates is fixed, so nothing waits for the device and no compiled graph breaks.

    Few updates are enough for two reasons. Without the minima, eps is measured against the differences that decide the
    plan. Over-relaxation (arXiv 1711.01851) makes each update w times as long, except the last, which makes the column
    sums exact. The remaining error of the rows is then spread (`round_plan`). docs/performance.md has the gaps to the
    optimum and the times.

    Args:
        cost: (B, N, M), float32, finite.
        a: Row masses, (B, N), at least 1e-25.
        b: Column masses, (B, M), at least 1e-25.
        updates: Pairs of updates per level.
        eps: Entropy weight of the first level, in units of the mean of K.
        relaxation: w, in [1, 2).
    """
    plan = cost - cost.amin(2, keepdim=True)
    plan = plan.sub_(plan.amin(1, keepdim=True))
    # The mean of a constant cost is 0 here, and any plan is optimal; the clamp prevents 0 / 0.
    plan = plan.mul_(-1 / (eps * plan.mean((1, 2), keepdim=True).clamp_min(1e-12))).exp_()
    log_a, log_b = a.log()[:, None], b.log()[:, None]
    f, g = log_a, log_b
    # In place from here on: allocating memory for a product takes longer than the product. The transposed copy is needed
    # because a row vector times a matrix is several times as fast as a matrix times a column vector.
    transposed = torch.empty_like(plan.transpose(1, 2), memory_format=torch.contiguous_format)
    for level, count in enumerate(updates):
        if level > 0:
            plan = plan.mul_((f - log_a / 2).exp_().transpose(1, 2)).mul_((g - log_b / 2).exp_())
            plan = plan.mul_(plan)
            f, g = torch.zeros_like(f), torch.zeros_like(g)
        plan = plan.clamp_min_(FLOOR)
        transposed.copy_(plan.transpose(1, 2))
        for step in range(count):
            last = level == len(updates) - 1 and step == count - 1
            f = _relaxed(f, log_a - torch.bmm(g.exp(), transposed).log_(), relaxation)
            g = _relaxed(g, log_b - torch.bmm(f.exp(), plan).log_(), 1.0 if last else relaxation)
    plan = plan.mul_(f.exp_().transpose(1, 2)).mul_(g.exp_())
    # The column sums are exact, and shrinking rows cannot make them too large: `round_plan` without its columns is enough.
    return _spread(_shrink(plan, a), a, b)


def entropic(cost: Tensor, a: Tensor, b: Tensor, eps: Tensor, updates: int = ENTROPIC_UPDATES) -> Tensor:
    """Returns entropic plans at a fixed entropy weight: `argmin_{P in U(a, b)} <P, C> + eps KL(P | a b^T)`, (B, N, M).

    Sinkhorn's updates scale exp(-C / eps) to the marginals a and b. The cost C loses its row and column minima first,
    which does not change the plan and gives every row and column an exponent of 0. Use an eps of at least a tenth
    of the cost's spread, where a few updates are enough. The last update makes the column sums exact; the remaining
    error of the rows is spread (`round_plan`).

    Args:
        cost: C, (B, N, M), float32, finite.
        a: Row masses, (B, N), positive.
        b: Column masses, (B, M), positive.
        eps: Entropy weight, (B,), positive, in the units of the cost.
        updates: Pairs of updates.
    """
    kernel = cost - cost.amin(2, keepdim=True)
    kernel = (kernel - kernel.amin(1, keepdim=True)).div_(-eps[:, None, None]).exp_().clamp_min_(FLOOR)
    transposed = kernel.transpose(1, 2).contiguous()
    a, b = a[:, None], b[:, None]
    f, g = a, b
    for step in range(updates):
        g = b / torch.bmm(f, kernel)
        if step < updates - 1:
            f = a / torch.bmm(g, transposed)
    plan = kernel.mul_(f.transpose(1, 2)).mul_(g)
    return _spread(_shrink(plan, a[:, 0]), a[:, 0], b[:, 0])


def entropic_self(cost: Tensor, a: Tensor, eps: Tensor, updates: int = ENTROPIC_UPDATES) -> Tensor:
    """Returns the `entropic` plans of sets with themselves, (B, N, N): the cost is symmetric with zero diagonal, and b = a.

    The plan is symmetric, so P_ij = f_i G_ij f_j with one vector f and G = exp(-C / eps). The update
    f <- sqrt(f a / (G f)) averages the old and the new f geometrically, which converges faster. The cost C is (B, N, N),
    the masses a are (B, N), the entropy weights eps (B,).
    """
    kernel = cost.div(-eps[:, None, None]).exp_().clamp_min_(FLOOR)
    a = a[:, None]
    f = a
    for _ in range(updates):
        f = (f * a / torch.bmm(f, kernel)).sqrt()
    return kernel.mul_(f.transpose(1, 2)).mul_(f)


def round_plan(plan: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Rounds plans onto the marginals a and b exactly: (B, N, M).

    Shrinks rows and columns that have too much mass, then spreads the missing mass. This is Algorithm 2 of Altschuler,
    Weed and Rigollet (NeurIPS 2017, arXiv 1705.09634).

    Args:
        plan: (B, N, M), non-negative.
        a: Row masses, (B, N).
        b: Column masses, (B, M).
    """
    plan = _shrink(plan.clone(), a)
    # The columns are the rows of the transposed view.
    plan = _shrink(plan.transpose(1, 2), b).transpose(1, 2)
    return _spread(plan, a, b)


def _relaxed(old: Tensor, goal: Tensor, relaxation: float) -> Tensor:
    """Returns old + relaxation (goal - old), with the part past the goal limited to (relaxation - 1) `STRETCH`."""
    return goal if relaxation == 1 else goal.add((goal - old).clamp_(-STRETCH, STRETCH), alpha=relaxation - 1)


def _shrink(plan: Tensor, a: Tensor) -> Tensor:
    """Scales rows of the plan (B, N, M) that have more mass than a (B, N) down to a, in place."""
    tiny = torch.finfo(plan.dtype).tiny  # prevents a division by 0 for a row without mass
    return plan.mul_((a / plan.sum(2).clamp_min(tiny)).clamp_max(1)[:, :, None])


def _spread(plan: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Adds the outer product of the rows' and the columns' missing mass, scaled to that mass, in place: (B, N, M)."""
    tiny = torch.finfo(plan.dtype).tiny  # prevents a division by 0 if nothing is missing
    missing_a, missing_b = (a - plan.sum(2)).clamp_min(0), (b - plan.sum(1)).clamp_min(0)
    share = missing_b / missing_b.sum(1, keepdim=True).clamp_min(tiny)
    return plan.addcmul_(missing_a[:, :, None], share[:, None, :])
