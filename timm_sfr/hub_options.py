"""The options of publishing on the Hub, and what it takes for the name of a repository or a branch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from huggingface_hub.utils import HFValidationError, validate_repo_id

from timm_sfr.utils.errors import UserError
from timm_sfr.utils.options import Checked, option


@dataclass(frozen=True)
class HubConfig(Checked):
    """Publishing on the Hugging Face Hub, and what a model's files say of its weights."""

    prefix: ClassVar[str] = "hub_"

    push_to_hub: str | None = option(
        None, "publish the best model as USER/NAME on the Hugging Face Hub when training ends", name="push_to_hub"
    )
    private: bool = option(False, "make that repository private, if it is made now")
    revision: str | None = option(None, "branch to publish on (default: main)")
    license: str | None = option(
        None, "licence of the weights (default: apache-2.0; that of the pretrained weights, if any)"
    )
    tag: str | None = option(None, "timm tag of the weights (default: sfr_DATASET)")
    dataset: str | None = option(None, "id of the dataset on the Hub, for the model card (default: its name)")

    def check(self) -> None:
        """The repository must be USER/NAME."""
        if self.push_to_hub is not None:
            check_repo_id(self.push_to_hub, "push-to-hub")
        elif self.private or self.revision:
            raise UserError(
                "push-to-hub: --hub-private and --hub-revision are for a push; give --push-to-hub USER/NAME too"
            )
        check_branch(self.revision, "hub-revision")


def check_branch(name: str | None, option: str) -> None:
    """Raises UserError unless git takes `name` for a branch, or it is None."""
    if name is not None and (
        not re.fullmatch(r"(?![/.-])[^\s~^:?*\[\\@\x00-\x20\x7f]+(?<![/.])", name) or ".." in name or "//" in name
    ):
        raise UserError(f"{option}: expected the name of a branch, without blanks and without ~^:?*[@; got {name!r}")


def check_repo_id(repo_id: str, option: str) -> str:
    """`repo_id` as it is.

    Raises:
        UserError: unless the Hub takes it as USER/NAME.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(
            f"{option}: expected USER/NAME; got {repo_id!r}: {str(error).split(':')[0].rstrip('.')}"
        ) from error
    if repo_id.count("/") != 1:
        raise UserError(f"{option}: expected USER/NAME; got {repo_id!r}")
    return repo_id
