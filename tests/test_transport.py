"""Transport and EMD-l2 against POT and finite differences, and their properties."""

import numpy as np
import ot
import pytest
import torch

from timm_sfr import UserError, emd_l2, gaussian_l2, sinkhorn_divergence, transport_plan
from timm_sfr.method.feature_loss import divergences
from timm_sfr.method.sinkhorn import cost_matrix, cross_marginals, round_plan, sinkhorn, uniform_marginals, unit
from timm_sfr.method.transport import assignments

SIZES = [(1, 1), (1, 5), (4, 1), (16, 16), (49, 49), (16, 49), (196, 49), (196, 196)]


def oracle(cost, a, b):
    """ot.emd2 in float64, a problem at a time."""
    values = []
    for c, p, q in zip(cost.double().numpy(), a.double().numpy(), b.double().numpy(), strict=True):
        values.append(ot.emd2(p / p.sum(), q / q.sum(), c))
    return torch.tensor(np.array(values))


def random_problem(n, m, channels=64, batch=4, marginals="uniform"):
    u, v = unit(torch.randn(batch, n, channels)), unit(torch.randn(batch, m, channels))
    cost = cost_matrix(u, v)
    return cost, *(cross_marginals(u, v) if marginals == "cross" else uniform_marginals(cost))


@pytest.mark.parametrize("marginals", ["uniform", "cross"])
@pytest.mark.parametrize("n,m", SIZES)
def test_both_solvers_on_random_unit_vectors(n, m, marginals):
    """The exact one gives POT's optimum, Sinkhorn's is within 3 % of it."""
    cost, a, b = random_problem(n, m, marginals=marginals)
    best, exact = oracle(cost, a, b), transport_plan(cost, a, b, "exact")
    assert torch.allclose((exact.double() * cost).sum((1, 2)), best, atol=1e-6)
    plan = transport_plan(cost, a, b, "sinkhorn")
    gap = (plan * cost).sum((1, 2)).double() / best - 1
    assert gap.max() <= 0.03 and gap.min() >= -1e-5
    assert (plan >= 0).all()
    assert torch.allclose(plan.sum(2), a, atol=1e-5) and torch.allclose(plan.sum(1), b, atol=1e-5)


@pytest.mark.parametrize("marginals", ["uniform", "cross"])
def test_both_solvers_on_real_features(real_features, marginals):
    for u, v, cost in real_features:
        a, b = cross_marginals(u, v) if marginals == "cross" else uniform_marginals(cost)
        best = oracle(cost, a, b)
        exact = (transport_plan(cost, a, b, "exact").double() * cost).sum((1, 2))
        assert torch.allclose(exact, best, atol=1e-6)
        plan = transport_plan(cost, a, b, "sinkhorn")
        assert torch.allclose(plan.sum(2), a, atol=1e-5) and torch.allclose(plan.sum(1), b, atol=1e-5)
        value = (plan * cost).sum((1, 2)).double()
        assert value.sum() / best.sum() - 1 <= 0.01


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_small_equal_problems_are_solved_exactly_by_default(n):
    cost, a, b = random_problem(n, n, batch=64)
    plan = transport_plan(cost)
    torch.testing.assert_close((plan * cost).sum((1, 2)).double(), oracle(cost, a, b), atol=1e-6, rtol=0)
    assert torch.equal(plan, assignments(cost)) and torch.equal(plan * n, (plan > 0).float())
    assert torch.equal(plan.sum(2), a) and torch.equal(plan.sum(1), b)


def test_other_problems_go_to_sinkhorn_by_default():
    for n, m in ((5, 5), (4, 3), (2, 6)):
        cost, a, b = random_problem(n, m)
        assert torch.equal(transport_plan(cost), sinkhorn(cost, a, b))
    cost, a, b = random_problem(4, 4, marginals="cross")
    assert torch.equal(transport_plan(cost, a, b), sinkhorn(cost, a, b))


