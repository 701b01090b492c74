"""The folder of a run, and who speaks: the main process alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from timm.models import safe_model_name

from timm_sfr.runs.checkpoints import checkpoints
from timm_sfr.utils.console import fields, logger, show_log
from timm_sfr.utils.errors import UserError, near_paths
from timm_sfr.utils.files import read_yaml
from timm_sfr.utils.processes import launch_id, on_main

LOCK_PATIENCE = 12  # seconds: loading processes hold the lock of a killed run until they see, within five, that it is gone
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
            logger.info(text, extra=fields(event, **values) if event else None)

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
        lock.acquire(timeout=LOCK_PATIENCE)
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
