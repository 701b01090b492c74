"""Thin modules and the EMD-l2 loss over the pure functions of transport, channels and smoothing."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from timm_sfr import smoothing as S
from timm_sfr.channels import match_channels
from timm_sfr.sections import SFRConfig, default_warmup
from timm_sfr.transport import (
    MARGINALS,
    cost_matrix,
    cross_marginals,
    entropic,
    entropic_self,
    fused_for,
    transport_plan,
    unit,
)
from timm_sfr.utils.errors import UserError

PLANS = ("emd", "grid")
ENTROPY = 0.3  # of `sinkhorn_divergence`


def emd_l2(
    shallow: Tensor,
    deep: Tensor,
    *,
    weights: str = "uniform",
    solver: str = "auto",
    matching: str = "emd",
) -> Tensor:
    """The squared distance between two sets of local features under their optimal transport plan; a scalar.

        C_ij = ||u_i - v_j||^2,    P* = argmin_{P in U(a, b)} <P, C>,    L = mean over the batch of <P*, C>

    with u, v the unit-length features. `deep` is a constant, and so is P*: the gradient through C alone is the exact
    gradient of the transport cost at fixed marginals (envelope theorem). Computed in float32 outside autocast.

    Args:
        shallow: Shallow local features, (B, N, C).
        deep: Deep local features matched to the shallow channels, (B, M, C).
        weights: Node weights a, b: ``"uniform"``, or ``"cross"`` (`cross_marginals`).
        solver: `transport_plan`'s solver.
        matching: ``"emd"``, or ``"grid"``: P the identity / N on a common grid (plain l2, the ablation); the row
            weights then come from `weights`.

    Raises:
        UserError: if shapes or options do not fit.
    """
    _check_nodes(shallow, deep)
    if weights not in MARGINALS or matching not in PLANS:
        raise UserError(f"expected weights in {MARGINALS} and matching in {PLANS}; got {weights!r}, {matching!r}")
    with torch.autocast(shallow.device.type, enabled=False):
        u, v = unit(shallow), unit(deep.detach())
        if matching == "grid":
            if u.shape != v.shape:
                raise UserError(f"grid matching needs equal node counts; got {u.shape[1]} and {v.shape[1]}")
            a = cross_marginals(u, v)[0] if weights == "cross" else _even(u)
            return (a * (u - v).square().sum(-1)).sum(-1).mean()
        a, b = cross_marginals(u, v) if weights == "cross" else (None, None)
        fused = fused_for((*u.shape[:2], v.shape[1]), u.device) if solver == "triton" else None
        if fused:
            a, b = (_even(u), _even(v)) if a is None or b is None else (a, b)
            return fused.transport_costs(u, v, a, b).mean()
        cost = cost_matrix(u, v)
        return (transport_plan(cost, a, b, solver) * cost).sum((1, 2)).mean()


def sinkhorn_divergence(shallow: Tensor, deep: Tensor, *, weights: str = "uniform", entropy: float = ENTROPY) -> Tensor:
    """The debiased transport cost between two sets of local features; a scalar, 0 where the sets are equal.

        W(x, y) = min_{P in U(a, b)} <P, C> + eps KL(P | a b^T),     C_ij = ||x_i - y_j||^2
        L = mean over the batch of W(u, v) - W(u, u) / 2 - W(v, v) / 2

    with u, v the unit-length features and eps = `entropy` times the mean cost within u and within v (a constant). For
    eps to 0 it is `emd_l2`; for a large eps it is the squared distance of the means alone. In between, the plan pairs
    nodes softly, and -W(u, u) / 2 keeps that softness from drawing the shallow nodes together. `deep` is a constant, and so
    are the plans: the gradient through the costs is the exact one (envelope theorem). Computed in float32 outside autocast.
    After Feydy et al., AISTATS 2019 (arXiv 1810.08278).

    Args:
        shallow: Shallow local features, (B, N, C).
        deep: Deep local features matched to the shallow channels, (B, M, C).
        weights: Node weights a, b: ``"uniform"``, or ``"cross"`` (`cross_marginals`).
        entropy: eps, in units of the mean cost within a set.

    Raises:
        UserError: if shapes or options do not fit.
    """
    _check_nodes(shallow, deep)
    if weights not in MARGINALS or entropy <= 0:
        raise UserError(f"expected weights in {MARGINALS} and entropy > 0; got {weights!r}, {entropy}")
    return divergences(shallow, deep, weights, entropy)[0].mean()


def divergences(
    shallow: Tensor, deep: Tensor, weights: str = "uniform", entropy: float = ENTROPY
) -> tuple[Tensor, Tensor]:
    """`sinkhorn_divergence` image by image, (B,), and the plan between the two sets, (B, N, M)."""
    with torch.autocast(shallow.device.type, enabled=False):
        u, v = unit(shallow), unit(deep.detach())
        a, b = cross_marginals(u, v) if weights == "cross" else (_even(u), _even(v))
        across, within_u, within_v = cost_matrix(u, v), cost_matrix(u, u), cost_matrix(v, v)
        with torch.no_grad():
            # The clamp is for sets whose nodes are all the same: any plan is optimal then.
            eps = (entropy / 2 * (within_u.mean((1, 2)) + within_v.mean((1, 2)))).clamp_min(1e-6)
            plan = entropic(across, a, b, eps)
            plan_u, plan_v = entropic_self(within_u, a, eps), entropic_self(within_v, b, eps)
        value = _entropic_cost(plan, across, a, b, eps)
        return value - (_entropic_cost(plan_u, within_u, a, a, eps) + _entropic_cost(plan_v, within_v, b, b, eps)) / 2, plan


def _entropic_cost(plan: Tensor, cost: Tensor, a: Tensor, b: Tensor, eps: Tensor) -> Tensor:
    """<P, C> + eps KL(P | a b^T) with P a constant, (B,)."""
    with torch.no_grad():
        divergence = torch.xlogy(plan, plan / (a[:, :, None] * b[:, None, :])).sum((1, 2))
    return (plan * cost).sum((1, 2)) + eps * divergence


def gaussian_l2(shallow: Tensor, deep: Tensor, *, weights: str = "uniform") -> Tensor:
    """The transport cost between two sets of local features, each taken as a diagonal Gaussian; a scalar.

        L = mean over the batch of ||mu_u - mu_v||^2 + ||sigma_u - sigma_v||^2

    with u, v the unit-length features and mu, sigma (C) their means and deviations over the nodes: W_2^2 between
    N(mu_u, diag sigma_u^2) and N(mu_v, diag sigma_v^2), which needs no plan and is at most `emd_l2`. `deep` is a
    constant. Computed in float32 outside autocast. The distance is WKD-F's (Lv et al., NeurIPS 2024, arXiv 2412.08139).

    Args:
        shallow: Shallow local features, (B, N, C).
        deep: Deep local features matched to the shallow channels, (B, M, C).
        weights: Node weights of the moments: ``"uniform"``, or ``"cross"`` (`cross_marginals`).

    Raises:
        UserError: if shapes or options do not fit.
    """
    _check_nodes(shallow, deep)
    if weights not in MARGINALS:
        raise UserError(f"expected weights in {MARGINALS}; got {weights!r}")
    with torch.autocast(shallow.device.type, enabled=False):
        u, v = unit(shallow), unit(deep.detach())
        a, b = cross_marginals(u, v) if weights == "cross" else (None, None)
        (mean_u, sigma_u), (mean_v, sigma_v) = _moments(u, a), _moments(v, b)
        return ((mean_u - mean_v).square() + (sigma_u - sigma_v).square()).sum(-1).mean()


def _even(x: Tensor) -> Tensor:
    """Equal weights (B, N) of the nodes of x (B, N, C)."""
    return x.new_full(x.shape[:2], 1 / x.shape[1])


def _moments(x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Means and deviations (B, C) of x (B, N, C) over its nodes, weighted by (B, N) if given."""
    share = _even(x) if weights is None else weights
    mean = (share[:, :, None] * x).sum(1)
    # 1e-8 keeps the root's gradient finite for a channel that is the same everywhere.
    return mean, ((share[:, :, None] * (x - mean[:, None]).square()).sum(1) + 1e-8).sqrt()


