"""`fit`: builds a run from its configuration and trains it."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from timm.layers import convert_sync_batchnorm, set_fast_norm
from timm.task import TrainingTask
from torch import nn
from torch.utils.data import DataLoader

from timm_sfr.config import DEFAULT_BATCH, DEFAULT_MODEL, RunConfig
from timm_sfr.data import summary
from timm_sfr.data.datasets import Split, open_splits
from timm_sfr.data.folders import SPLIT_FILE
from timm_sfr.data.loaders import TrainBatches, eval_loader
from timm_sfr.data.samples import BadImages, bad_images
from timm_sfr.data.transforms import Preprocessing, check_mode, create_mixup, img_mode, preprocessing
from timm_sfr.hub.card import base_model
from timm_sfr.hub.model_folder import Exporter, resolve_hub
from timm_sfr.hub.push import check_card, check_push, loading_line, published, push_to_hub
from timm_sfr.method.smoothing import default_warmup
from timm_sfr.method.task import EpochTask, SFRTask
from timm_sfr.models.files import CONFIG
from timm_sfr.models.loading import new_model
from timm_sfr.models.teacher import Teacher, changed, headline, open_teacher
from timm_sfr.runs.checkpoints import load_newest, set_aside
from timm_sfr.runs.folder import Workspace, open_workspace
from timm_sfr.runs.records import hardware, read_summary, term_names, versions
from timm_sfr.training.devices import explained, keep_freed_blocks, make_accelerator
from timm_sfr.training.forecast import Circumstances, advice
from timm_sfr.training.guards import ADVICE, FiniteGuard, Signals
from timm_sfr.training.optimizer import create_optimizer, create_schedule, learning_rate
from timm_sfr.training.recorder import Recorder
from timm_sfr.training.run_state import restore
from timm_sfr.training.tasks import create_task
from timm_sfr.training.trackers import Trackers
from timm_sfr.training.trainer import Trainer
from timm_sfr.utils.console import console_output, counted, show_log
from timm_sfr.utils.errors import UserError
from timm_sfr.utils.files import read_yaml
from timm_sfr.utils.processes import cores, on_main, one_at_a_time

JUMP = 2.0  # a rate that grows by more than this factor at a resume is said


@dataclass(frozen=True)
class Data:
    """A caller's own data for a run.

    Attributes:
        train: The training split.
        val: The validation split.
        batches: Makes the training batches; has the arguments of `TrainBatches`.
        val_loader: Makes the validation batches; has the arguments of `eval_loader`.
    """

    train: Split
    val: Split
    batches: Callable[..., Any] = TrainBatches
    val_loader: Callable[..., DataLoader] = eval_loader


# Makes a task from (model, input size (C, H, W), device).
TaskMaker = Callable[[nn.Module, tuple[int, int, int], torch.device], EpochTask]


def fit(
    config: RunConfig, resume: Path | None = None, *, task: TaskMaker | None = None, data: Data | None = None
) -> Path:
    """Trains as configured, or continues the run in `resume`; returns the run's folder.

    Args:
        config: The options.
        resume: The folder of a run to continue.
        task: Makes a task to train instead of SFR's or timm's plain one.
        data: Data to use instead of what the options name.

    Raises:
        UserError: if the options, the data or the model do not allow a run, or the loss is not finite.
    """
    trainer = None
    with console_output(config.engine.json_logs):
        try:
            trainer = prepare(config, resume, task=task, data=data)
            return _run(trainer, resume)
        except UserError:
            raise
        except (RuntimeError, ValueError, ConnectionError, EOFError) as error:
            explanation = explained(error, trainer.workspace.kept() if trainer is not None else "no run was started")
            if explanation is None:
                raise
            raise explanation from error


def prepare(
    config: RunConfig, resume: Path | None = None, *, task: TaskMaker | None = None, data: Data | None = None
) -> Trainer:
    """Returns a trainer with everything on the device and wrapped by Accelerate; the arguments are those of `fit`.

    Raises:
        UserError: as in `fit`.
    """
    show_log(config.engine.json_logs)
    accelerator = make_accelerator(config)
    if accelerator.device.type == "cpu":
        keep_freed_blocks()
    set_seed(config.engine.seed)
    set_fast_norm(config.model.fast_norm)
    reachable = config.hub.push_to_hub is not None and on_main(accelerator, lambda: check_push(config.hub))
    mode = config.data.input_img_mode or img_mode(config.model.in_chans or 3)
    if data is None:
        listed = None if resume is None else resume / SPLIT_FILE
        splits = one_at_a_time(accelerator, lambda: open_splits(config.data, mode, config.engine.seed, listed))
        data = Data(*splits)
    config, fitted = _fitted_batch(config, data.train, accelerator.num_processes)
    built = _build(config, accelerator, reachable, task, data, mode)
    batches = built.data.batches(built.data.train, config.data, config.aug, built.prep, config.engine.seed, accelerator)
    optimizer, schedule, lr = _optimisation(config, accelerator, built.task, len(batches))
    loader = built.data.val_loader(built.data.val, config.data, built.prep)
    if not built.data.val.streamed:
        loader = accelerator.prepare(loader)
    # Not the schedule: Accelerate would step it once per process.
    built.task.trainable_module, optimizer = accelerator.prepare(built.task.trainable_module, optimizer)
    engine = config.engine
    workspace = open_workspace(
        engine.output, engine.experiment, config.model.model or DEFAULT_MODEL, resume, accelerator
    )
    resolved = resolve(config, built.prep, built.num_classes, lr, accelerator.mixed_precision)
    facts = _facts(config, accelerator, built)
    bad = _bad_images(batches, loader, workspace)
    _announce(workspace, resolved, built, accelerator, facts["parameters"], schedule.epochs, fitted)
    ordered = not built.data.val.streamed or accelerator.num_processes == 1
    return Trainer(
        config=resolved,
        accelerator=accelerator,
        task=built.task,
        optimizer=optimizer,
        schedule=schedule,
        batches=batches,
        guard=FiniteGuard(accelerator, engine.on_nonfinite, term_names(built.teacher is not None)),
        workspace=workspace,
        recorder=Recorder(
            workspace, resolved, facts, schedule.epochs, built.exporter, built.data.train, built.data.val, ordered, bad
        ),
        trackers=Trackers(accelerator, workspace.run),
        signals=Signals(accelerator),
        val_loader=loader,
        prep=built.prep,
        mixup=create_mixup(config.aug, built.num_classes),
    )


def resolve(config: RunConfig, prep: Preprocessing, num_classes: int, lr: float, precision: str) -> RunConfig:
    """Returns `config` for args.yaml, with every default that depends on data, model or machine filled in."""
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


def _run(trainer: Trainer, resume: Path | None) -> Path:
    """Trains the remaining epochs, prints where the results are, and publishes them if the options ask for it."""
    say, run = trainer.workspace.say, trainer.workspace.run
    try:
        if resume is not None:
            _restore(trainer)
        elif trainer.config.optim.start_epoch:
            _start_late(trainer)
        state = trainer.state
        if state.epoch < trainer.end:
            trainer.recorder.start()
            options, resumed = trainer.config.flat(), resume is not None
            on_main(trainer.accelerator, lambda: trainer.trackers.start(options, state.epoch, resumed))
            _forecast(trainer)
        else:
            done = f"{counted(state.epoch, 'epoch')} of {trainer.schedule.epochs} done"
            more = "--epochs" if trainer.end == trainer.schedule.epochs else "--stop-epoch"
            say(f"nothing is left to train: {done}; to train longer, raise {more}")
        # Loading processes are forks: without this, each looks through all objects when it ends, and copies their pages.
        gc.collect()
        gc.freeze()
        trainer.fit()
    finally:
        gc.unfreeze()
        trainer.trackers.finish()
        trainer.workspace.release()
        trainer.accelerator.end_training()
    best, last = state.best, state.last
    if not best:
        metric = trainer.config.engine.eval_metric
        why = f"the validation's {metric} was never finite; {ADVICE}" if last else "none was validated; raise --epochs"
        raise UserError(f"epochs: all {state.epoch} epochs of {run} are done, but {why}")
    say(f"best val_top1 {best['val_top1']:.2f} at epoch {best['epoch'] + 1}, last {last['val_top1']:.2f}", "best",
        best=best, last=last)  # fmt: skip
    if trainer.workspace.main and not (run / "model" / CONFIG).is_file():
        raise UserError(
            f"resume: the model/ of {str(run)!r} is gone, and only a new best epoch writes it; raise --epochs"
        )
    say(f"the model is in {run / 'model'}")
    line = loading_line(run, f"local-dir:{run / 'model'}")
    say(f"load it with: {line}", "done", run=str(run), model=str(run / "model"), load=line)
    hub = trainer.config.hub
    if hub.push_to_hub is not None and trainer.workspace.main:
        # The other processes have finished, and their launcher waits for this one.
        url = push_to_hub(run, hub.push_to_hub, private=hub.private, revision=hub.revision)
        say(published(run, url, hub.push_to_hub, hub.revision), "published", url=url)
    return run


def _start_late(trainer: Trainer) -> None:
    """Makes a new run begin at ``--start-epoch``."""
    start = trainer.config.optim.start_epoch or 0
    if start >= trainer.end:
        raise UserError(f"start-epoch: expected less than {trainer.end}, the epochs of this run; got {start}")
    trainer.start_at(start)
    trainer.workspace.say(f"starting at epoch {start + 1} of {trainer.schedule.epochs}")


def _restore(trainer: Trainer) -> None:
    """Restores the newest intact checkpoint in the run's folder."""
    say, run = trainer.workspace.say, trainer.workspace.run
    saved = load_newest(run / "checkpoints", say)
    options = _changed_options(run / "args.yaml", trainer.config)
    try:
        restore(trainer, saved, str(run / "args.yaml"), trainer.config.engine.resume_opt)
    except UserError as error:
        if not options:
            raise
        raise UserError(str(error).replace("these options: ", f"these options: with {options}: ", 1)) from error
    state, done = trainer.state, trainer.state.epoch >= trainer.end
    if trainer.workspace.main:
        set_aside(run / "checkpoints", saved)
    state.rows = read_summary(run / "summary.csv", state.epoch)
    within = f", batch {state.step + 1}" if state.step else ""
    if not done:
        say(f"resuming {run} at epoch {state.epoch + 1}{within}")
    if options:
        say(f"{'these options change nothing now' if done else 'changed options'}: {options}")
    before, now = saved["optimizer"]["param_groups"][0]["lr"], trainer.optimizer.param_groups[0]["lr"]
    if not done and now > JUMP * before:
        say(f"warning: the learning rate rises from {before:.2g}, where the run stopped, to {now:.2g}: the schedule is another")
    other = changed(run / "metrics.json", trainer.recorder.facts)
    if other is not None:
        say(other)


