"""Compares our trainer without SFR with timm's own ``train.py``: the same command, several seeds each, the last top-1.

    python -m benchmarks.timm_agreement --train-py FILE --data-dir DIR

FILE is the ``train.py`` of timm's repository. DIR has train/CLASS and val/CLASS; the first images of each class are used. The two
draw other random numbers, so single runs differ; the intervals have to overlap.
"""

from __future__ import annotations

import argparse
import csv
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

from timm_sfr.cli.compare import half_interval
from timm_sfr.data.folders import is_hidden

COMMAND = shlex.split(
    "--model test_resnet --img-size 32 --batch-size 64 --epochs 12 --opt sgd --lr 0.1 --sched cosine --sched-on-updates "
    "--warmup-epochs 2 --weight-decay 0.0005 --smoothing 0.1 --scale 0.5 1 --color-jitter 0 --reprob 0.1 --train-split train "
    "--val-split val --workers 1 --device cpu --checkpoint-hist 1"
)
# The recipes that are compared: a name, and what is added to the command.
RECIPES = {
    "label smoothing": (),
    "BCE, mixup and CutMix": ("--bce-loss", "--mixup", "0.2", "--cutmix", "1"),
    "moving average": ("--model-ema", "--model-ema-decay", "0.98"),
    "AdamW, RandAugment, clipping": ("--opt", "adamw", "--lr", "0.005", "--aa", "rand-m5", "--clip-grad", "1"),
}


def subset(source: Path, place: Path, images: int) -> int:
    """Links the first `images` images of each class of both splits into `place`; returns the number of classes."""
    classes = sorted(one.name for one in (source / "train").iterdir() if one.is_dir() and not is_hidden(one.name))
    for split in ("train", "val"):
        for name in classes:
            folder = place / split / name
            folder.mkdir(parents=True)
            for image in sorted((source / split / name).iterdir())[:images]:
                (folder / image.name).symlink_to(image.resolve())
    return len(classes)


def last_top1(script: list[str], options: list[str], output: Path, column: str) -> float:
    """Runs a training and returns the last top-1 of its summary.csv."""
    command = [sys.executable, *script, *options, "--output", str(output), "--experiment", "run"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)}: {done.stderr.strip().splitlines()[-1:]}")
    with (output / "run" / "summary.csv").open(newline="") as file:
        return float(list(csv.DictReader(file))[-1][column])


def spread(values: list[float]) -> str:
    """Returns the mean and half the 95 % interval as text."""
    return f"{mean(values):.2f} ± {half_interval(values):.2f}"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status: 1 if some intervals do not overlap."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train-py", type=Path, required=True, help="timm's train.py")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with train/CLASS and val/CLASS")
    parser.add_argument("--images", type=int, default=100, help="images per class and split (default: 100)")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    args = parser.parse_args(arguments)
    apart = 0
    print("| recipe | timm's train.py | ours, --no-sfr | difference |\n|---|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "data"
        classes = subset(args.data_dir, data, args.images)
        for name in args.recipes:
            both: tuple[list[float], list[float]] = ([], [])
            for seed in args.seeds:
                options = [*COMMAND, *RECIPES[name], "--data-dir", str(data), "--num-classes", str(classes), "--seed", str(seed)]
                output = Path(place) / name / str(seed)
                both[0].append(last_top1([str(args.train_py)], options, output / "timm", "eval_top1"))
                ours = [*options, "--no-sfr", "--report-interval", "0"]
                both[1].append(last_top1(["-m", "timm_sfr.cli.main", "train"], ours, output / "ours", "val_top1"))
            gap = mean(both[1]) - mean(both[0])
            apart += abs(gap) > sum(half_interval(values) for values in both)
            print(f"| {name} | {spread(both[0])} | {spread(both[1])} | {gap:+.2f} |", flush=True)
    return 1 if apart else 0


if __name__ == "__main__":
    sys.exit(main())
