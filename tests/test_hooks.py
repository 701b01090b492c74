"""Models that are not timm's, or whose features cannot be had in timm's way: taps by forward hooks."""

import copy
import dataclasses

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

from timm_sfr import SFRConfig, SFRTask, UserError, choose_taps
from timm_sfr.method.probe import Hooks, as_map

RESNET = SFRConfig(taps=("layer1", "layer2", "layer3"))


class Mine(nn.Module):
    """A user's own net: a block that runs twice, and tokens with a class token."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 16, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.shared(self.shared(self.stem(x)).relu()).relu()
        x = self.down(x).flatten(2).transpose(1, 2)
        x = self.mix(torch.cat((self.token.expand(len(x), -1, -1), x), 1))
        return self.head(x[:, 0] + x[:, 1:].mean(1))


def resnet():
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=10)


def test_a_model_of_torchvision_trains():
    """Its loss falls, its features come closer, and nothing is left on it but what it had."""
    model = resnet()
    # Under moments the features come closer from the first steps on, whatever the images.
    config = dataclasses.replace(RESNET, matching="gaussian", max_nodes=49)
    task = SFRTask(model, config, input_size=(3, 64, 64), verbose=False)
    assert task.plan.mechanism == "hooks" and "by hooks" in str(task.plan) and task.plan.num_classes == 10
    images, target = torch.randn(8, 3, 64, 64), torch.arange(8)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.02, momentum=0.9)
    results = []
    for _ in range(8):
        results.append(task(images, target))
        results[-1]["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert results[-1]["task_loss"] < results[0]["task_loss"] and results[-1]["sfr_loss"] < results[0]["sfr_loss"]
    assert set(task.plain_model.state_dict()) == set(resnet().state_dict())


def test_hooks_take_what_the_modules_gave():
    model = resnet().eval()
    task = SFRTask(model, RESNET, input_size=(3, 64, 64), verbose=False)
    images = torch.randn(2, 3, 64, 64)
    x = model.maxpool(model.relu(model.bn1(model.conv1(images))))
    first = model.layer1(x)
    with torch.no_grad():
        logits, nodes = task.trainable_module.eval()(images)
        assert torch.equal(logits, model(images))
        assert torch.equal(nodes[-1], model.layer3(model.layer2(first)).flatten(2).transpose(1, 2))
    # A pass of the plain model keeps no activation alive.
    assert all(not tap.armed and tap.values == [] for tap in task.trainable_module.hooks.taken)


def test_a_copy_has_its_own_hooks():
    """Such as the moving average's."""
    task = SFRTask(resnet(), RESNET, input_size=(3, 64, 64), verbose=False)
    task.setup_ema(decay=0.0)
    twin, images = copy.deepcopy(task.trainable_module), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
        ours, theirs = (module.eval()(images)[1] for module in (task.trainable_module, twin))
        assert not torch.allclose(ours[0], theirs[0]) and torch.equal(task.trainable_module(images)[1][0], ours[0])


def test_compiles_without_graph_breaks():
    torch._dynamo.reset()
    module = SFRTask(resnet(), RESNET, input_size=(3, 64, 64), verbose=False).trainable_module.eval()
    compiled, images = torch.compile(module, backend="eager", fullgraph=True), torch.randn(2, 3, 64, 64)
    for scale in (1, 2):
        assert torch.allclose(compiled(scale * images)[1][0], module(scale * images)[1][0], atol=1e-5)


def test_a_model_of_the_users_own():
    """Tokens become a map; the module that runs twice is no feature."""
    task = SFRTask(Mine(), SFRConfig(taps=("stem", "mix")), input_size=(3, 32, 32), verbose=False)
    found = [(tap.module, tap.channels, tap.grid) for tap in task.plan.taps]
    assert found == [("stem", 8, (8, 8)), ("mix", 16, (4, 4))]
    result = task(torch.randn(4, 3, 32, 32), torch.arange(4))
    result["loss"].backward()
    assert result["sfr_loss"] > 0 and all(parameter.grad is not None for parameter in task.parameters())
    with pytest.raises(UserError, match="no feature 'shared'"):
        choose_taps(Mine(), (3, 32, 32), ["shared", "mix"])
    with pytest.raises(UserError, match="'stem' ran 2 times"):
        model = Mine()
        model.forward = lambda x: (model.stem(x), Mine.forward(model, x))[1]
        Hooks(model, ["stem"]).forward(model, torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    "options,size,said",
    [
        ({}, None, "input_size: ResNet does not say what images it takes"),
        ({}, (3, 64, 64), r"name its taps.*for example \('layer1', 'layer2', 'layer3', 'layer4'\). Features: 0 conv1"),
        ({"taps": ("layer9", "layer4")}, (3, 64, 64), "no feature 'layer9'; did you mean 'layer4'"),
        ({"taps": ("layer3", "layer1")}, (3, 64, 64), "then a deeper one"),
        ({"weight": 0.0}, None, "input_size: ResNet does not say how many classes"),
        ({"taps": ("layer1", "layer1", "layer3")}, (3, 64, 64), "each once"),
        ({"taps": ("layer1", "avgpool")}, (3, 64, 64), "avgpool has fewer than the 4 locations"),
    ],
)
def test_mistakes(options, size, said):
    with pytest.raises(UserError, match=said):
        SFRTask(resnet(), SFRConfig(**options), input_size=size, verbose=False)


