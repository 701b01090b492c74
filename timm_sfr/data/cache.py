"""A decoded dataset in one file that every data loading process maps: images are decoded once, not once an epoch."""

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

CHUNK = 1024  # images decoded before their bytes are written
_PREFIX = f"timm_sfr-cache-{socket.gethostname()}-"  # a temporary folder may be shared by machines and containers
_SPARE = 0.9  # of the free memory and disk, how much a cache may take


class Cached(Dataset):
    """What `source` gives by index, read once at construction: uint8 images of any sizes, and their classes.

    The pixels lie in a temporary file that the processes map, so that they share one copy of it in memory however they
    are started. It goes when the process that made it ends.

    Args:
        source: Gives (image, class index) by index and has a length. PIL images come back as PIL images; uint8 tensors
            and arrays as arrays, (C, H, W).

    Raises:
        UserError: if the images would not fit into the free memory or the temporary folder.
    """

    def __init__(self, source: Any) -> None:
        _remove_left_over()
        handle, path = tempfile.mkstemp(prefix=f"{_PREFIX}{os.getpid()}-", suffix=".uint8")
        self._remove = weakref.finalize(self, _unlink, path, os.getpid())
        self.path = Path(path)
        targets, shapes = [], []
        with os.fdopen(handle, "wb") as file:
            for image, target in _read_all(source):
                self.pictures = isinstance(image, Image.Image)
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
        return Image.fromarray(array) if self.pictures else array, target

    def array(self, index: int) -> tuple[np.ndarray, int]:
        """The image's pixels, (H, W) or (H, W, C) of a PIL image, and its class."""
        start, end = self.starts[index : index + 2].tolist()
        shape = [size for size in self.shapes[index].tolist() if size]
        return self.bytes[start:end].reshape(shape), self.targets[index].item()

    @property
    def size(self) -> int:
        """Bytes of all images."""
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        # A map is pickled as its contents: a started process maps the file itself.
        return {name: value for name, value in self.__dict__.items() if name not in ("bytes", "images", "_remove")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, images=None)
        self._map()

    def _map(self) -> None:
        # Copy on write: fast_collate warns of arrays that cannot be written to.
        # As a plain array: a slice of a memmap takes ten times as long.
        self.bytes = np.asarray(np.memmap(self.path, np.uint8, "c"))

    def _check_room(self, needed: float, count: int) -> None:
        free = min(psutil.virtual_memory().available, shutil.disk_usage(self.path.parent).free)
        if needed > _SPARE * free:
            raise UserError(
                f"cache-dataset: {count} decoded images take about {needed / 2**30:.1f} GiB; "
                f"{free / 2**30:.1f} GiB are free in memory and in {self.path.parent}; leave the option out, or make the "
                "images smaller first"
            )


def _read_all(source: Any) -> Iterator[tuple[Any, int]]:
    """(image, class) in order, decoded a chunk at a time, by threads where the source can be read by several."""
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


def _remove_left_over() -> None:
    """Removes the files of processes of this machine that were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        owner = path.name.removeprefix(_PREFIX).split("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            with contextlib.suppress(OSError):
                path.unlink()


def _unlink(path: str, owner: int) -> None:
    if os.getpid() == owner:  # forked workers leave it to the process that made it
        Path(path).unlink(missing_ok=True)
