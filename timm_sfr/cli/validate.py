"""``timm-sfr validate MODEL --data-dir DIR``: scores a model on a split."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from timm_sfr.cli.parser import given
from timm_sfr.cli.verbs import INPUT, MACHINE, SCORED
from timm_sfr.config import RunConfig, merged
from timm_sfr.data.datasets import open_validation
from timm_sfr.data.folders import SPLIT_FILE, lists_all
from timm_sfr.data.loaders import eval_loader
from timm_sfr.data.samples import bad_images
from timm_sfr.data.tables import find_table, is_table
from timm_sfr.data.transforms import check_mode, preprocessing
from timm_sfr.models.files import made_up_name, several_labels
from timm_sfr.models.loading import create_model
from timm_sfr.runs.records import hardware, recorded, run_folder
from timm_sfr.runs.scores import MULTILABEL, TITLES, recorded_scores, shown_percents
from timm_sfr.training.devices import make_accelerator
from timm_sfr.training.evaluate import evaluate, evaluate_views
from timm_sfr.training.progress import watched
from timm_sfr.utils.console import console_output, json_line, show_log, sides, some
from timm_sfr.utils.errors import UserError, near_paths

OTHER_DATA = {"data_dir", "dataset", "val_split"}  # options that may name other data than a run's


def run(args: Namespace) -> int:
    """Runs the command; returns 0."""
    own, chosen = recorded(args.model, (*SCORED, *INPUT)), given(args, (*SCORED, *INPUT, *MACHINE, "tta"))
    listed = _list(args.model, own, chosen)
    if chosen.keys() & OTHER_DATA:
        own.pop("val_share", None)
    options = merged(own, chosen)
    if options.get("dataset") == "digits":
        options.setdefault("img_size", None)  # the model's own, and not the digits'
    if not options.get("data_dir") and not options.get("dataset"):
        near = "" if Path(args.model).exists() else near_paths(args.model)
        if near:
            raise UserError(f"model: there is no folder {args.model!r}{near}")
        raise UserError("data-dir: expected --data-dir DIR, or --dataset NAME; only a run has recorded its data")
    if args.json:
        show_log(to_stderr=True)
    with console_output(False):
        model = create_model(args.model, revision=args.revision)
        if several_labels(model):
            options.setdefault("task", MULTILABEL)
        config = RunConfig.from_flat(options)
        scores = validate(model, config, listed)
    main, nonfinite = scores.pop("main"), scores.pop("nonfinite")
    if main:
        if nonfinite:
            print(f"warning: the outputs for {nonfinite} images are not finite; they count as wrong", file=sys.stderr)
        shown = shown_percents(config.data.task, model.num_classes)
        print(json_line({"model": args.model, **scores}) if args.json else _table(args.model, scores, shown))
    return 0


def _list(model: str, own: dict[str, Any], chosen: dict[str, Any]) -> Path | None:
    """Returns a run's list of the images that it was validated on, if the options `chosen` name the same images.

    Args:
        model: The run's folder, or any other name of a model.
        own: The run's options.
        chosen: The options of the command line, which win.

    Raises:
        UserError: if they ask for another choice of images than the list's.
    """
    folder = run_folder(model)
    if folder is None or not (folder / SPLIT_FILE).is_file():
        return None
    if chosen.keys() & OTHER_DATA:  # other data than the run's, or the same in another place
        options = merged(own, chosen)
        root, table = chosen.get("data_dir", ""), options.get("dataset")
        if is_table(table) and "val_split" not in chosen:
            root = options.get("data_dir") or find_table(table, None).parent
        if not lists_all(folder / SPLIT_FILE, Path(root)):
            return None
    for name in {"val_share", "seed"} & chosen.keys():
        option, file = name.replace("_", "-"), str(folder / SPLIT_FILE)
        raise UserError(f"{option}: {file!r} lists the images that the run was validated on, and any other choice would have "
                        "training images; leave the option out")  # fmt: skip
    return folder / SPLIT_FILE


def validate(model: nn.Module, config: RunConfig, listed: Path | None = None) -> dict[str, Any]:
    """Scores a model on the validation split that `config` names, with the same code as training.

    Args:
        model: The model.
        config: The data, the input and the machine.
        listed: A run's list of the images of a folder without splits.

    Returns:
        ``images``, ``top1`` and ``top5`` (percent), ``loss`` (mean cross-entropy), ``ece``, or for images with several classes
        ``map``, ``micro_f1``, ``macro_f1`` and ``sample_f1`` (percent) and ``loss``; ``images_per_second``,
        ``img_size`` (the height), ``input_size`` (C, H, W), ``hardware``, and ``main``, whether this is the process that prints.
        ``tta``: its ``views`` and the same scores.

    Raises:
        UserError: if the split cannot be opened, or its classes do not match the model's.
    """
    accelerator = make_accelerator(config)
    prep = preprocessing(config.model, model)
    check_mode(config.data.input_img_mode or prep.img_mode, prep.input_size[0])
    if config.engine.tta >= 5 and prep.crop_pct >= 1 and accelerator.is_main_process:
        print(f"warning: tta: with --crop-pct {prep.crop_pct:g} all crops of a square image are the same; --crop-pct 0.875 "
              "leaves them room", file=sys.stderr)  # fmt: skip
    mode, own = config.data.input_img_mode or prep.img_mode, _with_images(model.pretrained_cfg.get("label_names"))
    split = open_validation(config.data, mode, config.engine.seed, own, listed)
    _check_classes(model, split.class_names, own)
    views = max(1, config.engine.tta)
    loader = eval_loader(split, config.data, prep, views)
    if not split.streamed:
        loader = accelerator.prepare(loader)
    model = model.to(accelerator.device)
    scores: dict[str, Any]
    with _says_bad_images(loader):
        started = time.perf_counter()
        if views == 1:
            scores = evaluate(model, loader, prep, accelerator, watch=watched, threshold=config.threshold)
        else:
            scores, augmented = evaluate_views(model, loader, prep, accelerator, watched, config.threshold)
            scores["tta"] = {"views": views, **{name: augmented[name] for name in recorded_scores(config.data.task)}}
        scores["images_per_second"] = scores["images"] / (time.perf_counter() - started)
    main = accelerator.is_main_process
    machine = hardware(accelerator.device, accelerator.num_processes)
    accelerator.end_training()
    return {**scores, "img_size": prep.input_size[1], "input_size": prep.input_size, "hardware": machine, "main": main}


@contextlib.contextmanager
def _says_bad_images(loader: Any) -> Iterator[None]:
    """A context that ends with a warning if images of this process did not decode and were replaced (``--on-bad-image skip``)."""
    bad = bad_images(loader.dataset)
    if bad is None:
        yield
        return
    with tempfile.TemporaryDirectory() as place:
        bad.write_to(Path(place) / "bad_images.txt")
        yield
        if bad.names():
            print(f"warning: images that do not decode and were replaced by others: {len(bad.names())}: {some(bad.names())}",
                  file=sys.stderr)  # fmt: skip


def _with_images(names: Sequence[str] | None) -> Sequence[str] | None:
    """Returns a model's class names without those at the end that training made up for classes without images."""
    count = len(names or ())
    while names and count and names[count - 1] == made_up_name(count - 1):
        count -= 1
    return names[:count] if names and count else names


