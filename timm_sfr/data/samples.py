"""Reads and decodes single samples, replaces images that do not decode, and transforms each with its own random numbers.

Shape suffixes: B batch, C channels, H x W pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import ImageDataset, MultiLabelTarget
from torch.utils.data import Dataset

from timm_sfr.config import DataConfig
from timm_sfr.data.batch_transform import Batch, BatchTransform
from timm_sfr.data.cache import Cached
from timm_sfr.data.datasets import Split
from timm_sfr.data.folders import TEXT, FolderReader
from timm_sfr.data.images import UNDECODABLE, ImageReading, to_mode
from timm_sfr.utils.console import logger
from timm_sfr.utils.errors import UserError
from timm_sfr.utils.seeding import random_state_kept, seed_cpu


def image_reading(config: DataConfig, mode: str) -> ImageReading:
    """Returns how a run reads images for a model that takes the Pillow mode `mode`, unless the options name another."""
    return ImageReading(config.input_img_mode or mode, config.exif, config.image_background, config.image_range)


class BadImage(UserError):
    """An image that does not decode."""

    name: str = ""  # of its file, or its number
    target: int | None = None  # its class, if it is known


class Decoded(Dataset):
    """The decoded samples of a map-style dataset: (PIL image, class index) by index.

    If an image may have several classes, an array (K,) of 0 and 1, float32, takes the place of the index.

    Raises:
        BadImage: when an image that does not decode is read.
    """

    def __init__(self, dataset: Any, reading: ImageReading) -> None:
        self.dataset, self.reading = dataset, reading
        encode = getattr(dataset, "target_transform", None)
        self.encode = encode if isinstance(encode, MultiLabelTarget) else None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        target = None
        try:
            # timm's own __getitem__ would warn and return the next file in place of one that does not decode.
            if isinstance(self.dataset, ImageDataset):
                stream, target = self.dataset.reader[index]
                with contextlib.closing(stream) if hasattr(stream, "close") else contextlib.nullcontext():
                    image = self._convert(Image.open(stream))
                    return image, int(target) if self.encode is None else self.encode(target).numpy()
            image, target = self.dataset[index]
            return self._convert(image), int(target)
        except UNDECODABLE as error:
            name = file_name(self.dataset, index)
            bad = BadImage(f"data: cannot decode image {name}: {error}; replace or delete the file, or give --on-bad-image skip")
            # Several classes are no class whose next image could take the place.
            bad.name, bad.target = name, int(target) if target is not None and self.encode is None else None
            raise bad from error

    def target(self, index: int) -> int:
        """Returns the class of a sample, without decoding the image if the dataset knows its class."""
        reader = getattr(self.dataset, "reader", None)
        if hasattr(reader, "targets"):  # a tar
            return int(reader.targets[index])
        if isinstance(self.dataset, ImageDataset) and hasattr(reader, "samples"):
            return int(reader.samples[index][1])
        return self[index][1]

    @property
    def concurrent(self) -> bool:
        """Whether several threads may read at once: true for files, not for an open tar or a database."""
        return isinstance(self.dataset, ImageDataset) and isinstance(self.dataset.reader, FolderReader)

    def _convert(self, image: Image.Image) -> Image.Image:
        # PIL itself only warns up to twice this number.
        if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {Image.MAX_IMAGE_PIXELS}")
        return to_mode(image, self.reading)


class BadImages:
    """A list of the images that did not decode: a file to which all data loading processes add each image once."""

    def __init__(self) -> None:
        self.path: Path | None = None  # until `write_to` sets it
        self.waiting: list[str] = []  # the lines added before that

    def write_to(self, path: Path) -> None:
        """Sets the file of the list; call it before the data loading processes start."""
        self.path = path
        for line in self.waiting:
            self.add(line)

    def add(self, line: str) -> None:
        """Adds a line with an image and the reason, unless it is already in the list."""
        if self.path is None:
            self.waiting.append(line)
        elif line not in self.names():
            try:
                with self.path.open("a", **TEXT) as file:  # one short write, so that lines of several processes do not mix
                    file.write(line + "\n")
            except OSError as error:
                logger.warning(f"warning: {self.path} cannot be written: {error.strerror}; missing line: {line}")

    def names(self) -> list[str]:
        """Returns the lines written so far."""
        return self.path.read_text(**TEXT).splitlines() if self.path is not None and self.path.exists() else []


class BadImageReplacer(Dataset):
    """Wraps `Decoded`: an image that does not decode is replaced by the next image of the same class that does.

    The choice depends only on the dataset. If the class of the bad image is unknown, or it may have several, the next image
    is used with its own class.

    Raises:
        BadImage: if no image of the class decodes.
    """

    def __init__(self, images: Decoded, bad: BadImages) -> None:
        self.images, self.bad = images, bad

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            return self.images[index]
        except BadImage as error:
            self.bad.add(f"{error.name}: {error.__cause__}".replace("\n", " "))
            for other in range(index + 1, index + len(self)):
                with contextlib.suppress(BadImage):
                    if error.target is None or self.images.target(other % len(self)) == error.target:
                        return self.images[other % len(self)]
            raise


class Samples(Dataset):
    """Transformed samples: (uint8 image (C, H, W), class index) by key (`timm_sfr.data.order`).

    The transform's random numbers are seeded by (seed, variant, index).

    Args:
        images: A map-style dataset of (image, class index).
        transform: Maps an image to uint8, or to a tuple of views (`AugSplits`); None if the images are already transformed.
        seed: None if the transform draws no random numbers.
        batch_transform: The batch version of `transform`, if there is one; `images` are then `Cached`.
    """

    def __init__(
        self, images: Any, transform: Callable | None, seed: int | None, batch_transform: BatchTransform | None = None
    ) -> None:
        self.images, self.transform, self.seed, self.batch_transform = images, transform, seed, batch_transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int) -> tuple[Any, int]:
        samples = self.__getitems__([key])
        return tuple(part[0] for part in samples) if isinstance(samples, tuple) else samples[0]

    def __getitems__(self, keys: list[int]) -> list[tuple[Any, int]] | Batch:
        """Returns a batch; saves the random state only once, because saving takes as long as decoding a small image."""
        if self.seed is None:
            return [self._sample(key) for key in keys]
        with random_state_kept():
            return [self._sample(key) for key in keys] if self.batch_transform is None else self._batch(keys)

    def _batch(self, keys: list[int]) -> Batch:
        arrays, targets = zip(*(self.images.array(key % len(self)) for key in keys), strict=True)
        draws = []
        for key, array in zip(keys, arrays, strict=True):
            seed_cpu(self.seed, *divmod(key, len(self)))
            draws.append(self.batch_transform.draw(*array.shape[:2]))
        return self.batch_transform(arrays, draws), list(targets)

    def _sample(self, key: int) -> tuple[Any, int]:
        variant, index = divmod(key, len(self))
        image, target = self.images[index]
        if self.seed is not None:
            seed_cpu(self.seed, variant, index)
        return image if self.transform is None else self.transform(image), target


def make_samples(split: Split, transform: Callable, config: DataConfig, img_mode: str, seed: int | None) -> Samples:
    """Returns the samples of a map-style split; ``cache_dataset`` decodes once and, if `seed` is None, also transforms once.

    Raises:
        UserError: if the cached images do not fit into memory, or one of them does not decode.
    """
    images: Dataset = Decoded(split.dataset, image_reading(config, img_mode))
    if config.on_bad_image == "skip":
        images = BadImageReplacer(images, BadImages())
    if not config.cache_dataset:
        return Samples(images, transform, seed)
    if seed is None:
        return Samples(Cached(Samples(images, transform, None)), None, None)
    cached = Cached(images)
    return Samples(cached, transform, seed, _batch_transform(transform, cached))


def resized(samples: Samples, transform: Callable) -> Samples:
    """Returns `samples` with another transform on the same images, which must not be transformed yet."""
    images = samples.images
    batched = _batch_transform(transform, images) if isinstance(images, Cached) else None
    return Samples(images, transform, samples.seed, batched)


def bad_images(samples: Any) -> BadImages | None:
    """Returns the list of bad images of `samples` or the dataset that they wrap; None if bad images are not replaced."""
    while samples is not None and not isinstance(samples, BadImageReplacer):
        samples = getattr(samples, "images", None)
    return None if samples is None else samples.bad


def file_name(dataset: Any, index: int) -> str:
    """Returns the file name of a sample, or ``number INDEX`` if the dataset has no file names."""
    try:
        name = dataset.filename(index, absolute=True)
    except Exception:  # any dataset, any error: a missing file name must not stop a run
        name = None
    return f"number {index}" if name is None else str(name)


def _batch_transform(transform: Callable, cached: Cached) -> BatchTransform | None:
    """Returns the batch version of `transform` if it exists and gives bit-identical results on a sample of the images."""
    batch_transform = BatchTransform.of(transform)
    if batch_transform is None or cached.mode != "RGB":
        return None
    sample = [cached.array(index)[0] for index in range(0, len(cached), max(1, len(cached) // 32))]
    if any(image.ndim != 3 or image.shape[2] != 3 for image in sample):
        return None
    with random_state_kept():
        if batch_transform.matches(transform, sample, seed_cpu):
            return batch_transform
    logger.debug("timm's transforms differ from our batched ones here; images are transformed one by one")
    return None
