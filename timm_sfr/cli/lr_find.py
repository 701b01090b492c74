"""``timm-sfr lr-find``: a learning-rate range test of a training, with its curve as a picture and as figures."""

from __future__ import annotations

import csv
import itertools
from argparse import Namespace
from pathlib import Path
from statistics import pstdev

from timm_sfr.cli.train import read_options
from timm_sfr.config import DEFAULT_MODEL
from timm_sfr.training.lr_find import RangeTest, find_rate
from timm_sfr.utils.console import json_line, show_log
from timm_sfr.utils.errors import UserError

# Options that a user may give for the training that follows, and that a range test has no use for.
UNUSED = ("lr", "lr_base", "lr_base_size", "lr_base_scale", "sched", "output", "experiment", "push_to_hub", "report_to",
          "checkpoint_interval", "checkpoint_hist", "save_epochs", "save_images", "start_epoch", "stop_epoch", "patience",
          "test_split", "test_num_samples", "tta")  # fmt: skip
ENDINGS = (".png", ".svg", ".pdf")
SURE = 2  # a fall of the loss by fewer deviations of the single losses is uncertain


def write_figures(test: RangeTest, path: Path) -> None:
    """Writes a row for each update: update, lr, loss, smoothed_loss (empty for the update that ended the test)."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("update", "lr", "loss", "smoothed_loss"))
        smoothed = [*test.smoothed, *[""] * (len(test.losses) - len(test.smoothed))]
        rows.writerows((i + 1, *row) for i, row in enumerate(zip(test.rates, test.losses, smoothed, strict=True)))


def picture(test: RangeTest, title: str, path: Path) -> None:
    """Draws the losses over the rates, on a logarithmic axis, with a line at the suggested rate."""
    from matplotlib.figure import Figure  # imported here because it is slow to import

    count = len(test.smoothed)
    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot()
    axes.plot(test.rates[:count], test.losses[:count], color="#b9c0c9", linewidth=1, label="loss")
    axes.plot(test.rates[:count], test.smoothed, color="#3b76af", label="smoothed")
    if test.rate is not None:
        axes.axvline(test.rate, color="#e8833a", label=f"suggestion: {test.rate:.2g}")
    low, high = min(test.smoothed), max(test.smoothed[0], test.losses[0])
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss", title=title)
    span = (high - low) or 1.0
    axes.set_ylim(low - 0.1 * span, high + 0.5 * span)
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def free_path(path: Path) -> Path:
    """Returns `path`, or if that file or its figures exist, the first of NAME-2, NAME-3 and so on that does not."""
    names = itertools.chain([path], (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2)))
    return next(one for one in names if not one.exists() and not one.with_suffix(".csv").exists())


def lines(test: RangeTest, asked: int, files: tuple[Path, Path]) -> list[str]:
    """Returns what to print."""
    end = min(range(len(test.smoothed)), key=test.smoothed.__getitem__)
    done = f"{len(test.losses)} of {asked} updates of {test.batch} images, rates {test.rates[0]:.2g} to {test.rates[-1]:.2g}"
    if len(test.losses) < asked:
        done += f": the loss was {test.losses[-1]:.3g} at the last, and the test ended"
    found = [
        *([test.note] if test.note else []),
        done,
        f"smoothed loss: {test.smoothed[0]:.3f} at first, lowest {test.smoothed[end]:.3f} at {test.rates[end]:.2g}",
        f"curve: {files[0]}; figures: {files[1]}",
    ]
    if test.rate is not None:
        fall = test.smoothed[0] - test.smoothed[end]
        scatter = pstdev(loss - smooth for loss, smooth in zip(test.losses, test.smoothed, strict=False))
        if fall < SURE * scatter:
            found.append(f"warning: the smoothed loss falls by {fall:.2g}, and single updates scatter by {scatter:.2g}: the "
                         "suggestion is uncertain; give more --lr-updates, or a larger --batch-size")  # fmt: skip
        found += [
            f"suggestion: --lr {test.rate:.2g}, where the smoothed loss falls fastest; a start, not an answer: look at the "
            "curve, and compare runs at a third and at three times that rate",
            f"next: timm-sfr train with the same options and --lr {test.rate:.2g}",
        ]
    return found


def run(args: Namespace) -> int:
    """Runs the command; returns 0."""
    own = ("lr_low", "lr_high", "lr_updates", "picture", "json")
    low, high, count, path, as_json = (vars(args).pop(name) for name in own)
    path = path or free_path(Path("lr-find.png"))
    if not 0 < low < high or count < 10:
        raise UserError(
            f"lr-low: expected two rates above 0, --lr-low the smaller, and 10 --lr-updates or more; got {low:g}, {high:g} "
            f"and {count}"
        )
    if path.suffix.lower() not in ENDINGS:
        raise UserError(f"picture: expected a file that ends in {', '.join(ENDINGS)}; got {str(path)!r}")
    unused = [f"--{name.replace('_', '-')}" for name in UNUSED if name in vars(args)]
    config, _ = read_options(args)
    if as_json:
        show_log(to_stderr=True)
    test = find_rate(config, low, high, count)
    if not test.main:
        return 0
    files = (path, path.with_suffix(".csv"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(test, f"{config.model.model or DEFAULT_MODEL}, {config.optim.opt}, {test.batch} images an update", path)
        write_figures(test, files[1])
    except (OSError, ValueError) as error:
        raise UserError(f"picture: cannot write {str(path)!r}: {error}") from error
    if as_json:
        print(json_line({"lr": test.rate, "batch": test.batch, "updates": len(test.losses), "picture": str(path),
                         "figures": str(files[1])}))  # fmt: skip
    else:
        if unused:
            print(f"note: without effect here, as no run is written and the rate is varied: {', '.join(unused)}")
        print("\n".join(lines(test, count, files)))
    if test.rate is None:
        raise UserError(
            f"lr-high: no suggestion, because the smoothed loss never fell between {low:g} and {test.rates[-1]:g}; "
            "try other --lr-low and --lr-high, or more --lr-updates"
        )
    return 0
