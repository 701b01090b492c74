"""Loads a model from a run's folder, a repository on the Hub, the zoo, or timm, by one function.

From a folder or the Hub nothing is unpickled: only ``config.json`` and ``model.safetensors`` are read, and only from the named
folder or commit: references to other files or places in a configuration are not followed.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from timm.models import load_checkpoint, load_state_dict, resolve_model_input_args
from torch import nn

from timm_sfr.config import DEFAULT_MODEL, ModelConfig, check_repo_id
from timm_sfr.method.probe import MISFITS, model_name
from timm_sfr.models.files import CONFIG, PROBLEM, WEIGHTS, _damaged, check_dtypes, check_folder, class_list, own_config
from timm_sfr.models.zoo import ZooEntry, loading, zoo
from timm_sfr.utils.console import counted, logger
from timm_sfr.utils.errors import HubError, UserError, near_matches, near_paths
from timm_sfr.utils.hub_client import check_token, hub_errors, quick_offline, reason


def create_model(
    name: str | Path,
    pretrained: bool = True,
    num_classes: int | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Returns the timm model that `name` refers to, in evaluation mode if its weights were loaded.

    Args:
        name: ``USER/NAME`` or ``hf-hub:USER/NAME[@REVISION]`` on the Hub; a folder with ``config.json`` and
            ``model.safetensors``, or a run's folder; a name of the zoo, such as ``resnet20_cifar.sfr_digits``; or any
            other name that timm knows.
        pretrained: Load the weights; if False, only the architecture at its recorded size.
        num_classes: Number of classes; if it differs from that of the weights, the classifier gets new weights.
        revision: A branch, tag or commit of the repository.
        token: A token, for private repositories; by default that of ``hf auth login`` or HF_TOKEN.
        cache_dir: Folder for downloads; by default huggingface_hub's cache. Cached files need no network.
        kwargs: Further arguments of ``timm.create_model``.

    Raises:
        UserError: if the model does not exist, its files do not fit together, or its weights are a pickle instead of
            safetensors.
        HubError: if the model is on the Hub and cannot be downloaded.
    """
    name = str(name)
    arguments = {"pretrained": pretrained, "num_classes": num_classes, **kwargs}
    where = {"revision": revision, "token": check_token(token), "cache_dir": cache_dir}
    entry = zoo().get(name)
    if entry is not None and (entry.file is None or revision is not None) and pretrained:
        return _from_folder(_download(entry.repo_id, where, entry=entry), name, arguments)
    if entry is not None and not entry.available:  # not a tag that timm knows
        return _create(name.split(".")[0], name, arguments | {"pretrained_cfg": entry.pretrained_cfg()})
    folder = None if timm.is_model(name) else _local(name)
    if revision is not None and (folder is not None or timm.is_model(name)):
        raise UserError(f"revision: {name!r} is not on the Hub and has no revisions; leave the revision out")
    if folder is not None:
        return _from_folder(folder, name, arguments)
    if ":" in name or "/" in name:
        return _from_folder(_from_hub(name, where, pretrained), name, arguments)
    if not timm.is_model(name):
        known = [*zoo(), *timm.list_models()]
        raise UserError(f"model: there is no {name!r}{near_matches(name, known) or '; timm.list_models() lists them'}")
    return _create(name, name, arguments | {"cache_dir": cache_dir})


def base_folder(name: str, weights: bool) -> Path:
    """Returns the local folder of an ``hf-hub:`` or ``local-dir:`` name, checked, with the weights if asked."""
    folder = _local(name) or _from_hub(name, {"revision": None, "token": None, "cache_dir": None}, weights)
    check_folder(folder, name, weights)
    return folder


