"""The transport loss in Triton: one program computes a problem's cost, plan, loss and gradient in registers.

The arithmetic is that of `timm_sfr.method.sinkhorn.sinkhorn`, which is the oracle in the tests and the replacement where this
cannot run. Imported only for ``--sfr-solver triton``.

Shapes: B problems in the batch, N shallow nodes (rows), M deep nodes (columns), C channels.
"""

# No `from __future__ import annotations`: torch reads an operator's schema from its annotations, and older versions need types.

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from timm_sfr.method.sinkhorn import EPS, FLOOR, RELAXATION, STRETCH, UPDATES

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # for tests: Triton's interpreter runs on the CPU
_MAX_NODES = 64  # per side: a program holds several copies of the plan in its registers
_CHANNELS = 32  # read at a time


def fits(cost_shape: tuple[int, ...], device: torch.device) -> bool:
    """Returns whether problems (B, N, M) can be solved here: on CUDA (or Triton's interpreter), with at most 64 x 64 nodes."""
    return (device.type == "cuda" or INTERPRETED) and max(cost_shape[1:]) <= _MAX_NODES


@library.custom_op("timm_sfr::plans", mutates_args=())
def plans(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Returns the plans (B, N, M) of `timm_sfr.method.sinkhorn.sinkhorn` for cost (B, N, M), a (B, N), b (B, M); all float32."""
    cost, a, b = cost.contiguous(), a.contiguous(), b.contiguous()
    plan = torch.empty_like(cost)
    batch, rows, columns = cost.shape
    with torch.cuda.device_of(cost):  # Triton starts its programs on the current device
        _plan_kernel[(batch,)](cost, a, b, plan, rows, columns, EPS, RELAXATION, STRETCH, FLOOR, **_shape(rows, columns))
    return plan


@plans.register_fake
def _(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.empty_like(cost, memory_format=torch.contiguous_format)


def transport_costs(u: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Returns the transport cost L = <P, C> of each problem, (B,), with C_ij = ||u_i - v_j||^2.

    P is the plan of `timm_sfr.method.sinkhorn.sinkhorn` for C, a and b, as a constant. Only u gets a gradient:
    dL/du_i = 2 sum_j P_ij (u_i - v_j). It is computed with the loss, in the same program.

    Args:
        u: Shallow features, (B, N, C), float32.
        v: Deep features, (B, M, C), float32, constants.
        a: Row masses, (B, N), at least 1e-25.
        b: Column masses, (B, M), at least 1e-25.
    """
    return _costs(u, v, a, b)[0]


@library.custom_op("timm_sfr::transport_costs", mutates_args=())
def _costs(u: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns <P, C>, (B,), and its gradient with respect to u, (B, N, C)."""
    u, v, a, b = (x.contiguous() for x in (u, v, a, b))
    (batch, rows, channels), columns = u.shape, v.shape[1]
    costs, gradient = u.new_empty(batch), torch.empty_like(u)
    with torch.cuda.device_of(u):
        _cost_kernel[(batch,)](
            u, v, a, b, costs, gradient, rows, columns, channels, EPS, RELAXATION, STRETCH, FLOOR,
            CHANNELS=_CHANNELS, **_shape(rows, columns),
        )  # fmt: skip
    return costs, gradient


@_costs.register_fake
def _(u: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape[0]), torch.empty_like(u, memory_format=torch.contiguous_format)


def _keep_gradient(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
    if torch.is_grad_enabled():
        raise NotImplementedError("the triton solver has no second derivative; take sinkhorn")
    return ctx.saved_tensors[0] * grad[:, None, None], None, None, None


_costs.register_autograd(_backward, setup_context=_keep_gradient)


def _tile(nodes: int) -> int:
    return max(16, triton.next_power_of_2(nodes))  # 16 is the minimum of tl.dot


def _shape(rows: int, columns: int) -> dict[str, Any]:
    tile = _tile(rows) * _tile(columns)
    return {"ROWS": _tile(rows), "COLUMNS": _tile(columns), "FIRST": UPDATES[0], "SECOND": UPDATES[1], "THIRD": UPDATES[2],
            "num_warps": max(1, tile // 512)}  # fmt: skip


@triton.jit
def _at_least(x, low):
    # By default tl.maximum drops NaN, which the check for a non-finite loss must see.
    return tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _relaxed(old, goal, relaxation, stretch):
    return goal + tl.clamp(goal - old, -stretch, stretch, propagate_nan=tl.PropagateNan.ALL) * (relaxation - 1)


@triton.jit
def _rescaled(plan, f, g, log_a, log_b, valid, floor):
    """Returns the start of a level, P_ij^2 / (a_i b_j), with P the plan of the level before."""
    plan = plan * tl.exp(f - log_a / 2)[:, None] * tl.exp(g - log_b / 2)[None, :]
    return tl.where(valid, _at_least(plan * plan, floor), 0.0)


@triton.jit
def _fit_rows(plan, f, g, log_a, row_valid, relaxation, stretch):
    # A padding row sums to 0; 1 instead keeps the logarithm finite.
    sums = tl.where(row_valid, tl.sum(plan * tl.exp(g)[None, :], 1), 1.0)
    return _relaxed(f, log_a - tl.log(sums), relaxation, stretch)


@triton.jit
def _fit_columns(plan, f, g, log_b, column_valid, relaxation, stretch):
    sums = tl.where(column_valid, tl.sum(plan * tl.exp(f)[:, None], 0), 1.0)
    return _relaxed(g, log_b - tl.log(sums), relaxation, stretch)


@triton.jit
def _solve(cost, a, b, row_valid, column_valid, rows, columns, eps, relaxation, stretch, floor,
           FIRST: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr):  # fmt: skip
    """Solves one problem as `timm_sfr.method.sinkhorn.sinkhorn` does; returns its plan, padded to (ROWS, COLUMNS)."""
    valid = row_valid[:, None] & column_valid[None, :]
    far = float("inf")
    plan = cost - tl.min(tl.where(valid, cost, far), 1)[:, None]
    plan = plan - tl.min(tl.where(valid, plan, far), 0)[None, :]
    mean = tl.sum(tl.sum(tl.where(valid, plan, 0.0), 1), 0) / (rows * columns)
    plan = tl.where(valid, _at_least(tl.exp(-plan / (eps * _at_least(mean, 1e-12))), floor), 0.0)
    log_a, log_b = tl.log(tl.where(row_valid, a, 1.0)), tl.log(tl.where(column_valid, b, 1.0))
    f, g = log_a, log_b
    for _ in range(FIRST):
        f = _fit_rows(plan, f, g, log_a, row_valid, relaxation, stretch)
        g = _fit_columns(plan, f, g, log_b, column_valid, relaxation, stretch)
    plan = _rescaled(plan, f, g, log_a, log_b, valid, floor)
    f, g = tl.zeros_like(f), tl.zeros_like(g)
    for _ in range(SECOND):
        f = _fit_rows(plan, f, g, log_a, row_valid, relaxation, stretch)
        g = _fit_columns(plan, f, g, log_b, column_valid, relaxation, stretch)
    plan = _rescaled(plan, f, g, log_a, log_b, valid, floor)
    f, g = tl.zeros_like(f), tl.zeros_like(g)
    for step in range(THIRD):
        f = _fit_rows(plan, f, g, log_a, row_valid, relaxation, stretch)
        # The last update is not relaxed, so that the column sums are exact.
        g = _fit_columns(plan, f, g, log_b, column_valid, tl.where(step == THIRD - 1, 1.0, relaxation), stretch)
    plan = plan * tl.exp(f)[:, None] * tl.exp(g)[None, :]
    # Shrink rows with too much mass and spread the missing mass, as at the end of `timm_sfr.method.sinkhorn.sinkhorn`.
    tiny = 1.1754943508222875e-38
    plan = plan * tl.minimum(a / _at_least(tl.sum(plan, 1), tiny), 1.0, propagate_nan=tl.PropagateNan.ALL)[:, None]
    missing_a, missing_b = _at_least(a - tl.sum(plan, 1), 0.0), _at_least(b - tl.sum(plan, 0), 0.0)
    return plan + missing_a[:, None] * (missing_b / _at_least(tl.sum(missing_b, 0), tiny))[None, :]


@triton.jit
def _plan_kernel(cost_ptr, a_ptr, b_ptr, plan_ptr, rows, columns, eps, relaxation, stretch, floor, ROWS: tl.constexpr,
                 COLUMNS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr):  # fmt: skip
    problem = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    row_valid, column_valid = i < rows, j < columns
    valid = row_valid[:, None] & column_valid[None, :]
    place = problem * rows * columns + i[:, None] * columns + j[None, :]
    cost = tl.load(cost_ptr + place, mask=valid, other=0.0)
    a = tl.load(a_ptr + problem * rows + i, mask=row_valid, other=0.0)
    b = tl.load(b_ptr + problem * columns + j, mask=column_valid, other=0.0)
    plan = _solve(cost, a, b, row_valid, column_valid, rows, columns, eps, relaxation, stretch, floor, FIRST, SECOND, THIRD)
    tl.store(plan_ptr + place, plan, mask=valid)


@triton.jit
def _cost_kernel(u_ptr, v_ptr, a_ptr, b_ptr, costs_ptr, gradient_ptr, rows, columns, channels, eps, relaxation, stretch,
                 floor, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, FIRST: tl.constexpr,
                 SECOND: tl.constexpr, THIRD: tl.constexpr):  # fmt: skip
    problem = tl.program_id(0).to(tl.int64)
    i, j, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, CHANNELS)
    row_valid, column_valid = i < rows, j < columns
    a = tl.load(a_ptr + problem * rows + i, mask=row_valid, other=0.0)
    b = tl.load(b_ptr + problem * columns + j, mask=column_valid, other=0.0)
    u_place = problem * rows * channels + i[:, None] * channels + c[None, :]
    v_place = problem * columns * channels + j[:, None] * channels + c[None, :]
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    u_squares, v_squares = tl.zeros((ROWS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, channels, CHANNELS):
        within = (start + c < channels)[None, :]
        u = tl.load(u_ptr + u_place + start, mask=row_valid[:, None] & within, other=0.0)
        v = tl.load(v_ptr + v_place + start, mask=column_valid[:, None] & within, other=0.0)
        products = tl.dot(u, tl.trans(v), products, input_precision="ieee")  # TF32 would lose half the digits
        u_squares += tl.sum(u * u, 1)
        v_squares += tl.sum(v * v, 1)
    distance = v_squares[None, :] - 2 * products + u_squares[:, None]
    cost = _at_least(distance, 0.0)
    plan = _solve(cost, a, b, row_valid, column_valid, rows, columns, eps, relaxation, stretch, floor, FIRST, SECOND, THIRD)
    tl.store(costs_ptr + problem, tl.sum(tl.sum(plan * cost, 1), 0))
    plan = tl.where(distance < 0, 0.0, 2 * plan)  # the clamp above has no gradient there
    mass = tl.sum(plan, 1)
    for start in range(0, channels, CHANNELS):
        within = (start + c < channels)[None, :]
        u = tl.load(u_ptr + u_place + start, mask=row_valid[:, None] & within, other=0.0)
        v = tl.load(v_ptr + v_place + start, mask=column_valid[:, None] & within, other=0.0)
        gradient = mass[:, None] * u - tl.dot(plan, v, input_precision="ieee")
        tl.store(gradient_ptr + u_place + start, gradient, mask=row_valid[:, None] & within)
