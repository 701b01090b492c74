"""A Gradio Space beside a published model: a page on the Hub on which anyone can classify an image with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, SpaceCardData
from huggingface_hub.errors import RepositoryNotFoundError
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from timm_sfr.data.transforms import img_mode
from timm_sfr.hub.card import NOT_THE_HUBS
from timm_sfr.models import SMALL_IMAGE_MODELS, cifar
from timm_sfr.models.files import PROBLEM, SEVERAL_LABELS
from timm_sfr.utils.errors import UserError

TEMPLATES = Path(__file__).with_name("space")
APP, REQUIREMENTS, README, ARCHITECTURES = "app.py", "requirements.txt", "README.md", "cifar.py"
SDK = {"sdk": "gradio", "sdk_version": "6.31.0"}
MARK = "timm_sfr"  # the tag of a Space that we may write again
UNTOUCHED = {".gitattributes", README}  # the files of a Space that nobody has filled


def space_files(config: dict[str, Any], model: str, revision: str | None, title: str, place: Path) -> dict[str, Path]:
    """Writes the files of a Space to `place`; returns the path of each by its name in the Space.

    timm alone loads timm's architectures. For one of ours the Space also gets our module with it, which needs nothing else.

    Args:
        config: The model's config.json.
        model: The model's repository, ``USER/NAME``.
        revision: Its branch, or None.
        title: The name of the Space.
        place: A folder.

    Raises:
        UserError: if the model does not take grey or colour images, or an image may have several of its classes.
    """
    if config.get(PROBLEM) == SEVERAL_LABELS:
        raise UserError("space: the demo is for one class an image, and this model has several; leave out --space")
    channels, architecture = config["pretrained_cfg"]["input_size"][0], config["architecture"]
    if channels not in (1, 3):
        raise UserError(
            f"space: a demo takes grey or colour images; this model takes {channels} channels; leave out --space"
        )
    ours, licence = architecture in SMALL_IMAGE_MODELS, config["pretrained_cfg"].get("license")
    named = licence in NOT_THE_HUBS
    head = SpaceCardData(
        title=title,
        **SDK,
        app_file=APP,
        models=[model],
        license="other" if named else licence,
        license_name=licence if named else None,
        tags=["image-classification", "timm", MARK],
    )
    values = {
        "source": f"{model}@{revision}" if revision else model,
        "model": model,
        "name": model.split("/")[1],
        "mode": img_mode(channels),
        "ours": ours,
        "title": title,
        "architecture": architecture,
        "classes": config["num_classes"],
    }
    place.mkdir(parents=True, exist_ok=True)
    shelf = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    for name in (APP, REQUIREMENTS, README):
        text = shelf.get_template(f"{name}.jinja").render(card_data=head.to_yaml(), **values)
        (place / name).write_text(text, encoding="utf-8")
    files = {name: place / name for name in (APP, REQUIREMENTS, README)}
    return files | ({ARCHITECTURES: Path(cifar.__file__)} if ours else {})


def check_space(api: HfApi, space: str) -> None:
    """Checks that the name of a Space is free, or that of a Space which we have written or nobody has filled.

    Raises:
        UserError: if it is somebody's own work.
    """
    try:
        info = api.space_info(space)
    except RepositoryNotFoundError:
        return
    tags = (info.card_data.to_dict() if info.card_data else {}).get("tags") or []
    filled = {file.rfilename for file in info.siblings or []} - UNTOUCHED
    if filled and MARK not in tags:
        raise UserError(
            f"space: {space} exists and was not made by timm_sfr (its README.md has no tag {MARK}); choose another name: "
            "--space USER/SPACE"
        )
