"""What a push would fail by, found before hours of training: the token, the repository, the card."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import RepositoryNotFoundError

from timm_sfr.card import Facts, metadata
from timm_sfr.hub_options import HubConfig
from timm_sfr.utils.errors import HubError, UserError
from timm_sfr.utils.hub_client import told, transient

_logger = logging.getLogger("timm_sfr")


def check_push(hub: HubConfig) -> bool:
    """Makes sure that the Hub knows the token, and that it may write to the repository that `hub` names.

    That is: it is not a token that only reads, the repository is its user's or that of an organisation in which they
    write, and it is not public where it is to be private. What a fine-grained token allows is not looked into.
    A Hub that cannot be reached now may be reached after training: that is only said.

    Returns:
        Whether the Hub could be reached.

    Raises:
        UserError: if there is no token, or the Hub refuses.
    """
    api, repo_id = HfApi(), str(hub.push_to_hub)
    with _in_time(repo_id) as what:
        who = api.whoami()
        if ((who.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
            raise UserError(f"{what}: the token only reads; make one with write access")
        groups = [group for group in who.get("orgs") or [] if group.get("roleInOrg") != "read"]
        mine = [str(some["name"]) for some in (who, *groups) if some.get("name")]
        owner = repo_id.split("/")[0]
        if mine and owner.casefold() not in map(str.casefold, mine):
            raise UserError(f"{what}: the token does not write for {owner!r}; expected any of {', '.join(mine)} there")
        if hub.private:
            with contextlib.suppress(RepositoryNotFoundError):
                refuse_public(api, repo_id)
        return True
    return False


def refuse_public(api: HfApi, repo_id: str) -> None:
    """Raises ValueError if the repository, which is there, is public."""
    if api.model_info(repo_id).private is False:
        raise ValueError(
            "it is there and public; make it private in its settings on the Hub, or publish it without asking for private"
        )


def check_card(hub: HubConfig, options: dict[str, Any]) -> None:
    """Makes sure that the Hub takes a card with the run's licence and dataset.

    Args:
        hub: With the licence resolved, see `resolve_hub`.
        options: The run's options.

    Raises:
        UserError: if not, with what it says is wrong.
    """
    name = str(hub.push_to_hub).split("/")[1]
    head = metadata(name, {"pretrained_cfg": {"license": hub.license}}, Facts(options=options))
    with _in_time(str(hub.push_to_hub)):
        validate_card(f"---\n{head.to_yaml()}\n---\n")


def validate_card(text: str) -> None:
    """Asks the Hub whether it takes the head of a card.

    Raises:
        ValueError: if not, with what it says is wrong.
    """
    try:
        ModelCard(text).validate()
    except ValueError as error:
        try:
            said = "; ".join(str(found["message"]) for found in json.loads(str(error))["errors"])
        except (ValueError, KeyError, TypeError):
            said = str(error)
        raise ValueError(f"the Hub refuses the card: {said}; see --hub-license and --hub-dataset") from None


@contextlib.contextmanager
def _in_time(repo_id: str) -> Iterator[str]:
    """What the Hub refuses is the user's mistake; what may pass until training ends is only said."""
    what = f"push-to-hub: {repo_id} could not be published"
    try:
        with told(what):
            yield what
    except HubError as error:
        if error.reason is None or not transient(error.reason):
            raise UserError(str(error)) from None
        _logger.warning(f"{error}; training goes on, and the push is tried at its end")
