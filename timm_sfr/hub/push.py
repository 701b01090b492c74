"""Publishes the files of a run or a model on the Hugging Face Hub, in one commit."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from timm.utils import unwrap_model
from torch import nn

from timm_sfr.config import DataConfig, HubConfig, check_branch, check_repo_id
from timm_sfr.hub.card import Facts, imports, render
from timm_sfr.hub.model_folder import Exporter
from timm_sfr.hub.preflight import RUN_FILES, check_run, check_space, readable, refuse_public, validate_card
from timm_sfr.hub.space import ARCHITECTURES, README, SDK, space_files
from timm_sfr.models.files import CARD, CONFIG, WEIGHTS, class_list, several_labels
from timm_sfr.utils.console import logger
from timm_sfr.utils.errors import UserError
from timm_sfr.utils.files import read_yaml
from timm_sfr.utils.hub_client import bounded_xet, check_token, hub_errors, retried
from timm_sfr.version import __version__

# Options on where the run is stored and published, which do not belong in the published args.yaml.
LOCAL_OPTIONS = ("push_to_hub", "hub_private", "hub_revision", "output", "experiment", "wandb_resume_id")
LOCAL_PATHS = ("data_dir", "class_map", "class_weights", "pretrained_path", "initial_checkpoint")  # published without folders
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
    space: str | None = None,
) -> str:
    """Publishes a finished run's best model, or a timm model, in one commit; returns the commit's address.

    For a run, the commit has ``config.json``, ``model.safetensors``, a card with the measured scores, ``args.yaml`` (without the
    options on where the run is stored and published), ``summary.csv``, ``metrics.json``, and pictures of the curves, the
    confusion matrix and the calibration. For a model, it has the first three, without scores.
    The weights are those of the plain timm model, as safetensors. The repository and the branch are created if missing. The
    same commit deletes a pickle and files of a run in the repository that belong to other weights.

    Args:
        run_or_model: A run's folder, a timm model, or an `SFRTask`.
        repo_id: ``USER/NAME``.
        private: Create the repository as private; an existing public one is refused.
        revision: Branch to publish on; by default ``main``.
        token: A token with write access; by default that of ``hf auth login`` or HF_TOKEN.
        commit_message: The commit's title.
        license: Licence of the weights; by default the one that the run recorded, and none for a model.
        space: ``USER/SPACE``: also publishes a Gradio Space to try the model in, by one commit; private if the model is.

    Raises:
        UserError: if the run is unfinished or damaged, the model is not timm's, or the Space is somebody's own work.
        HubError: if the Hub cannot be reached or refuses. The files on disk stay as they are, so call it again.
    """
    check_repo_id(repo_id, "repo_id")
    check_branch(revision, "revision")
    if space is not None:
        check_repo_id(space, "space")
    token, source = check_token(token), _at(repo_id, revision)
    with TemporaryDirectory(prefix="timm_sfr-push-") as place:
        if isinstance(run_or_model, (str, Path)):
            files = run_files(Path(run_or_model), source, Path(place), license)
            again = _command(run_or_model, repo_id, private, revision, commit_message, license, space)
        else:
            files, again = model_files(run_or_model, source, Path(place), license), "call push_to_hub again"
        api = HfApi(token=token, library_name="timm_sfr", library_version=__version__)
        upload = _Upload(api, repo_id, revision, files, commit_message or f"Publish with timm_sfr {__version__}")
        demo = None if space is None else upload.beside(space, Path(place) / "space")
        with hub_errors(f"push-to-hub: {repo_id} is not published", again, token):
            # Check everything before creating the repository, so that a refused push leaves none behind.
            if demo is not None:
                about = demo.files[README].read_text(encoding="utf-8")
                retried(lambda: check_space(api, space, repo_id, about, private))
            retried(lambda: validate_card(files[CARD].read_text(encoding="utf-8")))
            retried(lambda: upload.create_repository(private))
            with bounded_xet():
                # Upload separately from the commit, so that the commit has its own retries after a long upload.
                retried(upload.send_files)
            url = retried(upload.commit)
        if demo is not None:
            with hub_errors(f"push-to-hub: {url} is published, and its Space {space} is not", again, token):
                retried(lambda: demo.publish_beside(repo_id))
        return url


@dataclass(frozen=True)
class _Upload:
    """The steps of one push; each can be repeated after a failure."""

    api: HfApi
    repo_id: str
    revision: str | None  # the branch; None for ``main``
    files: dict[str, Path]  # by name in the repository
    message: str  # the commit's title
    kind: str = "model"  # or "space"
    # Files that a push without them deletes, because they belong to other weights.
    owned: frozenset[str] = frozenset({*RUN_FILES, *PICKLES, *CARD_PICTURES})

    def beside(self, space: str, place: Path) -> _Upload:
        """Returns the upload of a Space for this model, with its files written to `place`."""
        config = json.loads(self.files[CONFIG].read_text(encoding="utf-8"))
        options = read_yaml(self.files["args.yaml"]) if "args.yaml" in self.files else {}
        title, mode = space.split("/")[1], options.get("input_img_mode")
        files = space_files(config, self.repo_id, self.revision, title, place, mode)
        return _Upload(self.api, space, None, files, self.message, "space", frozenset({ARCHITECTURES}))

    def publish_beside(self, model: str) -> None:
        """Creates the Space and commits its files; it is private if the `model` is."""
        hidden = bool(self.api.model_info(model).private)
        self.create_repository(hidden)
        self.commit()
        logger.info(f"the Space is {constants.ENDPOINT}/spaces/{self.repo_id}")
        if hidden:
            logger.info(f"note: {model} is private; give the Space a secret HF_TOKEN, in its settings, that may read it")

    def create_repository(self, private: bool) -> None:
        """Creates the repository and the branch if missing; raises ValueError if it is public and `private` is set."""
        # None rather than False: False would create a public repository even if the organisation's default is private.
        sdk = SDK["sdk"] if self.kind == "space" else None
        self.api.create_repo(self.repo_id, private=private or None, exist_ok=True, repo_type=self.kind, space_sdk=sdk)
        if private:
            refuse_public(self.api, self.repo_id, self.kind)
        if self.revision is not None:
            self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)

    def send_files(self) -> None:
        """Uploads the large files."""
        self.api.preupload_lfs_files(self.repo_id, self._additions(), revision=self.revision)

    def commit(self) -> str:
        """Commits all files and deletes those of other weights; returns the commit's address."""
        # Ask again on every try: the commit may have succeeded although its answer was lost.
        before = self.api.repo_info(self.repo_id, revision=self.revision, repo_type=self.kind)
        present = {file.rfilename for file in before.siblings or []}
        stale = sorted(self.owned & present - {*self.files})
        source, listed = _at(self.repo_id, self.revision), ", ".join(stale)
        if stale:
            logger.info(f"deleting from {source}, because they belong to other weights: {listed}")
        done = self.api.create_commit(
            self.repo_id,
            [*self._additions(), *(CommitOperationDelete(name) for name in stale)],
            commit_message=self.message,
            commit_description=f"Deleted, because they belong to other weights: {listed}" if stale else None,
            revision=self.revision,
            repo_type=self.kind,
        )
        if done.oid == before.sha:
            logger.info(f"{source} already has these files: nothing was sent")
        return str(done.commit_url)

    def _additions(self) -> list[CommitOperationAdd]:
        # New objects on every try: huggingface_hub records its progress in them. It still sends no file twice.
        return [CommitOperationAdd(name, path) for name, path in sorted(self.files.items())]


