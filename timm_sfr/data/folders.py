"""Folders of classes: finds their images and what is passed over, splits a folder that has no splits, checks class maps.

A class is the name of the folder that an image lies in, as in timm; hidden folders and files never count.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.misc import natural_key

from timm_sfr.data.images import image_endings
from timm_sfr.utils.console import counted, some
from timm_sfr.utils.errors import UserError, near_matches
from timm_sfr.utils.files import replace_atomically

SPLIT_SYNONYMS = ({"train", "training"}, {"val", "valid", "validation", "eval", "evaluation"})
LAYOUT = "DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg, or DIR/CLASS/*.jpg"
SPLIT_FILE = "split.csv"  # in a run's folder: the files of each part of a folder without splits
VAL_SHARE = 0.1
SEPARATOR = "|"  # of an image's classes, if it may have several
TEXT: dict[str, str] = {"encoding": "utf-8", "errors": "surrogateescape"}  # a file's name may be no UTF-8


@dataclass(frozen=True)
class FolderScan:
    """What a folder of classes holds: its images, and what is passed over."""

    root: Path
    images: list[tuple[str, str]]  # (path, class), in natural order of the paths; ``|`` separates several classes
    other: Counter[str] = field(default_factory=Counter)  # files with other endings, by ending
    hidden: tuple[str, ...] = ()  # folders and files, relative to the root
    loose: int = 0  # images outside of any class's folder
    empty: tuple[str, ...] = ()  # folders without an image in them or below
    left_out: int = 0  # images of classes that a class map does not name
    unlisted: int = 0  # images that a run's list of files does not name
    other_splits: Counter[str] = field(default_factory=Counter)  # images in rows of a table's unused splits, by split
    several: bool = False  # whether an image may have any number of classes

    def labels(self, name: str) -> tuple[str, ...]:
        """Returns the classes that an image's entry in `images` names."""
        return tuple(filter(None, name.split(SEPARATOR))) if self.several else (name,)

    @property
    def counts(self) -> Counter[str]:
        """The number of images of every class."""
        return Counter(label for _, name in self.images for label in self.labels(name))

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes that have images, in natural order; raises UserError for a name that is not UTF-8."""
        names = tuple(sorted(self.counts, key=natural_key))
        for name in names:
            if not name.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in name):  # as Python reads such bytes
                raise UserError(f"data: expected names of classes in UTF-8; got {name!a} in {str(self.root)!r}; rename the "
                                "folder, or save the table as UTF-8")  # fmt: skip
        return names

    def passed_over(self) -> str:
        """Returns one phrase for everything that is not trained on, by kind and number; empty if there is nothing."""
        parts = [f"{count} {ending or 'without an ending'}" for ending, count in self.other.most_common()]
        if self.loose:
            parts.append(f"{self.loose} outside of a class's folder")
        if self.hidden:
            parts.append(f"{len(self.hidden)} hidden ({', '.join(self.hidden[:3])}{', ...' * (len(self.hidden) > 3)})")
        if self.left_out:
            parts.append(f"{counted(self.left_out, 'image')} of classes that the class map leaves out")
        if self.unlisted:
            parts.append(f"{self.unlisted} that are not in the run's {SPLIT_FILE}")
        parts += [f"{counted(count, 'image')} of split {name!r}" for name, count in self.other_splits.most_common()]
        return ", ".join(parts)


class FolderReader(ReaderImageFolder):
    """timm's reader of a folder, for the images of a scan.

    Attributes:
        samples: (path, class index) of every image; if it may have several classes, their indices in order.
    """

    def __init__(self, scan: FolderScan, class_to_idx: Mapping[str, int]) -> None:
        self.root, self.class_to_idx = str(scan.root), dict(class_to_idx)  # timm's __init__ would search the folder
        self.samples: list[tuple[str, Any]] = []
        for path, name in scan.images:
            indices = sorted({class_to_idx[label] for label in scan.labels(name)})
            self.samples.append((path, tuple(indices) if scan.several else indices[0]))


def scan_folder(root: Path, endings: Iterable[str] | None = None) -> FolderScan:
    """Finds the images below `root`, and whatever else lies there.

    `endings` are those of images, such as ``.jpg``; by default all that Pillow decodes.
    """
    endings = set(image_endings() if endings is None else endings)
    images: list[tuple[str, str]] = []
    other: Counter[str] = Counter()
    hidden: list[str] = []
    loose, with_images, leaves = 0, set(), []
    for place, folders, files, unseen in walk(root):
        inside = os.path.relpath(place, root)
        hidden += [os.path.normpath(os.path.join(inside, name)) for name in unseen]
        for name in files:
            ending = os.path.splitext(name)[1].lower()
            if ending not in endings:
                other[ending] += 1
            elif inside == ".":
                loose += 1
            else:
                images.append((os.path.join(place, name), os.path.basename(place)))
                with_images.add(inside)
        if not folders and inside != ".":
            leaves.append(inside)
    images.sort(key=lambda image: natural_key(image[0]))
    empty = tuple(sorted(set(leaves) - with_images, key=natural_key))
    return FolderScan(Path(root), images, other, tuple(sorted(hidden)), loose, empty)


def walk(root: Path) -> Iterator[tuple[str, list[str], list[str], list[str]]]:
    """Yields `root` and each folder below it, also through links: its path, its folders and files, and the hidden of both."""
    for place, folders, files in os.walk(root, followlinks=True):
        if _is_loop(place, str(root)):
            folders.clear()
            continue
        hidden = [name for name in (*folders, *files) if is_hidden(name)]
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield place, folders, [name for name in files if not is_hidden(name)], hidden


def find_split(root: Path, split: str) -> Path | None:
    """Returns the folder or file of a split in `root`, by its name or a synonym; None if it does not exist."""
    return next((root / name for name in split_names(split) if (root / name).exists()), None)


def split_names(split: str) -> list[str]:
    """Returns the names that a split's folder may have: its own first, then those that mean the same."""
    name = split.split("[")[0]
    return [name, *sorted(set().union(*(group for group in SPLIT_SYNONYMS if name in group)) - {name})]


