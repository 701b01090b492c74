"""Turns images into tensors: PIL mode, size, normalisation, augmentation, mixup."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image, ImageMode
from timm.data import Mixup, create_transform, resolve_input_data_config
from timm.data.auto_augment import AugmentOp, posterize
from timm.data.transforms import str_to_interp_mode
from torch import Tensor, nn
from torchvision.transforms import CenterCrop, Compose, FiveCrop, InterpolationMode, RandomCrop, Resize, TenCrop

from timm_sfr.config import AugConfig, ModelConfig
from timm_sfr.utils.errors import UserError

INTERPOLATIONS = tuple(mode.value for mode in InterpolationMode)


@dataclass(frozen=True)
class Preprocessing:
    """Image size and normalisation, as timm's ``resolve_data_config`` returns them."""

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str = "center"

    @property
    def img_mode(self) -> str:
        """The PIL mode of the input's number of channels."""
        return img_mode(self.input_size[0])

    def normalize(self, images: Tensor) -> Tensor:
        """Returns uint8 images (B, C, H, W) as float32, normalised: (images / 255 - mean) / std."""
        mean, std = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) * 255 for values in (self.mean, self.std))
        return (images.float() - mean) / std

    def at(self, size: int) -> Preprocessing:
        """Returns the same preprocessing for square images of `size` pixels."""
        return replace(self, input_size=(self.input_size[0], size, size))

    def eval_transform(self, views: int = 1) -> Callable:
        """Returns timm's validation transform, which outputs uint8: an image (C, H, W), or `views` of it (V, C, H, W).

        Raises:
            UserError: if timm cannot make the transform, or it does not fit `TestViews`.
        """
        try:
            made = create_transform(
                self.input_size,
                interpolation=self.interpolation,
                crop_pct=self.crop_pct,
                crop_mode=self.crop_mode,
                use_prefetcher=True,
            )
            return made if views == 1 else TestViews(made, views)
        except (AssertionError, ValueError, KeyError, ZeroDivisionError) as error:
            raise UserError(f"interpolation and crop-pct: timm cannot make the validation transform of {self.interpolation!r} "
                            f"and {self.crop_pct}: {error!r}; give an interpolation such as bicubic") from error  # fmt: skip

    def train_transform(self, aug: AugConfig) -> Callable:
        """Returns timm's training transform, which outputs uint8; with ``aug_splits``, it outputs `AugSplits`.

        With ``crop_padding``, torchvision's random crop of the padded image takes the place of timm's.

        Raises:
            UserError: if timm cannot make the transform; most often it does not know the augmentation policy.
        """
        if self.input_size[0] not in (1, 3) and (aug.aa or aug.grayscale_prob):
            raise UserError("aa and grayscale-prob: they are for grey and colour images; these have "
                            f"{self.input_size[0]} channels; leave the options out")  # fmt: skip
        try:
            made = self._train_transform(aug)
            if aug.crop_padding is not None:
                first = made[0] if aug.aug_splits else made
                first.transforms[:1] = self._padded_crop(aug.crop_padding)
            for step in _operations(made):
                if step.aug_fn is posterize:
                    step.aug_fn = posterize_to_black
            return AugSplits(*made, aug.aug_splits) if aug.aug_splits else made
        except (AssertionError, ValueError, KeyError, IndexError) as error:
            if aug.train_interpolation not in ("", "random", *INTERPOLATIONS):
                raise UserError(f"train_interpolation: expected random, {', '.join(INTERPOLATIONS)}; got "
                                f"{aug.train_interpolation!r}") from error  # fmt: skip
            raise UserError(f"aa: timm cannot make the training transform: {error}; give a policy such as "
                            "rand-m9-mstd0.5-inc1, original or augmix-m5") from error  # fmt: skip

    def _padded_crop(self, padding: int) -> tuple[Callable, Callable]:
        """Returns torchvision's steps that resize an image to the training size, pad it with black, and crop it at random."""
        size = self.input_size[1:]
        return Resize(size, str_to_interp_mode(self.interpolation)), RandomCrop(size, padding)

    def _train_transform(self, aug: AugConfig) -> Any:
        return create_transform(
            self.input_size,
            is_training=True,
            no_aug=aug.no_aug,
            train_crop_mode=aug.train_crop_mode,
            scale=aug.scale,
            ratio=aug.ratio,
            hflip=aug.hflip,
            vflip=aug.vflip,
            # None, not 0: timm's jitter of strength 0 changes nothing and takes as long as all other steps.
            color_jitter=aug.color_jitter or None,
            color_jitter_prob=aug.color_jitter_prob,
            grayscale_prob=aug.grayscale_prob or 0.0,
            gaussian_blur_prob=aug.gaussian_blur_prob or 0.0,
            auto_augment=aug.aa,
            interpolation=self.interpolation if aug.no_aug else aug.train_interpolation or self.interpolation,
            mean=self.mean,
            std=self.std,
            use_prefetcher=True,
            separate=aug.aug_splits > 0,
        )


