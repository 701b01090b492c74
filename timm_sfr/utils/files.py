"""Writes files atomically (completely or not at all), and reads options from YAML."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from timm_sfr.utils.errors import UserError


def replace_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` to create a file or folder beside `path`, then moves it to `path`; a failure leaves `path` unchanged."""
    fresh = path.with_name(f".{path.name}.new")
    old = path.with_name(f".{path.name}.old")
    for leftover in (fresh, old):
        remove(leftover)
    try:
        write(fresh)
        if fresh.is_dir() and path.exists():
            path.rename(old)  # a folder cannot replace a folder that is not empty
        os.replace(fresh, path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        remove(fresh)
        raise
    remove(old)


def write_whole(path: Path, text: str) -> None:
    """Writes a UTF-8 text file atomically, replacing any old one; a failure leaves the old one unchanged."""
    replace_atomically(path, lambda fresh: fresh.write_text(text, encoding="utf-8"))


def write_json(path: Path, values: dict[str, Any] | list[Any]) -> None:
    """Writes a JSON file atomically."""
    write_whole(path, json.dumps(values, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; an empty one if the file cannot be read or holds something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the options in a YAML file by name, with underscores for hyphens.

    Raises:
        UserError: if the file cannot be read or does not contain a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "problem", None) or getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"config: cannot read {str(path)!r}: {reason}") from error
    if not isinstance(values, dict):
        raise UserError(f"config: expected {str(path)!r} to contain OPTION: VALUE lines; got {type(values).__name__}")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def remove(path: Path) -> None:
    """Deletes a file or a folder with everything in it, if it exists."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
