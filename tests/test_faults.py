"""Runs that are stopped, killed or damaged: nothing that was saved is lost, and what goes on ends with the same bits."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from conftest import ROOT, TRAIN, run

from benchmarks.faults import EVERYTHING, differences
from timm_sfr import UserError
from timm_sfr.checkpoint import Damaged, checkpoints, load_checkpoint, load_newest, save_checkpoint
from timm_sfr.cli import INTERRUPTED, parse
from timm_sfr.signals import Signals

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}


def state(updates=0, value=0.0):
    place = {"epoch": updates // 10, "step": updates % 10, "images": updates % 10 * 64, "updates": updates}
    return {**place, "module": {"x": torch.full((300,), value)}, "best": {"val_top1": 1.5}}


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path):
    for updates in range(6):
        save_checkpoint(tmp_path, state(updates), keep=2, best=updates == 1)
    assert [load_checkpoint(path)["updates"] for path in checkpoints(tmp_path)] == [1, 4, 5]
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in checkpoints(tmp_path)}, "no leftovers"


def test_any_damage_is_found_and_the_one_before_is_taken(tmp_path):
    save_checkpoint(tmp_path, state(1, 1.0), 5, False)
    newest = save_checkpoint(tmp_path, state(2, 2.0), 5, False)
    said = []
    for file in newest.iterdir():
        whole = file.read_bytes()
        flips = [
            whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(0, len(whole), max(1, len(whole) // 300))
        ]
        cuts = [whole[: len(whole) * part // 7] for part in range(7)]
        holes = [whole[:i] + bytes(len(whole[i : i + 64])) + whole[i + 64 :] for i in range(0, len(whole), 64)]
        for damaged in [*flips, *cuts, whole + b"x", *(hole for hole in holes if hole != whole)]:
            file.write_bytes(damaged)
            with pytest.raises(Damaged, match="is damaged"):
                load_checkpoint(newest)
        assert load_newest(tmp_path, said.append)["updates"] == 1 and "trying the one before it" in said[-1]
        file.write_bytes(whole)
    assert load_checkpoint(newest)["module"]["x"][0] == 2.0
    for file in newest.iterdir():
        whole = file.read_bytes()
        file.unlink()
        with pytest.raises(Damaged):
            load_checkpoint(newest)
        file.write_bytes(whole)
    for path in checkpoints(tmp_path):
        (path / "state.pt").unlink()
    with pytest.raises(UserError, match=r"no whole checkpoint in .* \(2 damaged\)"):
        load_newest(tmp_path, said.append)


def test_a_checkpoint_that_is_cut_off_while_it_is_written_leaves_those_before(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, state(1), 5, False)
    with monkeypatch.context() as patch:
        patch.setattr(
            torch, "save", lambda state, file: (file.write(b"half"), (_ for _ in ()).throw(KeyboardInterrupt))[0]
        )
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, state(2), 5, False)
    assert [load_checkpoint(path)["updates"] for path in checkpoints(tmp_path)] == [1]
    # A kill leaves the half-written folder: it is no checkpoint, and the next one takes its place.
    (tmp_path / ".epoch-00000-image-0000000128.new").mkdir()
    assert len(checkpoints(tmp_path)) == 1
    save_checkpoint(tmp_path, state(2), 5, False)
    assert len(checkpoints(tmp_path)) == len(list(tmp_path.iterdir())) == 2


def test_a_checkpoint_never_runs_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    path = save_checkpoint(tmp_path / "checkpoints", {**state(1), "extra": Evil()}, 5, False)
    with pytest.raises(Damaged):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with everything on that draws random numbers, and all of its checkpoints."""
    output = tmp_path_factory.mktemp("whole")
    done = run(
        *TRAIN, *EVERYTHING, "--checkpoint-hist", 99, "--output", output, "--experiment", "run", OMP_NUM_THREADS="1"
    )
    assert done.returncode == 0, done.stderr
    return output / "run"


def cut(whole, place, keep):
    """A copy of a run as it was when its checkpoint number `keep` was its newest."""
    shutil.copytree(whole, place)
    for path in checkpoints(place / "checkpoints")[keep + 1 :]:
        shutil.rmtree(path)
    return load_checkpoint(checkpoints(place / "checkpoints")[-1])


@pytest.mark.parametrize("keep", [1, 5])
def test_resuming_in_mid_epoch_ends_with_the_same_bits(whole, tmp_path, keep):
    state = cut(whole, tmp_path / "run", keep)
    assert state["step"] > 0 and state["parts"]
    done = run(*TRAIN, "--resume", tmp_path / "run", OMP_NUM_THREADS="1")
    assert f"at epoch {state['epoch'] + 1}, batch {state['step'] + 1}" in done.stdout, done.stderr
    assert differences(whole, tmp_path / "run") == []


