"""The classes of a dataset's images, and a weight for each class: from their numbers, or from a file."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.data import ImageDataset
from torch import Tensor

from timm_sfr.data.datasets import Split
from timm_sfr.utils.console import some
from timm_sfr.utils.errors import UserError, first_line, near_matches, near_paths


def class_targets(dataset: Any) -> Tensor:
    """Returns the class of every sample of a map-style dataset, (count,); decodes the images only if nothing else says it."""
    reader = getattr(dataset, "reader", None)
    if isinstance(dataset, ImageDataset):
        if hasattr(reader, "iter_targets"):  # Hugging Face data sets
            found = list(reader.iter_targets())
        elif hasattr(reader, "targets"):  # a tar
            found = reader.targets
        else:
            found = [target for _, target in getattr(reader, "samples", reader)]
    else:  # the digits and torchvision's
        known = (getattr(dataset, name, None) for name in ("targets", "labels"))
        found = next((one for one in known if one is not None and len(one) == len(dataset)), None)
        found = [dataset[index][1] for index in range(len(dataset))] if found is None else found
    targets = torch.as_tensor(found, dtype=torch.int64)
    if targets.ndim != 1:  # QMNIST's have more columns than the class
        targets = torch.tensor([int(dataset[index][1]) for index in range(len(dataset))])
    return targets


def balanced_weights(targets: Tensor, num_classes: int) -> tuple[float, ...]:
    """Returns w_c = n / (K n_c), a weight for each class; the mean over the images is 1, and classes without images get 1.

    n is the number of images, whose classes are `targets` (n,), n_c that of class c, and K the number of classes that have
    images. It is scikit-learn's ``compute_class_weight("balanced")``.
    """
    sizes = targets.bincount(minlength=num_classes).double()
    weights = len(targets) / ((sizes > 0).sum() * sizes.clamp_min(1))
    return tuple(torch.where(sizes > 0, weights, 1.0).tolist())


def resolve_class_weights(
    option: str | None, train: Split, num_classes: int, names: Sequence[str] | None
) -> tuple[float, ...] | None:
    """Returns a weight for each class, as ``--class-weights`` says (``auto`` or a file); None for equal weights.

    Raises:
        UserError: if ``auto`` is given for a stream, or the file does not give each class one weight.
    """
    if option is None:
        return None
    if option != "auto":
        return _from_file(Path(option), num_classes, names)
    if train.streamed:
        raise UserError("class-weights: a stream does not say how many images its classes have; expected a file of weights; got "
                        "auto")  # fmt: skip
    targets = class_targets(train.dataset)
    if len(targets) == 0 or targets.min() < 0:
        raise UserError("class-weights: auto counts the images of each class, and some have none; give a file of weights")
    return balanced_weights(targets, num_classes)


def _from_file(path: Path, num_classes: int, names: Sequence[str] | None) -> tuple[float, ...]:
    entries = _read(path)
    where = f"class-weights: {str(path)!r}"
    keys = [key for key, _ in entries]
    twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
    if twice is not None:
        raise UserError(f"{where} has {twice!r} twice; expected one weight for each class")
    # Names that are numbers may differ from the indices: a file has either the one or the other.
    known = {str(name): index for index, name in enumerate(names or ())}
    numbers = {str(index): index for index in range(num_classes)}
    chosen = known if names and len(known.keys() & keys) >= len(numbers.keys() & keys) else numbers
    unknown = [key for key in keys if key not in chosen]
    if unknown:
        hint = near_matches(unknown[0], known)
        raise UserError(f"{where} has {unknown[0]!r}, which is neither a class nor an index below {num_classes}{hint}")
    missing = [name for name in chosen if name not in keys]
    if missing:
        raise UserError(
            f"{where} lacks weights of {len(missing)} of {num_classes} classes: {some(missing)}; expected one of each"
        )
    weights = {}
    for key, value in entries:
        weights[chosen[key]] = _number(value)
        if not 0 <= weights[chosen[key]] < math.inf:
            raise UserError(f"{where}: expected a number of at least 0 for {key!r}; got {value!r}")
    if not any(weights.values()):
        raise UserError(f"{where} has weights of 0 only; expected one above 0")
    return tuple(weights[index] for index in range(num_classes))


def _read(path: Path) -> list[tuple[str, Any]]:
    """Returns the (class, weight) pairs of a file, in order; a first CSV line without a number is a header."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() in (".yaml", ".yml", ".json"):
            node = yaml.compose(text, yaml.SafeLoader)  # which keeps names such as `no` and `007`, and doubles
            if not isinstance(node, yaml.MappingNode):
                kind = type(yaml.safe_load(text)).__name__
                raise UserError(f"class-weights: expected CLASS: WEIGHT lines in {str(path)!r}; got {kind}")
            return [(str(key.value), yaml.safe_load(yaml.serialize(value))) for key, value in node.value]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        hint = near_paths(path) if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"class-weights: cannot read {str(path)!r}: {first_line(error)}{hint}; expected 'auto', or a YAML, CSV "
                        "or text file of classes and weights") from error  # fmt: skip
    lines = [line for line in text.splitlines() if line.strip()]
    comma = path.suffix.lower() == ".csv"
    rows = list(csv.reader(lines)) if comma else [line.rsplit(None, 1) for line in lines]
    if comma and rows and len(rows[0]) == 2 and math.isnan(_number(rows[0][1])):
        rows = rows[1:]
    for row in rows:
        if len(row) != 2:
            raise UserError(f"class-weights: expected a class and a weight on each line of {str(path)!r}; got {row}")
    if not rows:
        raise UserError(f"class-weights: {str(path)!r} is empty; expected a class and a weight on each line")
    return [(name.strip(), value) for name, value in rows]


def _number(value: Any) -> float:
    """Returns a weight as a number; NaN if it is none."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return math.nan
