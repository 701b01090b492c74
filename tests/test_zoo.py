"""The zoo in timm, the model that comes with the package, and prediction."""

import dataclasses
import json

import pytest
import timm
import torch
import yaml
from conftest import change, run
from hub_tools import PREDICT, python
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save

import timm_sfr
from benchmarks.zoo import main as measure
from timm_sfr import RunConfig
from timm_sfr.cli.predict import find_images, predict
from timm_sfr.data.datasets import Digits
from timm_sfr.models.zoo import CONFIGS, Measured, ZooEntry, register, zoo

NAME = "resnet20_cifar.sfr_digits"
SHIPPED = [name for name, entry in zoo().items() if entry.file]
RECIPE = "resnet56_cifar.sfr_cifar100"  # without weights


@pytest.fixture(params=zoo())
def entry(request):
    return zoo()[request.param]


def test_every_recipe_is_a_run_and_a_model(entry):
    config = RunConfig.from_flat(entry.options)
    architecture, tag = entry.name.split(".", 1)
    assert config.model.model == architecture and config.hub.tag == tag and config.sfr.enabled
    model = timm_sfr.create_model(entry.name, pretrained=False)
    about = model.pretrained_cfg
    assert model.num_classes == about["num_classes"] == entry.about.num_classes
    assert sum(p.numel() for p in model.parameters()) == entry.about.parameters
    assert about["tag"] == tag and about["license"] == config.hub.license == "apache-2.0"
    assert not {"url", "origin_url", "paper_ids", "notes"} & about.keys()
    assert ("hf_hub_id" in about) != ("file" in about)
    if config.model.img_size:
        assert about["input_size"] == (3, config.model.img_size, config.model.img_size)
    if config.model.mean:
        assert about["mean"] == config.model.mean and about["std"] == config.model.std
    with torch.no_grad():
        assert model.eval().forward_features(torch.zeros(1, *about["input_size"])).shape[2:] == about["pool_size"]


def test_timm_lists_what_loads():
    """Recipes without weights are not in timm, and its own weights are as they were."""
    names = ["resnet20_cifar.sfr_cifar10", NAME]
    assert timm.list_pretrained("*sfr*") == timm.list_models("*.sfr*", pretrained=True) == SHIPPED == names
    with pytest.raises(RuntimeError, match="sfr_cifar100"):
        timm.create_model(RECIPE, pretrained=True)
    assert timm.create_model("resnet18").pretrained_cfg["tag"] == "a1_in1k"
    assert "resnet18.a1_in1k" in timm.list_pretrained("resnet18") and timm.list_models("resnet18") == ["resnet18"]
    assert {"resnet18", "resnet50"} <= set(timm.list_models(module="resnet"))
    before = timm.list_pretrained("resnet*")
    register()
    assert timm.list_pretrained("resnet*") == before


def test_the_table():
    models, recipes = (part.splitlines() for part in str(timm_sfr.list_pretrained()).split("\n\n"))
    assert models[0].split() == ["name", "parameters", "dataset", "top-1", "weights"]
    assert f"timm-sfr train --config {CONFIGS / 'RECIPE.yaml'}" in recipes[0]
    for name, entry in zoo().items():
        line = next(line for line in (models if entry.available else recipes) if line.startswith(name + " "))
        measured = entry.measured
        interval = f" ± {measured.top1_interval:.2f}" if measured and len(measured.seeds) > 1 else ""
        assert measured is None or f"  {measured.top1:.2f}{interval} %" in line
    assert [entry.name for entry in timm_sfr.list_pretrained("*digits")] == [NAME]


def test_a_namespace_that_is_none():
    done = python("import timm_sfr; print(timm_sfr.list_pretrained('*cifar10')[0].repo_id)", TIMM_SFR_NAMESPACE="a/b")
    assert done.stdout == "timm-sfr/mobilenetv2_cifar.sfr_cifar10\n" and "expected the name of a user" in done.stderr


def test_a_recipe_that_is_wrong_is_named(tmp_path, monkeypatch):
    (tmp_path / "resnet18.sfr_x.yaml").write_text("model: resnet18\nzoo: {parameter: 1}\n")
    monkeypatch.setattr("timm_sfr.models.zoo.CONFIGS", tmp_path)
    with pytest.raises(timm_sfr.UserError, match=r"resnet18.sfr_x.yaml: the `zoo:` part cannot be read"):
        zoo.__wrapped__()


