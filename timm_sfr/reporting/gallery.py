"""Loads images of a run's validation split by index and encodes them for a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from timm_sfr.config import RunConfig
from timm_sfr.data.datasets import Split, open_validation
from timm_sfr.data.folders import SPLIT_FILE
from timm_sfr.data.samples import BadImage, Decoded, file_name, image_reading
from timm_sfr.data.transforms import Preprocessing
from timm_sfr.runs.predictions import PredictionTable
from timm_sfr.utils.errors import UserError

# Images of up to SMALL pixels a side keep their pixels, shown as squares; larger ones are shrunk to at most LARGE.
SMALL, LARGE = 64, 224


@dataclass(frozen=True)
class Sample:
    """One image."""

    index: int  # in the split
    target: Any  # its class; if it may have several, an array (K,) of 0 and 1
    pixels: Tensor  # the model's input before normalisation, uint8 (C, H, W)

    def label(self, names: Sequence[str]) -> str:
        """Returns its class in words, or its classes, by their names; a class without a name is a number."""
        if isinstance(self.target, int):
            return names[self.target] if self.target < len(names) else str(self.target)
        return ", ".join(names[k] for k in np.flatnonzero(self.target)) or "no class"


class Gallery:
    """The images of a run's validation split: `dataset`, if it is already open.

    `names` are the model's classes; empty if they are not known.

    Raises:
        UserError: if the split cannot be opened, or is a stream.
    """

    def __init__(self, run: Path, config: RunConfig, prep: Preprocessing, names: Sequence[str], dataset: Any = None) -> None:
        mode = config.data.input_img_mode or prep.img_mode
        split = Split(dataset, None)
        if dataset is None:
            split = open_validation(config.data, mode, config.engine.seed, names, run / SPLIT_FILE)
        if split.streamed:
            raise UserError("images of a stream cannot be read by index")
        self.images = Decoded(split.dataset, image_reading(config.data, mode))
        self.transform, self.root, self.class_names = prep.eval_transform(), config.data.data_dir, split.class_names

    def __len__(self) -> int:
        return len(self.images)

    def sample(self, index: int) -> Sample | None:
        """Returns an image by its index; None if it does not decode."""
        try:
            image, target = self.images[index]
        except BadImage:
            return None
        return Sample(index, target, torch.as_tensor(np.asarray(self.transform(image))))

    def matches(self, predictions: PredictionTable) -> bool:
        """Returns whether `predictions` are of these images; compares their number and up to 50 file names."""
        if len(self) != len(predictions.files):
            return False
        checked = np.linspace(0, len(self) - 1, min(len(self), 50)).astype(int).tolist()
        return all(file_name(self.images.dataset, i) == predictions.files[i] for i in checked)

    def spread(self, targets: np.ndarray | None, count: int) -> list[Sample]:
        """Returns up to `count` images, taken in turn from evenly spaced classes; without `targets`, at evenly spaced indices."""
        if targets is None:
            indices = np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int)
        else:
            ends = np.cumsum(np.unique(targets, return_counts=True)[1])
            by_class = np.split(np.argsort(targets, kind="stable"), ends[:-1])
            turns = zip_longest(*by_class)  # the first image of every class, then the second, ...
            first = next(turns)[:: max(1, len(by_class) // count)]
            later = (index for turn in turns for index in turn if index is not None)
            indices = list(islice(chain(first, later), count))
        found = [self.sample(int(index)) for index in indices]
        return [sample for sample in found if sample is not None]

    def short(self, file: str) -> str:
        """Returns a file's path relative to the data's folder; outside it, the file's name."""
        path = PurePath(file if file.startswith("number ") else Path(file).absolute())
        root = Path(self.root).absolute() if self.root else None
        return str(path.relative_to(root)) if root is not None and path.is_relative_to(root) else path.name or file


def data_uri(pixels: Tensor) -> str:
    """Returns an image, uint8 (C, H, W), as a ``data:`` URI: in colour if C is 3, otherwise its first channel in grey."""
    array = pixels.permute(1, 2, 0).numpy() if len(pixels) == 3 else pixels[0].numpy()
    image = Image.fromarray(np.ascontiguousarray(array))
    small = max(image.size) <= SMALL
    image.thumbnail((LARGE, LARGE))
    buffer = io.BytesIO()
    kind: dict[str, Any] = {"format": "PNG"} if small else {"format": "JPEG", "quality": 85}
    image.save(buffer, **kind)
    return f"data:image/{kind['format'].lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
