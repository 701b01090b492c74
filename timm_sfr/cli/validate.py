"""``timm-sfr validate MODEL --data-dir DIR``: scores a model on a split."""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from torch import nn

from timm_sfr.cli.parser import add_model, add_options, given
from timm_sfr.config import RunConfig
from timm_sfr.data.datasets import open_split
from timm_sfr.data.loaders import eval_loader
from timm_sfr.data.transforms import check_mode, preprocessing
from timm_sfr.models.loading import create_model
from timm_sfr.runs.records import hardware
from timm_sfr.training.devices import make_accelerator
from timm_sfr.training.evaluate import evaluate
from timm_sfr.training.progress import watched
from timm_sfr.utils.errors import UserError, near_paths
from timm_sfr.utils.files import read_yaml

WHAT = "Score a run, a model of the Hub or the zoo, or any timm model on a validation split: top-1, top-5, loss, ECE."
DATA = ("data_dir", "dataset", "val_split", "val_num_samples", "dataset_download", "class_map", "input_img_mode", "input_key",
        "target_key", "batch_size", "validation_batch_size", "workers", "on_bad_image")  # fmt: skip
INPUT = ("img_size", "mean", "std", "interpolation", "crop_pct")
MACHINE = ("device", "mixed_precision")


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's options."""
    add_model(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    for title, names in (("data (default for a run: its own data)", DATA), ("input", INPUT), ("machine", MACHINE)):
        add_options(parser.add_argument_group(title), names)


def run(args: Namespace) -> int:
    """Runs the command; returns 0."""
    options = {**_recorded(args.model), **given(args, (*DATA, *INPUT, *MACHINE))}
    if not options.get("data_dir") and not options.get("dataset"):
        near = "" if Path(args.model).exists() else near_paths(args.model)
        raise UserError(f"data-dir: expected --data-dir DIR, or --dataset NAME; only a run has recorded its data{near}")
    config = RunConfig.from_flat(options)
    scores = validate(create_model(args.model, revision=args.revision), config)
    if scores.pop("main"):
        print(json.dumps({"model": args.model, **scores}) if args.json else _table(args.model, scores))
    return 0


def validate(model: nn.Module, config: RunConfig) -> dict[str, Any]:
    """Scores a model on the validation split that `config` names, with the same code as training.

    Returns:
        ``images``, ``top1`` and ``top5`` (percent), ``loss`` (mean cross-entropy), ``ece``, ``images_per_second``,
        ``img_size``, ``hardware``, and ``main``, whether this is the process that prints.

    Raises:
        UserError: if the split cannot be opened, or its classes do not match the model's.
    """
    accelerator = make_accelerator(config)
    prep = preprocessing(config.model, model)
    check_mode(config.data.input_img_mode or prep.img_mode, prep.input_size[0])
    split = open_split(config.data, False, config.data.input_img_mode or prep.img_mode, config.engine.seed)
    _check_classes(model, split.class_names)
    loader = eval_loader(split, config.data, prep)
    if not split.streamed:
        loader = accelerator.prepare(loader)
    model = model.to(accelerator.device)
    started = time.perf_counter()
    scores: dict[str, Any] = evaluate(model, loader, prep, accelerator, watch=watched)
    scores["images_per_second"] = scores["images"] / (time.perf_counter() - started)
    main = accelerator.is_main_process
    machine = hardware(accelerator.device, accelerator.num_processes)
    accelerator.end_training()
    return {**scores, "img_size": prep.input_size[1], "hardware": machine, "main": main}


def _recorded(model: str) -> dict[str, Any]:
    """Returns the data and input options in a run's args.yaml; an empty dictionary for any other model."""
    path = Path(model) / "args.yaml"
    if not path.is_file():
        return {}
    return {name: value for name, value in read_yaml(path).items() if name in (*DATA, *INPUT)}


def _check_classes(model: nn.Module, names: tuple[str, ...] | None) -> None:
    if not names:
        return
    if len(names) != model.num_classes:
        raise UserError(f"data: expected {model.num_classes} classes, as the model has; got {len(names)}: "
                        f"{list(names)[:3]}...; use the split that it was trained for, or --class-map")  # fmt: skip
    own = model.pretrained_cfg.get("label_names")
    if own and list(own) != list(names) and set(own) & set(names):
        at = next(i for i, (one, other) in enumerate(zip(own, names, strict=True)) if one != other)
        raise UserError(f"data: class {at} is {names[at]!r} in the data and {own[at]!r} in the model; rename the folders, or "
                        "give --class-map")  # fmt: skip


def _table(model: str, scores: dict[str, Any]) -> str:
    shown = {
        "images": f"{scores['images']} at {scores['img_size']} pixels",
        "top-1": f"{scores['top1']:.3f} %",
        "top-5": f"{scores['top5']:.3f} %",
        "loss (NLL)": f"{scores['loss']:.5f}",
        "ECE, 15 bins": f"{scores['ece']:.4f}",
        "images/s": f"{scores['images_per_second']:.0f} on {scores['hardware']}",
    }
    return "\n".join([model, *(f"  {name:<13}{value}" for name, value in shown.items())])
