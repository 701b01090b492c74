"""Checks the trainer's answers to wrong input: each must be one line, and no saved file may be lost.

    python -m benchmarks.bad_inputs

It runs `train_sfr.py` with every case below, in one process, and writes the table of docs/reliability.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from benchmarks.accuracy import HERE
from benchmarks.pages import fill, markdown
from timm_sfr.runs.checkpoints import checkpoints
from train_sfr import main as train

DOCUMENT = HERE.parent / "docs" / "reliability.md"
QUICK = ("--epochs", "1", "--img-size", "16", "--batch-size", "64", "--workers", "0", "--device", "cpu")


@dataclass(frozen=True)
class Case:
    """One wrong input.

    Attributes:
        what: What is wrong.
        says: A part of the expected line that does not depend on other libraries.
        words: Returns the command-line options, for an empty folder and a copy of a finished run.
    """

    what: str
    says: str
    words: Callable[[Path, Path], list[str]]


@dataclass(frozen=True)
class Answer:
    """The trainer's answer: the exit status, the lines on standard error, and the files of the run that it changed or lost."""

    status: int
    lines: list[str]
    lost: list[str]


def given(*words: str) -> Callable[[Path, Path], list[str]]:
    """Returns a function that gives these options and writes no file."""
    return lambda folder, run: list(words)


def images(folder: Path, val: tuple[str, ...] = ("a", "b")) -> Path:
    """Writes eight images of each class, a and b, and returns the folder; `val` lists the classes of the validation split."""
    for split, classes in (("train", ("a", "b")), ("val", val)):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for index in range(8):
                Image.new("RGB", (20, 20), (30 * index, 0, 0)).save(folder / split / name / f"{index}.png")
    return folder


def small(folder: Path) -> list[str]:
    """Returns the options to train on a folder of `images`."""
    return ["--data-dir", str(folder), "--batch-size", "8"]


def file(folder: Path, name: str, content: str | bytes) -> str:
    """Writes a new file; returns its path."""
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder / name)


class Evil:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder / "the pickle ran"),)


def model(folder: Path, run: Path, change: Callable[[Path], None]) -> list[str]:
    """Changes a copy of the run's model; returns the options to start from it."""
    shutil.copytree(run / "model", folder / "model")
    change(folder / "model" / "model.safetensors")
    return ["--model", f"local-dir:{folder / 'model'}", "--pretrained"]


