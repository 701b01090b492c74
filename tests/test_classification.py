"""The forms of the classification loss: BCE, JSD and class weights, against timm and PyTorch, alone and with SFR."""

import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import adds_up, cut, finished_run, summary, train
from safetensors.torch import load_file
from test_teacher import terms
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy
from timm.optim import create_optimizer_v2

from benchmarks.faults import differences
from timm_sfr import DynamicLabelSmoothing, LossForm, RunConfig, SFRConfig, SFRTask, UserError
from timm_sfr.method.classification import ClassificationLoss, jensen_shannon, weighted_mean
from timm_sfr.models.split_bn import split_batchnorm, without_auxiliary
from timm_sfr.runs.checkpoints import checkpoints, load_checkpoint
from timm_sfr.training.run import prepare
from timm_sfr.training.tasks import PlainLoss, PlainTask, create_task

K = 7
WEIGHTS = (0.5, 1.0, 2.0, 0.25, 1.0, 3.0, 1.5)
FORMS = {
    "bce": LossForm(bce=True),
    "bce-sum": LossForm(bce=True, bce_sum=True, bce_target_thresh=0.2, bce_pos_weight=2.0),
    "jsd": LossForm(splits=3),
    "weights": LossForm(class_weights=(*WEIGHTS, 1.0, 1.0, 2.0)),
    "bce-weights": LossForm(bce=True, class_weights=(*WEIGHTS, 1.0, 1.0, 2.0)),
    "jsd-weights": LossForm(splits=3, class_weights=(*WEIGHTS, 1.0, 1.0, 2.0)),
}


def random(size=24):
    return torch.randn(size, K) * 3, torch.randint(0, K, (size,))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("total,threshold,positive", list(itertools.product((False, True), (None, 0.2), (None, 3.0))))
def test_bce_without_sfr_is_timms(smoothing, total, threshold, positive):
    form = LossForm(bce=True, bce_sum=total, bce_target_thresh=threshold, bce_pos_weight=positive)
    timms = BinaryCrossEntropy(smoothing, target_threshold=threshold, sum_classes=total, pos_weight=positive)
    ours = PlainLoss(smoothing, form)
    logits, target = random()
    assert torch.allclose(ours(logits, target), timms(logits, target))
    # timm's train.py smooths mixtures where it makes them, and gives them to a criterion that smooths no more.
    mixed, smoothed = (mixup_target(target, K, lam=0.3, smoothing=s) for s in (0.0, smoothing))
    assert torch.allclose(ours(logits, mixed), timms(logits, smoothed))


def test_bce_needs_neither_mixing_nor_smoothing():
    """timm's train.py would take cross-entropy here, in silence."""
    logits, target = random()
    expected = F.binary_cross_entropy_with_logits(logits, F.one_hot(target, K).float())
    for loss in (PlainLoss(0.0, LossForm(bce=True))(logits, target),
                 DynamicLabelSmoothing(K, 0.0, loss=LossForm(bce=True))(logits, target)[0]):  # fmt: skip
        assert torch.allclose(loss, expected)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.2])
def test_bce_with_sfr_is_timms_on_the_smoothed_targets(mixed, threshold):
    form = LossForm(bce=True, bce_target_thresh=threshold)
    smoothing = DynamicLabelSmoothing(K, 0.3, "classes", loss=form)
    smoothing.table.copy_(torch.rand(K, K).softmax(1))
    logits, target = random()
    y = mixup_target(target, K, lam=0.3) if mixed else target
    smoothed, _ = smoothing.targets(logits, y)
    q = (F.one_hot(target, K).float() if not mixed else y) @ smoothing.table
    assert torch.allclose(smoothed, 0.7 * (F.one_hot(target, K) if not mixed else y) + 0.3 * q)
    expected = BinaryCrossEntropy(target_threshold=threshold)(logits, smoothed)
    assert torch.allclose(smoothing(logits, y)[0], expected)


