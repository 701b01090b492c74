"""What can go wrong with a push, and what is said and kept then."""

import re
import time

import pytest
import timm
from conftest import TRAIN, change, finished_run, run
from hub_server import READ, WRITE, Repo
from hub_tools import FILES, PICTURES, PUSH, STARTING, contents, push, python

from timm_sfr.utils import hub_client


@pytest.fixture(autouse=True)
def _hardly_waits(request, monkeypatch):
    """The waits between tries are short, but for one test."""
    if "503 on commit" not in request.node.name:
        monkeypatch.setattr(hub_client, "WAITS", tuple(wait / 100 for wait in hub_client.WAITS))


FAULTS = {
    # name: (what always fails and how, token, repository, words in the one line)
    "bad token": ({}, "hf_wrong_1234567890", "user/x", ("refused the token (401)", "hf auth login")),
    "no token": ({}, None, "user/x", ("no token was found", "hf auth login")),
    "read-only token": ({}, READ, "user/x", ("no right to write there (403)",)),
    "another's name": ({}, WRITE, "other/x", ("no right to write there (403)",)),
    "no server": ({}, WRITE, "user/x", ("cannot reach http://127.0.0.1",)),
    "server gone in an upload": ({"put": "close"}, WRITE, "user/x", ("cannot reach http://127.0.0.1",)),
    "503 on PUT": ({"put": 503}, WRITE, "user/x", ("answered 503",)),
    "503 on commit": ({"commit": 503}, WRITE, "user/x", ("answered 503",)),
    "412 on commit": ({"commit": 412}, WRITE, "user/x", ("somebody else's commit", "412")),
    "500 on create": ({"create": 500}, WRITE, "user/x", ("answered 500",)),
    "offline": ({}, WRITE, "user/x", ("HF_HUB_OFFLINE is set",)),
}
# Of one kind with others, and twenty seconds of waiting each.
SLOW = ("server gone in an upload", "503 on PUT", "412 on commit", "500 on create")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FAULTS])
def test_a_push_that_fails(name, hub, finished, tmp_path):
    """One line that says what and how to try again, exit status 3, the run as it was, the token nowhere."""
    faults, token, repo, words = FAULTS[name]
    hub.always |= faults
    if name == "no server":
        hub.close()
    before = contents(finished)
    extra = {"HF_HUB_OFFLINE": "1"} if name == "offline" else {}
    done = push(finished, repo, hub, tmp_path / "home", token=token, **extra)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 3 and len(errors) == 1, done.stderr
    assert all(word in errors[0] for word in (*words, f"{repo} is not published", f"timm-sfr push {finished} {repo}"))
    assert contents(finished) == before
    assert token is None or token not in done.stdout + done.stderr
    assert len(hub.repos.get("user/x", Repo()).commits) <= 1, "nothing but the repository's first commit"
    if name not in ("no server", "bad token", "no token", "read-only token", "another's name"):
        hub.always.clear()
        sent = hub.asked.count("put")
        assert push(finished, repo, hub, tmp_path / "home").returncode == 0
        assert set(hub.repos["user/x"].commits[-1][2]) - {".gitattributes"} == FILES
        if "commit" in name:
            assert hub.asked.count("put") == sent, "what was uploaded is not sent again"