def choose_split(scan: FolderScan, share: float, seed: int) -> tuple[FolderScan, FolderScan]:
    """Returns the training and the validation part of a folder without splits.

    Each class gives the images with the smallest SHA-256 of seed and path to validation: the share, and at least one image if
    the class has two. If an image may have several classes, all images are one class here, and no class loses its last image.
    Adding files moves few images between the parts. The order of the listing has no effect.
    """
    val: set[str] = set()
    of_class: dict[str, list[str]] = {}
    for path, name in scan.images:
        of_class.setdefault("" if scan.several else name, []).append(path)
    labels, left = dict(scan.images), scan.counts
    for paths in of_class.values():
        paths.sort(key=lambda path: hashlib.sha256(f"{seed}/{_inside(scan.root, path)}".encode(**TEXT)).digest())
        count = max(1, round(share * len(paths))) if len(paths) > 1 else 0
        for path in paths:
            own = scan.labels(labels[path])
            if count and all(left[label] > 1 for label in own):  # the last image of a class is trained on
                val.add(path)
                left.subtract(own)
                count -= 1
    train = dataclasses.replace(scan, images=[image for image in scan.images if image[0] not in val])
    chosen = [image for image in scan.images if image[0] in val]
    return train, FolderScan(scan.root, chosen, several=scan.several)


def write_split(path: Path, parts: Mapping[str, FolderScan]) -> None:
    """Writes the files of the parts of a folder as CSV: split, class, and file relative to the folder."""
    rows = [(split, name, _inside(scan.root, file)) for split, scan in parts.items() for file, name in scan.images]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("split", "class", "file"), *rows])
    replace_atomically(path, lambda fresh: fresh.write_text(text.getvalue(), **TEXT))


def read_split(path: Path, scan: FolderScan, needed: Sequence[str] = ("train", "val")) -> tuple[FolderScan, FolderScan]:
    """Returns the training and the validation part that a run's `write_split` wrote, of the folder as it is now.

    The parts in `needed` must be complete. For other parts, the images that still exist are returned.

    Raises:
        UserError: if the file cannot be read, or one of its images is gone.
    """
    try:
        with path.open(newline="", **TEXT) as file:
            rows = [(row["split"], row["file"]) for row in csv.DictReader(file)]
    except (OSError, KeyError, UnicodeDecodeError) as error:
        raise UserError(f"data: cannot read the list of files {str(path)!r}: {error}") from error
    here = {_inside(scan.root, image[0]): image for image in scan.images}
    gone = [file for split, file in rows if file not in here and split in needed]
    if gone:
        raise UserError(f"data: {len(gone)} of the {len(rows)} files in {str(path)!r} are gone from {str(scan.root)!r}, such as "
                        f"{gone[0]!r}; put them back, or start a new run")  # fmt: skip
    train, val = ([here[file] for split, file in rows if split == part and file in here] for part in ("train", "val"))
    unlisted = max(0, len(here) - len(train) - len(val))  # a table may name an image twice
    return dataclasses.replace(scan, images=train, unlisted=unlisted), FolderScan(scan.root, val, several=scan.several)


def lists_all(path: Path, root: Path) -> bool:
    """Returns whether a run's list of files is there and all of its files lie in `root`."""
    if not path.is_file():
        return False
    with path.open(newline="", **TEXT) as file:
        return all((root / row["file"]).is_file() for row in csv.DictReader(file))


def map_classes(scan: FolderScan, class_map: Mapping[str, int], source: str) -> FolderScan:
    """Returns the images of the classes that a class map names; the others are counted as left out.

    An image that may have several classes stays, with those that the map names. A name without images raises UserError.
    """
    counts = scan.counts
    without = [name for name in class_map if name not in counts]
    if without:
        unnamed = [name for name in scan.classes if name not in class_map]
        hint = "".join(near_matches(str(name), unnamed or scan.classes) for name in without[:1])
        nothing, other = (some([repr(name) for name in names]) for names in (without, unnamed))
        raise UserError(f"class-map: expected images in {str(scan.root)!r} for every name in {source}; got none for "
                        f"{nothing}{hint}; classes that the map does not name: {other}")  # fmt: skip
    if scan.several:
        named = ((path, [label for label in scan.labels(name) if label in class_map]) for path, name in scan.images)
        return dataclasses.replace(scan, images=[(path, SEPARATOR.join(labels)) for path, labels in named])
    images = [image for image in scan.images if image[1] in class_map]
    return dataclasses.replace(scan, images=images, left_out=scan.left_out + len(scan.images) - len(images))


def _inside(root: Path, path: str) -> str:
    return Path(os.path.relpath(path, root)).as_posix()


def _is_loop(place: str, root: str) -> bool:
    """Returns whether a folder is a link to one of its own parent folders, which would make an endless loop."""
    if place == root or not os.path.islink(place):
        return False
    real, above = Path(os.path.realpath(place)), place
    while above != root:
        above = os.path.dirname(above)
        passed = Path(os.path.realpath(above))
        if real == passed or real in passed.parents:
            return True
    return False


def is_hidden(name: str) -> bool:
    """Returns whether a folder or file belongs to the system, a notebook or an archive, and not to the data."""
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")
