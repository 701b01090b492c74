"""How images become tensors: mode, size, normalisation, mixing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import ImageMode
from timm.data import Mixup, create_transform, resolve_input_data_config
from torch import Tensor, nn

from timm_sfr.config import AugConfig, ModelConfig
from timm_sfr.utils.errors import UserError


def check_mode(mode: str, channels: int) -> None:
    """Raises UserError unless images of a PIL mode have so many channels."""
    try:
        bands = len(ImageMode.getmode(mode).bands)
    except KeyError as error:
        raise UserError(f"input-img-mode: expected a mode of PIL's, such as RGB, L or CMYK; got {mode!r}") from error
    if bands != channels:
        raise UserError(f"in-chans: expected {bands}, as images of mode {mode} have; got {channels}; give --input-img-mode, or "
                        "another --in-chans")  # fmt: skip


@dataclass(frozen=True)
class Preprocessing:
    """Image size and normalisation, as timm's ``resolve_data_config`` gives them."""

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str = "center"

    @property
    def img_mode(self) -> str:
        """The PIL mode with this many channels."""
        return img_mode(self.input_size[0])

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) as float32 with the mean taken off and divided by the deviation."""
        mean, std = (
            torch.tensor(values, device=images.device).view(1, -1, 1, 1) * 255 for values in (self.mean, self.std)
        )
        return (images.float() - mean) / std

    def eval_transform(self) -> Callable:
        """timm's validation transform, to uint8.

        Raises:
            UserError: if timm cannot make it.
        """
        try:
            return create_transform(
                self.input_size,
                interpolation=self.interpolation,
                crop_pct=self.crop_pct,
                crop_mode=self.crop_mode,
                use_prefetcher=True,
            )
        except (AssertionError, ValueError, KeyError, ZeroDivisionError) as error:
            raise UserError(f"interpolation and crop-pct: timm cannot make the validation transform of {self.interpolation!r} "
                            f"and {self.crop_pct}: {error!r}; an interpolation is such as bicubic") from error  # fmt: skip

    def train_transform(self, aug: AugConfig) -> Callable:
        """timm's training transform, to uint8.

        Raises:
            UserError: if timm does not know the augmentation policy.
        """
        try:
            return self._train_transform(aug)
        except (AssertionError, ValueError, KeyError, IndexError) as error:
            raise UserError(f"aa: timm cannot make the training transform: {error}; a policy is such as "
                            "rand-m9-mstd0.5-inc1, original or augmix-m5") from error  # fmt: skip

    def _train_transform(self, aug: AugConfig) -> Callable:
        return create_transform(
            self.input_size,
            is_training=True,
            no_aug=aug.no_aug,
            train_crop_mode=aug.train_crop_mode,
            scale=aug.scale,
            ratio=aug.ratio,
            hflip=aug.hflip,
            vflip=aug.vflip,
            # timm makes a jitter of 0 too, which changes nothing and takes as long as the rest.
            color_jitter=aug.color_jitter or None,
            auto_augment=aug.aa,
            interpolation=aug.train_interpolation,
            mean=self.mean,
            std=self.std,
            use_prefetcher=True,
        )


def preprocessing(config: ModelConfig, model: nn.Module) -> Preprocessing:
    """timm's data configuration for this model as it was made, with what the options override.

    Raises:
        UserError: for means or deviations that do not fit its channels.
    """
    names = ("in_chans", "img_size", "mean", "std", "interpolation", "crop_pct")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    try:
        resolved = resolve_input_data_config(model, given)
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"mean and std: expected one value, or one per channel; got {config.mean} and {config.std}"
        ) from error
    return Preprocessing(**{name: _tuple(resolved[name]) for name in Preprocessing.__dataclass_fields__})


def create_mixup(aug: AugConfig, num_classes: int) -> Mixup | None:
    """timm's mixup and CutMix, on batches on the device; smoothing is left to the loss."""
    if not aug.mixes:
        return None
    return Mixup(
        mixup_alpha=aug.mixup,
        cutmix_alpha=aug.cutmix,
        cutmix_minmax=aug.cutmix_minmax,
        prob=aug.mixup_prob,
        switch_prob=aug.mixup_switch_prob,
        mode=aug.mixup_mode,
        label_smoothing=0.0,
        num_classes=num_classes,
    )


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def img_mode(channels: int) -> str:
    """The PIL mode of images with so many channels."""
    return "L" if channels == 1 else "RGB"
