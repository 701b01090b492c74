import contextlib
import csv
import gc
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share the cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import timm
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from hub_server import Hub
from warm import HUB, Warm, can_start, read_hub_settings

import train_sfr
from benchmarks import faults
from timm_sfr.cli.main import main as timm_sfr_main
from timm_sfr.data.datasets import Digits
from timm_sfr.method.channels import group_channels
from timm_sfr.method.probe import forward_taps
from timm_sfr.method.sinkhorn import cost_matrix, unit
from timm_sfr.method.tapped_model import to_nodes
from timm_sfr.method.taps import choose_taps
from timm_sfr.runs.checkpoints import checkpoints, load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
TRAIN = [sys.executable, str(ROOT / "train_sfr.py"), "--report-interval", "0"]  # test_report.py has reports
COMMAND = [sys.executable, "-m", "timm_sfr.cli.main"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
EVERYTHING = (*faults.EVERYTHING, "--channels-last", "--checkpoint-hist", 99)
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}
STARTED = dict(os.environ)
WARM = Warm(STARTED)


def run(*words, timeout=600, **env):
    """Runs a command as a user would: its exit status, and what it printed on standard output and error.

    One of our own commands runs in this process, if at most the Hub's settings in the environment change; COLD=1 runs all
    in new ones.
    """
    words, env = [str(word) for word in words], {**os.environ, **env}
    if "COLD" not in os.environ:
        changed = {name for name in {*env, *os.environ} if env.get(name) != os.environ.get(name)}
        if all(name.startswith(HUB) for name in changed):
            if words[:2] == TRAIN[:2]:
                return run_here(train_sfr.main, words[2:], env)
            if words[:3] == COMMAND:
                return run_here(timm_sfr_main, words[3:], env)
        if can_start(words, env, STARTED):
            return WARM.run(words[1:], env, ROOT, timeout)
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout, env=env, cwd=ROOT)


@contextlib.contextmanager
def environment(env):
    """A context in which the environment is `env`, also for huggingface_hub."""
    before = dict(os.environ)
    if env == before:
        yield
        return
    try:
        os.environ.clear()
        os.environ.update(env)
        read_hub_settings()
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        read_hub_settings()


def run_here(main, words, env):
    """Runs a command in this process, from the repository's root, with streams of its own."""
    out, err, place = io.StringIO(), io.StringIO(), os.getcwd()
    logging.getLogger("timm_sfr").handlers.clear()  # the next handler takes the new standard output
    os.chdir(ROOT)
    try:
        with environment(env), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.resetwarnings()
            warnings.simplefilter("ignore", DeprecationWarning)  # as Python does by default
            try:
                status = main(words)
            except SystemExit as stop:
                status = stop.code or 0
            except Exception:
                traceback.print_exc()
                status = 1
    finally:
        os.chdir(place)
        logging.getLogger("timm_sfr").handlers.clear()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        gc.freeze()  # the run has undone the session's
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session", autouse=True)
def _cold():
    gc.freeze()
    yield
    WARM.close()


def train(*words, ok=True, **env):
    """The training script on these words, which ends well, or with an error of ours."""
    done = run(*TRAIN, *words, **env)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done


def train_pair(*words, **env):
    """The training script in two processes on the CPU, however it ends."""
    return run(*TORCHRUN, TRAIN[1], *words, OMP_NUM_THREADS="1", **env)


def finished_run(output, *words, **env):
    """The folder of a run that has ended, and what it printed."""
    done = train(*words, "--output", output, "--experiment", "run", **env)
    return output / "run", done.stdout


def started(run_dir, *command, **options):
    """A process that runs the command, as soon as the run in `run_dir` has a checkpoint; or it has ended."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ALONE, **options}
    process = subprocess.Popen([str(word) for word in command], **options)
    while process.poll() is None and not checkpoints(run_dir / "checkpoints"):
        time.sleep(0.02)
    return process


def change(path, **values):
    """Gives values in a JSON or YAML file of a run others."""
    load, dump = (yaml.safe_load, yaml.safe_dump) if path.suffix == ".yaml" else (json.loads, json.dumps)
    path.write_text(dump(load(path.read_text()) | values))


def summary(run_dir):
    """The rows of a run's summary.csv."""
    with (run_dir / "summary.csv").open() as file:
        return list(csv.DictReader(file))


