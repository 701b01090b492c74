"""What the configuration dataclasses share: documented options whose types, choices and bounds are checked when made."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any, ClassVar

from timm_sfr.utils.errors import UserError, near_matches


def option(default: Any, text: str, *, choices: tuple[str, ...] = (), name: str = "", short: str = "") -> Any:
    """A documented option: its default, help text, allowed values, outside name if it differs, and short flag."""
    return field(default=default, metadata={"help": text, "choices": choices, "name": name, "short": short})


@dataclass(frozen=True)
class Checked:
    """Checks every field's type and choices; subclasses add their own bounds in `check`.

    `prefix` stands before the outside names of a section's options.
    """

    prefix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            value = coerce(getattr(self, item.name), hints[item.name], outside_name(item, self.prefix))
            object.__setattr__(self, item.name, value)
            choices = item.metadata.get("choices")
            if choices and value is not None and value not in choices:
                hint = near_matches(str(value), choices)
                raise UserError(
                    f"{outside_name(item, self.prefix)}: expected one of {', '.join(choices)}; got {value!r}{hint}"
                )
        self.check()

    def check(self) -> None:
        """Raises UserError for values that fit no run."""

    def at_least(self, low: float, *names: str) -> None:
        """Raises UserError unless every named option is None or >= `low`."""
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name in names and value is not None and value < low:
                raise UserError(f"{outside_name(item, self.prefix)}: expected at least {low}; got {value}")

    def within(self, low: float, high: float, *names: str) -> None:
        """Raises UserError unless every named option is None or in [low, high]."""
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name in names and value is not None and not low <= value <= high:
                raise UserError(
                    f"{outside_name(item, self.prefix)}: expected a value from {low} to {high}; got {value}"
                )


def outside_name(item: dataclasses.Field, prefix: str = "") -> str:
    """The option's name on the command line and in YAML."""
    return item.metadata.get("name") or prefix + item.name


def coerce(value: Any, hint: Any, name: str) -> Any:
    """`value` as the annotated type `hint`: integers become floats and lists tuples; anything else is an error."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = next(entry for entry in kinds if entry is not type(None))
    if typing.get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        return tuple(coerce(entry, typing.get_args(kind)[0], name) for entry in value)
    if kind is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # an index among names, such as a tap's
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 as text
        except ValueError:
            pass
    plain = typing.get_origin(kind) or kind
    if not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
        raise UserError(f"{name}: expected {getattr(kind, '__name__', kind)}; got {value!r}")
    return value
