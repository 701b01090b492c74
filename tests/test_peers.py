"""The comparison's peers against losses computed by hand."""

import numpy as np
import pytest
import timm
import torch

from benchmarks.methods import COMPANIONS, METHODS, find
from benchmarks.methods.peer import kl
from benchmarks.methods.sliced import sliced_distance
from benchmarks.methods.tffd import inter, intra
from timm_sfr import UserError, emd_l2, gaussian_l2

SIZE = (3, 32, 32)
CLASSES = 10


def make(name):
    task = find(name)(timm.create_model("resnet20_cifar", num_classes=CLASSES), SIZE, torch.device("cpu"))
    return task, task.get_eval_model()


def batch(size=6):
    return torch.randn(size, *SIZE), torch.randint(0, CLASSES, (size,))


def numbers(x):
    return x.detach().double().numpy()


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def cross_entropy(z, q):
    """-sum_k q_k log p_k, mean over the batch; q one-hot where given as classes."""
    q = np.eye(z.shape[1])[q] if q.ndim == 1 else q
    return -(q * np.log(softmax(z))).sum(-1).mean()


def divergence(p, z, temperature):
    """T^2 KL(p || softmax(z / T)), mean over the batch."""
    return temperature**2 * (p * (np.log(p) - np.log(softmax(z / temperature)))).sum(-1).mean()


def close(tensor, number):
    assert float(tensor.detach()) == pytest.approx(number, rel=1e-4, abs=1e-6)


def test_cross_entropy_and_label_smoothing():
    x, y = batch()
    for name, epsilon in (("ce", 0.0), ("ls", 0.1)):
        task, _ = make(name)
        result = task.eval()(x, y)
        target = (1 - epsilon) * np.eye(CLASSES)[y] + epsilon / CLASSES
        close(result["loss"], cross_entropy(numbers(result["output"]), target))


@pytest.mark.parametrize("name,alpha,beta", [("deepsup", 0.0, 0.0), ("byot", 0.3, 0.03)])
def test_byot(name, alpha, beta):
    task, _ = make(name)
    x, y = batch()
    task.eval()
    logits, heads, features = task.trainable_module(x)
    assert len(heads) == 2 and len(features) == 3 and all(feature.shape == features[-1].shape for feature in features)
    z, deep = numbers(logits), numbers(features[-1])
    expected = cross_entropy(z, y.numpy())
    for head, feature in zip(heads, features, strict=False):
        expected += (1 - alpha) * cross_entropy(numbers(head), y.numpy())
        expected += alpha * divergence(softmax(z / 3), numbers(head), 3)
        expected += beta * ((numbers(feature) - deep) ** 2).sum(1).mean()
    close(task(x, y)["loss"], expected)


def test_byot_teaches_nothing_to_the_deepest_head():
    task, model = make("byot")
    task.alpha = 1.0  # the heads then see the teacher alone
    x, y = batch()
    result = task(x, y)
    (result["loss"] - torch.nn.functional.cross_entropy(result["output"], y)).backward()
    assert model.fc.weight.grad is None or model.fc.weight.grad.abs().max() < 1e-6


def test_byot_teaches_its_features_to_the_shallow_stages_alone():
    """In evaluation mode, so that no statistics carry a gradient elsewhere."""
    task, model = make("byot:alpha=0.0,beta=5.0")
    x, y = batch()
    logits, heads, features = task.eval().trainable_module(x)
    deep = list(model.stages[-1].parameters())
    # The hand's loss: the deep features as numbers.
    loss = sum(torch.nn.functional.cross_entropy(z, y) for z in (logits, *heads))
    target = torch.tensor(features[-1].tolist())
    loss = loss + sum(5 * ((feature - target) ** 2).sum(1).mean() for feature in features[:-1])
    expected = torch.autograd.grad(loss, deep)
    for ours, hand in zip(torch.autograd.grad(task(x, y)["loss"], deep), expected, strict=True):
        torch.testing.assert_close(ours, hand, rtol=1e-4, atol=1e-6)


