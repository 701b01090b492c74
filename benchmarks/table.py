"""Makes the tables and plots of docs/results.md from the CSVs of the comparison.

    python -m benchmarks.table

It writes each table between its markers in ``docs/results.md``, and one plot per table in the same folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from benchmarks import timing
from benchmarks.accuracy import HERE, RESULTS, read
from benchmarks.overview import OVERVIEWS, overview
from benchmarks.pages import fill, labels
from benchmarks.presets import PRESETS
from timm_sfr.cli.compare import FEWEST, spread
from timm_sfr.cli.compare import half_interval as interval

DOCS = HERE.parent / "docs"
BASES = ("ce", "ls")  # the methods that the others are compared with
HEAD = (
    "method", "seeds", "top-1, last epoch", "95 % interval", "difference to ce", "to ls", "(top-1, best epoch)", "top-5",
    "NLL", "ECE", "time / ce", "extra parameters",
)  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """The runs of one method with one number of epochs: rows by seed."""

    method: str
    epochs: int
    rows: dict[int, dict[str, str]]

    def values(self, column: str) -> list[float]:
        """Returns a column, in the order of the seeds."""
        return [float(row[column]) for _, row in sorted(self.rows.items())]


def paired(a: Summary, b: Summary, column: str) -> list[tuple[float, float]]:
    """Returns the values of both for the seeds that both have."""
    return [(float(a.rows[s][column]), float(b.rows[s][column])) for s in sorted(a.rows.keys() & b.rows.keys())]


def summaries(rows: Iterable[dict[str, str]]) -> list[Summary]:
    """Groups the runs of one set by method and number of epochs; the best mean comes first."""
    found: dict[tuple[str, int], dict[int, dict[str, str]]] = {}
    for row in rows:
        found.setdefault((row["method"], int(row["epochs"])), {})[int(row["seed"])] = row
    made = [Summary(*key, by_seed) for key, by_seed in found.items()]
    return sorted(made, key=lambda one: -mean(one.values("top1")))


def name(one: Summary, usual: int) -> str:
    """Returns the method's name, with its epochs if they differ from the table's usual number."""
    return one.method if one.epochs == usual else f"{one.method}, {one.epochs} epochs"


def gain(one: Summary, base: Summary | None) -> str:
    """Returns the mean difference in top-1 from `base`, paired by seed, as text; empty if there are no pairs.

    If `base` lacks some of the seeds, the number of pairs follows in brackets.
    """
    gains = [a - b for a, b in paired(one, base, "top1")] if base is not None and one is not base else []
    part = f" ({len(gains)})" if len(gains) < len(one.rows) else ""  # then it is not the difference of the two means
    return spread(gains, 2, "+") + part if gains else ""


def usual_epochs(found: list[Summary]) -> int:
    """Returns the number of epochs that most methods ran for."""
    lengths = [one.epochs for one in found]
    return max(set(lengths), key=lengths.count)


def find(found: list[Summary], method: str, epochs: int) -> Summary | None:
    """Returns the runs of a method with that number of epochs, or None."""
    return next((one for one in found if (one.method, one.epochs) == (method, epochs)), None)


def relative_time(one: Summary, ratios: dict[str, float], usual: int) -> str:
    """Returns the training time relative to `ce` with the usual number of epochs; empty if the method was not timed."""
    ratio = 1.0 if one.method == "ce" else ratios.get(one.method)
    return "" if ratio is None else f"{ratio * one.epochs / usual:.2f}"


def table(found: list[Summary], ratios: dict[str, float]) -> str:
    """Returns a Markdown table of one set, best mean first; `ratios` are times per batch relative to `ce`, by method."""
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
    """Returns the timings on a set; without any, those on a set of its preset with the same network, size and batch."""

    def kind(other: str) -> tuple:
        one = PRESETS.get(preset, {}).get(other)
        return () if one is None else (one.model, one.net, one.pixels, one.batch, one.precision, one.more)

    own = [row for row in clock if (row["preset"], row["set"]) == (preset, name)]
    like = [row for row in clock if row["preset"] == preset and kind(row["set"]) == kind(name) != ()]
    return own or [row for row in like if row["set"] == like[0]["set"]]


def caption(rows: list[dict[str, str]], times: list[dict[str, str]]) -> str:
    """Returns the text below a table: what the runs have in common, their machine and versions, and how time was measured."""
    first = rows[0]
    pending = " + marks code that was not committed yet." if any(row["commit"].endswith("+") for row in rows) else ""
    many = {key: sorted({row[key] for row in rows}) for key in ("hardware", "commit", "versions")}
    used = {tuple(json.loads(text).items()) for text in many["versions"]}
    used = {frozenset(one): one for one in sorted(used)}.values()  # the same versions in another order are the same
    versions = "; ".join(", ".join(f"{name} {version}" for name, version in one) for one in used)
    return (
        f"{first['images']} training images per epoch at {first['pixels']} px, {first['model']}. ± is half the width of the "
        "95 % t-interval. Differences are paired by seed; a number in brackets counts the pairs if some seeds have none. "
        f"{', '.join(many['hardware'])}; {versions}; commits {', '.join(many['commit'])}.{pending}" + _timed(times)
    )


def _timed(times: list[dict[str, str]]) -> str:
    if not times:
        return ""
    one = times[0]
    many = {key: " or ".join(dict.fromkeys(row[key] for row in times)) for key in ("rounds", "batches", "ce_images_per_second")}
    return (
        f" Time is measured on {one['set']}: the median of {many['rounds']} rounds of {many['batches']} batches, each between "
        f"two of `ce` ({many['ce_images_per_second']} images/s, {one['hardware']}, {one['threads']} thread(s)), multiplied by "
        "the number of epochs."
    )


def by_table(rows: Iterable[dict[str, str]]) -> dict[tuple[str, str, str], list[dict[str, str]]]:
    """Groups the rows by table: (preset, set, split).

    On val, SFR with other options (``sfr:OPTION=VALUE``) goes into separate tables with the preset ``parts``, together with
    SFR and cross-entropy.
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
    """Plots top-1 at the last epoch: the mean, the 95 % interval, and the seeds as dots."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "timm_sfr"  # the same CSV gives the same file
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text, which makes the file ten times smaller
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
    """Updates the document and the plots; returns the exit status."""
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
    for label in labels(text) & OVERVIEWS.keys():
        text = fill(text, label, overview(rows, *OVERVIEWS[label]))
    made = {"-".join(kind) for kind in placed} | OVERVIEWS.keys()
    for label in sorted(labels(text) - made):
        print(f"warning: {args.document} has a table {label} that no run is behind; remove it", file=sys.stderr)
    args.document.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
