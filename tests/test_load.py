"""Loading what was published, by timm alone and by this package; and what does not load."""

import json
import time

import pytest
import safetensors.torch
import torch
from conftest import ROOT, finished_run, run
from hub_tools import FILES, PREDICT, STARTING, WITHOUT, logits_by, push, python


def test_train_push_load(hub, tmp_path):
    """Training publishes; another process with an empty cache gets the same logits, bit for bit."""
    env = hub.env(tmp_path / "home")
    words = ("--epochs", 1, "--report-interval", 1, "--push-to-hub", "user/x")
    _, printed = finished_run(tmp_path, *words, **env)
    assert "published: " in printed and 'timm.create_model("hf-hub:user/x", pretrained=True)' in printed
    commits = hub.repos["user/x"].commits
    assert len(commits) == 2 and set(commits[1][2]) - {".gitattributes"} == FILES
    images = tmp_path / "images.pt"
    torch.save(torch.randn(4, 3, 16, 16), images)
    by_timm, ours = 'timm.create_model("{}", pretrained=True)', 'timm_sfr.create_model("user/x")'
    local, _ = logits_by(by_timm.format(f"local-dir:{tmp_path}/run/model"), images, tmp_path / "a.pt", {})
    for number, create in enumerate((by_timm.format("hf-hub:user/x"), ours)):
        env = hub.env(tmp_path / f"empty{number}", token=None)
        found, printed = logits_by(create, images, tmp_path / "b.pt", env)
        assert torch.equal(found, local) and "0.4914, 0.4822, 0.4465" in printed
    # What was loaded once needs no network.
    offline = {**hub.env(tmp_path / "empty1", token=None), "HF_HUB_OFFLINE": "1"}
    hub.close()
    found, _ = logits_by(ours, images, tmp_path / "c.pt", offline)
    assert torch.equal(found, local)


def test_timm_alone_loads_timms_architecture(hub, resnet_run, tmp_path):
    assert push(resnet_run[0], "user/r", hub, tmp_path / "home").returncode == 0
    images = tmp_path / "images.pt"
    torch.save(torch.randn(4, 3, 64, 64), images)
    create = 'timm.create_model("{}", pretrained=True)'
    local, _ = logits_by(create.format(f"local-dir:{resnet_run[0]}/model"), images, tmp_path / "a.pt", {}, WITHOUT)
    env = hub.env(tmp_path / "empty", token=None)
    found, _ = logits_by(create.format("hf-hub:user/r"), images, tmp_path / "b.pt", env, WITHOUT)
    assert torch.equal(found, local)


def test_names_of_classes_travel(hub, folder, tmp_path):
    """Into the configuration, and out of it in a prediction; the card of the run tells of its last epoch."""
    env = hub.env(tmp_path / "home")
    size = ("--img-size", 32, "--batch-size", 20, "--epochs", 3, "--workers", 0)
    run_dir, _ = finished_run(tmp_path, "--data-dir", folder, "--val-split", "val", *size, "--push-to-hub", "user/named", **env)
    config = json.loads(hub.repos["user/named"].commits[-1][2]["config.json"])
    assert config["label_names"] == ["class0", "class1", "class2"] and config["num_classes"] == 3
    image = next((folder / "val").rglob("*.png"))
    done = run(*PREDICT, "user/named", image, **hub.env(tmp_path / "empty", token=None))
    assert done.returncode == 0
    assert {line.split()[0] for line in done.stdout.splitlines()[1:]} == set(config["label_names"])
    card = (run_dir / "model" / "README.md").read_text()
    assert "| validation, last epoch | 3 |" in card and "in the folder above" in card


def repository(digits_run):
    """The files of that run's model, as they lie on the Hub."""
    model = digits_run[0] / "model"
    return {name: (model / name).read_bytes() for name in ("config.json", "model.safetensors")}


def load_error(hub, home, name="user/bad", **env):
    code = f"""
import timm_sfr
try:
    timm_sfr.create_model({name!r})
except timm_sfr.UserError as error:
    print(error)
"""
    started = time.monotonic()
    done = python(code, **{**hub.env(home, token=None), **env})
    assert done.returncode == 0 and time.monotonic() - started < 30 + STARTING, done.stderr
    assert len(done.stdout.strip().splitlines()) == 1
    return done.stdout


