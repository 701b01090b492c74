"""Trackers: what they hold, read back from their own files, is what summary.csv holds."""

import contextlib
import json
import shutil
import sys
from collections import defaultdict

import psutil
import pytest
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from conftest import run, summary, train

from timm_sfr import RunConfig, UserError
from timm_sfr.runs.checkpoints import checkpoints
from timm_sfr.training.trackers import Trackers, chosen, hyperparameters, metric_name

NAMES = {
    "train_loss": "train/loss", "task_loss": "train/task_loss", "sfr_loss": "train/sfr_loss", "sfr_weight": "train/sfr_weight",
    "smoothing": "train/smoothing", "lr": "train/lr", "images_per_second": "train/images_per_second", "val_loss": "val/loss",
    "val_top1": "val/top1", "val_top5": "val/top5",
}  # fmt: skip


def from_tensorboard(folder):
    """Every scalar as a list of (step, value), as TensorBoard shows it, and the names of the hyper-parameters."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = reader.EventAccumulator(str(folder))
    accumulator.Reload()
    scalars = {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}
    hparams = accumulator.summary_metadata.keys() & {"_hparams_/session_start_info"}
    return scalars, hparams


def from_wandb(folder):
    """The same out of the offline files, and their runs' ids and options: blocks of 32 KiB, records with a 7-byte head."""
    records = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    scalars, ids, options = defaultdict(list), set(), {}
    for file in sorted(folder.glob("offline-run-*/run-*.wandb")):
        data, place, whole = file.read_bytes(), 7, b""
        while place + 7 <= len(data):
            left = 32768 - place % 32768
            if left < 7:
                place += left
                continue
            length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
            whole += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind not in (1, 4):  # whole, or its last part
                continue
            record, whole = records.Record.FromString(whole), b""
            if record.HasField("run"):
                ids.add(record.run.run_id)
                options |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.HasField("history"):
                found = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                for name, value in found.items():
                    scalars[name].append((found["_step"], value))
    return {name: values for name, values in scalars.items() if not name.startswith("_")}, ids, options


def expected(folder):
    rows = summary(folder)
    return {NAMES[name]: [(int(row["epoch"]) + 1, float(row[name])) for row in rows if row[name] != ""]
            for name in rows[0] if name in NAMES}  # fmt: skip


def assert_same(found, wanted, but=()):
    assert set(found) == set(wanted) >= set(NAMES.values())
    for name, values in wanted.items():
        assert [step for step, _ in found[name]] == [step for step, _ in values], name
        if name not in but:
            assert [value for _, value in found[name]] == pytest.approx([value for _, value in values], rel=1e-5), name


def test_tensorboard_and_wandb_hold_what_summary_holds_also_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard"), pytest.importorskip("wandb")
    # A smoothing of its own: what SFR finds itself depends on the number of epochs, which the resume changes.
    words = ("--report-to", "tensorboard", "wandb", "--val-interval", 2, "--sched", "step", "--smoothing", 0.1,
             "--output", tmp_path, "--experiment", "run")  # fmt: skip
    assert "warning" not in train("--epochs", 2, *words, WANDB_MODE="offline").stdout
    folder = tmp_path / "run"
    wanted = expected(folder)
    assert [step for step, _ in wanted["val/top1"]] == [2]
    scalars, hparams = from_tensorboard(folder / "tensorboard")
    assert_same(scalars, wanted)
    assert hparams, "the options are among its hyper-parameters"
    scalars, ids, options = from_wandb(folder / "wandb")
    assert_same(scalars, wanted)
    assert len(ids) == 1 and options["model"] == "resnet20_cifar" and options["lr"] == 0.1
    # A run that died before its last checkpoint goes on an epoch earlier than its trackers are.
    shutil.rmtree(checkpoints(folder / "checkpoints")[-1])
    assert "at epoch 2" in train("--resume", folder, "--epochs", 4, WANDB_MODE="offline").stdout
    wanted = expected(folder)
    # What TensorBoard had of epoch 2 is struck out and written anew; wandb takes no step twice, and keeps its own.
    assert_same(from_tensorboard(folder / "tensorboard")[0], wanted)
    scalars, again, _ = from_wandb(folder / "wandb")
    assert_same(scalars, wanted, but=("train/images_per_second",))
    assert again == ids


