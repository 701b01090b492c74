"""What a push publishes: the real huggingface_hub against a Hub on the loopback."""

import json

import pytest
import timm
import torch
import yaml
from conftest import TRAIN, change, run
from hub_tools import FILES, push, python
from huggingface_hub import ModelCard
from safetensors.torch import load, save_file

from timm_sfr.data.datasets import Digits


def test_config_and_card(hub, finished, tmp_path):
    """Ours in all it says; scores are metrics.json's; the Hub's own check passes."""
    assert push(finished, "user/card", hub, tmp_path / "home").returncode == 0
    files = hub.repos["user/card"].commits[-1][2]
    config = json.loads(files["config.json"])
    about = config["pretrained_cfg"]
    assert about["tag"] == "sfr_digits" and about["license"] == "apache-2.0"
    assert about["mean"] == [0.4914, 0.4822, 0.4465] and about["input_size"] == [3, 16, 16]
    assert config["label_names"] == list("0123456789")
    assert not {"url", "hf_hub_id", "origin_url", "paper_ids", "notes"} & about.keys()
    assert not {"push_to_hub", "output", "experiment"} & yaml.safe_load(files["args.yaml"]).keys()
    assert all(isinstance(tensor, torch.Tensor) for tensor in load(files["model.safetensors"]).values())

    best = json.loads((finished / "metrics.json").read_text())["best"]
    card = ModelCard(files["README.md"].decode())
    results = {result.metric_name: result for result in card.data.eval_results}
    assert results["Top 1 Accuracy"].metric_value == pytest.approx(best["val_top1"], abs=1e-4)
    assert results["Top 5 Accuracy"].metric_value == pytest.approx(best["val_top5"], abs=1e-4)
    assert results["Top 1 Accuracy"].dataset_split == "validation"
    head = card.data
    assert (head.get("library_name"), head.license, head.datasets) == ("timm", "apache-2.0", None)
    assert {"image-classification", "timm", "timm_sfr", "self-distillation"} == set(card.data.tags)
    assert f"{best['val_top1']:.2f}" in card.text and "seed 42" in card.text and "user/card" in card.text
    check = python(
        f"from huggingface_hub import ModelCard; ModelCard.load({str(finished / 'model/README.md')!r}).validate()",
        **hub.env(tmp_path / "home"),
    )
    assert check.returncode == 0 and hub.asked.count("validate_yaml") == 3, check.stderr
    # The four lines of the card run, on the file that they name.
    code = card.text.split("```python\n")[1].split("```")[0]
    code = code.replace("image.png", str(tmp_path / "digit.png"))
    Digits(train=False, mode="RGB")[0][0].save(tmp_path / "digit.png")
    used = python(code, **hub.env(tmp_path / "other", token=None))
    assert used.returncode == 0 and len(eval(used.stdout)) == 5, used.stderr


