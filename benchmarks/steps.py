"""Measures one training step with and without SFR: time, peak memory, graph breaks, synchronisations, operations."""

from __future__ import annotations

import resource
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import timm
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.accuracy import HERE
from benchmarks.measured import Row, ratio_row, timed
from timm_sfr import SFRConfig, SFRTask
from timm_sfr.training.devices import keep_freed_blocks


@dataclass(frozen=True)
class Setting:
    """One training step to time.

    Attributes:
        model: The model's name in timm.
        size: Image size, pixels.
        batch: Images per step.
        bf16: Whether the step runs under autocast to bfloat16.
        compiled: Whether the model is compiled by `torch.compile`.
        target: The highest accepted ratio of the times.
        matching: How features are matched.
        solver: The solver of `emd`'s transport problems.
    """

    model: str
    size: int
    batch: int
    bf16: bool = False
    compiled: bool = False
    target: float = 1.02
    matching: str = SFRConfig().matching
    solver: str = SFRConfig().solver

    @property
    def label(self) -> str:
        """The setting's name in tables."""
        more = ", bf16" * self.bf16 + ", compiled" * self.compiled
        more += f", --sfr-matching {self.matching}" * (self.matching != SFRConfig().matching)
        more += f" --sfr-solver {self.solver}" * (self.solver != SFRConfig().solver)
        return f"{self.model}, {self.size} px, batch {self.batch}{more}"

    @property
    def sfr(self) -> SFRConfig:
        """SFR's options: the defaults, except for the matching and its solver."""
        return SFRConfig(matching=self.matching, solver=self.solver)


CPU = (
    Setting("resnet18_cifar", 32, 128),
    Setting("resnet20_cifar", 32, 128, target=1.08),
    Setting("resnet20_cifar", 32, 128, target=1.08, matching="emd"),
)
GPU = (
    Setting("resnet50", 224, 256, bf16=True, compiled=True),
    Setting("vit_small_patch16_224", 224, 256, bf16=True),
    Setting("resnet18_cifar", 32, 128, bf16=True),
    Setting("resnet20_cifar", 32, 128, bf16=True, target=1.08),
    Setting("resnet20_cifar", 32, 128, bf16=True, target=1.08, matching="emd"),
    Setting("resnet20_cifar", 32, 128, bf16=True, target=1.08, matching="emd", solver="triton"),
)


