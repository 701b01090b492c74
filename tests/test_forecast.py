"""What is said before a run: how much there is to train, and lines on options that look wrong."""

import json
import os
import platform
import re
from pathlib import Path

import pytest
import timm
import torch
from conftest import TRAIN, run

from timm_sfr import RunConfig
from timm_sfr.config import DEFAULT_BATCH
from timm_sfr.training import forecast
from timm_sfr.training.forecast import Circumstances, advice, total_reduction, usual_rate
from timm_sfr.utils.processes import cores


def test_too_many_loading_processes_are_told_in_one_line_and_the_length_in_another(folder, tmp_path):
    # On two cores at most, whatever there are, where a process can be held to some: each more is a loading process more.
    own = min(cores(), 2) if hasattr(os, "sched_setaffinity") else cores()
    workers = own + 1
    script = (
        "import os, sys, train_sfr\n"
        "if hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])\n"
        "sys.exit(train_sfr.main(sys.argv[1:]))"
    )
    done = run(TRAIN[0], "-c", script, *TRAIN[2:], "--model", "resnet20_cifar", "--data-dir", folder, "--epochs", 1,
               "-b", 20, "-j", workers, "--model-ema", "--json-logs", "--output", tmp_path, "--experiment", "run")  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and done.stderr == ""
    warned = [line["text"] for line in lines if line["event"] == "warning"]
    assert [text.split(";")[0] for text in warned if "workers" in text] == [
        f"warning: workers: {workers} loading processes for {own} core{'s' if own > 1 else ''}"
    ]
    assert any(text.startswith("warning: model-ema: the average is what is scored") for text in warned)
    length = next(line for line in lines if line["event"] == "length")
    assert length["updates"] * 20 == length["images"] and length["epochs"] == 1
    assert re.fullmatch(r"\d+ images an epoch, \d+ updates in 1 epoch", length["text"])


def lines_on(model="resnet20_cifar", **options):
    images = options.pop("images", 50000)
    given = {"data_dir": "x", "model": model, "img_size": 224, "workers": 2, "warmup_epochs": 0, **options}
    config = RunConfig.from_flat(given)
    batch = (config.data.batch_size or DEFAULT_BATCH) * config.optim.grad_accum_steps
    lr = config.optim.lr if config.optim.lr is not None else config.optim.lr_base
    made = timm.create_model(model, num_classes=10)
    return advice(config, Circumstances(made, images, batch, lr, config.optim.epochs, 4))


