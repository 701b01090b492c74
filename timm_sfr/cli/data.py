"""``timm-sfr data DIR``: shows what a training run would find in a dataset's folders."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping
from typing import Any

from timm_sfr.cli.parser import given
from timm_sfr.cli.verbs import FOLDER
from timm_sfr.config import RunConfig
from timm_sfr.data.datasets import Split, open_splits, open_test
from timm_sfr.data.summary import PAIRS, duplicates, headers, unknown_ranges
from timm_sfr.data.tables import is_table
from timm_sfr.utils.console import aligned, counted
from timm_sfr.utils.errors import UserError


def run(args: Namespace) -> int:
    """Runs the command; returns 0."""
    options = given(args, FOLDER)
    if is_table(args.source):
        options["dataset"] = args.source
    elif "data_dir" in options:
        raise UserError(f"data-dir: it is for the paths in csv/FILE; got the folder {args.source!r} too; leave the option out")
    else:
        options["data_dir"] = args.source
    config = RunConfig.from_flat(options)
    train, val = open_splits(config.data, "RGB", config.engine.seed)
    test = open_test(config.data, "RGB", config.engine.seed, train.class_names)
    splits = {"train": train, "val": val, **({} if test is None else {"test": test})}
    if any(split.scan is None for split in splits.values()):
        raise UserError(f"data: expected a folder of images; {args.source!r} has its images in tars or shards")
    found = describe(splits)
    print(json.dumps(found) if args.json else table(found))
    return 0


def describe(splits: Mapping[str, Split]) -> dict[str, Any]:
    """Returns what lies in the folders of the splits train, val and perhaps test, in JSON's types."""
    train = splits["train"]
    names = train.class_names or ()
    found: dict[str, Any] = {"splits": list(splits), "classes": {name: {} for name in names}, "chosen": train.chosen}
    for split, part in splits.items():
        scan, targets = part.scan, [target for _, target in part.dataset.reader.samples]
        counts = Counter(index for target in targets for index in (target if scan.several else (target,)))
        for index, name in enumerate(names):
            found["classes"][name][split] = counts[index]
        seen, unreadable = headers(scan)
        kinds: Counter[str] = Counter()
        for (kind, mode, _), count in seen.items():
            kinds[f"{kind} {mode}"] += count
        sides = sorted((size for _, _, size in seen), key=lambda size: size[0] * size[1])
        found[split] = {
            "images": len(scan.images), "passed_over": dict(scan.other.most_common()), "hidden": list(scan.hidden),
            "loose": scan.loose, "left_out": scan.left_out, "other_splits": dict(scan.other_splits), "empty": list(scan.empty),
            "sampled": dict(kinds), "unreadable": [os.path.relpath(path, scan.root) for path in unreadable],
            "own_range": unknown_ranges(seen), "smallest": list(sides[0]) if sides else None,
            "largest": list(sides[-1]) if sides else None,
        }  # fmt: skip
    root = os.path.commonpath([os.path.abspath(part.scan.root) for part in splits.values()])
    found["duplicates"] = [
        {split: os.path.relpath(path, root) for split, path in zip(pair, paths, strict=True)}
        for pair in PAIRS if set(pair) <= splits.keys()
        for paths in duplicates(splits[pair[1]].scan, splits[pair[0]].scan)
    ]  # fmt: skip
    return found


def table(found: dict[str, Any]) -> str:
    """Returns `describe`'s findings as text: a table of the classes, then what is worth a look in each split."""
    splits = found["splits"]
    rows = [("class", *splits)]
    rows += [(name, *(str(counts[split]) for split in splits)) for name, counts in found["classes"].items()]
    rows.append(("all", *(str(found[split]["images"]) for split in splits)))
    lines = aligned(rows)
    if found["chosen"]:
        lines.append("val is taken from the training images by --seed and --val-share")
    for split in splits:
        part = found[split]
        kinds = ", ".join(f"{count} {kind}" for kind, count in part["sampled"].items())
        small, large = ("x".join(map(str, part[name] or ())) for name in ("smallest", "largest"))
        size = f"{small} to {large}" if large != small else small
        count = sum(part["sampled"].values())
        rest = ", the others only counted" if count + len(part["unreadable"]) < part["images"] else ""
        lines.append(f"{split}: {count} of the images opened{rest}: {kinds}; {size} pixels")
        passed = [f"{count} {ending or 'without an ending'}" for ending, count in part["passed_over"].items()]
        for label, values in (
            ("no images in the sample", part["unreadable"]),
            ("each image scaled by its own range, floats within 0 to 1 by those (--image-range), mode", part["own_range"]),
            ("passed over", passed),
            ("hidden", part["hidden"]),
            ("passed over, of other splits", [f"{count} of {name}" for name, count in part["other_splits"].items()]),
            ("folders without images", part["empty"]),
        ):
            if values:
                lines.append(f"{split}: {label}: {', '.join(values)}")
        if part["loose"]:
            lines.append(f"{split}: {counted(part['loose'], 'image')} outside of a class's folder")
        if part["left_out"]:
            lines.append(f"{split}: {counted(part['left_out'], 'image')} of classes that the class map leaves out")
    for pair in found["duplicates"]:
        lines.append(f"in {' and in '.join(pair)}, which makes the scores too good: {' = '.join(pair.values())}")
    return "\n".join(lines)