def test_not_published_yet(hub, tmp_path):
    """One line with the command that trains it."""
    code = f"import timm_sfr\ntry:\n    timm_sfr.create_model('{RECIPE}')\nexcept timm_sfr.HubError as error:\n    print(error)"
    done = python(code, **hub.env(tmp_path, token=None))
    said = f"timm-sfr/{RECIPE}: it is not published yet (or private); to train it: timm-sfr train --config "
    assert f"{said}{CONFIGS / RECIPE}.yaml" in done.stdout, done.stderr
    done = python(code, **hub.env(tmp_path, token=None) | {"HF_HUB_OFFLINE": "1"})
    said = "HF_HUB_OFFLINE is set; its weights do not come with the package; to train it: timm-sfr train --config "
    assert f"{said}{CONFIGS / RECIPE}.yaml" in done.stdout, done.stderr


def test_published_loads_by_its_name(hub, tmp_path):
    """Once its repository is there, in the namespace that is set, the zoo's name loads it, in timm too."""
    about = {"num_classes": 100, "input_size": [3, 32, 32]}
    config = {"architecture": "resnet56_cifar", "num_classes": 100, "pretrained_cfg": about}
    weights = save(timm.create_model("resnet56_cifar", num_classes=100).state_dict())
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": weights}
    hub.add(f"me/{RECIPE}", files)
    code = (
        f"import timm, timm_sfr; a = timm.create_model('{RECIPE}', pretrained=True); "
        f"b = timm_sfr.create_model('{RECIPE}'); print(a.fc.bias.tolist() == b.fc.bias.tolist())"
    )
    done = python(code, TIMM_SFR_NAMESPACE="me", **hub.env(tmp_path / "home", token=None))
    assert done.stdout == "True\n", done.stderr


def accuracy(model):
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    digits = Digits(train=False, mode="RGB")
    images = torch.stack([transform(digits[i][0]) for i in range(len(digits))])
    labels = torch.tensor([digits[i][1] for i in range(len(digits))])
    with torch.no_grad():
        best = model(images).topk(5).indices == labels[:, None]
    return 100 * best[:, 0].float().mean().item(), 100 * best.any(1).float().mean().item(), len(labels)


def test_the_digits_model_scores_what_its_recipe_says():
    measured = zoo()[NAME].measured
    assert len(measured.seeds) >= 5
    for model in (timm.create_model(NAME, pretrained=True).eval(), timm_sfr.create_model(NAME)):
        top1, top5, images = accuracy(model)
        assert images == measured.images
        assert top1 == pytest.approx(measured.published_top1, abs=1e-3)
        assert top5 == pytest.approx(measured.published_top5, abs=1e-3)
        assert model.pretrained_cfg["label_names"] == tuple("0123456789")
    maps = timm_sfr.create_model(NAME, features_only=True)(torch.randn(1, 3, 16, 16))
    assert [x.shape[1] for x in maps] == [feature["num_chs"] for feature in model.feature_info]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_model_that_comes_with_the_package(name):
    """It loads without a network, and has at most 10 MB, measured scores, and a card with them."""
    entry: ZooEntry = zoo()[name]
    model, source = timm.create_model(name, pretrained=True), entry.file
    with safe_open(model.pretrained_cfg["file"], framework="pt") as file:
        assert set(file.keys()) == set(model.state_dict())
    card = source.with_suffix(".md").read_text()
    assert source.stat().st_size <= 10e6 and f'timm.create_model("{name}", pretrained=True)' in card
    assert f"| {entry.measured.published_epoch} | {entry.measured.published_top1:.2f} |" in card
    size = model.pretrained_cfg["input_size"]
    assert timm.create_model(name, pretrained=True, num_classes=3)(torch.randn(1, *size)).shape == (1, 3)


