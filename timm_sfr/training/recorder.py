"""What a run writes as it goes: the files of an epoch, checkpoints, the list of bad images."""

from __future__ import annotations

import contextlib
import shlex
import signal
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import IterableDataset

from timm_sfr.data.samples import bad_images, file_name
from timm_sfr.hub.card import Facts
from timm_sfr.runs.checkpoints import save_checkpoint
from timm_sfr.runs.predictions import PREDICTIONS, write_predictions
from timm_sfr.runs.records import write_summary
from timm_sfr.training.run_state import collect
from timm_sfr.utils.console import logger
from timm_sfr.utils.errors import Interrupted, UserError, brief
from timm_sfr.utils.files import write_json

if TYPE_CHECKING:
    from timm_sfr.training.trainer import Trainer

REPORT_SHARE = 0.02  # of the time



def write_epoch(trainer: Trainer, improved: bool) -> None:
    """Summary, best model and metrics of an epoch, each whole; the checkpoint comes after them: it is what counts."""
    run, exporter = trainer.workspace.run, trainer.exporter
    with spared(trainer, "the epoch's files"):
        write_summary(run / "summary.csv", trainer.rows)
        metrics = trainer.metrics()
        if exporter is not None and trainer.best:
            facts = Facts(metrics, trainer.config.flat(), trainer.rows)
            if improved:
                exporter.write(run / "model", trainer.exported_model().state_dict(), facts)
                _keep_predictions(trainer)
            elif (run / "model").is_dir():
                exporter.describe(run / "model", facts)
        if trainer.best:
            write_json(run / "metrics.json", metrics)


def _keep_predictions(trainer: Trainer) -> None:
    """What the best model said of every validation image; several processes' streams have no order to write it in."""
    path, images = trainer.workspace.run / PREDICTIONS, trainer.val_images
    path.unlink(missing_ok=True)  # of other weights, whatever becomes of the new one
    streamed = isinstance(images, IterableDataset)
    if streamed and trainer.accelerator.num_processes > 1:
        return
    rows = trainer.seen.rows()
    named = not streamed and len(rows) == len(images)
    write_predictions(path, rows, lambda index: file_name(images if named else None, index))


def refresh_report(trainer: Trainer, last: bool) -> None:
    """Writes the report where it is due, on the main process; whatever becomes of it, the training goes on."""
    interval, started = trainer.config.engine.report_interval, time.perf_counter()
    if interval == 0 or not trainer.best or not trainer.accelerator.is_main_process:
        return
    if interval is None:  # when what the last one took is this share of the time since
        due = started - trainer.reported > trainer.report_seconds / REPORT_SHARE
    else:
        due = len(trainer.rows) % interval == 0
    if not (due or last):
        return
    try:
        from timm_sfr.reporting.page import write_report  # only here: matplotlib takes a while

        page = write_report(trainer.workspace.run, dataset=trainer.val_images, training=not last)
        if last:
            trainer.workspace.say(f"the report is {page}")
    except Exception as error:  # a picture is not worth a run
        trainer.workspace.say(f"warning: the report could not be written: {brief(error)}")
    trainer.reported = time.perf_counter()
    trainer.report_seconds = trainer.reported - started
    trainer.started += trainer.report_seconds  # no part of the training's time


def keep_checkpoint(trainer: Trainer, epoch: int, step: int, total: Tensor | None, improved: bool) -> None:
    """Keeps a checkpoint; every process has to come here, for what each alone knows in mid-epoch."""
    trainer.seconds = time.perf_counter() - trainer.started
    if step == 0 and not trainer.accelerator.is_main_process:
        return
    state = collect(trainer, epoch, step, total)
    if trainer.accelerator.is_main_process:
        folder, count = trainer.workspace.run / "checkpoints", trainer.config.engine.checkpoint_hist
        with spared(trainer, "a checkpoint"):
            save_checkpoint(folder, state, count, improved)


@contextlib.contextmanager
def spared(trainer: Trainer, what: str) -> Iterator[None]:
    """Says in one line that the disk does not take `what`, and stops, or goes on where the options say so.

    Raises:
        UserError: to stop.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:  # the latter is what safetensors makes of the former
        reason = f"{what} cannot be written: {getattr(error, 'strerror', None) or error}"
        if trainer.config.engine.on_full_disk == "stop":
            raise UserError(
                f"output: {reason}; stopped, {trainer.workspace.kept()}; make room and --resume, or give --on-full-disk skip"
            ) from error
        logger.warning(f"warning: {reason}; going on without (--on-full-disk skip)")


def interrupted(trainer: Trainer, stop: int) -> Interrupted:
    """What a run that a signal has stopped ends with."""
    accelerator, launcher = trainer.accelerator, "python"
    if accelerator.num_processes > 1:
        cpu = "--cpu " if accelerator.device.type == "cpu" else ""
        launcher = f"accelerate launch {cpu}--num_processes {accelerator.num_processes}"
    return Interrupted(
        f"stopped by {signal.Signals(stop).name} after update {trainer.updates}, {trainer.workspace.kept()}; go on with: "
        f"{launcher} train_sfr.py --resume {shlex.quote(str(trainer.workspace.run))}"
    )


def say_bad_images(trainer: Trainer, before: int) -> int:
    """Says how many images did not decode, if that are more than `before`; how many there are."""
    bad = bad_images(getattr(trainer.batches, "samples", None))
    count = 0 if bad is None else len(bad.names())
    if count > before:
        trainer.workspace.say(f"warning: {count} images do not decode and others stand in for them: {bad.path}")
    return count
