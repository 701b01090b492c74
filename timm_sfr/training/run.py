"""`fit`: builds a run from its configuration and trains it."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from timm.layers import convert_sync_batchnorm, set_fast_norm
from timm.task import TrainingTask
from torch import nn
from torch.utils.data import DataLoader

from timm_sfr.config import AUTO, DEFAULT_BATCH, DEFAULT_MODEL, RunConfig
from timm_sfr.data import summary
from timm_sfr.data.class_weights import resolve_class_weights
from timm_sfr.data.datasets import Split, open_splits, open_test
from timm_sfr.data.folders import SPLIT_FILE
from timm_sfr.data.loaders import TrainBatches, eval_loader
from timm_sfr.data.samples import BadImages, bad_images
from timm_sfr.data.sizes import SizeSchedule
from timm_sfr.data.transforms import Preprocessing, check_cutmix, check_mode, create_mixup, img_mode, preprocessing
from timm_sfr.hub.card import base_model
from timm_sfr.hub.model_folder import Exporter, resolve_hub
from timm_sfr.hub.preflight import check_card, check_push
from timm_sfr.hub.push import loading_line, published, push_to_hub
from timm_sfr.method.config import LossForm
from timm_sfr.method.probe import check_input
from timm_sfr.method.smoothing import warmup_epochs
from timm_sfr.method.task import EpochTask, SFRTask
from timm_sfr.models.files import CONFIG, made_up_name
from timm_sfr.models.loading import new_model
from timm_sfr.models.split_bn import split_batchnorm, without_auxiliary
from timm_sfr.models.teacher import Teacher, changed, headline, open_teacher
from timm_sfr.runs.checkpoints import load_newest, set_aside
from timm_sfr.runs.folder import Workspace, open_workspace
from timm_sfr.runs.records import hardware, read_summary, term_names, versions
from timm_sfr.runs.scores import PERCENT, shown_percents
from timm_sfr.training.batch_size import MOST, has_own_memory, power_of_two, probe_batch
from timm_sfr.training.devices import explained_errors, keep_freed_blocks, make_accelerator
from timm_sfr.training.forecast import Circumstances, advice
from timm_sfr.training.guards import ADVICE, FiniteGuard, Signals
from timm_sfr.training.optimizer import base_rate, create_optimizer, create_schedule, learning_rate
from timm_sfr.training.recorder import Recorder
from timm_sfr.training.run_state import Learner, RunState, restore
from timm_sfr.training.step import augment, image_dtype
from timm_sfr.training.tasks import create_task
from timm_sfr.training.trackers import Trackers
from timm_sfr.training.trainer import Trainer
from timm_sfr.utils.console import console_output, counted, show_log, sides
from timm_sfr.utils.errors import UserError
from timm_sfr.utils.files import read_json, read_yaml
from timm_sfr.utils.processes import cores, on_main, one_at_a_time

PART_NAMES = ("train", "val", "test")
JUMP = 2.0  # warn if a resume raises the learning rate by more than this factor


@dataclass(frozen=True)
class Data:
    """A caller's own data for a run.

    Attributes:
        train: The training split.
        val: The validation split.
        test: The test split, if there is one.
        batches: Makes the training batches; has the arguments of `TrainBatches`.
        val_loader: Makes the batches of validation and test; has the arguments of `eval_loader`.
    """

    train: Split
    val: Split
    test: Split | None = field(default=None, kw_only=True)
    batches: Callable[..., Any] = TrainBatches
    val_loader: Callable[..., DataLoader] = eval_loader

    @property
    def splits(self) -> tuple[Split, Split, Split | None]:
        """The splits: train, val and test."""
        return self.train, self.val, self.test


# Makes a task from (model, input size (C, H, W), device).
TaskMaker = Callable[[nn.Module, tuple[int, int, int], torch.device], EpochTask]


def fit(config: RunConfig, resume: Path | None = None, *, task: TaskMaker | None = None, data: Data | None = None) -> Path:
    """Trains as configured, or continues the run in `resume`; returns the run's folder.

    Args:
        config: The options.
        resume: The folder of a run to continue.
        task: Makes a task to train instead of SFR's or timm's plain one.
        data: Data to use instead of what the options name.

    Raises:
        UserError: if the options, the data or the model do not allow a run, or the loss is not finite.
    """
    trainer: Trainer | None = None

    def kept() -> str:
        return trainer.workspace.kept() if trainer is not None else "no run was started"

    with console_output(config.engine.json_logs), explained_errors(kept):
        trainer = prepare(config, resume, task=task, data=data)
        return _run(trainer, resume)


def prepare(config: RunConfig, resume: Path | None = None, *, task: TaskMaker | None = None, data: Data | None = None) -> Trainer:
    """Returns a trainer with everything on the device and wrapped by Accelerate; arguments and errors are those of `fit`."""
    if config.engine.tta > 1:
        raise UserError("tta: training validates every image as it is; leave the option out, and score the finished run with: "
                        f"timm-sfr validate RUN --tta {config.engine.tta}")  # fmt: skip
    if resume is not None and task is None and read_json(resume / "metrics.json").get("custom_task"):
        raise UserError(
            f"resume: {resume} was trained with a task of its own; continue it in Python, with fit(config, RUN, task=...)"
        )
    accelerator = start(config)
    reachable = config.hub.push_to_hub is not None and on_main(accelerator, lambda: check_push(config.hub))
    learner, built, fitted = assemble(config, accelerator, resume, task=task, data=data, reachable=reachable)
    resolved, epochs, engine = learner.config, learner.schedule.epochs, config.engine
    loader = _loader(built, built.data.val, resolved, accelerator)
    workspace = open_workspace(engine.output, engine.experiment, config.model.model or DEFAULT_MODEL, resume, accelerator)
    facts = _facts(config, accelerator, built, learner.schedule.epochs)
    bad = _list_bad_images(getattr(learner.batches, "samples", None), workspace)
    _list_bad_images(loader.dataset, workspace)
    _announce(workspace, learner, built, facts["parameters"], fitted)
    ordered = not built.data.val.streamed or accelerator.num_processes == 1
    return Trainer(
        **vars(learner),
        workspace=workspace,
        recorder=Recorder(workspace, resolved, facts, epochs, built.exporter, *built.data.splits, ordered, bad),
        trackers=Trackers(accelerator, workspace.run),
        signals=Signals(accelerator),
        val_loader=loader,
        prep=built.prep,
        mixup=create_mixup(config.aug, built.num_classes, config.data.multilabel),
        test_loader=None if built.data.test is None else lambda: _test_loader(built, resolved, accelerator, workspace),
    )


def _open(config: RunConfig, mode: str, listed: Path | None) -> Data:
    """Opens the splits that the options name."""
    train, val = open_splits(config.data, mode, config.engine.seed, listed)
    return Data(train, val, test=open_test(config.data, mode, config.engine.seed, train.class_names))


def start(config: RunConfig) -> Any:
    """Starts the log, the device and the random numbers; returns Accelerate's object, with the errors of `make_accelerator`."""
    show_log(config.engine.json_logs)
    accelerator = make_accelerator(config)
    if accelerator.device.type == "cpu":
        keep_freed_blocks()
    set_seed(config.engine.seed)
    set_fast_norm(config.model.fast_norm)
    return accelerator


