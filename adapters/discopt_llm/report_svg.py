"""Axes, marks and cells of the pictures in a report, as SVG; positions are pixels, colours are CSS classes.

Colours are classes so that a page can have other ones in the dark. Whatever a colour says is also said by a mark's
shape, a line's width or a word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from discopt.plots import short_number
from discopt_llm.markup import Markup, join, tag

__all__ = [
    "MARKS",
    "NARROW",
    "WIDE",
    "Frame",
    "Scale",
    "axes",
    "key",
    "line",
    "mark",
    "mark_path",
    "on_two_widths",
    "shortened",
    "span_of",
    "spans_decades",
    "svg",
    "text",
]

WIDE, NARROW = 860.0, 350.0  # pixels
LETTER = 6.7  # pixels that a letter takes at most, on average
TICKS = 6
LOGARITHMIC = 30.0  # times that values have to lie apart for such a scale
MARKS = ("circle", "square", "triangle", "diamond", "wedge")


@dataclass(frozen=True)
class Scale:
    """From values to pixels."""

    low: float
    high: float
    start: float  # pixels
    end: float
    log: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"a scale needs a range, got {self.low} to {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic scale needs values above 0, got {self.low}")

    def __call__(self, value: float) -> float:
        """The pixel of a value; those out of range lie at the ends."""
        share = (self._flat(value) - self._flat(self.low)) / (self._flat(self.high) - self._flat(self.low))
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def _flat(self, value: float) -> float:
        return math.log(max(value, self.low / 1e3)) if self.log else value

    def ticks(self, count: int = TICKS) -> list[float]:
        """At most so many round values within the range."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            for steps in ((1, 2, 5), (1, 3), (1,)):
                found = [m * 10.0**e for e in range(first, last + 1) for m in steps]
                found = [value for value in found if self.low <= value <= self.high]
                if len(found) <= count:
                    break
            if len(found) >= 2:
                return found[:: math.ceil(len(found) / count)]
        unit = 10.0 ** math.floor(math.log10((self.high - self.low) / count))
        for step in (m * unit for m in (1, 2, 2.5, 5, 10, 20)):
            places = range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)
            if len(places) <= count:
                break
        return [i * step for i in places]


@dataclass(frozen=True)
class Frame:
    """The room of a picture, and of its axes within, pixels."""

    width: float
    height: float
    left: float = 56
    right: float = 16
    top: float = 12
    bottom: float = 46

    def x(self, low: float, high: float, *, log: bool = False) -> Scale:
        """A horizontal scale."""
        return Scale(low, high, self.left, self.width - self.right, log)

    def y(self, low: float, high: float, *, log: bool = False) -> Scale:
        """A vertical scale, upwards."""
        return Scale(low, high, self.height - self.bottom, self.top, log)


def span_of(values: Sequence[float], *, margin: float = 0.06, log: bool = False) -> tuple[float, float]:
    """A range that holds the values, with some room at both ends; one value alone gets a range around it."""
    low, high = min(values), max(values)
    if log:
        room = max((high / low) ** margin, 1.02)
        return low / room, high * room
    room = margin * (high - low) or abs(high) * 0.1 or 1.0
    return low - room, high + room


def spans_decades(values: Sequence[float]) -> bool:
    """Whether values, all above 0, are so far apart that a logarithmic scale shows more."""
    return min(values) > 0 and max(values) / min(values) > LOGARITHMIC


def svg(frame: Frame, label: str, *parts: Markup, fixed: bool = False, class_: str | None = None) -> Markup:
    """The picture; `fixed` keeps its size, else it fills the width there is. `label` says what it shows."""
    size = {"width": f"{frame.width:g}", "height": f"{frame.height:g}"} if fixed else {}
    return tag(
        "svg",
        *parts,
        viewBox=f"0 0 {frame.width:g} {frame.height:g}",
        role="img",
        aria_label=label,
        class_=class_,
        **size,
    )


def text(x: float, y: float, words: str, *, anchor: str = "start", class_: str | None = None) -> Markup:
    """Words with their base line at y."""
    return tag("text", words, x=float(x), y=float(y), text_anchor=anchor, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return tag("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def mark_path(shape: str, x: float, y: float, radius: float = 4.0) -> str:
    """The outline of a mark around a point, one of `MARKS`, to be put into a path."""
    r, x, y = radius, round(x, 1), round(y, 1)
    if shape == "circle":
        return f"M{x - r:g} {y:g}a{r:g} {r:g} 0 1 0 {2 * r:g} 0a{r:g} {r:g} 0 1 0 {-2 * r:g} 0z"
    if shape == "square":
        r = 0.85 * r
        return f"M{x - r:g} {y - r:g}h{2 * r:g}v{2 * r:g}h{-2 * r:g}z"
    if shape == "triangle":
        return f"M{x:g} {y - 1.15 * r:g}l{r:g} {1.9 * r:g}h{-2 * r:g}z"
    if shape == "diamond":
        r = 1.3 * r
        return f"M{x:g} {y - r:g}l{r:g} {r:g}l{-r:g} {r:g}l{-r:g} {-r:g}z"
    return f"M{x:g} {y + 1.15 * r:g}l{r:g} {-1.9 * r:g}h{-2 * r:g}z"


def mark(shape: str, x: float, y: float, class_: str, *, title: str | None = None, radius: float = 4.5) -> Markup:
    """One mark, with a title to point at."""
    inside = [tag("title", title)] if title else []
    return tag("path", *inside, d=mark_path(shape, x, y, radius), class_=class_)


def axes(frame: Frame, x: Scale | None, y: Scale | None, x_title: str = "", y_title: str = "") -> Markup:
    """Grid, numbers and titles; the vertical axis has its title on top of it."""
    bottom = frame.height - frame.bottom
    parts = []
    if y is not None:
        for value in y.ticks():
            parts.append(line(frame.left, y(value), frame.width - frame.right, y(value), "grid"))
            parts.append(
                text(frame.left - 7, y(value) + 4, short_number(value).replace("-", "−"), anchor="end", class_="tick")
            )
        parts.append(text(4, 13, y_title, class_="axis"))
    if x is not None:
        room = (x.end - x.start) / 58  # numbers side by side
        for value in x.ticks(max(2, min(TICKS, int(room)))):
            parts.append(line(x(value), frame.top, x(value), bottom, "grid"))
            parts.append(
                text(x(value), bottom + 17, short_number(value).replace("-", "−"), anchor="middle", class_="tick")
            )
        parts.append(text((x.start + x.end) / 2, bottom + 37, x_title, anchor="middle", class_="axis"))
        parts.append(line(x.start, bottom, x.end, bottom, "edge"))
    return tag("g", *parts, aria_hidden="true")


def shortened(words: str, pixels: float) -> str:
    """Words that fit, with dots for what does not."""
    fits = max(3, int(pixels / LETTER))
    return words if len(words) <= fits else words[: fits - 1].rstrip() + "…"


def key(*entries: tuple[Markup, str]) -> Markup:
    """A legend: small pictures, 28 x 14 pixels each, and what they stand for."""
    swatches = [
        tag("li", tag("svg", drawing, viewBox="0 0 28 14", width="28", height="14", aria_hidden="true"), words)
        for drawing, words in entries
    ]
    return tag("ul", swatches, class_="key")


def on_two_widths(draw: Callable[[float], Markup]) -> Markup:
    """A picture drawn for a desk and for a phone, each with letters of the same size; the page shows one of them."""
    return join(*(tag("div", draw(width), class_=name) for name, width in (("wide", WIDE), ("narrow", NARROW))))
