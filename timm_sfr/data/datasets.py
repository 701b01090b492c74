"""Opens timm's datasets (folders, tars, torch/, hfds/, wds/, ...) and the built-in digits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import ImageDataset, MultiLabelTarget, add_img_extensions, create_dataset
from timm.data.readers.class_map import load_class_map
from torch.utils.data import Dataset, IterableDataset

from timm_sfr.config import DataConfig
from timm_sfr.data.folders import (
    LAYOUT,
    SPLIT_SYNONYMS,
    VAL_SHARE,
    FolderReader,
    FolderScan,
    choose_split,
    find_split,
    map_classes,
    read_split,
    scan_folder,
    split_names,
)
from timm_sfr.data.images import image_endings
from timm_sfr.data.tables import KNOWN_SPLITS, Table, find_table, is_table, read_table
from timm_sfr.utils.console import counted
from timm_sfr.utils.errors import UserError, first_line, near_matches, near_paths


@dataclass(frozen=True)
class Split:
    """One split of a dataset, map-style or a stream."""

    dataset: Any
    class_names: tuple[str, ...] | None  # in the order of their indices; None if they are not known
    scan: FolderScan | None = None  # what lies in the split's folder; None for other datasets
    chosen: bool = False  # whether the split was chosen from a folder that has no splits

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


# Of torchvision: only a training and a test half.
HALVES = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")


@dataclass(frozen=True)
class Parts:
    """The images of the parts (train, val, test) of a dataset that are listed before they are opened; see `Split.chosen`."""

    scans: dict[str, FolderScan]
    chosen: bool = True


def open_splits(config: DataConfig, img_mode: str, seed: int, listed: Path | None = None) -> tuple[Split, Split]:
    """Opens the training and the validation split; both number the classes as the training split does.

    The arguments are those of `open_split`; `listed` is given if the run is resumed.

    Raises:
        UserError: if a split cannot be opened, or the validation split has classes that the training split lacks.
    """
    parts = _parts(config, seed, listed)
    train = open_split(config, "train", img_mode, seed, parts=parts)
    return train, open_split(config, "val", img_mode, seed, train.class_names, parts=parts)


def open_test(config: DataConfig, img_mode: str, seed: int, classes: tuple[str, ...] | None) -> Split | None:
    """Opens the test split, with the numbers of the training split's `classes`; None if the options name none.

    Raises:
        UserError: if it cannot be opened, or has classes that the training split lacks.
    """
    return None if config.test_split is None else open_split(config, "test", img_mode, seed, classes)


def open_split(
    config: DataConfig,
    part: str,
    img_mode: str,
    seed: int,
    classes: tuple[str, ...] | None = None,
    listed: Path | None = None,
    parts: Parts | None = None,
) -> Split:
    """Opens a part of the dataset in `config`.

    Args:
        config: The data options.
        part: Which part: train, val or test.
        img_mode: The Pillow mode of the images.
        seed: Chooses the validation images of a folder without splits.
        classes: The classes in the order of their indices, of which the split may lack some; None: its own.
        listed: The file in which a run has listed the images of a folder without splits.
        parts: The images of the parts, if they are already known.

    Raises:
        UserError: if the split is missing or empty, timm cannot open it, it has a class that is not among `classes`, or an
            option is given that this data does not take.
    """
    _check_source(config, part)
    name = config.dataset or ""
    parts = parts or _parts(config, seed, listed, part)
    add_img_extensions([ending for ending in image_endings() if ending not in (".png", ".jpg", ".jpeg")])
    if name == "digits":
        split = Split(Digits(part == "train", img_mode), tuple("0123456789"))
    elif parts is not None and part in parts.scans:
        split = _from_scan(config, parts.scans[part], part, classes, parts.chosen)
    elif "/" not in name and (root := _split_root(config, part)).is_dir():
        split = _from_scan(config, scan_folder(root, _endings(config)), part, classes)
    else:
        split = _from_timm(config, part, img_mode, seed, classes)
    if config.num_samples(part) is not None and not split.streamed:
        raise UserError(f"{part}-num-samples: it is for streams, which do not know their length; this data has "
                        f"{counted(len(split.dataset), 'image')}; leave the option out")  # fmt: skip
    return split


def _check_source(config: DataConfig, part: str) -> None:
    """Raises UserError for a data set that is not known, or options that it does not take."""
    if config.multilabel and not is_table(config.dataset) and not (config.dataset or "").startswith("hfds/"):
        raise UserError("task: multilabel reads several classes of an image from --dataset csv/FILE or hfds/NAME; got "
                        f"{config.dataset or config.data_dir!r}, whose images have one class each")  # fmt: skip
    name = config.dataset or ""
    if "/" not in name and (config.data_dir is None) and name not in ("", "folder", "digits"):
        kinds = "torch/NAME, hfds/NAME, hfids/NAME, tfds/NAME, wds/ or csv/FILE, or 'digits'"
        raise UserError(f"dataset: expected {kinds}, or --data-dir; got {name!r}{near_matches(name, ['digits'])}")
    if config.class_map and name.split("/")[0] in ("digits", "torch"):
        raise UserError(f"class-map: {name} numbers its classes itself; leave the option out")
    if name == "digits" and part == "test":
        raise UserError("test-split: the digits have no test split; leave the option out, or give --data-dir or --dataset")


def open_validation(
    config: DataConfig, img_mode: str, seed: int, names: Sequence[str] | None, listed: Path | None = None
) -> Split:
    """Opens the validation split, as `open_split`, for a model with the classes `names`, of which the split may lack some."""
    split = open_split(config, "val", img_mode, seed, listed=listed)
    if names and split.class_names and set(split.class_names) < set(names):
        split = open_split(config, "val", img_mode, seed, tuple(names), listed)
    return split


def _from_scan(config: DataConfig, scan: FolderScan, part: str, classes: tuple[str, ...] | None, chosen: bool = False) -> Split:
    """Returns the split that a folder's images make."""
    if config.class_map is not None:
        class_to_idx = _class_map(config.class_map, scan.root)
        # Only the training split has to have images of every class in the map.
        needed = class_to_idx if part == "train" else {name: 0 for name in scan.classes if name in class_to_idx}
        scan = map_classes(scan, needed, config.class_map)
    elif classes is not None:
        class_to_idx = {name: index for index, name in enumerate(classes)}
    else:
        class_to_idx = {name: index for index, name in enumerate(scan.classes)}
        if scan.several and scan.images and not class_to_idx:
            raise UserError(f"data: no image of {part} has a class; expected some with | or ; between their classes")
    if not scan.images:
        over = scan.passed_over()
        raise UserError(f"data: found no images in folders of classes in {str(scan.root)!r}{f'; found {over}' if over else ''}; "
                        f"expected {LAYOUT}")  # fmt: skip
    _check_known(scan.classes, class_to_idx, part)
    names = _names(class_to_idx)
    encode = MultiLabelTarget(len(names)) if scan.several else None
    dataset = ImageDataset(str(scan.root), reader=FolderReader(scan, class_to_idx), target_transform=encode)
    return Split(dataset, names, scan, chosen)


