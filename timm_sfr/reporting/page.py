"""Writes the report of a run, an HTML page that needs no network, with its figures as PNG files; and a page on several runs."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from torch import nn

from timm_sfr.config import RunConfig
from timm_sfr.data.transforms import Preprocessing, preprocessing
from timm_sfr.method.channels import ChannelProjection
from timm_sfr.method.taps import TapPlan, choose_taps
from timm_sfr.models.files import CONFIG
from timm_sfr.models.loading import create_model
from timm_sfr.reporting import figures
from timm_sfr.reporting.curves import Panel, own_panels, shared_panels
from timm_sfr.reporting.gallery import SMALL, Gallery, Sample, data_uri
from timm_sfr.reporting.tap_matches import TapMatch, tap_matches
from timm_sfr.runs.checkpoints import checkpoints, load_checkpoint
from timm_sfr.runs.predictions import (
    CLASS_SCORES,
    ECE_BINS,
    PREDICTIONS,
    PredictionTable,
    read_class_scores,
    read_predictions,
)
from timm_sfr.runs.records import Run, read_finished, taught_itself, validated
from timm_sfr.runs.scores import MULTILABEL, TITLES, shown_percents
from timm_sfr.utils.errors import UserError
from timm_sfr.utils.files import read_json, replace_atomically, write_whole

PAGE, PICTURES = "report.html", "pictures"
SFR_IMAGES, SFR_BATCH = 4, 16  # images shown in the SFR section; images over which channels are correlated
MAX_PAIRS = 12
# What the figures of the scores show, for those who cannot see them.
SHOWS = {
    "confusion": "confusion matrix: true classes in rows, predicted ones in columns",
    "reliability": "accuracy against confidence, and images by confidence",
}


def write_report(path: Path, mistakes: int = 24, dataset: Any = None, training: bool = False) -> Path:
    """Writes ``report.html`` and ``pictures/*.png`` of a run from its files, its best model and its data; returns the page.

    The page omits what is not available (for example if the data have been moved) and says so.

    Args:
        path: The run's folder.
        mistakes: How many of the most confident mistakes to show.
        dataset: The validation split, if it is already open.
        training: Whether the run is still training; the page then reloads itself.

    Raises:
        UserError: if the folder is not a run's, or its files are damaged.
        OSError: if the page or the figures cannot be written.
    """
    run, notes = read_finished(path), []
    table = _load_predictions(run, notes)
    shown, pictures = _draw_figures(run, table)
    page = _page_values(run, table, shown, notes, mistakes, dataset)
    text = _template("page.html").render(**page, training=training, written=time.strftime("%Y-%m-%d %H:%M"))
    write_whole(path / PAGE, text)

    def write(fresh: Path) -> None:
        fresh.mkdir()
        for name, figure in pictures.items():
            (fresh / f"{name}.png").write_bytes(figures.png(figure))

    replace_atomically(path / PICTURES, write)
    return path / PAGE


def write_comparison(
    path: Path,
    runs: Sequence[tuple[str, Run]],
    scores: Sequence[Sequence[str]],
    notes: Sequence[str],
    options: Sequence[Sequence[str]],
) -> None:
    """Writes a page with the tables of a comparison and the overlaid curves of the runs, given as (label, run).

    The first rows of the tables `scores` and `options` (those that differ) are headings; `notes` are lines on the scores.

    Raises:
        OSError: if the page cannot be written.
    """
    panels = shared_panels(runs)
    text = _template("comparison.html").render(curves=[_curve(panel) for panel in panels], scores=scores, notes=notes,
                                               options=options, count=len(runs))  # fmt: skip
    write_whole(path, text)


def _load_predictions(run: Run, notes: list[str]) -> PredictionTable | None:
    """Returns the best model's predictions; None, with a note, if the file is missing, damaged or of another model."""
    path, best = run.path / PREDICTIONS, run.metrics["best"]
    if run.task == MULTILABEL:
        return None
    if not path.is_file():
        notes.append(f"There is no {PREDICTIONS}: several processes validated a stream, or the run was made by a version that "
                     "did not save predictions.")  # fmt: skip
        return None
    try:
        table = read_predictions(path, int(run.options.get("num_classes") or 10**7))
    except UserError as error:
        notes.append(f"Scores by class are left out: {error}")
        return None
    if len(table.files) != best["images"] or abs(100 * table.hits.mean() - best["val_top1"]) > 1e-3:
        notes.append(f"Scores by class are left out: {PREDICTIONS} is not from the best epoch's model.")
        return None
    return table


def _draw_figures(run: Run, table: PredictionTable | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the figures of a run's scores by name, for the page (only with predictions) and for the PNG files."""
    panels = own_panels(run)
    pictures = {"curves": figures.draw(figures.sheet, panels, size=(12, 2.7 * -(-len(panels) // 3)))}
    if table is None:
        return {}, pictures
    names = _with_numbers(_class_names(run), table)
    counts, share = table.confusion(len(names))
    side = 4.8 if len(names) > 5 else 3.6
    shown = {
        "confusion": figures.draw(figures.confusion, counts, share, names, size=(side, side)),
        "reliability": figures.draw(figures.reliability, table, ECE_BINS, size=(4.8, 4.2)),
    }
    pictures |= shown
    if not figures.drawable(names):  # the page's fonts have these characters, a picture's font does not
        numbers = [str(index) for index in range(len(names))]
        pictures["confusion"] = figures.draw(figures.confusion, counts, share, numbers, size=(side, side))
    return shown, pictures


def _page_values(
    run: Run, table: PredictionTable | None, shown: dict[str, Any], notes: list[str], mistakes: int, dataset: Any
) -> dict[str, Any]:
    """Returns the values for the page's template."""
    page: dict[str, Any] = {
        "run": run, "name": run.path.absolute().name, "notes": notes, "predictions": table,
        "best": run.metrics["best"], "last": run.metrics["last"], "test": run.metrics.get("test"),
        "epochs": int(run.rows[-1]["epoch"]) + 1 if run.rows else 0,
        "command": f"python train_sfr.py --config {shlex.quote(str(run.path / 'args.yaml'))}",
        "recipe": yaml.safe_dump(run.options, sort_keys=False, allow_unicode=True),
        "classes": [], "pairs": [], "mistakes": [], "matches": [], "channel_figures": [], "deep": "",
        "titles": TITLES, "labels": _by_label(run, notes),
        "percents": shown_percents(run.task, run.options.get("num_classes") or 1),
    }  # fmt: skip
    page["curves"] = [_curve(panel) for panel in own_panels(run)]
    page |= {name: _svg(figure, name, SHOWS[name]) for name, figure in shown.items()}
    page["scored"] = validated(run.rows)
    model, gallery = _open_run(run, notes, dataset)
    names = _class_names(run) or list((gallery and gallery.class_names) or [])
    if table is not None:
        names = _with_numbers(names, table)
        wrong = table.wrong()
        page["classes"], page["pairs"] = _by_class(table, wrong, names), _confused_pairs(wrong, names)
        if gallery is not None and not gallery.matches(table):
            notes.append(f"The images cannot be shown: the data do not match {PREDICTIONS}.")
            gallery = None
        page["mistakes"] = _mistakes(table, names, gallery, mistakes) if gallery is not None else []
    if model is not None and gallery is not None and taught_itself(run.metrics, run.options):
        try:
            page |= _sfr_values(run, model, gallery, table, names)
        except UserError as error:
            notes.append(f"The SFR section is left out: {error}")
    return page


def _open_run(
    run: Run, notes: list[str], dataset: Any
) -> tuple[tuple[nn.Module, Preprocessing, RunConfig] | None, Gallery | None]:
    """Returns the run's best model with its preprocessing and options, and the images of its validation split."""
    try:
        config = RunConfig.from_flat({**run.options, "experiment": None}, where=run.path / "args.yaml")
        # Creating a model draws random numbers; a report written during training must not change its random state.
        with torch.random.fork_rng(devices=[]):
            model = create_model(f"local-dir:{run.path.absolute() / 'model'}")
        prep = preprocessing(config.model, model)
    except UserError as error:
        notes.append(f"The model cannot be loaded: {error}")
        return None, None
    try:
        return (model, prep, config), Gallery(run.path, config, prep, _class_names(run), dataset)
    except UserError as error:
        notes.append(f"The images cannot be shown: {error}")
        return (model, prep, config), None


def _by_label(run: Run, notes: list[str]) -> list[dict[str, Any]]:
    """Returns the scores of each class, the lowest AP first, if an image may have several classes; else an empty list."""
    if run.task != MULTILABEL:
        return []
    try:
        return sorted(read_class_scores(run.path / CLASS_SCORES), key=lambda row: row["ap"])
    except UserError as error:
        notes.append(f"Scores by class are left out: {error}")
        return []


def _by_class(table: PredictionTable, wrong: list[tuple[int, int, int]], names: list[str]) -> list[dict[str, Any]]:
    """Returns each class's accuracy and the wrong class predicted most often for it, the lowest accuracy first."""
    images, hits = table.by_class(len(names))
    instead: dict[int, int] = {}
    for target, prediction, _ in wrong:
        instead.setdefault(target, prediction)
    rows = [
        {"name": names[k], "images": int(images[k]), "accuracy": 100 * hits[k] / images[k],
         "instead": names[instead[k]] if k in instead else ""}
        for k in np.flatnonzero(images).tolist()
    ]  # fmt: skip
    return sorted(rows, key=lambda row: row["accuracy"])


def _confused_pairs(wrong: list[tuple[int, int, int]], names: list[str]) -> list[dict[str, Any]]:
    """Returns the pairs of classes confused most often, counted in both directions."""
    found: dict[tuple[int, int], list[int]] = {}
    for target, prediction, count in wrong:
        pair = found.setdefault((min(target, prediction), max(target, prediction)), [0, 0])
        pair[int(target > prediction)] += count
    most = sorted(found.items(), key=lambda item: -sum(item[1]))[:MAX_PAIRS]
    return [{"one": names[i], "other": names[j], "there": a, "back": b} for (i, j), (a, b) in most]


def _mistakes(table: PredictionTable, names: list[str], gallery: Gallery, count: int) -> list[dict[str, Any]]:
    found = []
    for index in table.mistakes(count):
        sample = gallery.sample(index)
        if sample is not None and sample.target == table.target[index]:
            found.append({"uri": data_uri(sample.pixels), "small": _is_small(sample), "target": names[table.target[index]],
                          "prediction": names[table.prediction[index]], "confidence": 100 * float(table.confidence[index]),
                          "file": gallery.short(table.files[index])})  # fmt: skip
    return found


def _sfr_values(run: Run, opened: Any, gallery: Gallery, table: PredictionTable | None, names: list[str]) -> dict[str, Any]:
    """Returns the values for the template's SFR section: each shallow tap's plan on images, and its channel weights."""
    model, prep, config = opened
    count = SFR_BATCH if config.sfr.channels == "transport" else SFR_IMAGES
    samples = gallery.spread(table.target if table is not None else None, count)
    if not samples:
        raise UserError("no image of the validation split decodes")
    plan = choose_taps(model, prep.input_size, config.sfr.taps)
    maps = _projection(run, plan) if config.sfr.channels == "projection" else None
    images = prep.normalize(torch.stack([sample.pixels for sample in samples]))
    matches = tap_matches(model, plan, config.sfr, images, maps)
    shown = samples[:SFR_IMAGES]
    pictures = [{"uri": data_uri(one.pixels), "small": _is_small(one), "name": one.label(names)} for one in shown]
    return {
        "deep": plan.deep.module, "options": config.sfr, "images": pictures,
        "height": 100 * prep.input_size[1] / prep.input_size[2],
        "matches": [{"tap": match, "stays": match.stays, "images": [_cells(match, i) for i in range(len(shown))]}
                    for match in matches if match.plan is not None],
        "channel_figures": [
            _svg(figures.draw(figures.channels, match.channels.numpy(), match.module, size=(4.8, 2.6)),
                 f"channels{number}", f"channels of {match.module}")
            for number, match in enumerate(matches if config.sfr.channels != "groups" else ())
        ],
        "taught": [_groups(plan.deep.channels, tap.channels, tap.module) for tap in plan.shallow],
    }  # fmt: skip


def _groups(deep: int, shallow: int, module: str) -> str:
    """Returns in words how groups of deep channels teach the channels of a shallow tap."""
    if deep > shallow:
        return f"the means of neighbours among the {deep} deep channels teach the {shallow} of {module}"
    if deep == shallow:
        return f"each of the {deep} deep channels teaches one of {module}"
    return f"each of the {deep} deep channels teaches several of the {shallow} of {module}"


def _projection(run: Run, plan: TapPlan) -> ChannelProjection:
    """Returns the learned channel maps, which only checkpoints contain, of the best epoch or the nearest later one.

    Raises:
        UserError: if no such checkpoint is left.
    """
    with torch.random.fork_rng(devices=[]):
        maps = ChannelProjection(tuple(tap.channels for tap in plan.shallow), plan.deep.channels)
    for path in checkpoints(run.path / "checkpoints"):
        try:
            state = load_checkpoint(path)
            if state["epoch"] > run.metrics["best"]["epoch"]:
                maps.load_state_dict(state["task"]["projection"])
                return maps
        except (UserError, KeyError, RuntimeError):
            continue
    raise UserError("no checkpoint with the learned channel maps is left from the best epoch or later")


def _cells(match: TapMatch, image: int) -> dict[str, Any]:
    """Returns one image's locations, and its plan in thousandths of each location's mass."""
    plan = match.plan[image].numpy()
    shares = plan / np.maximum(plan.sum(1, keepdims=True), 1e-12)
    sparse = [[[int(j), round(1000 * float(plan[i, j]), 2)] for j in np.flatnonzero(row >= 0.005)]
              for i, row in enumerate(shares)]  # fmt: skip
    return {"cells": _locations(match.grid), "deep": _locations(match.deep_grid), "plan": sparse,
            "distance": float(match.distance[image])}  # fmt: skip


def _locations(grid: tuple[int, int]) -> list[dict[str, float]]:
    """Returns a grid's locations as rectangles, in percent of the image, row by row."""
    rows, columns = grid
    return [{"x": 100 * column / columns, "y": 100 * row / rows, "w": 100 / columns, "h": 100 / rows}
            for row, column in np.ndindex(rows, columns)]  # fmt: skip


def _is_small(sample: Sample) -> bool:
    return max(sample.pixels.shape[1:]) <= SMALL


def _class_names(run: Run) -> list[str]:
    """Returns the model's class names; an empty list if it has none."""
    names = read_json(run.path / "model" / CONFIG).get("label_names")
    return [str(name) for name in names] if isinstance(names, list) else []


def _with_numbers(names: list[str], table: PredictionTable) -> list[str]:
    """Returns `names`, extended by numbers for classes without a name."""
    count = int(max(table.target.max(initial=0), table.prediction.max(initial=0))) + 1
    return names + [str(k) for k in range(len(names), count)]


def _curve(panel: Panel) -> Markup:
    return _svg(figures.draw(figures.sheet, [panel]), panel.name, panel.title)


def _svg(figure: Any, name: str, label: str) -> Markup:
    return Markup(figures.svg(figure, name, label))


def _template(name: str) -> Any:
    folder = PackageLoader("timm_sfr.reporting", ".")
    options = {"trim_blocks": True, "lstrip_blocks": True, "undefined": StrictUndefined}
    return Environment(loader=folder, autoescape=True, **options).get_template(name)
