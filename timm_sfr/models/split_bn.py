"""BatchNorm layers of their own for the views of an image (timm's split BatchNorm), and the model's state without them."""

from __future__ import annotations

from typing import Any

from timm.layers import convert_splitbn_model
from torch import nn

from timm_sfr.utils.errors import UserError

AUXILIARY = ".aux_bn."  # part of the names of what the views after the first have


def split_batchnorm(model: nn.Module, splits: int) -> nn.Module:
    """Returns the model with each BatchNorm split for `splits` parts of a batch; in evaluation it is the model as it was.

    Raises:
        UserError: if the model has no BatchNorm over maps, or another kind that timm does not split.
    """
    kinds = {type(module).__name__ for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    other = any(isinstance(module, (nn.BatchNorm1d, nn.BatchNorm3d)) for module in model.modules())
    if not kinds or other:
        found = f"it has {', '.join(sorted(kinds))}" if kinds else "it has none"
        raise UserError(f"split_bn: it splits BatchNorm over maps, and {found}; leave the option out")
    return convert_splitbn_model(model, splits)


def without_auxiliary(named: dict[str, Any]) -> dict[str, Any]:
    """Returns those entries of a state dict, or of named parameters, that the model has without split BatchNorm."""
    return {name: value for name, value in named.items() if AUXILIARY not in name}
