"""The model folder of a run: what plain timm loads, from disk or from the Hub."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from timm.models import save_for_hf
from torch import nn

from timm_sfr.checkpoint import replace_atomically
from timm_sfr.loader import Preprocessing

# What an architecture's default configuration says of the weights that timm publishes; ours are others.
PROVENANCE = (
    "tag", "url", "file", "hf_hub_id", "hf_hub_filename", "origin_url", "paper_ids", "paper_name", "license", "notes",
    "source", "custom_load", "test_input_size", "test_crop_pct", "label_names", "label_descriptions",
)  # fmt: skip


class Exporter:
    """Writes ``config.json``, ``model.safetensors`` and ``README.md``; keeps an unwrapped copy of the model for it.

    Args:
        model: The timm model before any wrapping; copied to the CPU.
        prep: Its preprocessing, which goes into ``config.json``.
        class_names: Names of its classes, if known.
    """

    def __init__(self, model: nn.Module, prep: Preprocessing, class_names: tuple[str, ...] | None) -> None:
        self.template = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format)
        config = getattr(self.template, "pretrained_cfg", {})
        self.template.pretrained_cfg = {key: value for key, value in config.items() if key not in PROVENANCE}
        self.prep, self.class_names = prep, class_names

    def write(self, folder: Path, state: dict[str, torch.Tensor], metrics: dict[str, Any]) -> None:
        """Replaces `folder` by one with the weights `state`, which must have exactly the model's keys."""
        self.template.load_state_dict(state, strict=True)

        def write(fresh: Path) -> None:
            model_config = {"label_names": list(self.class_names)} if self.class_names else {}
            save_for_hf(
                self.template,
                str(fresh),
                model_config=model_config,
                safe_serialization=True,
                data_config={
                    "input_size": self.prep.input_size,
                    "mean": self.prep.mean,
                    "std": self.prep.std,
                    "interpolation": self.prep.interpolation,
                    "crop_pct": self.prep.crop_pct,
                    "crop_mode": self.prep.crop_mode,
                },
            )
            config = json.loads((fresh / "config.json").read_text())
            card_file = fresh / "README.md"
            card_file.write_text(card(config["architecture"], metrics))
            # safetensors leaves its file readable by the owner alone; give it what the user's umask gives the others.
            (fresh / "model.safetensors").chmod(card_file.stat().st_mode)

        folder.parent.mkdir(parents=True, exist_ok=True)
        replace_atomically(folder, write)


def card(architecture: str, metrics: dict[str, Any]) -> str:
    """A short model card from the run's own figures."""
    best, small = metrics["best"], architecture.endswith("_cifar")
    return f"""---
library_name: timm
tags: [image-classification, timm, timm_sfr, self-distillation]
---
# {architecture}

Trained {"with Self-Feature Regularization" if metrics["sfr"] else "without Self-Feature Regularization"} by
timm_sfr {metrics["versions"]["timm_sfr"]} on {metrics["dataset"]}, seed
{metrics["seed"]}. Nothing of it remains in the network.

Validation ({best["images"]} images, epoch {best["epoch"] + 1} of {metrics["epochs"]}, the best by val_{metrics["eval_metric"]}):
top-1 {best["val_top1"]:.2f} %, top-5 {best["val_top5"]:.2f} %, ECE {best["ece"]:.4f}.

```python
import timm{", timm_sfr  # registers the architecture" if small else ""}
model = timm.create_model("local-dir:.", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
logits = model(transform(image)[None])
```
"""
