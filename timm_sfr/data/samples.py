"""One sample: read, decoded, mended where it cannot be, transformed with random numbers of its own.

Shape suffixes: B batch, C channels, H x W pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import ImageDataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import Dataset

from timm_sfr.config import DataConfig
from timm_sfr.data.batch_transform import Batch, BatchTransform
from timm_sfr.data.cache import Cached
from timm_sfr.data.datasets import Split
from timm_sfr.utils.console import logger
from timm_sfr.utils.errors import UserError
from timm_sfr.utils.seeding import random_state_kept, seed_cpu


class BadImage(UserError):
    """An image that does not decode.

    Attributes:
        name: Its file, or its number.
        target: Its class, None where that is not known.
    """

    name: str = ""
    target: int | None = None


class Decoded(Dataset):
    """Samples of a map-style dataset: (PIL image, class index) by index.

    Raises:
        BadImage: on reading an image that does not decode.
    """

    def __init__(self, dataset: Any, img_mode: str) -> None:
        self.dataset, self.img_mode = dataset, img_mode

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        target = None
        try:
            # timm's own __getitem__ would replace a file that does not decode by its neighbour, with a warning.
            if isinstance(self.dataset, ImageDataset):
                stream, target = self.dataset.reader[index]
                with contextlib.closing(stream) if hasattr(stream, "close") else contextlib.nullcontext():
                    return self._convert(Image.open(stream)), int(target)
            image, target = self.dataset[index]
            return self._convert(image), int(target)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            name = file_name(self.dataset, index)
            bad = BadImage(
                f"data: cannot decode image {name}: {error}; replace or delete the file, or give --on-bad-image skip"
            )
            bad.name, bad.target = name, None if target is None else int(target)
            raise bad from error

    def target(self, index: int) -> int:
        """The class of a sample, without decoding it where the dataset can tell."""
        reader = getattr(self.dataset, "reader", None)
        if hasattr(reader, "targets"):  # of a tar
            return int(reader.targets[index])
        if isinstance(self.dataset, ImageDataset) and hasattr(reader, "samples"):
            return int(reader.samples[index][1])
        return self[index][1]

    @property
    def concurrent(self) -> bool:
        """Whether several threads may read at once: files may be, an open tar or a database may not."""
        return isinstance(self.dataset, ImageDataset) and type(self.dataset.reader) is ReaderImageFolder

    def _convert(self, image: Image.Image) -> Image.Image:
        # PIL itself refuses only twice as many, and warns in between.
        if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {Image.MAX_IMAGE_PIXELS}")
        return image.convert(self.img_mode)


class BadImages:
    """The list of images that did not decode: a file that all loading processes add to, each image once.

    Attributes:
        path: The file; until it is known, names wait.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self.waiting: list[str] = []

    def write_to(self, path: Path) -> None:
        """Says where the list is; before the loading processes start."""
        self.path = path
        waiting, self.waiting = self.waiting, []
        for line in waiting:
            self.add(line)

    def add(self, line: str) -> None:
        """Adds an image and why."""
        if self.path is None:
            self.waiting.append(line)
        elif line not in self.names():
            try:
                with self.path.open("a") as file:  # one short write: lines of several processes do not mix
                    file.write(line + "\n")
            except OSError as error:
                logger.warning(f"warning: {self.path} cannot be written: {error.strerror}; it does not list {line}")

    def names(self) -> list[str]:
        """The lines so far."""
        return self.path.read_text().splitlines() if self.path is not None and self.path.exists() else []


class Mended(Dataset):
    """`Decoded`, with another image of the same class in the place of one that does not decode: the next that does.

    Which one depends on the dataset alone. Where the class of the bad image is not known, the next image is taken with
    its own class.

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
    """Transformed samples: (uint8 image (C, H, W), class index) by key.

    A key is ``epoch * len + index`` (`EpochSampler`); the transform's random numbers come from (seed, epoch, index).

    Args:
        images: Gives (image, class index) by index.
        transform: From an image to uint8; None if the images are that already.
        seed: None for a transform that draws no random numbers.
        batched: Does the same as `transform` on a batch of the cached images that `images` are.
    """

    def __init__(
        self, images: Any, transform: Callable | None, seed: int | None, batched: BatchTransform | None = None
    ) -> None:
        self.images, self.transform, self.seed, self.batched = images, transform, seed, batched

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int) -> tuple[Any, int]:
        samples = self.__getitems__([key])
        return (samples.images_BCHW[0], samples.targets[0]) if isinstance(samples, Batch) else samples[0]

    def __getitems__(self, keys: list[int]) -> list[tuple[Any, int]] | Batch:
        """A whole batch, as the DataLoader asks for it: the state of the random numbers is put aside once, not once an
        image, which takes as long as decoding a small one."""
        if self.seed is None:
            return [self._sample(key) for key in keys]
        with random_state_kept():
            return [self._sample(key) for key in keys] if self.batched is None else self._batch(keys)

    def _batch(self, keys: list[int]) -> Batch:
        arrays, targets, draws = [], [], []
        for key in keys:
            epoch, index = divmod(key, len(self))
            array, target = self.images.array(index)
            seed_cpu(self.seed, epoch, index)
            arrays.append(array), targets.append(target), draws.append(self.batched.draw(*array.shape[:2]))
        return Batch(self.batched(arrays, draws), targets)

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
    if config.on_bad_image == "skip":
        images = Mended(images, BadImages())
    if not config.cache_dataset:
        return Samples(images, transform, seed)
    if seed is None:
        return Samples(Cached(Samples(images, transform, None)), None, None)
    cached = Cached(images)
    return Samples(cached, transform, seed, _batched(transform, cached))


def _batched(transform: Callable, cached: Cached) -> BatchTransform | None:
    """`transform` on batches, where it can be and a sample of the images shows the same bits with this Pillow."""
    batched = BatchTransform.of(transform)
    if batched is None or not cached.pictures:
        return None
    sample = [cached.array(index)[0] for index in range(0, len(cached), max(1, len(cached) // 32))]
    if any(image.ndim != 3 or image.shape[2] != 3 for image in sample):
        return None
    with random_state_kept():
        if batched.agrees(transform, sample, seed_cpu):
            return batched
    logger.debug("timm's transforms differ from the batched ones in this environment; images are transformed one by one")
    return None


def bad_images(samples: Any) -> BadImages | None:
    """The list that `samples` (or what they are read from) adds to; None where nothing is mended."""
    while samples is not None and not isinstance(samples, Mended):
        samples = getattr(samples, "images", None)
    return None if samples is None else samples.bad


def file_name(dataset: Any, index: int) -> str:
    """The file of a sample, or its number where the dataset cannot say."""
    try:
        name = dataset.filename(index, absolute=True)
    except Exception:  # datasets of any make: to name a file is not worth a run
        name = None
    return f"number {index}" if name is None else str(name)
