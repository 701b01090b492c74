"""Resumable states: written whole or not at all, read without unpickling, the newest whole one found on resume."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch

from timm_sfr.errors import UserError

SUFFIX = ".pt"


def replace_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Has `write` make a file or folder beside `path`, then puts it in `path`'s place; a failure leaves `path` as it was."""
    fresh = path.with_name(f".{path.name}.new")
    old = path.with_name(f".{path.name}.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    try:
        write(fresh)
        if fresh.is_dir() and path.exists():
            path.rename(old)  # a folder cannot be renamed onto a full one
        os.replace(fresh, path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(fresh) if fresh.is_dir() else fresh.unlink(missing_ok=True)
        raise
    if old.exists():
        shutil.rmtree(old)


def save_checkpoint(folder: Path, epoch: int, state: dict[str, Any], keep: int) -> Path:
    """Writes the state after epoch `epoch` and removes all but the newest `keep`; returns the file.

    Args:
        folder: The run's ``checkpoints/``.
        epoch: The finished epoch, from 0.
        state: Tensors, numbers, strings, lists and dictionaries only.
        keep: How many to keep.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"epoch-{epoch:05d}{SUFFIX}"

    def write(fresh: Path) -> None:
        with fresh.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    replace_atomically(path, write)
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The run's checkpoints, newest last."""
    return sorted(folder.glob(f"epoch-*{SUFFIX}"))


def load_newest(folder: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """The newest checkpoint that can be read; each damaged one before it is reported and passed over.

    Raises:
        UserError: if there is none.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, ValueError, KeyError, BadZipFile, pickle.UnpicklingError) as error:
            report(f"checkpoint {path} is damaged ({type(error).__name__}); trying the one before it")
    raise UserError(
        f"resume: no whole checkpoint in {str(folder)!r} ({len(found)} damaged); start the run anew with --config "
        f"{str(folder.parent / 'args.yaml')!r}"
    )
