"""Options: checked, flat, and the same from YAML, the command line and Python."""

import pytest
import yaml

from timm_sfr import RunConfig, SFRConfig, UserError
from timm_sfr.cli.train import parse, training_parser
from timm_sfr.config import options
from train_sfr import main


def test_flat_yaml_round_trip():
    config = RunConfig.from_flat({"lr": "1e-3", "sfr_taps": [1, "layer3"], "scale": [0.5, 1], "model_kwargs": {"a": 1}})
    assert config.optim.lr == 1e-3 and config.sfr.taps == ("1", "layer3") and config.aug.scale == (0.5, 1.0)
    assert RunConfig.from_flat(yaml.safe_load(yaml.safe_dump(config.flat()))) == config


def test_command_line_equals_python():
    words = (
        "--model resnet18 --data-dir x --sfr-weight 0.3 --no-sfr -b 32 --smoothing 0 --aa original "
        "--model-kwargs act_layer=silu depth=3 --cutmix-minmax 0.2 0.8 --torchcompile"
    )
    config, resume = parse(words.split())
    assert resume is None and config.data.batch_size == 32 and not config.sfr.enabled and config.sfr.weight == 0.3
    assert config.model.model_kwargs == {"act_layer": "silu", "depth": 3} and config.aug.cutmix_minmax == (0.2, 0.8)
    assert config.engine.torchcompile == "inductor" and config.data.dataset is None


def test_no_data_means_digits():
    config, _ = parse([])
    assert config.data.dataset == "digits" and config.model.model == "resnet20_cifar"
    assert parse(["--model", "resnet18"])[0].model.model == "resnet18"


def test_config_file_under_the_command_line(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("model: resnet18\nbatch-size: 16\nlr: 0.5\n")
    config, _ = parse(["--config", str(file), "--lr", "0.1"])
    assert (config.model.model, config.data.batch_size, config.optim.lr) == ("resnet18", 16, 0.1)


def test_a_rule_for_the_rate_replaces_a_rate(tmp_path):
    """Else `--lr-base` would change nothing over the digits' own rate, or over the one that a run has recorded."""
    assert parse(["--lr-base", "0.5"])[0].optim.lr is None and parse([])[0].optim.lr == 0.1
    file = tmp_path / "args.yaml"
    file.write_text("data_dir: x\nlr: 0.2\nlr_base: 0.1\n")
    for words, lr, base in (([], 0.2, 0.1), (["--lr-base", "0.5"], None, 0.5), (["--lr-base", "0.5", "--lr", "1"], 1.0, 0.5)):
        optim = parse(["--config", str(file), *words])[0].optim
        assert (optim.lr, optim.lr_base) == (lr, base)


@pytest.mark.parametrize(
    "values,message",
    [
        ({"epochs": "many"}, "epochs: expected int; got 'many'"),
        ({"sfr_channels": "group"}, "sfr_channels: expected one of groups, transport, projection; got 'group'"),
        ({"scale": [1.0]}, "scale: expected two positive numbers"),
        ({"crop_padding": 4, "scale": [0.5, 1.0], "data_dir": "x"}, "crop_padding: it does not go with scale"),
        ({"crop_padding": 4, "no_aug": True, "data_dir": "x"}, "crop_padding: it does not go with no_aug"),
        ({"hflip": 2}, "hflip: expected a value from 0 to 1"),
        ({"mixup": 0.2, "batch_size": 15}, "need an even size; got 15"),
        ({"sfr": "maybe"}, "sfr: expected bool"),
        ({"drop_path": 1.5}, "drop_path: expected a value from 0 to 1"),
    ],
)
def test_bad_values_are_refused(values, message):
    """test_bad_inputs.py has more, on the command line."""
    with pytest.raises(UserError, match=message):
        RunConfig.from_flat(values)


def test_every_option_is_documented_once():
    names = [name for _, name, _ in options()]
    assert len(names) == len(set(names)) and all(item.metadata["help"] for _, _, item in options())
    assert "--sfr-weight" in training_parser().format_help()


def test_configs_are_frozen():
    with pytest.raises(AttributeError):
        SFRConfig().weight = 1.0


def test_the_command_line_names_options_as_they_are_typed(capsys):
    assert main(["-b", "0"]) == 2 and capsys.readouterr().err == "error: batch-size: expected at least 1; got 0\n"
    assert main(["--sfr-taps", "a_b"]) == 2 and capsys.readouterr().err.startswith("error: sfr-taps: no feature 'a_b'")