@pytest.mark.slow
def test_a_recipe_is_measured(tmp_path, monkeypatch, capsys):
    """Over its seeds; what is done is taken, a run of another recipe is not."""
    entry = zoo()[NAME]
    assert measure(["resnet18.sfr_in1k"]) == 2 and "give --data-dir DIR" in capsys.readouterr().err
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(entry.recipe.read_text())
    (tmp_path / "weights").mkdir()
    short = dataclasses.replace(entry, recipe=recipe, options=entry.options | {"epochs": 1})
    monkeypatch.setattr("benchmarks.zoo.zoo", lambda: {NAME: short})
    monkeypatch.setattr("benchmarks.zoo.WEIGHTS_FOLDER", tmp_path / "weights")
    words = [NAME, "--seeds", "0", "1", "--output", str(tmp_path / "runs")]
    assert measure(words) == 0
    runs = [json.loads((tmp_path / "runs" / f"{NAME}-seed{i}" / "metrics.json").read_text()) for i in (0, 1)]
    written = yaml.safe_load(recipe.read_text())
    found = Measured(**written["zoo"]["metrics"])
    assert found.top1 == pytest.approx(sum(one["last"]["val_top1"] for one in runs) / 2, abs=1e-4)
    assert found.seeds == (0, 1) and found.published_top1 == pytest.approx(runs[0]["best"]["val_top1"], abs=1e-4)
    assert {key: written[key] for key in entry.options} == entry.options
    assert found.data == "digits" and f"{found.published_top1:.2f}" in (tmp_path / "weights" / f"{NAME}.md").read_text()
    # One that was interrupted goes on.
    run = tmp_path / "runs" / f"{NAME}-seed1"
    longer = dataclasses.replace(short, options=entry.options | {"epochs": 2})
    monkeypatch.setattr("benchmarks.zoo.zoo", lambda: {NAME: longer})
    for seed in (0, 1):
        for name in ("args.yaml", "metrics.json"):
            change(tmp_path / "runs" / f"{NAME}-seed{seed}" / name, epochs=2)
    assert measure(words) == 0 and json.loads((run / "metrics.json").read_text())["last"]["epoch"] == 1
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("metrics.json")}
    assert measure(words) == 0 and all(path.stat().st_mtime_ns == time for path, time in times.items())
    monkeypatch.setattr("benchmarks.zoo.zoo", lambda: {NAME: entry})
    capsys.readouterr()
    assert measure(words) == 2 and "other options than the recipe: epochs" in capsys.readouterr().err


@pytest.fixture
def pictures(tmp_path):
    digits = Digits(train=False, mode="RGB")
    for i in range(3):
        digits[i][0].save(tmp_path / f"{i}-is-{digits[i][1]}.png")
    Image.new("L", (20, 30)).save(tmp_path / "grey.png")
    return tmp_path


def test_the_images_of_a_folder_are_sorted(pictures):
    found = [path.name for path in find_images([pictures])]
    assert found == sorted(found) and found[-1] == "grey.png"


def test_linked_folders_are_searched_as_in_training(pictures):
    (pictures / "deep" / ".hidden").mkdir(parents=True)
    for name in ("deep/a.png", "deep/.hidden/b.png", ".c.png"):
        Image.new("L", (4, 4)).save(pictures / name)
    (pictures / "linked").symlink_to(pictures / "deep")
    (pictures / "deep" / "loop").symlink_to(pictures)
    names = [str(path.relative_to(pictures)) for path in find_images([pictures])]
    assert [name for name in names if "/" in name] == ["deep/a.png", "linked/a.png"]


def test_a_decoders_own_errors_are_of_its_image(pictures, monkeypatch):
    def fail(file):
        raise NotImplementedError("no such colour space")

    monkeypatch.setattr("timm_sfr.cli.predict.Image.open", fail)
    found = list(predict(timm_sfr.create_model(NAME), [pictures / "grey.png"]))
    assert [one.error for one in found] == ["no such colour space"]


def test_predict_a_folder(pictures):
    done = run(*PREDICT, NAME, pictures, "--topk", 2)
    assert done.returncode == 0 and not done.stderr, done.stderr
    blocks = done.stdout.split(str(pictures))[1:]
    assert len(blocks) == 4 and all(len(block.strip().splitlines()) == 3 for block in blocks)
    for block in blocks[:3]:
        name, best, _ = block.strip().splitlines()
        assert best.split()[0] == name[-5] and float(best.split()[1]) > 50


def test_predict_json_and_bad_files(pictures):
    (pictures / "1-is-torn.png").write_bytes((pictures / "grey.png").read_bytes()[:40])
    (pictures / "notes.txt").write_text("no image")
    done = run(*PREDICT, NAME, pictures, pictures / "notes.txt", "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1 and len(rows) == 6 and sum(row["error"] is not None for row in rows) == 2
    assert all(len(row["classes"]) == 5 for row in rows if row["error"] is None)
    assert sum(c["probability"] for c in rows[0]["classes"]) <= 1
    assert "skipped: " in done.stderr and "error: 2 of 6 images could not be read" in done.stderr


@pytest.mark.parametrize(
    "words,said",
    [
        (("resnet20_cifar.sfr_digit", "x"), "no such file"),
        (("resnet20_cifra", "README.md"), "did you mean"),
        (("./nowhere", "README.md"), "has no config.json"),
        ((NAME, "tests"), "no image in tests"),
        ((NAME, "README.md", "--topk", 0), "expected 1 or more"),
        ((NAME, "README.md", "--top", 0), "did you mean '--topk'"),
    ],
)
def test_predict_mistakes(words, said):
    done = run(*PREDICT, *words)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
