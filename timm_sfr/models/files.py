"""The files of a model: config.json and model.safetensors, checked before they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from torch import nn

from timm_sfr.utils.errors import UserError
from timm_sfr.utils.hub_client import reason

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


# What an architecture's default configuration says of the weights that timm publishes; ours are others.
PROVENANCE = (
    "tag", "url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "origin_url", "paper_ids", "paper_name",
    "license", "notes", "description", "custom_load", "test_input_size", "test_crop_pct", "test_pool_size", "label_names",
    "label_descriptions", "label_offset",
)  # fmt: skip


def own_config(config: dict[str, Any]) -> dict[str, Any]:
    """timm's pretrained configuration of an architecture without what it says of the weights that timm publishes."""
    return {key: value for key, value in config.items() if key not in PROVENANCE}


def check_folder(folder: Path, name: str, weights: bool) -> None:
    """Looks at what timm is about to load.

    Raises:
        UserError: if the configuration is no model's of timm's, or `weights` are wanted and are not whole safetensors.
    """
    try:
        architecture = str(json.loads((folder / CONFIG).read_text(encoding="utf-8"))["architecture"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"model: the {CONFIG} of {name!r} is damaged or not timm's: {reason(error)}") from error
    if not timm.is_model(architecture):
        raise UserError(
            f"model: {name!r} is a {architecture!r}, which neither timm {timm.__version__} nor timm_sfr has; import what "
            "adds it to timm first, or install a newer one"
        )
    if not weights:
        return
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"model: {name!r} has no {WEIGHTS}; a pickle is not loaded")
    try:
        with safe_open(folder / WEIGHTS, "pt"):  # reads the header, and whether the file is as long as that says
            pass
    except (SafetensorError, OSError) as error:
        raise _damaged(name, error) from error


def check_dtypes(folder: Path, model: nn.Module, name: str) -> None:
    """Raises UserError if a tensor of the weights is of another kind than the model's: timm would convert it silently."""
    expected = model.state_dict()
    with safe_open(folder / WEIGHTS, "pt") as file:
        for key in file.keys():  # noqa: SIM118  no mapping
            found = file.get_slice(key).get_dtype()
            if key in expected and expected[key].is_floating_point() != (found[0] in "FB" and found != "BOOL"):
                dtype = str(expected[key].dtype).removeprefix("torch.")
                raise UserError(
                    f"model: the weights of {name!r} do not fit: expected {key} to be {dtype}; got {found}; publish or "
                    "train them again"
                )


def _damaged(name: str, error: Exception) -> UserError:
    return UserError(f"model: the weights of {name!r} are damaged: {error}; download or train them again")
