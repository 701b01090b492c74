"""The report of a run: its figures say what the run's files say, the page stands alone, and nothing stops a training."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, TRAIN, change, run, summary, train

import timm_sfr
from timm_sfr.cli.main import main
from timm_sfr.method.config import SFRConfig
from timm_sfr.method.feature_loss import FeatureLoss
from timm_sfr.method.taps import choose_taps
from timm_sfr.reporting import figures
from timm_sfr.reporting.curves import own_panels
from timm_sfr.reporting.gallery import Gallery
from timm_sfr.reporting.page import write_report
from timm_sfr.reporting.tap_matches import tap_matches
from timm_sfr.runs.predictions import PredictionTable, read_predictions, write_predictions
from timm_sfr.runs.records import read_finished
from timm_sfr.utils.errors import UserError

VOID = {"meta", "link", "img", "br", "image", "input"}


class Page(HTMLParser):
    """A page's tags in order, balanced; its ids, references and loads."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.loads, self.text = [], [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"][1:]] if found.get("href", "").startswith("#") else []
        self.loads += [found[name] for name in ("src", "href", "xlink:href") if not found.get(name, "#").startswith("#")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def reported(digits_run, tmp_path_factory):
    """A run's folder with its report, and the page."""
    place = shutil.copytree(digits_run[0], tmp_path_factory.mktemp("report") / "run")
    return place, write_report(place).read_text()


def test_predictions_say_what_the_metrics_say(reported):
    place, _ = reported
    predictions = read_predictions(place / "predictions.csv")
    best = json.loads((place / "metrics.json").read_text())["best"]
    assert len(predictions.files) == best["images"]
    assert 100 * predictions.hits.mean() == pytest.approx(best["val_top1"], abs=1e-9)
    counts, share = predictions.confusion(10)
    assert share == 1 and counts.sum() == best["images"] and counts.trace() == predictions.hits.sum()
    count, confidence, accuracy = predictions.calibration(15)
    gap = np.nansum(count * np.abs(accuracy - confidence)) / count.sum()
    assert gap == pytest.approx(best["ece"], abs=1e-6)
    wrong = predictions.mistakes(5)
    assert all(predictions.target[i] != predictions.prediction[i] for i in wrong)
    sure = predictions.confidence[wrong]
    assert (np.diff(sure) <= 0).all() and sure[0] == predictions.confidence[~predictions.hits].max()


def test_predictions_are_of_the_exported_model(reported):
    place, _ = reported
    predictions = read_predictions(place / "predictions.csv")
    model = timm.create_model(f"local-dir:{place / 'model'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    digits = timm_sfr.data.datasets.Digits(train=False, mode="RGB")
    with torch.inference_mode():
        best = model(torch.stack([transform(digits[i][0]) for i in range(40)])).softmax(1).max(1)
    assert best.indices.tolist() == predictions.prediction[:40].tolist()
    np.testing.assert_allclose(best.values.numpy(), predictions.confidence[:40], atol=1e-5)
    assert predictions.target[:40].tolist() == [digits[i][1] for i in range(40)]


def test_the_page_stands_alone_and_is_whole(reported):
    place, text = reported
    page = Page(text)
    assert all(load.startswith("data:image/") for load in page.loads), page.loads
    assert "default-src 'none'" in text and not re.search(r"https?://(?!www\.w3\.org)", text.split("</style>")[1])
    repeated = {name for name in page.ids if page.ids.count(name) > 1}
    assert not repeated and set(page.links) <= set(page.ids)
    for section in ("curves", "sfr", "confusion", "classes", "mistakes", "recipe"):
        assert section in page.ids
    words = " ".join("".join(page.text).split())
    best = json.loads((place / "metrics.json").read_text())["best"]
    assert f"{best['val_top1']:.2f} %" in words and f"{best['ece']:.4f}" in words
    assert "currentColor" in text and "#010203" not in text  # the figures' ink is the page's
    for name in ("curves", "confusion", "reliability"):
        assert (place / "pictures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_curves_are_the_summary(reported):
    place, _ = reported
    rows = summary(place)
    panels = {panel.name: {curve.label: curve for curve in panel.curves} for panel in own_panels(read_finished(place))}
    assert panels["loss"]["training"].values == [float(row["train_loss"]) for row in rows]
    weighted = [float(row["sfr_weight"]) * float(row["sfr_loss"]) for row in rows]
    assert panels["features"]["weighted by λ"].values == pytest.approx(weighted)
    assert panels["score"]["top-1"].epochs == [1, 2, 3, 4]


def test_tap_matches_leave_no_hooks_on_the_model():
    layers = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 16, 5)
    model = torch.nn.Sequential(*layers)
    tap_matches(model, choose_taps(model, (3, 8, 8), ("0", "1")), SFRConfig(), torch.randn(2, 3, 8, 8))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("channels", ["groups", "transport"])
@pytest.mark.parametrize("matching", ["divergence", "emd", "grid", "gaussian"])
def test_tap_matches_are_what_the_loss_computes(matching, channels):
    """The mean distance is the feature loss of the same batch, plans have uniform marginals, every channel is taught."""
    config = SFRConfig(matching=matching, channels=channels, max_nodes=16)
    model = timm.create_model("resnet20_cifar", num_classes=10).eval()
    plan, images = choose_taps(model), torch.randn(4, 3, 32, 32)
    found = tap_matches(model, plan, config, images)
    task = timm_sfr.SFRTask(model, config, verbose=False)
    with torch.no_grad():
        _, nodes = task.trainable_module.eval()(images)
        loss = FeatureLoss(config)(nodes[:-1], nodes[-1])
    torch.testing.assert_close(torch.stack([one.distance.mean() for one in found]).mean(), loss, rtol=1e-4, atol=1e-5)
    for one, tap in zip(found, plan.shallow, strict=True):
        nodes = one.grid[0] * one.grid[1]
        assert one.channels.shape == (tap.channels, plan.deep.channels)
        torch.testing.assert_close(one.channels.sum(1), torch.ones(tap.channels), rtol=1e-4, atol=1e-4)
        if matching == "gaussian":  # moments pair no locations
            assert one.plan is None and one.stays is None
            continue
        assert one.plan.shape == (4, nodes, one.deep_grid[0] * one.deep_grid[1])
        torch.testing.assert_close(one.plan.sum(2), torch.full((4, nodes), 1 / nodes))
    if matching != "gaussian":
        assert found[0].stays == pytest.approx(100) if matching == "grid" else found[0].stays < 100


def test_projection_is_pictured_by_its_maps():
    config = SFRConfig(channels="projection", max_nodes=16)
    model = timm.create_model("resnet20_cifar", num_classes=10)
    task = timm_sfr.SFRTask(model, config, verbose=False)
    maps = task.trainable_module.projection
    found = tap_matches(model.eval(), task.plan, config, torch.randn(2, 3, 32, 32), maps)
    expected = maps.maps[0].weight.detach().abs().T
    torch.testing.assert_close(found[0].channels, expected / expected.sum(1, keepdim=True))


def test_a_page_takes_any_names(tmp_path, finished):
    """Names of classes and files are text, whatever they hold: markup, mathematics, scripts that no font here has."""
    names = ["<script>alert(1)</script>", "a & #010203", "$x^2", "_url(#q", "猫", '"', "7", "8", "9", "é" * 60]
    change(finished / "model" / "config.json", label_names=names)
    predictions = read_predictions(finished / "predictions.csv")
    rows = np.stack([predictions.target, predictions.prediction, predictions.confidence], 1)
    text = write_report(finished).read_text()
    assert "<script>alert" not in text and text.count("<script>") == 1
    words = "".join(Page(text).text)
    assert all(name in words for name in names)
    write_predictions(finished / "predictions.csv", rows, lambda index: f"</script>,\n'{index}")
    text = write_report(finished).read_text()
    assert "the data do not match" in "".join(Page(text).text)
    assert read_predictions(finished / "predictions.csv").files[3] == "</script>,\n'3"


def test_a_report_without_its_data_or_predictions_says_so(finished, command):
    change(finished / "args.yaml", dataset=None, data_dir="/gone")
    (finished / "predictions.csv").unlink()
    command("report", finished)
    page = Page((finished / "report.html").read_text())
    words = "".join(page.text)
    assert "The images cannot be shown" in words and "There is no predictions.csv" in words
    assert "curves" in page.ids and "sfr" not in page.ids


def test_damaged_predictions_are_left_out_and_the_page_says_so(finished, command):
    whole = (finished / "predictions.csv").read_text().splitlines()
    other = [whole[0], *(line.replace(",0,0,", ",0,1,") for line in whole[1:])]
    wrong = [*whole[:-1], "9,a,3,99999999999999999999,0.5"]
    for lines in (["index,file", "1,a"], whole[:1], whole[:100], other, wrong):
        (finished / "predictions.csv").write_text("\n".join(lines))
        command("report", finished)
        page = Page((finished / "report.html").read_text())
        assert "Scores by class are left out" in "".join(page.text) and "confusion" not in page.ids
        assert [path.name for path in (finished / "pictures").iterdir()] == ["curves.png"]  # for the card


@pytest.mark.parametrize(
    "name, text",
    [
        ("metrics.json", "{}"),
        ("metrics.json", '{"best": {}, "last": {"val_top1": 1}}'),
        ("metrics.json", "[1]"),
        ("summary.csv", "epoch,lr\n0,a\n"),
        ("args.yaml", "num_classes: abc"),
        ("model/config.json", "[]"),
        ("model/config.json", '{"label_names": 5}'),
    ],
)
def test_damaged_files_are_one_line(finished, capsys, name, text):
    (finished / name).write_text(text)
    status = main(["report", str(finished)])
    said = capsys.readouterr().err
    if name.startswith("model/"):  # the page goes without the model
        assert status == 0 and "The model cannot be loaded" in (finished / "report.html").read_text()
    else:
        assert status == 2 and said.startswith("error: ") and said.count("\n") == 1


def test_data_that_have_changed_are_not_shown(folder, tmp_path, command):
    data = shutil.copytree(folder, tmp_path / "data")
    train("--model", "resnet20_cifar", "--data-dir", data, "--epochs", 1, "-b", 20, "-j", 0, "--output", tmp_path,
          "--experiment", "run")  # fmt: skip
    next((data / "val" / "class0").iterdir()).rename(data / "val" / "class0" / "zzz.png")
    command("report", tmp_path / "run")
    page = Page((tmp_path / "run" / "report.html").read_text())
    assert "the data do not match predictions.csv" in "".join(page.text) and "mistakes" not in page.ids
    shutil.rmtree(data / "val" / "class2")
    command("report", tmp_path / "run")


def test_a_run_named_as_a_model_is_the_run(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.move(finished, tmp_path / "resnet20_cifar.sfr_digits")
    write_report(tmp_path / "resnet20_cifar.sfr_digits")
    page = (tmp_path / "resnet20_cifar.sfr_digits" / "report.html").read_text()
    write_report(Path("resnet20_cifar.sfr_digits"))
    again = (tmp_path / "resnet20_cifar.sfr_digits" / "report.html").read_text()
    distances = [re.findall(r"feature loss ([\d.]+)", text) for text in (page, again)]
    assert distances[0] and distances[0] == distances[1]


def test_the_report_is_written_while_it_trains_and_changes_no_bit(folder, tmp_path):
    words = ("--model", "resnet20_cifar", "--data-dir", folder, "--epochs", 3, "-b", 20, "-j", 1, "--output", tmp_path,
             "--sfr-channels", "projection")  # fmt: skip
    for name, interval in (("with", 1), ("without", 0)):
        done = train(*words, "--experiment", name, "--report-interval", interval)
        assert ("the report is" in done.stdout) == (interval > 0)
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1] and not (tmp_path / "without" / "report.html").exists()
    text = (tmp_path / "with" / "report.html").read_text()
    assert "reloads itself" not in text and "class1" in text and "sfr" in Page(text).ids
    predictions = read_predictions(tmp_path / "with" / "predictions.csv")
    assert all(name.startswith(str(folder / "val" / "class")) for name in predictions.files)


def test_a_report_that_fails_stops_no_training(folder, tmp_path):
    words = ("--model", "resnet20_cifar", "--data-dir", folder, "--epochs", 1, "-b", 20, "-j", 0, "--output", tmp_path)
    (tmp_path / "run").mkdir()
    script = (
        "import sys, timm_sfr.reporting.page as p, train_sfr\n"
        "def broken(*a, **k): raise MemoryError('no room')\n"
        "p.write_report = broken; sys.exit(train_sfr.main(sys.argv[1:]))"
    )
    done = run(TRAIN[0], "-c", script, *words, "--experiment", "run")
    assert done.returncode == 0 and "warning: the report could not be written: no room" in done.stdout, done.stderr


def test_many_classes_and_an_empty_one():
    """More classes than pixels are counted together, so that none is lost; a class without images divides by nothing."""
    target = np.arange(1, 10_000)
    predictions = PredictionTable([""] * len(target), target, target, np.full(len(target), 0.9, np.float32))
    counts, share = predictions.confusion(10_000)
    assert counts.shape == (200, 200) and share == 50
    assert counts.diagonal().tolist() == [49] + [50] * 199 and counts.sum() == len(target)
    images, hits = predictions.by_class(10_000)
    assert images[0] == hits[0] == 0 and images.sum() == hits.sum() == len(target) and predictions.wrong() == []
    rng = np.random.default_rng(0)
    target, prediction = rng.integers(0, 30, 5000), rng.integers(0, 30, 5000)
    predictions = PredictionTable([""] * 5000, target, prediction, rng.random(5000, dtype=np.float32))
    dense, wrong = predictions.confusion(30)[0], predictions.wrong()
    assert {(i, j): n for i, j, n in wrong} == {(i, j): n for (i, j), n in np.ndenumerate(dense) if i != j and n}
    assert [n for _, _, n in wrong] == sorted((n for _, _, n in wrong), reverse=True)


def test_samples_are_spread_over_the_classes(digits_run):
    finished = read_finished(digits_run[0])
    config = timm_sfr.config.RunConfig.from_flat(finished.options)
    model = timm_sfr.create_model(str(digits_run[0]))
    gallery = Gallery(digits_run[0], config, timm_sfr.data.transforms.preprocessing(config.model, model), [])
    predictions = read_predictions(digits_run[0] / "predictions.csv")
    samples = gallery.spread(predictions.target, 16)
    assert [one.target for one in samples] == [*range(10), *range(6)]
    assert [one.target for one in gallery.spread(predictions.target, 4)] == [0, 2, 4, 6]
    assert all(one.target == predictions.target[one.index] for one in samples)


def test_compare_draws_the_curves_over_each_other(finished, tmp_path, command, capsys):
    other = shutil.copytree(finished, tmp_path / "other")
    change(other / "args.yaml", seed=7, smoothing=0.3)
    out = command("compare", finished, other, "--html", tmp_path / "c.html")
    page = Page((tmp_path / "c.html").read_text())
    words = "".join("".join(page.text).split())
    assert not page.loads and "2runssidebyside" in words
    for line in out.splitlines()[:-1]:  # the last one says where the page is
        assert "".join(line.split()) in words, line
    assert out.endswith(f"the page is {tmp_path / 'c.html'}\n") and "A: run" in out and "B: other" in out
    assert main(["compare", str(finished), str(other), "--html", str(tmp_path / "none" / "c.html")]) == 2
    assert "error: html: cannot write" in capsys.readouterr().err


def test_a_picture_has_numbers_where_its_font_lacks_the_names(finished, monkeypatch):
    """The page itself shows the names: a browser has fonts for them."""
    drawn, confusion = [], figures.confusion

    def watched(figure, counts, share, names):
        drawn.append(list(names))
        confusion(figure, counts, share, names)

    monkeypatch.setattr(figures, "confusion", watched)
    names = ["猫", "犬", *"23456789"]
    change(finished / "model" / "config.json", label_names=names)
    assert figures.drawable(list("0123456789")) and not figures.drawable(names)
    assert "猫" in write_report(finished).read_text()
    assert drawn == [names, list("0123456789")]
    assert {file.name for file in (finished / "pictures").iterdir()} == {"curves.png", "confusion.png", "reliability.png"}


def test_the_templates_are_packaged():
    text = (ROOT / "pyproject.toml").read_text()
    assert '"timm_sfr.reporting" = ["*.html"]' in text and '"timm_sfr.hub" = ["*.md", "space/*"]' in text
    with pytest.raises(UserError, match="has no args"):
        write_report(ROOT / "docs")
