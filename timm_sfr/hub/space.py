"""A Gradio Space beside a published model: a page on the Hub on which anyone can classify an image with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import SpaceCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from timm_sfr.data.transforms import img_mode
from timm_sfr.hub.card import licence_entries
from timm_sfr.models import SMALL_IMAGE_MODELS, cifar
from timm_sfr.models.files import PROBLEM, SEVERAL_LABELS
from timm_sfr.utils.errors import UserError

TEMPLATES = Path(__file__).with_name("space")
APP, REQUIREMENTS, README, ARCHITECTURES = "app.py", "requirements.txt", "README.md", "cifar.py"
SDK = {"sdk": "gradio", "sdk_version": "6.31.0"}
MARK = "timm_sfr"  # the tag of a Space that we may write again
UNTOUCHED = {".gitattributes", README}  # the files of a Space that nobody has filled


def space_files(
    config: dict[str, Any], model: str, revision: str | None, title: str, place: Path, mode: str | None = None
) -> dict[str, Path]:
    """Writes the files of a Space to `place`; returns the path of each by its name in the Space.

    timm alone loads timm's architectures. For one of ours the Space also gets our module with it, which needs nothing else.

    Args:
        config: The model's config.json.
        model: Its repository, ``USER/NAME``.
        revision: Its branch, or None.
        title: The name of the Space.
        place: The folder to write to.
        mode: The Pillow mode in which the model takes images; by default that of its number of channels.

    Raises:
        UserError: if the model does not take grey or colour images, or an image may have several of its classes.
    """
    if config.get(PROBLEM) == SEVERAL_LABELS:
        raise UserError("space: the demo is for one class an image, and this model has several; leave out --space")
    channels, architecture = config["pretrained_cfg"]["input_size"][0], config["architecture"]
    if channels not in (1, 3):
        raise UserError(f"space: a demo takes grey or colour images; this model takes {channels} channels; leave out --space")
    ours = architecture in SMALL_IMAGE_MODELS
    head = SpaceCardData(
        title=title,
        **SDK,
        app_file=APP,
        models=[model],
        **licence_entries(config["pretrained_cfg"].get("license")),
        tags=["image-classification", "timm", MARK],
    )
    values = {
        "source": f"{model}@{revision}" if revision else model,
        "model": model,
        "name": model.split("/")[1],
        "mode": mode or img_mode(channels),
        "ours": ours,
        "title": title,
        "architecture": architecture,
        "classes": config["num_classes"],
    }
    place.mkdir(parents=True, exist_ok=True)
    shelf = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    files = {name: place / name for name in (APP, REQUIREMENTS, README)}
    for name, path in files.items():
        text = shelf.get_template(f"{name}.jinja").render(card_data=head.to_yaml(), **values)
        path.write_text(text, encoding="utf-8")
    return files | ({ARCHITECTURES: Path(cifar.__file__)} if ours else {})
