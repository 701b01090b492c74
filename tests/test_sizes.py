"""SFR at any image size: one task, many sizes."""

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.parallel import DistributedDataParallel

from timm_sfr import SFRConfig, SFRTask
from timm_sfr.method.feature_loss import FeatureLoss
from timm_sfr.method.probe import forward_taps
from timm_sfr.method.tapped_model import to_nodes
from timm_sfr.method.taps import UNMATCHED, node_grids

sides = st.integers(1, 40)


def made(name="resnet18", config=None, **options):
    return SFRTask(timm.create_model(name, num_classes=10, **options), config or SFRConfig(), verbose=False)


def step(task, height, width=None, count=2):
    result = task(torch.randn(count, 3, height, width or height), torch.arange(count))
    result["loss"].backward()
    return result


@given(st.lists(st.tuples(sides, sides), min_size=2, max_size=5), st.integers(4, 64), st.booleans())
@settings(max_examples=300, deadline=None)
def test_node_grids_fit_the_maps_and_the_limit(grids, most, common):
    found = node_grids(grids, most, common)
    assert len(found) == len(grids)
    if UNMATCHED in found:
        assert set(found) == {UNMATCHED}
        return
    assert all(h * w <= most and 0 < h <= own[0] and 0 < w <= own[1] for (h, w), own in zip(found, grids, strict=True))
    assert not common or len(set(found)) == 1
    assert all(h * w >= 4 for h, w in grids)


@pytest.mark.parametrize("small", [(1, 1), (1, 3), (3, 1)])
@pytest.mark.parametrize("place", [0, 1])
def test_a_tap_of_fewer_than_four_locations_leaves_nothing_to_match(small, place):
    grids = [(8, 8), (4, 4)]
    assert UNMATCHED not in node_grids(grids, 16)
    grids[place] = small
    assert node_grids(grids, 16) == [UNMATCHED] * 2


@pytest.mark.parametrize("channels", ["groups", "transport", "projection"])
def test_the_first_size_is_what_it_was_to_the_bit(channels):
    """The plan's own grids and the losses on them; after another size, too."""
    task = made("resnet20_cifar", SFRConfig(channels=channels)).eval()
    images, target = torch.randn(4, 3, 32, 32), torch.arange(4)
    _, maps = forward_taps(task.plain_model, images, task.plan.indices)
    grids = task.plan.node_grids(task.config.max_nodes, task.config.common_grid)
    nodes = [to_nodes(x, grid) for x, grid in zip(maps, grids, strict=True)]
    project = task.trainable_module.projection
    expected = FeatureLoss(task.config)(nodes[:-1] if project is None else project(nodes[:-1]), nodes[-1])
    first = task(images, target)
    step(task, 24)
    again = task(images, target)
    assert torch.equal(first["sfr_loss"], expected) and first["sfr_loss"] > 0
    assert all(torch.equal(first[name], again[name]) for name in first)


def check(task, *sizes):
    for height, width in sizes:
        result = step(task, height, width)
        assert result["sfr_loss"] > 0 and result["loss"].isfinite(), (height, width)
        assert torch.allclose(result["loss"], result["task_loss"] + result["sfr_weight"] * result["sfr_loss"])


def test_one_task_takes_many_sizes():
    task = SFRTask(timm.create_model("resnet18", num_classes=10), verbose=False)
    check(task, (224, 224), (96, 96), (160, 160), (96, 160))
    assert task.plan.input_size == (3, 224, 224)


@pytest.mark.parametrize("channels", ["groups", "transport", "projection"])
@pytest.mark.parametrize("matching", ["divergence", "grid", "emd", "gaussian"])
def test_every_form_takes_many_sizes(channels, matching):
    check(made("resnet20_cifar", SFRConfig(channels=channels, matching=matching)), (32, 32), (16, 16), (24, 40), (8, 48))


@pytest.mark.parametrize("channels", ["groups", "projection"])
def test_a_size_of_too_few_locations_has_no_feature_loss_and_is_said_once(channels, said):
    task = made("resnet20_cifar", SFRConfig(channels=channels))
    for _ in range(2):
        task.zero_grad()
        result = step(task, 4)
        assert result["sfr_loss"] == 0 and torch.equal(result["loss"], result["task_loss"])
        assert all(parameter.grad is not None for parameter in task.trainable_module.parameters())
    assert len(said) == 1 and "images of 4x4 pixels leave fewer than 4 locations" in said[0]
    assert step(task, 16)["sfr_loss"] > 0


def test_a_size_of_too_few_locations_trains_as_without_sfr():
    plain, ours = (made("resnet20_cifar", SFRConfig(weight=weight, smoothing=0.1)) for weight in (0.0, 1.0))
    ours.plain_model.load_state_dict(plain.plain_model.state_dict())
    images, target = torch.randn(4, 3, 4, 4), torch.arange(4)
    for task in (plain, ours):
        task(images, target)["loss"].backward()
    for one, other in zip(plain.plain_model.parameters(), ours.plain_model.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_a_model_that_is_not_timms_takes_many_sizes_too():
    config = SFRConfig(taps=("layer1", "layer2", "layer3", "layer4"))
    model = torchvision.models.resnet18(num_classes=10)
    task = SFRTask(model, config, input_size=(3, 128, 128), verbose=False)
    check(task, (128, 128), (96, 96), (64, 96))
    assert step(task, 32)["sfr_loss"] == 0


def test_a_vit_with_dynamic_sizes():
    check(made("test_vit", dynamic_img_size=True), (160, 160), (96, 96), (64, 96))


def test_a_compiled_task_is_compiled_again_for_each_size():
    torch._dynamo.reset()
    task = made("resnet20_cifar").eval()
    compiled = torch.compile(task.trainable_module, backend="eager", fullgraph=True)
    for height, width in ((32, 32), (24, 40), (4, 4), (24, 40)):
        images = torch.randn(2, 3, height, width)
        (logits, nodes), (own, theirs) = compiled(images), task.trainable_module(images)
        assert torch.allclose(logits, own, atol=1e-4)
        assert [x.shape for x in nodes] == [x.shape for x in theirs]
        assert all(torch.allclose(x, y, atol=1e-3) for x, y in zip(nodes, theirs, strict=True))
    _, nodes = compiled.train()(images)  # nothing breaks the graph in training either
    nodes = [x.detach().requires_grad_() for x in nodes]  # dynamo warns of inputs that are no leaves
    loss = torch.compile(task.feature_loss, backend="eager", fullgraph=True)
    assert torch.allclose(loss(nodes[:-1], nodes[-1]), task.feature_loss(nodes[:-1], nodes[-1]), atol=1e-6)
    torch._dynamo.reset()


def test_ddp_waits_for_no_parameter_at_any_size(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        task = made("resnet20_cifar", SFRConfig(channels="projection"))
        task.trainable_module = DistributedDataParallel(task.trainable_module)
        for size in (32, 4, 16, 4):  # DDP raises at the next pass if a parameter got no gradient
            step(task, size)
    finally:
        torch.distributed.destroy_process_group()
