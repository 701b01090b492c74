"""The arguments of each command. Nothing here imports torch or timm, so that help and error messages appear immediately."""

from __future__ import annotations

import argparse
from argparse import ArgumentParser
from pathlib import Path

from timm_sfr.cli.parser import Parser, add_model, add_option, add_options
from timm_sfr.cli.timm_options import add_timm_options
from timm_sfr.config import SECTIONS, options

# The run's options that each command has too.
FOLDER = ("data_dir", "task", "train_split", "val_split", "test_split", "val_share", "class_map", "input_key", "target_key",
          "seed")  # fmt: skip
TAPS = ("img_size", "input_size", "in_chans", "model_kwargs", "batch_size", "sfr_taps", "sfr_channels", "sfr_matching",
        "sfr_weights", "sfr_solver", "sfr_max_nodes")  # fmt: skip
READING = ("input_img_mode", "exif", "image_background", "image_range")
THRESHOLD = ("multilabel_threshold",)
SCORED = ("data_dir", "dataset", "task", *THRESHOLD, "train_split", "val_split", "val_share", "seed", "val_num_samples",
          "dataset_download", "class_map", *READING, "input_key", "target_key", "batch_size", "validation_batch_size",
          "workers", "on_bad_image")  # fmt: skip
INPUT = ("img_size", "input_size", "mean", "std", "interpolation", "crop_pct")
MACHINE = ("device", "mixed_precision")
FORMATS = {"onnx": ".onnx", "torchscript": ".torchscript.pt", "pt2": ".pt2"}  # file formats and their endings


def training_parser() -> Parser:
    """Returns the parser of the training options; its result has only the options that the user gave."""
    parser = Parser(prog="train_sfr.py", description=_train.__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    _train(parser)
    return parser


# The functions below add a command's arguments to its parser; their docstrings are its help.


def _train(parser: ArgumentParser) -> None:
    """Train any timm model with Self-Feature Regularization. Without data options, trains on the built-in digits."""
    _training_options(parser)
    parser.add_argument("--resume", metavar="RUN", help="continue the run in this folder; 'auto': continue the newest run "
                        "with these options or this --experiment, or start one")  # fmt: skip


def _training_options(parser: ArgumentParser) -> None:
    parser.add_argument("-c", "--config", metavar="FILE", help="YAML file of options (a run's args.yaml repeats it)")
    groups = {name: parser.add_argument_group(name, kind.__doc__) for name, kind in SECTIONS.items()}
    for section, name, item in options():
        add_option(groups[section], section, name, item)
    add_timm_options(parser)


def _lr_find(parser: ArgumentParser) -> None:
    """Suggest a learning rate for a training: a range test, which raises the rate at every update and draws the loss."""
    own = parser.add_argument_group("range test", "all other options are those of the training")
    own.add_argument("--lr-low", type=float, default=1e-5, metavar="RATE", help="first learning rate (default: 1e-5)")
    own.add_argument("--lr-high", type=float, default=10.0, metavar="RATE", help="last learning rate (default: 10)")
    own.add_argument("--lr-updates", type=int, default=100, metavar="N", help="updates between them (default: 100)")
    own.add_argument("--picture", type=Path, metavar="FILE", help="the curve, a .png, .svg or .pdf; its figures are a .csv "
                     "beside it (default: lr-find.png, or lr-find-2.png and so on if there is one)")  # fmt: skip
    own.add_argument("--json", action="store_true", help="print one JSON object")
    _training_options(parser)


def _data(parser: ArgumentParser) -> None:
    """Show what training finds in a folder or a table: images per class, ignored files, duplicates, modes and sizes."""
    parser.add_argument("source", metavar="DIR", help="a folder with train/CLASS and val/CLASS, or only CLASS; or csv/FILE, a "
                        "table of image paths and labels, whose relative paths begin in --data-dir")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_options(parser, FOLDER)


def _validate(parser: ArgumentParser) -> None:
    """Score a run, a model of the Hub or the zoo, or any timm model on a validation split: top-1, top-5, loss, ECE."""
    add_model(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    for title, names in (("data (default for a run: its own data)", SCORED), ("input", (*INPUT, "tta")), ("machine", MACHINE)):
        add_options(parser.add_argument_group(title), names)


def _predict(parser: ArgumentParser) -> None:
    """Print the most probable classes of images, with a model of the zoo, the Hub, a folder, or timm."""
    add_model(parser)
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=Path, help="image files and folders")
    parser.add_argument("--topk", type=int, default=5, metavar="K", help="classes to print (default: 5)")
    parser.add_argument("-b", "--batch-size", type=int, default=32, metavar="N", help="images per batch (default: 32)")
    parser.add_argument("--json", action="store_true", help="print JSON, one object per line")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a table in place of printing: a row per image with its "
                        "classes, probabilities, and label, if its folder has the name of a class")  # fmt: skip
    add_options(parser.add_argument_group("how images are read (default for a run: as in its training)"), READING)
    add_options(parser.add_argument_group("several classes of an image"), THRESHOLD)


