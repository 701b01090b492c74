"""One page on a run that needs no network, and its figures as PNG files; and one page on several runs."""

from __future__ import annotations

import json
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
from timm_sfr.reporting.curves import COLOURS, Panel, own_panels, shared_panels
from timm_sfr.reporting.gallery import SMALL, Gallery, Sample, data_uri
from timm_sfr.reporting.lessons import Lesson, lessons
from timm_sfr.runs.checkpoints import checkpoints, load_checkpoint
from timm_sfr.runs.predictions import ECE_BINS, PREDICTIONS, Judged, read_predictions
from timm_sfr.runs.records import Run, read_finished
from timm_sfr.utils.errors import UserError
from timm_sfr.utils.files import replace_atomically, write_whole

PAGE, PICTURES = "report.html", "pictures"
TAUGHT, BATCH = 4, 16  # images that SFR is pictured on, and that channels are correlated over
PAIRS = 12


def write_report(path: Path, mistakes: int = 24, dataset: Any = None, training: bool = False) -> Path:
    """Writes ``report.html`` and ``pictures/*.png`` of a run from its files, its best model and its data; returns the page.

    What cannot be had (the data are elsewhere, say) is left out, and the page says so.

    Args:
        path: The run's folder.
        mistakes: How many of the surest mistakes to show.
        dataset: The validation split, where it is open already.
        training: Whether the run still trains: the page then loads itself anew.

    Raises:
        UserError: if the folder is no run, or its files are damaged.
        OSError: if it cannot be written.
    """
    run, notes = read_finished(path), []
    judged = _predictions(run, notes)
    drawn = _drawn(run, judged)
    page = _contents(run, judged, drawn, notes, mistakes, dataset)
    text = _template("page.html").render(**page, training=training, written=time.strftime("%Y-%m-%d %H:%M"))
    write_whole(path / PAGE, text)

    def write(fresh: Path) -> None:
        fresh.mkdir()
        for name, figure in drawn.items():
            (fresh / f"{name}.png").write_bytes(figures.png(figure))

    replace_atomically(path / PICTURES, write)
    return path / PAGE


def write_comparison(path: Path, runs: Sequence[tuple[str, Run]], lines: str) -> None:
    """Writes a page with the curves of several runs over each other, (label, run), and the comparison's `lines` of text.

    Raises:
        OSError: if it cannot be written.
    """
    labels = list(dict.fromkeys(label for label, _ in runs))
    colours = {label: COLOURS[place % len(COLOURS)] for place, label in enumerate(labels)}
    panels = shared_panels([(label, colours[label], run) for label, run in runs])
    text = _template("comparison.html").render(curves=[_curve(panel) for panel in panels], lines=lines,
                                               runs=[(label, run.path.absolute().name) for label, run in runs])  # fmt: skip
    write_whole(path, text)


def _predictions(run: Run, notes: list[str]) -> Judged | None:
    """What the best model said of every image, if it is kept and of that model."""
    path, best = run.path / PREDICTIONS, run.metrics["best"]
    if not path.is_file():
        notes.append(f"There is no {PREDICTIONS}: the run was validated as a stream by several processes, or by a version "
                     "that did not keep what the model said of every image.")  # fmt: skip
        return None
    try:
        judged = read_predictions(path, int(run.options.get("num_classes") or 10**7))
    except UserError as error:
        notes.append(f"Scores by class are left out: {error}")
        return None
    if len(judged.files) != best["images"] or abs(100 * judged.hits.mean() - best["val_top1"]) > 1e-3:
        notes.append(f"Scores by class are left out: {PREDICTIONS} is not of the best epoch's model.")
        return None
    return judged


def _drawn(run: Run, judged: Judged | None) -> dict[str, Any]:
    """The figures of a run's scores by name: ``curves``, ``confusion``, ``reliability``."""
    found = {"curves": figures.draw(lambda figure: figures.sheet(figure, own_panels(run)), (12, 5.4))}
    if judged is None:
        return found
    names = _fitting(_class_names(run), judged)
    counts, share = judged.confusion(len(names))
    side = 4.8 if len(names) > 5 else 3.6
    found["confusion"] = figures.draw(lambda figure: figures.confusion(figure, counts, share, names), (side, side))
    found["reliability"] = figures.draw(lambda figure: figures.reliability(figure, judged, ECE_BINS), (4.8, 4.2))
    return found


