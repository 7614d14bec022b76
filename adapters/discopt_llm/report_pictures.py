"""The charts of a report: loss over tokens, estimates with their intervals, sizes against losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from discopt.progress import format_count, format_loss
from discopt_llm.markup import Markup, join, tag
from discopt_llm.report_intervals import Interval
from discopt_llm.report_svg import (
    LETTER,
    MARKS,
    NARROW,
    Frame,
    axes,
    key,
    line,
    mark,
    mark_path,
    on_two_widths,
    shortened,
    span_of,
    spans_decades,
    svg,
    text,
)

__all__ = [
    "Point",
    "difference_words",
    "interval_picture",
    "interval_words",
    "loss_picture",
    "pareto_picture",
    "shows_loss",
]

USUAL = 0.95  # share of the stages whose medians have to fit into the picture
MOST_MARKS = 150  # of a stage; where there are more, its lines say enough
FINAL = "final choice"

Line = Mapping[str, Any]


@dataclass(frozen=True)
class _Stage:
    """The lines of one kind of stage, and how they are drawn."""

    name: str
    lines: tuple[Line, ...]
    class_: str
    shape: str


def shows_loss(trace: Sequence[Line]) -> bool:
    """Whether there is anything to draw."""
    return any(_finite(line.get("best")) for line in trace)


def loss_picture(trace: Sequence[Line], loss: str) -> Markup:
    """The best profile's loss over the tokens spent, and behind it each stage's candidates, best to median."""
    stages = _stages(trace)
    entries = [
        (tag("path", d="M2 7h24", class_="best"), "best profile, as measured last"),
        *(
            (
                join(line(14, 0, 14, 14, f"spread {stage.class_}"), mark(stage.shape, 14, 7, f"dot {stage.class_}")),
                _stage_words(stage),
            )
            for stage in stages
        ),
    ]
    return join(on_two_widths(lambda width: _loss_chart(trace, stages, loss, width)), key(*entries))


def _loss_chart(trace: Sequence[Line], stages: Sequence[_Stage], loss: str, width: float) -> Markup:
    best = [(at["total_fidelity"], at["best"]) for at in trace if _finite(at.get("best"))]
    seen = [at for stage in stages for at in stage.lines if _finite(at["loss"])]
    tokens = [at["total_fidelity"] for at in trace]
    frame = Frame(width, 300 if width > NARROW else 270, top=28)
    low = min([value for _, value in best] + [at["loss"] for at in seen])
    medians = sorted(at["median"] for at in seen)
    usual = medians[int(USUAL * (len(medians) - 1))] if medians else low
    high = max([value for _, value in best] + [usual])
    log_x, log_y = spans_decades(tokens), spans_decades([low, high])
    x = frame.x(*span_of(tokens, margin=0.03, log=log_x), log=log_x)
    y = frame.y(*span_of([low, high], log=log_y), log=log_y)
    parts = [axes(frame, x, y, f"tokens spent{', log scale' if log_x else ''}", f"{loss} (lower is better)")]
    for stage in stages:
        drawn = [at for at in stage.lines if _finite(at["loss"]) and at["loss"] <= y.high]
        spread = "".join(
            f"M{x(at['total_fidelity']):.1f} {y(at['loss']):.1f}V{y(at['median']):.1f}"
            for at in drawn
            if _finite(at["median"])
        )
        parts.append(tag("path", d=spread, class_=f"spread {stage.class_}"))
        if len(drawn) <= MOST_MARKS:
            marks = "".join(mark_path(stage.shape, x(at["total_fidelity"]), y(at["loss"]), 3.6) for at in drawn)
            parts.append(tag("path", d=marks, class_=f"dot {stage.class_}"))
    path = _steps([(x(at), y(value)) for at, value in best])
    parts.append(tag("path", d=path, class_="best"))
    at, value = best[-1]
    parts.append(mark("circle", x(at), y(value), "end", title=f"{format_loss(value)} after {format_count(at)} tokens"))
    fell = len(best) > 1 and best[-2][1] > value  # the line comes from above
    below = (fell and y(value) < frame.height - frame.bottom - 24) or y(value) < frame.top + 24
    where = y(value) + (20 if below else -10)
    parts.append(text(x(at) + 6, where, format_loss(value), anchor="end", class_="value"))
    label = (
        f"Loss over the tokens spent: the best profile's goes from {format_loss(best[0][1])} to "
        f"{format_loss(value)} in {format_count(at)} tokens."
    )
    return svg(frame, label, *parts)


def _steps(points: Sequence[tuple[float, float]]) -> str:
    """A path that goes across first, then up or down."""
    (x, y), *rest = points
    return f"M{x:.1f} {y:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in rest)


def _stages(trace: Sequence[Line]) -> list[_Stage]:
    """The choice of the start, the stages of the generations by number, and the final choice."""
    found: dict[str, list[Line]] = {}
    for at in trace:
        final, start = at.get("phase") == "choice", not at["generation"]
        name = FINAL if final else "start candidates" if start else f"stage {at['stage']}"
        found.setdefault(name, []).append(at)
    numbered = sorted(name for name in found if name.startswith("stage"))
    ordered = [name for name in ("start candidates", *numbered, FINAL) if name in found]
    looks = {"start candidates": ("s0", "circle"), FINAL: ("s4", "diamond")}
    looks |= {name: (f"s{min(i, 3)}", MARKS[min(i, 2)]) for i, name in enumerate(numbered, start=1)}
    return [_Stage(name, tuple(found[name]), *looks[name]) for name in ordered]


def _stage_words(stage: _Stage) -> str:
    fidelities = sorted({at["fidelity"] for at in stage.lines})
    each = " to ".join(dict.fromkeys(format_count(f) for f in (fidelities[0], fidelities[-1])))
    unseen = ", on text that the search has not seen" if stage.name == FINAL else ""
    return f"{stage.name} on {each} tokens{unseen}: best to median"


def interval_picture(
    estimates: Mapping[str, Interval], title: str, label: str, *, found: str | None = None, zero: str | None = None
) -> Markup:
    """A row for each estimate: a dot and its interval. `found` names the one that stands out.

    `zero` has the axis show 0, with these words beside it.
    """
    return on_two_widths(lambda width: _interval_chart(estimates, title, label, found, zero, width))


def _interval_chart(
    estimates: Mapping[str, Interval], title: str, label: str, found: str | None, zero: str | None, width: float
) -> Markup:
    narrow = width <= NARROW
    shown = interval_words if zero is None else difference_words
    rows = {name: interval for name, interval in estimates.items() if math.isfinite(interval.mean)}
    ends = [value for i in rows.values() for value in (i.mean, i.low, i.high) if math.isfinite(value)]
    longest = max(len(name) for name in rows) * LETTER + 16
    gutter = 16.0 if narrow else min(longest, 0.42 * width)
    step, top = (44.0, 10.0) if narrow else (30.0, 8.0 + 16.0 * (zero is not None))
    frame = Frame(width, top + step * len(rows) + 52, left=gutter, right=64, top=top)
    x = frame.x(*span_of([*ends, *([0.0] if zero is not None else [])]))
    parts = [axes(frame, x, None, title)]
    if zero is not None:
        parts.append(line(x(0), top, x(0), frame.height - frame.bottom, "edge"))
        if not narrow:
            parts.append(text(x(0), top - 8, zero, anchor="middle", class_="tick"))
    for i, (name, interval) in enumerate(rows.items()):
        class_ = "found" if name == found else "other"
        y = top + step * (i + 0.5) + (9 if narrow else 0)
        where = (2.0, y - 12, "start") if narrow else (gutter - 12, y + 4, "end")
        short = shortened(name, (width if narrow else gutter) - 14)
        parts.append(text(where[0], where[1], short, anchor=where[2], class_=f"name {class_}"))
        if interval.known:
            parts.append(line(x(interval.low), y, x(interval.high), y, f"whisker {class_}"))
            parts += [line(x(end), y - 5, x(end), y + 5, f"whisker {class_}") for end in (interval.low, interval.high)]
        words = f"{name}: {shown(interval)}"
        parts.append(mark("diamond" if name == found else "circle", x(interval.mean), y, f"dot {class_}", title=words))
        mean = format_loss(interval.mean) if zero is None else _signed(interval.mean)
        parts.append(text(width - 2, y + 4, mean, anchor="end", class_="tick"))
    said = "; ".join(f"{name} {shown(interval)}" for name, interval in rows.items())
    return svg(frame, f"{label}: {said}", *parts)


def interval_words(interval: Interval) -> str:
    """0.4715 [0.45, 0.5]."""
    if not math.isfinite(interval.mean):
        return "not finite"
    ends = f" [{interval.low:.3g}, {interval.high:.3g}]" if interval.known else ""
    return f"{interval.mean:.4g}{ends}"


def difference_words(interval: Interval) -> str:
    """−0.115 [−0.143, −0.0861]."""
    if not math.isfinite(interval.mean):
        return "not finite"
    ends = f" [{_signed(interval.low)}, {_signed(interval.high)}]" if interval.known else ""
    return _signed(interval.mean) + ends


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "−")


@dataclass(frozen=True)
class Point:
    """A run in a picture of sizes against losses."""

    key: str  # a letter or a number, as the table has it
    name: str
    size: float  # over that of the dense model
    loss: Interval
    shape: str  # one of MARKS
    front: bool  # no other is both smaller and better


def pareto_picture(points: Sequence[Point], loss: str) -> Markup:
    """Size against loss; the front, of points that no other beats in both, is joined by a line."""
    return on_two_widths(lambda width: _pareto_chart(points, loss, width))


def _pareto_chart(points: Sequence[Point], loss: str, width: float) -> Markup:
    frame = Frame(width, 340 if width > NARROW else 300, top=28)
    losses = [
        value for p in points for value in (p.loss.mean, p.loss.low, p.loss.high) if math.isfinite(value) and value > 0
    ]
    log = spans_decades(losses) if losses else False
    x = frame.x(*span_of([100 * p.size for p in points], margin=0.1))
    y = frame.y(*span_of(losses or [p.loss.mean for p in points], margin=0.1, log=log), log=log)
    scale = ", log scale" if log else ""
    parts = [axes(frame, x, y, "size, % of the dense model", f"{loss}{scale}")]
    front = sorted((p for p in points if p.front), key=lambda p: p.size)
    if len(front) > 1:
        parts.append(tag("path", d=_steps([(x(100 * p.size), y(p.loss.mean)) for p in front]), class_="front"))
    for p in points:
        class_ = "found" if p.front else "other"
        px, py = x(100 * p.size), y(p.loss.mean)
        if p.loss.known:
            parts.append(line(px, y(p.loss.low), px, y(p.loss.high), f"whisker {class_}"))
        words = f"{p.key}, {p.name}: {100 * p.size:.1f}% of the dense size, {interval_words(p.loss)}"
        parts.append(mark(p.shape, px, py, f"dot {class_}", title=words, radius=5.5))
        side, anchor = (9, "start") if p.front else (-9, "end")
        parts.append(text(px + side, py - 7, p.key, anchor=anchor, class_=f"value {class_}"))
    said = "; ".join(f"{p.key} {100 * p.size:.1f}% and {interval_words(p.loss)}" for p in points)
    return svg(frame, f"Size against loss: {said}", *parts)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
