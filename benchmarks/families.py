"""What SFR taps in every family of the installed timm, written to docs/models.md.

    python -m benchmarks.families

One model stands for each of timm's modules: the smallest classifier in it. Taps and shapes are measured on the meta device,
at the model's own image size; the step is one real forward and backward pass of an `SFRTask` on two images, with no setting.
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

from timm_sfr import SFRTask, UserError, choose_taps
from timm_sfr.config import ModelConfig
from timm_sfr.method.taps import TapPlan
from timm_sfr.models import SMALL_IMAGE_MODELS
from timm_sfr.models.loading import new_model

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
CLASSES = 10
SIZES = (16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512)
LARGE = 150e6  # parameters; above it no step is taken for real
HEAD = ("module", "model", "M", "taps", "channels", "nodes", "channels match", "taken by", "from px", "step")


@dataclass(frozen=True)
class Row:
    """A family, by the smallest classifier in it.

    Attributes:
        module: timm's module.
        name: The model.
        parameters: How many it has, with 10 classes.
        plan: Its taps; None if it cannot be tapped.
        smallest: Smallest image size of `SIZES` at which it can, pixels.
        step: What came of one real step, in words.
    """

    module: str
    name: str
    parameters: int
    plan: TapPlan | None
    smallest: int | None
    step: str

    def cells(self) -> list[str]:
        """The row as text."""
        start = [self.module, f"`{self.name}`", f"{self.parameters / 1e6:.1f}"]
        if self.plan is None:
            return [*start, *["-"] * (len(HEAD) - len(start) - 1), self.step]
        taps, grids = self.plan.taps, self.plan.node_grids(49)
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
    """The model without memory, with 10 classes."""
    with torch.device("meta"):
        return timm.create_model(name, num_classes=CLASSES)


def classifiers() -> dict[str, list[str]]:
    """timm's own models by module, those of this package left out."""
    found = defaultdict(list)
    for module in list_modules():
        for name in timm.list_models(module=module):
            # timm's test models are too small to stand for anything.
            if name not in SMALL_IMAGE_MODELS and not name.startswith("test_"):
                found[module].append(name)
    return dict(found)


def smallest(names: list[str]) -> tuple[str, int]:
    """The model of fewest parameters that has a classifier, and how many."""
    sizes = {}
    for name in names:
        model = on_meta(name)
        if getattr(model, "num_classes", 0) == CLASSES:
            sizes[name] = sum(p.numel() for p in model.parameters())
    name = min(sizes, key=lambda name: (sizes[name], name)) if sizes else names[0]
    return name, sizes.get(name, 0)


def plan_of(name: str) -> TapPlan:
    """Its taps at its own image size: on the meta device, or for real where the model reads values of a tensor."""
    try:
        with torch.device("meta"):
            return choose_taps(timm.create_model(name, num_classes=CLASSES))
    except UserError as error:
        if "item()" not in str(error):
            raise
        return choose_taps(timm.create_model(name, num_classes=CLASSES))


def smallest_size(name: str) -> int | None:
    """The smallest of `SIZES` at which it can be tapped, made for that size as `train_sfr.py --img-size` does."""
    for size in SIZES:
        try:
            with torch.device("meta"):
                choose_taps(new_model(ModelConfig(model=name, img_size=size), CLASSES), (3, size, size))
            return size
        except UserError:
            continue
    return None


def step_of(name: str) -> str:
    """One SFR step on two images with no setting: what is wrong with it, or ``"ok"``."""
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
    """A row for every module, or for those in `only`."""
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
    """docs/models.md."""
    taken = sum(row.step == "ok" for row in found)
    lines = [HEAD, ["---"] * len(HEAD), *(row.cells() for row in found)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"""# Models

What `timm_sfr.SFRTask(timm.create_model(NAME))` does, with no setting, in each of the {len(found)} modules of timm
{timm.__version__}: in {taken} of them the smallest classifier took one real step of training (loss finite, feature loss above
zero, a gradient in every parameter). `python -m benchmarks.families` writes this page; a test compares it with the models.

- **taps**: indices in `feature_info`, shallow ones first, the deep one last; **channels** of each.
- **nodes**: the grid that each tap is matched on, at the model's own image size; larger ones are average-pooled to at most 49.
- **channels match**: how many deep channels teach one shallow channel, for each shallow tap.
- **from px**: the smallest square image, of {", ".join(map(str, SIZES))}, at
  which the deep tap keeps 4 locations and a shallow one lies before it. The model is made for that size (`--img-size`). It is
  found on the meta device, which Gemma 4's encoder does not run on: it reads values of a tensor.
- **step**: models of more than {LARGE / 1e6:.0f} M parameters took none here.

`print(timm_sfr.choose_taps(model))` shows the same for any model and image size, and says which rule chose.

{table}
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; the exit status, 1 if a family fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="MODULE", help="print these modules' rows, and write nothing")
    args = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    found, started = [], time.monotonic()
    for row in rows(args.only):
        found.append(row)
        print(" | ".join(row.cells()), flush=True)
    if not args.only:
        PAGE.write_text(page(found))
        print(f"{len(found)} modules in {time.monotonic() - started:.0f} s; {PAGE} is written")
    return 0 if all(row.step in ("ok", "shapes only, on meta") for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
