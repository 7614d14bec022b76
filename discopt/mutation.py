"""Mutation of whole populations: level switches (EvoPress, Algorithm 1; METHOD.md, "Algorithm 1", step 3).

A switch moves one unit down a level and another of the same group up one. Where the steps of a group all cost the
same, the cost stays as it is; where they do not, offspring over the budget are thrown away. `discopt.exchange` has a
rule of our own for units of different cost.
"""

from __future__ import annotations

from bisect import bisect
from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from discopt.candidates import Candidates
from discopt.exchange import exchange
from discopt.space import Ints, Levels, SearchSpace
from discopt.switches import DRAWS, SCALE, TRIES, Changes, changed, switcher, whole_numbers

RULES = ("within", "across", "exchange")
ROUNDS = 24  # times that missing offspring are drawn again before a generation goes on with fewer
MAX_LEVEL_CHANGES = 10  # across-groups rule
MIN_SPENT = 0.8  # across-groups rule: what was added over what was freed

Rows = NDArray[np.intp]


def mutate(
    parents: NDArray[np.integer],
    count: int,
    space: SearchSpace,
    rng: np.random.Generator,
    *,
    switches: tuple[float, ...] = (5, 3, 1),
    rule: str = "within",
) -> Candidates:
    """Distinct feasible offspring of random parents (p, n), none equal to a parent: at most `count`.

    `switches[i]` is the weight of i + 1 switches; (5, 3, 1) is min(U{1..3}, U{1..3}). `rule` is "within" (a switch
    stays in its group), "across" (raise anywhere, then lower until the budget holds) or "exchange" (move anywhere, then
    fill the budget again; the only rule that moves bundles). Fewer than `count` come back where the neighbourhood
    does not hold more.
    """
    rows: Levels = np.ascontiguousarray(parents, dtype=np.int16)
    if rule == "within":
        return _switched(rows, count, space, rng, switches)
    return Candidates.of_rows(_redrawn(rows, count, space, rng, switches, rule))


def offspring(
    parents: NDArray[np.integer],
    count: int,
    space: SearchSpace,
    rng: np.random.Generator,
    *,
    switches: tuple[float, ...] = (5, 3, 1),
    rule: str = "within",
) -> Levels:
    """The rows of `mutate`: (p, n) -> (at most count, n)."""
    return mutate(parents, count, space, rng, switches=switches, rule=rule).rows()


def level_switch(profiles: Levels, number: NDArray[np.integer], space: SearchSpace, rng: np.random.Generator) -> Levels:
    """`number[i]` level switches on row i: (k, n) -> (at most k, n); rows that no longer meet the budget are left out.

    A group is picked with probability proportional to its number of units, among the groups where a switch is
    possible; a row without any stays as it is.
    """
    rows: Levels = np.array(profiles, dtype=np.int16, order="C")
    switch = switcher(space, whole_numbers(rng, DRAWS * len(rows)))
    for row, turns in zip(rows, number.tolist(), strict=True):
        for unit, level in switch(memoryview(row), turns).items():
            row[unit] = level
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
    weight = 1.0 / np.maximum(space.budget, 1)
    added, removed = np.zeros(len(rows)), np.zeros(len(rows))
    for turn in range(MAX_LEVEL_CHANGES):
        rising = number > turn
        falling = ~rising & (left < 0).any(axis=1)
        for table, active, spent in ((space.up, rising, added), (space.down, falling, removed)):
            index = np.flatnonzero(active)
            if not len(index):
                continue
            unit = _pick_units(rows, index, table, rng)
            index, unit = index[unit >= 0], unit[unit >= 0]
            before = rows[index, unit]
            after = table[unit, before]
            step = (space.cost[:, unit, after] - space.cost[:, unit, before]).T  # (rows, r)
            rows[index, unit] = after
            left[index] -= step
            spent[index] += np.abs(step) @ weight
    return rows[(left >= 0).all(axis=1) & (added >= MIN_SPENT * removed)]


