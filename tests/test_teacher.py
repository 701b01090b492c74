"""A teacher beside SFR: its terms by hand, what it sees, what it must stay out of, and the script end to end."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from conftest import change, summary, train
from PIL import Image
from safetensors.torch import load_file
from test_load import repository
from test_processes import agreeing_updates
from timm.task import FeatureDistillationTask

import timm_sfr
from benchmarks.faults import differences
from timm_sfr import RunConfig, SFRConfig, SFRTask, UserError
from timm_sfr.cli.compare import read_finished
from timm_sfr.config import KDConfig
from timm_sfr.data.transforms import Preprocessing
from timm_sfr.hub.push import run_files
from timm_sfr.models.teacher import Teacher, load_teacher
from timm_sfr.runs.checkpoints import checkpoints, load_checkpoint
from timm_sfr.runs.records import columns
from timm_sfr.training.run import prepare
from timm_sfr.training.run_state import collect, restore
from train_sfr import main

NAME = "resnet20_cifar.sfr_digits"
QUICK = ("--kd-model-name", NAME, "--epochs", 1, "-b", 128)
DEIT = {"model": "deit_tiny_distilled_patch16_224", "img_size": 16, "model_kwargs": {"depth": 2, "patch_size": 4}}


def adds_up(row):
    value = {name: float(row[name]) for name in row if row[name]}
    task = value["cls_weight"] * value["cls_loss"] + value["kd_weight"] * value["kd_loss"]
    return value["task_loss"] == pytest.approx(task, abs=1e-5) and value["train_loss"] == pytest.approx(
        value["task_loss"] + value["sfr_weight"] * value["sfr_loss"], abs=1e-5
    )


def trainer(tmp_path, **options):
    options = {"kd_model_name": NAME, "epochs": 2, "device": "cpu", "output": str(tmp_path), **options}
    return prepare(RunConfig.from_flat({"dataset": "digits", **options}))


def one_batch(trainer):
    return next(trainer.batches.epoch(0))


def student_outputs(trainer, images):
    """Logits, those of the distillation head if any, and features, as training gives them: by the plain model."""
    model = trainer.exported_model()
    final = model.forward_features(images)
    logits = model.forward_head(final)
    heads = logits if isinstance(logits, tuple) else (logits, logits)
    return *heads, model.forward_head(final, pre_logits=True)


def terms(result):
    """The terms of the loss with a teacher, which is the base task of SFR or stands alone."""
    return {name: result.get(name, result.get(f"base_{name}")) for name in ("cls_loss", "kd_loss", "cls_weight", "kd_weight")}


WAYS = {
    "logit": {},
    "weighed": {"task_loss_weight": 0.3, "kd_temperature": 2.0},
    "both": {"task_loss_weight": 0.5, "distill_loss_weight": 3.0},
    "feature": {"kd_distill_type": "feature", "distill_loss_weight": 5.0},
    "feature-wide": {"kd_distill_type": "feature", "model": "wrn_16_2_cifar", "sfr_channels": "projection"},
    "token": {**DEIT, "kd_distill_type": "token", "kd_temperature": 3.0},
    "hard": {**DEIT, "kd_distill_type": "token", "kd_token_distill_type": "hard", "task_loss_weight": 0.5},
}
WEIGHTS = {"weighed": (0.3, 0.7), "both": (0.5, 3.0), "feature": (1.0, 5.0), "hard": (0.5, 0.5)}


@pytest.mark.parametrize("sfr", [True, False], ids=["sfr", "no-sfr"])
@pytest.mark.parametrize("way", WAYS)
def test_the_terms_by_hand(way, sfr, tmp_path):
    options = WAYS[way]
    made = trainer(tmp_path, smoothing=0.2, sfr=sfr, **options)
    made.task.train()
    images, target = one_batch(made)
    result = made.task(images, target)
    term = terms(result)
    model = timm_sfr.create_model(NAME)
    # Training mode: BatchNorm takes the batch's own statistics, so that a second pass gives the same.
    logits, head, features = student_outputs(made, images)
    temperature = options.get("kd_temperature", 4.0)
    own = timm.data.resolve_model_data_config(model)
    mean, std, own_mean, own_std = (
        torch.tensor(x).view(3, 1, 1) for x in (made.prep.mean, made.prep.std, own["mean"], own["std"])
    )
    seen = (images * std + mean - own_mean) / own_std
    with torch.no_grad():
        theirs = model(seen)
        wanted = model.forward_features(seen).mean((2, 3))
    if options.get("kd_token_distill_type") == "hard":
        kd = -head.log_softmax(1)[torch.arange(len(head)), theirs.argmax(1)].mean()
    elif options.get("kd_distill_type") == "feature":
        module = made.task.trainable_module
        learned = module.to_teacher if sfr else module.projection
        ours = features if not isinstance(learned, torch.nn.Linear) else learned(features)
        assert isinstance(learned, torch.nn.Linear) == (way == "feature-wide")
        kd = (ours - wanted).square().mean()
    else:
        p, q = (theirs / temperature).softmax(1), (head / temperature).softmax(1)
        kd = temperature**2 * (p * (p.log() - q.log())).sum(1).mean()
    smoothed = 0.8 * F.one_hot(target, 10) + 0.2 / 10
    cls = -(smoothed * logits.log_softmax(1)).sum(1).mean()
    weights = WEIGHTS.get(way, (1.0, 1.0))
    assert (term["cls_weight"].item(), term["kd_weight"].item()) == pytest.approx(weights)
    assert term["kd_loss"].item() == pytest.approx(kd.item(), rel=1e-4)
    assert term["cls_loss"].item() == pytest.approx(cls.item(), rel=1e-4)
    assert result["task_loss"].item() == pytest.approx(weights[0] * cls.item() + weights[1] * kd.item(), rel=1e-4)
    extra = result["sfr_weight"] * result["sfr_loss"] if sfr else 0
    assert torch.allclose(result["loss"], result["task_loss"] + extra)
    assert not sfr or (result["sfr_loss"] > 0 and result["smoothing"].item() == pytest.approx(0.2))


@pytest.mark.parametrize("weight", [0.0, 0.2])
def test_timms_own_feature_distillation_as_a_base(weight):
    student, teacher = (timm.create_model(name, num_classes=10) for name in ("wrn_16_2_cifar", "resnet20_cifar"))
    base = FeatureDistillationTask(student, teacher, torch.nn.CrossEntropyLoss(), distill_loss_weight=2.0, verbose=False).eval()
    images, target = torch.randn(4, 3, 32, 32), torch.arange(4)
    expected, learned = base(images, target), base.trainable_module.projection
    task = SFRTask(student, SFRConfig(weight=weight), base=base, verbose=False).eval()
    result = task(images, target)
    assert torch.allclose(result["task_loss"], expected["loss"]) and torch.equal(result["output"], expected["output"])
    assert torch.allclose(result["base_kd_loss"], expected["kd_loss"])
    result["loss"].backward()
    assert learned.weight.grad.abs().sum() > 0 and task.trainable_module.to_teacher is learned
    state, other = task.get_task_state(), torch.zeros_like(learned.weight)
    kept = learned.weight.detach().clone()
    learned.weight.data.copy_(other)
    task.load_task_state({**state, "to_teacher": {**state["to_teacher"], "weight": kept}})
    assert torch.equal(learned.weight, kept) and "projection" not in state


@pytest.mark.parametrize("kind", ["logit", "feature"])
def test_the_teacher_is_no_part_of_what_is_trained_kept_or_exported(kind, tmp_path):
    plain = trainer(tmp_path, kd_model_name=None, model="wrn_16_2_cifar", epochs=1)
    made = trainer(tmp_path, kd_distill_type=kind, model="wrn_16_2_cifar", epochs=1, model_ema=True, model_ema_decay=0.5)
    ours, theirs = made.exported_model().state_dict(), plain.exported_model().state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs), "the student begins as it would without a teacher"
    teacher = made.task.base.teacher
    before = {key: value.clone() for key, value in teacher.model.state_dict().items()}
    made.train_epoch(0)
    assert not any(module.training for module in teacher.modules())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.model.state_dict().items())
    learned = {id(parameter) for group in made.optimizer.param_groups for parameter in group["params"]}
    assert not learned & {id(parameter) for parameter in teacher.parameters()}
    # Of feature distillation one matrix is learned and kept, from 128 channels to the teacher's 64.
    extra = 128 * 64 + 64 if kind == "feature" else 0
    student = sum(parameter.numel() for parameter in made.exported_model().parameters())
    assert made.recorder.facts["parameters"] == plain.recorder.facts["parameters"] == student
    assert sum(p.numel() for group in made.optimizer.param_groups for p in group["params"]) == student + extra
    assert sum(p.numel() for p in made.task.get_clip_parameters()) == student + extra
    with pytest.raises(UserError, match="5 terms of the loss, expected 9: a teacher or --jsd-loss was added or removed"):
        restore(made, collect(made, 0, 4, torch.zeros(6)))
    state = collect(made, 1, 0, None)
    assert set(state["module"]) == set(state["ema"]) and not any(key.startswith("base") for key in state["module"])
    assert len(state["module"]) == len(theirs) + 2 * (kind == "feature")
    assert set(made.exported_model().state_dict()) == set(theirs)


def test_labels_are_smoothed_dynamically_beside_a_teacher(tmp_path):
    made = trainer(tmp_path, sfr_smoothing_source="classes", sfr_smoothing_schedule="ramp", smoothing=0.3, lr=0.02)
    first, _ = made.train_epoch(0), made.train_epoch(1)
    second = made.train_epoch(1)
    table = made.task.smoothing.table
    assert first["smoothing"] == 0 and second["smoothing"] == pytest.approx(0.3)
    assert not torch.equal(table, torch.full_like(table, 0.1))
    assert torch.equal(made.task.get_task_state()["smoothing"]["table"], table)


def seen_by(student, images):
    """What the teacher sees of uint8 images (B, C, H, W) that the student sees normalised as `student` says."""
    teacher = Teacher(timm_sfr.create_model(NAME), student, KDConfig(model_name=NAME))
    return teacher.normalize_input(student.normalize(images))


def test_the_teacher_sees_its_own_preprocessing():
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    model = timm_sfr.create_model(NAME)
    own = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(own[name]).view(3, 1, 1) for name in ("mean", "std"))
    expected = []
    for image in images:
        small = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((16, 16), Image.Resampling.BILINEAR)
        expected.append((torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255 - mean) / std)
    seen = seen_by(Preprocessing((3, 40, 40), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), "bicubic", 1.0), images)
    assert torch.allclose(seen, torch.stack(expected), atol=1.5 / 255 / std.min())
    # The same preprocessing: the very same numbers.
    same = Preprocessing((3, 16, 16), own["mean"], own["std"], "bicubic", 1.0)
    batch = same.normalize(images[..., :16, :16])
    assert Teacher(model, same, KDConfig(model_name=NAME)).normalize_input(batch) is batch
    # Grey images are to it what they are as colour ones; and the other way round, as PIL makes them.
    grey = Preprocessing((1, 16, 16), (0.4,), (0.2,), "bicubic", 1.0)
    one = images[:, :1, :16, :16]
    assert torch.allclose(seen_by(grey, one), same.normalize(one.expand(-1, 3, -1, -1)), atol=1e-4)
    eye = Teacher(timm.create_model("resnet20_cifar", in_chans=1, num_classes=10,
                                    pretrained_cfg_overlay={"mean": (0.0,), "std": (1.0,), "input_size": (1, 16, 16)}),
                  same, KDConfig(model_name="eye"))  # fmt: skip
    by_pil = np.stack([np.array(Image.fromarray(i.permute(1, 2, 0).numpy()).convert("L")) for i in images[..., :16, :16]])
    assert np.abs(eye.normalize_input(batch)[:, 0].numpy() * 255 - by_pil).max() < 1
    with pytest.raises(UserError, match="channels, and the student's have 4"):
        seen_by(Preprocessing((4, 16, 16), (0.4,) * 4, (0.2,) * 4, "bicubic", 1.0), images)


def relabelled(digits_run, place, names):
    """That run's model, with other names of its classes."""
    shutil.copytree(digits_run[0] / "model", place)
    about = json.loads((place / "config.json").read_text())["pretrained_cfg"]
    change(place / "config.json", label_names=names, pretrained_cfg={**about, "label_names": names})
    return KDConfig(model_name=str(place))


