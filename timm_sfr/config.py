"""The options of a run: the sections together, under flat timm-style names to the outside.

`RunConfig.from_flat` reads a flat mapping (`args.yaml`, a ``--config`` file, the command line) and `RunConfig.flat`
writes one. Option names are timm's ``train.py`` names wherever timm has one.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, ClassVar

from huggingface_hub.utils import HFValidationError, validate_repo_id

from timm_sfr.method.config import LossForm, SFRConfig
from timm_sfr.runs.scores import CLASSIFICATION, METRICS, MULTILABEL, TASKS, metrics_of
from timm_sfr.utils.errors import UserError, near_matches
from timm_sfr.utils.options import Checked, option, outside_name, plain

DEFAULT_MODEL = "resnet18"
DEFAULT_BATCH = 128
AUTO = "auto"


def is_own_folder(kind: str, name: str) -> bool:
    """Returns whether the data set ``KIND/NAME`` is a folder on this machine, and not a name that others know."""
    return name.startswith(("/", ".", "~")) or (kind in ("hfds", "hfids") and Path(name).is_dir())


@dataclass(frozen=True)
class DataConfig(Checked):
    """The data to train on."""

    data_dir: str | None = option(
        None, "path to the dataset: a folder with train/CLASS/*.jpg and val/CLASS/*.jpg, or only CLASS/*.jpg; or tars, or shards"
    )
    dataset: str | None = option(
        None,
        "timm dataset type and name, such as torch/cifar10, hfds/NAME or wds/NAME; csv/FILE is a CSV or Parquet file of image "
        "paths and labels; 'digits' is built in, and the default without data",
    )
    task: str = option(
        CLASSIFICATION, "an image's label: one class, or with multilabel any number (in csv/ and hfds/ datasets)", choices=TASKS
    )
    train_split: str = option("train", "name of the training split")
    val_split: str = option("validation", "name of the validation split")
    test_split: str | None = option(None, "third split, scored once at the end by the exported weights: the honest score")
    val_share: float | None = option(
        None,
        "share of each class's training images to validate on without a val split (default: 0.1 in a folder without any split)",
        low=0,
        high=0.9,
    )
    train_num_samples: int | None = option(None, "number of training samples, for streamed datasets", low=1)
    val_num_samples: int | None = option(None, "number of validation samples, for streamed datasets", low=1)
    test_num_samples: int | None = option(None, "number of test samples, for streamed datasets", low=1)
    dataset_download: bool = option(False, "let torch/ datasets download themselves")
    class_map: str | None = option(None, "path to a class-to-index mapping file")
    input_img_mode: str | None = option(None, "image mode to convert to (default: RGB, or L for one channel)")
    exif: bool = option(True, "turn images upright by their EXIF orientation (timm does not)")
    image_background: tuple[int, ...] = option((255, 255, 255), "RGB colour, 0 to 255, that transparent images are laid on")
    image_range: tuple[float, ...] | None = option(
        None,
        "values that become black and white in images of more than 8 bits (default: 0 65535 for 16 bits, 0 1 for floats in that "
        "range, otherwise each image's smallest and largest value)",
    )
    input_key: str | None = option(
        None,
        "key of the image in hfds/ and wds/ datasets; column of the paths in csv/ (default: image, path, file or file_name); "
        "endings of images in folders, such as '.png;.jpg'",
    )
    target_key: str | None = option(
        None,
        "key of the label in hfds/ and wds/ datasets; its column in csv/ (default: label, class or target); with --task "
        "multilabel also several columns of 0 and 1, such as 'cat,dog'",
    )
    dataset_trust_remote_code: bool = option(False, "let hfds/ and hfids/ run their repository's code (old versions of datasets)")
    batch_size: int | str | None = option(
        None,
        "training batch size per process, or auto: the largest power of two that fits the GPU (default: 128, or the largest "
        "power of two that a smaller set fills)",
        short="-b",
        low=1,
    )
    validation_batch_size: int | None = option(None, "validation batch per process (default: training's)", short="-vb", low=1)
    workers: int | None = option(
        None, "data loading processes per process (default: 4, or the CPU cores if fewer)", short="-j", low=0
    )
    epoch_repeats: float = option(0.0, "passes over the images in one epoch, each augmented anew (0: one)", low=0)
    sampler: str = option(
        "shuffle", "an epoch: every image once; or as many images, of each class equally many", choices=("shuffle", "balanced")
    )
    on_bad_image: str = option(
        "stop", "if an image does not decode: stop, or skip it and use the next one of its class", choices=("stop", "skip")
    )
    cache_dataset: bool = option(False, "decode every image once, at the start, and keep all in memory: for sets of small images")
    pin_mem: bool = option(False, "pin memory for faster copies to the GPU")

    def check(self) -> None:
        """Checks the splits, the batch size's word, the colour and the range, and that no epoch is a part of one."""
        if not self.val_split:
            raise UserError("val-split: expected a name, because the best epoch is chosen there; got an empty word; "
                            "--val-interval makes validation rarer")  # fmt: skip
        if isinstance(self.batch_size, str) and self.batch_size != AUTO:
            raise UserError(f"batch_size: expected a number or {AUTO}; got {self.batch_size!r}")
        for name in ("train_split", "test_split"):
            if getattr(self, name) == "":
                raise UserError(f"{name}: expected the name of a split; got an empty word; leave the option out")
        _check_repeats(self.epoch_repeats, "epoch_repeats")
        if len(self.image_background) != 3 or any(not 0 <= part <= 255 for part in self.image_background):
            raise UserError(f"image_background: expected three numbers from 0 to 255; got {self.image_background}")
        if self.image_range is not None and (len(self.image_range) != 2 or not self.image_range[0] < self.image_range[1]):
            raise UserError(f"image_range: expected two numbers, smaller first; got {self.image_range}")
        if self.test_split is None and self.test_num_samples is not None:
            raise UserError("test-num-samples: it is for a test split; give --test-split too")
        if self.multilabel and self.sampler == "balanced":
            raise UserError("sampler: balanced needs images of one class each, and --task multilabel has several; leave it out")
        for what, name in (("training", self.train_split), ("validation", self.val_split)):
            if self.test_split == name:
                raise UserError(f"test-split: {name!r} is the {what} split; expected another, whose images are only tested on")

    @property
    def listed(self) -> bool:
        """Whether its files are listed by this package, which writes nothing: not timm's readers of tars and downloads."""
        places = (self.data_dir, self.train_split, self.val_split, self.test_split)
        tars = any(str(place).endswith(".tar") for place in places)
        return (self.dataset or "").lower().partition("/")[0] in ("", "folder", "digits", "csv") and not tars

    @property
    def multilabel(self) -> bool:
        """Whether an image has any number of classes."""
        return self.task == MULTILABEL

    def split(self, part: str) -> str:
        """Returns the name of the split for a part of the data: train, val or test."""
        return getattr(self, f"{part}_split") or ""

    def num_samples(self, part: str) -> int | None:
        """Returns the given number of samples of a part of the data: train, val or test."""
        return getattr(self, f"{part}_num_samples")

    def public_name(self) -> str | None:
        """Returns the dataset's type and name, or the folder's name; without the local path to a file or folder."""
        kind, _, name = (self.dataset or "").partition("/")
        if self.dataset is None:
            return self.data_dir and (PurePath(self.data_dir).name or self.data_dir)
        if kind == "csv":
            return f"{kind}/{PurePath(name).name}"
        return f"{kind}/./{PurePath(name).name}" if is_own_folder(kind, name) else self.dataset

    @property
    def batch_or_default(self) -> int:
        """The batch size, or the default also where ``auto`` has yet to find one: both are powers of two."""
        return DEFAULT_BATCH if self.batch_size == AUTO else self.batch

    @property
    def batch(self) -> int:
        """The batch size, or the default.

        Raises:
            UserError: if it is ``auto`` and has not been resolved: only training on data with an index can do that.
        """
        if isinstance(self.batch_size, str):
            raise UserError(f"batch-size: {AUTO} is for training on data with an index; give a number here")
        return self.batch_size or DEFAULT_BATCH


