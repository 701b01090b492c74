"""Options reach what they name: timm's transforms, the model, the loaders, the optimizer and the schedule."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from torch import nn

from timm_sfr import RunConfig, UserError
from timm_sfr.config import AugConfig, ModelConfig, OptimConfig
from timm_sfr.data.transforms import Preprocessing, check_cutmix, create_mixup, preprocessing
from timm_sfr.models.loading import new_model
from timm_sfr.training.optimizer import create_optimizer, create_schedule, learning_rate
from timm_sfr.training.run import prepare
from timm_sfr.utils.seeding import seed_cpu

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)
PREP = Preprocessing((3, 24, 24), MEAN, STD, "bilinear", 0.9)
DEFAULTS = {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "hflip": 0.5, "color_jitter": 0.4, "interpolation": "random"}
TIMMS = {"aa": "auto_augment", "train_interpolation": "interpolation"}


def pictures(count=12):
    values = np.random.default_rng(3).integers(0, 256, (count, 6, 7, 3), dtype=np.uint8)
    return [Image.fromarray(value).resize((60, 50), Image.Resampling.BICUBIC) for value in values]


def outputs(transform):
    """Its outputs for some pictures, each with random numbers of its own."""
    found = []
    for number, picture in enumerate(pictures()):
        seed_cpu(number)
        found.append(torch.as_tensor(transform(picture)).clone())
    return torch.stack(found)


@pytest.mark.parametrize(
    "option",
    [
        {"scale": (0.5, 0.6)}, {"ratio": (2.0, 2.5)}, {"hflip": 1.0}, {"vflip": 1.0}, {"color_jitter": 0.9},
        {"color_jitter_prob": 0.3}, {"grayscale_prob": 0.7}, {"gaussian_blur_prob": 0.7}, {"aa": "rand-m9-mstd0.5-inc1"},
        {"aa": "augmix-m5"}, {"train_interpolation": "bicubic"}, {"train_crop_mode": "rkrc"}, {"train_crop_mode": "rkrr"},
        {"no_aug": True},
    ],
    ids=lambda option: "-".join(f"{name}={value}" for name, value in option.items()),
)  # fmt: skip
def test_training_options_are_timms(option):
    """The same bits as timm's own transform with them, and others than without."""
    given = {**DEFAULTS, **{TIMMS.get(name, name): value for name, value in option.items()}}
    if option == {"no_aug": True}:
        given["interpolation"] = "bilinear"
    theirs = create_transform((3, 24, 24), is_training=True, use_prefetcher=True, mean=MEAN, std=STD, **given)
    ours, plain = (outputs(PREP.train_transform(AugConfig(**words))) for words in (option, {}))
    assert torch.equal(ours, outputs(theirs)) and not torch.equal(ours, plain)


@pytest.mark.parametrize("option", [{"crop_pct": 0.5}, {"interpolation": "nearest"}, {"img_size": 20}], ids=str)
def test_validation_options_are_timms(option):
    model = timm.create_model("resnet20_cifar")
    ours, plain = (preprocessing(ModelConfig(**words), model).eval_transform() for words in (option, {}))
    given = {"interpolation": "bicubic", "crop_pct": 1.0, **option}  # the model's, or the option
    size = given.pop("img_size", 32)
    theirs = create_transform((3, size, size), use_prefetcher=True, **given)
    assert torch.equal(outputs(ours), outputs(theirs))
    assert outputs(ours).shape != outputs(plain).shape or not torch.equal(outputs(ours), outputs(plain))


def random_layers(model):
    """The rates of a model's layers that are random in training."""
    return {getattr(layer, "p", getattr(layer, "drop_prob", 0.0)) for layer in model.modules()} - {0.0, None}


