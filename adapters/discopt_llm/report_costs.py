"""What the levels of a profile cost, and its moves, as tables of a report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from discopt.space import Levels
from discopt_llm import report_page as html
from discopt_llm.markup import Markup, join, tag
from discopt_llm.report_record import Move
from discopt_llm.report_units import Units
from discopt_llm.report_words import size_words

__all__ = ["cost_table", "moves_listing"]


def cost_table(units: Units, profile: Levels) -> Markup:
    """Bytes of a unit at every level, by what units are called in their blocks, and how many have it under a profile.

    Units that are drawn at several places, as whole blocks are, are one column.
    """
    assert units.bytes is not None and units.weights is not None
    kinds = [_kind(units, unit) for unit in range(units.n)]
    columns = list(dict.fromkeys(kinds))
    members = {column: [unit for unit in range(units.n) if kinds[unit] == column] for column in columns}
    rows: list[list[html.Cell]] = []
    for label in units.ranked:
        rows.append([units.heading(label), *(_cost(units, profile, members[column], label) for column in columns)])
    here = np.take_along_axis(units.bytes, np.asarray(profile)[:, None].astype(np.intp), axis=1)[:, 0]
    total = max(int(here.sum()), 1)
    together = [
        f"{size_words(int(here[of].sum()))}, {here[of].sum() / total:.1%}" for of in (members[c] for c in columns)
    ]
    rows.append(["all of them, here", *together])
    head = ["level", *(f"{column} ({len(members[column])})" for column in columns)]
    caption = "Bytes of one unit at each level; × how many have it. The number of units is in brackets."
    return html.table(caption, head, rows, marked=len(rows) - 1)


def _kind(units: Units, unit: int) -> str:
    return " and ".join(dict.fromkeys(column for _, column in units.places[unit]))


def _cost(units: Units, profile: Levels, members: Sequence[int], label: str) -> Markup:
    """One unit's bytes, or from the least to the most, and how many of the members have the level."""
    assert units.bytes is not None
    having = [(unit, row.index(label)) for unit in members if label in (row := units.labels[unit])]
    if not having:
        return Markup("–")
    costs = sorted({int(units.bytes[unit, level]) for unit, level in having})
    words = " to ".join(size_words(cost) for cost in dict.fromkeys((costs[0], costs[-1])))
    count = sum(int(profile[unit]) == level for unit, level in having)
    return join(words, tag("strong", f" ×{count}") if count else "")


def moves_listing(units: Units, moves: Sequence[Move]) -> Markup:
    """A line for each move: when, and which units went from which level to which."""
    rows = []
    for move in moves:
        changes = "; ".join(
            f"{units.names[unit]} {units.words(unit, before)} → {units.words(unit, after)}"
            for unit, before, after in move.changes
        )
        when = f"{move.generation}{' (final choice)' if move.final else ''}"
        rows.append((when, f"{len(move.changes)}: {changes}", f"{move.tokens:,}"))
    return html.table("Every move of the best profile", ("generation", "units", "tokens"), rows, words=2)