def _check_nodes(shallow: Tensor, deep: Tensor) -> None:
    if shallow.ndim != 3 or deep.ndim != 3 or shallow.shape[0] != deep.shape[0] or shallow.shape[2] != deep.shape[2]:
        raise UserError(
            "expected shallow (batch, nodes, channels) and deep (batch, nodes, channels) with equal batch and channels; "
            f"got {tuple(shallow.shape)} and {tuple(deep.shape)}"
        )


class ChannelProjection(nn.Module):
    """Learned 1x1 maps from each shallow tap's channels to the deep tap's; used in training and thrown away after it."""

    def __init__(self, shallow_channels: tuple[int, ...], deep_channels: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(channels, deep_channels, bias=False) for channels in shallow_channels)

    def forward(self, shallow: list[Tensor]) -> list[Tensor]:
        """(B, N_s, C_s) to (B, N_s, C_d) for every tap s."""
        return [project(x.to(project.weight.dtype)) for project, x in zip(self.maps, shallow, strict=True)]


class FeatureLoss(nn.Module):
    """(1/S) sum_s L_feat(f_s, sg f_d): the feature part of SFR, over all shallow taps. Holds options only.

    L_feat is `sinkhorn_divergence`, `emd_l2` with the plan that the options name, or `gaussian_l2`.
    """

    def __init__(self, config: SFRConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, shallow: list[Tensor], deep: Tensor) -> Tensor:
        """A scalar from S shallow taps (B, N_s, C_s), already projected if any, and the deep tap (B, M, C_d)."""
        deep = deep.detach()
        total = deep.new_zeros((), dtype=torch.float32)
        for features in shallow:
            total = total + self._distance(features, self._match(features, deep))
        return total / len(shallow)

    def _distance(self, shallow: Tensor, deep: Tensor) -> Tensor:
        config = self.config
        if config.matching == "divergence":
            return sinkhorn_divergence(shallow, deep, weights=config.weights)
        if config.matching == "gaussian":
            return gaussian_l2(shallow, deep, weights=config.weights)
        return emd_l2(shallow, deep, weights=config.weights, solver=config.solver, matching=config.matching)

    def _match(self, shallow: Tensor, deep: Tensor) -> Tensor:
        method = "groups" if self.config.channels == "projection" else self.config.channels
        return match_channels(deep, shallow.shape[-1], method, shallow=shallow.detach())


