"""Level switches of one profile, drawn with plain numbers (EvoPress, Algorithm 1).

A switch looks at a handful of numbers. Read one by one from lists they cost less than a single call on an array does,
and no more for many units than for few.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, repeat
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from discopt.space import Levels, SearchSpace

NONE = -1
TRIES = 32  # random draws of a unit before its group is searched through
GLANCE = 16  # units looked at in the time of one draw, where a whole group is searched through
DRAWS = 10  # random numbers that an offspring takes
SCALE = 1 << 30  # random numbers are whole and below it: plain Python divides those fastest

Changes = dict[int, int]  # the new levels of some units
Draw = Callable[[], int]  # of a random number in 0..SCALE-1
Switch = Callable[[memoryview, int], Changes]


class SwitchTables:
    """What switches look up: `peers[i]` are the units of unit i's group.

    The next level of a unit is `up[unit][level]` or `down[unit][level]`, -1 where there is none. `live` are the units
    of groups in which two can move at all.
    """

    def __init__(self, space: SearchSpace) -> None:
        members, first, size = space.group_members
        units: list[int] = members.tolist()
        groups = [units[start : start + count] for start, count in zip(first.tolist(), size.tolist(), strict=True)]
        can_move = (space.allowed & (space.up >= 0)).any(axis=1)
        able = np.bincount(space.group, weights=can_move)
        self.many = len(size) > 1
        self.live: list[int] = np.flatnonzero(able[space.group] > 1).tolist()
        self.peers = [groups[group] for group in space.group.tolist()]
        self.up, self.down = _rows(space.up), _rows(space.down)


def switcher(space: SearchSpace, draw: Draw) -> Switch:
    """Draws switches of one profile after another; a function within a function has all it looks up at hand."""
    tables, tries = space.moves.switches, range(max(TRIES, space.n // GLANCE))
    many, live, peers_of, up, down = tables.many, tables.live, tables.peers, tables.up, tables.down
    if not live:
        return lambda row, number: {}
    anyone = live[0], peers_of[live[0]], len(peers_of[live[0]])

    def switch(row: memoryview, number: int) -> Changes:
        """What `number` switches change of a profile (n,), given as a memory view.

        Each picks a group with probability proportional to its number of units, among those where a switch is
        possible, then a unit to lower and another to raise, each alike likely; with no switch possible, it stays.
        """
        changes: Changes = {}
        unit, peers, size = anyone
        for _ in range(number):
            if many:
                unit = live[draw() % len(live)]
                peers = peers_of[unit]
                size = len(peers)
            for _ in tries:
                lowered = peers[draw() % size]
                fall = down[lowered][changes[lowered] if lowered in changes else row[lowered]]
                if fall >= 0:
                    break
            for _ in tries:
                raised = peers[draw() % size]
                rise = up[raised][changes[raised] if raised in changes else row[raised]]
                if rise >= 0 and raised != lowered:
                    break
            if fall < 0 or rise < 0 or raised == lowered:  # rare: the luck of the draw, or no unit can
                lowered, raised = _search(space, draw, changed(np.asarray(row), changes), unit)
                if raised == NONE:
                    break
                fall = down[lowered][changes.get(lowered, row[lowered])]
                rise = up[raised][changes.get(raised, row[raised])]
            changes[lowered] = fall
            changes[raised] = rise
        if len(changes) < 2 * number:  # some unit was switched twice
            return {unit: level for unit, level in changes.items() if level != row[unit]}
        return changes

    return switch


def whole_numbers(rng: np.random.Generator, block: int) -> Draw:
    """Draws uniform numbers in 0..SCALE-1, `block` at once."""
    return chain.from_iterable((SCALE * rng.random(block)).astype(np.int32).tolist() for _ in repeat(None)).__next__


def changed(profile: Levels, changes: Changes) -> Levels:
    """A copy of the profile (n,) with some levels changed."""
    row = profile.copy()
    for unit, level in changes.items():
        row[unit] = level
    return row


def _rows(table: Levels) -> list[tuple[int, ...]]:
    """The rows of a table (n, m), one object for all that are equal."""
    known: dict[tuple[int, ...], tuple[int, ...]] = {}
    return [known.setdefault(row, row) for row in map(tuple, table.tolist())]


def _search(space: SearchSpace, draw: Draw, row: Levels, unit: int) -> tuple[int, int]:
    """A random pair to lower and raise in the unit's group or, if it has none, in another; (NONE, NONE) if none."""
    units = np.arange(space.n)
    can_fall, can_rise = space.down[units, row] >= 0, space.up[units, row] >= 0
    _, _, sizes = space.group_members
    fall, rise, both = (
        np.bincount(space.group, weights=can, minlength=len(sizes)) for can in (can_fall, can_rise, can_fall & can_rise)
    )
    possible = (fall > 0) & (rise > 0) & ~((fall == 1) & (rise == 1) & (both == 1))
    if not possible.any():
        return NONE, NONE
    group = space.group[unit]
    if not possible[group]:
        shares = np.where(possible, sizes, 0).cumsum()
        group = np.searchsorted(shares, draw() % shares[-1], side="right")
    falling, rising = (np.flatnonzero(can & (space.group == group)) for can in (can_fall, can_rise))
    if len(rising) == 1:
        falling = falling[falling != rising[0]]
    lowered = falling[draw() % len(falling)]
    rising = rising[rising != lowered]
    return int(lowered), int(rising[draw() % len(rising)])
