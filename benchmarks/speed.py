"""What SFR adds to a training step on this machine: time, memory, graph breaks, synchronisations; into a CSV and a page.

    python -m benchmarks.speed

Ratios are of medians of rounds in which both sides take turns (A B A B) in one process; memory is the peak of one process each.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import timm
import torch
from torch import Tensor, nn

from benchmarks.timing import in_turns, ratios
from timm_sfr import SFRConfig, SFRTask, report

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "speed.csv"


@dataclass(frozen=True)
class Setting:
    """One training step to time.

    Attributes:
        model: timm's name.
        size: Image size, pixels.
        batch: Images a step.
        bf16: Under autocast to bfloat16.
        compiled: By torch.compile.
        target: The ratio that it should not pass.
    """

    model: str
    size: int
    batch: int
    bf16: bool = False
    compiled: bool = False
    target: float = 1.02

    @property
    def label(self) -> str:
        """What a table calls it."""
        extra = f"{', bf16' * self.bf16}{', compiled' * self.compiled}"
        return f"{self.model}, {self.size} px, batch {self.batch}{extra}"


CPU = (Setting("resnet18_cifar", 32, 128), Setting("resnet20_cifar", 32, 128, target=1.08))
GPU = (
    Setting("resnet50", 224, 256, bf16=True, compiled=True),
    Setting("vit_small_patch16_224", 224, 256, bf16=True),
    Setting("resnet18_cifar", 32, 128, bf16=True),
    Setting("resnet20_cifar", 32, 128, bf16=True, target=1.08),
)


@dataclass(frozen=True)
class Ratio:
    """Median of the rounds' ratios, and their quartiles."""

    what: str
    ratio: float
    low: float
    high: float
    target: float
    seconds: float  # of the plain side
    rounds: int


def make_step(setting: Setting, sfr: SFRConfig | None, device: torch.device) -> Callable[[], None]:
    """One optimizer step on fixed images: with SFR, or plain label smoothing where `sfr` is None."""
    torch.manual_seed(0)
    model = timm.create_model(setting.model, num_classes=100)
    size = (3, setting.size, setting.size)
    images = torch.randn(setting.batch, *size, device=device)
    target = torch.randint(0, 100, (setting.batch,), device=device)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    if sfr is None:
        module: nn.Module = model.to(device).train()
    else:
        task = SFRTask(model, sfr, input_size=size, device=device, verbose=False)
        task.train()
        module = task.trainable_module
    if setting.compiled and sfr is not None:
        task.compile()
    elif setting.compiled:
        module = torch.compile(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=setting.bf16):
            loss: Tensor = criterion(module(images), target) if sfr is None else task(images, target)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(step: Callable[[], None], steps: int, device: torch.device) -> float:
    """Seconds a step."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / steps


def step_ratios(
    settings: tuple[Setting, ...], config: SFRConfig, args: argparse.Namespace, device: torch.device
) -> list[Ratio]:
    """A row for every setting."""
    found = []
    for setting in settings:
        plain, ours = make_step(setting, None, device), make_step(setting, config, device)
        once = timed(plain, 2, device)
        steps = max(1, round(args.seconds / once))
        timed(ours, 3, device)
        without, with_sfr = (partial(timed, step, steps, device) for step in (plain, ours))
        times, around, base = in_turns(without, {"sfr": with_sfr}, args.rounds, setting.label)
        middle, low, high = ratios(times, around)["sfr"]
        found.append(Ratio(f"step, {setting.label}", middle, low, high, setting.target, median(base), args.rounds))
        print(found[-1], flush=True)
    return found


def peak(setting: Setting, sfr: bool, device: str) -> float:
    """Peak memory of a process that takes five steps, MiB."""
    code = (
        "import torch, resource; from benchmarks.speed import Setting, make_step, peak_now; from timm_sfr import SFRConfig;"
        f"step = make_step({setting!r}, SFRConfig() if {sfr} else None, torch.device({device!r}));"
        "[step() for _ in range(5)]; print(peak_now())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HERE.parent)
    return float(done.stdout.split()[-1])


def peak_now() -> float:
    """Peak memory so far, MiB: allocated on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # rusage's peak is inherited from the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def memory_ratios(settings: tuple[Setting, ...], device: torch.device) -> list[Ratio]:
    """Peak memory with SFR against without."""
    found = []
    for setting in settings:
        low, middle, high = sorted(
            peak(setting, True, device.type) / peak(setting, False, device.type) for _ in range(3)
        )
        found.append(Ratio(f"peak memory, {setting.label}", middle, low, high, 1.03, 0.0, 3))
        print(found[-1], flush=True)
    return found


def graph_breaks(name: str, size: int) -> int:
    """Graph breaks of forward with taps and of the feature loss, beyond those of the plain model."""

    def count(function: Callable, *inputs: object) -> int:
        torch._dynamo.reset()
        return torch._dynamo.explain(function)(*inputs).graph_break_count

    task = SFRTask(timm.create_model(name), input_size=(3, size, size), verbose=False)
    images = torch.randn(2, 3, size, size)
    _, nodes = task.trainable_module(images)
    nodes = [node.detach() for node in nodes]
    extra = count(task.trainable_module, images) - count(task.plain_model, images)
    return extra + count(task.feature_loss, nodes[:-1], nodes[-1])


def syncs(setting: Setting) -> int:
    """Warnings of torch's sync debug mode in a step with SFR beyond those without; on a GPU only."""
    import warnings

    def count(sfr: SFRConfig | None) -> int:
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

    return count(SFRConfig()) - count(None)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--matching", default="gaussian", choices=("gaussian", "emd", "grid"))
    parser.add_argument("--models", nargs="+", help="only these")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = tuple(
        one for one in (GPU if device.type == "cuda" else CPU) if not args.models or one.model in args.models
    )
    config = SFRConfig(matching=args.matching)
    rows = step_ratios(settings, config, args, device)
    rows += [] if args.no_memory else memory_ratios(settings, device)
    breaks = {one.model: graph_breaks(one.model, one.size) for one in settings}
    print("graph breaks added:", breaks)
    if device.type == "cuda":
        print("synchronisations added:", {one.model: syncs(one) for one in settings if not one.compiled})
    about = {
        "matching": args.matching,
        "hardware": report.hardware(device, 1),
        "threads": args.threads,
        "versions": json.dumps(report.versions()),
        "date": time.strftime("%Y-%m-%d"),
    }
    fresh = [{**asdict(row), **about} for row in rows]
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    with args.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(fresh[0]))
        writer.writeheader()
        writer.writerows(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
