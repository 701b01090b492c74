"""`TappedModel`, the module that training runs: it maps images to logits and the nodes of the taps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import group_parameters
from timm.optim import auto_group_layers
from torch import Tensor, nn

from timm_sfr.method.config import SFRConfig
from timm_sfr.method.probe import HOOKS, Hooks, forward_final, forward_taps, model_name
from timm_sfr.method.taps import TapPlan, node_grids
from timm_sfr.utils.errors import UserError


def to_nodes(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Average-pools a map to `grid` and flattens its locations: (B, C, H, W) to (B, N, C)."""
    if x.shape[-2:] != grid:
        x = _pool(x, grid)
    return _SameLayout.apply(x).flatten(2).transpose(1, 2)


class TappedModel(nn.Module):
    """The module that training runs and DDP wraps: images (B, C, H, W) to logits (B, K) and tapped nodes [(B, N_t, C_t)].

    The images may have another size than the plan's: the grids of the nodes follow the maps of each batch (`node_grids`). If
    the maps leave too few locations to match, each tap becomes one node, its mean.

    Args:
        model: The plain model; exports contain its state dict only.
        plan: Its taps; None for logits only.
        config: SFR's options, of which this module uses those of the node grids; by default `SFRConfig()`.
        projection: A `ChannelProjection` of the shallow taps, if channels are matched that way. Used in training only.
        to_teacher: Maps the features before the classifier, (B, D), to a teacher's, (B, D'). If given, its output is
            returned with the logits, as in timm's feature distillation. Used in training only.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: TapPlan | None = None,
        config: SFRConfig | None = None,
        projection: nn.Module | None = None,
        to_teacher: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.projection = projection
        self.to_teacher = to_teacher
        self.plan = plan
        self.config = config or SFRConfig()
        self.hooks = Hooks(model, plan.modules) if plan is not None and plan.mechanism == HOOKS else None

    def forward(self, x: Tensor) -> tuple[Any, list[Tensor]]:
        """Returns the logits (B, K), and the nodes of the shallow taps followed by those of the deep tap."""
        if self.plan is None:
            return self.model(x) if self.to_teacher is None else self._forward_with_teacher(x)[0], []
        if self.to_teacher is not None:
            logits, maps = self._forward_with_teacher(x)
        elif self.hooks is None:
            logits, maps = forward_taps(self.model, x, self.plan.indices)
        else:
            logits, maps = self.hooks.forward(self.model, x)
        self._check(x, maps)
        # Integers, so that a compiled module is compiled again for maps of another size.
        grids = node_grids(
            [(int(tap.shape[2]), int(tap.shape[3])) for tap in maps], self.config.max_nodes, self.config.common_grid
        )
        nodes = [to_nodes(tap, grid) for tap, grid in zip(maps, grids, strict=True)]
        if self.projection is not None:
            nodes = [*self.projection(nodes[:-1]), nodes[-1]]
        return logits, nodes

    def _forward_with_teacher(self, x: Tensor) -> tuple[Any, list[Tensor]]:
        """Returns (logits (B, K), features for the teacher (B, D')), and the tapped maps."""
        if self.plan is None:
            final, maps = self.model.forward_features(x), []
        else:
            final, maps = forward_final(self.model, x, self.plan.indices)
        features = self.to_teacher(self.model.forward_head(final, pre_logits=True))
        return (self.model.forward_head(final), features), maps

    def names_here(self, own: Iterable[str]) -> list[str]:
        """Returns names of the model's own parameters, or patterns of them, as they are in this module."""
        return [f"model.{name}" for name in own]

    def no_weight_decay(self) -> set[str]:
        """Returns the model's own list under its names here, for timm's optimizer factory."""
        return set(self.names_here(getattr(self.model, "no_weight_decay", set)()))

    def group_matcher(self, coarse: bool = False) -> Any:
        """Returns the model's layer groups under its names here, for layer-wise learning rates; extras join the last group."""
        if hasattr(self.model, "group_matcher"):
            layers = group_parameters(self.model, self.model.group_matcher(coarse=coarse), reverse=True)
        else:
            layers = auto_group_layers(self.model)
        last = max(layers.values())
        return lambda name: layers.get(name.removeprefix("model."), last)

    def _check(self, images: Tensor, maps: list[Tensor]) -> None:
        """Raises UserError if training changes the maps."""
        for tap, x in zip(self.plan.taps, maps, strict=True):
            if x.shape[:2] != (len(images), tap.channels):
                raise UserError(
                    f"{model_name(self.model)}: {tap.module} returns {tuple(x.shape)} in training, expected ({len(images)}, "
                    f"{tap.channels}, H, W) as in evaluation; turn off options that drop or change features in training"
                )


def _pool(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Averages each cell of the grid, with cells of equal size: (B, C, H, W) to (B, C, *grid).

    If the grid does not divide the map, neighbouring cells overlap: 7 locations become 3 cells, 0-2, 2-4 and 4-6. Adaptive
    pooling has cells of different sizes, takes longer on CPUs, and PyTorch lists its gradient on GPUs as nondeterministic.
    """
    strides = [size // cells for size, cells in zip(x.shape[-2:], grid, strict=True)]
    sizes = [size - (cells - 1) * stride for size, cells, stride in zip(x.shape[-2:], grid, strides, strict=True)]
    return F.avg_pool2d(x, sizes, strides)


class _SameLayout(torch.autograd.Function):
    """The identity, with a gradient in the memory layout of the input.

    The gradient of (B, N, C) nodes, transposed back, is in channels-last layout. Without this conversion, every operation
    of the network before the tap would copy it into its own layout: at best a tenth of what SFR adds to a step.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous(memory_format=ctx.layout)
