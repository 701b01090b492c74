"""Tap choice on twelve families and on our own small-image models; test_families.py takes a step with each."""

import pytest
import timm
import timm.optim
import torch

from timm_sfr import SFRConfig, SFRTask, UserError, choose_taps
from timm_sfr.method.tapped_model import TappedModel
from timm_sfr.models import SMALL_IMAGE_MODELS

# name: (indices, channels, grids) at the model's own size
EXPECTED = {
    "resnet18": ([1, 2, 3, 4], [64, 128, 256, 512], [56, 28, 14, 7]),
    "resnet50": ([1, 2, 3, 4], [256, 512, 1024, 2048], [56, 28, 14, 7]),
    "mobilenetv3_small_100": ([1, 2, 3, 4], [16, 24, 48, 576], [56, 28, 14, 7]),
    "efficientnet_lite0": ([1, 2, 3, 4], [24, 40, 112, 320], [56, 28, 14, 7]),
    "convnext_atto": ([0, 1, 2, 3], [40, 80, 160, 320], [56, 28, 14, 7]),
    "swin_tiny_patch4_window7_224": ([0, 1, 2, 3], [96, 192, 384, 768], [56, 28, 14, 7]),
    "vit_tiny_patch16_224": ([2, 5, 8, 11], [192] * 4, [14] * 4),
    "mixer_s32_224": ([1, 3, 5, 7], [512] * 4, [7] * 4),
    "densenet121": ([1, 2, 3, 4], [256, 512, 1024, 1024], [56, 28, 14, 7]),
    "regnetx_002": ([1, 2, 3, 4], [24, 56, 152, 368], [56, 28, 14, 7]),
    "edgenext_xx_small": ([0, 1, 2, 3], [24, 48, 88, 168], [64, 32, 16, 8]),
    "mobileone_s0": ([1, 2, 3, 4], [48, 128, 256, 1024], [56, 28, 14, 7]),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_taps_and_what_is_left_as_it_was(name):
    model = timm.create_model(name, num_classes=10)
    model.train()
    next(iter(model.children())).eval()
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = choose_taps(model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    taps = [*plan.shallow, plan.deep]
    assert (plan.indices, [tap.channels for tap in taps], [tap.grid[0] for tap in taps]) == EXPECTED[name]


@pytest.mark.parametrize("name", SMALL_IMAGE_MODELS)
def test_small_image_models(name):
    plan = choose_taps(timm.create_model(name))
    assert plan.deep.nodes >= 16 and plan.shallow[0].stride == 1
    assert all(grid[0] * grid[1] <= 49 for grid in plan.node_grids(49))


def test_a_small_image_moves_the_deep_tap_forward():
    plan = choose_taps(timm.create_model("resnet18"), (3, 32, 32))
    assert (plan.indices, plan.deep.grid) == ([1, 2, 3], (2, 2))
    assert "layer3" in str(plan) and "3x32x32" in str(plan)


def test_node_grids():
    plan = choose_taps(timm.create_model("resnet18"), (3, 32, 32))
    assert plan.node_grids(49) == [(2, 2), (4, 4), (2, 2)]
    assert plan.node_grids(49, common=True) == [(2, 2)] * 3
    vit = choose_taps(timm.create_model("vit_tiny_patch16_224"))
    assert vit.node_grids(49) == [(7, 7)] * 4 and vit.node_grids(9) == [(3, 3)] * 4 and vit.node_grids(4) == [(2, 2)] * 4
    wide = choose_taps(timm.create_model("resnet20_cifar"), (3, 8, 64))
    assert wide.deep.grid == (2, 16) and wide.node_grids(16)[-1] == (2, 8) and wide.node_grids(4)[-1] == (2, 2)


def test_taps_by_index_and_name():
    model = timm.create_model("resnet18")
    assert choose_taps(model, taps=["layer2", -1]).indices == [2, 4]
    assert choose_taps(model, taps=[1, "3"]).indices == [1, 3]
    for taps, message in (([3, 1], "and then a deeper one"), (["layr2", 4], "did you mean 'layer2'"), ([4], "and then")):
        with pytest.raises(UserError, match=message):
            choose_taps(model, taps=taps)


@pytest.mark.parametrize(
    "name,size,message",
    [
        ("resnet18", 8, "no usable shallow tap at 8x8"),
        ("resnet18", 2, "4 locations"),
        ("mixer_s32_224", 64, "does not take 3x64x64"),
        ("inception_v3", 16, "does not take 3x16x16 images"),
    ],
)
def test_images_that_are_too_small(name, size, message):
    with pytest.raises(UserError, match=message):
        choose_taps(timm.create_model(name), (3, size, size))


@pytest.mark.parametrize(
    "name,options,message",
    [
        ("resnet10t", {"num_classes": 0}, "has no classifier"),
        ("vit_tiny_patch16_224", {"global_pool": ""}, r"one tensor of logits \(batch, classes\); got \(2, 197, 1000\)"),
        ("qwen3_vit_88m_enc", {}, "has no classifier"),
    ],
)
def test_what_is_no_classifier_is_refused(name, options, message):
    with torch.device("meta"), pytest.raises(UserError, match=message):
        choose_taps(timm.create_model(name, **options))


def test_taps_by_stage():
    model = timm.create_model("resnet18")
    assert choose_taps(model, taps=["stage2", "stage5"]).modules == ["layer1", "layer4"]
    with pytest.raises(UserError, match="no feature 'stage6'"):
        choose_taps(model, taps=["stage2", "stage6"])


@pytest.mark.parametrize(
    "name", ["resnet20_cifar", "vit_tiny_patch16_224", "visformer_tiny", "pit_ti_224", "nest_tiny", "twins_pcpvt_small"]
)
def test_the_optimizer_factory_sees_through_the_wrapper(name):
    model = timm.create_model(name, num_classes=10)
    tapped = TappedModel(model)

    def decays(module):
        prefix = "model." if module is tapped else ""
        names = {id(parameter): key.removeprefix(prefix) for key, parameter in module.named_parameters()}
        groups = timm.optim.create_optimizer_v2(module, "sgd", lr=0.1, weight_decay=0.1, layer_decay=0.8).param_groups
        return {names[id(p)]: (g["weight_decay"], g["lr_scale"]) for g in groups for p in g["params"]}

    assert decays(tapped) == decays(model)


def test_features_that_training_changes_are_refused():
    """Dropped patches leave no grid; dropped channels, other features."""
    with pytest.raises(UserError, match="patch_drop_rate: vit_tiny_patch16_224 drops patches"):
        choose_taps(timm.create_model("vit_tiny_patch16_224", patch_drop_rate=0.25))
    with pytest.raises(UserError, match="patch_drop_rate: hiera_tiny_224 drops patches"):
        choose_taps(timm.create_model("hiera_tiny_224", patch_drop_rate=0.25))
    with pytest.raises(UserError, match="patch_drop_rate: eva02_tiny_patch14_224 drops patches"):
        choose_taps(timm.create_model("eva02_tiny_patch14_224", patch_drop_rate=0.25))
    model = timm.create_model("resnet10t", num_classes=4)
    task = SFRTask(model, verbose=False)
    task.plain_model.layer2.register_forward_hook(lambda module, args, out: out[:, :64] if module.training else out)
    model.layer3 = torch.nn.Conv2d(64, 256, 3, 2, 1)
    with pytest.raises(UserError, match="as in evaluation"):
        task(torch.randn(2, 3, 176, 176), torch.tensor([0, 1]))


def test_the_size_is_the_models_as_it_was_made():
    assert choose_taps(timm.create_model("test_resnet", in_chans=1)).input_size == (1, 160, 160)
    assert choose_taps(timm.create_model("vit_tiny_patch16_224", img_size=96)).input_size == (3, 96, 96)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("channels", ["groups", "transport", "projection"])
def test_other_precisions(dtype, channels):
    model = timm.create_model("resnet20_cifar").to(dtype)
    task = SFRTask(model, SFRConfig(channels=channels), verbose=False)
    result = task(torch.randn(4, 3, 32, 32, dtype=dtype), torch.arange(4))
    result["loss"].backward()
    assert result["sfr_loss"] > 0 and model.conv1.weight.grad.abs().sum() > 0