def posterize_to_black(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """Returns timm's ``posterize`` of an image, also for 0 bits, which Pillow refuses since version 13: a black image.

    timm's policies ask for 0 bits at the highest magnitude, which rand-m9-mstd0.5-inc1 reaches in one draw of fifty.
    """
    return posterize(image, bits, **options) if bits > 0 else image.point([0] * 256 * len(image.getbands()))


def _operations(transform: Any) -> Iterator[AugmentOp]:
    """Yields the operations of the augmentation policies in a transform of timm's, or in a tuple of them."""
    if isinstance(transform, AugmentOp):
        yield transform
        return
    parts = transform if isinstance(transform, (list, tuple)) else [
        part for name in ("transforms", "policy", "ops") for part in getattr(transform, name, ())
    ]  # fmt: skip
    for part in parts:
        yield from _operations(part)


class AugSplits:
    """Turns an image into a tuple of `count` views, as timm's ``AugMixDataset`` does.

    The first view is cropped and flipped (`crop`); the others have the same crop and are also augmented, each anew. `finish`
    makes tensors of PIL images.
    """

    def __init__(self, crop: Callable, augment: Callable, finish: Callable, count: int) -> None:
        self.crop, self.augment, self.finish, self.count = crop, augment, finish, count

    def __call__(self, image: Any) -> tuple[Tensor, ...]:
        """Returns `count` uint8 tensors (C, H, W) of a PIL image."""
        clean = self.crop(image)
        return tuple(self.finish(self.augment(clean) if view else clean) for view in range(self.count))


class TestViews:
    """timm's validation transform with several views of an image, stacked: uint8 (V, C, H, W).

    Two views are the image and its mirror image. Five or ten are the crops of torchvision's `FiveCrop` or `TenCrop` in place of
    the centre crop. `plain_view` says which of them timm's transform makes.

    Raises:
        UserError: for crops of an image that timm does not crop at its centre.
    """

    def __init__(self, transform: Compose, views: int) -> None:
        self.transform, self.crops = transform, None
        if views >= 5:
            *self.resize, crop, self.convert = transform.transforms
            if not isinstance(crop, CenterCrop):
                raise UserError(f"tta: {views} views are crops, and this model's images are not cropped; --tta 2 mirrors them")
            self.crops = {5: FiveCrop, 10: TenCrop}[views](crop.size)

    def __call__(self, image: Any) -> Tensor:
        """Returns the views of a PIL image."""
        if self.crops is None:
            plain = self.transform(image)
            return torch.stack([plain, plain.flip(-1)])
        for step in self.resize:
            image = step(image)
        return torch.stack([self.convert(crop) for crop in self.crops(image)])


def plain_view(views: int) -> int:
    """Returns which of the `TestViews` timm's transform makes: the centre crop is the fifth of torchvision's five."""
    return 4 if views >= 5 else 0


def preprocessing(config: ModelConfig, model: nn.Module) -> Preprocessing:
    """Returns timm's data configuration of the model, overridden by the options in `config`.

    Raises:
        UserError: if the size does not fit the model, or the means or standard deviations do not fit its channels.
    """
    names = ("in_chans", "img_size", "input_size", "mean", "std", "interpolation", "crop_pct")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    try:
        resolved = resolve_input_data_config(model, given)
    except (ValueError, AssertionError) as error:
        if "Requested" in str(error):  # timm's words on a model of a fixed size, and on one of other channels
            raise UserError(f"img_size: {error}") from error
        raise UserError(f"mean and std: expected one value, or one per channel; got {config.mean} and {config.std}") from error
    found = {name: resolved[name] for name in Preprocessing.__dataclass_fields__}
    return Preprocessing(**{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})


def create_mixup(aug: AugConfig, num_classes: int, multi_label: bool = False) -> Mixup | None:
    """Returns timm's mixup and CutMix for batches on the device, or None if neither is on; the loss does the smoothing.

    With `multi_label`, it mixes targets (B, K) in place of class indices.
    """
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
        multi_label=multi_label,
    )


def check_cutmix(aug: AugConfig, sides: Sequence[int]) -> None:
    """Raises UserError if images with a side in `sides` (pixels) leave ``cutmix_minmax`` no whole number of pixels to cut."""
    low, high = aug.cutmix_minmax or (0.0, 1.0)
    side = next((side for side in sides if int(side * low) >= int(side * high)), None)
    if side is not None:
        raise UserError(f"cutmix-minmax: {low:g} to {high:g} of {side} pixels has no whole number of pixels to draw; give shares "
                        f"further apart, by more than {1 / side:.2g}")  # fmt: skip


def check_mode(mode: str, channels: int) -> None:
    """Raises UserError unless images of the PIL mode `mode` have `channels` channels."""
    try:
        bands = len(ImageMode.getmode(mode).bands)
    except KeyError as error:
        raise UserError(f"input-img-mode: expected a PIL mode, such as RGB, L or CMYK; got {mode!r}") from error
    if bands != channels:
        raise UserError(f"in-chans: expected {bands}, the channels of images of mode {mode}; got {channels}; give "
                        "--input-img-mode, or another --in-chans")  # fmt: skip


def img_mode(channels: int) -> str:
    """Returns the PIL mode of images with `channels` channels."""
    return "L" if channels == 1 else "RGB"
