"""Sends a run's scores to TensorBoard, Weights & Biases or Trackio, by Accelerate's trackers.

After an epoch, every column of summary.csv is sent under a fixed name (`metric_name`) at step epoch + 1. A file in the
run's folder records what was sent, so that a resumed run continues in the same place and sends no epoch twice.
"""

from __future__ import annotations

import json
import os
import re
import threading
import uuid
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.utils import LoggerType

from timm_sfr.utils.console import logger
from timm_sfr.utils.errors import UserError, brief
from timm_sfr.utils.files import write_json

PROJECT, STATE_FILE = "timm_sfr", "trackers.json"
SECRET = re.compile("token|secret|passw|authorization|signature|credential|[?&]sig=|(api|access|private).?key", re.IGNORECASE)
NO_SECRET = ("kd_distill_type", "kd_token_distill_type")  # "token" is a kind of distillation here


def chosen(names: Iterable[str]) -> list[str]:
    """Returns the trackers that ``--report-to`` names, without duplicates and ``none``; raises UserError if one is missing."""
    found = [name for name in dict.fromkeys(names) if name != "none"]
    for name in found:
        if find_spec(name) is None:
            raise UserError(f"report-to: {name} is not installed; pip install {name}, or leave it out of --report-to")
        if name not in LoggerType.list():
            raise UserError(f"report-to: this accelerate does not know {name}; pip install --upgrade accelerate")
    return found


def metric_name(column: str) -> str:
    """Returns ``train/NAME`` or ``val/NAME`` for a column of summary.csv, such as train/loss for ``train_loss``."""
    split, _, rest = column.partition("_")
    return f"{split}/{rest}" if split in ("train", "val") else f"train/{column}"


def metrics(row: dict[str, Any]) -> dict[str, float]:
    """Returns all numbers in a row of summary.csv by metric name, except the epoch, which is the step."""
    return {metric_name(name): float(value) for name, value in row.items() if name != "epoch" and value != ""}


def hyperparameters(options: dict[str, Any]) -> dict[str, bool | int | float | str]:
    """Returns the options that are set in the types that trackers accept; values that look secret are left out."""
    found: dict[str, bool | int | float | str] = {}
    for name, value in options.items():
        entries = {f"{name}.{key}": entry for key, entry in value.items()} if isinstance(value, dict) else {name: value}
        for key, entry in entries.items():
            if entry is None:
                continue
            plain = entry if isinstance(entry, (bool, int, float)) else _text(entry)
            found[key] = "(left out)" if name not in NO_SECRET and _looks_secret(key, plain) else plain
    return found


def _looks_secret(name: str, value: bool | int | float | str) -> bool:
    if not isinstance(value, str):
        return False
    return bool(SECRET.search(name) or (SECRET.search(value) and value != "token"))  # "token" alone is a kind of pooling


