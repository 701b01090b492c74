"""The options of a run: the sections together, under flat timm-style names to the outside.

`RunConfig.from_flat` reads a flat mapping (`args.yaml`, a ``--config`` file, the command line) and `RunConfig.flat`
writes one. Option names are timm's ``train.py`` names wherever timm has one.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any

from timm_sfr.hub_options import HubConfig
from timm_sfr.kd import KDConfig
from timm_sfr.method.config import SFRConfig
from timm_sfr.sections import AugConfig, DataConfig, EngineConfig, ModelConfig, OptimConfig
from timm_sfr.utils.errors import UserError, near_matches
from timm_sfr.utils.options import outside_name


@dataclass(frozen=True)
class RunConfig:
    """A whole run: one section per concern.

    Attributes:
        data: What is trained on.
        model: Which model, at which input.
        aug: Training augmentation.
        optim: Optimizer, schedule, length and averaging.
        sfr: Self-Feature Regularization.
        teacher: A teacher beside it.
        engine: How the run is carried out and where it is written.
        hub: Publishing on the Hugging Face Hub.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    aug: AugConfig = field(default_factory=AugConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sfr: SFRConfig = field(default_factory=SFRConfig)
    teacher: KDConfig = field(default_factory=KDConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    hub: HubConfig = field(default_factory=HubConfig)

    def __post_init__(self) -> None:
        if self.aug.mixes and self.data.batch_size % 2:
            raise UserError(
                f"batch-size: mixup and CutMix pair samples and need an even size; got {self.data.batch_size}"
            )

    @classmethod
    def from_flat(cls, values: dict[str, Any], where: str = "options") -> RunConfig:
        """Builds a run from a flat mapping; the digits' own defaults apply where no data is named.

        Raises:
            UserError: for an unknown key (with near matches), a value of the wrong type, or one out of bounds.
        """
        known = {name: (section, item) for section, name, item in options()}
        unknown = [key for key in values if key not in known]
        if unknown:
            hints = "".join(near_matches(str(key).replace("-", "_"), known) for key in unknown)
            raise UserError(f"{where}: unknown option {', '.join(map(repr, unknown))}{hints}")
        if values.get("dataset") in (None, "digits") and not values.get("data_dir"):
            values = {**DIGITS, **values}
        sections: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            section, item = known[key]
            sections.setdefault(section, {})[item.name] = value
        return cls(**{name: SECTIONS[name](**entries) for name, entries in sections.items()})

    def flat(self) -> dict[str, Any]:
        """Every option by its outside name, in plain YAML types."""
        values = {name: getattr(getattr(self, section), item.name) for section, name, item in options()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


SECTIONS: dict[str, type] = {
    item.name: typing.cast(type, item.default_factory) for item in dataclasses.fields(RunConfig)
}

# With 8 x 8 pixel digits, flips change the class and strong crops cut it off; small and short is enough.
DIGITS: dict[str, Any] = {
    "dataset": "digits",
    "model": "resnet20_cifar",
    "img_size": 16,
    "lr": 0.1,
    "epochs": 20,
    "batch_size": 64,
    "workers": 0,
    "scale": (0.7, 1.0),
    "hflip": 0.0,
    "color_jitter": 0.0,
}


def options() -> list[tuple[str, str, dataclasses.Field]]:
    """Every option as (section, outside name, field); SFR's carry the prefix ``sfr_``."""
    found = []
    for section, kind in SECTIONS.items():
        for item in dataclasses.fields(kind):
            found.append((section, outside_name(item, kind.prefix), item))
    return found