def assemble(
    config: RunConfig,
    accelerator: Any,
    resume: Path | None = None,
    *,
    task: TaskMaker | None = None,
    data: Data | None = None,
    reachable: bool = False,
) -> tuple[Learner, Built, str]:
    """Makes everything that learns, on the device and wrapped by Accelerate, without a folder for the run.

    `accelerator` is from `start`. If the run is to be published and the Hub is `reachable`, the card is checked. The other
    arguments and the errors are those of `fit`.

    Returns:
        What learns, with the resolved options; the parts that it is made of; and what to say of the batch size.
    """
    mode = config.data.input_img_mode or img_mode(config.model.in_chans or 3)
    if data is None:
        listed = None if resume is None else resume / SPLIT_FILE
        opened = partial(_open, config, mode, listed)
        data = opened() if config.data.listed else one_at_a_time(accelerator, opened)
    auto = config.data.batch_size == AUTO
    config, fitted = _fitted_batch(config, data.train, accelerator.num_processes)
    built = _build(config, accelerator, reachable, task, data, mode)
    if auto:
        config, fitted = _probed_batch(config, accelerator, built, fitted)
    sizes = _sizes(config, accelerator, built)
    changing = {} if sizes is None else {"sizes": sizes}
    batches = built.data.batches(
        built.data.train, config.data, config.aug, built.prep, config.engine.seed, accelerator, **changing
    )
    if sizes is not None and isinstance(built.task, SFRTask):
        built.task.smoothing.passes = len(batches) * sizes.average_batch * sizes.processes / len(data.train.dataset)
    mean_batch = config.data.batch_size if sizes is None else sizes.average_batch
    optimizer, schedule, lr = _optimisation(config, accelerator, built.task, len(batches), mean_batch)
    # Not the schedule: Accelerate would step it once per process.
    built.task.trainable_module, optimizer = accelerator.prepare(built.task.trainable_module, optimizer)
    learner = Learner(
        config=resolve(config, built.prep, built.num_classes, lr, accelerator.mixed_precision, schedule.epochs),
        accelerator=accelerator,
        task=built.task,
        optimizer=optimizer,
        schedule=schedule,
        batches=batches,
        guard=FiniteGuard(accelerator, config.engine.on_nonfinite, term_names(built.teacher is not None, config.loss.jsd_loss)),
    )
    return learner, built, fitted


