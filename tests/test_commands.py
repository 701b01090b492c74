"""``timm-sfr VERB``: every verb as a user calls it, and what it says to a mistake."""

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import onnx
import onnxruntime
import pytest
import scipy.stats
import timm
import torch
import yaml
from conftest import COMMAND, ROOT, change, run, train
from PIL import Image

import timm_sfr
from timm_sfr.cli import export, validate
from timm_sfr.cli.main import VERBS, main
from timm_sfr.cli.parser import CLOSED_PIPE
from timm_sfr.hub.push import model_files
from timm_sfr.models.files import class_list
from timm_sfr.runs.records import columns, recorded, run_folder, write_summary
from timm_sfr.training.run import fit

NAME = "resnet20_cifar.sfr_digits"


def test_help_names_every_verb(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    out = capsys.readouterr().out
    assert done.value.code == 0 and all(f"\n    {name} " in out for name in VERBS)
    for name in VERBS:
        with pytest.raises(SystemExit) as done:
            main([name, "--help"])
        assert done.value.code == 0 and f"usage: timm-sfr {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words,hint",
    [
        (("trian",), "did you mean 'train'"),
        (("validate", NAME, "--data-dri", "x"), "did you mean '--data-dir'"),
        (("export", NAME, "--format", "onx"), "did you mean 'onnx'"),
        (("taps", "resnet81"), "did you mean 'resnet18'"),
        (("taps", "user/none"), "no such folder; a model on the Hub is hf-hub:user/none"),
        (("taps", "resnet18", "--sfr-channels", "group"), "did you mean 'groups'"),
        (("taps", "resnet18", "--picture", "/does/not/exist.png"), "picture: cannot write"),
        (("validate", "testss"), "model: there is no folder 'testss'; did you mean 'tests'?"),
        (("validate", NAME), "expected --data-dir DIR, or --dataset NAME"),
        (("validate", "resnet20_cifra", "--dataset", "digits"), "did you mean 'resnet20_cifar'"),
        (("compare", "tests"), "two or more"),
        (("compare", "tests", "docs"), "'tests' has no args.yaml"),
        (("export", NAME, "--output", "/does/not/exist.onnx"), "output: cannot write"),
        (("train", "--modle", "x"), "did you mean '--model'"),
    ],
)
def test_mistakes(words, hint, command):
    assert hint in command(*words, status=2)


def test_the_installed_command():
    done = run(Path(sys.executable).with_name("timm-sfr"), "--version")
    assert done.returncode == 0 and done.stdout == f"timm-sfr {timm_sfr.__version__}\n"


def test_completion(capsys):
    with pytest.raises(SystemExit):
        main(["--print-completion", "bash"])
    script = capsys.readouterr().out
    assert all(name in script for name in VERBS) and "--sfr-matching" in script


def test_train_is_train_sfr(command, tmp_path):
    words = ("--epochs", 1, "--img-size", 16, "--device", "cpu", "--output", tmp_path, "--experiment", "run")
    command("train", *words)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_validate_gives_the_trainings_own_figures(digits_run, command):
    folder = digits_run[0]
    found = json.loads(command("validate", folder, "--json", "--device", "cpu"))
    best = json.loads((folder / "metrics.json").read_text())["best"]
    assert {name: found[name] for name in ("images", "ece")} == {name: best[name] for name in ("images", "ece")}
    assert {name: found[name] for name in ("top1", "top5", "loss")} == {
        name: best[f"val_{name}"] for name in ("top1", "top5", "loss")
    }
    for words in ((), ("--dataset", "digits")):
        text = command("validate", folder / "model", *words, "--device", "cpu")
        assert f"{found['top1']:.3f} %" in text and "360 at 16 pixels" in text


def test_validate_keeps_a_models_own_size(command, tmp_path):
    model_files(timm.create_model("resnet20_cifar", num_classes=10), "user/name", tmp_path)
    found = json.loads(command("validate", f"local-dir:{tmp_path / 'model'}", "--dataset", "digits", "--device", "cpu", "--json"))
    assert found["img_size"] == 32 and found["images"] == 360


def test_a_models_classes_without_images(capsys):
    model = SimpleNamespace(num_classes=4, pretrained_cfg={"label_names": ["a", "b", "class 2", "class 3"]})
    known = validate._with_images(model.pretrained_cfg["label_names"])
    assert known == ["a", "b"] and validate._with_images(["class 0"]) == ["class 0"] and validate._with_images(None) is None
    validate._check_classes(model, ("a", "b"), known)
    with pytest.raises(timm_sfr.UserError, match="expected 4 classes, as the model has; got 2"):
        validate._check_classes(model, ("a", "c"), known)


