"""Makes batches of samples in an order that depends only on the seed.

The key of a training sample contains its epoch and its index (`timm_sfr.data.order`). So a sample is the same in a given
epoch for any number of workers and processes.

Shape suffixes: B batch, C channels, H x W pixels.
"""

from __future__ import annotations

import atexit
import dataclasses
import itertools
import multiprocessing
import multiprocessing.util
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from timm.data.dataset import IterableImageDataset
from timm.data.loader import PrefetchLoader
from timm.data.random_erasing import RandomErasing
from timm.data.readers.shared_count import SharedCount
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler, get_worker_info
from torchvision.transforms import Compose

from timm_sfr.config import AugConfig, DataConfig
from timm_sfr.data.batch_transform import collate
from timm_sfr.data.class_weights import class_targets
from timm_sfr.data.datasets import Split
from timm_sfr.data.images import to_mode
from timm_sfr.data.order import EpochOrder
from timm_sfr.data.samples import file_name, image_reading, make_samples, resized
from timm_sfr.data.sizes import SizedBatches, SizedSamples, SizeSchedule
from timm_sfr.data.transforms import Preprocessing
from timm_sfr.utils.console import logger
from timm_sfr.utils.errors import UserError
from timm_sfr.utils.processes import cores
from timm_sfr.utils.seeding import mixed, random_state_kept, seed_cpu

WORKERS = 4


class EpochSampler(Sampler[int]):
    """Yields the keys of one process's samples in an order that depends only on (seed, epoch).

    The order is split into global batches of `batch_size` * `processes` samples. Process r takes the r-th part of each, so
    the global batches are the same for any number of processes. If the order repeats images, process r takes every
    `processes`-th sample instead, which spreads the repeats over the processes. Each epoch drops its last, incomplete global
    batch. A run resumed in mid-epoch skips the first `start` batches.

    Raises:
        UserError: if an epoch has no global batch.
    """

    def __init__(self, order: EpochOrder, batch_size: int, process: int = 0, processes: int = 1) -> None:
        if len(order) < batch_size * processes:
            raise UserError(
                f"batch-size: the training split has {order.count} images, fewer than one global batch of "
                f"{batch_size} x {processes} processes; lower --batch-size"
            )
        self.order, self.batch_size, self.process, self.processes = order, batch_size, process, processes
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        return len(self.order) // (self.batch_size * self.processes) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        yield from self.keys(self.epoch)[self.start * self.batch_size :]

    def indices(self, epoch: int, step: int) -> list[int]:
        """Returns the indices of the images in batch `step` of an epoch."""
        return [key % self.order.count for key in self.keys(epoch)[step * self.batch_size :][: self.batch_size]]

    def keys(self, epoch: int) -> list[int]:
        """Returns all keys of this process in an epoch, batch by batch."""
        keys = self.order.keys(epoch)[: len(self) * self.processes]
        return self.order.part(keys, self.batch_size, self.process, self.processes).tolist()


class TrainBatches:
    """Makes training batches on the device: normalised images (B, C, H, W) and class indices (B,).

    With views (``aug_splits``), a batch has the first views of all its images, then all second ones, and so on.
    With `sizes`, H and W change from batch to batch, and B too if the schedule has several batch sizes.
    """

    def __init__(
        self,
        split: Split,
        config: DataConfig,
        aug: AugConfig,
        prep: Preprocessing,
        seed: int,
        accelerator: Any,
        sizes: SizeSchedule | None = None,
    ) -> None:
        transform, batch = prep.train_transform(aug), config.batch
        self.split, self.sizes = split, sizes
        self.sampler: EpochSampler | SizedBatches | None = None
        form: dict[str, Any] = {"batch_size": batch, "drop_last": True}
        if split.streamed:
            _check_stream(config, aug)
            _check_shards(split.dataset, accelerator.num_processes * max(1, worker_count(config)))
            dataset = SeededStream(
                _prepare_stream(split.dataset, None, config, prep.img_mode), transform, seed, accelerator.process_index
            )
        else:
            if config.cache_dataset and accelerator.is_main_process:
                logger.info("decoding the images once, into memory")
            fixed = aug.no_aug and sizes is None  # else a cache keeps the images as they are decoded
            dataset = make_samples(split, transform, config, prep.img_mode, None if fixed else seed)
            targets = class_targets(split.dataset) if config.sampler == "balanced" else None
            order = EpochOrder(len(dataset), seed, config.epoch_repeats, aug.aug_repeats, targets)
            if sizes is None:
                self.sampler = EpochSampler(order, batch, accelerator.process_index, accelerator.num_processes)
                form["sampler"] = self.sampler
            else:
                views = [resized(dataset, prep.at(size).train_transform(aug)) for size in sizes.sizes]
                self.sampler = SizedBatches(sizes, order, accelerator.process_index)
                dataset, form = SizedSamples(views), {"batch_sampler": self.sampler}
        self.samples = dataset
        self.loader = DataLoader(dataset, **form, **_options(config, mixed(seed, accelerator.process_index)))
        self.batches = PrefetchLoader(
            self.loader, mean=prep.mean, std=prep.std, channels=prep.input_size[0], device=accelerator.device
        )
        # The trainer calls timm's random erasing: the loader is one batch ahead and would use another batch's random numbers.
        self.erase: Callable[[Tensor], Tensor] | None = None
        if aug.reprob > 0 and not aug.no_aug:
            splits = (aug.aug_splits or 2) if aug.resplit else 0
            self.erase = RandomErasing(
                aug.reprob, mode=aug.remode, max_count=aug.recount, num_splits=splits, device=accelerator.device
            )

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Returns the batches of epoch `epoch`, from batch `start` on, before random erasing (`erase`)."""
        if self.sampler is not None:
            self.sampler.epoch, self.sampler.start = epoch, start
            return iter(self.batches)
        self.samples.set_epoch(epoch)
        return itertools.islice(self.batches, start, None)  # a stream has to be read again up to `start`

    def files(self, epoch: int, step: int) -> list[str]:
        """Returns the file names of this process's batch `step` of epoch `epoch`; an empty list for a stream."""
        if self.sampler is None:
            return []
        return [file_name(self.split.dataset, index) for index in self.sampler.indices(epoch, step)]