@pytest.mark.parametrize("dynamic", [None, True])
def test_plans_compile_without_a_break(dynamic):
    for function, shape in ((transport_plan, (8, 4, 4)), (transport_plan, (8, 3, 3)), (transport_plan, (8, 6, 6))):
        cost = torch.rand(shape)
        whole = torch.compile(function, backend="eager", fullgraph=True, dynamic=dynamic)
        assert torch.equal(whole(cost), function(cost))
    u, v = torch.rand(4, 16, 8), torch.rand(4, 16, 8)
    whole = torch.compile(sinkhorn_divergence, backend="eager", fullgraph=True, dynamic=dynamic)
    assert torch.allclose(whole(u, v), sinkhorn_divergence(u, v), atol=1e-6)


def test_divergence_stays_finite_on_zero_huge_and_equal_features():
    for x in (torch.zeros(2, 16, 8), 1e30 * torch.rand(2, 16, 8), torch.rand(2, 16, 8)):
        leaf = x.clone().requires_grad_()
        value = sinkhorn_divergence(leaf, x)
        value.backward()
        assert value.abs() < 1e-3 and leaf.grad.isfinite().all() and leaf.grad.norm() <= 5e-3


def test_gradient_is_that_of_the_exact_transport_cost():
    shallow = torch.randn(2, 5, 6, dtype=torch.float64)
    deep = torch.randn(2, 7, 6, dtype=torch.float64)

    def value(x):
        u, v = (t / t.norm(dim=-1, keepdim=True) for t in (x, deep))
        cost = (u[:, :, None] - v[:, None]).square().sum(-1)
        return oracle(cost, *uniform_marginals(cost)).mean().item()

    x = shallow.float().requires_grad_()
    emd_l2(x, deep.float(), solver="exact").backward()
    step = 1e-6
    for index in np.ndindex(2, 5, 6):
        up, down = shallow.clone(), shallow.clone()
        up[index] += step
        down[index] -= step
        assert x.grad[index].item() == pytest.approx((value(up) - value(down)) / (2 * step), abs=2e-5)


def test_the_deep_side_gets_no_gradient():
    shallow, deep = torch.randn(2, 4, 8, requires_grad=True), torch.randn(2, 4, 8, requires_grad=True)
    emd_l2(shallow, deep).backward()
    assert deep.grad is None and shallow.grad.abs().sum() > 0


@pytest.mark.parametrize("solver", ["exact", "sinkhorn"])
@pytest.mark.parametrize("weights", ["uniform", "cross"])
def test_identical_sets_cost_nothing(solver, weights):
    x = torch.randn(3, 16, 64)
    # Against a mean cost of 2: what float32 rounding leaves, and what the entropy of the last annealing step does.
    limit = 1e-5 if solver == "exact" else 1e-3
    assert emd_l2(x, x, weights=weights, solver=solver) <= limit
    assert emd_l2(x, x[:, torch.randperm(16)], weights=weights, solver=solver) <= limit


@pytest.mark.parametrize("solver", ["exact", "sinkhorn"])
@pytest.mark.parametrize("weights", ["uniform", "cross"])
def test_the_order_of_nodes_does_not_matter(solver, weights):
    u, v = torch.randn(3, 16, 32), torch.randn(3, 25, 32)
    value = emd_l2(u, v, weights=weights, solver=solver)
    moved = emd_l2(u[:, torch.randperm(16)], v[:, torch.randperm(25)], weights=weights, solver=solver)
    assert torch.allclose(value, moved, rtol=1e-5)


def test_emd_is_at_most_the_grid_cost_and_equals_it_for_one_node():
    u, v = torch.randn(4, 16, 32), torch.randn(4, 16, 32)
    assert emd_l2(u, v, solver="exact") <= emd_l2(u, v, matching="grid") + 1e-6
    one = emd_l2(u[:, :1], v[:, :1])
    assert torch.allclose(one, emd_l2(u[:, :1], v[:, :1], matching="grid"), rtol=1e-5)


def entropic_cost(cost, a, b, eps):
    """<P, C> + eps KL(P | a b^T) at POT's plan, in float64."""
    plan = ot.sinkhorn(a, b, cost, reg=eps, method="sinkhorn_log", numItermax=100_000, stopThr=1e-12)
    return (plan * cost).sum() + eps * (plan * np.log(np.maximum(plan, 1e-300) / np.outer(a, b))).sum()


