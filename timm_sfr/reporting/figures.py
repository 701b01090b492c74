"""Draws the figures of a run with matplotlib: as inline SVG that follows the page's light or dark colours, and as PNG.

Shape suffixes: K classes, S shallow channels, D deep channels.
"""

from __future__ import annotations

import contextlib
import html
import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from timm_sfr.reporting.curves import BLUE, GREY, ORANGE, Panel
from timm_sfr.runs.predictions import PredictionTable

INK = "#010203"  # a placeholder for the page's text colour
HEAT = LinearSegmentedColormap.from_list("heat", [(0.23, 0.51, 0.77, 0.0), (0.23, 0.51, 0.77, 1.0)])
STYLE: dict[str, Any] = {
    "font.size": 9, "axes.titlesize": 10, "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": INK, "grid.alpha": 0.12, "axes.linewidth": 0.6, "legend.frameon": False, "legend.labelcolor": INK,
    "figure.facecolor": "none", "axes.facecolor": "none", "svg.fonttype": "none", "lines.linewidth": 1.5,
}  # fmt: skip
MAX_NAMED = 24  # a confusion matrix of more classes has no room for their names


def draw(paint: Callable[..., None], *values: Any, size: tuple[float, float] = (4.8, 3.0)) -> Figure:
    """Returns a figure of `size` inches in this package's style, drawn by `paint` from `values`."""
    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure, *values)
    return figure


def sheet(figure: Figure, panels: Sequence[Panel]) -> None:
    """Draws panels of curves, up to three in a row."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // 3)
    for index, panel in enumerate(panels):
        _curves(figure.add_subplot(rows, columns, index + 1), panel)


def _curves(axes: Any, panel: Panel) -> None:
    labels: set[str] = set()
    for curve in panel.curves:
        few = len(curve.epochs) < 12
        # Runs that differ only in their seed share a label; the underscore hides repeated legend entries.
        label = f"_{curve.label}" if curve.label in labels else _plain(curve.label)
        axes.plot(curve.epochs, curve.values, color=curve.colour, label=label, marker="o" if few else None, markersize=3,
                  linestyle="--" if curve.dashed else "-")  # fmt: skip
        labels.add(curve.label)
    axes.set_title(panel.title, loc="left")
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.ticklabel_format(axis="y", scilimits=(-3, 5))
    if len(labels) > 1:
        axes.legend(fontsize=8)


def confusion(figure: Figure, counts: np.ndarray, share: int, names: Sequence[str]) -> None:
    """Draws the confusion matrix, counts (K / n, K / n), coloured by the share of each row; n = `share` classes per row."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes, size = figure.add_subplot(), len(counts)
    end = size * share - 0.5  # a cell of several classes is as wide as they are
    axes.imshow(shares, cmap=HEAT, vmin=0, vmax=1, interpolation="nearest", extent=(-0.5, end, end, -0.5))
    axes.grid(False)
    grouping = f" ({share} neighbours per cell)" if share > 1 else ""
    axes.set(xlabel=f"predicted class{grouping}", ylabel=f"true class{grouping}")
    if size <= MAX_NAMED and share == 1:
        labels = [_plain(_short(name, 14)) for name in names]
        axes.set_xticks(range(size), labels, rotation=60 if max(map(len, labels)) > 2 else 0, fontsize=7)
        axes.set_yticks(range(size), labels, fontsize=7)
    if size <= 12:
        for i, j in np.argwhere(counts > 0):
            axes.text(j, i, str(counts[i, j]), ha="center", va="center", fontsize=7, color="w" if shares[i, j] > 0.95 else INK)


def drawable(texts: Sequence[str]) -> bool:
    """Returns whether matplotlib's font has all characters of the texts; without them, a picture shows boxes."""
    font = get_font(findfont(FontProperties()))
    return all(font.get_char_index(ord(character)) for text in texts for character in text)


def reliability(figure: Figure, predictions: PredictionTable, bins: int) -> None:
    """Draws accuracy against confidence in bins of equal width, above the number of images per bin."""
    count, confidence, accuracy = predictions.calibration(bins)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    centres = (np.arange(bins) + 0.5) / bins
    top.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="calibrated")
    top.bar(centres, np.nan_to_num(accuracy), 0.9 / bins, color=BLUE, label="accuracy")
    top.plot(confidence, accuracy, color=ORANGE, marker="o", markersize=3, linestyle="none", label="at mean confidence")
    top.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy")
    top.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    bottom.bar(centres, count, 0.9 / bins, color=GREY)
    bottom.set(xlabel="confidence", ylabel="images")


def channels(figure: Figure, weights: np.ndarray, module: str) -> None:
    """Draws how much each deep channel teaches each shallow one: weights (S, D), each row relative to its maximum."""
    order = np.lexsort((np.arange(weights.shape[1]), weights.argmax(0)))
    shown = weights[:, order] / np.maximum(weights.max(1, keepdims=True), 1e-12)
    axes = figure.add_subplot()
    axes.imshow(shown, cmap=HEAT, vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    axes.grid(False)
    sorted_by = "" if (order == np.arange(len(order))).all() else ", by the shallow channel they teach most"
    axes.set(xlabel=f"deep channels{sorted_by}", ylabel="shallow channels")
    axes.set_title(_plain(module), loc="left")


def svg(figure: Figure, name: str, label: str) -> str:
    """Returns an ``<svg>`` element that fills its container in ``currentColor``; `name`, unique in the page, prefixes its ids."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}), _missing_glyphs_allowed():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    # Only in the tags: the text between them may be the name of a class.
    text = re.sub(r"<[^>]*>", lambda tag: _restyle(tag[0], name), text)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)


def _restyle(tag: str, name: str) -> str:
    """Returns a tag with the page's text colour and font, and with `name` before its ids."""
    tag = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font: \1 system-ui, sans-serif", tag.replace(INK, "currentColor"))
    return re.sub(r"(\bid=\"|href=\"#|url\(#)", rf"\g<1>{name}-", tag)


def png(figure: Figure, dpi: int = 120) -> bytes:
    """Returns the figure as a PNG file with a white background."""
    buffer = io.BytesIO()
    with _missing_glyphs_allowed():
        figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    return buffer.getvalue()


@contextlib.contextmanager
def _missing_glyphs_allowed() -> Iterator[None]:
    """Silences warnings about glyphs that matplotlib's font lacks; the browser's fonts have them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        yield


def _plain(text: str) -> str:
    """Escapes text so that matplotlib shows it literally: no mathematics, no leading underscore (hidden in legends)."""
    text = text.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
