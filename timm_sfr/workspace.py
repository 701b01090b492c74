"""The folder of a run, and who speaks: the main process alone."""

from __future__ import annotations

import getpass
import logging
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from timm.models import safe_model_name

from timm_sfr.checkpoint import checkpoints
from timm_sfr.errors import UserError, near_paths
from timm_sfr.launch import launch_id
from timm_sfr.progress import fields, show_log

_logger = logging.getLogger("timm_sfr")
Result = TypeVar("Result")
PATIENCE = 12  # seconds: loading processes hold the lock of a killed run until they see, within five, that it is gone
LOCK, LAUNCH = ".lock", ".launch"  # in a run's folder: held while it trains; what started it


@dataclass(frozen=True)
class Workspace:
    """A run's folder on the disk, the same on every process."""

    run: Path
    main: bool
    lock: FileLock | None = None

    def release(self) -> None:
        """Lets another process train in the folder."""
        if self.lock is not None:
            self.lock.release()

    def say(self, text: str, event: str | None = None, **values: Any) -> None:
        """Prints a line, from the main process alone; `event` and `values` are what it says to programs (--json-logs)."""
        if self.main:
            _logger.info(text, extra=fields(event, **values) if event else None)

    def kept(self) -> str:
        """What is safe on the disk, in words."""
        found = checkpoints(self.run / "checkpoints")
        return f"the checkpoint {found[-1]} is kept" if found else "no checkpoint was due yet"


def open_workspace(output: str, experiment: str | None, model: str, resume: Path | None, accelerator: Any) -> Workspace:
    """Makes the folder of a new run, or takes that of the run to resume.

    Raises:
        UserError: if the folder already holds a run or cannot be made.
    """
    show_log()
    lock: FileLock | None = None

    def take() -> str:
        nonlocal lock
        run = resume if resume is not None else _make(Path(output), experiment, model)
        lock = _own(run)
        if resume is None:
            _check_empty(run)
        launch = launch_id()
        if launch is not None:
            (run / LAUNCH).write_text(launch)
        return str(run)

    run = Path(on_main(accelerator, take))
    return Workspace(run, accelerator.is_main_process, lock)


def on_main(accelerator: Any, work: Callable[[], Any]) -> Any:
    """What `work` gives on the main process, on every process.

    Raises:
        UserError: on every process, if it fails there.
    """
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = work()
        except UserError as error:
            answer[1] = error
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def one_at_a_time(accelerator: Any, work: Callable[[], Result]) -> Result:
    """What `work` gives on each process, one after another on a machine: what the first downloads is there for the others.

    A lock on a file, not a barrier: those who wait at a barrier give up after the ten minutes that NCCL allows.
    """
    if accelerator.num_processes == 1:
        return work()
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()  # a user may have no name, in a container
    with FileLock(Path(tempfile.gettempdir()) / f"timm_sfr-{user}.lock"):
        return work()


def read_run(run: Path) -> dict[str, Any]:
    """The options of the run in folder `run`, from its args.yaml.

    Raises:
        UserError: if `run` is no run.
    """
    if not (run / "args.yaml").is_file() or not checkpoints(run / "checkpoints"):
        hint = "" if run.exists() else near_paths(run)
        lacks = "args.yaml" if not (run / "args.yaml").is_file() else "checkpoints/epoch-*"
        raise UserError(
            f"resume: {str(run)!r} is no run: it has no {lacks}{hint}; give the folder that the run printed"
        )
    return read_yaml(run / "args.yaml")


def newest_run(
    output: str, experiment: str | None, model: str, given: dict[str, Any], launch: str | None = None
) -> Path | None:
    """The run to go on with: that of the experiment, or the newest in `output` with the options `given`; None if there is none.

    A run without a checkpoint does not count, nor one of another `launch` where that is given.
    """
    root, given = Path(output), {**{name: value for name, value in given.items() if name != "output"}, "model": model}
    found = [root / experiment] if experiment is not None else sorted(root.glob(f"*-{_stem(model)}*"))
    for run in reversed(found):
        if not (run / "args.yaml").is_file() or not checkpoints(run / "checkpoints"):
            continue
        if launch is not None and (not (run / LAUNCH).is_file() or (run / LAUNCH).read_text() != launch):
            continue
        if experiment is not None or given.items() <= read_yaml(run / "args.yaml").items():
            return run
    return None


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping of options from a YAML file.

    Raises:
        UserError: if the file is missing or holds something else.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "problem", None) or getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"config: cannot read {str(path)!r}: {reason}") from error
    if not isinstance(values, dict):
        raise UserError(f"config: expected {str(path)!r} to hold OPTION: VALUE lines; got {type(values).__name__}")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _stem(model: str) -> str:
    """A model's part of the folder's name: of one that is a folder itself the folder's."""
    return safe_model_name(model) if ":" in model else safe_model_name(Path(model).name or "model")


def _make(output: Path, experiment: str | None, model: str) -> Path:
    """A new run's folder: made by us alone, or that of the experiment."""
    run = output / (experiment or f"{time.strftime('%Y%m%d-%H%M%S')}-{_stem(model)}")
    while True:
        try:
            run.mkdir(parents=True, exist_ok=experiment is not None)
        except FileExistsError as error:
            if experiment is not None:
                raise UserError(
                    f"output: expected a folder; {str(run)!r} is a file; choose another --experiment"
                ) from error
            run = run.with_name(run.name + "-2")
        except OSError as error:
            raise UserError(f"output: {error}") from error
        else:
            return run


def _own(run: Path) -> FileLock | None:
    """A lock on the folder, kept until the process ends.

    Raises:
        UserError: if another process trains in it.
    """
    lock = FileLock(run / LOCK)
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout as error:
        raise UserError(f"output: another process is training in {str(run)!r}; choose another --experiment") from error
    except (OSError, NotImplementedError):  # a file system without locks
        return None
    return lock


def _check_empty(run: Path) -> None:
    """Raises UserError if a folder for a new run holds anything but what a run that died before its first checkpoint left."""
    dead = (run / "args.yaml").is_file() and not checkpoints(run / "checkpoints") and not (run / "model").exists()
    if not dead and any(path.name not in (LOCK, LAUNCH) for path in run.iterdir()):
        raise UserError(
            f"output: {str(run)!r} already holds files; choose another --experiment, or go on with --resume {run}"
        )
