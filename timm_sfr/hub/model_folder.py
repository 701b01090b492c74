"""The model folder of a run, which plain timm loads from disk or from the Hub."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.models import save_for_hf
from torch import nn

from timm_sfr.config import HubConfig, RunConfig
from timm_sfr.data.transforms import Preprocessing
from timm_sfr.hub.card import Facts, dataset_name, render
from timm_sfr.models.files import CARD, CONFIG, PROBLEM, SEVERAL_LABELS, WEIGHTS, own_config
from timm_sfr.models.split_bn import without_auxiliary
from timm_sfr.utils.files import replace_atomically, write_whole

# Licences of a teacher that are assumed to set no terms for the weights of its student.
PERMISSIVE = ("apache-2.0", "mit", "bsd-3-clause", "bsd-2-clause", "bsd", "cc0-1.0", "cc-by-4.0")


def resolve_hub(config: RunConfig, model: nn.Module, teacher: dict[str, Any] | None = None, sfr: bool = True) -> HubConfig:
    """Returns the hub options with the tag (default ``sfr_DATASET``) and the licence (default below) filled in.

    `teacher` are the facts of the teacher, if there is one. Without `sfr`, the default tag is ``DATASET``.

    - Weights trained from scratch: Apache 2.0.
    - Weights trained from others: the licence of those, or none if it is unknown.
    - Weights trained with a teacher whose licence is unknown or not permissive: none.

    args.yaml keeps the options as given: filled in, they would be wrong for a run with another data set or start.
    """
    name = dataset_name({"dataset": config.data.dataset, "data_dir": config.data.data_dir})
    theirs = getattr(model, "pretrained_cfg", {}).get("license") if config.model.keeps_pretrained else None
    scratch = not config.model.pretrained and not config.model.initial_checkpoint
    free = teacher is None or teacher["license"] in PERMISSIVE
    return dataclasses.replace(
        config.hub,
        tag=config.hub.tag or (f"sfr_{name}" if sfr else name),
        license=config.hub.license or (("apache-2.0" if scratch else theirs) if free else None),
    )


class Exporter:
    """Writes ``config.json``, ``model.safetensors`` and ``README.md`` from an unwrapped copy of the model.

    Args:
        model: The timm model before any wrapping; copied to the CPU.
        prep: The preprocessing for ``config.json``; None keeps that of the model's configuration.
        class_names: Names of the classes, if known.
        hub: Options with the tag and licence of the weights, from `resolve_hub`.
        multi_label: Whether an image may have several classes: ``config.json`` then says so, as transformers' does.
    """

    def __init__(
        self,
        model: nn.Module,
        prep: Preprocessing | None,
        class_names: tuple[str, ...] | None,
        hub: HubConfig,
        multi_label: bool = False,
    ) -> None:
        self.template = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format)
        self.template.pretrained_cfg = own_config(getattr(self.template, "pretrained_cfg", {}))
        self.prep, self.class_names, self.hub, self.multi_label = prep, class_names, hub, multi_label

    def write(self, folder: Path, state: dict[str, torch.Tensor], facts: Facts) -> None:
        """Replaces `folder` with one for the weights `state`, which must have the model's keys; split BatchNorm may add some."""
        self.template.load_state_dict(without_auxiliary(state), strict=True)

        def write(fresh: Path) -> None:
            with _unshared(self.template):
                save_for_hf(
                    self.template,
                    str(fresh),
                    model_config=self._model_config(),
                    safe_serialization=True,
                    data_config=None if self.prep is None else dataclasses.asdict(self.prep),
                )
            self.describe(fresh, facts)
            # safetensors makes its file readable by the owner only; use the permissions that the umask gives to other files.
            (fresh / WEIGHTS).chmod((fresh / CARD).stat().st_mode)

        folder.parent.mkdir(parents=True, exist_ok=True)
        replace_atomically(folder, write)

    @staticmethod
    def describe(folder: Path, facts: Facts) -> None:
        """Rewrites the card of the model in `folder`."""
        write_whole(folder / CARD, render(json.loads((folder / CONFIG).read_text()), facts))

    def _model_config(self) -> dict[str, Any]:
        given = {"tag": self.hub.tag, "license": self.hub.license}
        config: dict[str, Any] = {"pretrained_cfg": {key: value for key, value in given.items() if value is not None}}
        config |= {PROBLEM: SEVERAL_LABELS} if self.multi_label else {}
        return config | ({"label_names": list(self.class_names)} if self.class_names else {})


@contextlib.contextmanager
def _unshared(model: nn.Module) -> Iterator[None]:
    """A context in which no two tensors of the model's ``state_dict()`` share memory.

    safetensors refuses shared memory, which CoaT has. Each name keeps its own tensor, so timm loads the file like any other.
    """

    def state_dict() -> dict[str, torch.Tensor]:
        seen: set[int] = set()
        copied = {}
        for name, tensor in type(model).state_dict(model).items():
            copied[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
            seen.add(tensor.data_ptr())
        return copied

    model.state_dict = state_dict  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.state_dict
