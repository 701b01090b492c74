"""Random input to whatever reads input: a configuration, a command line, a checkpoint, an image. Clean errors alone.

FUZZ=5000 tries that many of each; by default a few hundred.
"""

import io
import json
import os
import warnings

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from timm_sfr import RunConfig, UserError
from timm_sfr.cli.predict import predict
from timm_sfr.cli.train import parse
from timm_sfr.config import options
from timm_sfr.runs.checkpoints import Damaged, checkpoints, load_checkpoint, load_newest, save_checkpoint
from timm_sfr.utils.files import read_yaml

MANY = int(os.environ.get("FUZZ", "300"))
many = settings(max_examples=MANY, deadline=None, suppress_health_check=list(HealthCheck), derandomize="FUZZ" not in os.environ)
NAMES = [name for _, name, _ in options()]
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.sampled_from(["auto", "no"]))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@many
@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=12), VALUES, max_size=6))
def test_any_mapping_is_a_configuration_or_an_error_of_ours(values):
    try:
        config = RunConfig.from_flat(values)
    except UserError:
        return
    assert RunConfig.from_flat(config.flat()).flat() == config.flat() or "nan" in str(config.flat())


FLAGS = st.sampled_from(["--" + name.replace("_", "-") for name in NAMES])
WORDS = FLAGS | st.text(max_size=10).filter(lambda word: word not in ("-h", "--help"))


@many
@given(st.lists(WORDS | st.integers().map(str) | st.floats().map(str), max_size=8))
def test_any_command_line_is_a_run_or_an_error_of_ours(words):
    try:
        config, resume = parse(words)
    except UserError as error:
        assert str(error)
        return
    assert isinstance(config, RunConfig) and resume is None


@many
@given(data=st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_any_file_is_a_mapping_or_an_error_of_ours(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "options.yaml"
    path.write_bytes(data)
    try:
        values = read_yaml(path)
    except UserError:
        return
    assert all(isinstance(key, str) for key in values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint to damage, and the bytes of its files."""
    place = tmp_path_factory.mktemp("fuzz") / "checkpoints"
    state = {"epoch": 1, "step": 2, "images": 128, "updates": 12, "module": {"x": torch.arange(50.0)}, "best": {"a": 1.0}}
    path = save_checkpoint(place, state, 5, True)
    return path, {file.name: file.read_bytes() for file in path.iterdir()}


@many
@given(file=st.sampled_from(["state.pt", "manifest.txt"]), place=st.floats(0, 1), cut=st.integers(0, 300),
       new=st.binary(max_size=300))  # fmt: skip
def test_any_damage_to_a_checkpoint_is_found(folder, file, place, cut, new):
    path, whole = folder
    start = int(place * len(whole[file]))
    damaged = whole[file][:start] + new + whole[file][start + cut :]
    (path / file).write_bytes(damaged)
    try:
        if damaged == whole[file]:
            assert load_checkpoint(path)["updates"] == 12
            return
        with pytest.raises(Damaged):
            load_checkpoint(path)
        with pytest.raises(UserError, match="no intact checkpoint"):
            load_newest(path.parent, lambda line: None)
    finally:
        (path / file).write_bytes(whole[file])


@many
@given(data=st.binary(max_size=400), manifest=st.dictionaries(st.text(max_size=8), VALUES, max_size=5) | VALUES)
def test_any_bytes_in_the_place_of_a_checkpoint_are_found(tmp_path_factory, data, manifest):
    path = tmp_path_factory.getbasetemp() / "other" / "epoch-00000-image-0000000000"
    path.mkdir(parents=True, exist_ok=True)
    (path / "state.pt").write_bytes(data)
    (path / "manifest.txt").write_text(json.dumps(manifest), errors="replace")
    assert checkpoints(path.parent) == [path]
    with pytest.raises(Damaged):
        load_checkpoint(path)


@pytest.fixture(scope="module")
def model():
    return timm.create_model("resnet20_cifar").eval()


PICTURE = io.BytesIO()
Image.linear_gradient("L").resize((20, 20)).save(PICTURE, "PNG")


@settings(many, max_examples=MANY // 3)
@given(place=st.floats(0, 1), cut=st.integers(0, 100), new=st.binary(max_size=100), whole=st.booleans())
def test_any_bytes_are_an_image_or_an_error_of_its_own(model, tmp_path_factory, place, cut, new, whole):
    path, data = tmp_path_factory.getbasetemp() / "image.png", PICTURE.getvalue()
    start = int(place * len(data))
    path.write_bytes(data[:start] + new + data[start + cut :] if whole else new)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL warns of some of what it reads
        (found,) = predict(model, [path])
    assert found.error or len(found.classes) == 5
