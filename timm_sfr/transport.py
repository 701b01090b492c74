"""Discrete optimal transport: cost, marginals, plan; each a pure function on batches.

Shape suffixes: B batch, N shallow nodes (rows), M deep nodes (columns), C channels.
"""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from timm_sfr.utils.errors import UserError

SOLVERS = ("auto", "sinkhorn", "exact", "triton")
MARGINALS = ("uniform", "cross")
# Up to this many nodes a side, all N^N maps of rows to columns are looked at (256), which takes less time than iterating.
ENUMERATED = 4
PERMUTATIONS = (1, 1, 2, 6, 24)  # of so many; looked up, since a compiled graph of dynamic shapes takes no factorial
# Pairs of updates of `entropic`: enough at the entropy that `sinkhorn_divergence` takes (its gradient is within 5 %, tested).
ENTROPIC_UPDATES = 8
_TRITON = find_spec("triton") is not None  # it comes with torch on Linux alone

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


def transport_plan(cost: Tensor, a: Tensor | None = None, b: Tensor | None = None, solver: str = "auto") -> Tensor:
    """The plan that moves mass a onto mass b at the least cost: `P* = argmin_{P in U(a, b)} <P, C>`, (B, N, M).

    U(a, b) holds the non-negative matrices with row sums a and column sums b. The plan is a constant (no gradient),
    computed outside autocast. The solvers:

    - ``"auto"``: `assignments`, which is exact, where the masses are equal (neither is given) and N = M <= 4;
      ``"sinkhorn"`` elsewhere.
    - ``"sinkhorn"``: close to the optimum, in float32, batched, compiles.
    - ``"exact"``: POT's network simplex in float64 on the CPU, one problem at a time: the oracle.
    - ``"triton"``: ``"sinkhorn"`` as one Triton program a problem, on CUDA and up to 64 x 64 nodes; elsewhere
      ``"sinkhorn"`` itself.

    Args:
        cost: (B, N, M), any finite values.
        a: Row masses, (B, N), summing to 1; uniform if None.
        b: Column masses, (B, M), summing to 1; uniform if None.
        solver: One of the above.

    Raises:
        UserError: if the shapes do not fit, or for an unknown solver.
    """
    if cost.ndim != 3:
        raise UserError(f"expected a cost of shape (batch, rows, columns); got {tuple(cost.shape)}")
    if solver not in SOLVERS:
        raise UserError(f"unknown solver {solver!r}: expected one of {', '.join(SOLVERS)}")
    if solver == "auto" and a is None and b is None and cost.shape[1] == cost.shape[2] <= ENUMERATED:
        with torch.no_grad(), torch.autocast(cost.device.type, enabled=False):
            return assignments(cost.detach().float()).to(cost.dtype)
    if a is None or b is None:
        even_a, even_b = uniform_marginals(cost)
        a, b = even_a if a is None else a, even_b if b is None else b
    if a.shape != cost.shape[:2] or b.shape != (cost.shape[0], cost.shape[2]):
        raise UserError(
            f"marginals do not fit the cost {tuple(cost.shape)}: expected a {tuple(cost.shape[:2])} and b "
            f"{(cost.shape[0], cost.shape[2])}; got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    fused = fused_for(cost.shape, cost.device) if solver == "triton" else None
    solve = exact if solver == "exact" else fused.plans if fused else sinkhorn
    with torch.no_grad(), torch.autocast(cost.device.type, enabled=False):
        return solve(cost.detach().float(), a.detach().float(), b.detach().float()).to(cost.dtype)


def assignments(cost: Tensor) -> Tensor:
    """Optimal plans of equal masses by looking at every map of rows to columns: (B, N, N), meant for N <= 4.

        P = (1/N) (the permutation matrix of least cost)

    An optimal plan of equal masses is always such a matrix (Birkhoff and von Neumann). All numbers are made on the
    device: nothing is copied to it, nothing synchronises.

    Args:
        cost: (B, N, N), float32, finite.
    """
    size = cost.shape[1]
    rows = torch.arange(size, device=cost.device)
    # Row i goes to column maps[k, i]: the digits of k to the base N. Those that hit every column are permutations; sorting
    # brings them to the front without asking how many they are.
    maps = torch.arange(size**size, device=cost.device)[:, None] // size**rows % size
    missed = (maps[:, :, None] != rows).all(1).any(1)
    maps = maps[missed.byte().argsort()[: PERMUTATIONS[size]]]
    total = cost.flatten(1)[:, rows * size + maps].sum(2)
    return (maps[total.argmin(1)][:, :, None] == rows).to(cost.dtype) / size


def fused_for(cost_shape: tuple[int, ...], device: torch.device) -> ModuleType | None:
    """`timm_sfr.fused` where it can solve problems (B, N, M) on this device; else None."""
    if not _TRITON:
        return None
    from timm_sfr import fused

    return fused if fused.fits(cost_shape, device) else None


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
