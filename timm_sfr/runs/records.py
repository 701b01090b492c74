"""The records of a run: the terms of the loss, the log line of an epoch, summary.csv, args.yaml, metrics.json."""

from __future__ import annotations

import csv
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import accelerate
import huggingface_hub
import safetensors
import timm
import torch
import yaml

from timm_sfr.runs.scores import CLASSIFICATION, MULTILABEL, PERCENT, metrics_of, recorded_scores, task_of
from timm_sfr.utils.console import counted
from timm_sfr.utils.errors import UserError, near_paths
from timm_sfr.utils.files import read_yaml, replace_atomically, write_whole
from timm_sfr.version import __version__


@dataclass(frozen=True)
class Term:
    """A term of the loss, as the task returns it and summary.csv logs it."""

    name: str  # its key in the task's result
    title: str = ""  # in curves; empty if it is not drawn
    loss: bool = False  # whether it is a loss, which must stay finite, and not a weight
    parts: tuple[str, ...] = ()  # the parts of a run that have it, any of "teacher" and "jsd"; empty if every run has it


# loss = task_loss + sfr_weight * sfr_loss. With a teacher, task_loss = cls_weight * cls_loss + kd_weight * kd_loss; with the
# JSD of views, task_loss = cls_loss + jsd_weight * jsd_loss.
# Mid-epoch checkpoints store sums in this order.
TERMS = (
    Term("loss", "training loss", loss=True),
    Term("task_loss", "task term of the training loss", loss=True),
    Term("sfr_loss", "feature loss, raw", loss=True),
    Term("sfr_weight", "weight λ of the feature loss"),
    Term("smoothing", "smoothing ε"),
    Term("cls_loss", "classification loss, raw", loss=True, parts=("teacher", "jsd")),
    Term("cls_weight", parts=("teacher",)),
    Term("kd_loss", "distillation loss, raw", loss=True, parts=("teacher",)),
    Term("kd_weight", parts=("teacher",)),
    Term("jsd_loss", "Jensen-Shannon divergence of the views, raw", loss=True, parts=("jsd",)),
    Term("jsd_weight", parts=("jsd",)),
)


def term_names(teacher: bool, jsd: bool = False) -> tuple[str, ...]:
    """Returns the names of the loss's terms, in the order of `TERMS`: of a run with a teacher, with the JSD of views."""
    has = {part for part, there in (("teacher", teacher), ("jsd", jsd)) if there}
    return tuple(term.name for term in TERMS if not term.parts or has & set(term.parts))


def columns(teacher: bool, jsd: bool = False, sized: bool = False, task: str = CLASSIFICATION) -> tuple[str, ...]:
    """Returns the columns of summary.csv; with `sized`, for training images whose size changes, also their mean size."""
    always = [term.name for term in TERMS if not term.parts]
    further = [name for name in term_names(teacher, jsd) if name not in always]
    return (
        "epoch", "lr", "train_loss", "task_loss", *further, *always[2:], "val_loss",
        *(f"val_{name}" for name in PERCENT[task]), "images_per_second",
        *(["train_img_size"] if sized else []),
    )  # fmt: skip


def epoch_row(
    epoch: int, lr: float, train: dict[str, float], val: dict[str, float] | None, task: str = CLASSIFICATION
) -> dict[str, Any]:
    """Returns a row of summary.csv; losses are means over the epoch's images, and `TERMS` says how they add up."""
    row = {"epoch": epoch, "lr": lr, "train_loss": train["loss"], **train}
    for name in metrics_of(task):
        row[f"val_{name}"] = val[name] if val else ""
    return {name: row[name] for name in columns(*_parts([row]))}