def resolve(config: RunConfig, prep: Preprocessing, num_classes: int, lr: float, precision: str, scheduled: int) -> RunConfig:
    """Returns `config` for args.yaml, with every default that depends on data, model or machine filled in.

    The warm-up of the learning rate is a share of the options' epochs, and that of SFR a share of the `scheduled` ones, with
    cycles and cooldown.
    """
    epochs = config.optim.epochs
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model,
            model=config.model.model or DEFAULT_MODEL,
            num_classes=num_classes,
            img_size=None,
            input_size=prep.input_size,  # of a square, the section sets img_size in its place
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
        optim=dataclasses.replace(config.optim, lr=lr, warmup_epochs=warmup_epochs(epochs, config.optim.warmup_epochs)),
        sfr=dataclasses.replace(config.sfr, warmup_epochs=warmup_epochs(scheduled, config.sfr.warmup_epochs)),
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
        if not trainer.done:
            trainer.recorder.start()
            options, resumed = trainer.config.flat(), resume is not None
            on_main(trainer.accelerator, lambda: trainer.trackers.start(options, state.epoch, resumed))
            _forecast(trainer)
        else:
            done = f"{counted(state.epoch, 'epoch')} of {trainer.schedule.epochs} done"
            early = state.epoch < trainer.end
            done += f", stopped early by --patience {trainer.config.optim.patience}" if early else ""
            more = "patience" if early else "epochs" if trainer.end == trainer.schedule.epochs else "stop-epoch"
            say(f"nothing is left to train: {done}; to train longer, raise --{more}")
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
    task = trainer.config.data.task
    main = f"val_{PERCENT[task][0]}"
    say(f"best {main} {best[main]:.2f} at epoch {best['epoch'] + 1}, last {last[main]:.2f}", "best", best=best, last=last)
    if state.test:
        say(_test_line(state.test, task, trainer.config.model.num_classes), "test", test=state.test)
    if trainer.workspace.main and not (run / "model" / CONFIG).is_file():
        raise UserError(f"resume: the model/ of {str(run)!r} is gone, and only a new best epoch writes it; raise --epochs")
    say(f"the model is in {run / 'model'}")
    if trainer.workspace.main:  # the other hosts may not have the folder
        line = loading_line(run, f"local-dir:{(run / 'model').absolute()}")  # for any folder that it is used in
        say(f"load it with: {line}", "done", run=str(run), model=str(run / "model"), load=line)
    hub = trainer.config.hub
    if hub.push_to_hub is not None and trainer.workspace.main:
        # The other processes have finished, and their launcher waits for this one.
        url = push_to_hub(run, hub.push_to_hub, private=hub.private, revision=hub.revision)
        say(published(run, url, hub.push_to_hub, hub.revision), "published", url=url)
    return run


