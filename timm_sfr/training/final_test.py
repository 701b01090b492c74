"""The end of a run: the exported weights are read back and scored on the test split, once."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from timm_sfr.data.transforms import Preprocessing
from timm_sfr.models.files import WEIGHTS
from timm_sfr.models.split_bn import without_auxiliary
from timm_sfr.runs.scores import CLASSIFICATION, MULTILABEL, recorded_scores
from timm_sfr.training.evaluate import evaluate
from timm_sfr.training.progress import watched
from timm_sfr.utils.errors import UserError, brief
from timm_sfr.utils.processes import on_main


def exported(model: nn.Module, folder: Path, accelerator: Any) -> nn.Module:
    """Returns a copy of `model` with the weights of a run's model folder, which only the main process needs to have.

    Raises UserError, on every process, if the weights cannot be read or do not fit.
    """
    chosen = copy.deepcopy(model)
    own = chosen.state_dict()
    auxiliary = {name: own[name] for name in own.keys() - without_auxiliary(own).keys()}  # not exported, and not used to score

    def read() -> None:
        try:
            chosen.load_state_dict({**load_file(folder / WEIGHTS), **auxiliary})
        except (OSError, RuntimeError, SafetensorError) as error:
            raise UserError(f"test-split: cannot score the weights in {str(folder)!r}: {brief(error)}") from error

    on_main(accelerator, read)
    # Contiguous, because a collective refuses other memory layouts.
    chosen.load_state_dict(broadcast({name: value.contiguous() for name, value in chosen.state_dict().items()}))
    return chosen


def score_split(
    model: nn.Module, loader: DataLoader, prep: Preprocessing, accelerator: Any, threshold: float | None = None
) -> tuple[dict[str, float], int]:
    """Returns the scores of `model` on a split, as `evaluate`, and for how many images its outputs are not finite."""
    scores = evaluate(model, loader, prep, accelerator, watch=partial(watched, name="test"), threshold=threshold)
    names = ("images", *recorded_scores(CLASSIFICATION if threshold is None else MULTILABEL))
    return {name: scores[name] for name in names}, int(scores["nonfinite"])
