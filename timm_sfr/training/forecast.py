"""Warnings before training, one line each, about options that are allowed but look wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from timm_sfr.config import RunConfig
from timm_sfr.data.loaders import worker_count
from timm_sfr.method.smoothing import warmup_epochs
from timm_sfr.utils.console import counted

# The usual learning rates, by a part of the optimizer's name (the first match counts): the rate at a batch of 256, the power
# of the batch that it scales with, and the factors by which it may be lower or higher without a warning. SGD: Goyal et al.,
# arXiv 1706.02677; the adaptive ones: recipes of timm and of the papers (AdamW 5e-4 to 1e-3, LAMB 5e-3, Lion a tenth of
# AdamW's, RMSprop 0.016).
RATES = {
    "lamb": (5e-3, 0.5, 1000, 20),
    "lion": (1e-4, 0.5, 1000, 20),
    "rmsprop": (1.6e-2, 0.5, 5000, 20),
    "ada": (1e-3, 0.5, 1000, 20),
    "sgd": (0.1, 1.0, 2000, 30),
    "momentum": (0.1, 1.0, 2000, 30),
    "nesterov": (0.1, 1.0, 2000, 30),
}
UNKNOWN = ("adagrad", "adadelta", "adafactor")  # their rates are not comparable with those of Adam
ENDLESS = ("step", "multistep", "constant", "plateau", "none")  # schedules without cycles or a cooldown
FAR = 1.8  # warn if the images are this many times larger or smaller than those of pretraining
UNTRAINED = 0.05  # warn if more than this share of the moving average is still the initial weights at the end
FEW = 32  # images: the rate is usually not lowered further for smaller batches
SMALL_IMAGES = 64  # pixels: up to this size, timm_sfr has architectures of its own


@dataclass(frozen=True)
class Circumstances:
    """What the warnings need to know of a run, beyond its options."""

    model: nn.Module
    images: int  # of an epoch, over all processes
    global_batch: int  # images per update, over all processes
    lr: float  # after warm-up
    epochs: int
    cores: int  # of the CPU, that this process may use
    processes: int = 1  # on this machine
    device: str = "cpu"  # the type of the device that trains


def advice(config: RunConfig, run: Circumstances) -> list[str]:
    """Returns the warnings, or an empty list if nothing looks wrong; `config` has to be resolved."""
    checks = (_size, _reduction, _batch, _rate, _warmup, _average, _precision)
    found = [*(check(config, run) for check in checks), *_odd(config, run)]
    return [f"warning: {line}" for line in found if line]


def total_reduction(model: nn.Module) -> tuple[int, bool] | None:
    """Returns a timm model's total stride, and whether its first layer applies all of it (ViT, mixers); None if unknown."""
    info = getattr(model, "feature_info", None)
    info = getattr(info, "info", info)
    if not isinstance(info, (list, tuple)) or not info or not all(isinstance(one, dict) for one in info):
        return None
    reductions = [int(one.get("reduction") or 0) for one in info]
    return (max(reductions), min(reductions) == max(reductions)) if min(reductions) > 0 else None


def usual_rate(opt: str, batch: int, momentum: float = 0.9) -> tuple[float, float, float] | None:
    """Returns the usual learning rate of `opt` at batch size `batch`, and the lowest and highest rates without a warning.

    Returns None for an optimizer whose usual rate is not known.
    """
    name = opt.lower()
    word = next((word for word in RATES if word in name), None)
    if word is None or any(unknown in name for unknown in UNKNOWN):
        return None
    rate, power, below, above = RATES[word]
    if word == "sgd":
        rate *= (1 - momentum) / 0.1  # momentum makes a step 1 / (1 - momentum) gradients long
    rate *= (max(batch, FEW) / 256) ** power
    return rate, rate / below, rate * above


def _size(config: RunConfig, run: Circumstances) -> str | None:
    """Pretrained weights expect objects at the scale of their training images."""
    own, size = (getattr(run.model, "pretrained_cfg", None) or {}).get("input_size"), _shorter(config)
    if not config.model.pretrained or not own or size is None or own[-1] / FAR < size < own[-1] * FAR:
        return None
    return (f"img-size: {size} px is far from the {own[-1]} px that the pretrained weights of {config.model.model} were trained "
            f"at; use --img-size {own[-1]} or a size near it")  # fmt: skip


def _reduction(config: RunConfig, run: Circumstances) -> str | None:
    """Stems made for 224 pixels reduce small images to almost nothing."""
    size, end = _shorter(config), total_reduction(run.model)
    if size is None or end is None or size > SMALL_IMAGES:
        return None
    grid = math.ceil(size / end[0])  # a strided layer with padding rounds up
    if grid > (2 if end[1] else 1):
        return None
    return (f"model: images of {size} px end as {grid}x{grid} in {config.model.model}, which divides them by {end[0]}: it is "
            f"made for larger images; for small ones use --model {_instead(config.model.model or '')}")  # fmt: skip


def _shorter(config: RunConfig) -> int | None:
    """Returns the images' shorter side in pixels."""
    sides = config.model.image_sides
    return None if sides is None else min(sides)


def _instead(name: str) -> str:
    if name.startswith(("mobile", "efficient", "mnas", "tiny", "lcnet")):
        return "mobilenetv2_cifar or resnet20_cifar"
    wide = "wrn_16_2_cifar" if name.startswith(("wide", "wrn")) else "resnet56_cifar"
    return f"resnet18_cifar (11 M parameters), {wide} or resnet20_cifar (0.3 M)"


