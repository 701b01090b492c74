"""Base of the configuration dataclasses: documented options with types, choices and bounds that are checked on creation."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, ClassVar

from timm_sfr.utils.errors import UserError, near_matches


def option(
    default: Any,
    text: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    name: str = "",
    short: str = "",
) -> Any:
    """Returns the field of a documented option in a `Checked` dataclass.

    Args:
        default: The default value.
        text: The help text.
        choices: The allowed values, or entries of a tuple; empty allows any.
        low: The lowest allowed number, also within a tuple.
        high: The highest allowed number, also within a tuple.
        name: The name outside Python, if it differs from the field's.
        short: A short flag, such as ``-b``.
    """
    metadata = {"help": text, "choices": choices, "low": low, "high": high, "name": name, "short": short}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Checked:
    """A frozen dataclass that checks each option's type, choices and bounds; subclasses check more in `check`."""

    prefix: ClassVar[str] = ""  # of the options' names outside Python

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            name = outside_name(item, self.prefix)
            value = coerce(getattr(self, item.name), hints[item.name], name)
            object.__setattr__(self, item.name, value)
            for entry in value if isinstance(value, tuple) else (value,):
                if entry is not None:
                    _check_value(entry, name, *(item.metadata[key] for key in ("choices", "low", "high")))
        self.check()

    def check(self) -> None:
        """Raises UserError for invalid combinations of values; does nothing here."""

    def changed(self) -> list[str]:
        """Returns the outside names of the options that differ from their defaults."""
        return [outside_name(item, self.prefix) for item in dataclasses.fields(self)
                if getattr(self, item.name) != item.default]  # fmt: skip


def _check_value(value: Any, name: str, choices: tuple[str, ...], low: float | None, high: float | None) -> None:
    """Raises UserError if the value is not one of `choices` or not between `low` and `high`."""
    if choices and value not in choices:
        raise UserError(f"{name}: expected one of {', '.join(choices)}; got {value!r}{near_matches(str(value), choices)}")
    if isinstance(value, str):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name}: expected a finite number; got {value}")
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"a value from {low} to {high}"
        raise UserError(f"{name}: expected {bounds}; got {value}")


def outside_name(item: dataclasses.Field, prefix: str = "") -> str:
    """Returns the option's name on the command line and in YAML."""
    return item.metadata.get("name") or prefix + item.name


def coerce(value: Any, hint: Any, name: str) -> Any:
    """Converts `value` to the annotated type `hint`.

    Numbers and numeric strings become floats, integers become strings, lists become tuples.

    Raises:
        UserError: if the value has another type.
    """
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    if str in kinds[1:] and isinstance(value, str):
        return value  # a number or a word: the section's `check` knows the words
    kind = next(entry for entry in kinds if entry is not type(None))
    if typing.get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        return tuple(coerce(entry, typing.get_args(kind)[0], name) for entry in value)
    if kind is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # an index where names are expected, such as a tap's
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 as a string
        except ValueError:
            pass
    expected = typing.get_origin(kind) or kind
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise UserError(f"{name}: expected {getattr(kind, '__name__', kind)}; got {value!r}")
    return plain(value, tuple) if expected is dict else value  # the same from Python and from YAML, which has no tuples


def plain(value: Any, sequence: type = list) -> Any:
    """Returns an option's value with each list and tuple, also within others, as a `sequence`; YAML has lists alone."""
    if isinstance(value, dict):
        return {key: plain(entry, sequence) for key, entry in value.items()}
    return sequence(plain(entry, sequence) for entry in value) if isinstance(value, (list, tuple)) else value
