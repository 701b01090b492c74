"""Compares SFR with its teacher-free peers on the same data, schedule and number of epochs.

    python -m benchmarks.accuracy --preset cpu --data-root DIR --jobs 2

Each run adds one row to a CSV. A run (set, method, seed, epochs, split) that is already in the CSV is skipped, and one that was
stopped goes on after its last epoch.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.presets import PRESETS, SOURCES, Set
from timm_sfr.runs.records import versions

if TYPE_CHECKING:
    from timm_sfr.config import RunConfig
    from timm_sfr.training.run import Data, TaskMaker

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "accuracy.csv"
HELD_OUT = HERE / "results" / "heldout.csv"
COLUMNS = (
    "preset", "set", "method", "seed", "split", "epochs", "top1", "top5", "nll", "ece", "best_top1", "best_epoch",
    "train_seconds", "extra_parameters", "images", "model", "pixels", "hardware", "versions", "commit", "date", "args",
)  # fmt: skip


UNFINISHED = HERE / "results" / "unfinished"  # the folders of runs whose process has ended early
# Peers with more state than weights, which a checkpoint lacks: their runs start anew.
FORGETFUL = ("dlb", "pskd")
# The split that is scored, and the part of the training images that is used.
SPLITS = {"val": 1, "val-part2": 2, "heldout": 1}


@dataclass(frozen=True)
class Cell:
    """One run of the comparison; `split` is one of `SPLITS`."""

    preset: str
    set: str
    method: str
    seed: int
    split: str
    epochs: int

    @property
    def data(self) -> Set:
        """The image set of the run."""
        return PRESETS[self.preset][self.set]

    def weights(self, output: str) -> Path:
        """Returns the file for pretrained weights, in the folder `output`."""
        return Path(output) / f"{self.data.source}.safetensors"

    def options(self, output: str = "") -> dict[str, Any]:
        """Returns the run's options, by their names in `train_sfr.py`; pretrained weights are a file in `output`."""
        data = self.data
        net = dict(data.net)
        if data.source is not None:
            net["pretrained_cfg_overlay"] = {"file": str(self.weights(output))}
        return {
            "data_dir": data.name, "model": data.model, "img_size": data.pixels, "batch_size": data.batch, "workers": 0,
            "epochs": self.epochs, "lr": data.lr, "weight_decay": 5e-4, "opt": "sgd", "sched": "cosine",
            "opt_kwargs": {"nesterov": True}, "seed": self.seed, "mixed_precision": data.precision,
            "channels_last": True, "model_kwargs": net or None, "pretrained": data.source is not None,
            "val_interval": data.val_interval, "checkpoint_hist": 1, "report_interval": 0, "output": output, "experiment": "run",
            **dict(data.more),
        }  # fmt: skip

    def recorded(self) -> dict[str, Any]:
        """Returns everything that determines the run: its options and its method's options, with all defaults."""
        from benchmarks.methods import find

        options = {key: value for key, value in self.options().items() if key != "output"}
        return json.loads(json.dumps(options | find(self.method).recorded()))


def parts(cell: Cell, root: Path, threads: int, output: str, limit: int | None = None) -> tuple[RunConfig, TaskMaker, Data]:
    """Returns the options, the task and the data of one cell; `limit` is the largest number of batches per epoch."""
    import torch

    from benchmarks.images import DeviceBatches, open_sets, val_batches
    from benchmarks.methods import COMPANIONS, find
    from timm_sfr.config import RunConfig
    from timm_sfr.training.run import Data

    torch.set_num_threads(threads)
    data, make = cell.data, find(cell.method)
    if data.source is not None:
        SOURCES[data.source](cell.weights(output))
    splits = open_sets(root, data.name, data.pixels, data.per_class, cell.split == "heldout", SPLITS[cell.split])
    batches = partial(DeviceBatches, companions=COMPANIONS.get(cell.method.partition(":")[0]), limit=limit)
    return RunConfig.from_flat(cell.options(output)), make, Data(*splits, batches, val_batches)


