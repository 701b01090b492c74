"""The comparison's table and plots, made from its CSV.

    python -m benchmarks.table

writes the tables into ``docs/results.md`` between its markers, and a plot a set beside it.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from benchmarks import timing
from benchmarks.accuracy import HERE, RESULTS, read
from benchmarks.pages import fill, labels
from benchmarks.presets import PRESETS
from timm_sfr.cli.compare import FEWEST, spread
from timm_sfr.cli.compare import half_interval as interval

DOCS = HERE.parent / "docs"
BASES = ("ce", "ls")  # what differences are to
HEAD = (
    "method", "seeds", "top-1, last epoch", "95 % interval", "difference to ce", "to ls", "(top-1, best epoch)", "top-5",
    "NLL", "ECE", "time / ce", "extra parameters",
)  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """One method's runs: rows by seed."""

    method: str
    epochs: int
    rows: dict[int, dict[str, str]]

    def values(self, column: str) -> list[float]:
        """One column over the seeds."""
        return [float(row[column]) for _, row in sorted(self.rows.items())]


def paired(a: Summary, b: Summary, column: str) -> list[tuple[float, float]]:
    """The values of both at the seeds that both have."""
    return [(float(a.rows[s][column]), float(b.rows[s][column])) for s in sorted(a.rows.keys() & b.rows.keys())]


def summaries(rows: Iterable[dict[str, str]]) -> list[Summary]:
    """The runs of one set by method and length, best mean first."""
    found: dict[tuple[str, int], dict[int, dict[str, str]]] = {}
    for row in rows:
        found.setdefault((row["method"], int(row["epochs"])), {})[int(row["seed"])] = row
    made = [Summary(*key, by_seed) for key, by_seed in found.items()]
    return sorted(made, key=lambda one: -mean(one.values("top1")))


def name(one: Summary, usual: int) -> str:
    """The method, with its epochs where they are not the table's."""
    return one.method if one.epochs == usual else f"{one.method}, {one.epochs} epochs"


def gain(one: Summary, base: Summary | None) -> str:
    """The difference in top-1 to `base` at the same length, paired by seed, with their number where not all seeds are
    in both; empty where there is none.
    """
    gains = [a - b for a, b in paired(one, base, "top1")] if base is not None and one is not base else []
    part = f" ({len(gains)})" if len(gains) < len(one.rows) else ""  # then the means differ by something else
    return spread(gains, 2, "+") + part if gains else ""


def usual_epochs(found: list[Summary]) -> int:
    """The length that most methods ran for."""
    lengths = [one.epochs for one in found]
    return max(set(lengths), key=lengths.count)


def find(found: list[Summary], method: str, epochs: int) -> Summary | None:
    """The method at that length."""
    return next((one for one in found if (one.method, one.epochs) == (method, epochs)), None)


def relative_time(one: Summary, ratios: dict[str, float], usual: int) -> str:
    """Training time against `ce` at the usual length, from the timings; empty where the method was not timed."""
    ratio = 1.0 if one.method == "ce" else ratios.get(one.method)
    return "" if ratio is None else f"{ratio * one.epochs / usual:.2f}"


def table(found: list[Summary], ratios: dict[str, float]) -> str:
    """A Markdown table of one set, best mean first; `ratios` are the methods' times a batch against `ce`."""
    usual = usual_epochs(found)
    lines = [" | ".join(HEAD), " | ".join(["---"] + ["---:"] * (len(HEAD) - 1))]
    for one in found:
        top1 = one.values("top1")
        half, middle = interval(top1), mean(top1)
        cells = [
            name(one, usual),
            str(len(top1)),
            f"{middle:.2f}" + (f" (sd {stdev(top1):.2f})" if len(top1) > 1 else ""),
            f"{middle - half:.2f} to {middle + half:.2f}" if len(top1) >= FEWEST else "",
            *(gain(one, find(found, base, one.epochs)) for base in BASES),
            f"({mean(one.values('best_top1')):.2f})",
            f"{mean(one.values('top5')):.2f}",
            f"{mean(one.values('nll')):.3f}",
            f"{100 * mean(one.values('ece')):.1f} %",
            relative_time(one, ratios, usual),
            f"{int(float(one.rows[min(one.rows)]['extra_parameters'])):,}",
        ]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def timings(clock: list[dict[str, str]], preset: str, name: str) -> list[dict[str, str]]:
    """The timings on a set, or on one of its preset with the same network at the same size and batch."""

    def kind(other: str) -> tuple:
        one = PRESETS.get(preset, {}).get(other)
        return () if one is None else (one.model, one.net, one.pixels, one.batch, one.precision, one.more)

    own = [row for row in clock if (row["preset"], row["set"]) == (preset, name)]
    like = [row for row in clock if row["preset"] == preset and kind(row["set"]) == kind(name) != ()]
    return own or [row for row in like if row["set"] == like[0]["set"]]


