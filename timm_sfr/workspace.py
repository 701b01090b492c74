"""The folder of a run, and who speaks: the main process alone."""

from __future__ import annotations

import getpass
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from accelerate.utils import broadcast_object_list
from filelock import FileLock
from timm.models import safe_model_name

from timm_sfr.checkpoint import checkpoints
from timm_sfr.errors import UserError

_logger = logging.getLogger("timm_sfr")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Workspace:
    """A run's folder on the disk, the same on every process."""

    run: Path
    main: bool

    def say(self, text: str) -> None:
        """Prints a line, from the main process alone."""
        if self.main:
            _logger.info(text)

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
    if resume is not None:
        return Workspace(resume, accelerator.is_main_process)
    run = on_main(accelerator, lambda: str(_make(Path(output), experiment, model)))
    return Workspace(Path(run), accelerator.is_main_process)


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
    with FileLock(Path(tempfile.gettempdir()) / f"timm_sfr-{getpass.getuser()}.lock"):
        return work()


def read_run(run: Path) -> dict[str, Any]:
    """The options of the run in folder `run`, from its args.yaml.

    Raises:
        UserError: if `run` is no run.
    """
    if not (run / "args.yaml").is_file() or not checkpoints(run / "checkpoints"):
        lacks = "args.yaml" if not (run / "args.yaml").is_file() else "checkpoints/epoch-*"
        raise UserError(f"resume: {str(run)!r} is no run: it has no {lacks}; give the folder that the run printed")
    return read_yaml(run / "args.yaml")


def newest_run(output: str, experiment: str | None, model: str, given: dict[str, Any]) -> Path | None:
    """The run to go on with: that of the experiment, or the newest in `output` with the options `given`; None if there is none.

    A run without a checkpoint does not count.
    """
    root, given = Path(output), {name: value for name, value in given.items() if name != "output"}
    found = [root / experiment] if experiment is not None else sorted(root.glob(f"*-{safe_model_name(model)}*"))
    for run in reversed(found):
        if not (run / "args.yaml").is_file() or not checkpoints(run / "checkpoints"):
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


def show_log() -> None:
    """Sends the package's log lines to standard output, once."""
    if not _logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        _logger.addHandler(handler)
        _logger.setLevel(logging.INFO)
        _logger.propagate = False


def _make(output: Path, experiment: str | None, model: str) -> Path:
    name = experiment or f"{time.strftime('%Y%m%d-%H%M%S')}-{safe_model_name(model)}"
    run = output / name
    if experiment is None:
        while run.exists():
            run = run.with_name(run.name + "-2")
    dead = (run / "args.yaml").is_file() and not checkpoints(run / "checkpoints") and not (run / "model").exists()
    if (
        run.exists() and any(run.iterdir()) and not dead
    ):  # a run that died before its first checkpoint has nothing to lose
        raise UserError(
            f"output: {str(run)!r} already holds files; choose another --experiment, or go on with --resume {run}"
        )
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: {error}") from error
    return run
