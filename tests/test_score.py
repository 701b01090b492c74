"""Honest scores: a test split, early stopping, test-time augmentation, and predictions as a table."""

import csv
import json
import shutil

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import change, cut, finished_run, summary, train, train_pair
from huggingface_hub import ModelCard
from PIL import Image
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from torchvision.transforms import TenCrop

from benchmarks.faults import differences
from timm_sfr import UserError
from timm_sfr.cli import compare
from timm_sfr.cli.main import main
from timm_sfr.config import RunConfig
from timm_sfr.data.transforms import Preprocessing, plain_view
from timm_sfr.hub.card import dataset_id, dataset_name
from timm_sfr.hub.push import model_files, run_files
from timm_sfr.runs.checkpoints import checkpoints
from timm_sfr.runs.predictions import ECE_BINS
from timm_sfr.training.run_state import RunState

TINY = ("--model", "resnet20_cifar", "--img-size", 16, "-b", 40, "-j", 0, "--device", "cpu", "--warmup-epochs", 0)


@pytest.fixture(scope="session")
def tested(table, tmp_path_factory):
    """A run on a table with a test split, and what it printed."""
    words = (*TINY, "--dataset", f"csv/{table}", "--epochs", 2, "--test-split", "test", "--report-interval", 9)
    return finished_run(tmp_path_factory.mktemp("tested"), *words)


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def labelled(table, split):
    """The image files and the classes of a split of the table."""
    rows = [row for row in csv.DictReader(table.read_text().splitlines()) if row["split"] == split]
    return [table.parent / row["path"] for row in rows], np.array([int(row["label"]) for row in rows])


