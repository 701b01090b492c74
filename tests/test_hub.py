"""Publishing and loading over HTTP: the real huggingface_hub and timm against a Hub on the loopback."""

import json
import re
import shutil
import sys
import time

import pytest
import timm
import torch
import yaml
from conftest import ROOT, TRAIN, run
from hub_server import READ, WRITE
from huggingface_hub import ModelCard
from safetensors.torch import load, save_file

FILES = {"config.json", "model.safetensors", "README.md", "args.yaml", "summary.csv", "metrics.json"}
STARTING = 10  # seconds that Python and the imports may take on two busy cores
PUSH = [sys.executable, "-m", "timm_sfr.push"]
PREDICT = [sys.executable, "-m", "timm_sfr.predict"]
LOGITS = """
import sys, timm, torch
{imports}
model = {create}.eval()
with torch.no_grad():
    torch.save(model(torch.load("{images}", weights_only=True)), "{out}")
print(timm.data.resolve_model_data_config(model)["mean"])
"""
# What is left of an environment where this package was never installed.
WITHOUT = "sys.modules['timm_sfr'] = None"


@pytest.fixture
def finished(digits_run, tmp_path):
    """A copy of a finished run."""
    return shutil.copytree(digits_run[0], tmp_path / "run")


@pytest.fixture(scope="session")
def resnet_run(tmp_path_factory):
    """A finished run of an architecture that timm itself has."""
    output = tmp_path_factory.mktemp("resnet")
    done = run(
        *TRAIN, "--model", "test_resnet", "--img-size", 64, "--epochs", 1, "--output", output, "--experiment", "run"
    )
    assert done.returncode == 0, done.stderr
    return output / "run"


def push(folder, repo, hub, home, *words, token=WRITE, **env):
    """What the command answers: exit status, output, the error line; never a traceback, in under half a minute."""
    started = time.monotonic()
    done = run(*PUSH, folder, repo, *words, **{**hub.env(home, token), **env})
    assert time.monotonic() - started < 30 + STARTING, "bounded"
    assert "Traceback" not in done.stderr, done.stderr
    return done


def python(code, **env):
    done = run(sys.executable, "-c", code, **env)
    return done


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def logits_by(create, images, out, env, imports="import timm_sfr"):
    done = python(LOGITS.format(imports=imports, create=create, images=images, out=out), **env)
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True), done.stdout


def test_train_push_load(hub, tmp_path):
    """Training publishes; another process with an empty cache gets the same logits, bit for bit."""
    env = hub.env(tmp_path / "home")
    done = run(*TRAIN, "--epochs", 1, "--output", tmp_path, "--experiment", "run", "--push-to-hub", "user/x", **env)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "published: " in done.stdout and 'timm.create_model("hf-hub:user/x", pretrained=True)' in done.stdout
    commits = hub.repos["user/x"].commits
    assert len(commits) == 2 and set(commits[1][2]) - {".gitattributes"} == FILES
    images = tmp_path / "images.pt"
    torch.save(torch.randn(4, 3, 16, 16), images)
    local, _ = logits_by(
        f'timm.create_model("local-dir:{tmp_path}/run/model", pretrained=True)', images, tmp_path / "a.pt", {}
    )
    for number, create in enumerate(
        ('timm.create_model("hf-hub:user/x", pretrained=True)', 'timm_sfr.create_model("user/x")')
    ):
        env = hub.env(tmp_path / f"empty{number}", token=None)
        found, printed = logits_by(create, images, tmp_path / "b.pt", env)
        assert torch.equal(found, local) and "0.4914, 0.4822, 0.4465" in printed
    # What was loaded once needs no network.
    offline = {**hub.env(tmp_path / "empty1", token=None), "HF_HUB_OFFLINE": "1"}
    hub.close()
    found, _ = logits_by('timm_sfr.create_model("user/x")', images, tmp_path / "c.pt", offline)
    assert torch.equal(found, local)


