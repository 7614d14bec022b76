"""Mutation that trades budget between units of different cost and spends all of it.

EvoPress moves budget inside a group of equal costs, or raises units anywhere and throws away most of what does not
fit (Algorithm 1; METHOD.md, "A structural limit"). Here a few random moves, all up or all down, are made first; where
they cost too much, others are lowered until the budget holds; what is left is then spent on yet others. Where all
steps cost the same, that is the level switch of the paper.

What has to be freed or spent is met by one move of about that cost or by several cheaper ones, as it comes: a row
takes the best fitting of 1, 2, 4, ... random moves. One alone gives the widest trades, many give the fewest changes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from discopt.moves import NONE, Rows
from discopt.space import Ints, Levels, SearchSpace

TRIES = 32  # random draws of a move before every move is looked at
CHOICES = np.array([1, 2, 4, 8, 16, 32])  # moves that a row chooses from

Flags = NDArray[np.bool_]


def exchange(
    profiles: Levels, slack: Ints, number: NDArray[np.integer], space: SearchSpace, rng: np.random.Generator
) -> Levels:
    """`number[i]` random moves of row i, then what fills its budget again: (k, n) -> (k, n), all feasible and full.

    `slack` (k, r) is what the rows leave of the budget. A move is a unit's step or a bundle's.
    """
    trade = _Trade(profiles, slack, space, rng)
    trade.switch(number)
    trade.repair()
    trade.refill()
    return trade.profiles


class _Trade:
    """Rows on their way from a parent to an offspring. Every loop moves levels one way, so it ends."""

    def __init__(self, profiles: Levels, slack: Ints, space: SearchSpace, rng: np.random.Generator) -> None:
        k = len(profiles)
        self.profiles, self.left = profiles.copy(), slack.copy()
        self._moves, self._rng = space.moves, rng
        self._weight = 1.0 / np.maximum(space.budget, 1)  # (r,) makes resources comparable
        self._choices = CHOICES[rng.integers(len(CHOICES), size=k)]
        self._switched = np.zeros((k, self._moves.count), dtype=bool)  # moves of the units that were switched
        self._lowered = np.zeros((k, self._moves.count), dtype=bool)  # moves that the repair has made

    def switch(self, number: NDArray[np.integer]) -> None:
        """`number[i]` different random moves of row i, all up or all down."""
        rises = self._rng.random(len(number)) < 0.5
        for turn in range(int(number.max(initial=0))):
            for up in (False, True):
                rows = np.flatnonzero((number > turn) & (rises == up))
                _, rows, moves = self._move(rows, self._switched, up=up, free=True)
                row, unit, _ = self._moves.units_of(rows, moves)
                self._switched[row, unit] = self._switched[row, self._moves.bundle_of(unit)] = True

    def repair(self) -> None:
        """Lower other units until the budget holds, bundles and what was switched only where no other can."""
        spared = self._switched.copy()
        spared[:, self.profiles.shape[1] :] = True
        while len(rows := np.flatnonzero((self.left < 0).any(axis=1))):
            stuck, made, moves = self._move(rows, spared, up=False)
            self._lowered[made, moves] = True
            stuck, made, moves = self._move(stuck, None, up=False)
            self._lowered[made, moves] = True
            # With several resources, a step that frees nothing of the one that is missing may lead to one that does.
            stuck, made, moves = self._move(stuck, None, up=False, free=True)
            self._lowered[made, moves] = True
            if len(stuck):  # not from a feasible parent: there the cheapest profile is below the budget
                raise ValueError(f"parents must be feasible, got one that costs {-self.left[stuck[0]].min()} too much")

    def refill(self) -> None:
        """Take back what the repair need not have lowered, then climb until nothing fits; what was switched, last."""
        rows = np.flatnonzero(self._lowered.sum(axis=1) > 1)
        pool, kept = np.flatnonzero(self._lowered[rows].any(axis=0)), ~self._lowered
        while len(rows):
            _, rows, moves = self._move(rows, kept, up=True, pool=pool)
            kept[rows, moves] = True
        rows = np.arange(len(self.profiles))
        while len(rows := rows[(self.left[rows] >= self._moves.least).all(axis=1)]):
            stuck, rows, _ = self._move(rows, self._switched, up=True)
            rows = np.concatenate([rows, self._move(stuck, None, up=True)[1]])

    def _move(
        self, rows: Rows, barred: Flags | None, *, up: bool, free: bool = False, pool: Rows | None = None
    ) -> tuple[Rows, Rows, Rows]:
        """One move in each of the rows that has one: (i,) -> rows without, (i - j,); rows with, (j,); moves, (j,).

        `barred` (k, moves) are those not to be made, `pool` those to choose from, all by default. Moves up have to
        fit what is left, and moves down to free what is missing; unless they are `free`.
        """
        if not len(rows):
            return rows, rows, rows
        move, price = self._pick(rows, np.arange(self._moves.count) if pool is None else pool, barred, up, free)
        made = move != NONE
        stuck, rows, move = rows[~made], rows[made], move[made]
        self._moves.make_(self.profiles, rows, move, up=up)
        self.left[rows] += price[:, made].T * (-1 if up else 1)
        return stuck, rows, move

    def _pick(self, rows: Rows, pool: Rows, barred: Flags | None, up: bool, free: bool) -> tuple[Rows, Ints]:
        """A move for each row, the best fitting of some random ones, and its price: (i,), (r, i); or NONE."""
        every = np.arange(len(rows))
        drawn = pool[self._rng.integers(len(pool), size=(len(rows), TRIES))]
        can, price = self._possible(rows, drawn, barred, up, free)
        chosen_from = can & (can.cumsum(axis=1) <= (1 if free else self._choices[rows][:, None]))
        misfit = np.abs(price - np.abs(self.left[rows]).T[:, :, None])  # (r, i, t)
        misfit = np.where(chosen_from, np.tensordot(self._weight, misfit, axes=1), np.inf)
        best = misfit.argmin(axis=1)
        found = can[every, best]
        move, price = np.where(found, drawn[every, best], NONE), price[:, every, best]
        if not found.all():  # the luck of the draw, or no move can
            missed = np.flatnonzero(~found)
            can, prices = self._possible(
                rows[missed], np.broadcast_to(pool, (len(missed), len(pool))), barred, up, free
            )
            one = np.where(can, self._rng.random(can.shape, dtype=np.float32), NONE).argmax(axis=1)
            move[missed] = np.where(can[np.arange(len(missed)), one], pool[one], NONE)
            price[:, missed] = prices[:, np.arange(len(missed)), one]
        return move, price

    def _possible(self, rows: Rows, moves: Rows, barred: Flags | None, up: bool, free: bool) -> tuple[Flags, Ints]:
        """Which of the moves (i, t) each row can make, (i, t), and what they cost, (r, i, t)."""
        price = self._moves.prices(self.profiles[rows], moves, up=up)
        left = self.left[rows].T[:, :, None]
        if free:
            can = price[0] != NONE
        elif up:
            can = (price[0] != NONE) & (price <= left).all(axis=0)
        else:
            can = ((price > 0) & (left < 0)).any(axis=0)
        if barred is not None:
            can &= ~barred[rows[:, None], moves]
        return can, price
