"""``timm-sfr VERB ...``: one command for everything in the package."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import shtab

from timm_sfr.cli import compare, export, list_zoo, predict, push, report, taps, train, validate
from timm_sfr.cli.parser import Parser, call
from timm_sfr.version import __version__

# Each module has ``WHAT`` (one line of help), ``add_arguments(parser)`` and ``run(args)``, which returns the exit status.
VERBS: dict[str, Any] = {
    "train": train, "validate": validate, "predict": predict, "taps": taps, "report": report, "compare": compare,
    "export": export, "push": push, "list": list_zoo,
}  # fmt: skip


def make_parser() -> tuple[Parser, dict[str, Parser]]:
    """Returns the parser of the command, and the parsers of the verbs."""
    parser = Parser(
        prog="timm-sfr",
        description="Train, inspect, score, compare, deploy and publish models with Self-Feature Regularization.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"timm-sfr {__version__}")
    shtab.add_argument_to(
        parser, "--print-completion", help="print a shell completion script: source it in the shell's profile"
    )
    places = parser.add_subparsers(dest="verb", metavar="VERB", required=True, title="verbs")
    for name, verb in VERBS.items():
        one = places.add_parser(name, help=verb.WHAT, description=verb.WHAT, allow_abbrev=False)
        verb.add_arguments(one)
    return parser, places.choices


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser, parsers = make_parser()
    if not words or words[0] not in VERBS:
        return call(lambda args: 0, parser, words)
    # The verb's own parser suggests options similar to a mistyped one.
    return call(VERBS[words[0]].run, parsers[words[0]], words[1:])


if __name__ == "__main__":
    sys.exit(main())