def test_classes_of_another_order_are_refused_and_of_other_names_told(digits_run, tmp_path):
    prep = Preprocessing((3, 16, 16), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)
    ours = tuple("0123456789")
    swapped = relabelled(digits_run, tmp_path / "swapped", list("1023456789"))
    with pytest.raises(UserError, match="in another order: '0' is its class 1 and the data's 0"):
        load_teacher(swapped, 10, ours, prep)
    words = relabelled(digits_run, tmp_path / "words", [f"digit {name}" for name in ours])
    assert "10 of the data's 10 classes have other names" in load_teacher(words, 10, ours, prep).warning
    assert load_teacher(words, 10, None, prep).warning is None
    assert load_teacher(KDConfig(model_name=NAME), 10, ours, prep).warning is None
    state = torch.get_rng_state()
    load_teacher(swapped, 10, None, prep)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("words,said", [
    (("--kd-temperature", 2), "kd-temperature: it needs a teacher; give --kd-model-name too"),
    (("--task-loss-weight", 0.5), "task-loss-weight: it needs a teacher"),
    (("--kd-model-name", "resnet20_cifra.sfr_digits"), "did you mean 'resnet20_cifar.sfr_digits'"),
    (("--kd-model-name", "resnet20_cifar"), "kd-model-name: "),
    (("--kd-model-name", "./nowhere"), "kd-model-name: there is no folder './nowhere'"),
    (("--kd-model-name", "runs/gone"), "use hf-hub:runs/gone"),
    (("--kd-model-name", NAME, "--num-classes", 12), "has 10 classes, expected the data's 12"),
    (("--kd-model-name", NAME, "--kd-distill-type", "token"), "resnet20_cifar has no distillation head"),
    (("--kd-model-name", NAME, "--kd-distill-type", "logits"), "expected one of logit, feature, token"),
    (("--kd-model-name", NAME, "--kd-loss-type", "mse"), "expected one of kl"),
    (("--kd-model-name", NAME, "--kd-temperature", 0), "kd-temperature: expected more than 0"),
    (("--kd-model-name", NAME, "--task-loss-weight", 2), "expected at most 1, because the distillation gets"),
    (("--kd-model-name", NAME, "--distill-loss-weight", -1), "expected at least 0"),
    (("--kd-model-name", NAME, "--kd-token-distill-type", "hard"), "it is for --kd-distill-type token"),
    (("--kd-model-name", NAME, "--kd-student-feature-dim", 64), "they are for --kd-distill-type feature"),
    (("--kd-model-name", NAME, "--kd-distill-type", "feature", "--kd-student-feature-dim", 63),
     "kd-student-feature-dim: expected 64, as measured; got 63"),
])  # fmt: skip
def test_bad_input_gets_one_line(words, said, tmp_path, capfd):
    status = main([str(word) for word in (*words, "--epochs", 1, "--output", tmp_path)])
    lines = capfd.readouterr().err.splitlines()
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0], lines
    assert not any(tmp_path.iterdir()), "told before a run is begun"


