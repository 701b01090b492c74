"""The comparison itself: its images, repeatable and resumable cells, timings."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from benchmarks import accuracy, presets, timing
from benchmarks.images import DeviceBatches, choose, decode, open_sets
from benchmarks.pool import side_by_side
from timm_sfr import RunConfig, SFRConfig, UserError
from timm_sfr.data.datasets import Split
from timm_sfr.utils.errors import Interrupted


def test_held_out_images_are_a_fixed_tenth_and_never_trained_on():
    labels = np.repeat(np.arange(3), 50)
    few, _ = choose(labels, 20, False)
    train, held = choose(labels, 20, True)
    rest, same = choose(labels, None, True)
    everything, none = choose(labels, None, False)
    assert np.array_equal(few, train) and np.array_equal(held, same) and len(none) == 0
    assert np.bincount(labels[held]).tolist() == [5] * 3 and np.bincount(labels[train]).tolist() == [20] * 3
    assert not set(held) & set(rest) and len(rest) + len(held) == len(everything) == 150


def test_part_2_is_the_next_images_of_every_class_and_none_of_part_1():
    labels = np.repeat(np.arange(3), 50)
    first, second = (choose(labels, 20, False, part)[0] for part in (1, 2))
    assert np.bincount(labels[second]).tolist() == [20] * 3 and not set(first) & set(second)
    assert set(first) | set(second) == set(choose(labels, 40, False)[0])
    for per_class in (26, None):
        with pytest.raises(UserError, match="training images of every class; one has 50"):
            choose(labels, per_class, False, 2)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A set of noisy colours: 4 classes of 40 images to train on and 10 to score."""
    place, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    for part, count in (("train", 40), ("val", 10)):
        for kind, colour in enumerate(rng.integers(60, 200, (4, 3))):
            (place / "colours" / part / f"c{kind}").mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(colour + rng.normal(0, 50, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / "colours" / part / f"c{kind}" / f"{i}.png")
    return place


@pytest.fixture(scope="module")
def train(root):
    return open_sets(root, "colours", 32, None, False)[0]


@pytest.fixture
def tiny(monkeypatch):
    """The set of noisy colours is the only one of the preset `cpu`; returns the function that puts it there."""

    def put(epochs=2, **options):
        # In float32, because bfloat16 takes many times as long on CPUs that have no instructions for it.
        chosen = presets.Set("colours", 32, None, "resnet20_cifar", epochs, 16, precision="no", net=presets.SMALL, **options)
        monkeypatch.setitem(accuracy.PRESETS, "cpu", {"colours": chosen})

    put()
    return put


def batches(split, companions=None, seed=0):
    """The comparison's batches of eight images, as floats that are not normalised."""
    prep, cpu = SimpleNamespace(normalize=lambda x: x.float()), SimpleNamespace(device=torch.device("cpu"))
    return DeviceBatches(split, SimpleNamespace(batch_size=8), None, prep, seed, cpu, companions)


def test_batches_are_crops_and_flips_that_depend_on_seed_and_epoch_alone(train):
    first, again = (list(batches(train).epoch(3)) for _ in range(2))
    assert len(first) == len(batches(train)) == 20
    assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
    assert all(map(torch.equal, next(batches(train).epoch(3, start=7)), first[7]))
    assert not torch.equal(first[0][0], next(batches(train).epoch(4))[0])
    assert not torch.equal(first[0][0], next(batches(train, seed=1).epoch(3))[0])
    images, labels = train.dataset.tensors
    padded = torch.nn.functional.pad(images, (4,) * 4).float()
    crops = {}
    for image, label in ((padded[i], int(labels[i])) for i in range(len(padded))):
        for flip in (image, image.flip(2)):
            for top in range(9):
                for left in range(9):
                    crops[flip[:, top : top + 32, left : left + 32].numpy().tobytes()] = label
    for x, y in first[:2]:
        assert [crops[image.numpy().tobytes()] for image in x] == y.tolist()


@pytest.mark.parametrize("companions", ["classmates", "views"])
def test_companions_leave_the_images_as_they_are(train, companions):
    alone, both = (batches(train, more).epoch(1) for more in (None, companions))
    for (x, y), (xx, yy) in zip(alone, both, strict=True):
        assert torch.equal(x, xx[: len(x)]) and torch.equal(y, yy) and not torch.equal(x, xx[len(x) :])


def test_views_are_of_the_same_images():
    shades = torch.arange(1, 41, dtype=torch.uint8)  # every image is of one shade; what is padded on is 0
    images = shades[:, None, None, None].expand(40, 3, 32, 32)
    train = Split(TensorDataset(images, torch.arange(40) % 2), ("even", "odd"))
    for x, y in batches(train, "views").epoch(0):
        one, other = (part.amax((1, 2, 3)) for part in x.split(len(y)))
        assert torch.equal(one, other) and len(set(one.tolist())) == len(y)


def test_train_and_val_must_have_the_same_classes(root, tmp_path):
    shutil.copytree(root / "colours", tmp_path / "colours")
    shutil.rmtree(tmp_path / "colours" / "val" / "c2")
    with pytest.raises(UserError, match=r"same classes; only one has \['c2'\]"):
        open_sets(tmp_path, "colours", 32, None, False)


def test_partners_are_of_the_same_class(train):
    plain = batches(train)
    colours = torch.stack([plain.images[plain.labels == k][:, :, 4:-4, 4:-4].float().mean((0, 2, 3)) for k in range(4)])
    for x, y in batches(train, "classmates").epoch(0):
        assert len(x) == 2 * len(y)
        centres = x[len(y) :, :, 8:-8, 8:-8].mean((2, 3))
        assert torch.equal(torch.cdist(centres, colours).argmin(1), y)


@pytest.mark.slow
def test_a_cell_repeats_to_the_bit_and_is_not_run_again(root, tiny, tmp_path, capsys):
    cell = accuracy.Cell("cpu", "colours", "sfr", 0, "val", 2)
    threads = torch.get_num_threads()
    rows = [accuracy.run(cell, root, 1) for _ in range(2)]
    torch.set_num_threads(threads)
    scores = [{name: row[name] for name in ("top1", "top5", "nll", "ece", "best_top1", "best_epoch")} for row in rows]
    assert scores[0] == scores[1] and scores[0]["nll"] > 0
    options = json.loads(rows[0]["args"])
    assert options["sfr"]["matching"] == "divergence" and options["lr"] == 0.2 and options["threads"] == 1
    assert rows[0]["extra_parameters"] == 0 and rows[0]["train_seconds"] > 0 and rows[0]["images"] == 160
    path = tmp_path / "results" / "accuracy.csv"
    accuracy.append(path, rows[0])
    with path.open() as file:
        assert next(csv.DictReader(file))["method"] == "sfr"
    words = ["--data-root", str(root), "--csv", str(path), "--methods", "sfr", "ce", "--seeds", "0"]
    assert [c.method for c in accuracy.missing(accuracy.parse(words))] == ["ce"]
    assert [c.method for c in accuracy.missing(accuracy.parse([*words, "--heldout"]))] == ["sfr", "ce"]
    assert [c.seed for c in accuracy.missing(accuracy.parse([*words[:4], "--methods", "ce"]))] == [0, 1, 2, 3, 4]
    chosen = accuracy.missing(accuracy.parse([*words[:4], "--methods", "ce", "--heldout"]))
    assert [c.seed for c in chosen] == [100, 101, 102, 103, 104], "options are chosen by other seeds than are reported"
    assert accuracy.main([*words[:4], "--methods", "sfr", "--seeds", "0"]) == 0
    assert "0 runs to do" in capsys.readouterr().out
    assert accuracy.main([*words, "--sets", "colors"]) == 2
    assert "did you mean" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["sfr", "dlb"])
