"""A worker of test_processes: some updates of a run, their losses, and whether all processes hold the same weights."""

import json
import sys
from pathlib import Path

import torch
from accelerate.utils import gather_object

from timm_sfr import RunConfig
from timm_sfr.fit import prepare


def main() -> None:
    out, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    trainer = prepare(RunConfig.from_flat(options))
    watched, losses, smoothing = trainer.guard.watch, [], trainer.task.smoothing
    trainer.guard.watch = lambda terms: (
        losses.append(trainer.accelerator.reduce(terms, "mean")[0].item()),
        watched(terms),
    )
    trainer.train_epoch(0)
    state = trainer.exported_model().state_dict()
    flat = torch.cat([value.double().flatten() for value in state.values()])
    everyone = gather_object([flat.tolist()])
    val = trainer.validate()
    if trainer.accelerator.is_main_process:
        result = {"losses": losses, "identical": all(other == everyone[0] for other in everyone), "val": val,
                  "processes": len(everyone), "updates": trainer.updates, "lr": trainer.optimizer.param_groups[0]["lr"],
                  "table": smoothing.table.tolist()}  # fmt: skip
        out.write_text(json.dumps(result))
    trainer.accelerator.end_training()


main()