def _start_late(trainer: Trainer) -> None:
    """Makes a new run begin at ``--start-epoch`` in the schedule."""
    start = trainer.config.optim.start_epoch
    if start >= trainer.end:
        raise UserError(f"start-epoch: expected less than {trainer.end}, the epochs of this run; got {start}")
    trainer.state = RunState(epoch=start, updates=trainer.updates_before(start, 0))
    trainer.schedule.resume(start, trainer.state.updates, None)
    trainer.workspace.say(f"starting at epoch {start + 1} of {trainer.schedule.epochs}")


def _restore(trainer: Trainer) -> None:
    """Restores the newest intact checkpoint in the run's folder."""
    say, run = trainer.workspace.say, trainer.workspace.run
    _check_opt(run / "args.yaml", trainer.config)
    saved = load_newest(run / "checkpoints", say)
    options = _changed_options(run / "args.yaml", trainer.config)
    try:
        restore(trainer, saved, str(run / "args.yaml"), trainer.config.engine.resume_opt)
    except UserError as error:
        if not options:
            raise
        raise UserError(str(error).replace("these options: ", f"these options: with {options}: ", 1)) from error
    state, done = trainer.state, trainer.done
    state.test = on_main(trainer.accelerator, lambda: trainer.recorder.recorded_test(state))
    if done:
        options = _changed_options(run / "args.yaml", trainer.config, ("test_split", "test_num_samples"))
    if trainer.workspace.main:
        set_aside(run / "checkpoints", saved)
    state.rows = read_summary(run / "summary.csv", state.epoch)
    within = f", batch {state.step + 1}" if state.step else ""
    if not done:
        say(f"resuming {run} at epoch {state.epoch + 1}{within}")
    if options:
        say(f"{'these options change nothing now' if done else 'changed options'}: {options}")
    before, now = (base_rate(groups) for groups in (saved["optimizer"]["param_groups"], trainer.optimizer.param_groups))
    if not done and now > JUMP * before:
        say(f"warning: the learning rate rises from {before:.2g}, where the run stopped, to {now:.2g}: the schedule is another")
    other = changed(run / "metrics.json", trainer.recorder.facts)
    if other is not None:
        say(other)


def _check_opt(path: Path, config: RunConfig) -> None:
    """Raises UserError if a run's args.yaml names another optimizer, whose state cannot be continued."""
    before, now = read_yaml(path).get("opt", config.optim.opt), config.optim.opt
    if before != now and config.engine.resume_opt:
        raise UserError(f"opt: expected {before!r}, the optimizer of the run to resume; got {now!r}; leave the option out, or "
                        "give --no-resume-opt to begin with a new optimizer")  # fmt: skip


def _changed_options(path: Path, config: RunConfig, but: Sequence[str] = ()) -> str:
    """Returns the options that differ from those in a run's args.yaml, without those in `but`, with both values."""
    before, now, but = read_yaml(path), config.flat(), ("experiment", *but)
    differ = [name for name in now if name in before and before[name] != now[name] and name not in but]
    return ", ".join(f"{name.replace('_', '-')} {now[name]} (was {before[name]})" for name in differ)


