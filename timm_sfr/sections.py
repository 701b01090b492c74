"""The sections of a run's options: one frozen dataclass per concern, checked when made, under timm's names.

Those of a teacher are in `timm_sfr.kd`, those of publishing in `timm_sfr.hub_options`.
"""

from __future__ import annotations

from dataclasses import dataclass

from timm_sfr.utils.errors import UserError, near_matches
from timm_sfr.utils.options import Checked, option

TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True)
class DataConfig(Checked):
    """What is trained on."""

    data_dir: str | None = option(
        None, "path to the dataset: a folder with train/CLASS/*.jpg and val/CLASS/*.jpg, or with tars or shards, ..."
    )
    dataset: str | None = option(
        None,
        "timm dataset type and name, such as torch/cifar10, hfds/NAME, wds/NAME; "
        "'digits' is built in and the default when no data is given",
    )
    train_split: str = option("train", "name of the training split")
    val_split: str = option("validation", "name of the validation split")
    train_num_samples: int | None = option(None, "number of training samples, for streamed datasets")
    val_num_samples: int | None = option(None, "number of validation samples, for streamed datasets")
    dataset_download: bool = option(False, "let torch/ datasets download themselves")
    class_map: str | None = option(None, "path to a class-to-index mapping file")
    input_img_mode: str | None = option(None, "image mode to convert to (default: RGB, or L for one channel)")
    input_key: str | None = option(None, "key of the image in hfds/ and wds/ datasets")
    target_key: str | None = option(None, "key of the label in hfds/ and wds/ datasets")
    batch_size: int = option(128, "training batch size per process", short="-b")
    validation_batch_size: int | None = option(None, "validation batch size per process (default: as in training)")
    workers: int = option(4, "data loading processes per process", short="-j")
    on_bad_image: str = option(
        "stop",
        "where an image does not decode: stop, or skip it and take the next of its class",
        choices=("stop", "skip"),
    )
    cache_dataset: bool = option(
        False, "decode every image once, at the start, and keep all in memory: for sets of small images"
    )
    pin_mem: bool = option(False, "pin memory for faster copies to the GPU")

    def check(self) -> None:
        """Counts must be positive."""
        self.at_least(1, "batch_size", "validation_batch_size", "train_num_samples", "val_num_samples")
        self.at_least(0, "workers")


@dataclass(frozen=True)
class ModelConfig(Checked):
    """Which model, at which input."""

    model: str | None = option(None, "name of any timm model (default: resnet18; resnet20_cifar on the digits)")
    pretrained: bool = option(False, "start from timm's pretrained weights")
    initial_checkpoint: str | None = option(None, "load these weights into the model before training")
    num_classes: int | None = option(None, "number of classes (default: as in the dataset)")
    img_size: int | None = option(None, "image size in pixels (default: the model's)")
    in_chans: int | None = option(None, "image channels (default: 3)")
    mean: tuple[float, ...] | None = option(None, "channel means for normalisation (default: the model's)")
    std: tuple[float, ...] | None = option(None, "channel deviations for normalisation (default: the model's)")
    interpolation: str | None = option(None, "resize interpolation for validation (default: the model's)")
    crop_pct: float | None = option(None, "centre crop share for validation (default: the model's)")
    drop: float | None = option(None, "dropout rate")
    drop_path: float | None = option(None, "stochastic depth rate")
    model_kwargs: dict | None = option(None, "further model arguments as KEY=VALUE")
    grad_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    channels_last: bool = option(False, "use the channels_last memory layout")

    def check(self) -> None:
        """Sizes must be positive, rates in [0, 1]."""
        self.at_least(1, "img_size", "in_chans")
        self.at_least(2, "num_classes")
        self.within(0, 1, "drop", "drop_path")