@dataclass(frozen=True)
class ModelConfig(Checked):
    """The model, and its input."""

    model: str | None = option(
        None, "any timm name, a run's folder, or hf-hub:USER/NAME (default: resnet18; resnet20_cifar on the digits)"
    )
    pretrained: bool = option(False, "start from timm's pretrained weights")
    pretrained_path: str | None = option(
        None, "with --pretrained: load this file of weights as if timm published it, with timm's adaptation to the model"
    )
    initial_checkpoint: str | None = option(None, "load these weights into the model before training")
    num_classes: int | None = option(None, "number of classes (default: as in the dataset)", low=2)
    img_size: int | None = option(None, "image size in pixels (default: the model's)", low=1)
    input_size: tuple[int, ...] | None = option(
        None, "channels, height and width of the images, such as 3 192 256, in place of --img-size and --in-chans"
    )
    in_chans: int | None = option(None, "image channels (default: 3)", low=1)
    mean: tuple[float, ...] | None = option(None, "channel means for normalisation (default: the model's)")
    std: tuple[float, ...] | None = option(None, "channel deviations for normalisation (default: the model's)")
    interpolation: str | None = option(None, "resize interpolation for validation (default: the model's)")
    crop_pct: float | None = option(None, "centre crop share for validation (default: the model's)", low=0)
    gp: str | None = option(None, "global pooling, such as avg, max or avgmax (default: the model's)")
    drop: float | None = option(None, "dropout rate", low=0, high=1)
    drop_path: float | None = option(None, "stochastic depth rate", low=0, high=1)
    drop_block: float | None = option(None, "DropBlock rate, for models that have it", low=0, high=1)
    bn_momentum: float | None = option(None, "BatchNorm's momentum, for EfficientNet's kin (default: the model's)", low=0, high=1)
    bn_eps: float | None = option(None, "BatchNorm's epsilon, for EfficientNet's kin (default: the model's)", low=0)
    head_init_scale: float | None = option(None, "multiply the classifier's initial weights and biases by this")
    head_init_bias: float | None = option(None, "initial value of the classifier's biases")
    model_kwargs: dict | None = option(
        None, "further model arguments as KEY=VALUE; values are Python's, such as img_size=(48,64), or else text"
    )
    fast_norm: bool = option(False, "compute normalisation layers at the lower precision under mixed precision, as timm can")
    grad_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    channels_last: bool = option(False, "use the channels_last memory layout")
    split_bn: bool = option(False, "separate BatchNorm layers for each view of --aug-splits; those of the first are exported")
    model_dtype: str | None = option(
        None, "type of the weights, without mixed precision (default: float32)", choices=("float32", "bfloat16", "float16")
    )

    @property
    def keeps_pretrained(self) -> bool:
        """Whether training starts from the model's own pretrained weights; an `initial_checkpoint` replaces them."""
        return self.pretrained and not self.initial_checkpoint

    @property
    def low_precision(self) -> bool:
        """Whether the weights themselves have 16 bits."""
        return self.model_dtype not in (None, "float32")

    def check(self) -> None:
        """Checks that a file of pretrained weights is used, and `input_size` against the options that it replaces.

        Sets those options: a square size is kept as img_size alone.
        """
        if self.pretrained_path is not None and not self.pretrained:
            raise UserError("pretrained-path: it is used with --pretrained only; give that too, or --initial-checkpoint")
        if self.input_size is None:
            return
        if len(self.input_size) != 3 or min(self.input_size) < 1:
            raise UserError(f"input_size: expected channels, height and width, such as 3 192 256; got {self.input_size}")
        channels, height, width = self.input_size
        for name, same in (("in_chans", self.in_chans == channels), ("img_size", self.img_size == height == width)):
            if getattr(self, name) is not None and not same:
                raise UserError(
                    f"input_size: expected a size that agrees with {name} {getattr(self, name)}; got {self.input_size}; give "
                    "one of the two"
                )
        object.__setattr__(self, "in_chans", channels)
        if height == width:
            object.__setattr__(self, "img_size", height)
            object.__setattr__(self, "input_size", None)

    @property
    def image_sides(self) -> tuple[int, int] | None:
        """Height and width of the images, if they are given."""
        if self.input_size is not None:
            return self.input_size[1], self.input_size[2]
        return None if self.img_size is None else (self.img_size, self.img_size)


