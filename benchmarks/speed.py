"""Measures what SFR costs on this machine: the time and memory of a step, the trainer's loop, the loader, and more.

    python -m benchmarks.speed

It writes results/speed.csv and the tables of docs/performance.md. A ratio is the median of rounds in which both sides take turns
(A B A B) in one process. Peak memory is measured in a separate process for each side. Run nothing else on the machine. If it has
a GPU, the steps run on the GPU.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import torch

from benchmarks import loops, steps
from benchmarks.accuracy import HERE, commit, positive, read
from benchmarks.measured import Row
from benchmarks.pages import fill, markdown
from timm_sfr.cli.parser import fail
from timm_sfr.runs.records import hardware, versions
from timm_sfr.utils.errors import UserError

RESULTS = HERE / "results" / "speed.csv"
DOCUMENT = HERE.parent / "docs" / "performance.md"
ABOUT = ("hardware", "threads", "versions", "commit", "date")


def merge(path: Path, rows: list[Row], about: dict[str, str], some: bool = False) -> list[dict[str, str]]:
    """Adds rows to the CSV, where they replace all rows of the same parts and machine; returns all rows.

    With `some`, which are not all of a part, they replace only the rows of the same measurements.
    """
    fresh = [{**{name: str(value) for name, value in asdict(row).items()}, **about} for row in rows]
    parts, again, known = {row.part for row in rows}, {(row.part, row.what) for row in rows}, read(path)
    if known and "part" not in known[0]:
        raise UserError(
            f"csv: expected {str(path)!r} to be of this benchmark; got columns {list(known[0])[:4]}; give another file"
        )
    kept = [
        row
        for row in known
        if row["hardware"] != about["hardware"] or ((row["part"], row["what"]) not in again if some else row["part"] not in parts)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*(one.name for one in fields(Row)), *ABOUT])
        writer.writeheader()
        writer.writerows([*kept, *fresh])
    return [*kept, *fresh]


def verdict(row: dict[str, str]) -> str:
    """Returns the target in words and whether it is met; an empty string without a target."""
    if row["target"] in ("", "None"):
        return ""
    value, target, floor = float(row["value"]), float(row["target"]), row["at_least"] == "True"
    met = value >= target if floor else value <= target
    return f"{'at least' if floor else 'at most'} {target:g}: {'met' if met else '**missed**'}"


def write_page(rows: list[dict[str, str]], document: Path) -> None:
    """Updates the tables of the document."""
    text = document.read_text()
    for part in dict.fromkeys(row["part"] for row in rows):
        chosen = [row for row in rows if row["part"] == part]
        table = [
            [row["what"], f"{float(row['value']):.3g}", f"{float(row['low']):.3g} to {float(row['high']):.3g}",
             verdict(row), row["note"]]
            for row in chosen
        ]  # fmt: skip
        header = ["what", "median", "quartiles", "target", "seen"]
        if part == "profile":
            table, header = [[line[0], line[1], line[4]] for line in table], ["operation", "ms more a step", "seen"]
        text = fill(text, f"speed-{part}", f"{markdown(header, table)}\n{_measured_on(chosen)}\n")
    document.write_text(text)


def _measured_on(rows: list[dict[str, str]]) -> str:
    """Returns the machines, versions and dates of the rows in words."""
    return "; ".join(
        dict.fromkeys(
            f"{row['hardware']}, {row['threads']} threads, torch {found['torch']}, timm {found['timm']}, {row['date']}"
            for row in rows
            for found in [json.loads(row["versions"])]
        )
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=(__doc__ or "").splitlines()[0])
    names = ("step", "memory", "graph", "profile", "loop", "loader", "growth", "processes")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, help="parts to measure (default: all)")
    parser.add_argument("--rounds", type=positive, default=15)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of one turn of steps")
    parser.add_argument("--threads", type=positive, default=os.cpu_count() or 1)
    parser.add_argument("--models", nargs="+", help="measure only the steps of these models")
    parser.add_argument("--data-dir", type=Path, help="folder with {train,val}/CLASS/*.jpg for the loader (default: noise)")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = steps.GPU if device.type == "cuda" else steps.CPU
    settings = tuple(one for one in known if not args.models or one.model in args.models)
    if not settings:
        return fail(f"models: expected any of {sorted({one.model for one in known})}; got {args.models}")

    def loader() -> list[Row]:
        with loops.small_images(args.data_dir) as folder:
            return loops.loader_rows(folder, min(args.rounds, 5))

    parts: dict[str, Callable[[], list[Row]]] = {
        "step": lambda: steps.step_rows(settings, device, args.rounds, args.seconds),
        "memory": lambda: steps.memory_rows(settings, device, min(args.rounds, 5)),
        "graph": lambda: steps.graph_rows(settings),
        "profile": lambda: [row for one in settings for row in steps.profile_rows(one, device)],
        "loop": lambda: loops.loop_rows(args.rounds),
        "loader": loader,
        "growth": loops.growth_rows,
        "processes": lambda: loops.process_rows(min(args.rounds, 7)),
    }
    about = {"hardware": hardware(device, 1), "threads": str(args.threads),
             "versions": json.dumps(versions()), "commit": commit(), "date": time.strftime("%Y-%m-%d")}  # fmt: skip
    try:
        merge(args.csv, [], about)  # fails before the measurements if the file cannot be used
        for name in args.parts:
            rows = merge(args.csv, parts[name](), about, args.models is not None)
            if args.document.is_file():
                write_page(rows, args.document)
    except (UserError, OSError) as error:
        return fail(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
