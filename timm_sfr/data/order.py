"""The order of an epoch's samples, which depends only on (seed, epoch): passes, repeats, and classes in balance.

A sample's key tells which one it is and seeds its augmentation: ``variant * count + index``. Every epoch has variants of its
own, as many as an image can be in one epoch.

Shape suffix: N, the samples of an epoch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from timm_sfr.utils.errors import UserError

# What an epoch takes of the images: their indices (N,), and for each how often it was taken before (N,).
Taken = tuple[Tensor, Tensor]


def balanced(targets: Tensor, generator: torch.Generator) -> Taken:
    """Returns as many images as there are, of each class equally many up to one, in random order.

    A class's images are taken in a random order that starts again when it has ended. Classes without images are left out.
    `targets` are the classes of all images, (count,).
    """
    count, sizes = len(targets), targets.unique(return_counts=True)[1]
    shares = torch.full_like(sizes, count // len(sizes))
    shares[torch.randperm(len(sizes), generator=generator)[: count % len(sizes)]] += 1
    mixed = torch.randperm(count, generator=generator)
    by_class = mixed[targets[mixed].argsort(stable=True)]
    kinds = torch.repeat_interleave(torch.arange(len(sizes)), shares)
    turns = torch.arange(count) - (shares.cumsum(0) - shares)[kinds]
    starts = sizes.cumsum(0) - sizes
    order = torch.randperm(count, generator=generator)
    index, before = by_class[starts[kinds] + turns % sizes[kinds]], turns // sizes[kinds]
    return index[order], before[order]


def repeated(taken: Taken, repeats: float) -> Taken:
    """Returns the first of the images, each `repeats` times in a row, until there are as many as before.

    As in timm's ``RepeatAugSampler``, a fraction repeats some images once more than others.
    """
    index, before = taken
    place = (torch.arange(len(index), dtype=torch.float64) // repeats).long()
    copy = torch.arange(len(index)) - torch.searchsorted(place, place)
    return index[place], before[place] * math.ceil(repeats) + copy


class EpochOrder:
    """The samples of each epoch, in order.

    Args:
        count: Number of images.
        seed: The run's seed.
        passes: Passes over the images in an epoch (``--epoch-repeats``); the last one may be a part.
        repeats: How often an image comes in a row (``--aug-repeats``); an epoch then has fewer images, and is as long.
        targets: The class of every image, (count,), to take each class equally often; None takes every image once.

    Raises:
        UserError: if a class index is negative, as for images without a label.
    """

    def __init__(self, count: int, seed: int, passes: float = 1, repeats: float = 1, targets: Tensor | None = None) -> None:
        self.count, self.seed, self.targets = count, seed, targets
        self.passes, self.repeats = max(1, passes), max(1, repeats)
        turns = 1
        if targets is not None:
            if targets.min() < 0:
                raise UserError("sampler: some training images have no class, and balanced needs one of each image")
            sizes = targets.unique(return_counts=True)[1]
            turns = math.ceil(math.ceil(count / len(sizes)) / int(sizes.min()))
        self._variants = turns * math.ceil(self.repeats)  # of one pass

    def __len__(self) -> int:
        return int(self.count * self.passes)

    def keys(self, epoch: int) -> Tensor:
        """Returns the keys of epoch `epoch`, (len,)."""
        generator, parts = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch), []
        passes = math.ceil(self.passes)
        for number in range(passes):
            if self.targets is None:
                index = torch.randperm(self.count, generator=generator)
                before = torch.zeros_like(index)
            else:
                index, before = balanced(self.targets, generator)
            if self.repeats > 1:
                index, before = repeated((index, before), self.repeats)
            parts.append(((epoch * passes + number) * self._variants + before) * self.count + index)
        return torch.cat(parts)[: len(self)]

    def part(self, keys: Tensor, size: int, process: int, processes: int) -> Tensor:
        """Returns a process's keys, (n / processes,), of the keys (n,) of whole global batches: process r's are the r-th `size`.

        If the order repeats images, it is every `processes`-th key instead, which spreads the repeats over the processes.
        """
        if self.repeats > 1:
            return keys[process::processes]
        return keys.view(-1, processes, size)[:, process].flatten()