@dataclass(frozen=True)
class AugConfig(Checked):
    """Training augmentation, by timm and torchvision."""

    no_aug: bool = option(False, "turn all training augmentation off")
    train_crop_mode: str | None = option(None, "random crop mode", choices=("rrc", "rkrc", "rkrr"))
    scale: tuple[float, ...] = option((0.08, 1.0), "random resize scale")
    ratio: tuple[float, ...] = option((3 / 4, 4 / 3), "random resize aspect ratio")
    crop_padding: int | None = option(
        None,
        "resize to the training size, pad with this many black pixels, and crop at random; replaces resized crops (CIFAR: 4)",
        low=1,
    )
    hflip: float = option(0.5, "horizontal flip probability", low=0, high=1)
    vflip: float = option(0.0, "vertical flip probability", low=0, high=1)
    color_jitter: float = option(0.4, "colour jitter factor", low=0)
    color_jitter_prob: float | None = option(None, "probability of any colour jitter (default: always)", low=0, high=1)
    grayscale_prob: float | None = option(None, "probability of turning an image grey (default: never)", low=0, high=1)
    gaussian_blur_prob: float | None = option(None, "probability of blurring an image (default: never)", low=0, high=1)
    aa: str | None = option(None, "AutoAugment policy, such as rand-m9-mstd0.5-inc1")
    reprob: float = option(0.0, "random erase probability", low=0, high=1)
    remode: str = option("pixel", "random erase mode", choices=("const", "rand", "pixel"))
    recount: int = option(1, "random erase count", low=1)
    resplit: bool = option(
        False, "erase nothing in the first view of --aug-splits (without --aug-splits: in the first half of a batch)"
    )
    aug_repeats: float = option(0.0, "how often an image is in an epoch, augmented anew; the length stays (0: once)", low=0)
    aug_splits: int = option(
        0, "views of each image in a batch: the first one cropped and flipped, the others also augmented; 0 or 2 and more", low=0
    )
    train_interpolation: str = option("random", "training interpolation; empty: as in validation")
    mixup: float = option(0.0, "mixup alpha, on if > 0", low=0)
    cutmix: float = option(0.0, "CutMix alpha, on if > 0", low=0)
    cutmix_minmax: tuple[float, ...] | None = option(None, "CutMix min and max ratio, overrides alpha")
    mixup_prob: float = option(1.0, "probability of mixing a batch", low=0, high=1)
    mixup_switch_prob: float = option(0.5, "probability of CutMix over mixup when both are on", low=0, high=1)
    mixup_mode: str = option("batch", "how mixing parameters are drawn", choices=("batch", "pair", "elem"))
    mixup_off_epoch: int = option(0, "no mixing from this epoch on, 0 for never", low=0)

    def check(self) -> None:
        """Checks that ranges are pairs, smaller number first, and that views and repeats are possible."""
        _check_repeats(self.aug_repeats, "aug_repeats")
        if self.aug_splits == 1:
            raise UserError("aug_splits: expected 0, or 2 or more views of each image; got 1")
        if self.aug_splits and (self.mixes or self.no_aug):
            other = "mixup and CutMix" if self.mixes else "no_aug"
            raise UserError(f"aug_splits: views of an image do not go with {other}; leave out one of the two")
        for name in ("scale", "ratio", "cutmix_minmax"):
            value = getattr(self, name)
            if value is not None and (len(value) != 2 or not 0 < value[0] <= value[1]):
                raise UserError(f"{name}: expected two positive numbers, smaller first; got {value}")
        for name in self.changed() if self.crop_padding is not None else ():
            if name in ("no_aug", "train_crop_mode", "scale", "ratio", "train_interpolation"):
                raise UserError(f"crop_padding: it does not go with {name}; leave out one of the two")
        low, high = self.cutmix_minmax or (0, 1)
        if not low < high <= 1:
            raise UserError(f"cutmix_minmax: expected two different shares up to 1, smaller first; got {self.cutmix_minmax}")

    @property
    def mixes(self) -> bool:
        """Whether mixup or CutMix is on."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None


def _check_repeats(times: float, name: str) -> None:
    """Raises UserError for a part of a repeat."""
    if 0 < times < 1:
        raise UserError(f"{name}: expected 0, or a number of at least 1; got {times:g}")


@dataclass(frozen=True)
class LossConfig(Checked):
    """The loss on the labels, by timm; docs/method.md says how SFR goes with each form."""

    bce_loss: bool = option(False, "binary cross-entropy of every class, in place of cross-entropy")
    bce_sum: bool = option(False, "sum it over the classes (default: their mean)")
    bce_target_thresh: float | None = option(None, "make its smoothed or mixed targets 1 above this, else 0", low=0, high=1)
    bce_pos_weight: float | None = option(None, "weight of its positive part (default: 1)", low=0)
    jsd_loss: bool = option(
        False, "cross-entropy on the first view of --aug-splits, and 12 times the Jensen-Shannon divergence of all"
    )
    class_weights: str | None = option(
        None,
        "weigh each image's loss by its class: 'auto', inversely to the class's number of training images; or a YAML, CSV or "
        "text file of class names (or indices) and weights",
    )

    def check(self) -> None:
        """Checks that there is only one loss."""
        if self.bce_loss and self.jsd_loss:
            raise UserError("jsd_loss: it has cross-entropy in it; leave out --bce-loss, or --jsd-loss")

    def form(self, splits: int, class_weights: tuple[float, ...] | None, multi_label: bool = False) -> LossForm:
        """Returns the form of the loss, for `splits` views of each image and a weight for each class, if given."""
        bce, views = self.bce_loss or multi_label, splits if self.jsd_loss else 0
        return LossForm(bce, self.bce_sum, self.bce_target_thresh, self.bce_pos_weight, views, class_weights, multi_label)


@dataclass(frozen=True)
class SizeConfig(Checked):
    """Training images whose size changes from batch to batch, by timm's schedule; validation keeps the model's size."""

    train_img_sizes: tuple[int, ...] | None = option(None, "sizes of square training images; each batch has one of them")
    train_batch_sizes: tuple[int, ...] | None = option(
        None, "batch size per process for each of --train-img-sizes (default: --batch-size for all)", low=1
    )
    train_size_probs: tuple[float, ...] | None = option(None, "share of batches for each of --train-img-sizes (default: equal)")
    train_size_schedule: str = option(
        "constant", "how sizes come: in constant shares, or from the first to the last", choices=("constant", "progressive")
    )
    train_size_schedule_spread: float = option(
        0.65, "how many neighbouring sizes the progressive schedule mixes (a standard deviation); 0 for none", low=0
    )
    train_size_random_mix: float = option(
        0.1, "share of the progressive schedule's batches whose size is any, with equal shares", low=0, high=1
    )
    train_batches_per_epoch: int | None = option(
        None, "batches an epoch with --train-img-sizes (default: for all images)", short="--train-steps-per-epoch", low=1
    )
    variable_batch_loss_scale: str = option(
        "none", "how gradients scale with a batch's size relative to the mean", choices=("none", "sqrt", "linear")
    )

    def check(self) -> None:
        """Checks that the options agree with the number of sizes, and that there are sizes at all."""
        sizes = self.train_img_sizes
        if sizes is None:
            changed = self.changed()
            if changed:
                raise UserError(f"{changed[0]}: it is for images whose size changes; give --train-img-sizes too")
            return
        if not sizes or min(sizes) < 1:
            raise UserError(f"train_img_sizes: expected sizes in pixels, such as 128 160 192; got {sizes}")
        for name in ("train_batch_sizes", "train_size_probs"):
            values = getattr(self, name)
            if values is not None and len(values) != len(sizes):
                raise UserError(f"{name}: expected {len(sizes)} numbers, one for each of train_img_sizes; got {len(values)}")
        shares = self.train_size_probs or (1.0,)
        if not (all(share >= 0 for share in shares) and sum(shares) > 0):
            raise UserError(f"train_size_probs: expected shares from 0 on, not all 0; got {self.train_size_probs}")
        progressive = self.train_size_schedule == "progressive"
        if not progressive and (self.train_size_schedule_spread, self.train_size_random_mix) != (0.65, 0.1):
            raise UserError("train_size_schedule_spread and train_size_random_mix: they are for --train-size-schedule "
                            "progressive; give that too")  # fmt: skip
        if progressive and len(sizes) < 2:
            raise UserError(f"train_size_schedule: progressive needs two sizes or more; got {sizes}")


@dataclass(frozen=True)
class OptimConfig(Checked):
    """Optimizer, schedule, length and averaging, all by timm."""

    epochs: int = option(100, "epochs to train (20 on the digits)", low=1)
    start_epoch: int | None = option(None, "epoch, counted from 0, at which a new run begins in the schedule", low=0)
    stop_epoch: int | None = option(
        None, "stop after this many epochs; the schedule stays that of --epochs; --resume RUN --stop-epoch MORE continues", low=1
    )
    opt: str = option("sgd", "optimizer, any of timm's")
    lr: float | None = option(None, "learning rate; overrides lr-base unless it is 0", low=0)
    lr_base: float = option(0.1, "base rate: lr = lr_base * global_batch / lr_base_size (square root for adaptive ones)", low=0)
    lr_base_size: int = option(256, "batch size that lr-base is meant for", low=1)
    lr_base_scale: str | None = option(None, "how lr scales with the batch (default: by optimizer)", choices=("linear", "sqrt"))
    momentum: float = option(0.9, "momentum", low=0, high=1)
    weight_decay: float = option(5e-4, "weight decay", low=0)
    opt_eps: float | None = option(None, "optimizer epsilon")
    opt_betas: tuple[float, ...] | None = option(None, "optimizer betas")
    opt_kwargs: dict | None = option(None, "further optimizer arguments as KEY=VALUE, with values as in --model-kwargs")
    layer_decay: float | None = option(None, "layer-wise learning rate decay")
    layer_decay_min_scale: float = option(0.0, "smallest factor of that decay", low=0)
    layer_decay_no_opt_scale: float | None = option(None, "layers whose factor is smaller than this are not trained")
    clip_grad: float | None = option(None, "gradient clipping value", low=0)
    clip_mode: str = option("norm", "gradient clipping mode", choices=("norm", "value", "agc"))
    grad_accum_steps: int = option(1, "batches per update", low=1)
    sched: str = option("cosine", "learning rate schedule, any of timm's")
    sched_on_updates: bool = option(True, "step the schedule every update rather than every epoch")
    warmup_epochs: int | None = option(None, "epochs of linear warm-up (default: a fifth of the epochs, at most 5)", low=0)
    warmup_lr: float = option(1e-5, "learning rate where the warm-up starts")
    warmup_prefix: bool = option(False, "do not count the warm-up in the schedule")
    min_lr: float = option(0.0, "lowest learning rate", low=0)
    cooldown_epochs: int = option(0, "epochs at min-lr after the schedule", low=0)
    decay_epochs: float | None = option(
        None, "epochs between decays of step (default: 90); epochs or share of the final decay of wsd and rsqrt (default: 0.2)"
    )
    decay_milestones: tuple[int, ...] = option((90, 180, 270), "epochs of the multistep schedule's decays")
    decay_rate: float = option(0.1, "decay rate of step, multistep and poly")
    patience_epochs: int = option(10, "patience of the plateau schedule; --patience is what stops a run")
    patience: int | None = option(
        None, "stop at the first validation that is this many epochs after the best one by --eval-metric (default: never)", low=1
    )
    lr_decay_fn: str | None = option(None, "form of the final decay of wsd (default: 1-sqrt) and rsqrt (default: linear)")
    lr_stable_timescale: float | None = option(None, "timescale of rsqrt in epochs (default: the warm-up)")
    lr_noise: tuple[float, ...] | None = option(None, "shares of the schedule where noise on the learning rate begins and ends")
    lr_noise_pct: float = option(0.67, "largest noise, as a share of the learning rate")
    lr_noise_std: float = option(1.0, "standard deviation of that noise")
    lr_cycle_mul: float = option(1.0, "factor from the length of one cycle to that of the next", low=0.01)
    lr_cycle_decay: float = option(0.5, "factor from the learning rate of one cycle to that of the next")
    lr_cycle_limit: int = option(1, "cycles of cosine, tanh and poly; each is a whole schedule", low=1)
    lr_k_decay: float = option(1.0, "k-decay of cosine and poly")
    model_ema: bool = option(False, "keep an exponential moving average of the weights, and evaluate and export it")
    model_ema_decay: float = option(0.9998, "decay of that average", low=0, high=1)
    model_ema_warmup: bool = option(False, "raise that decay from a small one, to forget the initial weights soon")
    model_ema_force_cpu: bool = option(False, "keep that average on the CPU, to save memory of the GPU (one process only)")

    def check(self) -> None:
        """Checks what bounds alone do not."""
        if self.decay_epochs is not None and not self.decay_epochs > 0:
            raise UserError(f"decay_epochs: expected more than 0; got {self.decay_epochs}")
        if self.opt_betas is not None and len(self.opt_betas) < 2:
            raise UserError(f"opt_betas: expected two numbers or more; got {self.opt_betas}")
        if self.lr_noise is not None and len(self.lr_noise) not in (1, 2):
            raise UserError(f"lr_noise: expected a share where the noise begins, and one where it ends; got {self.lr_noise}")
        if not self.lr_noise_pct > 0 or not self.lr_noise_std > 0:
            raise UserError(
                f"lr_noise_pct and lr_noise_std: expected more than 0; got {self.lr_noise_pct} and {self.lr_noise_std}"
            )
        if self.layer_decay is not None and not self.layer_decay > 0:
            raise UserError(f"layer_decay: expected more than 0, usually 0.5 to 0.9; got {self.layer_decay}")
        if self.model_ema_force_cpu and not self.model_ema:
            raise UserError("model-ema-force-cpu: it is for the moving average; give --model-ema too")


@dataclass(frozen=True)
class EngineConfig(Checked):
    """How the run is carried out, and where it is written."""

    output: str = option("output/train", "folder of all runs")
    experiment: str | None = option(None, "name of this run's folder (default: time and model)")
    seed: int = option(42, "random seed", low=0, high=2**32 - 1)  # NumPy takes no more
    device: str | None = option(None, "cpu to leave the GPU alone, cuda to need one, cuda:1 for the second")
    mixed_precision: str | None = option(
        None,
        "compute precision (default: what accelerate is configured for); amp, as --amp: fp16 on a GPU, bf16 on a CPU",
        choices=("no", "fp16", "bf16", "amp"),
    )
    torchcompile: str | None = option(None, "compile the model with this backend (inductor when given no name)")
    torchcompile_mode: str | None = option(
        None, "mode of --torchcompile", choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
    )
    synchronize_step: bool = option(False, "wait for the GPU after every update, for exact times of single updates")
    sync_bn: bool = option(False, "synchronise BatchNorm over processes (GPUs only)")
    dist_bn: str = option(
        "reduce", "what to do with processes' BatchNorm statistics after an epoch", choices=("reduce", "broadcast", "none")
    )
    ddp_bb: bool = option(True, "before each step, give all processes the BatchNorm statistics of the first one")
    log_interval: int = option(50, "without a terminal: batches between checks whether to print a progress line", low=1)
    json_logs: bool = option(False, "every line on standard output is one JSON object (docs/logs.md)")
    report_to: tuple[str, ...] = option(
        ("none",), "where an epoch's figures go too, one or more", choices=("none", "tensorboard", "wandb", "trackio")
    )
    wandb_project: str | None = option(None, "project in Weights & Biases (default: WANDB_PROJECT, or timm_sfr)")
    wandb_tags: tuple[str, ...] = option((), "tags of the run in Weights & Biases")
    wandb_resume_id: str | None = option(None, "with --resume: id of the Weights & Biases run to continue (default: this run's)")
    save_images: bool = option(
        False,
        "write the batch as trained on to RUN/train-batch-BATCH.jpg every --log-interval batches and at the end of an epoch",
    )
    val_interval: int = option(1, "epochs between validations", low=1)
    report_interval: int | None = option(
        None, "epochs between refreshes of RUN/report.html (default: as often as 2 % of the time allows; 0: no report)", low=0
    )
    checkpoint_hist: int = option(2, "resumable checkpoints to keep, beside the best one's", low=1)
    checkpoint_interval: int | None = option(None, "updates between checkpoints (default: one after every epoch only)", low=0)
    save_epochs: tuple[int, ...] | None = option(None, "also keep the checkpoints written after these epochs")
    resume_opt: bool = option(True, "resume the optimizer's state with the weights (--no-resume-opt: it starts anew)")
    on_nonfinite: str = option("stop", "if a loss or gradient is not finite: stop, or skip the update", choices=("stop", "skip"))
    on_full_disk: str = option(
        "stop", "if a checkpoint does not fit on the disk: stop, or skip it and continue", choices=("stop", "skip")
    )
    eval_metric: str | None = option(
        None, "what the best model is chosen by (default: top1; with --task multilabel: map)", choices=METRICS
    )
    multilabel_threshold: float = option(
        0.5, "with --task multilabel: probability from which on a class is predicted, for the F1 scores", low=0, high=1
    )
    tta: int = option(
        0,
        "test-time augmentation: score the mean logits of N views too: 2 (as it is and mirrored), 5 (corners and centre) or 10 "
        "(those and mirrored); for timm-sfr validate alone",
    )

    def check(self) -> None:
        """Checks the device, the number of views, and that options which need another have it."""
        if not 0 < self.multilabel_threshold < 1:
            raise UserError(f"multilabel_threshold: expected a value between 0 and 1; got {self.multilabel_threshold}")
        if self.tta not in (0, 1, 2, 5, 10):
            raise UserError(f"tta: expected 0 (none), 2, 5 or 10 views of an image; got {self.tta}")
        if self.device is not None and not re.fullmatch(r"[a-z]+(:\d+)?", self.device):
            raise UserError(f"device: expected cpu, cuda, or cuda:NUMBER; got {self.device!r}")
        if not self.ddp_bb and self.dist_bn == "none":
            raise UserError("no-ddp-bb: each process then has BatchNorm statistics of its own, and --dist-bn reduce or broadcast "
                            "has to bring them together after an epoch; got --dist-bn none")  # fmt: skip
        if self.torchcompile_mode is not None and self.torchcompile is None:
            raise UserError("torchcompile-mode: it is for --torchcompile; give that too")
        if "wandb" not in self.report_to and (self.wandb_project or self.wandb_tags or self.wandb_resume_id):
            raise UserError("wandb-project, wandb-tags, wandb-resume-id: they are for --log-wandb; give that too")


def in_words(distill_type: str, token_distill_type: str) -> tuple[str, bool]:
    """Returns a kind of distillation in words, and whether it has a temperature."""
    kind = f"{token_distill_type} token" if distill_type == "token" else distill_type
    return kind, kind not in ("hard token", "feature")


@dataclass(frozen=True)
class KDConfig(Checked):
    """A teacher beside SFR (with --no-sfr: alone), as timm's knowledge distillation has it."""

    prefix: ClassVar[str] = "kd_"

    model_name: str | None = option(
        None, "the teacher: a run's folder, hf-hub:USER/NAME, a zoo name, or any timm name, of the same classes"
    )
    distill_type: str = option(
        "logit",
        "what is distilled: logits, features before the classifier, or logits into a student's distillation head "
        "(deit_*_distilled_*)",
        choices=("logit", "feature", "token"),
    )
    loss_type: str = option("kl", "loss of logit distillation", choices=("kl",))
    distill_loss_weight: float | None = option(
        None, "weight of the distillation loss (default: 1, or 1 minus --task-loss-weight)", name="distill_loss_weight", low=0
    )
    task_loss_weight: float | None = option(None, "classification loss's weight (default: 1)", name="task_loss_weight", low=0)
    temperature: float = option(4.0, "temperature of the softmax in distillation")
    token_distill_type: str = option(
        "soft", "token distillation: KL divergence, or cross-entropy with the teacher's argmax", choices=("soft", "hard")
    )

    student_feature_dim: int | None = option(None, "width of the student's features (default: measured)", low=1)
    teacher_feature_dim: int | None = option(None, "width of the teacher's features (default: measured)", low=1)

    def check(self) -> None:
        """Checks that the options fit a teacher, and that there is one."""
        changed = self.changed()
        if self.model_name is None and changed:
            raise UserError(f"{changed[0].replace('_', '-')}: it needs a teacher; give --kd-model-name too")
        if self.model_name is not None and not self.model_name.strip():
            raise UserError("kd-model-name: expected the name or the folder of a teacher; got an empty word")
        if not self.temperature > 0:
            raise UserError(f"kd-temperature: expected more than 0; got {self.temperature}")
        if self.distill_loss_weight is None and (self.task_loss_weight or 0) > 1:
            raise UserError(
                "task-loss-weight: expected at most 1, because the distillation gets 1 minus this weight; got "
                f"{self.task_loss_weight:g}; give --distill-loss-weight too, or a smaller one"
            )
        if self.token_distill_type != "soft" and self.distill_type != "token":
            raise UserError("kd-token-distill-type: it is for --kd-distill-type token")
        if self.distill_type != "feature" and {self.student_feature_dim, self.teacher_feature_dim} != {None}:
            raise UserError("kd-student-feature-dim and kd-teacher-feature-dim: they are for --kd-distill-type feature")


