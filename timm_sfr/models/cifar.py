"""Networks for 32-pixel images, registered in timm: a 3 x 3 stem of stride 1 and no max-pool.

Stock ResNet stems reduce a 32-pixel image to 8 x 8 locations before the first block; these keep its resolution. The
blocks are timm's (`timm.models.resnet`, `resnetv2`, `efficientnet`), with the interface of every timm model.

- `resnet20_cifar`, `resnet56_cifar`: three stages of 16, 32, 64 channels (He et al., arXiv 1512.03385, section 4.2),
  with 1 x 1 convolutions in the shortcuts that change shape.
- `resnet18_cifar`: four stages of 64 to 512 channels.
- `wrn_16_2_cifar`: pre-activation blocks of 32, 64, 128 channels (Zagoruyko and Komodakis, arXiv 1605.07146).
- `mobilenetv2_cifar`: inverted residuals, a final stride of 8 (Sandler et al., arXiv 1801.04381).
"""

from typing import Any

import torch
from timm.layers import BatchNormAct2d, calculate_drop_path_rates, create_classifier, create_conv2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import BasicBlock, ResNet, make_blocks
from timm.models.resnetv2 import PreActBasic, ResNetStage
from torch import Tensor, nn


class CifarResNet(ResNet):
    """A residual network with a 3 x 3 stem of stride 1: (B, in_chans, H, W) to logits (B, num_classes).

    It has timm's head and its methods, and layers of its own. Arguments that are not listed are those of timm's ResNet.

    Args:
        layers: Blocks per stage; every stage after the first halves the resolution.
        channels: Channels per stage.
        preact: Use pre-activation blocks (normalise, activate, convolve).
        stem_width: Channels of the stem (default: those of the first stage).
    """

    def __init__(
        self,
        layers: tuple[int, ...],
        channels: tuple[int, ...],
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        preact: bool = False,
        stem_width: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        nn.Module.__init__(self)  # ResNet's own would add its layers
        dd = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False
        width = stem_width or channels[0]
        self.conv1 = nn.Conv2d(in_chans, width, 3, padding=1, bias=False, **dd)
        self.bn1 = nn.Identity() if preact else nn.BatchNorm2d(width, **dd)
        self.act1 = nn.Identity() if preact else nn.ReLU(inplace=True)
        build = _preact_stages if preact else _postact_stages
        self.stages = nn.Sequential(*build(layers, channels, width, drop_path_rate, dd))
        self.norm = BatchNormAct2d(channels[-1], act_layer=nn.ReLU, **dd) if preact else nn.Identity()
        self.feature_info = [
            {"num_chs": count, "reduction": 2**index, "module": f"stages.{index}"} for index, count in enumerate(channels)
        ]
        self.num_features = channels[-1]
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.init_weights()

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Returns patterns that group parameters, for layer-wise learning rates."""
        return {"stem": r"^conv1|bn1", "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)(?:\.blocks)?\.(\d+)"}

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Returns (final features, [features of the stages `indices`]) from one pass, or only the list.

        Raises:
            ValueError: if `output_fmt` is not NCHW.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: expected NCHW; got {output_fmt}")
        take, last = feature_take_indices(len(self.stages), indices)
        taps = []
        x = self.act1(self.bn1(self.conv1(x)))
        for index, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = checkpoint(stage, x) if self.grad_checkpointing else stage(x)
            if index in take:
                # As in timm, `norm` also normalises the last stage's tap.
                taps.append(self.norm(x) if norm and index == len(self.feature_info) - 1 else x)
        return taps if intermediates_only else (self.norm(x), taps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the stages after the last of `indices`, and the head; returns the indices."""
        take, last = feature_take_indices(len(self.stages), indices)
        pruned = last + 1 < len(self.stages)
        self.stages = self.stages[: last + 1]
        if pruned or prune_norm:
            self.norm = nn.Identity()
        if pruned:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or pruned:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Returns the last stage's features (B, C, H', W')."""
        x = self.act1(self.bn1(self.conv1(x)))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            for stage in self.stages:
                x = checkpoint(stage, x)
        else:
            x = self.stages(x)
        return self.norm(x)


def _postact_stages(
    layers: tuple[int, ...], channels: tuple[int, ...], width: int, drop_path: float, dd: dict[str, Any]
) -> list[nn.Module]:
    blocks = (BasicBlock,) * len(layers)
    return [stage for _, stage in make_blocks(blocks, channels, layers, width, drop_path_rate=drop_path, **dd)[0]]


def _preact_stages(
    layers: tuple[int, ...], channels: tuple[int, ...], width: int, drop_path: float, dd: dict[str, Any]
) -> list[nn.Module]:
    rates = calculate_drop_path_rates(drop_path, layers, stagewise=True)
    return [
        ResNetStage(
            before,
            after,
            stride=2 if index else 1,
            dilation=1,
            depth=layers[index],
            block_dpr=rates[index],
            bottle_ratio=1.0,
            block_fn=PreActBasic,
            conv_layer=create_conv2d,
            norm_layer=BatchNormAct2d,
            **dd,
        )
        for index, (before, after) in enumerate(zip((width, *channels[:-1]), channels, strict=True))
    ]


class CifarEfficientNet(EfficientNet):
    """timm's mobile networks with a stem of stride 1."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.conv_stem.stride = (1, 1)
        self.feature_info = [dict(entry, reduction=entry["reduction"] // 2) for entry in self.feature_info]


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "apache-2.0",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "resnet20_cifar": _cfg(),
        "resnet56_cifar": _cfg(),
        "resnet18_cifar": _cfg(pool_size=(4, 4)),
        "wrn_16_2_cifar": _cfg(),
        "mobilenetv2_cifar": _cfg(pool_size=(4, 4), first_conv="conv_stem", classifier="classifier"),
    }
)


def _build(model_class: type, variant: str, pretrained: bool, stages: int, **kwargs: Any) -> nn.Module:
    features = {"out_indices": tuple(range(stages)), "flatten_sequential": True}
    return build_model_with_cfg(model_class, variant, pretrained, feature_cfg=features, **kwargs)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-20 for 32-pixel images: 0.27 M parameters."""
    args = {"layers": (3, 3, 3), "channels": (16, 32, 64)}
    return _build(CifarResNet, "resnet20_cifar", pretrained, 3, **(args | kwargs))


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-56 for 32-pixel images: 0.86 M parameters."""
    args = {"layers": (9, 9, 9), "channels": (16, 32, 64)}
    return _build(CifarResNet, "resnet56_cifar", pretrained, 3, **(args | kwargs))


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18 for 32-pixel images: 11.2 M parameters."""
    args = {"layers": (2, 2, 2, 2), "channels": (64, 128, 256, 512)}
    return _build(CifarResNet, "resnet18_cifar", pretrained, 4, **(args | kwargs))


@register_model
def wrn_16_2_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Wide ResNet-16-2 for 32-pixel images: 0.69 M parameters."""
    args = {"layers": (2, 2, 2), "channels": (32, 64, 128), "stem_width": 16, "preact": True}
    return _build(CifarResNet, "wrn_16_2_cifar", pretrained, 3, **(args | kwargs))


@register_model
def mobilenetv2_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileNetV2 for 32-pixel images, with stride 1 in the stem and the second stage: 2.2 M parameters."""
    blocks = ["ds_r1_k3_s1_c16", "ir_r2_k3_s1_e6_c24", "ir_r3_k3_s2_e6_c32", "ir_r4_k3_s2_e6_c64",
              "ir_r3_k3_s1_e6_c96", "ir_r3_k3_s2_e6_c160", "ir_r1_k3_s1_e6_c320"]  # fmt: skip
    args = {
        "block_args": decode_arch_def([[block] for block in blocks]),
        "num_features": 1280,
        "round_chs_fn": round_channels,
        "act_layer": nn.ReLU6,
    }
    return _build(CifarEfficientNet, "mobilenetv2_cifar", pretrained, 4, **(args | kwargs))
