"""The progress of a run: two bars in a terminal, otherwise a line now and then, or lines of JSON."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from torch.utils.data import IterableDataset
from tqdm import tqdm

from timm_sfr.runs.records import log_line
from timm_sfr.runs.scores import CLASSIFICATION, PERCENT, TITLES
from timm_sfr.utils.console import clock, fields, logger

Item = TypeVar("Item")
LINE_EVERY = 30.0  # seconds between lines within an epoch when there are no bars
VALIDATION = 1 / 3  # cost of a validation batch in training batches: a backward pass costs two forward passes
NARROW = 64  # columns: in a narrower terminal, only the text is shown
WIDE_FORMAT, NARROW_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {text}", "{desc} {percentage:3.0f}% {text}"


class Progress:
    """Shows the progress of a run without using the device."""

    def __init__(
        self,
        epochs: int,  # of the whole run
        steps: tuple[int, int],  # batches per epoch, and per validation (0 if unknown)
        val_interval: int,  # epochs between validations
        log_interval: int,  # batches between checks whether a line is due
        main: bool,  # whether this process prints
        shown: Sequence[str] = PERCENT[CLASSIFICATION],  # the scores in percent that an epoch's line has, the main one first
    ) -> None:
        self.shown = shown
        self.epochs, self.steps, self.val_steps = epochs, max(1, steps[0]), steps[1]
        self.val_interval, self.log_interval = val_interval, log_interval
        self.main, self.bars = main, main and sys.stderr.isatty()
        self.run_bar: _Bar | None = None
        self.epoch_bar: _Bar | None = None
        self.epoch, self.first, self.step, self.images, self.loss, self.finite = 0, 0, 0, 0, 0.0, 0
        self.score = ""
        self.done = self.before = 0.0  # in training batches; before: done before this process started
        self.began = self.epoch_began = self.spoke = time.perf_counter()

    def __enter__(self) -> Progress:
        self.began = self.spoke = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._end_bar()
        if self.run_bar is not None:
            self.run_bar.close()
            self.run_bar = None

    def work(self, epochs: int) -> float:
        """Returns the work of the first `epochs` epochs in training batches; a validation batch counts as a third."""
        validations = epochs // self.val_interval + (epochs == self.epochs and epochs % self.val_interval > 0)
        return epochs * self.steps + validations * self.val_steps * VALIDATION

    def begin(self, epoch: int, start: int) -> None:
        """Begins an epoch at batch `start`."""
        now = time.perf_counter()
        if self.done == 0:
            self.before, self.began = self.work(epoch) + start, now
        self.epoch, self.first, self.step, self.images, self.loss, self.finite = epoch, start, start, 0, 0.0, 0
        self.done, self.epoch_began = self.work(epoch) + start, now
        if self.bars:
            self.run_bar = self.run_bar or _Bar("run", self.work(self.epochs), 0)
            self._new_bar(f"epoch {epoch + 1}/{self.epochs}", self.steps, start)
            self._draw()

    def batch(self, images: int, loss: float) -> None:
        """Counts a finished batch: its number of images on all processes, and its loss."""
        self.step, self.images = self.step + 1, self.images + images
        if math.isfinite(loss):  # a non-finite loss is reported separately
            self.loss, self.finite = self.loss + loss, self.finite + 1
        self.done += 1
        if not self.main:
            return
        if self.epoch_bar is not None:
            self.epoch_bar.advance(1, self._epoch_text())
            self._draw()
        if self.step % self.log_interval == 0 and self.step < self.steps:
            self._line(f"batch {self.step}/{self.steps} | {self._epoch_text()}", loss=self.mean_loss, batch=self.step,
                        batches=self.steps, images_per_second=self.rate)  # fmt: skip

    def validating(self, loader: Iterable[Item]) -> Iterator[Item]:
        """Yields the batches of a validation and counts them."""
        if self.bars and self.val_steps > 0:
            self._new_bar(f"validation {self.epoch + 1}/{self.epochs}", self.val_steps, 0)
        for count, batch in enumerate(loader, 1):
            yield batch
            self.done += VALIDATION
            if self.main and self.epoch_bar is not None:
                self.epoch_bar.advance(1, f"{count}/{self.val_steps}")
                self._draw()
            elif self.main and count % self.log_interval == 0:
                self._line(f"validation {count}/{self.val_steps}", validation=count)

    def end(self, row: dict[str, Any]) -> None:
        """Ends an epoch: prints its row of summary.csv as a line."""
        if row["val_loss"] != "":
            main = self.shown[0]
            self.score = f"{TITLES[main]} {row[f'val_{main}']:.2f} (epoch {self.epoch + 1}), "
        self._end_bar()
        self._draw()
        logger.info(log_line(row, self.epochs, self.shown), extra=fields("epoch", **row))

    @property
    def mean_loss(self) -> float:
        """The mean loss of the epoch's batches so far, without the non-finite ones."""
        return self.loss / max(1, self.finite)

    @property
    def rate(self) -> float:
        """Images per second in this epoch, on all processes."""
        return self.images / max(1e-9, time.perf_counter() - self.epoch_began)

    @property
    def left(self) -> float:
        """Estimated seconds until the run ends, at the average speed of this process so far."""
        made = self.done - self.before
        if made <= 0:
            return math.inf
        return (time.perf_counter() - self.began) / made * max(0.0, self.work(self.epochs) - self.done)

    def _epoch_text(self) -> str:
        made, elapsed = self.step - self.first, time.perf_counter() - self.epoch_began
        left = elapsed / made * (self.steps - self.step) if made else math.inf
        return f"loss {self.mean_loss:.4f}, {self.rate:.0f} images/s, {clock(left)} left"

    def _draw(self) -> None:
        if self.run_bar is not None:
            made = min(self.done, self.work(self.epochs))
            self.run_bar.advance(made - self.run_bar.n, f"{self.score}{clock(self.left)} left")

    def _new_bar(self, name: str, total: int, start: int) -> None:
        self._end_bar()
        self.epoch_bar = _Bar(name, total, start)

    def _end_bar(self) -> None:
        if self.epoch_bar is not None:
            self.epoch_bar.close()
            self.epoch_bar = None

    def _line(self, text: str, **values: Any) -> None:
        """Logs the progress of an epoch if the last line is old enough; if bars show it, only in JSON."""
        now = time.perf_counter()
        if now - self.spoke < LINE_EVERY or now - self.epoch_began < LINE_EVERY:
            return
        self.spoke, left = now, self.left
        extra = fields("progress", epoch=self.epoch, epochs=self.epochs, seconds_left=left, **values)
        extra["fields"]["json_only"] = self.bars
        logger.info(f"epoch {self.epoch + 1}/{self.epochs}: {text}; {clock(left)} left of the run", extra=extra)


