"""Data sets that are not folders: tars always; streams where their packages are installed."""

import json

import pytest
from conftest import finished_run, train
from digit_files import make_parquet, make_shards, make_tars

LENGTHS = ("--train-num-samples", 96, "--val-num-samples", 40, "--num-classes", 10)


def scores(tmp_path, *words):
    run, _ = finished_run(tmp_path, "--model", "resnet20_cifar", "--img-size", 16, "--epochs", 1, "-b", 32, "-j", 1, *words)
    return json.loads((run / "metrics.json").read_text())["last"]


def test_tars(tmp_path):
    make_tars(tmp_path)
    words = ("--data-dir", tmp_path, "--train-split", "train.tar", "--val-split", "val.tar")
    assert scores(tmp_path, *words)["images"] == 40


def test_webdataset_shards(tmp_path):
    pytest.importorskip("webdataset")
    make_shards(tmp_path)
    words = ("--data-dir", tmp_path, "--train-split", "train-{0000..0001}.tar", "--val-split", "val-{0000..0001}.tar")
    assert scores(tmp_path, "--dataset", "wds/", *words, *LENGTHS)["images"] == 40


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """The digits as Parquet shards, as data sets lie on the Hub."""
    pytest.importorskip("datasets")
    return make_parquet(tmp_path_factory.mktemp("parquet"))


def test_datasets_from_the_hub(parquet, tmp_path):
    assert scores(tmp_path, "--dataset", f"hfds/{parquet}")["images"] == 40


def test_datasets_streamed(parquet, tmp_path):
    assert scores(tmp_path, "--dataset", f"hfids/{parquet}", *LENGTHS)["images"] == 40


def test_a_stream_is_not_cached(parquet, tmp_path):
    done = train("--dataset", f"hfids/{parquet}", *LENGTHS, "--cache-dataset", "--output", tmp_path, ok=False)
    assert "cache-dataset: expected a dataset with an index" in done.stderr
