"""The digits as data sets lie on disks and on the Hub: tars, WebDataset shards, Parquet files."""

import functools
import io
import tarfile

from timm_sfr.data.datasets import Digits

COUNTS = {"train": 96, "val": 40}


@functools.cache
def digit_files(split):
    """A split's images as PNG files of 32 x 32 pixels, each with its label."""
    digits, files = Digits(split == "train", "RGB"), []
    for index in range(COUNTS[split]):
        image, label = digits[index]
        file = io.BytesIO()
        image.resize((32, 32)).save(file, "PNG")
        files.append((file.getvalue(), label))
    return files


def put(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def make_tars(place):
    """``SPLIT.tar`` with ``LABEL/INDEX.png``."""
    for split in COUNTS:
        with tarfile.open(place / f"{split}.tar", "w") as tar:
            for index, (data, label) in enumerate(digit_files(split)):
                put(tar, f"{label}/{index}.png", data)


def make_shards(place):
    """Two shards a split, ``SPLIT-0000.tar`` and ``SPLIT-0001.tar``, with ``INDEX.png`` and ``INDEX.cls``."""
    for split in COUNTS:
        for shard in range(2):
            with tarfile.open(place / f"{split}-{shard:04d}.tar", "w") as tar:
                for index, (data, label) in list(enumerate(digit_files(split)))[shard::2]:
                    put(tar, f"{index:05d}.png", data)
                    put(tar, f"{index:05d}.cls", str(label).encode())


def make_parquet(place):
    """Two Parquet files for each of the splits ``train`` and ``validation``, with the columns ``image`` and ``label``."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=[*"0123456789"])})
    for split, name in (("train", "train"), ("val", "validation")):
        rows = [{"image": {"bytes": data, "path": None}, "label": int(label)} for data, label in digit_files(split)]
        for shard in range(2):
            part = datasets.Dataset.from_list(rows[shard::2], features=features)
            part.to_parquet(str(place / f"{name}-{shard:05d}-of-00002.parquet"))
    return place
