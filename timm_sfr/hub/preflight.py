"""What is checked before anything is published, so that nothing fails after a long training or leaves half a repository.

`check_push` and `check_card` ask the Hub before training. A push calls `check_run`, `check_space` and `validate_card` before it
creates a repository, and `refuse_public` right after.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, RepoCard, SpaceCard
from huggingface_hub.errors import RepositoryNotFoundError
from jinja2 import UndefinedError
from safetensors import SafetensorError, safe_open

from timm_sfr.config import HubConfig
from timm_sfr.hub.card import Facts, card_head
from timm_sfr.hub.space import MARK, UNTOUCHED
from timm_sfr.models.files import CONFIG, WEIGHTS
from timm_sfr.runs.records import Run, read_finished
from timm_sfr.utils.console import logger
from timm_sfr.utils.errors import HubError, UserError
from timm_sfr.utils.hub_client import hub_errors, transient

RUN_FILES = ("args.yaml", "summary.csv", "metrics.json")


def check_push(hub: HubConfig) -> bool:
    """Checks before training that the token can write to the repository that `hub` names.

    The Hub must know the token, the token must not be read-only, the repository must belong to its user or to an organisation
    in which the user can write, and it must not be public if `hub` asks for private. The permissions of a fine-grained token
    are not checked. If the Hub cannot be reached, this only logs a warning, because it may be reachable after training.

    Returns:
        Whether the Hub could be reached.

    Raises:
        UserError: if there is no token, or the Hub refuses.
    """
    api, repo_id = HfApi(), str(hub.push_to_hub)
    with _before_training(repo_id) as what:
        check_owner(api, repo_id, what)
        if hub.private:
            with contextlib.suppress(RepositoryNotFoundError):
                refuse_public(api, repo_id)
        return True
    return False


def check_card(hub: HubConfig, options: dict[str, Any]) -> None:
    """Checks before training that the Hub accepts a card with the licence of `hub` and the dataset in the run's `options`.

    Raises:
        UserError: if the Hub refuses the card, with its reasons.
    """
    repo_id = str(hub.push_to_hub)
    head = card_head(repo_id.split("/")[1], {"pretrained_cfg": {"license": hub.license}}, Facts(options=options))
    with _before_training(repo_id):
        validate_card(f"---\n{head.to_yaml()}\n---\n")


def check_run(path: Path) -> Run:
    """Returns the records of the run in a folder, which can be published.

    Raises:
        UserError: if the run is unfinished, or a file is missing or damaged.
    """
    needed = (f"model/{CONFIG}", f"model/{WEIGHTS}", *RUN_FILES)
    missing = [name for name in needed if not (path / name).is_file()]
    if missing and path.name == "model" and (path.parent / "args.yaml").is_file():
        raise UserError(f"run: {str(path)!r} is a run's model folder; give the run: {str(path.parent)!r}")
    if missing:
        raise UserError(f"run: {str(path)!r} is not a finished run: it has no {', '.join(missing)}; give the folder that "
                        "the training printed")  # fmt: skip
    with readable(path, WEIGHTS), safe_open(path / "model" / WEIGHTS, framework="pt"):
        pass
    run = read_finished(path)
    with readable(path, "metrics.json or args.yaml"):
        unfinished = run.missing_epochs
    if unfinished:
        done, asked = unfinished
        raise UserError(
            f"run: {str(path)!r} stopped after {done} of {asked} epochs; finish it with --resume {path}, then publish it"
        )
    return run


@contextlib.contextmanager
def readable(run: Path, name: str) -> Iterator[None]:
    """A context that raises UserError with the file's `name` if the file cannot be read."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, UndefinedError) as error:
        raise UserError(
            f"run: {name} of {str(run)!r} is damaged: {error}; restore it from a copy, or train again with --config "
            f"{run / 'args.yaml'}"
        ) from error


def check_space(api: HfApi, space: str, model: str, card: str, private: bool) -> None:
    """Checks that the token can write to the `model` and the Space, and that the Space is free, unfilled, or written by us.

    Raises:
        UserError: if not; ValueError if the Space is public and the model is not, or the Hub refuses its `card`.
    """
    for repo_id in (model, space):
        check_owner(api, repo_id, f"push-to-hub: {repo_id} could not be published")
    with contextlib.suppress(RepositoryNotFoundError):
        private = private or bool(api.model_info(model).private)
    with contextlib.suppress(RepositoryNotFoundError):
        info = api.space_info(space)
        tags = (info.card_data.to_dict() if info.card_data else {}).get("tags") or []
        if {file.rfilename for file in info.siblings or []} - UNTOUCHED and MARK not in tags:
            raise UserError(
                f"space: {space} exists and was not made by timm_sfr (its README.md has no tag {MARK}); choose another "
                "name: --space USER/SPACE"
            )
        if private:
            refuse_public(api, space, "space")
    validate_card(card, SpaceCard)


def check_owner(api: HfApi, repo_id: str, what: str) -> None:
    """Raises UserError, which begins with `what`, if the token is read-only, or of neither the owner nor a member."""
    who = api.whoami()
    if ((who.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise UserError(f"{what}: the token is read-only; create one with write access")
    groups = [group for group in who.get("orgs") or [] if group.get("roleInOrg") != "read"]
    names = [str(account["name"]) for account in (who, *groups) if account.get("name")]
    owner = repo_id.split("/")[0]
    if names and owner.casefold() not in map(str.casefold, names):
        raise UserError(f"{what}: the token cannot write for {owner!r}; expected one of {', '.join(names)}")


def refuse_public(api: HfApi, repo_id: str, kind: str = "model") -> None:
    """Raises ValueError if the existing repository is public; `kind` is ``"model"`` or ``"space"``."""
    if api.repo_info(repo_id, repo_type=kind).private is False:
        raise ValueError(
            "it exists and is public; make it private in its settings on the Hub, or publish without asking for private"
        )


def validate_card(text: str, kind: type[RepoCard] = ModelCard) -> None:
    """Raises ValueError, with the Hub's reasons, if the Hub refuses the metadata of a card of this kind."""
    try:
        kind(text).validate()
    except ValueError as error:
        try:
            reasons = "; ".join(str(found["message"]) for found in json.loads(str(error))["errors"])
        except (ValueError, KeyError, TypeError):
            reasons = str(error)
        raise ValueError(f"the Hub refuses the card: {reasons}; see --hub-license and --hub-dataset") from None


@contextlib.contextmanager
def _before_training(repo_id: str) -> Iterator[str]:
    """A context that raises UserError if the Hub refuses, and only logs failures that may pass until training ends."""
    what = f"push-to-hub: {repo_id} could not be published"
    try:
        with hub_errors(what):
            yield what
    except HubError as error:
        if error.reason is None or not transient(error.reason):
            raise UserError(str(error)) from None
        logger.warning(f"{error}; training continues, and the push follows at its end")