def watched(loader: Iterable[Item], name: str = "validation") -> Iterator[Item]:
    """Yields the batches of a loader, with a bar of that name in a terminal."""
    main = os.environ.get("RANK", "0") == "0"
    yield from tqdm(loader, name, length_of(loader) or None, leave=False, disable=None if main else True)


def length_of(loader: Any) -> int:
    """Returns the number of batches of a loader; 0 for a stream, whose length is not reliable."""
    return 0 if isinstance(getattr(loader, "dataset", None), IterableDataset) else len(loader)


class _Bar(tqdm):
    """A bar followed by a text; the line never wraps."""

    text = ""

    def __init__(self, name: str, total: float, start: float) -> None:
        super().__init__(total=total, initial=start, desc=name.ljust(12), leave=False, dynamic_ncols=True, file=sys.stderr)

    @property
    def format_dict(self) -> dict[str, Any]:
        """The values that tqdm formats the bar with."""
        found = super().format_dict
        narrow = found["ncols"] is not None and found["ncols"] < NARROW
        return {**found, "text": self.text, "bar_format": NARROW_FORMAT if narrow else WIDE_FORMAT}

    def advance(self, count: float, text: str) -> None:
        """Advances the bar; tqdm redraws it when its interval has passed."""
        self.text = text
        self.update(count)
