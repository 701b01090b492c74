"""The state of a run between two updates: collected from all processes for a checkpoint, and restored from one.

A checkpoint may be restored with another number of processes or another batch size.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from timm.utils import unwrap_model
from torch import Tensor

from timm_sfr.config import RunConfig
from timm_sfr.data.sizes import SizeSchedule
from timm_sfr.training.guards import FiniteGuard
from timm_sfr.training.optimizer import Schedule
from timm_sfr.training.step import image_dtype
from timm_sfr.utils.errors import UserError, brief

# What one process alone knows in mid-epoch: kind ("total", "sums", "ema" or "module"), then name, then tensor.
Part = dict[str, dict[str, Tensor]]
# The types of a checkpoint's entries.
KINDS = {"epoch": int, "step": int, "images": int, "updates": int, "lr": (int, float), "seconds": (int, float),
         "best": dict, "last": dict, "module": dict, "task": dict, "optimizer": dict, "parts": list}  # fmt: skip
SIGNS = ("momentum", "betas", "alpha", "rho")  # options that only some optimizers have: they tell optimizers apart
# Optimizer arrays with one element for each element of the parameter, in every optimizer of torch and timm that has them.
ELEMENTWISE = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "grad_avg")


@dataclass
class RunState:
    """The progress of a run.

    `total` are this process's sums of the loss terms over the finished batches with finite terms; the last entry is the
    number of these batches. It is None at the start of an epoch.
    """

    epoch: int = 0  # number of finished epochs
    step: int = 0  # number of finished batches of the next epoch
    total: Tensor | None = None
    updates: int = 0
    seconds: float = 0.0  # training time
    lr: float = 0.0  # the learning rate at the start of this epoch
    best: dict[str, Any] = field(default_factory=dict)  # scores of the best epoch
    last: dict[str, Any] = field(default_factory=dict)  # scores of the last validated epoch
    rows: list[dict[str, Any]] = field(default_factory=list)  # of summary.csv
    test: dict[str, Any] = field(default_factory=dict)  # scores of the best epoch's weights; not in checkpoints

    def out_of_patience(self, patience: int | None) -> bool:
        """Returns whether the last validated epoch is `patience` epochs or more after the best one; never for None."""
        if patience is None or not self.last:
            return False
        return self.last["epoch"] - self.best.get("epoch", -1) >= patience


@dataclass
class Learner:
    """What training changes and a checkpoint keeps, on the device and prepared by Accelerate."""

    config: RunConfig
    accelerator: Any
    task: Any
    optimizer: Any
    schedule: Schedule
    batches: Any  # the training batches; their number is an epoch's length
    guard: FiniteGuard
    state: RunState = field(default_factory=RunState, kw_only=True)

    @property
    def module(self) -> Any:
        """The prepared trainable module."""
        return self.task.trainable_module

    @property
    def dtype(self) -> torch.dtype:
        """The type of the images that the model takes."""
        return image_dtype(self.config.model)

    @property
    def global_batch(self) -> int:
        """Images in one batch over all processes."""
        return self.config.data.batch * self.accelerator.num_processes

    @property
    def mean_batch(self) -> float:
        """Images in one batch over all processes, in the mean over the sizes of images."""
        return self.global_batch if self.sizes is None else self.sizes.average_batch * self.accelerator.num_processes

    @property
    def sizes(self) -> SizeSchedule | None:
        """The schedule of image sizes; None if they do not change."""
        return getattr(self.batches, "sizes", None)

    def share(self, batch: int) -> float:
        """Returns a batch's size relative to the schedule's mean; 1 if sizes do not change."""
        return 1.0 if self.sizes is None else batch / self.sizes.average_batch

    def scaled(self, loss: Tensor, share: float) -> Tensor:
        """Returns the loss scaled by its batch's share of the mean batch size, as the options say, for the gradients only."""
        mode = self.config.sizes.variable_batch_loss_scale
        if mode == "none" or share == 1:
            return loss
        return loss * (share if mode == "linear" else share**0.5)

    def images_before(self, epoch: int, step: int) -> int:
        """Returns the number of images in the first `step` batches of an epoch, over all processes."""
        return step * self.global_batch if self.sizes is None else self.sizes.images(epoch, step)

    def steps_of(self, epoch: int, images: int) -> int:
        """Returns the number of whole batches of an epoch that `images` images fill."""
        if self.sizes is None:
            return images // self.global_batch
        ends = itertools.accumulate(size * self.sizes.processes for _, size in self.sizes.batches(epoch))
        return sum(end <= images for end in ends)

    def updates_before(self, epoch: int, step: int) -> int:
        """Returns the number of updates in `epoch` epochs and `step` batches."""
        accum = self.config.optim.grad_accum_steps
        return epoch * -(-len(self.batches) // accum) + step // accum


def collect(learner: Learner, epoch: int, step: int, total: Tensor | None) -> dict[str, Any]:
    """Returns the content of a checkpoint; in mid-epoch, every process has to call this at the same update.

    `step` batches of `epoch` are finished, and `total` has this process's sums over them, as in `RunState`. Between epochs,
    `epoch` is the next one, and `total` None.
    """
    ema = learner.task.get_trainable_module(ema=True)
    scaler = learner.accelerator.scaler
    parts = gather_object([_own_part(learner, total)]) if step > 0 else []
    return {
        "epoch": epoch,
        "step": step,
        "updates": learner.state.updates,
        "images": learner.images_before(epoch, step),
        "lr": learner.state.lr,
        "seconds": learner.state.seconds,
        "best": learner.state.best,
        "last": learner.state.last,
        "module": unwrap_model(learner.module).state_dict(),
        "ema": ema.module.state_dict() if ema is not None else None,
        "task": learner.task.get_task_state(),
        "optimizer": learner.optimizer.state_dict(),
        "schedule": learner.schedule.state(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "parts": parts,
    }


def restore(learner: Learner, state: dict[str, Any], options: str = "args.yaml", optimizer: bool = True) -> None:
    """Restores what `collect` returned, also from another number of processes or another batch size.

    Args:
        learner: What to restore into.
        state: A checkpoint's content.
        options: The file with the run's own options, for the error message.
        optimizer: Whether to restore the optimizer's state too.

    Raises:
        UserError: if the checkpoint belongs to another model or optimizer.
    """
    try:
        _check(learner, state)
        _load(learner, state, optimizer)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else brief(error)
        raise UserError(
            f"resume: the checkpoint does not fit these options: {reason}; leave out the options that differ from {options}"
        ) from error


def _load(learner: Learner, state: dict[str, Any], optimizer: bool) -> None:
    ema = learner.task.get_trainable_module(ema=True)
    unwrap_model(learner.module).load_state_dict(state["module"])
    if ema is not None:
        # A moving average that is turned on at resume starts from the current weights, not from random ones.
        ema.module.load_state_dict(state["ema"] or state["module"])
    learner.task.load_task_state(state["task"])
    own_rate = not optimizer or _takes_own_rate(learner, state)
    if optimizer:
        _load_optimizer(learner, state, own_rate)
    step = state["step"]
    if state["images"] != learner.images_before(state["epoch"], step):
        # Other global batches: continue after the last whole batch of the images seen.
        step = learner.steps_of(state["epoch"], state["images"])
    step -= step % learner.config.optim.grad_accum_steps
    kept = {name: state[name] for name in ("epoch", "seconds", "lr", "best", "last")}
    learner.state = RunState(step=step, updates=learner.updates_before(state["epoch"], step), **kept)
    if step > 0:
        # Sums over batches of another size are scaled to the number of batches of this size.
        _load_part(learner, state["parts"], step, step / max(1, state["step"]))
    learner.schedule.resume(learner.state.epoch, learner.state.updates, state["schedule"], own_rate)


def _load_optimizer(learner: Learner, state: dict[str, Any], own_rate: bool) -> None:
    _check_optimizer(learner.optimizer.param_groups, state["optimizer"])
    # The options that a resumed run may change win over the saved ones.
    names = {"momentum", "betas", "eps", "weight_decay", "lr_scale", *(learner.config.optim.opt_kwargs or {})}
    if own_rate:
        names |= {"lr", "initial_lr"}
    options = [{name: group[name] for name in names & group.keys()} for group in learner.optimizer.param_groups]
    learner.optimizer.load_state_dict(state["optimizer"])
    for group, own in zip(learner.optimizer.param_groups, options, strict=True):
        group.update(own)
    if learner.accelerator.scaler is not None and state["scaler"] is not None:
        learner.accelerator.scaler.load_state_dict(state["scaler"])


def _takes_own_rate(learner: Learner, state: dict[str, Any]) -> bool:
    """Whether the rate follows from the options, and not from the plateau that the checkpoint was on."""
    before, now = (groups[0].get("initial_lr") for groups in (state["optimizer"]["param_groups"], learner.optimizer.param_groups))
    return not learner.schedule.remembers or state["schedule"] is None or before != now


def _check(learner: Learner, state: dict[str, Any]) -> None:
    """Raises ValueError for entries that would load silently and then break or change the training."""
    for name, kind in KINDS.items():
        if not isinstance(state[name], kind) or (isinstance(state[name], int) and state[name] < 0):
            raise ValueError(f"{name} is {str(state[name])[:40]!r}")
    own = unwrap_model(learner.module).state_dict()
    for name in ("module", "ema"):
        for key, value in (state[name] or {}).items():
            if key in own and value.is_floating_point() != own[key].is_floating_point():
                raise ValueError(f"expected {key} to be {own[key].dtype}; got {value.dtype}")


def _check_optimizer(groups: list[dict[str, Any]], state: dict[str, Any]) -> None:
    """Raises ValueError if `state` does not belong to an optimizer with these groups."""
    for group, saved in zip(groups, state["param_groups"], strict=False):  # torch checks their number
        for key in SIGNS:
            if (key in group) != (key in saved):
                raise ValueError(f"it is from another optimizer, {'without' if key in group else 'with'} {key}")
        for key, value in saved.items():
            if key != "params" and isinstance(group.get(key), (int, float)) and not isinstance(value, (int, float)):
                raise ValueError(f"the optimizer's {key} is {str(value)[:40]!r}")
        for parameter, index in zip(group["params"], saved["params"], strict=False):
            for key, value in state["state"].get(index, {}).items():
                if key not in ELEMENTWISE or value is None:
                    continue
                whole = key == "exp_avg_sq" and value.ndim == 0  # NvNovoGrad's, one number for a parameter
                if not value.is_floating_point() or (value.numel() != parameter.numel() and not whole):
                    raise ValueError(
                        f"the optimizer's {key} is {tuple(value.shape)} {value.dtype}, its parameter {tuple(parameter.shape)}"
                    )


def _own_part(learner: Learner, total: Tensor | None) -> Part:
    """Returns what only this process knows in mid-epoch: sums over its images, and the buffers of its moving average.

    The buffers of the model itself are not needed where DDP broadcasts those of the first process before every forward pass.
    """
    part = {"total": {} if total is None else {"total": total}, "sums": learner.task.get_sums(), **_buffers(learner)}
    if learner.config.engine.ddp_bb:
        part["module"] = {}
    return {kind: {name: value.detach().cpu().clone() for name, value in one.items()} for kind, one in part.items()}


def _buffers(learner: Learner) -> Part:
    """Returns the buffers of the moving average and of the model, without those that a model makes by itself."""
    ema = learner.task.get_trainable_module(ema=True)
    modules = {"ema": None if ema is None else ema.module, "module": unwrap_model(learner.module)}
    found: Part = {}
    for kind, module in modules.items():
        kept = () if module is None else module.state_dict().keys()
        found[kind] = {} if module is None else {name: value for name, value in module.named_buffers() if name in kept}
    return found


def _load_part(learner: Learner, parts: list[Part], step: int, scale: float) -> None:
    """Restores this process's part; if the number of processes has changed, the first process gets all sums."""
    rank, processes = learner.accelerator.process_index, learner.accelerator.num_processes
    if len(parts) == processes:
        part = parts[rank]
    else:
        count = torch.tensor(len(parts))
        totals = {"total": torch.stack([part["total"]["total"] for part in parts]).sum(0) / count}
        share = 1.0 if rank == 0 else 0.0
        sums = {name: share * sum(part["sums"][name] for part in parts) for name in parts[0]["sums"]}
        part = {"total": totals, "sums": sums, "ema": parts[0]["ema"], "module": parts[0].get("module", {})}
    total, terms = part["total"]["total"], len(learner.guard.names)
    if total.shape == (terms,):  # of an earlier version, which did not keep the number of batches
        total = torch.cat([total, total.new_tensor([step / scale])])
    if total.shape != (terms + 1,):
        raise ValueError(
            f"it was saved in mid-epoch with {total.numel() - 1} terms of the loss, expected {terms}: a teacher or "
            "--jsd-loss was added or removed"
        )
    learner.state.total = total.to(learner.accelerator.device) * scale
    if part["sums"]:
        learner.task.add_sums(part["sums"])
    for kind, buffers in _buffers(learner).items():
        for name in buffers.keys() & part.get(kind, {}).keys():
            buffers[name].copy_(part[kind][name])