def _changed_options(path: Path, config: RunConfig) -> str:
    """Returns the options that differ from those in a run's args.yaml, with both values; empty if there are none."""
    before, now = read_yaml(path), config.flat()
    differ = [name for name in now if name in before and before[name] != now[name] and name != "experiment"]
    return ", ".join(f"{name.replace('_', '-')} {now[name]} (was {before[name]})" for name in differ)


def _forecast(trainer: Trainer) -> None:
    """Prints warnings about the options, and how much is left to train."""
    config, say, epochs, state = trainer.config, trainer.workspace.say, trainer.end, trainer.state
    model, processes = trainer.exported_model(), trainer.accelerator.num_processes
    images = getattr(getattr(trainer.batches, "sampler", None), "count", config.data.train_num_samples)
    update = trainer.global_batch * config.optim.grad_accum_steps
    run = Circumstances(model, images, update, config.optim.lr or 0.0, epochs, cores(), processes)
    for line in advice(config, run):
        say(line)
    left, updates = epochs - state.epoch, trainer.updates_before(epochs, 0) - state.updates
    seen = len(trainer.batches) * trainer.global_batch
    say(f"{counted(seen, 'image')} an epoch, {counted(updates, 'update')} in {counted(left, 'epoch')}", "length", images=seen,
        updates=updates, epochs=left)  # fmt: skip