def probabilities(folder, files, mirror=False):
    """What the run's exported model says to images in plain timm; `mirror`: to the mean of an image's and its mirror's logits."""
    model = timm.create_model(f"local-dir:{folder / 'model'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    images = []
    for file in files:
        with Image.open(file) as image:
            images.append(transform(image))
    batch = torch.stack(images)
    with torch.no_grad():
        return (model(batch) if not mirror else (model(batch) + model(batch.flip(-1))) / 2).softmax(1).numpy()


def expected_scores(found, target):
    """scikit-learn's scores, and the calibration error by its definition."""
    confidence, hits = found.max(1), found.argmax(1) == target
    bins = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    gaps = [abs(hits[bins == one].mean() - confidence[bins == one].mean()) * (bins == one).mean() for one in set(bins.tolist())]
    return {"images": len(target), "top1": 100 * accuracy_score(target, found.argmax(1)),
            "top5": 100 * top_k_accuracy_score(target, found, k=5, labels=range(10)),
            "loss": log_loss(target, found, labels=range(10)), "ece": sum(gaps)}  # fmt: skip


def test_the_test_split_is_scored_with_the_exported_weights(tested, table):
    folder, printed = tested
    test = metrics(folder)["test"]
    files, target = labelled(table, "test")
    expected = expected_scores(probabilities(folder, files), target)
    assert {name: test[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert test["split"] == "test" and test["epoch"] == metrics(folder)["best"]["epoch"]
    assert f"test top1 {test['top1']:.2f}" in printed and "200/50/40 train/val/test images" in printed
    assert summary(folder)[-1]["val_top1"], "the test is not the validation"


def test_card_report_and_comparison_name_the_test(tested, tmp_path, command):
    folder, test = tested[0], metrics(tested[0])["test"]
    card = ModelCard.load(folder / "model" / "README.md")
    results = {one.metric_name: (one.metric_value, one.dataset_split) for one in card.data.eval_results}
    assert results == {f"Top {k} Accuracy": (pytest.approx(test[f"top{k}"], abs=1e-4), "test") for k in (1, 5)}
    assert f"| **these weights: test** | {test['epoch'] + 1} | {test['top1']:.2f} |" in card.text
    page = (folder / "report.html").read_text()
    assert f'<div class="score"><b>{test["top1"]:.2f} %</b><span>top-1, test</span>' in page
    other = shutil.copytree(folder, tmp_path / "other")
    change(other / "metrics.json", test={**test, "top1": test["top1"] + 1.5})
    change(other / "args.yaml", lr=0.5)
    lines = command("compare", folder, other).splitlines()
    assert "test top-1  test - A" in lines[0] and lines[2].endswith(f"{test['top1'] + 1.5:.2f}       +1.50")
    plain, scores = shutil.copytree(folder, tmp_path / "plain"), metrics(folder)
    del scores["test"]
    (plain / "metrics.json").write_text(json.dumps(scores))
    groups = compare.grouped([compare.read_finished(path) for path in (other, folder)])
    assert compare.tables(groups)[0][1][-2:] == (f"{test['top1'] + 1.5:.2f}", "")
    first, second = map(json.loads, command("compare", plain, other, "--json").splitlines())
    assert "test_top1" not in first and second["test_top1"] == [pytest.approx(test["top1"] + 1.5)]


def test_a_finished_run_is_scored_when_it_was_not_and_once(tested, tmp_path):
    folder, test = shutil.copytree(tested[0], tmp_path / "run"), metrics(tested[0])["test"]
    unscored = metrics(folder)
    del unscored["test"]
    (folder / "metrics.json").write_text(json.dumps(unscored))
    change(folder / "args.yaml", test_split=None)
    done = train("--resume", folder, "--test-split", "test")
    assert metrics(folder) == {**unscored, "test": test}
    assert "test-split" not in done.stdout and yaml.safe_load((folder / "args.yaml").read_text())["test_split"] == "test"
    change(folder / "metrics.json", test={**test, "top1": 12.5})
    assert "test top1 12.50" in train("--resume", folder).stdout, "scored a second time"
    change(folder / "metrics.json", test={**test, "top1": 12.5, "split": "another"})
    assert f"test top1 {test['top1']:.2f}" in train("--resume", folder).stdout, "the scores of another split are not this one's"
    change(folder / "metrics.json", test={**test, "top1": 12.5})
    longer = train("--resume", folder, "--epochs", 3).stdout
    best = metrics(folder)["best"]["epoch"]
    assert ("test top1 12.50" in longer) == (best == test["epoch"]) and metrics(folder)["test"]["epoch"] == best


def test_a_run_with_split_batchnorm_is_tested_with_its_plain_model(table, tmp_path):
    words = (*TINY, "--dataset", f"csv/{table}", "--epochs", 1, "--test-split", "test", "--aug-splits", 2, "--split-bn")
    run, said = finished_run(tmp_path, *words, "--report-interval", 0)
    files, target = labelled(table, "test")
    assert "scored once" in said
    assert metrics(run)["test"]["loss"] == pytest.approx(expected_scores(probabilities(run, files), target)["loss"], abs=1e-5)


@pytest.mark.slow
def test_two_processes_score_the_test_split_as_one_does(table, tmp_path, command):
    words = (*TINY, "--dataset", f"csv/{table}", "--epochs", 1, "--test-split", "test", "--validation-batch-size", 3)
    done = train_pair(*words, "--output", tmp_path, "--experiment", "run", "--report-interval", 0)
    assert done.returncode == 0 and done.stdout.count("test top1") == 1, done.stderr
    one = json.loads(command("validate", tmp_path / "run", "--val-split", "test", "--json", "--device", "cpu"))
    two = metrics(tmp_path / "run")["test"]
    assert {name: two[name] for name in ("images", "top1", "top5")} == {name: one[name] for name in ("images", "top1", "top5")}
    assert (two["loss"], two["ece"]) == pytest.approx((one["loss"], one["ece"]), abs=1e-6) and two["images"] == 40


@pytest.mark.parametrize(
    "words,said",
    [
        (("--test-split", "test"), "test-split: the digits have no test split"),
        (("--data-dir", "FOLDER", "--test-split", "test"), "test-split: 'FOLDER' has no 'test' part (any of test); found"),
        (("--data-dir", "FOLDER", "--test-split", "validation"), "test-split: 'validation' is the validation split"),
        (("--data-dir", "FOLDER", "--test-split", "valid"), "is the val split too"),
        (("--data-dir", "FOLDER", "--test-num-samples", 3), "test-num-samples: it is for a test split"),
        (("--tta", 2), "timm-sfr validate RUN --tta 2"),
        (("--tta", 3), "tta: expected 0 (none), 2, 5 or 10"),
        (("--patience", 0), "patience: expected"),
    ],
)
def test_mistakes_are_told_before_training(words, said, folder, tmp_path):
    words = [str(folder) if word == "FOLDER" else word for word in words]
    error = train(*words, "--output", tmp_path, ok=False).stderr
    assert said.replace("FOLDER", str(folder)) in error and len(error.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_a_test_split_with_other_classes_is_told_before_training(folder, tmp_path):
    data = shutil.copytree(folder, tmp_path / "data")
    shutil.copytree(data / "val", data / "test")
    (data / "test" / "class2").rename(data / "test" / "clas2")
    words = ("--data-dir", data, "--test-split", "test", "--output", tmp_path / "out")
    assert "test has 1 class that training does not have: ['clas2']; did you mean 'class2'" in train(*words, ok=False).stderr
    (data / "test" / "clas2").rename(data / "test" / "class2")
    done = train(*TINY[:4], *words, "--epochs", 1, "-b", 20, "-j", 0, "--experiment", "run")
    assert "data: warning: 21 images of test also in val" in done.stdout
    assert "test has 21 images in 3 classes, 7 each" in done.stdout


@pytest.mark.parametrize(
    "best,last,patience,stops",
    [(2, 4, 2, True), (2, 4, 3, False), (2, 4, None, False), (None, 2, 3, True), (None, 1, 3, False), (3, 3, 1, False),
     (None, None, 1, False)],
)  # fmt: skip
def test_patience_counts_validated_epochs(best, last, patience, stops):
    scores = [{} if epoch is None else {"epoch": epoch} for epoch in (best, last)]
    assert RunState(best=scores[0], last=scores[1]).out_of_patience(patience) is stops


@pytest.fixture(scope="module")
def impatient(table, tmp_path_factory):
    """A run whose rate falls to zero after two epochs, so that without BatchNorm nothing changes any more: it stops early."""
    words = (*TINY, "--model", "test_convnext", "--img-size", 32, "--opt", "adamw", "--lr", 1e-3,
             "--sched", "step", "--decay-epochs", 2, "--decay-rate", 0, "--patience", 2)  # fmt: skip
    return finished_run(tmp_path_factory.mktemp("impatient"), *words, "--dataset", f"csv/{table}", "--epochs", 12,
                        "--test-split", "test", "--checkpoint-hist", 99)  # fmt: skip


def test_a_run_stops_early_and_is_finished(impatient, tmp_path):
    folder, printed = impatient
    scores, rows = metrics(folder), summary(folder)
    best = max(range(len(rows)), key=lambda epoch: float(rows[epoch]["val_top1"]))  # the first of equal ones
    assert len(rows) == best + 3 < 12 and scores["best"]["epoch"] == best and scores["last"]["epoch"] == best + 2
    assert scores["stopped_early"] == {"epochs": best + 3, "patience": 2} and scores["test"]["epoch"] == best
    assert printed.count(f"stopped early after epoch {best + 3}: no better val_top1 than") == 1
    assert f"12 epochs, stopped early after {best + 3} (patience 2)" in (folder / "model" / "README.md").read_text()
    assert "README.md" in run_files(folder, "user/name", tmp_path), "it can be published"
    again = train("--resume", shutil.copytree(folder, tmp_path / "run")).stdout
    assert f"{best + 3} epochs of 12 done, stopped early by --patience 2; to train longer, raise --patience" in again
    assert "stopped early after" not in again


def test_patience_resumes_exactly(impatient, tmp_path):
    for keep in (0, len(checkpoints(impatient[0] / "checkpoints")) - 2):
        cut(impatient[0], tmp_path / str(keep), keep)
        train("--resume", tmp_path / str(keep))
        assert not differences(impatient[0], tmp_path / str(keep))
        assert metrics(tmp_path / str(keep))["test"] == metrics(impatient[0])["test"]
    train("--resume", tmp_path / "0", "--patience", 3)
    assert len(summary(tmp_path / "0")) == len(summary(impatient[0])) + 1, "more patience trains on"


@pytest.mark.parametrize("crop_mode,size", [("center", (3, 24, 24)), ("center", (3, 24, 16)), ("squash", (3, 24, 24))])
def test_the_views_are_torchvisions_crops(crop_mode, size):
    prep = Preprocessing(size, (0.5,) * 3, (0.5,) * 3, "bilinear", 0.8, crop_mode)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8))
    plain = prep.eval_transform()(image)
    views = {count: prep.eval_transform(count)(image) for count in (2, 5, 10)}
    for count, found in views.items():
        assert found.shape == (count, *size) and torch.equal(found[plain_view(count)], plain)
    assert torch.equal(views[2][1], plain.flip(-1)) and torch.equal(views[10][:5], views[5])
    *resize, _, convert = prep.eval_transform().transforms
    for step in resize:
        image = step(image)
    crops = torch.stack([convert(crop) for crop in TenCrop(size[1:])(image)])
    assert sorted(map(bytes, crops.numpy())) == sorted(map(bytes, views[10].numpy()))
    with pytest.raises(UserError, match="--tta 2 mirrors them"):
        Preprocessing(size, (0.5,) * 3, (0.5,) * 3, "bilinear", 0.8, "border").eval_transform(5)


def test_validate_with_test_time_augmentation(tested, table, command, capsys):
    """The plain scores stay; the others are those of the mean of the logits."""
    words = ["validate", str(tested[0]), "--val-split", "test", "--json", "--device", "cpu", "-j", "0"]
    plain, both = (json.loads(command(*words, *more)) for more in ((), ("--tta", "2")))
    names = ("images", "top1", "top5", "loss", "ece")
    assert {name: both[name] for name in names} == pytest.approx({name: plain[name] for name in names}, abs=1e-6)
    files, target = labelled(table, "test")
    expected = expected_scores(probabilities(tested[0], files, mirror=True), target)
    assert both["tta"]["views"] == 2 and {name: both["tta"][name] for name in names[1:]} == pytest.approx(
        {name: expected[name] for name in names[1:]}, abs=1e-5
    )
    shown = command(*(word for word in words if word != "--json"), "--tta", "10", "--crop-pct", "0.8")
    assert "the mean of the logits of 10 views" in shown
    assert main([*words, "--tta", "5", "--crop-pct", "1"]) == 0
    assert "all crops of a square image are the same" in capsys.readouterr().err


def test_predictions_as_a_table(tested, folder, tmp_path, capsys):
    """A row per image, in order; those that cannot be read too."""
    images = tmp_path / "7"
    images.mkdir()
    shutil.copy(next((folder / "val" / "class1").iterdir()), images / "a, b.png")
    (images / "bad.png").write_text("junk")
    shutil.copy(images / "a, b.png", tmp_path / "z.png")
    words = ["predict", str(tested[0]), str(images), str(tmp_path / "z.png"), "--topk", "2"]
    assert main([*words, "--csv", str(tmp_path / "out.csv")]) == 1
    printed = capsys.readouterr()
    assert printed.out == f"3 images in {tmp_path / 'out.csv'}\n" and "error: 1 of 3 images could not be read" in printed.err
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert list(rows[0]) == ["file", "label", "class1", "probability1", "class2", "probability2", "error"]
    assert [row["label"] for row in rows] == ["7", "7", ""] and [bool(row["error"]) for row in rows] == [False, True, False]
    found = probabilities(tested[0], [images / "a, b.png"])[0]
    order = np.argsort(-found)[:2]
    assert [rows[0]["class1"], rows[0]["class2"]] == [str(k) for k in order] and rows[0]["file"] == str(images / "a, b.png")
    assert [float(rows[0][f"probability{k}"]) for k in (1, 2)] == pytest.approx(found[order].tolist(), abs=1e-5)
    assert main([*words, "--csv", str(tmp_path / "none" / "out.csv")]) == 2
    assert "csv: cannot write" in capsys.readouterr().err


def test_a_run_that_ends_at_its_stop_epoch_is_published_without_local_paths(tested, tmp_path):
    folder = shutil.copytree(tested[0], tmp_path / "run")
    paths = {name: f"/home/me/{name}" for name in ("class_map", "class_weights", "pretrained_path", "initial_checkpoint")}
    change(folder / "args.yaml", stop_epoch=2, wandb_resume_id="mine", **paths)
    change(folder / "metrics.json", epochs=9)
    files = run_files(folder, "user/name", tmp_path)
    args = yaml.safe_load(files["args.yaml"].read_text())
    assert {name: args[name] for name in paths} == {name: name for name in paths} and "wandb_resume_id" not in args
    assert "9 epochs, stopped after 2 (`stop_epoch`), opt sgd" in files["README.md"].read_text()


def test_local_paths_of_the_data_are_not_published(tested, tmp_path):
    folder = tested[0]
    files = run_files(folder, "user/name", tmp_path)
    args = yaml.safe_load(files["args.yaml"].read_text())
    assert args["dataset"] == metrics(folder)["dataset"] == "csv/digits.csv"
    assert "--dataset csv/FILE" in files["README.md"].read_text()
    names = {"hfds/a/b": "hfds/a/b", "hfds//x/b": "hfds/./b", f"hfds/{tmp_path}": f"hfds/./{tmp_path.name}",
             "csv/mine/a.csv": "csv/a.csv"}  # fmt: skip
    assert {source: RunConfig.from_flat({"dataset": source}).data.public_name() for source in names} == names
    named = {
        "cifar10_1": {"data_dir": "/data/cifar10.1"},
        "mine": {"dataset": "csv/x/Mine.csv"},
        "cifar10": {"dataset": "torch/cifar10"},
        "imagenet": {"dataset": "wds/", "data_dir": "/d/ImageNet"},
        "flowers": {"dataset": "torch/image_folder", "data_dir": "flowers"},
        "digits": {"dataset": "digits"},
        "train": {"data_dir": "a/train.tar"},
        "data": {},
    }
    assert {name: dataset_name(options) for name, options in named.items()} == {name: name for name in named}
    ids = {"hfds/a/b": "a/b", "hfids/a/b": "a/b", "hfds//x/b": None, "hfds/./b": None, "hfds/parquet": None, "csv/a.csv": None,
           "torch/cifar10": "uoft-cs/cifar10", f"hfds/{tmp_path}": None}  # fmt: skip
    assert {source: dataset_id({"dataset": source}) for source in ids} == ids


@pytest.mark.parametrize("option,value,line", [
    ("initial_checkpoint", "/home/me/a.safetensors", "`--initial-checkpoint` with the path to that file"),
    ("class_weights", "/home/me/w.csv", "`--class-weights` with the path to that file"),
    ("class_weights", "auto", None),
])  # fmt: skip
def test_the_card_names_the_files_that_its_recipe_lacks(option, value, line, tested, tmp_path):
    folder = shutil.copytree(tested[0], tmp_path / "run")
    change(folder / "args.yaml", **{option: value})
    card = run_files(folder, "user/name", tmp_path)["README.md"].read_text()
    assert "/home/me" not in card and (line is None) == ("not published" not in card) and (line or "Recipe") in card


def test_a_card_claims_no_more_than_the_run_did(tested, tmp_path):
    """Without a feature loss nothing taught itself; of two classes, the top-5 says nothing."""
    folder = shutil.copytree(tested[0], tmp_path / "run")
    card = ModelCard(run_files(folder, "user/name", tmp_path)["README.md"].read_text())
    assert "self-distillation" in card.data.tags and "its deep features taught" in card.text
    assert [result.metric_name for result in card.data.eval_results] == ["Top 1 Accuracy", "Top 5 Accuracy"]
    change(folder / "args.yaml", sfr_weight=0.0)
    change(folder / "model/config.json", num_classes=2)
    card = ModelCard(run_files(folder, "user/name", tmp_path)["README.md"].read_text())
    assert "self-distillation" not in card.data.tags and "its deep features taught" not in card.text
    assert "The feature loss was off (weight 0)." in card.text
    assert [result.metric_name for result in card.data.eval_results] == ["Top 1 Accuracy"]


def test_the_code_of_a_card_for_other_channels_runs(tmp_path, capsys):
    model = timm.create_model("test_resnet", in_chans=4, num_classes=3)
    card = model_files(model, "user/name", tmp_path)["README.md"].read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("hf-hub:user/name", f"local-dir:{tmp_path / 'model'}")
    exec(code, {})
    assert "4, 160, 160" in code and len(eval(capsys.readouterr().out)) == 3


@pytest.mark.parametrize("name,published", [("local-dir:/home/me/one/model", "model"), ("runs/one", "one"),
                                            ("local-dir:one", "one"), ("hf-hub:user/base", None),
                                            ("test_resnet.r160_in1k", None)])  # fmt: skip
def test_a_local_model_is_published_without_its_folder(name, published, tested, tmp_path):
    folder = shutil.copytree(tested[0], tmp_path / "run")
    for file in ("args.yaml", "metrics.json"):
        change(folder / file, model=name)
    files = run_files(folder, "user/name", tmp_path)
    assert yaml.safe_load(files["args.yaml"].read_text())["model"] == (published or name)
    assert json.loads(files["metrics.json"].read_text()) == metrics(folder) | {"model": published or name}
    texts = [path.read_text() for path in files.values() if path.suffix in (".md", ".json", ".yaml", ".csv")]
    assert len(texts) >= 4 and not any("/home/me" in text for text in texts)
    line = "Add `--model` with the path to that file or folder, which is not published."
    assert (line in files["README.md"].read_text()) == (published is not None)
