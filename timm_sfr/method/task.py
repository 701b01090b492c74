"""`SFRTask`, Self-Feature Regularization as a timm training task: the only link to timm's training code."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from timm.task import MultiLabelClassificationEvaluator, TrainingTask
from timm.task.distillation import FeatureDistillationTrainableModule
from timm.utils import unwrap_model
from torch import Tensor, nn

from timm_sfr.method.channels import ChannelProjection
from timm_sfr.method.classification import Float32Buffers, jsd_terms
from timm_sfr.method.config import LossForm, SFRConfig
from timm_sfr.method.feature_loss import FeatureLoss
from timm_sfr.method.probe import HOOKS, count_classes, model_name
from timm_sfr.method.smoothing import DynamicLabelSmoothing, SmoothedLoss, warmup_epochs
from timm_sfr.method.tapped_model import TappedModel
from timm_sfr.method.taps import MIN_NODES, UNMATCHED, choose_taps
from timm_sfr.utils.errors import UserError

_logger = logging.getLogger(__name__)


def weight_at(config: SFRConfig, epoch: int, epochs: int) -> float:
    """Returns lambda(t), which rises over the first epochs, falls over the last, and is constant within an epoch.

        lambda(e) = weight * min(1, (e + 1) / (warmup + 1), (epochs - e) / (decay + 1))

    The warm-up is that of `warmup_epochs`. Epochs beyond the last, epochs - 1, have its lambda.
    """
    epoch = max(0, min(epoch, epochs - 1))
    warmup = warmup_epochs(epochs, config.warmup_epochs)
    return config.weight * min(1.0, (epoch + 1) / (warmup + 1), (epochs - epoch) / (config.decay_epochs + 1))


class EpochTask(TrainingTask):
    """A timm task with the trainer's hooks for epochs, which do nothing here; tasks without SFR use them as they are."""

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Called before epoch `epoch` (from 0) of `epochs`."""

    def end_epoch(self) -> None:
        """Called after an epoch."""

    def get_sums(self) -> dict[str, Tensor]:
        """Returns sums over this process's images of the epoch so far, for a checkpoint within the epoch."""
        return {}

    def add_sums(self, sums: dict[str, Tensor]) -> None:
        """Adds the result of `get_sums` after a run is resumed within an epoch."""


