"""Resumable states: written atomically, verified before they are read, and read without unpickling.

A checkpoint is a folder ``epoch-E-image-I`` (E epochs and I images of the next one are done) with ``state.pt`` and
``manifest.txt``. The manifest's first line is JSON: the size and the SHA-256 of the state, and its position in training. The
second line is the SHA-256 of the first.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from torch import Tensor

from timm_sfr.utils.errors import UserError
from timm_sfr.utils.files import remove, replace_atomically

STATE, MANIFEST = "state.pt", "manifest.txt"
FORMAT = 1
PLACE = ("epoch", "step", "images", "updates")
# What reading a damaged checkpoint may raise.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, BadZipFile, pickle.UnpicklingError)


class Damaged(UserError):
    """A checkpoint whose files changed after they were written."""


def save_checkpoint(folder: Path, state: dict[str, Any], keep: int, best: bool, epochs: Collection[int] = ()) -> Path:
    """Writes a checkpoint and deletes old ones; returns its folder.

    The newest `keep` remain, the newest best one, and those after `epochs` whole epochs. The write is atomic: into a temporary
    folder with the manifest, flushed to the disk, then renamed.

    Args:
        folder: The run's ``checkpoints/``.
        state: Tensors, numbers, strings, lists and dictionaries only; the keys in `PLACE` are its position in training.
        keep: How many checkpoints to keep.
        best: Whether this is the model's best score so far.
        epochs: Numbers of epochs whose checkpoints remain.

    Raises:
        OSError: if the disk is full or cannot be written to; older checkpoints stay.
    """
    path = folder / _name(state)

    def write(fresh: Path) -> None:
        fresh.mkdir()
        with (fresh / STATE).open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        content = {"bytes": (fresh / STATE).stat().st_size, "sha256": _file_sha256(fresh / STATE)}
        line = json.dumps({"format": FORMAT, **{name: state[name] for name in PLACE}, "best": best, **content})
        with (fresh / MANIFEST).open("w") as file:
            file.write(f"{line}\n{_sha256(line)}\n")
            file.flush()
            os.fsync(file.fileno())
        _sync(fresh)

    folder.mkdir(parents=True, exist_ok=True)
    needed, free = _tensor_bytes(state), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, _no_space(needed, free, folder))
    try:
        replace_atomically(path, write)
    except RuntimeError as error:  # torch raises this when a write fails
        raise OSError(errno.ENOSPC, _no_space(needed, shutil.disk_usage(folder).free, folder)) from error
    _sync(folder)
    for partial in folder.glob(".epoch-*"):  # left by processes that were killed during a write
        remove(partial)
    _delete_old(folder, keep, epochs)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Returns the folders of the run's checkpoints, newest last."""
    return sorted(path for path in folder.glob("epoch-*") if path.is_dir())


def load_newest(folder: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """Returns the state of the newest intact checkpoint; reports and skips damaged ones; raises UserError if all are."""
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            return load_checkpoint(path)
        except Damaged as error:
            report(f"{error}; trying the one before it")
    raise UserError(
        f"resume: no intact checkpoint in {str(folder)!r} ({len(found)} damaged); start a new run with --config "
        f"{str(folder.parent / 'args.yaml')!r}"
    )


def set_aside(folder: Path, state: dict[str, Any]) -> None:
    """Renames the checkpoints that are newer than the loaded `state`: they are damaged, and must not be found again."""
    loaded = _name(state)
    for path in checkpoints(folder):
        if path.name > loaded:
            aside = path.with_name(f"damaged-{path.name}")
            remove(aside)
            path.rename(aside)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Returns the state of one checkpoint, on the CPU, after checking its size and SHA-256 against the manifest.

    Only tensors, numbers, strings, lists and dictionaries are loaded (torch's ``weights_only``). Raises Damaged if the
    checkpoint changed after it was written.
    """
    try:
        manifest = _read_manifest(path)
        size, digest = manifest["bytes"], manifest["sha256"]
        if manifest["format"] != FORMAT:
            raise Damaged(f"checkpoint {path} is of format {manifest['format']}, expected {FORMAT}")
        if (path / STATE).stat().st_size != size or _file_sha256(path / STATE) != digest:
            raise Damaged(f"checkpoint {path} is damaged: {STATE} does not match {MANIFEST}")
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
        if any(state[name] != manifest[name] for name in PLACE):
            raise Damaged(f"checkpoint {path} is damaged: {MANIFEST} belongs to another checkpoint")
        return state
    except Damaged:
        raise
    except UNREADABLE as error:
        raise Damaged(f"checkpoint {path} is damaged ({type(error).__name__})") from error


def _name(state: dict[str, Any]) -> str:
    # Images, not updates, so that names sort by time even if a resumed run changes the batch size.
    return f"epoch-{state['epoch']:05d}-image-{state['images']:010d}"


def _delete_old(folder: Path, keep: int, epochs: Collection[int]) -> None:
    """Deletes all checkpoints except the newest `keep`, the newest best one, and those after `epochs` whole epochs."""
    kept = {_name({"epoch": epoch, "images": 0}) for epoch in epochs}
    found = checkpoints(folder)
    best = next((path for path in reversed(found) if _was_best(path)), None)
    for path in found[:-keep]:
        if path != best and path.name not in kept:
            shutil.rmtree(path)


def _was_best(path: Path) -> bool:
    try:
        return _read_manifest(path)["best"] is True
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _read_manifest(path: Path) -> dict[str, Any]:
    text = (path / MANIFEST).read_bytes().decode()  # text mode would hide an added carriage return
    line = text.split("\n", 1)[0]
    if text != f"{line}\n{_sha256(line)}\n":
        raise ValueError("the manifest has been changed")
    return json.loads(line)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    """Flushes the entries of `folder` to the disk, on systems that can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _no_space(needed: int, free: int, folder: Path) -> str:
    return f"it needs {needed / 2**20:.1f} MiB and {free / 2**20:.1f} MiB are free in {str(folder)!r}"


def _tensor_bytes(state: Any) -> int:
    """Returns the size of all tensors in a state, in bytes."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(_tensor_bytes, values))
