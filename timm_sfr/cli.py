"""The command lines: options made from the configuration's fields, in groups, under timm's names; errors in one line."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from timm_sfr.build import DEFAULT_MODEL
from timm_sfr.config import SECTIONS, RunConfig, options
from timm_sfr.utils.console import show_log
from timm_sfr.utils.errors import UserError, near_matches, one_line
from timm_sfr.utils.files import read_yaml
from timm_sfr.utils.processes import launch_id, restarts
from timm_sfr.workspace import newest_run, read_run

_logger = logging.getLogger("timm_sfr")

# Exit statuses beside 0 and 2: the run is done and whole, but not published; a signal stopped it, --resume goes on.
PUSH_FAILED, INTERRUPTED = 3, 75
TRAIN = "Train any timm model with Self-Feature Regularization. With no data given, on the built-in digits."


# Options of timm's train.py that have another name here.
OTHERS = {"--amp": "--mixed-precision fp16 (or bf16)", "--amp-dtype": "--mixed-precision", "--num-gpu": "accelerate launch",
          "--native-amp": "--mixed-precision fp16 (or bf16)", "--no-prefetcher": "not needed"}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with near matches for a mistyped option."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError in place of printing the usage."""
        if message.startswith("unrecognized arguments: "):
            words = message.removeprefix("unrecognized arguments: ").split() or ["''"]  # an empty word
            message = f"unrecognized arguments: {' '.join(words)}"
            hint = f"; timm_sfr's is {OTHERS[words[0]]}" if words[0] in OTHERS else ""
            message += hint or near_matches(words[0], self._option_string_actions) or "; --help lists them"
        chosen = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)$", message)
        if chosen is not None:
            message += near_matches(chosen[1], re.findall(r"[\w-]+", chosen[2]))
        raise UserError(message)


def make_parser() -> Parser:
    """The parser of the training's options; what is not given stays out of its result."""
    parser = Parser(prog="train_sfr.py", description=TRAIN, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    add_training(parser)
    return parser


def add_training(parser: argparse.ArgumentParser) -> None:
    """Adds all options of a run, in groups."""
    parser.add_argument("-c", "--config", metavar="FILE", help="YAML file of options (a run's args.yaml repeats it)")
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder; 'auto': with the newest "
                        "of these options or this --experiment, or begin it")  # fmt: skip
    groups = {
        name: parser.add_argument_group(name, (kind.__doc__ or "").splitlines()[0]) for name, kind in SECTIONS.items()
    }
    for section, name, item in options():
        _add(groups[section], section, name, item)


def add_options(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Adds some of a run's options, by their outside names; what is not given stays out of the result."""
    known = {name: (section, item) for section, name, item in options()}
    for name in names:
        section, item = known[name]
        _add(parser, section, name, item)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds MODEL and --revision: what `timm_sfr.create_model` takes."""
    parser.add_argument(
        "model", metavar="MODEL", help="a run's folder, USER/NAME on the Hub, zoo name, or any timm name"
    )
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")


def given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Those of the options `names` that were given."""
    return {name: value for name, value in vars(args).items() if name in names}


def parse(arguments: Sequence[str] | None = None) -> tuple[RunConfig, Path | None]:
    """The run that the command line asks for, and the folder of the run to resume, if any.

    Options on the command line win over the ``--config`` file, and both over the defaults.

    Raises:
        UserError: for an option that is unknown, of the wrong type or out of bounds.
    """
    given = vars(make_parser().parse_args(arguments))
    config, resume = given.pop("config", None), given.pop("resume", None)
    if resume is None and restarts() > 0:
        resume = "auto"  # torchrun has started the processes again after a failure
    if resume == "auto":
        stored = _stored(config)
        wanted = RunConfig.from_flat({**stored, **given}, where=config or "options")
        same = {name: list(value) if isinstance(value, tuple) else value for name, value in {**stored, **given}.items()}
        model, launch = wanted.model.model or DEFAULT_MODEL, launch_id() if restarts() > 0 else None
        found = newest_run(wanted.engine.output, wanted.engine.experiment, model, same, launch)
        if found is None:
            if os.environ.get("RANK", "0") == "0":
                show_log(wanted.engine.json_logs)
                _logger.info("no run of these options has a checkpoint to go on with: beginning one")
            return wanted, None
        config, resume = None, str(found)
    if resume is not None:
        if config is not None:
            raise UserError("resume: the run has its own args.yaml; leave --config out")
        return RunConfig.from_flat({**read_run(Path(resume)), **given}, where=resume), Path(resume)
    stored = _stored(config)
    return RunConfig.from_flat({**stored, **given}, where=config or "options"), None


def _stored(config: str | None) -> dict[str, Any]:
    """The options of a ``--config`` file."""
    stored = read_yaml(Path(config)) if config is not None else {}
    stored.pop("zoo", None)  # what a recipe in hub_configs says of its published model; no option
    if config is not None and Path(config).resolve().parent.name == stored.get("experiment"):
        del stored["experiment"]  # a run's own: to repeat it is to make another folder
    return stored


def _add(group: Any, section: str, name: str, item: dataclasses.Field) -> None:
    flag, hint = "--" + name.replace("_", "-"), typing.get_type_hints(SECTIONS[section])[item.name]
    text = item.metadata["help"].replace("%", "%%")
    kind = next(k for k in typing.get_args(hint) if k is not type(None)) if isinstance(hint, types.UnionType) else hint
    if kind is bool:
        if item.default:
            flag, action, text = "--no-" + flag[2:], "store_false", f"turn off: {text}"
        else:
            action = "store_true"
        group.add_argument(flag, dest=name, action=action, default=argparse.SUPPRESS, help=text)
        return
    if item.default is not None and item.default != ():
        default = " ".join(map(str, item.default)) if isinstance(item.default, tuple) else item.default
        text += f" (default: {default})"
    flags = [flag, *([item.metadata["short"]] if item.metadata["short"] else [])]
    extra: dict[str, Any] = {"metavar": "|".join(item.metadata["choices"]) or "VALUE"}
    if kind is dict:
        extra |= {"nargs": "+", "action": _Pairs, "metavar": "KEY=VALUE"}
    elif typing.get_origin(kind) is tuple:
        extra |= {"nargs": "+", "type": _number(typing.get_args(kind)[0])}
    elif name == "torchcompile":
        extra |= {"nargs": "?", "const": "inductor"}
    else:
        extra |= {"type": _number(kind)}
    group.add_argument(*flags, dest=name, default=argparse.SUPPRESS, help=text, **extra)


def _number(kind: type) -> type:
    return kind if kind in (int, float) else str


class _Pairs(argparse.Action):
    """KEY=VALUE words as a dictionary, values read as YAML."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        pairs = dict(getattr(namespace, self.dest, None) or {})
        for word in values:
            key, sign, value = word.partition("=")
            if not sign:
                parser.error(f"argument {option_string}: expected KEY=VALUE; got {word!r}")
            pairs[key] = yaml.safe_load(value)
        setattr(namespace, self.dest, pairs)


def call(run: Callable[[argparse.Namespace], int], parser: Parser, arguments: Sequence[str] | None) -> int:
    """Parses and runs a command; its exit status, 2 with one line for a mistake."""
    try:
        return run(parser.parse_args(arguments))
    except UserError as error:
        return fail(one_line(error))


def fail(message: str, status: int = 2) -> int:
    """Prints one error line; the exit status, 2 for a failed run."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status