def run_files(run: Path, source: str, place: Path, license: str | None = None) -> dict[str, Path]:
    """Returns the path of each file to publish of a run, by its name in the repository.

    Card, configuration, args.yaml and metrics.json differ from the run's, and are written to `place`.

    Args:
        run: The run's folder.
        source: The repository, ``USER/NAME[@REVISION]``.
        place: A folder.
        license: Replaces the licence that the run recorded.

    Raises:
        UserError: if the run is unfinished, or a file is missing or cannot be read.
    """
    found = check_run(run)
    options = {key: value for key, value in found.options.items() if key not in LOCAL_OPTIONS}
    unpublished = [name for name in LOCAL_PATHS if name != "data_dir" and options.get(name) not in (None, "", "auto")]
    for name in LOCAL_PATHS:
        if options.get(name):
            options[name] = PurePath(options[name]).name
    if options.get("model") != (model := _public_model(options.get("model"))):
        options["model"] = model
        unpublished.insert(0, "model")
    if options.get("dataset"):
        options["dataset"] = DataConfig(dataset=options["dataset"]).public_name()
    # Only figures: we may have no right to publish images of the data.
    pictures = {name: run / name for name in CARD_PICTURES if (run / name).is_file()}
    with readable(run, f"{CONFIG} or metrics.json"):
        teacher = found.metrics.get("teacher") or {}
        if teacher.get("folder"):
            options["kd_model_name"] = teacher["name"]
        config = json.loads((run / "model" / CONFIG).read_text())
        if license is not None:
            config["pretrained_cfg"]["license"] = options["hub_license"] = license
        facts = Facts(found.metrics, options, found.rows, source, tuple(pictures), unpublished=tuple(unpublished))
        card = render(config, facts)
        metrics = found.metrics | {"model": _public_model(found.metrics["model"])}
    files = {WEIGHTS: run / "model" / WEIGHTS, **{name: run / name for name in RUN_FILES}, **pictures}
    files |= {name: place / name for name in (CARD, CONFIG, "args.yaml", "metrics.json")}
    files[CONFIG].write_text(json.dumps(config, indent=2), encoding="utf-8")
    files[CARD].write_text(card, encoding="utf-8")
    files["args.yaml"].write_text(yaml.safe_dump(options, sort_keys=False))
    files["metrics.json"].write_text(json.dumps(metrics, indent=2), encoding="utf-8")
    return files