def _from_timm(config: DataConfig, part: str, img_mode: str, seed: int, classes: tuple[str, ...] | None) -> Split:
    """Returns the split as timm opens it: a tar, torch/, hfds/, wds/, ...

    Raises:
        UserError: if timm cannot open it, or its classes are not `classes`; those of a tar may be fewer.
    """
    split, samples = config.split(part), config.num_samples(part)
    name = config.dataset if config.dataset and "/" in config.dataset else ""
    if name.startswith("wds/") and samples is None:
        _check_shards(config.data_dir, part)
    if name.startswith("wds/") and config.epoch_repeats > 1:
        raise UserError(f"epoch-repeats: timm's reader of webdatasets does not repeat; got {config.epoch_repeats:g}; leave the "
                        "option out, and train for as many times more --epochs")  # fmt: skip
    kind, _, of = name.partition("/")
    if kind == "torch" and of.lower() in HALVES:
        _check_half(name, split, part)
    try:
        dataset = create_dataset(
            name,
            root=config.data_dir,
            split=split,
            class_map=config.class_map,
            is_training=part == "train",
            download=config.dataset_download,
            batch_size=config.batch_or_default,
            num_samples=samples,
            repeats=config.epoch_repeats if part == "train" else 0,  # of a stream; the sampler repeats other datasets
            seed=seed,
            # Streams give images as they are; their transform brings them to the mode (`timm_sfr.data.images`).
            input_img_mode="" if kind in ("wds", "hfids") else img_mode,
            input_key=config.input_key,
            target_key=config.target_key,
            trust_remote_code=config.dataset_trust_remote_code,
        )
    except (RuntimeError, AssertionError, ValueError, ImportError, OSError, KeyError, TypeError) as error:
        raise UserError(f"data: cannot open the {split!r} split of {name or config.data_dir!r}: {first_line(error)}") from error
    reader = getattr(dataset, "reader", dataset)
    # Readers of tars have class_name_to_idx.
    class_to_idx = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    names = _names(class_to_idx) if class_to_idx else getattr(dataset, "classes", None)
    names = tuple(names) if names else None
    if config.multilabel:
        _encode_labels(dataset, names, name)
    if names is None or classes is None or names == classes:
        return Split(dataset, names)
    numbers = {one: index for index, one in enumerate(classes)}
    _check_known(names, numbers, part)
    if name or not hasattr(reader, "targets"):
        raise UserError(f"data: {part} has {counted(len(names), 'class')} and train has {len(classes)}, expected the same ones "
                        f"in the same order{'' if name else '; give --class-map'}")  # fmt: skip
    reader.targets = [numbers[names[target]] for target in reader.targets]  # a tar that lacks some of the classes
    return Split(dataset, classes)


