"""From samples to batches, with an order and an augmentation that depend on the seed alone.

A training sample is drawn by a key that holds its epoch and its index, and augmented with random numbers from
(seed, epoch, index): the same sample looks the same in a given epoch whatever the number of workers and processes.

Shape suffixes: B batch, C channels, H x W pixels.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_transform
from timm.data.dataset import IterableImageDataset
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from timm_sfr.cache import Cached
from timm_sfr.data import Split
from timm_sfr.errors import UserError
from timm_sfr.sections import AugConfig, DataConfig

_logger = logging.getLogger("timm_sfr")


class Decoded(Dataset):
    """Samples of a map-style dataset: (PIL image, class index) by index.

    Raises:
        UserError: on reading an image that does not decode, with its name.
    """

    def __init__(self, dataset: Any, img_mode: str) -> None:
        self.dataset, self.img_mode = dataset, img_mode

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            return self._read(index)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(
                f"data: cannot decode image {_file_name(self.dataset, index)}: {error}; replace or delete the file"
            ) from error

    def _read(self, index: int) -> tuple[Image.Image, int]:
        # timm's own __getitem__ would replace a file that does not decode by its neighbour, with a warning.
        if isinstance(self.dataset, ImageDataset):
            stream, target = self.dataset.reader[index]
            with contextlib.closing(stream) if hasattr(stream, "close") else contextlib.nullcontext():
                return Image.open(stream).convert(self.img_mode), int(target)
        image, target = self.dataset[index]
        return image.convert(self.img_mode), int(target)


class Samples(Dataset):
    """Transformed samples: (uint8 image (C, H, W), class index) by key.

    A key is ``epoch * len + index`` (`EpochSampler`); the transform's random numbers come from (seed, epoch, index).

    Args:
        images: Gives (image, class index) by index.
        transform: From an image to uint8; None if the images are that already.
        seed: None for a transform that draws no random numbers.
    """

    def __init__(self, images: Dataset, transform: Callable | None, seed: int | None) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, key: int) -> tuple[Any, int]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[int]) -> list[tuple[Any, int]]:
        """A whole batch, as the DataLoader asks for it: the state of the random numbers is put aside once, not once an
        image, which takes as long as decoding a small one."""
        if self.seed is None:
            return [self._sample(key) for key in keys]
        with random_state_kept():
            return [self._sample(key) for key in keys]

    def _sample(self, key: int) -> tuple[Any, int]:
        epoch, index = divmod(key, len(self))
        image, target = self.images[index]
        if self.seed is not None:
            seed_cpu(self.seed, epoch, index)
        return image if self.transform is None else self.transform(image), target


def make_samples(split: Split, transform: Callable, config: DataConfig, img_mode: str, seed: int | None) -> Samples:
    """`Samples` of a map-style split; decoded once where the options say so, and transformed once where nothing is drawn.

    Raises:
        UserError: if an image does not decode, or all do not fit.
    """
    images: Dataset = Decoded(split.dataset, config.input_img_mode or img_mode)
    if not config.cache_dataset:
        return Samples(images, transform, seed)
    if seed is None:
        return Samples(Cached(Samples(images, transform, None)), None, None)
    return Samples(Cached(images), transform, seed)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Leaves the random numbers of Python, NumPy and torch (CPU) as they were, whatever is seeded inside.

    In a data loading process nothing else draws any: there it does nothing.
    """
    if get_worker_info() is not None:
        yield
        return
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_cpu(*entropy: int) -> None:
    """Seeds Python, NumPy and torch (CPU) from `entropy`."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


class EpochSampler(Sampler[int]):
    """Keys of one process's samples in an order that depends on (seed, epoch) alone.

    The order is cut into global batches of `batch_size` * `processes`; process r takes the r-th part of each, so any
    number of processes sees the same global batches. What does not fill a global batch is left out of that epoch.
    `start` batches are left out at its beginning, in a run that goes on in mid-epoch.
    """

    def __init__(self, count: int, batch_size: int, seed: int, process: int = 0, processes: int = 1) -> None:
        if count < batch_size * processes:
            raise UserError(
                f"batch-size: the training split has {count} images, fewer than one global batch of "
                f"{batch_size} x {processes} processes; lower --batch-size"
            )
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.process, self.processes = process, processes
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        return self.count // (self.batch_size * self.processes) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        yield from self.keys(self.epoch)[self.start * self.batch_size :]

    def keys(self, epoch: int) -> list[int]:
        """All keys of this process in an epoch, batch after batch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.count, generator=generator)[: len(self) * self.processes]
        own = order.view(-1, self.processes, self.batch_size)[:, self.process].flatten()
        return (own + epoch * self.count).tolist()


def img_mode(channels: int) -> str:
    """The PIL mode of images with so many channels."""
    return "L" if channels == 1 else "RGB"


