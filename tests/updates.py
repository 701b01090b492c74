"""A worker of test_processes: some updates of a run, their losses, and whether all processes hold the same weights."""

import json
import sys
from pathlib import Path

import torch
from accelerate.utils import gather_object

from timm_sfr import DynamicLabelSmoothing, RunConfig
from timm_sfr.data.datasets import open_splits
from timm_sfr.hub.card import Facts
from timm_sfr.method.smoothing import right_predictions, soft_targets, update_table
from timm_sfr.training.final_test import exported, score_split
from timm_sfr.training.run import Data, prepare


def table_error(process: int, processes: int) -> float:
    """How far the class table of all processes, each with its part of a batch, is from that of the joined batch."""
    logits = torch.randn(256, 10, generator=torch.Generator().manual_seed(0)) * 3
    target = torch.arange(256) % 10
    shared = DynamicLabelSmoothing(10, 0.1, "classes")
    shared(logits[process::processes], target[process::processes])
    shared.end_epoch()
    label, predictions, right = right_predictions(logits, soft_targets(target, 10))
    sums = torch.zeros(10, 10).index_add_(0, label, predictions)
    whole = update_table(torch.full((10, 10), 0.1), sums, torch.zeros(10).index_add_(0, label, right))
    return (shared.table - whole).abs().max().item()


def main() -> None:
    out, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    config = RunConfig.from_flat(options)
    train, val = open_splits(config.data, "RGB", 0)
    trainer = prepare(config, data=Data(train, val, test=val))
    watched, losses, smoothing = trainer.guard.terms.send, [], trainer.task.smoothing
    trainer.guard.terms.send = lambda terms: (
        losses.append(trainer.accelerator.reduce(terms, "mean")[0].item()),
        watched(terms),
    )
    trainer.train_epoch(0)
    state = trainer.exported_model().state_dict()
    flat = torch.cat([value.double().flatten() for value in state.values()])
    everyone = gather_object([flat.tolist()])
    val = trainer.validate()
    folder, main = trainer.workspace.run / "model", trainer.accelerator.is_main_process
    if main:
        trainer.recorder.exporter.write(folder, state, Facts())
    else:
        torch.nn.init.zeros_(trainer.exported_model().get_classifier().weight)  # the main process's weights count
    chosen = exported(trainer.exported_model(), folder, trainer.accelerator)
    test, _ = score_split(chosen, trainer.test_loader(), trainer.prep, trainer.accelerator, trainer.config.threshold)
    error = table_error(trainer.accelerator.process_index, len(everyone))
    if main:
        result = {"losses": losses, "identical": all(other == everyone[0] for other in everyone), "val": val,
                  "test": test, "model": str(folder),
                  "processes": len(everyone), "updates": trainer.state.updates, "lr": trainer.optimizer.param_groups[0]["lr"],
                  "table": smoothing.table.tolist(),
                  "table_error": error}  # fmt: skip
        out.write_text(json.dumps(result))
    trainer.accelerator.end_training()


main()