def _batch(config: RunConfig, run: Circumstances) -> str | None:
    if run.global_batch <= run.images:
        return None
    return (f"batch-size: an update would take {run.global_batch} images and an epoch has {run.images}; lower --batch-size or "
            "--grad-accum-steps")  # fmt: skip


def _rate(config: RunConfig, run: Circumstances) -> str | None:
    optim = config.optim
    usual = usual_rate(optim.opt, run.global_batch, min(optim.momentum, 0.99))
    if usual is None or run.lr == 0 or usual[1] <= run.lr <= usual[2]:
        return None
    far, end = ("above", "may well diverge") if run.lr > usual[2] else ("below", "will learn very little")
    return (f"lr: {run.lr:.2g} is far {far} the usual rate of {optim.opt} at {run.global_batch} images per update, about "
            f"{usual[0]:.2g}; the run {end}; use --lr {usual[0]:.2g}")  # fmt: skip


def _warmup(config: RunConfig, run: Circumstances) -> str | None:
    optim, sfr = config.optim, config.sfr
    if optim.sched != "none" and not optim.warmup_prefix and (optim.warmup_epochs or 0) >= run.epochs:
        return (f"warmup-epochs: {optim.warmup_epochs} of {run.epochs} epochs: the learning rate never reaches {run.lr:.2g}; "
                f"--warmup-epochs {warmup_epochs(run.epochs)} is usual")  # fmt: skip
    if sfr.enabled and sfr.weight > 0 and (sfr.warmup_epochs or 0) >= run.epochs:
        return (f"sfr-warmup-epochs: {sfr.warmup_epochs} of {run.epochs} epochs: lambda never reaches {sfr.weight:g}; "
                f"--sfr-warmup-epochs {warmup_epochs(run.epochs)} is usual")  # fmt: skip
    return None


def _average(config: RunConfig, run: Circumstances) -> str | None:
    """A moving average with a long memory is still the initial weights after a short run."""
    optim = config.optim
    updates = run.images * run.epochs // max(1, run.global_batch)
    rest = optim.model_ema_decay**updates
    if not optim.model_ema or optim.model_ema_warmup or not updates or rest < UNTRAINED:
        return None
    return (f"model-ema: the average is what is scored and exported, and after {updates} updates at decay "
            f"{optim.model_ema_decay:g} the initial weights are {100 * rest:.0f} % of it; use --model-ema-warmup, or "
            f"--model-ema-decay {max(0.5, 1 - 10 / updates):.3g}")  # fmt: skip


def _precision(config: RunConfig, run: Circumstances) -> str | None:
    """A CPU without bfloat16 instructions converts every number there and back."""
    if config.engine.mixed_precision == "bf16":
        option, instead = "mixed-precision", "no"
    elif config.model.model_dtype == "bfloat16":
        option, instead = "model-dtype", "float32"
    else:
        return None
    if run.device != "cpu" or cpu_has_bf16():
        return None
    return (f"{option}: bf16 is many times slower than float32 on this CPU, which has no instructions for it; use "
            f"--{option} {instead}")  # fmt: skip


def cpu_has_bf16() -> bool:
    """Returns whether oneDNN, PyTorch's CPU library, computes in bfloat16 here; True if PyTorch was built without it."""
    return not torch.backends.mkldnn.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _odd(config: RunConfig, run: Circumstances) -> list[str]:
    """Warns about values that are accepted but do not have the expected effect."""
    crop, decay, workers = config.model.crop_pct, config.optim.layer_decay, worker_count(config.data) * run.processes
    found = []
    if crop is not None and not 0 < crop <= 1:
        found.append(f"crop-pct: expected a share above 0 and up to 1; got {crop:g}, which timm interprets differently "
                     "(0 as 0.875); leave it out to use the model's")  # fmt: skip
    if decay is not None and decay > 1:
        found.append(f"layer-decay: expected above 0 and up to 1, usually 0.5 to 0.9; with {decay:g} the first layers "
                     "would learn fastest")  # fmt: skip
    optim = config.optim
    if optim.sched in ENDLESS and (optim.cooldown_epochs or optim.lr_cycle_limit > 1):
        found.append(f"cooldown-epochs and lr-cycle-limit: timm's schedule {optim.sched} has neither, so they have no effect")
    if workers > run.cores:
        found.append(f"workers: {workers} loading processes for {counted(run.cores, 'core')}; "
                     f"--workers {max(1, run.cores // run.processes)} is enough")  # fmt: skip
    if config.data.pin_mem and not torch.accelerator.is_available():
        found.append("pin-mem: it speeds up copies to a GPU, and there is none here, so it has no effect")
    aug = config.aug
    if aug.aug_splits and aug.aa is None and not aug.color_jitter:
        found.append("aug-splits: without --aa and --color-jitter, all views of an image are the same")
    if aug.resplit and not config.model.split_bn and (aug.reprob == 0 or aug.no_aug):
        found.append("resplit: nothing is erased without --reprob, so it has no effect")
    if config.data.sampler == "balanced" and config.loss.class_weights == "auto":
        found.append(
            "class-weights: --sampler balanced already takes all classes equally often; with auto, rare ones count twice"
        )
    sfr = config.sfr
    if sfr.enabled and sfr.weight > 0 and sfr.solver != "auto" and sfr.matching != "emd":
        found.append(f"sfr-solver: {sfr.solver} solves the plans of --sfr-matching emd; with {sfr.matching} it has no effect")
    elif config.sfr.solver == "triton" and run.device != "cuda":
        found.append("sfr-solver: triton runs on CUDA only; sinkhorn, the same solver in PyTorch, replaces it here")
    return found
