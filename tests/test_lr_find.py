"""The learning-rate range test: its parts as formulas, and the command on the digits."""

import csv
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import COMMAND, ROOT, run

from timm_sfr import RunConfig
from timm_sfr.cli.lr_find import free_path, lines
from timm_sfr.training import lr_find
from timm_sfr.training.lr_find import RangeTest, diverged, exponential_rates, range_test, smooth_losses, steepest
from timm_sfr.training.run import assemble, start

LR_FIND = [*COMMAND, "lr-find"]
SHORT = ("--device", "cpu", "-b", 16, "--lr-updates", 12)


def test_rates_rise_by_one_factor():
    rates = exponential_rates(1e-5, 10, 61)
    assert rates[0] == 1e-5 and rates[-1] == pytest.approx(10)
    assert all(b / a == pytest.approx(10 ** (1 / 10)) for a, b in itertools.pairwise(rates))


def test_smoothing_is_a_weighted_mean():
    """A Gaussian of four updates for 100, which does not move a straight line, nor the place of a single peak."""
    losses = [0.0] * 30 + [1.0] + [0.0] * 30
    weights = [math.exp(-((i - 30) ** 2) / 2 / 4**2) for i in range(61)]
    expected = [weight / sum(weights) for weight in weights]
    assert smooth_losses(losses, 100) == pytest.approx(expected, abs=1e-4)
    assert smooth_losses(list(range(60)), 100)[20:40] == pytest.approx(list(range(20, 40)))


def test_the_suggestion_is_where_a_known_curve_falls_fastest():
    """A logistic fall around 0.03 per factor of the rate, and then a rise whose slopes do not count."""
    rates = exponential_rates(1e-5, 10, 241)
    fall = [2 - 1 / (1 + math.exp(-4 * math.log10(rate / 0.03))) for rate in rates]
    curve = [loss if rate < 1 else loss + 50 * math.log10(rate) for rate, loss in zip(rates, fall, strict=True)]
    assert steepest(rates, curve) == pytest.approx(0.03, rel=0.05)
    assert steepest(rates, [1.0 + rate for rate in rates]) is None


def test_when_the_test_ends():
    """Four times the smoothed minimum."""
    assert diverged([2.0, math.nan], 10) and diverged([math.inf], 10) and not diverged([100.0], 10)
    lowest = min(smooth_losses([2.0, 1.0, 1.5], 10))
    assert 1 < lowest < 2
    assert not diverged([2.0, 1.0, 1.5, 3.99 * lowest], 10) and diverged([2.0, 1.0, 1.5, 4.01 * lowest], 10)


def test_gradients_scale_with_the_batch_as_in_training():
    """A batch of half the mean size has half the gradient with linear scaling, and 0.71 of it with sqrt; SGD's step shows it."""
    steps = {}
    for mode in ("none", "linear", "sqrt"):
        options = {"batch_size": 32, "device": "cpu", "train_img_sizes": (8, 16), "train_batch_sizes": (16, 48),
                   "weight_decay": 0.0, "train_size_probs": (1, 1), "variable_batch_loss_scale": mode}  # fmt: skip
        config = RunConfig.from_flat(options)
        learner, _, _ = assemble(config, start(config))
        before = learner.module.model.fc.weight.detach().clone()
        range_test(learner, None, [1e-3])
        steps[mode] = learner.module.model.fc.weight.detach() - before
    share = learner.share(len(next(iter(learner.batches.epoch(0)))[1]))
    assert share != 1
    for mode, scale in (("linear", share), ("sqrt", share**0.5)):
        assert torch.allclose(steps[mode], scale * steps["none"], rtol=1e-4, atol=1e-8)
    assert learner.mean_batch == learner.sizes.average_batch == 32