class SFRTask(Float32Buffers, EpochTask):
    """Trains a timm classifier with Self-Feature Regularization.

        L = L_cls(z, y~) + lambda(t) (1/S) sum_s L_feat(f_s, sg f_d)

    With binary cross-entropy averaged over K classes, lambda is divided by K (`LossForm.balance`).

    `trainable_module` is one module from images to (logits, tapped nodes). DDP or Accelerate wraps it, and autocast covers
    it. The losses run outside it, in float32. `plain_model` is the timm model whose weights are exported.

    Images may have any size that the model takes, also another one in each batch. The taps are those of `input_size`. A size
    at which a tap has fewer than 4 locations trains without the feature loss, and a line says so once.

    Call `set_epoch` before each epoch and `end_epoch` after it. Without these calls, lambda stays at its full value,
    automatic smoothing at no more than 0.1, and the class table uniform.

    Args:
        model: Any timm classifier, or any other module from images to logits (which needs `input_size`).
        config: SFR's options; by default `SFRConfig()`.
        input_size: (C, H, W) that the taps are chosen for; by default the model's own.
        base: A timm task over the same model that computes the logits once per batch, such as `LogitDistillationTask` or
            `FeatureDistillationTask`. Its loss replaces L_cls, including the smoothing, which is dynamic if the task's
            criterion is a `SmoothedLoss`.
        loss: The form of L_cls, such as ``LossForm(bce=True)``; by default cross-entropy. With a base, that of its loss.
            Images with several labels need ``LossForm(bce=True, multi_label=True)``.
        images: The number of training images. With it, the automatic smoothing is weaker for a model that is too small to
            memorise them (`DynamicLabelSmoothing.set_capacity`); without it, never.
        device: The device of the task's tensors; by default the model's.
        dtype: As in timm.
        verbose: Whether to log the chosen taps.

    Raises:
        UserError: if the model cannot be tapped at this size, `config` switches SFR off, or `base` does not train this model or
            comes with views.

    Examples:
        ```python
        model = timm.create_model("resnet18", num_classes=10)
        task = timm_sfr.SFRTask(model)
        task(images, targets)["loss"].backward()
        ```
    """

    weight: Tensor

    def __init__(
        self,
        model: nn.Module,
        config: SFRConfig | None = None,
        *,
        input_size: tuple[int, int, int] | None = None,
        base: TrainingTask | None = None,
        loss: LossForm | None = None,
        images: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        if hasattr(model, "_orig_mod"):
            raise UserError("model: expected one that is not compiled, because SFR adds outputs to it; got torch.compile's; pass "
                            "the model itself, and compile the task: task.compile()")  # fmt: skip
        device = device or next(model.parameters()).device
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        self.config, self.loss = config or SFRConfig(), loss or LossForm()
        if not self.config.enabled:
            raise UserError("sfr: SFRTask trains with SFR, and enabled=False asks for plain training; use "
                            "timm.task.ClassificationTask")  # fmt: skip
        if base is not None and self.loss.splits:
            raise UserError("base: a base task computes its own loss, and cannot have the JSD of views; leave out one of the two")
        self.plan = choose_taps(model, input_size, self.config.taps) if self.config.weight > 0 else None
        projection: ChannelProjection | None = None
        if self.plan is not None:
            if UNMATCHED in self.plan.node_grids(self.config.max_nodes, self.config.common_grid):
                raise UserError(
                    f"sfr_taps: a shallow tap of {model_name(model)} is smaller than the grid that it would be pooled to; name "
                    "others, or lower sfr_max_nodes"
                )
            if self.config.channels == "projection":
                shallow = tuple(tap.channels for tap in self.plan.shallow)
                projection = ChannelProjection(shallow, self.plan.deep.channels)
            if verbose:
                _logger.info("SFR taps:\n%s", self.plan)
        to_teacher = None if base is None else self._take_over(base, model)
        self.trainable_module: nn.Module = TappedModel(model, self.plan, self.config, projection, to_teacher).to(device)
        self.feature_loss = FeatureLoss(self.config)
        classes = self.plan.num_classes if self.plan is not None else count_classes(model, input_size)
        criterion = getattr(base, "criterion", None)
        self.smoothed = criterion if isinstance(criterion, SmoothedLoss) else None
        # A base task computes its own loss: this task smooths nothing and keeps no class table.
        form = self.config.smoothing_form if base is None else (0.0,)
        own = DynamicLabelSmoothing(classes, *form, loss=self.loss) if self.smoothed is None else self.smoothed.smoothing
        self.smoothing = own.to(device)
        if images is not None:
            self.smoothing.set_capacity(sum(p.numel() for p in model.parameters()), images)
        self.balance = self.loss.balance(classes)
        weight = torch.tensor(self.config.weight * self.balance, device=device)
        self.register_buffer("weight", weight, persistent=False)
        self.base = base
        self._unmatched: set[tuple[int, int]] = set()  # image sizes without feature loss that were announced

    def _take_over(self, base: TrainingTask, model: nn.Module) -> nn.Module | None:
        """Makes `base` reuse our forward pass; returns its map from features to the teacher's, or None without one."""
        trained, to_teacher = unwrap_model(base.trainable_module), None
        if isinstance(trained, FeatureDistillationTrainableModule):
            to_teacher = nn.Identity() if trained.projection is None else trained.projection
            trained = trained.student
        if trained is not model:
            raise UserError(
                "base: expected a timm task whose trainable_module is this model (such as LogitDistillationTask); got "
                f"{type(base).__name__} over {type(base.trainable_module).__name__}"
            )
        if to_teacher is not None and self.plan is not None and self.plan.mechanism == HOOKS:
            raise UserError(
                f"base: {model_name(model)} is tapped by hooks, which return no features for a teacher; use a model with "
                "forward_intermediates, or logit distillation (--kd-distill-type logit)"
            )
        base.trainable_module = _Precomputed()
        return to_teacher

    @property
    def plain_model(self) -> nn.Module:
        """The timm model in training, without any wrapper."""
        return unwrap_model(self.trainable_module).model

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Runs one forward pass and computes the losses.

        Args:
            input: Images, (B, C, H, W); with views, all first ones, then all second ones, and so on. NaFlex's dictionaries of
                patches are not supported.
            target: Class indices (B,), or distributions (B, K) from mixup or CutMix; of several labels, 0 to 1 for each class.

        Returns:
            ``loss`` = ``task_loss`` + ``sfr_weight`` * ``sfr_loss`` (scalars), ``output`` (B, K), and ``smoothing``,
            the batch's mean epsilon. With a base task, ``task_loss`` is its loss, and its terms keep their names with the
            prefix ``base_``. With views (`LossForm.splits`), ``task_loss`` = ``cls_loss`` + ``jsd_weight`` * ``jsd_loss``.
            If the model returns two logits (distilled training), they are averaged, as the model does at inference; a base
            task gets both.

        Raises:
            UserError: if `input` is not a tensor, or the model returns other outputs than these.
        """
        if not isinstance(input, Tensor):
            raise UserError(
                f"expected images as one tensor (B, C, H, W); got {type(input).__name__}; load the images of NaFlex models "
                "at one size, with timm's standard loader"
            )
        logits, nodes = self.trainable_module(input)
        extra: dict[str, Tensor] = {}
        if self.base is None:
            logits = self._single(logits)
            task_loss, epsilon, extra = self._classify(logits, target)
        else:
            stand_in = self.base.trainable_module
            stand_in.output = logits
            try:
                extra = self.base(input, target)
            finally:
                stand_in.output = None  # frees this step's graph
            logits = extra.get("output", logits)
            task_loss = extra["loss"]
            epsilon = self.weight.new_zeros(()) if self.smoothed is None else self.smoothed.epsilon
            extra = {f"base_{name}": value for name, value in extra.items() if name not in ("loss", "output")}
        sfr_loss = self._feature_loss(nodes, input) if nodes else self.weight.new_zeros(())
        return {
            "loss": task_loss + self.weight * sfr_loss,
            "output": logits,
            "task_loss": task_loss,
            "sfr_loss": sfr_loss,
            "sfr_weight": self.weight.clone(),  # the buffer changes with the epoch
            "smoothing": epsilon,
            **extra,
        }

    def _classify(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Returns the task loss, the mean eps, and with views the terms of `jsd_terms`, of which the labels see the first."""
        if not self.loss.splits:
            return *self.smoothing(logits, target), {}
        clean = len(logits) // self.loss.splits
        cls_loss, epsilon = self.smoothing(logits[:clean], target[:clean])
        terms = jsd_terms(cls_loss, logits, self.loss.splits)
        return terms["task_loss"], epsilon, terms

    def _feature_loss(self, nodes: list[Tensor], images: Tensor) -> Tensor:
        """Returns the feature loss of the taps' nodes, a scalar: 0 for images that leave too few locations to match."""
        if nodes[-1].shape[1] > 1:
            return self.feature_loss(nodes[:-1], nodes[-1])
        height, width = images.shape[-2:]
        if (height, width) not in self._unmatched and os.environ.get("RANK", "0") == "0":
            _logger.warning(f"warning: images of {height}x{width} pixels leave fewer than {MIN_NODES} locations at the taps, "
                            "chosen for larger ones: batches of them train without the feature loss")  # fmt: skip
        self._unmatched.add((height, width))
        # Not a constant: each parameter has to get a gradient, or DDP waits for that of the projection.
        return sum(((0.0 * x.float()).sum() for x in nodes[:-1]), self.weight.new_zeros(()))

    def _single(self, logits: Any) -> Tensor:
        """Returns one tensor of logits (B, K): the mean of the two in timm's distilled training."""
        if isinstance(logits, Tensor):
            return logits
        model = self.plain_model
        if not hasattr(model, "set_distilled_training") or not isinstance(logits, tuple):
            raise UserError(
                f"{model_name(model)} returns {len(logits)} outputs in training, expected one tensor of logits; create it "
                "without auxiliary classifiers (aux_logits=False)"
            )
        return torch.stack(logits).mean(0)

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Sets lambda and epsilon for epoch `epoch` (from 0) of `epochs`."""
        self.weight.fill_(weight_at(self.config, epoch, epochs) * self.balance)
        self.smoothing.set_epoch(epoch, epochs)

    def end_epoch(self) -> None:
        """Updates the class table from this epoch's predictions, summed over all processes."""
        self.smoothing.end_epoch()

    def get_sums(self) -> dict[str, Tensor]:
        """Returns the class table's sums over this process's images of the epoch so far."""
        own = {"sums": self.smoothing.sums, "counts": self.smoothing.counts}
        return own if self.smoothing.source == "classes" else {}

    def add_sums(self, sums: dict[str, Tensor]) -> None:
        """Adds the result of `get_sums` after a run is resumed within an epoch."""
        for name, own in self.get_sums().items():
            own += sums[name].to(own)

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> SFRTask:
        """Wraps the trainable module in DDP, for timm's own training script; with Accelerate, call `prepare` on it instead."""
        self.trainable_module = nn.parallel.DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Compiles the trainable module and returns the model for evaluation."""
        self.trainable_module = torch.compile(self.trainable_module, backend=backend, mode=mode, **compile_kwargs)
        return self.get_eval_model()

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """Returns the parameters for gradient clipping; adaptive clipping excludes the classifier, as in timm."""
        module = unwrap_model(self.trainable_module)
        parameters = list(module.model.parameters())[: -2 if exclude_head else None]
        return parameters + [p for _, extra in self._extras(module) for p in extra.parameters()]

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """Returns the plain timm model, or its moving average (EMA)."""
        module = self.get_trainable_module(ema=ema) if module is None else module
        return None if module is None else unwrap_model(module).model

    def create_evaluator(self, **kwargs: Any) -> Any:
        """Returns timm's evaluator of the base task, or of the labels: one an image, or several."""
        if self.base is not None:
            return self.base.create_evaluator(**kwargs)
        if self.loss.multi_label:
            return MultiLabelClassificationEvaluator(self.device, **kwargs)
        return super().create_evaluator(**kwargs)

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Returns the training state in addition to the model's weights: the class table and the projections."""
        module = self.get_trainable_module(ema=ema) if module is None else module
        if module is None:  # there is no average
            return {}
        module = unwrap_model(module)
        state = {"smoothing": self.smoothing.state_dict()}
        return state | {name: extra.state_dict() for name, extra in self._extras(module)}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Loads the result of `get_task_state`.

        Raises:
            RuntimeError: if there is no average to load into, or, with `strict`, a part is missing or left over.
        """
        if not state:
            return
        module = self.get_trainable_module(ema=ema) if module is None else module
        if module is None:
            raise RuntimeError("cannot load the state of the moving average before setup_ema()")
        module = unwrap_model(module)
        smoothing = dict(state["smoothing"])
        saved, table = smoothing.get("table"), self.smoothing.table
        if saved is not None and 0 in (len(saved), len(table)):  # resumed with another --sfr-smoothing-source
            smoothing["table"] = table
        self.smoothing.load_state_dict(smoothing, strict=strict)
        extras = dict(self._extras(module))
        wrong = sorted(extras.keys() ^ (state.keys() - {"smoothing"}))
        if strict and wrong:
            raise RuntimeError(f"the state and the task do not have the same parts: {', '.join(wrong)}")
        for name in extras.keys() & state.keys():
            extras[name].load_state_dict(state[name], strict=strict)

    @staticmethod
    def _extras(module: nn.Module) -> list[tuple[str, nn.Module]]:
        """Returns name and module of everything that is trained with the model and discarded afterwards."""
        extras = [(name, getattr(module, name)) for name in ("projection", "to_teacher")]
        return [(name, extra) for name, extra in extras if extra is not None]


class _Precomputed(nn.Module):
    """Replaces the model inside a base task: returns the output of the forward pass that already ran."""

    output: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return self.output
