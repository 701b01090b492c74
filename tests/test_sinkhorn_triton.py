"""The Triton program: by Triton's interpreter, on the CPU, against the solver that it repeats; and compiled for real GPUs.

Run by another process for each test of the interpreter: Triton asks whether to interpret when a kernel is defined.
"""

import re
import sys

import pytest
import torch
from conftest import run
from torch import library

from timm_sfr import emd_l2, transport_plan
from timm_sfr.method.sinkhorn import cost_matrix, cross_marginals, sinkhorn, uniform_marginals, unit
from timm_sfr.method.transport import triton_for

pytest.importorskip("triton")

from timm_sfr.method import sinkhorn_triton

SIZES = [(49, 49, 64), (16, 49, 40), (7, 5, 3), (64, 1, 8), (1, 1, 4)]


def problem(rows, columns, channels, weights="uniform", batch=2):
    generator = torch.Generator().manual_seed(rows)
    u, v = (unit(torch.randn(batch, n, channels, generator=generator)) for n in (rows, columns))
    u[0, 0] = 0  # a dead location
    cost = cost_matrix(u, v)
    return u, v, cost, *(cross_marginals(u, v) if weights == "cross" else uniform_marginals(cost))


@pytest.mark.skipif(sinkhorn_triton.INTERPRETED, reason="starts itself")
def test_by_the_interpreter():
    done = run(sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", __file__, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed >= 2 * len(SIZES) + 4, done.stdout


interpreted = pytest.mark.skipif(not sinkhorn_triton.INTERPRETED, reason="test_by_the_interpreter runs it")


@interpreted
@pytest.mark.parametrize("weights", ["uniform", "cross"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_plan_loss_and_gradient_are_those_of_the_eager_solver(size, weights):
    u, v, cost, a, b = problem(*size, weights)
    expected = sinkhorn(cost, a, b)
    torch.testing.assert_close(sinkhorn_triton.plans(cost, a, b), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(transport_plan(cost, a, b, "triton"), expected, rtol=1e-4, atol=1e-6)
    shallow, gradients = u.requires_grad_(), []
    for solver in ("sinkhorn", "triton"):
        loss = emd_l2(shallow, v, weights=weights, solver=solver)
        gradients.append(torch.autograd.grad(loss, shallow)[0])
        gradients.append(loss.detach())
    torch.testing.assert_close(gradients[2:], gradients[:2], rtol=1e-4, atol=1e-6)


@interpreted
def test_inputs_of_any_layout():
    u, v, cost, a, b = problem(9, 16, 8)
    turned = cost.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(sinkhorn_triton.plans(turned, a, b), sinkhorn_triton.plans(cost, a, b))
    assert torch.equal(sinkhorn_triton.transport_costs(u[:, :, ::2], v[:, :, ::2], a, b),
                       sinkhorn_triton.transport_costs(u[:, :, ::2].contiguous(), v[:, :, ::2].contiguous(), a, b))  # fmt: skip


@interpreted
def test_a_constant_cost_and_masses_close_to_zero():
    cost, a, b = torch.full((2, 5, 6), 0.7), torch.full((2, 5), 1e-6), torch.full((2, 6), 1 / 6)
    a[:, 0] = 1 - 4e-6
    plan = sinkhorn_triton.plans(cost, a, b)
    assert plan.isfinite().all() and (plan >= 0).all()
    torch.testing.assert_close(plan.sum(2), a)
    torch.testing.assert_close(plan.sum(1), b)


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's NumPy
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_shows(value, side):
    nodes = [torch.randn(2, 9, 8), torch.randn(2, 12, 8)]
    nodes[side][1, 3, 2] = value
    for solver in ("sinkhorn", "triton"):
        loss = emd_l2(nodes[0].requires_grad_(), nodes[1], solver=solver)
        gradient = torch.autograd.grad(loss, nodes[0])[0]
        assert not loss.isfinite() and gradient[0].isfinite().all() and not gradient[1].isfinite().any()
    cost = torch.rand(2, 5, 6)
    cost[1, 2, 3] = value
    plan = transport_plan(cost, solver="triton")
    assert plan[0].isfinite().all() and not plan[1].isfinite().any()


@interpreted
def test_a_second_derivative_is_refused():
    u, v, *_ = problem(4, 6, 8)
    loss = emd_l2(u.requires_grad_(), v, solver="triton")
    with pytest.raises(NotImplementedError, match="no second derivative; take sinkhorn"):
        torch.autograd.grad(loss, u, create_graph=True)


@interpreted
def test_the_operators_are_what_torch_expects():
    u, v, cost, a, b = problem(4, 6, 8)
    library.opcheck(sinkhorn_triton.plans, (cost, a, b))
    library.opcheck(torch.ops.timm_sfr.transport_costs.default, (u.requires_grad_(), v, a, b),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))  # fmt: skip


@interpreted
def test_it_adds_no_graph_break():
    u, v, *_ = problem(16, 16, 8)
    u.requires_grad_()
    found = torch._dynamo.explain(lambda x, y: emd_l2(x, y, solver="triton"))(u, v)
    (expected,) = torch.autograd.grad(emd_l2(u, v, solver="triton"), u)
    compiled = torch.compile(emd_l2, backend="aot_eager", fullgraph=True)
    assert torch.equal(torch.autograd.grad(compiled(u, v, solver="triton"), u)[0], expected)
    assert found.graph_break_count == 0, found.break_reasons
    assert any("timm_sfr" in str(op) for ops in found.ops_per_graph for op in ops), "the kernel is in the graph"


@pytest.mark.skipif(sinkhorn_triton.INTERPRETED, reason="of compiled kernels")
def test_elsewhere_the_eager_solver_stands_in():
    u, v, cost, a, b = problem(9, 9, 8)
    assert triton_for(cost.shape, cost.device) is None
    assert torch.equal(transport_plan(cost, a, b, "triton"), transport_plan(cost, a, b))
    assert torch.equal(emd_l2(u, v, solver="triton"), emd_l2(u, v))
    cuda = torch.device("cuda")
    assert (
        sinkhorn_triton.fits((8, 64, 64), cuda)
        and not sinkhorn_triton.fits((8, 65, 64), cuda)
        and not sinkhorn_triton.fits((8, 16, 128), cuda)
    )


@pytest.mark.skipif(sinkhorn_triton.INTERPRETED, reason="of compiled kernels")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(("name", "capability"), [("_plan_kernel", 80), ("_cost_kernel", 80), ("_cost_kernel", 90)])
def test_it_compiles_for_gpus(name, capability, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, options = getattr(sinkhorn_triton, name), sinkhorn_triton._shape(49, 49)
    warps = options.pop("num_warps")
    constants = {
        key: value for key, value in {**options, "CHANNELS": sinkhorn_triton._CHANNELS}.items() if key in kernel.arg_names
    }
    kinds = {"rows": "i32", "columns": "i32", "channels": "i32"}
    signature = {
        name: "constexpr" if name in constants else "*fp32" if name.endswith("_ptr") else kinds.get(name, "fp32")
        for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    made = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    assert made.metadata.shared <= 48 * 1024, "what any GPU has"
    assert "cubin" in made.asm
