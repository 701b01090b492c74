"""``timm-sfr list [PATTERN]``: lists the zoo."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from timm_sfr.models.zoo import list_pretrained

WHAT = "List the models of the zoo with their scores and repositories."


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("filter", metavar="PATTERN", nargs="?", default="*", help="such as 'resnet*' (default: all)")


def run(args: Namespace) -> int:
    """Prints the zoo; returns 0."""
    print(list_pretrained(args.filter))
    return 0
