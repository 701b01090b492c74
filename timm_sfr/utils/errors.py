"""Exceptions for user errors, the network and interruptions, and helpers for their messages."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


class UserError(ValueError):
    """An error that the user can fix: the message says what was expected, what came, and what to do.

    The command line prints it as one line and exits with a non-zero status; from Python it is a ``ValueError``.
    """


class HubError(UserError):
    """A transfer from or to the Hugging Face Hub failed; the files on disk are intact.

    Attributes:
        reason: The underlying error.
    """

    reason: BaseException | None = None


class Interrupted(Exception):
    """A signal stopped the run after an update and a checkpoint; the message says how to resume."""


def near_matches(name: str, names: Iterable[str], folder: str | Path = "") -> str:
    """Returns ``"; did you mean 'a' or 'b'?"`` with the `names`, in `folder`, closest to `name`; empty if none is close."""
    found = difflib.get_close_matches(name, list(names), n=4, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(os.path.join(folder, match)) for match in found)}?" if found else ""


def near_paths(path: str | Path) -> str:
    """Returns the text of `near_matches` for a missing path, with the closest names in its folder."""
    path = Path(os.path.expanduser(path))
    try:
        names = [one.name for one in path.parent.iterdir() if one.name != path.name]
    except (OSError, ValueError):
        return ""
    return near_matches(path.name, names, "" if path.parent == Path() else path.parent)


def first_line(error: BaseException) -> str:
    """Returns the first line of the error's message, or its type without a message."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def brief(error: BaseException) -> str:
    """Returns about 200 characters of the error's message on one line, or its type without a message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200].rsplit(' ', 1)[0]} ..."


def one_line(error: UserError) -> str:
    """Returns the error's message without the traceback that a data loading process wraps around it."""
    text = str(error)
    if text.startswith("Caught ") and "Traceback" in text:
        return text.strip().splitlines()[-1].split(": ", 1)[-1]
    return text
