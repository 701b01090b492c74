"""What a user gets wrong: one line each, no traceback, nothing saved is lost; and what comes from elsewhere is not trusted."""

import copy
import json

import pytest
import safetensors.torch
import torch
from conftest import TRAIN, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_fuzz import MANY, VALUES
from test_load import repository

from benchmarks.bad_inputs import CASES, DOCUMENT, QUICK, ask, finished_run
from timm_sfr import RunConfig, UserError
from timm_sfr.training.run import prepare
from timm_sfr.training.run_state import collect, restore


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("finished"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_bad_input_gets_one_line(case, finished, tmp_path):
    answer = ask(case, tmp_path, finished)
    assert answer.status == 2 and not answer.lost
    assert len(answer.lines) == 1 and answer.lines[0].startswith("error: ") and case.says in answer.lines[0]
    assert f"| {case.what} |" in DOCUMENT.read_text()


def test_what_a_configuration_says_of_other_places_is_not_followed(hub, digits_run, tmp_path):
    files = repository(digits_run)
    config = json.loads(files["config.json"])
    config["pretrained_cfg"] |= {
        "hf_hub_id": "user/evil", "hf_hub_filename": "../../evil.bin", "file": "/etc/passwd", "url": "http://127.0.0.1:9/evil.pth",
        "custom_load": "hf", "source": "url",
    }  # fmt: skip
    hub.add("user/odd", {**files, "config.json": json.dumps(config).encode(), "evil.bin": b"evil"})
    code = f"import timm_sfr, torch; torch.save(timm_sfr.create_model('user/odd').state_dict(), {str(tmp_path / 'w.pt')!r})"
    done = run(TRAIN[0], "-c", code, **hub.env(tmp_path / "home", token=None))
    assert done.returncode == 0, done.stderr
    own = safetensors.torch.load(files["model.safetensors"])
    assert all(torch.equal(value, own[key]) for key, value in torch.load(tmp_path / "w.pt", weights_only=True).items())


@pytest.mark.parametrize("pickled", [True, False])
def test_training_from_the_hub_takes_safetensors_alone(pickled, hub, digits_run, tmp_path):
    files = repository(digits_run)
    if pickled:
        files["pytorch_model.bin"] = files.pop("model.safetensors")
    hub.add("user/base", files)
    words = (*QUICK, "--model", "hf-hub:user/base", "--pretrained", "--output", tmp_path, "--experiment", "run")
    done = run(*TRAIN, *words, **hub.env(tmp_path / "home", token=None))
    if pickled:
        assert done.returncode == 2 and "a pickle is not loaded" in done.stderr and len(done.stderr.splitlines()) == 1
    else:
        assert done.returncode == 0, done.stderr
        assert "base_model: user/base" in (tmp_path / "run" / "model" / "README.md").read_text()


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    words = {"dataset": "digits", "epochs": 1, "img_size": 16, "batch_size": 64, "workers": 0, "device": "cpu",
             "model_ema": True, "opt": "adamw", "output": str(tmp_path_factory.mktemp("trainer"))}  # fmt: skip
    return prepare(RunConfig.from_flat(words))


@pytest.fixture(scope="module")
def state(trainer):
    trainer.train_epoch(0)
    return collect(trainer, 0, 4, torch.zeros(6))


def places(value, at=()):
    """Where in a state something is: the keys to every value in it."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*at, key))


def test_a_state_is_taken_up(trainer, state):
    restore(trainer, copy.deepcopy(state))


@settings(max_examples=MANY, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_any_other_state_is_taken_up_or_an_error_of_ours(trainer, state, data):
    """A value anywhere in a state is another, or a tensor of another shape or type."""
    *path, last = data.draw(st.sampled_from([place for place in places(state) if place]))
    other = copy.deepcopy(state)
    inner = other
    for key in path:
        inner = inner[key]
    tensors = st.sampled_from([torch.zeros(3), torch.zeros(2, 2, dtype=torch.long), torch.zeros(()), torch.ones(1).bool()])
    inner[last] = data.draw(VALUES | tensors)
    try:
        restore(trainer, other)
    except UserError as error:
        assert "does not fit these options: " in str(error) and "\n" not in str(error)