def _forecast(trainer: Trainer) -> None:
    """Prints warnings about the options, and how much is left to train."""
    config, say, epochs, state = trainer.config, trainer.workspace.say, trainer.end, trainer.state
    model, processes = trainer.exported_model(), int(os.environ.get("LOCAL_WORLD_SIZE", trainer.accelerator.num_processes))
    left, updates = epochs - state.epoch, trainer.updates_before(epochs, 0) - state.updates
    seen = trainer.images_before(state.epoch, len(trainer.batches))
    update = round(trainer.mean_batch * config.optim.grad_accum_steps)
    run = Circumstances(model, seen, update, config.optim.lr or 0.0, epochs, cores(), processes, trainer.accelerator.device.type)
    for line in advice(config, run):
        say(line)
    say(f"{counted(seen, 'image')} an epoch, {counted(updates, 'update')} in {counted(left, 'epoch')}", "length", images=seen,
        updates=updates, epochs=left)  # fmt: skip


@dataclass(frozen=True)
class Built:
    """The parts of a run before Accelerate wraps them."""

    data: Data
    model: nn.Module
    prep: Preprocessing
    num_classes: int
    teacher: Teacher | None
    exporter: Exporter | None
    task: EpochTask
    loss: LossForm
    custom: bool  # whether the task is the caller's, which need not follow the options of SFR


def _build(config: RunConfig, accelerator: Any, reachable: bool, task: TaskMaker | None, data: Data, mode: str) -> Built:
    """Makes the model, its teacher and the task; checks early what could make a push fail."""
    num_classes = _num_classes(config, data.train)
    model = new_model(config.model, num_classes)
    prep = preprocessing(config.model, model)
    check_mode(mode, prep.input_size[0])
    check_cutmix(config.aug, (*prep.input_size[1:], *(config.sizes.train_img_sizes or ())))
    names = _class_names(data.train, num_classes)
    teacher = open_teacher(config.teacher, num_classes, names, prep, accelerator, config.model.channels_last)
    if task is not None and teacher is not None:
        raise UserError("kd-model-name: a custom task cannot have a teacher; leave out one of the two")
    hub = resolve_hub(config, model, teacher.facts if teacher is not None else None, config.sfr.enabled and task is None)
    if reachable:
        on_main(accelerator, lambda: check_card(hub, config.flat()))
    exporter = Exporter(model, prep, names, hub, config.data.multilabel) if accelerator.is_main_process else None
    if config.model.split_bn:  # after the exporter's copy, which has the plain model's keys
        model = split_batchnorm(model, max(2, config.aug.aug_splits))
    size, device = prep.input_size, accelerator.device
    loss = config.loss.form(
        config.aug.aug_splits,
        resolve_class_weights(config.loss.class_weights, data.train, num_classes, names),
        config.data.multilabel,
    )
    if task is not None and loss != LossForm():
        raise UserError(f"loss: a custom task computes its own; leave out {loss.describe()}")
    made = create_task(model, config.sfr, size, device, teacher, loss) if task is None else task(model, size, device)
    if isinstance(made, SFRTask):
        made.smoothing.passes = max(1.0, config.data.epoch_repeats)
        reader = getattr(data.train.dataset, "reader", None)
        known = config.data.train_num_samples or getattr(reader, "num_samples", None)
        images = known if data.train.streamed else len(data.train.dataset)
        if images:  # None of a stream that does not say its number
            made.smoothing.set_capacity(_count(model), images)
    if not isinstance(made, EpochTask):
        raise UserError(f"task: expected a timm_sfr.method.task.EpochTask; got {type(made).__name__}")
    if config.model.low_precision:
        made.trainable_module.to(image_dtype(config.model))
    return Built(data, model, prep, num_classes, teacher, exporter, made, loss, task is not None)


def _count(model: nn.Module) -> int:
    """Returns the number of the model's parameters, of split BatchNorm only the exported ones."""
    return sum(p.numel() for p in without_auxiliary(dict(model.named_parameters())).values())


def _loader(built: Built, split: Split, config: RunConfig, accelerator: Any) -> DataLoader:
    """Returns the batches of the validation or the test split; each process reads its part of an indexed one."""
    loader = built.data.val_loader(split, config.data, built.prep)
    return loader if split.streamed else accelerator.prepare(loader)


