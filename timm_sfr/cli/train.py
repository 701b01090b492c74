"""``timm-sfr train`` and ``train_sfr.py``: parses the command line and trains."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm_sfr.cli.arguments import training_parser
from timm_sfr.cli.parser import INTERRUPTED, PUSH_FAILED, fail
from timm_sfr.config import AUTO, DEFAULT_MODEL, RunConfig, merged
from timm_sfr.runs.folder import newest_run, read_run
from timm_sfr.training.run import fit
from timm_sfr.utils.console import logger, show_log
from timm_sfr.utils.errors import HubError, Interrupted, UserError, one_line
from timm_sfr.utils.files import read_yaml
from timm_sfr.utils.processes import launch_id, restarts


def parse(arguments: Sequence[str] | None = None) -> tuple[RunConfig, Path | None]:
    """Returns the configuration from the command line, and the folder of the run to resume, or None.

    Options on the command line override the ``--config`` file, and both override the defaults.

    Raises:
        UserError: for an option that is unknown, of the wrong type or out of bounds.
    """
    return read_options(training_parser().parse_args(arguments))


def read_options(args: argparse.Namespace) -> tuple[RunConfig, Path | None]:
    """Does the same as `parse` for parsed arguments."""
    given = dict(vars(args))
    config, resume = given.pop("config", None), given.pop("resume", None)
    if resume is None and restarts() > 0:
        resume = "auto"  # torchrun has restarted the processes after a failure
    if resume == "auto":
        stored = _stored(config)
        asked = merged(stored, given)
        wanted = RunConfig.from_flat(asked, where=config or "options")
        same = {name: list(value) if isinstance(value, tuple) else value for name, value in asked.items()}
        same = {name: value for name, value in same.items() if (name, value) != ("batch_size", AUTO)}
        model, launch = wanted.model.model or DEFAULT_MODEL, launch_id() if restarts() > 0 else None
        found = newest_run(wanted.engine.output, wanted.engine.experiment, model, same, launch)
        if found is None:
            if os.environ.get("RANK", "0") == "0":
                show_log(wanted.engine.json_logs)
                logger.info("no run with these options has a checkpoint to resume; starting a new run")
            return wanted, None
        config, resume = None, str(found)
    if resume is not None:
        if config is not None:
            raise UserError("resume: the run has its own args.yaml; leave out --config")
        if given.get("batch_size") == AUTO:
            del given["batch_size"]  # the run has recorded what fitted
        return RunConfig.from_flat(merged(read_run(Path(resume)), given), where=resume), Path(resume)
    stored = _stored(config)
    return RunConfig.from_flat(merged(stored, given), where=config or "options"), None


def run(args: argparse.Namespace) -> int:
    """Trains; returns 0, 2 for an error, 3 if only the push failed, 75 if a signal stopped the run."""
    try:
        fit(*read_options(args))
    except HubError as error:
        return fail(one_line(error), PUSH_FAILED)
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":
            print(stop, file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        return fail("interrupted; --resume RUN continues from the last checkpoint")
    return 0


def _stored(config: str | None) -> dict[str, Any]:
    """Returns the options in a ``--config`` file."""
    stored = read_yaml(Path(config)) if config is not None else {}
    stored.pop("zoo", None)  # not an option: a recipe in hub_configs describes its published model there
    if config is not None and Path(config).resolve().parent.name == stored.get("experiment"):
        del stored["experiment"]  # a run's own args.yaml: repeating the run has to make another folder
    return stored
