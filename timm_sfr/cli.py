"""The command line: one option per configuration field, in groups, under timm's names."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from timm_sfr.build import DEFAULT_MODEL
from timm_sfr.config import SECTIONS, RunConfig, options
from timm_sfr.errors import UserError, near_matches
from timm_sfr.launch import restarts
from timm_sfr.workspace import newest_run, read_run, read_yaml

# Exit statuses beside 0 and 2: the run is done and whole, but not published; a signal stopped it, --resume goes on.
PUSH_FAILED, INTERRUPTED = 3, 75


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with near matches for a mistyped option."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError in place of printing the usage."""
        if message.startswith("unrecognized arguments: "):
            words = message.removeprefix("unrecognized arguments: ").split() or ["''"]  # an empty word
            message = f"unrecognized arguments: {' '.join(words)}"
            message += near_matches(words[0], self._option_string_actions) or "; --help lists them"
        raise UserError(message)


def make_parser() -> Parser:
    """The parser of all options; what is not given stays out of its result."""
    parser = Parser(
        prog="train_sfr.py",
        description="Train any timm model with Self-Feature Regularization. With no data given, on the built-in digits.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", metavar="FILE", help="YAML file of options (a run's args.yaml repeats it)")
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder; 'auto': with the newest "
                        "of these options or this --experiment, or begin it")  # fmt: skip
    groups = {
        name: parser.add_argument_group(name, (kind.__doc__ or "").splitlines()[0]) for name, kind in SECTIONS.items()
    }
    for section, name, item in options():
        hint = typing.get_type_hints(SECTIONS[section])[item.name]
        _add(groups[section], "--" + name.replace("_", "-"), name, item, hint)
    return parser


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
        found = newest_run(wanted.engine.output, wanted.engine.experiment, wanted.model.model or DEFAULT_MODEL, same)
        if found is None:
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
    return stored


def _add(group: Any, flag: str, name: str, item: dataclasses.Field, hint: Any) -> None:
    text = item.metadata["help"].replace("%", "%%")
    kind = next(k for k in typing.get_args(hint) if k is not type(None)) if isinstance(hint, types.UnionType) else hint
    if kind is bool:
        if item.default:
            group.add_argument("--no-" + flag[2:], dest=name, action="store_false", help=f"turn off: {text}")
        else:
            group.add_argument(flag, dest=name, action="store_true", help=text)
        return
    if item.default is not None and item.default != ():
        text += f" (default: {item.default})"
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
    group.add_argument(*flags, dest=name, help=text, **extra)


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


def fail(message: str, status: int = 2) -> int:
    """Prints one error line; the exit status, 2 for a failed run."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status
