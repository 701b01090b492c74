"""What is said before a run: estimates that come near the truth and change nothing, and lines on options that look wrong."""

import dataclasses
import json
import os
import random
import re
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import ALONE, TORCHRUN, TRAIN, run
from timm.task import ClassificationTask

import timm_sfr  # noqa: F401  (registers the architectures for small images)
from benchmarks.faults import differences
from timm_sfr import RunConfig
from timm_sfr.training import forecast
from timm_sfr.training.forecast import Circumstances, Estimate, advice, cores, estimate, total_reduction, usual_rate
from timm_sfr.training.run import prepare

# All that draws random numbers in a step, or keeps statistics of it.
STATEFUL = {"drop": 0.2, "drop_path": 0.1, "mixup": 0.2, "model_ema": True, "sfr_smoothing_source": "classes", "device": "cpu",
            "sfr_channels": "projection"}  # fmt: skip


def everything(trainer):
    """All that training goes on from."""
    task = trainer.task
    tensors = {f"buffer {name}": value for name, value in task.named_buffers()}
    tensors |= {f"parameter {name}": value for name, value in task.named_parameters()}
    tensors["torch"] = torch.get_rng_state()
    tensors["numpy"] = torch.from_numpy(np.random.get_state()[1].astype(np.int64))
    modes = {name: module.training for name, module in task.named_modules()}
    gradients = [parameter.grad is None for parameter in task.parameters()]
    wrapper, state = id(task.trainable_module), random.getstate()
    return {name: value.clone() for name, value in tensors.items()}, (modes, gradients, wrapper, state)


@pytest.mark.parametrize("sfr", [True, False])
def test_measuring_leaves_all_as_it_was(sfr, tmp_path):
    options = {**STATEFUL, "output": str(tmp_path), "batch_size": 32, "epochs": 40}
    trainer = prepare(RunConfig.from_flat({**options, "sfr": sfr} if not sfr else options))
    trainer.task.eval()
    tensors, others = everything(trainer)
    found = estimate(trainer)
    assert found.seconds > 0 and found.memory > 50 * 2**20
    after, others_after = everything(trainer)
    assert others == others_after and tensors.keys() == after.keys() and len(tensors) > 60
    assert [name for name in tensors if not torch.equal(tensors[name], after[name])] == []
    # It did run: the same steps outside change the statistics of BatchNorm.
    trainer.task.train()
    trainer.task(torch.randn(8, *trainer.prep.input_size), torch.zeros(8, dtype=torch.long))
    changed = [
        name for name, value in trainer.task.named_buffers() if not torch.equal(value, tensors[f"buffer {name}"])
    ]
    assert len(changed) > 20


@pytest.mark.slow
def test_a_run_ends_in_the_same_weights_with_and_without_it(tmp_path):
    words = ["--epochs", "1", "--drop", "0.1", "--mixup", "0.2", "--model-ema", "--sfr-smoothing-source", "classes", "-b", "128",
             "--output", str(tmp_path), "--experiment"]  # fmt: skip
    without = "import sys, timm_sfr.training.run as f; f.foresee = lambda trainer: None; import train_sfr; sys.exit(train_sfr.main({}))"
    done = run(sys.executable, "-c", without.format([*words, "without"]), OMP_NUM_THREADS="1")
    assert done.returncode == 0 and "estimate: " not in done.stdout, done.stderr
    done = run(*TRAIN, *words, "with", OMP_NUM_THREADS="1")
    assert done.returncode == 0 and done.stdout.count("estimate: ") == 1, done.stderr
    assert differences(tmp_path / "without", tmp_path / "with") == []


@pytest.mark.slow
def test_two_processes_measure_without_waiting_for_each_other(tmp_path):
    done = run(*TORCHRUN, TRAIN[1], "--epochs", 1, "--sfr-smoothing-source", "classes", "--output", tmp_path, "--experiment",
               "run", OMP_NUM_THREADS="1")  # fmt: skip
    assert done.returncode == 0 and done.stdout.count("estimate: ") == 1, done.stderr
    assert re.search(r"estimate: 0\.27 M parameters, 1408 images, 11 updates in 1 epoch; about 0:\d\d", done.stdout), (
        done.stdout
    )