def _test_loader(built: Built, config: RunConfig, accelerator: Any, workspace: Workspace) -> DataLoader:
    """Returns the batches of the test split, made only when they are needed."""
    loader = _loader(built, built.data.test, config, accelerator)
    _list_bad_images(loader.dataset, workspace)
    return loader


def _test_line(test: dict[str, Any], task: str, num_classes: int | None) -> str:
    """Returns the line with the test scores, which ends a run."""
    percents = ", ".join(f"{name} {test[name]:.2f}" for name in shown_percents(task, num_classes))
    ece = f", ECE {test['ece']:.4f}" if "ece" in test else ""
    return (f"test {percents}, loss {test['loss']:.4f}{ece} on {test['images']} images of "
            f"split {test['split']!r}, scored once with the weights of epoch {test['epoch'] + 1}")  # fmt: skip


def _sizes(config: RunConfig, accelerator: Any, built: Built) -> SizeSchedule | None:
    """Returns the schedule of image sizes, None for images of one size; raises UserError if the data or the model lack them."""
    train, sizes = built.data.train, config.sizes.train_img_sizes
    if sizes is None:
        return None
    if train.streamed:
        raise UserError("train_img_sizes: expected a dataset with an index (a folder, a tar, torch/, hfds/); this one is a "
                        "stream, which does not say which images a batch has; leave the option out")  # fmt: skip
    for size in sizes:
        try:
            check_input(built.model, built.prep.at(size).input_size)
        except UserError as error:
            fixed = getattr(built.model, "dynamic_img_size", True) is False
            hint = "give --model-kwargs dynamic_img_size=True" if fixed else "use a model that takes images of any size"
            raise UserError(f"train_img_sizes: {error}; {hint}") from error
    count, batch = int(len(train.dataset) * max(1, config.data.epoch_repeats)), config.data.batch_size
    epochs, seed, processes = config.optim.epochs, config.engine.seed, accelerator.num_processes
    return SizeSchedule.of(config.sizes, batch, count, epochs, seed, processes)


def _list_bad_images(samples: Any, workspace: Workspace) -> BadImages | None:
    """Sets the file for the list of samples that do not decode; returns the list, or None without one."""
    bad = bad_images(samples)
    if bad is not None:
        bad.write_to(workspace.run / "bad_images.txt")
    return bad


