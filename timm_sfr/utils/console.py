"""The package's output on the console: log lines as text or JSON, tables and durations."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from torch.utils.data import get_worker_info
from tqdm import tqdm

from timm_sfr.utils.errors import Interrupted, UserError, one_line

logger = logging.getLogger("timm_sfr")


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns rows of cells as lines with aligned columns, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun in the right form, such as ``1 class`` and ``2 classes``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' * noun.endswith('s') or 's'}"


def sides(height: int, width: int) -> str:
    """Returns an image size in pixels: ``224`` for a square, else such as ``192x256``."""
    return str(height) if height == width else f"{height}x{width}"


def some(names: Sequence[str], count: int = 3) -> str:
    """Returns the first few names, and how many more there are; ``none`` for no names."""
    return f"{', '.join(names[:count])}{f' and {len(names) - count} more' * (len(names) > count)}" or "none"


class Lines(logging.StreamHandler):
    """Writes the package's log records to a stream, one line each, above any progress bars."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.as_json = False

    def format(self, record: logging.LogRecord) -> str:
        """Returns the record's text, or a JSON object: ``event``, ``time`` (Unix seconds), ``text`` and its fields."""
        text = record.getMessage()
        if not self.as_json:
            return text
        warns = record.levelno >= logging.WARNING or text.startswith("warning: ")
        fields = {"event": "warning" if warns else "message", **getattr(record, "fields", {})}
        line = {"event": fields.pop("event"), "time": round(record.created, 3), "text": text, **fields}
        return json_line(line, empty=None)

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the line immediately, unless it is for JSON only and the format is text."""
        if getattr(record, "fields", {}).get("json_only") and not self.as_json:
            return
        if get_worker_info() is not None:  # its copy of tqdm's lock may never be released
            super().emit(record)
            return
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def fields(event: str, **values: Any) -> dict[str, Any]:
    """Returns the `extra` argument of a log call that gives the record an event and fields."""
    return {"fields": {"event": event, **values}}


def show_log(as_json: bool | None = None, to_stderr: bool = False) -> None:
    """Sends the package's log lines to standard output or error, once, as JSON or text; `as_json` None keeps the format."""
    if not logger.handlers:
        logger.addHandler(Lines(sys.stderr if to_stderr else sys.stdout))
        logger.setLevel(logging.INFO)
        logger.propagate = False
    for handler in logger.handlers:
        if isinstance(handler, Lines) and as_json is not None:
            handler.as_json = as_json


@contextlib.contextmanager
def console_output(as_json: bool) -> Iterator[None]:
    """Sets up the output of a run; with `as_json`, standard output gets our JSON lines only.

    If the run fails, the last JSON line says how. The output of other libraries then goes to standard error.
    """
    show_log(as_json)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # `advice` reports this in one line
        if not as_json:
            yield
            return
        main = os.environ.get("RANK", "0") == "0"
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        except (Interrupted, KeyboardInterrupt) as stop:
            if main:
                logger.info(str(stop) or "interrupted", extra=fields("interrupted"))
            raise
        except Exception as error:
            if main:
                text = one_line(error) if isinstance(error, UserError) else repr(error)
                logger.error(" ".join(text.split()), extra=fields("error"))
            raise


def clock(seconds: float) -> str:
    """Formats a duration as M:SS, H:MM:SS or, from 48 hours on, in days; ``?`` if it is not finite."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    if whole >= 48 * 3600:
        return f"{whole / 86400:.1f} days"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def json_line(value: Any, empty: Any = "") -> str:
    """Returns `value` as one line of strict JSON: numbers that are not finite become null, empty strings `empty`."""
    return json.dumps(_plain(value, empty), allow_nan=False)


def _plain(value: Any, empty: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry, empty) for key, entry in value.items() if key != "json_only"}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, empty) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return empty if value == "" else value
