"""`Trainer`: the loop over the epochs of a run, which also writes and validates."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.utils import distribute_bn, unwrap_model
from torch import Tensor
from torch.utils.data import DataLoader

from timm_sfr.data.transforms import Preprocessing
from timm_sfr.runs.folder import Workspace
from timm_sfr.runs.predictions import Predictions
from timm_sfr.runs.records import epoch_row
from timm_sfr.runs.scores import metrics_of, shown_percents
from timm_sfr.training.evaluate import evaluate
from timm_sfr.training.final_test import exported, score_split
from timm_sfr.training.guards import ADVICE, Signals, interrupted, write_event
from timm_sfr.training.optimizer import base_rate
from timm_sfr.training.progress import Progress, length_of
from timm_sfr.training.recorder import Recorder
from timm_sfr.training.run_state import Learner, collect
from timm_sfr.training.step import augment, clip_gradients
from timm_sfr.training.trackers import Trackers
from timm_sfr.utils.errors import UserError
from timm_sfr.utils.processes import on_main
from timm_sfr.utils.seeding import reseed


@dataclass
class Trainer(Learner):
    """The loop over a run's epochs."""

    workspace: Workspace
    recorder: Recorder
    trackers: Trackers
    signals: Signals
    val_loader: DataLoader
    prep: Preprocessing
    mixup: Any  # timm's mixup and CutMix; None if both are off
    test_loader: Callable[[], DataLoader] | None = field(default=None, kw_only=True)  # makes the batches of the test split
    seen: Predictions = field(default_factory=Predictions, kw_only=True)  # of the last validation
    _started: float = field(default_factory=time.perf_counter, kw_only=True)
    progress: Progress = field(init=False)

    def __post_init__(self) -> None:
        steps = len(self.batches), length_of(self.val_loader)
        engine, main = self.config.engine, self.accelerator.is_main_process
        shown = shown_percents(self.config.data.task, self.config.model.num_classes)
        self.progress = Progress(self.end, steps, engine.val_interval, engine.log_interval, main, shown)

    @property
    def end(self) -> int:
        """The number of epochs after which this run stops: all of the schedule, or ``--stop-epoch``."""
        return min(self.schedule.epochs, self.config.optim.stop_epoch or self.schedule.epochs)

    def train_epoch(self, epoch: int, start: int = 0) -> dict[str, float]:
        """Trains one epoch from batch `start` on; returns the epoch's means of the loss's terms, and images per second.

        Raises:
            Interrupted: if a signal stopped it, after a checkpoint was saved.
            UserError: for a non-finite loss, or if the data ends early.
        """
        accum = self.config.optim.grad_accum_steps
        self.task.set_epoch(epoch, self.schedule.epochs)
        self.task.train()
        if self.mixup is not None:
            self.mixup.mixup_enabled = not (0 < self.config.aug.mixup_off_epoch <= epoch)
        dtype = torch.float32 if self.accelerator.device.type == "mps" else torch.float64
        names = self.guard.names
        # The sums of the terms over the batches whose terms are finite, and last the number of these batches; a batch of
        # another size than the mean counts by its share.
        total = torch.zeros(len(names) + 1, dtype=dtype, device=self.accelerator.device)
        if start > 0 and self.state.total is not None:
            total += self.state.total
        steps, images, done, started = len(self.batches), 0, start, time.perf_counter()
        self.progress.begin(epoch, start)
        for step, (image, target) in enumerate(self.batches.epoch(epoch, start), start):
            images, done, share = images + len(target), step + 1, self.share(len(target))
            # A batch's random numbers depend only on these values, so that a run can resume at any batch.
            reseed(self.config.engine.seed, epoch, step, self.accelerator.process_index)
            image, target = augment(image, target, self.batches.erase, self.mixup, self.config.model.channels_last)
            if self.config.engine.save_images and (done % self.config.engine.log_interval == 0 or done == steps):
                self.recorder.save_images(image, step)
            image = image.to(self.dtype)
            # The last group of an epoch may be smaller; its mean is still a mean.
            group = min(accum, steps - step // accum * accum)
            if step % accum == 0:
                self.guard.begin(self.module, self.task.get_sums())
            updates_now = (step + 1) % accum == 0 or step + 1 == steps
            with contextlib.nullcontext() if updates_now else self.accelerator.no_sync(self.module):
                result = self.task(image, target)
                terms = torch.stack([_term(result, name) for name in names])
                self.guard.terms.send(terms)
                self.accelerator.backward(self.scaled(result["loss"], share) / group)
            if self.guard.check_terms():
                total[:-1] += share * terms
                total[-1] += share
            elif not self.guard.scaled:
                self._nonfinite(epoch, step)
            if updates_now:
                self._update(epoch, step)
                if step + 1 < steps:
                    self._between_updates(epoch, step + 1, total)
            self.progress.batch(len(target) * self.accelerator.num_processes, self.guard.loss)
        if done != steps:
            raise UserError(f"data: expected {steps} batches in epoch {epoch + 1}; got {done}: a stream has fewer samples "
                            "than --train-num-samples, or its shards do not divide evenly among the processes and "
                            f"workers; stopped, {self.workspace.kept()}")  # fmt: skip
        self._settle(epoch, steps - 1)
        sums = self.accelerator.reduce(total, reduction="sum")
        means = (sums[:-1] / sums[-1]).tolist()
        elapsed = time.perf_counter() - started
        self.task.end_epoch()
        self._share_batchnorm()
        rate = images * self.accelerator.num_processes / max(elapsed, 1e-9)
        pixels = {} if self.sizes is None else {"train_img_size": self.sizes.mean_size(epoch)}
        return {**dict(zip(names, means, strict=True)), "images_per_second": rate, **pixels}

    def validate(self) -> dict[str, float]:
        """Returns the scores of the exported model; if outputs are not finite, raises UserError unless the policy is to skip."""
        self.seen, watch = Predictions(), self.progress.validating
        model = self.exported_model()
        if self.config.optim.model_ema_force_cpu:
            model = copy.deepcopy(model).to(self.accelerator.device)
        scores = evaluate(model, self.val_loader, self.prep, self.accelerator, self.seen, watch, self.config.threshold)
        if scores["nonfinite"]:
            found = (f"non-finite outputs in validation, after update {self.state.updates}: of {scores['nonfinite']} of "
                     f"{scores['images']} images")  # fmt: skip
            if self.guard.policy == "stop":
                raise UserError(f"{found}; stopped, {self.workspace.kept()}; {ADVICE}")
            self.workspace.say(f"warning: {found}; they count as wrong")
        return scores

    def exported_model(self) -> Any:
        """Returns the plain timm model without wrappers: the moving average if there is one."""
        return unwrap_model(self.task.get_eval_model(ema=self.task.has_ema()))

    def fit(self) -> None:
        """Trains the remaining epochs and writes all files after each; raises as `train_epoch`, and UserError on a full disk."""
        with self.signals, self.progress:
            self._fit()

    @property
    def done(self) -> bool:
        """Whether nothing is left to train: all epochs are done, or --patience is used up, which the main process decides."""
        patience = self.config.optim.patience
        if self.state.epoch >= self.end or patience is None:
            return self.state.epoch >= self.end
        return on_main(self.accelerator, lambda: self.state.out_of_patience(patience))

    def _fit(self) -> None:
        engine, epochs, state = self.config.engine, self.end, self.state
        self._started, done = time.perf_counter() - state.seconds, self.done
        trains = not done
        while not done:
            epoch, start, state.step = state.epoch, state.step, 0
            if start == 0:
                state.lr = base_rate(self.optimizer.param_groups)
            train = self.train_epoch(epoch, start)
            due = (epoch + 1) % engine.val_interval == 0 or epoch + 1 == epochs
            val = self.validate() if due else None
            self.schedule.after_epoch(epoch, val[engine.eval_metric] if val else None)
            state.epoch, state.seconds = epoch + 1, time.perf_counter() - self._started
            state.rows.append(epoch_row(epoch, state.lr, train, val, self.config.data.task))
            improved = val is not None and self._record(epoch, val)
            done = self.done
            self._write(improved, done)
            self.accelerator.wait_for_everyone()
            stop, _ = self.signals.asked(state.updates, now=True)
            if stop is not None and not done:
                raise interrupted(stop, state.updates, self.workspace, self.accelerator)
        if trains and state.epoch < epochs:
            self._say_early()
        if self._test() or trains:
            self.recorder.refresh_report(state, last=True)

    def _say_early(self) -> None:
        state, metric, patience = self.state, self.config.engine.eval_metric, self.config.optim.patience
        best = f"than {state.best[f'val_{metric}']:.4g} of epoch {state.best['epoch'] + 1}" if state.best else "at all"
        self.workspace.say(f"stopped early after epoch {state.epoch}: no better val_{metric} {best} in {patience} epochs or more "
                           f"(--patience {patience})", "stopped_early", epochs=state.epoch, patience=patience)  # fmt: skip

    def _test(self) -> bool:
        """Scores the exported weights on the test split, if there is one and it was not scored; returns whether it did."""
        state = self.state
        if self.test_loader is None or not state.best or state.test:
            return False
        model = exported(self.exported_model(), self.workspace.run / "model", self.accelerator).to(self.accelerator.device)
        scores, nonfinite = score_split(model, self.test_loader(), self.prep, self.accelerator, self.config.threshold)
        if nonfinite:
            self.workspace.say(f"warning: non-finite outputs for {nonfinite} images of the test split; they count as wrong")
        state.test = {"split": self.config.data.test_split, "epoch": self.recorder.best_in_model(state)["epoch"], **scores}
        self.recorder.write_test(state)
        return True

    def _write(self, improved: bool, done: bool) -> None:
        """Writes the files of the finished epoch; the report of the last one waits for the test scores."""
        state = self.state
        self.recorder.say_bad_images()
        if self.accelerator.is_main_process:
            self.progress.end(state.rows[-1])
            self.recorder.write_epoch(state, improved, self.exported_model(), self.seen)
            self.trackers.log(state.rows)
        self._keep(state.epoch, 0, None, improved)
        if not done:
            # The training time does not include the report.
            self._started += self.recorder.refresh_report(state, last=False)

    def _keep(self, epoch: int, step: int, total: Tensor | None, improved: bool) -> None:
        """Saves a checkpoint; in mid-epoch every process has to call this, because each has its own sums."""
        self.state.seconds = time.perf_counter() - self._started
        if step == 0 and not self.accelerator.is_main_process:
            return
        state = collect(self, epoch, step, total)
        if self.accelerator.is_main_process:
            self.recorder.keep_checkpoint(state, improved)

    def _update(self, epoch: int, step: int) -> None:
        seen = self.guard.bad
        # Before clipping, which by value would make an infinite gradient finite.
        made = self.guard.check_gradients(self.module, (epoch, step, self.state.updates + 1))
        clip_gradients(self.config.optim, self.accelerator, self.task)
        if made:
            self.optimizer.step()
            made = not self.accelerator.optimizer_step_was_skipped
        elif seen is None:
            self._nonfinite(epoch, step)
        if not made:
            self.guard.rollback()
        if self.guard.too_many(made):
            where = f"epoch {epoch + 1}, update {self.state.updates + 1}"
            raise UserError(f"non-finite: {self.guard.in_a_row} updates in a row were skipped, the last at {where}; "
                            f"stopped, {self.workspace.kept()}; {ADVICE}")  # fmt: skip
        self.optimizer.zero_grad()
        self.state.updates += 1
        if made:
            self.task.update_ema(step=self.state.updates)
        if self.config.engine.synchronize_step and self.accelerator.device.type != "cpu":
            torch.accelerator.synchronize()
        self.schedule.after_update(self.state.updates)

    def _nonfinite(self, epoch: int, step: int) -> None:
        """Records the batch with the non-finite number; raises UserError unless the policy is to skip the update."""
        term, value = self.guard.bad or ("loss", math.nan)
        rank, late = self.accelerator.process_index, self.guard.late
        epoch, step, update = late or (epoch, step, self.state.updates + 1)
        place = {"epoch": epoch + 1, "batch": step + 1, "update": update, "process": rank}
        event = {**place, "term": term, "value": str(value), "action": self.guard.policy,
                 "files": self.batches.files(epoch, step)}  # fmt: skip
        with self.recorder.disk("the list of what was not finite"):
            self.workspace.run.mkdir(parents=True, exist_ok=True)  # on another host than the main process's
            write_event(self.workspace.run / ("nonfinite.json" if rank == 0 else f"nonfinite-{rank}.json"), event)
        if self.guard.policy != "skip":
            what, how = "gradients" if term == "gradient" else "loss", "after" if late else "before"
            raise UserError(f"non-finite {what} at epoch {epoch + 1}, update {update}: {term} is {value}; "
                            f"stopped {how} the update, {self.workspace.kept()}; {ADVICE}")  # fmt: skip

    def _share_batchnorm(self) -> None:
        """Makes BatchNorm's running statistics the same on all processes, because each saw only its part of the batches."""
        mode, processes = self.config.engine.dist_bn, self.accelerator.num_processes
        if processes == 1 or mode == "none":
            return
        for module in (self.module, self.task.get_trainable_module(ema=True)):
            if module is not None:
                distribute_bn(module, processes, reduce=mode == "reduce")

    def _record(self, epoch: int, val: dict[str, float]) -> bool:
        """Records the scores of an epoch; returns whether they are the best so far."""
        calibration = {name: val[name] for name in ("ece",) if name in val}
        scores = {"epoch": epoch, "images": val["images"], **calibration,
                  **{f"val_{name}": val[name] for name in metrics_of(self.config.data.task)}}  # fmt: skip
        self.state.last = scores
        best = self.state.best
        metric = f"val_{self.config.engine.eval_metric}"
        sign = -1 if metric == "val_loss" else 1
        if not math.isfinite(scores[metric]) or (best and sign * scores[metric] <= sign * best[metric]):
            return False
        self.state.best, self.state.test = scores, {}
        return True

    def _between_updates(self, epoch: int, step: int, total: Tensor) -> None:
        """After an update in mid-epoch: saves a checkpoint if one is due or requested, and stops on a signal."""
        stop, save = self.signals.asked(self.state.updates)
        interval = self.config.engine.checkpoint_interval
        if save or stop is not None or (interval and self.state.updates % interval == 0):
            self._settle(epoch, step - 1)
            self._keep(epoch, step, total, False)
        if stop is not None:
            # When one process ends, the launcher kills the others after seconds, and the first may still be writing.
            self.accelerator.wait_for_everyone()
            raise interrupted(stop, self.state.updates, self.workspace, self.accelerator)

    def _settle(self, epoch: int, step: int) -> None:
        """Checks the last update's gradients before anything is saved, if that has not happened yet."""
        self.guard.settle()
        if self.guard.late is not None:
            self._nonfinite(epoch, step)


def _term(result: dict[str, Tensor], name: str) -> Tensor:
    """Returns a term of the loss, of the task itself or of SFR's base task; without SFR, zero for all but the loss."""
    value = result.get(name, result.get(f"base_{name}"))
    if value is None:
        value = result["loss"] if name == "task_loss" else result["loss"].new_zeros(())
    return value.detach().float()