def _check_half(name: str, split: str, part: str) -> None:
    """Raises UserError for a split that a set of torchvision's with two halves does not have: timm would open the second."""
    if part == "test":
        raise UserError(f"test-split: {name} has two halves, of which the second is validated on; leave the option out")
    known = {"test", *SPLIT_SYNONYMS[0], *SPLIT_SYNONYMS[1]}
    if split not in known:
        raise UserError(f"{part}-split: expected 'train' or 'validation', the two halves of {name}; got {split!r}")


def _encode_labels(dataset: ImageDataset, names: tuple[str, ...] | None, name: str) -> None:
    """Makes a data set of Hugging Face's give several classes of an image as 0 and 1; raises UserError without such classes."""
    first = next(dataset.reader.iter_targets(), None)
    if names is None or not isinstance(first, (list, tuple)):
        raise UserError(f"task: multilabel needs a column of lists of class labels in {name!r}, or columns of 0 and 1 "
                        f"(--target-key A,B,C); got {first!r}")  # fmt: skip
    dataset.target_transform = MultiLabelTarget(len(names))


def _parts(config: DataConfig, seed: int, listed: Path | None, part: str = "train") -> Parts | None:
    """Splits a table, or a folder of classes without a validation split, into parts. Returns None for any other data.

    Raises:
        UserError: if a share is given for data that cannot be split or has a validation split, there are too few images to
            split, or files named in `listed` are missing (to open another part than train, only the validation files count).
    """
    if is_table(config.dataset):
        return _table_parts(config, seed, listed, part)
    parts = _folder_parts(config, seed, listed, part)
    if parts is None and config.val_share is not None:
        raise UserError("val-share: expected a folder of classes or a table, of which a part can be split off; "
                        f"{config.dataset or config.data_dir or 'digits'!r} is validated on its split {config.val_split!r}; "
                        "leave the option out, or name another --val-split")  # fmt: skip
    return parts


