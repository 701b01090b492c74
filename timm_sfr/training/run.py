"""`fit`: puts a run together from its configuration and trains it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from timm.layers import convert_sync_batchnorm
from timm.task import TrainingTask
from torch import nn
from torch.utils.data import DataLoader

from timm_sfr.config import DEFAULT_MODEL, RunConfig
from timm_sfr.data.datasets import Split, open_splits
from timm_sfr.data.loaders import TrainBatches, eval_loader
from timm_sfr.data.samples import bad_images
from timm_sfr.data.transforms import Preprocessing, check_mode, create_mixup, preprocessing
from timm_sfr.hub.card import base_model
from timm_sfr.hub.model_folder import Exporter, resolve_hub
from timm_sfr.hub.push import check_card, check_push, loading_line, published, push_to_hub
from timm_sfr.method.smoothing import default_warmup
from timm_sfr.method.task import SFRTask
from timm_sfr.models.files import CONFIG
from timm_sfr.models.loading import new_model
from timm_sfr.models.teacher import Teacher, changed, headline, open_teacher
from timm_sfr.runs.checkpoints import load_newest, set_aside
from timm_sfr.runs.folder import Workspace, open_workspace
from timm_sfr.runs.records import TEACHER_TERMS, hardware, read_summary, versions, write_args
from timm_sfr.training.devices import explained, keep_freed_blocks, make_accelerator
from timm_sfr.training.forecast import foresee
from timm_sfr.training.guards import TERMS, FiniteGuard, Signals
from timm_sfr.training.optimizer import create_optimizer, create_schedule, learning_rate
from timm_sfr.training.recorder import spared
from timm_sfr.training.run_state import restore
from timm_sfr.training.tasks import create_task
from timm_sfr.training.trainer import Trainer
from timm_sfr.utils.console import console_output, show_log
from timm_sfr.utils.errors import UserError
from timm_sfr.utils.processes import on_main, one_at_a_time


@dataclass(frozen=True)
class Parts:
    """What a caller may put in the place of the trainer's own parts, to train another task or on other batches.

    Attributes:
        splits: Opens the data, as `open_splits`.
        task: Makes the task, as `build.create_task`.
        batches: Makes the training batches, as `TrainBatches`.
        val_loader: Makes the validation batches, as `eval_loader`.
    """

    splits: Callable[..., tuple[Split, Split]] = open_splits
    task: Callable[..., TrainingTask] = create_task
    batches: Callable[..., Any] = TrainBatches
    val_loader: Callable[..., DataLoader] = eval_loader


def fit(config: RunConfig, resume: Path | None = None, parts: Parts | None = None) -> Path:
    """Trains as configured, or goes on with the run in `resume`; returns the run's folder.

    Raises:
        UserError: for anything in the options, the data or the model that fits no run, and for a non-finite loss.
    """
    with console_output(config.engine.json_logs):
        return _fit(config, resume, parts)


def _fit(config: RunConfig, resume: Path | None, parts: Parts | None) -> Path:
    begun: list[Trainer] = []
    try:
        begun.append(prepare(config, resume, parts))
        return _run(begun[0], resume)
    except UserError:
        raise
    except (RuntimeError, ValueError, ConnectionError, EOFError) as error:
        explanation = explained(error, begun[0].workspace.kept() if begun else "nothing was begun")
        if explanation is None:
            raise
        raise explanation from error


def _run(trainer: Trainer, resume: Path | None) -> Path:
    """Trains, or goes on; says where everything is, and publishes it where that is asked for."""
    say, run = trainer.workspace.say, trainer.workspace.run
    try:
        if resume is not None:
            state = load_newest(run / "checkpoints", say)
            restore(trainer, state)
            if trainer.workspace.main:
                set_aside(run / "checkpoints", state)
            trainer.rows = read_summary(run / "summary.csv", trainer.start_epoch)
            within = f", batch {trainer.start_step + 1}" if trainer.start_step else ""
            say(f"resuming {run} at epoch {trainer.start_epoch + 1}{within}")
            other = changed(run / "metrics.json", trainer.facts)
            if other is not None:
                say(other)
        left = trainer.start_epoch < trainer.schedule.epochs
        if not left:
            say(f"nothing is left to train: {trainer.start_epoch} epochs are done; to go on, raise --epochs")
        if trainer.accelerator.is_main_process and left:
            # Only now: options that do not fit the run to resume must not replace its own.
            with spared(trainer, "args.yaml"):
                write_args(run / "args.yaml", trainer.config.flat())
        if left:
            options, resumed = trainer.config.flat(), resume is not None
            on_main(trainer.accelerator, lambda: trainer.trackers.start(options, trainer.start_epoch, resumed))
            foresee(trainer)
        trainer.fit()
    finally:
        trainer.trackers.finish()
        trainer.workspace.release()
        trainer.accelerator.end_training()
    best, last = trainer.best, trainer.last
    if not best:
        raise UserError(f"epochs: {trainer.start_epoch} epochs of {run} are done, none was validated, and none is left to train; "
                        "raise --epochs")  # fmt: skip
    say(f"best val_top1 {best['val_top1']:.2f} at epoch {best['epoch'] + 1}, last {last['val_top1']:.2f}", "best",
        best=best, last=last)  # fmt: skip
    if trainer.workspace.main and not (run / "model" / CONFIG).is_file():
        raise UserError(
            f"resume: {str(run)!r} has no model/ any more, and it is written when an epoch is the best; raise --epochs"
        )
    say(f"the model is in {run / 'model'}")
    line = loading_line(run, f"local-dir:{run / 'model'}")
    say(f"load it with: {line}", "done", run=str(run), model=str(run / "model"), load=line)
    hub = trainer.config.hub
    if hub.push_to_hub is not None and trainer.workspace.main:
        # The other processes are done, and their launcher waits for this one.
        url = push_to_hub(run, hub.push_to_hub, private=hub.private, revision=hub.revision)
        say(published(run, url, hub.push_to_hub, hub.revision), "published", url=url)
    return run


def prepare(config: RunConfig, resume: Path | None = None, parts: Parts | None = None) -> Trainer:
    """Everything that `Trainer.fit` needs, on the device and wrapped by Accelerate.

    Raises:
        UserError: as `fit`.
    """
    parts = parts or Parts()
    show_log(config.engine.json_logs)
    accelerator = make_accelerator(config)
    if accelerator.device.type == "cpu":
        keep_freed_blocks()
    set_seed(config.engine.seed)
    reachable = config.hub.push_to_hub is not None and on_main(accelerator, lambda: check_push(config.hub))
    img_mode = config.data.input_img_mode or ("L" if config.model.in_chans == 1 else "RGB")
    train, val = one_at_a_time(accelerator, lambda: parts.splits(config.data, img_mode, config.engine.seed))
    num_classes = _num_classes(config, train)
    model = new_model(config.model, num_classes)
    prep = preprocessing(config.model, model)
    check_mode(img_mode, prep.input_size[0])
    device = accelerator.device
    names = train.class_names if train.class_names and len(train.class_names) == num_classes else None
    teacher = open_teacher(config.teacher, num_classes, names, prep, accelerator, config.model.channels_last)
    hub = resolve_hub(config, model, teacher.facts if teacher is not None else None)
    if reachable:
        on_main(accelerator, lambda: check_card(hub, config.flat()))
    exporter = Exporter(model, prep, names, hub) if accelerator.is_main_process else None
    task = parts.task(model, config.sfr, prep.input_size, device, teacher)
    batches = parts.batches(train, config.data, config.aug, prep, config.engine.seed, accelerator)

    optimizer, schedule, lr = _optimisation(config, accelerator, task, len(batches))
    loader = parts.val_loader(val, config.data, prep)
    if not val.streamed:
        loader = accelerator.prepare(loader)
    # The schedule stays out of this: Accelerate would step it once per process.
    task.trainable_module, optimizer = accelerator.prepare(task.trainable_module, optimizer)

    workspace = open_workspace(
        config.engine.output, config.engine.experiment, config.model.model or DEFAULT_MODEL, resume, accelerator
    )
    for samples in (getattr(batches, "samples", None), getattr(loader, "dataset", None)):
        bad = bad_images(samples)
        if bad is not None:
            bad.write_to(workspace.run / "bad_images.txt")
    resolved = resolve(config, prep, num_classes, lr, accelerator.mixed_precision)
    parameters = sum(p.numel() for p in model.parameters())
    opening = _headline(resolved, task, accelerator, train, val, parameters, teacher, schedule.epochs)
    started = {"run": str(workspace.run), "model": resolved.model.model, "parameters": parameters, "epochs": schedule.epochs}
    workspace.say(opening, "start", **started)
    _announce(workspace, config, task, train, teacher, accelerator.num_processes)
    return Trainer(
        config=resolved,
        accelerator=accelerator,
        workspace=workspace,
        task=task,
        optimizer=optimizer,
        schedule=schedule,
        batches=batches,
        val_loader=loader,
        val_images=val.dataset,
        prep=prep,
        mixup=create_mixup(config.aug, num_classes),
        guard=FiniteGuard(
            accelerator, config.engine.on_nonfinite, TERMS if teacher is None else TERMS + TEACHER_TERMS
        ),
        signals=Signals(accelerator),
        exporter=exporter,
        facts=_facts(config, accelerator, model, parameters, teacher),
    )


def _optimisation(config: RunConfig, accelerator: Any, task: TrainingTask, batches: int) -> tuple[Any, Any, float]:
    """The optimizer of what `task` trains, its schedule over epochs of `batches` batches, and the rate.

    Before that, what is trained gets its memory layout, its synchronised statistics and its moving average.
    """
    optim, module = config.optim, task.trainable_module
    if config.model.channels_last:
        module = module.to(memory_format=torch.channels_last)
    if config.engine.sync_bn and accelerator.num_processes > 1:
        module = convert_sync_batchnorm(module)
    task.trainable_module = module
    if optim.model_ema:
        task.setup_ema(decay=optim.model_ema_decay, use_warmup=optim.model_ema_warmup)
    lr = learning_rate(optim, config.data.batch_size * accelerator.num_processes * optim.grad_accum_steps)
    optimizer = create_optimizer(optim, module, lr)
    updates = -(-batches // optim.grad_accum_steps)
    return optimizer, create_schedule(optim, optimizer, updates, config.engine.eval_metric), lr


def _announce(
    workspace: Workspace, config: RunConfig, task: TrainingTask, train: Split, teacher: Teacher | None, processes: int
) -> None:
    """Says where the run is written, and what of it deserves a word before it starts."""
    if teacher is not None and teacher.warning is not None:
        workspace.say(teacher.warning)
    workspace.say(f"the run is written to {workspace.run}")
    images = 0 if train.streamed else len(train.dataset)
    dropped = images % (config.data.batch_size * processes)
    if dropped > 0.1 * max(1, images):
        workspace.say(f"note: {dropped} of {images} images fill no batch and sit out each epoch, others each time; "
                      "with a smaller --batch-size fewer do")  # fmt: skip
    if getattr(task, "plan", None) is not None:
        workspace.say(str(task.plan))


def _facts(
    config: RunConfig, accelerator: Any, model: nn.Module, parameters: int, teacher: Teacher | None
) -> dict[str, Any]:
    """What metrics.json says of a run besides its scores."""
    name = config.model.model or DEFAULT_MODEL
    return {
        "model": name,
        "dataset": config.data.dataset or config.data.data_dir,
        "sfr": config.sfr.enabled,
        "base_model": base_model(config.model.pretrained, name, model.pretrained_cfg),
        **({"teacher": teacher.facts} if teacher is not None else {}),
        "parameters": parameters,
        "seed": config.engine.seed,
        "hardware": hardware(accelerator.device, accelerator.num_processes),
        "mixed_precision": accelerator.mixed_precision,
        "versions": versions(),
    }


def resolve(config: RunConfig, prep: Preprocessing, num_classes: int, lr: float, precision: str) -> RunConfig:
    """`config` with every default that depended on data, model or machine written out, as args.yaml keeps it."""
    epochs = config.optim.epochs
    fifth = default_warmup(epochs)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model,
            model=config.model.model or DEFAULT_MODEL,
            num_classes=num_classes,
            img_size=config.model.img_size
            or (prep.input_size[1] if prep.input_size[1] == prep.input_size[2] else None),
            in_chans=prep.input_size[0],
            mean=prep.mean,
            std=prep.std,
            interpolation=prep.interpolation,
            crop_pct=prep.crop_pct,
        ),
        data=dataclasses.replace(
            config.data,
            validation_batch_size=config.data.validation_batch_size or config.data.batch_size,
            input_img_mode=config.data.input_img_mode or prep.img_mode,
        ),
        optim=dataclasses.replace(config.optim, lr=lr, warmup_epochs=_or(config.optim.warmup_epochs, fifth)),
        sfr=dataclasses.replace(
            config.sfr,
            warmup_epochs=_or(config.sfr.warmup_epochs, fifth),
        ),
        engine=dataclasses.replace(config.engine, mixed_precision=precision),
    )


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _num_classes(config: RunConfig, train: Split) -> int:
    """As given, or as in the data."""
    if config.model.num_classes is None:
        if not train.class_names:
            raise UserError("num-classes: the dataset does not say how many classes it has; give --num-classes")
        if len(train.class_names) < 2:
            raise UserError(
                f"data: expected at least 2 classes; got {len(train.class_names)}: {list(train.class_names)}"
            )
        return len(train.class_names)
    if train.class_names and len(train.class_names) > config.model.num_classes:
        raise UserError(
            f"num-classes: the data has {len(train.class_names)} classes; got {config.model.num_classes}; leave the option out"
        )
    return config.model.num_classes


def _headline(
    config: RunConfig,
    task: TrainingTask,
    accelerator: Any,
    train: Split,
    val: Split,
    parameters: int,
    teacher: Teacher | None,
    epochs: int,
) -> str:
    if isinstance(task, SFRTask):
        sfr, smoothing = task.config, task.smoothing.describe(epochs)
        method = f"SFR (lambda {sfr.weight:g}, {sfr.matching}, {sfr.channels}; smoothing {smoothing})"
    elif config.sfr.enabled:
        method = type(task).__name__
    else:
        method = f"plain training (smoothing {config.sfr.plain_smoothing:g})"
    method += f", {headline(teacher)}" if teacher is not None else ""
    counts = "/".join("?" if split.streamed else str(len(split.dataset)) for split in (train, val))
    return (
        f"{config.model.model}, {parameters / 1e6:.2f} M parameters, {config.model.num_classes} classes, "
        f"{config.model.img_size} px; {counts} train/val images; {method}; {config.optim.epochs} epochs on "
        f"{hardware(accelerator.device, accelerator.num_processes)}, {accelerator.mixed_precision} mixed precision"
    )
