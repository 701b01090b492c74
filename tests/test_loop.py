"""The training loop against one written by hand with torch and timm, with each option that changes an update."""

import itertools
import json
import math
import random

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, adaptive_clip_grad

import timm_sfr.training.trainer as trainer_file
from timm_sfr import RunConfig, UserError
from timm_sfr.training.run import fit, prepare

NET = {"layers": (1, 1, 1), "channels": (4, 8, 16)}
PLAIN = {"sfr": False, "smoothing": 0.0, "epochs": 2, "device": "cpu", "dataset": "digits", "model": "resnet20_cifar",
         "model_kwargs": NET, "img_size": 16, "batch_size": 128, "workers": 0, "lr": 0.1}  # fmt: skip


def prepared(tmp_path, **options):
    return prepare(RunConfig.from_flat({**PLAIN, "output": str(tmp_path), **options}))


def by_hand(trainer, accum=1, clip=lambda model: None, change=lambda images, target, step: (images, target), ema=None):
    """One epoch of a plain loop over the trainer's batches, from its weights: the model, its average if any, and the mean loss.

    `ema` are the arguments of timm's average.
    """
    model = timm.create_model("resnet20_cifar", num_classes=10, **NET)
    model.load_state_dict(trainer.exported_model().state_dict())
    average = None if ema is None else ModelEmaV3(model, **ema)
    optimizer = create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=5e-4, momentum=0.9)
    updates = math.ceil(len(trainer.batches) / accum)
    scheduler, _ = create_scheduler_v2(optimizer, "cosine", 2, warmup_epochs=0, warmup_lr=1e-5, step_on_epochs=False,
                                       updates_per_epoch=updates)  # fmt: skip
    losses = []
    batches = list(trainer.batches.epoch(0))
    model.train()
    for done, first in enumerate(range(0, len(batches), accum), 1):
        group = batches[first : first + accum]
        for step, (images, target) in enumerate(group, first):
            images, target = change(images, target, step)
            loss = F.cross_entropy(model(images), target)
            (loss / len(group)).backward()
            losses.append(loss.item())
        clip(model)
        optimizer.step()
        optimizer.zero_grad()
        if average is not None:
            average.update(model, step=done)
        scheduler.step_update(done)
    return model, average, sum(losses) / len(losses)


def assert_same(ours, theirs):
    for name, value in ours.state_dict().items():
        assert torch.allclose(value, theirs.state_dict()[name], atol=1e-5), name


def by_norm(model):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)


def by_value(model):
    torch.nn.utils.clip_grad_value_(model.parameters(), 1e-3)


def by_agc(model):
    """All parameters but the classifier's."""
    head = {id(p) for p in model.get_classifier().parameters()}
    adaptive_clip_grad([p for p in model.parameters() if id(p) not in head], 1e-3)


@pytest.mark.parametrize(
    "options,hand",
    [
        ({}, {}),
        ({"grad_accum_steps": 2}, {"accum": 2}),  # of 11 batches, so that the last group is smaller
        ({"grad_accum_steps": 4}, {"accum": 4}),
        ({"clip_grad": 0.05}, {"clip": by_norm}),
        ({"clip_grad": 1e-3, "clip_mode": "value"}, {"clip": by_value}),
        ({"clip_grad": 1e-3, "clip_mode": "agc"}, {"clip": by_agc}),
        ({"clip_grad": 0.05, "grad_accum_steps": 3}, {"clip": by_norm, "accum": 3}),
    ],
    ids=["plain", "accumulate-2", "accumulate-4", "norm", "value", "agc", "norm-accumulate-3"],
)
def test_no_sfr_is_a_plain_timm_loop(options, hand, tmp_path):
    """Equal to float rounding, and unlike the loop without the option."""
    trainer = prepared(tmp_path, **options)
    assert len(trainer.batches) == 11
    (model, _, loss), (without, *_) = by_hand(trainer, **hand), by_hand(trainer)
    means = trainer.train_epoch(0)
    assert means["loss"] == means["task_loss"] == pytest.approx(loss, rel=1e-5)
    assert means["sfr_loss"] == means["sfr_weight"] == 0
    assert_same(trainer.exported_model(), model)
    if options:
        weights = [net.state_dict()["stages.0.0.conv1.weight"] for net in (model, without)]
        assert not torch.allclose(*weights, atol=1e-4), "the option changes nothing here, so this test would not see it"


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("accum", [1, 2])
def test_the_moving_average_is_timms_and_is_what_is_scored(warmup, accum, tmp_path):
    trainer = prepared(tmp_path, model_ema=True, model_ema_decay=0.6, model_ema_warmup=warmup, grad_accum_steps=accum)
    model, average, _ = by_hand(trainer, accum, ema={"decay": 0.6, "use_warmup": warmup})
    trainer.train_epoch(0)
    assert_same(trainer.exported_model(), average.module)
    assert not torch.allclose(*(net.state_dict()["stages.0.0.conv1.weight"] for net in (model, average.module)), atol=1e-4)
    with torch.no_grad():
        net = average.module.eval()
        hits = [net(trainer.prep.normalize(images)).argmax(1) == target for images, target in trainer.val_loader]
    assert trainer.validate()["top1"] == pytest.approx(100 * torch.cat(hits).float().mean().item())


