"""Resumable states: written whole or not at all, checked before they are read, read without unpickling.

A checkpoint is a folder ``epoch-E-image-I`` (E epochs and I images of the next are done) with ``state.pt`` and
``manifest.txt``: a line of JSON with the size and the SHA-256 of the state and where in training it is, and a line with the
SHA-256 of the first.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from torch import Tensor

from timm_sfr.utils.errors import UserError
from timm_sfr.utils.files import _remove, replace_atomically

STATE, MANIFEST = "state.pt", "manifest.txt"
FORMAT = 1
PLACE = ("epoch", "step", "images", "updates")
_CHUNK = 1 << 20


class Damaged(UserError):
    """A checkpoint that is not what was written."""


def save_checkpoint(folder: Path, state: dict[str, Any], keep: int, best: bool) -> Path:
    """Writes a state and removes all but the newest `keep` checkpoints and the newest that was best; returns its folder.

    Whole or not at all: it is written beside its place, flushed to the disk with its manifest, and renamed.

    Args:
        folder: The run's ``checkpoints/``.
        state: Tensors, numbers, strings, lists and dictionaries only; `PLACE` names what says where it is.
        keep: How many to keep.
        best: Whether the model scored best here so far.

    Raises:
        OSError: if the disk is full or cannot be written to; what was there stays.
    """
    path = folder / _name(state)

    def write(fresh: Path) -> None:
        fresh.mkdir()
        with (fresh / STATE).open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        size, digest = _digest(fresh / STATE)
        where = {name: state[name] for name in PLACE}
        line = json.dumps({"format": FORMAT, **where, "best": best, "bytes": size, "sha256": digest})
        with (fresh / MANIFEST).open("w") as file:
            file.write(f"{line}\n{_sha256(line)}\n")
            file.flush()
            os.fsync(file.fileno())
        _sync(fresh)

    folder.mkdir(parents=True, exist_ok=True)
    needed, free = _bytes(state), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, _no_room(needed, free, folder))
    try:
        replace_atomically(path, write)
    except RuntimeError as error:  # torch's word for a write that failed
        raise OSError(errno.ENOSPC, _no_room(needed, shutil.disk_usage(folder).free, folder)) from error
    _sync(folder)
    for half in folder.glob(".epoch-*"):  # of processes that were killed in a write
        _remove(half)
    _thin(folder, keep)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The run's checkpoints, newest last."""
    return sorted(path for path in folder.glob("epoch-*") if path.is_dir())


def load_newest(folder: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """The newest whole checkpoint; each damaged one before it is reported and passed over.

    Raises:
        UserError: if there is none.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            return load_checkpoint(path)
        except Damaged as error:
            report(f"{error}; trying the one before it")
    raise UserError(
        f"resume: no whole checkpoint in {str(folder)!r} ({len(found)} damaged); start the run anew with --config "
        f"{str(folder.parent / 'args.yaml')!r}"
    )


def set_aside(folder: Path, state: dict[str, Any]) -> None:
    """Renames the damaged checkpoints that are newer than the state that was taken, so that they count as none."""
    taken = _name(state)
    for path in checkpoints(folder):
        if path.name > taken:
            replace = path.with_name(f"damaged-{path.name}")
            _remove(replace)
            path.rename(replace)


def _name(state: dict[str, Any]) -> str:
    # By images, not updates: in order of time also where a run goes on with another batch size.
    return f"epoch-{state['epoch']:05d}-image-{state['images']:010d}"


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state of one checkpoint, on the CPU, once its size and its SHA-256 are found to be the manifest's.

    Nothing is unpickled but tensors, numbers, strings, lists and dictionaries.

    Raises:
        Damaged: if it is not what was written.
    """
    try:
        manifest = _read_manifest(path)
        expected = manifest["bytes"], manifest["sha256"]
        if manifest["format"] != FORMAT:
            raise Damaged(f"checkpoint {path} is of format {manifest['format']}, expected {FORMAT}")
        if (path / STATE).stat().st_size != expected[0] or _digest(path / STATE) != expected:
            raise Damaged(f"checkpoint {path} is damaged: {STATE} is not what {MANIFEST} says")
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
        if any(state[name] != manifest[name] for name in PLACE):
            raise Damaged(f"checkpoint {path} is damaged: {MANIFEST} is of another one")
        return state
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        EOFError,
        BadZipFile,
        pickle.UnpicklingError,
    ) as error:
        if isinstance(error, Damaged):
            raise
        raise Damaged(f"checkpoint {path} is damaged ({type(error).__name__})") from error


def _thin(folder: Path, keep: int) -> None:
    """Removes all checkpoints but the newest `keep` and the newest that was best."""
    found = checkpoints(folder)
    best = next((path for path in reversed(found) if _was_best(path)), None)
    for path in found[:-keep]:
        if path != best:
            shutil.rmtree(path)


def _was_best(path: Path) -> bool:
    try:
        return _read_manifest(path)["best"] is True
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _read_manifest(path: Path) -> dict[str, Any]:
    text = (path / MANIFEST).read_bytes().decode()  # read as text, a carriage return would pass unseen
    line = text.split("\n", 1)[0]
    if text != f"{line}\n{_sha256(line)}\n":
        raise ValueError("the manifest is not what was written")
    return json.loads(line)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(path: Path) -> tuple[int, str]:
    """Bytes and SHA-256 of a file."""
    size, digest = 0, hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size += len(chunk)
            digest.update(chunk)
    return size, digest.hexdigest()


def _sync(folder: Path) -> None:
    """Has the disk keep the names in `folder`, where the system can be asked to."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _no_room(needed: int, free: int, folder: Path) -> str:
    return f"it needs {needed / 2**20:.1f} MiB and {free / 2**20:.1f} MiB are free in {str(folder)!r}"


def _bytes(state: Any) -> int:
    """Bytes of all tensors in a state."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(_bytes, values))
