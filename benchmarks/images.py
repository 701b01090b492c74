"""Image sets in memory. They are decoded once and reduced to a fixed part; the device crops and flips whole batches.

A set is a folder ``ROOT/NAME/{train,val}/CLASS/*.jpg``. Shape suffixes: n images, B batch, C channels, H x W pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from timm_sfr.data.datasets import Split
from timm_sfr.utils.errors import UserError
from timm_sfr.utils.files import replace_atomically

SUFFIXES = (".jpg", ".jpeg", ".png")
PAD = 4  # pixels of zero padding on each side of a 32-pixel image; proportional for other sizes


def decode(root: Path, name: str, part: str, pixels: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Returns the images uint8 (n, C, H, W), classes (n,) and class names of one part of a set.

    They are saved in ``ROOT/NAME-PART-PIXELSpx.npz``, from which later calls read them.

    Raises:
        UserError: if the folder is missing or has no classes.
    """
    folder, cache = root / name / part, root / f"{name}-{part}-{pixels}px.npz"
    if cache.exists():
        with np.load(cache) as kept:
            return kept["images"], kept["labels"], kept["names"].tolist()
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
    if not names:
        raise UserError(f"data-root: expected {folder}/CLASS/*.jpg; found {'no classes' if folder.is_dir() else 'nothing'}")
    images, labels = [], []
    for label, kind in enumerate(names):
        for path in sorted(path for path in (folder / kind).iterdir() if path.suffix.lower() in SUFFIXES):
            try:
                image = Image.open(path).convert("RGB")
            except OSError as error:
                raise UserError(f"data-root: {path} does not decode as an image: {error}") from error
            # The box filter averages whole pixels when an image shrinks, but only repeats pixels when it grows.
            smaller = pixels <= min(image.size)
            image = image.resize((pixels, pixels), Image.Resampling.BOX if smaller else Image.Resampling.BICUBIC)
            images.append(np.asarray(image).transpose(2, 0, 1))
            labels.append(label)
    if len(set(labels)) < len(names):
        empty = names[min(set(range(len(names))) - set(labels))]
        raise UserError(f"data-root: expected images ({', '.join(SUFFIXES)}) in {folder / empty}; found none")
    arrays = {"images": np.stack(images), "labels": np.array(labels), "names": np.array(names)}

    def write(fresh: Path) -> None:
        with fresh.open("wb") as file:
            np.savez(file, **arrays)

    replace_atomically(cache, write)
    return arrays["images"], arrays["labels"], names