def test_a_cell_that_was_stopped_goes_on_after_its_last_epoch(method, root, tiny, tmp_path, monkeypatch):
    tiny(epochs=3)
    cell, threads = accuracy.Cell("cpu", "colours", method, 0, "val", 3), torch.get_num_threads()
    whole = accuracy.run(cell, root, threads, 4)
    plain, trained = DeviceBatches.epoch, []

    def epoch(self, number, start=0):
        trained.append(number)
        if trained == [0, 1]:
            raise RuntimeError("stopped")
        return plain(self, number, start)

    monkeypatch.setattr(DeviceBatches, "epoch", epoch)
    with pytest.raises(RuntimeError, match="stopped"):
        accuracy.run(cell, root, threads, 4, tmp_path)
    assert len(list(tmp_path.iterdir())) == (method == "sfr")
    row = accuracy.run(cell, root, threads, 4, tmp_path)
    assert trained == [0, 1, *([1, 2] if method == "sfr" else [0, 1, 2])] and not list(tmp_path.iterdir())
    assert [row[name] for name in ("top1", "nll", "ece")] == [whole[name] for name in ("top1", "nll", "ece")]


def test_a_cell_that_was_stopped_within_an_epoch_goes_on_there(root, tiny, tmp_path, monkeypatch):
    tiny(epochs=2)
    cell, threads = accuracy.Cell("cpu", "colours", "ls", 0, "val", 2), torch.get_num_threads()
    whole = accuracy.run(cell, root, threads, 4)
    plain, starts = DeviceBatches.epoch, []

    def epoch(self, number, start=0):
        starts.append((number, start))
        for step, batch in enumerate(plain(self, number, start), start):
            if starts == [(0, 0), (1, 0)] and step == 2:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    monkeypatch.setattr(DeviceBatches, "epoch", epoch)
    with pytest.raises(Interrupted, match="SIGTERM"):
        accuracy.run(cell, root, threads, 4, tmp_path)
    row = accuracy.run(cell, root, threads, 4, tmp_path)
    assert starts[:2] == [(0, 0), (1, 0)] and starts[2][0] == 1 and starts[2][1] >= 2 and not list(tmp_path.iterdir())
    assert [row[name] for name in ("top1", "nll", "ece")] == [whole[name] for name in ("top1", "nll", "ece")]


