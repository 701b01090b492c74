"""Runs a function on several pieces of work at the same time, each in its own process."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import wait
from typing import Any, TypeVar

from timm_sfr.utils.errors import UserError

T = TypeVar("T")


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone, even if that was killed; the run goes on from its checkpoint."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "only child processes work"
    wait([parent.sentinel])
    os._exit(1)


def _work(answer: Any, function: Callable[..., Any], *job: Any) -> None:
    """Sends the result of ``function(*job)``, or the error as text, so that one failure does not end the others."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        found = function(*job)
    except UserError as error:
        found = str(error)
    except Exception as error:
        traceback.print_exc()
        found = f"{type(error).__name__}: {error}"
    answer.send(found)


def side_by_side(function: Callable[..., Any], pieces: Iterable[T], jobs: int, *more: Any) -> Iterator[tuple[T, Any | str]]:
    """Calls ``function(piece, *more)`` for all pieces, `jobs` at the same time, each in a fresh process.

    Yields each piece when it ends, with its result; if it failed or its process was killed, with the error as text.
    """
    context, queue = multiprocessing.get_context("spawn"), iter(pieces)
    running: dict[Any, tuple[T, Any]] = {}

    def start(count: int) -> None:
        for piece in itertools.islice(queue, count):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(theirs, function, piece, *more))
            process.start()
            theirs.close()  # so that the pipe closes when the process ends
            running[ours] = (piece, process)

    try:
        start(jobs)
        while running:
            for ours in wait(list(running)):
                piece, process = running.pop(ours)
                try:
                    found = ours.recv()
                except EOFError:
                    process.join()
                    found = f"its process ended with status {process.exitcode}"
                process.join()
                ours.close()
                yield piece, found
                start(1)
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()
