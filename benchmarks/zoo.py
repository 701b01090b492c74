"""Trains a recipe of the zoo with several seeds and writes the scores into the recipe.

    python -m benchmarks.zoo resnet20_cifar.sfr_digits
    python -m benchmarks.zoo resnet20_cifar.sfr_cifar10 --data-dir DIR --seeds 0

If the recipe's weights come with the package, those of its own seed are copied to `timm_sfr/weights/`, with their card.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from benchmarks.table import interval
from timm_sfr import RunConfig
from timm_sfr.cli.parser import fail
from timm_sfr.hub.card import Facts, dataset_name, render
from timm_sfr.models.files import CONFIG, WEIGHTS
from timm_sfr.models.zoo import WEIGHTS_FOLDER, ZooEntry, zoo
from timm_sfr.runs.checkpoints import checkpoints
from timm_sfr.runs.folder import read_run
from timm_sfr.runs.records import Run, read_finished
from timm_sfr.training.run import fit
from timm_sfr.utils.errors import UserError, near_matches
from timm_sfr.utils.files import read_json, write_whole

OURS = ("output", "experiment")  # options of this script, which another place or folder does not change


def train(entry: ZooEntry, seed: int, output: Path) -> Run:
    """Trains the recipe with `seed`, resumes its run, or reuses a finished one.

    Raises:
        UserError: if the recipe has no data, or the existing run has other options.
    """
    if not (entry.options.get("dataset") or entry.options.get("data_dir")):
        raise UserError(f"data-dir: {entry.name} does not come with its data; give --data-dir DIR")
    place = output / f"{entry.name}-seed{seed}"
    options = entry.options | {"seed": seed, "output": str(output), "experiment": place.name}
    config = RunConfig.from_flat(options)
    if not checkpoints(place / "checkpoints"):
        shutil.rmtree(place, ignore_errors=True)  # a run that was interrupted in its first epoch
        fit(config)
        return read_finished(place)
    theirs = read_run(place)
    wanted = {name: value for name, value in config.flat().items() if name in options and name not in OURS}
    other = sorted(name for name, value in wanted.items() if theirs.get(name) != value)
    if other:
        raise UserError(f"output: {place} was trained with other options than the recipe: {', '.join(other)}; remove it")
    metrics = read_json(place / "metrics.json")  # empty before the first validation
    if not metrics or metrics["last"]["epoch"] + 1 < metrics["epochs"]:
        fit(RunConfig.from_flat(theirs), resume=place)
    return read_finished(place)


def score(run: Run) -> dict[str, Any]:
    """Returns the scores of the run's weights as `timm-sfr validate` prints them: in float32, also after a bf16 training."""
    command = [sys.executable, "-m", "timm_sfr.cli.main", "validate", str(run.path), "--json", "--mixed-precision", "no"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def measured(runs: dict[int, Run], published: int, scores: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of `timm_sfr.models.zoo.Measured`.

    Args:
        runs: The runs by seed, which give the means at the last epoch.
        published: The seed whose weights are published.
        scores: The `score` of these weights.
    """
    last, own = [run.metrics["last"] for run in runs.values()], runs[published]
    top1 = [row["val_top1"] for row in last]
    return {
        "split": "validation",
        "images": scores["images"],
        "data": dataset_name(own.options),
        "seeds": list(runs),
        "top1": round(mean(top1), 4),
        "top1_interval": round(interval(top1), 4) if len(top1) > 1 else 0.0,
        "top5": round(mean(row["val_top5"] for row in last), 4),
        "published_top1": round(scores["top1"], 4),
        "published_top5": round(scores["top5"], 4),
        "published_seed": published,
        "published_epoch": own.metrics["best"]["epoch"] + 1,
        "hardware": own.metrics["hardware"],
        "versions": own.metrics["versions"],
        "date": time.strftime("%Y-%m-%d"),
    }


def ship(entry: ZooEntry, run: Run, scores: dict[str, Any]) -> None:
    """Copies the weights of `run` into the package, and writes their card with these `scores` beside them."""
    path = WEIGHTS_FOLDER / str(entry.about.weights)
    exact = {f"val_{name}": scores[name] for name in ("top1", "top5", "loss")} | {"ece": scores["ece"]}
    best, last = run.metrics["best"], run.metrics["last"]
    metrics = run.metrics | {"best": best | exact, "last": last | exact if last["epoch"] == best["epoch"] else last}
    model = run.path / "model"
    card = render(read_json(model / CONFIG), Facts(metrics, run.options, run.rows, packaged=entry.name))
    shutil.copy(model / WEIGHTS, path)
    write_whole(path.with_suffix(".md"), card)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", help="a recipe in hub_configs")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)), help="default: 0 to 4")
    parser.add_argument("--output", type=Path, default=Path("output/zoo"), help="folder of the runs (default: output/zoo)")
    parser.add_argument("--data-dir", help="folder with train/CLASS and val/CLASS, in place of the recipe's data; the card has "
                        "its name")  # fmt: skip
    args = parser.parse_args(arguments)
    entry = zoo().get(args.name)
    try:
        if entry is None:
            raise UserError(f"name: expected any of {', '.join(zoo())}; got {args.name!r}{near_matches(args.name, zoo())}")
        if args.data_dir:
            rest = {name: value for name, value in entry.options.items() if name not in ("dataset", "dataset_download")}
            entry = dataclasses.replace(entry, options=rest | {"data_dir": str(Path(args.data_dir).absolute())})
        published = int(entry.options["seed"])
        if published not in args.seeds:
            raise UserError(f"seeds: expected a list with the recipe's own seed, {published}; got {args.seeds}")
        runs = {seed: train(entry, seed, args.output) for seed in args.seeds}
    except UserError as error:
        return fail(str(error))
    scores = score(runs[published])
    if entry.about.weights is not None:
        ship(entry, runs[published], scores)
    # The metrics are the last part of the file, so everything before them stays unchanged.
    text, _, _ = entry.recipe.read_text().partition("\n  metrics:")
    block = yaml.safe_dump({"metrics": measured(runs, published, scores)}, sort_keys=False, width=120)
    entry.recipe.write_text(text + "\n" + "".join(f"  {line}\n" for line in block.splitlines()))
    print(block)
    return 0


if __name__ == "__main__":
    sys.exit(main())