def test_a_trial_is_short_and_stays_out_of_the_results(root, tiny, capsys):
    tiny(more=presets.MIX)
    row = accuracy.run(accuracy.Cell("cpu", "colours", "sfr", 0, "val", 1), root, torch.get_num_threads(), limit=2)
    assert row["images"] == 32 and '"cutmix": 1.0' in row["args"]
    assert accuracy.main(["--data-root", str(root), "--limit", "2"]) == 2
    assert "name a --csv of its own" in capsys.readouterr().err
    near = os.path.relpath(accuracy.RESULTS)
    assert accuracy.main(["--data-root", str(root), "--limit", "2", "--csv", near]) == 2


@pytest.mark.parametrize("preset,name", [(preset, name) for preset, sets in accuracy.PRESETS.items() for name in sets])
def test_every_set_is_a_valid_run(preset, name, tmp_path):
    options = accuracy.Cell(preset, name, "ce", 0, "val", 1).options(str(tmp_path))
    config = RunConfig.from_flat(options)
    assert timm.is_model(config.model.model) and config.engine.seed == 0
    assert str(tmp_path) not in json.dumps(accuracy.Cell(preset, name, "ce", 0, "val", 1).options())
    assert config.model.pretrained == (accuracy.PRESETS[preset][name].source is not None)


@pytest.mark.slow
def test_methods_are_timed_in_turns(root, tiny, tmp_path, capsys):
    threads, path = torch.get_num_threads(), tmp_path / "timing.csv"
    words = ["--data-root", str(root), "--rounds", "2", "--batches", "1", "--threads", str(threads)]
    assert timing.main([*words, "--methods", "sfr", "dlb", "--csv", str(path)]) == 0
    rows = accuracy.read(path)
    assert [row["method"] for row in rows] == ["sfr", "dlb"]
    assert all(0 < float(row["low"]) <= float(row["ratio"]) <= float(row["high"]) for row in rows)
    assert timing.main([*words, "--methods", "sfrr"]) == 2 and "expected any of" in capsys.readouterr().err


@pytest.mark.parametrize("method,options,changed", [
    ("sfr", {"sfr": dataclasses.asdict(SFRConfig(weight=0.1))}, r"sfr\.weight"), ("cskd", {"lr": 0.3}, "lr"),
    ("cskd", {"peer": {"temperature": 3.0}}, r"peer\.temperature"),
])  # fmt: skip
def test_rows_of_other_options_are_refused(method, options, changed, tmp_path):
    cell = accuracy.Cell("cpu", "tin100-3k", method, 0, "val", 48)
    for name, args in (("old", {}), ("same", cell.recorded()), ("other", cell.recorded() | options)):
        path = tmp_path / f"{name}.csv"
        row = dict.fromkeys(accuracy.COLUMNS, "") | dataclasses.asdict(cell) | {"args": json.dumps(args)}
        accuracy.append(path, row)
        words = ["--data-root", ".", "--csv", str(path), "--sets", "tin100-3k", "--methods", method, "--seeds", "0"]
        if name != "other":
            assert accuracy.missing(accuracy.parse(words)) == []
    with pytest.raises(UserError, match=rf"'{method}' on tin100-3k with other values of {changed} than"):
        accuracy.missing(accuracy.parse(words))
    with pytest.raises(UserError, match=changed):  # also where other methods are to be run
        accuracy.missing(accuracy.parse([*words, "--methods", "ce"]))


