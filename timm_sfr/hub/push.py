"""Publishing on the Hugging Face Hub: the files of a run, or of a model, in one commit."""

from __future__ import annotations

import contextlib
import csv
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from timm.utils import unwrap_model
from torch import nn

from timm_sfr.config import HubConfig, check_branch, check_repo_id
from timm_sfr.hub.card import Facts, card_head, imports, render
from timm_sfr.hub.model_folder import Exporter
from timm_sfr.models.files import CARD, CONFIG, WEIGHTS
from timm_sfr.utils.console import logger
from timm_sfr.utils.errors import HubError, UserError
from timm_sfr.utils.files import read_yaml
from timm_sfr.utils.hub_client import bounded_xet, check_token, hub_errors, retried, transient
from timm_sfr.version import __version__

# Where the run was kept and published is nothing to repeat.
NOT_OTHERS = ("push_to_hub", "hub_private", "hub_revision", "output", "experiment")
RUN_FILES = ("args.yaml", "summary.csv", "metrics.json")
CARD_PICTURES = ("pictures/curves.png", "pictures/confusion.png", "pictures/reliability.png")
PICKLES = ("pytorch_model.bin",)


def push_to_hub(
    run_or_model: str | Path | nn.Module,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    license: str | None = None,
) -> str:
    """Publishes a finished run's best model, or a timm model, in one commit; returns the commit's address.

    A run's repository gets ``config.json``, ``model.safetensors``, a card made from its measured scores, ``args.yaml``
    (without where it was kept and pushed to), ``summary.csv``, ``metrics.json`` and pictures of its curves, its confusion matrix
    and its calibration; a model's the first three, without scores.
    Weights are the plain timm model's, as safetensors. The repository and the branch are made where they are missing. A run's
    files and a pickle that are there and are not among these are of other weights, and are deleted by the same commit.

    Args:
        run_or_model: A run's folder, a timm model, or an `SFRTask`.
        repo_id: ``USER/NAME``.
        private: Make the repository private, if it is made now; one that is there and public is refused.
        revision: Branch to publish on, ``main`` by default.
        token: A token with write access; by default that of ``hf auth login`` or HF_TOKEN.
        commit_message: The commit's title.
        license: Licence of the weights; by default what the run recorded, and none for a model.

    Raises:
        UserError: if there is nothing whole to publish.
        HubError: if the Hub cannot be reached or refuses; nothing is lost on the disk, and it can be called again.
    """
    check_repo_id(repo_id, "repo_id")
    check_branch(revision, "revision")
    token, source = check_token(token), _at(repo_id, revision)
    with TemporaryDirectory(prefix="timm_sfr-push-") as place:
        if isinstance(run_or_model, (str, Path)):
            files = run_files(Path(run_or_model), source, Path(place), license)
            again = _command(run_or_model, repo_id, private, revision, commit_message, license)
        else:
            files, again = model_files(run_or_model, source, Path(place), license), "call push_to_hub again"
        api = HfApi(token=token, library_name="timm_sfr", library_version=__version__)
        upload = _Upload(api, repo_id, revision, files, commit_message or f"Publish with timm_sfr {__version__}")
        with hub_errors(f"push-to-hub: {repo_id} is not published", again, token):
            # The card is checked before the repository is created: a refused push should leave none behind.
            retried(lambda: validate_card(files[CARD].read_text(encoding="utf-8")), logger.warning)
            retried(lambda: upload.create_repository(private), logger.warning)
            with bounded_xet():
                # The upload is separate from the commit, so that a long upload leaves the commit its own retries.
                retried(upload.send_files, logger.warning)
            return retried(upload.commit, logger.warning)


@dataclass(frozen=True)
class _Upload:
    """One push, step by step; each step may be repeated after a failure.

    Attributes:
        api: huggingface_hub's.
        repo_id: ``USER/NAME``.
        revision: The branch, None for ``main``.
        files: Path of each file by its name in the repository.
        message: The commit's title.
    """

    api: HfApi
    repo_id: str
    revision: str | None
    files: dict[str, Path]
    message: str

    def create_repository(self, private: bool) -> None:
        """Creates the repository and the branch where they are missing; raises ValueError if it is public against the wish."""
        # With False, an organisation whose repositories are private by default would get a public one.
        self.api.create_repo(self.repo_id, private=private or None, exist_ok=True)
        if private:
            refuse_public(self.api, self.repo_id)
        if self.revision is not None:
            self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)

    def send_files(self) -> None:
        """Uploads the large files."""
        self.api.preupload_lfs_files(self.repo_id, self._additions(), revision=self.revision)

    def commit(self) -> str:
        """Commits all files and deletes those of other weights; returns the commit's address."""
        # Asked again for every try, because a commit whose answer was lost may have been made.
        before = self.api.model_info(self.repo_id, revision=self.revision)
        present = {file.rfilename for file in before.siblings or []}
        stale = sorted({*RUN_FILES, *PICKLES, *CARD_PICTURES} & present - {*self.files})
        source, listed = _at(self.repo_id, self.revision), ", ".join(stale)
        if stale:
            logger.info(f"deleting from {source}, because they belong to other weights: {listed}")
        done = self.api.create_commit(
            self.repo_id,
            [*self._additions(), *(CommitOperationDelete(name) for name in stale)],
            commit_message=self.message,
            commit_description=f"Deleted, because they belong to other weights: {listed}" if stale else None,
            revision=self.revision,
        )
        if done.oid == before.sha:
            logger.info(f"{source} already has these files: nothing was sent")
        return str(done.commit_url)

    def _additions(self) -> list[CommitOperationAdd]:
        # New objects for every try: huggingface_hub notes in them what it has done. It sends no file twice anyway.
        return [CommitOperationAdd(name, path) for name, path in sorted(self.files.items())]


