"""Caches a decoded dataset in one memory-mapped file, so that images are decoded once, not once per epoch."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import psutil
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from timm_sfr.utils.errors import UserError

CHUNK = 1024  # images decoded before their bytes are written to the file
_PREFIX = f"timm_sfr-cache-{socket.gethostname()}-"  # machines and containers may share a temporary folder
_MAX_SHARE = 0.9  # of the free memory and disk that a cache may take


class Cached(Dataset):
    """The decoded samples of `source`, read once at construction: uint8 images of any sizes, and their classes.

    The pixels are in a temporary file that all data loading processes map. They share one copy of it in memory, whatever
    the start method. The process that made the file deletes it on exit. PIL images are returned as PIL images, uint8 tensors
    and arrays as arrays (C, H, W).

    Raises:
        UserError: if the images do not fit into the free memory or the temporary folder.
    """

    def __init__(self, source: Any) -> None:
        _remove_stale_files()
        handle, path = tempfile.mkstemp(prefix=f"{_PREFIX}{os.getpid()}-", suffix=".uint8")
        self._remove = weakref.finalize(self, _unlink, path, os.getpid())
        self.path = Path(path)
        targets, shapes = [], []
        with os.fdopen(handle, "wb") as file:
            for image, target in _read_all(source):
                self.mode = image.mode if isinstance(image, Image.Image) else None
                array = np.ascontiguousarray(image.numpy() if isinstance(image, Tensor) else image, dtype=np.uint8)
                _write(file, array)
                targets.append(target)
                shapes.append((*array.shape, 0)[:3])
                if len(targets) == min(CHUNK, len(source)):
                    self._check_room(file.tell() / len(targets) * len(source), len(source))
        self.images = source if hasattr(source, "images") else None  # for `bad_images`
        self.shapes, self.targets = np.array(shapes), np.array(targets)
        self.starts = np.concatenate([[0], np.cumsum(np.where(self.shapes == 0, 1, self.shapes).prod(1))])
        self._map()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        array, target = self.array(index)
        return array if self.mode is None else _image(array, self.mode), target

    def array(self, index: int) -> tuple[np.ndarray, Any]:
        """Returns the image's pixels, for a PIL image (H, W) or (H, W, C), and its class, or several as an array (K,)."""
        start, end = self.starts[index : index + 2].tolist()
        shape = [size for size in self.shapes[index].tolist() if size]
        target = self.targets[index]
        return self.bytes[start:end].reshape(shape), target if target.ndim else target.item()

    def __getstate__(self) -> dict[str, Any]:
        # Pickling a memory map copies its contents, so a spawned process maps the file itself.
        return {name: value for name, value in self.__dict__.items() if name not in ("bytes", "images", "_remove")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, images=None)
        self._map()

    def _map(self) -> None:
        # Copy-on-write, because fast_collate warns about read-only arrays.
        # A plain array, because slicing a memmap takes ten times as long.
        self.bytes = np.asarray(np.memmap(self.path, np.uint8, "c"))

    def _check_room(self, needed: float, count: int) -> None:
        free = min(psutil.virtual_memory().available, shutil.disk_usage(self.path.parent).free)
        if needed > _MAX_SHARE * free:
            raise UserError(
                f"cache-dataset: {count} decoded images take about {needed / 2**30:.1f} GiB; "
                f"{free / 2**30:.1f} GiB are free in memory and in {self.path.parent}; leave the option out, or make the "
                "images smaller first"
            )


def _image(array: np.ndarray, mode: str) -> Image.Image:
    """Returns the pixels (H, W) or (H, W, C) as a Pillow image; Pillow would guess RGB or RGBA from the number of channels."""
    if mode in ("1", "L", "RGB", "RGBA"):
        return Image.fromarray(255 * array if mode == "1" else array).convert(mode)
    return Image.frombytes(mode, (array.shape[1], array.shape[0]), array.tobytes())


def _read_all(source: Any) -> Iterator[tuple[Any, int]]:
    """Yields (image, class) in order, decoded in chunks; uses several threads if the source is safe to read concurrently."""
    inner = source
    while hasattr(inner, "images"):
        inner = inner.images
    with ThreadPoolExecutor(None if getattr(inner, "concurrent", False) else 1) as pool:
        for start in range(0, len(source), CHUNK):
            yield from pool.map(source.__getitem__, range(start, min(start + CHUNK, len(source))))


def _write(file: BinaryIO, array: np.ndarray) -> None:
    try:
        file.write(array.data)
    except OSError as error:
        raise UserError(
            f"cache-dataset: cannot write the decoded images to {tempfile.gettempdir()}: {error.strerror}; leave the option "
            "out, or set TMPDIR to a folder with more room"
        ) from error


def _remove_stale_files() -> None:
    """Deletes the cache files that killed processes left on this machine."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        owner = path.name.removeprefix(_PREFIX).split("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            with contextlib.suppress(OSError):
                path.unlink()


def _unlink(path: str, owner: int) -> None:
    if os.getpid() == owner:  # forked workers must not delete it
        Path(path).unlink(missing_ok=True)