def _pickled(path: Path) -> None:
    torch.save(safetensors.torch.load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()


def _retyped(path: Path) -> None:
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({**tensors, "conv1.weight": tensors["conv1.weight"].long()}, path)


def _reshaped(path: Path) -> None:
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({**tensors, "conv1.weight": tensors["conv1.weight"][:, :, :1].contiguous()}, path)


def _climbing(path: Path) -> None:
    config = json.loads(path.with_name("config.json").read_text())
    path.with_name("config.json").write_text(json.dumps(config | {"architecture": "../../elsewhere"}))


def _long(path: Path) -> None:
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def _cut(path: Path) -> None:
    os.truncate(path, 50_000)


def options(folder: Path, text: str) -> list[str]:
    """Writes a file of options; returns the options to use it."""
    return ["--config", file(folder, "o.yaml", text)]


def resumed(run: Path, *words: str) -> list[str]:
    """Returns the options to resume the run with other options."""
    return ["--resume", str(run), "--epochs", "3", *words]


def edited(folder: Path, run: Path) -> list[str]:
    """Adds an invalid row to the run's summary.csv; returns the options to resume the run."""
    (run / "summary.csv").write_text((run / "summary.csv").read_text() + "garbage\n")
    return resumed(run)


def damaged(folder: Path, run: Path) -> list[str]:
    """Cuts the end off every checkpoint; returns the options to resume the run."""
    for path in checkpoints(run / "checkpoints"):
        (path / "state.pt").write_bytes((path / "state.pt").read_bytes()[:-100])
    return ["--resume", str(run)]


def pickled(folder: Path, run: Path) -> list[str]:
    """Leaves one checkpoint, a pickle that runs a command, with correct checksums; returns the options to resume the run."""
    *others, newest = checkpoints(run / "checkpoints")
    for path in others:
        shutil.rmtree(path)
    rewrite(newest, pickle.dumps(Evil(folder), 2))
    return resumed(run)


def mistyped(folder: Path, run: Path) -> list[str]:
    """Replaces the weights in every checkpoint by a number, with correct checksums; returns the options to resume the run."""
    for path in checkpoints(run / "checkpoints"):
        buffer = io.BytesIO()
        torch.save({**torch.load(path / "state.pt", weights_only=True), "module": 3}, buffer)
        rewrite(path, buffer.getvalue())
    return resumed(run)


def rewrite(checkpoint: Path, state: bytes) -> None:
    """Replaces the bytes of a checkpoint and its checksums."""
    (checkpoint / "state.pt").write_bytes(state)
    about = json.loads((checkpoint / "manifest.txt").read_text().splitlines()[0])
    line = json.dumps(about | {"bytes": len(state), "sha256": hashlib.sha256(state).hexdigest()})
    (checkpoint / "manifest.txt").write_text(f"{line}\n{hashlib.sha256(line.encode()).hexdigest()}\n")


def torn(folder: Path, run: Path) -> list[str]:
    """Writes images, one of them cut off; returns the options to train on them."""
    path = images(folder) / "train" / "a" / "3.png"
    path.write_bytes(path.read_bytes()[:60])
    return small(folder)


def bomb(folder: Path, run: Path) -> list[str]:
    """Writes images, one of which claims more pixels than PIL considers safe; returns the options to train on them."""
    path = images(folder) / "train" / "b" / "5.png"
    header = bytearray(path.read_bytes())
    header[16:24] = struct.pack(">II", 60_000, 60_000)
    header[29:33] = struct.pack(">I", zlib.crc32(bytes(header[12:29])))
    path.write_bytes(bytes(header))
    return small(folder)


CASES = (
    Case("an option mistyped", "did you mean '--model'", given("--modle", "resnet18")),
    Case("a word for a number", "invalid int value: 'ten'", given("--epochs", "ten")),
    Case("no epochs", "epochs: expected at least 1; got 0", given("--epochs", "0")),
    Case("a share out of bounds", "smoothing: expected a value in [0, 1); got 1.5", given("--smoothing", "1.5")),
    Case("an unknown choice", "did you mean 'emd'", given("--sfr-matching", "emb")),
    Case("a model mistyped", "did you mean 'resnet18'", given("--model", "resnet81")),
    Case("an argument that the model lacks", "model: cannot create", given("--model-kwargs", "depth=3")),
    Case("images too small for its taps", "no usable shallow tap", given("--model", "resnet18", "--img-size", "8")),
    Case("a tap that is not there", "no feature 'layer9'", given("--sfr-taps", "layer9", "layer3")),
    Case("an optimizer mistyped", "did you mean 'sgd'", given("--opt", "sdg")),
    Case("a schedule mistyped", "cannot make the schedule 'cosin'", given("--sched", "cosin")),
    Case("an unknown augmentation", "aa: timm cannot make", given("--aa", "foo")),
    Case("a precision that the device lacks", "fp16 needs a GPU", given("--mixed-precision", "fp16")),
    Case("a learning rate that is too high", "non-finite loss at epoch 1", given("--lr", "1e30")),
    Case("a seed that NumPy does not take", "seed: expected a value from 0 to", given("--seed", "4294967296")),
    Case("one beta for two", "opt-betas: expected two", given("--opt", "adamw", "--opt-betas", "0.9")),
    Case("an unknown interpolation", "interpolation", given("--interpolation", "foo")),
    Case("a range of CutMix that is empty", "cutmix-minmax: expected", given("--cutmix-minmax", "0.5", "0.5")),
    Case("two channels for RGB images", "in-chans: expected 3", given("--in-chans", "2")),
    Case("a step of no epochs", "decay-epochs: expected", given("--sched", "step", "--decay-epochs", "0")),
    Case("one image a batch, one value a channel", "batch-size: BatchNorm needs",
         given("--no-sfr", "--model", "resnet18", "--img-size", "32", "--batch-size", "1")),
    Case("another trainer's name for an option", "timm_sfr's is --lr", given("--learning-rate", "0.1")),
    Case("an option of timm's that does not go here", "use --torchcompile", given("--torchscript")),
    Case("a file to resume", "expected the folder of a run", lambda folder, run: ["--resume", file(folder, "last.pth.tar", "x")]),
    Case("a batch larger than the set", "fewer than one global batch", given("--batch-size", "5000")),
    Case("fewer classes than the data", "the data has 10 classes; got 4", given("--num-classes", "4")),
    Case("a data set mistyped", "did you mean 'digits'", given("--dataset", "digit")),
    Case("no such folder of data", "no such file or directory", given("--data-dir", "/does/not/exist")),
    Case("a folder without splits", "has no 'train' part", lambda folder, run: ["--data-dir", str(folder)]),
    Case("a class in the validation split alone", "val has 1 class that training does not have: ['c']",
         lambda folder, run: small(images(folder, ("a", "b", "c")))),
    Case("an image that is torn", "cannot decode image DIR/train/a/3.png", torn),
    Case("an image of too many pixels", "cannot decode image DIR/train/b/5.png", bomb),
    Case("a stream without its length", "train-num-samples: ",
         lambda folder, run: ["--dataset", "wds/", "--data-dir", str(folder), "--num-classes", "2"]),
    Case("no such file of options", "config: cannot read", lambda folder, run: ["--config", str(folder / "o.yaml")]),
    Case("an options file that is not YAML", "config: cannot read", lambda folder, run: options(folder, "seed: [1")),
    Case("a mistyped option in such a file", "did you mean 'seed'", lambda folder, run: options(folder, "sead: 3")),
    Case("a list for a number in such a file", "seed: expected int; got [1]", lambda folder, run: options(folder, "seed: [1]")),
    Case("an output that is a file", "output: ",
         lambda folder, run: ["--output", file(folder, "out", ""), "--experiment", "run"]),
    Case("an experiment that is there", "already holds files",
         lambda folder, run: ["--output", str(run.parent), "--experiment", run.name]),
    Case("a folder to resume that is no run", "is not a run", lambda folder, run: ["--resume", str(folder)]),
    Case("an experiment that is a file", "is a file",
         lambda folder, run: ["--output", str(folder), "--experiment", Path(file(folder, "run", "")).name]),
    Case("a summary.csv that somebody has edited", "is not what the run wrote", edited),
    Case("a run to resume without a whole checkpoint", "no intact checkpoint", damaged),
    Case("a checkpoint that runs code", "no intact checkpoint", pickled),
    Case("a checkpoint without weights", "module is '3'", mistyped),
    Case("another model than the run's", "Missing key(s)", lambda folder, run: resumed(run, "--model", "wrn_16_2_cifar")),
    Case("another optimizer than the run's", "opt: expected 'sgd', the optimizer of the run to resume",
         lambda folder, run: resumed(run, "--opt", "adamw")),
    Case("no such weights", "initial-checkpoint: no such file", given("--initial-checkpoint", "/does/not/exist.pth")),
    Case("weights that run code", "is not unpickled",
         lambda folder, run: ["--initial-checkpoint", file(folder, "w.pth", pickle.dumps(Evil(folder), 2))]),
    Case("a model's folder with a pickle", "a pickle is not loaded", lambda folder, run: model(folder, run, _pickled)),
    Case("weights whose header is absurdly long", "are damaged", lambda folder, run: model(folder, run, _long)),
    Case("weights that are cut off", "are damaged", lambda folder, run: model(folder, run, _cut)),
    Case("weights of another shape", "size mismatch", lambda folder, run: model(folder, run, _reshaped)),
    Case("weights of another type", "to be float32; got I64", lambda folder, run: model(folder, run, _retyped)),
    Case("an architecture that is a path", "which neither timm", lambda folder, run: model(folder, run, _climbing)),
    Case("an invalid repository name", "push-to-hub: expected USER/NAME", given("--push-to-hub", "a/b/c")),
)  # fmt: skip


def finished_run(output: Path) -> Path:
    """Trains two epochs on the digits; returns the run's folder."""
    with contextlib.redirect_stdout(io.StringIO()):
        train([*QUICK, "--epochs", "2", "--output", str(output), "--experiment", "run"])
    AcceleratorState._reset_state(reset_partial_state=True)
    return output / "run"


def ask(case: Case, place: Path, finished: Path) -> Answer:
    """Runs the trainer on a case, with a copy of a finished run in the empty folder `place`; returns its answer."""
    folder, run = place / "DIR", place / "runs" / "RUN"
    folder.mkdir()
    shutil.copytree(finished, run)
    words = case.words(folder, run)
    before = _contents(run)
    output = [] if {"--output", "--resume"} & set(words) else ["--output", str(place / "output")]
    quick = [] if "--resume" in words else list(QUICK)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            status = train([*quick, *output, *words])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    after = _contents(run)
    lost = [name for name, content in before.items() if after.get(name) != content]
    if (folder / "the pickle ran").exists():
        lost.append("a pickle ran")
    lines = [line.replace(str(folder), "DIR").replace(str(run), "RUN") for line in errors.getvalue().splitlines()]
    return Answer(status, lines, lost)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def main() -> int:
    """Runs all cases and writes the table; returns 1 if an answer was wrong, otherwise 0."""
    rows, bad = [], 0
    with tempfile.TemporaryDirectory() as place:
        finished = finished_run(Path(place))
        for number, case in enumerate(CASES, 1):
            with tempfile.TemporaryDirectory() as empty:
                answer = ask(case, Path(empty), finished)
            said = [line for line in answer.lines if line.startswith("error: ")]
            right = answer.status == 2 and len(said) == 1 and case.says in said[0] and not answer.lost
            bad += not right
            line = said[0].removeprefix("error: ").replace("|", "\\|") if said else "none"
            rows.append([str(number), case.what, f"`{line}`"])
            print("ok   " if right else "WRONG", case.what, answer if not right else said[0], flush=True)
    table = markdown(["", "what is wrong", "the line"], rows, words=True)
    DOCUMENT.write_text(fill(DOCUMENT.read_text(), "inputs", table))
    print(f"{len(CASES) - bad} of {len(CASES)} get one line, and nothing saved is lost")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
