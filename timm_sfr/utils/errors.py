"""The exceptions that a user's mistake, or the network, raises."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


class UserError(ValueError):
    """Something the user can put right: the message says what was expected, what came, and what to do.

    The command line prints it as one line and exits with a non-zero status; from Python it is a ``ValueError``.
    """


class HubError(UserError):
    """Something failed between here and the Hugging Face Hub; what is on the disk is whole.

    Attributes:
        reason: The error behind it.
    """

    reason: BaseException | None = None


class Interrupted(Exception):
    """A run that a signal stopped, after its update and with a checkpoint: the message says how to go on."""


def near_matches(name: str, names: Iterable[str], count: int = 4) -> str:
    """``", did you mean 'a' or 'b'?"`` for the `names` closest to `name`, or an empty string if none is close."""
    found = difflib.get_close_matches(name, list(names), n=count, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(match) for match in found)}?" if found else ""


def near_paths(path: str | Path, count: int = 3) -> str:
    """`near_matches` of a path that is not there among what lies beside it."""
    path = Path(os.path.expanduser(path))
    try:
        names = [one.name for one in path.parent.iterdir()]
    except (OSError, ValueError):
        return ""
    close = difflib.get_close_matches(path.name, names, n=count, cutoff=0.6)
    found = [str(path.parent / name) for name in close if name != path.name]
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""


def first_line(error: BaseException) -> str:
    """The first line of the error's message, or its type where it has none."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def brief(error: BaseException) -> str:
    """The error's message on one line, its first 200 characters, or its type where it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def one_line(error: UserError) -> str:
    """The error's message alone, also where a data loading process has wrapped it in its traceback."""
    text = str(error)
    if text.startswith("Caught ") and "Traceback" in text:
        return text.strip().splitlines()[-1].split(": ", 1)[-1]
    return text
