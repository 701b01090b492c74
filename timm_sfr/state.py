"""What a run is between two updates: gathered from all processes to be kept, and put back into one process or many."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from timm.utils import unwrap_model
from torch import Tensor

from timm_sfr.errors import UserError

if TYPE_CHECKING:
    from timm_sfr.engine import Trainer

Part = dict[str, dict[str, Tensor]]


def collect(trainer: Trainer, epoch: int, step: int, total: Tensor | None) -> dict[str, Any]:
    """All that a resumed run needs; to be called by every process at the same update.

    Args:
        trainer: The run.
        epoch: The epoch under way, or the next one.
        step: How many of its batches are done.
        total: This process's sums of the loss's terms over those; None between epochs.
    """
    ema = trainer.task.get_trainable_module(ema=True)
    scaler, schedule = trainer.accelerator.scaler, trainer.schedule.scheduler
    parts = gather_object([_own_part(trainer, total)]) if step > 0 else []
    return {
        "epoch": epoch,
        "step": step,
        "updates": trainer.updates,
        "images": step * trainer.global_batch,
        "lr": trainer.lr,
        "seconds": trainer.seconds,
        "best": trainer.best,
        "last": trainer.last,
        "module": unwrap_model(trainer.module).state_dict(),
        "ema": ema.module.state_dict() if ema is not None else None,
        "task": trainer.task.get_task_state(),
        "optimizer": trainer.optimizer.state_dict(),
        "schedule": schedule.state_dict() if schedule is not None else None,
        "scaler": scaler.state_dict() if scaler is not None else None,
        "parts": parts,
    }


def restore(trainer: Trainer, state: dict[str, Any]) -> None:
    """Takes up what `collect` gave, also where it came from another number of processes or another batch size.

    Raises:
        UserError: if it belongs to another model or optimizer.
    """
    ema = trainer.task.get_trainable_module(ema=True)
    try:
        unwrap_model(trainer.module).load_state_dict(state["module"])
        if ema is not None:
            # An average that is turned on at resume starts from the weights reached, not from random ones.
            ema.module.load_state_dict(state["ema"] or state["module"])
        trainer.task.load_task_state(state["task"])
        trainer.optimizer.load_state_dict(state["optimizer"])
        if trainer.accelerator.scaler is not None and state["scaler"] is not None:
            trainer.accelerator.scaler.load_state_dict(state["scaler"])
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"resume: the checkpoint does not fit these options: {reason}; leave out what differs from "
                        f"{trainer.workspace.run / 'args.yaml'}") from error  # fmt: skip
    trainer.start_epoch, trainer.start_step, trainer.updates = state["epoch"], state["step"], state["updates"]
    trainer.seconds, trainer.lr = state["seconds"], state["lr"]
    trainer.best, trainer.last = state["best"], state["last"]
    if state["images"] != trainer.start_step * trainer.global_batch:
        # Another global batch: go on after the images seen, to the last whole batch.
        trainer.start_step = state["images"] // trainer.global_batch
        trainer.updates = trainer.updates_before(trainer.start_epoch, trainer.start_step)
    if trainer.start_step > 0:
        # Sums over batches of another size count as so many of this one.
        _take_part(trainer, state["parts"], trainer.start_step / max(1, state["step"]))
    trainer.schedule.resume(trainer.start_epoch, trainer.updates, state["schedule"])


def _own_part(trainer: Trainer, total: Tensor | None) -> Part:
    """What this process alone knows in mid-epoch: sums over its images, and the averages of its own statistics.

    The buffers of the model itself are not among them: before every forward pass DDP hands out the first process's.
    """
    sums = getattr(trainer.task, "get_sums", dict)()
    ema = trainer.task.get_trainable_module(ema=True)
    buffers = {} if ema is None else dict(ema.module.named_buffers())
    part = {"total": {} if total is None else {"total": total}, "sums": sums, "ema": buffers}
    return {kind: {name: value.detach().cpu().clone() for name, value in one.items()} for kind, one in part.items()}


def _take_part(trainer: Trainer, parts: list[Part], scale: float) -> None:
    """Gives this process its part: its own where there are as many processes as before; else the sums go to the first."""
    rank, processes = trainer.accelerator.process_index, trainer.accelerator.num_processes
    if len(parts) == processes:
        part = parts[rank]
    else:
        count = torch.tensor(len(parts))
        totals = {"total": torch.stack([part["total"]["total"] for part in parts]).sum(0) / count}
        share = 1.0 if rank == 0 else 0.0
        sums = {name: share * sum(part["sums"][name] for part in parts) for name in parts[0]["sums"]}
        part = {"total": totals, "sums": sums, "ema": parts[0]["ema"]}
    device = trainer.accelerator.device
    trainer.start_total = part["total"]["total"].to(device) * scale
    if part["sums"] and hasattr(trainer.task, "add_sums"):
        trainer.task.add_sums(part["sums"])
    ema = trainer.task.get_trainable_module(ema=True)
    if ema is not None:
        for name, buffer in ema.module.named_buffers():
            if name in part["ema"]:
                buffer.copy_(part["ema"][name])
