"""Writes a run's files during training: those of each epoch, checkpoints, the report, and lists of failures."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn
from torchvision.utils import save_image

from timm_sfr.config import RunConfig
from timm_sfr.data.datasets import Split
from timm_sfr.data.folders import SPLIT_FILE, write_split
from timm_sfr.data.samples import BadImages, file_name
from timm_sfr.hub.card import Facts
from timm_sfr.hub.model_folder import Exporter
from timm_sfr.runs.checkpoints import save_checkpoint
from timm_sfr.runs.folder import Workspace
from timm_sfr.runs.predictions import CLASS_SCORES, PREDICTIONS, Predictions, write_class_scores, write_predictions
from timm_sfr.runs.records import write_args, write_summary
from timm_sfr.training.run_state import RunState
from timm_sfr.utils.console import logger
from timm_sfr.utils.errors import UserError, brief
from timm_sfr.utils.files import read_json, read_yaml, write_json

REPORT_SHARE = 0.02  # the default report interval spends at most this share of the time on reports


@dataclass
class Recorder:
    """Writes a run's files on the main process, and nothing on the others."""

    workspace: Workspace
    config: RunConfig  # resolved
    facts: dict[str, Any]  # content of metrics.json other than the scores
    epochs: int  # of the whole run
    exporter: Exporter | None  # None on all processes but the main one
    train: Split
    val: Split
    test: Split | None
    ordered: bool  # whether the predictions come in the split's order: not for several processes on a stream
    bad: BadImages | None  # the list of training images that do not decode
    _bad_before: int = 0
    _reported: float = field(default_factory=time.perf_counter)  # when the last report was written
    _report_seconds: float = 3.0  # how long it took

    def start(self) -> None:
        """Writes args.yaml. A resumed run calls this only after its checkpoint was found to fit the options."""
        if self.workspace.main:
            with self.disk("args.yaml"):
                write_args(self.workspace.run / "args.yaml", self.config.flat())
            scans = {"train": self.train.scan, "val": self.val.scan}
            if self.train.chosen and None not in scans.values():
                with self.disk(f"the list of files {SPLIT_FILE}"):
                    write_split(self.workspace.run / SPLIT_FILE, scans)

    def best_in_model(self, state: RunState) -> dict[str, Any]:
        """Returns the scores of the weights in the model folder: an older epoch's, if writing better ones has failed."""
        path = self.workspace.run / "metrics.json"
        return (read_json(path).get("best") if path.is_file() else None) or state.best

    def metrics(self, state: RunState, best: dict[str, Any]) -> dict[str, Any]:
        """Returns the content of metrics.json, with the scores `best` of the weights in the model folder."""
        patience = self.config.optim.patience
        early = state.epoch < self.epochs and state.out_of_patience(patience)
        return {
            "best": best,
            "last": state.last,
            **({"test": state.test} if state.test else {}),
            **({"stopped_early": {"epochs": state.epoch, "patience": patience}} if early else {}),
            "eval_metric": self.config.engine.eval_metric,
            "epochs": self.epochs,
            "seconds": round(state.seconds, 1),
            **self.facts,
        }

    def write_epoch(self, state: RunState, improved: bool, model: nn.Module, seen: Predictions) -> None:
        """Writes the files of an epoch, each atomically, on the main process: summary, best model, its predictions, metrics.

        The checkpoint is written after them, because it decides where a resumed run continues. `seen` are the predictions of
        `model` for the validation images; if they `improved`, both are written.
        """
        run = self.workspace.run
        with self.disk("the epoch's files"):
            write_summary(run / "summary.csv", state.rows)
            if not state.best:
                return
            metrics = self.metrics(state, state.best if improved else self.best_in_model(state))
            facts = Facts(metrics, self.config.flat(), state.rows)
            if improved:
                self.exporter.write(run / "model", model.state_dict(), facts)
                self._write_predictions(seen)
            elif (run / "model").is_dir():
                self.exporter.describe(run / "model", facts)
            write_json(run / "metrics.json", metrics)

    def recorded_test(self, state: RunState) -> dict[str, Any]:
        """Returns the test scores in metrics.json; empty if there are none for this split and the best epoch's weights."""
        path = self.workspace.run / "metrics.json"
        if self.test is None or not path.is_file():
            return {}
        found = read_json(path).get("test") or {}
        wanted = self.config.data.test_split, self.best_in_model(state).get("epoch")
        return found if (found.get("split"), found.get("epoch")) == wanted else {}

    def write_test(self, state: RunState) -> None:
        """Writes the test scores of a finished run: metrics, model card, and the split's name in args.yaml."""
        if not self.workspace.main:
            return
        run, options = self.workspace.run, self.config.flat()
        with self.disk("the test scores"):
            metrics = self.metrics(state, self.best_in_model(state))
            if (run / "model").is_dir():
                self.exporter.describe(run / "model", Facts(metrics, options, state.rows))
            # A run that had finished before keeps its other options.
            names = ("test_split", "test_num_samples")
            write_args(run / "args.yaml", {**read_yaml(run / "args.yaml"), **{name: options[name] for name in names}})
            write_json(run / "metrics.json", metrics)

    def _write_predictions(self, seen: Predictions) -> None:
        path = self.workspace.run / PREDICTIONS
        path.unlink(missing_ok=True)  # the old file belongs to other weights, even if writing the new one fails
        if seen.by_class is not None:
            (self.workspace.run / CLASS_SCORES).unlink(missing_ok=True)
            write_class_scores(self.workspace.run / CLASS_SCORES, seen.by_class(), self.train.class_names)
        elif self.ordered:
            rows, dataset = seen.rows(), self.val.dataset
            named = not self.val.streamed and len(rows) == len(dataset)
            write_predictions(path, rows, lambda index: file_name(dataset if named else None, index))

    def keep_checkpoint(self, state: dict[str, Any], improved: bool) -> None:
        """Writes a collected state as a checkpoint."""
        folder, engine = self.workspace.run / "checkpoints", self.config.engine
        with self.disk("a checkpoint"):
            save_checkpoint(folder, state, engine.checkpoint_hist, improved, engine.save_epochs or ())

    def save_images(self, images: Tensor, batch: int) -> None:
        """Writes the main process's images of a batch (B, C, H, W) as they are trained on, scaled to black and white.

        Of another number of channels than 1 or 3, it shows the first three, or the first.
        """
        if self.workspace.main:
            with self.disk("the images of a batch"):
                shown = 3 if images.shape[1] >= 3 else 1  # the numbers of channels that a JPEG file may have
                save_image(images[:, :shown], self.workspace.run / f"train-batch-{batch}.jpg", padding=0, normalize=True)

    def refresh_report(self, state: RunState, last: bool) -> float:
        """Writes the report if it is due; returns the seconds it took. A failed report does not stop the training."""
        interval, started = self.config.engine.report_interval, time.perf_counter()
        if interval == 0 or not state.best or not self.workspace.main:
            return 0.0
        if interval is None:  # by default, as often as REPORT_SHARE of the time allows
            due = started - self._reported > self._report_seconds / REPORT_SHARE
        else:
            due = len(state.rows) % interval == 0
        if not (due or last):
            return 0.0
        try:
            from timm_sfr.reporting.page import write_report  # imported here because matplotlib is slow to import

            page = write_report(self.workspace.run, dataset=self.val.dataset, training=not last)
            if last:
                self.workspace.say(f"the report is {page}")
        except Exception as error:  # a report is not worth losing a run
            self.workspace.say(f"warning: the report could not be written: {brief(error)}")
        self._reported = time.perf_counter()
        self._report_seconds = self._reported - started
        return self._report_seconds

    def say_bad_images(self) -> None:
        """Warns about training images that do not decode, if their number has grown."""
        if self.bad is None:
            return
        before, self._bad_before = self._bad_before, len(self.bad.names())
        if self._bad_before > before:
            self.workspace.say(f"warning: images that do not decode and were replaced by others: {self._bad_before}, listed in "
                               f"{self.bad.path}")  # fmt: skip

    @contextlib.contextmanager
    def disk(self, what: str) -> Iterator[None]:
        """A context that handles failed writes of `what`: it raises UserError, or warns and continues, as on_full_disk says."""
        try:
            yield
        except (OSError, SafetensorError) as error:  # safetensors wraps the system's errors in its own
            reason = f"{what} cannot be written: {getattr(error, 'strerror', None) or error}"
            if self.config.engine.on_full_disk == "stop":
                raise UserError(
                    f"output: {reason}; stopped, {self.workspace.kept()}; free some space and --resume, or use "
                    "--on-full-disk skip"
                ) from error
            logger.warning(f"warning: {reason}; continuing without it (--on-full-disk skip)")