def test_the_class_table_of_bce_holds_normalised_sigmoids():
    smoothing = DynamicLabelSmoothing(3, 0.5, "classes", loss=LossForm(bce=True))
    logits = torch.tensor([[3.0, 1.0, 0.0], [2.0, 0.0, 1.0], [0.0, -200.0, -300.0], [0.0, 0.0, 4.0]])
    smoothing(logits, torch.tensor([0, 0, 1, 2]))  # the third is wrong
    smoothing.end_epoch()
    sigmoids = logits.sigmoid()
    sigmoids /= sigmoids.sum(1, keepdim=True)
    assert torch.allclose(smoothing.table[0], sigmoids[:2].mean(0), atol=1e-6)
    assert torch.allclose(smoothing.table[1], torch.full((3,), 1 / 3))
    assert torch.allclose(smoothing.table[2], sigmoids[3])
    # Where every sigmoid underflows, the prediction is still the best class.
    smoothing(torch.tensor([[-300.0, -200.0, -300.0]]), torch.tensor([1]))
    assert torch.allclose(smoothing.sums[1], torch.tensor([0.0, 1.0, 0.0]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("splits", [2, 3])
def test_jsd_without_sfr_is_timms(splits, smoothing):
    loss = PlainLoss(smoothing, LossForm(splits=splits))
    task = PlainTask(torch.nn.Identity(), loss, device=torch.device("cpu"), verbose=False)
    logits, target = random(8 * splits)
    target = target[:8].repeat(splits)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    result, expected = task(ours, target), JsdCrossEntropy(splits, smoothing=smoothing)(theirs, target)
    assert torch.allclose(result["loss"], expected)
    gradients = [torch.autograd.grad(loss, x)[0] for loss, x in ((result["loss"], ours), (expected, theirs))]
    assert torch.allclose(*gradients, atol=1e-7)
    assert torch.equal(result["loss"], result["cls_loss"] + result["jsd_weight"] * result["jsd_loss"])
    assert result["jsd_weight"] == 12 and result["jsd_loss"] > 0


def test_the_jsd_of_equal_views_is_nothing_and_a_part_of_a_view_is_refused():
    logits = torch.randn(4, K)
    assert jensen_shannon(logits.repeat(3, 1), 3).abs() < 1e-6
    logits[0, 0] = 200.0  # the other probabilities are 0 in float32, which timm's gradient does not survive
    certain = torch.cat([logits, torch.randn(4, K)]).requires_grad_()
    target = torch.zeros(8, dtype=torch.long)
    value, timms = jensen_shannon(certain, 2), JsdCrossEntropy(2, alpha=1, smoothing=0)
    assert torch.allclose(value + F.cross_entropy(logits, target[:4]), timms(certain, target))
    assert torch.autograd.grad(value, certain)[0].isfinite().all()
    with pytest.raises(UserError, match="3 views of each image"):
        jensen_shannon(logits, 3)


def test_class_weights_of_cross_entropy_are_pytorchs():
    logits, target = random()
    expected = F.cross_entropy(logits, target, weight=torch.tensor(WEIGHTS))
    for loss in (PlainLoss(0.0, LossForm(class_weights=WEIGHTS))(logits, target),
                 DynamicLabelSmoothing(K, 0.0, loss=LossForm(class_weights=WEIGHTS))(logits, target)[0]):  # fmt: skip
        assert torch.allclose(loss, expected)


@pytest.mark.parametrize("bce", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_class_weights_weigh_samples_by_their_labels_before_smoothing(bce, mixed):
    logits, target = random()
    y = mixup_target(target, K, lam=0.3) if mixed else F.one_hot(target, K).float()
    smoothed = 0.8 * y + 0.2 / K
    if bce:
        losses = F.binary_cross_entropy_with_logits(logits, smoothed, reduction="none").mean(1)
    else:
        losses = -(smoothed * logits.log_softmax(1)).sum(1)
    weights = torch.tensor([sum(y[i, k] * WEIGHTS[k] for k in range(K)) for i in range(len(y))])
    expected = (weights * losses).sum() / weights.sum()
    form = LossForm(bce=bce, class_weights=WEIGHTS)
    given = y if mixed else target
    for loss in (PlainLoss(0.2, form)(logits, given), DynamicLabelSmoothing(K, 0.2, loss=form)(logits, given)[0]):
        assert torch.allclose(loss, expected)
    whole, real = (LossForm(bce=bce, class_weights=tuple(map(kind, range(K)))) for kind in (int, float))
    assert torch.equal(PlainLoss(0.2, whole)(logits, given), PlainLoss(0.2, real)(logits, given))


def test_a_batch_of_classes_without_weight_has_no_loss():
    assert weighted_mean(torch.ones(3), torch.zeros(3, dtype=torch.long), torch.tensor([0.0, 1.0])) == 0


def test_the_gradient_of_weighted_bce_by_finite_differences():
    torch.set_default_dtype(torch.float64)
    try:
        form = LossForm(bce=True, bce_pos_weight=2.0, class_weights=WEIGHTS)
        criterion = ClassificationLoss(form)
        logits, target = random(3)
        y = mixup_target(target, K, lam=0.3).double()
        assert torch.autograd.gradcheck(lambda z: criterion(z, y, y), logits.requires_grad_())
    finally:
        torch.set_default_dtype(torch.float32)


def small(name="resnet20_cifar"):
    return timm.create_model(name, num_classes=10)


def views(splits, size=4):
    return torch.randn(size * max(1, splits), 3, 16, 16), torch.randint(0, 10, (size,)).repeat(max(1, splits))


@pytest.mark.parametrize("name", FORMS)
def test_the_terms_add_up_with_sfr(name):
    form = FORMS[name]
    task = SFRTask(small(), SFRConfig(weight=0.5), input_size=(3, 16, 16), loss=form, verbose=False)
    result = task(*views(form.splits))
    assert torch.equal(result["loss"], result["task_loss"] + result["sfr_weight"] * result["sfr_loss"])
    assert result["sfr_loss"] > 0
    if form.splits:
        parts = result["cls_loss"] + result["jsd_weight"] * result["jsd_loss"]
        assert torch.equal(result["task_loss"], parts) and result["jsd_loss"] > 0
    result["loss"].backward()
    assert all(parameter.grad is not None for parameter in task.trainable_module.parameters())


def test_with_views_labels_and_table_see_the_first_and_the_features_see_all():
    config, form = SFRConfig(smoothing=0.3, smoothing_source="classes"), LossForm(splits=3)
    task = SFRTask(small(), config, input_size=(3, 16, 16), loss=form, verbose=False)
    images, target = views(3, 8)
    task.plain_model.eval()  # so that an image's logits do not depend on its batch
    result = task(images, target)
    counted = task.smoothing.counts.clone()
    plain = SFRTask(task.plain_model, config, input_size=(3, 16, 16), verbose=False)
    plain.plain_model.eval()
    first = plain(images[:8], target[:8])
    assert torch.allclose(result["cls_loss"], first["task_loss"]) and torch.equal(counted, plain.smoothing.counts)
    whole = plain(images, target)
    assert torch.allclose(result["sfr_loss"], whole["sfr_loss"])
    assert not torch.allclose(result["sfr_loss"], first["sfr_loss"])
    assert torch.allclose(result["jsd_loss"], jensen_shannon(result["output"], 3))


def test_averaged_bce_has_the_balance_of_summed_bce():
    model, (images, target) = small(), views(1)
    losses = []
    for total in (False, True):
        task = SFRTask(model, input_size=(3, 16, 16), loss=LossForm(bce=True, bce_sum=total), verbose=False)
        for epoch in (None, 0, 9):
            if epoch is not None:
                task.set_epoch(epoch, 10)
            losses.append(task(images, target)["loss"])
    for mean, total in zip(losses[:3], losses[3:], strict=True):
        assert torch.allclose(10 * mean, total)


STEPS = {
    "bce": ({"bce_loss": True}, lambda: BinaryCrossEntropy(0.1)),
    "bce-mixup": ({"bce_loss": True, "bce_target_thresh": 0.2, "mixup": 0.2}, lambda: BinaryCrossEntropy(0.1, 0.2)),
    "jsd": ({"jsd_loss": True, "aug_splits": 3, "aa": "rand-m9", "split_bn": True}, lambda: JsdCrossEntropy(3)),
    "splits": ({"aug_splits": 2, "aa": "rand-m9"}, lambda: torch.nn.CrossEntropyLoss(label_smoothing=0.1)),
}


@pytest.mark.parametrize("way", STEPS)
def test_without_sfr_every_step_is_timms(way, folder, tmp_path):
    """An epoch of ours, and one of a hand-written loop over the same batches with timm's loss and BatchNorm."""
    options, loss = STEPS[way]
    trainer = prepare(RunConfig.from_flat({
        "sfr": False, "data_dir": str(folder), "model": "resnet20_cifar", "img_size": 16, "batch_size": 20, "workers": 0,
        "device": "cpu", "epochs": 2, "sched": "none", "lr": 0.05, "output": str(tmp_path), **options,
    }))  # fmt: skip
    model = timm.create_model("resnet20_cifar", num_classes=3)
    model = timm.layers.convert_splitbn_model(model, 3) if "split_bn" in options else model
    model.load_state_dict(trainer.exported_model().state_dict())
    optimizer = create_optimizer_v2(model, "sgd", lr=0.05, weight_decay=5e-4, momentum=0.9)
    mixed = []
    if trainer.mixup is not None:
        mix = trainer.mixup
        trainer.mixup = lambda *batch: mixed.append(mix(*(x.clone() for x in batch))) or mixed[-1]
        trainer.mixup.mixup_enabled = True
    means, losses = trainer.train_epoch(0), []
    for images, target in mixed or trainer.batches.epoch(0):
        y = target if target.ndim == 1 else 0.9 * target + 0.1 / 3
        losses.append(loss()(model.train()(images), y))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert means["loss"] == pytest.approx(sum(losses).item() / 3, rel=1e-4)
    if way == "jsd":
        assert means["loss"] == pytest.approx(means["cls_loss"] + 12 * means["jsd_loss"])
    for ours, theirs in zip(trainer.exported_model().state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_a_teacher_goes_with_bce_and_class_weights(tmp_path):
    form = {"bce_loss": True, "class_weights": "auto"}
    for sfr in (True, False):
        config = {"dataset": "digits", "kd_model_name": "resnet20_cifar.sfr_digits", "device": "cpu"}
        config |= {"smoothing": 0.1, "sfr": sfr}
        trainer = prepare(RunConfig.from_flat({**config, **form, "output": str(tmp_path), "experiment": str(sfr)}))
        images, target = next(trainer.batches.epoch(0))
        result = trainer.task.train()(images, target)
        term = terms(result)
        criterion = trainer.task.smoothed.smoothing.criterion if sfr else trainer.task.criterion.criterion
        smoothed = 0.9 * F.one_hot(target, 10) + 0.01
        assert torch.allclose(term["cls_loss"], criterion(result["output"], smoothed, target))
        parts = term["cls_weight"] * term["cls_loss"] + term["kd_weight"] * term["kd_loss"]
        assert torch.allclose(result["task_loss"], parts)
        assert not sfr or torch.allclose(result["loss"], result["task_loss"] + result["sfr_weight"] * result["sfr_loss"])


RESUMED = {
    "jsd": ("--jsd-loss", "--aug-splits", 3, "--aa", "rand-m9", "--resplit", "--reprob", 0.5, "--split-bn", "--model-ema"),
    "repeats": ("--bce-loss", "--aug-repeats", 2, "--epoch-repeats", 1.5, "--mixup", 0.2),
    "balanced": ("--sampler", "balanced", "--class-weights", "auto", "--cache-dataset"),
}


@pytest.mark.parametrize("way", RESUMED)
def test_a_run_stopped_in_mid_epoch_goes_on_to_the_same_bits(way, folder, tmp_path):
    words = ("--model", "resnet20_cifar", "--data-dir", folder, "--img-size", 16, "-b", 20, "-j", 1, "--epochs", 2)
    whole, said = finished_run(tmp_path, *words, "--checkpoint-interval", 1, "--checkpoint-hist", 99, *RESUMED[way])
    state = cut(whole, tmp_path / "cut", -3)
    assert state["step"] > 0 and state["epoch"] == 1
    train("--resume", tmp_path / "cut")
    assert not differences(whole, tmp_path / "cut")
    for row in (rows := summary(whole)):
        assert adds_up(row)
        if way == "jsd":
            parts = float(row["cls_loss"]) + float(row["jsd_weight"]) * float(row["jsd_loss"])
            assert float(row["task_loss"]) == pytest.approx(parts, abs=1e-6)
    assert ("jsd_loss" in rows[0]) == (way == "jsd") and (way != "jsd" or "12 x jsd" in said)


def test_split_batchnorm_is_exported_as_a_plain_model(tmp_path):
    words = ("--model", "test_resnet", "--img-size", 32, "--epochs", 1, "-b", 256)
    run, _ = finished_run(tmp_path, *words, "--aug-splits", 2, "--aa", "rand-m9", "--split-bn")
    plain = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True).eval()
    state = load_checkpoint(checkpoints(run / "checkpoints")[-1])["module"]
    trained = split_batchnorm(timm.create_model("test_resnet", num_classes=10), 2)
    trained.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(plain(images), trained.eval()(images))
    fresh = timm.create_model("test_resnet", num_classes=10)
    assert set(load_file(run / "model" / "model.safetensors")) == set(fresh.state_dict())
    assert set(without_auxiliary(trained.state_dict())) == set(fresh.state_dict()) < set(trained.state_dict())
    aux = [(own.running_mean, other.running_mean) for own in trained.modules() for other in getattr(own, "aux_bn", ())]
    assert aux and not any(torch.equal(*pair) for pair in aux), "each part of the batch has statistics of its own"


@pytest.mark.parametrize(
    "values,message",
    [
        ({"bce_sum": True}, "bce_sum: it is for binary cross-entropy; give --bce-loss too"),
        ({"bce_target_thresh": 0.2}, "bce_target_thresh: it is for binary"),
        ({"bce_loss": True, "bce_target_thresh": 1.2}, "bce_target_thresh: expected a value from 0 to 1; got 1.2"),
        ({"bce_loss": True, "jsd_loss": True, "aug_splits": 3}, "jsd_loss: it has cross-entropy in it"),
        ({"jsd_loss": True}, "jsd_loss: it compares views .* give --aug-splits 3 too"),
        ({"jsd_loss": True, "aug_splits": 3, "kd_model_name": "x"}, "jsd_loss: it does not go with a teacher"),
        ({"aug_splits": 1}, "aug_splits: expected 0, or 2 or more views of each image; got 1"),
        ({"aug_splits": 3, "mixup": 0.2}, "aug_splits: views of an image do not go with mixup and CutMix"),
        ({"aug_splits": 3, "no_aug": True}, "aug_splits: views of an image do not go with no_aug"),
        ({"split_bn": True}, "split_bn: .* give --aug-splits or --resplit"),
        ({"split_bn": True, "aug_splits": 2, "sync_bn": True}, "split_bn: it does not go with sync_bn"),
        ({"split_bn": True, "resplit": True, "batch_size": 9}, "batch-size: .* an even size; got 9"),
        ({"aug_repeats": 0.5}, "aug_repeats: expected 0, or a number of at least 1; got 0.5"),
        ({"epoch_repeats": 0.5}, "epoch_repeats: expected 0, or a number of at least 1; got 0.5"),
        ({"sampler": "balance"}, "sampler: expected one of shuffle, balanced; got 'balance'; did you mean 'balanced'"),
    ],
)
def test_options_that_contradict_each_other_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        RunConfig.from_flat(values)


def test_forms_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="expected bce=True"):
        LossForm(bce_sum=True)
    with pytest.raises(UserError, match="no bce; got 3"):
        LossForm(bce=True, splits=3)
    for weights in ((0.0, 0.0), (1.0, -1.0), (1.0, float("nan"))):
        with pytest.raises(UserError, match="class_weights: expected numbers of at least 0"):
            LossForm(class_weights=weights)
    with pytest.raises(UserError, match="bce_pos_weight: expected more than 0; got -1"):
        LossForm(bce=True, bce_pos_weight=-1.0)
    assert hash(LossForm(class_weights=[1.0, 2.0])) == hash(LossForm(class_weights=(1.0, 2.0)))
    with pytest.raises(UserError, match="class_weights: expected 10, one for each class; got 7"):
        SFRTask(small(), loss=LossForm(class_weights=WEIGHTS), verbose=False)
    model = small()
    base = create_task(model, SFRConfig(enabled=False), (3, 16, 16), torch.device("cpu"))
    with pytest.raises(UserError, match="base: a base task computes its own loss"):
        SFRTask(model, base=base, loss=LossForm(splits=2), verbose=False)
    with pytest.raises(UserError, match="split_bn: it splits BatchNorm over maps, and it has none"):
        split_batchnorm(timm.create_model("test_vit"), 2)
