"""SFRTask: the terms of its loss, its schedule, its state, and its contract with timm."""

import inspect
import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.task import ClassificationTask, LogitDistillationTask, TrainingTask

from timm_sfr import (
    LossForm,
    SFRConfig,
    SFRTask,
    UserError,
    choose_taps,
    emd_l2,
    gaussian_l2,
    match_channels,
    sinkhorn_divergence,
)
from timm_sfr.method.probe import forward_taps
from timm_sfr.method.tapped_model import to_nodes
from timm_sfr.method.task import weight_at


def make(config=None, name="resnet20_cifar", **kwargs):
    model = timm.create_model(name, num_classes=10)
    return SFRTask(model, config or SFRConfig(), verbose=False, **kwargs)


def batch(size=8):
    return torch.randn(size, 3, 32, 32), torch.randint(0, 10, (size,))


FORMS = list(
    itertools.product(("groups", "transport", "projection"), ("divergence", "gaussian", "emd", "grid"), ("uniform", "cross"))
)


@pytest.mark.parametrize("matching", ["divergence", "gaussian", "emd"])
def test_what_processes_share_is_the_models_own_gradients(matching):
    task = make(SFRConfig(matching=matching, smoothing_source="classes"))
    ours, plain = task.trainable_module.parameters(), task.plain_model.parameters()
    assert [id(parameter) for parameter in ours] == [id(parameter) for parameter in plain]


@pytest.mark.parametrize("channels,matching,weights", FORMS)
def test_the_terms_add_up_to_the_loss(channels, matching, weights):
    task = make(SFRConfig(channels=channels, matching=matching, weights=weights, weight=0.5))
    result = task(*batch())
    assert result["sfr_loss"] > 0
    assert torch.allclose(result["loss"], result["task_loss"] + result["sfr_weight"] * result["sfr_loss"])
    result["loss"].backward()
    assert all(parameter.grad is not None for parameter in task.trainable_module.parameters())


@pytest.mark.parametrize("matching,distance", [("divergence", sinkhorn_divergence), ("gaussian", gaussian_l2), ("emd", emd_l2)])
def test_the_feature_loss_by_hand(matching, distance):
    task = make(SFRConfig(weight=0.3, smoothing=0.0, matching=matching)).eval()
    images, target = batch()
    logits, maps = forward_taps(task.plain_model, images, task.plan.indices)
    deep = to_nodes(maps[2], (4, 4))
    parts = [distance(to_nodes(m, (4, 4)), match_channels(deep, m.shape[1])) for m in maps[:2]]
    result = task(images, target)
    assert torch.allclose(result["sfr_loss"], (parts[0] + parts[1]) / 2)
    assert torch.allclose(result["task_loss"], F.cross_entropy(logits, target))
    assert torch.equal(result["output"], logits)


def test_deep_layers_learn_from_the_task_alone():
    task = make(SFRConfig(weight=1.0))
    task(*batch())["sfr_loss"].backward()
    grads = {name: parameter.grad for name, parameter in task.plain_model.named_parameters()}
    assert grads["conv1.weight"].abs().sum() > 0
    assert grads["stages.2.0.conv1.weight"] is None and grads["fc.weight"] is None


def test_weight_zero_leaves_the_smoothing_and_the_plain_pass():
    task = make(SFRConfig(weight=0.0))
    result = task(*batch())
    assert task.plan is None and result["sfr_loss"] == 0 and torch.equal(result["loss"], result["task_loss"])