def test_validate_takes_a_runs_own_images(tmp_path):
    """The list of a run holds for its table or folder in any place that has all of its images."""
    run, data = tmp_path / "run", tmp_path / "data"
    for folder in (run / "model", data / "i"):
        folder.mkdir(parents=True)
    table = data / "t.csv"
    (run / "args.yaml").write_text(yaml.safe_dump({"dataset": f"csv/{table}"}))
    (run / "split.csv").write_text("split,class,file\nval,a,i/0.png\n")
    own = {"dataset": f"csv/{table}"}
    assert validate._list(str(run), own, {}) == run / "split.csv"
    for path in (table, data / "i" / "0.png"):
        path.touch()
    for chosen in ({"dataset": f"csv/{table}"}, {"dataset": "csv/t.csv", "data_dir": str(data)}, {"data_dir": str(data)}):
        assert validate._list(f"local-dir:{run / 'model'}", own, chosen) == run / "split.csv", chosen
    assert validate._list(str(run), own, {"val_split": "other"}) is None
    assert validate._list("user/name", {}, {"dataset": f"csv/{table}"}) is None
    with pytest.raises(timm_sfr.UserError, match=r"seed: .*split.csv' lists the images that the run was validated on"):
        validate._list(str(run), own, {"seed": 7})
    (data / "i" / "0.png").unlink()
    assert validate._list(str(run), own, {"dataset": f"csv/{table}"}) is None


def test_a_runs_options_are_found_by_all_names_of_its_model(tmp_path, monkeypatch):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "args.yaml").write_text("exif: false\nlr: 1.0\n")
    monkeypatch.chdir(tmp_path / "run")
    folder = tmp_path / "run"
    names = (folder, folder / "model", f"local-dir:{folder}", f"local-dir:{folder / 'model'}", ".", "model")
    assert [recorded(name, ("exif",)) for name in names] == [{"exif": False}] * len(names)
    assert recorded("user/name", ("exif",)) == {} and run_folder(tmp_path) is None


def test_names_of_classes_by_number():
    """timm takes them as a list or as a dictionary, whose keys JSON makes texts."""
    assert class_list({"1": "b", "0": "a"}, 2) == class_list({0: "a", 1: "b"}, 2) == class_list(["a", "b"], 2) == ["a", "b"]
    assert class_list({"0": "a", "2": "b"}, 2) is class_list(["a"], 2) is class_list(None, 2) is None


def test_validate_other_classes(command, tmp_path):
    for name in [*"123456789", "ten"]:
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "val" / name / "0.png")
    words = ("validate", NAME, "--data-dir", tmp_path, "--device", "cpu", "-j", 0)
    assert "class 0 is '1' in the data and '0' in the model" in command(*words, status=2)
    (tmp_path / "val" / "ten").rename(tmp_path / "val" / "eleven")
    (tmp_path / "val" / "ten").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "val" / "ten" / "0.png")
    assert "expected 10 classes, as the model has; got 11" in command(*words, status=2)
    for name in ("ten", "eleven"):
        shutil.rmtree(tmp_path / "val" / name)
    assert json.loads(command(*words, "--json"))["images"] == 9, "a class may have no images in val"


def test_list(command):
    assert NAME in command("list") and NAME not in command("list", "wrn*")


def test_taps(command, tmp_path):
    picture = tmp_path / "taps.png"
    text = command("taps", "test_resnet", "--img-size", 64, "-b", 4, "--picture", picture)
    plan = timm_sfr.choose_taps(timm.create_model("test_resnet"), (3, 64, 64))
    lines = text.splitlines()
    for line, tap in zip(lines[1:], plan.taps, strict=False):
        assert tap.module in line and f"{tap.grid[0]}x{tap.grid[1]}" in line
    assert lines[len(plan.taps) + 1].startswith("at 3x64x64: ") and "for a batch of 4" in lines[-1]
    assert matplotlib.image.imread(picture).std() > 0.01, "something is drawn"
    found = json.loads(command("taps", "resnet20_cifar", "--json", "-b", 2, "--sfr-channels", "projection"))
    shallow, deep = found["taps"][0], found["taps"][-1]
    assert deep["role"] == "deep" and shallow["match"] == f"{shallow['channels']} projected to {deep['channels']}"
    assert all(tap["milliseconds"] > 0 for tap in found["taps"][:-1])


def test_taps_of_a_run_are_those_of_its_training(finished, command):
    args = finished / "args.yaml"
    args.write_text(yaml.safe_dump({**yaml.safe_load(args.read_text()), "sfr_matching": "gaussian", "sfr_taps": ["0", "2"]}))
    assert [tap["index"] for tap in json.loads(command("taps", finished, "-b", 2, "--json"))["taps"]] == [0, 2]
    assert "matched by gaussian" in command("taps", finished, "-b", 2)
    assert "matched by grid" in command("taps", finished, "-b", 2, "--sfr-matching", "grid")
    args.write_text(yaml.safe_dump({**yaml.safe_load(args.read_text()), "batch_size": 3, "sfr": False}))
    assert "for a batch of 3" in (text := command("taps", finished)) and "this run has no feature loss" in text


