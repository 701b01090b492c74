"""The zoo: each recipe in ``hub_configs/`` describes one model, a tag of an architecture that timm knows.

A recipe becomes a pretrained tag in timm when its weights exist.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from timm.models import PretrainedCfg, get_pretrained_cfg, model_entrypoint, register_model
from torch import nn

from timm_sfr.config import check_repo_id
from timm_sfr.models.files import own_config
from timm_sfr.utils.console import aligned
from timm_sfr.utils.errors import HubError, UserError
from timm_sfr.utils.files import read_yaml
from timm_sfr.utils.hub_client import hub_errors, network
from timm_sfr.utils.options import Checked, option

HERE = Path(__file__).resolve().parents[1]
WEIGHTS_FOLDER = HERE / "weights"
# An installed package has them inside, a clone next to the package.
CONFIGS = next((folder for folder in (HERE / "hub_configs", HERE.parent / "hub_configs") if folder.is_dir()), HERE)
OWNER = "timm-sfr"


@dataclass(frozen=True)
class Measured(Checked):
    """Scores of a recipe over several seeds at the last epoch, and of the published weights, from `benchmarks.zoo`."""

    split: str = option("validation", "split that they were measured on")
    images: int = option(0, "images in it")
    data: str = option("", "name of the data that they were trained and measured on")
    seeds: tuple[int, ...] = option((), "seeds")
    top1: float = option(0.0, "mean top-1 at the last epoch, percent")
    top1_interval: float = option(0.0, "half the width of its 95 % t-interval")
    top5: float = option(0.0, "mean top-5 at the last epoch, percent")
    published_top1: float = option(0.0, "top-1 of the published weights, percent")
    published_top5: float = option(0.0, "top-5 of the published weights, percent")
    published_seed: int = option(0, "their seed")
    published_epoch: int = option(0, "their epoch, from 1")
    hardware: str = option("", "what it was trained on")
    versions: dict | None = option(None, "versions of what it was trained with")
    date: str = option("", "when")


@dataclass(frozen=True)
class About(Checked):
    """The ``zoo:`` part of a recipe; the other keys are training options."""

    repo_id: str = option("", "repository on the Hub")
    num_classes: int = option(10, "classes")
    parameters: int = option(0, "parameters")
    weights: str | None = option(None, "file of weights in the package, once they are trained")
    label_names: tuple[str, ...] | None = option(None, "names of the classes")
    metrics: dict | None = option(None, "scores (`Measured`), or nothing if not yet measured")


@dataclass(frozen=True)
class ZooEntry:
    """A model of the zoo."""

    name: str  # in timm, ``ARCHITECTURE.TAG``
    recipe: Path
    options: dict[str, Any]  # of the training
    about: About

    @property
    def repo_id(self) -> str:
        """Its repository on the Hub, in the configured namespace."""
        owner, _, name = self.about.repo_id.rpartition("/")
        return f"{namespace() if owner in ('', OWNER) else owner}/{name or self.name}"

    @property
    def file(self) -> Path | None:
        """The file of its weights in the package, or None if there is none."""
        path = WEIGHTS_FOLDER / self.about.weights if self.about.weights else None
        return path if path is not None and path.is_file() else None

    @property
    def available(self) -> bool:
        """Whether its weights can be loaded: from the package, or from a namespace that the user has set."""
        return self.file is not None or namespace() != OWNER

    @property
    def dataset(self) -> str:
        """The name of its data."""
        found = (self.measured.data if self.measured else "", self.options.get("dataset"), self.options.get("hub_dataset"))
        return str(next(filter(None, found), ""))

    @property
    def measured(self) -> Measured | None:
        """Its scores, or None."""
        return Measured(**self.about.metrics) if self.about.metrics else None

    @property
    def command(self) -> str:
        """The command that trains it."""
        data = self.options.get("data_dir") or self.options.get("dataset")
        return f"timm-sfr train --config {self.recipe}{'' if data else ' --data-dir DIR'}"

    def pretrained_cfg(self) -> PretrainedCfg:
        """Returns timm's configuration for these weights: the architecture's, with the recipe's input, classes and source."""
        architecture, tag = self.name.split(".", 1)
        base = get_pretrained_cfg(architecture)
        known = own_config(dataclasses.asdict(base)) if base is not None else {}
        given = {key: self.options.get(key) for key in ("mean", "std", "interpolation", "crop_pct")}
        changes = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items() if v is not None}
        size = self.options.get("img_size")
        square = None if size is None else (self.options.get("in_chans") or 3, size, size)
        shape = self.options.get("input_size") or square
        if shape is not None:
            changes |= {"input_size": tuple(shape)}
            if known.get("pool_size") and known.get("input_size"):  # the last feature map's size; strides round up
                sides = zip(known["pool_size"], shape[1:], known["input_size"][1:], strict=True)
                changes |= {"pool_size": tuple(-(-pool * side // full) for pool, side, full in sides)}
        if self.file is not None:
            source = {"file": str(self.file)}
        else:  # without the file's name, timm may load a pickle
            source = {"hf_hub_id": self.repo_id, "hf_hub_filename": "model.safetensors"}
        changes |= {"architecture": architecture, "tag": tag, "num_classes": self.about.num_classes,
                    "label_names": self.about.label_names, "license": self.options.get("hub_license")}  # fmt: skip
        return PretrainedCfg(**known | changes | source)


class ZooTable(list):
    """A list of zoo entries that prints as two tables: the models with weights, and the recipes that wait for them."""

    def __str__(self) -> str:
        models, recipes = [("name", "parameters", "dataset", "top-1", "weights")], [("recipe", "parameters", "dataset")]
        for entry in self:
            about = (entry.name, f"{entry.about.parameters / 1e6:.2f} M", entry.dataset)
            if not entry.available:
                recipes.append(about)
                continue
            models.append((*about, _score(entry.measured), "come with the package" if entry.file else entry.repo_id))
        parts = ["\n".join(aligned(models))] if len(models) > 1 else []
        if len(recipes) > 1:
            parts.append(
                "recipes without weights; to train one: timm-sfr train --config "
                f"{CONFIGS / 'RECIPE.yaml'} [--data-dir DIR]\n" + "\n".join(aligned(recipes))
            )
        return "\n\n".join(parts)

    __repr__ = __str__


def _score(measured: Measured | None) -> str:
    if measured is None:
        return "not measured"
    interval = f" ± {measured.top1_interval:.2f}" if len(measured.seeds) > 1 else ""
    return f"{measured.top1:.2f}{interval} %"


@functools.cache
def namespace() -> str:
    """Returns the Hub user or organisation of the zoo's repositories: TIMM_SFR_NAMESPACE at import, or ``timm-sfr``."""
    name = os.environ.get("TIMM_SFR_NAMESPACE") or OWNER
    try:
        check_repo_id(f"{name}/name", "TIMM_SFR_NAMESPACE")
    except UserError:
        warnings.warn(f"TIMM_SFR_NAMESPACE: expected the name of a user or an organisation on the Hub; got {name!r}; "
                      f"using {OWNER!r}", stacklevel=2)  # fmt: skip
        return OWNER
    return name


@functools.cache
def zoo() -> dict[str, ZooEntry]:
    """Returns all entries by name.

    Raises:
        UserError: if a recipe cannot be read.
    """
    found = {}
    for path in sorted(CONFIGS.glob("*.yaml")):
        options = read_yaml(path)
        about = options.pop("zoo", None)
        try:
            entry = ZooEntry(path.stem, path, options, About(**about))
            Measured(**entry.about.metrics or {})
        except (TypeError, UserError) as error:
            raise UserError(f"hub_configs: {path}: the `zoo:` part cannot be read: {error}") from error
        found[path.stem] = entry
    return found


def list_pretrained(filter: str = "*") -> ZooTable:
    """Returns the zoo's entries with names that match `filter`; prints as a table of models and one of recipes."""
    return ZooTable(entry for name, entry in zoo().items() if fnmatch.fnmatch(name, filter))


def register() -> None:
    """Registers the zoo's models in timm: a tag each of its architecture, listed and created like timm's own.

    Recipes without weights are left out, so that everything that timm lists as pretrained loads.

    timm registers a module's ``default_cfgs`` together with an architecture, so a later tag has to register both again.
    """
    for entry in zoo().values():
        if not entry.available:
            continue
        architecture, tag = entry.name.split(".", 1)
        entrypoint = model_entrypoint(architecture)
        default = sys.modules[entrypoint.__module__].default_cfgs[architecture]
        if tag in default.cfgs:
            continue
        default.tags.append(tag)
        default.cfgs[tag] = entry.pretrained_cfg()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # timm warns that it overwrites the architecture: it is the same one
            register_model(_explaining(entrypoint))


@contextlib.contextmanager
def loading(entry: ZooEntry, token: str | None = None) -> Iterator[None]:
    """A context that raises `HubError` for Hub failures; if nothing can be downloaded, it names the command that trains it."""
    what = f"model: cannot load {entry.repo_id}"
    try:
        with hub_errors(what, token=token):
            yield
    except HubError as error:
        if isinstance(error.reason, RepositoryNotFoundError) and not isinstance(error.reason, GatedRepoError):
            raise HubError(f"{what}: it is not published yet (or private); to train it: {entry.command}") from None
        if entry.file is None and isinstance(error.reason, Exception) and network(error.reason):
            raise HubError(f"{error}; its weights do not come with the package; to train it: {entry.command}") from error
        raise


def _explaining(entrypoint: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Returns timm's entry point of an architecture with `loading`'s errors for the zoo's tags."""

    @functools.wraps(entrypoint)
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        given = kwargs.get("pretrained_cfg")
        tag = given.get("tag") if isinstance(given, dict) else getattr(given, "tag", given)
        entry = zoo().get(f"{entrypoint.__name__}.{tag}") if pretrained else None
        on_hub = entry is not None and entry.available and entry.file is None
        with loading(entry) if on_hub else contextlib.nullcontext():
            return entrypoint(pretrained=pretrained, **kwargs)

    return create