def divergence_by_pot(x, y, weights, eps=None):
    """The mean divergence of unit-length sets and each image's eps, by POT's Sinkhorn."""
    u, v = (t / t.norm(dim=-1, keepdim=True) for t in (x, y))
    within = [cost_matrix(t, t).mean((1, 2)) for t in (u, v)]
    eps = 0.15 * (within[0] + within[1]) if eps is None else eps
    a, b = (t.double() for t in cross_marginals(u, v)) if weights == "cross" else uniform_marginals(cost_matrix(u, v))
    values = []
    for i, e in enumerate(eps.tolist()):
        parts = [(u, v, a, b), (u, u, a, a), (v, v, b, b)]
        costs = [entropic_cost(cost_matrix(p, q)[i].numpy(), s[i].numpy(), t[i].numpy(), e) for p, q, s, t in parts]
        values.append(costs[0] - costs[1] / 2 - costs[2] / 2)
    return float(np.mean(values)), eps


@pytest.mark.parametrize("weights", ["uniform", "cross"])
@pytest.mark.parametrize("n,m", [(4, 4), (16, 16), (16, 9)])
def test_divergence_is_what_pots_plans_give(n, m, weights):
    x, y = torch.rand(3, n, 24, dtype=torch.float64), torch.rand(3, m, 24, dtype=torch.float64)
    expected, _ = divergence_by_pot(x, y, weights)
    assert sinkhorn_divergence(x.float(), y.float(), weights=weights).item() == pytest.approx(expected, abs=1e-4)


def test_divergence_has_the_gradient_of_its_value_at_fixed_entropy():
    x, y = torch.rand(1, 3, 4, dtype=torch.float64), torch.rand(1, 3, 4, dtype=torch.float64)
    leaf = x.float().requires_grad_()
    sinkhorn_divergence(leaf, y.float()).backward()
    _, eps = divergence_by_pot(x, y, "uniform")
    step, slopes = 1e-4, torch.zeros_like(x)
    for index in np.ndindex(1, 3, 4):
        up, down = x.clone(), x.clone()
        up[index] += step
        down[index] -= step
        values = [divergence_by_pot(moved, y, "uniform", eps)[0] for moved in (up, down)]
        slopes[index] = (values[0] - values[1]) / (2 * step)
    # A few updates leave a plan, and so a gradient, that is a few percent off.
    assert (leaf.grad - slopes).norm() <= 0.05 * slopes.norm()


def test_divergence_of_equal_sets_is_nothing_and_between_the_means_distance_and_the_emd():
    u, v = torch.rand(8, 16, 32), torch.rand(8, 16, 32)
    assert sinkhorn_divergence(u, u[:, torch.randperm(16)]).abs() < 1e-4
    means = (unit(u).mean(1) - unit(v).mean(1)).square().sum(-1).mean()
    value = sinkhorn_divergence(u, v)
    assert means < value < emd_l2(u, v, solver="exact")
    assert sinkhorn_divergence(u, v, entropy=100.0) == pytest.approx(means.item(), abs=1e-3)
    one = sinkhorn_divergence(u[:, :1], v[:, :1])
    assert torch.allclose(one, emd_l2(u[:, :1], v[:, :1]), rtol=1e-4)
    same = torch.rand(2, 1, 8).expand(2, 4, 8)  # every node the same: no scale to measure entropy by
    assert sinkhorn_divergence(same, same).abs() < 1e-5


@pytest.mark.parametrize("entropy", [0.0, -1.0])
def test_divergence_refuses_an_entropy_that_is_none(entropy):
    with pytest.raises(UserError, match="entropy > 0"):
        sinkhorn_divergence(torch.rand(1, 4, 4), torch.rand(1, 4, 4), entropy=entropy)


@pytest.mark.parametrize("weights", ["uniform", "cross"])
def test_gaussian_cost_by_hand(weights):
    u, v = torch.randn(3, 16, 8), torch.randn(3, 9, 8)
    masses = cross_marginals(unit(u), unit(v)) if weights == "cross" else (torch.ones(3, 16) / 16, torch.ones(3, 9) / 9)
    expected = 0.0
    for a, b, p, q in zip(*(x.double().numpy() for x in (u, v, *masses)), strict=True):
        moments = []
        for x, mass in ((a, p), (b, q)):
            x = x / np.linalg.norm(x, axis=1, keepdims=True)
            mean = np.average(x, 0, mass)
            moments.append((mean, np.sqrt(np.average((x - mean) ** 2, 0, mass))))
        expected += sum(((one - other) ** 2).sum() for one, other in zip(*moments, strict=True))
    assert gaussian_l2(u, v, weights=weights).item() == pytest.approx(expected / 3, rel=1e-4)