def make_step(setting: Setting, sfr: bool, device: torch.device) -> Callable[[], None]:
    """Returns a function that takes one optimizer step on fixed images, with SFR or with plain label smoothing.

    On the CPU, the memory allocator is set as in the trainer.
    """
    if device.type == "cpu":
        keep_freed_blocks()
    torch.manual_seed(0)
    model = timm.create_model(setting.model, num_classes=100)
    size = (3, setting.size, setting.size)
    images = torch.randn(setting.batch, *size, device=device)
    target = torch.randint(0, 100, (setting.batch,), device=device)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    if sfr:
        task = SFRTask(model, setting.sfr, input_size=size, device=device, verbose=False)
        task.train()
        module = task.trainable_module
        if setting.compiled:
            task.compile()
    else:
        module = model.to(device).train()
        if setting.compiled:
            module = torch.compile(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=setting.bf16):
            loss: Tensor = task(images, target)["loss"] if sfr else criterion(module(images), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_rows(settings: tuple[Setting, ...], device: torch.device, rounds: int, seconds: float) -> list[Row]:
    """Divides the time with SFR by the time without, in turns of about `seconds`."""
    rows = []
    for setting in settings:
        plain, ours = make_step(setting, False, device), make_step(setting, True, device)
        timed(plain, 3), timed(ours, 3)
        times = max(1, round(seconds / timed(plain, 2)))
        what = f"step, {setting.label}"
        rows.append(ratio_row("step", what, plain, ours, rounds, times=times, target=setting.target))
    # Two identical sides show the noise of the measurement.
    first, second = (make_step(settings[-1], False, device) for _ in range(2))
    timed(first, 3), timed(second, 3)
    rows.append(ratio_row("step", f"plain over plain, {settings[-1].model}", first, second, rounds, times=times))
    return rows


def memory_rows(settings: tuple[Setting, ...], device: torch.device, repeats: int = 5) -> list[Row]:
    """Divides the peak memory of five steps with SFR by that without, each in its own process."""
    rows = []
    for setting in settings:
        pairs = [(peak(setting, False, device.type), peak(setting, True, device.type)) for _ in range(repeats)]
        each = sorted(ours / plain for plain, ours in pairs)
        plain, ours = (median(side) for side in zip(*pairs, strict=True))
        note = f"{plain:,.0f} MiB against {ours:,.0f} MiB, {repeats} processes each"
        what = f"peak memory, {setting.label}"
        rows.append(Row("memory", what, each[repeats // 2], each[repeats // 4], each[-1 - repeats // 4], 1.03, False, note))
        print(rows[-1], flush=True)
    return rows


def peak(setting: Setting, sfr: bool, device: str) -> float:
    """Returns the peak memory of a process that takes five steps, in MiB."""
    code = (
        "import torch; from benchmarks.steps import Setting, make_step, peak_now;"
        f"step = make_step({setting!r}, {sfr}, torch.device({device!r})); [step() for _ in range(5)]; print(peak_now())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HERE.parent)
    return float(done.stdout.split()[-1])


def peak_now() -> float:
    """Returns the peak memory of this process in MiB: allocated GPU memory if there is a GPU, otherwise resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # unlike rusage's peak, it is not inherited from the parent process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def graph_rows(settings: tuple[Setting, ...]) -> list[Row]:
    """Counts the graph breaks and, on a GPU, the synchronisations that SFR adds to a step."""
    rows = []
    for setting in settings:
        extra = graph_breaks(setting)
        rows.append(Row("graph", f"graph breaks added, {setting.label}", extra, extra, extra, 0))
        if torch.cuda.is_available() and not setting.compiled:
            extra = syncs(setting, True) - syncs(setting, False)
            rows.append(Row("graph", f"synchronisations added, {setting.label}", extra, extra, extra, 0))
        print(rows[-1], flush=True)
    return rows


def graph_breaks(setting: Setting) -> int:
    """Returns the graph breaks of the forward pass with taps and of the feature loss, minus those of the plain model."""

    def count(function: Callable, *inputs: object) -> int:
        torch._dynamo.reset()
        return torch._dynamo.explain(function)(*inputs).graph_break_count

    size = (3, setting.size, setting.size)
    task = SFRTask(timm.create_model(setting.model), setting.sfr, input_size=size, verbose=False)
    images = torch.randn(2, *size)
    _, nodes = task.trainable_module(images)
    nodes = [node.detach() for node in nodes]
    extra = count(task.trainable_module, images) - count(task.plain_model, images)
    return extra + count(task.feature_loss, nodes[:-1], nodes[-1])


def syncs(setting: Setting, sfr: bool) -> int:
    """Returns the number of synchronisations in a step, from torch's sync debug mode; needs a GPU."""
    step = make_step(setting, sfr, torch.device("cuda"))
    step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in caught)


def profile_rows(setting: Setting, device: torch.device, count: int = 8, steps: int = 5) -> list[Row]:
    """Returns the operations whose time grows most when SFR is added, in milliseconds per step, and the total."""
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    totals: list[dict[str, float]] = []
    for sfr in (False, True):
        step = make_step(setting, sfr, device)
        timed(step, 3)
        with profile(activities=[activity]) as profiled:
            timed(step, steps)
        name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        totals.append({one.key: getattr(one, name) / 1e3 / steps for one in profiled.key_averages()})
    plain, ours = totals
    extra = {key: ours.get(key, 0.0) - plain.get(key, 0.0) for key in ours}
    rows = []
    for key in sorted(extra, key=lambda key: -extra[key])[:count]:
        note = f"{plain.get(key, 0.0):.2f} ms against {ours[key]:.2f} ms"
        rows.append(Row("profile", f"{key} ({setting.label})", extra[key], extra[key], extra[key], None, False, note))
    total = Row("profile", f"all operations ({setting.label})", *[sum(ours.values()) - sum(plain.values())] * 3,
                note=f"{sum(plain.values()):.1f} ms against {sum(ours.values()):.1f} ms")  # fmt: skip
    return [*rows, total]