def new_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """Returns the timm model with `num_classes` outputs for the configured input.

    Raises:
        UserError: if timm does not know the name (with near matches), or arguments or weights do not fit the model.
    """
    name = source = config.model or DEFAULT_MODEL
    plain = name.split(".")[0]
    folder = None
    if ":" in name or (not timm.is_model(plain) and Path(name).is_dir()):
        try:
            folder = base_folder(name, config.pretrained)
        except HubError as error:  # the exit status of a HubError means that a finished run was not published
            raise UserError(str(error)) from error
        source = f"local-dir:{folder}"
    elif not timm.is_model(plain):
        if "/" in name:
            hub = f"; a model on the Hub is hf-hub:{name}" if name.count("/") == 1 else ""
            hint = f", and there is no such folder{hub}"
        else:
            hint = near_matches(plain, timm.list_models()) or "; timm.list_models() lists them"
        raise UserError(f"model: timm has no model {name!r}{hint}")
    if folder is not None and config.pretrained_path is not None:
        raise UserError(f"pretrained-path: {name!r} has weights of its own; leave the option out, or give a name of timm's")
    arguments = _model_arguments(config)
    request = {name: getattr(config, name) for name in ("img_size", "input_size", "in_chans")}
    try:
        online = _downloads(source, {"pretrained": config.pretrained})
        with quick_offline() if online else nullcontext(), _missing_weights() as missing:
            model = timm.create_model(
                pretrained=config.pretrained,
                **resolve_model_input_args(source, request, num_classes=num_classes, **arguments),
            )
        if folder is not None and config.pretrained:
            check_dtypes(folder, model, name)
        if config.pretrained_path is not None:  # what timm says of its own weights is not true of these
            _check_all_loaded(model, missing, config.pretrained_path)
            model.pretrained_cfg = {**own_config(model.pretrained_cfg), "num_classes": num_classes}
        if config.initial_checkpoint:
            _load(model, config.initial_checkpoint)
        _scale_head(model, config, name)
        if config.grad_checkpointing:
            model.set_grad_checkpointing(True)
    except UserError:
        raise
    except (*MISFITS, OSError, SafetensorError, UnpicklingError, EOFError) as error:
        raise UserError(f"model: cannot create {name!r}: {reason(error)}") from error
    if folder is not None and name.startswith(("hf-hub:", "hf_hub:")):
        model.pretrained_cfg["hf_hub_id"] = name.split(":", 1)[1]  # where the folder came from
    if getattr(model, "num_classes", 0) != num_classes:
        raise UserError(f"model: {name!r} has no classifier for {num_classes} classes")
    return model


@contextmanager
def _missing_weights() -> Iterator[list[str]]:
    """A context that collects the names of the weights that a pretrained file lacks, which timm only logs."""
    names: list[str] = []
    log = logging.getLogger("timm.models._builder")
    level, effective = log.level, log.getEffectiveLevel()

    def collect(record: logging.LogRecord) -> bool:
        found = re.match(r"Missing keys \((.*?)\)", record.getMessage())
        names.extend(found[1].split(", ") if found else ())
        return record.levelno >= effective

    log.addFilter(collect)
    log.setLevel(logging.INFO)
    try:
        yield names
    finally:
        log.setLevel(level)
        log.removeFilter(collect)


def _check_all_loaded(model: nn.Module, missing: list[str], path: str) -> None:
    """Raises UserError if weights of the model outside its classifier are among those that the file lacks."""
    classifier = model.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{name}." for name in ((classifier,) if isinstance(classifier, str) else classifier))
    lacking = [name for name in missing if not name.startswith(heads)]
    if lacking:
        raise UserError(f"pretrained-path: expected weights of the same architecture; {path!r} lacks "
                        f"{counted(len(lacking), 'weight')} of the model, such as {lacking[0]!r}; give another file")  # fmt: skip


