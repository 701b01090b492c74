"""Datasets, order, augmentation and scores."""

import gc
import pickle
import random
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from test_score import expected_scores
from timm.data.auto_augment import posterize

from timm_sfr import UserError
from timm_sfr.config import AugConfig, DataConfig, ModelConfig
from timm_sfr.data.cache import Cached
from timm_sfr.data.datasets import open_split, open_splits
from timm_sfr.data.loaders import EpochSampler, TrainBatches, eval_loader
from timm_sfr.data.order import EpochOrder
from timm_sfr.data.transforms import Preprocessing, _operations, preprocessing
from timm_sfr.models.loading import new_model
from timm_sfr.training.evaluate import Scores
from timm_sfr.utils.processes import one_at_a_time
from timm_sfr.utils.seeding import random_state_kept, seed_cpu

PREP = Preprocessing((3, 16, 16), (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), "bilinear", 1.0)


def test_digits_split():
    train, val = open_splits(DataConfig(dataset="digits"), "RGB", 0)
    assert (len(train.dataset), len(val.dataset)) == (1437, 360) and train.class_names == tuple("0123456789")
    again = open_splits(DataConfig(dataset="digits"), "RGB", 1)[1]
    assert np.array_equal(val.dataset.pixels, again.dataset.pixels)
    assert {p.tobytes() for p in train.dataset.pixels}.isdisjoint({p.tobytes() for p in val.dataset.pixels})


def batches(config, epoch, aug=None):
    split = open_splits(config, "RGB", 0)[0]
    aug = aug or AugConfig(aa="rand-m9")
    return list(TrainBatches(split, config, aug, PREP, 5, Accelerator(cpu=True)).epoch(epoch))


def test_images_do_not_depend_on_workers_or_batches():
    config = DataConfig(dataset="digits", batch_size=32, workers=0)
    alone, helped = batches(config, 1), batches(DataConfig(dataset="digits", batch_size=64, workers=2), 1)
    ours, theirs = torch.cat([b[0] for b in alone[:4]]), torch.cat([b[0] for b in helped[:2]])
    assert torch.equal(ours, theirs)
    assert not torch.equal(batches(config, 2)[0][0], alone[0][0])


AUGMENTATIONS = {"defaults": AugConfig(), "augmented": AugConfig(aa="rand-m9"), "plain": AugConfig(no_aug=True),
                 "views": AugConfig(aug_splits=3, aa="rand-m9")}  # fmt: skip


