"""Figures of a run, by matplotlib: as SVG that lies in a page and takes its colours, light or dark; and as PNG.

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

from timm_sfr.reporting.curves import BLUE, GREY, ORANGE, Panel
from timm_sfr.runs.predictions import Judged

INK = "#010203"  # stands for the page's own text colour
HEAT = LinearSegmentedColormap.from_list("heat", [(0.23, 0.51, 0.77, 0.0), (0.23, 0.51, 0.77, 1.0)])
STYLE: dict[str, Any] = {
    "font.size": 9, "axes.titlesize": 10, "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": INK, "grid.alpha": 0.12, "axes.linewidth": 0.6, "legend.frameon": False, "legend.labelcolor": INK,
    "figure.facecolor": "none", "axes.facecolor": "none", "svg.fonttype": "none", "lines.linewidth": 1.5,
}  # fmt: skip
NAMED = 24  # classes that a confusion matrix has room to name


def draw(paint: Callable[[Figure], None], size: tuple[float, float] = (4.8, 3.0)) -> Figure:
    """A figure of `size` inches, as `paint` leaves it, in this package's style."""
    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure)
    return figure


def curves(figure: Figure, panel: Panel) -> None:
    """Paints one panel of curves."""
    _curves(figure.add_subplot(), panel)


def sheet(figure: Figure, panels: Sequence[Panel]) -> None:
    """Paints several panels of curves, three in a row."""
    rows = -(-len(panels) // 3)
    for index, panel in enumerate(panels):
        _curves(figure.add_subplot(rows, 3, index + 1), panel)


def _curves(axes: Any, panel: Panel) -> None:
    drawn: set[str] = set()
    for curve in panel.curves:
        few = len(curve.epochs) < 12
        # A run's seeds share a label: one entry of the legend.
        label = f"_{curve.label}" if curve.label in drawn else _plain(curve.label)
        axes.plot(curve.epochs, curve.values, color=curve.colour, label=label, marker="o" if few else None, markersize=3,
                  linestyle="--" if curve.dashed else "-")  # fmt: skip
        drawn.add(curve.label)
    axes.set_title(panel.title, loc="left")
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.ticklabel_format(axis="y", scilimits=(-3, 5))
    if len(drawn) > 1:
        axes.legend(fontsize=8)


def confusion(figure: Figure, counts: np.ndarray, share: int, names: Sequence[str]) -> None:
    """Paints the confusion matrix, counts (K / n, K / n), rows as shares of their class; n = `share` classes are one row."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes, size = figure.add_subplot(), len(counts)
    axes.imshow(shares, cmap=HEAT, vmin=0, vmax=1, interpolation="nearest")
    axes.grid(False)
    together = f" ({share} neighbours together)" if share > 1 else ""
    axes.set(xlabel=f"predicted{together}", ylabel=f"class{together}")
    if size <= NAMED and share == 1:
        labels = [_plain(_short(name, 14)) for name in names]
        axes.set_xticks(range(size), labels, rotation=60 if max(map(len, labels)) > 2 else 0, fontsize=7)
        axes.set_yticks(range(size), labels, fontsize=7)
    if size <= 12:
        for i, j in np.argwhere(counts > 0):
            axes.text(
                j, i, str(counts[i, j]), ha="center", va="center", fontsize=7, color="w" if shares[i, j] > 0.5 else INK
            )


def reliability(figure: Figure, judged: Judged, bins: int) -> None:
    """Paints accuracy against confidence in bins of equal width, over how many images each bin holds."""
    count, confidence, accuracy = judged.calibration(bins)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    edges = (np.arange(bins) + 0.5) / bins
    top.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="calibrated")
    top.bar(edges, np.nan_to_num(accuracy), 0.9 / bins, color=BLUE, label="accuracy")
    top.plot(confidence, accuracy, color=ORANGE, marker="o", markersize=3, linestyle="none", label="at mean confidence")
    top.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy")
    top.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    bottom.bar(edges, count, 0.9 / bins, color=GREY)
    bottom.set(xlabel="confidence", ylabel="images")


def channels(figure: Figure, weights: np.ndarray, module: str) -> None:
    """Paints which deep channels teach which shallow ones: weights (S, D), each row relative to its largest."""
    order = np.lexsort((np.arange(weights.shape[1]), weights.argmax(0)))
    shown = weights[:, order] / np.maximum(weights.max(1, keepdims=True), 1e-12)
    axes = figure.add_subplot()
    axes.imshow(shown, cmap=HEAT, vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    axes.grid(False)
    sorted_by = "" if (order == np.arange(len(order))).all() else ", sorted by whom they teach"
    axes.set(xlabel=f"deep channels{sorted_by}", ylabel="shallow channels")
    axes.set_title(_plain(module), loc="left")


def svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an ``<svg>`` element as wide as its place, whose ink is ``currentColor``; `name` is its own in the page."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}), _known_glyphs():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    # In the tags alone: what stands between them may be the name of a class.
    text = re.sub(r"<[^>]*>", lambda tag: _fitted(tag[0], name), text)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)


def _fitted(tag: str, name: str) -> str:
    """A tag with the page's ink and font, and with ids of its own."""
    tag = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font: \1 system-ui, sans-serif", tag.replace(INK, "currentColor"))
    return re.sub(r"(\bid=\"|href=\"#|url\(#)", rf"\g<1>{name}-", tag)


def png(figure: Figure, dpi: int = 120) -> bytes:
    """The figure as a PNG file on white."""
    buffer = io.BytesIO()
    with _known_glyphs():
        figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    return buffer.getvalue()


@contextlib.contextmanager
def _known_glyphs() -> Iterator[None]:
    """Class names may be in scripts that matplotlib's font lacks; the page has the browser's own fonts."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        yield


def _plain(text: str) -> str:
    """Text that matplotlib takes as it stands: no mathematics, no leading underscore (which hides from the legend)."""
    text = text.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
