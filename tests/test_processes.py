"""Two processes on the CPU."""

import json
import re
import sys

import pytest
from conftest import ROOT, TORCHRUN, run, train, train_pair

from timm_sfr.data.datasets import Digits
from timm_sfr.runs.predictions import read_predictions

# Layer normalisation does not look across the batch, so only rounding differs between one process and two.
SHARED = {"model": "test_convnext", "img_size": 64, "num_classes": 10, "device": "cpu", "lr": 0.02, "epochs": 2, "workers": 0,
          "sfr_weight": 1.0, "smoothing": 0.2, "sfr_smoothing_source": "classes"}  # fmt: skip


def updates(tmp_path, processes, batch_size=128, **options):
    """What updates.py says of an epoch in so many processes, on the same global batches."""
    out = tmp_path / f"{processes}.json"
    options = {**SHARED, "output": str(tmp_path), "batch_size": batch_size // processes, **options}
    launcher = TORCHRUN if processes == 2 else [sys.executable]
    done = run(*launcher, ROOT / "tests" / "updates.py", out, json.dumps(options), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["processes"] == processes and found["identical"]
    return found


def agreeing_updates(tmp_path, batch_size=128, count=10, **options):
    """`updates` in one process and in two, whose first `count` losses are the same."""
    one, two = (updates(tmp_path, processes, batch_size, **options) for processes in (1, 2))
    # The same images in the same order, summed in another order: rounding alone, which ten updates amplify a little.
    assert len(one["losses"]) >= count and two["losses"][:count] == pytest.approx(one["losses"][:count], rel=1e-4)
    return one, two


def test_one_process_and_two_agree(tmp_path, command):
    one, two = agreeing_updates(tmp_path)
    # The schedule moved once per update, not once per process.
    assert (two["updates"], two["lr"]) == (one["updates"], one["lr"])
    # 360 images do not divide by 2 x 64: each is counted once all the same.
    assert two["val"]["images"] == one["val"]["images"] == 360
    assert two["val"]["loss"] == pytest.approx(one["val"]["loss"], rel=1e-2)
    # The test split is scored with the main process's weights, and as one process scores it.
    alone = json.loads(command("validate", two["model"], "--dataset", "digits", "--img-size", 64, "--json", "--device", "cpu"))
    assert two["test"] == pytest.approx({name: alone[name] for name in two["test"]}, abs=1e-6) and two["test"]["images"] == 360
    # The class table over two processes is that of one on the joined batches: exactly on the same predictions, and
    # closely after an epoch of training, whose rounding differs.
    assert two["table_error"] < 1e-6
    for ours, theirs in zip(two["table"], one["table"], strict=True):
        assert ours == pytest.approx(theirs, abs=2e-3)
    assert one["table"] != [[0.1] * 10] * 10


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"aug_repeats": 2, "epoch_repeats": 1.5, "sampler": "balanced", "bce_loss": True, "bce_sum": True},
     {"jsd_loss": True, "aug_splits": 2, "aa": "rand-m5"}],
    ids=["repeats", "views"],
)  # fmt: skip
def test_one_process_and_two_agree_on_repeats_and_views(options, tmp_path):
    agreeing_updates(tmp_path, epochs=1, **options)


@pytest.mark.slow
def test_batchnorm_statistics_are_shared(tmp_path):
    one, two = (updates(tmp_path, n, model="resnet20_cifar", img_size=16) for n in (1, 2))
    # BatchNorm normalises each process's half by its own statistics (64 images, not 128): losses agree, not exactly.
    assert two["losses"][:10] == pytest.approx(one["losses"][:10], rel=0.05)


@pytest.mark.slow  # the pages' own commands start two processes, too
def test_torchrun_on_the_cpu_trains_with_two_processes(tmp_path):
    done = train_pair("--epochs", 1, "--batch-size", 64, "--output", tmp_path, "--experiment", "run")
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout and len(re.findall("^epoch 1/1", done.stdout, re.M)) == 1
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["last"]["images"] == 360 and "2 processes" in metrics["hardware"]
    # What is kept of every image is in the order of the split, whatever process saw it.
    predictions, digits = read_predictions(tmp_path / "run" / "predictions.csv"), Digits(train=False, mode="RGB")
    assert predictions.target.tolist() == digits.labels.tolist()
    assert 100 * predictions.hits.mean() == pytest.approx(metrics["best"]["val_top1"])
    assert (tmp_path / "run" / "report.html").is_file()


def publish(tmp_path, hub):
    """A short training in two processes, which then publishes."""
    words = ("--epochs", 1, "--batch-size", 64, "--output", tmp_path, "--experiment", "run", "--push-to-hub", "user/two")
    return train_pair(*words, **hub.env(tmp_path / "home"))


@pytest.mark.slow
def test_two_processes_publish_once(tmp_path, hub):
    done = publish(tmp_path, hub)
    assert done.returncode == 0 and done.stdout.count("published: ") == 1, done.stderr
    assert hub.asked.count("create") == hub.asked.count("commit") == hub.asked.count("whoami") == 1


@pytest.mark.slow
def test_two_processes_fail_to_publish_with_one_line(tmp_path, hub):
    hub.faults["commit"] = [403]
    done = publish(tmp_path, hub)
    assert done.returncode != 0 and done.stderr.count("error: push-to-hub: user/two is not published") == 1, done.stderr
    assert (tmp_path / "run" / "model" / "model.safetensors").exists() and hub.asked.count("commit") == 1
    assert len(hub.repos["user/two"].commits) == 1


@pytest.mark.slow
def test_a_failed_launch_says_why_and_fails(tmp_path):
    done = train_pair("--model", "resnet81", "--output", tmp_path)
    assert done.returncode != 0 and "did you mean 'resnet18'" in done.stderr


@pytest.mark.parametrize(
    "name,value,said",
    [
        ("ACCELERATE_USE_FSDP", "true", "asks for FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "True", "asks for DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "1", "asks for Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "asks for tensor, context"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "use --grad-accum-steps"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "use --mixed-precision bf16"),
    ],
)
def test_what_accelerate_is_configured_for_and_a_run_cannot_do(name, value, said, tmp_path, monkeypatch):
    """Refused in one line, before there is a folder; Accelerate itself trains without FSDP and with a quarter of the loss."""
    monkeypatch.setenv(name, value)
    done = train("--output", tmp_path / "out", ok=False)
    assert done.stderr.count("\n") == 1 and f"({name})" * (value != "fp8") in done.stderr and said in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_accelerate_launch_sets_for_plain_processes_is_no_obstacle(tmp_path, monkeypatch):
    """Its own defaults."""
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.setenv(name, "false")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    train("--epochs", 1, "--output", tmp_path)


@pytest.mark.slow
def test_fsdp_by_accelerate_launch_is_refused(tmp_path):
    """As a user asks for it: by a configuration file of `accelerate config`."""
    (tmp_path / "fsdp.yaml").write_text(
        "distributed_type: FSDP\nnum_processes: 2\nuse_cpu: true\nmixed_precision: 'no'\n"
        "fsdp_config:\n  fsdp_version: 2\n  fsdp_auto_wrap_policy: SIZE_BASED_WRAP\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", tmp_path / "fsdp.yaml"]
    done = run(*launch, ROOT / "train_sfr.py", "--output", tmp_path / "out", OMP_NUM_THREADS="1")
    assert done.returncode != 0 and "asks for FSDP (ACCELERATE_USE_FSDP)" in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()