def test_tffd():
    task, _ = make("tffd")
    x, y = batch()
    task.eval().set_epoch(2, 60)
    logits, maps = task.trainable_module(x)
    maps = [numbers(m) for m in maps]
    within = 0.0
    for m in maps:
        flat = m.reshape(*m.shape[:2], -1)
        salience = (flat / np.maximum(np.linalg.norm(flat, axis=2, keepdims=True), 1e-12)).mean((0, 2))
        order, half = np.argsort(-salience, kind="stable"), m.shape[1] // 2
        within += ((m[:, order[:half]] - m[:, order[half:]]) ** 2).mean()
    between = 0.0
    for i, low in enumerate(maps):
        for high in maps[i + 1 :]:
            side, count = high.shape[2], low.shape[1]
            step = low.shape[2] // side
            pooled = low.reshape(len(low), count, side, step, side, step).mean((3, 5))
            between += ((pooled - high[:, :count]) ** 2).mean()
    expected = cross_entropy(numbers(logits), y.numpy()) + 3 / 5 * (8e-4 * within + 5e-4 * between)
    assert 8e-4 * within + 5e-4 * between > 1e-4
    close(task(x, y)["loss"], expected)


def test_tffd_holds_the_deep_map_constant():
    shallow, deep = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 8, 4, 4, requires_grad=True)
    (inter(shallow, deep) + 0 * intra(shallow)).backward()
    assert shallow.grad.abs().sum() > 0 and deep.grad is None


def test_cskd():
    task, model = make("cskd")
    (x, y), (others, _) = batch(), batch()
    model.eval()
    z, teacher = numbers(model(x)), numbers(model(others))
    result = task(torch.cat([x, others]), y)
    assert result["output"].shape == (len(y), CLASSES)
    close(result["loss"], cross_entropy(z, y.numpy()) + divergence(softmax(teacher / 4), z, 4))


def test_pskd():
    task, model = make("pskd")
    x, y = batch()
    model.eval()
    before = softmax(numbers(model(x)))
    task.set_epoch(0, 10)
    close(task(x, y)["loss"], cross_entropy(numbers(model(x)), y.numpy()))
    task.end_epoch()
    with torch.no_grad():
        model.fc.weight.add_(0.1 * torch.randn_like(model.fc.weight))
    task.set_epoch(4, 10)
    share = 0.8 * 5 / 10
    target = (1 - share) * np.eye(CLASSES)[y] + share * before
    close(task(x, y)["loss"], cross_entropy(numbers(model(x)), target))


def test_ols():
    task, model = make("ols")
    x, y = batch()
    task.eval()
    z = numbers(model(x))
    half = 0.5 * np.eye(CLASSES)[y] + 0.5 / CLASSES  # the table is uniform before the first epoch ends
    close(task(x, y)["loss"], cross_entropy(z, half))
    task.train()
    model.eval()
    y = model(x).argmax(1)  # every prediction right
    task(x, y)
    task.end_epoch()
    p, labels = softmax(z), y.numpy()
    means = np.stack([p[labels == label].mean(0) for label in labels])
    close(task.eval()(x, y)["loss"], cross_entropy(z, 0.5 * np.eye(CLASSES)[labels] + 0.5 * means))


def test_dlb():
    task, model = make("dlb")
    (x0, y0), (x1, y1), (second, _) = batch(), batch(), batch()
    model.eval()
    z0 = numbers(model(x0))
    close(task(torch.cat([x0, second]), y0)["loss"], cross_entropy(z0, y0.numpy()))
    with torch.no_grad():
        model.fc.weight.mul_(2.0)
    again, z1 = numbers(model(second)), numbers(model(x1))
    expected = cross_entropy(np.concatenate([z1, again]), np.concatenate([y1, y0])) + divergence(softmax(z0 / 3), again, 3)
    result = task(torch.cat([x1, torch.randn_like(x1)]), y1)
    assert result["output"].shape == (len(y1), CLASSES)
    close(result["loss"], expected)


def test_tfkd():
    task, model = make("tfkd")
    x, y = batch()
    model.eval()
    z = numbers(model(x))
    teacher = np.full((len(y), CLASSES), 0.01 / (CLASSES - 1))
    teacher[np.arange(len(y)), y] = 0.99
    soft = teacher ** (1 / 20) / (teacher ** (1 / 20)).sum(1, keepdims=True)
    close(task(x, y)["loss"], 0.9 * cross_entropy(z, y.numpy()) + 0.1 * divergence(soft, z, 20))