def test_trackio_holds_what_summary_holds(tmp_path):
    pytest.importorskip("trackio")
    import sqlite3

    words = ("--report-to", "trackio", "--output", tmp_path, "--experiment", "run")
    for more in (("--epochs", 1, *words), ("--resume", tmp_path / "run", "--epochs", 2)):
        train(*more, TRACKIO_DIR=str(tmp_path / "trackio"))
    with sqlite3.connect(tmp_path / "trackio" / "timm_sfr.db") as base:
        found = base.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert len({name for name, _, _ in found}) == 1
    scalars = defaultdict(list)
    for _, step, values in found:
        for name, value in json.loads(values).items():
            scalars[name].append((step, value))
    assert_same(scalars, expected(tmp_path / "run"))


def test_a_tracker_that_is_not_installed_is_told_before_training(tmp_path):
    hidden = f"import sys; sys.modules['wandb'] = None; import train_sfr; sys.exit(train_sfr.main({{}}))"  # noqa: F541
    done = run(sys.executable, "-c", hidden.format(["--report-to", "wandb", "--output", str(tmp_path)]))
    assert done.returncode == 2 and not any(tmp_path.iterdir())
    assert done.stderr == "error: report-to: wandb is not installed; pip install wandb, or leave it out of --report-to\n"
    with pytest.raises(UserError, match=r"report_to: expected one of none, tensorboard, .* did you mean 'wandb'"):
        RunConfig.from_flat({"report_to": ["wandbb"]})
    assert chosen(("none",)) == []


def opened(folder, name):
    pytest.importorskip(name)
    config = ProjectConfiguration(logging_dir=".")
    return Trackers(Accelerator(cpu=True, log_with=[name], project_config=config), folder)


ROWS = [{"epoch": str(epoch), "lr": "0.1", "train_loss": str(1 / (epoch + 1)), "val_top1": ""} for epoch in range(4)]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_fails_is_told_once_and_left(name, tmp_path, monkeypatch, said):
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers = opened(tmp_path, name)
    trackers.start({"model": "x"}, 0, False)
    trackers.log(ROWS[:1])
    if name == "tensorboard":
        shutil.rmtree(tmp_path / "tensorboard")
    else:
        for child in psutil.Process().children(recursive=True):
            if child.name().startswith("wandb"):
                child.kill()
                child.wait(10)
    for count in (2, 3, 4):
        trackers.log(ROWS[:count])
    trackers.finish()
    if name == "wandb":
        with contextlib.suppress(Exception):  # it looks for its dead service at the process's end
            sys.modules["wandb"].teardown()
    assert len(said) == 1 and said[0].startswith(f"warning: report-to: {name} fails: "), said
    assert json.loads((tmp_path / "trackers.json").read_text())[name]["logged"] < 4


def test_a_resumed_run_fills_what_its_tracker_lacks(tmp_path):
    """The rows come from summary.csv, as text; a tracker that is new to the run, or was left, gets all of them."""
    trackers = opened(tmp_path, "tensorboard")
    trackers.start({"model": "x"}, 3, True)
    trackers.log(ROWS)
    trackers.finish()
    scalars, _ = from_tensorboard(tmp_path / "tensorboard")
    assert set(scalars) == {"train/lr", "train/loss"}
    assert scalars["train/loss"] == [(epoch + 1, pytest.approx(1 / (epoch + 1))) for epoch in range(4)]


def test_one_that_does_not_start_stops_a_new_run_and_not_a_resumed_one(tmp_path, said):
    (tmp_path / "tensorboard").write_text("a file in the folder's place")
    with pytest.raises(UserError, match=r"report-to: tensorboard does not start: .*leave it out of --report-to"):
        opened(tmp_path, "tensorboard").start({}, 0, False)
    trackers = opened(tmp_path, "tensorboard")
    trackers.start({}, 0, True)
    trackers.log(ROWS)
    trackers.finish()
    assert len(said) == 1 and said[0].endswith("continuing without it")


def test_options_as_trackers_take_them():
    options = {"lr": 0.1, "sfr": True, "scale": [0.5, 1.0], "drop": None, "model_kwargs": {"depth": 3, "api_key": "s3cret"},
               "data_dir": "https://me:s3cret@host/data", "input_key": "jpg",
               "train_split": "pipe:curl -H 'Authorization: Bearer s3cret' host"}  # fmt: skip
    found = hyperparameters(options)
    assert found["scale"] == "0.5 1.0" and found["model_kwargs.depth"] == 3 and "drop" not in found
    assert found["data_dir"] == "https://host/data" and found["input_key"] == "jpg" and "s3cret" not in str(found)
    assert all(isinstance(value, (bool, int, float, str)) for value in found.values())
    assert {name: metric_name(name) for name in NAMES} == NAMES
    assert hyperparameters({"gp": "token", "wandb_token": "token"}) == {"gp": "token", "wandb_token": "(left out)"}
