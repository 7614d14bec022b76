"""The single moves of a profile: a step of one unit, or the step of a bundle of units that go together.

Moves 0..n-1 are the steps of the units, the rest those of the bundles. A bundle's step up takes all its units from
their lowest level to the next allowed one; its step down takes them to the lowest from wherever they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from discopt.switches import NONE as NONE
from discopt.switches import SwitchTables

if TYPE_CHECKING:
    from discopt.space import Ints, Levels, SearchSpace

Rows = NDArray[np.intp]


class Moves:
    """What the moves of a space cost, and how they change profiles.

    A move up to a level that no profile of the space can have, however cheap all else is, counts as none.
    """

    def __init__(self, space: SearchSpace) -> None:
        self.n = space.n
        self.switches = SwitchTables(space)  # of steps within groups
        self.count = space.n + len(space.bundles)
        self._tables = {True: space.up, False: space.down}
        self._lowest, self._lifted = space.cheapest(), space.second
        self._bundle = np.full(space.n, NONE, dtype=np.intp)  # number of each unit's bundle
        self._members = np.full((len(space.bundles), max(map(len, space.bundles), default=0)), NONE, dtype=np.intp)
        for number, units in enumerate(space.bundles):
            self._bundle[units] = number
            self._members[number, : len(units)] = units
        units = np.arange(space.n)
        self._above = space.cost - space.cost[:, units, self._lowest][:, :, None]  # (r, n, m) the lowest level's cost
        lift = self._above[:, units, self._lifted]  # (r, n) what a unit's part in the step of its bundle costs
        self._lift = self._sum_members(lift, np.arange(len(self._members)))  # (r, B)
        # What a bundle's other units cost at least, wherever one of them is above its lowest level.
        company = np.where(self._bundle >= 0, np.pad(self._lift, ((0, 0), (0, 1)))[:, self._bundle] - lift, 0)
        spare = space.budget - space.cost_of(self._lowest[None])[0]
        self._price = {up: _step_prices(space.cost, table) for up, table in self._tables.items()}
        reached = np.take_along_axis(self._above, np.maximum(space.up, 0)[None].astype(np.intp), axis=2)
        self._price[True][:, ((reached + company[:, :, None]) > spare[:, None, None]).any(axis=0)] = NONE
        self._lift[:, (self._lift > spare[:, None]).any(axis=0)] = NONE
        ups = np.concatenate([self._price[True].reshape(space.r, -1), self._lift], axis=1)
        self.least = ups.min(axis=1, where=ups >= 0, initial=np.iinfo(np.int64).max)  # (r,) what any move up adds

    def prices(self, profiles: Levels, moves: Rows, *, up: bool) -> Ints:
        """What moves up add, or moves down free: profiles (k, n), moves (k, t) -> (r, k, t); -1 for no such move."""
        unit = np.minimum(moves, self.n - 1) if len(self._members) else moves
        price: Ints = self._price[up][:, unit, np.take_along_axis(profiles, unit, axis=1)]
        if len(self._members):
            row, column = np.nonzero(moves >= self.n)
            price[:, row, column] = self._bundle_prices(profiles, row, moves[row, column] - self.n, up)
        return price

    def make_(self, profiles: Levels, row: Rows, move: Rows, *, up: bool) -> None:
        """Make a move in each of the different rows (i,) of the profiles (k, n), in place."""
        row, unit, alone = self.units_of(row, move)
        together = (self._lifted if up else self._lowest)[unit]
        profiles[row, unit] = np.where(alone, self._tables[up][unit, profiles[row, unit]], together)

    def units_of(self, row: Rows, move: Rows) -> tuple[Rows, Rows, NDArray[np.bool_]]:
        """The units that moves change: rows (i,), moves (i,) -> rows, units, and whether alone, each (j,), j >= i."""
        alone = move < self.n
        if alone.all():
            return row, move, alone
        units = self._members[move[~alone] - self.n]
        bundle, member = np.nonzero(units >= 0)
        return (
            np.concatenate([row[alone], row[~alone][bundle]]),
            np.concatenate([move[alone], units[bundle, member]]),
            np.concatenate([alone[alone], np.zeros(len(bundle), dtype=bool)]),
        )

    def bundle_of(self, unit: Rows) -> Rows:
        """The move of each unit's bundle, or the unit itself where it has none: (i,) -> (i,)."""
        return np.where(self._bundle[unit] >= 0, self._bundle[unit] + self.n, unit)

    def _bundle_prices(self, profiles: Levels, row: Rows, bundle: Rows, up: bool) -> Ints:
        """As `prices` for one bundle in each row: (i,), (i,) -> (r, i)."""
        first = self._members[bundle, 0]
        is_down = profiles[row, first] == self._lowest[first]
        if up:
            return np.where(is_down, self._lift[:, bundle], NONE)
        held = self._members[bundle]  # (i, units)
        above = self._above[:, held, profiles[row[:, None], held]]
        return np.where(is_down, NONE, np.where(held >= 0, above, 0).sum(axis=2))

    def _sum_members(self, values: Ints, bundle: Rows) -> Ints:
        """Sums over the units of bundles: (r, n), (i,) -> (r, i)."""
        held = self._members[bundle]
        return np.where(held >= 0, values[:, held], 0).sum(axis=2, dtype=np.int64)


def _step_prices(cost: Ints, table: Levels) -> Ints:
    """What the steps of a table (n, m) change the cost by, (r, n, m); -1 where there is none."""
    there = np.take_along_axis(cost, np.maximum(table, 0)[None].astype(np.intp), axis=2)
    return np.where(table >= 0, np.abs(there - cost), NONE)