def test_gaussian_cost_is_a_lower_bound_of_emd_and_equals_it_for_one_node():
    u, v = torch.randn(4, 16, 32), torch.randn(4, 16, 32)
    assert gaussian_l2(u, v) <= emd_l2(u, v, solver="exact") + 1e-6
    # Two sets of one node each have no deviation: both costs are the squared distance.
    assert torch.allclose(gaussian_l2(u[:, :1], v[:, :1]), emd_l2(u[:, :1], v[:, :1]), rtol=1e-4)


def test_gaussian_gradient_is_the_shallow_sides_alone():
    x = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    deep = torch.randn(2, 9, 8, requires_grad=True)
    value = gaussian_l2(x, deep)
    value.backward()
    assert deep.grad is None
    step = 1e-2 * torch.randn_like(x)
    ahead, behind = (gaussian_l2(x.detach() + sign * step, deep) for sign in (1, -1))
    assert ((ahead - behind) / 2).item() == pytest.approx((x.grad * step).sum().item(), rel=2e-2)


@pytest.mark.parametrize("solver", ["exact", "sinkhorn", "gaussian"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: (torch.randn(2, 9, 16) * 2e4).clamp(-6e4, 6e4).half(),
        lambda: (torch.randn(2, 9, 16) * 1e-7).half(),
        lambda: torch.randn(2, 9, 16) * 1e30,
        lambda: torch.zeros(2, 9, 16),
        lambda: torch.ones(2, 9, 16),
        lambda: torch.randn(2, 9, 16).bfloat16(),
    ],
    ids=["fp16-large", "fp16-tiny", "huge", "zero", "equal", "bf16"],
)
def test_extreme_features_give_finite_losses_and_gradients(make, solver):
    x = make().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if solver == "gaussian":
            loss = gaussian_l2(x, make(), weights="cross")
        else:
            loss = emd_l2(x, make(), weights="cross", solver=solver)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and x.grad.isfinite().all()


def test_unit_length_and_cost():
    u, v = unit(torch.randn(2, 5, 8)), unit(torch.randn(2, 6, 8))
    assert torch.allclose(u.norm(dim=-1), torch.ones(2, 5), atol=1e-6)
    assert torch.allclose(cost_matrix(u, v), torch.cdist(u, v).square(), atol=1e-5)


def test_the_gradient_of_unit_length_is_autograds():
    """Of features of all sizes; a dead one gets none."""
    x = torch.randn(3, 5, 8) * 10.0 ** torch.arange(-5, 10)[:, None].view(3, 5, 1)
    x[1, 2] = 1e-7
    x.requires_grad_()
    given = torch.randn(3, 5, 8)
    unit(x).backward(given)
    plain = x.detach().double().requires_grad_()
    torch.nn.functional.normalize(plain, dim=-1).backward(given.double())
    assert (x.grad[1, 2] == 0).all()
    plain.grad[1, 2] = 0
    size = plain.detach().abs().amax(-1, keepdim=True)
    assert torch.allclose(x.grad * size, plain.grad * size, atol=1e-5)


def test_cross_marginals_by_hand():
    u, v = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]]), torch.tensor([[[1.0, 0.0]]])
    a, b = cross_marginals(u, v)
    assert torch.allclose(a, torch.tensor([[1.001, 0.001]]) / 1.002) and torch.equal(b, torch.ones(1, 1))


@pytest.mark.parametrize("solver", ["auto", "sinkhorn", "exact"])
def test_masses_of_zero_move_nothing(solver):
    cost, a, b = torch.rand(2, 4, 5), torch.tensor([[0.5, 0.5, 0.0, 0.0]] * 2), torch.tensor([[0.0, 0.25, 0.25, 0.5, 0.0]] * 2)
    plan = transport_plan(cost, a, b, solver)
    assert torch.allclose(plan.sum(2), a, atol=1e-6) and torch.allclose(plan.sum(1), b, atol=1e-6)
    assert transport_plan(torch.rand(0, 4, 5), solver=solver).shape == (0, 4, 5)
    with pytest.raises(UserError, match="expected a floating-point cost"):
        transport_plan(torch.ones(1, 2, 2, dtype=torch.long), solver=solver)