def test_timm_alone_loads_timms_architecture(hub, resnet_run, tmp_path):
    assert push(resnet_run, "user/r", hub, tmp_path / "home").returncode == 0
    images = tmp_path / "images.pt"
    torch.save(torch.randn(4, 3, 64, 64), images)
    create = 'timm.create_model("{}", pretrained=True)'
    local, _ = logits_by(create.format(f"local-dir:{resnet_run}/model"), images, tmp_path / "a.pt", {}, WITHOUT)
    env = hub.env(tmp_path / "empty", token=None)
    found, _ = logits_by(create.format("hf-hub:user/r"), images, tmp_path / "b.pt", env, WITHOUT)
    assert torch.equal(found, local)


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
    assert head.library_name == "timm" and head.license == "apache-2.0" and head.datasets is None
    assert {"image-classification", "timm", "timm_sfr", "self-distillation"} == set(card.data.tags)
    assert f"{best['val_top1']:.2f}" in card.text and "seed 42" in card.text and "user/card" in card.text
    check = python(
        f"from huggingface_hub import ModelCard; ModelCard.load({str(finished / 'model/README.md')!r}).validate()",
        **hub.env(tmp_path / "home"),
    )
    assert check.returncode == 0 and hub.count("validate_yaml") == 3, check.stderr
    # The four lines of the card run, on the file that they name.
    code = card.text.split("```python\n")[1].split("```")[0]
    code = code.replace("image.png", str(tmp_path / "digit.png"))
    from timm_sfr.data import Digits

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
    done = python("import timm_sfr; timm_sfr.push_to_hub(__import__('torch').nn.Linear(1, 1), 'user/plain')")
    assert "expected a model of timm's" in done.stderr


def test_second_push_and_revisions(hub, finished, tmp_path):
    home = tmp_path / "home"
    assert push(finished, "user/two", hub, home).returncode == 0
    first = hub.repos["user/two"].branches["main"]
    before = timm.create_model(f"local-dir:{finished}/model", pretrained=True).state_dict()
    save_file({name: tensor * 2 for name, tensor in before.items()}, finished / "model" / "model.safetensors")
    metrics = json.loads((finished / "metrics.json").read_text())
    metrics["best"]["val_top1"] = 12.5
    (finished / "metrics.json").write_text(json.dumps(metrics))
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
    assert done.returncode == 0 and len(repo.commits) == 3 and "there was nothing to send" in done.stdout
    # Another branch, made where it is missing.
    assert push(finished, "user/two", hub, home, "--revision", "v2").returncode == 0
    assert len(repo.commits) == 4 and b'"hf-hub:user/two@v2"' in repo.tree("v2")[1]["README.md"]


def test_a_card_that_the_hub_refuses(hub, finished, tmp_path):
    """What the Hub says is wrong with it is passed on, before there is a repository."""
    done = push(finished, "user/x", hub, tmp_path / "home", "--hub-license", "apace-2.0")
    said = """the Hub refuses the card: "license" must be one of [apache-2.0, """
    assert done.returncode == 3 and said in done.stderr and not hub.repos, done.stderr
    assert f"once that is put right: python -m timm_sfr.push {finished} user/x --hub-license" in done.stderr


def fails(kind, *answers, forever=True):
    def prepare(hub):
        hub.faults[kind] = list(answers)
        if forever:
            hub.forever.add(kind)

    return prepare


