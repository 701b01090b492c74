"""Our small-image models are timm models: what timm's own model tests ask, asked of them."""

import pytest
import timm
import timm.optim
import torch

from timm_sfr.models import SMALL_IMAGE_MODELS

PARAMETERS = {"resnet20_cifar": 272474, "resnet56_cifar": 855770, "resnet18_cifar": 11173962, "wrn_16_2_cifar": 691674,
              "mobilenetv2_cifar": 2236682}  # fmt: skip


@pytest.fixture(params=SMALL_IMAGE_MODELS)
def name(request):
    return request.param


def test_listed_with_its_size(name):
    assert name in timm.list_models("*_cifar")
    assert sum(p.numel() for p in timm.create_model(name).parameters()) == PARAMETERS[name]


def test_forward_and_backward(name):
    model = timm.create_model(name, num_classes=7, drop_rate=0.1, drop_path_rate=0.1)
    out = model(torch.randn(2, 3, 32, 32))
    out.mean().backward()
    assert out.shape == (2, 7) and all(p.grad is not None for p in model.parameters())


def test_default_config(name):
    model = timm.create_model(name).eval()
    cfg = model.default_cfg
    keys = set(model.state_dict())
    assert cfg["architecture"] == name and cfg["num_classes"] == 10 and cfg["input_size"] == (3, 32, 32)
    assert f"{cfg['classifier']}.weight" in keys and f"{cfg['first_conv']}.weight" in keys
    x = torch.randn(1, *cfg["input_size"])
    assert model.forward_features(x).shape[-2:] == cfg["pool_size"]
    model.reset_classifier(0, "")
    assert model(x).shape[-2:] == cfg["pool_size"]
    model.eval().reset_classifier(5, "avg")
    assert model(x).shape == (1, 5) and not any(module.training for module in model.modules())
    assert timm.create_model(name, num_classes=0)(x).shape == (1, model.num_features)
    assert timm.create_model(name, in_chans=1)(x[:, :1]).shape == (1, 10)


def test_features(name):
    x = torch.randn(2, 3, 32, 32)
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    torch.manual_seed(0)
    features = timm.create_model(name, features_only=True).eval()
    final, taps = model.forward_intermediates(x)
    assert torch.equal(model.forward_head(final), model(x)) and torch.equal(final, model.forward_features(x))
    for info, tap, feature in zip(model.feature_info, taps, features(x), strict=True):
        assert tap.shape[1] == info["num_chs"] == feature.shape[1]
        assert tap.shape[2] == 32 // info["reduction"] == feature.shape[2]
        assert torch.allclose(tap, feature, atol=1e-5)
    last = len(taps) - 1
    assert len(model.forward_intermediates(x, indices=[0, last], intermediates_only=True)) == 2
    early = model.forward_intermediates(x, indices=[0], intermediates_only=True, stop_early=True)
    assert torch.equal(early[0], taps[0])


def test_pruning_keeps_the_tap(name):
    model, x = timm.create_model(name).eval(), torch.randn(1, 3, 32, 32)
    tap = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
    model.prune_intermediate_layers([1])
    assert torch.equal(model.forward_intermediates(x, indices=[1], intermediates_only=True)[0], tap)


def test_gradient_checkpointing_changes_nothing(name):
    torch.manual_seed(0)
    plain = timm.create_model(name)
    torch.manual_seed(0)
    checkpointed = timm.create_model(name)
    checkpointed.set_grad_checkpointing()
    x, passes = torch.randn(2, 3, 32, 32), {}
    for model in (plain, checkpointed):
        deepest = max((name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)), key=len)
        model.get_submodule(deepest).register_forward_hook(
            lambda *_, model=model: passes.update({model: passes.get(model, 0) + 1})
        )
        model.forward_head(model.forward_intermediates(x)[0]).sum().backward()
    assert [passes[plain], passes[checkpointed]] == [1, 2]  # the second time for the gradient
    for ours, theirs in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)


def test_layer_decay_groups_cover_the_model(name):
    model = timm.create_model(name)
    optimizer = timm.optim.create_optimizer_v2(model, "sgd", lr=0.1, layer_decay=0.5)
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert len(scales) > 3 and sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
