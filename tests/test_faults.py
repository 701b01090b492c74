"""Runs that are stopped, killed or damaged: nothing that was saved is lost, and what goes on ends with the same bits."""

import json
import os
import shutil
import signal
import subprocess
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from conftest import ALONE, EVERYTHING, TORCHRUN, TRAIN, change, cut, run, started, summary, train, train_pair

from benchmarks.faults import differences
from timm_sfr import RunConfig, UserError
from timm_sfr.cli.parser import INTERRUPTED
from timm_sfr.cli.train import parse
from timm_sfr.config import OptimConfig
from timm_sfr.method.smoothing import own_epsilon
from timm_sfr.runs.checkpoints import Damaged, checkpoints, load_checkpoint, load_newest, save_checkpoint, set_aside
from timm_sfr.training.optimizer import create_optimizer, create_schedule
from timm_sfr.training.recorder import Recorder
from timm_sfr.training.run import prepare
from timm_sfr.training.run_state import RunState, _check_optimizer, restore


def state(updates=0, value=0.0):
    place = {"epoch": updates // 10, "step": updates % 10, "images": updates % 10 * 64, "updates": updates}
    return {**place, "module": {"x": torch.full((300,), value)}, "best": {"val_top1": 1.5}}


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path):
    for updates in range(6):
        save_checkpoint(tmp_path, state(updates), keep=2, best=updates == 1)
    assert [load_checkpoint(path)["updates"] for path in checkpoints(tmp_path)] == [1, 4, 5]
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in checkpoints(tmp_path)}, "no leftovers"


