"""Measures the training time of each method relative to cross-entropy (`ce`), and writes it to a CSV.

    python -m benchmarks.timing --preset cpu --data-root DIR

In every round, each method trains a few batches between two turns of `ce`, all in this process. Its ratio is its time divided by
the mean of the two. Run nothing else on the machine. A noisy moment spoils one round, but not the median.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.accuracy import HERE, Cell, asked, commit, parts, positive, read
from benchmarks.presets import PRESETS
from timm_sfr.runs.records import versions

RESULTS = HERE / "results" / "timing.csv"
COLUMNS = ("preset", "set", "method", "ratio", "low", "high", "rounds", "batches", "ce_images_per_second",
           "hardware", "threads", "versions", "commit", "date")  # fmt: skip
SECOND = 1  # the timed epoch, from 0: from this epoch on, PS-KD makes its second pass


def seconds(trainer: Any) -> float:
    """Returns the time of one shortened epoch."""
    from benchmarks.measured import timed  # imported here because it imports this module, and torch

    return timed(partial(trainer.train_epoch, SECOND))


def ratios(times: dict[str, list[float]], around: dict[str, list[float]]) -> dict[str, tuple[float, float, float]]:
    """Returns the median and both quartiles, over the rounds, of each method's time divided by that of the `ce` around it.

    Args:
        times: Seconds by method, one number per round.
        around: The mean seconds of the `ce` before and after, by method, one number per round.
    """
    found = {}
    for method, taken in times.items():
        each = [a / b for a, b in zip(taken, around[method], strict=True)]
        low, _, high = quantiles(each, n=4, method="inclusive") if len(each) > 1 else (each[0],) * 3
        found[method] = (median(each), low, high)
    return found


def in_turns(
    base: Callable[[], float], others: dict[str, Callable[[], float]], rounds: int, what: str
) -> tuple[dict[str, list[float]], dict[str, list[float]], list[float]]:
    """Measures in turns (A B A B): each of `others` between two of `base`.

    Args:
        base: Does its work once and returns the seconds.
        others: The functions to compare with it, by name.
        rounds: Number of rounds.
        what: The name in the progress lines.

    Returns:
        The seconds by name, the mean seconds of the base before and after by name, and the seconds of the base.
    """
    times: dict[str, list[float]] = {name: [] for name in others}
    around: dict[str, list[float]] = {name: [] for name in others}
    own: list[float] = []
    for turn in range(rounds):
        before = base()
        for name, work in others.items():
            times[name].append(work())
            after = base()
            around[name].append((before + after) / 2)
            own.append(after)
            before = after
        print(f"{what}: round {turn + 1} of {rounds}", flush=True)
    return times, around, own


def measure(
    preset: str, name: str, methods: list[str], root: Path, threads: int, rounds: int, batches: int
) -> list[dict[str, Any]]:
    """Times the methods on one set; returns the rows of the CSV."""
    from timm_sfr.training.run import prepare

    started_from = commit()
    with contextlib.ExitStack() as stack:
        trainers = {}
        for method in dict.fromkeys(["ce", *methods]):
            output = stack.enter_context(tempfile.TemporaryDirectory())
            with contextlib.redirect_stdout(io.StringIO()):
                cell = Cell(preset, name, method, 0, "val", PRESETS[preset][name].epochs)
                config, make, data = parts(cell, root, threads, output, batches)
                trainers[method] = prepare(config, task=make, data=data)
        for trainer in trainers.values():
            for epoch in range(SECOND + 1):
                trainer.train_epoch(epoch)
        turns = {method: partial(seconds, trainer) for method, trainer in trainers.items()}
        times, around, base = in_turns(turns.pop("ce"), turns, rounds, name)
        facts = trainers["ce"].recorder.facts
    rate = batches * PRESETS[preset][name].batch / median(base)
    return [
        {
            "preset": preset, "set": name, "method": method, "ratio": f"{middle:.4f}", "low": f"{low:.4f}",
            "high": f"{high:.4f}", "rounds": rounds, "batches": batches, "ce_images_per_second": f"{rate:.0f}",
            "hardware": facts["hardware"], "threads": threads, "versions": json.dumps(versions()),
            "commit": started_from, "date": time.strftime("%Y-%m-%d"),
        }
        for method, (middle, low, high) in ratios(times, around).items()
    ]  # fmt: skip


def merge(path: Path, rows: list[dict[str, Any]]) -> None:
    """Adds rows to the CSV, where they replace rows of the same set and method."""
    fresh = {(row["preset"], row["set"], row["method"]): row for row in rows}
    kept = {(row["preset"], row["set"], row["method"]): row for row in read(path)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({**kept, **fresh}.values())


def main(arguments: list[str] | None = None) -> int:
    """Times the requested methods; returns the exit status."""
    from timm_sfr.cli.parser import fail
    from timm_sfr.utils.errors import UserError

    parser = argparse.ArgumentParser(prog="python -m benchmarks.timing", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--data-root", type=Path, required=True, help="folder with NAME/{train,val}/CLASS/*.jpg")
    parser.add_argument("--sets", nargs="+", help="sets of the preset (default: the first one)")
    parser.add_argument("--methods", nargs="+", help="methods (default: all)")
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--batches", type=positive, default=16, help="batches per turn")
    parser.add_argument("--threads", type=positive, default=1 if (os.cpu_count() or 1) < 8 else 8)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    try:
        sets, methods = asked(args)
        if set(methods) == {"ce"}:
            raise UserError("methods: expected a method to compare with ce; got only ce")
        for name in sets if args.sets else sets[:1]:
            rows = measure(args.preset, name, methods, args.data_root, args.threads, args.rounds, args.batches)
            merge(args.csv, rows)
            for row in rows:
                print(f"{name} {row['method']}: {row['ratio']} x ce ({row['low']} to {row['high']})", flush=True)
    except UserError as error:
        return fail(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