def test_a_timm_model_is_published_without_timms_provenance(hub, tmp_path):
    code = (
        "import timm, timm_sfr; model = timm.create_model('resnet18', num_classes=7); "
        "print(timm_sfr.push_to_hub(model, 'user/plain', commit_message='mine'))"
    )
    done = python(code, **hub.env(tmp_path / "home"))
    assert done.returncode == 0 and f"{hub.url}/user/plain/commit/" in done.stdout, done.stderr
    _, title, files = hub.repos["user/plain"].commits[-1]
    assert title == "mine" and set(files) - {".gitattributes"} == {"config.json", "model.safetensors", "README.md"}
    about = json.loads(files["config.json"])["pretrained_cfg"]
    assert not {"tag", "origin_url", "paper_ids", "license", "hf_hub_id"} & about.keys() and about["num_classes"] == 7
    code = (
        "import timm, timm_sfr; loss = timm_sfr.LossForm(bce=True, multi_label=True); "
        "task = timm_sfr.SFRTask(timm.create_model('resnet18', num_classes=7), loss=loss); "
        "timm_sfr.push_to_hub(task, 'user/several')"
    )
    done = python(code, **hub.env(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    files = hub.repos["user/several"].commits[-1][2]
    assert json.loads(files["config.json"])["problem_type"] == "multi_label_classification"
    assert b"sigmoid" in files["README.md"] and b"softmax" not in files["README.md"]
    done = python("import timm_sfr; timm_sfr.push_to_hub(__import__('torch').nn.Linear(1, 1), 'user/plain')")
    assert "expected a timm model" in done.stderr


@pytest.mark.slow
def test_second_push_and_revisions(hub, finished, tmp_path):
    home = tmp_path / "home"
    assert push(finished, "user/two", hub, home).returncode == 0
    first = hub.repos["user/two"].branches["main"]
    before = timm.create_model(f"local-dir:{finished}/model", pretrained=True).state_dict()
    save_file({name: tensor * 2 for name, tensor in before.items()}, finished / "model" / "model.safetensors")
    best = json.loads((finished / "metrics.json").read_text())["best"]
    change(finished / "metrics.json", best={**best, "val_top1": 12.5})
    assert push(finished, "user/two", hub, home, "--commit-message", "second").returncode == 0
    repo = hub.repos["user/two"]
    assert len(repo.commits) == 3 and repo.commits[-1][1] == "second"
    assert "12.50" in repo.commits[-1][2]["README.md"].decode()
    code = (
        "import timm, timm_sfr; a = timm_sfr.create_model('user/two', revision='{0}'); "
        "b = timm.create_model('hf-hub:user/two@{0}', pretrained=True); c = timm_sfr.create_model('user/two'); "
        "print(a.fc.bias.tolist() == b.fc.bias.tolist(), (2 * a.fc.bias).tolist() == c.fc.bias.tolist())"
    )
    done = python(code.format(first), **hub.env(tmp_path / "other", token=None))
    assert done.stdout == "True True\n", done.stderr
    # The same once more changes nothing, and makes no empty commit.
    done = push(finished, "user/two", hub, home)
    assert done.returncode == 0 and len(repo.commits) == 3 and "nothing was sent" in done.stdout
    # Another branch, made where it is missing.
    assert push(finished, "user/two", hub, home, "--revision", "v2").returncode == 0
    assert len(repo.commits) == 4 and b'"hf-hub:user/two@v2"' in repo.tree("v2")[1]["README.md"]


def test_a_card_that_the_hub_refuses(hub, finished, tmp_path):
    """What the Hub says is wrong with it is passed on, before there is a repository."""
    done = push(finished, "user/x", hub, tmp_path / "home", "--hub-license", "apace-2.0")
    said = """the Hub refuses the card: "license" must be one of [apache-2.0, """
    assert done.returncode == 3 and said in done.stderr and not hub.repos, done.stderr
    assert f"once that is fixed: timm-sfr push {finished} user/x --hub-license" in done.stderr


def test_what_belongs_to_other_weights_goes(hub, finished, tmp_path):
    """A model after a run: its scores and curve go; so does a pickle, which would be of other weights."""
    hub.add("team/x", {"pytorch_model.bin": b"pickle", "notes.txt": b"kept"})
    done = push(finished, "team/x", hub, tmp_path / "home", "--hub-license", "mit")
    files = hub.repos["team/x"].commits[-1][2]
    assert done.returncode == 0 and set(files) == FILES | {"notes.txt"}, done.stderr
    assert "deleting from team/x, because they belong to other weights: pytorch_model.bin" in done.stdout
    assert ModelCard(files["README.md"].decode()).data.license == "mit"
    assert json.loads(files["config.json"])["pretrained_cfg"]["license"] == "mit"
    assert yaml.safe_load(files["args.yaml"])["hub_license"] == "mit"
    code = (
        "import timm_sfr; model = timm_sfr.create_model('resnet20_cifar.sfr_digits'); "
        "timm_sfr.push_to_hub(model, 'team/x', license='dinov3-license')"
    )
    done = python(code, **hub.env(tmp_path / "home"))
    files = hub.repos["team/x"].commits[-1][2]
    assert done.returncode == 0 and set(files) == {"config.json", "model.safetensors", "README.md", "notes.txt"}
    head = ModelCard(files["README.md"].decode()).data
    assert (head.license, head.license_name) == ("other", "dinov3-license")


def test_a_public_repository_stays_closed_to_private_weights(hub, finished, tmp_path):
    hub.add("user/open", {"notes.txt": b"kept"})
    done = push(finished, "user/open", hub, tmp_path / "home", "--private", "--revision", "v2")
    assert done.returncode == 3, done.stderr
    assert "it exists and is public" in done.stderr and "once that is fixed" in done.stderr
    repo = hub.repos["user/open"]
    assert len(repo.commits) == 1 and not hub.objects and list(repo.branches) == ["main"]
    words = ("--output", tmp_path, "--experiment", "new", "--push-to-hub", "user/open", "--hub-private")
    done = run(*TRAIN, *words, **hub.env(tmp_path / "home"))
    assert done.returncode == 2 and "it exists and is public" in done.stderr and not (tmp_path / "new").exists()
