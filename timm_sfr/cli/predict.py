"""``timm-sfr predict MODEL IMAGE_OR_FOLDER ...``: classifies images."""

from __future__ import annotations

import csv
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset

from timm_sfr.cli.parser import fail, given
from timm_sfr.cli.verbs import READING, THRESHOLD
from timm_sfr.config import DataConfig, RunConfig
from timm_sfr.data.folders import SEPARATOR, TEXT, walk
from timm_sfr.data.images import UNDECODABLE, image_endings, to_mode
from timm_sfr.data.samples import image_reading
from timm_sfr.data.transforms import check_mode, img_mode
from timm_sfr.models.files import class_list, several_labels
from timm_sfr.models.loading import create_model
from timm_sfr.runs.records import recorded
from timm_sfr.runs.scores import CLASSIFICATION, MULTILABEL
from timm_sfr.utils.console import counted, json_line
from timm_sfr.utils.errors import UserError, near_paths
from timm_sfr.utils.files import replace_atomically


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image with their probabilities, or the error if it could not be read."""

    file: str
    classes: list[tuple[str, float]]
    error: str | None = None


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Returns the files in `paths`, and in place of each folder the images in it, sorted; hidden ones are left out.

    Raises:
        UserError: if a path does not exist, or no image was found.
    """
    found: list[Path] = []
    endings = image_endings()
    for path in paths:
        if path.is_dir():
            inside = (Path(place, name) for place, _, files, _ in walk(path) for name in files)
            found += sorted(file for file in inside if file.suffix.lower() in endings and file.is_file())
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"image: no such file or directory: {str(path)!r}{near_paths(path)}")
    if not found:
        raise UserError(f"image: no image in {', '.join(map(str, paths))} (looked for {' '.join(endings)})")
    return found


def class_names(model: Any) -> list[str] | None:
    """Returns the model's own class names, or ImageNet's if timm's tag implies them; else None."""
    own = class_list(model.pretrained_cfg.get("label_names"), model.num_classes)
    if own is not None:
        return own
    imagenet = any(part in (model.pretrained_cfg.get("tag") or "") for part in ("in1k", "in12k", "in21k", "in22k"))
    subset = infer_imagenet_subset(model) if imagenet else None
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    return [info.index_to_description(i) for i in range(model.num_classes)]


def predict(
    model: Any,
    files: Sequence[Path],
    topk: int = 5,
    batch_size: int = 32,
    config: DataConfig | None = None,
    threshold: float = 0.5,
) -> Iterator[Prediction]:
    """Yields the `topk` most probable classes of every image, in order, or the error of a file that does not decode.

    Of a model whose images may have several classes, all that reach the probability `threshold`, or else the `topk`.

    Args:
        model: A timm model in evaluation mode; its own preprocessing is used.
        files: Image files.
        topk: Number of classes.
        batch_size: Images per batch.
        config: Options on how images are read; None for the defaults.
        threshold: See above.
    """
    data = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**data, is_training=False)
    names, reading = class_names(model), image_reading(config or DataConfig(), img_mode(data["input_size"][0]))
    check_mode(reading.mode, data["input_size"][0])
    for start in range(0, len(files), batch_size):
        part, images, errors = files[start : start + batch_size], {}, {}
        for file in part:
            try:
                with Image.open(file) as image:
                    images[file] = transform(to_mode(image, reading))
            except UNDECODABLE as error:
                errors[file] = str(error) or type(error).__name__
        found = {}
        if images:
            with torch.inference_mode():
                logits = model(torch.stack(list(images.values())))
            found = dict(zip(images, _likely(logits, topk, threshold if several_labels(model) else None), strict=True))
        for file in part:
            classes = [(names[i] if names else str(i), p) for i, p in found.get(file, ())]
            yield Prediction(str(file), classes, errors.get(file))


