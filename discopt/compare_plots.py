"""Pictures of a comparison. They need matplotlib, which the extra `plot` brings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from discopt.compare_statistics import Gaps, cliques, first_hits, quartiles, rank
from discopt.compare_summary import Comparison
from discopt.plots import GRID, INK, MUTED, _tick_formatter, new_figure, save_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind tell apart, without the yellow that white drowns.
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
DEFAULT_COLOR = "#000000"
LINES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))  # the next round of the colours takes the next
MARKERS = ("o", "s", "^", "D")
FLOOR = 1e-5  # gaps below are drawn there
TARGETS = np.geomspace(1.0, 1e-4, 41)  # gaps
COLUMNS = 4


def plot_comparison(comparison: Comparison, folder: Path, names: Sequence[str]) -> None:
    """Write the pictures of curves, targets, running times and ranks under these names.

    Raises DiscoptError where matplotlib is missing.
    """
    for draw, name in zip((_curves, _targets, _running_times, _ranks), names, strict=True):
        save_figure(draw(comparison), folder / name)


def _style(c: Comparison, a: int) -> dict[str, Any]:
    """The look of an algorithm's lines, the same in all pictures."""
    if c.algorithms[a] == c.default:
        return {"color": DEFAULT_COLOR, "linestyle": "-", "linewidth": 2.4, "zorder": 5}
    index = [name for name in c.algorithms if name != c.default].index(c.algorithms[a])
    round_, color = divmod(index, len(COLORS))
    return {"color": COLORS[color], "linestyle": LINES[round_ % len(LINES)], "linewidth": 1.5, "zorder": 3}


def _legend(figure: Figure, c: Comparison, shown: Sequence[int], *, markers: bool = False) -> None:
    """Above everything, the names of those algorithms."""
    from matplotlib.lines import Line2D

    looks = [{**_style(c, a), **({"marker": _marker(c, a), "linestyle": ""} if markers else {})} for a in shown]
    handles = [Line2D([], [], **look, label=c.algorithms[a]) for look, a in zip(looks, shown, strict=True)]
    columns = max(2, int(figure.get_figwidth() / 1.7))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=9, labelcolor=INK)


def _marker(c: Comparison, a: int) -> str:
    """Algorithms of one colour have different line styles, and different markers."""
    return MARKERS[LINES.index(_style(c, a)["linestyle"])]


def _found_something(c: Comparison) -> list[int]:
    """Algorithms with at least one curve."""
    return np.flatnonzero(np.isfinite(c.medians).any(axis=(0, 2))).tolist()


