"""Makes, locks and finds the folders of runs; prints from the main process only."""

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

# Seconds to wait for the lock. Loading processes of a killed run hold its lock until they notice, within five seconds.
LOCK_PATIENCE = 12
# Files in a run's folder: locked while it trains; the id of the launch that started it.
LOCK, LAUNCH = ".lock", ".launch"


@dataclass(frozen=True)
class Workspace:
    """A run's folder, the same on all processes; only the main process holds the lock."""

    run: Path
    main: bool
    lock: FileLock | None = None

    def release(self) -> None:
        """Lets another process train in the folder."""
        if self.lock is not None:
            self.lock.release()

    def say(self, text: str, event: str | None = None, **values: Any) -> None:
        """Logs a line, on the main process only; `event` and `values` are its machine-readable form (--json-logs)."""
        if self.main:
            logger.info(text, extra=fields(event, **values) if event else None)

    def kept(self) -> str:
        """Returns a phrase that names the newest checkpoint, for messages."""
        found = checkpoints(self.run / "checkpoints")
        return f"the checkpoint {found[-1]} is kept" if found else "no checkpoint was due yet"


def open_workspace(output: str, experiment: str | None, model: str, resume: Path | None, accelerator: Any) -> Workspace:
    """Makes and locks the folder of a new run, or locks the folder of the run to resume.

    Raises UserError if the folder already contains a run, cannot be made, or another process trains in it.
    """
    show_log()
    lock: FileLock | None = None

    def make_and_lock() -> str:
        nonlocal lock
        run = resume if resume is not None else _make(Path(output), experiment, model)
        lock = _lock(run)
        if resume is None:
            _check_empty(run)
        launch = launch_id()
        if launch is not None:
            (run / LAUNCH).write_text(launch)
        return str(run)

    run = Path(on_main(accelerator, make_and_lock))
    return Workspace(run, accelerator.is_main_process, lock)


def read_run(run: Path) -> dict[str, Any]:
    """Returns the options in the args.yaml of folder `run`; raises UserError if it is not a run's folder with a checkpoint."""
    if run.is_file():
        raise UserError(
            f"resume: expected the folder of a run; got the file {str(run)!r}; a checkpoint of timm's has no exact state to "
            f"resume: start a new run from its weights with --initial-checkpoint {run}, and --start-epoch for its place in the "
            "schedule"
        )
    if not (run / "args.yaml").is_file() or not checkpoints(run / "checkpoints"):
        hint = "" if run.exists() else near_paths(run)
        lacks = "args.yaml" if not (run / "args.yaml").is_file() else "checkpoints/epoch-*"
        raise UserError(f"resume: {str(run)!r} is not a run: it has no {lacks}{hint}; give the folder that the run printed")
    return read_yaml(run / "args.yaml")


def newest_run(output: str, experiment: str | None, model: str, given: dict[str, Any], launch: str | None = None) -> Path | None:
    """Returns the run to resume: the `experiment`, or the newest run in `output` with the options `given`; None if none.

    Skips runs without a checkpoint and, if `launch` is given, runs of other launches.
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
    """Returns the model's part of the run folder's name; for a model in a folder, from that folder's name."""
    return safe_model_name(model) if ":" in model else safe_model_name(Path(model).name or "model")


def _make(output: Path, experiment: str | None, model: str) -> Path:
    """Makes the folder of a new run: the experiment's, which may exist, or one whose name is not taken yet."""
    run = output / (experiment or f"{time.strftime('%Y%m%d-%H%M%S')}-{_stem(model)}")
    while True:
        try:
            run.mkdir(parents=True, exist_ok=experiment is not None)
        except FileExistsError as error:
            if experiment is not None:
                raise UserError(f"output: expected a folder; {str(run)!r} is a file; choose another --experiment") from error
            run = run.with_name(run.name + "-2")
        except OSError as error:
            raise UserError(f"output: {error}") from error
        else:
            return run


def _lock(run: Path) -> FileLock | None:
    """Locks the folder until the process ends, or raises UserError if another has; returns None on file systems without locks."""
    lock = FileLock(run / LOCK)
    try:
        lock.acquire(timeout=LOCK_PATIENCE)
    except Timeout as error:
        raise UserError(f"output: another process is training in {str(run)!r}; choose another --experiment") from error
    except (OSError, NotImplementedError):
        return None
    return lock


def _check_empty(run: Path) -> None:
    """Raises UserError unless the folder is empty or contains a run that died before its first checkpoint."""
    dead = (run / "args.yaml").is_file() and not checkpoints(run / "checkpoints") and not (run / "model").exists()
    if not dead and any(path.name not in (LOCK, LAUNCH) for path in run.iterdir()):
        raise UserError(
            f"output: {str(run)!r} already holds files; choose another --experiment, or continue it with --resume {run}"
        )
