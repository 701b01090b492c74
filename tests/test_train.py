"""The real script, end to end, as a user runs it."""

import json
import shutil

import pytest
import timm
import torch
import yaml
from conftest import TRAIN, adds_up, run, summary, train
from hub_tools import WITHOUT, logits_by
from safetensors.torch import load_file

from benchmarks.faults import differences
from timm_sfr.method.smoothing import own_epsilon
from timm_sfr.runs.checkpoints import checkpoints, load_checkpoint


def test_what_a_run_writes(digits_run):
    folder, printed = digits_run
    assert {p.name for p in folder.iterdir()} - {".lock"} == {
        "args.yaml", "summary.csv", "checkpoints", "model", "metrics.json", "predictions.csv", "pictures", "report.html",
    }  # fmt: skip
    assert {p.name for p in (folder / "model").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert len({p.stat().st_mode for p in (folder / "model").iterdir()}) == 1, "others may read all of it or none"
    assert str(folder / "model") in printed and "shallow" in printed
    assert len([line for line in printed.splitlines() if line.startswith("epoch ")]) == 4
    assert len(checkpoints(folder / "checkpoints")) == 2
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["best"]["images"] == metrics["last"]["images"] == 360
    assert metrics["last"]["epoch"] == 3 and metrics["seed"] == 42 and metrics["parameters"] == 272474
    assert {"val_top1", "val_top5", "ece"} <= metrics["best"].keys() and {"timm", "torch"} <= metrics["versions"].keys()
    assert metrics["best"]["val_top1"] >= 60  # four epochs of twenty: far above chance, far from done
    args = yaml.safe_load((folder / "args.yaml").read_text())
    assert args["model"] == "resnet20_cifar" and args["num_classes"] == 10 and args["lr"] == 0.1


def test_logged_is_optimised(digits_run):
    rows = summary(digits_run[0])
    assert len(rows) == 4
    assert all(map(adds_up, rows))
    assert float(rows[-1]["sfr_loss"]) > 0 and float(rows[-1]["smoothing"]) == pytest.approx(own_epsilon(10, 4))


def test_the_line_that_a_run_prints_loads_its_model(digits_run):
    line = digits_run[1].strip().splitlines()[-1]
    assert line.startswith("load it with: import timm, timm_sfr; model = ")
    done = run(TRAIN[0], "-c", line.removeprefix("load it with: ") + "; print(model.num_classes, model.training)")
    assert done.returncode == 0 and done.stdout == "10 False\n", done.stderr


@pytest.mark.parametrize("name,plugin", [("resnet20_cifar", True), ("test_resnet", False)])
def test_plain_timm_loads_the_model_bit_for_bit(name, plugin, request, tmp_path):
    """In a process that blocks timm_sfr for timm's own models; with `import timm_sfr` for ours."""
    folder, printed = request.getfixturevalue("digits_run" if plugin else "resnet_run")
    assert f"load it with: import timm{', timm_sfr' * plugin}; model = " in printed
    state = load_checkpoint(checkpoints(folder / "checkpoints")[-1])
    best = json.loads((folder / "metrics.json").read_text())["best"]["epoch"] + 1
    trained = timm.create_model(name, num_classes=10).eval()
    images = torch.randn(5, 3, 64, 64)
    torch.save(images, tmp_path / "x.pt")
    # Sums come in another order with another number of threads.
    found, _ = logits_by(f'timm.create_model("local-dir:{folder}/model", pretrained=True)', tmp_path / "x.pt", tmp_path / "y.pt",
                         {"OMP_NUM_THREADS": str(torch.get_num_threads())},
                         "import timm_sfr" if plugin else WITHOUT)  # fmt: skip
    exported = load_file(folder / "model" / "model.safetensors")
    if state["epoch"] == best:
        plain = {key.removeprefix("model."): value for key, value in state["module"].items()}
        assert all(torch.equal(plain[key], value) for key, value in exported.items())
    trained.load_state_dict(exported)
    with torch.no_grad():
        assert torch.equal(trained(images), found)


def test_resume_is_bit_identical_and_config_repeats_the_run(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "cut")
    newest = checkpoints(tmp_path / "cut" / "checkpoints")[-1] / "state.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])  # the newest is damaged: the one before it counts
    done = train("--resume", tmp_path / "cut", OMP_NUM_THREADS="1")
    assert "is damaged" in done.stdout and "at epoch 3" in done.stdout
    train("--config", whole / "args.yaml", "--output", tmp_path, "--experiment", "again", OMP_NUM_THREADS="1")
    for other in ("cut", "again"):
        assert not differences(whole, tmp_path / other)


@pytest.mark.parametrize(
    "words",
    [
        ("--sfr-channels", "transport", "--sfr-weights", "cross", "--sfr-matching", "grid", "--opt", "adamw", "--lr", 1e-3),
        ("--sfr-matching", "emd", "--sfr-solver", "exact", "--val-interval", 2, "--smoothing", 0.1,
         "--sfr-smoothing-source", "uniform", "--sfr-smoothing-schedule", "confidence", "--sched", "plateau"),
        ("--model", "test_vit", "--img-size", 64, "--sfr-taps", 0, 1, "--in-chans", 1, "--eval-metric", "loss",
         "--no-sched-on-updates", "--warmup-epochs", 1, "--mixed-precision", "bf16"),
    ],
    ids=["transport-grid", "exact-plateau", "vit-grey-bf16"],
)  # fmt: skip
def test_options_train(words, tmp_path):
    train("--epochs", 2, "--img-size", 16, *words, "--output", tmp_path, "--experiment", "run")
    row = summary(tmp_path / "run")[-1]
    assert adds_up(row) and row["val_top1"]


def test_torchcompile(tmp_path):
    train("--epochs", 1, "--torchcompile", "aot_eager", "--output", tmp_path, "--experiment", "run")
    assert set(load_file(tmp_path / "run/model/model.safetensors")) == set(timm.create_model("resnet20_cifar").state_dict())


def test_a_non_finite_loss_keeps_the_last_checkpoint(finished):
    before = (finished / "model/model.safetensors").read_bytes()
    newest = checkpoints(finished / "checkpoints")[-1]
    done = train("--resume", finished, "--epochs", 6, "--lr", 1e30, ok=False)
    assert "non-finite loss at epoch 5" in done.stderr and str(newest) in done.stderr
    assert checkpoints(finished / "checkpoints")[-1] == newest
    assert (finished / "model/model.safetensors").read_bytes() == before


def test_options_that_do_not_fit_the_run_to_resume_change_nothing(finished):
    done = train("--resume", finished, "--model", "wrn_16_2_cifar", "--epochs", 6, ok=False)
    assert "does not fit these options" in done.stderr
    assert yaml.safe_load((finished / "args.yaml").read_text())["model"] == "resnet20_cifar"
    done = train("--output", finished.parent, "--experiment", finished.name, ok=False)
    assert "already holds files" in done.stderr