def test_hooks_where_timms_way_fails():
    """A timm model whose forward_intermediates does not lead to its logits is tapped at the modules that it names."""
    model = timm.create_model("resnet10t", num_classes=10)
    expected = choose_taps(model, (3, 64, 64))
    whole = model.forward_intermediates
    model.forward_intermediates = lambda x, **kwargs: (whole(x, **kwargs)[0] * 0, whole(x, **kwargs)[1])
    plan = choose_taps(model, (3, 64, 64))
    assert plan.mechanism == "hooks" and plan.modules == expected.modules
    result = SFRTask(model, input_size=(3, 64, 64), verbose=False)(torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))
    assert result["sfr_loss"] > 0


def test_maps():
    x, images = torch.randn(2, 6, 4, 8), torch.randn(2, 3, 32, 64)
    assert as_map(x, images) is x
    assert torch.equal(as_map(x.permute(0, 2, 3, 1), images), x)
    tokens = x.flatten(2).transpose(1, 2)
    assert torch.equal(as_map(tokens, images), x)
    assert torch.equal(as_map(torch.cat((torch.zeros(2, 2, 6), tokens), 1), images), x)
    # Among them tokens before the batch, and windows of one.
    odd = (torch.randn(2, 6), torch.randn(2, 31, 6), torch.randn(2, 5, 4, 30))
    for wrong in (*odd, (x,), tokens.transpose(0, 1), x.repeat(4, 1, 1, 1)):
        with pytest.raises(UserError, match="expected a map"):
            as_map(wrong, images, "module")


def test_modules_that_are_called_by_numbers():
    """A name wins over an index."""
    blocks = [nn.Sequential(nn.Conv2d(c, d, 3, 2, 1), nn.ReLU()) for c, d in ((3, 8), (8, 16), (16, 32))]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))
    assert choose_taps(model, (3, 32, 32), ["0", "1", "2"]).modules == ["0", "1", "2"]
    assert choose_taps(model, (3, 32, 32), [0, 1]).modules == ["0.0", "0.1"]
    plain = SFRTask(model, SFRConfig(weight=0.0), input_size=(3, 32, 32), verbose=False)
    assert plain(torch.randn(2, 3, 32, 32), torch.tensor([0, 4]))["loss"].isfinite()


def test_auxiliary_classifiers_are_refused():
    model = torchvision.models.googlenet(num_classes=10, init_weights=False)
    task = SFRTask(model, SFRConfig(taps=("inception3b", "inception4e")), input_size=(3, 64, 64), verbose=False)
    with pytest.raises(UserError, match="returns 3 outputs in training"):
        task(torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))


def test_checkpointing():
    """Non-reentrant, a module's second run in the backward pass is not taken; reentrant, it would give no gradient."""

    class Checkpointed(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.net, self.reentrant = resnet(), reentrant

        def forward(self, x):
            net = self.net
            x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
            if self.training:
                x = checkpoint(nn.Sequential(net.layer1, net.layer2), x, use_reentrant=self.reentrant)
            else:
                x = net.layer2(net.layer1(x))
            return net.fc(net.avgpool(net.layer4(net.layer3(x))).flatten(1))

    config = SFRConfig(taps=("net.layer1", "net.layer2", "net.layer3"))
    images, target = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    task = SFRTask(Checkpointed(False), config, input_size=(3, 64, 64), verbose=False)
    task(images, target)["loss"].backward()
    plain = SFRTask(resnet(), SFRConfig(taps=("layer1", "layer2", "layer3")), input_size=(3, 64, 64), verbose=False)
    plain(images, target)["loss"].backward()
    ours, theirs = task.plain_model.net.conv1.weight.grad, plain.plain_model.conv1.weight.grad
    assert torch.allclose(ours, theirs, atol=1e-5 * theirs.abs().max())
    with pytest.raises(UserError, match="use_reentrant=False"):
        SFRTask(Checkpointed(True), config, input_size=(3, 64, 64), verbose=False)(images, target)


def test_counting_classes_leaves_every_modules_mode():
    """A frozen BatchNorm stays in evaluation mode."""
    model = resnet().train()
    model.bn1.eval()
    SFRTask(model, SFRConfig(weight=0.0), input_size=(3, 64, 64), verbose=False)
    assert model.training and model.layer1.training and not model.bn1.training