EVERYTHING = ("--mixup", 0.2, "--cutmix", 1, "--model-ema", "--model-ema-decay", 0.9, "--grad-accum-steps", 2, "--clip-grad", 1,
              "--drop-path", 0.1, "--reprob", 0.2, "--sfr-smoothing-source", "classes", "--kd-distill-type", "feature",
              "--model", "wrn_16_2_cifar", "--checkpoint-interval", 3, "--checkpoint-hist", 99, "--epochs", 2)  # fmt: skip


def test_a_run_with_a_teacher_goes_on_to_the_same_bits(digits_run, tmp_path):
    """The teacher is another run; the cut is in mid-epoch, and the teacher is made anew from its name."""
    teacher = digits_run[0]
    words = (*EVERYTHING, "--model-ema-decay", 0.8, "--kd-model-name", teacher, "-b", 64)
    train(*words, "--output", tmp_path, "--experiment", "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for path in checkpoints(tmp_path / "cut" / "checkpoints")[-3:]:
        shutil.rmtree(path)
    assert load_checkpoint(checkpoints(tmp_path / "cut" / "checkpoints")[-1])["step"] > 0
    done = train("--resume", tmp_path / "cut")
    assert "warning" not in done.stdout and not differences(tmp_path / "whole", tmp_path / "cut")
    rows = summary(tmp_path / "cut")
    assert len(rows) == 2 and all(tuple(row) == columns(True) and adds_up(row) for row in rows)
    args = yaml.safe_load((tmp_path / "cut" / "args.yaml").read_text())
    assert args["kd_model_name"] == str(teacher) and args["kd_temperature"] == 4.0
    card = (tmp_path / "cut" / "model" / "README.md").read_text()
    assert "license: apache-2.0" in card and "A teacher, the run `run` (resnet20_cifar, 0.27 M parameters" in card
    about = json.loads((tmp_path / "cut" / "metrics.json").read_text())["teacher"]
    assert (about["name"], about["folder"], about["architecture"]) == ("run", True, "resnet20_cifar")
    assert (about["license"], about["parameters"], about["source"]) == ("apache-2.0", 272474, None)
    # Where the teacher lies is not published.
    (tmp_path / "place").mkdir()
    files = run_files(tmp_path / "cut", "user/name", tmp_path / "place")
    published = "".join(files[name].read_text() for name in ("args.yaml", "metrics.json", "README.md"))
    assert "kd_model_name: run\n" in published and str(teacher.parent) not in published
    assert "Add `--kd-model-name` with the path to the teacher" in published
    keys = set(load_file(tmp_path / "cut" / "model" / "model.safetensors"))
    assert keys == set(timm.create_model("wrn_16_2_cifar").state_dict())


def test_a_teacher_that_comes_later(finished):
    assert tuple(summary(finished)[0]) == columns(False), "without one, the columns are what they were"
    done = train("--resume", finished, *QUICK, "-b", 64, "--epochs", 5)
    assert "the teacher is not the one" in done.stdout
    rows = summary(finished)
    assert tuple(rows[0]) == columns(True) and [row["kd_loss"] == "" for row in rows] == [True] * 4 + [False]
    assert adds_up(rows[4]) and float(rows[4]["lr"]) > 0 and len(read_finished(finished).rows) == 5


@pytest.mark.parametrize("words", [
    ("--channels-last", "--img-size", 32, "--mean", 0.5, "--std", 0.5),
    pytest.param(("--torchcompile", "aot_eager", "--no-sfr", "--kd-distill-type", "feature", "--in-chans", 1, "--model-ema"),
                 marks=pytest.mark.slow),
    pytest.param(("--sfr-weight", 0, "--kd-distill-type", "feature", "--mixed-precision", "bf16", "--torchcompile", "aot_eager"),
                 marks=pytest.mark.slow),
    ("--kd-distill-type", "token", "--model", "deit_tiny_distilled_patch16_224", "--model-kwargs", "depth=2", "--img-size", 32,
     "--opt", "adamw", "--lr", 1e-3, "--layer-decay", 0.7),
], ids=["resized", "compiled-feature-grey", "smoothing-alone", "token"])  # fmt: skip
def test_options_train(words, tmp_path):
    assert main([str(word) for word in (*QUICK, *words, "--output", tmp_path, "--experiment", "run")]) == 0
    (row,) = summary(tmp_path / "run")
    assert adds_up(row) and float(row["kd_loss"]) > 0


@pytest.mark.slow
def test_one_process_and_two_agree(tmp_path):
    _, two = agreeing_updates(tmp_path, kd_model_name=NAME, kd_distill_type="feature", model_ema=True, img_size=32, epochs=1)
    assert two["table_error"] < 1e-6


@pytest.mark.slow
def test_a_teacher_from_the_hub(hub, digits_run, tmp_path):
    files = repository(digits_run)
    hub.add("user/pickled", {"config.json": files["config.json"], "pytorch_model.bin": files["model.safetensors"]})
    config = json.loads(files["config.json"])
    config["pretrained_cfg"]["license"] = "cc-by-nc-4.0"
    hub.add("user/closed", {**files, "config.json": json.dumps(config).encode()})
    words = (*QUICK, "--output", tmp_path)
    env = hub.env(tmp_path / "home", token=None)
    done = train(*words, "--kd-model-name", "hf-hub:user/pickled", ok=False, **env)
    assert done.returncode == 2 and "kd-model-name: " in done.stderr and "a pickle is not loaded" in done.stderr
    done = train(*words, "--kd-model-name", "hf-hub:user/closed", "--experiment", "run", **env)
    assert "taught by hf-hub:user/closed (0.27 M parameters, 3x16x16; logit, temperature 4" in done.stdout
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    # Nothing is claimed of weights that a teacher under other terms has taught.
    assert "license" not in head and "knowledge-distillation" in head["tags"]
    assert "[`hf-hub:user/closed`](https://huggingface.co/user/closed)" in card
    assert "weights under cc-by-nc-4.0" in card and "There was no teacher" not in card


def test_the_teachers_digest_is_that_of_its_weights_and_names():
    def digest(model):
        return Teacher(model, Preprocessing((3, 16, 16), (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0), KDConfig(NAME)).facts["sha256"]

    model = timm.create_model(NAME, pretrained=True)
    whole = hashlib.sha256()
    for key, value in model.state_dict().items():
        whole.update(key.encode() + value.contiguous().numpy().tobytes())
    assert digest(model) == whole.hexdigest()
    with torch.no_grad():
        model.fc.bias[3] += 1e-3
    assert digest(model) != whole.hexdigest()