def seed_all(*place):
    """Seeds everything as the run documents it: by (seed, epoch, batch, process)."""
    seed = int(np.random.SeedSequence(place).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.mark.parametrize(
    "options,change",
    [
        ({"reprob": 0.5}, RandomErasing(0.5, mode="pixel", device="cpu")),
        ({"reprob": 0.5, "remode": "const"}, RandomErasing(0.5, mode="const", device="cpu")),
        ({"reprob": 0.5, "remode": "rand"}, RandomErasing(0.5, mode="rand", device="cpu")),
        ({"reprob": 0.5, "recount": 3}, RandomErasing(0.5, mode="pixel", max_count=3, device="cpu")),
        ({"mixup": 0.4}, Mixup(0.4, 0.0, label_smoothing=0.0, num_classes=10)),
        ({"cutmix": 1.0}, Mixup(0.0, 1.0, label_smoothing=0.0, num_classes=10)),
        ({"cutmix_minmax": (0.3, 0.6)}, Mixup(0.0, 0.0, (0.3, 0.6), label_smoothing=0.0, num_classes=10)),
        ({"mixup": 0.4, "mixup_prob": 0.3}, Mixup(0.4, 0.0, prob=0.3, label_smoothing=0.0, num_classes=10)),
        ({"mixup": 0.4, "cutmix": 1.0, "mixup_switch_prob": 0.8},
         Mixup(0.4, 1.0, switch_prob=0.8, label_smoothing=0.0, num_classes=10)),
        ({"mixup": 0.4, "mixup_mode": "elem"}, Mixup(0.4, 0.0, mode="elem", label_smoothing=0.0, num_classes=10)),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)  # fmt: skip
def test_every_batch_is_mixed_and_erased_as_timm_does_with_its_own_random_numbers(options, change, tmp_path):
    trainer = prepared(tmp_path, seed=7, **options)

    def changed(images, target, step):
        seed_all(7, 0, step, 0)
        return (change(images), target) if isinstance(change, RandomErasing) else change(images, target)

    (model, _, loss), (_, _, plain) = by_hand(trainer, change=changed), by_hand(trainer)
    assert trainer.train_epoch(0)["loss"] == pytest.approx(loss, rel=1e-5) and loss != pytest.approx(plain, rel=1e-3)
    assert_same(trainer.exported_model(), model)


def test_random_numbers_are_those_of_the_epoch_the_batch_and_the_process(tmp_path, monkeypatch):
    trainer, drawn = prepared(tmp_path, seed=7, reprob=0.5), {}
    for process in (0, 1):
        monkeypatch.setattr(type(trainer.accelerator), "process_index", process)
        for epoch in (0, 1):
            steps = iter(range(11))

            def note(images, place=(process, epoch), steps=steps):
                step = next(steps)
                drawn[(*place, step)] = found = (random.random(), np.random.rand(), torch.rand(1).item())
                seed_all(7, place[1], step, place[0])
                assert found == (random.random(), np.random.rand(), torch.rand(1).item())
                return images

            trainer.batches.erase = note
            trainer.train_epoch(epoch)
    assert len(drawn) == len(set(drawn.values())) == 44


def test_mixing_ends_with_its_epoch(tmp_path):
    trainer, kinds = prepared(tmp_path, mixup=0.4, mixup_off_epoch=1), []
    compute = trainer.task.forward

    def note(images, target):
        kinds.append((target.shape, bool((target == target.round()).all())))
        return compute(images, target)

    trainer.task.forward = note
    for epoch in (0, 1):
        trainer.train_epoch(epoch)
    assert all(not whole for _, whole in kinds[:11]) and all(whole for _, whole in kinds[11:]) and len(kinds) == 22


@pytest.mark.parametrize(
    "options", [{}, {"clip_grad": 1e-3, "clip_mode": "value"}, {"clip_grad": 0.05}], ids=["", "value", "norm"]
)
def test_a_gradient_that_is_not_finite_moves_neither_the_weights_nor_their_average(options, tmp_path):
    """Clipping by value would make it finite, so it is looked for first."""
    trainer = prepared(tmp_path, on_nonfinite="skip", model_ema=True, model_ema_decay=0.6, **options)
    weight = trainer.module.get_parameter("stages.0.0.conv1.weight")
    states = {"": trainer.module, "average ": trainer.task.get_trainable_module(ema=True)}
    before, seen, steps = {}, [], iter(range(11))

    def weights():
        return {
            kind + name: value.detach().clone() for kind, module in states.items() for name, value in module.named_parameters()
        }

    def spoil(gradient):
        step = next(steps)
        if step == 4:
            before.update(weights())
            return gradient * math.inf
        if step == 5:
            seen.append([name for name, value in weights().items() if not torch.equal(value, before[name])])
        return gradient

    weight.register_hook(spoil)
    trainer.train_epoch(0)
    assert before and seen == [[]] and trainer.guard.skipped == 1
    events = json.loads((trainer.workspace.run / "nonfinite.json").read_text())
    assert [(event["term"], event["update"], event["action"]) for event in events] == [("gradient", 5, "skip")]


def test_an_epoch_that_ends_early_is_an_error(tmp_path):
    trainer = prepared(tmp_path)
    whole = trainer.batches.epoch
    trainer.batches.epoch = lambda epoch, start=0: itertools.islice(whole(epoch, start), 10)
    with pytest.raises(UserError, match=r"expected 11 batches in epoch 1; got 10.*--train-num-samples"):
        trainer.train_epoch(0)


@pytest.mark.parametrize("start,ok", [(1, True), (2, False), (3, False)])
def test_a_start_epoch_lies_within_the_run(start, ok, tmp_path):
    config = RunConfig.from_flat(
        {**PLAIN, "output": str(tmp_path), "experiment": "run", "start_epoch": start, "report_interval": 0}
    )
    if ok:
        assert len((fit(config) / "summary.csv").read_text().splitlines()) == 2
        return
    with pytest.raises(UserError, match=f"start-epoch: expected less than 2, the epochs of this run; got {start}"):
        fit(config)


@pytest.mark.parametrize("mode,reduce", [("reduce", [True, True]), ("broadcast", [False, False]), ("none", [])])
def test_the_statistics_of_batchnorm_are_shared_as_the_option_says(mode, reduce, tmp_path, monkeypatch):
    """timm's function is tested with two real processes elsewhere; this is what it is called with."""
    trainer, calls = prepared(tmp_path, dist_bn=mode, model_ema=True), []
    monkeypatch.setattr(trainer_file, "distribute_bn", lambda module, world, reduce: calls.append((module, world, reduce)))
    trainer._share_batchnorm()
    assert not calls, "one process has nothing to share"
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    trainer._share_batchnorm()
    assert [(world, how) for _, world, how in calls] == [(2, how) for how in reduce]
    assert [module for module, *_ in calls] == [trainer.module, trainer.task.get_trainable_module(ema=True)][: len(reduce)]


def test_batches_of_another_size_count_by_their_share(tmp_path):
    """The means of the terms are means over images."""
    trainer = prepared(tmp_path, train_img_sizes=(16, 24), train_batch_sizes=(96, 32))
    losses = []
    compute = trainer.task.forward

    def note(images, target):
        found = compute(images, target)
        losses.append((found["loss"].item(), len(target)))
        return found

    trainer.task.forward = note
    means = trainer.train_epoch(0)
    count = sum(size for _, size in losses)
    assert {size for _, size in losses} == {96, 32}
    assert means["loss"] == pytest.approx(sum(loss * size for loss, size in losses) / count, rel=1e-5)


def test_a_skipped_batch_is_not_in_the_class_table(tmp_path):
    trainer = prepared(tmp_path, sfr=True, smoothing=None, on_nonfinite="skip")
    steps, kept, seen = iter(range(11)), {}, []
    compute = trainer.task.forward

    def spoil(images, target):
        step, sums = next(steps), trainer.task.get_sums()
        if step == 5:
            kept.update({name: value.clone() for name, value in sums.items()})
            result = compute(images, target)
            assert not torch.equal(sums["counts"], kept["counts"]), "the batch would be in the table"
            return {**result, "loss": result["loss"] * math.nan, "task_loss": result["task_loss"] * math.nan}
        if step == 6:
            seen.extend(torch.equal(sums[name], kept[name]) for name in ("sums", "counts"))
        return compute(images, target)

    trainer.task.forward = spoil
    means = trainer.train_epoch(0)
    assert seen == [True, True] and trainer.guard.skipped == 1 and math.isfinite(means["loss"])