def model_files(model: nn.Module, source: str, place: Path, license: str | None = None) -> dict[str, Path]:
    """Writes a timm model or an `SFRTask` to `place`, with a card without scores; returns the files, as `run_files`.

    Raises:
        UserError: if it is not a timm model, or cannot be saved.
    """
    plain = unwrap_model(getattr(model, "plain_model", model))
    plain = getattr(plain, "_orig_mod", plain)  # unwraps torch.compile
    config = getattr(plain, "pretrained_cfg", None)
    if not isinstance(config, dict) or not config.get("architecture"):
        raise UserError(f"model: expected a timm model (from timm.create_model); got {type(plain).__name__}")
    kept = class_list(config.get("label_names"), getattr(plain, "num_classes", 0))
    try:
        several = several_labels(plain) or getattr(getattr(model, "loss", None), "multi_label", False)
        exporter = Exporter(plain, None, kept and tuple(kept), HubConfig(license=license), several)
        exporter.write(place / "model", plain.state_dict(), Facts(source=source))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"model: cannot save {config['architecture']!r}: {error}") from error
    return {name: place / "model" / name for name in (CONFIG, WEIGHTS, CARD)}


def loading_line(run: Path, source: str) -> str:
    """Returns the Python line that loads the model of `run` from `source`."""
    architecture = json.loads((run / "model" / CONFIG).read_text())["architecture"]
    return f'{imports(architecture)}; model = timm.create_model("{source}", pretrained=True).eval()'


def published(run: Path, url: str, repo_id: str, revision: str | None) -> str:
    """Returns the message after a successful push: the commit's address and the line that loads the model."""
    return f"published: {url}\nload it anywhere with: {loading_line(run, f'hf-hub:{_at(repo_id, revision)}')}"


def _public_model(name: str | None) -> str | None:
    """Returns the name of a run's model without the path to a folder; timm's names and hf-hub:USER/NAME stay."""
    folder = str(name or "").removeprefix("local-dir:")
    local = folder != str(name or "") or ("/" in folder and ":" not in folder)
    return PurePath(folder).name if local else name


def _at(repo_id: str, revision: str | None) -> str:
    return f"{repo_id}@{revision}" if revision else repo_id


def _command(run: str | Path, repo_id: str, private: bool, *values: str | None) -> str:
    """Returns the command that repeats the push; `values` are revision, title, licence and Space."""
    words = ["timm-sfr", "push", str(run), repo_id, *(["--private"] if private else [])]
    for name, value in zip(("--revision", "--commit-message", "--hub-license", "--space"), values, strict=True):
        words += [name, value] if value else []
    return shlex.join(words)