class Trackers:
    """The trackers of a run; does nothing on processes other than the main one, or without ``--report-to``."""

    def __init__(self, accelerator: Any, run: Path) -> None:
        self.accelerator, self.run = accelerator, run
        self.asked = list(accelerator.log_with) if accelerator.is_main_process else []
        self.state: dict[str, dict[str, Any]] = {}
        self._hook = threading.excepthook

    def start(self, options: dict[str, Any], epoch: int, resumed: bool) -> None:
        """Starts the trackers at epoch `epoch`; those of a resumed run continue in the same place.

        If one does not start, a resumed run warns and continues without it; another raises UserError.
        """
        if options.get("wandb_resume_id") and not resumed:
            raise UserError("wandb-resume-id: it is for --resume; leave it out of a new run")
        self.state, live = self._read() if resumed else {}, []
        threading.excepthook = self._thread_failed
        for kind in self.asked:
            name, fresh = str(kind), os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8]
            state = self.state.setdefault(name, {"id": fresh, "logged": 0})
            if name == "tensorboard":
                state["logged"] = min(state["logged"], epoch)  # later steps are purged and written again
            try:
                self.accelerator.log_with, self.accelerator.trackers = [kind], []
                self.accelerator.project_configuration.logging_dir = str(self.run)
                named = options.get("wandb_project") if name == "wandb" else None
                project = name if name == "tensorboard" else named or os.environ.get(f"{name.upper()}_PROJECT", PROJECT)
                arguments = self._arguments(name, state, options)
                self.accelerator.init_trackers(project, init_kwargs={name: arguments})
                if name == "tensorboard" and not resumed:
                    _write_hyperparameters(self.accelerator.trackers[0].tracker, hyperparameters(options))
                live += self.accelerator.trackers
            except Exception as error:
                advice = "wandb login, or set WANDB_MODE=offline" if name == "wandb" else "leave it out of --report-to"
                if not resumed:
                    raise UserError(f"report-to: {name} does not start: {brief(error)}; {advice}") from error
                logger.warning(f"warning: report-to: {name} does not start: {brief(error)}; continuing without it")
        self.accelerator.log_with, self.accelerator.trackers = self.asked, live
        self._keep()

    def log(self, rows: list[dict[str, Any]]) -> None:
        """Sends the new rows of summary.csv; a tracker that fails is removed with a warning, and the training continues."""
        for tracker in list(self.accelerator.trackers) if self.asked else []:
            state = self.state[tracker.name]
            try:
                for row in rows:
                    step = int(row["epoch"]) + 1
                    if step > state["logged"]:
                        tracker.log(metrics(row), step=step)
                        state["logged"] = step
            except Exception as error:
                self.accelerator.trackers.remove(tracker)
                logger.warning(f"warning: report-to: {tracker.name} fails: {brief(error)}; the training continues without it")
        self._keep()

    def _keep(self) -> None:
        """Writes the ids of the tracker runs and the last steps sent to the run's folder."""
        if not self.asked:
            return
        try:
            write_json(self.run / STATE_FILE, self.state)
        except OSError as error:
            logger.warning(f"warning: {STATE_FILE} cannot be written: {brief(error)}; on resume, the run may start new tracker "
                           "runs")  # fmt: skip

    def finish(self) -> None:
        """Closes the trackers."""
        for tracker in list(self.accelerator.trackers) if self.asked else []:
            try:
                tracker.finish()
            except Exception as error:
                logger.warning(f"warning: report-to: {tracker.name} did not end well: {brief(error)}")
        self.accelerator.trackers, threading.excepthook = [], self._hook

    def _thread_failed(self, what: Any) -> None:
        """Hides tracebacks of TensorBoard's writer thread: `log` gets and reports the same errors."""
        if not type(what.thread).__module__.startswith("tensorboard"):
            self._hook(what)

    def _arguments(self, name: str, state: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        """Returns the arguments that start a tracker."""
        if name == "tensorboard":
            return {"purge_step": state["logged"] + 1}
        shared = {"name": self.run.resolve().name, "resume": "allow", "config": hyperparameters(options)}
        if name == "trackio":
            return {**shared, "name": f"{shared['name']}-{state['id']}"}  # it identifies a run by its name
        import wandb

        # By default wandb captures the console, and our output would pass through wandb before the terminal.
        settings = wandb.Settings(console=os.environ.get("WANDB_CONSOLE", "off"))
        if options.get("wandb_resume_id"):
            shared["resume"], state["id"] = "must", options["wandb_resume_id"]
        tags = list(options.get("wandb_tags") or ()) or None
        return {**shared, "dir": str(self.run), "id": state["id"], "settings": settings, "tags": tags}

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            found = json.loads((self.run / STATE_FILE).read_text())
            return {name: {"id": str(one["id"]), "logged": int(one["logged"])} for name, one in found.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}


def _write_hyperparameters(writer: Any, options: dict[str, Any]) -> None:
    """Writes the options to the run's own event file: Accelerate would make a folder that TensorBoard shows as a run."""
    from torch.utils.tensorboard.summary import hparams

    for summary in hparams(options, {}):
        writer.file_writer.add_summary(summary)
    writer.flush()


def _text(value: Any) -> str:
    """Returns a value as text, without user names and passwords in URLs."""
    words = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return re.sub(r"//[^/@\s]+@", "//", words)