def _contents(
    run: Run, judged: Judged | None, drawn: dict[str, Any], notes: list[str], mistakes: int, dataset: Any
) -> dict[str, Any]:
    """What the page's template takes."""
    page: dict[str, Any] = {
        "run": run, "name": run.path.absolute().name, "notes": notes, "judged": judged,
        "best": run.metrics["best"], "last": run.metrics["last"], "epochs": len(run.rows),
        "again": f"python train_sfr.py --config {shlex.quote(str(run.path / 'args.yaml'))}",
        "recipe": yaml.safe_dump(run.options, sort_keys=False, allow_unicode=True),
        "classes": [], "pairs": [], "mistakes": [], "taught": [], "by_channel": [],
    }  # fmt: skip
    page["curves"] = [_curve(panel) for panel in own_panels(run)]
    page |= {name: _svg(figure, name, name) for name, figure in drawn.items() if name != "curves"}
    model, gallery = _opened(run, notes, dataset)
    names = _class_names(run) or list((gallery and gallery.class_names) or [])
    if judged is not None:
        names = _fitting(names, judged)
        wrong = judged.wrong()
        page["classes"], page["pairs"] = _by_class(judged, wrong, names), _confused(wrong, names)
        if gallery is not None and not gallery.judged(judged):
            notes.append(f"The images cannot be shown: the data are not those of {PREDICTIONS}.")
            gallery = None
        page["mistakes"] = _mistakes(judged, names, gallery, mistakes) if gallery is not None else []
    if model is not None and gallery is not None and run.metrics.get("sfr") and run.options.get("sfr_weight", 1):
        try:
            page |= _sfr(run, model, gallery, judged, names)
        except UserError as error:
            notes.append(f"SFR cannot be pictured: {error}")
    return page


def _opened(
    run: Run, notes: list[str], dataset: Any
) -> tuple[tuple[nn.Module, Preprocessing, RunConfig] | None, Gallery | None]:
    """The run's best model with its preprocessing and options, and the images of its validation split."""
    try:
        config = RunConfig.from_flat({**run.options, "experiment": None}, where=run.path / "args.yaml")
        # Making a model draws random numbers, which are not this page's to take.
        with torch.random.fork_rng(devices=[]):
            model = create_model(f"local-dir:{run.path.absolute() / 'model'}")
        prep = preprocessing(config.model, model)
    except UserError as error:
        notes.append(f"The model cannot be loaded: {error}")
        return None, None
    try:
        return (model, prep, config), Gallery(config, prep, dataset)
    except UserError as error:
        notes.append(f"The images cannot be shown: {error}")
        return (model, prep, config), None


def _by_class(judged: Judged, wrong: list[tuple[int, int, int]], names: list[str]) -> list[dict[str, Any]]:
    """Accuracy of each class and what it is most often called instead, the worst first."""
    images, hits = judged.by_class(len(names))
    instead: dict[int, int] = {}
    for one, other, _ in wrong:
        instead.setdefault(one, other)
    rows = [
        {"name": names[k], "images": int(images[k]), "accuracy": 100 * hits[k] / images[k],
         "instead": names[instead[k]] if k in instead else ""}
        for k in np.flatnonzero(images).tolist()
    ]  # fmt: skip
    return sorted(rows, key=lambda row: row["accuracy"])


def _confused(wrong: list[tuple[int, int, int]], names: list[str]) -> list[dict[str, Any]]:
    """The pairs of classes that are taken for each other most often, both ways together."""
    found: dict[tuple[int, int], list[int]] = {}
    for one, other, count in wrong:
        pair = found.setdefault((min(one, other), max(one, other)), [0, 0])
        pair[int(one > other)] += count
    most = sorted(found.items(), key=lambda item: -sum(item[1]))[:PAIRS]
    return [{"one": names[i], "other": names[j], "there": a, "back": b} for (i, j), (a, b) in most]


def _mistakes(judged: Judged, names: list[str], gallery: Gallery, count: int) -> list[dict[str, Any]]:
    found = []
    for index in judged.mistakes(count):
        sample = gallery.sample(index)
        if sample is not None and sample.target == judged.target[index]:
            found.append({"uri": data_uri(sample.pixels), "small": _is_small(sample), "target": names[judged.target[index]],
                          "prediction": names[judged.prediction[index]], "confidence": 100 * float(judged.confidence[index]),
                          "file": gallery.short(judged.files[index])})  # fmt: skip
    return found


