"""Transport costs to test solvers on: from the features of a pretrained network on real images, or from random features."""

from __future__ import annotations

import tempfile
from itertools import islice
from pathlib import Path

import timm
import torch
from PIL import Image
from torch import Tensor

from benchmarks.presets import imagenet_lite0
from timm_sfr.method.channels import group_channels
from timm_sfr.method.probe import forward_taps
from timm_sfr.method.sinkhorn import cost_matrix, unit
from timm_sfr.method.tapped_model import to_nodes
from timm_sfr.method.taps import choose_taps
from timm_sfr.utils.errors import UserError

BATCH = 64  # images per forward pass


def random_costs(count: int, nodes: int, channels: int = 64) -> Tensor:
    """Returns costs (count, nodes, nodes) between random unit vectors, which have no structure."""
    generator = torch.Generator().manual_seed(0)
    u, v = (unit(torch.randn(count, nodes, channels, generator=generator)) for _ in range(2))
    return cost_matrix(u, v)


def real_costs(folder: Path, count: int, nodes: int) -> dict[str, Tensor]:
    """Returns costs (count, nodes, nodes) between each shallow tap and the deep tap, by the shallow tap's module.

    The features are those of `tf_efficientnet_lite0` with ImageNet weights. The images are resized to 32 sqrt(nodes)
    pixels, so that the deep tap has `nodes` locations. Channels are matched by `groups`. If the folder has fewer than
    `count` images, they are repeated.

    Raises:
        UserError: if the folder has no images, or the weights are not installed.
    """
    paths = sorted(folder.rglob("*.jpg"))
    chosen = list(islice(paths, 0, None, max(1, len(paths) // count)))[:count]
    if not chosen:
        raise UserError(f"images: expected a folder with .jpg files; found none in {folder}")
    chosen = (chosen * -(-count // len(chosen)))[:count]
    size = (3, *[32 * round(nodes**0.5)] * 2)
    with tempfile.TemporaryDirectory() as place:
        imagenet_lite0(weights := Path(place) / "weights.safetensors")
        overlay = {"file": str(weights)}
        model = timm.create_model("tf_efficientnet_lite0", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    config = {**timm.data.resolve_model_data_config(model), "input_size": size, "crop_pct": 1.0}
    transform = timm.data.create_transform(**config)
    plan = choose_taps(model, input_size=size)
    found: dict[str, list[Tensor]] = {tap.module: [] for tap in plan.shallow}
    for start in range(0, count, BATCH):
        images = torch.stack([transform(Image.open(path).convert("RGB")) for path in chosen[start : start + BATCH]])
        with torch.inference_mode():
            _, maps = forward_taps(model, images, plan.indices)
            *shallow, deep = (to_nodes(tap, plan.deep.grid) for tap in maps)
            for tap, features in zip(plan.shallow, shallow, strict=True):
                found[tap.module].append(cost_matrix(unit(features), unit(group_channels(deep, tap.channels))))
    return {module: torch.cat(parts).clone() for module, parts in found.items()}
