"""Data sets that are not folders: tars always; streams where their packages are installed."""

import dataclasses
import json
import tarfile
from types import SimpleNamespace

import pytest
import torch
from conftest import finished_run, train
from digit_files import digit_files, make_parquet, make_shards, make_tars, put
from torch.utils.data import DataLoader, IterableDataset

from timm_sfr import UserError
from timm_sfr.config import AugConfig, DataConfig
from timm_sfr.data.datasets import open_split
from timm_sfr.data.loaders import SeededStream, TrainBatches, eval_loader
from timm_sfr.data.transforms import Preprocessing

PREP = Preprocessing((3, 16, 16), (0.5,) * 3, (0.25,) * 3, "bilinear", 1.0)
ONE = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"), is_main_process=True)
LENGTHS = ("--train-num-samples", 96, "--val-num-samples", 40, "--num-classes", 10)


def scores(tmp_path, *words):
    run, _ = finished_run(tmp_path, "--model", "resnet20_cifar", "--img-size", 16, "--epochs", 1, "-b", 32, "-j", 1, *words)
    return json.loads((run / "metrics.json").read_text())["last"]


def test_tars(tmp_path):
    make_tars(tmp_path)
    words = ("--data-dir", tmp_path, "--train-split", "train.tar", "--val-split", "val.tar")
    assert scores(tmp_path, *words, "-b", "auto")["images"] == 40


def test_webdataset_shards(tmp_path):
    pytest.importorskip("webdataset")
    make_shards(tmp_path)
    words = ("--data-dir", tmp_path, "--train-split", "train-{0000..0001}.tar", "--val-split", "val-{0000..0001}.tar")
    assert scores(tmp_path, "--dataset", "wds/", *words, *LENGTHS)["images"] == 40
    config = DataConfig(dataset="wds/", data_dir=str(tmp_path), train_split="train-{0000..0001}.tar", train_num_samples=96)
    for options, said in (
        ({"epoch_repeats": 2}, "epoch-repeats: .* got 2"),
        ({"on_bad_image": "skip"}, "on-bad-image: .* stream"),
    ):
        given = dataclasses.replace(config, **options)
        with pytest.raises(UserError, match=said):
            TrainBatches(open_split(given, "train", "RGB", 0), given, AugConfig(), PREP, 0, ONE)


class Noise(IterableDataset):
    """Twelve images, three of each of four processes' workers."""

    def __len__(self):
        return 12

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        yield from ((number, 0) for number in range(3))


def test_the_random_numbers_of_a_stream():
    """They differ by seed, epoch, process, loading process and position, and are the same again; nobody else's change."""

    def draws(seed, epoch, process, workers):
        stream = SeededStream(Noise(), lambda number: torch.rand(1), seed, process)
        loader = DataLoader(stream, None, num_workers=workers, generator=torch.Generator())
        stream.set_epoch(epoch)
        return [image.item() for image, _ in loader]

    state = torch.get_rng_state()
    places = [(0, 0, 0, 0), (0, 0, 0, 2), (0, 1, 0, 0), (0, 0, 1, 0), (1, 0, 0, 0)]
    drawn = [draws(*place) for place in places]
    assert [len(one) for one in drawn] == [3, 6, 3, 3, 3] and set(drawn[0]) < set(drawn[1])
    assert len({number for one in drawn for number in one}) == 15
    assert drawn == [draws(*place) for place in places] and torch.equal(torch.get_rng_state(), state)


def test_each_process_reads_its_shards_of_webdataset_once(tmp_path):
    """timm's reader makes the parts equally long: of shards of 30 and 10 images it would read 10 twice, and leave out 10."""
    pytest.importorskip("webdataset")
    for shard, count in enumerate((30, 10, 5)):
        with tarfile.open(tmp_path / f"val-{shard:04d}.tar", "w") as tar:
            for index, (data, _) in zip(range(count), digit_files("val"), strict=False):
                put(tar, f"{shard}-{index:05d}.png", data)
                put(tar, f"{shard}-{index:05d}.cls", str(shard).encode())
    config = DataConfig(dataset="wds/", data_dir=str(tmp_path), val_split="val-{0000..0002}.tar", val_num_samples=45, workers=1)
    seen = []
    for rank in range(4):
        split = open_split(config, "val", "RGB", 0)
        split.dataset.reader.dist_rank, split.dataset.reader.dist_num_replicas = rank, 4
        seen.append([target for _, targets in eval_loader(split, config, PREP) for target in targets.tolist()])
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
