"""Measures what SFR taps in each of timm's modules, and writes docs/models.md.

    python -m benchmarks.families

Each module is represented by its smallest classifier. Taps and shapes are measured on the meta device, at the model's own image
size. The step is one real forward and backward pass of an `SFRTask` with default options, on two images.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timm.models import list_modules
from torch import nn

from timm_sfr import SFRConfig, SFRTask, UserError, choose_taps
from timm_sfr.config import ModelConfig
from timm_sfr.method.taps import TapPlan
from timm_sfr.models import SMALL_IMAGE_MODELS
from timm_sfr.models.loading import new_model

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
CLASSES = 10
SIZES = (16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512)
LARGE = 150e6  # parameters; a larger model takes no real step
HEAD = ("module", "model", "M", "taps", "channels", "nodes", "channels match", "taken by", "from px", "step")


@dataclass(frozen=True)
class Row:
    """The results for one of timm's modules.

    Attributes:
        module: timm's module.
        name: Its smallest classifier.
        parameters: Number of parameters, with 10 classes.
        plan: The taps; None if the model cannot be tapped.
        smallest: The smallest image size of `SIZES` at which it can be tapped, in pixels.
        step: The result of one real step, in words.
    """

    module: str
    name: str
    parameters: int
    plan: TapPlan | None
    smallest: int | None
    step: str

    def cells(self) -> list[str]:
        """Returns the cells of the row as text."""
        start = [self.module, f"`{self.name}`", f"{self.parameters / 1e6:.1f}"]
        if self.plan is None:
            return [*start, *["-"] * (len(HEAD) - len(start) - 1), self.step]
        taps, grids = self.plan.taps, self.plan.node_grids(SFRConfig().max_nodes)
        ratios = [self.plan.deep.channels / tap.channels for tap in self.plan.shallow]
        style = "g" if all(ratio.is_integer() for ratio in ratios) else ".2f"
        many = " ".join(format(ratio, style) for ratio in ratios) + " to 1"
        return [
            *start,
            " ".join(str(tap.index) for tap in taps),
            " ".join(str(tap.channels) for tap in taps),
            " ".join(f"{h}x{w}" for h, w in grids),
            "one to one" if set(ratios) == {1.0} else many,
            self.plan.mechanism,
            str(self.smallest or "-"),
            self.step,
        ]


def on_meta(name: str) -> nn.Module:
    """Returns the model with 10 classes, on the meta device, where it uses no memory."""
    with torch.device("meta"):
        return timm.create_model(name, num_classes=CLASSES)


def classifiers() -> dict[str, list[str]]:
    """Returns the names of timm's own models by module, without those of this package."""
    found = defaultdict(list)
    for module in list_modules():
        for name in timm.list_models(module=module):
            # timm's test models are too small to represent a module.
            if name not in SMALL_IMAGE_MODELS and not name.startswith("test_"):
                found[module].append(name)
    return dict(found)


def smallest(names: list[str]) -> tuple[str, int]:
    """Returns the classifier with the fewest parameters, and their number."""
    sizes = {}
    for name in names:
        model = on_meta(name)
        if getattr(model, "num_classes", 0) == CLASSES:
            sizes[name] = sum(p.numel() for p in model.parameters())
    name = min(sizes, key=lambda name: (sizes[name], name)) if sizes else names[0]
    return name, sizes.get(name, 0)


def plan_of(name: str) -> TapPlan:
    """Returns the model's taps at its own image size, on the meta device unless the model reads values of a tensor."""
    try:
        with torch.device("meta"):
            return choose_taps(timm.create_model(name, num_classes=CLASSES))
    except UserError as error:
        if "item()" not in str(error):
            raise
        return choose_taps(timm.create_model(name, num_classes=CLASSES))


def smallest_size(name: str) -> int | None:
    """Returns the smallest of `SIZES` at which the model, made for that size (``--img-size``), can be tapped."""
    for size in SIZES:
        try:
            with torch.device("meta"):
                choose_taps(new_model(ModelConfig(model=name, img_size=size), CLASSES), (3, size, size))
            return size
        except UserError:
            continue
    return None


def step_of(name: str) -> str:
    """Takes one SFR step with default options on two images; returns ``"ok"``, or what is wrong."""
    torch.manual_seed(0)
    task = SFRTask(timm.create_model(name, num_classes=CLASSES), verbose=False)
    result = task(torch.randn(2, *task.plan.input_size), torch.tensor([0, 1]))
    result["loss"].backward()
    idle = [key for key, p in task.named_parameters() if p.requires_grad and p.grad is None]
    if not result["loss"].isfinite():
        return "loss not finite"
    if not result["sfr_loss"] > 0:
        return "no feature loss"
    return "ok" if not idle else f"no gradient in {', '.join(idle[:3])}"


def rows(only: list[str] | None = None) -> Iterator[Row]:
    """Yields a row for every module, or for those in `only`."""
    for module, names in classifiers().items():
        if only and module not in only:
            continue
        name, parameters = smallest(names)
        try:
            plan = plan_of(name)
            step = step_of(name) if parameters <= LARGE else "shapes only, on meta"
        except UserError as error:
            yield Row(module, name, parameters, None, None, str(error))
            continue
        yield Row(module, name, parameters, plan, smallest_size(name), step)


def page(found: list[Row]) -> str:
    """Returns the text of docs/models.md."""
    taken = sum(row.step == "ok" for row in found)
    lines = [HEAD, ["---"] * len(HEAD), *(row.cells() for row in found)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"""# Models

This page shows `timm_sfr.SFRTask(timm.create_model(NAME, num_classes=10))` with default options, for the smallest classifier in
each of the {len(found)} modules of timm {timm.__version__}. In {taken} of them it took one real training step (finite loss,
feature loss above zero, a gradient in every parameter). `python -m benchmarks.families` writes this page; a test compares it
with the models.

- **model**: the smallest one, apart from timm's `test_*`.
- **taps**: indices in `feature_info`, the shallow ones first and the deep one last; **channels**: the number of channels of each.
- **nodes**: the grid of each tap at the model's own image size; larger grids are average-pooled to at most
  {SFRConfig().max_nodes} nodes.
- **channels match**: how many deep channels teach one shallow channel, for each shallow tap.
- **taken by**: how the features are read, through timm's `forward_intermediates` or forward hooks.
- **from px**: the smallest square image, of {", ".join(map(str, SIZES))}, at
  which the deep tap still has 4 locations and comes after a shallow tap. The model is made for that size (`--img-size`). This is
  found on the meta device. Gemma 4's encoder does not run there, because it reads values of a tensor.
- **step**: models with more than {LARGE / 1e6:.0f} M parameters took no step here.

`timm-sfr taps NAME --img-size PX` shows the same for any model and image size, and names the rule that chose the taps.

{table}
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 1 if a module fails, otherwise 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="MODULE", help="only print the rows of these modules")
    args = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    found, started = [], time.monotonic()
    for row in rows(args.only):
        found.append(row)
        print(" | ".join(row.cells()), flush=True)
    if not args.only:
        PAGE.write_text(page(found))
        print(f"{len(found)} modules in {time.monotonic() - started:.0f} s; wrote {PAGE}")
    return 0 if all(row.step in ("ok", "shapes only, on meta") for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