def adds_up(row):
    """Whether the loss in a row of a summary.csv is the sum of its terms."""
    parts = float(row["task_loss"]) + float(row["sfr_weight"]) * float(row["sfr_loss"])
    return float(row["train_loss"]) == pytest.approx(parts, abs=1e-6)


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    yield
    # Accelerate keeps the first precision of a process; a test must not hand its own on.
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def command(capsys):
    """A function of the words of ``timm-sfr``: what it prints on standard output, or its one line of error at status 2."""

    def printed(*words, status=0):
        assert timm_sfr_main([str(word) for word in words]) == status
        out, err = capsys.readouterr()
        if status != 2:
            return out
        assert len(err.splitlines()) == 1 and err.startswith("error: ") and not out
        return err

    return printed


@pytest.fixture
def said():
    """What the package says, line by line."""
    logger, lines = logging.getLogger("timm_sfr"), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


@pytest.fixture
def hub():
    """A Hub on the loopback."""
    server = Hub()
    yield server
    server.close()


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """A finished run on the digits: all defaults but four epochs, and one report."""
    return finished_run(tmp_path_factory.mktemp("digits"), "--epochs", 4, "--report-interval", 4)


@pytest.fixture(scope="session")
def resnet_run(tmp_path_factory):
    """A finished run of an architecture that timm itself has."""
    words = ("--model", "test_resnet", "--img-size", 64, "--epochs", 1)
    return finished_run(tmp_path_factory.mktemp("resnet"), *words)


@pytest.fixture
def finished(digits_run, tmp_path):
    """A copy of a finished run."""
    return shutil.copytree(digits_run[0], tmp_path / "run")


@pytest.fixture(scope="session")
def real_features():
    """Costs between real tapped features: shallow and matched deep taps of the shipped model on validation digits."""
    model = timm.create_model("resnet20_cifar.sfr_digits", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    digits = Digits(train=False, mode="RGB")
    images = torch.stack([transform(digits[i][0]) for i in range(64)])
    plan = choose_taps(model)
    with torch.no_grad():
        _, maps = forward_taps(model, images, plan.indices)
    pairs = []
    for grid in ((4, 4), (2, 2)):
        deep = to_nodes(maps[-1], grid)
        for tap in maps[:-1]:
            for nodes in (to_nodes(tap, (4, 4)), to_nodes(tap, (7, 7))):
                u, v = unit(nodes), unit(group_channels(deep, nodes.shape[-1]))
                pairs.append((u, v, cost_matrix(u, v)))
    return pairs


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder dataset of real images: 3 classes of digits, 20 to train and 7 to validate on each."""
    root = tmp_path_factory.mktemp("data") / "folder"
    for training, split, count in ((True, "train", 20), (False, "val", 7)):
        digits = Digits(train=training, mode="RGB")
        for name in ("0", "1", "2"):
            (root / split / f"class{name}").mkdir(parents=True)
            chosen = [i for i in range(len(digits)) if str(digits[i][1]) == name][:count]
            for i in chosen:
                digits[i][0].resize((32, 32)).save(root / split / f"class{name}" / f"{i}.png")
    return root


def digits_table(root, val, label):
    """A CSV file with a column ``split``: of every digit 20 images to train, `val` to validate and 4 to test on."""
    digits = Digits(train=True, mode="RGB")
    (root / "images").mkdir()
    with (root / "digits.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label", "split"))
        for digit in range(10):
            chosen = [i for i in range(len(digits)) if digits[i][1] == digit][: 24 + val]
            for place, i in enumerate(chosen):
                digits[i][0].save(root / "images" / f"{i}.png")
                split = "train" if place < 20 else "val" if place < 20 + val else "test"
                writer.writerow((f"images/{i}.png", label(digit), split))
    return root / "digits.csv"


@pytest.fixture(scope="session")
def table(tmp_path_factory):
    """A table of digits, 5 of each to validate on."""
    return digits_table(tmp_path_factory.mktemp("table"), 5, str)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A run with everything on that draws random numbers, and all of its checkpoints."""
    return finished_run(tmp_path_factory.mktemp("whole"), *EVERYTHING, OMP_NUM_THREADS="1")[0]


def cut(whole, place, keep):
    """A copy of a run as it was when its checkpoint number `keep` was its newest."""
    shutil.copytree(whole, place)
    for path in checkpoints(place / "checkpoints")[keep + 1 :]:
        shutil.rmtree(path)
    return load_checkpoint(checkpoints(place / "checkpoints")[-1])
