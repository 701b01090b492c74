"""Measures the trainer's loop, the loader and several processes, and how the time of the losses grows with their size."""

from __future__ import annotations

import csv
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import timm
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from benchmarks.accuracy import HERE
from benchmarks.measured import Row, ratio_row, timed
from timm_sfr import emd_l2, gaussian_l2, sinkhorn_divergence
from timm_sfr.config import AugConfig, DataConfig, RunConfig
from timm_sfr.data.datasets import open_splits
from timm_sfr.data.loaders import TrainBatches, eval_loader
from timm_sfr.data.transforms import Preprocessing
from timm_sfr.method.transport import transport_plan
from timm_sfr.training.optimizer import create_optimizer
from timm_sfr.training.run import prepare
from timm_sfr.utils.errors import UserError

MODEL, BATCH = "resnet20_cifar", 128


def loop_rows(rounds: int) -> list[Row]:
    """Compares `train_sfr.py --no-sfr` with a minimal loop over the same batches: images per second, one epoch per turn."""
    with tempfile.TemporaryDirectory() as output:
        options = {"sfr": False, "model": MODEL, "batch_size": BATCH, "workers": 0, "cache_dataset": True,
                   "dataset": "digits", "img_size": 32, "output": output, "experiment": "run"}  # fmt: skip
        trainer = prepare(RunConfig.from_flat(options))
        device, config = trainer.accelerator.device, trainer.config
        model = timm.create_model(MODEL, num_classes=10).to(device)
        optimizer = create_optimizer(config.optim, model, config.optim.lr)
        criterion = nn.CrossEntropyLoss(label_smoothing=config.sfr.plain_smoothing)

        def minimal() -> None:
            model.train()
            for image, target in trainer.batches.epoch(0):
                loss = criterion(model(image), target)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

        minimal(), trainer.train_epoch(0)
        what = f"train_sfr.py --no-sfr, images/s over a minimal timm loop's, {MODEL}, 32 px, batch {BATCH}"
        return [ratio_row("loop", what, minimal, lambda: trainer.train_epoch(0), rounds, target=0.98, speed=True)]


AUGMENTATIONS = {
    "defaults (crop, flip, colours)": AugConfig(),
    "crop and flip": AugConfig(color_jitter=0.0),
    "--no-aug": AugConfig(no_aug=True),
}
PREP = Preprocessing((3, 32, 32), (0.5,) * 3, (0.25,) * 3, "bilinear", 1.0)