def _taps(parser: ArgumentParser) -> None:
    """Show what SFR would tap in a model, or what a run tapped: which features teach which, and the cost per step."""
    parser.add_argument("model", metavar="MODEL", help="any timm name, a run's folder, hf-hub:USER/NAME, or local-dir:FOLDER")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also draw the taps to a .png, .svg or .pdf file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_options(parser.add_argument_group("as in training (default for a run: SFR's options of its training)"), TAPS)


def _report(parser: ArgumentParser) -> None:
    """Write RUN/report.html: curves, scores by class, mistakes, and which features teach which. Needs no network."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument("--mistakes", type=int, default=24, metavar="N", help="wrong images to show (default: 24)")


def _compare(parser: ArgumentParser) -> None:
    """Compare runs: the options that differ, the scores, and the differences in the main one, paired by seed."""
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folders of runs; the first is the base")
    parser.add_argument("--json", action="store_true", help="print one JSON object per group")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with all curves in shared plots")


def _export(parser: ArgumentParser) -> None:
    """Write a model as ONNX, TorchScript or PT2, with its preprocessing and class names, and check it against PyTorch."""
    add_model(parser)
    parser.add_argument("--format", choices=tuple(FORMATS), default="onnx", help="file format (default: onnx)")
    parser.add_argument("--output", type=Path, metavar="FILE",
                        help="file to write (default: in a run's folder, else the model's name in the current one)")  # fmt: skip


def _push(parser: ArgumentParser) -> None:
    """Publish a finished run on the Hugging Face Hub. Uses the token of `hf auth login` or HF_TOKEN."""
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="folder of the run")
    parser.add_argument("repo_id", metavar="USER/NAME", help="repository; created if it does not exist")
    parser.add_argument("--private", "--hub-private", action="store_true", help="make a newly created repository private")
    parser.add_argument("--revision", "--hub-revision", help="branch to publish on (default: main)")
    parser.add_argument("--commit-message", help="title of the commit")
    parser.add_argument("--hub-license", help="licence of the weights (default: what the run recorded)")
    parser.add_argument("--space", metavar="USER/SPACE", nargs="?", const="",
                        help="also publish a Gradio Space to try the model in (alone: of the model's name)")  # fmt: skip


def _list(parser: ArgumentParser) -> None:
    """List the models of the zoo with their scores and repositories."""
    parser.add_argument("filter", metavar="PATTERN", nargs="?", default="*", help="such as 'resnet*' (default: all)")


VERBS = {
    "train": _train, "lr-find": _lr_find, "data": _data, "validate": _validate, "predict": _predict, "taps": _taps,
    "report": _report, "compare": _compare, "export": _export, "push": _push, "list": _list,
}  # fmt: skip
