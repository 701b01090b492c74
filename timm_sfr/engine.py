"""`Trainer`: the epochs of a run, and what is written after each.

One batch, top to bottom: `TrainBatches` -> mixup -> `task` (one pass, all losses) -> backward -> clip -> update ->
schedule -> moving average. Accelerate holds devices, processes and precision; timm everything else.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad, distribute_bn, unwrap_model
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from timm_sfr import build, report
from timm_sfr.card import Facts
from timm_sfr.checkpoint import save_checkpoint
from timm_sfr.config import RunConfig
from timm_sfr.errors import UserError
from timm_sfr.evaluate import evaluate
from timm_sfr.export import Exporter
from timm_sfr.loader import Preprocessing, TrainBatches, reseed
from timm_sfr.workspace import Workspace

_logger = logging.getLogger("timm_sfr")
# The terms of the loss, logged as they are optimised: loss = task_loss + sfr_weight * sfr_loss.
TERMS = ("loss", "task_loss", "sfr_loss", "sfr_weight", "smoothing")


class FiniteGuard:
    """Finds a non-finite loss before the update, without making the device wait.

    The terms travel to the host while the backward pass runs; `check` waits for that copy alone.
    """

    def __init__(self, device: torch.device) -> None:
        self.pinned = torch.zeros(len(TERMS), pin_memory=True) if device.type == "cuda" else None
        self.event = torch.cuda.Event() if device.type == "cuda" else None
        self.values = torch.zeros(len(TERMS))

    def watch(self, terms: Tensor) -> None:
        """Takes the terms of a batch, (len(TERMS),)."""
        if self.pinned is None or self.event is None:
            self.values = terms
            return
        self.values = self.pinned.copy_(terms, non_blocking=True)
        self.event.record()

    def check(self, where: str, kept: str) -> None:
        """Raises UserError if a term was not finite."""
        if self.event is not None:
            self.event.synchronize()
        values = dict(zip(TERMS, self.values.tolist(), strict=True))
        bad = [name for name in ("task_loss", "sfr_loss", "loss") if not math.isfinite(values[name])]
        if bad:
            raise UserError(
                f"non-finite loss at {where}: {bad[0]} is {values[bad[0]]}; stopped before the update, {kept}; try a lower "
                "--lr, --clip-grad 1, or --mixed-precision bf16 in place of fp16"
            )


@dataclass
class Trainer:
    """The parts of a run and how far it is."""

    config: RunConfig
    accelerator: Any
    workspace: Workspace
    task: TrainingTask
    optimizer: Any
    schedule: build.Schedule
    batches: TrainBatches
    val_loader: DataLoader
    prep: Preprocessing
    mixup: Any
    guard: FiniteGuard
    exporter: Exporter | None
    facts: dict[str, Any]
    start_epoch: int = 0
    updates: int = 0
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)

    @property
    def module(self) -> Any:
        """The prepared trainable module."""
        return self.task.trainable_module

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Trains one epoch; the means of the loss's terms over all images of all processes, and images per second."""
        optim, accum = self.config.optim, self.config.optim.grad_accum_steps
        set_epoch = getattr(self.task, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch, self.schedule.epochs)
        reseed(self.config.engine.seed, epoch, self.accelerator.process_index)
        self.task.train()
        if self.mixup is not None:
            self.mixup.mixup_enabled = not (0 < self.config.aug.mixup_off_epoch <= epoch)
        total = torch.zeros(len(TERMS), dtype=torch.float32 if self.accelerator.device.type == "mps" else torch.float64)
        total = total.to(self.accelerator.device)
        steps, images, started = len(self.batches), 0, time.perf_counter()
        quiet = None if self.accelerator.is_main_process else True  # None: no bar where there is no terminal
        bar = tqdm(total=steps, desc=f"epoch {epoch + 1}", leave=False, disable=quiet)
        for step, (image, target) in enumerate(self.batches.epoch(epoch)):
            images += len(target)
            if self.config.model.channels_last:
                image = image.contiguous(memory_format=torch.channels_last)
            if self.mixup is not None:
                image, target = self.mixup(image, target)
            # The last group of an epoch may be smaller; its mean is still a mean.
            group = min(accum, steps - step // accum * accum)
            updates_now = (step + 1) % accum == 0 or step + 1 == steps
            with contextlib.nullcontext() if updates_now else self.accelerator.no_sync(self.module):
                result = self.task(image, target)
                terms = torch.stack([_term(result, name) for name in TERMS])
                total += terms
                self.guard.watch(terms)
                self.accelerator.backward(result["loss"] / group)
            self.guard.check(f"epoch {epoch + 1}, update {self.updates + 1}", self.workspace.kept())
            if updates_now:
                self._update(optim)
            if (step + 1) % self.config.engine.log_interval == 0 and not bar.disable:
                bar.set_postfix(loss=f"{(total[0] / (step + 1)).item():.4f}", refresh=False)
            bar.update()
        bar.close()
        means = self.accelerator.reduce(total / max(1, steps), reduction="mean").tolist()
        elapsed = time.perf_counter() - started
        end_epoch = getattr(self.task, "end_epoch", None)
        if end_epoch is not None:
            end_epoch()
        self._share_batchnorm()
        rate = images * self.accelerator.num_processes / max(elapsed, 1e-9)
        return {**dict(zip(TERMS, means, strict=True)), "images_per_second": rate}

    def validate(self) -> dict[str, float]:
        """Scores of what gets exported: the moving average where there is one."""
        return evaluate(self.exported_model(), self.val_loader, self.prep, self.accelerator)

    def exported_model(self) -> Any:
        """The plain timm model behind all wrappers."""
        return unwrap_model(self.task.get_eval_model(ema=self.task.has_ema()))

    def fit(self) -> None:
        """Runs the remaining epochs, writing everything after each."""
        engine, epochs = self.config.engine, self.schedule.epochs
        started = time.perf_counter() - self.seconds
        for epoch in range(self.start_epoch, epochs):
            lr = self.optimizer.param_groups[0]["lr"]
            train = self.train_epoch(epoch)
            due = (epoch + 1) % engine.val_interval == 0 or epoch + 1 == epochs
            val = self.validate() if due else None
            self.schedule.after_epoch(epoch, val[engine.eval_metric] if val else None)
            self.seconds = time.perf_counter() - started
            row = report.epoch_row(epoch, lr, train, val)
            self.rows.append(row)
            improved = val is not None and self._record(epoch, val)
            if self.accelerator.is_main_process:
                _logger.info(report.log_line(row, epochs))
                self._write(epoch, improved)
            self.accelerator.wait_for_everyone()

    def metrics(self) -> dict[str, Any]:
        """What metrics.json holds."""
        return {
            "best": self.best,
            "last": self.last,
            "eval_metric": self.config.engine.eval_metric,
            "epochs": self.schedule.epochs,
            "seconds": round(self.seconds, 1),
            **self.facts,
        }

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        ema = self.task.get_trainable_module(ema=True)
        scaler = self.accelerator.scaler
        return {
            "epoch": self.start_epoch,
            "updates": self.updates,
            "seconds": self.seconds,
            "best": self.best,
            "last": self.last,
            "module": unwrap_model(self.module).state_dict(),
            "ema": ema.module.state_dict() if ema is not None else None,
            "task": self.task.get_task_state(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.scheduler.state_dict() if self.schedule.scheduler is not None else None,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Takes up what `state` gave.

        Raises:
            UserError: if it belongs to another model or optimizer.
        """
        ema = self.task.get_trainable_module(ema=True)
        try:
            unwrap_model(self.module).load_state_dict(state["module"])
            if ema is not None:
                # An average that is turned on at resume starts from the weights reached, not from random ones.
                ema.module.load_state_dict(state["ema"] or state["module"])
            self.task.load_task_state(state["task"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.accelerator.scaler is not None and state["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"resume: the checkpoint does not fit these options: {reason}; leave out what differs from "
                            f"{self.workspace.run / 'args.yaml'}") from error  # fmt: skip
        self.start_epoch, self.updates, self.seconds = state["epoch"], state["updates"], state["seconds"]
        self.best, self.last = state["best"], state["last"]
        self.schedule.resume(self.start_epoch, self.updates, state["schedule"])

    def _update(self, optim: Any) -> None:
        if optim.clip_grad is not None:
            self.accelerator.unscale_gradients()
            parameters = self.task.get_clip_parameters(exclude_head="agc" in optim.clip_mode)
            dispatch_clip_grad(parameters, optim.clip_grad, mode=optim.clip_mode)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        self.task.update_ema(step=self.updates)
        self.schedule.after_update(self.updates)

    def _share_batchnorm(self) -> None:
        """Makes BatchNorm's running statistics the same on all processes; each saw its own part of the batches."""
        mode, processes = self.config.engine.dist_bn, self.accelerator.num_processes
        if processes == 1 or mode == "none":
            return
        distribute_bn(self.module, processes, reduce=mode == "reduce")
        if self.task.has_ema():
            distribute_bn(self.task.get_trainable_module(ema=True), processes, reduce=mode == "reduce")

    def _record(self, epoch: int, val: dict[str, float]) -> bool:
        """Notes the scores of an epoch; whether they are the best so far."""
        scores = {"epoch": epoch, "images": val["images"], "ece": val["ece"],
                  **{f"val_{name}": val[name] for name in ("top1", "top5", "loss")}}  # fmt: skip
        self.last = scores
        metric = f"val_{self.config.engine.eval_metric}"
        sign = -1 if metric == "val_loss" else 1
        if self.best and sign * scores[metric] <= sign * self.best[metric]:
            return False
        self.best = scores
        return True

    def _write(self, epoch: int, improved: bool) -> None:
        """Summary, best model, metrics and checkpoint of an epoch, each whole; the checkpoint last: it is what counts."""
        run = self.workspace.run
        report.write_summary(run / "summary.csv", self.rows)
        if self.exporter is not None and self.best:
            facts = Facts(self.metrics(), self.config.flat(), self.rows)
            if improved:
                self.exporter.write(run / "model", self.exported_model().state_dict(), facts)
            elif (run / "model").is_dir():
                self.exporter.describe(run / "model", facts)
        if self.best:
            report.write_json(run / "metrics.json", self.metrics())
        state = {**self.state(), "epoch": epoch + 1}
        save_checkpoint(run / "checkpoints", epoch, state, self.config.engine.checkpoint_hist)


def _term(result: dict[str, Tensor], name: str) -> Tensor:
    """A term of the loss; a task without SFR has its loss alone."""
    value = result.get(name)
    if value is None:
        value = result["loss"] if name == "task_loss" else result["loss"].new_zeros(())
    return value.detach().float()