def log_line(row: dict[str, Any], epochs: int, shown: Sequence[str] = PERCENT[CLASSIFICATION]) -> str:
    """Returns the log line of an epoch, with the scores `shown` in percent."""
    parts = [f"epoch {row['epoch'] + 1}/{epochs}", f"lr {row['lr']:.3g}", f"loss {row['train_loss']:.4f}"]
    terms = []
    if "kd_loss" in row:
        terms += [f"{row[f'{name}_weight']:.3g} x {name} {row[f'{name}_loss']:.4f}" for name in ("cls", "kd")]
    elif "jsd_loss" in row:
        terms += [f"cls {row['cls_loss']:.4f}", f"{row['jsd_weight']:.3g} x jsd {row['jsd_loss']:.4f}"]
    if row["sfr_weight"]:
        terms = terms or [f"task {row['task_loss']:.4f}"]
        terms.append(f"{row['sfr_weight']:.3g} x sfr {row['sfr_loss']:.4f}")
    if terms:
        parts.append("= " + " + ".join(terms))
    if row["val_loss"] != "":
        parts.append(f"| val loss {row['val_loss']:.4f}")
        parts += [f"{name} {row[f'val_{name}']:.2f}" for name in shown]
    if row.get("train_img_size"):
        parts.append(f"| {row['train_img_size']:.0f} px")
    return " ".join([*parts, f"| {row['images_per_second']:.0f} images/s"])


def write_summary(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes summary.csv atomically, numbers with 8 significant digits."""

    def write(fresh: Path) -> None:
        with fresh.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns(*_parts(rows)), restval="")
            writer.writeheader()
            for row in rows:
                writer.writerow({k: f"{v:.8g}" if isinstance(v, float) else v for k, v in row.items()})

    replace_atomically(path, write)


def read_summary(path: Path, epochs: int) -> list[dict[str, Any]]:
    """Returns the rows of the first `epochs` epochs of a summary.csv; an empty list if the file does not exist.

    Raises UserError if the file is not a valid summary.csv.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["epoch"]) < epochs]
    except (KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
        raise UserError(f"run: {str(path)!r} is not what the run wrote: {error!r}; move it away to resume without it") from error
    if any(set(row) != set(columns(*_parts([row]))) for row in rows):
        raise UserError(
            f"run: expected the columns {', '.join(columns(False))} in {str(path)!r}; move it away to resume without it"
        )
    return rows


def _parts(rows: list[dict[str, Any]]) -> tuple[bool, bool, bool, str]:
    """Returns the arguments of `columns` for rows: what terms and sizes any of them has, and the task."""
    teacher, jsd, sized, multilabel = (
        any(name in row for row in rows) for name in ("kd_loss", "jsd_loss", "train_img_size", "val_map")
    )
    return teacher, jsd, sized, MULTILABEL if multilabel else CLASSIFICATION


def write_args(path: Path, values: dict[str, Any]) -> None:
    """Writes args.yaml, which ``--config`` reads back."""
    write_whole(path, yaml.safe_dump(values, sort_keys=False))


def versions() -> dict[str, str]:
    """Returns the versions of Python and of all packages that can affect results."""
    modules = (timm, torch, accelerate, safetensors, huggingface_hub)
    found = {module.__name__: str(module.__version__) for module in modules}
    return {"timm_sfr": __version__, "python": platform.python_version(), "POT": metadata.version("POT"), **found}


def run_folder(model: str | Path) -> Path | None:
    """Returns the folder of the run whose model `model` names, as its own folder or its model's; None if it is no run's."""
    path = Path(os.path.expanduser(str(model).removeprefix("local-dir:")))
    places = (path, path.absolute().parent) if path.name == "model" else (path,)
    return next((place for place in places if (place / "args.yaml").is_file()), None)


def recorded(model: str | Path, names: Sequence[str]) -> dict[str, Any]:
    """Returns those of the options `names` that the args.yaml of a model's run has; nothing if the model is no run's."""
    folder = run_folder(model)
    if folder is None:
        return {}
    return {name: value for name, value in read_yaml(folder / "args.yaml").items() if name in names}


def validated(rows: Sequence[dict[str, Any]]) -> int:
    """Returns how many epochs of a summary.csv were validated."""
    return sum(row.get("val_loss") not in ("", None) for row in rows)


def taught_itself(metrics: dict[str, Any], options: dict[str, Any]) -> bool:
    """Whether a run's deep features taught its shallow ones as its options say: with SFR, lambda and no loss of its own."""
    return bool(metrics.get("sfr") and options.get("sfr_weight", 1) and not metrics.get("custom_task"))


def hardware(device: torch.device, processes: int) -> str:
    """Returns a description of the device and the number of processes."""
    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(device)}"
    return f"{device.type}, {counted(os.cpu_count() or 1, 'core')}, {counted(processes, 'process')}"