@pytest.mark.parametrize("name,options", [
    ("test_vit", {"drop": 0.4}), ("test_vit", {"drop_path": 0.4}), ("resnet10t", {"drop_block": 0.4}),
    ("resnet10t", {"drop": 0.4}),
])  # fmt: skip
def test_options_reach_the_models_random_layers(name, options):
    """A model in training is random with them alone."""
    (value,) = options.values()
    further = {"zero_init_last": False} if name.startswith("resnet") else None  # else blocks add 0 at first
    model, plain = (new_model(ModelConfig(model=name, model_kwargs=further, **words), 10).train() for words in (options, {}))
    assert not random_layers(plain)
    if "drop" in options:
        assert model.drop_rate == value if not random_layers(model) else value in random_layers(model)
    else:
        assert max(random_layers(model)) == pytest.approx(value, rel=0.5)
    images = torch.randn(4, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        assert not torch.equal(model(images), model(images)) and torch.equal(plain(images), plain(images))


def test_validation_has_its_own_batches_and_the_runs_precision(tmp_path):
    options = {"dataset": "digits", "model": "resnet20_cifar", "img_size": 16, "batch_size": 64, "workers": 0, "device": "cpu",
               "output": str(tmp_path), "validation_batch_size": 50, "mixed_precision": "bf16", "epochs": 1}  # fmt: skip
    trainer, seen = prepare(RunConfig.from_flat(options)), []
    trainer.exported_model().register_forward_hook(lambda _, images, logits: seen.append((len(images[0]), logits.dtype)))
    assert trainer.validate()["images"] == 360
    assert seen == [(50, torch.bfloat16)] * 7 + [(10, torch.bfloat16)]
    assert len(next(iter(trainer.batches.epoch(0)))[1]) == 64


def test_the_rate_scales_with_the_batch_as_timms_does():
    """By timm's train.py: linearly, or by the root for adaptive optimizers, unless the scale is given."""
    rate = {name: learning_rate(OptimConfig(opt=name, lr_base=0.1, lr_base_size=256), 1024) for name in ("sgd", "adamw", "lamb")}
    assert rate == pytest.approx({"sgd": 0.4, "adamw": 0.2, "lamb": 0.2})
    assert learning_rate(OptimConfig(opt="adamw", lr_base_scale="linear"), 1024) == pytest.approx(0.4)
    assert learning_rate(OptimConfig(opt="sgd", lr_base_scale="sqrt"), 64) == pytest.approx(0.05)
    assert learning_rate(OptimConfig(lr=0.3), 1024) == 0.3


def test_named_optimizer_options_win_over_its_further_ones():
    further = {"betas": (0.1, 0.2), "eps": 1.0, "amsgrad": True}
    config = OptimConfig(opt="adamw", opt_betas=(0.8, 0.95), opt_eps=1e-5, opt_kwargs=further)
    group = create_optimizer(config, nn.Linear(2, 2), 0.1).param_groups[0]
    assert (group["betas"], group["eps"], group["amsgrad"]) == ((0.8, 0.95), 1e-5, True)
    group = create_optimizer(OptimConfig(opt="adamw", opt_kwargs={"betas": (0.1, 0.2)}), nn.Linear(2, 2), 0.1).param_groups[0]
    assert group["betas"] == (0.1, 0.2)


@pytest.mark.parametrize("metric,better,worse", [("loss", 0.5, 1.5), ("top1", 90.0, 10.0)])
def test_a_plateau_lowers_the_rate_only_when_the_scores_stop_improving(metric, better, worse):
    options = OptimConfig(sched="plateau", patience_epochs=0, decay_rate=0.1, epochs=9, warmup_epochs=0, lr=1.0)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = create_schedule(options, optimizer, 3, metric)
    rates = []
    for epoch, score in enumerate((1.0 if metric == "loss" else 50.0, better, worse)):
        schedule.after_epoch(epoch, score)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1.0, 1.0, 0.1])


@pytest.mark.parametrize("shares,sides,fits", [
    ((0.3, 0.31), (16,), False), ((0.3, 0.4), (16,), True), ((0.3, 0.31), (224, 16), False), ((0.3, 0.31), (224,), True),
])  # fmt: skip
def test_cutmix_has_pixels_to_cut(shares, sides, fits):
    """Where timm's own draw would fail, one line says so before training."""
    mixup = create_mixup(AugConfig(cutmix_minmax=shares), 10)
    images = [torch.randn(2, 3, side, side) for side in sides]
    if fits:
        check_cutmix(AugConfig(cutmix_minmax=shares), sides)
        assert all(torch.isfinite(mixup(batch, torch.tensor([1, 2]))[0]).all() for batch in images)
        return
    with pytest.raises(UserError, match=r"cutmix-minmax: 0\.3 to 0\.31 of 16 pixels"):
        check_cutmix(AugConfig(cutmix_minmax=shares), sides)
    with pytest.raises(ValueError, match="low >= high"):
        mixup(images[-1], torch.tensor([1, 2]))


def test_a_run_whose_cutmix_has_no_pixels_to_cut_says_so(tmp_path):
    options = {"dataset": "digits", "img_size": 16, "cutmix_minmax": (0.3, 0.31), "output": str(tmp_path), "device": "cpu"}
    with pytest.raises(UserError, match=r"further apart, by more than 0\.06"):
        prepare(RunConfig.from_flat(options))
