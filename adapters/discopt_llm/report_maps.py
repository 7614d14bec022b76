"""Maps of a profile: blocks from top to bottom, units from left to right, a level's word and colour in each cell.

Colours go from light, for the cheapest level, to dark, for the dearest, which the colour-blind see as well; cells
that were dropped are hatched. The words are black or white, whichever stands out more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from discopt.space import Levels
from discopt_llm.markup import Markup, join, tag
from discopt_llm.report_record import Move
from discopt_llm.report_svg import Frame, axes, key, line, on_two_widths, svg, text
from discopt_llm.report_units import DROPPED, KEPT, Units
from discopt_llm.report_words import size_words

__all__ = ["distance_picture", "level_map", "move_map", "start_of"]

# From light to dark: ColorBrewer's YlGnBu (Brewer, 2013), without its two darkest.
_SHADES = ("#ffffd9", "#edf8b1", "#c7e9b4", "#7fcdbb", "#41b6c4", "#1d91c0", "#225ea8")
_DOWN, _UP = ("#fdd0a2", "#f16913"), ("#c6dbef", "#2171b5")  # by one step, and by the most; orange and blue
ROW, LETTER = 22.0, 7.4  # pixels
MOST_SWATCHES = 9  # in a legend; more levels are shown by some of them


@dataclass(frozen=True)
class _Cell:
    """What is drawn of a unit."""

    word: str
    title: str
    fill: str | None  # None: as the class has it
    class_: str


def level_map(units: Units, profile: Levels) -> Markup:
    """The level of every unit of a profile (n,), with a legend."""
    cells = []
    for unit, level in enumerate(profile.tolist()):
        label = units.labels[unit][level]
        costs = "" if units.bytes is None else f", {size_words(int(units.bytes[unit, level]))}"
        title = f"{units.names[unit]}: {units.words(unit, level)}{costs}"
        if label == DROPPED:
            cells.append(_Cell(units.word(unit, level), title, None, "gone"))
        else:
            shade = 0.35 if label == KEPT else units.share(unit, level)
            cells.append(_Cell(units.word(unit, level), title, _shade(_SHADES, shade), "cell"))
    label = f"Map of the levels of {units.n} units in {units.blocks} blocks; the cost table and profile.json have them."
    return join(_scrolled(_map(units, cells, label), "Map of the profile"), _level_key(units, profile))


def move_map(units: Units, start: Levels, profile: Levels) -> Markup:
    """How many levels up or down every unit went from one profile (n,) to another."""
    steps = profile.astype(int) - start.astype(int)
    most = max(int(np.abs(steps).max()), 2)
    cells = []
    for unit, step in enumerate(steps.tolist()):
        was, now = (units.words(unit, int(p[unit])) for p in (start, profile))
        title = f"{units.names[unit]}: {was}" + (f" → {now}" if step else ", unmoved")
        if not step:
            cells.append(_Cell("", title, None, "still"))
            continue
        fill = _shade(_UP if step > 0 else _DOWN, (abs(step) - 1) / (most - 1))
        cells.append(_Cell(f"{step:+d}".replace("-", "−"), title, fill, "cell"))
    label = f"Map of the units that moved: {np.count_nonzero(steps)} of {units.n} ended on another level."
    keys = (
        (_swatch(_DOWN[0]), "compressed more than at the start, by so many levels"),
        (_swatch(_UP[0]), "compressed less"),
        (_swatch(None, "still"), "as at the start"),
    )
    return join(_scrolled(_map(units, cells, label), "Map of the moves"), key(*keys))


def _map(units: Units, cells: Sequence[_Cell], label: str) -> Markup:
    blocks = sorted({block for places in units.places for block, _ in places})
    names = {-1: "emb.", units.blocks: "head"}
    longest = max((len(cell.word) for cell in cells), default=0)
    width = max(34.0, LETTER * longest + 12)
    head = 18 + 0.64 * LETTER * max(map(len, units.columns))  # names lean to the right, at 40 degrees
    tail = 0.77 * LETTER * max(len(units.columns[-1]), len(units.columns[0]) - len(units.columns) * 5)
    frame = Frame(46 + width * len(units.columns) + max(tail - width / 2, 4), head + ROW * len(blocks) + 4)
    parts = []
    for i, column in enumerate(units.columns):
        x = 46 + width * (i + 0.5)
        parts.append(
            tag("text", column, transform=f"translate({x:.1f} {head - 8:.1f}) rotate(-40)", class_="tick turned")
        )
    for i, block in enumerate(blocks):
        parts.append(text(36, head + ROW * i + 15, names.get(block, str(block)), anchor="end", class_="tick"))
    for cell, places in zip(cells, units.places, strict=True):
        for block, column in places:
            x, y = 46 + width * units.columns.index(column), head + ROW * blocks.index(block)
            parts.append(_drawn(cell, x, y, width))
    return svg(frame, label, *parts, fixed=True, class_="map")


def _drawn(cell: _Cell, x: float, y: float, width: float) -> Markup:
    box = tag("rect", x=x + 1, y=y + 1, width=width - 2, height=ROW - 2, rx="3", class_=cell.class_, fill=cell.fill)
    ink = None if cell.fill is None else f"fill:{_ink(cell.fill)}"
    word = tag(
        "text", cell.word, x=x + width / 2, y=y + 15, text_anchor="middle", class_=f"in-{cell.class_}", style=ink
    )
    return tag("g", tag("title", cell.title), box, *([word] if cell.word else []))


def _scrolled(picture: Markup, label: str) -> Markup:
    """A picture of fixed size that scrolls by itself where it is too wide."""
    return tag("div", picture, class_="scroll", tabindex="0", role="region", aria_label=label)


def _level_key(units: Units, profile: Levels) -> Markup:
    if units.kind == "sparsity" and units.zeros is not None:
        here = units.zeros[np.arange(units.n), profile]
        all_zeros = [units.zeros[u, i] for u, row in enumerate(units.labels) for i, label in enumerate(row) if label]
        most, least = float(max(all_zeros)), float(min(all_zeros))
        swatches = [
            (_swatch(_shade(_SHADES, s)), f"{most - s * (most - least):.0%} zeros") for s in (0, 0.25, 0.5, 0.75, 1)
        ]
        note = f"Zeros in %, as they are in each layer; {here.min():.1%} to {here.max():.1%} here."
        return join(key(*swatches), tag("p", note, class_="note"))
    where = {label: (u, i) for u, row in enumerate(units.labels) for i, label in enumerate(row) if label is not None}
    shown = units.ranked
    if len(shown) > MOST_SWATCHES:
        shown = tuple(shown[round(i * (len(shown) - 1) / (MOST_SWATCHES - 1))] for i in range(MOST_SWATCHES))
    swatches = []
    for label in shown:
        if label == DROPPED:
            swatches.append((_swatch(None, "gone"), "× dropped"))
        else:
            shade = 0.35 if label == KEPT else units.share(*where[label])
            swatches.append((_swatch(_shade(_SHADES, shade)), units.heading(label)))
    return key(*swatches)


def _swatch(fill: str | None, class_: str = "cell") -> Markup:
    return tag("rect", x=3.0, y=1.0, width=22.0, height=12.0, rx="3", class_=class_, fill=fill)


def _shade(colors: Sequence[str], share: float) -> str:
    """A colour between the first, at 0, and the last, at 1."""
    place = min(max(share, 0.0), 1.0) * (len(colors) - 1)
    i = min(int(place), len(colors) - 2)
    mixed = (1 - (place - i)) * _channels(colors[i]) + (place - i) * _channels(colors[i + 1])
    return "#" + "".join(f"{round(channel):02x}" for channel in mixed)


def _ink(fill: str) -> str:
    """Black or white: one of them has a contrast of at least 4.5 to any colour (WCAG 2, relative luminance)."""
    channels = _channels(fill) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return "#000000" if float(linear @ (0.2126, 0.7152, 0.0722)) > 0.179 else "#ffffff"


def _channels(color: str) -> NDArray[np.float64]:
    """Red, green and blue of "#rrggbb", 0 to 255: (3,)."""
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)], dtype=np.float64)


# -- moves ----------------------------------------------------------------------------------------------------------


def start_of(moves: Sequence[Move], profile: Levels) -> Levels:
    """The profile that the generations began with, (n,): before all moves but the choice of the start."""
    levels = profile.copy()
    for move in reversed(moves):
        if move.generation > 0:
            for unit, before, _ in move.changes:
                levels[unit] = before
    return levels


def distance_picture(moves: Sequence[Move], start: Levels, tokens: int) -> Markup:
    """Over the tokens spent, how many units have another level than at the start."""
    levels, points = start.copy(), [(0, 0)]
    for move in moves:
        if move.generation > 0:
            for unit, _, after in move.changes:
                levels[unit] = after
            points.append((move.tokens, int(np.count_nonzero(levels != start))))
    points.append((max(tokens, points[-1][0]), points[-1][1]))
    return on_two_widths(lambda width: _distance_chart(points, width))


def _distance_chart(points: Sequence[tuple[int, int]], width: float) -> Markup:
    frame = Frame(width, 190, top=28)
    x, y = frame.x(0, max(points[-1][0], 1)), frame.y(0, max(*(count for _, count in points), 4) * 1.1)
    path = f"M{x(0):.1f} {y(0):.1f}" + "".join(f"H{x(at):.1f}V{y(count):.1f}" for at, count in points)
    drawn = [
        axes(frame, x, y, "tokens spent", "units on another level than at the start"),
        tag("path", d=path, class_="best"),
    ]
    drawn += [line(x(at), y(count) - 3, x(at), y(count) + 3, "best") for at, count in points[1:-1]]
    return svg(frame, f"Units on another level than at the start: {points[-1][1]} at the end.", *drawn)