def eval_loader(split: Split, config: DataConfig, prep: Preprocessing, views: int = 1) -> DataLoader:
    """Returns a loader of validation batches, in order: uint8 images (B, C, H, W) and class indices (B,).

    With several `views` of each image (2, 5 or 10, see `TestViews`) images are (B, V, C, H, W).
    """
    batch = config.validation_batch_size or config.batch
    transform = prep.eval_transform(views)
    if split.streamed:
        dataset = _prepare_stream(split.dataset, transform, config, prep.img_mode)
        some = _read_own_shards(dataset.reader)
        return DataLoader(dataset if some else _Nothing(), batch, **_options(config))
    dataset = make_samples(split, transform, config, prep.img_mode, None)
    return DataLoader(dataset, batch, **_options(config))


def worker_count(config: DataConfig) -> int:
    """Returns the number of data loading processes of this process: 4 by default, and at most its share of the cores."""
    if config.workers is not None:
        return config.workers
    return max(1, min(WORKERS, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


class SeededStream(IterableDataset):
    """The samples of a stream, each transformed with random numbers seeded by (seed, epoch, process, worker, position).

    So processes, epochs and seeds differ, and a resumed epoch draws the same numbers again.
    """

    def __init__(self, dataset: IterableImageDataset, transform: Callable, seed: int, process: int) -> None:
        self.dataset, self.transform, self.seed, self.process = dataset, transform, seed, process
        self.current = SharedCount()  # the epoch, which loading processes that have started have to see

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the order and of the random numbers."""
        self.current.value = epoch
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        worker = get_worker_info()
        place = (self.seed, self.current.value, self.process, 0 if worker is None else worker.id)
        for position, (image, target) in enumerate(self.dataset):
            with random_state_kept():
                seed_cpu(*place, position)
                image = self.transform(image)
            yield image, target


def _prepare_stream(dataset: Any, transform: Callable | None, config: DataConfig, mode: str) -> IterableImageDataset:
    if config.cache_dataset:
        raise UserError("cache-dataset: expected a dataset with an index (a folder, a tar, torch/, hfds/); this one is a "
                        "stream; leave the option out")  # fmt: skip
    read = partial(to_mode, reading=image_reading(config, mode))
    dataset.transform = read if transform is None else Compose([read, transform])
    dataset.set_loader_cfg(num_workers=worker_count(config))
    return dataset


class _Nothing(IterableDataset):
    """The part of a stream of a process without a shard."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def _read_own_shards(reader: Any) -> bool:
    """Makes timm's reader of webdataset shards read each of this process's shards once; returns whether it has any.

    By itself, it makes the parts of several processes equally long: it repeats some samples and leaves others out.
    """
    files = getattr(getattr(reader, "split_info", None), "filenames", None)
    if files is not None and getattr(reader, "dist_num_replicas", 1) > 1:
        own = files[reader.dist_rank :: reader.dist_num_replicas]
        reader.split_info = dataclasses.replace(reader.split_info, filenames=own)
        reader.dist_rank, reader.dist_num_replicas, reader.global_num_workers = 0, 1, reader.num_workers
        return bool(own)
    return True


def _check_stream(config: DataConfig, aug: AugConfig) -> None:
    """Raises UserError for options that need to know the images of an epoch beforehand."""
    skips = config.on_bad_image == "skip"
    for name, given in (("sampler", config.sampler != "shuffle"), ("aug-repeats", aug.aug_repeats > 1), ("on-bad-image", skips)):
        if given:
            raise UserError(f"{name}: expected a dataset with an index (a folder, a tar, torch/, hfds/); this one is a stream, "
                            "whose images and classes are not known beforehand; leave the option out")  # fmt: skip


def _check_shards(dataset: IterableImageDataset, readers: int) -> None:
    """Raises UserError if there are fewer shards than reading processes: those without a shard would block the others."""
    reader = dataset.reader
    files = getattr(getattr(reader, "split_info", None), "filenames", None)
    shards = len(files) if files else getattr(getattr(reader, "dataset", None), "num_shards", None)
    if isinstance(shards, int) and shards < readers:
        raise UserError(f"workers: the stream has {shards} shards for {readers} reading processes (processes times workers); "
                        "lower --workers, or cut the data into more shards")  # fmt: skip


def _ignore_signals(worker: int) -> None:
    """Ignores stop signals, which launchers and terminals send to all processes: the training process ends its workers."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _terminate_workers() -> None:
    """Ends the workers at exit: multiprocessing would wait forever for children that ignore its SIGTERM."""
    children = [child for child in multiprocessing.active_children() if child.daemon]
    if children and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report their end as an error
    for child in children:
        child.terminate()
    for child in children:
        child.join(0.1)
        if child.is_alive():
            child.kill()


atexit.register(_terminate_workers)  # registered after multiprocessing's handler, so it runs first


def _options(config: DataConfig, seed: int = 0) -> dict[str, Any]:
    workers = worker_count(config)
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": config.pin_mem and torch.accelerator.is_available(),
        "collate_fn": collate,
        "worker_init_fn": _ignore_signals,
        # A separate generator, because starting workers draws a number and a resumed run starts them in another epoch.
        # webdataset shuffles by it, so it differs between seeds and processes.
        "generator": torch.Generator().manual_seed(seed),
    }