def test_sliced():
    u, v = torch.randn(3, 9, 8), torch.randn(3, 9, 8)
    expected = 0.0
    for a, b in zip(numbers(u), numbers(v), strict=True):
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
        expected += sum(((np.sort(a[:, c]) - np.sort(b[:, c])) ** 2).mean() for c in range(8))
    close(sliced_distance(u, v), expected / 3)
    assert gaussian_l2(u, v) <= sliced_distance(u, v) <= emd_l2(u, v, solver="exact")
    task, _ = make("sliced:smoothing=0,matching=grid")
    result = task(*batch())
    close(result["loss"], float((result["task_loss"] + result["sfr_weight"] * result["sfr_loss"]).detach()))
    assert result["sfr_loss"] > 0


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_its_model_and_no_other(name):
    task, model = make(name)
    x, y = batch(8)
    x = torch.cat([x, x]) if name in COMPANIONS else x
    for _ in range(2):
        task(x, y)["loss"].backward()
        task.end_epoch()
    assert all(parameter.grad is not None for parameter in model.parameters())
    owned = {id(p) for p in task.trainable_module.parameters()}
    assert {id(p) for p in model.parameters()} <= owned
    assert {id(p) for p in task.parameters()} == owned


@pytest.mark.parametrize("name", ["ce", "ls", "byot", "tffd", "pskd", "ols", "dlb", "tfkd", "sfr", "sfr-emd"])
def test_mixed_targets_train(name):
    task, _ = make(name)
    (x, _), y = batch(4), torch.rand(4, CLASSES).softmax(1)
    x = torch.cat([x, x]) if name in COMPANIONS else x
    for _ in range(2):
        result = task(x, y)
        task.end_epoch()
    result["loss"].backward()
    assert result["loss"].isfinite()


@pytest.mark.parametrize("name", ["cskd", "dlb", "pskd"])
def test_the_gradient_passes_no_teacher(name):
    task, model = make(name)
    (x, y), (other, _), (third, _) = batch(), batch(), batch()
    model.eval()
    F = torch.nn.functional
    if name == "cskd":
        loss = task(torch.cat([x, other]), y)["loss"]
        expected = F.cross_entropy(model(x), y) + kl(model(other).detach(), model(x), 4.0)
    elif name == "dlb":
        task(torch.cat([x, other]), y)
        loss = task(torch.cat([third, third]), y)["loss"]
        expected = (F.cross_entropy(model(third), y) + F.cross_entropy(model(other), y)) / 2
        expected = expected + kl(model(x).detach(), model(other), 3.0)
    else:
        task.end_epoch()
        task.set_epoch(9, 10)
        loss = task(x, y)["loss"]
        expected = F.cross_entropy(model(x), 0.2 * F.one_hot(y, CLASSES) + 0.8 * model(x).detach().softmax(-1))
    grads = [torch.autograd.grad(one, model.conv1.weight)[0] for one in (loss, expected)]
    assert grads[0].abs().max() > 0 and torch.allclose(*grads, rtol=1e-3, atol=1e-6 * grads[0].abs().max().item())


def test_unknown_methods_are_errors():
    with pytest.raises(UserError, match="did you mean"):
        find("sfr-emdd")
    for name, message in (
        ("sfr:lamda=1", "unknown option lamda"),
        ("sfr:weigth=1", "did you mean 'weight'"),
        ("sfr:enabled=false", "enabled is not an option"),
        ("ce:smoothing=0.1", "'ce' has no options"),
        ("byot:alpha=x", "alpha: expected a number; got 'x'"),
    ):
        with pytest.raises(UserError, match=message):
            find(name)
    assert find("sfr:weight=0.5,channels=projection").config.weight == 0.5
    with pytest.raises(UserError, match=r"unknown option alpha; CSKD has temperature, weight"):
        find("cskd:alpha=1")
    task = find("cskd:weight=0.3")(timm.create_model("resnet20_cifar"), SIZE, torch.device("cpu"))
    assert (task.weight, task.temperature) == (0.3, 4.0)
