"""Command lines: options made from the configuration's fields, in groups, with timm's names; one-line errors."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import difflib
import functools
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from timm_sfr.cli.timm_options import also
from timm_sfr.config import SECTIONS, options
from timm_sfr.utils.errors import UserError, near_matches, one_line

# Exit statuses other than 0 and 2: the run is complete but not published; a signal stopped it, and --resume continues it.
PUSH_FAILED, INTERRUPTED = 3, 75
CLOSED_PIPE = 141  # as for a program that SIGPIPE ends
# Options of other trainers that have another name here.
OTHERS = {"--num-gpu": "accelerate launch", "--learning-rate": "--lr", "--num-workers": "--workers (-j)",
          "--num-epochs": "--epochs", "--optimizer": "--opt", "--scheduler": "--sched", "--lr-scheduler": "--sched",
          "--output-dir": "--output", "--image-size": "--img-size", "--fp16": "--mixed-precision fp16",
          "--bf16": "--mixed-precision bf16"}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse's parser with one-line errors that suggest options similar to a mistyped one."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError instead of printing the usage."""
        if message.startswith("unrecognized arguments: "):
            words = message.removeprefix("unrecognized arguments: ").split() or ["''"]  # an empty word
            message = f"unrecognized arguments: {' '.join(words)}"
            close = difflib.get_close_matches(words[0], OTHERS, n=1, cutoff=0.85)
            hint = f"; timm_sfr's is {OTHERS[close[0]]}" if close else ""
            message += hint or near_matches(words[0], self._option_string_actions) or "; --help lists them"
        chosen = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)$", message)
        if chosen is not None:
            message += near_matches(chosen[1], re.findall(r"[\w-]+", chosen[2]))
        raise UserError(message)


def add_options(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Adds the run options `names`; the parsed result has only the options that the user gave."""
    known = {name: (section, item) for section, name, item in options()}
    for name in names:
        section, item = known[name]
        add_option(parser, section, name, item)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds MODEL and --revision, the arguments of `timm_sfr.create_model`."""
    parser.add_argument("model", metavar="MODEL", help="a run's folder, USER/NAME on the Hub, zoo name, or any timm name")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")


def given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Returns those of the options `names` that the user gave."""
    return {name: value for name, value in vars(args).items() if name in names}


def add_option(group: Any, section: str, name: str, item: dataclasses.Field) -> None:
    """Adds one option of a section, made from its field."""
    flag, hint = "--" + name.replace("_", "-"), _types(section)[item.name]
    text = item.metadata["help"].replace("%", "%%")
    kind = next(k for k in typing.get_args(hint) if k is not type(None)) if isinstance(hint, types.UnionType) else hint
    if kind is bool:
        action: Any = argparse.BooleanOptionalAction if item.default else "store_true"
        text += " (default: on)" * item.default
        group.add_argument(flag, *also(name), dest=name, action=action, default=argparse.SUPPRESS, help=text)
        return
    if item.default is not None and item.default != ():
        default = " ".join(map(str, item.default)) if isinstance(item.default, tuple) else item.default
        text += f" (default: {default})"
    flags = [flag, *([item.metadata["short"]] if item.metadata["short"] else []), *also(name)]
    extra: dict[str, Any] = {"metavar": "|".join(item.metadata["choices"]) or "VALUE"}
    if kind is dict:
        extra |= {"nargs": "*", "action": _Pairs, "metavar": "KEY=VALUE"}
    elif typing.get_origin(kind) is tuple:
        extra |= {"nargs": "+", "type": typing.get_args(kind)[0]}
    elif name == "torchcompile":
        extra |= {"nargs": "?", "const": "inductor"}
    else:
        extra |= {"type": _number_or_word if str in typing.get_args(hint)[1:] else kind}
    group.add_argument(*flags, dest=name, default=argparse.SUPPRESS, help=text, **extra)


@functools.cache
def _types(section: str) -> dict[str, Any]:
    return typing.get_type_hints(SECTIONS[section])


def call(run: Callable[[argparse.Namespace], int], parser: Parser, arguments: Sequence[str] | None) -> int:
    """Parses the arguments and runs a command; returns its exit status, or prints one line and returns 2 for an error."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError):  # a stand-in for a stream, or one that is set up otherwise
            stream.reconfigure(errors="backslashreplace")  # a file's name may have bytes that are not UTF-8
    try:
        args = parser.parse_args(arguments)
        package = sys.modules["timm_sfr"]
        if not hasattr(package, "__all__"):  # train_sfr.py has put off its __init__
            package.__spec__.loader.exec_module(package)
        return run(args)
    except UserError as error:
        return fail(one_line(error))
    except BrokenPipeError:  # whatever read the output has ended, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the interpreter's last flush succeeds
        return CLOSED_PIPE


def fail(message: str, status: int = 2) -> int:
    """Prints one error line; returns the exit status `status`. An option that it begins with is named as on the command line."""
    name, colon, rest = " ".join(message.split()).partition(":")
    if any(name == option for _, option, _ in options()):
        name = name.replace("_", "-")
    print(f"error: {name}{colon}{rest}", file=sys.stderr)
    return status


def _number_or_word(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


def literal(text: str) -> Any:
    """Returns the Python value that `text` writes, as timm reads it; `true`, `false` and `null` too; else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return {"true": True, "false": False, "null": None}.get(text.lower(), text)


class _Pairs(argparse.Action):
    """Parses KEY=VALUE words into a dictionary, with the values read by `literal`; empty words are left out, as in timm."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        pairs = dict(getattr(namespace, self.dest, None) or {})
        for word in filter(None, values):
            key, sign, value = word.partition("=")
            if not sign:
                parser.error(f"argument {option_string}: expected KEY=VALUE; got {word!r}")
            pairs[key] = literal(value)
        setattr(namespace, self.dest, pairs)
