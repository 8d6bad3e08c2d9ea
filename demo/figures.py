"""Curves of a run, or of several, from the objects of metrics.jsonl."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

Rows = Sequence[Mapping[str, Any]]
FloatArray = npt.NDArray[np.float64]

BANDS = tuple(f"diffusion_loss_{low:.1f}_{low + 0.2:.1f}" for low in (0.0, 0.2, 0.4, 0.6, 0.8))
# From light to dark as the ratio grows; one hue, because the bands are ordered.
BAND_COLOURS = ("#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08306b")
ARM_COLOURS = ("#6b7280", "#1d4ed8", "#d97706", "#059669")
_LINE, _FAINT = "#1d4ed8", "#bfd0f5"


def series(rows: Rows, key: str) -> tuple[FloatArray, FloatArray]:
    """Steps and values of the rows that have the key."""
    found = [row for row in rows if row.get(key) is not None]
    return np.array([row["step"] for row in found], np.float64), np.array([row[key] for row in found], np.float64)


def window(rows: Rows) -> int:
    """Steps of the moving average that a curve of this many rows gets."""
    return max(1, len(rows) // 40)


def moving_average(values: FloatArray, width: int) -> FloatArray:
    """Mean of each value and up to `width - 1` before it; the result is as long as `values`."""
    sums = np.cumsum(np.concatenate(([0.0], values)))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    means: FloatArray = (sums[ends] - sums[starts]) / (ends - starts)
    return means


def losses_by_ratio(rows: Rows) -> Figure:
    """Mean loss per masked token, one line per band of mask ratios."""
    figure, (axes,) = _panels(1)
    for key, colour in zip(BANDS, BAND_COLOURS, strict=True):
        steps, values = series(rows, key)
        if len(steps):
            low, high = key.split("_")[-2:]
            label = f"{100 * float(low):.0f} to {100 * float(high):.0f} % masked"
            axes.plot(steps, moving_average(values, window(rows)), color=colour, label=label, linewidth=1.6)
    _label(axes, "loss per masked token (nats)")
    axes.legend(frameon=False, fontsize=8)
    return figure


def alignment(rows: Rows) -> Figure | None:
    """JEPA loss of every step and cosine to the target where it was measured; None for a run without JEPA."""
    measured, cosine = series(rows, "target_cosine")
    steps, loss = series(rows, "jepa_loss")
    if not len(measured):
        return None
    figure, (left, right) = _panels(2)
    left.plot(steps, loss, color=_FAINT, linewidth=0.8)
    left.plot(steps, moving_average(loss, window(rows)), color=_LINE, linewidth=1.6)
    _label(left, "JEPA loss, 1 - cosine")
    right.plot(measured, cosine, color=_LINE, marker="o", markersize=3, linewidth=1.2)
    _label(right, "cosine of prediction and target")
    return figure


def collapse(rows: Rows) -> Figure | None:
    """Effective rank and diversity of the pooled embeddings; None if they were not monitored."""
    steps, rank = series(rows, "effective_rank")
    if not len(steps):
        return None
    figure, (left, right) = _panels(2)
    left.plot(steps, rank, color=_LINE, marker="o", markersize=3, linewidth=1.2)
    left.set_ylim(0, max(rank) * 1.15)
    _label(left, f"effective rank of {rows_measured(rows)} rows")
    measured, diversity = series(rows, "cosine_diversity")
    right.plot(measured, diversity, color=_LINE, marker="o", markersize=3, linewidth=1.2)
    right.set_ylim(bottom=0)
    _label(right, "cosine diversity")
    return figure


def rows_measured(rows: Rows) -> str:
    """Numbers of rows that the effective rank was measured on, such as `256` or `64 to 256`."""
    _, counts = series(rows, "monitor_rows")
    low, high = int(counts.min()), int(counts.max())
    return str(high) if low == high else f"{low} to {high}"


def speed(rows: Rows) -> Figure:
    """Tokens per second."""
    figure, (axes,) = _panels(1)
    steps, values = series(rows, "tokens_per_second")
    axes.plot(steps, values, color=_FAINT, linewidth=0.8)
    axes.plot(steps, moving_average(values, window(rows)), color=_LINE, linewidth=1.6)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    _label(axes, "tokens per second")
    return figure


def rate_and_gradient(rows: Rows) -> Figure:
    """Learning rate, and gradient norm before clipping."""
    figure, (left, right) = _panels(2)
    left.plot(*series(rows, "lr"), color=_LINE, linewidth=1.6)
    left.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    _label(left, "learning rate")
    steps, norm = series(rows, "grad_norm")
    right.plot(steps, norm, color=_FAINT, linewidth=0.8)
    right.plot(steps, moving_average(norm, window(rows)), color=_LINE, linewidth=1.6)
    right.set_yscale("log")
    _label(right, "gradient norm before clipping")
    return figure


def diffusion_losses(arms: Mapping[str, Sequence[Rows]]) -> Figure:
    """Diffusion loss of several arms: the mean over their seeds, and the range from the lowest to the highest."""
    figure, (axes,) = _panels(1)
    for (name, runs), colour in zip(arms.items(), ARM_COLOURS, strict=False):
        curves = [series(rows, "diffusion_loss") for rows in runs]
        length = min(len(steps) for steps, _ in curves)
        smooth = np.stack([moving_average(values[:length], window(runs[0])) for _, values in curves])
        steps = curves[0][0][:length]
        axes.plot(steps, smooth.mean(0), color=colour, label=name, linewidth=1.6)
        axes.fill_between(steps, smooth.min(0), smooth.max(0), color=colour, alpha=0.15, linewidth=0)
    _label(axes, "diffusion loss (nats)")
    axes.legend(frameon=False, fontsize=8)
    return figure


def scores_by_arm(arms: Mapping[str, Sequence[float]], intervals: Mapping[str, tuple[float, float] | None]) -> Figure:
    """Functional match of every seed as a dot, its mean as a bar, and the interval of the mean where there is one."""
    figure, (axes,) = _panels(1)
    for place, ((name, scores), colour) in enumerate(zip(arms.items(), ARM_COLOURS, strict=False)):
        percent = 100 * np.array(scores)
        axes.plot([place - 0.2, place + 0.2], [percent.mean()] * 2, color=colour, linewidth=2.5)
        spread = np.linspace(-0.08, 0.08, len(scores)) if len(scores) > 1 else [0.0]
        axes.plot([place + shift for shift in spread], percent, "o", color=colour, markersize=5)
        interval = intervals[name]
        if interval is not None:
            axes.vlines(place - 0.2, 100 * interval[0], 100 * interval[1], color=colour, linewidth=1.2)
    axes.set_xticks(range(len(arms)), list(arms))
    axes.set_ylim(0, 100)
    axes.set_xlim(-0.5, len(arms) - 0.5)
    _plain(axes, "functional match (%)")
    return figure


def _panels(number: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(7.2, 3.0), layout="constrained", dpi=150)
    return figure, [figure.add_subplot(1, number, place + 1) for place in range(number)]


def _label(axes: Axes, title: str) -> None:
    axes.set_xlabel("optimizer step", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    _plain(axes, title)


def _plain(axes: Axes, title: str) -> None:
    """No box, a faint grid, and the unit as a title in place of a rotated label."""
    axes.set_title(title, loc="left", fontsize=9)
    axes.tick_params(labelsize=8, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
