"""The comparison's peers against losses computed by hand, and the comparison itself: repeatable and resumable."""

import csv
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_sfr  # noqa: F401  (registers resnet20_cifar)
from benchmarks import accuracy, timing
from benchmarks.images import DeviceBatches, choose, open_sets
from benchmarks.methods import METHODS, find
from benchmarks.methods.sliced import sliced_distance
from benchmarks.methods.tffd import inter, intra
from timm_sfr import RunConfig, UserError, emd_l2, gaussian_l2

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
        expected += (
            alpha * divergence(softmax(z / 3), numbers(head), 3) + beta * ((numbers(feature) - deep) ** 2).mean()
        )
    close(task(x, y)["loss"], expected)


def test_byot_teaches_nothing_to_the_deepest_head():
    task, model = make("byot")
    task.alpha = 1.0  # the heads then see the teacher alone
    x, y = batch()
    result = task(x, y)
    (result["loss"] - torch.nn.functional.cross_entropy(result["output"], y)).backward()
    assert model.fc.weight.grad is None or model.fc.weight.grad.abs().max() < 1e-6


def test_tffd():
    task, _ = make("tffd")
    x, y = batch()
    task.eval().set_epoch(4, 100)
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
    expected = cross_entropy(numbers(logits), y.numpy()) + 5 / 20 * (8e-4 * within + 5e-4 * between)
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
    (x0, y0), (x1, y1) = batch(), batch()
    model.eval()
    z0 = numbers(model(x0))
    close(task(x0, y0)["loss"], cross_entropy(z0, y0.numpy()))
    with torch.no_grad():
        model.fc.weight.mul_(2.0)
    again, z1 = numbers(model(x0)), numbers(model(x1))
    expected = cross_entropy(np.concatenate([z1, again]), np.concatenate([y1, y0])) + divergence(
        softmax(z0 / 3), again, 3
    )
    result = task(x1, y1)
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
    x = torch.cat([x, x]) if name == "cskd" else x
    for _ in range(2):
        task(x, y)["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    owned = {id(p) for p in task.trainable_module.parameters()}
    assert {id(p) for p in model.parameters()} <= owned
    assert {id(p) for p in task.parameters()} == owned


def test_unknown_methods_are_errors():
    with pytest.raises(UserError, match="did you mean"):
        find("sfr-emdd")
    with pytest.raises(UserError, match="lamda"):
        find("sfr:lamda=1")
    assert find("sfr:weight=0.5,channels=projection") is not None


def test_held_out_images_are_a_fixed_tenth_and_never_trained_on():
    labels = np.repeat(np.arange(3), 50)
    few, _ = choose(labels, 20, False)
    train, held = choose(labels, 20, True)
    rest, same = choose(labels, None, True)
    everything, none = choose(labels, None, False)
    assert np.array_equal(few, train) and np.array_equal(held, same) and len(none) == 0
    assert np.bincount(labels[held]).tolist() == [5] * 3 and np.bincount(labels[train]).tolist() == [20] * 3
    assert not set(held) & set(rest) and len(rest) + len(held) == len(everything) == 150


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A set of noisy colours: 4 classes of 40 images to train on and 10 to score."""
    place, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    for part, count in (("train", 40), ("val", 10)):
        for kind, colour in enumerate(rng.integers(60, 200, (4, 3))):
            (place / "colours" / part / f"c{kind}").mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(colour + rng.normal(0, 50, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / "colours" / part / f"c{kind}" / f"{i}.png")
    return place


class Loader:
    batch_size = 8


class Prep:
    @staticmethod
    def normalize(x):
        return x.float()


class Accelerator:
    device = torch.device("cpu")


def test_batches_are_crops_and_flips_that_depend_on_seed_and_epoch_alone(root):
    train, _ = open_sets(root, "colours", 32, None, False)
    make_batches = lambda seed: DeviceBatches(train, Loader, None, Prep, seed, Accelerator)  # noqa: E731
    first, again = (list(make_batches(0).epoch(3)) for _ in range(2))
    assert len(first) == len(make_batches(0)) == 20
    assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
    assert not torch.equal(first[0][0], next(make_batches(0).epoch(4))[0])
    assert not torch.equal(first[0][0], next(make_batches(1).epoch(3))[0])
    images, labels = train.dataset.tensors
    padded = torch.nn.functional.pad(images, (4,) * 4).float()
    crops = {}
    for image, label in ((padded[i], int(labels[i])) for i in range(len(padded))):
        for flip in (image, image.flip(2)):
            for top in range(9):
                for left in range(9):
                    crops[flip[:, top : top + 32, left : left + 32].numpy().tobytes()] = label
    for x, y in first[:2]:
        assert [crops[image.numpy().tobytes()] for image in x] == y.tolist()


def test_partners_are_of_the_same_class(root):
    train, _ = open_sets(root, "colours", 32, None, False)
    plain = DeviceBatches(train, Loader, None, Prep, 0, Accelerator)
    colours = torch.stack([plain.images[plain.labels == k][:, :, 4:-4, 4:-4].float().mean((0, 2, 3)) for k in range(4)])
    for x, y in DeviceBatches(train, Loader, None, Prep, 0, Accelerator, partners=True).epoch(0):
        assert len(x) == 2 * len(y)
        centres = x[len(y) :, :, 8:-8, 8:-8].mean((2, 3))
        assert torch.equal(torch.cdist(centres, colours).argmin(1), y)


def test_a_cell_repeats_to_the_bit_and_is_not_run_again(root, tmp_path, monkeypatch, capsys):
    tiny = accuracy.Set("colours", 32, None, "resnet20_cifar", 2, batch=16, net=accuracy.SMALL)
    monkeypatch.setitem(accuracy.PRESETS, "cpu", {"colours": tiny})
    cell = accuracy.Cell("cpu", "colours", "sfr", 0, "val", 2)
    threads = torch.get_num_threads()
    rows = [accuracy.run(cell, root, 1) for _ in range(2)]
    torch.set_num_threads(threads)
    scores = [{name: row[name] for name in ("top1", "top5", "nll", "ece", "best_top1", "best_epoch")} for row in rows]
    assert scores[0] == scores[1] and scores[0]["nll"] > 0
    assert json.loads(rows[0]["args"])["sfr"]["matching"] == "gaussian"
    assert rows[0]["extra_parameters"] == 0 and rows[0]["train_seconds"] > 0 and rows[0]["images"] == 160
    path = tmp_path / "results" / "accuracy.csv"
    accuracy.append(path, rows[0])
    with path.open() as file:
        assert next(csv.DictReader(file))["method"] == "sfr"
    words = ["--data-root", str(root), "--csv", str(path), "--methods", "sfr", "ce", "--seeds", "0"]
    assert [c.method for c in accuracy.missing(accuracy.parse(words))] == ["ce"]
    assert [c.method for c in accuracy.missing(accuracy.parse([*words, "--heldout"]))] == ["sfr", "ce"]
    assert accuracy.main([*words[:4], "--methods", "sfr", "--seeds", "0"]) == 0
    assert "0 runs to do" in capsys.readouterr().out
    assert accuracy.main([*words, "--sets", "colors"]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_a_trial_is_short_and_stays_out_of_the_results(root, monkeypatch, capsys):
    tiny = accuracy.Set("colours", 32, None, "resnet20_cifar", 2, 16, net=accuracy.SMALL, more=accuracy.MIX)
    monkeypatch.setitem(accuracy.PRESETS, "cpu", {"colours": tiny})
    row = accuracy.run(accuracy.Cell("cpu", "colours", "sfr", 0, "val", 1), root, torch.get_num_threads(), limit=2)
    assert row["images"] == 32 and '"cutmix": 1.0' in row["args"]
    assert accuracy.main(["--data-root", str(root), "--limit", "2"]) == 2
    assert "name a --csv of its own" in capsys.readouterr().err


@pytest.mark.parametrize("preset,name", [(preset, name) for preset, sets in accuracy.PRESETS.items() for name in sets])
def test_every_set_is_a_valid_run(preset, name, tmp_path):
    options = accuracy.Cell(preset, name, "ce", 0, "val", 1).options(str(tmp_path))
    config = RunConfig.from_flat(options)
    assert timm.is_model(config.model.model) and config.engine.seed == 0
    assert str(tmp_path) not in json.dumps(accuracy.Cell(preset, name, "ce", 0, "val", 1).options())
    assert config.model.pretrained == (accuracy.PRESETS[preset][name].source is not None)


def test_methods_are_timed_in_turns(root, monkeypatch, tmp_path, capsys):
    tiny = accuracy.Set("colours", 32, None, "resnet20_cifar", 2, 16, net=accuracy.SMALL)
    monkeypatch.setitem(accuracy.PRESETS, "cpu", {"colours": tiny})
    threads, path = torch.get_num_threads(), tmp_path / "timing.csv"
    words = ["--data-root", str(root), "--rounds", "2", "--batches", "1", "--threads", str(threads)]
    assert timing.main([*words, "--methods", "sfr", "dlb", "--csv", str(path)]) == 0
    rows = accuracy.read(path)
    assert [row["method"] for row in rows] == ["sfr", "dlb"]
    assert all(0 < float(row["low"]) <= float(row["ratio"]) <= float(row["high"]) for row in rows)
    assert timing.main([*words, "--methods", "sfrr"]) == 2 and "expected any of" in capsys.readouterr().err


def test_every_peer_is_in_the_comparison():
    assert {"ce", "ls", "deepsup", "byot", "tffd", "cskd", "pskd", "ols", "dlb", "tfkd", "sfr-gaussian", "sfr"} <= set(
        METHODS
    )