CONVNEXT = ("--model", "test_convnext", "--img-size", "64", "--opt", "adamw", "--lr", "1e-3")


@pytest.mark.parametrize("words", [(), pytest.param(CONVNEXT, marks=pytest.mark.slow)])
def test_it_comes_near_the_truth(words, tmp_path):
    words = [*TRAIN[2:], "--epochs", "2", *words, "--json-logs", "--output", str(tmp_path), "--experiment", "run"]
    # Its peak by its own count: what wait4 says begins with the memory of the process that started it.
    script = (
        "import sys, train_sfr; train_sfr.main(sys.argv[1:]); print(open('/proc/self/status').read(), file=sys.stderr)"
    )
    done = run(sys.executable, "-c", script, *words, **ALONE)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    peak = re.search(r"VmHWM:\s+(\d+) kB", done.stderr)
    said = next(line for line in lines if line["event"] == "estimate")
    seconds = json.loads((tmp_path / "run" / "metrics.json").read_text())["seconds"]
    assert said["updates"] == 44
    assert seconds / 4 < said["seconds"] < 4 * seconds, "other processes come and go; docs/logs.md has what is usual"
    assert said["memory"] == pytest.approx(int(peak[1]) * 1024, rel=0.25)
    times = {line["event"]: line["time"] for line in reversed(lines)}
    assert times["estimate"] - times["start"] < max(3, 0.1 * seconds)


def test_what_is_left_is_what_counts(tmp_path):
    trainer = prepare(RunConfig.from_flat({"output": str(tmp_path), "device": "cpu"}))
    whole = estimate(trainer)
    assert (whole.parameters, whole.images, whole.updates, whole.epochs) == (272474, 1408, 440, 20)
    trainer.start_epoch, trainer.updates = 19, 19 * 22
    last = estimate(trainer)
    assert (last.updates, last.epochs) == (22, 1) and last.seconds < whole.seconds / 5

    class Other(ClassificationTask):
        pass

    trainer.task = Other(trainer.exported_model(), verbose=False)
    text = str(estimate(trainer))
    assert text == ("estimate: 0.27 M parameters, 1408 images, 22 updates in 1 epoch; time and memory are not measured for this "
                    "kind of run")  # fmt: skip


def test_its_words():
    found = Estimate(11_200_000, 50000, 39000, 100, 7300.0, 3.2 * 2**30, 900.0, 120.0, True)
    assert str(found) == ("estimate: 11.20 M parameters, 50000 images, 39000 updates in 100 epochs; about 2:01:40 (1:13 an "
                          "epoch) and 3.2 GiB of GPU memory")  # fmt: skip
    assert "loading gives about 120 images/s and the model takes 900" in found.slow_loading
    assert dataclasses.replace(found, loading_rate=800.0).slow_loading is None


def test_loading_processes_are_timed_with_a_cache_too(folder, tmp_path):
    options = {"model": "resnet20_cifar", "data_dir": str(folder), "batch_size": 20, "workers": 1, "cache_dataset": True}
    trainer = prepare(RunConfig.from_flat({**options, "output": str(tmp_path), "device": "cpu"}))
    assert trainer.batches.samples.batched is not None and forecast._timed_loading(trainer) > 0


def test_loading_processes_are_timed_and_too_many_told_in_one_line(folder, tmp_path):
    # On two cores at most, whatever there are, where a process can be held to some: each more is a loading process more.
    own = min(cores(), 2) if hasattr(os, "sched_setaffinity") else cores()
    workers = own + 1
    script = (
        "import os, sys, train_sfr\n"
        "if hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])\n"
        "sys.exit(train_sfr.main(sys.argv[1:]))"
    )
    done = run(sys.executable, "-c", script, *TRAIN[2:], "--model", "resnet20_cifar", "--data-dir", folder, "--epochs", 1,
               "-b", 20, "-j", workers, "--json-logs", "--output", tmp_path, "--experiment", "run")  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and done.stderr == ""
    told = [line["text"] for line in lines if line["event"] == "warning"]
    assert [text.split(";")[0] for text in told if "workers" in text] == [
        f"warning: workers: {workers} loading processes for {own} core{'s' if own > 1 else ''}"
    ]
    assert next(line for line in lines if line["event"] == "estimate")["loading_rate"] > 0


