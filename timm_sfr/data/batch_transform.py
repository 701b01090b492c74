"""The fast path of ``--cache-dataset``: the training transform on a whole batch of small images.

It draws the same random numbers as the transform and gives the same bits in less time. For a 32-pixel image, timm spends most of
the time on converting to and from PIL at every step. Here Pillow only resizes; everything else is array arithmetic on the batch.

Shape suffixes: B batch, C = 3 channels, H x W pixels.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.loader import fast_collate
from timm.data.transforms import MaybePILToTensor, RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import (
    ColorJitter,
    Compose,
    InterpolationMode,
    RandomCrop,
    RandomHorizontalFlip,
    RandomVerticalFlip,
    Resize,
)

_FILTERS = {InterpolationMode.BILINEAR: Image.Resampling.BILINEAR, InterpolationMode.BICUBIC: Image.Resampling.BICUBIC}
_LARGEST = 128 * 128  # pixels of a transformed image; for larger images Pillow's own operations are about as fast
# A resized crop, or a crop of the padded image; the steps after it are the same.
_CROPS = ((RandomResizedCropAndInterpolation,), (Resize, RandomCrop))
_STEPS = (RandomHorizontalFlip, RandomVerticalFlip, ColorJitter, MaybePILToTensor)


@dataclass(frozen=True)
class Draw:
    """The random parameters that timm's transform draws for one image."""

    crop: tuple[int, int, int, int]  # top, left, height, width, in the image or the padded one
    resample: int  # Pillow's filter
    hflip: bool
    vflip: bool
    colours: tuple[tuple[int, int, float], ...]  # (position in the order, index into `_CHANGES`, factor) of each change


class BatchTransform:
    """A random crop, flips and colour jitter without hue, in timm's order; `of` makes it from a transform.

    The crop is timm's random resized one, or torchvision's random one of the resized and padded image.
    """

    def __init__(self, steps: dict[type, Any]) -> None:
        self.padded = RandomCrop in steps
        self.crop = steps[RandomCrop if self.padded else RandomResizedCropAndInterpolation]
        self.filters = steps[Resize].interpolation if self.padded else self.crop.interpolation
        self.jitter: ColorJitter | None = steps.get(ColorJitter)
        self.flips = [getattr(steps.get(kind), "p", None) for kind in (RandomHorizontalFlip, RandomVerticalFlip)]

    @classmethod
    def of(cls, transform: Callable) -> BatchTransform | None:
        """Returns the batch version of `transform`; None if its steps, their order, or its image size are not supported."""
        if type(transform) is not Compose:
            return None
        steps = {type(step): step for step in transform.transforms}
        kinds = tuple(map(type, transform.transforms))
        crop = next((crop for crop in _CROPS if kinds[: len(crop)] == crop), None)
        rest = kinds[len(crop or ()) :]
        if crop is None or rest != tuple(kind for kind in _STEPS if kind in rest) or MaybePILToTensor not in rest:
            return None
        made, hue = cls(steps), getattr(steps.get(ColorJitter), "hue", None)
        filters = {made.filters} if isinstance(made.filters, InterpolationMode) else set(made.filters)
        known = hue is None and filters <= set(_FILTERS)
        return made if known and math.prod(made.crop.size) <= _LARGEST else None

    def matches(self, transform: Callable, images: Sequence[np.ndarray], seed: Callable[[int], None]) -> bool:
        """Returns whether the output is bit-identical to that of `transform` on `images` (H, W, C).

        `seed` is called with the image's number before each of both transforms.
        """
        draws, expected = [], []
        for number, image in enumerate(images):
            seed(number)
            draws.append(self.draw(*image.shape[:2]))
            seed(number)
            expected.append(transform(Image.fromarray(image)).numpy())
        return np.array_equal(self(images, draws), np.stack(expected))

    def draw(self, height: int, width: int) -> Draw:
        """Draws the parameters for an image of this size, with the functions that timm's transform calls, in its order."""
        if self.padded:
            height, width = (side + 2 * self.crop.padding for side in self.crop.size)
        blank = torch.empty(0, height, width)  # get_params reads only its size
        crop = self.crop.get_params(blank, *((self.crop.size,) if self.padded else (self.crop.scale, self.crop.ratio)))
        mode = self.filters if isinstance(self.filters, InterpolationMode) else random.choice(self.filters)
        hflip, vflip = (p is not None and bool(torch.rand(1) < p) for p in self.flips)
        return Draw(crop, _FILTERS[mode], hflip, vflip, self._draw_colours())

    def __call__(self, images: Sequence[np.ndarray], draws: Sequence[Draw]) -> np.ndarray:
        """Transforms uint8 images (H, W, C) of any sizes by their `draws`; returns a batch (B, C, H, W), uint8."""
        batch_BCHW = np.empty((len(images), 3, *self.crop.size), np.uint8)
        for out, image, draw in zip(batch_BCHW, images, draws, strict=True):
            cropped = self._cropped(image, draw)
            out[:] = cropped[:: -1 if draw.vflip else 1, :: -1 if draw.hflip else 1].transpose(2, 0, 1)
        for place in range(4):
            for operation, change in enumerate(_CHANGES):
                factors = {row: factor for row, draw in enumerate(draws) for at, kind, factor in draw.colours
                           if (at, kind) == (place, operation)}  # fmt: skip
                if factors:
                    rows, factors_B111 = list(factors), np.array([*factors.values()], np.float32).reshape(-1, 1, 1, 1)
                    batch_BCHW[rows] = change(batch_BCHW[rows], factors_B111)
        return batch_BCHW

    def _cropped(self, image: np.ndarray, draw: Draw) -> np.ndarray:
        """Returns the crop of an image (H, W, C), at the training size."""
        top, left, h, w = draw.crop
        if self.padded:
            resized, around = _resized(image, self.crop.size, draw.resample), self.crop.padding
            image = np.zeros((*(side + 2 * around for side in self.crop.size), 3), np.uint8)
            image[around:-around, around:-around] = resized
        return _resized(image[top : top + h, left : left + w], self.crop.size, draw.resample)

    def _draw_colours(self) -> tuple[tuple[int, int, float], ...]:
        if self.jitter is None:
            return ()
        jitter = self.jitter
        order, *factors, _ = jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        return tuple(
            (place, kind, factors[kind])
            for place, kind in enumerate(order.tolist())
            if kind < len(factors) and factors[kind] is not None
        )