@dataclass(frozen=True)
class HubConfig(Checked):
    """Publishing on the Hugging Face Hub, and what a model's files say of its weights."""

    prefix: ClassVar[str] = "hub_"

    push_to_hub: str | None = option(None, "publish the best model as USER/NAME on the Hub after training", name="push_to_hub")
    private: bool = option(False, "create that repository as private; an existing public one is refused")
    revision: str | None = option(None, "branch to publish on (default: main)")
    license: str | None = option(
        None,
        "licence of the weights (default: apache-2.0, or the pretrained weights'; none if a teacher's is not permissive)",
    )
    tag: str | None = option(None, "timm tag of the weights (default: sfr_DATASET)")
    dataset: str | None = option(None, "id of the dataset on the Hub, for the model card (default: its name)")

    def check(self) -> None:
        """Checks that the repository is USER/NAME."""
        if self.push_to_hub is not None:
            check_repo_id(self.push_to_hub, "push-to-hub")
        elif self.private or self.revision:
            raise UserError("push-to-hub: --hub-private and --hub-revision are for a push; give --push-to-hub USER/NAME too")
        check_branch(self.revision, "hub-revision")


def check_branch(name: str | None, option: str) -> None:
    """Raises UserError if `name` is not a valid branch name; None is allowed."""
    if name is not None and (
        not re.fullmatch(r"(?![/.-])[^\s~^:?*\[\\@\x00-\x20\x7f]+(?<![/.])", name) or ".." in name or "//" in name
    ):
        raise UserError(f"{option}: expected the name of a branch, without blanks and without ~^:?*[@; got {name!r}")