def caption(rows: list[dict[str, str]], times: list[dict[str, str]]) -> str:
    """What the runs of a set have in common, on what they ran, and how their times were taken."""
    first = rows[0]
    pending = " + is code that was not committed yet." if any(row["commit"].endswith("+") for row in rows) else ""
    many = {key: sorted({row[key] for row in rows}) for key in ("hardware", "commit", "versions")}
    versions = "; ".join(re.sub(r'[{}"]', "", text) for text in many["versions"])
    return (
        f"{first['images']} training images a run and epoch at {first['pixels']} px, {first['model']}; ± is half the width of "
        "the 95 % t-interval; differences are paired by seed, over as many seeds as stand in brackets where not over all. "
        f"{', '.join(many['hardware'])}; {versions}; commits {', '.join(many['commit'])}.{pending}" + _timed(times)
    )


def _timed(times: list[dict[str, str]]) -> str:
    if not times:
        return ""
    one = times[0]
    sittings = sorted({(row["rounds"], row["batches"], row["ce_images_per_second"]) for row in times})
    rounds = " or ".join(f"{rounds} rounds of {batches} batches" for rounds, batches, _ in sittings)
    rates = " or ".join(rate for *_, rate in sittings)
    return (
        f" Time is the median of {rounds} on {one['set']}, each between two of `ce` ({rates} images/s, {one['hardware']}, "
        f"{one['threads']} thread(s)), times the epochs."
    )


def by_table(rows: Iterable[dict[str, str]]) -> dict[tuple[str, str, str], list[dict[str, str]]]:
    """The rows of each table by (preset, set, split).

    SFR with a part left out (``sfr:OPTION=VALUE``) has tables of its own on val, ``parts``, beside SFR and cross-entropy.
    """
    found: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in rows:
        part = row["split"] == "val" and row["method"].startswith("sfr:")
        found.setdefault(("parts" if part else row["preset"], row["set"], row["split"]), []).append(row)
    for (preset, name, split), chosen in list(found.items()):
        if preset == "parts":
            whole = found.get((chosen[0]["preset"], name, split), [])
            chosen += [row for row in whole if row["method"] in ("sfr", "ce")]
    return found


def plot(found: list[Summary], title: str, axis: str, path: Path) -> None:
    """Top-1 at the last epoch, mean and 95 % interval, the seeds as dots."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "timm_sfr"  # the same figure from the same CSV
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text: a tenth of the size
    from matplotlib import pyplot as plt

    usual, ordered = usual_epochs(found), found[::-1]
    labels = [name(one, usual) for one in ordered]
    size = (4.5 + 0.075 * max(map(len, labels)), 0.8 + 0.26 * len(ordered))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    for place, one in enumerate(ordered):
        top1 = one.values("top1")
        colour = "tab:red" if one.method.startswith("sfr") else "tab:blue" if one.method in BASES else "0.4"
        axes.scatter(top1, [place] * len(top1), s=6, color=colour, alpha=0.4, linewidths=0)
        half = interval(top1) if len(top1) >= FEWEST else 0.0
        axes.errorbar(mean(top1), place, xerr=half, fmt="o", color=colour, markersize=4, capsize=2)
    axes.set_yticks(range(len(ordered)), labels)
    axes.set_xlabel(axis)
    axes.set_title(title)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Renews the document and the plots; the exit status."""
    from timm_sfr.cli.parser import fail

    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--csv", type=Path, nargs="+", default=[RESULTS, RESULTS.with_name("heldout.csv")])
    parser.add_argument("--timing", type=Path, default=timing.RESULTS)
    parser.add_argument("--document", type=Path, default=DOCS / "results.md")
    args = parser.parse_args(arguments)
    for option, path in [("csv", path) for path in args.csv] + [("document", args.document)]:
        if not path.is_file():
            return fail(f"{option}: there is no file {path}")
    text = args.document.read_text()
    rows, clock = [row for path in args.csv for row in read(path)], read(args.timing)
    placed = by_table(rows)
    for kind, chosen in sorted(placed.items()):
        label = "-".join(kind)
        found = summaries(chosen)
        picture = args.document.parent / f"results-{label}.svg"
        split = {"heldout": "held-out images", "val-part2": "val, trained on part 2,"}.get(kind[2], kind[2])
        plot(found, f"{kind[1]} ({kind[0]} preset)", f"top-1 on {split} at the last epoch, %", picture)
        times = timings(clock, chosen[0]["preset"], kind[1])
        ratios = {row["method"]: float(row["ratio"]) for row in times}
        body = f"{table(found, ratios)}\n\n{caption(chosen, times)}\n\n![top-1 by method]({picture.name})\n"
        text = fill(text, label, body)
    made = {"-".join(kind) for kind in placed}
    for label in sorted(labels(text) - made):
        print(f"warning: {args.document} has a table {label} that no run is behind; take it out", file=sys.stderr)
    args.document.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
