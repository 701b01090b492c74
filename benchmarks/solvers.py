"""Compares transport solvers, ours and those of libraries: the cost of their plans above the optimum, and their time.

    python -m benchmarks.solvers --images DIR

All settings of every solver are tried on 256 problems of 49 x 49. At every size, our default then takes turns (A B A B) with the
fastest setting of each library that has a mean gap of at most 1 %. Before the cost of a plan is computed, the plan is rounded
onto the marginals, because a plan that misses them could cost less than the optimum. The rounding is not timed. The results are
written to results/solvers.csv and to the tables and the plot of docs/performance.md. Without --images, only random features are
used. geomloss is optional (pip install --no-deps geomloss).
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.accuracy import HERE, commit, positive, read
from benchmarks.features import random_costs, real_costs
from benchmarks.libraries import OURS, Solve, candidates
from benchmarks.measured import timed
from benchmarks.pages import fill, markdown
from benchmarks.timing import in_turns, ratios
from timm_sfr.method.sinkhorn import round_plan, uniform_marginals
from timm_sfr.method.transport import exact
from timm_sfr.runs.records import hardware, versions
from timm_sfr.utils.errors import UserError

RESULTS = HERE / "results" / "solvers.csv"
DOCUMENT = HERE.parent / "docs" / "performance.md"
SWEPT = (256, 49)
SIZES = [(batch, nodes) for nodes in (16, 49, 64, 196) for batch in (64, 256, 1024)]
LIMIT = 1.0  # percent: the largest mean gap of a setting that is compared
SLOW = 5.0  # seconds per call: a slower solver is left out at that size


def seconds(solve: Solve, cost: Tensor) -> float:
    """Returns the time of one call."""
    return timed(partial(solve, cost))


def gaps(solve: Solve, costs: dict[str, Tensor], best: dict[str, Tensor]) -> Tensor:
    """Returns by how many percent the cost of the rounded plan exceeds the optimum, for every problem of all `costs`."""
    found = []
    for name, cost in costs.items():
        plan = round_plan(solve(cost).to(cost), *uniform_marginals(cost))
        found.append(100 * ((plan * cost).sum((1, 2)).cpu() / best[name] - 1))
    return torch.cat(found)


def optimum(cost: Tensor) -> Tensor:
    """Returns the exact optimal cost of every problem."""
    return (exact(cost, *uniform_marginals(cost)) * cost).sum((1, 2)).cpu()


@dataclass(frozen=True)
class Row:
    """The result of a solver with one setting at one size.

    `ratio`, `low` and `high` are the median and the quartiles, over the rounds, of its time divided by our default's time
    (None in the sweep).
    """

    kind: str  # sweep or size
    features: str
    batch: int
    nodes: int
    solver: str
    setting: str
    milliseconds: float
    ratio: float | None
    low: float | None
    high: float | None
    gap: float
    worst: float


def sweep(features: str, costs: dict[str, Tensor]) -> list[Row]:
    """Measures every setting of every solver: the gap on all `costs`, the time on the first."""
    best = {name: optimum(cost) for name, cost in costs.items()}
    first, rows = next(iter(costs.values())), []
    for solver, settings in candidates().items():
        for setting, solve in settings.items():
            solve(first)
            taken = median(seconds(solve, first) for _ in range(3))
            gap = gaps(solve, costs, best)
            rows.append(Row("sweep", features, *first.shape[:2], solver, setting, 1e3 * taken, None, None, None,
                            gap.mean().item(), gap.max().item()))  # fmt: skip
            print(f"{solver} {setting}: {1e3 * taken:.1f} ms, {rows[-1].gap:.2f} %", flush=True)
    return rows


def fastest(rows: list[Row]) -> dict[str, str]:
    """Returns the fastest setting of each other solver with a mean gap of at most `LIMIT`; omits a solver without one."""
    found: dict[str, Row] = {}
    for row in rows:
        best = found.get(row.solver)
        if row.solver != OURS and row.gap <= LIMIT and (best is None or row.milliseconds < best.milliseconds):
            found[row.solver] = row
    return {solver: row.setting for solver, row in found.items()}


def compare(features: str, costs: dict[str, Tensor], chosen: dict[str, str], rounds: int) -> list[Row]:
    """Measures our default and the chosen settings: the time in turns on the first of `costs`, the gaps on all."""
    known, first = candidates(), next(iter(costs.values()))
    best = {name: optimum(cost) for name, cost in costs.items()}
    mine = next(iter(known[OURS].values()))
    solvers = {name: known[name][setting] for name, setting in chosen.items()}
    seconds(mine, first)
    quick = {name: solve for name, solve in solvers.items() if seconds(solve, first) < SLOW}
    turns = {name: partial(seconds, solve, first) for name, solve in quick.items()}
    what = f"{features} {tuple(first.shape)}"
    times, around, own = in_turns(partial(seconds, mine, first), turns, rounds, what)
    rows = []
    shares = {OURS: (1.0, 1.0, 1.0), **ratios(times, around)}
    labels = {OURS: next(iter(known[OURS])), **chosen}
    for name, solve in {OURS: mine, **quick}.items():
        gap, taken = gaps(solve, costs, best), median(own if name == OURS else times[name])
        size = ("size", features, *first.shape[:2])
        rows.append(Row(*size, name, labels[name], 1e3 * taken, *shares[name], gap.mean().item(), gap.max().item()))
        print(
            f"  {name} {labels[name]}: {1e3 * taken:.1f} ms, {shares[name][0]:.2f} x ours, {rows[-1].gap:.2f} %",
            flush=True,
        )
    return rows


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Plots gap against time, one line per solver, through its settings that no other of its settings beats in both."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "timm_sfr"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for solver in dict.fromkeys(row["solver"] for row in rows):
        points = sorted((float(r["milliseconds"]), max(float(r["gap"]), 1e-3)) for r in rows if r["solver"] == solver)
        front = [point for index, point in enumerate(points) if all(point[1] < other[1] for other in points[:index])]
        axes.plot(*zip(*front, strict=True), marker="o", markersize=4, label=solver, lw=2 if solver == OURS else 1)
    axes.set(xscale="log", yscale="log", xlabel="milliseconds for 256 problems of 49 x 49",
             ylabel="mean gap to the optimum, %")  # fmt: skip
    axes.set_ylim(top=20)
    axes.axhline(1, color="grey", lw=0.8, ls=":")
    axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _number(row: dict[str, str], name: str) -> str:
    value = float(row[name])
    return f"{value:.3g}" if name == "milliseconds" else f"{value:.1f}" if name == "ratio" else f"{value:.2f}"


def write_page(rows: list[dict[str, str]], document: Path) -> None:
    """Updates the tables and the plot of the document."""
    text = document.read_text()
    sizes = [row for row in rows if row["kind"] == "size"]
    others = {row["solver"]: row["setting"] for row in sizes if row["solver"] != OURS}
    cells: dict[tuple[str, int, int], dict[str, dict[str, str]]] = {}
    for row in sizes:
        cells.setdefault((row["features"], int(row["nodes"]), int(row["batch"])), {})[row["solver"]] = row
    for kind in {row["features"] for row in sizes}:
        table = []
        for (features, nodes, batch), found in sorted(cells.items()):
            if features == kind:
                cell = [f"{_number(found[n], 'ratio')} x ({_number(found[n], 'gap')} %)" if n in found else "" for n in others]
                mine = found[OURS]
                gap = f"{_number(mine, 'gap')} % ({_number(mine, 'worst')} %)"
                table.append([f"{batch} of {nodes} x {nodes}", f"{_number(mine, 'milliseconds')} ms", gap, *cell])
        text = fill(text, f"solvers-{kind}", markdown(["problems", "ours", "its gap, mean (worst)", *others], table))
    listed = {
        f"{row['features']}: {row['solver']} ({row['setting']})" for row in sizes if row["solver"] != OURS and row["setting"]
    }
    about = f"Settings: {'; '.join(sorted(listed))}. `reg` is in units of the mean cost; then the number of iterations.\n"
    text = fill(text, "solvers-settings", about)
    document.write_text(text)
    swept = [row for row in rows if row["kind"] == "sweep"]
    features = "real" if any(row["features"] == "real" for row in swept) else "random"
    plot([row for row in swept if row["features"] == features], document.with_name("performance-solvers.svg"))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.solvers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder of .jpg files, at any depth, for real features")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--batches", type=positive, nargs="+", help="only these numbers of problems")
    parser.add_argument("--nodes", type=positive, nargs="+", help="only these numbers of nodes")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def costs(kind: str, batch: int, nodes: int) -> dict[str, Tensor]:
        found = {"": random_costs(batch, nodes)} if kind == "random" else real_costs(args.images, batch, nodes)
        return {name: cost.to(device) for name, cost in found.items()}

    about = {"hardware": hardware(device, 1), "threads": args.threads, "versions": json.dumps(versions()),
             "commit": commit(), "date": time.strftime("%Y-%m-%d")}  # fmt: skip

    def write(rows: list[Row]) -> None:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*(one.name for one in fields(Row)), *about])
            writer.writeheader()
            writer.writerows({**asdict(row), **about} for row in rows)

    kinds = ["real", "random"] if args.images else ["random"]
    try:
        with torch.no_grad():
            rows = sweep(kinds[0], costs(kinds[0], *SWEPT))
            chosen = fastest(rows)
            for kind in kinds:
                for batch, nodes in SIZES:
                    if batch in (args.batches or [batch]) and nodes in (args.nodes or [nodes]):
                        rows += compare(kind, costs(kind, batch, nodes), chosen, args.rounds)
                        write(rows)  # after each size, so that an interruption loses little
    except UserError as error:
        from timm_sfr.cli.parser import fail

        return fail(str(error))
    if args.document.is_file():
        write_page(read(args.csv), args.document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