def _folder_parts(config: DataConfig, seed: int, listed: Path | None, part: str) -> Parts | None:
    """Splits a folder of classes, as `_parts`."""
    if "/" in (config.dataset or "") or config.data_dir is None or not Path(config.data_dir).is_dir():
        return None
    root = Path(config.data_dir)
    train, val = find_split(root, config.train_split), find_split(root, config.val_split)
    if val is not None:
        if config.val_share is not None:
            raise UserError(f"val-share: {str(root)!r} has a validation split, {val.name!r}; leave the option out")
        return None
    if train is not None and (config.val_share is None or not train.is_dir()):
        return None
    defaults = DataConfig()
    if train is None and (config.train_split, config.val_split) != (defaults.train_split, defaults.val_split):
        return None
    scan = scan_folder(train or root, _endings(config))
    folders = {Path(path).relative_to(scan.root).parts[0].lower() for path, _ in scan.images}
    tested = {"test", (config.test_split or "test").lower()}
    misnamed = bool(folders & tested.union(*SPLIT_SYNONYMS))  # splits under other names are no classes
    if train is None and len(scan.classes) == 1 and not misnamed:
        raise UserError(f"data: expected two classes or more in {str(root)!r}; got {scan.classes[0]!r} alone; expected {LAYOUT}")
    if train is None and (not scan.images or misnamed):
        return None
    return Parts(_chosen_scans(config, scan, seed, listed, part))


def _chosen_scans(config: DataConfig, scan: FolderScan, seed: int, listed: Path | None, part: str) -> dict[str, FolderScan]:
    """Returns the parts to train and to validate on of images without a validation split, as `_parts`."""
    if listed is not None and listed.is_file():
        train, val = read_split(listed, scan, ("train", "val") if part == "train" else ("val",))
        return {"train": train, "val": val}
    if config.class_map is not None:
        scan = map_classes(scan, _class_map(config.class_map, scan.root), config.class_map)
    train, val = choose_split(scan, VAL_SHARE if config.val_share is None else config.val_share, seed)
    if not val.images:
        raise UserError(f"data: every class in {str(scan.root)!r} has a single image, so none is left to validate on; add "
                        "images, or make train/ and val/ of your own")  # fmt: skip
    return {"train": train, "val": val}


def _table_parts(config: DataConfig, seed: int, listed: Path | None, part: str) -> Parts:
    """Returns the parts of a table: by its column ``split``, or with a chosen validation part, as `_parts`.

    Raises:
        UserError: if the table cannot be read, a part that is needed has no rows, or some of its image files are missing.
    """
    file = find_table(config.dataset or "", config.data_dir)
    table = read_table(file, config.data_dir, config.input_key, config.target_key, config.multilabel)
    if part == "train":
        table.check_several()
    defaults, whole = DataConfig(), table.splits is None
    names = {name: split_names(config.split(name)) for name in ("train", "val", "test") if config.split(name)}
    for name in ("train", "val"):
        if set(names[name]) & set(names.get("test", ())):
            raise UserError(f"test-split: {config.test_split!r} means the {name} split {config.split(name)!r} too; expected "
                            "another, whose images are only tested on")  # fmt: skip
    used = {name for group in names.values() for name in group}
    table.check_splits(used | KNOWN_SPLITS)
    has_val = not set(table.splits or ()).isdisjoint(names["val"])
    if has_val and config.val_share is not None:
        raise UserError(f"val-share: {str(table.file)!r} has rows of a validation split; leave the option out")
    chosen = not has_val and (config.val_share is not None or (whole and config.val_split == defaults.val_split))
    scans = {name: table.scan(group) for name, group in names.items()}
    scans["train"] = table.scan(None if whole and config.train_split == defaults.train_split else names["train"], used)
    needed = ("train", "val") if part == "train" else (part,)
    for name in needed:
        if not scans["train" if chosen and name == "val" else name].images:
            raise _no_rows(table, config, name)
    if chosen and part != "test":
        scans |= _chosen_scans(config, scans["train"], seed, listed, part)
    table.check_files(scans[name] for name in needed)
    return Parts(scans, chosen)


def _no_rows(table: Table, config: DataConfig, part: str) -> UserError:
    """Returns the error for a part of which a table has no rows."""
    names = ", ".join(sorted(split_names(config.split(part))))
    here = "no column 'split'" if table.splits is None else f"rows of {', '.join(table.splits)}"
    share = "; --val-share 0.1 takes a part of the training images" if part == "val" else ""
    return UserError(f"{part}-split: expected rows of split {config.split(part)!r} (any of {names}) in {str(table.file)!r}; "
                     f"it has {here}{share}")  # fmt: skip