def test_lambda_warms_up_and_decays():
    config = SFRConfig(weight=1.0, warmup_epochs=3, decay_epochs=2)
    found = [weight_at(config, epoch, 8) for epoch in range(8)]
    assert found == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 2 / 3, 1 / 3])
    assert [weight_at(SFRConfig(weight=1.0), epoch, 10) for epoch in range(3)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert [weight_at(config, epoch, 8) for epoch in (8, 20)] == pytest.approx([1 / 3, 1 / 3]), "as in the last epoch"
    task = make(config)
    task.set_epoch(0, 8)
    assert task(*batch())["sfr_weight"] == 0.25


def test_state_travels():
    config = SFRConfig(channels="projection", smoothing_source="classes")
    task, other = make(config), make(config)
    for _ in range(3):
        task(*batch(64))
    task.end_epoch()
    other.load_checkpoint_state(task.get_checkpoint_state()["state_dict"], task.get_checkpoint_state()["task_state"])
    task.eval(), other.eval()
    images, target = batch()
    ours, theirs = task(images, target), other(images, target)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_state_of_other_parts_is_refused():
    plain, learned = make(), make(SFRConfig(channels="projection"))
    for one, other in ((plain, learned), (learned, plain)):
        with pytest.raises(RuntimeError, match="do not have the same parts: projection"):
            one.load_task_state(other.get_task_state())
        one.load_task_state(other.get_task_state(), strict=False)
    assert plain.get_task_state(ema=True) == {}
    with pytest.raises(RuntimeError, match=r"before setup_ema\(\)"):
        plain.load_task_state(plain.get_task_state(), ema=True)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_a_task_of_another_type_keeps_its_own_state_in_float32(kind):
    task, (images, target) = make(loss=LossForm(class_weights=(0.11,) * 10)).to(kind), batch()
    task.set_epoch(4, 48)
    result = task(images.to(kind), target)
    result["loss"].backward()
    assert result["loss"].isfinite() and next(task.plain_model.parameters()).grad.dtype == kind
    buffers = (task.weight, task.smoothing.table, task.smoothing.counts, task.smoothing.criterion.class_weights)
    assert {one.dtype for one in buffers} == {torch.float32}
    assert torch.equal(buffers[-1], torch.full((10,), 0.11)), "it was never rounded"


def test_a_compiled_model_is_refused_and_a_compiled_task_is_not():
    model = torch.compile(timm.create_model("resnet20_cifar", num_classes=10), backend="eager")
    with pytest.raises(UserError, match=r"got torch.compile's; pass the model itself, and compile the task"):
        SFRTask(model, verbose=False)
    assert choose_taps(model).num_classes == 10


def test_exported_state_is_the_plain_models():
    task = make(SFRConfig(channels="projection"))
    expected = list(timm.create_model("resnet20_cifar").state_dict())
    assert list(task.get_checkpoint_state()["state_dict"]) == expected
    task.setup_ema(decay=0.9)
    task.update_ema(step=1)
    assert list(task.get_checkpoint_state(ema=True)["state_dict_ema"]) == expected


def test_composes_with_a_distillation_task():
    student, teacher = (timm.create_model("resnet20_cifar", num_classes=10) for _ in range(2))
    base = LogitDistillationTask(student, teacher, distill_loss_weight=1.0, task_loss_weight=1.0, verbose=False)
    images, target = batch()
    student.eval()
    expected = base.eval()(images, target)
    task = SFRTask(student, SFRConfig(weight=0.2), base=base, verbose=False).eval()
    result = task(images, target)
    assert torch.allclose(result["task_loss"], expected["loss"])
    assert torch.allclose(result["loss"], result["task_loss"] + 0.2 * result["sfr_loss"])
    assert torch.allclose(result["base_kd_loss"], expected["kd_loss"])
    with pytest.raises(UserError, match="trainable_module is this model"):
        SFRTask(teacher, base=ClassificationTask(student, verbose=False), verbose=False)


@pytest.mark.parametrize("channels", ["groups", "transport", "projection"])
def test_losses_are_float32_under_autocast(channels):
    task = make(SFRConfig(channels=channels))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = task(*batch())
    assert result["loss"].dtype == result["sfr_loss"].dtype == torch.float32
    # Autocast changes nothing in the loss, not even the channels' correlations, whose sum over the batch overflows in fp16.
    shallow, deep = [torch.randn(4200, 16, 2)], torch.randn(4200, 16, 2)
    expected = task.feature_loss(shallow, deep)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(task.feature_loss(shallow, deep), expected)


def test_an_epochs_result_keeps_its_weight():
    task = make()
    task.set_epoch(0, 20)
    first = task(*batch())
    task.set_epoch(10, 20)
    assert torch.allclose(first["loss"], first["task_loss"] + first["sfr_weight"] * first["sfr_loss"])
    assert first["sfr_weight"] == pytest.approx(1 / 5)


def test_a_config_without_sfr_is_refused():
    with pytest.raises(UserError, match="enabled=False asks for plain training"):
        make(SFRConfig(enabled=False))


def test_the_contract_with_timm_holds():
    """What we override, and what the engine calls, still exists in timm with these names."""
    for name in ("prepare_distributed", "compile", "get_eval_model", "get_task_state", "load_task_state", "forward",
                 "create_evaluator"):  # fmt: skip
        ours, theirs = (inspect.signature(getattr(kind, name)).parameters for kind in (SFRTask, TrainingTask))
        assert [p for p in theirs if p in ours] == list(theirs), name
    for name in ("setup_ema", "update_ema", "has_ema", "get_clip_parameters", "get_trainable_module", "no_sync",
                 "get_checkpoint_state", "load_checkpoint_state"):  # fmt: skip
        assert callable(getattr(SFRTask, name))
    assert issubclass(SFRTask, TrainingTask)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("grid", [(2, 2), (4, 4)])
def test_the_gradient_of_nodes_has_the_layout_of_the_map(layout, grid):
    # Any other is copied by every operation before the tap.
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=layout).requires_grad_()
    (gradient,) = torch.autograd.grad((to_nodes(x, grid) * torch.randn(2, grid[0] * grid[1], 3)).sum(), x)
    assert gradient.is_contiguous(memory_format=layout)
    y = x.detach().clone().requires_grad_()
    nodes = F.adaptive_avg_pool2d(y, grid).flatten(2).transpose(1, 2)
    assert torch.equal(to_nodes(x, grid), nodes)
    weights = torch.randn_like(nodes)
    (ours,), (theirs,) = (torch.autograd.grad((one * weights).sum(), to) for one, to in ((to_nodes(x, grid), x), (nodes, y)))
    assert torch.allclose(ours, theirs)


def test_compile_compiles_what_trains_and_returns_the_plain_model():
    task, (images, target) = make(SFRConfig(smoothing=0.1)), batch()
    expected, calls = task(images, target), []

    def backend(graph, examples):
        calls.append(len(examples))
        return graph.forward

    plain = task.plain_model
    assert task.compile(backend=backend) is plain and not calls
    found = task(images, target)
    assert calls and torch.allclose(found["loss"], expected["loss"], atol=1e-5)
    found["loss"].backward()
    assert all(parameter.grad is not None for parameter in plain.parameters())
    assert task.plain_model is plain and set(plain.state_dict()) == set(timm.create_model("resnet20_cifar").state_dict())


def test_prepare_distributed_wraps_what_trains_in_ddp(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        task = make()
        plain = task.plain_model
        assert task.prepare_distributed(bucket_cap_mb=1) is task
        assert isinstance(task.trainable_module, torch.nn.parallel.DistributedDataParallel)
        assert task.trainable_module.bucket_bytes_cap == 2**20 and task.plain_model is plain
        task(*batch())["loss"].backward()
        assert all(parameter.grad is not None for parameter in plain.parameters())
    finally:
        torch.distributed.destroy_process_group()