@dataclass(frozen=True)
class Run:
    """The contents of a run's folder."""

    path: Path
    options: dict[str, Any]  # args.yaml
    metrics: dict[str, Any]  # metrics.json
    rows: list[dict[str, Any]]  # summary.csv

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.options.get("seed", 0))

    @property
    def task(self) -> str:
        """What the run has trained: one class an image, or any number."""
        return task_of(self.options)

    @property
    def missing_epochs(self) -> tuple[int, int] | None:
        """The epochs that are done and those that were asked for, of a run that has neither reached its end nor stopped early."""
        epochs = self.metrics["epochs"]
        last = self.rows[-1]["epoch"] if self.rows else self.metrics["last"]["epoch"]
        done, asked = int(last) + 1, min(epochs, self.options.get("stop_epoch") or epochs)
        return (done, asked) if done < asked and not self.metrics.get("stopped_early") else None

    @property
    def test(self) -> dict[str, Any] | None:
        """The scores on the test split; None if it was not scored."""
        return self.metrics.get("test")

    def score(self, name: str) -> float:
        """Returns a score of the last epoch, or one that begins with ``test_``."""
        if name.startswith("test_"):
            return float(self.metrics["test"][name.removeprefix("test_")])
        return float(self.metrics["last"][name])

    def column(self, name: str) -> tuple[list[float], list[float]]:
        """Returns epochs (from 1) and values of a column where it is not empty; ``weighted`` is sfr_weight * sfr_loss."""
        if name == "weighted":
            epochs, raw = self.column("sfr_loss")
            return epochs, [loss * weight for loss, weight in zip(raw, self.column("sfr_weight")[1], strict=True)]
        found = [(float(row["epoch"]) + 1, float(row[name])) for row in self.rows if row.get(name) not in ("", None)]
        return [epoch for epoch, _ in found], [value for _, value in found]


def read_finished(path: Path) -> Run:
    """Reads a run's folder; raises UserError if it is not one, or the run has not been validated yet."""
    missing = [name for name in ("args.yaml", "summary.csv", "metrics.json") if not (path / name).is_file()]
    if not path.exists():
        raise UserError(f"run: there is no folder {str(path)!r}{near_paths(path)}; give the folder that the training printed")
    if missing:
        raise UserError(f"run: {str(path)!r} has no {missing[0]}; give the folder that the training printed")
    try:
        metrics = json.loads((path / "metrics.json").read_text())
        run = Run(path, read_yaml(path / "args.yaml"), metrics, read_summary(path / "summary.csv", 10**9))
        _check(run)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"run: metrics.json, summary.csv or args.yaml of {str(path)!r} is damaged: {error!r}; restore it from a "
                        f"copy, or train again with --config {path / 'args.yaml'}") from error  # fmt: skip
    return run


def _check(run: Run) -> None:
    """Raises KeyError, TypeError, ValueError or AttributeError if a value that readers need is missing or invalid."""
    names = ("epoch", "images", *recorded_scores(run.task))
    for when in ("best", "last"):
        for name in names:
            float(run.metrics[when][name if name in ("epoch", "images", "ece") else f"val_{name}"])
    for name in ("epochs", "parameters", "seconds", "seed"):
        float(run.metrics[name])
    for name in names if run.test is not None else ():
        float(run.test[name])
    for name in ("model", "dataset", "hardware", "mixed_precision", "eval_metric"):
        str(run.metrics[name])
    run.metrics["versions"].items()
    int(run.options.get("num_classes") or 0)
    for row in run.rows:
        for value in row.values():
            float(value or 0)
