"""``timm-sfr train`` and ``train_sfr.py``: parses the command line and trains."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm_sfr.cli.parser import INTERRUPTED, PUSH_FAILED, fail
from timm_sfr.cli.timm_options import translate
from timm_sfr.cli.verbs import training_parser
from timm_sfr.config import AUTO, DEFAULT_MODEL, RunConfig, merged
from timm_sfr.runs.folder import newest_run, read_run
from timm_sfr.training.devices import precision
from timm_sfr.training.run import fit
from timm_sfr.utils.console import logger, show_log
from timm_sfr.utils.errors import HubError, Interrupted, UserError, one_line
from timm_sfr.utils.files import read_yaml
from timm_sfr.utils.processes import hosts, launch_id, restarts


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
    config, resume = given.pop("config", None) or None, given.pop("resume", None) or None
    launches: list[str | None] = [None] if resume == "auto" else []  # whose runs to look for; None: anybody's
    if restarts() > 0 and hosts() == 1:  # torchrun has restarted the processes after a failure
        resume, launches = resume or "auto", [launch_id(), *launches]
    elif restarts() > 0 and resume is None:
        raise UserError("resume: torchrun has restarted the processes of this host, and each host counts its own restarts; give "
                        "--resume auto, which all hosts follow, and an --output on a disk that they share")  # fmt: skip
    if resume == "auto":
        values = _merged(_stored(config), given)[0]
        found = next(filter(None, (_newest(values, config, launch) for launch in launches)), None)
        if found is None:
            return _configured(_stored(config), given, config, "no run with these options has a checkpoint to resume; "
                               "starting a new run"), None  # fmt: skip
        config, resume = None, str(found)
        given.pop("start_epoch", None)  # it was for the run's start
    if resume is None:
        return _configured(_stored(config), given, config), None
    if config is not None:
        raise UserError("resume: the run has its own args.yaml; leave out --config")
    if given.get("start_epoch") is not None:
        raise UserError("start-epoch: a resumed run continues where it is; leave the option out, or start a new run from its "
                        f"weights: --model {resume} --pretrained")  # fmt: skip
    if given.get("batch_size") == AUTO:
        del given["batch_size"]  # the run has recorded what fitted
    if restarts() > 0:
        given.pop("resume_opt", None)  # it was for the resume before
    stored = {name: value for name, value in read_run(Path(resume)).items() if name != "resume_opt"}
    return _configured(stored, given, resume), Path(resume)


def _merged(stored: dict[str, Any], given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns the options of a file with those of the command line over them, by our names, and what to say of them."""
    (below, notes), (above, more) = translate(stored), translate(given, stored)
    return merged(below, above), list(dict.fromkeys([*notes, *more]))


def _configured(stored: dict[str, Any], given: dict[str, Any], where: str | None, *lines: str) -> RunConfig:
    """Returns the configuration of these options, and prints `lines` and what there is to say of the options."""
    values, notes = _merged(stored, given)
    config = RunConfig.from_flat(values, where=where or "options")
    if (notes or lines) and os.environ.get("RANK", "0") == "0":
        show_log(config.engine.json_logs)
        for line in (*lines, *notes):
            logger.info(line)
    return config


def _newest(values: dict[str, Any], where: str | None, launch: str | None) -> Path | None:
    """Returns the newest run with these options that has a checkpoint, of torchrun's `launch` or any; None without one."""
    wanted = RunConfig.from_flat(values, where=where or "options")
    model = wanted.model.model or DEFAULT_MODEL
    names = {*values, "img_size", "in_chans"} if values.get("input_size") else {*values}
    same = {name: value for name, value in wanted.flat().items() if name in names and value is not None}
    same.pop("resume_opt", None)  # it is for the resume, not for the run
    for name in ("mean", "std"):  # args.yaml has a value for each channel
        if len(same.get(name) or ()) == 1:
            same[name] = list(same[name]) * (wanted.model.in_chans or 3)
    if same.get("batch_size") == AUTO:
        del same["batch_size"]
    if same.get("mixed_precision") == "amp":
        same["mixed_precision"] = precision(wanted)
    return newest_run(wanted.engine.output, wanted.engine.experiment, model, same, launch)


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
    if stored.pop("resume", None):
        raise UserError(f"config: {config!r} has a value for resume; give --resume on the command line instead")
    if config is not None and Path(config).resolve().parent.name == stored.get("experiment"):
        del stored["experiment"]  # a run's own args.yaml: repeating the run has to make another folder
    return stored