def _log_ticks(axis: Axis, low: float, high: float) -> None:
    """Plain numbers on a log axis: a few within a decade or two, else the decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 30 * low else (1.0,), numticks=8))
    axis.set_major_formatter(_tick_formatter() if low >= 1 else FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _curves(c: Comparison) -> Figure:
    """The gap of each algorithm over what it spent: medians, and quartiles as bands; a panel for each problem."""
    columns = min(COLUMNS, len(c.problems))
    rows = math.ceil(len(c.problems) / columns)
    figure = new_figure(max(3.4 * columns, 6.0), 2.6 * rows + 0.9)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, p in zip(grid.flat, range(rows * columns), strict=True):
        if p >= len(c.problems):
            axes.set_visible(False)
            continue
        _panel(axes, c, p)
    figure.supxlabel("full measurements spent", fontsize=10, color=INK)
    figure.supylabel("gap: 0 at the reference, 1 at a random profile (lower is better)", fontsize=10, color=INK)
    _legend(figure, c, _found_something(c))
    return figure


def _panel(axes: Axes, c: Comparison, p: int) -> None:
    low, median, high = (_drawn(values) for values in quartiles(np.moveaxis(c.gaps[p], 1, 0)))  # (a, t) each
    for a in range(len(c.algorithms)):
        if np.isfinite(median[a]).any():
            style = _style(c, a)
            top = np.where(np.isfinite(high[a]), high[a], np.nanmax(high[np.isfinite(high)], initial=1.0))
            axes.fill_between(
                c.points, low[a], top, where=np.isfinite(low[a]), color=style["color"], alpha=0.13, linewidth=0
            )
            axes.plot(c.points, np.where(np.isfinite(median[a]), median[a], np.nan), **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    seen = median[np.isfinite(median)]
    if len(seen):
        bottom, top = max(FLOOR * 0.8, seen.min() / 1.4), max(seen.max(), seen.min() * 3) * 1.2
        axes.set_ylim(bottom, top)
        _log_ticks(axes.yaxis, bottom, top)
    axes.set_xlim(c.points[0], c.points[-1])
    _log_ticks(axes.xaxis, c.points[0], c.points[-1])
    axes.set_title(c.problems[p].name, loc="left", fontsize=9.5, fontweight="bold")
    for budget in c.budgets:
        axes.axvline(budget, color=MUTED, linewidth=0.6, linestyle=(0, (2, 3)), zorder=1)
    style_axes(axes)


def _drawn(gaps: Gaps) -> Gaps:
    """With room on a log axis for gaps that are 0."""
    return np.maximum(gaps, FLOOR)


def _targets(c: Comparison) -> Figure:
    """Share of all pairs of a run and a target gap that were reached, over what the run had spent."""
    figure = new_figure(max(5.2 * len(c.subsets), 6.5), 4.6)
    panels = figure.subplots(1, len(c.subsets), squeeze=False, sharey=True)[0]
    for axes, (name, problems) in zip(panels, c.subsets.items(), strict=True):
        for a in np.flatnonzero(c.everywhere):
            axes.plot(c.points, _reached(c, problems, int(a)), **_style(c, int(a)))
        axes.set_xscale("log")
        axes.set_xlim(c.points[0], c.points[-1])
        _log_ticks(axes.xaxis, c.points[0], c.points[-1])
        axes.set_xlabel("full measurements spent")
        axes.set_title(f"{name} problems ({len(problems)})", loc="left", fontsize=10, fontweight="bold")
        style_axes(axes)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel(f"share of {len(TARGETS)} target gaps from 1 to {TARGETS[-1]:g}\nreached (higher is better)")
    style_axes(panels[0])
    _legend(figure, c, np.flatnonzero(c.everywhere).tolist())
    return figure


def _reached(c: Comparison, problems: NDArray[np.intp], a: int) -> Gaps:
    """(t,)"""
    runs = c.gaps[problems, a].reshape(-1, len(c.points))
    hits = np.concatenate([first_hits(runs, c.points, target) for target in TARGETS])
    return (hits[:, None] <= np.array(c.points)).mean(axis=0)


def _running_times(c: Comparison) -> Figure:
    """Expected running time to the tolerated gap, a row for each problem; at the right edge, never reached."""
    shown = _found_something(c)
    figure = new_figure(9.0, max(0.34, 0.045 * len(shown)) * len(c.problems) + 2.0)
    axes = figure.add_subplot()
    finite = c.running_times[np.isfinite(c.running_times)].tolist()
    low, high = min(finite, default=c.points[0]), max([*finite, c.points[-1]])
    never = 1.6 * high
    offsets = np.linspace(-0.42, 0.42, len(shown) + 2)[1:-1]
    for offset, a in zip(offsets, shown, strict=True):
        times, rows = c.running_times[:, a], np.arange(len(c.problems)) + offset
        hollow = np.isinf(times)
        color, marker = _style(c, a)["color"], _marker(c, a)
        axes.scatter(times[~hollow], rows[~hollow], color=color, marker=marker, s=24, zorder=3)
        axes.scatter(
            np.full(hollow.sum(), never), rows[hollow], facecolors="white", edgecolors=color, marker=marker, s=14
        )
    for p in range(1, len(c.problems)):
        axes.axhline(p - 0.5, color=GRID, linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(low / 1.2, never * 1.15)
    _log_ticks(axes.xaxis, low, high)
    axes.axvline(1.25 * high, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
    axes.set_yticks(range(len(c.problems)), [facts.name for facts in c.problems])
    axes.set_ylim(len(c.problems) - 0.5, -0.5)
    axes.set_xlabel(f"expected full measurements to a gap of {c.tolerance:g} (hollow, at the right: never reached)")
    style_axes(axes)
    axes.grid(False, axis="y")
    _legend(figure, c, shown, markers=True)
    return figure


def _ranks(c: Comparison) -> Figure:
    """Average ranks at each budget over all problems; bars join those that do not differ significantly."""
    shown = np.flatnonzero(c.everywhere).tolist()
    height = 0.24 * math.ceil(len(shown) / 2) + 1.25
    figure = new_figure(8.0, height * len(c.budgets))
    for axes, b in zip(figure.subplots(len(c.budgets), 1, squeeze=False)[:, 0], range(len(c.budgets)), strict=True):
        _rank_axis(axes, c, b, shown)
    return figure


def _rank_axis(axes: Axes, c: Comparison, b: int, shown: Sequence[int]) -> None:
    """A critical-difference diagram: the best rank at the left, names on stems, bars over ranks that are alike."""
    axes.set_axis_off()
    count = len(shown)
    axes.set_title(f"{c.budgets[b]:,} full measurements", loc="left", fontsize=10, fontweight="bold", color=INK)
    if not count:
        return
    found = rank(c.medians[:, shown, b])
    half = math.ceil(count / 2)
    margin = 0.35 * max(1, count - 1)
    axes.set_xlim(1 - margin, count + margin)
    axes.set_ylim(-half - 1.6, 2.2)
    axes.hlines(0, 1, count, color=INK, linewidth=1.0)
    for tick in range(1, count + 1):
        axes.vlines(tick, 0, 0.18, color=INK, linewidth=1.0)
        axes.text(tick, 0.3, str(tick), ha="center", va="bottom", fontsize=8, color=MUTED)
    order = np.argsort(found.ranks, kind="stable")
    for position, index in enumerate(order):
        left = position < half
        y = -1.4 - (position if left else count - 1 - position)
        end = 1 - 0.04 * margin if left else count + 0.04 * margin
        place = found.ranks[index]
        style = _style(c, shown[index])
        axes.plot([place, place, end], [0, y, y], color=style["color"], linewidth=1.2)
        text = f"{c.algorithms[shown[index]]}  {place:.2f}" if left else f"{place:.2f}  {c.algorithms[shown[index]]}"
        axes.text(
            end + (-0.03 if left else 0.03) * margin,
            y,
            text,
            ha="right" if left else "left",
            va="center",
            fontsize=9,
            color=INK,
            fontweight="bold" if c.algorithms[shown[index]] == c.default else "normal",
        )
    if math.isfinite(found.critical_difference):
        bars = cliques(found.ranks.tolist(), found.critical_difference)
        for level, (low, high) in enumerate(bars):
            y = -0.25 - min(0.25, 0.9 / len(bars)) * level
            axes.plot([low - 0.03, high + 0.03], [y, y], color=INK, linewidth=2.2, solid_capstyle="round", zorder=6)
        end = 1 + min(found.critical_difference, count - 1)
        axes.plot([1, end], [1.35, 1.35], color=INK, linewidth=1.2, marker="|", markersize=6)
        label = f"critical difference {found.critical_difference:.2f}, Friedman p = {found.p:.2g}"
        axes.text(1, 1.55, label, fontsize=8, color=MUTED, va="bottom")