def _optimisation(config: RunConfig, accelerator: Any, task: TrainingTask, batches: int, batch: float) -> tuple[Any, Any, float]:
    """Returns the optimizer of the task's trainable module, its schedule over epochs of `batches` batches, and the rate.

    `batch` is the mean batch size of a process. First sets the module's memory layout, synchronised BatchNorm and moving
    average.
    """
    optim, module = config.optim, task.trainable_module
    if config.model.channels_last:
        module = module.to(memory_format=torch.channels_last)
    if config.engine.sync_bn and accelerator.num_processes > 1:
        if accelerator.device.type == "cpu":
            raise UserError(
                "sync-bn: expected GPUs, because PyTorch has no synchronised BatchNorm for CPUs; leave the option out"
            )
        module = convert_sync_batchnorm(module)
    task.trainable_module = module
    if optim.model_ema:
        if optim.model_ema_force_cpu and accelerator.num_processes > 1:
            raise UserError("model-ema-force-cpu: expected one process, because several average over the GPUs; got "
                            f"{accelerator.num_processes}; leave the option out")  # fmt: skip
        device = "cpu" if optim.model_ema_force_cpu else None
        # In float32: 16 bits are too coarse for its small steps, and timm rounds those by random numbers that no checkpoint has.
        kind = {"dtype": torch.float32} if config.model.low_precision else {}
        task.setup_ema(decay=optim.model_ema_decay, use_warmup=optim.model_ema_warmup, device=device, **kind)
    lr = learning_rate(optim, batch * accelerator.num_processes * optim.grad_accum_steps)
    optimizer = create_optimizer(optim, module, lr)
    updates = -(-batches // optim.grad_accum_steps)
    return optimizer, create_schedule(optim, optimizer, updates, config.engine.eval_metric, config.engine.seed), lr


def _announce(workspace: Workspace, learner: Learner, built: Built, parameters: int, fitted: str) -> None:
    """Prints what the run trains, where it is written, and notes on the teacher, the batches, the sizes and the taps."""
    config, epochs = learner.config, learner.schedule.epochs
    opening = _headline(config, built, learner.accelerator, parameters, epochs)
    started = {"run": str(workspace.run), "model": config.model.model, "parameters": parameters, "epochs": epochs}
    workspace.say(opening, "start", **started)
    if built.teacher is not None and built.teacher.warning is not None:
        workspace.say(built.teacher.warning)
    workspace.say(f"the run is written to {workspace.run}")
    train = built.data.train
    for line in summary.lines(*built.data.splits) if workspace.main else ():
        workspace.say(line)
    if fitted:
        workspace.say(fitted)
    if train.class_names and built.num_classes > len(train.class_names):
        workspace.say(f"note: the model has {built.num_classes} classes, and the data has images of {len(train.class_names)}")
    images = 0 if train.streamed else int(len(train.dataset) * max(1, config.data.epoch_repeats))
    dropped = images % learner.global_batch
    if learner.sizes is not None:
        workspace.say(str(learner.sizes))
    elif dropped > 0.1 * max(1, images):
        workspace.say(f"note: each epoch drops {dropped} of {images} images, different ones each time, because they do not "
                      "fill a batch; a smaller --batch-size drops fewer")  # fmt: skip
    if built.loss.class_weights is not None:
        workspace.say(_weights_in_words(built.loss.class_weights, _class_names(train, built.num_classes)))
    if isinstance(built.task, SFRTask) and built.task.plan is not None:
        workspace.say(str(built.task.plan))


def _facts(config: RunConfig, accelerator: Any, built: Built, epochs: int) -> dict[str, Any]:
    """Returns the content of metrics.json other than the scores, of a run whose schedule has `epochs` epochs."""
    name, model, teacher = config.model.model or DEFAULT_MODEL, built.model, built.teacher
    images = summary.facts(*built.data.splits)
    smoothing = built.task.smoothing if isinstance(built.task, SFRTask) else None
    return {
        "model": name,
        "dataset": config.data.public_name(),
        "sfr": isinstance(built.task, SFRTask),
        **({"custom_task": True} if built.custom else {}),
        "base_model": base_model(config.model.keeps_pretrained, name, model.pretrained_cfg),
        **({"teacher": teacher.facts} if teacher is not None else {}),
        **({"images": images} if images else {}),
        "parameters": _count(model),
        **({"smoothing": smoothing.strength(epochs)} if smoothing is not None else {}),
        "seed": config.engine.seed,
        "hardware": hardware(accelerator.device, accelerator.num_processes),
        "mixed_precision": accelerator.mixed_precision,
        "versions": versions(),
    }


def _weights_in_words(weights: tuple[float, ...], names: tuple[str, ...] | None) -> str:
    """Returns the smallest and the largest class weight in words."""
    ends = (pick(range(len(weights)), key=weights.__getitem__) for pick in (min, max))
    named = (f"{weights[i]:.3g} ({names[i] if names else f'class {i}'})" for i in ends)
    return f"class weights: {' to '.join(named)}"


def _class_names(train: Split, num_classes: int) -> tuple[str, ...] | None:
    """Returns the names of the model's classes if the data has names; classes without one get a number."""
    known = train.class_names
    return None if not known else (*known, *map(made_up_name, range(len(known), num_classes)))


def _fitted_batch(config: RunConfig, train: Split, processes: int) -> tuple[RunConfig, str]:
    """Returns the configuration with a batch size, and what to say of it if the images are too few for the default."""
    batch, said = config.data.batch_size, ""
    if batch in (None, AUTO):
        batch = DEFAULT_BATCH
        if not train.streamed and 0 < len(train.dataset) < batch * processes:
            batch = power_of_two(len(train.dataset) // processes)
            said = (f"batch size {batch}: the {len(train.dataset)} training images do not fill one of {DEFAULT_BATCH} on each "
                    "process; -b sets another")  # fmt: skip
    return _with_batch(config, batch), said


def _with_batch(config: RunConfig, size: int) -> RunConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=size))


