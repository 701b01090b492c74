"""Dynamic label smoothing."""

import math

import pytest
import torch
import torch.nn.functional as F
from timm.data.mixup import mixup_target
from timm.loss import LabelSmoothingCrossEntropy

from timm_sfr import DynamicLabelSmoothing, LossForm, RunConfig, SFRConfig, SFRTask, UserError
from timm_sfr.method.smoothing import label_capacity, own_epsilon, ramp
from timm_sfr.method.task import weight_at
from timm_sfr.training.run import prepare

OWN = (None, None, "constant")  # SFR's default: it finds its own strength
OPTIONS = [(source, schedule) for source in ("uniform", "classes") for schedule in ("constant", "ramp", "confidence")]


@pytest.mark.parametrize("form", [OWN] + [(0.3, *option) for option in OPTIONS])
@pytest.mark.parametrize("mixed", [False, True])
def test_targets_are_distributions(form, mixed):
    smoothing = DynamicLabelSmoothing(7, *form)
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


def test_own_strength_makes_the_right_class_a_hundred_times_as_probable_as_any_other_up_to_a_half():
    for classes in (2, 10, 50, 100):
        epsilon = own_epsilon(classes)
        other = epsilon / classes
        assert (1 - epsilon + other) / other == pytest.approx(100) if classes < 100 else epsilon == 0.5
    assert own_epsilon(1000) == own_epsilon(21841) == 0.5


def test_own_strength_is_near_nothing_in_short_training_and_whole_in_long():
    assert own_epsilon(100, 16) < 0.1 and 0.45 < own_epsilon(100, 48) < own_epsilon(100, 300) <= own_epsilon(100) <= 0.5
    assert own_epsilon(10, 48) == pytest.approx(10 / 109 * (1 - math.exp(-((48 / 32) ** 3))))
    strengths = [own_epsilon(100, epochs) for epochs in range(1, 100)]
    assert strengths == sorted(strengths)


def test_own_strength_follows_what_the_network_can_memorise():
    """1,024 images of 8 classes are 3,072 bits."""
    assert label_capacity(30720, 1024, 8) == pytest.approx(10) and label_capacity(30720, 2048, 64) == pytest.approx(2.5)
    whole = own_epsilon(100, 48)
    found = [own_epsilon(100, 48, capacity) for capacity in (0.0, 0.16, 4, 16, 500)]
    assert found == pytest.approx([0, whole / 10, whole / 2, whole, whole])


def test_a_run_counts_its_parameters_images_and_classes(tmp_path):
    options = {"dataset": "digits", "device": "cpu", "epochs": 40, "output": str(tmp_path), "batch_size": 64, "workers": 0}
    small = prepare(RunConfig.from_flat({**options, "model_kwargs": {"channels": [4, 8, 16]}}))
    count = sum(p.numel() for p in small.exported_model().parameters())
    expected = own_epsilon(10, 40, count / (1437 * math.log2(10)))
    assert 0 < expected < 0.8 * own_epsilon(10, 40)
    small.task.set_epoch(39, 40)
    assert small.task.smoothing.epsilon_t.item() == pytest.approx(expected)
    assert small.recorder.facts["smoothing"] == pytest.approx(expected)
    model = small.exported_model()
    alone = SFRTask(model, input_size=(3, 32, 32), images=1437, verbose=False)
    alone.set_epoch(39, 40)
    assert alone.smoothing.epsilon_t.item() == pytest.approx(expected)
    assert SFRTask(model, input_size=(3, 32, 32), verbose=False).smoothing.capacity is None
    several = SFRTask(model, loss=LossForm(bce=True, multi_label=True), input_size=(3, 32, 32), images=1437, verbose=False)
    assert several.smoothing.capacity is None


def test_own_strength_rises_over_the_first_epochs_as_lambda_does():
    smoothing, moved = DynamicLabelSmoothing(100), []
    assert smoothing.source == "classes" and smoothing.epsilon_t.item() == pytest.approx(0.1)  # of a run of unknown length
    for epoch in range(48):
        smoothing.set_epoch(epoch, 48)
        moved.append(smoothing.epsilon_t.item())
    expected = [own_epsilon(100, 48) * weight_at(SFRConfig(), epoch, 48) for epoch in range(48)]
    assert moved == pytest.approx(expected) and moved[0] < moved[4] < moved[5] == moved[-1]
    smoothing.set_epoch(0, 4)  # too short for a warm-up
    assert smoothing.epsilon_t.item() == pytest.approx(own_epsilon(100, 4))


def test_the_class_table_is_for_as_many_classes_as_memory_holds():
    assert DynamicLabelSmoothing(21841).table.numel() == 0 and DynamicLabelSmoothing(21841).source == "uniform"
    assert DynamicLabelSmoothing(1024).table.shape == (1024, 1024)
    assert DynamicLabelSmoothing(10, 0.1).source == "uniform"  # a given epsilon is timm's
    assert DynamicLabelSmoothing(10, 0.1, "classes").source == "classes"


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


def test_what_is_not_finite_leaves_no_trace_in_the_table():
    smoothing = DynamicLabelSmoothing(3, 0.5, "classes")
    logits = torch.eye(3) * 4
    logits[0, 1] = float("nan")
    smoothing(logits, torch.arange(3))
    smoothing.end_epoch()
    assert torch.allclose(smoothing.table[0], torch.full((3,), 1 / 3)) and smoothing.table.isfinite().all()
    assert torch.allclose(smoothing.table[1:], (torch.eye(3) * 4).softmax(1)[1:])


def test_evaluation_does_not_count():
    smoothing = DynamicLabelSmoothing(3, 0.5, "classes").eval()
    smoothing(torch.eye(3), torch.arange(3))
    assert smoothing.counts.sum() == 0


@pytest.mark.parametrize(
    "arguments",
    [(1,), (3, 1.0), (3, -0.1), (3, 0.1, "class"), (3, 0.1, "uniform", "cosine"), (3, None, None, "ramp")],
)
def test_bad_options_are_refused(arguments):
    with pytest.raises(UserError):
        DynamicLabelSmoothing(*arguments)


def test_a_mixture_counts_in_the_class_table_for_its_largest_class():
    smoothing = DynamicLabelSmoothing(3).train()
    logits = torch.tensor([[4.0, 0.0, 1.0], [0.0, 3.0, 0.0], [0.0, 0.0, 5.0]])
    target = torch.tensor([[0.6, 0.4, 0.0], [0.7, 0.3, 0.0], [0.1, 0.1, 0.8]])  # right, wrong, right
    smoothing(logits, target)
    assert smoothing.counts.tolist() == [1, 0, 1]
    smoothing.end_epoch()
    expected = torch.stack([logits[0].softmax(0), torch.full((3,), 1 / 3), logits[2].softmax(0)])
    assert torch.allclose(smoothing.table, expected)
    # q of a mixture is the mixture of its classes' rows.
    smoothing.epsilon_t.fill_(0.5)
    smoothed, _ = smoothing.targets(logits, target)
    assert torch.allclose(smoothed, 0.5 * target + 0.5 * target @ expected)