@pytest.mark.parametrize("loss", [gaussian_l2, emd_l2, sinkhorn_divergence])
def test_second_derivatives_are_refused(loss):
    x = torch.randn(1, 4, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss(x, torch.randn(1, 4, 3)).sum(), x, create_graph=True)


def test_rounding_mends_any_plan():
    plan = torch.rand(3, 6, 7)
    a, b = torch.rand(3, 6).softmax(-1), torch.rand(3, 7).softmax(-1)
    rounded = round_plan(plan, a, b)
    assert torch.allclose(rounded.sum(2), a, atol=1e-6) and torch.allclose(rounded.sum(1), b, atol=1e-6)


def hard_costs():
    """Costs that no features give: outliers, all mass wanted in one column, equal costs, negative and huge ones."""
    for n, m in ((49, 49), (16, 49), (196, 49), (1, 7), (3, 3)):
        for power in (0.1, 1, 4, 16, 60):
            yield torch.rand(8, n, m) ** power * 1e-20
            yield (torch.rand(8, n, m) ** -power).clamp_max(1e30)
        yield torch.zeros(8, n, m)
        single = torch.zeros(8, n, m)
        single[:, 0, 0] = 1e30
        crowded = torch.ones(8, n, m)
        crowded[:, : max(1, n // 10), 1:] = 100
        yield from (single, crowded, -torch.rand(8, n, m) * 1e6)


@pytest.mark.parametrize("floor", [1e-3, 1e-6, 1e-25])
def test_no_cost_and_no_marginals_break_the_solver(floor):
    for cost in hard_costs():
        a, b = ((torch.rand_like(even) ** 30 + floor) for even in uniform_marginals(cost))
        a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
        plan = transport_plan(cost, a, b, "sinkhorn")
        assert plan.isfinite().all() and (plan >= 0).all()
        assert torch.allclose(plan.sum(2), a, atol=1e-5) and torch.allclose(plan.sum(1), b, atol=1e-5)


def test_wrong_shapes_and_names_are_refused():
    cost = torch.rand(2, 3, 4)
    with pytest.raises(UserError, match=r"expected a \(2, 3\)"):
        transport_plan(cost, torch.ones(2, 4) / 4, None)
    with pytest.raises(UserError, match="unknown solver"):
        transport_plan(cost, solver="simplex")
    with pytest.raises(UserError, match="equal batch and channels"):
        emd_l2(torch.rand(2, 3, 4), torch.rand(2, 3, 5))
    with pytest.raises(UserError, match="equal batch and channels"):
        gaussian_l2(torch.rand(2, 3, 4), torch.rand(1, 3, 4))
    with pytest.raises(UserError, match="uniform"):
        gaussian_l2(torch.rand(2, 3, 4), torch.rand(2, 3, 4), weights="equal")
    with pytest.raises(UserError, match="equal node counts"):
        emd_l2(torch.rand(2, 3, 4), torch.rand(2, 5, 4), matching="grid")


@pytest.mark.parametrize("loss", [emd_l2, gaussian_l2, sinkhorn_divergence])
def test_nan_is_no_dead_feature(loss):
    u, v = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    u[0, 1, 2] = float("nan")
    assert loss(u, v).isnan() and loss(v, u).isnan()


@pytest.mark.parametrize("weights", ["uniform", "cross"])
@pytest.mark.parametrize(
    "distance", [sinkhorn_divergence, gaussian_l2, emd_l2, lambda *args, **words: divergences(*args, **words)[0].sum()]
)
def test_the_deep_side_and_the_plan_are_constants(distance, weights):
    shallow, deep = (torch.randn(3, 4, 8, requires_grad=True) for _ in range(2))
    distance(shallow, deep, weights=weights).backward()
    assert shallow.grad.abs().sum() > 0 and deep.grad is None
    assert not divergences(shallow, deep, weights)[1].requires_grad
    assert not any(mass.requires_grad for mass in cross_marginals(unit(shallow), unit(deep)))
