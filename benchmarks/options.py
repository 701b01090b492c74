"""Writes docs/options.md, the list of all options, and the tables of docs/timm.md: ``python -m benchmarks.options``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.pages import fill
from timm_sfr.cli.timm_options import tables
from timm_sfr.cli.train import training_parser

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "options.md"
TIMM = DOCUMENT.with_name("timm.md")
HEAD = """# All options

Of `train_sfr.py` and `timm-sfr train`; names are those of timm's `train.py` where it has one ([timm.md](timm.md) has the few
exceptions). In a file of options
([train.md](train.md#a-recipe-in-a-file)) `-` is `_`, `--no-sfr` is `sfr: false`, and so with the other `--no-` options. This page
is made from what the command checks, by `python -m benchmarks.options`.
"""


def cell(text: str) -> str:
    """Returns text as a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def flag(action: argparse.Action) -> str:
    """Returns the flags of an option and the name of its value."""
    flags = ", ".join(f"`{word}`" for word in sorted(action.option_strings, key=len))
    if action.nargs == 0 or action.metavar in (None, "VALUE"):
        return flags
    return f"{flags} {cell(str(action.metavar))}"


def render() -> str:
    """Returns the text of the page."""
    parts = [HEAD]
    for group in training_parser()._action_groups[1:]:
        rows = [one for one in group._group_actions if "-h" not in one.option_strings and one.help != argparse.SUPPRESS]
        if rows:
            title = "the run" if group.title in ("options", "optional arguments") else str(group.title)
            about = (group.description or "").replace("docs/method.md", "[method.md](method.md)")
            lines = [f"## {title}", "", *([about, ""] if about else []), "| option | what |", "|---|---|"]
            lines += [f"| {flag(action)} | {cell((action.help or '').replace('%%', '%'))} |" for action in rows]
            parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def render_timm() -> str:
    """Returns the text of docs/timm.md with its tables made anew."""
    text = TIMM.read_text(encoding="utf-8")
    for label, body in tables().items():
        text = fill(text, label, body)
    return text


def main() -> int:
    """Writes the pages; returns 0."""
    DOCUMENT.write_text(render(), encoding="utf-8")
    TIMM.write_text(render_timm(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