@pytest.mark.parametrize("aug", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_cached_set_gives_the_same_batches(folder, aug, workers):
    config = DataConfig(data_dir=str(folder), batch_size=20, workers=workers)
    cached = replace(config, cache_dataset=True)
    for epoch in (0, 1):
        for ours, theirs in zip(batches(cached, epoch, aug), batches(config, epoch, aug), strict=True):
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    val = open_splits(config, "RGB", 0)[1]
    for ours, theirs in zip(eval_loader(val, cached, PREP), eval_loader(val, config, PREP), strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def images_of_many_sizes():
    return [(Image.fromarray(np.random.randint(0, 256, (h, w, 3), np.uint8)), h % 3) for h in (3, 9) for w in (5, 8)]


def test_a_cache_holds_images_of_any_size_and_travels_to_other_processes():
    source = images_of_many_sizes()
    cache = Cached(source)
    copy = pickle.loads(pickle.dumps(cache))
    assert len(cache) == len(copy) == 4 and cache.starts[-1] == sum(i.width * i.height * 3 for i, _ in source)
    for index, (image, target) in enumerate(source):
        for one in (cache, copy):
            assert one[index][0].tobytes() == image.tobytes() and one[index][0].size == image.size
            assert one[index][1] == target
    assert len(pickle.dumps(cache)) < 2000, "the pixels must not travel"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_a_cache_keeps_the_mode_of_its_images(mode):
    image = Image.effect_noise((12, 8), 90).convert("RGB").convert(mode)
    found = Cached([(image, 0)])[0][0]
    assert found.mode == mode and found.size == image.size and found.tobytes() == image.tobytes()


def test_a_cache_leaves_no_file_behind():
    cache = Cached(images_of_many_sizes())
    path = cache.path
    assert path.stat().st_size == cache.starts[-1]
    del cache
    gc.collect()
    assert not path.exists()


def test_a_set_that_does_not_fit_is_not_cached(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    before = set(Path(tempfile.gettempdir()).glob("timm_sfr-cache-*"))
    with pytest.raises(UserError, match="cache-dataset: 4 decoded images take about"):
        Cached(images_of_many_sizes())
    gc.collect()
    assert set(Path(tempfile.gettempdir()).glob("timm_sfr-cache-*")) == before


def test_what_is_seeded_inside_leaves_no_trace():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    drawn = []
    for _ in range(2):
        with random_state_kept():
            seed_cpu(1, 2, 3)
            drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_policies_are_for_grey_and_colour_images():
    prep = Preprocessing((4, 16, 16), (0.5,) * 4, (0.25,) * 4, "bilinear", 1.0)
    for aug in (AugConfig(aa="rand-m9"), AugConfig(grayscale_prob=0.5)):
        with pytest.raises(UserError, match="these have 4 channels"):
            prep.train_transform(aug)


def test_normalisation_is_the_same_in_training_and_validation():
    config = DataConfig(dataset="digits", batch_size=360, workers=0)
    _, val = open_splits(config, "RGB", 0)
    images, _ = next(iter(eval_loader(val, config, PREP)))
    assert images.dtype == torch.uint8 and images.shape == (360, 3, 16, 16)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (PREP.mean, PREP.std))
    expected = (images.double() / 255 - mean) / std
    assert torch.allclose(PREP.normalize(images), expected.float(), atol=1e-5)
    got = TrainBatches(val, config, AugConfig(no_aug=True), PREP, 0, Accelerator(cpu=True))
    image, target = next(got.epoch(0))
    order = [key % 360 for key in got.sampler]
    assert torch.allclose(image, PREP.normalize(images)[order], atol=1e-5)
    assert target.tolist() == [val.dataset.labels[i] for i in order]


def test_scores_against_scikit_learn():
    logits, target = torch.randn(500, 10), torch.randint(0, 10, (500,))
    scores = Scores(torch.device("cpu"))
    for part in range(0, 500, 64):
        scores.add(logits[part : part + 64], target[part : part + 64])
    found, expected = scores.result(), expected_scores(logits.double().softmax(1).numpy(), target.numpy())
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_data_that_cannot_be_trained_on(folder, tmp_path):
    cases = {
        "missing": "no such file",
        "empty": "found nothing",
        "noval": "no 'validation' part .* --val-share 0.1 takes a part of the training split",
    }
    (tmp_path / "empty").mkdir()
    shutil.copytree(folder / "train", tmp_path / "noval" / "train")
    for name, message in cases.items():
        with pytest.raises(UserError, match=message):
            open_splits(DataConfig(data_dir=str(tmp_path / name)), "RGB", 0)
    for config in (DataConfig(dataset="digits", val_share=0.1), DataConfig(dataset="torch/cifar10", val_share=0.1)):
        with pytest.raises(UserError, match=r"val-share: .* is validated on its split 'validation'; leave the option out"):
            open_splits(config, "RGB", 0)
    (tmp_path / "hollow" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="found no images in folders of classes"):
        open_splits(DataConfig(data_dir=str(tmp_path / "hollow")), "RGB", 0)
    with pytest.raises(UserError, match="fewer than one global batch of 64 x 2"):
        EpochSampler(EpochOrder(100, 0), 64, 0, 2)


@pytest.mark.parametrize("options,said", [
    ({"dataset": "torch/cifar10", "test_split": "test"}, "test-split: torch/cifar10 has two halves"),
    ({"dataset": "torch/mnist", "train_split": "train[:9]"}, r"train-split: expected 'train' or 'validation'.*got 'train\[:9\]'"),
    ({"dataset": "torch/mnist", "class_map": "map.txt"}, "class-map: torch/mnist numbers its classes itself"),
    ({"dataset": "digits", "class_map": "map.txt"}, "class-map: digits numbers its classes itself"),
    ({"dataset": "digits", "train_num_samples": 3}, "train-num-samples: it is for streams, .* has 1437 images"),
])  # fmt: skip
def test_what_data_do_not_have_is_refused(options, said):
    part = "test" if "test_split" in options else "train"
    with pytest.raises(UserError, match=said):
        open_split(DataConfig(**options), part, "RGB", 0)


@pytest.mark.parametrize("name", ["train_split", "val_split", "test_split"])
def test_a_splits_name_is_not_empty(name):
    with pytest.raises(UserError, match=f"{name}|{name.replace('_', '-')}: expected"):
        DataConfig(data_dir="x", **{name: ""})


def test_a_test_folder_of_any_name_is_no_class(tmp_path):
    for place in ("cat", "dog", "holdout/cat", "holdout/dog"):
        (tmp_path / place).mkdir(parents=True)
        for index in range(3):
            Image.new("L", (4, 4), index).save(tmp_path / place / f"{index}.png")
    with pytest.raises(UserError, match="has no 'train' part"):
        open_splits(DataConfig(data_dir=str(tmp_path), test_split="holdout"), "RGB", 0)
    given = DataConfig(data_dir=str(tmp_path / "holdout"), input_key=".PNG; jpg")
    assert open_splits(given, "RGB", 0)[0].scan.counts == {"cat": 2, "dog": 2}


@pytest.mark.parametrize("options,size", [({}, (3, 32, 32)), ({"in_chans": 1}, (1, 32, 32)), ({"img_size": 24}, (3, 24, 24)),
                                          ({"in_chans": 1, "img_size": 24}, (1, 24, 24))])  # fmt: skip
def test_channels_and_size_are_options_of_their_own(options, size):
    config = ModelConfig(model="resnet20_cifar", **options)
    prep = preprocessing(config, new_model(config, 10))
    assert prep.input_size == size and len(prep.mean) == len(prep.std) == size[0]


def test_processes_open_the_data_one_at_a_time(tmp_path, monkeypatch):
    """So that a download happens once; alone, a process takes no lock."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    inside, most = [], []

    def work():
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        return 7

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: one_at_a_time(SimpleNamespace(num_processes=4), work), range(4)))
    assert answers == [7] * 4 and max(most) == 1 and list(tmp_path.glob("*.lock"))
    assert one_at_a_time(SimpleNamespace(num_processes=1), work) == 7


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m15-inc1", "rand-m12-mmax20-inc1", "v0", "original",
                                    "augmix-m10", "rand-m0"])  # fmt: skip
def test_every_posterization_of_timms_policies_works(policy):
    """As with Pillow before 13, which refuses 0 bits: a black image then, otherwise timm's own."""
    made = PREP.train_transform(AugConfig(aa=policy))
    steps = [step for step in _operations(made) if step.name.startswith("Posterize")]
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    assert steps
    for step in steps:
        step.prob, step.magnitude_std = 1.0, 0
        for magnitude in (0, 3, step.magnitude, 10, 20):
            step.magnitude = magnitude
            (bits,) = step.level_fn(min(step.magnitude, step.magnitude_max or 10), step.hparams)
            expected = Image.new("RGB", (8, 8)) if bits <= 0 else posterize(image, bits)
            assert (np.asarray(step(image)) == np.asarray(expected)).all()
