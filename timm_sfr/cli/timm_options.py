"""Options of timm's ``train.py`` that are not options here: other names, options without a meaning here, refused ones.

All other options of timm are fields in `timm_sfr.config` with the same name. `benchmarks.options` makes docs/timm.md from this.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from timm_sfr.config import options
from timm_sfr.utils.errors import UserError

# timm's name -> ours, for options that mean the same; the last one is short for --jsd-loss in timm's documentation.
RENAMED = {
    "data": "data_dir",
    "recovery_interval": "checkpoint_interval",
    "drop_connect": "drop_path",
    "native_amp": "amp",
    "dr": "decay_rate",
    "jsd": "jsd_loss",
}


@dataclass(frozen=True)
class Foreign:
    """An option of timm's that does nothing here.

    Attributes:
        flags: How it is written; the first one without hyphens is its name in a file.
        why: Why it does nothing, or what takes its place.
        default: timm's default, which asks for nothing.
        nargs: The number of its words, as in argparse; 0 for a switch.
    """

    flags: tuple[str, ...]
    why: str
    default: Any = False
    nargs: int | str | None = 0

    @property
    def name(self) -> str:
        """The name in a file and in the parsed options."""
        return self.flags[0].lstrip("-").replace("-", "_")

    def asked(self, value: Any) -> bool:
        """Whether `value` asks for more than timm's default."""
        return value is not None and _words(value) != _words(self.default)


_LABELS = "several labels stand in one cell of a table, or as 0 and 1 in the columns of --target-key A,B,C"
_NAFLEX = "NaFlex loaders are not supported; NaFlex models train at one size with --img-size"

# Accepted, and said once to have no meaning.
MEANINGLESS = (
    Foreign(("--fuser",), "it chooses a fuser for TorchScript; --torchcompile fuses operations", "", None),
    Foreign(("--no-prefetcher",), "images are normalised on the device in any case"),
    Foreign(("--device-modules",), "PyTorch loads the modules of installed device backends itself", None, "+"),
    Foreign(("--local_rank", "--local-rank"), "launchers give the rank in the environment", 0, None),
    Foreign(("--use-multi-epochs-loader",), "loading processes stay for the whole run in any case"),
    Foreign(("--num-gpu",), "launchers give the number of processes", 1, None),
    Foreign(("--worker-seeding",), "random numbers depend on the seed, the epoch and the sample, not on workers", "all", None),
)
# Not accepted: the line names what takes its place.
REFUSED = (
    Foreign(("--torchscript",), "TorchScript cannot return features; use --torchcompile, and timm-sfr export for deployment"),
    Foreign(("--aot-autograd",), "newer versions of timm do not have it either; use --torchcompile"),
    Foreign(("--apex-amp",), "NVIDIA's Apex is not supported; use --amp"),
    Foreign(("--bn-tf",), "newer versions of timm do not have it either; --bn-momentum 0.01 --bn-eps 0.001 is the same"),
    Foreign(("--mixup-elem",), "newer versions of timm do not have it either; use --mixup-mode elem"),
    Foreign(("--validation-batch-size-multiplier",), "newer versions of timm do not have it either; use -vb", 1, None),
    Foreign(("--amp-impl",), "NVIDIA's Apex is not supported; use --amp alone", "native", None),
    Foreign(("--target-format",), _LABELS, None, None),
    Foreign(("--naflex-loader",), _NAFLEX),
    Foreign(("--naflex-train-seq-lens",), _NAFLEX, [128, 256, 576, 784, 1024], "+"),
    Foreign(("--naflex-max-seq-len",), _NAFLEX, 576, None),
    Foreign(("--naflex-patch-sizes",), _NAFLEX, None, "+"),
    Foreign(("--naflex-patch-size-probs",), _NAFLEX, None, "+"),
    Foreign(("--naflex-loss-scale",), _NAFLEX, "linear", None),
    Foreign(("--naflex-patchify-channels-first",), _NAFLEX),
)
FOREIGN = {one.name: one for one in (*MEANINGLESS, *REFUSED)}

# Options that are translated: timm's flag -> (what it is the same as, its number of words).
TRANSLATED: dict[str, tuple[str, int | None]] = {
    "--amp": ("--mixed-precision amp, fp16 or bf16, as --amp-dtype says", 0),
    "--amp-dtype": ("with --amp: float16 (--mixed-precision fp16) or bfloat16 (--mixed-precision bf16)", None),
    "--log-wandb": ("--report-to wandb", 0),
    "--loss": ("ce (the default), bce (--bce-loss) or jsd (--jsd-loss)", None),
}
_LOSSES = {"ce": (), "bce": ("bce_loss",), "jsd": ("jsd_loss",)}
_PRECISIONS = {None: "amp", "float16": "fp16", "bfloat16": "bf16"}
# Options that are read together: if the command line has one, a file may give the others.
_TOGETHER = (("amp", "amp_dtype"), ("log_wandb", "report_to"))
# What an empty word stands for; for all others, the default.
_EMPTY = {"dist_bn": "none", "train_interpolation": "", "val_split": ""}


def also(name: str) -> list[str]:
    """Returns timm's other flags for our option `name`."""
    return [flag_of(other) for other, ours in RENAMED.items() if ours == name and other != "data"]


