"""Turns any image that Pillow opens into a model's input: orientation, depth, transparency, colour; size and normalisation.

Training, validation, prediction and the report all call `to_mode`, so that they see the same pixels. `model_input` also resizes
and normalises, for exported models. `timm-sfr export` puts a copy of this file beside the model, so it imports only NumPy and
Pillow.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageMode
from PIL.TiffImagePlugin import BITSPERSAMPLE

# Formats that Pillow recognises but cannot decode by itself: they need another program or an installed handler.
NO_PIXELS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# Modes that hold more than 8 bits a channel; Pillow's own `convert` clips them to 0 ... 255, so that most become white.
DEEP = ("I", "F")
# What Pillow's decoders raise on damaged files.
UNDECODABLE = (OSError, SyntaxError, ValueError, RuntimeError, AssertionError, AttributeError, LookupError, TypeError, EOFError,
               struct.error, Image.DecompressionBombError)  # fmt: skip
KNOWN = ("PNG", "PPM")  # formats whose deep images have 16 bits, also where Pillow opens them as I
# What makes an image upright, by its orientation in EXIF.
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # fmt: skip


def image_endings() -> tuple[str, ...]:
    """Returns the endings of the files that Pillow decodes, in lower case and sorted, such as ``.jpg``."""
    Image.init()
    known = Image.registered_extensions().items()
    return tuple(sorted(ending for ending, name in known if name in Image.OPEN and name not in NO_PIXELS))


@dataclass(frozen=True)
class ImageReading:
    """How images are read."""

    mode: str = "RGB"  # the Pillow mode that the model takes
    exif: bool = True  # whether the orientation in the EXIF data is applied
    background: tuple[int, ...] = (255, 255, 255)  # the RGB colour that transparent images are laid on
    value_range: tuple[float, ...] | None = None  # what becomes black and white beyond 8 bits; None: see `scaled`


def to_mode(image: Image.Image, reading: ImageReading) -> Image.Image:
    """Returns an image in the mode `reading.mode`.

    The image is turned upright by its EXIF orientation, scaled to 8 bits if it has more, and laid on the background if it is
    transparent and the mode is not. Of an animation, only the first frame is used.

    Raises:
        ValueError: if Pillow cannot convert the image's mode.
        OSError: if the image does not decode.
    """
    image.load()  # Pillow decodes late, and some decoders set the mode or the transparency only then
    turn = TURNS.get(orientation(image)) if reading.exif else None
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith(DEEP):
        deep, image = image, scaled(image, reading.value_range)
        if isinstance(deep.info.get("transparency"), int):  # a PNG's value that is transparent
            opaque = 255 * (np.asarray(deep) != deep.info["transparency"]).astype(np.uint8)
            image = Image.merge("LA", (image, Image.fromarray(opaque)))
    if image.has_transparency_data and not has_alpha(reading.mode):
        image = laid_on(image, reading.background)
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow's direct conversion to other modes warns
    elif image.mode == "LAB":
        image = image.convert("RGB")  # Pillow's only conversion of this mode
    return image.convert(reading.mode)


def orientation(image: Image.Image) -> int:
    """Returns how an image was taken, 1 to 8, from its EXIF data; 1, upright, without any or with damaged data."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # struct.error, SyntaxError, ...: the image itself is intact
        return 1


def has_alpha(mode: str) -> bool:
    """Returns whether a Pillow mode has a channel of transparency."""
    return any(band in ("A", "a") for band in ImageMode.getmode(mode).bands[1:])


def laid_on(image: Image.Image, background: tuple[int, ...]) -> Image.Image:
    """Returns a transparent image laid on a colour, as RGB: alpha * image + (1 - alpha) * background."""
    over = image.convert("RGBA")
    under = Image.new("RGBA", over.size, (*background, 255))
    return Image.alpha_composite(under, over).convert("RGB")


def scaled(image: Image.Image, value_range: tuple[float, ...] | None = None) -> Image.Image:
    """Returns an image of a mode that begins with I or F (more than 8 bits), scaled to 8 bits (mode L).

    255 * (value - low) / (high - low), rounded and clipped. Without a `value_range` (low, high) it is 0 to 2**bits - 1 for
    integers whose file says how many bits they have (at most 16), 0 to 1 for floats in that range, and otherwise the image's
    own smallest and largest value.
    """
    values = np.asarray(image).astype(np.float64)
    low, high = value_range or _own_range(image, values)
    with np.errstate(invalid="ignore"):  # NaN becomes black
        shares = np.nan_to_num((values - low) / max(high - low, np.finfo(np.float64).tiny))
    return Image.fromarray((255 * shares.clip(0, 1)).round().astype(np.uint8))


def _own_range(image: Image.Image, values: np.ndarray) -> tuple[float, float]:
    """Returns the values that stand for black and white if the options give no range."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if image.mode.startswith("F"):
        return (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)
    bits = _bits(image)
    return (0.0, 2.0**bits - 1) if bits is not None and low >= 0 and high < 2**bits else (low, high)


def _bits(image: Image.Image) -> int | None:
    """Returns the bits of an integer image's values, at most 16; None if they are not known, or more."""
    found = getattr(image, "tag_v2", {}).get(BITSPERSAMPLE)
    if found:
        bits = int(found[0] if isinstance(found, tuple) else found)
        return bits if bits <= 16 else None
    return 16 if image.mode.startswith("I;16") or image.format in KNOWN else None


def model_input(image: Image.Image, about: dict[str, Any]) -> np.ndarray:
    """Returns an image as a batch of one for an exported model: float32 (1, C, H, W), equal to validation's.

    to_mode -> resize -> crop the centre -> (pixels / 255 - mean) / std

    Args:
        image: An image as Pillow opens it.
        about: What the exported file has under the name ``timm_sfr.json``.
    """
    reading = ImageReading(about["image_mode"], about["exif"], tuple(about["image_background"]), about["image_range"])
    channels, height, width = about["input_size"]
    resample = Image.Resampling[about["interpolation"].upper()]
    image = to_mode(image, reading)
    image = _resized(image, (height, width), about["crop_pct"], about["crop_mode"], resample)
    pixels = np.asarray(_centre(image, height, width), np.float32).reshape(height, width, channels)
    pixels = (pixels / 255 - np.float32(about["mean"])) / np.float32(about["std"])
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], np.float32)


def _resized(
    image: Image.Image, size: tuple[int, int], crop_pct: float, crop_mode: str, resample: Image.Resampling
) -> Image.Image:
    """Resizes as timm's validation does: the image becomes just large enough to cover size / crop_pct.

    Raises:
        ValueError: for timm's crop mode ``border``, which no model uses by default.
    """
    height, width = (math.floor(side / crop_pct) for side in size)
    if crop_mode == "squash":
        return image.resize((width, height), resample)
    if crop_mode != "center":
        raise ValueError(f"expected crop mode center or squash; got {crop_mode!r}")
    if height == width:  # torchvision's: the shorter side, and the longer one rounded down
        short, long = sorted(image.size)
        longer = int(height * long / short)
        return image.resize((height, longer) if image.width <= image.height else (longer, height), resample)
    ratio = min(image.height / height, image.width / width)
    return image.resize((round(image.width / ratio), round(image.height / ratio)), resample)


def _centre(image: Image.Image, height: int, width: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
