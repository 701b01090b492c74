"""Kills runs at random instants, resumes them, and compares the results bit by bit with a run that was not killed.

    python -m benchmarks.faults --kills 50

The runs train on the digits. They use everything that draws random numbers (mixup, CutMix, random augmentation in a worker
process, erasing, stochastic depth), gradient accumulation, an average of the weights and dynamic smoothing. Each run is killed
(SIGKILL) at a random instant; every fifth run while it writes a checkpoint. It is then resumed, and perhaps killed again, until
it ends.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy import HERE, positive
from timm_sfr.runs.checkpoints import checkpoints, load_checkpoint

EVERYTHING = ("--mixup", "0.2", "--cutmix", "1", "--model-ema", "--model-ema-decay", "0.9", "--grad-accum-steps", "2",
              "--clip-grad", "1", "--aa", "rand-m5", "--reprob", "0.2", "--drop-path", "0.1", "-j", "1", "--epochs", "3",
              "--sfr-channels", "projection", "--sfr-smoothing-source", "classes", "--batch-size", "64", "--img-size", "16",
              "--checkpoint-interval", "3")  # fmt: skip
CLOCKS = ("seconds",)


def start(output: Path, name: str) -> subprocess.Popen:
    """Starts a process that trains the run `name`, or resumes it if it exists."""
    command = [
        sys.executable,
        str(HERE.parent / "train_sfr.py"),
        *EVERYTHING,
        "--resume",
        "auto",
        "--output",
        str(output),
    ]
    with (output / f"{name}.log").open("a") as log:
        return subprocess.Popen(
            [*command, "--experiment", name], stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )


def wait_for_write(process: subprocess.Popen, folder: Path, after: float) -> bool:
    """Waits until a checkpoint is being written after the instant `after`; returns False if the process ends before that."""
    while process.poll() is None:
        if time.monotonic() >= after and any(folder.glob(".epoch-*")):
            return True
        time.sleep(0.0005)
    return False


def trial(number: int, output: Path, length: float, ready: float, draw: random.Random) -> tuple[list[float], int, list[str]]:
    """Trains one run, killed and resumed until it ends.

    Returns:
        The seconds until each kill, the number of kills during a write, and what differs from the whole run.
    """
    name, lived, writes = f"trial-{number}", [], 0
    while True:
        process, began = start(output, name), time.monotonic()
        if not lived or (len(lived) < 3 and draw.random() < 0.3):
            instant = began + draw.uniform(0.8 * ready, length)
            if number % 5 == 0:
                writes += wait_for_write(process, output / name / "checkpoints", instant)
            else:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(instant - time.monotonic())
            if process.poll() is None:
                process.kill()
                process.wait()
                lived.append(time.monotonic() - began)
                continue
        process.wait()
        wrong = differences(output / "whole", output / name) if process.returncode == 0 else [f"status {process.returncode}"]
        return lived, writes, wrong


def differences(one: Path, other: Path) -> list[str]:
    """Returns the names of what differs between two finished runs, except clocks; empty if all bits are the same."""
    found = []
    states = [load_checkpoint(checkpoints(run / "checkpoints")[-1]) for run in (one, other)]
    for name in states[0]:
        if name not in CLOCKS and not same(states[0][name], states[1][name]):
            found.append(name)
    tables = [[{k: v for k, v in row.items() if k != "images_per_second"} for row in read(run)] for run in (one, other)]
    if tables[0] != tables[1]:
        found.append("summary.csv")
    if (one / "model/model.safetensors").read_bytes() != (other / "model/model.safetensors").read_bytes():
        found.append("model.safetensors")
    return found


def read(run: Path) -> list[dict[str, str]]:
    """Returns the rows of a run's summary.csv."""
    with (run / "summary.csv").open() as file:
        return list(csv.DictReader(file))


def same(one: Any, other: Any) -> bool:
    """Returns whether two states are equal bit by bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def main(arguments: list[str] | None = None) -> int:
    """Runs the trials; returns 1 if a run did not end with the same bits, otherwise 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=positive, default=50, help="number of runs, each killed at least once")
    parser.add_argument("--jobs", type=positive, default=2, help="runs at the same time")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random instants")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(args.jobs) as pool:
        output, began = Path(place), time.monotonic()
        whole = start(output, "whole")
        while whole.poll() is None and not (output / "whole" / "args.yaml").exists():
            time.sleep(0.05)
        ready = time.monotonic() - began
        if whole.wait() != 0:
            print((output / "whole.log").read_text(), file=sys.stderr)
            return 1
        length = time.monotonic() - began
        print(f"a whole run takes {length:.1f} s; training begins after {ready:.1f} s\n", flush=True)
        print("| trial | killed after, s | while it wrote | same bits |\n|---|---|---:|---|", flush=True)
        jobs = [(number, output, length, ready, random.Random(args.seed * 1000 + number)) for number in range(args.kills)]
        bad = kills = writes = 0
        for number, (lived, written, wrong) in enumerate(pool.map(lambda job: trial(*job), jobs), 1):
            bad, kills, writes = bad + bool(wrong), kills + len(lived), writes + written
            instants = ", ".join(f"{instant:.1f}" for instant in lived) or "ended before"
            print(f"| {number} | {instants} | {written} | {', '.join(wrong) or 'yes'} |", flush=True)
    print(f"\n{args.kills - bad} of {args.kills} runs ended with the same bits; {kills} kills, {writes} of them in a write")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