def _sfr(run: Run, opened: Any, gallery: Gallery, judged: Judged | None, names: list[str]) -> dict[str, Any]:
    """What the template shows of SFR: for every shallow tap, images with who teaches what, and the channels."""
    model, prep, config = opened
    samples = gallery.spread(
        judged.target if judged is not None else None, BATCH if config.sfr.channels == "transport" else TAUGHT
    )
    if not samples:
        raise UserError("no image of the validation split decodes")
    names = names + [str(k) for k in range(len(names), 1 + max(one.target for one in samples))]
    plan = choose_taps(model, prep.input_size, config.sfr.taps)
    maps = _projection(run, plan) if config.sfr.channels == "projection" else None
    found = lessons(model, plan, config.sfr, prep.normalize(torch.stack([sample.pixels for sample in samples])), maps)
    shown = samples[:TAUGHT]
    pictures = [{"uri": data_uri(one.pixels), "small": _is_small(one), "name": names[one.target]} for one in shown]
    return {
        "deep": plan.deep.module, "options": config.sfr, "images": pictures,
        "height": 100 * prep.input_size[1] / prep.input_size[2],
        "taught": [{"lesson": lesson, "stays": lesson.stays, "images": [_cells(lesson, i) for i in range(len(shown))]}
                   for lesson in found if lesson.plan is not None],
        "by_channel": [
            _svg(figures.draw(lambda figure, one=lesson: figures.channels(figure, one.channels.numpy(), one.module), (4.8, 2.6)),
                 f"channels{number}", f"channels of {lesson.module}")
            for number, lesson in enumerate(found)
        ],
    }  # fmt: skip


def _projection(run: Run, plan: TapPlan) -> ChannelProjection:
    """The learned channel maps, which are kept in checkpoints alone: those of the best epoch, or of the nearest one after it.

    Raises:
        UserError: if there is no checkpoint that has them.
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
    raise UserError("the learned channel maps are in the checkpoints, and none of the best epoch or after it is left")


def _cells(lesson: Lesson, image: int) -> dict[str, Any]:
    """One image of a lesson: the plan in thousandths of the mass, and where each location's teachers lie on the mean."""
    plan = lesson.plan[image].numpy()
    shares = plan / np.maximum(plan.sum(1, keepdims=True), 1e-12)
    deep = _locations(lesson.deep_grid)
    means = shares @ np.array([(one["x"] + one["w"] / 2, one["y"] + one["h"] / 2) for one in deep])
    cells = [{**one, "from_x": x, "from_y": y} for one, (x, y) in zip(_locations(lesson.grid), means, strict=True)]
    sparse = [[[int(j), round(1000 * float(plan[i, j]), 2)] for j in np.flatnonzero(row >= 0.005)]
              for i, row in enumerate(shares)]  # fmt: skip
    return {"cells": cells, "deep": deep, "plan": sparse, "distance": float(lesson.distance[image])}


def _locations(grid: tuple[int, int]) -> list[dict[str, float]]:
    """The locations of a grid as rectangles, in percent of the image, row by row."""
    rows, columns = grid
    return [{"x": 100 * column / columns, "y": 100 * row / rows, "w": 100 / columns, "h": 100 / rows}
            for row, column in np.ndindex(rows, columns)]  # fmt: skip


def _is_small(sample: Sample) -> bool:
    return max(sample.pixels.shape[1:]) <= SMALL


def _class_names(run: Run) -> list[str]:
    """The model's class names; none where it has none."""
    try:
        names = json.loads((run.path / "model" / CONFIG).read_text())["label_names"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


def _fitting(names: list[str], judged: Judged) -> list[str]:
    """`names`, and numbers for classes beyond them."""
    most = int(max(judged.target.max(initial=0), judged.prediction.max(initial=0))) + 1
    return names + [str(k) for k in range(len(names), most)]


def _curve(panel: Panel) -> Markup:
    return _svg(figures.draw(lambda figure: figures.curves(figure, panel)), panel.name, panel.title)


def _svg(figure: Any, name: str, label: str) -> Markup:
    return Markup(figures.svg(figure, name, label))


def _template(name: str) -> Any:
    folder = PackageLoader("timm_sfr.reporting", ".")
    options = {"trim_blocks": True, "lstrip_blocks": True, "undefined": StrictUndefined}
    return Environment(loader=folder, autoescape=True, **options).get_template(name)