class DynamicLabelSmoothing(nn.Module):
    """Soft cross-entropy against targets smoothed dynamically: L = -sum_k y~_k log softmax(z)_k, mean over the batch.

        y~ = (1 - eps_t) y + eps_t q

    Args:
        num_classes: K.
        epsilon: The smoothing eps. None: eps finds its own strength (`timm_sfr.smoothing.own_epsilon`), and rises to it
            over the first fifth of the epochs, at most 5 of them; without `set_epoch` it is at most 0.1. A number is
            timm's ``--smoothing``; 0 is plain cross-entropy.
        source: q. ``"uniform"``: 1/K. ``"classes"``: the model's mean prediction for the sample's class over the
            samples it got right in the last epoch that had any (uniform until then); for a mixture, the mixture of q.
            None: ``"classes"`` where eps finds its own strength and K is at most 1,024, else ``"uniform"``.
        schedule: eps_t of a given eps. ``"constant"``; ``"ramp"``: from 0 to eps over training; ``"confidence"``: per
            sample, larger where the model is surer.

    The class table is a (K, K) buffer; `end_epoch` renews it, summed over all processes.

    Raises:
        UserError: if an option is out of bounds, or a schedule is given without an epsilon.
    """

    epsilon_t: Tensor
    table: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(
        self,
        num_classes: int,
        epsilon: float | None = None,
        source: str | None = None,
        schedule: str = "constant",
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise UserError(f"label smoothing needs at least 2 classes; got num_classes={num_classes}")
        if epsilon is not None and not 0 <= epsilon < 1:
            raise UserError(f"expected smoothing in [0, 1); got {epsilon}")
        if source not in (None, *S.SOURCES) or schedule not in S.SCHEDULES:
            raise UserError(
                f"expected source in {S.SOURCES} and schedule in {S.SCHEDULES}; got {source!r}, {schedule!r}"
            )
        if epsilon is None and schedule != "constant":
            raise UserError(f"schedule {schedule!r} moves an epsilon that is given, as --smoothing 0.1; none is")
        self.num_classes, self.epsilon, self.schedule = num_classes, epsilon, schedule
        own = epsilon is None and num_classes <= S.TABLE_CLASSES
        self.source = source or ("classes" if own else "uniform")
        # Until `set_epoch` says how long the run is, no more than what timm takes.
        own_now = min(0.1, S.own_epsilon(num_classes))
        now = own_now if epsilon is None else 0.0 if schedule == "ramp" else epsilon
        self.register_buffer("epsilon_t", torch.tensor(now))
        rows = num_classes if self.source == "classes" else 0
        self.register_buffer("table", torch.full((rows, num_classes), 1 / num_classes))
        self.register_buffer("sums", torch.zeros(rows, num_classes), persistent=False)
        self.register_buffer("counts", torch.zeros(rows), persistent=False)

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Sets eps_t for epoch `epoch` of `epochs`."""
        if self.epsilon is None:
            warmup = default_warmup(epochs)
            now = S.own_epsilon(self.num_classes, epochs) * min(1.0, (epoch + 1) / (warmup + 1))
        else:
            now = S.ramp(self.epsilon, epoch, epochs) if self.schedule == "ramp" else self.epsilon
        self.epsilon_t.fill_(now)

    def describe(self, epochs: int) -> str:
        """The form and the size of the smoothing in a run of `epochs` epochs, in a few words."""
        if self.epsilon is None:
            towards = "by class" if self.source == "classes" else self.source
            return f"up to {S.own_epsilon(self.num_classes, epochs):.2g} {towards}"
        return f"{self.epsilon:g} {self.source} {self.schedule}"

    def targets(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The smoothed targets y~ (B, K) and the mean eps of the batch (a scalar).

        Args:
            logits: (B, K); only the ``confidence`` schedule looks at them, as constants.
            target: Class indices (B,) or mixtures (B, K).
        """
        y = S.soft_targets(target, self.num_classes)
        epsilon = S.confidence(logits, self.epsilon) if self.schedule == "confidence" else self.epsilon_t
        # A matrix product makes the q of a mixture the mixture of its classes' q.
        q = y @ self.table if self.source == "classes" else y.new_full((self.num_classes,), 1 / self.num_classes)
        return S.smooth(y, epsilon, q), epsilon.mean()

    def forward(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The loss (a scalar) and the mean eps of the batch (a scalar); in training, adds the batch to the table's sums.

        Args:
            logits: (B, K).
            target: Class indices (B,) or mixtures (B, K).
        """
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            if self.epsilon == 0:
                return F.cross_entropy(logits, target), self.epsilon_t
            with torch.no_grad():
                smoothed, epsilon = self.targets(logits, target)
                if self.source == "classes" and self.training:
                    label, predictions, right = S.right_predictions(logits, S.soft_targets(target, self.num_classes))
                    self.sums.index_add_(0, label, predictions)
                    self.counts.index_add_(0, label, right)
            return F.cross_entropy(logits, smoothed), epsilon

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Sums the epoch's predictions over all processes and makes them the table of the next epoch."""
        if self.source != "classes":
            return
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.sums)
            dist.all_reduce(self.counts)
        self.table.copy_(S.update_table(self.table, self.sums, self.counts))
        self.sums.zero_()
        self.counts.zero_()


class SmoothedLoss(nn.Module):
    """Dynamic label smoothing as the criterion of a base task: `SFRTask` over that task then moves it and logs its eps.

    Attributes:
        smoothing: What smooths.
        epsilon: The mean eps of the last batch, a scalar.
    """

    def __init__(self, smoothing: DynamicLabelSmoothing) -> None:
        super().__init__()
        self.smoothing, self.epsilon = smoothing, smoothing.epsilon_t

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss alone, a scalar, of logits (B, K) and class indices (B,) or mixtures (B, K)."""
        loss, self.epsilon = self.smoothing(logits, target)
        return loss
