"""A learning-rate range test (Smith, arXiv 1506.01186): the loss while the rate rises from update to update.

The first functions are pure; `range_test` trains, and `find_rate` does both for a run's options.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from timm_sfr.config import RunConfig
from timm_sfr.data.transforms import create_mixup
from timm_sfr.training.devices import explained_errors
from timm_sfr.training.run import assemble, start
from timm_sfr.training.run_state import Learner
from timm_sfr.training.step import augment, clip_gradients
from timm_sfr.utils.console import console_output
from timm_sfr.utils.errors import UserError
from timm_sfr.utils.seeding import reseed

WIDTH = 1 / 25  # of the smoothing, as a share of the updates
DIVERGED = 4.0  # the test ends at a loss this many times its smoothed minimum


@dataclass(frozen=True)
class RangeTest:
    """What a range test found."""

    rates: list[float]  # the learning rate of each update
    losses: list[float]  # the loss at each update, before it; the last may be what ended the test
    smoothed: list[float]  # `smooth_losses` of them, without that one
    rate: float | None  # the suggested rate; None if the loss did not fall
    batch: int  # images in an update
    note: str = ""  # what there is to say of the batch size
    main: bool = True  # whether this is the process that prints


def exponential_rates(low: float, high: float, count: int) -> list[float]:
    """Returns `count` rates from `low` to `high`: rate_i = low (high / low)^(i / (count - 1))."""
    return [low * (high / low) ** (i / (count - 1)) for i in range(count)]


def smooth_losses(losses: Sequence[float], count: int) -> list[float]:
    """Returns s_i = sum_j w_(i - j) l_j, with Gaussian weights whose deviation is a 25th of the test's `count` updates.

    The mean is centred: a running mean of the past would lag, and suggest a rate several times too high.
    """
    width = max(1.0, WIDTH * count)
    return gaussian_filter1d(np.asarray(losses, dtype=float), width, mode="nearest").tolist()


def diverged(losses: Sequence[float], count: int) -> bool:
    """Returns whether the last loss is not finite, or more than four times the smallest smoothed one before it."""
    *before, last = losses
    return not math.isfinite(last) or (len(before) > 0 and last > DIVERGED * min(smooth_losses(before, count)))


def steepest(rates: Sequence[float], smoothed: Sequence[float]) -> float | None:
    """Returns the rate at which the smoothed loss falls fastest per factor of the rate, before its minimum; None if nowhere.

    docs/train.md has the check that it was chosen by, against a tenth of the rate at the minimum.
    """
    end = min(range(len(smoothed)), key=smoothed.__getitem__)
    if end == 0:
        return None
    slopes = [(smoothed[i + 1] - smoothed[i]) / math.log(rates[i + 1] / rates[i]) for i in range(end)]
    i = min(range(end), key=slopes.__getitem__)
    return math.sqrt(rates[i] * rates[i + 1])


def range_test(learner: Learner, mixup: Any, rates: Sequence[float]) -> list[float]:
    """Trains one update at each rate; returns the losses, the mean over the update's images on all processes.

    An update is the run's own: its batches, augmentation, task, precision and clipping. Lambda and smoothing have the
    strength of the middle of the run, because a run has reached its full rate by then. The test ends early if the loss has
    diverged. The weights are worthless afterwards.
    """
    accelerator, task, optim = learner.accelerator, learner.task, learner.config.optim
    epochs, accum = learner.schedule.epochs, optim.grad_accum_steps
    task.set_epoch(epochs // 2, epochs)
    task.train()
    batches, losses = _batches(learner, mixup), []
    for rate in rates:
        for group in learner.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)  # as timm's schedules do, for --layer-decay
        total = torch.zeros((), device=accelerator.device)
        for image, target in itertools.islice(batches, accum):
            loss = task(image, target)["loss"]
            accelerator.backward(learner.scaled(loss, learner.share(len(target))) / accum)
            total += loss.detach().float() / accum
        clip_gradients(optim, accelerator, task)
        learner.optimizer.step()
        learner.optimizer.zero_grad()
        losses.append(accelerator.reduce(total, reduction="mean").item())
        if diverged(losses, len(rates)):
            break
    return losses


def find_rate(config: RunConfig, low: float, high: float, count: int) -> RangeTest:
    """Makes a range test of `count` updates from rate `low` to `high`, with a run's options, on weights that are thrown away.

    Raises UserError if the options, the data or the model do not allow a run, or the loss is not finite at the first rate.
    """
    with console_output(config.engine.json_logs), explained_errors(lambda: "no run was started"):
        accelerator = start(config)
        learner, _, note = assemble(config, accelerator)
        rates = exponential_rates(low, high, count)
        mixup = create_mixup(learner.config.aug, learner.config.model.num_classes, learner.config.data.multilabel)
        losses = range_test(learner, mixup, rates)
        images = round(learner.mean_batch * learner.config.optim.grad_accum_steps)
        main = accelerator.is_main_process
        accelerator.end_training()
    kept = losses[:-1] if diverged(losses, count) else losses
    if not kept:
        raise UserError(f"lr-low: the loss is {losses[0]} at the first update, before any rate was used; look at the data")
    smoothed = smooth_losses(kept, count)
    return RangeTest(rates[: len(losses)], losses, smoothed, steepest(rates, smoothed), images, note, main)


def _batches(learner: Learner, mixup: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the batches of the run, epoch after epoch, with the random numbers that training would use for them."""
    config, batches = learner.config, learner.batches
    for epoch in itertools.count():
        for step, (image, target) in enumerate(batches.epoch(epoch)):
            reseed(config.engine.seed, epoch, step, learner.accelerator.process_index)
            image, target = augment(image, target, batches.erase, mixup, config.model.channels_last)
            yield image.to(learner.dtype), target
