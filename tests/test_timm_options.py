"""timm's command line: every option is known, means what it does in timm, and survives files and resumed runs."""

import argparse
import ast
import dataclasses
import os
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from conftest import finished_run, summary, train
from safetensors.torch import load_file
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.utils import ParseKwargs

from benchmarks.options import DEFAULTS
from timm_sfr import RunConfig, SFRTask, UserError
from timm_sfr.cli.timm_options import FOREIGN, RENAMED, TRANSLATED, translate
from timm_sfr.cli.train import parse, training_parser
from timm_sfr.config import AugConfig, ModelConfig, OptimConfig, options
from timm_sfr.data.transforms import Preprocessing
from timm_sfr.hub.model_folder import resolve_hub
from timm_sfr.models.loading import new_model
from timm_sfr.training.optimizer import base_rate, create_optimizer, create_schedule, learning_rate
from timm_sfr.training.run import _check_opt, _optimisation
from timm_sfr.training.run_state import _load_optimizer
from timm_sfr.training.step import augment
from timm_sfr.training.trackers import Trackers
from timm_sfr.utils.options import plain

HERE = Path(__file__).resolve().parent
# Options of which the list does not know timm's default.
UNKNOWN = {"--task", "--multilabel-threshold"}
# Defaults that are written in another way and mean the same.
SAME = ("decay_epochs", "checkpoint_interval", "output", "eval_metric")


def read_list():
    """The options of timm's train.py that lie beside this file: (flags, default)."""
    lines = [line for line in (HERE / "timm_options.txt").read_text().splitlines() if not line.startswith("#")]
    return [(line.split(" = ")[0].split(), ast.literal_eval(line.split(" = ")[1])) for line in lines]


def read_train(path):
    """The options of a train.py of timm's: (flags, default)."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    found = []
    for call in sorted(calls, key=lambda call: call.lineno):
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
            given = {word.arg: word.value for word in call.keywords}
            default = given.get("default", ast.Constant(False if "action" in given else None))
            found.append(([flag.value for flag in call.args], eval(ast.unparse(default))))
    return found


def train_py():
    """A train.py of timm's: TIMM_TRAIN names it, or it lies beside an installed checkout; None if there is none."""
    beside = Path(timm.__file__).resolve().parent.parent / "train.py"
    path = Path(os.environ.get("TIMM_TRAIN", beside))
    return path if path.is_file() and "PyTorch ImageNet Training" in path.read_text() else None


def name_of(flags):
    return max(flags, key=len).lstrip("-").replace("-", "_")


def unknown(rows):
    """Flags of timm's that our parser does not have."""
    actions = training_parser()._actions
    known = {flag for action in actions for flag in action.option_strings} | {action.dest for action in actions}
    return {flag for flags, _ in rows for flag in flags if flag not in known}


def test_every_option_of_timm_is_known():
    assert unknown(read_list()) == set()


@pytest.mark.skipif(train_py() is None, reason="no train.py of timm's here; TIMM_TRAIN=FILE names one")
def test_every_option_of_the_train_py_that_is_here_is_known_and_listed():
    rows = read_train(train_py())
    assert unknown(rows) == set()
    listed = {tuple(flags): default for flags, default in read_list()}
    assert {tuple(flags): default for flags, default in rows}.items() <= listed.items()


def test_the_tables_name_what_exists():
    ours = {name for _, name, _ in options()}
    theirs = {name_of(flags) for flags, _ in read_list()}
    older = {"native_amp", "aot_autograd", "apex_amp", "amp_impl", "dr", "jsd", "bn_tf", "mixup_elem", "num_gpu",
             "validation_batch_size_multiplier"}  # fmt: skip
    assert set(RENAMED) | set(FOREIGN) | {name_of([flag]) for flag in TRANSLATED} <= theirs | older
    assert set(RENAMED.values()) - {"amp"} <= ours
    assert not ours & set(FOREIGN)