def choose(labels: np.ndarray, per_class: int | None, held_out: bool, part: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of the images to train on and of those held out, both in ascending order, without overlap.

    The choice is always the same. Each class has a fixed random order. Its first `per_class` images (None: all) are
    trained on; with `part` 2, its next `per_class` images. With `held_out`, the last tenth of each class is held out and
    the training images come from the rest.

    Raises:
        UserError: if a class has too few images for the part.
    """
    order = np.random.default_rng(0).permutation(len(labels))
    kinds = [order[labels[order] == kind] for kind in np.unique(labels)]
    ends = [len(kind) - (len(kind) // 10 if held_out else 0) for kind in kinds]
    start = (part - 1) * (per_class or max(ends))
    train = [kind[:end][start:][:per_class] for kind, end in zip(kinds, ends, strict=True)]
    if part > 1 and min(map(len, train)) < (per_class or 1):
        raise UserError(
            f"part: part {part} needs {part * (per_class or max(ends))} training images of every class; one has {min(ends)}"
        )
    rest = [kind[end:] for kind, end in zip(kinds, ends, strict=True)]
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(rest))


def open_sets(root: Path, name: str, pixels: int, per_class: int | None, held_out: bool, part: int = 1) -> tuple[Split, Split]:
    """Returns the training split and the split to score: ``val``, or with `held_out` a fixed tenth of ``train``."""
    images, labels, names = decode(root, name, "train", pixels)
    chosen, rest = choose(labels, per_class, held_out, part)
    val = (images[rest], labels[rest])
    if not held_out:
        *val, found = decode(root, name, "val", pixels)
        if found != names:
            missing = sorted(set(names) ^ set(found))
            raise UserError(f"data-root: {root / name}: train and val must have the same classes; only one has {missing}")
    return tuple(
        Split(TensorDataset(torch.from_numpy(x), torch.from_numpy(y).long()), tuple(names))
        for x, y in ((images[chosen], labels[chosen]), val)
    )  # type: ignore[return-value]


class DeviceBatches:
    """Training batches of a set in device memory: padded random crops and flips, normalised.

    The order, crops and flips of an epoch depend only on (seed, epoch), so every method sees the same batches. With
    `companions`, a batch of B targets has 2B images (2B, C, H, W): the second half has, for each image, another image of
    its class (``"classmates"``) or a second crop and flip of it (``"views"``). `limit` is the most batches per epoch.
    """

    def __init__(
        self, split: Split, config: Any, aug: Any, prep: Any, seed: int, accelerator: Any,
        companions: str | None = None, limit: int | None = None,
    ) -> None:  # fmt: skip
        images, self.labels = split.dataset.tensors
        if len(images) < config.batch_size:
            raise UserError(f"batch-size: {len(images)} training images are fewer than one batch of {config.batch_size}")
        self.pad = PAD * images.shape[-1] // 32
        self.pixels, self.prep, self.seed = images.shape[-1], prep, seed
        self.device, self.batch, self.companions = accelerator.device, config.batch_size, companions
        self.batches = min(len(self.labels) // self.batch, limit or len(self.labels))
        self.images = F.pad(images.to(self.device), (self.pad,) * 4)
        self.members = [torch.nonzero(self.labels == kind)[:, 0] for kind in range(len(split.class_names or ()))]

    def __len__(self) -> int:
        return self.batches

    erase = None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the batches of epoch `epoch` from number `start` on; the ones before are made too, for their random numbers."""
        return itertools.islice(self._all(epoch), start, None)

    def _all(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        seed = self.seed * 1_000_003 + epoch
        generator, other = (torch.Generator().manual_seed(s) for s in (seed, seed + 500_000))
        order = torch.randperm(len(self.labels), generator=generator)
        for chosen in order[: len(self) * self.batch].split(self.batch):
            target = self.labels[chosen]
            images = self._augment(chosen, generator)
            if self.companions is not None:
                # Their own generator keeps the first half of the batch the same for every method.
                chosen = self._others(target, other) if self.companions == "classmates" else chosen
                images = torch.cat([images, self._augment(chosen, other)])
            yield images, target.to(self.device, non_blocking=True)

    def files(self, epoch: int, step: int) -> list[str]:
        """Returns an empty list, because these images have no files."""
        return []

    def _others(self, target: Tensor, generator: torch.Generator) -> Tensor:
        places = torch.rand(len(target), generator=generator)
        kinds = [self.members[kind] for kind in target.tolist()]
        return torch.stack([kind[int(place * len(kind))] for kind, place in zip(kinds, places.tolist(), strict=True)])

    def _augment(self, chosen: Tensor, generator: torch.Generator) -> Tensor:
        count, span = len(chosen), torch.arange(self.pixels)
        top, left = torch.randint(2 * self.pad + 1, (2, count, 1), generator=generator)
        flip = torch.rand(count, 1, generator=generator) < 0.5
        rows, columns = top + span, left + torch.where(flip, span.flip(0), span)
        place = [x.to(self.device, non_blocking=True) for x in (chosen[:, None, None], rows[:, :, None], columns[:, None])]
        images = self.images[place[0], :, place[1], place[2]].permute(0, 3, 1, 2)
        return self.prep.normalize(images.contiguous())


def val_batches(split: Split, config: Any, prep: Any) -> DataLoader:
    """Returns batches of 500 uint8 images (B, C, H, W) and classes (B,), in order, each image once."""
    return DataLoader(_Rows(split.dataset), batch_size=500, shuffle=False, collate_fn=tuple)


class _Rows(Dataset):
    """A dataset that returns a whole batch by its indices, which is faster than stacking single images."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, ...]:
        return self.data[rows]
