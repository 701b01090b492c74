"""Checks a model's files, config.json and model.safetensors, before timm loads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from torch import nn

from timm_sfr.utils.errors import UserError
from timm_sfr.utils.hub_client import reason

PROBLEM, SEVERAL_LABELS = "problem_type", "multi_label_classification"  # in config.json, as transformers' models
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
# Keys in an architecture's default configuration that describe the weights that timm publishes, not ours.
PROVENANCE = (
    "tag", "url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "origin_url", "paper_ids", "paper_name",
    "license", "notes", "description", "custom_load", "test_input_size", "test_crop_pct", "test_pool_size", "label_names",
    "label_descriptions", "label_offset", PROBLEM,
)  # fmt: skip


def own_config(config: dict[str, Any]) -> dict[str, Any]:
    """Returns timm's pretrained configuration of an architecture without the keys on the weights that timm publishes."""
    return {key: value for key, value in config.items() if key not in PROVENANCE}


def made_up_name(index: int) -> str:
    """Returns the name of a class of which the training data has no images (``--num-classes`` above theirs)."""
    return f"class {index}"


def class_list(names: Any, count: int) -> list[str] | None:
    """Returns the names of `count` classes, a list or a dictionary by number, as a list; None if they do not fit."""
    if isinstance(names, Mapping):
        names = [names.get(index, names.get(str(index))) for index in range(count)] if len(names) == count else None
    if not names or len(names) != count or None in names:
        return None
    return [str(name) for name in names]


def several_labels(model: nn.Module) -> bool:
    """Returns whether an image may have several of the model's classes, as its ``config.json`` says."""
    return model.pretrained_cfg.get(PROBLEM) == SEVERAL_LABELS


def check_folder(folder: Path, name: str, weights: bool) -> None:
    """Checks the configuration in a folder, and with `weights` also the weights, before timm loads them.

    Raises:
        UserError: if the configuration is not of a model that timm has, or the weights are not intact safetensors.
    """
    try:
        architecture = str(json.loads((folder / CONFIG).read_text(encoding="utf-8"))["architecture"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"model: the {CONFIG} of {name!r} is damaged or not timm's: {reason(error)}") from error
    if not timm.is_model(architecture):
        raise UserError(
            f"model: {name!r} is a {architecture!r}, which neither timm {timm.__version__} nor timm_sfr has; import the "
            "package that adds it to timm, or install a newer timm"
        )
    if not weights:
        return
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"model: {name!r} has no {WEIGHTS}; a pickle is not loaded")
    try:
        with safe_open(folder / WEIGHTS, "pt"):  # reads the header and checks the file's length
            pass
    except (SafetensorError, OSError) as error:
        raise _damaged(name, error) from error


def check_dtypes(folder: Path, model: nn.Module, name: str) -> None:
    """Raises UserError if float and non-float dtypes of weights and model differ: timm would convert them silently."""
    expected = model.state_dict()
    with safe_open(folder / WEIGHTS, "pt") as file:
        for key in file.keys():  # noqa: SIM118  it is not a mapping
            found = file.get_slice(key).get_dtype()
            if key in expected and expected[key].is_floating_point() != (found[0] in "FB" and found != "BOOL"):
                dtype = str(expected[key].dtype).removeprefix("torch.")
                raise UserError(
                    f"model: the weights of {name!r} do not fit: expected {key} to be {dtype}; got {found}; publish or "
                    "train them again"
                )


def _damaged(name: str, error: Exception) -> UserError:
    return UserError(f"model: the weights of {name!r} are damaged: {error}; download or train them again")
