"""Dynamic label smoothing."""

import pytest
import torch
import torch.nn.functional as F
from timm.data.mixup import mixup_target
from timm.loss import LabelSmoothingCrossEntropy

from timm_sfr import DynamicLabelSmoothing, UserError
from timm_sfr.smoothing import ramp

OPTIONS = [(source, schedule) for source in ("uniform", "classes") for schedule in ("constant", "ramp", "confidence")]


@pytest.mark.parametrize("source,schedule", OPTIONS)
@pytest.mark.parametrize("mixed", [False, True])
def test_targets_are_distributions(source, schedule, mixed):
    smoothing = DynamicLabelSmoothing(7, 0.3, source, schedule)
    logits, target = torch.randn(32, 7) * 4, torch.randint(0, 7, (32,))
    for epoch in range(3):
        smoothing.set_epoch(epoch, 3)
        y = mixup_target(target, 7, lam=0.3) if mixed else target
        smoothed, epsilon = smoothing.targets(logits, y)
        assert torch.allclose(smoothed.sum(1), torch.ones(32), atol=1e-6) and (smoothed >= 0).all()
        assert 0 <= epsilon <= 0.3 + 1e-6
        smoothing(logits, y)
        smoothing.end_epoch()


@pytest.mark.parametrize("source,schedule", OPTIONS)
def test_epsilon_zero_is_plain_cross_entropy(source, schedule):
    logits, target = torch.randn(16, 5), torch.randint(0, 5, (16,))
    loss, _ = DynamicLabelSmoothing(5, 0.0, source, schedule)(logits, target)
    assert torch.equal(loss, F.cross_entropy(logits, target))


def test_uniform_constant_is_timms_label_smoothing():
    logits, target = torch.randn(16, 5), torch.randint(0, 5, (16,))
    loss, epsilon = DynamicLabelSmoothing(5, 0.1)(logits, target)
    assert torch.allclose(loss, LabelSmoothingCrossEntropy(0.1)(logits, target), atol=1e-6) and epsilon == 0.1


def test_ramp_goes_from_nothing_to_epsilon():
    assert [ramp(0.2, epoch, 5) for epoch in range(5)] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert ramp(0.2, 0, 1) == 0.2


def test_confidence_is_larger_where_the_model_is_surer():
    logits = torch.tensor([[0.0, 0.0], [1.0, 0.0], [50.0, 0.0]])
    smoothed, _ = DynamicLabelSmoothing(2, 0.2, schedule="confidence").targets(logits, torch.zeros(3, dtype=torch.long))
    assert smoothed[0, 0] == 1 and smoothed[0, 0] > smoothed[1, 0] > smoothed[2, 0]
    assert smoothed[2, 0] == pytest.approx(0.9, abs=1e-6)


def test_class_table_is_the_mean_prediction_of_right_samples():
    smoothing = DynamicLabelSmoothing(3, 0.5, "classes")
    logits = torch.tensor([[3.0, 1.0, 0.0], [2.0, 0.0, 1.0], [0.0, 5.0, 0.0], [9.0, 0.0, 0.0]])
    target = torch.tensor([0, 0, 0, 1])  # the third and the fourth are wrong
    smoothing(logits[:2], target[:2])
    smoothing(logits[2:], target[2:])
    smoothing.end_epoch()
    assert torch.allclose(smoothing.table[0], logits[:2].softmax(1).mean(0), atol=1e-6)
    assert torch.allclose(smoothing.table[1:], torch.full((2, 3), 1 / 3))
    before = smoothing.table.clone()
    smoothing.end_epoch()  # an epoch without a right sample leaves the table as it was
    assert torch.equal(smoothing.table, before)


def test_the_q_of_a_mixture_is_the_mixture_of_q():
    smoothing = DynamicLabelSmoothing(3, 0.5, "classes")
    smoothing.table.copy_(torch.rand(3, 3).softmax(1))
    y = torch.tensor([[0.25, 0.75, 0.0]])
    smoothed, _ = smoothing.targets(torch.zeros(1, 3), y)
    q = 0.25 * smoothing.table[0] + 0.75 * smoothing.table[1]
    assert torch.allclose(smoothed, 0.5 * y + 0.5 * q, atol=1e-6)


def test_evaluation_does_not_count():
    smoothing = DynamicLabelSmoothing(3, 0.5, "classes").eval()
    smoothing(torch.eye(3), torch.arange(3))
    assert smoothing.counts.sum() == 0


@pytest.mark.parametrize("arguments", [(1,), (3, 1.0), (3, -0.1), (3, 0.1, "class"), (3, 0.1, "uniform", "cosine")])
def test_bad_options_are_refused(arguments):
    with pytest.raises(UserError):
        DynamicLabelSmoothing(*arguments)
