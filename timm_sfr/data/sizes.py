"""Training at image sizes that change from batch to batch: timm's schedule of sizes, and the samples of each batch.

timm's `ScheduledBatchSampler` draws the size of each batch. It depends only on the options, the seed, the epoch and the number
of images per process, so all processes draw the same. Which images a batch has is ours, as in `EpochSampler`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.data.scheduled_sampler import ScheduledBatchSampler
from torch.utils.data import Dataset, Sampler

from timm_sfr.config import SizeConfig
from timm_sfr.data.order import EpochOrder
from timm_sfr.data.samples import Samples
from timm_sfr.utils.errors import UserError

# An image that an epoch repeats has the random numbers of an epoch this much later.
REPEAT = 1_000_000
SizedKey = tuple[int, int]  # the key of a sample, and the number of its size among the options'


@dataclass(frozen=True)
class SizeSchedule:
    """The sizes of a run's training images: square, in pixels, as timm's `policy` for one process chooses among them."""

    sizes: tuple[int, ...]
    policy: ScheduledBatchSampler
    processes: int

    @classmethod
    def of(cls, config: SizeConfig, batch: int, count: int, epochs: int, seed: int, processes: int) -> SizeSchedule:
        """Returns the schedule for `count` images, with `batch` images of any size a process unless the options say otherwise.

        Raises:
            UserError: if the images do not fill a batch.
        """
        sizes = config.train_img_sizes or ()
        progressive = config.train_size_schedule == "progressive"
        try:
            policy = ScheduledBatchSampler(
                range(count // processes),
                config.train_batch_sizes or (batch,) * len(sizes),
                config.train_size_probs,
                seed,
                num_batches=config.train_batches_per_epoch,
                choice_schedule=config.train_size_schedule,
                schedule_epochs=epochs if progressive else None,
                schedule_spread=config.train_size_schedule_spread,
                schedule_random_mix=config.train_size_random_mix,
            )
        except ValueError as error:
            raise UserError(f"train_img_sizes: timm cannot make the schedule of sizes for {count} images in {processes} "
                            f"processes: {error}") from error  # fmt: skip
        return cls(sizes, policy, processes)

    def __len__(self) -> int:
        """Number of batches in an epoch, the same in each."""
        return len(self.policy)

    @property
    def average_batch(self) -> float:
        """Mean batch size of a process under the schedule: the batch size that the learning rate is for."""
        return self.policy.average_batch_size

    def batches(self, epoch: int) -> list[tuple[int, int]]:
        """Returns the batches of an epoch in order: the number of the size, and the batch size of a process."""
        self.policy.set_epoch(epoch)
        return [(batch[0][1], len(batch)) for batch in self.policy]

    def images(self, epoch: int, steps: int) -> int:
        """Returns the number of images in the first batches of an epoch, over all processes."""
        return self.processes * sum(size for _, size in self.batches(epoch)[:steps])

    def mean_size(self, epoch: int) -> float:
        """Returns the mean image size in an epoch, in pixels."""
        batches = self.batches(epoch)
        return sum(self.sizes[choice] * size for choice, size in batches) / sum(size for _, size in batches)

    def __str__(self) -> str:
        pairs = ", ".join(
            f"{size} px in batches of {batch}" for size, batch in zip(self.sizes, self.policy.batch_sizes, strict=True)
        )
        return (f"training images of {pairs}, {self.policy.choice_schedule}: {len(self)} batches an epoch, of "
                f"{self.average_batch:.4g} images in the mean")  # fmt: skip


class SizedBatches(Sampler[list[SizedKey]]):
    """Yields the keys of one process's batches; order and sizes depend only on (seed, epoch).

    As in `EpochSampler`, the order is split into global batches, of which process r takes the r-th part. If the schedule needs
    more images than there are, they are taken again, in another order and with other random numbers.
    """

    def __init__(self, schedule: SizeSchedule, order: EpochOrder, process: int = 0) -> None:
        self.schedule, self.order, self.process = schedule, order, process
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        return len(self.schedule)

    def __iter__(self) -> Iterator[list[SizedKey]]:
        yield from itertools.islice(self.batches(self.epoch), self.start, None)

    def batches(self, epoch: int) -> Iterator[list[SizedKey]]:
        """Yields the keys of each batch of an epoch."""
        processes, keys, passes = self.schedule.processes, torch.empty(0, dtype=torch.long), 0
        for choice, size in self.schedule.batches(epoch):
            while len(keys) < size * processes:
                fresh = self.order.keys(epoch + REPEAT * passes)[: len(self.order) // processes * processes]
                keys, passes = torch.cat([keys, fresh]), passes + 1
            batch, keys = keys[: size * processes], keys[size * processes :]
            yield [(key, choice) for key in self.order.part(batch, size, self.process, processes).tolist()]

    def indices(self, epoch: int, step: int) -> list[int]:
        """Returns the indices of the images in batch `step` of an epoch."""
        return [key % self.order.count for key, _ in next(itertools.islice(self.batches(epoch), step, None))]


class SizedSamples(Dataset):
    """Samples by `SizedKey`: `views` has the samples at each size. All keys of a batch have the same size."""

    def __init__(self, views: Sequence[Samples]) -> None:
        self.views, self.images = views, views[0].images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: SizedKey) -> tuple[Any, int]:
        return self.views[key[1]][key[0]]

    def __getitems__(self, keys: list[SizedKey]) -> Any:
        """Returns a batch, as `Samples` does."""
        return self.views[keys[0][1]].__getitems__([key for key, _ in keys])