def test_defaults_that_differ_are_told():
    ours = {name: item.default for _, name, item in options()}
    differ = {}
    for flags, default in read_list():
        name = RENAMED.get(name_of(flags), name_of(flags))
        if name.startswith("no_") and name[3:] in ours:
            name, default = name[3:], not default
        if name in ours and flags[0] not in UNKNOWN and (default or None) != (plain(ours[name]) or None):
            differ[name] = default
    told = {name: theirs for name, (theirs, _) in DEFAULTS.items()}
    assert {name: value for name, value in differ.items() if name not in SAME} == {
        # Only for this option are 0 and None, the model's own value, not the same.
        name: value
        for name, value in told.items()
        if name != "drop"
    }
    assert timm.create_model("rexnet_100").drop_rate == 0.2 and ours["drop"] is None


def test_the_defaults_of_timm_as_a_file_are_a_run_and_say_nothing():
    values = {name_of(flags): default for flags, default in read_list() if not set(flags) & UNKNOWN}
    values = {name: value for name, value in values.items() if name not in ("config", "resume")}
    found, notes = translate(values)
    config = RunConfig.from_flat({**found, "data_dir": "x"})
    assert notes == [] and config.optim.epochs == 300 and config.engine.mixed_precision is None
    assert config.data.class_map is None and config.aug.aa is None and config.engine.dist_bn == "reduce"
    assert config.engine.ddp_bb and config.engine.resume_opt and config.engine.output == "output/train"


# --- commands ---------------------------------------------------------------------------------------------------------


def commands():
    lines = [line for line in (HERE / "timm_commands.txt").read_text().splitlines() if not line.startswith("#")]
    return {name: words for name, _, words in (line.partition(": ") for line in lines)}


def ours_of(command):
    """The words for the script, without the launcher."""
    words = shlex.split(command)
    return words[2:] if words[0].endswith("distributed_train.sh") else words[words.index("train.py") + 1 :]


TYPO = "mobilenetv3"  # its command has /--data-dir for --data-dir, which timm's own parser does not take either


@pytest.mark.parametrize("name", commands())
def test_published_commands_are_parsed_as_they_stand(name):
    words = ours_of(commands()[name])
    if name == TYPO:
        with pytest.raises(UserError, match="unrecognized arguments: imagenet/"):
            parse(words)
        words = ["--data-dir" if word == "/--data-dir" else word for word in words]
    config, resume = parse(words)
    flat, given = config.flat(), vars(training_parser().parse_args(words))
    assert resume is None and "imagenet" in config.data.data_dir
    if "input_size" in given:  # a square one is kept under the other names
        given["in_chans"], given["img_size"], _ = given.pop("input_size")
    for key, value in given.items():
        if key in flat:  # and so with every option of the command: nothing is lost on the way
            assert flat[key] == plain(value), key
    precision = "bf16" if "bfloat16" in words else "amp"
    assert config.engine.mixed_precision == (precision if given.get("amp") else None)


@pytest.mark.parametrize("name", [name if name in ("efficientnet_b0", "convnext_tiny")
                                  else pytest.param(name, marks=pytest.mark.slow) for name in commands()])  # fmt: skip
def test_published_commands_train(name, folder, tmp_path):
    """One epoch with a small model on a small set; all other options stay."""
    words = ["--data-dir" if word == "/--data-dir" else word for word in ours_of(commands()[name])]
    for flag, count in (("--model-kwargs", 2), ("--input-size", 4), ("--torchcompile", 1)):
        if flag in words:  # of the model that is replaced, of its size; compiling takes minutes on two cores
            del words[words.index(flag) : words.index(flag) + count]
    small = ("--model", "resnet20_cifar", "--data-dir", folder, "--epochs", 1, "-b", 16, "--img-size", 16, "-j", 0,
             "--warmup-epochs", 0)  # fmt: skip
    words = [word for word in words if word != "/imagenet" or "--data-dir" in words]  # the positional folder has a name here
    run_dir, printed = finished_run(tmp_path, *words, *small)
    if "--amp" in words or "--native-amp" in words:
        assert "bf16 mixed precision" in printed or torch.accelerator.is_available()
    assert len(summary(run_dir)) == 1 and (run_dir / "model" / "model.safetensors").is_file()


