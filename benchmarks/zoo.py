"""Trains a recipe of the zoo with several seeds and writes the scores into the recipe.

    python -m benchmarks.zoo resnet20_cifar.sfr_digits

If the recipe's weights come with the package, those of its own seed are copied to `timm_sfr/weights/`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path
from statistics import mean

import yaml

from benchmarks.table import interval
from timm_sfr import RunConfig
from timm_sfr.cli.parser import fail
from timm_sfr.models.zoo import WEIGHTS_FOLDER, ZooEntry, zoo
from timm_sfr.runs.checkpoints import checkpoints
from timm_sfr.runs.folder import read_run
from timm_sfr.training.run import fit
from timm_sfr.utils.errors import UserError, near_matches


def train(entry: ZooEntry, seed: int, output: Path) -> tuple[Path, dict]:
    """Trains the recipe with `seed`, resumes its run, or reuses a finished one; returns the run's folder and its metrics.

    Raises:
        UserError: if the recipe has no data, or the existing run has other options.
    """
    if not (entry.options.get("dataset") or entry.options.get("data_dir")):
        raise UserError(f"data-dir: {entry.name} does not come with its data; give --data-dir DIR")
    run = output / f"{entry.name}-seed{seed}"
    config = RunConfig.from_flat(entry.options | {"seed": seed, "output": str(output), "experiment": run.name})
    if not checkpoints(run / "checkpoints"):
        shutil.rmtree(run, ignore_errors=True)  # a run that was interrupted in its first epoch
        fit(config)
    theirs = read_run(run)
    other = sorted(name for name, value in (entry.options | {"seed": seed}).items() if theirs.get(name) != value)
    if other:
        raise UserError(f"output: {run} was trained with other options than the recipe: {', '.join(other)}; remove it")
    metrics = json.loads((run / "metrics.json").read_text())
    if metrics["last"]["epoch"] + 1 < metrics["epochs"]:
        fit(RunConfig.from_flat(theirs), resume=run)
        metrics = json.loads((run / "metrics.json").read_text())
    return run, metrics


def measured(runs: dict[int, dict], published: int) -> dict:
    """Returns the scores of `runs` (metrics by seed), with the fields of `timm_sfr.models.zoo.Measured`."""
    last, best = [run["last"] for run in runs.values()], runs[published]["best"]
    scores, some = [row["val_top1"] for row in last], runs[published]
    half = interval(scores) if len(scores) > 1 else 0.0
    return {
        "split": "validation",
        "images": best["images"],
        "seeds": list(runs),
        "top1": round(mean(scores), 4),
        "top1_interval": round(half, 4),
        "top5": round(mean(row["val_top5"] for row in last), 4),
        "published_top1": round(best["val_top1"], 4),
        "published_top5": round(best["val_top5"], 4),
        "published_seed": published,
        "published_epoch": best["epoch"] + 1,
        "hardware": some["hardware"],
        "versions": some["versions"],
        "date": time.strftime("%Y-%m-%d"),
    }


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", help="a recipe in hub_configs")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)), help="default: 0 to 4")
    parser.add_argument("--output", type=Path, default=Path("output/zoo"), help="folder of the runs (default: output/zoo)")
    parser.add_argument("--data-dir", help="folder of the data, if the recipe does not name it")
    args = parser.parse_args(arguments)
    entry = zoo().get(args.name)
    try:
        if entry is None:
            raise UserError(f"name: expected any of {', '.join(zoo())}; got {args.name!r}{near_matches(args.name, zoo())}")
        if args.data_dir:
            entry = dataclasses.replace(entry, options=entry.options | {"data_dir": args.data_dir})
        published = int(entry.options["seed"])
        if published not in args.seeds:
            raise UserError(f"seeds: expected a list with the recipe's own seed, {published}; got {args.seeds}")
        runs = {seed: train(entry, seed, args.output) for seed in args.seeds}
    except UserError as error:
        return fail(str(error))
    if entry.about.weights is not None:
        shutil.copy(runs[published][0] / "model" / "model.safetensors", WEIGHTS_FOLDER / entry.about.weights)
    scores = {"metrics": measured({seed: metrics for seed, (_, metrics) in runs.items()}, published)}
    # The metrics are the last part of the file, so everything before them stays unchanged.
    text, _, _ = entry.recipe.read_text().partition("\n  metrics:")
    block = yaml.safe_dump(scores, sort_keys=False, width=120)
    entry.recipe.write_text(text + "\n" + "".join(f"  {line}\n" for line in block.splitlines()))
    print(block)
    return 0


if __name__ == "__main__":
    sys.exit(main())
