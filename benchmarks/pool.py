"""Work side by side, each piece in a process of its own."""

from __future__ import annotations

import itertools
import multiprocessing
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import wait
from typing import Any, TypeVar

from timm_sfr.utils.errors import UserError

T = TypeVar("T")


def _work(answer: Any, function: Callable[..., Any], *job: Any) -> None:
    """Sends ``function(*job)``, or in words what went wrong: one that fails must not end the others."""
    try:
        found = function(*job)
    except UserError as error:
        found = str(error)
    except Exception as error:
        traceback.print_exc()
        found = f"{type(error).__name__}: {error}"
    answer.send(found)


def side_by_side(
    function: Callable[..., Any], pieces: Iterable[T], jobs: int, *more: Any
) -> Iterator[tuple[T, Any | str]]:
    """Does ``function(piece, *more)`` for all pieces, `jobs` at once, in fresh processes: nothing of one is left in the next.

    Yields each piece as it ends with what came of it, or with what went wrong in words, also where its process was killed.
    """
    context, queue = multiprocessing.get_context("spawn"), iter(pieces)
    running: dict[Any, tuple[T, Any]] = {}

    def start(count: int) -> None:
        for piece in itertools.islice(queue, count):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(theirs, function, piece, *more))
            process.start()
            theirs.close()  # so that the end of the process ends the pipe
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