# --- single options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words,name,value",
    [
        ("DIR", "data_dir", "DIR"),
        ("--model resnet18 DIR --epochs 3", "data_dir", "DIR"),
        ("--amp", "mixed_precision", "amp"),
        ("--native-amp --amp-dtype bfloat16", "mixed_precision", "bf16"),
        ("--amp --amp-dtype float16", "mixed_precision", "fp16"),
        ("--amp --mixed-precision bf16", "mixed_precision", "bf16"),
        ("--log-wandb", "report_to", ["wandb"]),
        ("--log-wandb --report-to tensorboard none", "report_to", ["tensorboard", "wandb"]),
        ("--recovery-interval 7", "checkpoint_interval", 7),
        ("--drop-connect 0.2", "drop_path", 0.2),
        ("--dr 0.9", "decay_rate", 0.9),
        ("-vb 64", "validation_batch_size", 64),
        ("--sched-on-updates", "sched_on_updates", True),
        ("--no-sched-on-updates", "sched_on_updates", False),
        ("--no-resume-opt", "resume_opt", False),
        ("--aa ''", "aa", None),
        ("--dist-bn ''", "dist_bn", "none"),
        ("--train-interpolation ''", "train_interpolation", ""),
        ("--output '' --config '' --resume ''", "output", "output/train"),
        ("--model-kwargs", "model_kwargs", {}),
        ("--model-kwargs img_size=(48,64) layers=[1,(2,3)] x=None", "model_kwargs",
         {"img_size": [48, 64], "layers": [1, [2, 3]], "x": None}),
    ],
)  # fmt: skip
def test_timm_words(words, name, value):
    assert parse(shlex.split(words))[0].flat()[name] == value


@pytest.mark.parametrize(
    "words,message",
    [
        ("a --data-dir b", "DIR and --data-dir: they are one option; got 'a' and 'b'"),
        ("--model-kwargs a", "expected KEY=VALUE; got 'a'"),
        ("--naflex-max-seq-len 100", "NaFlex models train at one size"),
        ("--amp-impl apex", "use --amp alone"),
        ("--amp --mixed-precision no", "--amp: it is --mixed-precision amp; got --mixed-precision no"),
        ("--amp --amp-dtype half", "expected float16 or bfloat16; got 'half'"),
        ("--val-split ''", "val-split: expected a name"),
        ("--pretrained-path x", "it is used with --pretrained only"),
        ("--torchcompile-mode default", "give that too"),
        ("--wandb-tags a", "they are for --log-wandb"),
        ("--model-dtype bfloat16 --amp", "leave out one of the two"),
        ("--no-ddp-bb --dist-bn ''", "got --dist-bn none"),
        ("--model-ema-force-cpu", "give --model-ema too"),
        ("--resume tests/timm_options.txt", "expected the folder of a run; got the file .*--initial-checkpoint"),
        ("--lr-noise 0.1 0.2 0.3", "lr_noise: expected a share"),
    ],
)
def test_what_does_not_go_is_one_line(words, message):
    with pytest.raises(UserError, match=message):
        parse(shlex.split(words))


@pytest.mark.parametrize(
    "given,notes",
    [
        ({"fuser": "te", "no_prefetcher": True}, ["--fuser has no meaning here", "--no-prefetcher has no meaning here"]),
        ({"local_rank": "1", "worker_seeding": "part"}, ["--local_rank", "--worker-seeding"]),
        ({"amp_dtype": "bfloat16"}, ["--amp-dtype has no meaning without --amp"]),
        ({"fuser": "", "amp_dtype": "float16", "naflex_max_seq_len": "576", "amp_impl": "native"}, []),
    ],
)
def test_options_without_a_meaning_are_told_once(given, notes):
    found, said = translate(given)
    assert found == {} and len(said) == len(notes) and all(note in line for note, line in zip(notes, said, strict=True))