def _model_arguments(config: ModelConfig) -> dict[str, Any]:
    """Returns the arguments of ``timm.create_model`` that the options ask for; those of ``--model-kwargs`` win."""
    arguments = {
        "drop_rate": config.drop,
        "drop_path_rate": config.drop_path,
        "drop_block_rate": config.drop_block,
        "global_pool": config.gp,
        "bn_momentum": config.bn_momentum,
        "bn_eps": config.bn_eps,
    }
    if config.pretrained_path is not None:
        if not Path(config.pretrained_path).is_file():
            raise UserError(f"pretrained-path: no such file: {config.pretrained_path!r}{near_paths(config.pretrained_path)}")
        # timm makes a new classifier, because no model has -1 classes.
        arguments["pretrained_cfg_overlay"] = {"file": config.pretrained_path, "num_classes": -1}
    return {**arguments, **(config.model_kwargs or {})}


def _scale_head(model: nn.Module, config: ModelConfig, name: str) -> None:
    """Scales the classifier's weights and sets its biases as the options ask; raises UserError if it lacks them."""
    scale, bias = config.head_init_scale, config.head_init_bias
    if scale is None and bias is None:
        return
    heads = model.get_classifier()
    for head in heads if isinstance(heads, (tuple, list)) else (heads,):
        if getattr(head, "bias", None) is None or getattr(head, "weight", None) is None:
            raise UserError(f"head-init-scale and head-init-bias: the classifier of {name!r} has no weights or no biases")
        with torch.no_grad():
            if scale is not None:
                head.weight.mul_(scale)
                head.bias.mul_(scale)
            if bias is not None:
                head.bias.fill_(bias)


def _local(name: str) -> Path | None:
    """Returns the model folder that `name` refers to, directly or as a run's folder; None if it is not a folder."""
    given = os.path.expanduser(name.removeprefix("local-dir:"))
    for folder in (Path(given), Path(given) / "model"):
        if (folder / CONFIG).is_file():
            return folder
    if name.startswith("local-dir:") or given.startswith((".", "/", "~")):
        raise UserError(
            f"model: {given!r} has no {CONFIG} and no model/{CONFIG}{near_paths(given)}; use the folder that the training printed"
        )
    return None


def _from_hub(name: str, where: dict[str, Any], weights: bool) -> Path:
    """Downloads ``[hf-hub:]USER/NAME[@REVISION]``; returns its folder in the cache."""
    repo_id, _, at = name.removeprefix("hf-hub:").removeprefix("hf_hub:").partition("@")
    if repo_id.count("/") != 1 and name == repo_id:
        raise UserError(f"model: {name!r} is neither a folder nor a USER/NAME on the Hub{near_paths(name)}")
    check_repo_id(repo_id, "model")
    return _download(repo_id, where | {"revision": where["revision"] or at or None}, weights)


def _download(repo_id: str, where: dict[str, Any], weights: bool = True, entry: ZooEntry | None = None) -> Path:
    """Downloads a repository's configuration and, if asked, its weights; returns their folder in the cache."""
    revision, token = where["revision"], where["token"]
    what = f"model: cannot load {repo_id}{f' at {revision}' if revision else ''}"
    try:
        with loading(entry, token) if entry is not None else hub_errors(what, token=token), quick_offline():
            config = hf_hub_download(repo_id, CONFIG, **where)
            if weights:  # of the same commit
                hf_hub_download(repo_id, WEIGHTS, **where | {"revision": Path(config).parent.name})
    except HubError as error:
        cause = error.reason
        if isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
            raise HubError(
                f"{what}: expected {CONFIG} and {WEIGHTS} on {revision or 'main'}; at least one is missing, and a pickle is "
                "not loaded"
            ) from error
        raise
    return Path(config).parent


def _from_folder(folder: Path, name: str, arguments: dict[str, Any]) -> nn.Module:
    """Returns timm's model from the files in `folder`, loading only safetensors."""
    check_folder(folder, name, arguments["pretrained"])
    model = _create(f"local-dir:{folder}", name, arguments)
    kind = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get(PROBLEM)
    if kind is not None:
        model.pretrained_cfg[PROBLEM] = kind  # timm leaves it out
    if arguments["pretrained"]:
        check_dtypes(folder, model, name)
    return model