@pytest.mark.parametrize("path", [accuracy.RESULTS, accuracy.HELD_OUT])
def test_the_committed_runs_are_of_the_options_that_their_names_mean(path):
    assert len(accuracy.read(path)) > 100
    accuracy.missing(accuracy.parse(["--data-root", ".", "--csv", str(path)]))


@pytest.mark.parametrize("words", [["--epochs", "0"], ["--jobs", "x"], ["--limit", "-1"]])
def test_counts_are_from_one_up(words, capsys):
    with pytest.raises(SystemExit):
        accuracy.parse(["--data-root", ".", *words])
    assert "expected a whole number from 1 up" in capsys.readouterr().err


def test_a_file_that_cannot_take_the_runs_is_said_before_them(root, tiny, tmp_path, capsys):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    words = ["--data-root", str(root), "--methods", "ce"]
    for path, message in ((tmp_path, "cannot write to"), (tmp_path / "other.csv", "has other columns")):
        assert accuracy.main([*words, "--csv", str(path)]) == 2 and message in capsys.readouterr().err
    empty = tmp_path / "empty.csv"
    accuracy.check_csv(empty)
    accuracy.append(empty, dict.fromkeys(accuracy.COLUMNS, "1"))
    assert accuracy.read(empty)[0]["method"] == "1"
    twice = ["--data-root", ".", "--csv", str(tmp_path / "new.csv"), "--methods", "ce", "ce", "--seeds", "1", "1"]
    assert len(accuracy.missing(accuracy.parse(twice))) == 1


def test_held_out_scores_have_a_file_of_their_own():
    assert accuracy.parse(["--data-root", ".", "--heldout"]).csv == accuracy.HELD_OUT
    assert accuracy.parse(["--data-root", "."]).csv == accuracy.RESULTS


def fail_or_die(piece, status):
    if piece == "raise":
        raise ZeroDivisionError("division by zero")
    if piece == "refuse":
        raise UserError("data-root: no")
    if piece == "die":
        os._exit(status)
    return piece.upper()


@pytest.mark.slow
def test_one_that_fails_or_is_killed_does_not_end_the_others(capfd):
    found = dict(side_by_side(fail_or_die, ["a", "raise", "die", "refuse", "b"], 2, 7))
    assert found == {
        "a": "A", "raise": "ZeroDivisionError: division by zero", "die": "its process ended with status 7",
        "refuse": "data-root: no", "b": "B",
    }  # fmt: skip
    assert "Traceback" in capfd.readouterr().err


def test_folders_with_other_files_and_without_images(tmp_path):
    for kind in ("a", "b"):
        (tmp_path / "set" / "train" / kind).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "set" / "train" / "a" / "1.png")
    (tmp_path / "set" / "train" / "a" / "boxes.txt").write_text("no image")
    with pytest.raises(UserError, match=r"expected images .* in .*train/b; found none"):
        decode(tmp_path, "set", "train", 8)
    Image.new("RGB", (8, 8)).save(tmp_path / "set" / "train" / "b" / "1.PNG")
    (tmp_path / "set" / "train" / "b" / "2.jpg").write_text("no image")
    with pytest.raises(UserError, match=r"2\.jpg does not decode"):
        decode(tmp_path, "set", "train", 8)
    (tmp_path / "set" / "train" / "b" / "2.jpg").unlink()
    images, labels, names = decode(tmp_path, "set", "train", 8)
    assert images.shape == (2, 3, 8, 8) and labels.tolist() == [0, 1] and names == ["a", "b"]


def _say_and_sleep(place):
    Path(place).write_text(str(os.getpid()))
    time.sleep(300)


def test_work_ends_with_the_process_that_started_it(tmp_path):
    """Also if that was killed, which leaves it no time to end anything."""
    code = f"""if __name__ == "__main__":
    import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
    from benchmarks.pool import side_by_side
    from test_comparison import _say_and_sleep
    list(side_by_side(_say_and_sleep, [{str(tmp_path / "pid")!r}], 1))
"""
    (tmp_path / "main.py").write_text(code)
    root = Path(__file__).parent.parent
    process = subprocess.Popen([sys.executable, tmp_path / "main.py"], cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    try:
        pid = int(_soon(lambda: (tmp_path / "pid").read_text() if (tmp_path / "pid").exists() else ""))
        assert psutil.pid_exists(pid)
    finally:
        process.kill()
        process.wait()
    assert _soon(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def _soon(found):
    """What the function returns, once it is true, within two minutes."""
    end = time.monotonic() + 120
    while not (value := found()) and time.monotonic() < end:
        time.sleep(0.1)
    return value