@dataclass(frozen=True)
class AugConfig(Checked):
    """Training augmentation, all by timm."""

    no_aug: bool = option(False, "turn all training augmentation off")
    train_crop_mode: str | None = option(None, "random crop mode", choices=("rrc", "rkrc", "rkrr"))
    scale: tuple[float, ...] = option((0.08, 1.0), "random resize scale")
    ratio: tuple[float, ...] = option((3 / 4, 4 / 3), "random resize aspect ratio")
    hflip: float = option(0.5, "horizontal flip probability")
    vflip: float = option(0.0, "vertical flip probability")
    color_jitter: float = option(0.4, "colour jitter factor")
    aa: str | None = option(None, "AutoAugment policy, such as rand-m9-mstd0.5-inc1")
    reprob: float = option(0.0, "random erase probability")
    remode: str = option("pixel", "random erase mode", choices=("const", "rand", "pixel"))
    recount: int = option(1, "random erase count")
    train_interpolation: str = option("random", "training interpolation")
    mixup: float = option(0.0, "mixup alpha, on if > 0")
    cutmix: float = option(0.0, "CutMix alpha, on if > 0")
    cutmix_minmax: tuple[float, ...] | None = option(None, "CutMix min and max ratio, overrides alpha")
    mixup_prob: float = option(1.0, "probability of mixing a batch")
    mixup_switch_prob: float = option(0.5, "probability of CutMix over mixup when both are on")
    mixup_mode: str = option("batch", "how mixing parameters are drawn", choices=("batch", "pair", "elem"))
    mixup_off_epoch: int = option(0, "no mixing from this epoch on, 0 for never")

    def check(self) -> None:
        """Probabilities in [0, 1], pairs of two."""
        self.within(0, 1, "hflip", "vflip", "reprob", "mixup_prob", "mixup_switch_prob")
        self.at_least(0, "mixup", "cutmix", "color_jitter", "mixup_off_epoch")
        for name in ("scale", "ratio", "cutmix_minmax"):
            value = getattr(self, name)
            if value is not None and (len(value) != 2 or not 0 < value[0] <= value[1]):
                raise UserError(f"{name}: expected two positive numbers, smaller first; got {value}")
        low, high = self.cutmix_minmax or (0, 1)
        if not low < high <= 1:
            raise UserError(
                f"cutmix_minmax: expected two different shares up to 1, smaller first; got {self.cutmix_minmax}"
            )

    @property
    def mixes(self) -> bool:
        """Whether mixup or CutMix is on."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None


@dataclass(frozen=True)
class OptimConfig(Checked):
    """Optimizer, schedule, length and averaging, all by timm."""

    epochs: int = option(100, "epochs to train (20 on the digits)")
    opt: str = option("sgd", "optimizer, any of timm's")
    lr: float | None = option(None, "learning rate; overrides lr-base")
    lr_base: float = option(
        0.1, "base rate: lr = lr_base * global_batch / lr_base_size (square root for adaptive ones)"
    )
    lr_base_size: int = option(256, "batch size that lr-base is meant for")
    lr_base_scale: str | None = option(
        None, "how lr scales with the batch (default: by optimizer)", choices=("linear", "sqrt")
    )
    momentum: float = option(0.9, "momentum")
    weight_decay: float = option(5e-4, "weight decay")
    opt_eps: float | None = option(None, "optimizer epsilon")
    opt_betas: tuple[float, ...] | None = option(None, "optimizer betas")
    opt_kwargs: dict | None = option(None, "further optimizer arguments as KEY=VALUE")
    layer_decay: float | None = option(None, "layer-wise learning rate decay")
    clip_grad: float | None = option(None, "gradient clipping value")
    clip_mode: str = option("norm", "gradient clipping mode", choices=("norm", "value", "agc"))
    grad_accum_steps: int = option(1, "batches per update")
    sched: str = option("cosine", "learning rate schedule, any of timm's")
    sched_on_updates: bool = option(True, "step the schedule every update rather than every epoch")
    warmup_epochs: int | None = option(None, "epochs of linear warm-up (default: a fifth of the epochs, at most 5)")
    warmup_lr: float = option(1e-5, "learning rate where the warm-up starts")
    warmup_prefix: bool = option(False, "do not count the warm-up in the schedule")
    min_lr: float = option(0.0, "lowest learning rate")
    cooldown_epochs: int = option(0, "epochs at min-lr after the schedule")
    decay_epochs: float = option(90, "epochs between decays of the step schedule")
    decay_milestones: tuple[int, ...] = option((90, 180, 270), "epochs of the multistep schedule's decays")
    decay_rate: float = option(0.1, "decay rate of step, multistep and poly")
    patience_epochs: int = option(10, "patience of the plateau schedule")
    model_ema: bool = option(False, "keep an exponential moving average of the weights, and evaluate and export it")
    model_ema_decay: float = option(0.9998, "decay of that average")
    model_ema_warmup: bool = option(False, "warm that decay up")

    def check(self) -> None:
        """Lengths positive, rates non-negative."""
        self.at_least(1, "epochs", "grad_accum_steps", "lr_base_size")
        if self.decay_epochs <= 0:
            raise UserError(f"decay_epochs: expected more than 0; got {self.decay_epochs}")
        if self.opt_betas is not None and len(self.opt_betas) < 2:
            raise UserError(f"opt_betas: expected two numbers or more; got {self.opt_betas}")
        self.at_least(0, "warmup_epochs", "lr", "lr_base", "weight_decay", "cooldown_epochs", "clip_grad", "min_lr")
        self.within(0, 1, "model_ema_decay", "momentum")


@dataclass(frozen=True)
class EngineConfig(Checked):
    """How the run is carried out and where it is written."""

    output: str = option("output/train", "folder of all runs")
    experiment: str | None = option(None, "name of this run's folder (default: time and model)")
    seed: int = option(42, "random seed")
    device: str | None = option(None, "'cpu' to leave the GPU alone", choices=("cpu",))
    mixed_precision: str | None = option(
        None, "compute precision (default: what accelerate is configured for)", choices=("no", "fp16", "bf16")
    )
    torchcompile: str | None = option(None, "compile the model with this backend (inductor when given no name)")
    sync_bn: bool = option(False, "synchronise BatchNorm over processes (GPUs only)")
    dist_bn: str = option(
        "reduce",
        "what to do with BatchNorm statistics of several processes after an epoch",
        choices=("reduce", "broadcast", "none"),
    )
    log_interval: int = option(
        50, "batches between looks at whether a line on a long epoch is due, where there is no terminal for bars"
    )
    json_logs: bool = option(False, "every line on standard output is one JSON object (docs/logs.md)")
    report_to: tuple[str, ...] = option(
        ("none",), "where an epoch's figures go too: none, or any of tensorboard, wandb and trackio"
    )
    val_interval: int = option(1, "epochs between validations")
    report_interval: int | None = option(
        None,
        "epochs between refreshes of RUN/report.html (default: as often as 2 % of the time allows; 0: no report at all)",
    )
    checkpoint_hist: int = option(2, "resumable checkpoints to keep, beside the best one's")
    checkpoint_interval: int | None = option(None, "updates between checkpoints (one is kept after every epoch anyway)")
    on_nonfinite: str = option(
        "stop", "where a loss or gradient is not finite: stop, or skip the update", choices=("stop", "skip")
    )
    on_full_disk: str = option(
        "stop", "where a checkpoint does not fit: stop, or skip it and go on", choices=("stop", "skip")
    )
    eval_metric: str = option("top1", "what the best model is chosen by", choices=("top1", "top5", "loss"))

    def check(self) -> None:
        """Intervals positive, trackers known."""
        for name in self.report_to:
            if name not in (*TRACKERS, "none"):
                hint = near_matches(name, TRACKERS)
                raise UserError(f"report_to: expected none, {', '.join(TRACKERS)}; got {name!r}{hint}")
        self.at_least(1, "log_interval", "val_interval", "checkpoint_hist", "checkpoint_interval")
        self.at_least(0, "report_interval")
        self.within(0, 2**32 - 1, "seed")  # what NumPy takes
