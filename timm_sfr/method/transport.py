"""Discrete optimal transport: cost, marginals, plan; each a pure function on batches.

Shape suffixes: B batch, N shallow nodes (rows), M deep nodes (columns), C channels.
"""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from timm_sfr.method.sinkhorn import sinkhorn, uniform_marginals
from timm_sfr.utils.errors import UserError

SOLVERS = ("auto", "sinkhorn", "exact", "triton")
# Up to this many nodes a side, all N^N maps of rows to columns are looked at (256), which takes less time than iterating.
ENUMERATED = 4
PERMUTATIONS = (1, 1, 2, 6, 24)  # of so many; looked up, since a compiled graph of dynamic shapes takes no factorial
_TRITON = find_spec("triton") is not None  # it comes with torch on Linux alone


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
    triton = triton_for(cost.shape, cost.device) if solver == "triton" else None
    solve = exact if solver == "exact" else triton.plans if triton else sinkhorn
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


def triton_for(cost_shape: tuple[int, ...], device: torch.device) -> ModuleType | None:
    """`timm_sfr.method.sinkhorn_triton` where it can solve problems (B, N, M) on this device; else None."""
    if not _TRITON:
        return None
    from timm_sfr.method import sinkhorn_triton  # only here: importing it imports Triton

    return sinkhorn_triton if sinkhorn_triton.fits(cost_shape, device) else None


def exact(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Optimal plans by POT's network simplex (`ot.emd`), in NumPy float64, one problem at a time: (B, N, M)."""
    import ot  # only here: it takes a second, a fifth of this package's import

    costs, rows, columns = (x.double().cpu().numpy() for x in (cost, a, b))
    # The simplex wants equal masses to float64 precision; float32 sums to 1 only to 1e-7.
    rows, columns = rows / rows.sum(-1, keepdims=True), columns / columns.sum(-1, keepdims=True)
    plans = [torch.from_numpy(ot.emd(*problem)) for problem in zip(rows, columns, costs, strict=True)]
    return torch.stack(plans).to(cost)


