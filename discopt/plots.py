"""Pictures of a run. They need matplotlib, which the extra `plot` brings."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from discopt.errors import DiscoptError, RunFolderError
from discopt.files import write_atomic
from discopt.progress import format_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2937", "#6b7280", "#e5e7eb"
BEST = "#0f766e"
STAGES = ("#64748b", "#3b82f6", "#f59e0b", "#ec4899")  # the first, second, ... stage; the last repeats

_log = logging.getLogger(__name__)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches, on the file backend and without global state; needs the extra `plot`."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DiscoptError("a picture needs the extra plot: pip install 'discopt-search[plot]'") from error
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: Axes) -> None:
    """The look that all pictures share."""
    axes.set_axisbelow(True)
    axes.grid(True, color=GRID, linewidth=0.8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=9)
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
        label.set_color(INK)


def is_drawn(plot: Callable[[], object]) -> bool:
    """Whether a picture could be drawn, which takes matplotlib; a place that cannot be written is an error still."""
    try:
        plot()
    except RunFolderError:
        raise
    except DiscoptError as error:
        _log.info("no picture: %s", error)
        return False
    return True


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write the picture as PNG, whole or not at all."""
    import io

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomic(path, buffer.getvalue())


def plot_trace(
    trace: Iterable[Mapping[str, Any]],
    path: str | os.PathLike[str],
    unit: str = "evaluations",
    *,
    loss: str = "loss",
    title: str | None = None,
) -> Path:
    """Draw a run's trace to a PNG: the elite's loss over the fidelity spent, and each stage's candidates behind it.

    `unit` names the fidelity ("tokens"), `loss` the loss ("KL to the dense model, nats per token"). Raises
    DiscoptError where matplotlib is missing and ValueError for a trace without a measurement.
    """
    lines = [line for line in trace if line.get("total_fidelity")]
    best = [(line["total_fidelity"], line["best"]) for line in lines if _finite(line.get("best"))]
    if not best:
        raise ValueError(f"a trace with at least one measured best is needed, got {len(lines)} lines without")
    figure = new_figure(7.0, 4.2)
    axes = figure.add_subplot()
    handles = [_draw_stage(axes, lines, stage, i) for i, stage in enumerate(sorted({_stage(line) for line in lines}))]
    spent, losses = zip(*best, strict=True)
    (curve,) = axes.plot(
        spent, losses, color=BEST, linewidth=2.0, drawstyle="steps-post", label="best profile", zorder=4
    )
    axes.plot(spent[-1:], losses[-1:], "o", color=BEST, markersize=5, zorder=5)
    axes.annotate(
        f"{losses[-1]:.4g}",
        (spent[-1], losses[-1]),
        xytext=(7, 0),
        textcoords="offset points",
        color=BEST,
        fontsize=10,
        fontweight="bold",
        va="center",
    )
    _scale(axes, lines, losses)
    axes.set_xlabel(f"{unit} spent")
    axes.set_ylabel(f"{loss}{chr(10) if len(loss) > 24 else ' '}(lower is better)")
    axes.xaxis.set_major_formatter(_tick_formatter())
    if title:
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    style_axes(axes)
    shown = [handle for handle in handles if handle is not None]
    axes.legend(handles=[curve, *shown], frameon=False, fontsize=9, labelcolor=INK, loc="upper right")
    save_figure(figure, path)
    return Path(path)


def _draw_stage(axes: Axes, lines: Sequence[Mapping[str, Any]], stage: int, index: int) -> Any:
    """Faintly, from the best of a stage's candidates to their median; the legend's handle, None if there is nothing."""
    rows = [
        line for line in lines if _stage(line) == stage and _finite(line.get("loss")) and _finite(line.get("median"))
    ]
    if not rows:
        return None
    color = STAGES[min(index, len(STAGES) - 1)]
    x = [line["total_fidelity"] for line in rows]
    low, middle = [line["loss"] for line in rows], [line["median"] for line in rows]
    fidelities = {line["fidelity"] for line in rows}
    each = f" at {format_count(fidelities.pop())}" if len(fidelities) == 1 else ""
    label = ("start candidates" if stage == 0 else f"stage {stage}") + f"{each}, best to median"
    if len(rows) < 8:  # too few for an area
        return axes.vlines(x, low, middle, color=color, linewidth=4.0, alpha=0.5, zorder=2, label=label)
    return axes.fill_between(x, low, middle, color=color, alpha=0.3, linewidth=0, zorder=2, label=label)


def _scale(axes: Axes, lines: Sequence[Mapping[str, Any]], best: Sequence[float]) -> None:
    """Log scale where losses span decades; room for the spread, but not for what is far above the curve."""
    seen = [line[key] for line in lines for key in ("loss", "median") if _finite(line.get(key))] + list(best)
    low, high = min(seen), max(seen)
    if low > 0 and max(best) / low > 30:
        axes.set_yscale("log")
        return
    medians = sorted(line["median"] for line in lines if _finite(line.get("median")))
    usual = medians[int(0.95 * (len(medians) - 1))] if medians else high
    top = max(max(best), usual)
    if high > top and top > low:
        axes.set_ylim(low - 0.05 * (top - low), top + 0.08 * (top - low))


def _tick_formatter() -> Callable[..., str] | Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: short_number(value))


def short_number(value: float) -> str:
    """An axis number: 250, 20k, 1.5M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _stage(line: Mapping[str, Any]) -> int:
    return int(line.get("stage") or 0)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
