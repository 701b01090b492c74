"""The teacher of a distillation: a frozen model that gets each image at the size and normalisation of its own training.

Shape suffixes: B batch, K classes, C channels, H x W pixels, D features.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path, PurePath
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_input_data_config
from timm.task import DistillationTeacher
from torch import Tensor, nn

from timm_sfr.config import KDConfig, in_words
from timm_sfr.data.transforms import Preprocessing
from timm_sfr.method.probe import MISFITS, described
from timm_sfr.models.loading import create_model
from timm_sfr.utils.errors import UserError, first_line, near_paths
from timm_sfr.utils.files import read_json
from timm_sfr.utils.processes import one_at_a_time

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL makes grey images


class Teacher(DistillationTeacher):
    """timm's wrapper of a teacher, which converts the student's images to the teacher's.

    timm's wrapper converts means and deviations. This one also converts the size (bilinear, antialiased; timm's passes the
    student's size on), and between grey and colour images in both directions. The teacher is frozen, in evaluation mode,
    and not part of what is trained, averaged, saved or exported.

    Raises:
        UserError: if it cannot take the student's images.

    Attributes:
        facts: Entries on the teacher for metrics.json and the model card.
        warning: A warning about its classes, or None.
    """

    student_mean: Tensor
    student_std: Tensor
    luma: Tensor

    def __init__(self, model: nn.Module, student: Preprocessing, config: KDConfig) -> None:
        super().__init__(model)
        self.requires_grad_(False).eval()
        self.config = config
        own = resolve_input_data_config(model)
        self.input_size: tuple[int, int, int] = tuple(own["input_size"])
        theirs, ours = student.input_size[0], self.input_size[0]
        if theirs != ours and {theirs, ours} != {1, 3}:
            raise UserError(
                f"kd-model-name: the teacher {config.model_name!r} takes images with {ours} channels, and the student's have "
                f"{theirs}; expected the same, or 1 and 3"
            )
        for name, values, channels in (
            ("mean_kd", own["mean"], ours),
            ("std_kd", own["std"], ours),
            ("student_mean", student.mean, theirs),
            ("student_std", student.std, theirs),
            ("luma", LUMA, 3),
        ):
            per_channel = torch.tensor(values).expand(channels) if len(values) == 1 else torch.tensor(values)
            self.register_buffer(name, per_channel.view(1, -1, 1, 1), persistent=False)
        self.same = (
            student.input_size == self.input_size
            and torch.equal(self.student_mean, self.mean_kd)
            and torch.equal(self.student_std, self.std_kd)
        )
        self.facts, self.warning = _facts(model, config), None
        self.features: nn.Module = PreLogits(model)

    @torch.no_grad()
    def normalize_input(self, input: Tensor, student_mean: Any = None, student_std: Any = None) -> Tensor:
        """Converts the student's normalised images (B, C, H, W) to the teacher's, (B, C', H', W').

        timm's tasks pass the statistics of the student's architecture. They are ignored, because the run may normalise
        with others: those are undone.
        """
        channels, *size = self.input_size
        if self.same and list(input.shape[2:]) == size:
            return input
        images = input.float() * self.student_std + self.student_mean
        if images.shape[1] == 3 and channels == 1:
            images = (images * self.luma).sum(1, keepdim=True)
        elif images.shape[1] == 1 and channels == 3:
            images = images.expand(-1, 3, -1, -1)
        if list(images.shape[2:]) != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return (images - self.mean_kd) / self.std_kd

    def prepare(self, accelerator: Any, channels_last: bool) -> None:
        """Puts the teacher on the device with the run's precision and compiler, but not wrapped for gradients."""
        if channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        if self.config.distill_type == "feature":
            self.features = accelerator.prepare_model(self.features, evaluation_mode=True)
        else:
            self.model = accelerator.prepare_model(self.model, evaluation_mode=True)
        self.to(accelerator.device)

    def forward(self, input: Tensor, return_features: bool = False) -> Tensor:
        """Returns logits (B, K) for the teacher's images, or the features before its classifier, (B, D)."""
        return self.features(input) if return_features else self.model(input)


class PreLogits(nn.Module):
    """A timm model without its classifier, as one module: images (B, C, H, W) to pooled features (B, D)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Returns the features (B, D) of images (B, C, H, W)."""
        return self.model.forward_head(self.model.forward_features(x), pre_logits=True)

    def width(self, input_size: tuple[int, int, int], whose: str) -> int:
        """Returns D, measured on the model's device in evaluation mode; `whose` names the model in errors.

        Raises:
            UserError: if the model does not give such features.
        """
        like, training = next(self.model.parameters()), self.model.training
        try:
            with torch.no_grad():
                found: Any = self.eval()(torch.zeros(2, *input_size, device=like.device))
        except MISFITS as error:
            raise UserError(
                f"kd-distill-type: the {whose} gives no features before its classifier: {first_line(error)}; use logit"
            ) from error
        finally:
            self.train(training)
        if not isinstance(found, Tensor) or found.ndim != 2:
            raise UserError(
                f"kd-distill-type: the {whose} gives {described(found)} before its classifier, expected features (batch, D); "
                "use logit"
            )
        return found.shape[1]


def open_teacher(
    config: KDConfig,
    num_classes: int,
    class_names: tuple[str, ...] | None,
    student: Preprocessing,
    accelerator: Any,
    channels_last: bool,
) -> Teacher | None:
    """Returns the teacher on the device, as `load_teacher`, or None if the options name none."""
    if config.model_name is None:
        return None
    teacher = one_at_a_time(accelerator, lambda: load_teacher(config, num_classes, class_names, student))
    teacher.prepare(accelerator, channels_last)
    return teacher


def load_teacher(config: KDConfig, num_classes: int, class_names: tuple[str, ...] | None, student: Preprocessing) -> Teacher:
    """Returns the teacher that the options name; from the Hub, only safetensors are loaded.

    The random state does not change: a student starts with the same weights with or without a teacher.

    Raises:
        UserError: if the teacher does not exist, has other classes, or cannot take the student's images.
    """
    name = str(config.model_name)
    if "/" in name and ":" not in name and not Path(os.path.expanduser(name)).is_dir():
        # create_model would ask the Hub: a missing run's folder must not load somebody else's weights.
        raise UserError(f"kd-model-name: there is no folder {name!r}{near_paths(name)}; for a repository on the Hub, use "
                        f"hf-hub:{name}")  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        try:
            model = create_model(name)
        except UserError as error:  # never a HubError: its exit status means that a finished run was not published
            raise UserError(f"kd-model-name: {str(error).removeprefix('model: ')}") from error
    architecture = model.pretrained_cfg.get("architecture")
    if getattr(model, "num_classes", 0) != num_classes:
        raise UserError(
            f"kd-model-name: the teacher {name!r} has {getattr(model, 'num_classes', 0)} classes, expected the data's "
            f"{num_classes}; first train one on this data (--model {architecture} --pretrained), then use its folder"
        )
    teacher = Teacher(model, student, config)
    teacher.warning = _check_classes(name, model.pretrained_cfg.get("label_names"), class_names)
    try:
        with torch.no_grad():
            logits = model(torch.zeros(2, *teacher.input_size))
    except MISFITS as error:
        raise UserError(
            f"kd-model-name: the teacher {name!r} fails on images of its own input size: {first_line(error)}"
        ) from error
    if not isinstance(logits, Tensor) or logits.shape != (2, num_classes):
        raise UserError(f"kd-model-name: expected logits (batch, {num_classes}) of {name!r}; got {described(logits)}")
    return teacher


def headline(teacher: Teacher) -> str:
    """Returns a short description of the teacher."""
    config, facts = teacher.config, teacher.facts
    kind, heated = in_words(config.distill_type, config.token_distill_type)
    heat = f", temperature {config.temperature:g}" if heated else ""
    size = "x".join(map(str, teacher.input_size))
    name = f"{'the run ' if facts['folder'] else ''}{facts['name']}"
    known = facts.get("task_loss_weight") is not None  # a custom task may weight the terms differently
    weights = f"weights {facts['task_loss_weight']:g} and {facts['distill_loss_weight']:g}" if known else "its own weights"
    return f"taught by {name} ({facts['parameters'] / 1e6:.2f} M parameters, {size}; {kind}{heat}, {weights})"


def changed(metrics: Path, facts: dict[str, Any]) -> str | None:
    """Returns a warning if a resumed run has another teacher than its metrics.json records; else None."""
    recorded = read_json(metrics)  # empty if nothing was validated yet
    before, now = ((found.get("teacher") or {}).get("sha256") for found in (recorded, facts))
    if not recorded or before == now:
        return None
    return "warning: the teacher is not the one that this run started with; the result will differ from an uninterrupted run"


def _check_classes(name: str, theirs: Any, ours: tuple[str, ...] | None) -> str | None:
    """Returns a warning if the class names do not show that the teacher's classes are the data's; else None.

    Raises:
        UserError: if the teacher has a class of the data at another index.
    """
    if not theirs or ours is None or list(map(str, theirs)) == list(ours):
        return None
    place = {str(label): index for index, label in enumerate(theirs)}
    for index, label in enumerate(ours):
        if place.get(label, index) != index:
            raise UserError(
                f"kd-model-name: the teacher {name!r} was trained on these classes in another order: {label!r} is its class "
                f"{place[label]} and the data's {index}; use a --class-map in its order, or train another teacher"
            )
    unknown = [label for label in ours if label not in place]
    if not unknown:
        return None
    return (
        f"warning: {len(unknown)} of the data's {len(ours)} classes have other names than the teacher's ({unknown[0]!r} is its "
        f"{str(theirs[ours.index(unknown[0])])!r}); assuming that they are the same classes in the same order"
    )


def _facts(model: nn.Module, config: KDConfig) -> dict[str, Any]:
    """Returns the teacher's origin and the hash of its weights; of a folder only the last name, to keep paths private."""
    name, about, digest = str(config.model_name), getattr(model, "pretrained_cfg", {}) or {}, hashlib.sha256()
    place = Path(os.path.expanduser(name.removeprefix("local-dir:")))
    folder = not timm.is_model(name) and place.is_dir()
    source = about.get("hf_hub_id")
    if folder:
        place = place.resolve()
        name, source = PurePath(place.parent if place.name == "model" else place).name, None
    elif not timm.is_model(name):
        source = name.removeprefix("hf-hub:").removeprefix("hf_hub:")
    for key, value in model.state_dict().items():
        digest.update(key.encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return {
        "name": name,
        "folder": folder,
        "architecture": about.get("architecture"),
        "source": source,
        "license": about.get("license"),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sha256": digest.hexdigest(),
    }