@pytest.mark.parametrize(
    "options,expected",
    [
        ({}, None),
        ({"opt": "adamw", "lr": 0.1}, r"lr: 0.1 is far above the usual rate of adamw at 128 images per update, about 0.00071; .*"
                                      r"may well diverge; use --lr 0.00071"),
        ({"opt": "adamw"}, "is far above the usual rate of adamw"),  # timm's default rate is SGD's
        ({"opt": "adamw", "lr": 1e-5}, None),  # fine-tuning
        ({"lr": 1e-5}, "lr: 1e-05 is far below the usual rate of sgd at 128 images per update, about 0.05"),
        ({"lr": 1e-3}, None),
        ({"lr": 50.0}, "far above"),
        ({"lr": 1.0, "momentum": 0.0}, None),
        ({"opt": "adadelta", "lr": 1.0}, None),
        ({"lr": 0.1, "batch_size": 8}, None),
        ({"warmup_epochs": 5, "epochs": 5}, "warmup-epochs: 5 of 5 epochs: the learning rate never reaches 0.1"),
        ({"warmup_epochs": 5, "epochs": 5, "warmup_prefix": True, "sfr": False}, None),
        ({"sfr_warmup_epochs": 9, "epochs": 5}, "sfr-warmup-epochs: 9 of 5 epochs: lambda never reaches 1"),
        ({"crop_pct": 0.0}, "crop-pct: expected a share above 0"),
        ({"layer_decay": 1.2}, "layer-decay: expected above 0 and up to 1"),
        ({"layer_decay": 0.75}, None),
        ({"sched": "step", "cooldown_epochs": 3}, "timm's schedule step has neither, so they have no effect"),
        ({"cooldown_epochs": 3, "lr_cycle_limit": 2}, None),
        ({"workers": 5}, "workers: 5 loading processes for 4 cores; --workers 4 is enough"),
        ({"sfr_solver": "triton", "sfr_matching": "emd"}, "sfr-solver: triton runs on CUDA only"),
        ({"sfr_solver": "exact"}, "sfr-solver: exact solves the plans of --sfr-matching emd; with divergence it has no effect"),
        ({"sfr_solver": "exact", "sfr_matching": "emd"}, None),
        ({"images": 100}, "batch-size: an update would take 128 images and an epoch has 100"),
        ({"images": 200, "grad_accum_steps": 2}, "batch-size: an update would take 256 images"),
        ({"model": "resnet18", "img_size": 32}, "of 32 px end as 1x1 in resnet18, which divides them by 32: .*resnet18_cifar"),
        ({"model": "resnet18", "img_size": 48}, None),  # 2x2
        ({"model": "resnet18", "img_size": 64}, None),
        ({"model": "resnet20_cifar", "img_size": 32}, None),
        ({"model": "mobilenetv3_small_050", "img_size": 32}, "--model mobilenetv2_cifar"),
        ({"model": "test_vit", "img_size": 32}, "images of 32 px end as 2x2"),
        ({"model": "test_vit", "img_size": 64}, None),
        ({"model": "resnet18", "img_size": 96, "pretrained": True}, "img-size: 96 px is far from the 224 px"),
        ({"model": "resnet18", "img_size": 160, "pretrained": True}, None),
        ({"model": "resnet18", "img_size": 96}, None),
        ({"images": 6000, "epochs": 4, "model_ema": True}, "model-ema: .* after 187 updates at decay 0.9998 the initial weights "
                                                         "are 96 % of it; use --model-ema-warmup, or --model-ema-decay 0.947"),
        ({"images": 6000, "epochs": 4, "model_ema": True, "model_ema_warmup": True}, None),
        ({"images": 6000, "epochs": 4, "model_ema": True, "model_ema_decay": 0.95}, None),
        ({"model_ema": True, "epochs": 100}, None),
    ],
    ids=str,
)  # fmt: skip
def test_what_looks_wrong_is_told(options, expected):
    found = lines_on(**options)
    assert len(found) == (expected is not None), found
    assert expected is None or (re.search(expected, found[0]) and found[0].startswith("warning: ")), found


@pytest.mark.parametrize("option,low,high", [("mixed_precision", "bf16", "no"), ("model_dtype", "bfloat16", "float32")])
def test_bf16_on_a_cpu_without_it(option, low, high, monkeypatch):
    monkeypatch.setattr(forecast, "cpu_has_bf16", lambda: True)
    assert lines_on(**{option: low}) == []
    monkeypatch.setattr(forecast, "cpu_has_bf16", lambda: False)
    (line,), flag = lines_on(**{option: low}), option.replace("_", "-")
    assert line.startswith(f"warning: {flag}: bf16 is many times slower") and line.endswith(f"; use --{flag} {high}")
    assert lines_on(**{option: high}) == [] == lines_on()


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists() or platform.machine() != "x86_64", reason="needs the flags of an x86 CPU")
def test_a_cpu_that_has_bf16_is_known():
    flags = Path("/proc/cpuinfo").read_text().split()
    assert forecast.cpu_has_bf16() == all(flag in flags for flag in ("avx512bw", "avx512vl", "avx512dq"))


def test_rates_and_reductions():
    assert usual_rate("sgd", 256)[0] == pytest.approx(0.1) and usual_rate("nadamw", 1024)[0] == pytest.approx(2e-3)
    assert usual_rate("adagrad", 256) is None and usual_rate("nonsense", 256) is None
    assert total_reduction(timm.create_model("resnet18")) == (32, False)
    assert total_reduction(timm.create_model("test_vit")) == (16, True)
    assert total_reduction(torch.nn.Linear(2, 2)) is None
