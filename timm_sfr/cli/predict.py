"""``timm-sfr predict MODEL IMAGE_OR_FOLDER ...``: classifies images."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm_sfr.cli.parser import add_model, fail
from timm_sfr.utils.errors import UserError, near_paths

WHAT = "Print the most probable classes of images, with a model of the zoo, the Hub, a folder, or timm."
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image with their probabilities, or the error if it could not be read."""

    file: str
    classes: list[tuple[str, float]]
    error: str | None = None


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Returns the files in `paths`, and in place of each folder the images in it, sorted.

    Raises:
        UserError: if a path does not exist, or no image was found.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"image: no such file or directory: {str(path)!r}{near_paths(path)}")
    if not found:
        raise UserError(f"image: no image in {', '.join(map(str, paths))} (looked for {' '.join(sorted(SUFFIXES))})")
    return found


def class_names(model: Any) -> list[str] | None:
    """Returns the model's own class names, or ImageNet's if timm's tag implies them; else None."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    own = model.pretrained_cfg.get("label_names")
    if own and len(own) == model.num_classes:
        return [str(own[i]) for i in range(model.num_classes)]
    imagenet = any(part in (model.pretrained_cfg.get("tag") or "") for part in ("in1k", "in12k", "in21k", "in22k"))
    subset = infer_imagenet_subset(model) if imagenet else None
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    return [info.index_to_description(i) for i in range(model.num_classes)]


def predict(model: Any, files: Sequence[Path], topk: int = 5, batch_size: int = 32) -> Iterator[Prediction]:
    """Yields the `topk` most probable classes of every image, in order, or the error of a file that does not decode.

    Args:
        model: A timm model in evaluation mode; its own preprocessing is used.
        files: Image files.
        topk: Number of classes.
        batch_size: Images per batch.
    """
    import timm
    import torch
    from PIL import Image

    from timm_sfr.data.transforms import img_mode

    data = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**data, is_training=False)
    mode, names = img_mode(data["input_size"][0]), class_names(model)
    for start in range(0, len(files), batch_size):
        part, images, errors = files[start : start + batch_size], {}, {}
        for file in part:
            try:
                with Image.open(file) as image:
                    images[file] = transform(image.convert(mode))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                errors[file] = str(error) or type(error).__name__
        rows: dict[Path, list[tuple[str, float]]] = {}
        if images:
            with torch.inference_mode():
                best = model(torch.stack(list(images.values()))).softmax(1).topk(min(topk, model.num_classes))
            for file, values, places in zip(images, best.values.tolist(), best.indices.tolist(), strict=True):
                rows[file] = [(names[i] if names else str(i), p) for p, i in zip(values, places, strict=True)]
        for file in part:
            yield Prediction(str(file), rows.get(file, []), errors.get(file))


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's options."""
    add_model(parser)
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=Path, help="image files and folders")
    parser.add_argument("--topk", type=int, default=5, metavar="K", help="classes to print (default: 5)")
    parser.add_argument("-b", "--batch-size", type=int, default=32, metavar="N", help="images per batch (default: 32)")
    parser.add_argument("--json", action="store_true", help="print JSON, one object per line")


def run(args: Namespace) -> int:
    """Runs the command; returns 0, or 1 if an image could not be read."""
    from timm_sfr.models.loading import create_model

    if args.topk < 1 or args.batch_size < 1:
        raise UserError("topk and batch-size: expected 1 or more")
    files = find_images(args.images)
    model = create_model(args.model, revision=args.revision)
    if not getattr(model, "num_classes", 0):
        raise UserError(f"model: {args.model!r} has no classifier")
    failed = 0
    for found in predict(model, files, args.topk, args.batch_size):
        failed += found.error is not None
        if found.error is not None:
            print(f"skipped: {found.file}: {found.error}", file=sys.stderr)
        if args.json:
            classes = [{"class": name, "probability": round(p, 6)} for name, p in found.classes]
            print(json.dumps({"file": found.file, "classes": classes, "error": found.error}))
        elif found.error is None:
            print(found.file)
            width = max(len(name) for name, _ in found.classes)
            for name, p in found.classes:
                print(f"  {name.ljust(width)}  {100 * p:6.2f} %")
    if failed:
        return fail(f"{failed} of {len(files)} images could not be read", 1)
    return 0
