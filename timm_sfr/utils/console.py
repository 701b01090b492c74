"""Text for people: tables in columns."""

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


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, the columns under each other, two blanks apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


logger = logging.getLogger("timm_sfr")


class Lines(logging.StreamHandler):
    """Writes the package's records to standard output, a line each, above the bars if there are any."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.as_json = False

    def format(self, record: logging.LogRecord) -> str:
        """The record's text, or a JSON object: ``event``, ``time`` (Unix seconds), ``text`` and its fields."""
        text = record.getMessage()
        if not self.as_json:
            return text
        warns = record.levelno >= logging.WARNING or text.startswith("warning: ")
        fields = {"event": "warning" if warns else "message", **getattr(record, "fields", {})}
        line = {"event": fields.pop("event"), "time": round(record.created, 3), "text": text, **fields}
        return json.dumps(_plain(line), allow_nan=False)

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the line at once."""
        if getattr(record, "fields", {}).get("json_only") and not self.as_json:
            return
        if get_worker_info() is not None:  # its copy of the bars' lock may be one that nobody gives back
            super().emit(record)
            return
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def fields(event: str, **values: Any) -> dict[str, Any]:
    """What `extra` of a log call takes, to give a record its fields."""
    return {"fields": {"event": event, **values}}


def show_log(as_json: bool | None = None) -> None:
    """Sends the package's log lines to standard output, once; as JSON or not, or as before where `as_json` is None."""
    if not logger.handlers:
        logger.addHandler(Lines(sys.stdout))
        logger.setLevel(logging.INFO)
        logger.propagate = False
    for handler in logger.handlers:
        if isinstance(handler, Lines) and as_json is not None:
            handler.as_json = as_json


@contextlib.contextmanager
def console_output(as_json: bool) -> Iterator[None]:
    """Within a run: with `as_json`, standard output gets our lines alone, the last of which says how the run has failed.

    What other libraries print goes to standard error then.
    """
    show_log(as_json)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # `advice` says it in one line
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
    """A duration as M:SS, H:MM:SS or in days."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    if whole >= 48 * 3600:
        return f"{whole / 86400:.1f} days"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def _plain(value: Any) -> Any:
    """`value` as JSON knows it: what is not finite, and an empty cell, as null."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items() if key != "json_only"}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return None if value == "" else value
