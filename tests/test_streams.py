"""Data sets that are not folders: tars always; streams where their packages are installed."""

import io
import json
import tarfile

import pytest
from conftest import TRAIN, run

from timm_sfr.data.datasets import Digits


def images(training, count):
    digits = Digits(training, "RGB")
    for index in range(count):
        image, label = digits[index]
        file = io.BytesIO()
        image.save(file, "PNG")
        yield index, file.getvalue(), label


def put(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def scores(tmp_path, *words):
    done = run(*TRAIN, "--model", "resnet20_cifar", "--img-size", 16, "--epochs", 1, "-b", 32, "-j", 1, *words,
               "--output", tmp_path, "--experiment", "run")  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "run" / "metrics.json").read_text())["last"]


def test_tars(tmp_path):
    for split, training, count in (("train", True, 96), ("val", False, 40)):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for index, data, label in images(training, count):
                put(tar, f"{label}/{index}.png", data)
    words = ("--data-dir", tmp_path, "--train-split", "train.tar", "--val-split", "val.tar")
    assert scores(tmp_path, *words)["images"] == 40


def test_webdataset_shards(tmp_path):
    pytest.importorskip("webdataset")
    for split, training, count in (("train", True, 96), ("val", False, 40)):
        for shard in range(2):
            with tarfile.open(tmp_path / f"{split}-{shard:04d}.tar", "w") as tar:
                for index, data, label in images(training, count):
                    if index % 2 == shard:
                        put(tar, f"{index:05d}.png", data)
                        put(tar, f"{index:05d}.cls", str(label).encode())
    words = ("--dataset", "wds/", "--data-dir", tmp_path, "--train-split", "train-{0000..0001}.tar", "--val-split",
             "val-{0000..0001}.tar", "--train-num-samples", 96, "--val-num-samples", 40, "--num-classes", 10)  # fmt: skip
    assert scores(tmp_path, *words)["images"] == 40


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """The digits as Parquet shards, as data sets lie on the Hub."""
    datasets = pytest.importorskip("datasets")
    place = tmp_path_factory.mktemp("parquet")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))})
    for split, training, count in (("train", True, 96), ("validation", False, 40)):
        for shard in range(2):
            rows = [
                {"image": {"bytes": data, "path": None}, "label": int(label)}
                for index, data, label in images(training, count)
                if index % 2 == shard
            ]
            part = datasets.Dataset.from_list(rows, features=features)
            part.to_parquet(str(place / f"{split}-{shard:05d}-of-00002.parquet"))
    return place


def test_datasets_from_the_hub(parquet, tmp_path):
    assert scores(tmp_path, "--dataset", f"hfds/{parquet}")["images"] == 40


def test_datasets_streamed(parquet, tmp_path):
    words = ("--train-num-samples", 96, "--val-num-samples", 40, "--num-classes", 10)
    assert scores(tmp_path, "--dataset", f"hfids/{parquet}", *words)["images"] == 40


def test_a_stream_is_not_cached(parquet, tmp_path):
    words = ("--train-num-samples", 96, "--val-num-samples", 40, "--num-classes", 10, "--cache-dataset")
    done = run(*TRAIN, "--dataset", f"hfids/{parquet}", *words, "--output", tmp_path)
    assert done.returncode == 2 and "cache-dataset: expected a dataset with an index" in done.stderr
