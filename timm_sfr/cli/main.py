"""``timm-sfr VERB ...``, one command for everything in the package, and ``train_sfr.py``, which is ``timm-sfr train``."""

from __future__ import annotations

import importlib
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence

import shtab

from timm_sfr.cli.parser import Parser, call
from timm_sfr.cli.verbs import VERBS, training_parser
from timm_sfr.version import __version__


def make_parser() -> tuple[Parser, dict[str, Parser]]:
    """Returns the parser of the command, and the parsers of the verbs."""
    parser = Parser(
        prog="timm-sfr",
        description="Train, inspect, score, compare, deploy and publish models with Self-Feature Regularization.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"timm-sfr {__version__}")
    text = "print a shell completion script: source it in the shell's profile"
    shtab.add_argument_to(parser, "--print-completion", help=text)
    places = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    for name, add_arguments in VERBS.items():
        what = add_arguments.__doc__
        add_arguments(places.add_parser(name, help=what, description=what, allow_abbrev=False))
    return parser, places.choices


def runner(verb: str) -> Callable[[Namespace], int]:
    """Returns a function that imports the verb's module and carries the verb out."""
    return lambda args: importlib.import_module(f"timm_sfr.cli.{verb.replace('-', '_')}").run(args)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status. Without a verb, prints the help."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser, parsers = make_parser()
    if not words:
        parser.print_help()
        return 0
    if words[0] not in VERBS:
        return call(lambda args: 0, parser, words)
    # The verb's own parser suggests options similar to a mistyped one.
    return call(runner(words[0]), parsers[words[0]], words[1:])


def train(arguments: Sequence[str] | None = None) -> int:
    """Runs ``train_sfr.py``; returns the exit status."""
    return call(runner("train"), training_parser(), arguments)


if __name__ == "__main__":
    sys.exit(main())
