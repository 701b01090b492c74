"""Images of all kinds become the model's input: depth, transparency, orientation, endings, size."""

import importlib
import io
import json
import struct
import sys
import warnings

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import change, finished_run
from PIL import ExifTags, Image

from timm_sfr import UserError
from timm_sfr.config import DataConfig
from timm_sfr.data.images import ImageReading, image_endings, model_input, to_mode
from timm_sfr.data.samples import image_reading
from timm_sfr.data.transforms import Preprocessing

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


def test_a_transparent_value_of_sixteen_bits():
    image = saved(Image.fromarray(np.array([[0, 40000]], np.uint16)), "PNG", transparency=40000)
    assert np.asarray(to_mode(image, ImageReading("RGB"))).tolist() == [[[0] * 3, [255] * 3]]


def test_one_bit_cmyk_and_opaque_images_are_as_in_pillow():
    bits = saved(Image.fromarray(np.eye(8) > 0), "PNG")
    assert bits.mode == "1" and np.asarray(to_mode(bits, ImageReading("L"))).mean() == 255 / 8
    ink = Image.new("RGB", (8, 8), (200, 30, 60)).convert("CMYK")
    for kind in ("JPEG", "TIFF"):  # a JPEG of CMYK is stored inverted
        assert np.abs(np.subtract(to_mode(saved(ink, kind), ImageReading()).getpixel((4, 4)), (200, 30, 60))).max() <= 3
    grey = saved(Image.fromarray((255 * RAMP).astype(np.uint8)), "JPEG")
    assert to_mode(grey, ImageReading("RGB")).tobytes() == grey.convert("RGB").tobytes()
    lab = saved(Image.new("LAB", (2, 2), (140, 150, 120)), "TIFF")
    assert to_mode(lab, ImageReading("L")).tobytes() == lab.convert("RGB").convert("L").tobytes()


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


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's own
def test_damaged_exif_stops_nothing():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.ImageDescription] = "wide"
    numbers = (ExifTags.Base.ImageDescription, ExifTags.Base.ImageWidth)
    before, after = (struct.pack("<HH" if b"II*" in exif.tobytes() else ">HH", number, 2) for number in numbers)
    damaged = exif.tobytes().replace(before, after)  # a width that is a text: Pillow cannot write it again
    assert damaged != exif.tobytes()
    image = saved(Image.new("RGB", (8, 4)), "JPEG", exif=damaged)
    assert to_mode(image, ImageReading()).size == (4, 8)
    image = saved(Image.new("RGB", (8, 4)), "JPEG", exif=b"Exif\0\0" + b"MM\0*" + b"\xff" * 20)
    assert to_mode(image, ImageReading()).size == (8, 4)


def test_a_grey_map_of_sixteen_bits_has_its_whole_range():
    image = Image.open(io.BytesIO(b"P5 2 1 65535\n" + (257).to_bytes(2, "big") + (65535).to_bytes(2, "big")))
    assert image.mode == "I" and np.asarray(to_mode(image, ImageReading("L"))).tolist() == [[1, 255]]


def test_endings_and_options():
    assert {".jpg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"} <= set(image_endings())
    assert not {".pdf", ".mpg", ".eps", ".txt"} & set(image_endings())
    for options in ({"image_background": (0, 0)}, {"image_background": (0, 0, 256)}, {"image_range": (5, 5)}):
        with pytest.raises(UserError, match="expected t"):
            DataConfig(**options)


@pytest.mark.parametrize("options", [{}, {"crop_pct": 0.9, "interpolation": "bicubic"}, {"input_size": (3, 32, 48)},
                                     {"crop_mode": "squash", "crop_pct": 1.0}, {"input_size": (1, 28, 28)},
                                     {"interpolation": "nearest", "crop_pct": 0.7}])  # fmt: skip
