"""``--batch-size auto``: what fits is found by real steps, recorded as a number, and leaves no trace."""

import gc

import numpy as np
import pytest
import torch
import yaml
from conftest import COMMAND, ROOT, TORCHRUN, run, train
from safetensors.torch import load_file

from timm_sfr import RunConfig, UserError
from timm_sfr.cli.train import parse
from timm_sfr.method.task import SFRTask
from timm_sfr.training import batch_size
from timm_sfr.training import run as training
from timm_sfr.training.devices import explained

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."  # as torch words it, which Accelerate reads
CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"  # as torch words it


@pytest.fixture
def small(monkeypatch):
    """A device whose memory holds a step of 16 images, and the sizes that were tried on it."""
    tried, forward = [], SFRTask.forward

    def full(self, images, target):
        tried.append(len(images))
        result = forward(self, images, target)  # statistics and sums have changed when the memory is full
        if len(images) > 16:
            raise torch.OutOfMemoryError(FULL)
        return result

    monkeypatch.setattr(SFRTask, "forward", full)
    monkeypatch.setattr(training, "MOST", 64)
    monkeypatch.setattr(training, "has_own_memory", lambda device: True)
    yield tried
    gc.collect()


def test_a_run_is_the_same_as_with_the_number(small, tmp_path):
    """Bit for bit: weights, statistics, class table, random numbers; the rate scales with the size that was found."""
    words = ("--epochs", 1, "--model-ema", "--mixup", 0.2, "--output", tmp_path)
    done = train("--batch-size", "auto", "--experiment", "auto", *words)
    assert small[:4] == [64, 32, 16, 16] and set(small[4:]) == {16}
    assert done.stdout.count("batch size 16: the largest power of two whose training step fits") == 1
    train("--batch-size", 16, "--experiment", "given", *words)
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("auto", "given"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    options = [yaml.safe_load((tmp_path / name / "args.yaml").read_text()) for name in ("auto", "given")]
    assert options[0]["batch_size"] == 16 and options[0]["validation_batch_size"] == 16
    assert {**options[0], "experiment": ""} == {**options[1], "experiment": ""}
    # A resume keeps the number, and finds the run although the word is not in its options.
    for resume in (str(tmp_path / "auto"), "auto"):
        config, found = parse(["--resume", resume, "-b", "auto", "--experiment", "auto", *map(str, words)])
        assert config.data.batch_size == 16 and found == tmp_path / "auto"


def test_the_rate_is_for_the_size_that_was_found(small, tmp_path):
    config = RunConfig.from_flat({"lr": None, "lr_base": 0.1, "batch_size": "auto", "grad_accum_steps": 2})
    learner, _, _ = training.assemble(config, training.start(config))
    assert learner.config.optim.lr == pytest.approx(0.1 * 32 / 256) and learner.batches.sampler.batch_size == 16


def test_weights_of_16_bits_are_probed_as_they_are_trained(small):
    config = RunConfig.from_flat({"batch_size": "auto", "model_dtype": "bfloat16", "train_img_sizes": (16, 24)})
    learner, _, _ = training.assemble(config, training.start(config))
    assert learner.config.data.batch_size == 16 and next(learner.module.parameters()).dtype == torch.bfloat16


def test_nothing_is_left_of_a_probe_that_fails():
    """Parameters, buffers, gradients and random numbers are as before."""
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Dropout())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    torch.manual_seed(3), np.random.seed(3)
    expected = torch.rand(2), np.random.rand()
    torch.manual_seed(3), np.random.seed(3)
    with pytest.raises(RuntimeError, match="of another kind"), batch_size.undone(module):
        module(torch.randn(8, 3, 4, 4) + np.random.rand()).sum().backward()
        torch.optim.SGD(module.parameters(), lr=1.0).step()
        assert not torch.equal(module[1].running_mean, before["1.running_mean"])
        raise RuntimeError("of another kind")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.equal(torch.rand(2), expected[0]) and np.random.rand() == expected[1]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(FULL), RuntimeError(CUBLAS)], ids=["torch", "cublas"])
@pytest.mark.parametrize("most,room", [(1000, 1), (1000, 63), (64, 64), (1, 5), (4096, 4096)])
def test_the_largest_power_of_two_that_fits(most, room, error):
    def step(size):
        if size > room:
            raise error

    found = batch_size.largest(step, most)
    assert found <= room and found.bit_count() == 1 and (2 * found > room or 2 * found > most)


def test_what_does_not_fit_at_all_and_other_errors():
    def step(size):
        raise torch.OutOfMemoryError(FULL)

    with pytest.raises(UserError, match="not even one image fits"):
        batch_size.largest(step, 64)

    def wrong(size):
        raise RuntimeError("of another kind")

    with pytest.raises(RuntimeError, match="of another kind"):
        batch_size.largest(wrong, 64)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(FULL), RuntimeError(CUBLAS)], ids=["torch", "cublas"])
def test_a_run_whose_memory_is_full_says_what_to_lower(error):
    told = str(explained(error, "nothing was begun"))
    assert told.startswith("out of memory: CUDA ") and "lower --batch-size" in told


def test_on_a_cpu_it_is_the_default():
    config = RunConfig.from_flat({"batch_size": "auto"})
    learner, _, said = training.assemble(config, training.start(config))
    assert learner.config.data.batch_size == 128
    assert said == "batch size 128, the default; --batch-size auto probes the memory of GPUs, not that of the CPU"


def test_other_words_and_other_commands():
    with pytest.raises(UserError, match="batch_size: expected a number or auto; got 'x'"):
        parse(["-b", "x"])
    with pytest.raises(UserError, match="batch_size: expected at least 1; got 0"):
        parse(["-b", "0"])
    done = run(*COMMAND, "taps", "resnet20_cifar", "--img-size", 32, "-b", "auto")
    assert done.returncode == 2 and "batch-size: auto is for training on data with an index" in done.stderr


TWO = """
from accelerate import Accelerator
import torch
from timm_sfr import RunConfig, SFRTask
from timm_sfr.training.batch_size import probe_batch
import timm
accelerator = Accelerator(cpu=True)
room = (32, 8)[accelerator.process_index]
task = SFRTask(timm.create_model("resnet20_cifar", num_classes=10), input_size=(3, 16, 16), verbose=False)
def batch(size):
    if size > room:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")
    return torch.randn(size, 3, 16, 16), torch.randint(10, (size,))
found = probe_batch(RunConfig.from_flat({}), accelerator, task, batch, 64)
print(f"<{found}>")
accelerator.end_training()
"""


@pytest.mark.slow
def test_processes_agree_on_the_smallest(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    done = run(*TORCHRUN, tmp_path / "two.py", OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    assert done.returncode == 0 and done.stdout.count("<8>") == 2, done.stderr