def test_a_run_with_a_task_of_its_own_is_not_continued_with_another(finished):
    facts = finished / "metrics.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"custom_task": True}))
    with pytest.raises(timm_sfr.UserError, match=r"resume: .* task of its own; continue it in Python"):
        fit(timm_sfr.RunConfig.from_flat(yaml.safe_load((finished / "args.yaml").read_text())), finished)


def fake_run(place, top1, **options):
    """The files of a finished run that `compare` reads."""
    place.mkdir()
    (place / "args.yaml").write_text(yaml.safe_dump({"model": "m", "lr": 0.1, "output": str(place), **options}))
    write_summary(place / "summary.csv", [dict.fromkeys(columns(False), 0)])
    scores = {"val_top1": top1, "val_top5": 90.0, "val_loss": 1.0, "ece": 0.1, "epoch": 0, "images": 100}
    texts = dict.fromkeys(("model", "dataset", "hardware", "mixed_precision", "eval_metric"), "m")
    numbers = {"seconds": 60, "epochs": 1, "parameters": 1, "seed": options.get("seed", 0)}
    metrics = {"last": scores, "best": scores, "versions": {}, **texts, **numbers}
    (place / "metrics.json").write_text(json.dumps(metrics))
    return place


def test_compare_pairs_by_seed(command, tmp_path):
    tops = {"a": [50.0, 51.0, 52.5], "b": [51.0, 52.5, 53.0]}
    runs = [
        fake_run(tmp_path / f"{name}{seed}", top1, seed=seed, mixup=float(name == "b"))
        for name, values in tops.items()
        for seed, top1 in enumerate(values)
    ]
    text = command("compare", *runs).splitlines()
    assert text[1].startswith("A  0,1,2") and text[2].startswith("B  0,1,2") and "60" not in text[1]
    gains = np.subtract(tops["b"], tops["a"])
    low, high = scipy.stats.t.interval(0.95, 2, gains.mean(), scipy.stats.sem(gains))
    assert f"{gains.mean():+.2f} ± {(high - low) / 2:.2f}" in text[2]
    assert text[-1].split() == ["mixup", "0.0", "1.0"], "what differs, and nothing else"
    groups = [json.loads(line) for line in command("compare", *runs, "--json").splitlines()]
    assert groups[1]["top1_minus_first"] == pytest.approx(list(gains)) and groups[1]["seeds"] == [0, 1, 2]
    assert "have the same options and seed 0" in command("compare", runs[0], runs[0], status=2)
    (runs[0] / "metrics.json").write_text("{}")
    damaged = command("compare", *runs, status=2)
    assert "is damaged: KeyError('best'); restore it from a copy" in damaged


def test_compare_knows_unfinished_runs_and_those_of_older_versions(command, tmp_path):
    runs = [
        fake_run(tmp_path / str(seed), 50.0 + seed, seed=seed, **({"on_bad_image": "stop"} if seed else {})) for seed in (0, 1)
    ]
    found = json.loads(command("compare", *runs, "--json"))
    assert found["seeds"] == [0, 1] and found["unfinished_seeds"] == [], "a new option's default is no difference"
    change(runs[1] / "metrics.json", epochs=9)
    assert "note: 1 is unfinished: 1 of 9 epochs" in command("compare", *runs)
    change(runs[1] / "metrics.json", last=json.loads((runs[1] / "metrics.json").read_text())["last"] | {"val_loss": float("nan")})
    again = json.loads(command("compare", *runs, "--json"), parse_constant=pytest.fail)
    assert again["unfinished_seeds"] == [1] and again["val_loss"] == [1.0, None]


def test_compare_says_that_runs_were_validated_on_other_images(command, tmp_path):
    runs = [fake_run(tmp_path / name, 50.0, seed=0, val_split=name) for name in ("val", "test")]
    note = "note: the runs may have been validated on different images (val_split); differences then mean little"
    assert note in command("compare", *runs).splitlines()


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("kind", export.FORMATS)
def test_export(kind, command, tmp_path):
    path = tmp_path / f"model{export.FORMATS[kind]}"
    assert "largest difference from PyTorch" in command("export", NAME, "--format", kind, "--output", path)
    images = torch.randn(5, 3, 16, 16)
    expected = timm_sfr.create_model(NAME)(images).detach()
    if kind == "onnx":
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        text = {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}[export.METADATA]
    elif kind == "torchscript":
        files = {export.METADATA: ""}
        found = torch.jit.load(str(path), _extra_files=files)(images)
        text = files[export.METADATA]
    else:
        files = {export.METADATA: ""}
        found = torch.export.load(str(path), extra_files=files).module()(images)
        text = files[export.METADATA]
    assert torch.allclose(found.detach(), expected, atol=1e-4)
    about = json.loads(text)
    assert about["label_names"] == list("0123456789") and about["input_size"] == [3, 16, 16]
    assert about["mean"] == pytest.approx(timm_sfr.create_model(NAME).pretrained_cfg["mean"])