def run_files(run: Path, source: str, place: Path, license: str | None = None) -> dict[str, Path]:
    """What is published of a run as `source`, USER/NAME[@REVISION]: file name to path; what is made for it goes to `place`.

    `license`, if given, takes the place of the one that the run recorded.

    Raises:
        UserError: if the run lacks a file, or one cannot be read.
    """
    needed = {
        CONFIG: run / "model" / CONFIG,
        WEIGHTS: run / "model" / WEIGHTS,
        **{name: run / name for name in RUN_FILES},
    }
    missing = [str(path.relative_to(run)) for path in needed.values() if not path.is_file()]
    if missing and run.name == "model" and (run.parent / "args.yaml").is_file():
        raise UserError(f"run: {str(run)!r} is the model within a run; give the run: {str(run.parent)!r}")
    if missing:
        raise UserError(f"run: {str(run)!r} is no finished run: it has no {', '.join(missing)}; give the folder that the "
                        "training printed")  # fmt: skip
    options = {key: value for key, value in read_yaml(run / "args.yaml").items() if key not in NOT_OTHERS}
    if options.get("data_dir"):
        options["data_dir"] = PurePath(options["data_dir"]).name  # where it lies here is nobody's business
    with _whole(run, WEIGHTS), safe_open(needed[WEIGHTS], framework="pt") as weights:
        weights.keys()
    with _whole(run, CONFIG):
        config = json.loads(needed[CONFIG].read_text())
        if license is not None:
            config["pretrained_cfg"]["license"] = options["hub_license"] = license
    with _whole(run, "metrics.json"):
        metrics = json.loads(needed["metrics.json"].read_text())
        if (metrics.get("teacher") or {}).get("folder"):
            options["kd_model_name"] = metrics["teacher"]["name"]
    with _whole(run, "summary.csv"), needed["summary.csv"].open(newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    with _whole(run, f"{CONFIG}, metrics.json or summary.csv"):
        # Figures only: the images of the data may not be ours to publish.
        pictures = {name: run / name for name in CARD_PICTURES if (run / name).is_file()}
        card = render(config, Facts(metrics, options, rows, source, tuple(pictures)))
    done, asked = metrics["last"]["epoch"] + 1, metrics["epochs"]
    if done < asked:
        raise UserError(
            f"run: {str(run)!r} stopped after {done} of {asked} epochs; go on with --resume {run}, then publish it"
        )
    files = needed | pictures | {name: place / name for name in (CARD, CONFIG, "args.yaml")}
    files[CONFIG].write_text(json.dumps(config, indent=2), encoding="utf-8")
    files[CARD].write_text(card, encoding="utf-8")
    files["args.yaml"].write_text(yaml.safe_dump(options, sort_keys=False))
    return files


@contextlib.contextmanager
def _whole(run: Path, name: str) -> Iterator[None]:
    """Names the file that cannot be read."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"run: {name} of {str(run)!r} is damaged: {error}; get it from a copy, or train again with --config "
            f"{run / 'args.yaml'}"
        ) from error


def model_files(model: nn.Module, source: str, place: Path, license: str | None = None) -> dict[str, Path]:
    """What is published of a timm model or an `SFRTask` as `source`: configuration, weights and a card without scores.

    Raises:
        UserError: if it is no timm model.
    """
    plain = unwrap_model(getattr(model, "plain_model", model))
    plain = getattr(plain, "_orig_mod", plain)  # torch.compile's
    config = getattr(plain, "pretrained_cfg", None)
    if not isinstance(config, dict) or not config.get("architecture"):
        raise UserError(f"model: expected a model of timm's (timm.create_model); got {type(plain).__name__}")
    names = config.get("label_names")
    kept = tuple(names) if names and len(names) == getattr(plain, "num_classes", None) else None
    try:
        exporter = Exporter(plain, None, kept, HubConfig(license=license))
        exporter.write(place / "model", plain.state_dict(), Facts(source=source))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"model: cannot save {config['architecture']!r}: {error}") from error
    return {name: place / "model" / name for name in (CONFIG, WEIGHTS, CARD)}


def loading_line(run: Path, source: str) -> str:
    """The Python line that loads the model of `run` from `source`."""
    architecture = json.loads((run / "model" / CONFIG).read_text())["architecture"]
    return f'{imports(architecture)}; model = timm.create_model("{source}", pretrained=True).eval()'


def published(run: Path, url: str, repo_id: str, revision: str | None) -> str:
    """What is said after a push."""
    return f"published: {url}\nload it anywhere with: {loading_line(run, f'hf-hub:{_at(repo_id, revision)}')}"


def _at(repo_id: str, revision: str | None) -> str:
    return f"{repo_id}@{revision}" if revision else repo_id


def _command(run: str | Path, repo_id: str, private: bool, *values: str | None) -> str:
    """The command that publishes it; `values` are revision, title and licence."""
    words = ["timm-sfr", "push", str(run), repo_id, *(["--private"] if private else [])]
    for name, value in zip(("--revision", "--commit-message", "--hub-license"), values, strict=True):
        words += [name, value] if value else []
    return shlex.join(words)




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
    head = card_head(name, {"pretrained_cfg": {"license": hub.license}}, Facts(options=options))
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
        with hub_errors(what):
            yield what
    except HubError as error:
        if error.reason is None or not transient(error.reason):
            raise UserError(str(error)) from None
        logger.warning(f"{error}; training goes on, and the push is tried at its end")
