"""Writes docs/options.md, the list of all options, and the tables of docs/timm.md: ``python -m benchmarks.options``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.pages import fill, markdown
from timm_sfr.cli.timm_options import MEANINGLESS, REFUSED, RENAMED, TRANSLATED, also, flag_of
from timm_sfr.cli.train import training_parser

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "options.md"
TIMM = DOCUMENT.with_name("timm.md")
HEAD = """# All options

Of `train_sfr.py` and `timm-sfr train`; names are those of timm's `train.py` where it has one ([timm.md](timm.md) has the few
exceptions). In a file of options
([train.md](train.md#a-recipe-in-a-file)) `-` is `_`, `--no-sfr` is `sfr: false`, and so with the other `--no-` options. This page
is made from what the command checks, by `python -m benchmarks.options`.
"""
# Where defaults differ: option -> (timm's, ours in words). A command that relies on timm's has to give it.
DEFAULTS: dict[str, tuple[Any, str]] = {
    "model": ("resnet50", "`resnet18`; on the digits `resnet20_cifar`"),
    "epochs": (300, "100; on the digits 20"),
    "batch_size": (128, "128, or less if there are fewer images"),
    "weight_decay": (2e-5, "0.0005"),
    "sched_on_updates": (False, "on; `--no-sched-on-updates` steps the schedule every epoch, as timm does"),
    "warmup_epochs": (5, "a fifth of the epochs, at most 5"),
    "drop": (0.0, "the model's own: 0.2 for rexnet, ghostnet, repghostnet and legacy_seresnet (18 and 50), else 0"),
    "smoothing": (0.1, "chosen by SFR; with `--no-sfr` 0.1"),
    "checkpoint_hist": (10, "the 2 newest, and the best one; timm keeps the best 10"),
    "workers": (4, "4, or as many as there are cores"),
    "device": ("cuda", "the GPU if there is one"),
}


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
    renamed = [(also(name), flag_of(name)) for name in dict.fromkeys(RENAMED.values()) if also(name)]
    same = [("`DIR`", "`--data-dir DIR`"), *((code(flags), f"`{ours}`") for flags, ours in renamed if ours != "--amp")]
    same += [(code([flag, *also(flag[2:])]), text) for flag, (text, _) in TRANSLATED.items()]
    defaults = [(f"`{flag_of(name)}`", f"`{theirs}`", ours) for name, (theirs, ours) in DEFAULTS.items()]
    text = TIMM.read_text(encoding="utf-8")
    for label, header, rows in (
        ("same", ("timm", "here"), same),
        ("nothing", ("option", "why"), [(code(one.flags), one.why) for one in MEANINGLESS]),
        ("refused", ("option", "why, and what takes its place"), [(code(one.flags), one.why) for one in REFUSED]),
        ("defaults", ("option", "timm", "here"), defaults),
    ):
        text = fill(text, label, markdown(header, rows, words=True))
    return text


def code(flags: Iterable[str]) -> str:
    """Returns flags in code type."""
    return ", ".join(f"`{flag}`" for flag in flags)


def main() -> int:
    """Writes the pages; returns 0."""
    DOCUMENT.write_text(render(), encoding="utf-8")
    TIMM.write_text(render_timm(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