@pytest.mark.parametrize("name,said", [
    ("pickle", "at least one is missing, and a pickle is not loaded"), ("truncated", "are damaged"), ("header", "are damaged"),
    ("types", "to be float32; got I32"), ("unknown architecture", "'resnet_of_mine', which neither timm"), ("keys", "do not fit"),
    ("config", "is damaged or not timm's"),
    ("missing", "no such repository, or it is private"),
    pytest.param("no server", "cannot reach http://127.0.0.1", marks=pytest.mark.slow),
    ("revision", "it has no such revision"), ("offline", "HF_HUB_OFFLINE is set"),
])  # fmt: skip
def test_a_repository_that_does_not_load(name, said, hub, digits_run, tmp_path):
    files = repository(digits_run)
    config = json.loads(files["config.json"])
    if name == "pickle":
        files["pytorch_model.bin"] = files.pop("model.safetensors")
    elif name == "truncated":
        files["model.safetensors"] = files["model.safetensors"][:50_000]
    elif name == "header":  # it gives its own length, here as 2**62 bytes
        files["model.safetensors"] = (2**62).to_bytes(8, "little") + files["model.safetensors"][8:]
    elif name == "types":
        tensors = safetensors.torch.load(files["model.safetensors"])
        files["model.safetensors"] = safetensors.torch.save({key: value.int() for key, value in tensors.items()})
    elif name == "unknown architecture":
        files["config.json"] = json.dumps(config | {"architecture": "resnet_of_mine"}).encode()
    elif name == "keys":
        files["config.json"] = json.dumps(config | {"architecture": "resnet56_cifar"}).encode()
    elif name == "config":
        files["config.json"] = b"{"
    if name != "missing":
        hub.add("user/bad", files)
    if name == "no server":
        hub.close()
    repo = "user/bad@v9" if name == "revision" else "user/bad"
    extra = {"HF_HUB_OFFLINE": "1"} if name == "offline" else {}
    assert said in load_error(hub, tmp_path / "home", repo, **extra)


def test_a_full_disk(hub, digits_run, tmp_path):
    """The disk is full when the weights come in (their file refuses to be written): one line; it loads once there is room."""
    hub.add("user/big", repository(digits_run))
    limited = """
import builtins, errno, timm_sfr
import huggingface_hub.file_download as download
real = download.http_get
def full(url, temp_file, **kwargs):
    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device", temp_file.name)
        def __getattr__(self, name):
            return getattr(temp_file, name)
    return real(url, Full() if "safetensors" in url else temp_file, **kwargs)
download.http_get = full
try:
    timm_sfr.create_model("user/big")
except timm_sfr.UserError as error:
    print(error)
"""
    env = hub.env(tmp_path / "home", token=None)
    done = python(limited, **env)
    assert "the disk is full" in done.stdout, done.stdout + done.stderr
    done = python("import timm_sfr; print(timm_sfr.create_model('user/big').num_classes)", **env)
    assert done.stdout == "10\n", done.stderr


@pytest.mark.slow
def test_other_arguments_of_create_model(hub, finished, tmp_path):
    assert push(finished, "user/x", hub, tmp_path / "home", "--private").returncode == 0
    assert hub.repos["user/x"].private
    assert "no such repository, or it is private" in load_error(hub, tmp_path / "a", "user/x")
    hub.repos["user/x"].private, hub.repos["user/x"].gated = False, True
    assert "it is gated; log in, and ask for access" in load_error(hub, tmp_path / "a", "user/x")
    hub.repos["user/x"].gated = False
    code = (
        "import timm_sfr; a = timm_sfr.create_model('hf-hub:user/x', num_classes=3, drop_rate=0.1); "
        "b = timm_sfr.create_model('user/x', pretrained=False); "
        "print(a.num_classes, a.training, b.num_classes, b.training, 'label_names' in a.pretrained_cfg)"
    )
    done = python(code, **hub.env(tmp_path / "b"))
    assert done.stdout == "3 False 10 True False\n", done.stderr
    done = run(*PREDICT, "user/x", ROOT / "nothing.png", **hub.env(tmp_path / "b"))
    assert done.returncode == 2 and "no such file" in done.stderr
