"""A Space beside a published model: its files, that its app predicts, and what must not be overwritten."""

import json
import re

import pytest
from conftest import ROOT, run
from hub_server import READ
from hub_tools import FILES, PREDICT, push, python
from huggingface_hub import SpaceCard

from timm_sfr.data.datasets import Digits
from timm_sfr.hub.space import space_files

DEMO = {"app.py", "requirements.txt", "README.md"}
# Gradio's names that the app uses; `launch` fails, because importing the app must not start a server.
STUB = """
import sys, types
gradio = types.ModuleType("gradio")
gradio.Image = lambda **given: given
gradio.Label = lambda **given: given
class Interface:
    def __init__(self, fn, inputs, outputs, **given): self.fn, self.inputs = fn, inputs
gradio.Interface = Interface
sys.modules["gradio"] = gradio
"""


def made(hub, name):
    """The files of a repository that a push has put there."""
    files = hub.repos[name].commits[-1][2]
    return {path: content for path, content in files.items() if path != ".gitattributes"}


def test_an_app_that_predicts(hub, finished, tmp_path):
    """As `timm-sfr predict` does, where timm_sfr is not installed; and a second push changes nothing."""
    home = tmp_path / "home"
    done = push(finished, "user/digits", hub, home, "--space", "team/try-digits")
    assert done.returncode == 0 and f"the Space is {hub.url}/spaces/team/try-digits" in done.stdout, done.stderr
    assert set(made(hub, "user/digits")) == FILES
    files = made(hub, "space:team/try-digits")
    assert set(files) == DEMO | {"cifar.py"} and len(hub.repos["space:team/try-digits"].commits) == 2
    head = SpaceCard(files["README.md"].decode()).data
    assert (head.sdk, head.app_file, head.models, head.license) == ("gradio", "app.py", ["user/digits"], "apache-2.0")
    place = tmp_path / "space"
    place.mkdir()
    for name, content in files.items():
        (place / name).write_bytes(content)
    Digits(train=False, mode="RGB")[5][0].save(tmp_path / "digit.png")
    code = (
        f"import json, sys; sys.path.insert(0, {str(place)!r}); sys.modules['timm_sfr'] = None\n{STUB}\n"
        "import app; from PIL import Image\n"
        f"found = app.demo.fn(Image.open({str(tmp_path / 'digit.png')!r}).convert(app.demo.inputs['image_mode']))\n"
        "print(json.dumps([found, app.predict(None)]))"
    )
    used = python(code, **hub.env(tmp_path / "other", token=None))
    assert used.returncode == 0, used.stderr
    found, nothing = json.loads(used.stdout)
    ours = json.loads(run(*PREDICT, finished, tmp_path / "digit.png", "--topk", 10, "--json").stdout)
    assert nothing == {} and set(found) == set("0123456789") and sum(found.values()) == pytest.approx(1, abs=1e-5)
    assert found == pytest.approx({one["class"]: one["probability"] for one in ours["classes"]}, abs=1e-5)
    done = push(finished, "user/digits", hub, home, "--space", "team/try-digits")
    assert done.returncode == 0 and done.stdout.count("nothing was sent") == 2
    assert len(hub.repos["space:team/try-digits"].commits) == 2


def test_a_model_of_timm_needs_timm_alone(hub, tmp_path):
    """Its Space has the model's name; our module goes where it was left by another model."""
    hub.add("space:user/plain", {"README.md": b"---\ntags: [timm_sfr]\n---\n", "cifar.py": b"", "notes.txt": b"kept"})
    code = (
        "import timm, timm_sfr; model = timm.create_model('test_resnet', num_classes=7, in_chans=1); "
        "timm_sfr.push_to_hub(model, 'user/plain', space='user/plain', license='dinov3-license', revision='v2')"
    )
    done = python(code, **hub.env(tmp_path / "home"))
    files = made(hub, "space:user/plain")
    assert done.returncode == 0 and set(files) == DEMO | {"notes.txt"}, done.stderr
    head, app = SpaceCard(files["README.md"].decode()).data.to_dict(), files["app.py"].decode()
    assert (head["license"], head["license_name"]) == ("other", "dinov3-license")
    assert 'create_model("hf-hub:user/plain@v2", pretrained=True)' in app and 'image_mode="L"' in app
    assert not re.search("timm_sfr|cifar", app)


