"""What lies in the folders of a dataset: images per class, what is passed over, images of both splits, modes and sizes."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from statistics import median
from typing import Any

from PIL import Image

from timm_sfr.data.datasets import Split
from timm_sfr.data.folders import FolderScan
from timm_sfr.data.images import DEEP, KNOWN, UNDECODABLE
from timm_sfr.utils.console import counted, some

SAMPLE = 64  # images whose headers are read, spread over a split
Header = tuple[str, str, tuple[int, int]]  # format, mode, (width, height)
PAIRS = (("val", "train"), ("test", "train"), ("test", "val"))  # splits that must not share images
CHEAP = 20_000  # a run looks for duplicates only if both splits together have at most this many images


def lines(train: Split, val: Split, test: Split | None = None) -> list[str]:
    """Returns what a run says of its folders before it trains; an empty list for other datasets."""
    if train.scan is None or val.scan is None:
        return []
    scans = {"train": train.scan, "val": val.scan, **({"test": test.scan} if test and test.scan else {})}
    found = [f"data: {'; '.join(f'{name} has {per_class(scan)}' for name, scan in scans.items())}"]
    if train.chosen:
        found[0] += ("; val is" if len(scans) > 2 else ",") + " taken from the training images by --seed"
    for name, scan in scans.items():
        if scan.passed_over():
            found.append(f"data: {name} passes over {scan.passed_over()}")
        if scan.empty:
            found.append(f"data: {name} has {counted(len(scan.empty), 'folder')} without images: {some(scan.empty)}")
        ranges = unknown_ranges(headers(scan)[0])
        if ranges:
            found.append(f"data: {name} has images of mode {', '.join(ranges)}, each scaled by its own smallest and largest "
                         "value (floats within 0 to 1 by those); --image-range LOW HIGH gives all of them one scale")  # fmt: skip
    lacking = missing_in_val(train.scan, val.scan)
    if lacking:
        found.append(f"data: val has no images of {counted(len(lacking), 'class')}: {some(lacking)}")
    for name, other in PAIRS:
        if not {name, other} <= scans.keys() or len(scans[name].images) + len(scans[other].images) > CHEAP:
            continue
        twice = duplicates(scans[other], scans[name])
        if twice:
            above = os.path.commonpath([os.path.dirname(path) for path in twice[0]])
            pair = " = ".join(os.path.relpath(path, above) for path in twice[0])
            found.append(f"data: warning: {counted(len(twice), 'image')} of {name} also in {other}, such as {pair}: they make "
                         "the scores too good")  # fmt: skip
    return found


def facts(train: Split, val: Split, test: Split | None = None) -> dict[str, Any]:
    """Returns the numbers of images, and what was passed over, for metrics.json; empty for other datasets."""
    splits = {"train": train, "val": val, "test": test}
    scans = {name: split.scan for name, split in splits.items() if split is not None and split.scan is not None}
    return {name: {"images": len(scan.images), "passed_over": scan.passed_over()} for name, scan in scans.items()}


def per_class(scan: FolderScan) -> str:
    """Returns a phrase with the number of images and the sizes of the classes."""
    counts = scan.counts
    if scan.several:
        without = sum(not scan.labels(name) for _, name in scan.images)
        mean = f"{counts.total() / max(1, len(scan.images)):.2g} an image"
        return f"{counted(len(scan.images), 'image')} with {counted(len(counts), 'class')}, {mean}, {without} without a class"
    small, large = (pick(counts, key=lambda name: counts[name]) for pick in (min, max))
    sizes = f"{counts[small]} each" if counts[small] == counts[large] else (
        f"{counts[small]} ({small}) to {counts[large]} ({large}) each, median {median(counts.values()):g}"
    )  # fmt: skip
    return f"{counted(len(scan.images), 'image')} in {counted(len(counts), 'class')}, {sizes}"


def missing_in_val(train: FolderScan, val: FolderScan) -> list[str]:
    """Returns the classes of the training folder that have no images in the validation folder."""
    here = set(val.counts)
    return [name for name in train.classes if name not in here]


def duplicates(train: FolderScan, val: FolderScan) -> list[tuple[str, str]]:
    """Returns the images of val whose file is, byte for byte, one of train: (path in val, path in train)."""
    sizes: dict[int, list[str]] = defaultdict(list)
    for path, _ in train.images:
        with contextlib.suppress(OSError):  # training reports a file that cannot be read
            sizes[os.path.getsize(path)].append(path)
    known: dict[int, dict[bytes, str]] = {}
    found = []
    for path, _ in val.images:
        with contextlib.suppress(OSError):
            size = os.path.getsize(path)
            if size not in sizes:
                continue
            if size not in known:
                known[size] = {_digest(other): other for other in reversed(sizes[size])}
            other = known[size].get(_digest(path))
            if other is not None:
                found.append((path, other))
    return found


def headers(scan: FolderScan) -> tuple[Counter[Header], list[str]]:
    """Returns (format, mode, (width, height)) of about `SAMPLE` images, spread over the folder, and those that cannot be read."""
    found: Counter[Header] = Counter()
    unreadable = []
    step = max(1, len(scan.images) // SAMPLE)
    for path, _ in scan.images[::step]:
        try:
            with Image.open(path) as image:
                found[image.format or "?", image.mode, image.size] += 1
        except UNDECODABLE:
            unreadable.append(path)
    return found, unreadable


def unknown_ranges(sampled: Iterable[Header]) -> list[str]:
    """Returns the modes among sampled images whose values have no known range: 32-bit integers and floats."""
    return sorted({mode for kind, mode, _ in sampled if mode in DEEP and kind not in KNOWN})


def _digest(path: str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).digest()
