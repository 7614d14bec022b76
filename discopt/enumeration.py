"""Every profile of a small space, without a look at those that break a budget or a bundle.

Profiles grow unit by unit. A beginning is kept only where its cheapest completion is in the space, so that there are
never more beginnings than profiles.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from discopt.space import Ints, Levels, SearchSpace

CHUNK = 1 << 14  # beginnings that grow together

Rows = NDArray[np.intp]


def feasible_profiles(space: SearchSpace) -> Iterator[Levels]:
    """Every feasible profile once, in lexicographic order, in populations (k, n) with k >= 1."""
    growth = _Growth(space)
    stack = [(np.empty((1, 0), dtype=np.int16), *growth.root())]
    while stack:
        levels, left, lifted = stack.pop()
        unit = levels.shape[1]
        if unit == space.n:
            yield levels
            continue
        row, level, left, lifted = growth.grow(unit, left, lifted)
        levels = np.concatenate([levels[row], level[:, None]], axis=1)
        parts = -(-len(levels) // CHUNK)
        blocks = zip(*(np.array_split(array, parts) for array in (levels, left, lifted)), strict=True)
        stack += reversed(list(blocks))


def count_profiles(space: SearchSpace, limit: int) -> int | None:
    """How many feasible profiles there are; None if they are more than `limit`."""
    growth = _Growth(space)
    left, lifted = growth.root()
    for unit in range(space.n):
        _, _, left, lifted = growth.grow(unit, left, lifted)
        if len(left) > limit:
            return None
    return len(left)


class _Growth:
    """How beginnings grow by a unit.

    Of k beginnings, `left` (k, r) is what their cheapest completions leave of the budget, and `lifted` (k, bundles + 1)
    the bundles above their lowest level; the last column stands for the units without any.
    """

    def __init__(self, space: SearchSpace) -> None:
        self._space = space
        self._lowest = space.cheapest()
        self._bundle = np.full(space.n, len(space.bundles))
        self._price = space.cost - space.cost[:, np.arange(space.n), self._lowest][:, :, None]  # (r, n, m)
        self._first = np.ones(space.n, dtype=bool)  # of their bundle
        for number, units in enumerate(space.bundles):
            first, others = units[0], units[1:]  # in ascending order
            self._bundle[units], self._first[others] = number, False
            lift = self._price[:, others, space.second[others]]  # (r, others) is paid with the first one's step
            self._price[:, others] -= lift[:, :, None]
            self._price[:, first, np.arange(space.m) != self._lowest[first]] += lift.sum(axis=1)[:, None]
            self._price[:, others, self._lowest[others]] = 0

    def root(self) -> tuple[Ints, NDArray[np.bool_]]:
        """`left` and `lifted` of the one beginning without units."""
        spare = self._space.budget - self._space.cost_of(self._lowest[None])
        return spare, np.zeros((1, len(self._space.bundles) + 1), dtype=bool)

    def grow(self, unit: int, left: Ints, lifted: NDArray[np.bool_]) -> tuple[Rows, Levels, Ints, NDArray[np.bool_]]:
        """All beginnings one unit longer: whose they are and the unit's level, (j,), `left` and `lifted`, (j, ...)."""
        levels = np.flatnonzero(self._space.allowed[unit])
        price = self._price[:, unit, levels].T  # (levels, r)
        fits = (price <= left[:, None]).all(axis=2)  # (k, levels)
        above, bundle = levels != self._lowest[unit], self._bundle[unit]
        if not self._first[unit]:
            fits &= above == lifted[:, bundle, None]
        row, column = np.nonzero(fits)
        grown = lifted[row]
        if bundle < len(self._space.bundles):
            grown[:, bundle] = above[column]
        return row, levels[column].astype(np.int16), left[row] - price[column], grown
