"""Mutation of whole populations: level switches (EvoPress, Algorithm 1; METHOD.md, "Algorithm 1", step 3).

A switch moves one unit down a level and another of the same group up one. Where the steps of a group all cost the
same, the cost stays as it is; where they do not, offspring over the budget are thrown away. `discopt.exchange` has a
rule of our own for units of different cost.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from discopt.exchange import exchange
from discopt.space import Ints, Levels, SearchSpace

RULES = ("within", "across", "exchange")
TRIES = 32  # random draws of a unit before its group is searched through
ROUNDS = 24  # times that missing offspring are drawn again before a generation goes on with fewer
MAX_LEVEL_CHANGES = 10  # across-groups rule
MIN_SPENT = 0.8  # across-groups rule: what was added over what was freed

Rows = NDArray[np.intp]


def offspring(
    parents: NDArray[np.integer],
    count: int,
    space: SearchSpace,
    rng: np.random.Generator,
    *,
    switches: tuple[float, ...] = (5, 3, 1),
    rule: str = "within",
) -> Levels:
    """Distinct feasible offspring of random parents, none equal to a parent: (p, n) -> (at most count, n).

    `switches[i]` is the weight of i + 1 switches; (5, 3, 1) is min(U{1..3}, U{1..3}). `rule` is "within" (a switch
    stays in its group), "across" (raise anywhere, then lower until the budget holds) or "exchange" (move anywhere, then
    fill the budget again; the only rule that moves bundles). Fewer than `count` rows come back where the neighbourhood
    does not hold more.
    """
    rows: Levels = np.asarray(parents, dtype=np.int16)
    weights = np.asarray(switches, dtype=np.float64)
    slack = space.budget - space.cost_of(rows) if rule != "within" else None  # (p, r)
    seen = {row.tobytes() for row in rows}
    found: list[Levels] = []
    drawn = 0
    for _ in range(ROUNDS):
        missing = count - len(found)
        if missing <= 0:
            break
        size = min(2 * count, round(missing * (drawn + 1) / (len(found) + 1)))  # as many as the yield so far asks for
        chosen = rng.integers(len(rows), size=size)
        number = rng.choice(len(weights), size=size, p=weights / weights.sum()) + 1
        drawn += size
        if slack is None:
            children = level_switch(rows[chosen], number, space, rng)
        elif rule == "exchange":
            children = exchange(rows[chosen], slack[chosen], number, space, rng)
        else:
            children = raise_and_lower(rows[chosen], slack[chosen], number, space, rng)
        for child in children:
            key = child.tobytes()
            if key not in seen:
                seen.add(key)
                found.append(child)
    return np.stack(found[:count]) if found else np.empty((0, space.n), dtype=np.int16)


def level_switch(profiles: Levels, number: NDArray[np.integer], space: SearchSpace, rng: np.random.Generator) -> Levels:
    """`number[i]` level switches on row i: (k, n) -> (at most k, n); rows that no longer meet the budget are left out.

    A group is picked with probability proportional to its number of units, among the groups where a switch is
    possible; a row without any stays as it is.
    """
    rows = profiles.copy()
    for turn in range(int(number.max(initial=0))):
        active = np.flatnonzero(number > turn)
        lowered, raised = _pick_pairs(rows, active, space, rng)
        active, lowered, raised = (a[lowered >= 0] for a in (active, lowered, raised))
        rows[active, lowered] = space.down[lowered, rows[active, lowered]]
        rows[active, raised] = space.up[raised, rows[active, raised]]
    return rows if space.steady else rows[space.feasible(rows)]


def raise_and_lower(
    profiles: Levels, slack: Ints, number: NDArray[np.integer], space: SearchSpace, rng: np.random.Generator
) -> Levels:
    """Raise `number[i]` random units of row i, then lower random ones until the budget holds: (k, n) -> (at most k, n).

    `slack` (k, r) is what the rows leave of the budget. Left out are rows that need more than MAX_LEVEL_CHANGES
    steps, and rows that free far more than they spend (added over removed below MIN_SPENT, resources weighed by
    their budgets).
    """
    rows, left = profiles.copy(), slack.copy()
    k = len(rows)
    everyone = _Pool(np.arange(space.n), np.zeros(k, dtype=np.intp), np.full(k, space.n))
    weight = 1.0 / np.maximum(space.budget, 1)
    added, removed = np.zeros(k), np.zeros(k)
    for turn in range(MAX_LEVEL_CHANGES):
        rising = number > turn
        falling = ~rising & (left < 0).any(axis=1)
        for table, active, spent in ((space.up, rising, added), (space.down, falling, removed)):
            index = np.flatnonzero(active)
            if not len(index):
                continue
            unit = _pick_units(rows, index, everyone.at(index), table, rng)
            index, unit = index[unit >= 0], unit[unit >= 0]
            before = rows[index, unit]
            after = table[unit, before]
            step = (space.cost[:, unit, after] - space.cost[:, unit, before]).T  # (rows, r)
            rows[index, unit] = after
            left[index] -= step
            spent[index] += np.abs(step) @ weight
    return rows[(left >= 0).all(axis=1) & (added >= MIN_SPENT * removed)]


class _Pool(NamedTuple):
    """The units each row may pick from: members[start[i] : start[i] + size[i]]."""

    members: Rows
    start: Rows  # (k,)
    size: Rows  # (k,)

    def at(self, index: Rows) -> _Pool:
        return _Pool(self.members, self.start[index], self.size[index])


def _pick_pairs(rows: Levels, index: Rows, space: SearchSpace, rng: np.random.Generator) -> tuple[Rows, Rows]:
    """A unit to lower and one of its group to raise, for the indexed rows: (i,), (i,); -1 where there is no pair."""
    members, start, size = space.group_members
    group = space.group[rng.integers(space.n, size=len(index))]  # proportional to its number of units
    pool = _Pool(members, start[group], size[group])
    lowered = _pick_units(rows, index, pool, space.down, rng)
    raised = _pick_units(rows, index, pool, space.up, rng, avoid=lowered)
    for i in np.flatnonzero((lowered < 0) | (raised < 0)):
        lowered[i], raised[i] = _search_pair(rows[index[i]], space, rng)
    return lowered, raised


def _pick_units(
    rows: Levels, index: Rows, pool: _Pool, step: Levels, rng: np.random.Generator, avoid: Rows | None = None
) -> Rows:
    """A random unit of its pool that can take the step, for the indexed rows: (i,); -1 where there is none."""
    draws = (rng.random((len(index), TRIES)) * pool.size[:, None]).astype(np.intp)
    drawn = pool.members[pool.start[:, None] + draws]
    can = step[drawn, rows[index[:, None], drawn]] >= 0
    if avoid is not None:
        can &= drawn != avoid[:, None]
    first = can.argmax(axis=1)
    every = np.arange(len(index))
    unit: Rows = drawn[every, first]
    for i in np.flatnonzero(~can[every, first]):  # rare: the luck of the draw, or no unit can
        members = pool.members[pool.start[i] : pool.start[i] + pool.size[i]]
        able = members[step[members, rows[index[i], members]] >= 0]
        if avoid is not None:
            able = able[able != avoid[i]]
        unit[i] = rng.choice(able) if len(able) else -1
    return unit


def _search_pair(row: Levels, space: SearchSpace, rng: np.random.Generator) -> tuple[int, int]:
    """As `_pick_pairs` for one row whose group had no pair, by looking at every group; (-1, -1) if none has one."""
    units = np.arange(space.n)
    can_fall, can_rise = space.down[units, row] >= 0, space.up[units, row] >= 0
    _, _, sizes = space.group_members
    fall, rise, both = (
        np.bincount(space.group, weights=can, minlength=len(sizes)) for can in (can_fall, can_rise, can_fall & can_rise)
    )
    possible = np.flatnonzero((fall > 0) & (rise > 0) & ~((fall == 1) & (rise == 1) & (both == 1)))
    if not len(possible):
        return -1, -1
    group = rng.choice(possible, p=sizes[possible] / sizes[possible].sum())
    falling, rising = (np.flatnonzero(can & (space.group == group)) for can in (can_fall, can_rise))
    if len(rising) == 1:
        falling = falling[falling != rising[0]]
    lowered = int(rng.choice(falling))
    return lowered, int(rng.choice(rising[rising != lowered]))
