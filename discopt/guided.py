"""Offspring whose moves follow what a model expects of them, and crossover; both keep the budget.

An offspring is a switch of some units, a repair that lowers others until the budget holds, and a refill. Which unit,
in each, is the one whose step is expected to add least to the loss for the budget it frees or takes, up to a random
error of a given size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from discopt.moves import NONE, Rows
from discopt.space import Ints, Levels, SearchSpace

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


def trade(
    profiles: Levels, gains: Floats, number: Rows, error: Floats, space: SearchSpace, rng: np.random.Generator
) -> Levels:
    """Feasible offspring of feasible profiles, one each: (k, n) -> (k, n).

    gains (k, n, m) is what putting one unit to another level adds to the loss, `number` (k,) how many moves to begin
    with, `error` (k,) the standard deviation of the random error in the loss of a move.
    """
    guide = _Guide(profiles.copy(), gains, error, space, rng)
    guide.switch(number)
    guide.repair()
    guide.refill()
    return guide.profiles


def cross(first: Levels, second: Levels, space: SearchSpace, rng: np.random.Generator) -> Levels:
    """Uniform crossover, bundles whole, brought to the budget by random moves: (k, n), (k, n) -> (k, n)."""
    k, n = first.shape
    from_first = rng.random((k, n)) < 0.5
    for units in space.bundles:
        from_first[:, units] = from_first[:, units[:1]]
    children = np.where(from_first, first, second)
    guide = _Guide(children, np.zeros((k, n, space.m)), np.ones(k), space, rng)
    guide.repair()
    guide.refill()
    return guide.profiles


@dataclass(eq=False)
class _Guide:
    """Rows on their way from a parent to an offspring. Every loop moves levels one way, so it ends."""

    profiles: Levels  # (k, n)
    gains: Floats  # (k, n, m)
    error: Floats  # (k,)
    space: SearchSpace
    rng: np.random.Generator

    def __post_init__(self) -> None:
        space, moves = self.space, self.space.moves
        k = len(self.profiles)
        self._left: Ints = space.budget - space.cost_of(self.profiles)  # (k, r)
        self._weight = 1.0 / np.maximum(space.budget, 1)  # (r,) makes resources comparable
        self._noise = self.error[:, None] * self.rng.standard_normal((k, moves.count))
        self._spared = np.zeros((k, moves.count), dtype=bool)

    def switch(self, number: Rows) -> None:
        """`number[i]` moves of row i that are expected to lose least, all up or all down."""
        rises = self.rng.random(len(number)) < 0.5
        for turn in range(int(number.max(initial=0))):
            for up in (False, True):
                rows = np.flatnonzero((number > turn) & (rises == up))
                price, change = self._steps(rows, up)
                score = np.where((price[0] != NONE) & ~self._spared[rows], change + self._noise[rows], np.inf)
                self._make(rows, score, price, up)

    def repair(self) -> None:
        """Lower units that were not switched until the budget holds, those that were only where no other can."""
        while len(rows := np.flatnonzero((self._left < 0).any(axis=1))):
            price, change = self._steps(rows, up=False)
            frees: Flags = np.logical_or.reduce((price > 0) & (self._left[rows].T[:, :, None] < 0), axis=0)
            score = np.where(frees, (change + self._noise[rows]) / self._size(price), np.inf)
            others = np.where(self._spared[rows], np.inf, score)
            able = np.logical_or.reduce(np.isfinite(others), axis=1)
            self._make(rows, np.where(able[:, None], others, score), price, up=False)

    def refill(self) -> None:
        """Raise units as long as that fits what is left of the budget, and is not expected to do harm."""
        rows = np.arange(len(self.profiles))
        while len(rows):
            price, change = self._steps(rows, up=True)
            affordable: Flags = np.logical_and.reduce(price <= self._left[rows].T[:, :, None], axis=0)
            fits = (price[0] != NONE) & affordable
            harmless = change <= np.maximum(self._noise[rows], 0)
            score = np.where(fits & harmless, (change - np.abs(self._noise[rows])) / self._size(price), np.inf)
            rows = rows[self._make(rows, score, price, up=True)]

    def _steps(self, rows: Rows, up: bool) -> tuple[Ints, Floats]:
        """What every move costs or frees, (r, k, moves), -1 for none, and what it adds to the loss, (k, moves)."""
        space, moves = self.space, self.space.moves
        profiles, n = self.profiles[rows], self.space.n
        everything = np.broadcast_to(np.arange(moves.count), (len(rows), moves.count))
        price = moves.prices(profiles, everything, up=up)
        step = (space.up if up else space.down)[np.arange(n), profiles]  # (k, n)
        own = self._gain(rows, np.maximum(step, 0)) - self._gain(rows, profiles)
        if moves.count == n:
            return price, own
        together = np.broadcast_to(space.second if up else space.cheapest(), profiles.shape)
        joint = self._gain(rows, together) - self._gain(rows, profiles)
        return price, np.hstack([own, *(joint[:, units].sum(axis=1, keepdims=True) for units in space.bundles)])

    def _gain(self, rows: Rows, profiles: Levels) -> Floats:
        """What each unit's level adds to the loss by itself: (k, n) -> (k, n)."""
        return np.take_along_axis(self.gains[rows], profiles[:, :, None].astype(np.intp), axis=2)[:, :, 0]

    def _size(self, price: Ints) -> Floats:
        """How much of the budgets moves take, all resources together: (r, k, moves) -> (k, moves)."""
        size = np.tensordot(self._weight, np.maximum(price, 0), axes=1)
        return np.maximum(size, self._weight.min() / 2)

    def _make(self, rows: Rows, score: Floats, price: Ints, up: bool) -> NDArray[np.bool_]:
        """Make the move of lowest score in each of the rows; which rows had one, (k,)."""
        move = score.argmin(axis=1)
        every = np.arange(len(rows))
        able = np.isfinite(score[every, move])
        made, move = rows[able], move[able]
        self.space.moves.make_(self.profiles, made, move, up=up)
        self._left[made] += price[:, every[able], move].T * (-1 if up else 1)
        row, unit, _ = self.space.moves.units_of(made, move)
        self._spared[row, unit] = self._spared[row, self.space.moves.bundle_of(unit)] = True
        return able