def test_export_refuses_what_differs(tmp_path, monkeypatch):
    model = timm_sfr.create_model(NAME)
    write, load = export.WRITERS["torchscript"]
    monkeypatch.setitem(export.WRITERS, "torchscript", (write, lambda path: lambda images: load(path)(images) + 0.1))
    path = tmp_path / "model.pt"
    path.write_text("before")
    with pytest.raises(timm_sfr.UserError, match=r"differs from PyTorch by 0\.1"):
        export.export(model, path, "torchscript", export.metadata(model, NAME))
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    monkeypatch.setitem(export.NEEDS, "onnx", ("no_such_package",))
    with pytest.raises(timm_sfr.UserError, match=r"pip install \"timm-sfr\[export\]\""):
        export.export(model, path, "onnx", export.metadata(model, NAME))


def test_the_readme_names_every_verb():
    text = (ROOT / "README.md").read_text()
    assert all(f"timm-sfr {name}" in text for name in VERBS)


def test_mistyped_paths_are_met_with_those_that_are_there(finished, folder, command):
    wrong, images = f"{finished}x", f"{folder}r"
    for words, name in (
        (("report", wrong), finished.name),
        (("validate", wrong), finished.name),
        (("compare", wrong, finished), finished.name),
        (("train", "--resume", wrong), finished.name),
        (("train", "--data-dir", images), folder.name),
        (("predict", NAME, images), folder.name),
    ):
        expected = f"did you mean '{finished.parent if name == finished.name else folder.parent}/{name}'"
        assert expected in command(*words, status=2)


@pytest.mark.parametrize("name,word,said", [("main", "--lerning-rate", "timm_sfr's is --lr"), ("main", "--help", "--sfr-weight"),
                                            ("timm_sfr", "--version", "timm-sfr 0"), ("timm_sfr", "trian", "'train'"),
                                            ("timm_sfr", None, "compare")])  # fmt: skip
def test_help_and_mistakes_need_neither_torch_nor_timm(name, word, said):
    code = f"""
import sys, train_sfr
try:
    train_sfr.{name}({[] if word is None else [word]})
except SystemExit:
    pass
assert not {{"torch", "timm", "accelerate"}} & set(sys.modules), sorted(sys.modules)
if {word!r} == "trian":
    import timm_sfr
    assert timm_sfr.create_model
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and said in done.stdout + done.stderr, done.stdout + done.stderr


def test_a_reader_that_stops_reading_is_no_error():
    code = "import sys, train_sfr; sys.exit(train_sfr.timm_sfr(['train', '--help']))"
    done = run("bash", "-c", f"{sys.executable} -c {shlex.quote(code)} | true; exit ${{PIPESTATUS[0]}}")
    assert done.returncode in (0, CLOSED_PIPE) and done.stderr == ""


@pytest.mark.parametrize("model,more", [
    ("resnet18", "\n"),
    ("resnet56_cifar.sfr_cifar100", "; its weights do not come with the package; to train it: timm-sfr train --config "),
])  # fmt: skip
def test_without_a_network_a_model_is_refused_in_seconds(model, more, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "0.png")
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    started = time.monotonic()
    done = run(*COMMAND, "predict", model, tmp_path / "0.png", **env)
    assert done.returncode == 2 and f"cannot reach http://127.0.0.1:9{more}" in done.stderr and time.monotonic() - started < 20
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""


def test_weights_of_another_classifier_are_taken_without_it(tmp_path):
    state = timm.create_model("test_resnet", num_classes=7).state_dict()
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "seven.pth")
    words = ("--model", "test_resnet", "--img-size", 32, "--epochs", 1, "-j", 0, "--device", "cpu", "--output", tmp_path)
    done = train(*words, "--initial-checkpoint", tmp_path / "seven.pth")
    assert "is for 7 classes and is left out; the model starts with a new one for 10" in done.stdout
    torch.save({key: value for key, value in state.items() if "layer3" not in key}, tmp_path / "part.pth")
    done = train(*words, "--initial-checkpoint", tmp_path / "part.pth", ok=False)
    assert "does not fit test_resnet: " in done.stderr and "more like it); give --model" in done.stderr
    assert len(done.stderr.splitlines()) == 1