@dataclass(frozen=True)
class _Built:
    """The parts of a run before Accelerate wraps them."""

    data: Data
    model: nn.Module
    prep: Preprocessing
    num_classes: int
    teacher: Teacher | None
    exporter: Exporter | None
    task: EpochTask


def _build(
    config: RunConfig, accelerator: Any, reachable: bool, task: TaskMaker | None, data: Data, mode: str
) -> _Built:
    """Makes the model, its teacher and the task; checks early what could make a push fail."""
    num_classes = _num_classes(config, data.train)
    model = new_model(config.model, num_classes)
    prep = preprocessing(config.model, model)
    check_mode(mode, prep.input_size[0])
    names = _class_names(data.train, num_classes)
    teacher = open_teacher(config.teacher, num_classes, names, prep, accelerator, config.model.channels_last)
    if task is not None and teacher is not None:
        raise UserError("kd-model-name: a custom task cannot have a teacher; leave out one of the two")
    hub = resolve_hub(config, model, teacher.facts if teacher is not None else None)
    if reachable:
        on_main(accelerator, lambda: check_card(hub, config.flat()))
    exporter = Exporter(model, prep, names, hub) if accelerator.is_main_process else None
    size, device = prep.input_size, accelerator.device
    made = create_task(model, config.sfr, size, device, teacher) if task is None else task(model, size, device)
    if not isinstance(made, EpochTask):
        raise UserError(f"task: expected a timm_sfr.method.task.EpochTask; got {type(made).__name__}")
    return _Built(data, model, prep, num_classes, teacher, exporter, made)


