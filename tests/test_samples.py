"""Images that do not decode, and loading processes that die."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from conftest import run, train
from PIL import Image

from timm_sfr.cli.main import main
from timm_sfr.config import AugConfig, DataConfig
from timm_sfr.data.datasets import open_splits
from timm_sfr.data.images import ImageReading
from timm_sfr.data.samples import BadImage, BadImages, Decoded, bad_images, make_samples
from timm_sfr.data.transforms import Preprocessing
from timm_sfr.training.devices import explained

PREP = Preprocessing((3, 32, 32), (0.5,) * 3, (0.25,) * 3, "bilinear", 1.0)


@pytest.fixture
def damaged(folder, tmp_path):
    """The folder of images with three that do not decode: cut off, empty, no image; and where they lie."""
    place = tmp_path / "images"
    shutil.copytree(folder, place)
    train = open_splits(DataConfig(data_dir=str(place)), "RGB", 0)[0].dataset
    files = [Path(train.filename(index, absolute=True)) for index in (23, 24, 25)]  # in the order that they are read
    files[0].write_bytes(files[0].read_bytes()[:100])
    files[1].write_bytes(b"")
    files[2].write_text("no image")
    return place, files


@pytest.mark.parametrize("cached", [False, True])
def test_another_image_of_the_class_stands_in_for_one_that_does_not_decode(damaged, cached):
    place, _ = damaged
    config = DataConfig(data_dir=str(place), workers=0, on_bad_image="skip", cache_dataset=cached)
    train = open_splits(config, "RGB", 0)[0]
    samples = make_samples(train, PREP.train_transform(AugConfig()), config, "RGB", 0)
    for bad in (23, 24, 25):
        (image, target), (other, same) = samples.images[bad], samples.images[26]
        assert image.tobytes() == other.tobytes() and target == same == 1
    assert samples.images[0][1] == 0
    if not cached:
        assert len(bad_images(samples).waiting) == 3


def test_bad_images_are_listed_once_and_the_run_goes_on(damaged, tmp_path, capsys):
    place, files = damaged
    words = ("--model", "resnet20_cifar", "--data-dir", place, "--epochs", 2, "-b", 20, "-j", 2, "--output", tmp_path)
    error = train(*words, "--experiment", "stop", ok=False).stderr
    assert "cannot decode image" in error and "--on-bad-image skip" in error and any(str(file) in error for file in files)
    done = train(*words, "--experiment", "skip", "--on-bad-image", "skip")
    assert "warning: images that do not decode and were replaced by others: 3, listed in" in done.stdout
    lines = set((tmp_path / "skip" / "bad_images.txt").read_text().splitlines())
    assert {line.split(": ")[0] for line in lines} == {str(file) for file in files}
    assert main(["validate", str(tmp_path / "skip"), "--val-split", "train", "--on-bad-image", "skip", "-j", "2"]) == 0
    assert f"warning: images that do not decode and were replaced by others: 3: {files[0]}" in capsys.readouterr().err


def test_an_image_of_too_many_pixels_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadImage, match="number 1: 16 x 16 pixels are more than 100"):
        Decoded([(Image.new("L", (8, 8)), 0), (Image.new("L", (16, 16)), 1)], ImageReading())[1]


def test_a_loading_process_that_dies_is_said_in_one_line(folder, tmp_path):
    script = (
        "import os, sys, timm_sfr.data.samples as s, train_sfr; seed = s.seed_cpu;"
        "s.seed_cpu = lambda *e: os._exit(9) if e[1:] == (0, 7) else seed(*e);"
        "sys.exit(train_sfr.main(sys.argv[1:]))"
    )
    words = ("--model", "resnet20_cifar", "--data-dir", folder, "--epochs", 1, "-b", 20, "-j", 1, "--output", tmp_path)
    done = run(sys.executable, "-c", script, *words)
    assert done.returncode == 2 and "error: data: a loading process died: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_pipe_that_breaks_before_its_process_has_died_is_one_line_too():
    """torch raises from its handler of SIGCHLD, which may come while the broken pipe's error is being told."""

    def late(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) exited unexpectedly with exit code 9. Details are lost.")

    before = signal.signal(signal.SIGALRM, late)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        told = explained(ConnectionResetError("reset by peer"), "nothing was begun")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert "worker (pid 7) exited unexpectedly with exit code 9" in str(told)


def test_a_bad_image_whose_name_is_no_text_is_listed(tmp_path):
    bad, name = BadImages(), os.fsdecode(b"caf\xe9.png")
    bad.write_to(tmp_path / "bad_images.txt")
    bad.add(name), bad.add(name)
    assert bad.names() == [name]


def test_an_error_in_a_loading_process_is_told_in_its_own_words():
    text = (
        "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1, in f\nRuntimeError: 1 shard for 4 workers\n'
    )
    told = str(explained(RuntimeError(text), "nothing was begun"))
    assert told == "data: a loading process failed: RuntimeError: 1 shard for 4 workers; nothing was begun"
