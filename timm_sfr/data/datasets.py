"""Opens timm's datasets (folders, tars, torch/, hfds/, wds/, ...) and the built-in digits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import Dataset, IterableDataset

from timm_sfr.config import DataConfig
from timm_sfr.utils.errors import UserError, first_line, near_matches, near_paths

SPLIT_SYNONYMS = ({"train", "training"}, {"val", "valid", "validation", "eval", "evaluation"})


@dataclass(frozen=True)
class Split:
    """One split of a dataset, map-style or a stream, and its class names if known."""

    dataset: Any
    class_names: tuple[str, ...] | None

    @property
    def streamed(self) -> bool:
        """Whether the dataset is a stream, which can only be iterated."""
        return isinstance(self.dataset, IterableDataset)


class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits (8 x 8 grey), split 4 : 1 by class with a fixed seed, as PIL images."""

    def __init__(self, train: bool, mode: str) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
        parts = train_test_split(pixels, digits.target, test_size=0.2, random_state=0, stratify=digits.target)
        self.pixels, self.labels = (parts[0], parts[2]) if train else (parts[1], parts[3])
        self.mode = mode

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]).convert(self.mode), int(self.labels[index])


def open_split(config: DataConfig, training: bool, img_mode: str, seed: int) -> Split:
    """Opens the training or the validation split of the dataset in `config`.

    Raises:
        UserError: if the split is missing or empty, or timm cannot open it.
    """
    if config.dataset == "digits":
        return Split(Digits(training, img_mode), tuple("0123456789"))
    split = config.train_split if training else config.val_split
    name = config.dataset or ""
    samples = config.train_num_samples if training else config.val_num_samples
    if "/" not in name and (config.data_dir is None) and name not in ("", "folder"):
        kinds = "torch/NAME, hfds/NAME, hfids/NAME, tfds/NAME or wds/, or 'digits'"
        raise UserError(f"dataset: expected {kinds}, or --data-dir; got {name!r}{near_matches(name, ['digits'])}")
    if not name or name == "folder":
        name = ""
        _check_folder(config.data_dir, split)
    if name.startswith("wds/") and samples is None:
        _check_shards(config.data_dir, "train" if training else "val")
    try:
        dataset = create_dataset(
            name,
            root=config.data_dir,
            split=split,
            class_map=config.class_map,
            is_training=training,
            download=config.dataset_download,
            batch_size=config.batch_size,
            num_samples=samples,
            seed=seed,
            input_img_mode=img_mode,
            input_key=config.input_key,
            target_key=config.target_key,
        )
    except (RuntimeError, AssertionError, ValueError, ImportError, OSError, KeyError, TypeError) as error:
        raise UserError(
            f"data: cannot open the {split!r} split of {name or config.data_dir!r}: {first_line(error)}"
        ) from error
    reader = getattr(dataset, "reader", dataset)
    # Readers of tars have class_name_to_idx.
    classes = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    names = tuple(map(str, sorted(classes, key=classes.get))) if classes else getattr(dataset, "classes", None)
    return Split(dataset, tuple(names) if names else None)


def open_splits(config: DataConfig, img_mode: str, seed: int) -> tuple[Split, Split]:
    """Opens the training and the validation split and checks that their classes are the same.

    Raises:
        UserError: if a split cannot be opened, or the classes differ.
    """
    train, val = (open_split(config, training, img_mode, seed) for training in (True, False))
    if train.class_names and val.class_names and train.class_names != val.class_names:
        only_train = sorted(set(train.class_names) - set(val.class_names))[:3]
        only_val = sorted(set(val.class_names) - set(train.class_names))[:3]
        raise UserError(
            f"data: train has {len(train.class_names)} classes and val has {len(val.class_names)}, expected the same ones; "
            f"only in train: {only_train or 'none'}, only in val: {only_val or 'none'}; rename the folders, or give "
            "--class-map"
        )
    return train, val


def _check_shards(data_dir: str | None, split: str) -> None:
    """Raises UserError if a folder of shards has no file with the number of samples."""
    root = Path(data_dir or "")
    if root.is_dir() and not any((root / name).exists() for name in ("_info.json", "info.json")):
        raise UserError(f"{split}-num-samples: the shards in {str(root)!r} do not say how many samples they hold; give "
                        "--train-num-samples and --val-num-samples")  # fmt: skip


def _check_folder(data_dir: str | None, split: str) -> None:
    """Raises UserError unless `data_dir` contains `split`; timm would fall back to the whole folder."""
    layout = "DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg"
    root = Path(data_dir or "")
    if data_dir is None or not root.exists():
        hint = "" if data_dir is None else near_paths(root)
        raise UserError(f"data-dir: no such file or directory: {data_dir!r}{hint}; expected {layout}")
    if root.is_file():
        raise UserError(f"data-dir: {data_dir!r} is a file; give the folder and name its splits with --train-split and "
                        "--val-split (for example train.tar)")  # fmt: skip
    names = {split.split("[")[0]}.union(*(group for group in SPLIT_SYNONYMS if split in group))
    if not any((root / name).exists() for name in names):
        found = ", ".join(sorted(entry.name for entry in root.iterdir())[:6]) or "nothing"
        raise UserError(f"data-dir: {data_dir!r} has no {split!r} part (any of {', '.join(sorted(names))}); found {found}; "
                        f"expected {layout}")  # fmt: skip