def test_an_update_is_one_of_the_run(monkeypatch):
    """At rates that are all the same, the losses are those of a plain loop over the run's own batches, task and optimizer."""
    options = {"batch_size": 16, "device": "cpu", "opt": "adamw", "clip_grad": 1.0, "mixup": 0.2, "grad_accum_steps": 2,
               "sfr_weight": 0.5}  # fmt: skip
    config = RunConfig.from_flat(options)
    learner, _, _ = assemble(config, start(config))
    mixup = lr_find.create_mixup(config.aug, 10)
    found = range_test(learner, mixup, [1e-3] * 3)

    learner, _, _ = assemble(config, start(config))
    task, module = learner.task, learner.module
    # timm's groups, whose weight decays differ.
    groups = [{name: group[name] for name in ("params", "weight_decay")} for group in learner.optimizer.param_groups]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    task.set_epoch(10, 20)
    task.train()
    batches, losses = lr_find._batches(learner, lr_find.create_mixup(config.aug, 10)), []
    for _ in range(3):
        terms = []
        for _ in range(2):
            result = task(*next(batches))
            assert result["sfr_weight"] == 0.5 and result["loss"] == result["task_loss"] + 0.5 * result["sfr_loss"]
            (result["loss"] / 2).backward()
            terms.append(result["loss"].item() / 2)
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(terms))
    assert found == pytest.approx(losses, rel=1e-4) and len(set(found)) == 3


def test_the_command(tmp_path):
    """A suggestion within the rates, a picture and its figures, no run; the same again by the same seed."""
    words = (*SHORT, "--lr-low", 1e-3, "--lr-high", 1, "--output", tmp_path / "runs")
    done = run(*LR_FIND, *words, "--picture", tmp_path / "new" / "curve.svg")
    assert done.returncode == 0 and not (tmp_path / "runs").exists(), done.stderr
    assert (tmp_path / "new" / "curve.svg").read_text().startswith("<?xml")
    with (tmp_path / "new" / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["update"]) for row in rows] == list(range(1, len(rows) + 1)) and 2 <= len(rows) <= 12
    again = run(*LR_FIND, *words, "--json", "--picture", tmp_path / "again.png")
    found = json.loads(again.stdout)
    assert (tmp_path / "again.csv").read_text() == (tmp_path / "new" / "curve.csv").read_text()
    assert (tmp_path / "again.png").read_bytes()[:4] == b"\x89PNG"
    assert (found["batch"], found["updates"]) == (16, len(rows))
    assert 1e-3 < found["lr"] < 1
    assert f"suggestion: --lr {found['lr']:.2g}" in done.stdout and "a start, not an answer" in done.stdout
    assert "note: without effect here, as no run is written and the rate is varied: --output" in done.stdout
    other = run(*LR_FIND, *words, "--seed", 1, "--picture", tmp_path / "other.png")
    assert other.returncode in (0, 2) and (tmp_path / "other.csv").read_text() != (tmp_path / "again.csv").read_text()


def test_a_loss_that_diverges_ends_it(tmp_path):
    """At once at a rate that is far too high: then there is no suggestion, and the curve shows why."""
    done = run(*LR_FIND, *SHORT, "--lr-low", 1e3, "--lr-high", 1e6, "--picture", tmp_path / "curve.png")
    assert done.returncode == 2 and "of 12 updates" in done.stdout and "the test ended" in done.stdout
    assert "lr-high: no suggestion, because the smoothed loss never fell" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "curve.csv").is_file()


@pytest.mark.parametrize(
    "words,said",
    [
        (("--lr-low", "1", "--lr-high", "0.1"), "expected two rates above 0, --lr-low the smaller"),
        (("--lr-updates", "3"), "10 --lr-updates or more"),
        (("--picture", "x.jpeg"), "picture: expected a file that ends in .png, .svg, .pdf; got 'x.jpeg'"),
        (("--resume", "RUN"), "unrecognized arguments: --resume"),
        (("--lr-lwo", "1"), "did you mean '--lr-low'"),
    ],
)
def test_bad_input_is_refused_before_anything(words, said):
    done = run(*LR_FIND, *words)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not (ROOT / "lr-find.png").exists()


def test_a_fall_that_is_no_larger_than_the_scatter_is_uncertain():
    rates = exponential_rates(1e-4, 1, 40)
    for fall, uncertain in ((2.0, False), (0.1, True)):
        losses = [3 - fall * i / 40 + (0.1 if i % 2 else -0.1) for i in range(40)]
        smoothed = smooth_losses(losses, 40)
        test = RangeTest(rates, losses, smoothed, steepest(rates, smoothed), 32)
        said = "\n".join(lines(test, 40, (Path("a.png"), Path("a.csv"))))
        assert ("the suggestion is uncertain" in said) == uncertain and "suggestion: --lr" in said


def test_an_earlier_curve_is_kept(tmp_path):
    path = tmp_path / "lr-find.png"
    assert free_path(path) == path
    path.touch()
    (tmp_path / "lr-find-2.csv").touch()
    assert free_path(path) == tmp_path / "lr-find-3.png"
