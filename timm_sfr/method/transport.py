"""Optimal transport plans from a cost and two sets of masses, by one of several solvers.

Shapes: B problems in the batch, N shallow nodes (rows), M deep nodes (columns).
"""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from timm_sfr.method.config import SOLVERS
from timm_sfr.method.sinkhorn import sinkhorn, uniform_marginals
from timm_sfr.utils.errors import UserError

# Up to N = 4 nodes per side, `assignments` tries all N^N (at most 256) maps of rows to columns, which is faster than iterating.
ENUMERATED = 4
LEAST_MASS = 1e-25
PERMUTATIONS = (1, 1, 2, 6, 24)  # N! for N = 0..4, as a table: a compiled graph with dynamic shapes has no factorial
_TRITON = find_spec("triton") is not None  # torch includes it on Linux only


def transport_plan(cost: Tensor, a: Tensor | None = None, b: Tensor | None = None, solver: str = "auto") -> Tensor:
    """Returns the plan that moves mass a to mass b at the least cost, `P* = argmin_{P in U(a, b)} <P, C>`, (B, N, M).

    U(a, b) is the set of non-negative matrices with row sums a and column sums b. The plan is a constant (no gradient).
    It is computed with autocast off and returned in the dtype of the cost. The solvers:

    - ``"auto"``: `assignments`, which is exact, if a and b are both None and N = M <= 4; otherwise ``"sinkhorn"``.
    - ``"sinkhorn"``: batched, in float32; compiles. Close to the optimum for costs of similar size, such as distances of
      features; far from it with a few much larger ones, such as 1e4 for a pair that is forbidden.
    - ``"exact"``: POT's network simplex in float64 on the CPU, one problem at a time. It is the oracle in the tests.
    - ``"triton"``: ``"sinkhorn"`` with one Triton program per problem, on CUDA and for up to 64 x 64 nodes; otherwise
      ``"sinkhorn"`` itself.

    Args:
        cost: C, (B, N, M), floating point, finite.
        a: Row masses, (B, N), at least 0 and summing to 1, which is not checked; uniform if None.
        b: Column masses, (B, M), likewise.
        solver: ``"auto"``, ``"sinkhorn"``, ``"exact"`` or ``"triton"``.

    Raises:
        UserError: if the shapes do not match, the cost is of integers, or the solver is unknown.
    """
    if cost.ndim != 3 or not cost.is_floating_point():
        raise UserError(f"expected a floating-point cost of shape (batch, rows, columns); got {cost.dtype} {tuple(cost.shape)}")
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
            f"marginals do not match the cost {tuple(cost.shape)}: expected a {tuple(cost.shape[:2])} and b "
            f"{(cost.shape[0], cost.shape[2])}; got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    triton = triton_for(cost.shape, cost.device) if solver == "triton" else None
    with torch.no_grad(), torch.autocast(cost.device.type, enabled=False):
        if solver == "exact":
            return exact(cost.detach(), a.detach(), b.detach())
        # The other solvers take logarithms of the masses, so a mass of 0 becomes one that moves nothing.
        a, b = (mass.detach().float().clamp_min(LEAST_MASS) for mass in (a, b))
        return (triton.plans if triton else sinkhorn)(cost.detach().float(), a, b).to(cost.dtype)


def assignments(cost: Tensor) -> Tensor:
    """Returns optimal plans between equal masses, (B, N, N), by trying every permutation; for N <= 4.

        P = (1/N) (the permutation matrix of least cost)

    Some optimal plan between equal masses always has this form (Birkhoff and von Neumann). Everything is computed on the
    device: nothing is copied to it, and nothing waits for it.

    Args:
        cost: (B, N, N), float32, finite.
    """
    size = cost.shape[1]
    rows = torch.arange(size, device=cost.device)
    # Map k sends row i to column maps[k, i], digit i of k in base N. A map that hits every column is a permutation. Sorting
    # moves these to the front, where a mask would have to wait for the device to count them.
    maps = torch.arange(size**size, device=cost.device)[:, None] // size**rows % size
    missed = (maps[:, :, None] != rows).all(1).any(1)
    maps = maps[missed.byte().argsort()[: PERMUTATIONS[size]]]
    total = cost.flatten(1)[:, rows * size + maps].sum(2)
    return (maps[total.argmin(1)][:, :, None] == rows).to(cost.dtype) / size


def triton_for(cost_shape: tuple[int, ...], device: torch.device) -> ModuleType | None:
    """Returns `timm_sfr.method.sinkhorn_triton` if it can solve problems (B, N, M) on the device, otherwise None."""
    if not _TRITON:
        return None
    from timm_sfr.method import sinkhorn_triton  # here because it imports Triton

    return sinkhorn_triton if sinkhorn_triton.fits(cost_shape, device) else None


def exact(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Returns optimal plans (B, N, M) for cost (B, N, M), a (B, N), b (B, M) by POT's network simplex (`ot.emd`).

    It runs in NumPy float64, one problem at a time.
    """
    import ot  # here because it takes a second, a fifth of this package's import time

    costs, rows, columns = (x.double().cpu().numpy() for x in (cost, a, b))
    # The simplex expects both sides to have the same total in float64; float32 masses sum to 1 only within 1e-7.
    rows, columns = rows / rows.sum(-1, keepdims=True), columns / columns.sum(-1, keepdims=True)
    plans = [torch.from_numpy(ot.emd(*problem)) for problem in zip(rows, columns, costs, strict=True)]
    return torch.stack(plans).to(cost) if plans else torch.empty_like(cost)
