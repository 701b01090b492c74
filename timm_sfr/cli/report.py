"""``timm-sfr report RUN``: writes the HTML report of a run."""

from __future__ import annotations

from argparse import Namespace

from timm_sfr.utils.errors import UserError


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
