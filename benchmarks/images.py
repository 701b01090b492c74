"""Image sets in memory: decoded once, cut to a fixed part, cropped and flipped a whole batch at a time on the device.

A set is a folder ``ROOT/NAME/{train,val}/CLASS/*.jpg``. Shape suffixes: n images, B batch, C channels, H x W pixels.
"""

from __future__ import annotations

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
PAD = 4  # pixels of zero padding around a crop at 32 pixels


def decode(root: Path, name: str, part: str, pixels: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images uint8 (n, C, H, W), classes (n,) and class names of one part of a set; kept beside it for the next time.

    Raises:
        UserError: if the folder is missing or has no classes.
    """
    folder, cache = root / name / part, root / f"{name}-{part}-{pixels}px.npz"
    if cache.exists():
        with np.load(cache) as kept:
            return kept["images"], kept["labels"], kept["names"].tolist()
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
    if not names:
        raise UserError(
            f"data-root: expected {folder}/CLASS/*.jpg; found {'no classes' if folder.is_dir() else 'nothing'}"
        )
    images, labels = [], []
    for label, kind in enumerate(names):
        for path in sorted(path for path in (folder / kind).iterdir() if path.suffix.lower() in SUFFIXES):
            try:
                image = Image.open(path).convert("RGB")
            except OSError as error:
                raise UserError(f"data-root: {path} does not decode as an image: {error}") from error
            # Box averages whole pixels where an image shrinks, and would only repeat them where it grows.
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


def choose(
    labels: np.ndarray, per_class: int | None, held_out: bool, part: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train on and indices held out, in ascending order, both fixed and never the same image.

    In a fixed random order of every class, the first `per_class` (None: all) are trained on, or with `part` 2 the next
    as many; with `held_out`, the last tenth of the class is held out, and what is trained on comes from the rest.

    Raises:
        UserError: if a class has no such part.
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


def open_sets(
    root: Path, name: str, pixels: int, per_class: int | None, held_out: bool, part: int = 1
) -> tuple[Split, Split]:
    """The part to train on and the part that scores are measured on: ``val``, or a fixed tenth of ``train``."""
    images, labels, names = decode(root, name, "train", pixels)
    chosen, rest = choose(labels, per_class, held_out, part)
    val = (images[rest], labels[rest])
    if not held_out:
        *val, found = decode(root, name, "val", pixels)
        if found != names:
            missing = sorted(set(names) ^ set(found))
            raise UserError(
                f"data-root: {root / name}: train and val must have the same classes; only one has {missing}"
            )
    return tuple(
        Split(TensorDataset(torch.from_numpy(x), torch.from_numpy(y).long()), tuple(names))
        for x, y in ((images[chosen], labels[chosen]), val)
    )  # type: ignore[return-value]


class DeviceBatches:
    """Training batches from a set that lies on the device: padded random crops and flips, normalised.

    Order, crops and flips of an epoch depend on (seed, epoch) alone, so every method sees the same batches. With
    `companions`, the images are followed by as many others, (2B, C, H, W) for B targets: ``"classmates"``, another image
    of each one's class, or ``"views"``, each one cropped and flipped anew. `limit` cuts an epoch to so many batches.
    """

    def __init__(
        self, split: Split, config: Any, aug: Any, prep: Any, seed: int, accelerator: Any,
        companions: str | None = None, limit: int | None = None,
    ) -> None:  # fmt: skip
        images, self.labels = split.dataset.tensors
        if len(images) < config.batch_size:
            raise UserError(
                f"batch-size: {len(images)} training images are fewer than one batch of {config.batch_size}"
            )
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
        """The batches of epoch `epoch`, from its first: these runs are not resumed."""
        start = self.seed * 1_000_003 + epoch
        generator, other = (torch.Generator().manual_seed(s) for s in (start, start + 500_000))
        order = torch.randperm(len(self.labels), generator=generator)
        for chosen in order[: len(self) * self.batch].split(self.batch):
            target = self.labels[chosen]
            images = self._augment(chosen, generator)
            if self.companions is not None:
                # From a generator of their own: the images stay those that every method sees.
                chosen = self._others(target, other) if self.companions == "classmates" else chosen
                images = torch.cat([images, self._augment(chosen, other)])
            yield images, target.to(self.device, non_blocking=True)

    def files(self, epoch: int, step: int) -> list[str]:
        """None: the images have no files here."""
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
        place = [
            x.to(self.device, non_blocking=True) for x in (chosen[:, None, None], rows[:, :, None], columns[:, None])
        ]
        images = self.images[place[0], :, place[1], place[2]].permute(0, 3, 1, 2)
        return self.prep.normalize(images.contiguous())


def val_batches(split: Split, config: Any, prep: Any) -> DataLoader:
    """Batches of 500 uint8 images (B, C, H, W) and classes (B,), each once, in order."""
    return DataLoader(_Rows(split.dataset), batch_size=500, shuffle=False, collate_fn=tuple)


class _Rows(Dataset):
    """A set that hands out a whole batch by its indices, without stacking it image by image."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, ...]:
        return self.data[rows]