def _check_classes(model: nn.Module, names: tuple[str, ...] | None, known: Sequence[str] | None) -> None:
    """Raises UserError if the data's classes `names` are not the model's, or those of them that are `known` by name."""
    if not names or list(names) == list(known or ()):
        return
    if len(names) != model.num_classes:
        raise UserError(f"data: expected {model.num_classes} classes, as the model has; got {len(names)}: "
                        f"{list(names)[:3]}...; use the split that it was trained for, or --class-map")  # fmt: skip
    own = model.pretrained_cfg.get("label_names")
    if own and not set(own) & set(names):
        print("warning: the data and the model share no class name, so classes are matched by order: "
              f"{names[0]!r} is scored as {own[0]!r}, and so on", file=sys.stderr)  # fmt: skip
    elif own and list(own) != list(names):
        at = next(i for i, (one, other) in enumerate(zip(own, names, strict=True)) if one != other)
        raise UserError(f"data: class {at} is {names[at]!r} in the data and {own[at]!r} in the model; rename the folders, or "
                        "give --class-map")  # fmt: skip


def _table(model: str, scores: dict[str, Any], percents: Sequence[str]) -> str:
    shown = {
        "images": f"{scores['images']} at {sides(*scores['input_size'][1:])} pixels",
        **_shown(scores, percents),
        "images/s": f"{scores['images_per_second']:.0f} on {scores['hardware']}",
    }
    lines = [model, *(f"  {name:<13}{value}" for name, value in shown.items())]
    if "tta" in scores:
        lines.append(f"  with test-time augmentation, the mean of the logits of {scores['tta']['views']} views:")
        lines += [f"  {name:<13}{value}" for name, value in _shown(scores["tta"], percents).items()]
    return "\n".join(lines)


def _shown(scores: dict[str, Any], percents: Sequence[str]) -> dict[str, str]:
    """Returns the scores as text, by their names: first `percents`."""
    calibrated = "ece" in scores
    return {
        **{TITLES[name]: f"{scores[name]:.3f} %" for name in percents},
        "loss (NLL)" if calibrated else "loss (BCE)": f"{scores['loss']:.5f}",
        **({"ECE, 15 bins": f"{scores['ece']:.4f}"} if calibrated else {}),
    }
