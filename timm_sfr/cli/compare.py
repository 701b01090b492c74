"""``timm-sfr compare RUN RUN ...``: compares runs."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev
from typing import Any

from scipy.stats import t

from timm_sfr.config import options
from timm_sfr.runs.records import Run, read_finished
from timm_sfr.runs.scores import CLASSIFICATION, PERCENT, TITLES, recorded_scores
from timm_sfr.utils.console import aligned, json_line
from timm_sfr.utils.errors import UserError
from timm_sfr.utils.options import plain

# Options that do not make two runs different experiments.
INCIDENTAL = ("seed", "output", "experiment", "push_to_hub", "hub_private", "hub_revision", "hub_license", "hub_tag",
              "hub_dataset", "workers", "log_interval", "report_interval", "report_to", "json_logs", "checkpoint_hist",
              "checkpoint_interval", "save_epochs", "save_images", "synchronize_step", "wandb_project", "wandb_tags",
              "wandb_resume_id", "test_split", "test_num_samples")  # fmt: skip
Row = tuple[str, ...]
VALIDATED_ON = ("dataset", "data_dir", "val_split", "val_share", "val_num_samples")
FEWEST = 3  # seeds for an interval: with two, it would be several times as wide as the difference between them


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed.

    Attributes:
        name: A letter.
        options: The options that distinguish them from other groups.
        runs: The runs by seed.
    """

    name: str
    options: dict[str, Any]
    runs: dict[int, Run]

    @property
    def task(self) -> str:
        """What the runs have trained."""
        return next(iter(self.runs.values())).task

    @property
    def tested(self) -> bool:
        """Whether every run has test scores."""
        return all(run.test is not None for run in self.runs.values())

    def values(self, score: str) -> list[float]:
        """Returns a score of every run, in the order of the seeds."""
        return [run.score(score) for _, run in sorted(self.runs.items())]


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Returns the runs in groups that differ only in their seed, in the order of the arguments.

    Raises:
        UserError: if two runs have the same options and the same seed.
    """
    names = sorted({name for run in runs for name in run.options} - set(INCIDENTAL))
    # A run of an older version lacks newer options, and had what are now their defaults.
    defaults = {name: plain(item.default) for _, name, item in options()}
    values = [{name: run.options.get(name, defaults.get(name)) for name in names} for run in runs]
    differing = [name for name in names if len({repr(one[name]) for one in values}) > 1]
    found: dict[str, Group] = {}
    for run, own in zip(runs, values, strict=True):
        apart = {name: own[name] for name in differing}
        name = chr(ord("A") + len(found)) if len(found) < 26 else f"A{len(found)}"
        group = found.setdefault(repr(apart), Group(name, apart, {}))
        if run.seed in group.runs:
            raise UserError(
                f"run: {str(run.path)!r} and {str(group.runs[run.seed].path)!r} have the same options and seed {run.seed}; "
                "leave out one of them"
            )
        group.runs[run.seed] = run
    return list(found.values())


def half_interval(values: Sequence[float]) -> float:
    """Returns half the width of the 95 % t-interval of the mean, t_{0.975, n-1} s / sqrt(n); nan for one value."""
    if len(values) < 2:
        return float("nan")
    return float(t.ppf(0.975, len(values) - 1)) * stdev(values) / sqrt(len(values))


def spread(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    """Returns the mean as text, with half the 95 % interval for three or more values; empty for no values."""
    if not values:
        return ""
    half = f" ± {half_interval(values):.{digits}f}" if len(values) >= FEWEST else ""
    return f"{mean(values):{sign}.{digits}f}{half}"


def difference(one: Group, base: Group, score: str) -> list[float]:
    """Returns `one` minus `base` for every seed that both have; if they share none, the difference of the means."""
    shared = sorted(one.runs.keys() & base.runs.keys())
    if not shared:
        return [mean(one.values(score)) - mean(base.values(score))]
    return [one.runs[seed].score(score) - base.runs[seed].score(score) for seed in shared]


def scores_table(groups: Sequence[Group]) -> str:
    """Returns a table of the scores at the last epoch and the differences of the main one, paired by seed."""
    rows, notes, options = tables(groups)
    return "\n".join([*aligned(rows), *notes, *(["", *aligned(options)] if len(options) > 1 else [])])


def tables(groups: Sequence[Group]) -> tuple[list[Row], list[str], list[Row]]:
    """Returns the rows of the scores, notes on them, and the rows of the options that differ; each begins with a heading."""
    base, tested = groups[0], [group.tested for group in groups]
    names, title = PERCENT[base.task], TITLES[PERCENT[base.task][0]]
    main, calibrated = names[0], ["ece"] if base.task == CLASSIFICATION else []
    titles = [TITLES[name] for name in names]
    lines: list[Row] = [("", "seeds", *titles, "loss", *(["ECE"] if calibrated else []), f"best {title}", "minutes",
                         f"{title} - {base.name}")]  # fmt: skip
    if any(tested):
        lines[0] += (f"test {title}", f"test - {base.name}")
    for group in groups:
        best = [float(run.metrics["best"][f"val_{main}"]) for run in group.runs.values()]
        minutes = [float(run.metrics["seconds"]) / 60 for run in group.runs.values()]
        gain = difference(group, base, f"val_{main}") if group is not base else []
        unpaired = " (no seed in both)" if gain and not group.runs.keys() & base.runs.keys() else ""
        lines.append((group.name, ",".join(map(str, sorted(group.runs))),
                      *(spread(group.values(f"val_{name}")) for name in names), spread(group.values("val_loss"), 3),
                      *(spread(group.values(name), 3) for name in calibrated), spread(best), f"{mean(minutes):.1f}",
                      spread(gain, 2, "+") + unpaired))  # fmt: skip
        if any(tested):
            gain = difference(group, base, f"test_{main}") if group is not base and base.tested and group.tested else []
            lines[-1] += (spread(group.values(f"test_{main}")) if group.tested else "", spread(gain, 2, "+"))
    notes = ["at the last epoch, percent; ± half the 95 % interval over 3 or more seeds; the best epoch is chosen on val"]
    if any(tested):
        notes.append("test: scored once, at the end, with the best epoch's weights: the honest figure")
    if other := [name for name in VALIDATED_ON if name in base.options]:
        notes.append(f"note: the runs may have been validated on different images ({', '.join(other)}); differences then mean "
                     "little")  # fmt: skip
    for group in groups:
        for run in group.runs.values():
            if found := run.missing_epochs:
                notes.append(f"note: {run.path.absolute().name} is unfinished: {found[0]} of {found[1]} epochs")
    for group in groups:
        notes.append(f"{group.name}: {', '.join(run.path.absolute().name for _, run in sorted(group.runs.items()))}")
    options: list[Row] = [("", *(group.name for group in groups))]
    options += [(name, *(_short(group.options[name]) for group in groups)) for name in base.options]
    return lines, notes, options


def run(args: Namespace) -> int:
    """Runs the command; returns 0."""
    if len(args.runs) < 2:
        raise UserError("run: expected two or more folders to compare; got one")
    groups = grouped([read_finished(path) for path in args.runs])
    if len({group.task for group in groups}) > 1:
        raise UserError("run: some of the runs have --task multilabel and some not, and their scores cannot be compared")
    if args.html is not None:
        from timm_sfr.reporting.page import write_comparison  # imported here because matplotlib is slow to import

        try:
            runs = [(group.name, one) for group in groups for one in group.runs.values()]
            write_comparison(args.html, runs, *tables(groups))
        except OSError as error:
            raise UserError(f"html: cannot write {str(args.html)!r}: {error.strerror or error}") from error
    if not args.json:
        print(scores_table(groups))
        if args.html is not None:
            print(f"the page is {args.html}")
        return 0
    for group in groups:
        recorded = recorded_scores(group.task)
        names = [name if name == "ece" else f"val_{name}" for name in recorded]
        names += [f"test_{name}" for name in recorded if group.tested]
        scores = {name: group.values(name) for name in names}
        gain = {f"{recorded[0]}_minus_first": difference(group, groups[0], f"val_{recorded[0]}")}
        unfinished = sorted(seed for seed, one in group.runs.items() if one.missing_epochs)
        about = {"group": group.name, "options": group.options, "seeds": sorted(group.runs), "unfinished_seeds": unfinished}
        print(json_line({**about, **scores, **gain}))
    return 0


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"...{text[-37:]}"