def run(cell: Cell, root: Path, threads: int, limit: int | None = None, unfinished: Path | None = None) -> dict[str, Any]:
    """Trains one cell with at most `limit` batches per epoch; returns its row of the CSV.

    If its process ends early, the next call with the same `unfinished` folder and commit goes on after its last checkpoint.
    """
    from timm_sfr.runs.checkpoints import checkpoints
    from timm_sfr.runs.records import read_summary
    from timm_sfr.training.run import fit

    started_from = commit()
    with _folder(unfinished, cell, started_from, limit) as output:
        config, make, data = parts(cell, root, threads, output, limit)
        trained = []  # the task, whose module has the parameters that are trained beside the model's

        def task(*arguments: Any) -> Any:
            trained.append(make(*arguments))
            return trained[0]

        begun = Path(output, "run")
        if not checkpoints(begun / "checkpoints"):
            shutil.rmtree(begun, ignore_errors=True)  # it has not finished an epoch
        folder = fit(config, begun if begun.is_dir() else None, task=task, data=data)
        found = json.loads((folder / "metrics.json").read_text())
        rows = read_summary(folder / "summary.csv", cell.epochs)
    batch = cell.data.batch
    images = min(len(data.train.dataset) // batch, limit or len(data.train.dataset)) * batch
    last, best = found["last"], found["best"]
    return {
        **dataclasses.asdict(cell),
        "top1": last["val_top1"], "top5": last["val_top5"], "nll": last["val_loss"], "ece": last["ece"],
        "best_top1": best["val_top1"], "best_epoch": best["epoch"] + 1,
        "train_seconds": sum(images / float(row["images_per_second"]) for row in rows),
        "extra_parameters": sum(p.numel() for p in trained[0].trainable_module.parameters()) - found["parameters"],
        "images": images, "model": cell.data.model, "pixels": cell.data.pixels, "hardware": found["hardware"],
        "versions": json.dumps(versions()), "commit": started_from, "date": time.strftime("%Y-%m-%d"),
        "args": json.dumps(cell.recorded() | {"threads": threads}),
    }  # fmt: skip


@contextlib.contextmanager
def _folder(unfinished: Path | None, cell: Cell, started_from: str, limit: int | None) -> Iterator[str]:
    """A context with the folder of the cell's run; it is kept if the run ends early and can go on.

    Its name says what the run is of, so that only the same run goes on: the commit and what differs from it, the cell, a trial's
    length.
    """
    if unfinished is None or cell.method.partition(":")[0] in FORGETFUL:
        with tempfile.TemporaryDirectory() as place:
            yield place
        return
    own = () if limit is None else (f"limit{limit}",)
    kept = unfinished / "-".join(map(str, (started_from + _differs(), *dataclasses.astuple(cell), *own)))
    kept.mkdir(parents=True, exist_ok=True)
    yield str(kept)
    shutil.rmtree(kept)


def _differs() -> str:
    """Returns a checksum of the code's differences from the last commit; an empty string without any."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        found = subprocess.run(["git", "diff", "HEAD", "--", "*.py"], cwd=HERE.parent, capture_output=True, check=True).stdout
        return f"{zlib.crc32(found):08x}" if found else ""
    return ""


def commit() -> str:
    """Returns the last commit of this code, with a + if files differ from it; an empty string if there is no repository."""
    try:
        git = partial(subprocess.run, cwd=HERE.parent, capture_output=True, text=True, check=True)
        name = git(["git", "log", "-1", "--format=%h", "--", "*.py"]).stdout.strip()
        return name + ("+" if git(["git", "status", "--porcelain", "--", "*.py"]).stdout else "")
    except (OSError, subprocess.CalledProcessError, TypeError):
        return ""


def read(path: Path) -> list[dict[str, str]]:
    """Returns the rows of a CSV; an empty list if the file does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: dict[str, Any]) -> None:
    """Adds one row and flushes it to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not file.tell():
            writer.writeheader()
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        file.flush()
        os.fsync(file.fileno())


def check_csv(path: Path) -> None:
    """Checks before any run that rows can be added to the file.

    Raises:
        UserError: if it cannot be written, or has other columns.
    """
    from timm_sfr.utils.errors import UserError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+", newline="") as file:
            file.seek(0)
            found = next(csv.reader(file), None)
    except OSError as error:
        raise UserError(f"csv: cannot write to {path}: {error.strerror}") from error
    if found is not None and tuple(found) != COLUMNS:
        raise UserError(f"csv: {path} has other columns than this benchmark writes; give another file")


def positive(text: str) -> int:
    """Parses a positive whole number, for argparse."""
    number = int(text) if text.strip().lstrip("-").isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up; got {text}")
    return number


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--data-root", type=Path, required=True, help="folder with NAME/{train,val}/CLASS/*.jpg")
    parser.add_argument("--sets", nargs="+", help="sets of the preset (default: all)")
    parser.add_argument("--methods", nargs="+", help="methods, or sfr:OPTION=VALUE,... (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 to 4; with --heldout 100 to 104")
    parser.add_argument("--epochs", type=positive, help="epochs (default: the set's), for a trial or a comparison at equal time")
    parser.add_argument("--heldout", action="store_true", help="score on a held-out tenth of train, to choose options")
    parser.add_argument("--part", type=int, choices=(1, 2), default=1, help="2: train on the next images of each class, the "
                        "same number; no option was chosen on them")  # fmt: skip
    parser.add_argument("--jobs", type=positive, default=2, help="runs at the same time")
    parser.add_argument("--minutes", type=float, help="start no new run after this many minutes; running ones end")
    parser.add_argument("--limit", type=positive, help="batches per epoch, for a trial; needs another --csv")
    parser.add_argument("--unfinished", type=Path, default=UNFINISHED, help="folder of the runs that were stopped; the same "
                        "command at the same commit goes on from their checkpoints (default: results/unfinished)")  # fmt: skip
    parser.add_argument("--csv", type=Path, help=f"default: {RESULTS.name}, or {HELD_OUT.name}, in {HERE.name}/results")
    args = parser.parse_args(arguments)
    if args.heldout and args.part == 2:
        parser.error("--part 2 is scored on val only; omit --heldout")
    args.csv = args.csv or (HELD_OUT if args.heldout else RESULTS)
    return args


def asked(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Returns the requested sets and methods; by default all sets of the preset and all methods.

    Raises:
        UserError: for an unknown name.
    """
    from benchmarks.methods import METHODS, find
    from timm_sfr.utils.errors import UserError, near_matches

    sets = args.sets or list(PRESETS[args.preset])
    methods = args.methods or list(METHODS)
    for name in sets:
        if name not in PRESETS[args.preset]:
            hint = near_matches(name, PRESETS[args.preset])
            raise UserError(f"sets: expected any of {', '.join(PRESETS[args.preset])}; got {name!r}{hint}")
    for name in methods:
        find(name)
    return sets, methods