def lines_on(model="resnet20_cifar", **options):
    images = options.pop("images", 50000)
    config = RunConfig.from_flat(
        {"data_dir": "x", "model": model, "img_size": 224, "workers": 2, "warmup_epochs": 0, **options}
    )
    batch = config.data.batch_size * config.optim.grad_accum_steps
    lr = config.optim.lr if config.optim.lr is not None else config.optim.lr_base
    made = timm.create_model(model, num_classes=10)
    return advice(config, Circumstances(made, images, batch, lr, config.optim.epochs, 4))


@pytest.mark.parametrize(
    "options,expected",
    [
        ({}, None),
        ({"opt": "adamw", "lr": 0.1}, r"lr: 0.1 is far above what adamw usually takes at 128 images an update, about 0.0007; .*"
                                      r"may well diverge; give --lr 0.0007"),
        ({"opt": "adamw"}, "is far above what adamw"),  # timm's default rate is SGD's
        ({"opt": "adamw", "lr": 1e-5}, None),  # fine-tuning
        ({"lr": 1e-5}, "lr: 1e-05 is far below what sgd usually takes at 128 images an update, about 0.05"),
        ({"lr": 1e-3}, None),
        ({"lr": 50.0}, "far above"),
        ({"lr": 1.0, "momentum": 0.0}, None),
        ({"opt": "adadelta", "lr": 1.0}, None),
        ({"lr": 0.1, "batch_size": 8}, None),
        ({"warmup_epochs": 5, "epochs": 5}, "warmup-epochs: 5 of 5 epochs: the learning rate never gets to 0.1"),
        ({"warmup_epochs": 5, "epochs": 5, "warmup_prefix": True, "sfr": False}, None),
        ({"sfr_warmup_epochs": 9, "epochs": 5}, "sfr-warmup-epochs: 9 of 5 epochs: lambda never gets to 1"),
        ({"crop_pct": 0.0}, "crop-pct: expected a share above 0"),
        ({"layer_decay": 1.2}, "layer-decay: expected above 0 and up to 1"),
        ({"layer_decay": 0.75}, None),
        ({"workers": 5}, "workers: 5 loading processes for 4 cores; --workers 4 is enough"),
        ({"sfr_solver": "triton", "sfr_matching": "emd"}, "sfr-solver: triton runs on CUDA alone"),
        ({"sfr_solver": "exact"}, "sfr-solver: exact solves the plans of --sfr-matching emd; with divergence it has no effect"),
        ({"sfr_solver": "exact", "sfr_matching": "emd"}, None),
        ({"images": 100}, "batch-size: an update would take 128 images and the training split has 100"),
        ({"images": 200, "grad_accum_steps": 2}, "batch-size: an update would take 256 images"),
        ({"model": "resnet18", "img_size": 32}, "of 32 px end as 1x1 in resnet18, which divides them by 32: .*resnet18_cifar"),
        ({"model": "resnet18", "img_size": 64}, None),
        ({"model": "resnet20_cifar", "img_size": 32}, None),
        ({"model": "mobilenetv3_small_050", "img_size": 32}, "--model mobilenetv2_cifar"),
        ({"model": "test_vit", "img_size": 32}, "images of 32 px end as 2x2"),
        ({"model": "test_vit", "img_size": 64}, None),
        ({"model": "resnet18", "img_size": 96, "pretrained": True}, "img-size: 96 px is far from the 224 px"),
        ({"model": "resnet18", "img_size": 160, "pretrained": True}, None),
        ({"model": "resnet18", "img_size": 96}, None),
    ],
    ids=str,
)  # fmt: skip
def test_what_looks_wrong_is_told(options, expected):
    found = lines_on(**options)
    assert len(found) == (expected is not None), found
    assert expected is None or (re.search(expected, found[0]) and found[0].startswith("warning: ")), found


def test_rates_and_reductions():
    assert usual_rate("sgd", 256)[0] == pytest.approx(0.1) and usual_rate("nadamw", 1024)[0] == pytest.approx(2e-3)
    assert usual_rate("adagrad", 256) is None and usual_rate("nonsense", 256) is None
    assert total_reduction(timm.create_model("resnet18")) == (32, False)
    assert total_reduction(timm.create_model("test_vit")) == (16, True)
    assert total_reduction(torch.nn.Linear(2, 2)) is None