def test_the_exports_input_is_validations(options):
    """Of images of all shapes, without torch."""
    size = options.get("input_size", (3, 32, 32))
    prep = Preprocessing(
        **{
            "input_size": size, "mean": (0.4,) * size[0], "std": (0.2,) * size[0], "interpolation": "bilinear",
            "crop_pct": 0.875, **options,
        }
    )  # fmt: skip
    about = {"input_size": list(size), "mean": prep.mean, "std": prep.std, "interpolation": prep.interpolation,
             "crop_pct": prep.crop_pct, "crop_mode": prep.crop_mode, "image_mode": prep.img_mode, "exif": True,
             "image_background": [255, 255, 255], "image_range": None}  # fmt: skip
    transform = prep.eval_transform()
    noise = np.random.default_rng(0)
    for width, height in ((32, 32), (50, 37), (37, 50), (200, 41), (33, 97), (20, 31), (64, 48)):
        image = Image.fromarray(noise.integers(0, 256, (height, width, 3), np.uint8))
        expected = prep.normalize(torch.as_tensor(np.asarray(transform(to_mode(image, ImageReading(prep.img_mode)))))[None])
        found = model_input(image, about)
        assert found.shape == tuple(expected.shape) and found.dtype == np.float32
        assert np.allclose(found, expected.numpy(), atol=1e-5), (width, height)
    with pytest.raises(ValueError, match="expected crop mode"):
        model_input(image, {**about, "crop_mode": "border"})


def test_an_export_scores_what_validate_says(tmp_path, command, monkeypatch):
    """On images that are not square, which most examples squeeze."""
    noise = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 40)):
        for label in range(2):
            for index in range(count):
                pixels = noise.integers(0, 200, (24 + 8 * (index % 3), 60, 3), np.uint8)
                pixels[:, : pixels.shape[1] // 2 if index % 2 else 14] += np.uint8(40 * label)
                path = tmp_path / "set" / split / str(label) / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    words = ("--model", "test_resnet", "--data-dir", tmp_path / "set", "--img-size", 32, "--epochs", 2, "-j", 0, "-b", 16)
    run, _ = finished_run(tmp_path, *words, "--device", "cpu")
    scores = json.loads(command("validate", run, "--json", "-j", 0, "--device", "cpu"))
    command("export", run)
    code = (run / "timm_sfr_images.py").read_text()
    assert "torch" not in sys.modules["timm_sfr.data.images"].__dict__ and "import timm" not in code
    monkeypatch.syspath_prepend(run)
    beside = importlib.import_module("timm_sfr_images")
    session = onnxruntime.InferenceSession(run / "model.onnx", providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["timm_sfr.json"])
    right = loss = 0
    for path in sorted((tmp_path / "set" / "val").rglob("*.png")):
        (logits,) = session.run(["logits"], {"images": beside.model_input(Image.open(path), about)})
        right += about["label_names"][logits[0].argmax()] == path.parent.name
        loss += torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor([int(path.parent.name)])).item()
    assert 100 * right / scores["images"] == pytest.approx(scores["top1"])
    assert loss / scores["images"] == pytest.approx(scores["loss"], rel=1e-4)
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(str(run / "model.onnx"), "CPU")
    images = beside.model_input(Image.open(path), about)
    assert np.allclose(compiled({"images": images})[0], session.run(["logits"], {"images": images})[0], atol=1e-3)


def test_predict_reads_images_as_the_run_did(finished, tmp_path, command):
    """The options on reading in its args.yaml count, unless the command names others."""
    noise = np.random.default_rng(0)
    glass = Image.fromarray(noise.integers(0, 256, (24, 24, 4), np.uint8), "RGBA")
    glass.putalpha(Image.fromarray(np.tile(np.array([0, 90, 255], np.uint8), (24, 8))))
    glass.save(tmp_path / "glass.png")

    def odds(*words):
        return json.loads(command("predict", finished, tmp_path / "glass.png", "--json", *words))

    white, black = odds(), odds("--image-background", 0, 0, 0)
    assert white != black
    change(finished / "args.yaml", image_background=[0, 0, 0])
    assert odds() == black and odds("--image-background", 255, 255, 255) == white