def _split_root(config: DataConfig, part: str) -> Path:
    """Returns the folder or file of a split; timm would fall back to the whole folder.

    Raises:
        UserError: if there is none, or the test split is one of the others.
    """
    split, option = config.split(part), "test-split" if part == "test" else "data-dir"
    root = Path(config.data_dir or "")
    if config.data_dir is None or not root.exists():
        hint = "" if config.data_dir is None else near_paths(root)
        raise UserError(f"data-dir: no such file or directory: {config.data_dir!r}{hint}; expected {LAYOUT}")
    if root.is_file():
        raise UserError(f"data-dir: {config.data_dir!r} is a file; give the folder and name its splits with --train-split and "
                        "--val-split (for example train.tar); a table of image paths is --dataset csv/FILE")  # fmt: skip
    found = find_split(root, split)
    if found is None:
        names = sorted(split_names(split))
        here = ", ".join(sorted(entry.name for entry in root.iterdir())[:6]) or "nothing"
        trains = part == "val" and find_split(root, config.train_split) is not None
        share = "; --val-share 0.1 takes a part of the training split" if trains else ""
        raise UserError(f"{option}: {config.data_dir!r} has no {split!r} part (any of {', '.join(names)}); found {here}; "
                        f"expected {LAYOUT}{share}")  # fmt: skip
    for other in ("train", "val") if part == "test" else ():
        if found == find_split(root, config.split(other)):
            raise UserError(f"test-split: {str(found)!r} is the {other} split too; expected images that are only tested on")
    return found


def _check_known(names: tuple[str, ...], class_to_idx: dict[str, int], split: str) -> None:
    """Raises UserError for a class of a split that is not among the training split's."""
    unknown = [name for name in names if name not in class_to_idx]
    if unknown:
        hint = near_matches(unknown[0], [name for name in class_to_idx if name not in names] or class_to_idx)
        raise UserError(
            f"data: {split} has {counted(len(unknown), 'class')} that training does not have: {unknown[:3]}{hint}; rename "
            "them, or give --class-map"
        )


def _class_map(path: str, root: Path) -> dict[str, int]:
    """Returns the class map in a file; raises UserError if it cannot be read."""
    place = next((one for one in (Path(path), root / path) if one.is_file()), None)
    if place is not None and place.suffix.lower() == ".txt":
        return _listed_classes(place)
    try:
        return load_class_map(path, str(root))
    except Exception as error:  # an assertion, an unpickling error, ...
        raise UserError(f"class-map: cannot read {path!r}: {first_line(error)}; expected a .txt file with one class a line, or "
                        "a .pkl file of {class: index}") from error  # fmt: skip


def _listed_classes(path: Path) -> dict[str, int]:
    """Returns the index of every line of a text file; the file may begin with a byte order mark and end with blank lines."""
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"class-map: cannot read {str(path)!r}: {first_line(error)}") from error
    numbers: dict[str, int] = {}
    for index, name in enumerate(map(str.strip, lines)):
        if not name or name in numbers:
            what = f"{name!r} a second time" if name else "a blank line"
            raise UserError(f"class-map: expected another class on each line of {str(path)!r}; got {what} on line {index + 1}")
        numbers[name] = index
    return numbers


def _endings(config: DataConfig) -> list[str] | None:
    """Returns the file endings of images from the options; None for all that Pillow decodes."""
    words = [word.strip().lower().lstrip(".") for word in (config.input_key or "").split(";")]
    return [f".{word}" for word in words if word] or None


def _names(class_to_idx: dict[str, int]) -> tuple[str, ...]:
    """Returns the name of every index; a class map may give several folders one index, and leave out others."""
    names: dict[int, list[str]] = {}
    for name, index in class_to_idx.items():
        names.setdefault(index, []).append(str(name))
    return tuple(" / ".join(names.get(index, [f"class {index}"])) for index in range(max(names) + 1))


def _check_shards(data_dir: str | None, split: str) -> None:
    """Raises UserError if a folder of shards has no file with the number of samples."""
    root = Path(data_dir or "")
    if root.is_dir() and not any((root / name).exists() for name in ("_info.json", "info.json")):
        raise UserError(f"{split}-num-samples: the shards in {str(root)!r} do not say how many samples they hold; give "
                        "--train-num-samples and --val-num-samples")  # fmt: skip
