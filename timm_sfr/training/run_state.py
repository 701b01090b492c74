"""What a run is between two updates: gathered from all processes to be kept, and put back into one process or many."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from timm.utils import unwrap_model
from torch import Tensor

from timm_sfr.utils.errors import UserError, brief

if TYPE_CHECKING:
    from timm_sfr.training.trainer import Trainer

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
    scaler = trainer.accelerator.scaler
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
        "schedule": trainer.schedule.state(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "parts": parts,
    }


def restore(trainer: Trainer, state: dict[str, Any]) -> None:
    """Takes up what `collect` gave, also where it came from another number of processes or another batch size.

    Raises:
        UserError: if it belongs to another model or optimizer.
    """
    try:
        _check(trainer, state)
        _take(trainer, state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else brief(error)
        raise UserError(f"resume: the checkpoint does not fit these options: {reason}; leave out what differs from "
                        f"{trainer.workspace.run / 'args.yaml'}") from error  # fmt: skip


def _take(trainer: Trainer, state: dict[str, Any]) -> None:
    ema = trainer.task.get_trainable_module(ema=True)
    unwrap_model(trainer.module).load_state_dict(state["module"])
    if ema is not None:
        # An average that is turned on at resume starts from the weights reached, not from random ones.
        ema.module.load_state_dict(state["ema"] or state["module"])
    trainer.task.load_task_state(state["task"])
    _check_optimizer(trainer.optimizer.param_groups, state["optimizer"])
    options = [_options(trainer, group) for group in trainer.optimizer.param_groups]
    trainer.optimizer.load_state_dict(state["optimizer"])
    for group, own in zip(trainer.optimizer.param_groups, options, strict=True):
        group.update(own)
    if trainer.accelerator.scaler is not None and state["scaler"] is not None:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])
    trainer.start_epoch, trainer.start_step = state["epoch"], state["step"]
    trainer.seconds, trainer.lr = state["seconds"], state["lr"]
    trainer.best, trainer.last = state["best"], state["last"]
    if state["images"] != trainer.start_step * trainer.global_batch:
        # Another global batch: go on after the images seen, to the last whole batch.
        trainer.start_step = state["images"] // trainer.global_batch
    trainer.start_step -= trainer.start_step % trainer.config.optim.grad_accum_steps
    trainer.updates = trainer.updates_before(trainer.start_epoch, trainer.start_step)
    if trainer.start_step > 0:
        # Sums over batches of another size count as so many of this one.
        _take_part(trainer, state["parts"], trainer.start_step / max(1, state["step"]))
    trainer.schedule.resume(trainer.start_epoch, trainer.updates, state["schedule"])


KINDS = {"epoch": int, "step": int, "images": int, "updates": int, "lr": (int, float), "seconds": (int, float),
         "best": dict, "last": dict, "module": dict, "task": dict, "optimizer": dict, "parts": list}  # fmt: skip
SIGNS = ("momentum", "betas", "alpha", "rho")  # an option that one optimizer has tells it from the others
# Arrays of these names have an element for each of the parameter's, in every optimizer of torch and timm that has them.
ELEMENTWISE = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "grad_avg")


def _check(trainer: Trainer, state: dict[str, Any]) -> None:
    """Raises ValueError for what loading would take without a word, and training would fail on or be changed by."""
    for name, kind in KINDS.items():
        if not isinstance(state[name], kind) or (isinstance(state[name], int) and state[name] < 0):
            raise ValueError(f"{name} is {str(state[name])[:40]!r}")
    own = unwrap_model(trainer.module).state_dict()
    for name in ("module", "ema"):
        for key, value in (state[name] or {}).items():
            if key in own and value.is_floating_point() != own[key].is_floating_point():
                raise ValueError(f"expected {key} to be {own[key].dtype}; got {value.dtype}")


def _options(trainer: Trainer, group: dict[str, Any]) -> dict[str, Any]:
    """What the run's options say of a group: it wins over what was saved, so that a resumed run may change it."""
    names = {"momentum", "betas", "eps", "weight_decay", *(trainer.config.optim.opt_kwargs or {})}
    if not trainer.schedule.remembers:
        names |= {"lr", "initial_lr"}
    return {name: value for name, value in group.items() if name in names}


def _check_optimizer(groups: list[dict[str, Any]], state: dict[str, Any]) -> None:
    """Raises ValueError where a state is not of an optimizer with these groups."""
    for group, saved in zip(groups, state["param_groups"], strict=False):  # torch counts them
        for key in SIGNS:
            if (key in group) != (key in saved):
                raise ValueError(f"its optimizer is another one, {'without' if key in group else 'with'} {key}")
        for key, value in saved.items():
            if key != "params" and isinstance(group.get(key), (int, float)) and not isinstance(value, (int, float)):
                raise ValueError(f"the optimizer's {key} is {str(value)[:40]!r}")
        for parameter, index in zip(group["params"], saved["params"], strict=False):
            for key, value in state["state"].get(index, {}).items():
                if key not in ELEMENTWISE or value is None:
                    continue
                if not value.is_floating_point() or value.numel() != parameter.numel():
                    raise ValueError(
                        f"the optimizer's {key} is {tuple(value.shape)} {value.dtype}, its parameter {tuple(parameter.shape)}"
                    )


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
    device, terms = trainer.accelerator.device, len(trainer.guard.names)
    if part["total"]["total"].shape != (terms,):
        raise ValueError(
            f"it was kept in mid-epoch, and has {part['total']['total'].numel()} terms of the loss, expected {terms}: a teacher "
            "came or went"
        )
    trainer.start_total = part["total"]["total"].to(device) * scale
    if part["sums"] and hasattr(trainer.task, "add_sums"):
        trainer.task.add_sums(part["sums"])
    ema = trainer.task.get_trainable_module(ema=True)
    if ema is not None:
        for name, buffer in ema.module.named_buffers():
            if name in part["ema"]:
                buffer.copy_(part["ema"][name])
