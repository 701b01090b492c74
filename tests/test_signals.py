"""Signals: a run that is asked to stop keeps a checkpoint and says how to go on."""

import os
import signal
import sys
import time

import pytest
from conftest import EVERYTHING, TORCHRUN, TRAIN, started, train

from benchmarks.faults import differences
from timm_sfr.cli.parser import INTERRUPTED
from timm_sfr.runs.checkpoints import checkpoints
from timm_sfr.training.guards import ECHO, Signals, _command


def test_sigterm_keeps_a_checkpoint_and_says_how_to_go_on(whole, tmp_path):
    words = (*EVERYTHING, "--output", tmp_path, "--experiment", "run", "--resume", "auto")
    process = started(tmp_path / "run", *TRAIN, *words)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED and "Traceback" not in err
    assert "stopped by SIGTERM after update" in err and f"train_sfr.py --resume {tmp_path / 'run'}" in err
    assert str(checkpoints(tmp_path / "run" / "checkpoints")[-1]) in err
    assert "resuming" in train(*words, OMP_NUM_THREADS="1").stdout
    assert differences(whole, tmp_path / "run") == []


@pytest.mark.slow
def test_ctrl_c_on_two_processes_keeps_a_checkpoint(tmp_path):
    """A terminal sends SIGINT to the launcher and to all that it started; torchrun then hands it on once more."""
    words = ("--epochs", 200, "-b", 32, "--checkpoint-interval", 5, "--device", "cpu", "--val-interval", 50, "--output", tmp_path,
             "--experiment", "run")  # fmt: skip
    process = started(tmp_path / "run", *TORCHRUN, TRAIN[1], *words, start_new_session=True)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=100)
    newest = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert f"the checkpoint {newest} is kept; continue with: " in err, out + err
    assert process.returncode != 0
    assert "resuming" in train("--resume", tmp_path / "run", "--epochs", 3, OMP_NUM_THREADS="1").stdout


def test_a_stop_for_the_whole_group_spares_the_loading_processes(folder, tmp_path):
    """SLURM, systemd and torchrun signal every process of a job."""
    words = ("--model", "resnet20_cifar", "--data-dir", folder, "--epochs", 500, "-b", 20, "-j", 2, "--checkpoint-interval", 1,
             "--output", tmp_path, "--experiment", "run")  # fmt: skip
    process = started(tmp_path / "run", *TRAIN, *words, start_new_session=True)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED and "stopped by SIGTERM" in err and len(err.splitlines()) == 1, err


class Alone:
    num_processes = 1


@pytest.mark.parametrize("started,processes,cpu,expected", [
    ("/x/timm-sfr", 1, True, "timm-sfr train"), ("train_sfr.py", 1, True, "python train_sfr.py"),
    ("../a b/train_sfr.py", 1, False, "python '../a b/train_sfr.py'"), ("/x/pytest", 1, True, "python train_sfr.py"),
    ("/x/timm-sfr", 2, True, "torchrun --nproc-per-node 2 --no-python timm-sfr train"),
    ("train_sfr.py", 4, False, "accelerate launch --num_processes 4 train_sfr.py"),
])  # fmt: skip
def test_the_command_to_go_on_with_is_the_one_that_was_given(started, processes, cpu, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", [started])
    assert _command(processes, cpu) == expected


@pytest.fixture
def interruptible():
    """Python's own handler of SIGINT, which a shell's background job ignores."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_signals_are_noted_and_a_second_interrupt_is_not(interruptible):
    with Signals(Alone()) as signals:
        assert signals.asked(1) == (None, False)
        signal.raise_signal(signal.SIGUSR1)
        assert signals.asked(2) == (None, True) and signals.asked(3) == (None, False)
        signal.raise_signal(signal.SIGINT)
        assert signals.asked(4) == (signal.SIGINT, False)
        signal.raise_signal(signal.SIGINT)  # at once: the launcher's echo of the same Ctrl-C
        time.sleep(ECHO + 0.1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
