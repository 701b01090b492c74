"""Images with any number of classes: data, loss, scores, and all commands on a run; against timm and scikit-learn."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import adds_up, cut, digits_table, finished_run, summary, train
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score
from test_processes import agreeing_updates
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy
from timm.task import ClassificationEvaluator, MultiLabelClassificationTask

from benchmarks.faults import differences
from timm_sfr import DynamicLabelSmoothing, LossForm, RunConfig, SFRConfig, SFRTask, UserError
from timm_sfr.cli.train import parse
from timm_sfr.config import DataConfig
from timm_sfr.data.datasets import Digits, open_splits, open_validation
from timm_sfr.data.images import ImageReading
from timm_sfr.data.samples import Decoded
from timm_sfr.data.transforms import create_mixup
from timm_sfr.hub.space import space_files
from timm_sfr.method.smoothing import own_epsilon
from timm_sfr.models.files import PROBLEM, SEVERAL_LABELS
from timm_sfr.runs.predictions import read_class_scores
from timm_sfr.training.evaluate import LabelScores
from timm_sfr.training.tasks import PlainLoss, PlainTask

K = 6
MULTI = LossForm(bce=True, multi_label=True)
WORDS = ("--task", "multilabel", "--model", "resnet20_cifar", "--img-size", 16, "-b", 20, "-j", 0, "--device", "cpu",
         "--scale", 0.7, 1, "--hflip", 0, "--color-jitter", 0, "--cache-dataset", "--opt", "adamw", "--lr", 0.01)  # fmt: skip


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    """A table of digits with two classes each, the digit and even or odd, 8 of each digit to validate on."""
    return digits_table(tmp_path_factory.mktemp("labels"), 8, lambda digit: f"{digit}|{('even', 'odd')[digit % 2]}")


@pytest.fixture(scope="module")
def labelled(labels, tmp_path_factory):
    """A finished run on that table, and what it printed."""
    words = (*WORDS, "--dataset", f"csv/{labels}", "--test-split", "test", "--epochs", 6, "--report-interval", 6)
    return finished_run(tmp_path_factory.mktemp("labelled"), *words)


def targets(size=24):
    """Logits, and classes of which an image has none, one or several."""
    return torch.randn(size, K) * 3, (torch.rand(size, K) < 0.3).float()


# --- data -------------------------------------------------------------------------------------------------------------


def table(root, header, rows, name="t.csv"):
    for index in range(len(rows)):
        Image.new("RGB", (16, 16), (index, 0, 0)).save(root / f"{index}.png")
    with (root / name).open("w", newline="") as file:
        csv.writer(file).writerows([header, *([f"{index}.png", *row] for index, row in enumerate(rows))])
    return root / name


def opened(path, **options):
    return open_splits(DataConfig(dataset=f"csv/{path}", task="multilabel", **options), "RGB", 0)


def dense(split):
    images = Decoded(split.dataset, ImageReading())
    return np.stack([images[index][1] for index in range(len(images))])


def test_several_classes_in_a_cell(tmp_path):
    cells = ["cat|dog", "dog; bird", "", "bird", " cat |", "dog|dog", "cat", "bird"]
    rows = [(cell, "train" if index < 6 else "val") for index, cell in enumerate(cells)]
    train_split, val_split = opened(table(tmp_path, ("image", "label", "split"), rows))
    assert train_split.class_names == ("bird", "cat", "dog") == val_split.class_names
    expected = [[0, 1, 1], [1, 0, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert dense(train_split).tolist() == expected and dense(train_split).dtype == np.float32
    assert dense(val_split).tolist() == [[0, 1, 0], [1, 0, 0]]
    config = DataConfig(dataset=f"csv/{tmp_path / 't.csv'}", task="multilabel")
    alone = open_validation(config, "RGB", 0, ("ant", "bird", "cat", "dog"))
    assert dense(alone).tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]], "in the order of the model's classes"
    (tmp_path / "map.txt").write_text("dog\nbird\n")
    assert dense(opened(tmp_path / "t.csv", class_map=str(tmp_path / "map.txt"))[0]).tolist()[:4] == [
        [1, 0], [1, 1], [0, 0], [0, 1]]  # fmt: skip


def test_a_column_for_each_class(tmp_path):
    rows = [(1, 1, "x", "train"), (0, 1, "x", "train"), (0, 0, "x", "train"), (1, 0, "x", "val")]
    path = table(tmp_path, ("image", "dog", "cat", "label", "split"), rows)
    train_split, val_split = opened(path, target_key="dog, cat")
    assert train_split.class_names == ("cat", "dog")
    assert dense(train_split).tolist() == [[1, 1], [1, 0], [0, 0]] and dense(val_split).tolist() == [[0, 1]]


def test_lists_in_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table(tmp_path, ("image",), [()] * 4)
    columns = {
        "image": [f"{index}.png" for index in range(4)],
        "split": ["train"] * 3 + ["val"],
        "label": [["b", "a"], [], ["b"], ["a"]],
        "a": [True, False, True, False],
        "b": [True, True, False, True],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    assert dense(opened(tmp_path / "t.parquet")[0]).tolist() == [[1, 1], [0, 0], [0, 1]]
    assert dense(opened(tmp_path / "t.parquet", target_key="a,b")[0]).tolist() == [[1, 1], [0, 1], [1, 0]]


def test_a_part_of_all_images_is_validated_on_where_there_is_no_split(tmp_path):
    path = table(tmp_path, ("image", "label"), [("a|b" if index % 2 else "",) for index in range(20)])
    train_split, val_split = opened(path, val_share=0.25)
    assert (len(train_split.dataset), len(val_split.dataset)) == (15, 5)
    path = table(tmp_path, ("image", "label"), [("a|b" if index else "rare",) for index in range(20)])
    for seed in range(8):  # the last image of a class is trained on, whatever the seed
        train_split, val_split = open_splits(DataConfig(dataset=f"csv/{path}", task="multilabel", val_share=0.5), "RGB", seed)
        assert len(val_split.dataset) == 10 and train_split.scan.counts["rare"] == 1


@pytest.mark.parametrize(
    "rows,options,said",
    [
        ([("a",), ("b",)], {}, "every image in 'FILE' has exactly one class, and --task multilabel is for any number"),
        ([("",), ("|",)], {}, "no image of train has a class"),
        ([("a|b",), ("a",)], {"target_key": "label,cat"}, "has no column of labels: expected cat"),
        ([("a|b",), ("a",)], {"target_key": "label,label"}, "target-key: Multi-field target key"),
        ([("a|b",), ("a",)], {"target_key": "label,image"}, "line 2: expected 0 or 1 in column 'label'"),
    ],
)
def test_mistakes_in_a_table(rows, options, said, tmp_path):
    path = table(tmp_path, ("image", "label"), rows)
    with pytest.raises(UserError) as error:
        opened(path, **options)
    assert said.replace("FILE", str(path)) in str(error.value) and "\n" not in str(error.value)


def test_hugging_face_data_sets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    digits = Digits(train=True, mode="RGB")
    names = [*map(str, range(10)), "even"]
    values = {"image": [digits[index][0] for index in range(8)],
              "label": [[digits[index][1], *([10] if digits[index][1] % 2 == 0 else [])] for index in range(8)],
              "one": [0] * 8}  # fmt: skip
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Sequence(datasets.ClassLabel(names=names)),
                                  "one": datasets.ClassLabel(names=["a", "b"])})  # fmt: skip
    for split in ("train", "validation"):
        path = tmp_path / "set" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_dict(values, features=features).to_parquet(path)
    shared = {"dataset": f"hfds/{tmp_path / 'set'}", "task": "multilabel", "data_dir": str(tmp_path / "cache")}
    split = open_splits(DataConfig(**shared), "RGB", 0)[0]
    assert split.class_names == tuple(names)
    assert [np.flatnonzero(row).tolist() for row in dense(split)] == values["label"]
    with pytest.raises(UserError, match="needs a column of lists of class labels"):
        open_splits(DataConfig(**shared, target_key="one"), "RGB", 0)


# --- loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"bce_sum": True, "pos_weight": 3.0}, {"bce_target_thresh": 0.2}])
def test_without_sfr_the_loss_is_that_of_timms_task(options):
    logits, target = targets()
    model = torch.nn.Identity()
    timms = MultiLabelClassificationTask(model, criterion_kwargs={"smoothing": 0.1, **options}, verbose=False)
    form = LossForm(**{"bce_pos_weight" if name == "pos_weight" else name: value for name, value in options.items()},
                    bce=True, multi_label=True)  # fmt: skip
    ours = PlainTask(model, PlainLoss(0.1, form), verbose=False)
    assert torch.allclose(ours(logits, target)["loss"], timms(logits, target)["loss"])
    with pytest.raises(UserError, match="expected dense targets"):
        ours(logits, target.argmax(1))


def test_mixing_and_smoothing_are_those_of_timm():
    logits, target = targets()
    mixup = create_mixup(RunConfig.from_flat({"mixup": 1.0, "data_dir": "x"}).aug, K, multi_label=True)
    images = torch.rand(24, 3, 4, 4)
    mixed_images, mixed = mixup(images.clone(), target)
    first, last = images[0].flatten(), images[-1].flatten()
    lam = ((mixed_images[0].flatten() - last) @ (first - last) / (first - last).square().sum()).item()
    assert torch.allclose(mixed, lam * target + (1 - lam) * target.flip(0), atol=1e-4)
    # timm smooths mixtures where it makes them, and gives them to a criterion that smooths no more.
    smoothed = mixup_target(target, K, lam=0.3, smoothing=0.1, multi_label=True)
    mixed = mixup_target(target, K, lam=0.3, multi_label=True)
    assert torch.allclose(PlainLoss(0.1, MULTI)(logits, mixed), BinaryCrossEntropy(0.0)(logits, smoothed))


def test_dynamic_smoothing_is_that_of_two_classes():
    smoothing = DynamicLabelSmoothing(K, loss=MULTI)
    smoothing.set_epoch(99, 100)
    logits, target = targets()
    loss, epsilon = smoothing(logits, target)
    assert epsilon.item() == pytest.approx(own_epsilon(2)) and not smoothing.table.numel()
    # The target makes a class that is there 100 times as probable as that it is not.
    high = smoothing.targets(logits, target)[0].max()
    assert (high / (1 - high)).item() == pytest.approx(100, rel=1e-3)
    assert torch.allclose(loss, BinaryCrossEntropy(own_epsilon(2), smooth_dense=True)(logits, target))
    for source, schedule in (("classes", "constant"), (None, "confidence")):
        with pytest.raises(UserError, match="several labels have no class table and no confidence"):
            DynamicLabelSmoothing(K, 0.1, source, schedule, MULTI)


def model_and_batch():
    model = timm.create_model("resnet20_cifar", num_classes=K)
    return model, torch.randn(4, 3, 32, 32), targets(4)[1]


@pytest.mark.parametrize("total", [False, True])
def test_terms_add_up_and_lambda_keeps_its_balance(total):
    model, images, target = model_and_batch()
    form = LossForm(bce=True, bce_sum=total, multi_label=True)
    task = SFRTask(model, SFRConfig(smoothing=0.1), loss=form, verbose=False)
    result = task(images, target)
    expected = BinaryCrossEntropy(0.1, smooth_dense=True, sum_classes=total)(result["output"], target)
    assert torch.allclose(result["task_loss"], expected) and result["sfr_loss"] > 0
    assert result["sfr_weight"].item() == pytest.approx(1 if total else 1 / K)
    assert torch.allclose(result["loss"], result["task_loss"] + result["sfr_weight"] * result["sfr_loss"])
    with pytest.raises(UserError, match="expected dense targets"):
        task(images, target.argmax(1))


def test_one_class_that_an_image_has_or_not():
    model, images = timm.create_model("resnet20_cifar", num_classes=1), torch.randn(4, 3, 32, 32)
    target = torch.tensor([[0.0], [1.0], [1.0], [0.0]])
    task = SFRTask(model, SFRConfig(smoothing=0.1), loss=MULTI, verbose=False)
    result = task(images, target)
    assert torch.allclose(result["task_loss"], F.binary_cross_entropy_with_logits(result["output"], 0.9 * target + 0.05))
    based = SFRTask(model, base=MultiLabelClassificationTask(model, verbose=False), loss=MULTI, images=100, verbose=False)
    assert based(images, target)["sfr_loss"] > 0
    with pytest.raises(UserError, match="at least 2 classes that exclude each other; got num_classes=1"):
        SFRTask(model, verbose=False)


def test_timms_evaluator_is_that_of_the_labels():
    model, _, target = model_and_batch()
    logits = torch.randn(4, K)
    base = MultiLabelClassificationTask(model, verbose=False)
    for task in (SFRTask(model, loss=MULTI, verbose=False), SFRTask(model, base=base, loss=MULTI, verbose=False)):
        ours, theirs = task.create_evaluator(), MultiLabelClassificationTask(model, verbose=False).create_evaluator()
        for evaluator in (ours, theirs):
            evaluator.update(logits, target)
        assert type(ours) is type(theirs) and ours.compute() == theirs.compute()
    assert type(SFRTask(model, verbose=False).create_evaluator()) is ClassificationEvaluator


def test_on_top_of_timms_own_task():
    model, images, target = model_and_batch()
    base = MultiLabelClassificationTask(model, criterion_kwargs={"loss_type": "asl"}, verbose=False)
    task = SFRTask(model, base=base, loss=MULTI, verbose=False)
    result = task(images, target)
    assert torch.allclose(result["task_loss"], base.criterion(result["output"], target))
    assert torch.allclose(result["loss"], result["task_loss"] + result["sfr_weight"] * result["sfr_loss"])
    assert result["sfr_weight"].item() == pytest.approx(1 / K) and result["sfr_loss"] > 0
    result["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.5, 0.2])
def test_scores_are_those_of_scikit_learn(threshold):
    logits, target = targets(90)
    target[:, 2] = 0  # a class without images
    scores = LabelScores(torch.device("cpu"), threshold)
    for part in range(0, 90, 32):
        scores.add(logits[part : part + 32], target[part : part + 32])
    found, y, predicted = scores.result(), target.numpy().astype(int), (logits.sigmoid() >= threshold).numpy()
    present = [average_precision_score(y[:, k], logits[:, k]) for k in range(K) if k != 2]
    assert found["map"] == pytest.approx(100 * sum(present) / K)
    for name in ("micro", "macro"):
        assert found[f"{name}_f1"] == pytest.approx(100 * f1_score(y, predicted, average=name, zero_division=0))
    assert found["sample_f1"] == pytest.approx(100 * f1_score(y, predicted, average="samples", zero_division=0))
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target).item()
    assert found["loss"] == pytest.approx(loss) and (found["images"], found["nonfinite"]) == (90, 0)
    by_class = scores.by_class()
    assert by_class[:, 0].tolist() == y.sum(0).tolist()
    assert by_class[:, [1, 4]].mean(0) == pytest.approx([found["map"], found["macro_f1"]])


def test_an_image_with_outputs_that_are_not_finite_counts_as_wrong():
    logits, target = torch.full((2, K), 9.0), torch.ones(2, K)
    logits[1, 3] = math.nan
    scores = LabelScores(torch.device("cpu"), 0.5)
    scores.add(logits, target)
    found = scores.result()
    assert found["nonfinite"] == 1 and math.isnan(found["loss"]) and found["sample_f1"] == 50


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words,said",
    [
        (("--jsd-loss", "--aug-splits", "3"), "jsd_loss: it does not go with --task multilabel"),
        (("--class-weights", "auto"), "class_weights: it does not go with --task multilabel"),
        (("--sampler", "balanced"), "sampler: balanced needs images of one class each"),
        (("--kd-model-name", "resnet18"), "kd_model_name: it does not go with --task multilabel"),
        (("--sfr-smoothing-source", "classes"), "sfr_smoothing_source: it does not go with"),
        (("--smoothing", "0.1", "--sfr-smoothing-schedule", "confidence"), "sfr_smoothing_schedule: it does not go with"),
        (("--eval-metric", "top1"), "eval_metric: expected one of map, micro_f1, macro_f1, sample_f1, loss"),
        (("--multilabel-threshold", "1"), "multilabel_threshold: expected a value between 0 and 1"),
        (("--loss", "asl"), "--loss: expected one of ce, bce, jsd; got 'asl'"),
        (("--loss", "ce"), "--loss: several labels have binary cross-entropy"),
        (("--target-format", "multihot"), "--target-format: several labels stand in one cell"),
    ],
)
def test_what_does_not_go_with_it_is_told(words, said):
    with pytest.raises(UserError) as error:
        parse(["--dataset", "csv/x", "--task", "multilabel", *words])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_its_options_without_it_are_told():
    for words, said in ((("--eval-metric", "map"), "expected one of top1, top5, loss"),
                        (("--multilabel-threshold", "0.3"), "it is for --task multilabel")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            parse(words)
    assert parse([])[0].engine.eval_metric == "top1" and parse(["--loss", "bce"])[0].loss.bce_loss
    config = parse(["--task", "multilabel", "--dataset", "csv/x", "--bce-sum", "--loss", "bce"])[0]
    assert (config.engine.eval_metric, config.threshold, config.loss.form(0, None, True).bce_sum) == ("map", 0.5, True)
    with pytest.raises(UserError, match="--loss: bce is another loss than --jsd-loss"):
        parse(["--loss", "bce", "--jsd-loss"])


def test_images_of_one_class_are_refused(folder, tmp_path):
    for words in (("--data-dir", folder), ("--dataset", "digits")):
        done = train(*WORDS, *words, "--output", tmp_path, ok=False)
        assert "task: multilabel reads several classes of an image from --dataset csv/FILE or hfds/NAME" in done.stderr


# --- runs and commands ------------------------------------------------------------------------------------------------


def test_a_run_learns_and_writes_its_scores_card_and_report(labelled):
    run, said = labelled
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["best"]["val_map"] > 80 and metrics["test"]["map"] > 70 and metrics["eval_metric"] == "map"
    names = {"map", "micro_f1", "macro_f1", "sample_f1", "loss"}
    assert set(metrics["last"]) == {"epoch", "images", *(f"val_{name}" for name in names)}
    assert set(metrics["test"]) == {"epoch", "images", "split", *names}
    assert f"best val_map {metrics['best']['val_map']:.2f}" in said and f"test map {metrics['test']['map']:.2f}" in said
    assert "multi-label BCE" in said and "2 an image, 0 without a class" in said
    assert all(map(adds_up, summary(run)))
    rows = read_class_scores(run / "classes.csv")
    assert [row["class"] for row in rows] == [*map(str, range(10)), "even", "odd"]
    assert np.mean([row["ap"] for row in rows]) == pytest.approx(metrics["best"]["val_map"], abs=1e-4)
    assert not (run / "predictions.csv").exists()
    card, page = (run / "model" / "README.md").read_text(), (run / "report.html").read_text()
    assert f"{metrics['test']['map']:.2f} |" in card and ".sigmoid()[0]" in card
    assert "top-1" not in card and "ECE" not in card
    assert "An image may have any number of them." in card and "type: mean_average_precision" in card
    assert "Classes, lowest average precision first" in page and "mAP, test" in page and "ECE" not in page
    assert "top-1" not in page and 'class="note"' not in page and 'id="sfr"' in page


def test_commands_on_it(labelled, labels, digits_run, tmp_path, command):
    run, _ = labelled
    best = json.loads((run / "metrics.json").read_text())["best"]
    own = json.loads(command("validate", run, "--json", "--device", "cpu"))
    assert {name: own[name] for name in ("map", "micro_f1", "loss")} == pytest.approx(
        {name: best[f"val_{name}"] for name in ("map", "micro_f1", "loss")}, rel=1e-5)  # fmt: skip
    # The model's folder alone says that an image may have several classes.
    out = command("validate", run / "model", "--dataset", f"csv/{labels}", "--tta", 2, "--device", "cpu")
    assert f"{own['map']:.3f} %" in out and "mAP" in out and "views" in out
    images = sorted(labels.parent.glob("images/*.png"))[:30]
    found = [json.loads(line)["classes"] for line in command("predict", run / "model", *images, "--json").splitlines()]
    assert sum({"even", "odd"} & {one["class"] for one in classes} != set() for classes in found) > 20
    assert all(one["probability"] >= 0.5 for classes in found if len(classes) != 2 for one in classes)
    csv_file = tmp_path / "p.csv"
    command("predict", run, *images, "--csv", csv_file, "--multilabel-threshold", 0.999999, "--topk", 2)
    with csv_file.open() as file:
        rows = list(csv.DictReader(file))
    assert all(len(row["class"].split("|")) == len(row["probability"].split("|")) == 2 for row in rows)
    data = json.loads(command("data", f"csv/{labels}", "--task", "multilabel", "--json"))
    assert data["classes"]["even"] == {"train": 100, "val": 40} and data["train"]["images"] == 200
    # Compared with a run without SFR, and with one whose images have one class.
    other, _ = finished_run(tmp_path, *WORDS, "--dataset", f"csv/{labels}", "--no-sfr", "--epochs", 1, "--mixup", 0.5)
    out = command("compare", run, other)
    assert "mAP" in out and "best mAP" in out and "top-1" not in out and "ECE" not in out
    assert "some of the runs have --task multilabel and some not" in command("compare", run, digits_run[0], status=2)


def test_a_run_stopped_in_mid_epoch_goes_on_to_the_same_bits(labels, tmp_path):
    words = (*WORDS, "--dataset", f"csv/{labels}", "--epochs", 2, "--cutmix", 1, "--mixup", 0.2, "--aug-repeats", 2,
             "--model-ema", "-b", 60)  # fmt: skip
    whole, _ = finished_run(tmp_path, *words, "--checkpoint-interval", 1, "--checkpoint-hist", 99)
    state = cut(whole, tmp_path / "cut", -3)
    assert state["step"] > 0 and state["epoch"] == 1
    train("--resume", tmp_path / "cut")
    assert not differences(whole, tmp_path / "cut")


def test_bad_images_are_replaced_by_the_next(labels, tmp_path):
    bad = shutil.copytree(labels.parent, tmp_path / "data")
    first = sorted(bad.glob("images/*.png"))[0]
    first.write_text("junk")
    words = (*WORDS, "--dataset", f"csv/{bad / 'digits.csv'}", "--epochs", 1, "--output", tmp_path, "--on-bad-image")
    assert first.name in train(*words, "stop", ok=False).stderr
    assert "warning: images that do not decode and were replaced by others: 1, listed in" in train(*words, "skip").stdout


@pytest.mark.slow
def test_one_process_and_two_agree(labels, tmp_path):
    one, two = agreeing_updates(tmp_path, 30, 6, dataset=f"csv/{labels}", task="multilabel", num_classes=12, epochs=1,
                                sfr_smoothing_source="uniform")  # fmt: skip
    assert len(one["losses"]) == len(two["losses"]) == 6
    # 80 images do not divide by 2 x 15: each is counted once all the same.
    assert two["val"]["images"] == one["val"]["images"] == 80
    assert two["val"]["map"] == pytest.approx(one["val"]["map"], abs=1) and two["test"]["map"] > 0


def test_a_space_is_refused(tmp_path):
    config = {PROBLEM: SEVERAL_LABELS, "architecture": "resnet18", "pretrained_cfg": {"input_size": (3, 8, 8)}}
    with pytest.raises(UserError, match="space: the demo is for one class an image"):
        space_files(config, "me/model", None, "title", tmp_path)
