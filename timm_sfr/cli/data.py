"""``timm-sfr data DIR``: shows what a training run would find in a dataset's folders."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections import Counter
from typing import Any

from timm_sfr.cli.arguments import FOLDER
from timm_sfr.cli.parser import given
from timm_sfr.config import RunConfig
from timm_sfr.data.datasets import Split, open_splits
from timm_sfr.data.summary import duplicates, headers, unknown_ranges
from timm_sfr.utils.console import aligned, counted
from timm_sfr.utils.errors import UserError


def run(args: Namespace) -> int:
    """Runs the command; returns 0."""
    config = RunConfig.from_flat({**given(args, FOLDER), "data_dir": args.data_dir})
    train, val = open_splits(config.data, "RGB", config.engine.seed)
    if train.scan is None or val.scan is None:
        raise UserError(f"data: expected a folder of images; {args.data_dir!r} has its images in tars or shards")
    found = describe(train, val)
    print(json.dumps(found) if args.json else table(found))
    return 0


def describe(train: Split, val: Split) -> dict[str, Any]:
    """Returns what lies in the folders of two splits, in JSON's types."""
    names = train.class_names or ()
    found: dict[str, Any] = {"classes": {name: {} for name in names}, "chosen": train.chosen}
    for split, part, scan in (("train", train, train.scan), ("val", val, val.scan)):
        counts = Counter(target for _, target in part.dataset.reader.samples)
        for index, name in enumerate(names):
            found["classes"][name][split] = counts[index]
        seen, unreadable = headers(scan)
        kinds: Counter[str] = Counter()
        for (kind, mode, _), count in seen.items():
            kinds[f"{kind} {mode}"] += count
        sides = sorted((size for _, _, size in seen), key=lambda size: size[0] * size[1])
        found[split] = {
            "images": len(scan.images), "passed_over": dict(scan.other.most_common()), "hidden": list(scan.hidden),
            "loose": scan.loose, "left_out": scan.left_out, "empty": list(scan.empty), "sampled": dict(kinds),
            "unreadable": [os.path.relpath(path, scan.root) for path in unreadable], "own_range": unknown_ranges(seen),
            "smallest": list(sides[0]) if sides else None, "largest": list(sides[-1]) if sides else None,
        }  # fmt: skip
    root = os.path.commonpath([train.scan.root, val.scan.root])
    pairs = duplicates(train.scan, val.scan)
    found["duplicates"] = [[os.path.relpath(path, root) for path in pair] for pair in pairs]
    return found


def table(found: dict[str, Any]) -> str:
    """Returns `describe`'s findings as text: a table of the classes, then what is worth a look in each split."""
    rows = [("class", "train", "val")]
    rows += [(name, str(counts["train"]), str(counts["val"])) for name, counts in found["classes"].items()]
    rows.append(("all", str(found["train"]["images"]), str(found["val"]["images"])))
    lines = aligned(rows)
    if found["chosen"]:
        lines.append("val is taken from the training images by --seed and --val-share")
    for split in ("train", "val"):
        part = found[split]
        kinds = ", ".join(f"{count} {kind}" for kind, count in part["sampled"].items())
        small, large = ("x".join(map(str, part[name] or ())) for name in ("smallest", "largest"))
        lines.append(f"{split}: a sample has {kinds}; {small}" + (f" to {large}" if large != small else "") + " pixels")
        passed = [f"{count} {ending or 'without an ending'}" for ending, count in part["passed_over"].items()]
        for label, values in (
            ("no images in the sample", part["unreadable"]),
            ("each image scaled by its own range (--image-range), mode", part["own_range"]),
            ("passed over", passed),
            ("hidden", part["hidden"]),
            ("folders without images", part["empty"]),
        ):
            if values:
                lines.append(f"{split}: {label}: {', '.join(values)}")
        if part["loose"]:
            lines.append(f"{split}: {counted(part['loose'], 'image')} outside of a class's folder")
        if part["left_out"]:
            lines.append(f"{split}: {counted(part['left_out'], 'image')} of classes that the class map leaves out")
    lines += [f"in val and in train, which makes the scores too good: {val} = {train}" for val, train in found["duplicates"]]
    return "\n".join(lines)