@pytest.mark.parametrize("given,found", [
    ({"amp": True, "native_amp": False}, {"mixed_precision": "amp"}),
    ({"native_amp": True, "amp": False}, {"mixed_precision": "amp"}),
    ({"amp": False, "native_amp": True}, {"mixed_precision": "amp"}),
    ({"drop_path": 0.1, "drop_connect": 0.0}, {"drop_path": 0.1}),
    ({"drop_connect": 0.0, "drop_path": 0.1}, {"drop_path": 0.1}),
    ({"recovery_interval": 0, "checkpoint_interval": 5}, {"checkpoint_interval": 5}),
    ({"drop_connect": 0.0}, {"drop_path": 0.0}),
])  # fmt: skip
def test_files_of_older_versions_have_an_option_by_two_names(given, found):
    assert translate(given) == (found, [])


def test_layers_keep_their_factors_without_a_schedule():
    config = OptimConfig(layer_decay=0.5, sched="none")
    optimizer = create_optimizer(config, timm.create_model("resnet20_cifar"), 0.1)
    create_schedule(config, optimizer, 4)
    assert optimizer.param_groups[0]["lr"] < 0.01 and base_rate(optimizer.param_groups) == pytest.approx(0.1)
    with pytest.raises(UserError, match="layer_decay: expected more than 0"):
        OptimConfig(layer_decay=0.0)


def test_a_run_keeps_its_optimizer(tmp_path):
    (tmp_path / "args.yaml").write_text("opt: sgd\n")
    config = RunConfig.from_flat({"data_dir": "x", "opt": "momentum"})
    with pytest.raises(UserError, match="opt: expected 'sgd', the optimizer of the run to resume; got 'momentum'"):
        _check_opt(tmp_path / "args.yaml", config)
    _check_opt(tmp_path / "args.yaml", RunConfig.from_flat({"data_dir": "x", "opt": "momentum", "resume_opt": False}))
    _check_opt(tmp_path / "args.yaml", RunConfig.from_flat({"data_dir": "x"}))


