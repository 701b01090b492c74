"""What an epoch consists of: repeats, passes, balanced classes, views; and class weights from counts and files."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import train
from PIL import Image
from sklearn.utils.class_weight import compute_class_weight
from timm.data import AugMixDataset, create_transform
from timm.data.distributed_sampler import RepeatAugSampler

from timm_sfr import DynamicLabelSmoothing, UserError
from timm_sfr.config import AugConfig, DataConfig
from timm_sfr.data.class_weights import balanced_weights, class_targets, resolve_class_weights
from timm_sfr.data.datasets import Digits, Split, open_splits
from timm_sfr.data.loaders import EpochSampler, TrainBatches
from timm_sfr.data.order import EpochOrder
from timm_sfr.data.transforms import Preprocessing
from timm_sfr.method.smoothing import own_epsilon
from timm_sfr.utils.seeding import seed_cpu

PREP = Preprocessing((3, 16, 16), (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), "bilinear", 1.0)
UNEVEN = torch.tensor([0] * 40 + [1] * 9 + [2] * 3 + [4] * 55)  # no image of class 3


def parts(processes, batch, epoch, order):
    """The keys of each process, (batches, samples)."""
    found = []
    for process in range(processes):
        sampler = EpochSampler(order, batch // processes, process, processes)
        sampler.epoch = epoch
        found.append(torch.tensor(list(sampler)).view(-1, batch // processes))
    return found


@pytest.mark.parametrize("repeats", [2, 3, 1.5])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_repeats_are_those_of_timms_sampler(repeats, processes):
    seed, epoch, count = 3, 2, 107
    found = parts(processes, 16, epoch, EpochOrder(count, seed, repeats=repeats))
    for process, keys in enumerate(found):
        timms = RepeatAugSampler(range(count), processes, process, num_repeats=repeats, selected_round=0)
        timms.set_epoch(seed * 1_000_003 + epoch)  # the seed of our order
        expected = list(timms)[: keys.numel()]
        assert (keys.flatten() % count).tolist() == expected and keys.numel() >= count // processes - 16


ORDERS = {
    "plain": {},
    "repeats": {"repeats": 3},
    "passes": {"passes": 2.5},
    "both": {"passes": 2, "repeats": 1.5},
    "balanced": {"targets": UNEVEN},
    "all": {"targets": UNEVEN, "passes": 2, "repeats": 2},
}


@pytest.mark.parametrize("way", ORDERS)
def test_no_two_samples_of_a_run_are_augmented_alike(way):
    order = EpochOrder(107, 3, **ORDERS[way])
    epochs = [order.keys(epoch) for epoch in range(4)]
    assert all(len(keys) == len(order) for keys in epochs)
    assert len(torch.cat(epochs).unique()) == 4 * len(order)
    assert all(torch.equal(order.keys(epoch), keys) for epoch, keys in enumerate(epochs))
    assert not torch.equal(epochs[0] % 107, epochs[1] % 107)
    assert not torch.equal(EpochOrder(107, 4, **ORDERS[way]).keys(0), epochs[0])


@pytest.mark.parametrize("way", ORDERS)
def test_any_number_of_processes_has_the_same_global_batches_also_after_a_stop(way):
    order = EpochOrder(107, 3, **ORDERS[way])
    (whole,) = parts(1, 16, 1, order)
    for processes in (2, 4):
        together = torch.cat(parts(processes, 16, 1, order), 1)
        assert torch.equal(together.sort(1).values, whole.sort(1).values)
        assert order.repeats > 1 or torch.equal(together, whole), "process r takes the r-th part of each global batch"
    sampler = EpochSampler(order, 16)
    sampler.epoch, sampler.start = 1, 2
    assert list(sampler) == whole[2:].flatten().tolist()


def test_passes_take_each_image_equally_often():
    index = EpochOrder(10, 0, passes=2.5).keys(1) % 10
    assert len(index) == 25 and index[:10].unique().numel() == index[10:20].unique().numel() == 10
    assert index[20:].unique().numel() == 5


def test_a_balanced_epoch_takes_each_class_and_each_of_its_images_equally_often():
    order = EpochOrder(len(UNEVEN), 0, targets=UNEVEN)
    extra = set()
    for epoch in range(8):
        index = order.keys(epoch) % len(UNEVEN)
        counts = UNEVEN[index].bincount(minlength=5)
        assert len(index) == len(UNEVEN) and counts[3] == 0 and set(counts.tolist()) == {0, 26, 27}
        extra |= {kind for kind, count in enumerate(counts.tolist()) if count == 27}
        for kind in (0, 1, 2, 4):
            uses = index.bincount(minlength=len(UNEVEN))[kind == UNEVEN]
            assert uses.max() - uses.min() <= 1
    assert len(extra) > 2, "no class always has one more"
    with pytest.raises(UserError, match="sampler: some training images have no class"):
        EpochOrder(3, 0, targets=torch.tensor([0, -1, 1]))


@pytest.mark.parametrize("aug", [{"aug_repeats": 2}, {}], ids=["repeats", "passes"])
def test_each_repeat_is_augmented_anew_for_any_number_of_workers(aug, folder):
    """Repeats of an image lie beside each other in a batch; passes are one after the other."""
    config = DataConfig(data_dir=str(folder), batch_size=20, workers=0, epoch_repeats=0 if aug else 2)
    train = open_splits(config, "RGB", 0)[0]
    made = [TrainBatches(train, replace(config, workers=n), AugConfig(**aug), PREP, 5, Accelerator(cpu=True)) for n in (0, 2)]
    assert len(made[0]) == (3 if aug else 6)
    ours, theirs = (torch.cat([images for images, _ in one.epoch(1)]) for one in made)
    assert torch.equal(ours, theirs)
    files = [name for step in range(len(made[0])) for name in made[0].files(1, step)]
    assert len(set(files)) == (30 if aug else 60) and len(files) == (60 if aug else 120)
    for name in files[:5]:
        first, second = (index for index, other in enumerate(files) if other == name)
        assert not torch.equal(ours[first], ours[second])


def test_views_are_those_of_timms_augmix_dataset(folder):
    images = [(image.convert("RGB"), label) for image, label in (Digits(True, "RGB")[i] for i in range(6))]

    class Plain(torch.utils.data.Dataset):
        transform = create_transform(PREP.input_size, is_training=True, auto_augment="rand-m9", mean=PREP.mean, std=PREP.std,
                                     interpolation="random", use_prefetcher=True, separate=True)  # fmt: skip

        def __getitem__(self, index):
            return self.transform(images[index][0]), images[index][1]

    timms, ours = AugMixDataset(Plain(), 3), PREP.train_transform(AugConfig(aa="rand-m9", aug_splits=3))
    for index, (image, _) in enumerate(images):
        seed_cpu(index)
        expected, _ = timms[index]
        seed_cpu(index)
        found = ours(image)
        assert len(found) == 3 and all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("splits", [0, 3])
@pytest.mark.parametrize("resplit", [False, True])
def test_resplit_erases_nothing_in_the_first_part(resplit, splits, folder):
    config = DataConfig(data_dir=str(folder), batch_size=20, workers=0)
    aug = AugConfig(reprob=1.0, resplit=resplit, aug_splits=splits, aa="rand-m9")
    made = TrainBatches(open_splits(config, "RGB", 0)[0], config, aug, PREP, 5, Accelerator(cpu=True))
    images, target = next(made.epoch(0))
    assert len(images) == len(target) == 20 * max(1, splits)
    if splits:
        assert torch.equal(target, target[:20].repeat(3)) and not torch.equal(images[:20], images[20:40])
    erased = (made.erase(images.clone()) != images).flatten(1).any(1)
    clean = len(images) // (splits or 2) if resplit else 0
    assert not erased[:clean].any() and erased[clean:].all()


def test_smoothing_counts_passes_and_not_epochs():
    smoothing = DynamicLabelSmoothing(100)
    smoothing.passes = 3.0
    smoothing.set_epoch(15, 16)
    assert smoothing.epsilon_t.item() == pytest.approx(own_epsilon(100, 48))


def test_auto_weights_are_scikit_learns(folder):
    present = [0, 1, 2, 4]
    expected = compute_class_weight("balanced", classes=np.array(present), y=UNEVEN.numpy())
    weights = balanced_weights(UNEVEN, 6)
    assert [weights[k] for k in present] == pytest.approx(expected) and weights[3] == weights[5] == 1
    assert torch.tensor(weights)[UNEVEN].mean() == pytest.approx(1)


class Wide(list):
    """Samples whose classes are one of several columns."""


def test_classes_of_every_kind_of_dataset(folder):
    train = open_splits(DataConfig(data_dir=str(folder)), "RGB", 0)[0].dataset
    assert class_targets(train).tolist() == [0] * 20 + [1] * 20 + [2] * 20
    digits = Digits(True, "RGB")
    assert class_targets(digits).tolist() == [digits[i][1] for i in range(len(digits))]
    pairs = [(Image.new("L", (4, 4)), kind) for kind in (2, 0, 1)]  # nothing but the samples themselves
    assert class_targets(pairs).tolist() == [2, 0, 1]
    wide = Wide(pairs)
    wide.targets = torch.tensor([[2, 7], [0, 7], [1, 7]])  # as QMNIST's, whose first column is the class
    assert class_targets(wide).tolist() == [2, 0, 1]


FILES = {
    "w.yaml": "cat: 1\ndog: 2.5\nowl: 0\n",
    "w.json": '{"owl": 0, "cat": 1, "dog": 2.5}',
    "w.csv": "class,weight\ncat,1\ndog,2.5\nowl,0\n",
    "w.txt": "dog 2.5\n\ncat 1\nowl 0\n",
    "index.csv": "0,1\n1,2.5\n2,0\n",
}
NAMES = ("cat", "dog", "owl")
SPLIT = Split([(None, 0), (None, 0), (None, 1), (None, 2)], NAMES)


@pytest.mark.parametrize("name", FILES)
def test_weights_from_files(name, tmp_path):
    (tmp_path / name).write_text("\ufeff" * (name == "w.csv") + FILES[name], encoding="utf-8")
    assert resolve_class_weights(str(tmp_path / name), SPLIT, 3, NAMES) == (1.0, 2.5, 0.0)


def test_names_that_are_numbers_are_names(tmp_path):
    (tmp_path / "w.txt").write_text("7 1\n1 2\n0 3\n")
    names = ("0", "7", "1")
    assert resolve_class_weights(str(tmp_path / "w.txt"), SPLIT, 3, names) == (3.0, 1.0, 2.0)
    assert resolve_class_weights("auto", SPLIT, 3, names) == pytest.approx((2 / 3, 4 / 3, 4 / 3))
    assert resolve_class_weights(None, SPLIT, 3, names) is None


@pytest.mark.parametrize(
    "name,text,message",
    [
        ("w.yaml", "cat: 1\ndgo: 2\nowl: 1\n", "has 'dgo', which is neither a class nor an index below 3; did you mean 'dog'"),
        ("w.csv", "0,1\n1,1\n3,1\n", "has '3', which is neither"),
        ("w.txt", "cat 1\ncat 2\ndog 1\nowl 1\n", "has 'cat' twice"),
        ("w.txt", "cat 1\n", "lacks weights of 2 of 3 classes: dog, owl"),
        ("w.csv", "class,weight\ncat,1\ndog,x\nowl,1\n", "expected a number of at least 0 for 'dog'; got 'x'"),
        ("w.yaml", "cat: 1\ncat: 7\ndog: 2\nowl: 1\n", "has 'cat' twice"),
        ("w.yaml", "no: 1\ndog: 2\nowl: 1\n", "has 'no', which is neither a class nor an index below 3"),
        ("w.yaml", "cat: -1\ndog: 1\nowl: 1\n", "expected a number of at least 0 for 'cat'; got -1"),
        ("w.yaml", "cat: 0\ndog: 0\nowl: 0\n", "has weights of 0 only"),
        ("w.yaml", "- 1\n- 2\n", "expected CLASS: WEIGHT lines .* got list"),
        ("w.yaml", "cat: [1\n", "cannot read"),
        ("w.csv", "cat;1\n", "expected a class and a weight on each line"),
        ("w.txt", "\n", "is empty"),
        ("w.txt", "\x00", "expected a class and a weight"),
    ],
)
def test_mistakes_in_files_of_weights_get_one_line(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        resolve_class_weights(str(tmp_path / name), SPLIT, 3, NAMES)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("class-weights: ")


def test_a_missing_file_of_weights_and_streams_get_one_line(tmp_path):
    (tmp_path / "weights.yaml").write_text("")
    done = train("--class-weights", tmp_path / "weight.yaml", "--output", tmp_path / "out", ok=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "class-weights: cannot read" in done.stderr and "did you mean" in done.stderr

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    stream = Split(Stream(), None)
    with pytest.raises(UserError, match=r"class-weights: a stream does not say .*; got auto"):
        resolve_class_weights("auto", stream, 3, None)
    for config, aug in ((DataConfig(sampler="balanced"), AugConfig()), (DataConfig(), AugConfig(aug_repeats=3))):
        with pytest.raises(UserError, match=r"(sampler|aug-repeats): .* this one is a stream"):
            TrainBatches(stream, config, aug, PREP, 0, Accelerator(cpu=True))


def test_a_run_says_its_class_weights(folder, tmp_path):
    (tmp_path / "w.json").write_text(json.dumps({"class0": 0.5, "class1": 1, "class2": 4}))
    words = ("--model", "resnet20_cifar", "--data-dir", folder, "--img-size", 16, "-b", 20, "-j", 0, "--epochs", 1)
    done = train(*words, "--class-weights", tmp_path / "w.json", "--output", tmp_path, "--experiment", "run")
    assert "class weights: 0.5 (class0) to 4 (class2)" in done.stdout and "class weights;" in done.stdout
