"""Training images of other sizes: not square, and changing from batch to batch."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import COMMAND, adds_up, cut, finished_run, run, summary, train
from PIL import Image
from timm.data.scheduled_sampler import ScheduledBatchSampler

from benchmarks.faults import differences
from timm_sfr import UserError
from timm_sfr.config import AugConfig, DataConfig, KDConfig, ModelConfig, RunConfig, SizeConfig
from timm_sfr.data.datasets import open_splits
from timm_sfr.data.loaders import EpochSampler
from timm_sfr.data.order import EpochOrder
from timm_sfr.data.samples import make_samples, resized
from timm_sfr.data.sizes import SizedBatches, SizedSamples, SizeSchedule
from timm_sfr.data.transforms import Preprocessing
from timm_sfr.models.teacher import Teacher
from timm_sfr.training.optimizer import learning_rate
from timm_sfr.training.run import assemble, start
from timm_sfr.training.run_state import Learner

PREP = Preprocessing((3, 32, 32), (0.5,) * 3, (0.25,) * 3, "bilinear", 1.0)
SIZES = ("--train-img-sizes", 8, 12, 16)


def schedule(count=1000, batch=32, epochs=4, processes=1, seed=7, sizes=(8, 12, 16, 20), **options):
    return SizeSchedule.of(SizeConfig(train_img_sizes=sizes, **options), batch, count, epochs, seed, processes)


@pytest.mark.parametrize("options", [
    {},
    {"train_batch_sizes": (40, 32, 20, 10), "train_size_probs": (1, 0, 2, 1)},
    {"train_size_schedule": "progressive", "train_batch_sizes": (40, 32, 20, 10)},
    {"train_batches_per_epoch": 70},
])  # fmt: skip
def test_processes_agree_on_sizes_and_share_the_images(options):
    ours = schedule(processes=2, **options)
    parts = [SizedBatches(schedule(processes=2, **options), EpochOrder(1000, 7), process) for process in (0, 1)]
    for epoch in (0, 3, 1):
        one, two = (list(part.batches(epoch)) for part in parts)
        assert len(one) == len(two) == len(ours) == len(ours.batches(epoch))
        for (choice, size), first, second in zip(ours.batches(epoch), one, two, strict=True):
            assert {key[1] for key in first + second} == {choice} and len(first) == len(second) == size
        seen = [key for batch in one + two for key, _ in batch]
        assert len(set(seen)) == len(seen), "no key comes twice"
        indices = [key % 1000 for key in seen]
        assert len(indices) <= 1000 or len(set(indices)) == 1000, "all images before any comes again"
        assert len(indices) == ours.images(epoch, len(ours)) and len(set(indices)) == min(1000, len(indices))
        part = SizedBatches(ours, EpochOrder(1000, 7), 1)
        part.epoch, part.start = epoch, 3
        assert list(part) == two[3:] and part.indices(epoch, 3) == [key % 1000 for key, _ in two[3]]


def test_the_smoothing_counts_the_images_of_short_epochs():
    """50 epochs of 2 batches of 32 images are few passes over the 1,437 digits, so labels are smoothed by almost nothing."""
    options = {"train_img_sizes": (8, 16), "train_batches_per_epoch": 2, "batch_size": 32, "epochs": 50, "workers": 0}
    # Its first epochs have the batches of the first size alone.
    later = {"train_img_sizes": (8, 16), "train_batch_sizes": (64, 16), "train_size_schedule": "progressive", "epochs": 9}
    cases = ((options, 64 / 1437), ({"batch_size": 32}, 1), ({"batch_size": 32, "epoch_repeats": 2}, 2), (later, 35 * 40 / 1437))
    for given, passes in cases:
        config = RunConfig.from_flat({"model": "resnet20_cifar", **given})
        learner, _, _ = assemble(config, start(config))
        assert learner.task.smoothing.passes == pytest.approx(passes)
        if given is options:
            assert learner.task.smoothing.strength(50) < 1e-3


def test_one_size_has_the_batches_of_a_run_without_sizes():
    plain, sized = EpochSampler(EpochOrder(1000, 7), 32), SizedBatches(schedule(sizes=(8,)), EpochOrder(1000, 7))
    for epoch in (0, 2):
        assert [key for batch in sized.batches(epoch) for key, _ in batch] == plain.keys(epoch)
    assert sized.indices(2, 5) == plain.indices(2, 5)


def test_the_progressive_schedule_goes_from_the_first_size_to_the_last():
    """By hand: without spread and mix, epoch e of four has size e alone, and the mean batch is that of the four."""
    options = {"train_size_schedule": "progressive", "train_size_schedule_spread": 0, "train_size_random_mix": 0}
    ours = schedule(train_batch_sizes=(40, 32, 20, 12), **options)
    assert ours.average_batch == 26 and len(ours) == int(1000 / 26)
    for epoch in range(4):
        assert set(ours.batches(epoch)) == {(epoch, (40, 32, 20, 12)[epoch])}
        assert ours.mean_size(epoch) == (8, 12, 16, 20)[epoch]
        assert ours.images(epoch, 3) == 3 * (40, 32, 20, 12)[epoch]


def test_the_shares_and_the_rest_reach_timms_sampler():
    options = {"train_size_schedule": "progressive", "train_size_probs": (1, 2, 3, 0), "train_size_schedule_spread": 0.4,
               "train_size_random_mix": 0.3, "train_batches_per_epoch": 50}  # fmt: skip
    theirs = ScheduledBatchSampler(range(500), (32,) * 4, (1, 2, 3, 0), 7, num_batches=50, choice_schedule="progressive",
                                   schedule_epochs=4, schedule_spread=0.4, schedule_random_mix=0.3)  # fmt: skip
    theirs.set_epoch(2)
    assert schedule(processes=2, **options).batches(2) == [(batch[0][1], len(batch)) for batch in theirs]
    mean = schedule(train_batch_sizes=(64, 32, 16, 8), train_size_probs=(1, 1, 2, 0)).average_batch
    assert mean == 64 / 4 + 32 / 4 + 16 / 2
    config = RunConfig.from_flat({"lr_base": 0.1, "lr_base_size": 64, "dataset": "none"}).optim
    assert learning_rate(config, mean) == pytest.approx(0.1 * mean / 64)


@pytest.mark.parametrize("options,said", [
    ({"train_img_sizes": ()}, "expected sizes in pixels"),
    ({"train_batch_sizes": (8,)}, "give --train-img-sizes too"),
    ({"train_batches_per_epoch": 8}, "give --train-img-sizes too"),
    ({"train_img_sizes": (8, 16), "train_batch_sizes": (8,)}, "expected 2 numbers, one for each"),
    ({"train_img_sizes": (8, 16), "train_size_probs": (0, 0)}, "not all 0"),
    ({"train_img_sizes": (8, 16), "train_size_probs": (1, float("nan"))}, "train_size_probs: expected a finite number"),
    ({"train_img_sizes": (8, 16), "train_size_probs": (2, -1)}, "expected shares from 0 on"),
    ({"train_img_sizes": (8,), "train_size_schedule": "progressive"}, "needs two sizes or more"),
    ({"train_img_sizes": (8,), "train_batch_sizes": (7,), "mixup": 0.2}, "train-batch-sizes: mixup and CutMix"),
    ({"train_img_sizes": (8, 16), "train_size_random_mix": 0.5}, "they are for --train-size-schedule progressive"),
    ({"train_img_sizes": (8, 16), "aug_splits": 3}, "views of an image do not go with train_img_sizes"),
    ({"input_size": (3, 16)}, "expected channels, height and width"),
    ({"input_size": (3, 16, 24), "img_size": 16}, "agrees with img_size 16"),
    ({"input_size": (3, 16, 24), "in_chans": 1}, "agrees with in_chans 1"),
])  # fmt: skip
def test_options_that_do_not_fit_are_one_line(options, said):
    with pytest.raises(UserError, match=said):
        RunConfig.from_flat({"data_dir": "none", **options})


def test_too_few_images_for_a_batch_are_one_line():
    with pytest.raises(UserError, match=r"train_img_sizes: timm cannot make the schedule .* reduce the batch sizes"):
        schedule(count=30)


def test_a_square_input_size_is_an_image_size():
    config = ModelConfig(input_size=(1, 24, 24))
    assert (config.input_size, config.img_size, config.in_chans) == (None, 24, 1)
    assert ModelConfig(input_size=(3, 16, 24)).image_sides == (16, 24)


@pytest.mark.parametrize("cached", [False, True])
def test_a_sample_depends_on_its_key_and_its_size_alone(folder, cached):
    config = DataConfig(data_dir=str(folder), workers=0, cache_dataset=cached)
    aug, split = AugConfig(reprob=0.5), open_splits(DataConfig(data_dir=str(folder)), "RGB", 0)[0]
    plain = make_samples(split, PREP.train_transform(aug), config, "RGB", 3)
    views = SizedSamples([resized(plain, PREP.at(size).train_transform(aug)) for size in (16, 32)])
    assert all((view.batch_transform is not None) == cached for view in views.views)
    keys = [70, 65, 121]
    for choice, size in enumerate((16, 32)):
        batch = views.__getitems__([(key, choice) for key in keys])
        images = batch[0] if cached else [image for image, _ in batch]
        alone = [views[key, choice] for key in keys]
        assert all(np.array_equal(one, np.asarray(other[0])) for one, other in zip(images, alone, strict=True))
        assert np.asarray(images[0]).shape == (3, size, size)
    assert np.array_equal(np.asarray(views[70, 1][0]), np.asarray(plain[70][0]))
    later = SizedBatches(schedule(count=60, batch=20, sizes=(8,), train_batches_per_epoch=6), EpochOrder(60, 0))
    first, again = (list(later.batches(0))[place:][:3] for place in (0, 3))
    repeated = {key % 60: key for batch in again for key, _ in batch}
    key = first[0][0][0]
    assert not np.array_equal(np.asarray(views[key, 1][0]), np.asarray(views[repeated[key % 60], 1][0]))


@pytest.fixture(scope="module")
def changing(tmp_path_factory):
    """A run with sizes and batch sizes that change, everything that draws random numbers, and all of its checkpoints."""
    words = (*SIZES, "--train-batch-sizes", 96, 64, 32, "--train-size-schedule", "progressive", "--mixup", 0.2,
             "--cutmix", 1, "--reprob", 0.2, "--model-ema", "--cache-dataset", "--grad-accum-steps", 2, "--epochs", 2,
             "--variable-batch-loss-scale", "sqrt", "--checkpoint-interval", 3, "--checkpoint-hist", 99)  # fmt: skip
    return finished_run(tmp_path_factory.mktemp("sizes"), *words, OMP_NUM_THREADS="1")


def test_a_run_with_changing_sizes(changing):
    folder, printed = changing
    assert "training images of 8 px in batches of 96, 12 px in batches of 64, 16 px in batches of 32, progressive" in printed
    rows = summary(folder)
    assert 8 < float(rows[0]["train_img_size"]) < float(rows[1]["train_img_size"]) < 16
    assert all(adds_up(row) and float(row["sfr_loss"]) > 0 for row in rows)
    done = run_validate(folder)
    assert done["input_size"] == [3, 16, 16], "validation keeps the model's size"


def run_validate(folder):
    done = run(*COMMAND, "validate", folder, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_run_with_changing_sizes_resumes_to_the_bit(changing, tmp_path):
    newest = cut(changing[0], tmp_path / "run", 4)
    assert newest["step"] > 0 and newest["epoch"] == 1, "in the midst of the second epoch"
    train("--resume", tmp_path / "run", OMP_NUM_THREADS="1")
    assert not differences(changing[0], tmp_path / "run")


def test_images_are_counted_to_resume_with_other_batches():
    """As many whole batches as the images seen fill."""
    learner = Learner.__new__(Learner)
    learner.batches = SimpleNamespace(sizes=schedule(processes=2, train_batch_sizes=(40, 32, 20, 10)))
    for step in range(len(learner.sizes) + 1):
        images = learner.images_before(1, step)
        assert learner.steps_of(1, images) == step and learner.steps_of(1, max(0, images - 1)) == max(0, step - 1)


def test_sizes_that_the_model_or_the_data_do_not_have_are_one_line(tmp_path):
    quick = ("--epochs", 1, "--device", "cpu", "--output", tmp_path, "--input-size", 3, 32, 32, "--train-img-sizes", 32, 48)
    done = train("--model", "vit_tiny_patch16_224", *quick, ok=False)
    assert "train-img-sizes: img_size: vit_tiny_patch16_224 does not take 3x48x48 images" in done.stderr
    assert "give --model-kwargs dynamic_img_size=True" in done.stderr and len(done.stderr.splitlines()) == 1


def not_square(model, shape, tmp_path):
    """A run of one epoch at this size, checked."""
    words = ("--model", model, "--input-size", *shape, "--device", "cpu", "-j", 0, "-b", 240, "--epochs", 1)
    folder, printed = finished_run(tmp_path, *words)
    assert f"{shape[1]}x{shape[2]} px" in printed
    options = yaml.safe_load((folder / "args.yaml").read_text())
    assert options["input_size"] == list(shape) and options["img_size"] is None and options["in_chans"] == shape[0]
    again = timm.create_model(f"local-dir:{folder / 'model'}", pretrained=True)
    assert timm.data.resolve_model_data_config(again)["input_size"] == shape
    assert run_validate(folder)["input_size"] == list(shape)
    return folder


def test_images_that_are_not_square_from_end_to_end(tmp_path):
    folder = not_square("resnet20_cifar", (3, 12, 20), tmp_path)
    Image.new("RGB", (30, 20)).save(tmp_path / "0.png")
    for words in (("predict", folder, tmp_path / "0.png"), ("export", folder, "--format", "torchscript"), ("report", folder)):
        done = run(*COMMAND, *words)
        assert done.returncode == 0, done.stderr
    train("--resume", folder, "--epochs", 2)
    assert len(summary(folder)) == 2
    # A size on the command line wins over the file's, also under its other name.
    done = train("--config", folder / "args.yaml", "--img-size", 16, "--output", tmp_path)
    assert "classes, 16 px" in done.stdout


def test_a_vit_is_made_for_images_that_are_not_square(tmp_path):
    not_square("test_vit", (1, 32, 64), tmp_path)


def test_taps_of_images_that_are_not_square(command):
    assert "at 3x64x96: " in command("taps", "resnet10t", "--input-size", 3, 64, 96, "-b", 2)


def test_a_teacher_sees_images_of_any_size_at_its_own():
    """Also where nothing else differs between the two."""
    model = timm.create_model("resnet20_cifar", num_classes=4)
    own = timm.data.resolve_model_data_config(model)
    prep = Preprocessing(own["input_size"], own["mean"], own["std"], own["interpolation"], own["crop_pct"])
    teacher = Teacher(model, prep, KDConfig(model_name="any"))
    images = torch.randn(2, 3, 32, 32)
    assert teacher.normalize_input(images) is images
    assert teacher.normalize_input(torch.randn(2, 3, 24, 48)).shape == images.shape