def test_a_file_and_the_command_line_together(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("amp: true\namp_dtype: bfloat16\nno_resume_opt: false\nreport_to: [tensorboard]\ndata: null\nresume: ''\n")
    assert parse(["--config", str(file)])[0].engine.mixed_precision == "bf16"
    assert parse(["--config", str(file), "--amp-dtype", "float16"])[0].engine.mixed_precision == "fp16"
    assert parse(["--config", str(file), "--mixed-precision", "no"])[0].engine.mixed_precision == "no"
    assert parse(["--config", str(file), "--log-wandb"])[0].engine.report_to == ("tensorboard", "wandb")


WORDS = ["a=(48,64)", "b=[1, 2.5]", "c=None", "d=silu", "e=1e-4", "f=True", "g='x y'", "h={'i': (1,)}", "j=a=b", "", "k=-3",
         "l=08", "m=yes", "n=1,2", "o="]  # fmt: skip


def test_values_are_read_as_timm_reads_them():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
    theirs = parser.parse_args(["--model-kwargs", *WORDS]).model_kwargs
    for name in ("--model-kwargs", "--opt-kwargs"):
        assert vars(training_parser().parse_args([name, *WORDS]))[name[2:].replace("-", "_")] == theirs


def test_values_survive_files():
    config, _ = parse(["--model-kwargs", *WORDS, "--opt-kwargs", "betas=(0.9,0.99)"])
    assert config.model.model_kwargs["a"] == (48, 64) and config.optim.opt_kwargs == {"betas": (0.9, 0.99)}
    assert RunConfig.from_flat(yaml.safe_load(yaml.safe_dump(config.flat()))) == config


# --- schedules --------------------------------------------------------------------------------------------------------

SCHEDULES = {
    "cosine": {"lr_cycle_limit": 2, "lr_cycle_mul": 2.0, "lr_cycle_decay": 0.3, "lr_k_decay": 0.7},
    "tanh": {"warmup_prefix": True},
    "step": {"decay_epochs": 2.4, "decay_rate": 0.97, "lr_noise": (0.42, 0.9)},
    "multistep": {"decay_milestones": (2, 4), "lr_noise": (0.5,), "lr_noise_pct": 0.3, "lr_noise_std": 0.4},
    "poly": {"lr_k_decay": 2.0, "decay_rate": 2.0, "cooldown_epochs": 1},
    "wsd": {"lr_decay_fn": "linear", "lr_noise": (0.0, 0.5)},
    "rsqrt": {"lr_stable_timescale": 2.0, "decay_epochs": 2},
    "constant": {},
    "plateau": {"patience_epochs": 0, "lr_noise": (0.0, 0.9)},
}


def follow(schedule, optimizer, updates, metrics, start=0):
    """The rates at every update from `start` on, and the states before each of them."""
    rates, states = [], []
    for update in range(start, updates * len(metrics)):
        states.append(schedule.state() and dict(schedule.state()))
        rates.append([group["lr"] for group in optimizer.param_groups])
        schedule.after_update(update + 1)
        if (update + 1) % updates == 0:
            schedule.after_epoch(update // updates, metrics[update // updates])
    return rates, states


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated:FutureWarning")
@pytest.mark.parametrize("on_updates", [True, False])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_timms_and_resume_from_counts(name, on_updates):
    """The oracle is timm's factory on the options as its train.py has them; a resumed schedule goes on as if never stopped."""
    metrics, updates = [1.0, 3.0, 2.0, 2.0, 4.0, 1.0, 1.0, 1.0], 3
    options = {"epochs": 6, "warmup_epochs": 1, "min_lr": 1e-3, "sched": name, "sched_on_updates": on_updates}
    config = OptimConfig(**options, **SCHEDULES[name])

    def fresh():
        optimizer = create_optimizer_v2(torch.nn.Linear(2, 2), "sgd", lr=0.5)
        return create_schedule(config, optimizer, updates, "top1", seed=7), optimizer

    theirs = create_optimizer_v2(torch.nn.Linear(2, 2), "sgd", lr=0.5)
    args = argparse.Namespace(**{**vars(config), "seed": 7, "sched_on_updates": on_updates and name != "plateau"})
    scheduler, epochs = create_scheduler_v2(theirs, **scheduler_kwargs(args), updates_per_epoch=updates)
    schedule, optimizer = fresh()
    rates, states = follow(schedule, optimizer, updates, metrics)
    assert schedule.epochs == epochs
    for update, rate in enumerate(rates):
        assert [group["lr"] for group in theirs.param_groups] == rate, update
        scheduler.step_update(update + 1)
        if (update + 1) % updates == 0:
            scheduler.step(update // updates + 1, metrics[update // updates])
    assert len({rate[0] for rate in rates}) > 1
    for update in range(1, len(rates)):
        again, resumed = fresh()
        for group, lr in zip(resumed.param_groups, rates[update], strict=True):  # the checkpoint's optimizer
            group["lr"] = lr if again.remembers else group["lr"]
        again.resume(update // updates, update, states[update], own_rate=not again.remembers)
        assert follow(again, resumed, updates, metrics, update)[0] == rates[update:], update


# --- models -----------------------------------------------------------------------------------------------------------


def test_model_options_reach_the_model():
    model = new_model(ModelConfig(model="test_efficientnet", bn_momentum=0.3, bn_eps=0.5, gp="max", drop_block=None), 5)
    norms = [one for one in model.modules() if isinstance(one, torch.nn.BatchNorm2d)]
    assert {(norm.momentum, norm.eps) for norm in norms} == {(0.3, 0.5)} and "max" in model.global_pool.pool_type
    dropped = new_model(ModelConfig(model="resnet10t", drop_block=0.2), 5)
    blocks = [one for one in dropped.modules() if "DropBlock" in str(type(one))]
    assert blocks and max(block.drop_prob for block in blocks) == 0.2
    with pytest.raises(UserError, match=r"cannot create 'resnet20_cifar'.*bn_eps"):
        new_model(ModelConfig(model="resnet20_cifar", bn_eps=0.5), 5)


def test_the_classifier_starts_as_asked():
    torch.manual_seed(1)
    plain_head = new_model(ModelConfig(model="resnet20_cifar"), 5).get_classifier()
    torch.manual_seed(1)
    head = new_model(ModelConfig(model="resnet20_cifar", head_init_scale=0.5, head_init_bias=-2.0), 5).get_classifier()
    assert torch.equal(head.weight, plain_head.weight * 0.5) and head.bias.tolist() == [-2.0] * 5
    with pytest.raises(UserError, match="no weights or no biases"):
        new_model(ModelConfig(model="levit_128s", head_init_scale=0.5), 5)


def test_a_file_as_pretrained_weights(tmp_path):
    source = new_model(ModelConfig(model="resnet18"), 7)
    torch.save(source.state_dict(), tmp_path / "a.pth")
    config = ModelConfig(model="resnet18", pretrained=True, pretrained_path=str(tmp_path / "a.pth"), in_chans=1)
    model = new_model(config, 5)  # timm sums the weights of the stem over the channels
    assert torch.equal(model.layer1[0].conv1.weight, source.layer1[0].conv1.weight) and model.num_classes == 5
    assert torch.allclose(model.conv1.weight, source.conv1.weight.sum(1, keepdim=True))
    assert model.pretrained_cfg["num_classes"] == 5 and not model.pretrained_cfg.keys() & {"hf_hub_id", "file", "url"}
    with pytest.raises(UserError, match="pretrained-path: no such file"):
        new_model(ModelConfig(model="resnet18", pretrained=True, pretrained_path="nowhere.pth"), 5)
    torch.save({"module": source.state_dict()}, tmp_path / "state.pt")
    with pytest.raises(UserError, match=r"state.pt' lacks 100 weights of the model, such as 'conv1.weight'"):
        new_model(dataclasses.replace(config, pretrained_path=str(tmp_path / "state.pt")), 5)


def test_wandb_gets_what_was_asked(tmp_path):
    pytest.importorskip("wandb")
    wanted = {"wandb_tags": ["a", "b"], "wandb_resume_id": "abc", "lr": 0.1}
    state = {"id": "own", "logged": 0}
    arguments = Trackers._arguments(argparse.Namespace(run=tmp_path), "wandb", state, wanted)
    assert arguments["tags"] == ["a", "b"] and arguments["id"] == "abc" and arguments["resume"] == "must"
    assert state["id"] == "abc" and arguments["config"]["lr"] == 0.1


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for a machine without a GPU")
def test_a_device_that_is_not_here():
    error = train("--device", "cuda:1", ok=False).stderr
    assert "error: device: expected cpu, which this machine has; got 'cuda:1'" in error


# --- runs -------------------------------------------------------------------------------------------------------------


def weights(run_dir):
    return load_file(run_dir / "model" / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_stopped_late_and_resumed_runs(folder, tmp_path):
    """--stop-epoch and a resume are the whole run; --no-resume-opt is another; --start-epoch begins within the schedule."""
    words = (folder, "--model", "resnet20_cifar", "--img-size", 16, "-b", 16, "-j", 0, "--epochs", 3, "--lr-noise", 0.2, 0.9,
             "--grayscale-prob", 0.3, "--gaussian-blur-prob", 0.3, "--color-jitter-prob", 0.5, "--eval-metric", "loss",
             "--val-interval", 3, "--checkpoint-hist", 1, "--no-prefetcher")  # fmt: skip
    whole, printed = finished_run(tmp_path / "whole", *words, "--save-images", "--log-interval", 2, "--save-epochs", 1)
    assert printed.count("note: --no-prefetcher has no meaning here") == 1
    assert sorted(path.name for path in whole.glob("train-batch-*")) == ["train-batch-1.jpg", "train-batch-2.jpg"]
    kept = sorted(path.name[:11] for path in (whole / "checkpoints").iterdir())
    assert kept == ["epoch-00001", "epoch-00003"]
    part, printed = finished_run(tmp_path / "part", *words, "--stop-epoch", 2)
    assert len(summary(part)) == 2 and "epoch 2/2" in printed
    other = shutil.copytree(part, tmp_path / "other")
    assert "raise --stop-epoch" in train("--resume", part).stdout
    train("--resume", part, "--stop-epoch", 3)
    assert same(weights(part), weights(whole))
    assert [row["lr"] for row in summary(part)] == [row["lr"] for row in summary(whole)]
    train("--resume", other, "--stop-epoch", 3, "--no-resume-opt")
    assert not same(weights(other), weights(whole))
    assert yaml.safe_load((other / "args.yaml").read_text())["resume_opt"] is False
    late, _ = finished_run(tmp_path / "late", *words, "--start-epoch", 2)
    rates = [[(row["epoch"], row["lr"]) for row in rows] for rows in (summary(late), summary(whole)[2:])]
    assert rates[0] == rates[1]
    assert "a resumed run continues where it is" in train("--resume", part, "--start-epoch", 1, ok=False).stderr


def test_low_precision_weights_and_the_models_own_size(folder, tmp_path):
    """The size of --model-kwargs is that of the run; weights in bfloat16 train, resume to the same bits, and load."""
    words = (folder, "--model", "vit_tiny_patch16_224", "--model-kwargs", "img_size=(16,24)", "patch_size=8", "depth=3",
             "embed_dim=24", "num_heads=2", "--model-dtype", "bfloat16", "-b", 16, "-j", 0, "--epochs", 2, "--opt", "adamw",
             "--lr", 1e-3, "--model-ema", "--model-ema-decay", 0.5, "--model-ema-force-cpu",
             "--opt-kwargs", "betas=(0.9,0.99)")  # fmt: skip
    whole, _ = finished_run(tmp_path / "whole", *words)
    part, _ = finished_run(tmp_path / "part", *words, "--stop-epoch", 1)
    train("--resume", part, "--stop-epoch", 2)
    assert same(weights(part), weights(whole))
    model = timm.create_model(f"local-dir:{whole / 'model'}", pretrained=True)
    assert model.patch_embed.img_size == (16, 24) and model.pretrained_cfg["input_size"] == (3, 16, 24)


@pytest.mark.parametrize("patterns,count", [(["head.*", "patch_embed.*"], 4), ("head.*", 2)])
def test_patterns_of_the_fallback_optimizer_mean_the_models_own_names(patterns, count):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3)
    config = OptimConfig(opt="muon", opt_kwargs={"fallback_list": patterns})
    found = []
    for module in (model, SFRTask(model, input_size=(3, 32, 32), verbose=False).trainable_module):
        groups = create_optimizer(config, module, 0.1).param_groups
        found.append(sum(len(group["params"]) for group in groups if group.get("use_fallback")))
    assert found == [count, count]


def test_a_rate_of_0_is_the_base_rate_as_in_timm():
    assert learning_rate(OptimConfig(lr=0.0), 256) == learning_rate(OptimConfig(), 256) > 0


def test_a_file_of_an_older_timm_works_and_what_it_asks_for_is_refused():
    old = {"bn_tf": False, "num_gpu": 1, "validation_batch_size_multiplier": 1, "mixup_elem": False, "lr": 0.1}
    assert translate(old) == ({"lr": 0.1}, [])
    with pytest.raises(UserError, match=r"--bn-tf: .*--bn-momentum 0\.01"):
        translate({"bn_tf": True})


@pytest.mark.parametrize("name", ["lr", "clip_grad", "epoch_repeats"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_is_finite(name, value):
    with pytest.raises(UserError, match=f"{name}: expected a finite number; got {value}"):
        RunConfig.from_flat(translate({name: value})[0])


def test_a_batch_is_mixed_before_it_is_erased_as_in_timms_loader():
    images, target = torch.ones(4, 1, 2, 2), torch.arange(4)
    erase = lambda x: x * torch.tensor([[1.0, 0.0], [1.0, 1.0]])  # noqa: E731
    mixed, soft = augment(images, target, erase, lambda x, y: (x * 0.5 + x.flip(0) * 0.5, y), channels_last=True)
    assert mixed.unique().tolist() == [0, 1] and soft is target


def test_what_timm_cannot_make_is_said_by_its_option():
    module = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="opt: 'adahessian' needs second derivatives"):
        create_optimizer(OptimConfig(opt="adahessian"), module, 0.1)
    with pytest.raises(UserError, match=r"opt: timm cannot make the optimizer 'sdg': .*; did you mean .*'sgd'"):
        create_optimizer(OptimConfig(opt="sdg"), module, 0.1)
    with pytest.raises(UserError, match=r"unexpected keyword argument 'foaster'$"):
        create_optimizer(OptimConfig(opt="sgd", opt_kwargs={"foaster": 1}), module, 0.1)
    prep = Preprocessing((3, 16, 16), (0.5,) * 3, (0.25,) * 3, "bilinear", 1.0)
    with pytest.raises(UserError, match=r"train_interpolation: expected random, nearest, .*; got 'foo'"):
        prep.train_transform(AugConfig(train_interpolation="foo"))
    with pytest.raises(UserError, match="aa: timm cannot make the training transform"):
        prep.train_transform(AugConfig(aa="foo"))


def test_a_resumed_run_takes_the_factors_of_its_own_options():
    model = timm.create_model("resnet20_cifar")
    before, now = (create_optimizer(OptimConfig(layer_decay=decay), model, 0.1) for decay in (0.9, 0.5))
    wanted = [group["lr_scale"] for group in now.param_groups]
    learner = SimpleNamespace(
        optimizer=now, config=RunConfig.from_flat({"data_dir": "x"}), accelerator=SimpleNamespace(scaler=None)
    )
    _load_optimizer(learner, {"optimizer": before.state_dict()}, True)
    assert [group["lr_scale"] for group in now.param_groups] == wanted and min(wanted) < 0.01


def test_the_tag_and_the_licence_of_the_weights():
    def resolved(sfr=True, **options):
        model = SimpleNamespace(pretrained_cfg={"license": "mit"})
        hub = resolve_hub(RunConfig.from_flat({"data_dir": "my/Pets", "model": "resnet18", **options}), model, sfr=sfr)
        return hub.tag, hub.license

    assert resolved() == ("sfr_pets", "apache-2.0") and resolved(sfr=False) == ("pets", "apache-2.0")
    assert resolved(pretrained=True) == ("sfr_pets", "mit")
    assert resolved(initial_checkpoint="a.pth") == ("sfr_pets", None)
    assert resolved(pretrained=True, initial_checkpoint="a.pth") == ("sfr_pets", None)  # of other weights than timm's


def test_synchronised_batchnorm_needs_gpus():
    config, task = RunConfig.from_flat({"data_dir": "x", "sync_bn": True}), SimpleNamespace(trainable_module=torch.nn.Identity())
    cpus = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    with pytest.raises(UserError, match="sync-bn: expected GPUs"):
        _optimisation(config, cpus, task, 3, 8)


def test_the_rate_of_a_run_is_that_before_the_factors_of_the_layers():
    optimizer = create_optimizer(OptimConfig(layer_decay=0.5), timm.create_model("resnet20_cifar"), 0.1)
    create_schedule(OptimConfig(epochs=3, warmup_epochs=0), optimizer, 4).resume(0, 1, None)
    assert optimizer.param_groups[0]["lr"] < 0.01 and 0.09 < base_rate(optimizer.param_groups) < 0.1