def test_sigterm_keeps_a_checkpoint_and_says_how_to_go_on(whole, tmp_path):
    words = [
        *EVERYTHING,
        "--checkpoint-hist",
        "99",
        "--output",
        str(tmp_path),
        "--experiment",
        "run",
        "--resume",
        "auto",
    ]
    process = subprocess.Popen([*TRAIN, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ALONE)
    folder = tmp_path / "run" / "checkpoints"
    while process.poll() is None and not checkpoints(folder):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED and "Traceback" not in err
    assert "stopped by SIGTERM after update" in err and f"train_sfr.py --resume {tmp_path / 'run'}" in err
    assert str(checkpoints(folder)[-1]) in err
    done = run(*TRAIN, *words, OMP_NUM_THREADS="1")
    assert "resuming" in done.stdout and done.returncode == 0, done.stderr
    assert differences(whole, tmp_path / "run") == []


class Alone:
    num_processes = 1


def test_signals_are_noted_and_a_second_interrupt_is_not():
    with Signals(Alone()) as signals:
        assert signals.asked(1) == (None, False)
        signal.raise_signal(signal.SIGUSR1)
        assert signals.asked(2) == (None, True) and signals.asked(3) == (None, False)
        signal.raise_signal(signal.SIGINT)
        assert signals.asked(4) == (signal.SIGINT, False)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def limited(kilobytes, *words):
    """Runs the command with a limit on the size of a file: writes fail for real, as on a full disk."""
    return run("bash", "-c", f'ulimit -f {kilobytes}; exec "$@"', "bash", *TRAIN, *words)


def test_a_checkpoint_that_does_not_fit_stops_the_run_or_is_skipped(tmp_path):
    words = ("--epochs", 2)
    done = limited(1800, *words, "--output", tmp_path, "--experiment", "stop")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "output: a checkpoint cannot be written" in done.stderr and "--on-full-disk skip" in done.stderr
    done = limited(1800, *words, "--on-full-disk", "skip", "--output", tmp_path, "--experiment", "skip")
    assert done.returncode == 0 and done.stdout.count("warning: a checkpoint cannot be written") == 2, done.stderr
    assert not checkpoints(tmp_path / "skip" / "checkpoints") and (tmp_path / "skip/model/model.safetensors").exists()


def test_auto_takes_the_newest_run_of_the_same_options(digits_run, tmp_path, monkeypatch):
    first, other = tmp_path / "20260101-000000-resnet20_cifar", tmp_path / "20260102-000000-resnet20_cifar"
    shutil.copytree(digits_run[0], first)
    shutil.copytree(digits_run[0], other)
    args = yaml.safe_load((other / "args.yaml").read_text())
    (other / "args.yaml").write_text(yaml.safe_dump({**args, "lr": 0.5}))
    words = ["--resume", "auto", "--output", str(tmp_path)]
    assert parse([*words, "--epochs", "4"])[1] == other
    assert parse([*words, "--lr", "0.1"])[1] == first
    config, resume = parse([*words, "--lr", "0.3"])
    assert resume is None and config.optim.lr == 0.3
    shutil.rmtree(other / "checkpoints")
    assert parse(words)[1] == first
    assert parse([*words, "--experiment", first.name, "--lr", "0.7"])[1] == first
    # What torchrun starts again after a failure goes on by itself.
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert parse(["--output", str(tmp_path), "--lr", "0.1"])[1] == first


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same in two processes, half a batch each."""
    output = tmp_path_factory.mktemp("pair")
    words = [*EVERYTHING, "--batch-size", 32, "--checkpoint-hist", 99, "--output", output, "--experiment", "run"]
    done = run(*TORCHRUN, ROOT / "train_sfr.py", *words, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return output / "run"


def test_two_processes_resume_in_mid_epoch_with_the_same_bits(pair, tmp_path):
    assert len(cut(pair, tmp_path / "run", 5)["parts"]) == 2
    done = run(*TORCHRUN, ROOT / "train_sfr.py", "--resume", tmp_path / "run", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert differences(pair, tmp_path / "run") == []


def test_one_process_takes_up_what_two_left_and_the_other_way_round(pair, whole, tmp_path):
    for source, name, launcher, batch in ((pair, "one", [sys.executable], 64), (whole, "two", TORCHRUN, 32)):
        state = cut(source, tmp_path / name, 5)
        done = run(
            *launcher, ROOT / "train_sfr.py", "--resume", tmp_path / name, "--batch-size", batch, OMP_NUM_THREADS="1"
        )
        assert f"at epoch {state['epoch'] + 1}, batch {state['step'] + 1}" in done.stdout, done.stderr
        ours, theirs = (load_checkpoint(checkpoints(r / "checkpoints")[-1]) for r in (tmp_path / name, source))
        assert (ours["epoch"], ours["updates"]) == (theirs["epoch"], theirs["updates"])
        assert ours["last"]["images"] == 360


def test_another_batch_size_goes_on_after_the_images_seen(whole, tmp_path):
    state = cut(whole, tmp_path / "run", 1)  # twelve batches of 64
    done = run(*TRAIN, "--resume", tmp_path / "run", "--batch-size", 100, OMP_NUM_THREADS="1")
    assert state["images"] == 768 and "at epoch 1, batch 8" in done.stdout, done.stderr
    assert done.returncode == 0