def loader_rows(folder: Path, rounds: int) -> list[Row]:
    """Compares the loader with --cache-dataset to the loader without: images per second, by augmentation and workers.

    torch uses one thread here. More threads would wait for work in busy loops, which takes the workers' cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _loader_rows(folder, rounds)
    finally:
        torch.set_num_threads(threads)


def _loader_rows(folder: Path, rounds: int) -> list[Row]:
    rows, accelerator = [], Accelerator(cpu=not torch.cuda.is_available())
    for workers, (name, aug) in itertools.product((0, 2), AUGMENTATIONS.items()):
        work = []
        for cached in (False, True):
            config = DataConfig(data_dir=str(folder), batch_size=BATCH, workers=workers, cache_dataset=cached)
            train = open_splits(config, "RGB", 0)[0]
            work.append(_drained(TrainBatches(train, config, aug, PREP, 0, accelerator), len(train.dataset)))
        rows.append(_loader_row(f"training, {name}, {workers} workers", *work, rounds))
    for workers in (0, 2):
        config = DataConfig(data_dir=str(folder), batch_size=BATCH, workers=workers)
        val = open_splits(config, "RGB", 0)[1]
        work = [
            _drained(eval_loader(val, replace(config, cache_dataset=cached), PREP), len(val.dataset)) for cached in (False, True)
        ]
        rows.append(_loader_row(f"validation, {workers} workers", *work, rounds))
    return rows


def _drained(batches: Any, images: int) -> tuple[Callable[[], None], int]:
    """Reads all batches once; returns a function that reads them again, and the number of images."""

    def drain() -> None:
        for _ in batches.epoch(0) if hasattr(batches, "epoch") else batches:
            pass

    drain()
    return drain, images


def _loader_row(what: str, plain: tuple[Callable, int], cached: tuple[Callable, int], rounds: int) -> Row:
    row = ratio_row("loader", f"--cache-dataset, {what}", plain[0], cached[0], rounds, target=3.0, speed=True)
    rates = [images / timed(work) for work, images in (plain, cached)]
    return replace(row, note=f"{rates[0]:.0f} against {rates[1]:.0f} images/s, {rounds} rounds")


@contextmanager
def small_images(source: Path | None, per_class: int = 1000) -> Iterator[Path]:
    """Yields a folder with the first images of each class of `source`; without it, of noise: 32 pixels, JPEG, 10 classes."""
    if source is not None and not all((source / split).is_dir() for split in ("train", "val")):
        raise UserError(f"data-dir: expected {str(source)!r} to hold train/CLASS/*.jpg and val/CLASS/*.jpg; give such a folder")
    with tempfile.TemporaryDirectory() as place:
        random = np.random.default_rng(0)
        for split in ("train", "val"):
            classes = sorted((source / split).iterdir()) if source else [Path(str(index)) for index in range(10)]
            for name in classes:
                folder = Path(place, split, name.name)
                folder.mkdir(parents=True)
                if source:
                    for path in sorted(name.iterdir())[:per_class]:
                        (folder / path.name).symlink_to(path.resolve())
                    continue
                for index in range(per_class):
                    rough = Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8))
                    rough.resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{index}.jpg", quality=90)
        yield Path(place)


def process_rows(rounds: int, processes: int = 2) -> list[Row]:
    """Divides the time per image with SFR by that without, in CPU processes, by whole runs of `train_sfr.py` in turns."""

    def rate(*words: str) -> float:
        with tempfile.TemporaryDirectory() as output:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
            fixed = ["--model", MODEL, "--batch-size", str(BATCH // processes), "--epochs", "3", "--workers", "0",
                     "--cache-dataset", "--device", "cpu", "--output", output, "--experiment", "run"]  # fmt: skip
            command = [*launch, str(HERE.parent / "train_sfr.py"), *fixed, *words]
            subprocess.run(command, capture_output=True, check=True)
            with Path(output, "run", "summary.csv").open() as file:
                return median(float(row["images_per_second"]) for row in list(csv.DictReader(file))[1:])

    before, each = rate("--no-sfr"), []
    for _ in range(rounds):
        ours, after = rate(), rate("--no-sfr")
        each.append((before + after) / 2 / ours)
        before = after
        print(f"{processes} processes: {each[-1]:.3f}", flush=True)
    low, middle, high = np.quantile(each, (0.25, 0.5, 0.75)).tolist()
    note = f"{before:.0f} images/s without, {rounds} rounds of whole runs"
    return [
        Row(
            "processes",
            f"step, {MODEL}, 32 px, {processes} processes of {BATCH // processes}",
            middle,
            low,
            high,
            None,
            False,
            note,
        )
    ]


def growth_rows() -> list[Row]:
    """Fits the exponents of time in B, N and C at large sizes; the target is the exponent of the arithmetic."""

    def both(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[int, int, int], Callable[[], None]]:
        def make(b: int, n: int, c: int) -> Callable[[], None]:
            shallow, deep = torch.randn(b, n, c, requires_grad=True), torch.randn(b, n, c)
            return lambda: loss(shallow, deep).backward()

        return make

    def plan(b: int, n: int, c: int) -> Callable[[], Tensor]:
        cost = torch.rand(b, n, n)
        return lambda: transport_plan(cost)

    sizes = {"B": (64, 128, 256, 512), "N": (36, 64, 100, 196), "C": (64, 128, 256, 512)}
    usual = {"B": 64, "N": 49, "C": 64}
    most = {
        "transport_plan": {"B": 1, "N": 2},
        "emd_l2": {"B": 1, "N": 2, "C": 1},
        "gaussian_l2": {"B": 1, "N": 1, "C": 1},
        "sinkhorn_divergence": {"B": 1, "N": 2, "C": 1},
    }
    rows = []
    losses = {loss.__name__: both(loss) for loss in (emd_l2, gaussian_l2, sinkhorn_divergence)}
    for name, make in {"transport_plan": plan, **losses}.items():
        for axis, power in most[name].items():
            works = {size: make(*{**usual, axis: size}.values()) for size in sizes[axis]}
            for work in works.values():
                timed(work, 3)
            # The sizes take turns, so that a slow moment affects all of them.
            taken = [[timed(work, 3) for work in works.values()] for _ in range(15)]
            slopes = [np.polyfit(np.log(list(works)), np.log(times), 1)[0] for times in taken]
            low, middle, high = np.quantile(slopes, (0.25, 0.5, 0.75)).tolist()
            spread = ", ".join(
                f"{size}: {1e3 * median(t):.2f} ms" for size, t in zip(works, zip(*taken, strict=True), strict=True)
            )
            rows.append(Row("growth", f"{name}, exponent of {axis}", middle, low, high, power, False, spread))
            print(rows[-1], flush=True)
    return rows