def _bad_images(batches: Any, loader: DataLoader, workspace: Workspace) -> BadImages | None:
    """Sets the file for the lists of images that do not decode; returns the training images' list, or None."""
    found = [bad_images(getattr(batches, "samples", None)), bad_images(getattr(loader, "dataset", None))]
    for bad in found:
        if bad is not None:
            bad.write_to(workspace.run / "bad_images.txt")
    return found[0]


def _optimisation(config: RunConfig, accelerator: Any, task: TrainingTask, batches: int) -> tuple[Any, Any, float]:
    """Returns the optimizer of the task's trainable module, its schedule over epochs of `batches` batches, and the rate.

    First sets the module's memory layout, synchronised BatchNorm and moving average.
    """
    optim, module = config.optim, task.trainable_module
    if config.model.channels_last:
        module = module.to(memory_format=torch.channels_last)
    if config.engine.sync_bn and accelerator.num_processes > 1:
        module = convert_sync_batchnorm(module)
    if config.model.low_precision:
        module = module.to(getattr(torch, config.model.model_dtype or "float32"))
    task.trainable_module = module
    if optim.model_ema:
        if optim.model_ema_force_cpu and accelerator.num_processes > 1:
            raise UserError("model-ema-force-cpu: expected one process, because several average over the GPUs; got "
                            f"{accelerator.num_processes}; leave the option out")  # fmt: skip
        device = "cpu" if optim.model_ema_force_cpu else None
        task.setup_ema(decay=optim.model_ema_decay, use_warmup=optim.model_ema_warmup, device=device)
    lr = learning_rate(optim, config.data.batch_size * accelerator.num_processes * optim.grad_accum_steps)
    optimizer = create_optimizer(optim, module, lr)
    updates = -(-batches // optim.grad_accum_steps)
    return optimizer, create_schedule(optim, optimizer, updates, config.engine.eval_metric, config.engine.seed), lr


def _announce(
    workspace: Workspace,
    config: RunConfig,
    built: _Built,
    accelerator: Any,
    parameters: int,
    epochs: int,
    fitted: str,
) -> None:
    """Prints what the run trains, where it is written, and notes on the teacher, the batches and the taps."""
    opening = _headline(config, built, accelerator, parameters, epochs)
    started = {"run": str(workspace.run), "model": config.model.model, "parameters": parameters, "epochs": epochs}
    workspace.say(opening, "start", **started)
    if built.teacher is not None and built.teacher.warning is not None:
        workspace.say(built.teacher.warning)
    workspace.say(f"the run is written to {workspace.run}")
    train = built.data.train
    for line in summary.lines(train, built.data.val) if workspace.main else ():
        workspace.say(line)
    if fitted:
        workspace.say(fitted)
    if train.class_names and built.num_classes > len(train.class_names):
        workspace.say(f"note: the model has {built.num_classes} classes, and the data has images of {len(train.class_names)}")
    images = 0 if train.streamed else len(train.dataset)
    dropped = images % (config.data.batch_size * accelerator.num_processes)
    if dropped > 0.1 * max(1, images):
        workspace.say(f"note: each epoch drops {dropped} of {images} images, different ones each time, because they do not "
                      "fill a batch; a smaller --batch-size drops fewer")  # fmt: skip
    if isinstance(built.task, SFRTask) and built.task.plan is not None:
        workspace.say(str(built.task.plan))


def _facts(config: RunConfig, accelerator: Any, built: _Built) -> dict[str, Any]:
    """Returns the content of metrics.json other than the scores."""
    name, model, teacher = config.model.model or DEFAULT_MODEL, built.model, built.teacher
    images = summary.facts(built.data.train, built.data.val)
    return {
        "model": name,
        "dataset": config.data.dataset or config.data.data_dir,
        "sfr": config.sfr.enabled,
        "base_model": base_model(config.model.pretrained, name, model.pretrained_cfg),
        **({"teacher": teacher.facts} if teacher is not None else {}),
        **({"images": images} if images else {}),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": config.engine.seed,
        "hardware": hardware(accelerator.device, accelerator.num_processes),
        "mixed_precision": accelerator.mixed_precision,
        "versions": versions(),
    }


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _class_names(train: Split, num_classes: int) -> tuple[str, ...] | None:
    """Returns a name for each of the model's classes, if the data knows names; those that it lacks get a number."""
    known = train.class_names
    return None if not known else (*known, *(f"class {index}" for index in range(len(known), num_classes)))


def _fitted_batch(config: RunConfig, train: Split, processes: int) -> tuple[RunConfig, str]:
    """Returns the configuration with a batch size, and what to say of it if the images are too few for the default."""
    batch, said = config.data.batch_size, ""
    if batch is None:
        batch = DEFAULT_BATCH
        if not train.streamed and 0 < len(train.dataset) < batch * processes:
            batch = 1 << max(0, (len(train.dataset) // processes).bit_length() - 1)
            said = (f"batch size {batch}: the {len(train.dataset)} training images do not fill one of {DEFAULT_BATCH} on each "
                    "process; -b sets another")  # fmt: skip
    return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=batch)), said


def _num_classes(config: RunConfig, train: Split) -> int:
    """Returns the number of classes from the options, or else from the data."""
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


def _headline(config: RunConfig, built: _Built, accelerator: Any, parameters: int, epochs: int) -> str:
    """Returns one line that describes the run."""
    task, teacher = built.task, built.teacher
    if isinstance(task, SFRTask):
        sfr, smoothing = task.config, task.smoothing.describe(epochs)
        method = f"SFR (lambda {sfr.weight:g}, {sfr.matching}, {sfr.channels}; smoothing {smoothing})"
    elif config.sfr.enabled:
        method = type(task).__name__
    else:
        method = f"plain training (smoothing {config.sfr.plain_smoothing:g})"
    method += f", {headline(teacher)}" if teacher is not None else ""
    counts = "/".join("?" if split.streamed else str(len(split.dataset)) for split in (built.data.train, built.data.val))
    return (
        f"{config.model.model}, {parameters / 1e6:.2f} M parameters, {config.model.num_classes} classes, "
        f"{config.model.img_size} px; {counts} train/val images; {method}; {counted(config.optim.epochs, 'epoch')} on "
        f"{hardware(accelerator.device, accelerator.num_processes)}, {accelerator.mixed_precision} mixed precision"
    )
