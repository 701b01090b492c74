"""Signals, looked at between updates: stop after this one, or keep a checkpoint and go on.

SIGTERM and SIGINT ask for a stop, a second SIGINT stops at once; SIGUSR1 asks for a checkpoint.
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

import torch

# Several processes agree by a collective; a signal waits for at most so many updates.
AGREE_EVERY = 10
ECHO = 1.0  # seconds: a terminal sends Ctrl-C to all processes, and their launcher hands it on to them once more


class Signals:
    """A context in which signals are noted in place of ending the process.

    Attributes:
        stop: The signal that asked for a stop, or None.
        save: Whether a checkpoint was asked for.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.stop: int | None = None
        self.save = False
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        # Python lets the main thread alone set handlers; a run in another thread goes without.
        if threading.current_thread() is threading.main_thread():
            names = ("SIGTERM", "SIGINT", "SIGUSR1")  # Windows lacks the last
            numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
            self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before if before is not None else signal.SIG_DFL)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == getattr(signal, "SIGUSR1", None):
            self.save = True
        elif number == signal.SIGINT and self.stop == signal.SIGINT:
            if time.monotonic() - self._since > ECHO:
                raise KeyboardInterrupt
        else:
            self.stop, self._since = number, time.monotonic()

    def asked(self, updates: int, now: bool = False) -> tuple[int | None, bool]:
        """What any process was asked for, the same on all: the signal to stop for, and whether to keep a checkpoint.

        Args:
            updates: How many are done, the same on all processes.
            now: All processes are here at the end of an epoch: agree at once.
        """
        if self.accelerator.num_processes == 1:
            stop, save = self.stop, self.save
        elif now or updates % AGREE_EVERY == 0:
            own = torch.tensor([self.stop or 0, int(self.save)], device=self.accelerator.device)
            flags = self.accelerator.gather(own[None]).amax(0).tolist()
            stop, save = flags[0] or None, bool(flags[1])
        else:
            return None, False
        if save:
            self.save = False
        return stop, save
