"""Tables of images: reads paths and labels from a CSV or Parquet file, and lists each split's images as a folder's are.

A row names an image file, its class and, if the table has a column ``split``, the split that it belongs to. If an image may
have several classes, its cell has ``|`` or ``;`` between them, or each class has a column of 0 and 1.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.data.readers.targets import parse_target_keys

from timm_sfr.data.folders import SEPARATOR, SPLIT_SYNONYMS, FolderScan
from timm_sfr.utils.console import counted, some
from timm_sfr.utils.errors import UserError, first_line, near_matches, near_paths

PREFIX = "csv/"  # of --dataset
DELIMITERS = ",;\t"
SPLIT_COLUMN = "split"
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "path", "file", "file_name"), ("label", "class", "target")
KNOWN_SPLITS = set().union({"test"}, *SPLIT_SYNONYMS)  # what a column of splits may say, beside the splits' own names
Cells = Iterator[tuple[int, list[Any]]]


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    number: int  # of the line in a CSV file, where the header is line 1; of the row in a Parquet file, counted from 1
    path: str
    label: str  # the name of the image's class; several have ``|`` between them
    split: str  # empty if the table has no such column


@dataclass(frozen=True)
class Table:
    """A table of images."""

    file: Path
    root: Path  # relative paths begin here
    rows: list[Row]
    splits: tuple[str, ...] | None  # the names in its column ``split``, in the order in which they appear
    several: bool = False  # whether an image may have any number of classes

    def scan(self, names: Iterable[str] | None, used: Container[str] | None = None) -> FolderScan:
        """Returns the images of a split, of which all `names` mean the same, or of all rows for None.

        If the names `used` of all splits in use are given, rows of others are counted as passed over.
        """
        names = None if names is None else set(names)
        images = [(row.path, row.label) for row in self.rows if names is None or row.split in names]
        others = Counter(row.split for row in self.rows if used is not None and row.split and row.split not in used)
        return FolderScan(self.root, images, other_splits=others, several=self.several)

    def check_splits(self, known: Collection[str]) -> None:
        """Raises UserError for a row whose split is empty or not among the names `known`."""
        for row in self.rows if self.splits is not None else ():
            if row.split not in known:
                what = f"unknown split {row.split!r}{near_matches(row.split, known)}" if row.split else "empty split"
                raise UserError(f"dataset: {_place(self.file, row.number)}: {what}; expected one of {', '.join(sorted(known))}")

    def check_files(self, scans: Iterable[FolderScan]) -> None:
        """Raises UserError if image files of the scans are missing: their number and the first few, with their rows."""
        folders: dict[str, set[str]] = {}
        missing = {path for scan in scans for path, _ in scan.images if not _is_there(path, folders)}
        if not missing:
            return
        unit = "line" if _reader(self.file) is _read_csv else "row"
        rows = [f"{os.path.relpath(row.path, self.root)} ({unit} {row.number})" for row in self.rows if row.path in missing]
        raise UserError(f"dataset: {counted(len(rows), 'image')} of {str(self.file)!r} missing: {some(rows)}; looked in "
                        f"{str(self.root)!r}; relative paths begin in --data-dir, or else in the file's folder")  # fmt: skip

    def check_several(self) -> None:
        """Raises UserError if every image has exactly one class where any number is expected."""
        if self.several and all(row.label and SEPARATOR not in row.label for row in self.rows):
            raise UserError(f"task: every image in {str(self.file)!r} has exactly one class, and --task multilabel is for any "
                            "number, with | or ; between them; leave out the option (--bce-loss has the same loss)")  # fmt: skip


def is_table(dataset: str | None) -> bool:
    """Returns whether the option --dataset names a table."""
    return (dataset or "").startswith(PREFIX)


def find_table(dataset: str, data_dir: str | None) -> Path:
    """Returns the file that ``csv/FILE`` names, in the current folder or in `data_dir`; raises UserError without one."""
    given = dataset.removeprefix(PREFIX)
    found = [place for place in (Path(given), Path(data_dir or "") / given) if given and place.is_file()]
    if not found:
        raise UserError(f"dataset: expected csv/FILE, a CSV or Parquet file of image paths and labels; there is no file {given!r}"
                        f"{near_paths(given) if given else ''}")  # fmt: skip
    return found[0]


def read_table(file: Path, data_dir: str | None, image: str | None, label: str | None, several: bool = False) -> Table:
    """Reads a table.

    Args:
        file: A Parquet file, if its name ends so, or else a CSV file, whose cells ``,``, ``;`` or tabs separate.
        data_dir: The folder that relative paths are relative to; by default the file's.
        image: The column of the paths; by default the first of `IMAGE_COLUMNS` that the table has.
        label: The column of the labels; by default the first of `LABEL_COLUMNS` that the table has.
        several: Whether an image may have any number of classes. `label` may then be several columns, such as ``cat,dog``.

    Raises:
        UserError: with the row, for whatever cannot be read: a missing column, an empty cell, one path with two labels.
    """
    root = Path(data_dir) if data_dir else file.parent
    if not root.is_dir():
        raise UserError(f"data-dir: there is no folder {str(root)!r}{near_paths(root)}; image paths are relative to it")

    def choose(columns: Sequence[str]) -> list[str]:
        wanted = [label] if not several or label in columns else _keys(label)
        chosen = [_column(file, columns, image, IMAGE_COLUMNS, "input-key", "image paths"),
                  *(_column(file, columns, key, LABEL_COLUMNS, "target-key", "labels") for key in wanted)]  # fmt: skip
        return chosen + [SPLIT_COLUMN] * (SPLIT_COLUMN in columns)

    names, cells = _reader(file)(file, choose)
    rows = list(_rows(file, root, names, cells, several))
    if not rows:
        raise UserError(f"dataset: {str(file)!r} has no rows; expected one per image")
    splits = tuple(dict.fromkeys(row.split for row in rows)) if names[-1] == SPLIT_COLUMN else None
    return Table(file, root, rows, splits, several)


def _keys(label: str | None) -> list[str | None]:
    """Returns the columns that ``--target-key`` names, as timm reads it: several have commas between them."""
    try:
        return [*(parse_target_keys(label) or [label])]
    except ValueError as error:
        raise UserError(f"target-key: {first_line(error)}") from error


def _rows(file: Path, root: Path, names: Sequence[str], cells: Cells, several: bool) -> Iterator[Row]:
    """Yields the rows, checked. The columns `names` are the path, the label or labels, and perhaps the split."""
    image, *columns = names
    has_split = columns[-1] == SPLIT_COLUMN
    columns = columns[: len(columns) - has_split]
    labels: dict[str, tuple[str, int]] = {}
    for number, (given, *values) in cells:
        split = (_text(values.pop()) or "") if has_split else ""
        name = _filled(file, number, image, given)
        label = _joined(file, number, columns, values) if several else _filled(file, number, columns[0], values[0])
        path = os.path.normpath(root / name)
        before = labels.setdefault(path, (label, number))
        if before[0] != label:
            expected = "the same" if several else "one"
            raise UserError(f"dataset: {_place(file, number)}: {name!r} has the label {label!r} here and {before[0]!r} in "
                            f"{_place(file, before[1]).split(', ')[-1]}; expected {expected} label")  # fmt: skip
        yield Row(number, path, label, split)


def _filled(file: Path, number: int, column: str, value: Any) -> str:
    """Returns a cell as text; raises UserError if it is empty or has something else."""
    text = _text(value)
    if text is None:
        raise UserError(f"dataset: {_place(file, number)}: expected text or an integer in column {column!r}; images "
                        "themselves in a Parquet file are for --dataset hfds/FOLDER")  # fmt: skip
    if not text:
        raise UserError(f"dataset: {_place(file, number)}: column {column!r} is empty")
    return text


def _joined(file: Path, number: int, columns: Sequence[str], values: Sequence[Any]) -> str:
    """Returns an image's classes with ``|`` between them, from one column of classes, or one of 0 and 1 for each class.

    Raises:
        UserError: if a cell has no text, no integer and no list of them, or a class's column something else than 0 or 1.
    """
    if len(columns) == 1:
        labels = [_text(part) for part in (values[0] if isinstance(values[0], (list, tuple)) else values)]
        if None in labels:
            raise UserError(f"dataset: {_place(file, number)}: expected text, integers or lists of them in column "
                            f"{columns[0]!r}; got {values[0]!r}")  # fmt: skip
        labels = [part.strip() for label in labels for part in re.split(r"[|;]", label)]
    else:
        flags = [_text(int(value) if isinstance(value, bool) else value) for value in values]
        wrong = next((place for place, flag in enumerate(flags) if flag not in ("0", "1")), None)
        if wrong is not None:
            raise UserError(f"dataset: {_place(file, number)}: expected 0 or 1 in column {columns[wrong]!r}, because "
                            f"--target-key names several; got {values[wrong]!r}")  # fmt: skip
        labels = [name for name, flag in zip(columns, flags, strict=True) if flag == "1"]
    return SEPARATOR.join(dict.fromkeys(filter(None, labels)))


def _text(value: Any) -> str | None:
    """Returns a cell as text without blanks around it, an integer also from a float; None for anything else."""
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else None
    return str(value).strip()


def _column(file: Path, columns: Sequence[str], given: str | None, defaults: Sequence[str], option: str, what: str) -> str:
    """Returns the name of a column; raises UserError if the table does not have it."""
    wanted = (given,) if given else defaults
    found = next((name for name in wanted if name in columns), None)
    if found is None:
        hint = near_matches(wanted[0], columns) if given else f"; give --{option} NAME"
        raise UserError(f"dataset: {str(file)!r} has no column of {what}: expected {' or '.join(wanted)}; got "
                        f"{', '.join(map(repr, columns)) or 'no columns'}{hint}")  # fmt: skip
    return found


def _read_csv(file: Path, choose: Callable[[Sequence[str]], list[str]]) -> tuple[list[str], Cells]:
    """Returns the chosen columns of a CSV file and its rows: line number and cells."""
    try:
        with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as opened:
            text = opened.read()
    except OSError as error:
        raise UserError(f"dataset: cannot read {str(file)!r}: {error.strerror or error}") from error
    head = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(DELIMITERS, key=head.count))
    try:
        columns = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise UserError(f"dataset: {_place(file, 1)}: {error}") from error
    names = choose(columns)
    places = [columns.index(name) for name in names]

    def cells() -> Cells:
        try:
            for values in reader:
                if values and len(values) != len(columns):
                    raise UserError(f"dataset: {_place(file, reader.line_num)}: expected {len(columns)} cells, as in line 1; got "
                                    f"{len(values)}")  # fmt: skip
                if values:
                    yield reader.line_num, [values[place] for place in places]
        except csv.Error as error:
            raise UserError(f"dataset: {_place(file, reader.line_num)}: {error}") from error

    return names, cells()


def _read_parquet(file: Path, choose: Callable[[Sequence[str]], list[str]]) -> tuple[list[str], Cells]:
    """Returns the chosen columns of a Parquet file and its rows: row number and cells."""
    try:
        from pyarrow import ArrowException, parquet  # imported here because it is an extra
    except ImportError as error:
        raise UserError('dataset: a Parquet file needs pyarrow; pip install "timm-sfr[hfds]"') from error
    try:
        with parquet.ParquetFile(file) as opened:
            names = choose(opened.schema_arrow.names)
            found = opened.read(columns=names)
    except (OSError, ArrowException) as error:
        raise UserError(f"dataset: cannot read {str(file)!r}: {first_line(error)}") from error
    return names, enumerate(map(list, zip(*(found[name].to_pylist() for name in names), strict=True)), 1)


def _reader(file: Path) -> Callable[..., tuple[list[str], Cells]]:
    return _read_parquet if file.suffix.lower() in (".parquet", ".pq") else _read_csv


def _place(file: Path, number: int) -> str:
    return f"{str(file)!r}, {'line' if _reader(file) is _read_csv else 'row'} {number}"


def _is_there(path: str, folders: dict[str, set[str]]) -> bool:
    """Returns whether a file exists; `folders` keeps what was listed, because one listing is cheaper than many questions."""
    folder, name = os.path.split(path)
    if folder not in folders:
        try:
            folders[folder] = set(os.listdir(folder))
        except OSError:
            folders[folder] = set()
    return name in folders[folder] or os.path.isfile(path)
