"""The solvers that are compared, ours and those of libraries: functions from costs (B, N, M) to plans with equal masses."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import ot
import torch
from torch import Tensor

from timm_sfr.method.sinkhorn import UPDATES, sinkhorn, uniform_marginals
from timm_sfr.method.transport import exact, transport_plan

Solve = Callable[[Tensor], Tensor]
OURS, LOOP, EXACT = "timm_sfr sinkhorn", "loop of ot.emd", "timm_sfr exact"


def log_domain(cost: Tensor, iterations: int) -> Tensor:
    """The usual solver: Sinkhorn in the log domain, with the entropy annealed from 1 to 0.01 of the mean cost."""
    a, b = uniform_marginals(cost)
    cost = cost / cost.mean((1, 2), keepdim=True)
    f, g, log_a, log_b = torch.zeros_like(a), torch.zeros_like(b), a.log(), b.log()
    for step in range(iterations):
        eps = 0.01 ** min(1.0, step / max(1, iterations - 3))
        f = eps * (log_a - torch.logsumexp((g[:, None, :] - cost) / eps, 2))
        g = eps * (log_b - torch.logsumexp((f[:, :, None] - cost) / eps, 1))
    return ((f[:, :, None] + g[:, None, :] - cost) / eps).exp()


def emd_loop(cost: Tensor) -> Tensor:
    """Calls `ot.emd` for one problem at a time, with costs already in NumPy float64, which is its best case."""
    problems = _numpy(cost)
    even = [np.full(size, 1 / size) for size in problems.shape[1:]]
    plans = [ot.emd(*even, problem) for problem in problems]
    return torch.from_numpy(np.stack(plans)).to(cost)


def assignment_loop(cost: Tensor) -> Tensor:
    """Calls SciPy's linear assignment for one problem at a time; exact for equal masses and equal numbers of nodes."""
    from scipy.optimize import linear_sum_assignment

    plan = torch.zeros_like(cost)
    for index, problem in enumerate(_numpy(cost)):
        rows, columns = linear_sum_assignment(problem)
        plan[index, rows, columns] = 1 / cost.shape[1]
    return plan


def pot_batch(cost: Tensor, reg: float, iterations: int, method: str) -> Tensor:
    """Calls `ot.batch.solve_batch`, with `reg` in units of the mean cost."""
    from ot.batch import solve_batch

    return solve_batch(cost / cost.mean(), reg, method=method, max_iter=iterations, tol=0.0, grad="detach").plan


def geomloss_batch(cost: Tensor, reg: float, iterations: int) -> Tensor:
    """Calls geomloss's `ot.solve_batch`, with `reg` in units of the mean cost."""
    from geomloss.ot import solve_batch

    return solve_batch(cost / cost.mean(), reg=reg, max_iter=iterations).plan


_KEPT: list[tuple[Tensor, np.ndarray]] = []


def _numpy(cost: Tensor) -> np.ndarray:
    """Returns `cost` as NumPy float64. Repeated calls reuse the array, so that the timed loops do not convert it."""
    if not _KEPT or _KEPT[0][0] is not cost:
        _KEPT[:] = [(cost, cost.double().cpu().numpy())]
    return _KEPT[0][1]


def ours(cost: Tensor, **options: Any) -> Tensor:
    """Calls our solver with equal masses."""
    return sinkhorn(cost, *uniform_marginals(cost), **options)


def candidates() -> dict[str, dict[str, Solve]]:
    """Returns the settings of every solver, by its name; the first setting of ours is its default."""
    updates = [UPDATES, (3, 4, 6), (1, 2), (2, 4), (2, 3, 4), (2, 3, 4, 6), (3, 4, 5, 8), (3, 5, 8, 8, 8)]
    found: dict[str, dict[str, Solve]] = {
        OURS: {" + ".join(map(str, counts)): partial(ours, updates=counts) for counts in updates},
        "log domain, annealed": {f"{count}": partial(log_domain, iterations=count) for count in (8, 16, 32, 64)},
        LOOP: {"": emd_loop},
        EXACT: {"": lambda cost: exact(cost, *uniform_marginals(cost))},
        "loop of SciPy's assignment": {"": assignment_loop},
    }
    if torch.cuda.is_available():
        found["timm_sfr triton"] = {"": partial(transport_plan, solver="triton")}
    # POT's third method, `proximal`, is left out: up to 0.9.7.post1 it has a sign error (PythonOT/POT#842, fixed by #844).
    for method in ("log_sinkhorn", "sinkhorn"):
        found[f"ot.batch {method}"] = {
            f"reg {reg:g}, {count}": partial(pot_batch, reg=reg, iterations=count, method=method)
            for reg in (0.02, 0.01, 0.005)
            for count in (10, 20, 50, 100, 200)
        }
    if importlib.util.find_spec("geomloss") is not None:
        found["geomloss"] = {
            f"reg {reg:g}, {count}": partial(geomloss_batch, reg=reg, iterations=count)
            for reg in (0.02, 0.01, 0.005, 0.002)
            for count in (10, 20, 50, 100, 200)
        }
    return found
