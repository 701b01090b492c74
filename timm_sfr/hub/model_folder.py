"""The model folder of a run: what plain timm loads, from disk or from the Hub."""

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
from timm_sfr.models.files import CARD, CONFIG, WEIGHTS, own_config
from timm_sfr.utils.files import replace_atomically, write_whole

# Weights under these are taken to ask nothing of those that they taught.
PERMISSIVE = ("apache-2.0", "mit", "bsd-3-clause", "bsd-2-clause", "bsd", "cc0-1.0", "cc-by-4.0")


def resolve_hub(config: RunConfig, model: nn.Module, teacher: dict[str, Any] | None = None) -> HubConfig:
    """The hub options with tag and licence written out: ``sfr_DATASET``; Apache 2.0 for weights made from scratch.

    Weights that started from others keep those's licence, or have none where it is not known; nor have those that a teacher
    (its facts) under unknown terms, or such as reach further, has taught. `args.yaml` keeps what was asked for: another data
    set or start would make the answer wrong.
    """
    name = dataset_name({"dataset": config.data.dataset, "data_dir": config.data.data_dir})
    theirs = getattr(model, "pretrained_cfg", {}).get("license") if config.model.pretrained else None
    scratch = not config.model.pretrained and not config.model.initial_checkpoint
    free = teacher is None or teacher["license"] in PERMISSIVE
    return dataclasses.replace(
        config.hub,
        tag=config.hub.tag or (f"sfr_{name}" if config.sfr.enabled else name),
        license=config.hub.license or (("apache-2.0" if scratch else theirs) if free else None),
    )


class Exporter:
    """Writes ``config.json``, ``model.safetensors`` and ``README.md``; keeps an unwrapped copy of the model for it.

    Args:
        model: The timm model before any wrapping; copied to the CPU.
        prep: Its preprocessing, which goes into ``config.json``; None keeps what the model's configuration says.
        class_names: Names of its classes, if known.
        hub: Tag and licence of the weights, resolved.
    """

    def __init__(
        self, model: nn.Module, prep: Preprocessing | None, class_names: tuple[str, ...] | None, hub: HubConfig
    ) -> None:
        self.template = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format)
        self.template.pretrained_cfg = own_config(getattr(self.template, "pretrained_cfg", {}))
        self.prep, self.class_names, self.hub = prep, class_names, hub

    def write(self, folder: Path, state: dict[str, torch.Tensor], facts: Facts) -> None:
        """Replaces `folder` by one with the weights `state`, which must have exactly the model's keys."""
        self.template.load_state_dict(state, strict=True)

        def write(fresh: Path) -> None:
            with _apart(self.template):
                save_for_hf(
                    self.template,
                    str(fresh),
                    model_config=self._model_config(),
                    safe_serialization=True,
                    data_config=self._data_config(),
                )
            self.describe(fresh, facts)
            # safetensors leaves its file readable by the owner alone; give it what the user's umask gives the others.
            (fresh / WEIGHTS).chmod((fresh / CARD).stat().st_mode)

        folder.parent.mkdir(parents=True, exist_ok=True)
        replace_atomically(folder, write)

    @staticmethod
    def describe(folder: Path, facts: Facts) -> None:
        """Replaces the card of the model in `folder`."""
        text = render(json.loads((folder / CONFIG).read_text()), facts)
        write_whole(folder / CARD, text)

    def _model_config(self) -> dict[str, Any]:
        says = {"tag": self.hub.tag, "license": self.hub.license}
        found: dict[str, Any] = {"pretrained_cfg": {key: value for key, value in says.items() if value is not None}}
        return found | ({"label_names": list(self.class_names)} if self.class_names else {})

    def _data_config(self) -> dict[str, Any] | None:
        names = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
        return {name: getattr(self.prep, name) for name in names} if self.prep is not None else None


@contextlib.contextmanager
def _apart(model: nn.Module) -> Iterator[None]:
    """Inside, the model's ``state_dict()``, which timm saves, holds no memory twice: safetensors refuses it, and CoaT has some.

    Each name keeps its tensor, so that timm loads it as it loads any other.
    """

    def state_dict() -> dict[str, torch.Tensor]:
        seen: set[int] = set()
        found = {}
        for name, tensor in type(model).state_dict(model).items():
            found[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
            seen.add(tensor.data_ptr())
        return found

    model.state_dict = state_dict  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.state_dict