def add_timm_options(parser: argparse.ArgumentParser) -> None:
    """Adds timm's positional DIR, and its options that are translated, have no meaning, or are refused."""
    parser.add_argument("data", nargs="?", metavar="DIR", default=argparse.SUPPRESS, help="the same as --data-dir")
    group = parser.add_argument_group("timm", "timm's names for options above.")
    for flag, (same, nargs) in TRANSLATED.items():
        _add(group, [flag, *also(flag[2:])], nargs, f"the same as {same}" if nargs == 0 else same)
    for one in FOREIGN.values():
        _add(parser, list(one.flags), one.nargs, argparse.SUPPRESS)


def translate(values: Mapping[str, Any], below: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], list[str]]:
    """Returns options by our names, and a line for each that has no meaning here.

    Args:
        values: Options by timm's names or ours, from a file or the command line.
        below: The options that these override.

    Raises:
        UserError: for an option that is refused, or two that contradict each other.
    """
    for group in _TOGETHER:
        if below is not None and values.keys() & set(group):
            values = {**{name: below[name] for name in group if name in below}, **values}
    found: dict[str, Any] = {}
    older: set[str] = set()  # options that were given by a name that timm had before
    notes: list[str] = []
    defaults = {name: item.default for _, name, item in options()}
    for key, value in values.items():
        name = RENAMED.get(key, key)
        if name in FOREIGN:
            notes += _foreign(FOREIGN[name], value)
            continue
        if name not in defaults and name[:3] == "no_" and isinstance(defaults.get(name[3:]), bool):
            name, value = name[3:], not value
        if name != key and value is None:
            continue
        if value == "" and name in defaults:
            value = _EMPTY.get(name, defaults[name])
        if name in found and (name != key or name in older):  # files of timm's hold both names, one with its default
            if not value:
                continue
            if not found[name]:
                del found[name]
        older |= {name} if name != key else set()
        if name in found and found[name] != value:
            both = " and ".join(flag_of(one) for one in values if RENAMED.get(one, one) == name)
            raise UserError(f"{both}: they are one option; got {found[name]!r} and {value!r}; leave one of them out")
        found[name] = value
    return _loss(_report_to(_precision(found, notes))), notes


def _foreign(option: Foreign, value: Any) -> list[str]:
    """Returns what there is to say of an option that does nothing here."""
    if not option.asked(value):
        return []
    if option in REFUSED:
        raise UserError(f"{option.flags[0]}: {option.why}")
    return [f"note: {option.flags[0]} has no meaning here: {option.why}"]


def _precision(found: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Translates --amp and --amp-dtype into --mixed-precision."""
    amp, dtype = found.pop("amp", False), found.pop("amp_dtype", None)
    if dtype not in _PRECISIONS:
        raise UserError(f"--amp-dtype: expected float16 or bfloat16; got {dtype!r}")
    if not amp and dtype == "bfloat16":
        notes.append("note: --amp-dtype has no meaning without --amp")
    if not amp:
        return found
    same = found.get("mixed_precision") or _PRECISIONS[dtype]
    if same != _PRECISIONS[dtype] and (dtype is not None or same == "no"):
        raise UserError(f"--amp: it is --mixed-precision {_PRECISIONS[dtype]}; got --mixed-precision {same} too")
    return {**found, "mixed_precision": same}


def _report_to(found: dict[str, Any]) -> dict[str, Any]:
    """Translates --log-wandb into --report-to."""
    if not found.pop("log_wandb", False):
        return found
    others = [name for name in found.get("report_to") or () if name not in ("none", "wandb")]
    return {**found, "report_to": [*others, "wandb"]}


def _loss(found: dict[str, Any]) -> dict[str, Any]:
    """Translates --loss into --bce-loss and --jsd-loss."""
    loss = found.pop("loss", None)
    if loss is None:
        return found
    if loss not in _LOSSES:
        raise UserError(f"--loss: expected one of {', '.join(_LOSSES)}; got {loss!r}; timm's other losses are not supported")
    others = [name for name in ("bce_loss", "jsd_loss") if found.get(name) and name not in _LOSSES[loss]]
    if others:
        raise UserError(f"--loss: {loss} is another loss than {flag_of(others[0])}; leave one of them out")
    if loss == "ce" and found.get("task") == "multilabel":
        raise UserError("--loss: several labels have binary cross-entropy; got ce; leave the option out")
    return {**found, "bce_loss": loss == "bce", "jsd_loss": loss == "jsd"}


def _add(group: Any, flags: list[str], nargs: int | str | None, text: str) -> None:
    name = flags[0].lstrip("-").replace("-", "_")
    how: dict[str, Any] = {"action": "store_true"} if nargs == 0 else {"nargs": nargs, "metavar": "VALUE"}
    group.add_argument(*flags, dest=name, default=argparse.SUPPRESS, help=text, **how)


def flag_of(name: str) -> str:
    """Returns the flag of an option's name."""
    return "DIR" if name == "data" else "--" + name.replace("_", "-")


def _words(value: Any) -> list[str]:
    """Returns a value as the words of a command line."""
    return [str(one) for one in value] if isinstance(value, Iterable) and not isinstance(value, str) else [str(value)]