def test_damage_is_found_and_the_one_before_is_taken(tmp_path):
    save_checkpoint(tmp_path, state(1, 1.0), 5, False)
    newest = save_checkpoint(tmp_path, state(2, 2.0), 5, False)
    said = []
    for file in newest.iterdir():  # test_fuzz.py has all kinds of damage
        whole = file.read_bytes()
        for damaged in (bytes([whole[0] ^ 1]) + whole[1:], whole[: len(whole) // 2], whole[:-1] + b"\r" + whole[-1:], None):
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            with pytest.raises(Damaged, match="is damaged"):
                load_checkpoint(newest)
        assert load_newest(tmp_path, said.append)["updates"] == 1 and "trying the one before it" in said[-1]
        file.write_bytes(whole)
    assert load_checkpoint(newest)["module"]["x"][0] == 2.0
    for path in checkpoints(tmp_path):
        (path / "state.pt").unlink()
    with pytest.raises(UserError, match=r"no intact checkpoint in .* \(2 damaged\)"):
        load_newest(tmp_path, said.append)


def test_a_checkpoint_that_is_cut_off_while_it_is_written_leaves_those_before(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, state(1), 5, False)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda state, file: (file.write(b"half"), (_ for _ in ()).throw(KeyboardInterrupt))[0])
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


@pytest.mark.parametrize("keep", [1, 5])
def test_resuming_in_mid_epoch_ends_with_the_same_bits(whole, tmp_path, keep):
    state = cut(whole, tmp_path / "run", keep)
    assert state["step"] > 0 and state["parts"]
    done = train("--resume", tmp_path / "run", OMP_NUM_THREADS="1")
    assert f"at epoch {state['epoch'] + 1}, batch {state['step'] + 1}" in done.stdout
    assert differences(whole, tmp_path / "run") == []


@pytest.mark.slow
def test_two_runs_do_not_share_a_folder(tmp_path):
    words = ("--epochs", "500", "--output", str(tmp_path), "--experiment", "run")
    first = subprocess.Popen([*TRAIN, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ALONE)
    while first.poll() is None and not (tmp_path / "run" / "args.yaml").exists():
        time.sleep(0.02)
    done = run(*TRAIN, *words)
    assert done.returncode == 2 and "another process is training in" in done.stderr
    first.send_signal(signal.SIGTERM)
    _, err = first.communicate(timeout=60)
    assert first.returncode == INTERRUPTED, err


def test_other_options_on_resume_take_effect(whole, tmp_path):
    """The schedule goes by the images seen, and the optimizer takes the new options."""
    cut(whole, tmp_path / "run", 7)  # some way into the second epoch
    options = yaml.safe_load((whole / "args.yaml").read_text())
    path = tmp_path / "run"
    kept = load_newest(path / "checkpoints", print)
    for changed in ({"grad_accum_steps": 4}, {"batch_size": 32}, {"weight_decay": 0.3, "momentum": 0.1, "smoothing": 0.4}):
        config = RunConfig.from_flat({**options, **changed, "device": "cpu"})
        trainer = prepare(config, path)
        restore(trainer, load_newest(path / "checkpoints", print))
        trainer.workspace.release()
        accum, batches = config.optim.grad_accum_steps, len(trainer.batches)
        assert trainer.state.step % accum == 0 and trainer.state.step * trainer.global_batch <= kept["images"]
        assert trainer.state.updates == kept["epoch"] * -(-batches // accum) + trainer.state.step // accum
        group = trainer.optimizer.param_groups[0]
        assert group["momentum"] == config.optim.momentum
        assert trainer.optimizer.param_groups[-1]["weight_decay"] in (0, config.optim.weight_decay)
        trainer.task.set_epoch(1, 3)
        given = config.sfr.smoothing  # None: a third epoch's share of the strength that SFR finds
        assert float(trainer.task.smoothing.epsilon_t) == pytest.approx(own_epsilon(10, 3) if given is None else given)


def test_a_finished_run_stays_as_it_is(finished):
    before = (finished / "args.yaml").read_bytes()
    done = train("--resume", finished, "--lr", 0.5, "--seed", 7)
    assert "nothing is left to train: 4 epochs of 4 done" in done.stdout
    assert "these options change nothing now: lr 0.5 (was 0.1), seed 7 (was 42)" in done.stdout
    assert "resuming" not in done.stdout and (finished / "args.yaml").read_bytes() == before
    shutil.rmtree(finished / "model")
    assert "is gone, and only a new best epoch writes it" in train("--resume", finished, ok=False).stderr


@pytest.mark.slow
@pytest.mark.parametrize("words,sfr_warmup", [
    (("--sched", "plateau", "--patience-epochs", 1, "--lr", 1e-6, "--epochs", 5, "--warmup-epochs", 0), 1),
    (("--opt", "novograd", "--lr", 0.001, "--epochs", 4), 0),  # it keeps one number for a whole parameter
    (("--epochs", 3, "--lr-cycle-limit", 2, "--sfr-decay-epochs", 1), 1),  # lambda's warm-up is a share of all 6 epochs
], ids=["plateau", "novograd", "cycles"])  # fmt: skip
def test_what_depends_on_all_epochs_goes_on_to_the_same_bits(words, sfr_warmup, tmp_path):
    train(*words, "--img-size", 16, "--checkpoint-hist", 9, "--output", tmp_path, "--experiment", "whole")
    cut(tmp_path / "whole", tmp_path / "run", 2)
    train("--resume", tmp_path / "run")
    assert differences(tmp_path / "whole", tmp_path / "run") == []
    assert yaml.safe_load((tmp_path / "whole/args.yaml").read_text())["sfr_warmup_epochs"] == sfr_warmup


@pytest.mark.slow
def test_a_plateaus_options_may_change(tmp_path):
    words = ("--img-size", 16, "--epochs", 2, "--warmup-epochs", 0, "--output", tmp_path, "--experiment", "run")
    train(*words)
    assert float(summary(tmp_path / "run")[-1]["lr"]) < 0.1, "a cosine's end"
    train("--resume", tmp_path / "run", "--epochs", 3, "--sched", "plateau")
    assert float(summary(tmp_path / "run")[-1]["lr"]) == 0.1, "a new plateau begins at the rate of the options"
    words = ("--lr", 0.001, "--patience-epochs", 3, "--decay-rate", 0.5, "--warmup-epochs", 1)
    train("--resume", tmp_path / "run", "--epochs", 4, *words)
    assert float(summary(tmp_path / "run")[-1]["lr"]) == 0.001
    schedule = load_checkpoint(checkpoints(tmp_path / "run/checkpoints")[-1])["schedule"]
    assert (schedule["patience"], schedule["factor"]) == (3, 0.5) and schedule["last_epoch"] == 2


def test_a_plateau_resumes_its_scores_and_takes_its_options():
    """What it has seen goes on; how patient it is, and how much it lowers the rate, are options."""

    def made(**options):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        return create_schedule(OptimConfig(sched="plateau", epochs=9, **{"warmup_epochs": 0} | options), optimizer, 4)

    before, after = made(), made(patience_epochs=1, decay_rate=0.5, min_lr=0.01)
    for epoch, score in enumerate((50.0, 40.0, 30.0)):
        before.after_epoch(epoch, score)
    after.resume(3, 12, before.state(), own_rate=False)
    inner = after.scheduler.lr_scheduler
    assert (inner.best, inner.num_bad_epochs, inner.last_epoch) == (50.0, 2, 3)
    assert (inner.patience, inner.factor, inner.min_lrs) == (1, 0.5, [0.01])
    # A rate of its own is that after the warm-up, or the warm-up's, and without the noise before.
    for epoch, rate in ((0, 1e-5), (1, 1e-5 + (0.1 - 1e-5) / 2), (2, 0.1), (7, 0.1)):
        fresh = made(warmup_epochs=2, warmup_lr=1e-5)
        fresh.resume(epoch, 4 * epoch, {**before.state(), "restore_lr": [3.0]})
        assert fresh.scheduler.optimizer.param_groups[0]["lr"] == pytest.approx(rate) and fresh.scheduler.restore_lr is None


@pytest.mark.parametrize("opt", ["novograd", "adamw", "lamb", "lion"])
def test_the_state_of_any_optimizer_fits(opt):
    module = torch.nn.Conv2d(3, 4, 3)
    optimizer = create_optimizer(OptimConfig(opt=opt), module, 0.01)
    module(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    _check_optimizer(optimizer.param_groups, state)
    names = ("exp_avg_sq", "exp_avg")
    entry, name = next((e, n) for e in state["state"].values() for n in names if e.get(n) is not None and e[n].numel() > 1)
    entry[name] = torch.zeros(2)
    with pytest.raises(ValueError, match="its parameter"):
        _check_optimizer(optimizer.param_groups, state)


def test_the_warm_up_of_lambda_is_a_share_of_all_epochs(tmp_path):
    options = {"epochs": 3, "lr_cycle_limit": 2, "device": "cpu", "batch_size": 256}
    learner = prepare(RunConfig.from_flat({**options, "output": str(tmp_path)}))
    assert learner.schedule.epochs == 6
    assert (learner.config.optim.warmup_epochs, learner.config.sfr.warmup_epochs) == (0, 1)


def test_damaged_checkpoints_are_set_aside(tmp_path):
    for updates in (1, 2, 3):
        save_checkpoint(tmp_path, state(updates), 5, False)
    newest = checkpoints(tmp_path)[-1]
    (newest / "state.pt").write_bytes(b"")
    set_aside(tmp_path, load_newest(tmp_path, lambda line: None))
    assert len(checkpoints(tmp_path)) == 2 and (tmp_path / f"damaged-{newest.name}").is_dir()
    save_checkpoint(tmp_path, state(2, 5.0), 1, False)
    assert [load_checkpoint(path)["updates"] for path in checkpoints(tmp_path)] == [2]


def limited(kilobytes, *words):
    """Runs the command with a limit on the size of a file: writes fail for real, as on a full disk."""
    code = (
        f"import resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, ({1024 * kilobytes},) * 2)\n"
        f"import train_sfr\nsys.exit(train_sfr.main({[str(word) for word in (*TRAIN[2:], *words)]}))"
    )
    return run(TRAIN[0], "-c", code)


def test_a_checkpoint_that_does_not_fit_stops_the_run_or_is_skipped(tmp_path):
    words = ("--epochs", 1, "--output", tmp_path)
    done = limited(1800, *words, "--experiment", "stop")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "output: a checkpoint cannot be written" in done.stderr and "--on-full-disk skip" in done.stderr
    done = limited(1800, *words, "--on-full-disk", "skip", "--experiment", "skip")
    assert done.returncode == 0 and done.stdout.count("warning: a checkpoint cannot be written") == 1, done.stderr
    assert not checkpoints(tmp_path / "skip" / "checkpoints") and (tmp_path / "skip/model/model.safetensors").exists()


def test_scores_stay_with_the_weights_that_they_are_of(tmp_path):
    """If the best model cannot be written, metrics and card go on to describe the one that is there."""
    described = []

    def write(folder, state, facts):
        if facts.metrics["best"]["epoch"] == 1:
            raise OSError(28, "No space left on device")
        folder.mkdir()

    exporter = SimpleNamespace(write=write, describe=lambda folder, facts: described.append(facts.metrics["best"]["epoch"]))
    config = RunConfig.from_flat({"on_full_disk": "skip"})
    recorder = Recorder(SimpleNamespace(run=tmp_path, main=True), config, {}, 3, exporter, *[None] * 3, False, None)
    model, seen = torch.nn.Identity(), SimpleNamespace(by_class=None)
    scores = [{"epoch": epoch, "val_top1": top1} for epoch, top1 in enumerate((50.0, 80.0, 70.0))]
    for last, best, improved in ((0, 0, True), (1, 1, True), (2, 1, False)):
        state = RunState(epoch=last + 1, best=scores[best], last=scores[last])
        recorder.write_epoch(state, improved, model, seen)
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["best"] == scores[0] and found["last"] == scores[2] and described == [0]
    assert recorder.best_in_model(state) == scores[0]


FULL = """
mount -t tmpfs -o size={size} tmpfs {place} || exit 99
"${{@}}" --output {place} --experiment run; echo "status $?"
mount -o remount,size=64m {place}
{python} {train} --resume {place}/run; echo "status $?"
cp -r {place}/run {kept}
"""


@pytest.mark.slow
def test_a_disk_that_fills_up(tmp_path):
    """A small tmpfs, for real: the run stops in one line, what was kept is whole, and it goes on once there is room."""
    words = ("--epochs", 3, "--img-size", 16, "--batch-size", 64, "-j", 0)
    train(*words, "--output", tmp_path, "--experiment", "whole", OMP_NUM_THREADS="1")
    # What the run holds after its first epoch, and half of what the second one writes beside it.
    newest = checkpoints(tmp_path / "whole/checkpoints")[-1]
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in (newest, tmp_path / "whole/model")]
    (tmp_path / "disk").mkdir()
    script = FULL.format(size=int(1.5 * sum(sizes)), place=tmp_path / "disk", python=TRAIN[0], train=TRAIN[1],
                         kept=tmp_path / "kept")  # fmt: skip
    done = run("unshare", "-rm", "bash", "-c", script, "bash", *TRAIN, *words, OMP_NUM_THREADS="1")
    if done.returncode == 99 or "unshare failed" in done.stderr:
        pytest.skip("no tmpfs can be mounted here")
    assert [line for line in done.stdout.splitlines() if line.startswith("status")] == ["status 2", "status 0"], done.stderr
    assert "cannot be written" in done.stderr and len(done.stderr.splitlines()) == 1
    assert "epoch-00001-image" in done.stderr, "the first epoch's checkpoint is what is kept"
    assert not differences(tmp_path / "whole", tmp_path / "kept")


def test_auto_takes_the_newest_run_of_the_same_options(digits_run, tmp_path, monkeypatch):
    names = ("20260101-000000-resnet20_cifar", "20260102-000000-resnet20_cifar")
    first, other = (shutil.copytree(digits_run[0], tmp_path / name) for name in names)
    change(other / "args.yaml", lr=0.5)
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
    assert parse(["--resume", str(first), "--no-resume-opt"])[0].engine.resume_opt, "it was for the start before"


@pytest.mark.parametrize("words", ["--input-size 3 16 16", "--amp --device cpu", "--start-epoch 1", "--no-resume-opt",
                                   "--mean 0.5 --std 0.25"])  # fmt: skip
def test_auto_knows_options_that_a_run_records_otherwise(words, digits_run, tmp_path):
    run = shutil.copytree(digits_run[0], tmp_path / "20260101-000000-resnet20_cifar")
    change(run / "args.yaml", start_epoch=1, device="cpu", mixed_precision="bf16")
    if "--mean" in words:
        change(run / "args.yaml", mean=[0.5] * 3, std=[0.25] * 3)
    for more, found in ((words.split(), run), (["--input-size", "3", "16", "24"], None), (["--start-epoch", "2"], None)):
        assert parse(["--resume", "auto", "--output", str(tmp_path), *more])[1] == found


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same in two processes, half a batch each."""
    output = tmp_path_factory.mktemp("pair")
    words = (*EVERYTHING, "--batch-size", 32, "--output", output, "--experiment", "run")
    done = train_pair(*words)
    assert done.returncode == 0, done.stderr
    return output / "run"


@pytest.mark.slow
def test_two_processes_resume_in_mid_epoch_with_the_same_bits(pair, tmp_path):
    assert len(cut(pair, tmp_path / "run", 5)["parts"]) == 2
    done = train_pair("--resume", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert differences(pair, tmp_path / "run") == []


@pytest.mark.slow
def test_one_process_takes_up_what_two_left_and_the_other_way_round(pair, whole, tmp_path):
    for source, name, train_on, batch in ((pair, "one", train, 64), (whole, "two", train_pair, 32)):
        state = cut(source, tmp_path / name, 5)
        done = train_on("--resume", tmp_path / name, "--batch-size", batch)
        assert f"at epoch {state['epoch'] + 1}, batch {state['step'] + 1}" in done.stdout, done.stderr
        ours, theirs = (load_checkpoint(checkpoints(r / "checkpoints")[-1]) for r in (tmp_path / name, source))
        assert (ours["epoch"], ours["updates"]) == (theirs["epoch"], theirs["updates"])
        assert ours["last"]["images"] == 360


def test_another_batch_size_goes_on_after_the_images_seen(whole, tmp_path):
    state = cut(whole, tmp_path / "run", 1)  # twelve batches of 64: seven of 100, of which whole groups of two count
    done = train("--resume", tmp_path / "run", "--batch-size", 100, OMP_NUM_THREADS="1")
    assert state["images"] == 768 and "at epoch 1, batch 7" in done.stdout


def kill_a_rank(output, *launcher_words):
    """Starts two processes, kills one (SIGKILL) after the first checkpoint; the launcher, and when it was."""
    words = (*EVERYTHING, "--batch-size", 32, "--output", output, "--experiment", "run")
    process = started(output / "run", *TORCHRUN, *launcher_words, TRAIN[1], *words, stderr=subprocess.STDOUT)
    ranks = [child for child in psutil.Process(process.pid).children() if "train_sfr.py" in " ".join(child.cmdline())]
    assert len(ranks) == 2
    ranks[1].kill()
    return process, time.monotonic()


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_soon(tmp_path):
    process, killed = kill_a_rank(tmp_path)
    printed, _ = process.communicate(timeout=60)
    print(f"ended {time.monotonic() - killed:.1f} s after the kill")
    assert process.returncode != 0 and "Signal 9" in printed


@pytest.mark.slow
def test_after_a_killed_rank_torchrun_goes_on_by_itself_with_the_same_bits(pair, tmp_path):
    process, _ = kill_a_rank(tmp_path, "--max-restarts", "1")
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0 and "resuming" in printed, printed
    assert differences(pair, tmp_path / "run") == []