# Transformed samples as one batch: uint8 images (B, C, H, W) and their classes, indices or arrays (K,).
Batch = tuple[np.ndarray, list[Any]]


def collate(samples: list[tuple[Any, int]] | Batch) -> tuple[Tensor, Tensor]:
    """Returns the samples as one batch: images (B, C, H, W), uint8, and class indices (B,), or several classes (B, K)."""
    if isinstance(samples, tuple):
        images_BCHW, targets = samples
        return torch.from_numpy(images_BCHW), torch.from_numpy(np.array(targets))
    return fast_collate(samples)


def _resized(image: np.ndarray, size: tuple[int, int], resample: int) -> np.ndarray:
    """Returns an image (H, W, C) as Pillow resizes it to `size`, (height, width)."""
    if image.shape[:2] == tuple(size):
        return image
    pixels = Image.fromarray(image).resize((size[1], size[0]), resample).tobytes()
    return np.frombuffer(pixels, np.uint8).reshape(*size, 3)


def _blend(base: np.ndarray, images_BCHW: np.ndarray, factors_B111: np.ndarray) -> np.ndarray:
    """Pillow's ``blend``: base + factor * (image - base) in float32, clipped to 0..255, with the fraction truncated."""
    base = base.astype(np.float32)
    blended = images_BCHW.astype(np.float32)
    blended -= base
    blended *= factors_B111
    blended += base
    return np.clip(blended, 0, 255, out=blended).astype(np.uint8)


def _grey(images_BCHW: np.ndarray) -> np.ndarray:
    """Pillow's conversion to grey, rounded, (B, 1, H, W); the weights are in units of 2^-16."""
    red, green, blue = (images_BCHW[:, channel : channel + 1].astype(np.int32) for channel in range(3))
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _brightness(images_BCHW: np.ndarray, factors: np.ndarray) -> np.ndarray:
    return _blend(np.zeros((1, 1, 1, 1)), images_BCHW, factors)


def _contrast(images_BCHW: np.ndarray, factors: np.ndarray) -> np.ndarray:
    mean = _grey(images_BCHW).mean((1, 2, 3), keepdims=True)
    return _blend(np.floor(mean + 0.5), images_BCHW, factors)


def _saturation(images_BCHW: np.ndarray, factors: np.ndarray) -> np.ndarray:
    return _blend(_grey(images_BCHW), images_BCHW, factors)


_CHANGES = (_brightness, _contrast, _saturation)