def _create(source: str, name: str, arguments: dict[str, Any]) -> nn.Module:
    with hub_errors(f"model: cannot load {name!r}"), quick_offline() if _downloads(source, arguments) else nullcontext():
        try:
            model = timm.create_model(source, **arguments)
        except UserError:
            raise
        except SafetensorError as error:
            raise _damaged(name, error) from error
        except (RuntimeError, TypeError, ValueError, AssertionError, KeyError) as error:
            raise UserError(f"model: the files or arguments of {name!r} do not fit it: {reason(error)}") from error
    names = model.pretrained_cfg.get("label_names")
    if names:
        # With `features_only`, timm returns a network without a classifier.
        found = class_list(names, getattr(model, "num_classes", len(names)))
        if found is None:  # the names belong to another classifier
            model.pretrained_cfg = {key: value for key, value in model.pretrained_cfg.items() if not key.startswith("label_")}
        elif isinstance(names, Mapping):
            model.pretrained_cfg = {**model.pretrained_cfg, "label_names": found}
    return model.eval() if arguments["pretrained"] else model


def _downloads(source: str, arguments: dict[str, Any]) -> bool:
    """Whether timm needs the Hub for this model."""
    return bool(arguments["pretrained"]) and not source.startswith("local-dir:") and source not in zoo()


def _load(model: nn.Module, path: str) -> None:
    """Loads a file of weights with timm; skips a classifier for another number of classes and logs that.

    Raises:
        UserError: if it is missing, does not fit, or contains anything but tensors, numbers and texts.
    """
    if (Path(path) / "model" / WEIGHTS).is_file():
        raise UserError(f"initial-checkpoint: {path!r} is a folder; give the file {str(Path(path) / 'model' / WEIGHTS)!r}")
    if not Path(path).is_file():
        raise UserError(f"initial-checkpoint: no such file: {path!r}{near_paths(path)}")
    try:
        if Path(path).suffix.lower() in (".npz", ".npy"):  # of JAX: each model has a loader of its own
            load_checkpoint(model, path)
            return
        state = load_state_dict(path)
    except Exception as error:
        if not isinstance(error, UnpicklingError) and "weights_only" not in str(error):
            raise
        raise UserError(
            f"initial-checkpoint: {path!r} is not a file of weights, or has more than tensors, numbers and texts, and is not "
            "unpickled; if you trust it, convert it to safetensors"
        ) from error
    _fit_state(model, state, path)


def _fit_state(model: nn.Module, state: dict[str, Any], path: str) -> None:
    """Loads a state dictionary.

    Raises:
        UserError: if a tensor other than the classifier's is missing, left over or of another shape.
    """
    own, heads = model.state_dict(), model.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    other = [key for key in own if key in state and own[key].shape != state[key].shape]
    classifier = [key for key in other if heads and key.startswith(heads)]
    wrong = [f"{key} is {tuple(state[key].shape)}, expected {tuple(own[key].shape)}" for key in other if key not in classifier]
    # Old files lack the counts of BatchNorm's batches, which nothing uses with a momentum.
    counts = [key for key in own if key not in state and key.endswith(".num_batches_tracked")]
    wrong += [f"{key} is missing" for key in own if key not in state and key not in counts]
    wrong += [f"{key} is left over" for key in state if key not in own]
    if wrong:
        more = f" (and {len(wrong) - 1} more like it)" if len(wrong) > 1 else ""
        raise UserError(f"initial-checkpoint: {path!r} does not fit {model_name(model)}: {wrong[0]}{more}; give --model the "
                        "architecture that the weights are of, with its --model-kwargs and --in-chans")  # fmt: skip
    model.load_state_dict({**state, **{key: own[key] for key in (*classifier, *counts)}})
    if classifier:
        logger.info(f"initial-checkpoint: the classifier in {path} is for {len(state[classifier[-1]])} classes and is left out; "
                    f"the model starts with a new one for {model.num_classes}")  # fmt: skip