def missing(args: argparse.Namespace) -> list[Cell]:
    """Returns the requested cells that are not in the CSV. All cells of a seed come before the next seed."""
    sets, methods = asked(args)
    rows = read(args.csv)
    for row in rows:
        _same_options(row, args.csv)
    done = {tuple(row[field.name] for field in dataclasses.fields(Cell)) for row in rows}
    split = "heldout" if args.heldout else "val" if args.part == 1 else "val-part2"
    cells = [
        Cell(args.preset, name, method, seed, split, args.epochs or PRESETS[args.preset][name].epochs)
        # Options are chosen with other seeds than the reported ones, because both train on the same images.
        for seed in args.seeds or (range(100, 105) if args.heldout else range(5))
        for name in sets
        for method in methods
    ]
    return [cell for cell in dict.fromkeys(cells) if tuple(map(str, dataclasses.astuple(cell))) not in done]


def _same_options(row: dict[str, str], path: Path) -> None:
    """Raises UserError if a row's set or method now has other options, for example because a default has changed."""
    from timm_sfr.utils.errors import UserError

    if row["set"] not in PRESETS.get(row["preset"], {}):
        return  # this set no longer exists
    cell = Cell(row["preset"], row["set"], row["method"], int(row["seed"]), row["split"], int(row["epochs"]))
    before, now = (_flat(options) for options in (json.loads(row["args"] or "{}"), cell.recorded()))
    # Options added since then were not recorded; they do not make a row invalid.
    changed = sorted(key for key in before.keys() & now.keys() if before[key] != now[key])
    if changed:
        raise UserError(
            f"csv: {path} holds {row['method']!r} on {row['set']} with other values of {', '.join(changed)} than these names "
            "have now; move those rows to another file, or rename them to METHOD:OPTION=VALUE,..."
        )


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    parts = {kind: options.get(kind) or {} for kind in ("sfr", "peer")}
    rest = {key: value for key, value in options.items() if key not in parts}
    return rest | {f"{kind}.{key}": value for kind, part in parts.items() for key, value in part.items()}


def main(arguments: list[str] | None = None) -> int:
    """Runs the missing cells; returns the exit status."""
    from benchmarks.images import decode
    from benchmarks.pool import side_by_side
    from timm_sfr.cli.parser import fail
    from timm_sfr.utils.errors import UserError

    args = parse(arguments)
    try:
        if args.limit is not None and args.csv.resolve() in (RESULTS, HELD_OUT):
            raise UserError("limit: a trial's scores do not belong in the results; name a --csv of its own")
        check_csv(args.csv)
        cells = missing(args)
        for name, pixels in sorted({(cell.data.name, cell.data.pixels) for cell in cells}):
            for part in ("train", "val"):  # before the runs, which would all do it
                decode(args.data_root, name, part, pixels)
    except UserError as error:
        return fail(str(error))
    print(f"{len(cells)} runs to do", flush=True)
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    started, failed = time.monotonic(), 0

    def due() -> Iterator[Cell]:
        for cell in cells:
            if args.minutes is not None and time.monotonic() - started > 60 * args.minutes:
                return
            yield cell

    for cell, row in side_by_side(run, due(), args.jobs, args.data_root, threads, args.limit, args.unfinished):
        name = f"{cell.set} {cell.method} seed {cell.seed}"
        if isinstance(row, str):
            failed += 1
            print(f"{name}: failed: {row}", flush=True)
        else:
            append(args.csv, row)
            print(f"{name}: top-1 {row['top1']:.2f}, {row['train_seconds']:.0f} s", flush=True)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
