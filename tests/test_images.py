"""Images of all kinds become the model's mode: depth, transparency, orientation, endings."""

import io
import warnings

import numpy as np
import pytest
from PIL import ExifTags, Image

from timm_sfr import UserError
from timm_sfr.config import DataConfig
from timm_sfr.data.images import ImageReading, image_endings, image_reading, to_mode

RAMP = np.linspace(0, 1, 64).reshape(8, 8)


def saved(image, kind, **options):
    """An image as it comes from a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return Image.open(file)


@pytest.mark.parametrize("dtype,scale,kind", [(np.uint16, 65535, "PNG"), (np.uint16, 65535, "TIFF"), (np.float32, 1, "TIFF"),
                                              (np.float32, 1234.5, "TIFF"), (np.int32, 10**6, "TIFF"),
                                              (np.uint8, 255, "PNG")])  # fmt: skip
def test_more_than_eight_bits_are_scaled(dtype, scale, kind):
    """Pillow's own conversion clips: all but the darkest become white."""
    image = saved(Image.fromarray((RAMP * scale).round(0 if scale > 1 else 7).astype(dtype)), kind)
    got = np.asarray(to_mode(image, ImageReading("L")))
    assert np.abs(got - 255 * RAMP).max() <= 1
    assert np.array_equal(np.asarray(to_mode(image, ImageReading("RGB"))), np.repeat(got[..., None], 3, 2))


def test_a_dark_image_of_sixteen_bits_stays_dark_and_twelve_bits_use_their_own_range():
    values = np.full((8, 8), 4095, np.uint16)
    assert np.asarray(to_mode(saved(Image.fromarray(values), "PNG"), ImageReading("L"))).max() == 16
    twelve = saved(Image.fromarray(values), "TIFF")
    twelve.tag_v2[258] = (12,)
    assert np.asarray(to_mode(twelve, ImageReading("L"))).min() == 255
    stated = image_reading(DataConfig(image_range=(0, 8190)), "L")
    assert np.asarray(to_mode(saved(Image.fromarray(values), "PNG"), stated)).max() == 128


def test_values_that_are_not_finite_are_black():
    image = Image.fromarray(np.array([[np.nan, 0.0, 0.5, 1.0]], np.float32))
    assert np.asarray(to_mode(image, ImageReading("L"))).tolist() == [[0, 0, 128, 255]]
    assert np.asarray(to_mode(Image.fromarray(np.full((2, 2), 7.0, np.float32)), ImageReading("L"))).max() == 0


@pytest.mark.parametrize("kind", ["RGBA", "LA", "PA", "P", "RGB"])
def test_transparency_lies_on_the_background(kind):
    """Half of the image is transparent, over black pixels that nobody sees."""
    alpha = Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 4, 0))
    image = Image.new("RGB", (2, 4), (0, 0, 0))
    image.paste((204, 204, 204), (1, 0, 2, 4))
    if kind == "P":
        image = saved(image.quantize(), "PNG", transparency=image.quantize().getpixel((0, 0)))
        assert image.mode == "P"
    elif kind == "RGB":
        image = saved(image, "PNG", transparency=(0, 0, 0))
    else:
        image = image.convert("RGB" if kind == "RGBA" else "L" if kind == "LA" else "P")
        image.putalpha(alpha)
        assert image.mode == kind
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = np.asarray(to_mode(image, ImageReading("RGB")))
        assert (pixels[:, 0] == 255).all() and (pixels[:, 1] == 204).all()
        green = to_mode(image, image_reading(DataConfig(image_background=(0, 128, 0)), "RGB"))
        assert green.getpixel((0, 0)) == (0, 128, 0)
        assert to_mode(image, ImageReading("RGBA")).getpixel((0, 0))[3] == 0


def test_one_bit_cmyk_and_opaque_images_are_as_in_pillow():
    bits = saved(Image.fromarray(np.eye(8) > 0), "PNG")
    assert bits.mode == "1" and np.asarray(to_mode(bits, ImageReading("L"))).mean() == 255 / 8
    ink = Image.new("RGB", (8, 8), (200, 30, 60)).convert("CMYK")
    for kind in ("JPEG", "TIFF"):  # a JPEG of CMYK is stored inverted
        assert np.abs(np.subtract(to_mode(saved(ink, kind), ImageReading()).getpixel((4, 4)), (200, 30, 60))).max() <= 3
    grey = saved(Image.fromarray((255 * RAMP).astype(np.uint8)), "JPEG")
    assert to_mode(grey, ImageReading("RGB")).tobytes() == grey.convert("RGB").tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_unless_it_is_turned_off(orientation):
    upright = Image.fromarray(np.arange(8, dtype=np.uint8).reshape(2, 4) * 30)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = saved(upright, "PNG", exif=exif)
    turned = to_mode(image, ImageReading("L"))
    assert turned.size == (upright.size if orientation < 5 else upright.size[::-1])
    assert (turned.tobytes() == upright.tobytes()) == (orientation == 1)
    assert to_mode(image, image_reading(DataConfig(exif=False), "L")).tobytes() == upright.tobytes()


def test_endings_and_options():
    assert {".jpg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"} <= set(image_endings())
    assert not {".pdf", ".mpg", ".eps", ".txt"} & set(image_endings())
    for options in ({"image_background": (0, 0)}, {"image_background": (0, 0, 256)}, {"image_range": (5, 5)}):
        with pytest.raises(UserError, match="expected t"):
            DataConfig(**options)
