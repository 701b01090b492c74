"""Losses and gradients that are not finite: left out and written down, or the run stops."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from timm_sfr import RunConfig, UserError
from timm_sfr.training.evaluate import Scores
from timm_sfr.training.guards import FiniteGuard
from timm_sfr.training.run import prepare


def spoiled(tmp_path, policy, when, gradient=False):
    """A trainer on the digits, and the batches of its first epoch at which a loss, or a gradient, is not finite."""
    options = {"epochs": 1, "on_nonfinite": policy, "output": str(tmp_path), "experiment": "run", "device": "cpu",
               "smoothing": 0.2, "sfr_smoothing_source": "classes", "model_ema": True}  # fmt: skip
    trainer = prepare(RunConfig.from_flat(options))
    compute, calls = trainer.task.forward, iter(range(10**6))
    trainer.losses = []

    def forward(image, target):
        bad = next(calls) in when
        if bad and not gradient:
            image = image * float("nan")
        result = compute(image, target)
        if bad and gradient:
            result["output"].register_hook(lambda g: g * float("inf"))
        trainer.losses.append(result["loss"].item())
        return result

    trainer.task.forward = forward
    return trainer


def finite(trainer):
    tensors = [*trainer.exported_model().state_dict().values(), *trainer.task.plain_model.state_dict().values(),
               *trainer.task.get_sums().values(), trainer.task.smoothing.table]  # fmt: skip
    return all(tensor.isfinite().all() for tensor in tensors)


@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
def test_a_batch_that_is_not_finite_is_left_out_and_written_down(tmp_path, gradient):
    trainer = spoiled(tmp_path, "skip", {3, 4}, gradient)
    means = trainer.train_epoch(0)
    assert trainer.guard.skipped == 2 and trainer.state.updates == len(trainer.batches) and finite(trainer)
    finite_losses = [loss for loss in trainer.losses if math.isfinite(loss)]
    assert len(finite_losses) == len(trainer.batches) - 2 * (not gradient)
    assert means["loss"] == pytest.approx(sum(finite_losses) / len(finite_losses), rel=1e-6)
    events = json.loads((tmp_path / "run/nonfinite.json").read_text())
    assert [(event["epoch"], event["batch"], event["update"]) for event in events] == [(1, 4, 4), (1, 5, 5)]
    assert events[0]["term"] == ("gradient" if gradient else "task_loss") and events[0]["action"] == "skip"
    keys = trainer.batches.sampler.keys(0)[3 * 64 : 4 * 64]
    assert events[0]["files"] == [f"number {key % 1437}" for key in keys]


def test_under_a_gradient_scaler_nothing_but_the_scaler_leaves_updates_out():
    accelerator = SimpleNamespace(device=torch.device("cpu"), scaler=object(), num_processes=1)
    for scaled, bad in ((True, None), (False, "task_loss")):
        accelerator.scaler = object() if scaled else None
        guard = FiniteGuard(accelerator)
        guard.terms.send(torch.tensor([float("inf"), float("inf"), 0, 0, 0]))
        assert not guard.check_terms()
        guard.settle()
        assert (guard.bad and guard.bad[0]) == bad


@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
def test_by_default_it_stops_the_run(tmp_path, gradient):
    trainer = spoiled(tmp_path, "stop", {3}, gradient)
    with pytest.raises(UserError, match=r"non-finite (loss|gradients) at epoch 1, update 4: .* stopped before the update"):
        trainer.train_epoch(0)
    assert trainer.state.updates == 3 and all(p.isfinite().all() for p in trainer.task.plain_model.parameters())
    assert len(json.loads((tmp_path / "run/nonfinite.json").read_text())) == 1


def test_too_many_in_a_row_stop_it_anyway(tmp_path):
    trainer = spoiled(tmp_path, "skip", range(2, 99))
    with pytest.raises(UserError, match="11 updates in a row were skipped, the last at epoch 1, update 13"):
        trainer.train_epoch(0)
    assert finite(trainer)


def test_outputs_that_are_not_finite_in_validation_stop_the_run_or_count_as_wrong(tmp_path):
    trainer = spoiled(tmp_path, "stop", ())
    with torch.no_grad():
        next(trainer.task.plain_model.parameters()).fill_(float("nan"))
        trainer.task.update_ema(step=1)
    trainer.task.get_eval_model = lambda ema=False: trainer.task.plain_model
    with pytest.raises(UserError, match=r"non-finite outputs in validation, .* 360 of 360 images; stopped, .*--lr"):
        trainer.validate()
    trainer.guard.policy = "skip"
    scores = trainer.validate()
    assert scores["nonfinite"] == scores["images"] == 360 and scores["top1"] == 0 and math.isnan(scores["loss"])


def test_one_output_that_is_not_finite_leaves_the_others_scores_alone():
    scores = Scores(torch.device("cpu"))
    logits = torch.eye(4)[:, :3] * 5
    logits[3] = float("nan")
    scores.add(logits, torch.tensor([0, 1, 0, 2]))
    result = scores.result()
    assert result["top1"] == 50 and result["nonfinite"] == 1 and math.isfinite(result["ece"])
