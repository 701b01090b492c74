"""``timm-sfr VERB ...``: one command for all that the package does."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import shtab

from timm_sfr import compare, deploy, predict, push, tapview, validate
from timm_sfr.cli import TRAIN, Parser, add_training, call
from timm_sfr.reporting import command
from timm_sfr.version import __version__
from timm_sfr.zoo import list_pretrained


@dataclass(frozen=True)
class Verb:
    """One of the command's verbs: what it does, its options, and how it runs."""

    what: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int]


def add_listing(parser: ArgumentParser) -> None:
    """Adds the options of ``list``."""
    parser.add_argument("filter", metavar="PATTERN", nargs="?", default="*", help="such as 'resnet*' (default: all)")


def list_zoo(args: Namespace) -> int:
    """Prints the zoo."""
    print(list_pretrained(args.filter))
    return 0


def _train(args: Namespace) -> int:
    raise AssertionError("the training parses its own words")


VERBS = {
    "train": Verb(TRAIN, add_training, _train),
    "validate": Verb(validate.WHAT, validate.add_arguments, validate.run),
    "predict": Verb(predict.WHAT, predict.add_arguments, predict.run),
    "taps": Verb(tapview.WHAT, tapview.add_arguments, tapview.run),
    "report": Verb(command.WHAT, command.add_arguments, command.run),
    "compare": Verb(compare.WHAT, compare.add_arguments, compare.run),
    "export": Verb(deploy.WHAT, deploy.add_arguments, deploy.run),
    "push": Verb(push.WHAT, push.add_arguments, push.run),
    "list": Verb("List the models of the zoo, with their scores and where they are.", add_listing, list_zoo),
}


def make_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the command, and that of each verb."""
    parser = Parser(
        prog="timm-sfr",
        description="Train, inspect, score, compare, deploy and publish models with Self-Feature Regularization.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"timm-sfr {__version__}")
    shtab.add_argument_to(
        parser, "--print-completion", help="print the completion of a shell: source it in its profile"
    )
    places = parser.add_subparsers(dest="verb", metavar="VERB", required=True, title="verbs")
    for name, verb in VERBS.items():
        one = places.add_parser(name, help=verb.what, description=verb.what, allow_abbrev=False)
        verb.add_arguments(one)
    return parser, places.choices


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    verb = VERBS.get(words[0]) if words else None
    if words[:1] == ["train"] and not {"-h", "--help"} & set(words):
        from train_sfr import main as train

        return train(words[1:])
    parser, parsers = make_parser()
    if verb is None:
        return call(lambda args: 0, parser, words)
    # By its own parser, which knows what a mistyped option may have meant.
    return call(verb.run, parsers[words[0]], words[1:])


if __name__ == "__main__":
    sys.exit(main())