def _likely(logits: torch.Tensor, topk: int, threshold: float | None) -> list[list[tuple[int, float]]]:
    """Returns the classes of each image with their probabilities, the most probable first, for logits (B, K).

    Without a threshold, the `topk` by softmax; with one, those whose sigmoid reaches it, or else the `topk`.
    """
    classes = logits.shape[1]
    probabilities = logits.softmax(1) if threshold is None else logits.sigmoid()
    best = probabilities.topk(min(topk, classes) if threshold is None else classes)
    found = [
        list(zip(places, values, strict=True)) for values, places in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    if threshold is None:
        return found
    return [[one for one in pairs if one[1] >= threshold] or pairs[:topk] for pairs in found]


def run(args: Namespace) -> int:
    """Runs the command; returns 0, or 1 if an image could not be read."""
    if args.topk < 1 or args.batch_size < 1:
        raise UserError("topk and batch-size: expected 1 or more")
    files = find_images(args.images)
    model = create_model(args.model, revision=args.revision)
    if not getattr(model, "num_classes", 0):
        raise UserError(f"model: {args.model!r} has no classifier")
    several, names = several_labels(model), (*READING, *THRESHOLD)
    config = RunConfig.from_flat(
        {**recorded(args.model, names), **given(args, names), "task": MULTILABEL if several else CLASSIFICATION}
    )
    found = _told(predict(model, files, args.topk, args.batch_size, config.data, config.engine.multilabel_threshold))
    if args.csv is not None:
        topk = None if several else min(args.topk, model.num_classes)
        failed = write_csv(args.csv, found, class_names(model), topk, args.json)
        if not args.json:
            print(f"{counted(len(files), 'image')} in {args.csv}")
    else:
        failed = sum(_show(one, args.json) for one in found)
    if failed:
        return fail(f"{failed} of {len(files)} images could not be read", 1)
    return 0


def write_csv(
    path: Path, predictions: Iterable[Prediction], names: Sequence[str] | None, topk: int | None, as_json: bool = False
) -> int:
    """Writes a row per image: file, label, class1, probability1, ... and the error of an image that could not be read.

    The label is the name of the image's folder, if that is one of the classes `names`, else empty. The file is written whole
    or not at all.

    Args:
        path: The file.
        predictions: The predictions.
        names: The model's classes; None if they have no names.
        topk: Number of classes of each prediction; None for any number, which then have ``|`` between them in one cell.
        as_json: Also print each prediction as JSON.

    Returns:
        The number of images that could not be read.

    Raises:
        UserError: if the file cannot be written.
    """
    known, failed = set(names or ()), 0

    def write(fresh: Path) -> None:
        nonlocal failed
        with fresh.open("w", newline="", **TEXT) as file:
            writer = csv.writer(file, lineterminator="\n")
            if topk is None:
                header = ["class", "probability"]
            else:
                header = ["label", *(f"{what}{place}" for place in range(1, topk + 1) for what in ("class", "probability"))]
            writer.writerow(["file", *header, "error"])
            for one in predictions:
                if topk is None:
                    cells = [SEPARATOR.join(name for name, _ in one.classes), SEPARATOR.join(f"{p:.6f}" for _, p in one.classes)]
                else:
                    folder = Path(one.file).absolute().parent.name
                    pairs = [cell for name, p in one.classes for cell in (name, f"{p:.6f}")] or [""] * 2 * topk
                    cells = [folder if folder in known else "", *pairs]
                writer.writerow([one.file, *cells, one.error or ""])
                failed += one.error is not None
                if as_json:
                    _show(one, True)

    try:
        replace_atomically(path, write)
    except OSError as error:
        raise UserError(f"csv: cannot write {str(path)!r}: {error.strerror or error}") from error
    return failed


def _told(predictions: Iterable[Prediction]) -> Iterator[Prediction]:
    """Yields the predictions; says which images could not be read."""
    for found in predictions:
        if found.error is not None:
            print(f"skipped: {found.file}: {found.error}", file=sys.stderr)
        yield found


def _show(found: Prediction, as_json: bool) -> bool:
    """Prints a prediction; returns whether the image could not be read."""
    if as_json:
        classes = [{"class": name, "probability": round(p, 6)} for name, p in found.classes]
        print(json_line({"file": found.file, "classes": classes, "error": found.error}))
    elif found.error is None:
        print(found.file)
        width = max(len(name) for name, _ in found.classes)
        for name, p in found.classes:
            print(f"  {name.ljust(width)}  {100 * p:6.2f} %")
    return found.error is not None