@pytest.mark.parametrize("kind,answers", [("commit", [503, 503]), ("commit", [412]), ("create", [502]), ("put", ["close"])])
def test_what_passes_is_tried_again(kind, answers, hub, finished, tmp_path):
    hub.faults[kind] = [*answers]
    done = push(finished, "user/again", hub, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    needed = 1 + len(PICTURES) if kind == "put" else 1
    assert len(hub.repos["user/again"].commits) == 2 and hub.asked.count(kind) == len(answers) + needed


def test_a_push_after_training_that_fails(hub, tmp_path):
    """The run is whole, the exit status says so, and the command of the error line publishes it. The token is nowhere."""
    hub.always["commit"] = 503
    env = hub.env(tmp_path / "home")
    done = run(*TRAIN, "--epochs", 1, "--output", tmp_path, "--experiment", "run", "--push-to-hub", "user/x", **env)
    assert done.returncode == 3 and "Traceback" not in done.stderr
    error = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert timm.create_model(f"local-dir:{tmp_path}/run/model", pretrained=True).num_classes == 10
    hub.always.clear()
    command = re.search(r"to try again: timm-sfr push (.+)$", error)[1].split()
    again = run(*PUSH, *command, **env)
    assert again.returncode == 0 and hub.repos["user/x"].commits[-1][2]["model.safetensors"], again.stderr
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or WRITE.encode() not in path.read_bytes(), path
    assert WRITE not in done.stdout + done.stderr + again.stdout + again.stderr


@pytest.mark.slow
def test_a_token_that_cannot_write_stops_before_training(hub, tmp_path):
    words = ("--epochs", 1, "--output", tmp_path, "--experiment", "run", "--push-to-hub")
    for token, said in (
        (READ, "the token is read-only"),
        ("hf_wrong_1234567890", "refused the token"),
        (None, "no token was found"),
    ):
        done = run(*TRAIN, *words, "user/x", **hub.env(tmp_path / "home", token))
        assert done.returncode == 2 and said in done.stderr and not (tmp_path / "run").exists(), done.stderr
        assert token is None or token not in done.stderr
    for repo, said in (
        (("x",), "expected USER/NAME; got 'x'"),
        (("other/x",), "the token cannot write for 'other'; expected one of user, team"),
        (("team/x", "--hub-license", "my own"), """the Hub refuses the card: "license" must be one of [apache-2.0, """),
        (("user/x", "--hub-dataset", "my data"), "the Hub refuses the card: not an id; see --hub-license and --hub-dataset"),
    ):
        done = run(*TRAIN, *words, *repo, **hub.env(tmp_path / "home"))
        assert done.returncode == 2 and said in done.stderr and not (tmp_path / "run").exists(), done.stderr


def test_the_command_to_try_again_is_whole(hub, finished, tmp_path):
    """What was private must not become public by it."""
    hub.faults["create"] = [403]
    done = push(finished, "user/x", hub, tmp_path / "home", "--private", "--revision", "v2", "--commit-message", "a b")
    assert f"timm-sfr push {finished} user/x --private --revision v2 --commit-message 'a b'" in done.stderr


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
    _, printed = finished_run(tmp_path, "--epochs", 1, "--push-to-hub", "user/x", **hub.env(tmp_path / "home"))
    assert printed.count("training continues") == 1
    assert set(hub.repos["user/x"].commits[-1][2]) - {".gitattributes"} == FILES - PICTURES  # without a report


@pytest.mark.slow
def test_a_xet_server_that_is_busy(hub, finished, tmp_path):
    """hf_xet by itself tries for minutes."""
    pytest.importorskip("hf_xet")
    hub.always["xet"] = 503
    done = push(finished, "user/x", hub, tmp_path / "home", HF_HUB_DISABLE_XET="0")
    assert done.returncode == 3 and "answered 503" in done.stderr, done.stderr
    assert hub.asked.count("xet") and not hub.asked.count("put") and WRITE not in done.stdout + done.stderr


@pytest.mark.slow
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
    hub.always["xet"] = 403
    before = hub.asked.count("xet")
    done = push(finished, "user/x", hub, tmp_path / "home", HF_HUB_DISABLE_XET="0")
    assert done.returncode == 3 and "no right to write there (403)" in done.stderr, done.stderr
    assert hub.asked.count("xet") == before + 1


@pytest.mark.slow
def test_a_slow_upload_leaves_the_commit_its_tries(hub, finished, tmp_path):
    hub.slow, hub.faults["commit"] = 11, [503]
    assert push(finished, "user/x", hub, tmp_path / "home").returncode == 0 and hub.asked.count("commit") == 2


def test_a_token_is_in_no_traceback(hub, finished, tmp_path):
    code = "import timm_sfr; timm_sfr.push_to_hub({!r}, 'user/x', token='hf_secret_1234567890{}')"
    for tail, said in (("\\n", "refused the token"), (" b", "token: expected one word"), ("é", "token: expected one word")):
        done = python(code.format(str(finished), tail), **hub.env(tmp_path / "home", None))
        assert said in done.stderr and "secret" not in done.stderr, done.stderr


def test_a_run_that_is_not_whole_is_not_published(hub, finished, tmp_path):
    change(finished / "metrics.json", epochs="4")
    done = push(finished, "user/x", hub, tmp_path / "home")
    assert done.returncode == 2 and "metrics.json or args.yaml of" in done.stderr and "Traceback" not in done.stderr
    change(finished / "metrics.json", epochs=20)
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