def check_repo_id(repo_id: str, option: str) -> str:
    """Returns `repo_id` unchanged.

    Raises:
        UserError: unless the Hub takes it as USER/NAME.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = str(error).split(":")[0].rstrip(".")
        raise UserError(f"{option}: expected USER/NAME; got {repo_id!r}: {reason}") from error
    if repo_id.count("/") != 1:
        raise UserError(f"{option}: expected USER/NAME; got {repo_id!r}")
    return repo_id


@dataclass(frozen=True)
class RunConfig:
    """A whole run: one section per concern. `from_flat` makes one; of no options, the run on the digits.

    Attributes:
        data: What is trained on.
        model: Which model, at which input.
        aug: Training augmentation.
        loss: The loss on the labels.
        sizes: Training image sizes that change.
        optim: Optimizer, schedule, length and averaging.
        sfr: Self-Feature Regularization.
        teacher: A teacher beside it.
        engine: How the run is carried out and where it is written.
        hub: Publishing on the Hugging Face Hub.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    aug: AugConfig = field(default_factory=AugConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    sizes: SizeConfig = field(default_factory=SizeConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sfr: SFRConfig = field(default_factory=SFRConfig)
    teacher: KDConfig = field(default_factory=KDConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    hub: HubConfig = field(default_factory=HubConfig)

    def __post_init__(self) -> None:
        if self.data.batch_size == AUTO and self.sizes.train_batch_sizes is not None:
            raise UserError(f"train_batch_sizes: they do not go with --batch-size {AUTO}; leave out one of the two")
        batches = self.sizes.train_batch_sizes or (self.data.batch_or_default,)
        odd = [batch for batch in batches if batch % 2]
        if self.aug.mixes and odd:
            name = "batch-size" if self.sizes.train_batch_sizes is None else "train-batch-sizes"
            raise UserError(f"{name}: mixup and CutMix pair samples and need an even size; got {odd[0]}")
        self._check_views()
        self._check_precision()
        self._check_task()

    def _check_task(self) -> None:
        """Checks that the other options go with the task, and sets the metric that chooses the best model."""
        engine, loss, task = self.engine, self.loss, self.data.task
        multilabel = self.data.multilabel
        for name in ("bce_sum", "bce_target_thresh", "bce_pos_weight"):
            if getattr(loss, name) not in (None, False) and not (loss.bce_loss or multilabel):
                raise UserError(f"{name}: it is for binary cross-entropy; give --bce-loss too, or leave the option out")
        known = metrics_of(task)
        if engine.eval_metric is None:
            object.__setattr__(self, "engine", dataclasses.replace(engine, eval_metric=known[0]))
        elif engine.eval_metric not in known:
            raise UserError(
                f"eval_metric: expected one of {', '.join(known)}, the scores of --task {task}; got {engine.eval_metric!r}"
            )
        if not multilabel:
            if engine.multilabel_threshold != EngineConfig().multilabel_threshold:
                raise UserError("multilabel-threshold: it is for --task multilabel; give that too, or leave the option out")
            return
        lone = "several classes of an image have no"
        for name, given, why in (
            ("jsd_loss", loss.jsd_loss, "the Jensen-Shannon divergence compares distributions over classes"),
            ("class_weights", loss.class_weights is not None, "an image has several classes; --bce-pos-weight weighs positives"),
            ("kd_model_name", self.teacher.model_name is not None, "a teacher's classes exclude each other"),
            ("sfr_smoothing_source", self.sfr.smoothing_source == "classes", f"{lone} mean prediction"),
            ("sfr_smoothing_schedule", self.sfr.smoothing_schedule == "confidence", f"{lone} confidence in one class"),
        ):
            if given:
                raise UserError(f"{name}: it does not go with --task multilabel: {why}; leave the option out")

    @property
    def threshold(self) -> float | None:
        """The probability from which on a class is predicted, if an image may have several; else None."""
        return self.engine.multilabel_threshold if self.data.multilabel else None

    def _check_precision(self) -> None:
        """Checks that weights of 16 bits go with the other options."""
        if self.model.low_precision and self.engine.mixed_precision not in (None, "no"):
            raise UserError(
                f"model-dtype: {self.model.model_dtype} weights go without mixed precision, and float32 ones with it; "
                "leave out one of the two"
            )
        if self.model.low_precision and self.teacher.model_name is not None:
            raise UserError(f"model-dtype: a teacher computes in float32, not in {self.model.model_dtype}; use --amp instead")

    def _check_views(self) -> None:
        """Checks that views and their BatchNorm go with the other options."""
        splits, batch = self.aug.aug_splits, self.data.batch_or_default
        if splits and self.sizes.train_img_sizes is not None:
            raise UserError("aug_splits: views of an image do not go with train_img_sizes; leave out one of the two")
        if self.loss.jsd_loss and not splits:
            raise UserError("jsd_loss: it compares views of an image, and there is one; give --aug-splits 3 too")
        if self.loss.jsd_loss and self.teacher.model_name is not None:
            raise UserError("jsd_loss: it does not go with a teacher; leave out --jsd-loss, or --kd-model-name")
        if self.model.split_bn and not (splits or self.aug.resplit):
            raise UserError("split_bn: it is for parts of a batch that are augmented differently; give --aug-splits or --resplit")
        if self.model.split_bn and self.engine.sync_bn:
            raise UserError("split_bn: it does not go with sync_bn; leave out one of the two")
        odd = [size for size in self.sizes.train_batch_sizes or (batch,) if size % 2]
        if self.model.split_bn and not splits and odd:
            name = "batch-size" if self.sizes.train_batch_sizes is None else "train-batch-sizes"
            raise UserError(f"{name}: --split-bn with --resplit halves the batch, which needs an even size; got {odd[0]}")

    @classmethod
    def from_flat(cls, values: dict[str, Any], where: str = "options") -> RunConfig:
        """Builds a run from a flat mapping; the digits' own defaults apply where no data is named.

        Raises:
            UserError: for an unknown key (with near matches), a value of the wrong type, or one out of bounds.
        """
        known = {name: (section, item) for section, name, item in options()}
        unknown = [key for key in values if key not in known]
        if unknown:
            hints = "".join(near_matches(str(key).replace("-", "_"), known) for key in unknown)
            raise UserError(f"{where}: unknown option {', '.join(map(repr, unknown))}{hints}")
        if values.get("dataset") in (None, "digits") and not values.get("data_dir"):
            defaults = dict(DIGITS)
            if "img_size" in (values.get("model_kwargs") or {}):  # the model's own size
                defaults["img_size"] = None
            if values.get("crop_padding") is not None:  # it takes the place of the resized crops
                del defaults["scale"]
            values = merged(defaults, {**values, "dataset": "digits"})
        sections: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            section, item = known[key]
            sections.setdefault(section, {})[item.name] = value
        return cls(**{name: SECTIONS[name](**entries) for name, entries in sections.items()})

    def flat(self) -> dict[str, Any]:
        """Returns every option by its outside name, in plain YAML types."""
        values = {name: getattr(getattr(self, section), item.name) for section, name, item in options()}
        return {name: plain(value) for name, value in values.items()}


SECTIONS: dict[str, type] = {item.name: typing.cast(type, item.default_factory) for item in dataclasses.fields(RunConfig)}

# With 8 x 8 pixel digits, flips change the class and strong crops cut it off; small and short is enough.
DIGITS: dict[str, Any] = {
    "dataset": "digits",
    "model": "resnet20_cifar",
    "img_size": 16,
    "lr": 0.1,
    "epochs": 20,
    "batch_size": 64,
    "workers": 0,
    "scale": (0.7, 1.0),
    "hflip": 0.0,
    "color_jitter": 0.0,
}


def merged(stored: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Returns the options `stored`, overridden by `given`.

    A given image size also replaces one under its other name, and a given rule for the learning rate a rate.
    """
    replaced: set[str] = set()
    if given.get("input_size") is not None:
        replaced = {"img_size", "in_chans"}
    elif given.get("img_size") is not None:
        replaced = {"input_size"}
    if any(given.get(name) is not None for name in ("lr_base", "lr_base_size", "lr_base_scale")):
        replaced |= {"lr"}
    return {name: value for name, value in stored.items() if name not in replaced} | given


def options() -> list[tuple[str, str, dataclasses.Field]]:
    """Returns every option as (section, outside name, field); SFR's have the prefix ``sfr_``."""
    return [
        (section, outside_name(item, kind.prefix), item)
        for section, kind in SECTIONS.items()
        for item in dataclasses.fields(kind)
    ]
