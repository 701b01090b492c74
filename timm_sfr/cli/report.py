"""``timm-sfr report RUN``: writes the HTML report of a run."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from timm_sfr.utils.errors import UserError

WHAT = "Write RUN/report.html: curves, scores by class, mistakes, and which features teach which. Needs no network."


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument("--mistakes", type=int, default=24, metavar="N", help="wrong images to show (default: 24)")


def run(args: Namespace) -> int:
    """Runs the command; returns 0."""
    from timm_sfr.reporting.page import write_report  # imported here because matplotlib is slow to import

    if args.mistakes < 0:
        raise UserError(f"mistakes: expected 0 or more; got {args.mistakes}")
    try:
        print(write_report(args.run, args.mistakes))
    except OSError as error:
        raise UserError(f"run: the report cannot be written: {error}") from error
    return 0
