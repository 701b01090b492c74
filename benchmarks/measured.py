"""The rows of the speed benchmark, and the measurement of ratios: both sides take turns, medians over rounds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from benchmarks.timing import in_turns, ratios


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        part: The part of the benchmark.
        what: The measured quantity.
        value: Median.
        low: Lower quartile.
        high: Upper quartile.
        target: Its limit, or None.
        at_least: Whether the target is a minimum instead of a maximum.
        note: More text for the table.
    """

    part: str
    what: str
    value: float
    low: float
    high: float
    target: float | None = None
    at_least: bool = False
    note: str = ""


def timed(work: Callable[[], object], times: int = 1) -> float:
    """Returns the mean seconds of `work` over `times` calls in a row; waits for the GPU if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(times):
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / times


def ratio_row(
    part: str,
    what: str,
    base: Callable[[], object],
    other: Callable[[], object],
    rounds: int,
    *,
    times: int = 1,
    target: float | None = None,
    speed: bool = False,
) -> Row:
    """Returns the time of `other` over that of `base`, measured in turns; with `speed`, the speed of `other` over `base`."""
    taken, around, own = in_turns(partial(timed, base, times), {"": partial(timed, other, times)}, rounds, what)
    middle, low, high = ratios(taken, around)[""]
    if speed:
        middle, low, high = 1 / middle, 1 / high, 1 / low
    note = f"{1e3 * median(own):,.4g} ms against {1e3 * median(taken['']):,.4g} ms, {rounds} rounds"
    row = Row(part, what, middle, low, high, target, speed, note)
    print(row, flush=True)
    return row
