"""What a run shows: bars in a terminal of any width, few lines where there is none, JSON for programs."""

import json
import logging
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl

import pytest
from conftest import ALONE, ROOT, TRAIN, run, started, summary, train

from timm_sfr.cli.parser import INTERRUPTED
from timm_sfr.training.progress import Progress
from timm_sfr.utils.console import clock, console_output, show_log


def in_terminal(columns, *words):
    """What a command writes to a terminal of so many columns."""
    master, slave = pty.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen([str(w) for w in words], stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, env=ALONE)
    os.close(slave)
    written, until = b"", time.monotonic() + 100
    while time.monotonic() < until and (process.poll() is None or select.select([master], [], [], 0)[0]):
        if select.select([master], [], [], 0.2)[0]:
            try:
                written += os.read(master, 65536)
            except OSError:  # the other end is closed
                break
    os.close(master)
    assert process.wait(timeout=10) == 0, written.decode()
    return written.decode()


def screen(written):
    """The lines that are left on an endless terminal, by the four controls that the bars use."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[A|\r|\n|[^\x1b\r\n]+", written):
        if part == "\x1b[A":
            row -= 1
        elif part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        else:
            line = lines[row].ljust(column)
            lines[row], column = line[:column] + part + line[column + len(part) :], column + len(part)
    return [line.rstrip() for line in lines]


@pytest.mark.parametrize("columns", [80, pytest.param(40, marks=pytest.mark.slow)])
def test_bars_in_a_terminal(columns, tmp_path):
    words = ("--epochs", 2, "-b", 64 if columns == 80 else 128, "--output", tmp_path, "--experiment", "run")
    written = in_terminal(columns, *TRAIN, *words)
    drawn = [part for part in re.split(r"\x1b\[A|\r|\n", written) if re.search(r" \d+%", part)]
    assert max(map(len, drawn)) <= columns, "a bar that is wider than the terminal wraps"
    of_run, of_epoch = ([part for part in drawn if part.startswith(name)] for name in ("run ", "epoch "))
    assert len(of_epoch) > 10 and len(of_run) > 10 and any(part.startswith("validation") for part in drawn)
    assert re.search(r"loss \d\.\d{4}, \d+ images/s" if columns == 80 else r"loss \d\.\d{4}", of_epoch[5])
    if columns == 80:
        assert re.search(r"\d:\d\d left$", of_epoch[5])
        assert re.search(r"top-1 \d+\.\d\d \(epoch 1\), \d:\d\d left$", of_run[-3]), of_run[-3]
    # Nothing of the bars is left; what is are the lines of a run without a terminal.
    left = screen(written)
    assert not [line for line in left if "%" in line]
    epochs = [line for line in left if line.startswith("epoch ")]
    assert [line.split()[1] for line in epochs] == ["1/2", "2/2"]
    assert all(re.fullmatch(r"epoch .* \| val loss .* images/s", line) for line in epochs)


def test_quiet_without_a_terminal(tmp_path):
    """Nothing on standard error, a line an epoch, and within one where it is long."""
    quick = "import timm_sfr.training.progress as p; p.LINE_EVERY = 0; import train_sfr; train_sfr.main({})"
    words = ["--report-interval", "0", "--epochs", "2", "--log-interval", "8", "--output", str(tmp_path), "--experiment"]
    done = run(sys.executable, "-c", quick.format([*words, "often"]))
    lines = [line for line in done.stdout.splitlines() if line.startswith("epoch ")]
    within = [line.split(":")[0] for line in lines if "batch" in line]
    assert within == ["epoch 1/2", "epoch 1/2", "epoch 2/2", "epoch 2/2"]
    shown = re.fullmatch(r"epoch 1/2: batch 16/22 \| loss \d\.\d+, \d+ images/s, \d:\d\d left; \d:\d\d left of the run", lines[1])
    assert shown and done.stderr == ""


def events(text):
    return [json.loads(line) for line in text.splitlines()]


def test_json_lines(tmp_path):
    done = train("--epochs", 3, "--val-interval", 2, "--json-logs", "--output", tmp_path, "--experiment", "run")
    found = events(done.stdout)
    assert done.stderr == "" and all({"event", "time", "text"} <= set(line) for line in found)
    start = found[0]
    assert (start["event"], start["parameters"], start["run"]) == ("start", 272474, str(tmp_path / "run"))
    rows = summary(tmp_path / "run")
    lines = [line for line in found if line["event"] == "epoch"]
    assert len(lines) == len(rows) == 3 and lines[0]["val_top1"] is None
    for line, row in zip(lines, rows, strict=True):
        for name, value in row.items():
            assert (line[name] is None) == (value == "")
            assert value == "" or line[name] == pytest.approx(float(value), rel=1e-6)
    assert [line["event"] for line in found[-3:]] == ["best", "message", "done"]
    assert found[-3]["best"]["val_top1"] == lines[found[-3]["best"]["epoch"]]["val_top1"]
    assert found[-1]["model"] == str(tmp_path / "run" / "model")
    done = run(sys.executable, "-c", found[-1]["load"] + "; print(model.num_classes)")
    assert done.stdout == "10\n", done.stderr


@pytest.mark.slow
def test_json_says_why_a_run_has_ended(tmp_path):
    words = ("--json-logs", "--output", tmp_path, "--experiment")
    done = run(*TRAIN, *words, "lr", "--epochs", 2, "--lr", 1e30)
    last = events(done.stdout)[-1]
    assert done.returncode == 2 and last["event"] == "error" and done.stderr == f"error: {last['text']}\n"
    assert "non-finite" in last["text"]
    process = started(tmp_path / "stop", *TRAIN, *words, "stop", "--epochs", 200, "--checkpoint-interval", 5)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    last = events(out)[-1]
    assert process.returncode == INTERRUPTED and last["event"] == "interrupted" and err == last["text"] + "\n"


def test_what_others_print_does_not_come_between(capsys):
    logger = logging.getLogger("timm_sfr")
    before, logger.handlers = logger.handlers, []
    try:
        with console_output(True):
            print("a download's noise")
            logger.warning("warning: a line")
            logger.info("nan", extra={"fields": {"event": "epoch", "loss": float("nan"), "val_top1": ""}})
        out, err = capsys.readouterr()
        show_log(False)
        logger.info("plain again")
    finally:
        logger.handlers = before
    first, second = events(out)
    assert err == "a download's noise\n" and (first["event"], first["text"]) == ("warning", "warning: a line")
    assert second["loss"] is None and second["val_top1"] is None
    assert capsys.readouterr().out == "plain again\n"


def test_time_left_counts_validation():
    progress = Progress(4, (30, 9), 2, 50, True)
    assert progress.work(4) == 4 * 30 + 2 * 3 and progress.work(1) == 30 and progress.work(2) == 63
    assert Progress(3, (30, 9), 2, 50, True).work(3) == 96  # the last epoch is always validated
    progress.begin(2, 10)  # of a run that goes on there: 63 + 10 of 126 are done
    for _ in range(10):
        progress.batch(32, 2.0)
    progress.began -= 20
    assert progress.left == pytest.approx(2 * 43, rel=0.01) and progress.mean_loss == 2.0
    assert list(progress.validating(range(9))) == list(range(9)) and progress.done == pytest.approx(86)
    assert (clock(5), clock(65), clock(3700), clock(400000)) == ("0:05", "1:05", "1:01:40", "4.6 days")
    assert clock(float("inf")) == "?"