def _probed_batch(config: RunConfig, accelerator: Any, built: Built, fitted: str) -> tuple[RunConfig, str]:
    """Returns the configuration with the batch size that fits the device's memory, and what to say of it."""
    if not has_own_memory(accelerator.device):
        default = fitted or f"batch size {config.data.batch}, the default"
        return config, f"{default}; --batch-size {AUTO} probes the memory of GPUs, not that of the CPU"
    train, device = built.data.train, accelerator.device
    mixup = create_mixup(config.aug, built.num_classes, config.data.multilabel)
    views, (channels, height, width) = max(1, config.aug.aug_splits), built.prep.input_size
    dtype = image_dtype(config.model)
    if config.sizes.train_img_sizes is not None:
        height = width = max(config.sizes.train_img_sizes)

    def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.randn(size * views, channels, height, width, device=device, dtype=dtype)
        target = torch.randint(built.num_classes, (size,), device=device).repeat(views)
        if config.data.multilabel:
            target = torch.nn.functional.one_hot(target, built.num_classes).float()
        return augment(images, target, None, mixup, config.model.channels_last)

    most = power_of_two(MOST if train.streamed else min(MOST, len(train.dataset) // accelerator.num_processes))
    size = probe_batch(config, accelerator, built.task, batch, most)
    why = "the largest power of two whose training step fits the device's memory"
    if size == most:
        why = f"more was not tried: at most {MOST}, and at most the training images; a training step fits the device's memory"
    return _with_batch(config, size), f"batch size {size}: {why}"


def _num_classes(config: RunConfig, train: Split) -> int:
    """Returns the number of classes from the options, or else from the data."""
    names, given = train.class_names or (), config.model.num_classes
    if given is None:
        if not names:
            raise UserError("num-classes: the dataset does not say how many classes it has; give --num-classes")
        if len(names) < 2:
            raise UserError(f"data: expected at least 2 classes; got {len(names)}: {list(names)}")
        return len(names)
    if config.data.multilabel and len(names) != given:
        raise UserError(f"num-classes: expected {len(names)}, the classes of the labels; got {given}; leave the option out")
    if len(names) > given:
        raise UserError(f"num-classes: the data has {len(names)} classes; got {given}; leave the option out")
    return given


def _headline(config: RunConfig, built: Built, accelerator: Any, parameters: int, epochs: int) -> str:
    """Returns one line that describes the run."""
    task, teacher = built.task, built.teacher
    if built.custom:
        method = f"a task of its own, {type(task).__name__}"
    elif isinstance(task, SFRTask):
        sfr, smoothing = task.config, task.smoothing.describe(epochs)
        weight = f"{sfr.weight:g}" if task.balance == 1 else f"{sfr.weight:g} / {config.model.num_classes}"
        method = f"SFR (lambda {weight}, {sfr.matching}, {sfr.channels}; smoothing {smoothing})"
    else:
        method = f"plain training (smoothing {config.sfr.plain_smoothing:g})"
    method += f", {built.loss.describe()}" if built.loss.describe() else ""
    method += f", {headline(teacher)}" if teacher is not None else ""
    splits = [split for split in built.data.splits if split is not None]
    counts = "/".join("?" if split.streamed else str(len(split.dataset)) for split in splits)
    counts += f" {'/'.join(PART_NAMES[: len(splits)])} images"
    return (
        f"{config.model.model}, {parameters / 1e6:.2f} M parameters, {config.model.num_classes} classes, "
        f"{sides(*built.prep.input_size[1:])} px; {counts}; {method}; {counted(config.optim.epochs, 'epoch')} on "
        f"{hardware(accelerator.device, accelerator.num_processes)}, {accelerator.mixed_precision} mixed precision"
    )
