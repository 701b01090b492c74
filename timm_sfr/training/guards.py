"""Guards of a run: `FiniteGuard` finds non-finite losses and gradients, `Signals` notes signals to stop or to save."""

from __future__ import annotations

import json
import math
import shlex
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from timm_sfr.runs.folder import Workspace
from timm_sfr.runs.records import TERMS, term_names
from timm_sfr.utils.errors import Interrupted
from timm_sfr.utils.files import write_json

# The terms in the order in which a non-finite one is looked for: the parts of a sum before the sum.
WATCHED = [term.name for term in sorted((t for t in TERMS if t.loss), key=lambda t: (t.name == "loss", not t.parts))]
MOST_IN_A_ROW = 10  # updates skipped in a row: more are no accident
ADVICE = "try a lower --lr, --clip-grad 1, or --mixed-precision bf16 instead of fp16"
AGREE_EVERY = 10  # updates: how often several processes agree on signals, which takes a collective
ECHO = 1.0  # seconds: a terminal sends Ctrl-C to all processes, and their launcher then sends it to them again


class Watched:
    """Copies numbers from the device to the host without making the device wait."""

    def __init__(self, device: torch.device, count: int) -> None:
        cuda = device.type == "cuda"
        self.pinned = torch.zeros(count, pin_memory=True) if cuda else None
        self.event = torch.cuda.Event() if cuda else None
        self.values: Tensor | None = None

    def send(self, values: Tensor) -> None:
        """Starts to copy (count,) numbers."""
        self.values = values if self.pinned is None else self.pinned.copy_(values, non_blocking=True)
        if self.event is not None:
            self.event.record()

    def receive(self) -> list[float] | None:
        """Returns the numbers sent last, or None if they were already received."""
        if self.values is None:
            return None
        if self.event is not None:
            self.event.synchronize()
        values, self.values = self.values.tolist(), None
        return values


class FiniteGuard:
    """Checks that the terms of the loss and the norm of the gradients are finite.

    The loss is checked while the backward pass runs. The norm is checked before the update if the policy is ``"skip"`` or
    the device is not CUDA; otherwise at the next update and before anything is saved, so that the GPU need not wait. In
    fp16 the gradient scaler skips updates by itself: then only too many in a row count.

    The policy ``"skip"`` skips the update and restores the statistics that the batch changed; ``"stop"`` stops the run. `names`
    are the terms of the loss in the order in which they are sent, by default those that every run has.
    """

    def __init__(self, accelerator: Any, policy: str = "stop", names: tuple[str, ...] | None = None) -> None:
        names = names or term_names(teacher=False)
        self.accelerator, self.policy, self.names = accelerator, policy, names
        self.terms, self.norm = Watched(accelerator.device, len(names)), Watched(accelerator.device, 1)
        self.bad: tuple[str, float] | None = None  # the non-finite term of this group of batches, and its value
        self.late: tuple[int, int, int] | None = None  # epoch, batch and update of one found only after its update
        self._sent: tuple[int, int, int] | None = None
        self.in_a_row = self.skipped = 0
        self.loss = math.nan  # of the batch checked last
        self._kept: list[tuple[Tensor, Tensor]] = []

    @property
    def scaled(self) -> bool:
        """Whether a gradient scaler skips updates by itself."""
        return self.accelerator.scaler is not None

    def begin(self, module: nn.Module, sums: dict[str, Tensor]) -> None:
        """Begins a group of batches: copies the state of `module` and `sums` that a non-finite batch would spoil."""
        self.bad = None
        if self.policy == "skip" or self.scaled:
            spoiled = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
            self._kept = [(tensor, tensor.clone()) for tensor in [*spoiled, *sums.values()]]

    def check_terms(self) -> bool:
        """Returns whether the terms sent last are finite, and also the last update's gradients if not yet checked."""
        self.settle()
        if self.late is not None:  # these terms come from weights that a bad update has spoiled
            return False
        sent = self.terms.receive()
        assert sent is not None, "the trainer sends a batch's terms before it checks them"
        values = dict(zip(self.names, sent, strict=True))
        self.loss = values["loss"]
        found = next(((name, values[name]) for name in WATCHED if not math.isfinite(values.get(name, 0.0))), None)
        if not self.scaled:
            self.bad = self.bad or found
        return found is None

    def check_gradients(self, module: nn.Module, place: tuple[int, int, int]) -> bool:
        """Returns whether to make the update, the same on all processes; `place` is epoch and batch (from 0), update (from 1)."""
        if self.scaled:
            return True
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        norm = get_total_norm(gradients)[None]
        later = self.policy == "stop" and norm.is_cuda
        self.norm.send(norm)
        self._sent = place if later else None
        if later:
            return self.bad is None
        self.settle()
        if self.accelerator.num_processes > 1 and self.policy == "skip":
            wrong = torch.tensor([float(self.bad is not None)], device=norm.device)
            if self.accelerator.reduce(wrong, "sum").item() > 0:
                self.bad = self.bad or ("gradient", math.nan)
        return self.bad is None

    def settle(self) -> None:
        """Checks the norm sent last."""
        norm = self.norm.receive()
        if norm is not None and not math.isfinite(norm[0]):
            self.bad, self.late = self.bad or ("gradient", norm[0]), self._sent

    def rollback(self) -> None:
        """Restores the state from before the group of batches."""
        with torch.no_grad():
            for tensor, kept in self._kept:
                tensor.copy_(kept)

    def too_many(self, made: bool) -> bool:
        """Counts an update that was made or skipped; returns whether too many in a row were skipped."""
        self.in_a_row = 0 if made else self.in_a_row + 1
        self.skipped += not made
        return self.in_a_row > MOST_IN_A_ROW


def write_event(path: Path, event: dict[str, Any]) -> None:
    """Appends an event to the JSON list in a file."""
    try:
        events = json.loads(path.read_text())
    except (OSError, ValueError):
        events = []
    write_json(path, [*events, event])


class Signals:
    """A context that notes SIGTERM, SIGINT and SIGUSR1 instead of ending the process; a second Ctrl-C ends it."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.stop: int | None = None  # the signal that requested a stop
        self.save = False  # whether a checkpoint was requested
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        # Python lets only the main thread set handlers; a run in another thread has none.
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
        """Returns the signal to stop for, or None, and whether to save a checkpoint; the same on all processes.

        They agree every few of the `updates`, or with `now` at once, because all are at the end of an epoch.
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


def interrupted(number: int, updates: int, workspace: Workspace, accelerator: Any) -> Interrupted:
    """Returns the exception for a run that signal `number` stopped after `updates` updates."""
    command = _command(accelerator.num_processes, accelerator.device.type == "cpu")
    return Interrupted(
        f"stopped by {signal.Signals(number).name} after update {updates}, {workspace.kept()}; continue with: "
        f"{command} --resume {shlex.quote(str(workspace.run))}"
    )


def _command(processes: int, cpu: bool) -> str:
    """Returns the command that trains, as this process was started."""
    started = Path(sys.argv[0])
    script = shlex.quote(str(started)) if started.name == "train_sfr.py" else "train_sfr.py"
    installed = {"timm-sfr": "timm-sfr train", "train-sfr": "train-sfr"}.get(started.name)
    if processes == 1:
        return installed or f"python {script}"
    launcher, plain = "accelerate launch --num_processes", "--no_python"
    if cpu:
        launcher, plain = "torchrun --nproc-per-node", "--no-python"
    return f"{launcher} {processes} {f'{plain} {installed}' if installed else script}"