NOTHING = fails("none", 0)
FAULTS = {
    # name: (what is wrong, token, repository, words in the one line)
    "bad token": (NOTHING, "hf_wrong_1234567890", "user/x", ("refused the token (401)", "hf auth login")),
    "no token": (NOTHING, None, "user/x", ("no token was found", "hf auth login")),
    "read-only token": (NOTHING, READ, "user/x", ("no right to write there (403)",)),
    "another's name": (NOTHING, WRITE, "other/x", ("no right to write there (403)",)),
    "no server": (lambda hub: hub.close(), WRITE, "user/x", ("cannot reach http://127.0.0.1",)),
    "server gone in an upload": (fails("put", "close"), WRITE, "user/x", ("cannot reach http://127.0.0.1",)),
    "503 on PUT": (fails("put", 503), WRITE, "user/x", ("answered 503",)),
    "503 on commit": (fails("commit", 503), WRITE, "user/x", ("answered 503",)),
    "412 on commit": (fails("commit", 412), WRITE, "user/x", ("somebody else's commit", "412")),
    "500 on create": (fails("create", 500), WRITE, "user/x", ("answered 500",)),
    "offline": (NOTHING, WRITE, "user/x", ("HF_HUB_OFFLINE is set",)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_push_that_fails(name, hub, finished, tmp_path):
    """One line that says what and how to try again, exit status 3, the run as it was, the token nowhere."""
    prepare, token, repo, words = FAULTS[name]
    prepare(hub)
    before = contents(finished)
    extra = {"HF_HUB_OFFLINE": "1"} if name == "offline" else {}
    done = push(finished, repo, hub, tmp_path / "home", token=token, **extra)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 3 and len(errors) == 1, done.stderr
    assert all(
        word in errors[0] for word in (*words, f"{repo} is not published", f"python -m timm_sfr.push {finished} {repo}")
    )
    assert contents(finished) == before
    assert token is None or token not in done.stdout + done.stderr
    assert len(hub.repos.get("user/x", Hubless).commits) <= 1, "nothing but the repository's first commit"
    if name not in ("no server", "bad token", "no token", "read-only token", "another's name"):
        hub.faults.clear()
        sent = hub.count("put")
        assert push(finished, repo, hub, tmp_path / "home").returncode == 0
        assert set(hub.repos["user/x"].commits[-1][2]) - {".gitattributes"} == FILES
        if "commit" in name:
            assert hub.count("put") == sent, "what was uploaded is not sent again"


class Hubless:
    commits = ()


@pytest.mark.parametrize(
    "kind,answers", [("commit", [503, 503]), ("commit", [412]), ("create", [502]), ("put", ["close"])]
)
def test_what_passes_is_tried_again(kind, answers, hub, finished, tmp_path):
    hub.faults[kind] = [*answers]
    done = push(finished, "user/again", hub, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert len(hub.repos["user/again"].commits) == 2 and hub.count(kind) == len(answers) + 1


def test_a_push_after_training_that_fails(hub, tmp_path):
    """The run is whole, the exit status says so, and the command of the error line publishes it. The token is nowhere."""
    hub.faults["commit"] = [503]
    hub.forever.add("commit")
    env = hub.env(tmp_path / "home")
    done = run(*TRAIN, "--epochs", 1, "--output", tmp_path, "--experiment", "run", "--push-to-hub", "user/x", **env)
    assert done.returncode == 3 and "Traceback" not in done.stderr
    error = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert timm.create_model(f"local-dir:{tmp_path}/run/model", pretrained=True).num_classes == 10
    hub.faults.clear()
    command = re.search(r"to try again: python (.+)$", error)[1].split()
    again = run(sys.executable, *command, **env)
    assert again.returncode == 0 and hub.repos["user/x"].commits[-1][2]["model.safetensors"], again.stderr
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or WRITE.encode() not in path.read_bytes(), path
    assert WRITE not in done.stdout + done.stderr + again.stdout + again.stderr


def test_a_token_that_cannot_write_stops_before_training(hub, tmp_path):
    words = ("--epochs", 1, "--output", tmp_path, "--experiment", "run", "--push-to-hub")
    for token, said in (
        (READ, "only reads"),
        ("hf_wrong_1234567890", "refused the token"),
        (None, "no token was found"),
    ):
        done = run(*TRAIN, *words, "user/x", **hub.env(tmp_path / "home", token))
        assert done.returncode == 2 and said in done.stderr and not (tmp_path / "run").exists(), done.stderr
        assert token is None or token not in done.stderr
    for repo, said in (
        (("x",), "expected USER/NAME; got 'x'"),
        (("other/x",), "the token does not write for 'other'; expected any of user, team there"),
        (("team/x", "--hub-license", "my own"), """the Hub refuses the card: "license" must be one of [apache-2.0, """),
        (
            ("user/x", "--hub-dataset", "my data"),
            "the Hub refuses the card: not an id; see --hub-license and --hub-dataset",
        ),
    ):
        done = run(*TRAIN, *words, *repo, **hub.env(tmp_path / "home"))
        assert done.returncode == 2 and said in done.stderr and not (tmp_path / "run").exists(), done.stderr


def test_the_command_to_try_again_is_whole(hub, finished, tmp_path):
    """What was private must not become public by it."""
    hub.faults["create"] = [403]
    done = push(finished, "user/x", hub, tmp_path / "home", "--private", "--revision", "v2", "--commit-message", "a b")
    assert f"timm_sfr.push {finished} user/x --private --revision v2 --commit-message 'a b'" in done.stderr


def test_what_belongs_to_other_weights_goes(hub, finished, tmp_path):
    """A model after a run: its scores and curve go; so does a pickle, which would be of other weights."""
    hub.add("team/x", {"pytorch_model.bin": b"pickle", "notes.txt": b"kept"})
    done = push(finished, "team/x", hub, tmp_path / "home", "--hub-license", "mit")
    files = hub.repos["team/x"].commits[-1][2]
    assert done.returncode == 0 and set(files) == FILES | {"notes.txt"}, done.stderr
    assert "deleting from team/x, as of other weights: pytorch_model.bin" in done.stdout
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
    assert (
        done.returncode == 3 and "it is there and public" in done.stderr and "once that is put right" in done.stderr
    ), done.stderr
    repo = hub.repos["user/open"]
    assert len(repo.commits) == 1 and not hub.objects and list(repo.branches) == ["main"]
    words = ("--output", tmp_path, "--experiment", "new", "--push-to-hub", "user/open", "--hub-private")
    done = run(*TRAIN, *words, **hub.env(tmp_path / "home"))
    assert done.returncode == 2 and "it is there and public" in done.stderr and not (tmp_path / "new").exists()


def test_a_commit_whose_answer_was_lost(hub, finished, tmp_path):
    """It was carried out, deletions and all: trying again finds that."""
    hub.add("user/x", {"pytorch_model.bin": b"pickle"})
    hub.faults["answer"] = [504]
    done = push(finished, "user/x", hub, tmp_path / "home")
    assert done.returncode == 0 and len(hub.repos["user/x"].commits) == 2, done.stderr
    assert set(hub.repos["user/x"].commits[-1][2]) == FILES


def test_a_hub_that_is_away_before_training(hub, tmp_path):
    """It may be back after it."""
    hub.faults["whoami"] = [503]
    words = ("--epochs", 1, "--output", tmp_path, "--experiment", "run", "--push-to-hub", "user/x")
    done = run(*TRAIN, *words, **hub.env(tmp_path / "home"))
    assert done.returncode == 0 and done.stdout.count("training goes on") == 1, done.stderr
    assert set(hub.repos["user/x"].commits[-1][2]) - {".gitattributes"} == FILES


def test_a_xet_server_that_is_busy(hub, finished, tmp_path):
    """hf_xet by itself tries for minutes."""
    pytest.importorskip("hf_xet")
    hub.faults["xet"] = [503]
    hub.forever.add("xet")
    done = push(finished, "user/x", hub, tmp_path / "home", HF_HUB_DISABLE_XET="0")
    assert done.returncode == 3 and "answered 503" in done.stderr, done.stderr
    assert hub.count("xet") and not hub.count("put") and WRITE not in done.stdout + done.stderr


def test_xet_is_bounded_after_a_download_too(hub, finished, tmp_path):
    """Whose session has no such bound; and no answer of its server is taken for a dead line."""
    code = (
        "import timm_sfr, time; from huggingface_hub.utils._xet import get_xet_session; get_xet_session()\n"
        f"try:\n    timm_sfr.push_to_hub({str(finished)!r}, 'user/x')\nexcept timm_sfr.HubError as error: print(error)"
    )
    pytest.importorskip("hf_xet")
    started = time.monotonic()
    done = python(code, **{**hub.env(tmp_path / "home"), "HF_HUB_DISABLE_XET": "0"})
    assert "cannot reach the storage (Xet)" in done.stdout and time.monotonic() - started < 30 + STARTING, done.stderr
    hub.faults["xet"] = [403]
    hub.forever.add("xet")
    before = hub.count("xet")
    done = push(finished, "user/x", hub, tmp_path / "home", HF_HUB_DISABLE_XET="0")
    assert done.returncode == 3 and "no right to write there (403)" in done.stderr, done.stderr
    assert hub.count("xet") == before + 1


def test_names_of_classes_travel(hub, folder, tmp_path):
    """Into the configuration, and out of it in a prediction; the card of the run tells of its last epoch."""
    env = hub.env(tmp_path / "home")
    size = ("--img-size", 32, "--batch-size", 20, "--epochs", 3, "--workers", 0)
    words = ("--data-dir", folder, "--val-split", "val", *size, "--output", tmp_path)
    done = run(*TRAIN, *words, "--experiment", "run", "--push-to-hub", "user/named", **env)
    assert done.returncode == 0, done.stderr
    config = json.loads(hub.repos["user/named"].commits[-1][2]["config.json"])
    assert config["label_names"] == ["class0", "class1", "class2"]
    image = next((folder / "val").rglob("*.png"))
    done = run(*PREDICT, "user/named", image, **hub.env(tmp_path / "empty", token=None))
    assert done.returncode == 0 and {line.split()[0] for line in done.stdout.splitlines()[1:]} == set(
        config["label_names"]
    )
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "| last epoch | 3 |" in card and "in the folder above" in card


def test_a_slow_upload_leaves_the_commit_its_tries(hub, finished, tmp_path):
    hub.slow, hub.faults["commit"] = 11, [503]
    assert push(finished, "user/x", hub, tmp_path / "home").returncode == 0 and hub.count("commit") == 2


def test_a_token_is_in_no_traceback(hub, finished, tmp_path):
    code = "import timm_sfr; timm_sfr.push_to_hub({!r}, 'user/x', token='hf_secret_1234567890{}')"
    for tail, said in (
        ("\\n", "refused the token"),
        (" b", "token: expected one word"),
        ("é", "token: expected one word"),
    ):
        done = python(code.format(str(finished), tail), **hub.env(tmp_path / "home", None))
        assert said in done.stderr and "secret" not in done.stderr, done.stderr


def test_a_run_that_is_not_whole_is_not_published(hub, finished, tmp_path):
    metrics = json.loads((finished / "metrics.json").read_text())
    (finished / "metrics.json").write_text(json.dumps(metrics | {"epochs": 20}))
    done = push(finished, "user/x", hub, tmp_path / "home")
    assert done.returncode == 2 and "stopped after 4 of 20 epochs" in done.stderr and not hub.repos
    weights = finished / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    done = push(finished, "user/x", hub, tmp_path / "home")
    assert done.returncode == 2 and "model.safetensors of" in done.stderr and "damaged" in done.stderr and not hub.repos
    done = push(finished / "model", "user/x", hub, tmp_path / "home")
    assert done.returncode == 2 and f"give the run: '{finished}'" in done.stderr, done.stderr
    weights.unlink()
    done = push(finished, "user/x", hub, tmp_path / "home")
    assert done.returncode == 2 and "it has no model/model.safetensors" in done.stderr and not hub.repos


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
    ("pickle", "they are not both there, and a pickle is not loaded"), ("truncated", "are damaged"),
    ("unknown architecture", "'resnet_of_mine', which neither timm"), ("keys", "do not fit"),
    ("config", "is damaged or not timm's"),
    ("missing", "no such repository, or it is private"), ("no server", "cannot reach http://127.0.0.1"),
    ("revision", "it has no such revision"), ("offline", "HF_HUB_OFFLINE is set"),
])  # fmt: skip
def test_a_repository_that_does_not_load(name, said, hub, digits_run, tmp_path):
    model = digits_run[0] / "model"
    files = {
        "config.json": (model / "config.json").read_bytes(),
        "model.safetensors": (model / "model.safetensors").read_bytes(),
    }
    config = json.loads(files["config.json"])
    if name == "pickle":
        files["pytorch_model.bin"] = files.pop("model.safetensors")
    elif name == "truncated":
        files["model.safetensors"] = files["model.safetensors"][:50_000]
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
    model = digits_run[0] / "model"
    hub.add("user/big", {name: (model / name).read_bytes() for name in ("config.json", "model.safetensors")})
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