def _redrawn(
    parents: Levels, count: int, space: SearchSpace, rng: np.random.Generator, switches: tuple[float, ...], rule: str
) -> Levels:
    """`mutate` for the rules that make many rows at once, again until there are enough: (at most count, n)."""
    weights = np.asarray(switches, dtype=np.float64)
    slack = space.budget - space.cost_of(parents)  # (p, r)
    make = exchange if rule == "exchange" else raise_and_lower
    seen = {row.tobytes() for row in parents}
    found: list[Levels] = []
    drawn = 0
    for _ in range(ROUNDS):
        missing = count - len(found)
        if missing <= 0:
            break
        size = min(2 * count, round(missing * (drawn + 1) / (len(found) + 1)))  # as many as the yield so far asks for
        chosen = rng.integers(len(parents), size=size)
        number = rng.choice(len(weights), size=size, p=weights / weights.sum()) + 1
        drawn += size
        for child in make(parents[chosen], slack[chosen], number, space, rng):
            key = child.tobytes()
            if key not in seen:
                seen.add(key)
                found.append(child)
    return np.stack(found[:count]) if found else np.empty((0, space.n), dtype=np.int16)


def _switched(
    parents: Levels, count: int, space: SearchSpace, rng: np.random.Generator, switches: tuple[float, ...]
) -> Candidates:
    """`mutate` within groups, one offspring after the other, each as costly as its changes."""
    draw = whole_numbers(rng, DRAWS * count)
    switch = switcher(space, draw)
    share = _shares(tuple(switches))
    rows, several = [memoryview(row) for row in parents], len(parents) > 1
    slack = None if space.steady else space.budget - space.cost_of(parents)  # (p, r)
    # Two parents can have one child: it is known by its row. That of a single parent is known by its changes: comparing
    # it with the few whose units have the same sum is less work than hashing them all.
    seen: dict[object, list[object]] = {row.tobytes(): [row.tobytes()] for row in parents} if several else {0: [{}]}
    base: list[int] = []
    found: list[Changes] = []
    for _ in range(2 * ROUNDS * count):
        if len(found) == count:
            break
        parent = draw() % len(rows) if several else 0
        changes = switch(rows[parent], bisect(share, draw()) + 1)
        if slack is not None and not _affordable(space, parents[parent], changes, slack[parent]):
            continue
        profile = changed(parents[parent], changes).tobytes() if several else changes
        alike = seen.setdefault(profile if several else sum(changes), [])
        if profile not in alike:
            alike.append(profile)
            base.append(parent)
            found.append(changes)
    return Candidates.changed(parents, base, found)


@lru_cache
def _shares(switches: tuple[float, ...]) -> tuple[float, ...]:
    """Of mutations with at most i + 1 switches, in SCALE."""
    total = sum(switches) / SCALE
    return tuple(weight / total for weight in accumulate(switches))


def _affordable(space: SearchSpace, profile: Levels, changes: Changes, slack: Ints) -> bool:
    """Whether changes of a profile (n,) cost no more than what it leaves of the budgets, (r,)."""
    unit, level = list(changes), list(changes.values())
    added = space.cost[:, unit, level] - space.cost[:, unit, profile[unit]]
    return bool((added.sum(axis=1) <= slack).all())


def _pick_units(rows: Levels, index: Rows, step: Levels, rng: np.random.Generator) -> Rows:
    """A random unit that can take the step, for the indexed rows: (i,); -1 where there is none."""
    units = np.arange(rows.shape[1])
    drawn = (rng.random((len(index), TRIES)) * len(units)).astype(np.intp)
    can = step[drawn, rows[index[:, None], drawn]] >= 0
    first = can.argmax(axis=1)
    every = np.arange(len(index))
    unit: Rows = drawn[every, first]
    for i in np.flatnonzero(~can[every, first]):  # rare: the luck of the draw, or no unit can
        able = np.flatnonzero(step[units, rows[index[i]]] >= 0)
        unit[i] = rng.choice(able) if len(able) else -1
    return unit
