"""Runs timm's training transform on a whole batch of small images: same random numbers, bit-identical output, less time.

For a 32-pixel image, timm spends most of the time on converting to and from PIL at every step. Here Pillow only resizes;
everything else is array arithmetic on the batch.

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
from torchvision.transforms import ColorJitter, Compose, InterpolationMode, RandomHorizontalFlip, RandomVerticalFlip

_FILTERS = {InterpolationMode.BILINEAR: Image.Resampling.BILINEAR, InterpolationMode.BICUBIC: Image.Resampling.BICUBIC}
_LARGEST = 128 * 128  # pixels of a transformed image; for larger images Pillow's own operations are about as fast
_STEPS = (RandomResizedCropAndInterpolation, RandomHorizontalFlip, RandomVerticalFlip, ColorJitter, MaybePILToTensor)


@dataclass(frozen=True)
class Draw:
    """The random parameters that timm's transform draws for one image."""

    crop: tuple[int, int, int, int]  # top, left, height, width
    resample: int  # Pillow's filter
    hflip: bool
    vflip: bool
    colours: tuple[tuple[int, int, float], ...]  # (position in the order, index into `_CHANGES`, factor) of each change


class BatchTransform:
    """A random resized crop, flips and colour jitter without hue, in timm's order; `of` makes it from a timm transform."""

    def __init__(self, steps: dict[type, Any]) -> None:
        self.crop = steps[RandomResizedCropAndInterpolation]
        self.jitter: ColorJitter | None = steps.get(ColorJitter)
        self.flips = [getattr(steps.get(kind), "p", None) for kind in (RandomHorizontalFlip, RandomVerticalFlip)]

    @classmethod
    def of(cls, transform: Callable) -> BatchTransform | None:
        """Returns the batch version of `transform`; None if its steps, their order, or its image size are not supported."""
        if type(transform) is not Compose:
            return None
        steps = {type(step): step for step in transform.transforms}
        order = [_STEPS.index(kind) if kind in _STEPS else -1 for kind in map(type, transform.transforms)]
        if order != sorted(set(order)) or not {0, len(_STEPS) - 1} <= set(order) or -1 in order:
            return None
        made, hue = cls(steps), getattr(steps.get(ColorJitter), "hue", None)
        filters = made.crop.interpolation
        filters = {filters} if isinstance(filters, InterpolationMode) else set(filters)
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
        blank = torch.empty(0, height, width)  # get_params reads only its size
        crop = self.crop.get_params(blank, self.crop.scale, self.crop.ratio)
        mode = self.crop.interpolation
        mode = mode if isinstance(mode, InterpolationMode) else random.choice(mode)
        hflip, vflip = (p is not None and bool(torch.rand(1) < p) for p in self.flips)
        return Draw(crop, _FILTERS[mode], hflip, vflip, self._draw_colours())

    def __call__(self, images: Sequence[np.ndarray], draws: Sequence[Draw]) -> np.ndarray:
        """Transforms uint8 images (H, W, C) of any sizes by their `draws`; returns a batch (B, C, H, W), uint8."""
        height, width = self.crop.size
        batch_BCHW = np.empty((len(images), 3, height, width), np.uint8)
        for out, image, draw in zip(batch_BCHW, images, draws, strict=True):
            top, left, h, w = draw.crop
            part = Image.fromarray(image[top : top + h, left : left + w])
            pixels = part.resize((width, height), draw.resample).tobytes()
            resized = np.frombuffer(pixels, np.uint8).reshape(height, width, 3)
            out[:] = resized[:: -1 if draw.vflip else 1, :: -1 if draw.hflip else 1].transpose(2, 0, 1)
        for place in range(4):
            for operation, change in enumerate(_CHANGES):
                factors = {row: factor for row, draw in enumerate(draws) for at, kind, factor in draw.colours
                           if (at, kind) == (place, operation)}  # fmt: skip
                if factors:
                    rows, factors_B111 = list(factors), np.array([*factors.values()], np.float32).reshape(-1, 1, 1, 1)
                    batch_BCHW[rows] = change(batch_BCHW[rows], factors_B111)
        return batch_BCHW

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
