"""A figure of the speed benchmark, and how ratios are measured: in turns, medians over rounds."""

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
    """One figure.

    Attributes:
        part: Which part of the benchmark it belongs to.
        what: What was measured.
        value: Median.
        low: Lower quartile.
        high: Upper quartile.
        target: What it should not pass; None where there is none.
        at_least: The target is a floor.
        note: What else the table says.
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
    """Seconds that `work` takes, `times` in a row, on the GPU to its end."""
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
    """`other`'s time over `base`'s, in turns; `speed` turns it round, to how much faster `other` is."""
    taken, around, own = in_turns(partial(timed, base, times), {"": partial(timed, other, times)}, rounds, what)
    middle, low, high = ratios(taken, around)[""]
    if speed:
        middle, low, high = 1 / middle, 1 / high, 1 / low
    note = f"{1e3 * median(own):.3g} ms against {1e3 * median(taken['']):.3g} ms, {rounds} rounds"
    row = Row(part, what, middle, low, high, target, speed, note)
    print(row, flush=True)
    return row