@dataclass(frozen=True)
class Preprocessing:
    """Image size and normalisation, as timm's ``resolve_data_config`` gives them."""

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str = "center"

    @property
    def img_mode(self) -> str:
        """The PIL mode with this many channels."""
        return img_mode(self.input_size[0])

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) as float32 with the mean taken off and divided by the deviation."""
        mean, std = (
            torch.tensor(values, device=images.device).view(1, -1, 1, 1) * 255 for values in (self.mean, self.std)
        )
        return (images.float() - mean) / std

    def eval_transform(self) -> Callable:
        """timm's validation transform, to uint8."""
        return create_transform(
            self.input_size,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            use_prefetcher=True,
        )

    def train_transform(self, aug: AugConfig) -> Callable:
        """timm's training transform, to uint8.

        Raises:
            UserError: if timm does not know the augmentation policy.
        """
        try:
            return self._train_transform(aug)
        except (AssertionError, ValueError, KeyError, IndexError) as error:
            raise UserError(f"aa: timm cannot make the training transform: {error}; a policy is such as "
                            "rand-m9-mstd0.5-inc1, original or augmix-m5") from error  # fmt: skip

    def _train_transform(self, aug: AugConfig) -> Callable:
        return create_transform(
            self.input_size,
            is_training=True,
            no_aug=aug.no_aug,
            train_crop_mode=aug.train_crop_mode,
            scale=aug.scale,
            ratio=aug.ratio,
            hflip=aug.hflip,
            vflip=aug.vflip,
            color_jitter=aug.color_jitter,
            auto_augment=aug.aa,
            interpolation=aug.train_interpolation,
            mean=self.mean,
            std=self.std,
            use_prefetcher=True,
        )


class TrainBatches:
    """Training batches on the device: normalised images (B, C, H, W) and class indices (B,)."""

    def __init__(
        self, split: Split, config: DataConfig, aug: AugConfig, prep: Preprocessing, seed: int, accelerator: Any
    ) -> None:
        transform = prep.train_transform(aug)
        self.split = split
        self.sampler: EpochSampler | None = None
        if split.streamed:
            dataset = _streamed(split.dataset, transform, config)
        else:
            place = {"process": accelerator.process_index, "processes": accelerator.num_processes}
            if config.cache_dataset and accelerator.is_main_process:
                _logger.info("decoding the images once, into memory")
            dataset = make_samples(split, transform, config, prep.img_mode, None if aug.no_aug else seed)
            self.sampler = EpochSampler(len(dataset), config.batch_size, seed, **place)
        self.loader = DataLoader(dataset, config.batch_size, sampler=self.sampler, drop_last=True, **_workers(config))
        self.batches = PrefetchLoader(
            self.loader,
            mean=prep.mean,
            std=prep.std,
            channels=prep.input_size[0],
            device=accelerator.device,
        )
        # timm's own, but called by the trainer: the loader is a batch ahead, and would draw from another batch's numbers.
        self.erase: Callable[[Tensor], Tensor] | None = None
        if aug.reprob > 0 and not aug.no_aug:
            self.erase = RandomErasing(
                aug.reprob, mode=aug.remode, max_count=aug.recount, num_splits=0, device=accelerator.device
            )

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epoch `epoch`, in its own order, from batch `start` on; not yet erased (`erase`)."""
        if self.sampler is not None:
            self.sampler.epoch, self.sampler.start = epoch, start
            return iter(self.batches)
        self.split.dataset.set_epoch(epoch)
        return itertools.islice(self.batches, start, None)  # a stream is read up to there again

    def files(self, epoch: int, step: int) -> list[str]:
        """The files of this process's batch `step` of epoch `epoch`; none for a stream."""
        if self.sampler is None:
            return []
        keys = self.sampler.keys(epoch)[step * self.sampler.batch_size :][: self.sampler.batch_size]
        return [_file_name(self.split.dataset, key % self.sampler.count) for key in keys]


def _file_name(dataset: Any, index: int) -> str:
    """The file of a sample, or its number where the dataset cannot say."""
    try:
        return str(dataset.filename(index, absolute=True))
    except (AttributeError, AssertionError, NotImplementedError, TypeError):
        return f"number {index}"


def eval_loader(split: Split, config: DataConfig, prep: Preprocessing) -> DataLoader:
    """Validation batches, uint8 images (B, C, H, W) and class indices (B,), every sample once, in order."""
    batch = config.validation_batch_size or config.batch_size
    transform = prep.eval_transform()
    if split.streamed:
        return DataLoader(_streamed(split.dataset, transform, config), batch, **_workers(config))
    dataset = make_samples(split, transform, config, prep.img_mode, None)
    return DataLoader(dataset, batch, shuffle=False, **_workers(config))


def _streamed(dataset: IterableImageDataset, transform: Callable, config: DataConfig) -> IterableImageDataset:
    if config.cache_dataset:
        raise UserError("cache-dataset: expected a dataset with an index (a folder, a tar, torch/, hfds/); this one is a "
                        "stream; leave the option out")  # fmt: skip
    dataset.transform = transform
    dataset.set_loader_cfg(num_workers=config.workers)
    return dataset


def _workers(config: DataConfig) -> dict[str, Any]:
    return {
        "num_workers": config.workers,
        "persistent_workers": config.workers > 0,
        "pin_memory": config.pin_mem,
        "collate_fn": fast_collate,
        # Its own, since starting workers draws a number: a resumed run starts them in another epoch.
        "generator": torch.Generator(),
    }


def reseed(*entropy: int) -> None:
    """Seeds Python, NumPy and torch (all devices) from `entropy`: dropout, mixup and erasing of (seed, epoch, process)."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