def test_what_the_app_needs_is_what_the_package_needs(tmp_path):
    """The lower bounds do not drift apart."""
    config = {"architecture": "resnet18", "num_classes": 2, "pretrained_cfg": {"input_size": [3, 8, 8]}}
    files = space_files(config, "user/x", None, "x", tmp_path)
    assert 'image_mode="RGB"' in files["app.py"].read_text()
    assert 'image_mode="YCbCr"' in space_files(config, "user/x", None, "x", tmp_path, "YCbCr")["app.py"].read_text()
    needed = files["requirements.txt"].read_text().split()
    ours = re.findall(r'^    "([^"]+)",', (ROOT / "pyproject.toml").read_text(), re.M)
    assert set(needed) - {"gradio>=5"} <= set(ours)
    assert {re.split("[>=]", word)[0] for word in needed} >= {"gradio", "torch", "timm", "safetensors"}


@pytest.mark.parametrize(
    "words,token,status,said",
    [
        (("other/x",), None, 2, "the token cannot write for 'other'; expected one of user, team"),
        (("user/x",), READ, 2, "the token is read-only"),
        (("user/own",), None, 2, "space: user/own exists and was not made by timm_sfr"),
        (("x",), None, 2, "space: expected USER/NAME; got 'x'"),
        (("user/open", "--private"), None, 3, "it exists and is public"),
    ],
)
def test_a_space_that_cannot_be_written(words, token, status, said, hub, finished, tmp_path):
    """Nothing is uploaded then, not even the model."""
    hub.add("space:user/own", {"README.md": b"---\nsdk: static\n---\n", "index.html": b"mine"})
    hub.add("space:user/open", {"README.md": b"---\ntags: [timm_sfr]\n---\n", "app.py": b""})
    given = {"token": token} if token else {}
    done = push(finished, "user/x", hub, tmp_path / "home", "--space", *words, **given)
    assert done.returncode == status and said in done.stderr, done.stderr
    assert set(hub.repos) == {"space:user/own", "space:user/open"} and not hub.objects
    assert all(len(repo.commits) == 1 for repo in hub.repos.values())


def test_a_space_that_fails_after_the_model(hub, finished, tmp_path):
    """The line says what is published; its command goes on where it stopped, in the Space that was made. Private is private."""
    hub.faults["commit"] = [0, 403]  # the first is the model's
    done = push(finished, "user/x", hub, tmp_path / "home", "--private", "--space")
    assert done.returncode == 3
    assert "is published, and its Space user/x is not: no right to write there (403)" in done.stderr
    again = f"timm-sfr push {finished} user/x --private --space user/x"
    assert again in done.stderr
    assert len(hub.repos["user/x"].commits) == 2 and len(hub.repos["space:user/x"].commits) == 1
    done = push(finished, "user/x", hub, tmp_path / "home", *again.split()[4:])
    assert done.returncode == 0 and set(made(hub, "space:user/x")) == DEMO | {"cifar.py"}, done.stderr
    assert "note: user/x is private; give the Space a secret HF_TOKEN" in done.stdout
    assert hub.repos["user/x"].private and hub.repos["space:user/x"].private


def test_channels_that_no_picture_has(tmp_path):
    config = {"architecture": "resnet18", "num_classes": 2, "pretrained_cfg": {"input_size": [5, 8, 8]}}
    with pytest.raises(ValueError, match="this model takes 5 channels"):
        space_files(config, "user/x", None, "x", tmp_path)
