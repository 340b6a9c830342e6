"""Draws the charts of a report as data URIs of SVG images; Matplotlib is imported with the first one."""

import base64
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxft.targets.classification import Reliability
from jaxft.targets.metrics import CALIBRATION_BINS

if TYPE_CHECKING:
    from matplotlib.axes import Axes


COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#475569")
INK, FAINT = "#334155", "#cbd5e1"

STYLE: Any = {
    "axes.edgecolor": FAINT,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.prop_cycle": f"cycler('color', {list(COLOURS)})",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "font.size": 9.5,
    "grid.color": "#e2e8f0",
    "legend.frameon": False,
    "svg.fonttype": "none",  # keeps text as text: smaller, and the browser's fonts cover any script
    "text.parse_math": False,  # for class names with a $
    "xtick.color": INK,
    "ytick.color": INK,
}


LABELLED_CLASSES = 40  # above this number, the names beside a confusion matrix would not be legible
WRITTEN_CLASSES = 16  # up to this number, counts are written into the matrix
DRAWN_POINTS = 1000  # at most in a scatter plot
Curve = tuple[np.ndarray, np.ndarray]  # x, y


def svg(draw: Callable[["Axes"], None], width: float = 5.2, height: float = 3.1) -> str:
    """Returns a figure, filled by `draw`, as a data URI. width, height: inches at the nominal font size."""
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser uses its own fonts
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def curves(title: str, lines: Mapping[str, Curve], *, percent: bool = False, from_zero: bool = False) -> str:
    """Draws curves against epochs, with markers if they have few points."""
    from matplotlib.ticker import MaxNLocator

    def draw(axes: "Axes") -> None:
        for label, (x, y) in lines.items():
            axes.plot(x, y, label=label, linewidth=1.8, marker="o" if len(x) <= 20 else "", markersize=4)
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if from_zero:
            axes.set_ylim(bottom=0)
        if percent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
        if len(lines) > 1:
            axes.legend()

    return svg(draw)


def confusion(matrix: np.ndarray, class_names: Sequence[str]) -> str:
    """Draws a confusion matrix with the true classes in rows; the colour is the share of its row."""
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    classes = len(class_names)

    def draw(axes: "Axes") -> None:
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
        axes.grid(visible=False)
        if classes <= LABELLED_CLASSES:
            names = [name if len(name) <= 16 else f"{name[:15]}…" for name in class_names]
            size = min(9.5, 220 / classes)
            axes.set_xticks(range(classes), names, rotation=90, fontsize=size)
            axes.set_yticks(range(classes), names, fontsize=size)
        if classes <= WRITTEN_CLASSES:
            for (i, j), count in np.ndenumerate(matrix):
                if count:
                    colour = "white" if share[i, j] > 0.5 else INK
                    axes.text(j, i, str(count), ha="center", va="center", color=colour, fontsize=8)

    return svg(draw, 5.2, 5.2)


def reliability(bins: Reliability, xlabel: str = "confidence", ylabel: str = "accuracy") -> str:
    """Draws accuracy against confidence; a bar's opacity is its share of the images."""

    def draw(axes: "Axes") -> None:
        centre = (np.arange(CALIBRATION_BINS) + 0.5) / CALIBRATION_BINS
        opacity = 0.25 + 0.75 * bins.num_images / max(bins.num_images.max(), 1)
        for x, y, alpha, num_images in zip(centre, bins.accuracy, opacity, bins.num_images, strict=True):
            if num_images:
                axes.bar(x, y, 0.9 / CALIBRATION_BINS, color=COLOURS[0], alpha=alpha)
        axes.plot([0, 1], [0, 1], color=INK, linestyle="--", linewidth=1, label="perfect calibration")
        axes.set(title="Reliability", xlabel=xlabel, ylabel=ylabel, xlim=(0, 1), ylim=(0, 1))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
        axes.legend(loc="upper left")

    return svg(draw, 5.2, 4.0)


def scatter(truth: np.ndarray, predicted: np.ndarray, name: str) -> str:
    """Draws predicted numbers (N,) against the labels (N,), N > 0, at most DRAWN_POINTS of them, and the diagonal."""
    drawn = np.random.default_rng(0).permutation(len(truth))[:DRAWN_POINTS]

    def draw(axes: "Axes") -> None:
        axes.scatter(truth[drawn], predicted[drawn], s=14, color=COLOURS[0], alpha=0.5, linewidths=0)
        bounds = [truth.min(), truth.max()]
        axes.plot(bounds, bounds, color=INK, linestyle="--", linewidth=1, label="perfect prediction")
        axes.legend(loc="upper left")
        axes.set(title="Predicted against true", xlabel=f"true {name}", ylabel=f"predicted {name}")

    return svg(draw, 5.2, 4.0)


def histogram(errors: np.ndarray, name: str) -> str:
    """Draws the distribution of errors (N,), predicted minus true."""

    def draw(axes: "Axes") -> None:
        axes.hist(errors, bins=min(max(len(errors) // 5, 10), 40), color=COLOURS[0])
        axes.axvline(0, color=INK, linestyle="--", linewidth=1)
        axes.set(title="Errors", xlabel=f"predicted minus true {name}", ylabel="images")

    return svg(draw, 5.2, 4.0)
