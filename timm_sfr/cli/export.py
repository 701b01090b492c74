"""``timm-sfr export MODEL --format onnx|torchscript|pt2``: writes a model that runs without timm, and checks it."""

from __future__ import annotations

import importlib.util
import json
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from timm_sfr.cli.predict import class_names
from timm_sfr.cli.verbs import FORMATS, READING
from timm_sfr.config import DataConfig, RunConfig
from timm_sfr.data import images
from timm_sfr.data.samples import image_reading
from timm_sfr.data.transforms import img_mode
from timm_sfr.method.probe import MISFITS
from timm_sfr.models.files import several_labels
from timm_sfr.models.loading import create_model
from timm_sfr.runs.records import recorded
from timm_sfr.utils.errors import UserError, brief
from timm_sfr.utils.files import replace_atomically, write_whole
from timm_sfr.version import __version__

NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime")}
BATCHES = (1, 3, 8)  # batch sizes of the check: other than the traced size, 2, because the file has to take any
TOLERANCE = 1e-3  # as a share of the largest logit; other runtimes sum in another order
METADATA = "timm_sfr.json"
PREPROCESSING = "timm_sfr_images.py"  # a copy of `timm_sfr.data.images`


def metadata(model: nn.Module, name: str, config: DataConfig | None = None) -> dict[str, Any]:
    """Returns what is needed to use the file: how images are read, their size and normalisation, and the class names.

    `timm_sfr.data.images.model_input` takes it.

    Args:
        model: A timm model.
        name: What it is called.
        config: How images were read in training; None for the defaults.
    """
    data = timm.data.resolve_model_data_config(model)
    reading = image_reading(config or DataConfig(), img_mode(data["input_size"][0]))
    kept = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    return {
        "model": name,
        "architecture": model.pretrained_cfg.get("architecture"),
        "input": "images, (batch, channels, height, width), float32: pixels / 255, then (x - mean) / std",
        "output": f"logits, (batch, classes); probabilities by {'sigmoid' if several_labels(model) else 'softmax'}",
        **{key: data[key] for key in kept},
        "image_mode": reading.mode,
        "exif": reading.exif,
        "image_background": reading.background,
        "image_range": reading.value_range,
        "num_classes": model.num_classes,
        "label_names": class_names(model),
        "made_by": f"timm_sfr {__version__}, timm {timm.__version__}, torch {torch.__version__}",
    }


def export(model: nn.Module, path: Path, kind: str, about: dict[str, Any]) -> float:
    """Writes a model for batches of any size and checks the file against the model.

    Args:
        model: A timm model in evaluation mode.
        path: The file; replaced atomically.
        kind: ``"onnx"``, ``"torchscript"`` or ``"pt2"``.
        about: The result of `metadata`, which is stored in the file.

    Returns:
        The largest difference between the logits of file and model, over batches of 1, 3 and 8 random images.

    Raises:
        UserError: if the model cannot be exported to the format, the logits differ, or a package is missing.
    """
    missing = [name for name in NEEDS.get(kind, ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'format: {kind} needs {", ".join(missing)}; pip install "timm-sfr[export]"')
    write, load = WRITERS[kind]
    size = tuple(about["input_size"])
    example = torch.randn(2, *size)
    largest = 0.0

    def write_and_check(fresh: Path) -> None:
        nonlocal largest
        write(model, example, fresh, json.dumps(about))
        run = load(fresh)
        for batch in BATCHES:
            batch_of_noise = torch.randn(batch, *size)
            with torch.inference_mode():
                expected = model(batch_of_noise)
            difference = float((run(batch_of_noise) - expected).abs().max())
            largest = max(largest, difference)
            if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
                raise UserError(f"format: the {kind} file differs from PyTorch by {difference:.2g} at batch {batch}; "
                                "try another --format")  # fmt: skip

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporters announce their own future changes
            replace_atomically(path, write_and_check)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"output: cannot write {str(path)!r}: {error.strerror or error}") from error
    except (*MISFITS, torch.onnx.OnnxExporterError) as error:
        what = f"format: {about['model']!r} cannot be exported to {kind}"
        raise UserError(f"{what}: {brief(error)}; try another --format") from error
    return largest


def _write_onnx(model: nn.Module, example: Tensor, path: Path, about: str) -> None:
    import onnx

    batch = torch.export.Dim("batch", min=1)
    torch.onnx.export(
        model, (example,), str(path), dynamo=True, input_names=["images"], output_names=["logits"],
        dynamic_shapes=({0: batch},), external_data=False, verbose=False,
    )  # fmt: skip
    written = onnx.load(str(path))
    onnx.helper.set_model_props(written, {METADATA: about})
    onnx.save(written, str(path))


def _load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _write_torchscript(model: nn.Module, example: Tensor, path: Path, about: str) -> None:
    with torch.inference_mode():
        traced = torch.jit.trace(model, example)
    torch.jit.save(traced, str(path), _extra_files={METADATA: about})


def _load_torchscript(path: Path) -> Callable[[Tensor], Tensor]:
    return torch.inference_mode()(torch.jit.load(str(path)))


def _write_pt2(model: nn.Module, example: Tensor, path: Path, about: str) -> None:
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    with path.open("wb") as file:  # torch rejects file names that do not end in .pt2
        torch.export.save(program, file, extra_files={METADATA: about})


def _load_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    with path.open("rb") as file:
        return torch.inference_mode()(torch.export.load(file).module())


WRITERS = {
    "onnx": (_write_onnx, _load_onnx),
    "torchscript": (_write_torchscript, _load_torchscript),
    "pt2": (_write_pt2, _load_pt2),
}


def run(args: Namespace) -> int:
    """Runs the command; returns 0."""
    model = create_model(args.model, revision=args.revision)
    about = metadata(model, args.model, RunConfig.from_flat(recorded(args.model, READING)).data)
    stem = Path(args.model.split(":")[-1].split("@")[0]).absolute().name
    if (Path(args.model) / "args.yaml").is_file():
        stem = str(Path(args.model, "model"))
    path = args.output or Path(stem + FORMATS[args.format])
    difference = export(model, path, args.format, about)
    beside = path.with_name(PREPROCESSING)
    write_whole(beside, Path(images.__file__).read_text(encoding="utf-8"))
    size = ", ".join(map(str, about["input_size"]))
    print(f"{path}: {args.format}, {path.stat().st_size / 2**20:.1f} MiB, images (batch, {size}); largest difference from "
          f"PyTorch {difference:.2g} over batches of {', '.join(map(str, BATCHES))}")  # fmt: skip
    print(f"{beside}: its function model_input prepares images as validation does; it needs only NumPy and Pillow")
    return 0
