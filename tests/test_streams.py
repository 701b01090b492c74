"""Data sets that are not folders: tars always; streams where their packages are installed."""

import json
import tarfile

import pytest
from conftest import finished_run, train
from digit_files import digit_files, make_parquet, make_shards, make_tars, put

from timm_sfr.config import DataConfig
from timm_sfr.data.datasets import open_split
from timm_sfr.data.loaders import eval_loader
from timm_sfr.data.transforms import Preprocessing

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


def test_each_process_reads_its_shards_of_webdataset_once(tmp_path):
    """timm's reader makes the parts equally long: of shards of 30 and 10 images it would read 10 twice, and leave out 10."""
    pytest.importorskip("webdataset")
    for shard, count in enumerate((30, 10, 5)):
        with tarfile.open(tmp_path / f"val-{shard:04d}.tar", "w") as tar:
            for index, (data, _) in zip(range(count), digit_files("val"), strict=False):
                put(tar, f"{shard}-{index:05d}.png", data)
                put(tar, f"{shard}-{index:05d}.cls", str(shard).encode())
    config = DataConfig(dataset="wds/", data_dir=str(tmp_path), val_split="val-{0000..0002}.tar", val_num_samples=45, workers=1)
    prep, seen = Preprocessing((3, 16, 16), (0.5,) * 3, (0.25,) * 3, "bilinear", 1.0), []
    for rank in range(4):
        split = open_split(config, "val", "RGB", 0)
        split.dataset.reader.dist_rank, split.dataset.reader.dist_num_replicas = rank, 4
        seen.append([target for _, targets in eval_loader(split, config, prep) for target in targets.tolist()])
    assert seen == [[0] * 30, [1] * 10, [2] * 5, []]


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
