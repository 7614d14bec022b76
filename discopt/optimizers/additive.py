"""Additive search: measure what every single change does, and solve for the best sum of changes.

A loss that is a sum over the units is solved exactly by the first turn. Elsewhere the answer holds near the profile
that the changes were measured from, so that later turns make fewer moves.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from discopt.arrays import pack, unpack
from discopt.objective import Losses
from discopt.optimizers.base import StopReason
from discopt.optimizers.neighbours import Restarts
from discopt.optimizers.one_sample import OneSample
from discopt.optimizers.plan import Plan
from discopt.separable import solve_separable
from discopt.space import Levels, SearchSpace

PENALTIES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)  # on a changed unit, in mean predicted gains of the first answer's

Pairs = NDArray[np.intp]


class Additive(OneSample):
    """Turns of two parts, from the plan's profile or the nearest to uniform on.

    First the sweep: every profile with the level of one unit changed, at all of its levels; where units go together,
    every bundle moved as a whole, and its units' other levels while it is up. These may be over the budget; the answer
    of the search never is. Where the plan does not reach that far, the smaller changes are measured, in random order,
    and levels that were not are forbidden; as are those whose loss is not finite.

    Then the answers: the profiles with the lowest sum of changes, exactly (`discopt.separable`), under several
    penalties on the number of changed units, the first of them none. The best of all feasible profiles of a turn is
    where the next one starts; if none is better than where the turn started, some random moves from the best one found
    (`Restarts`).
    """

    algorithm = "additive"

    def __init__(self, space: SearchSpace, plan: Plan | None = None, *, seed: int = 0) -> None:
        super().__init__(space, plan or Plan(), seed=seed)
        self._from = self._better = self._first()  # where the turn started, and the best feasible profile since
        self._from_loss = self._better_loss = math.nan  # while it was not measured
        self._sweep: Pairs = np.empty((0, 2), dtype=np.intp)  # unit and level of the changes to measure
        self._swept = np.full((space.n, space.m), np.nan)  # losses of the single changes; NaN where not measured
        self._answers = np.empty((0, space.n), dtype=np.int16)  # to measure
        self._peak_loss = math.inf  # the best loss at the last restart
        self._restarts = Restarts(space, self._rng)
        self._next()

    def _propose(self) -> Levels | StopReason:
        if math.isnan(self._from_loss):
            return self._from[None]
        if len(self._sweep):
            return self._changed(self._sweep[: self.plan.batch])
        if len(self._answers):
            return self._answers[: self.plan.batch]
        return StopReason.EXHAUSTED

    def _learn(self, population: Levels, losses: Losses) -> None:
        k = len(population)
        if math.isnan(self._from_loss):
            self._arrive(population[0], float(losses[0]))
            return
        row = self._better_row(population, losses, self._better_loss)
        if row is not None:
            self._better, self._better_loss = population[row], float(losses[row])
        if len(self._sweep):
            unit, level = self._sweep[:k].T
            self._swept[unit, level] = losses
            self._sweep = self._sweep[k:]
            if not len(self._sweep):
                self._answers = self._solve()
        else:
            self._answers = self._answers[k:]
        if not len(self._sweep) and not len(self._answers):
            self._turn()

    def _arrive(self, profile: Levels, loss: float) -> None:
        """Begin a turn at a feasible profile, or at a random one where its loss is not finite."""
        if not math.isfinite(loss):
            self._from, self._from_loss = self.space.random(1, self._rng)[0], math.nan
            return
        self._from, self._from_loss = profile, loss
        self._better, self._better_loss = profile, loss
        self._swept = np.full((self.space.n, self.space.m), np.nan)
        self._sweep = self._changes(self.plan.evaluations - self._evaluated - 1)
        if not len(self._sweep):
            self._turn()

    def _turn(self) -> None:
        """Where to go when all is measured."""
        if self._better_loss < self._from_loss:
            self._arrive(self._better, self._better_loss)
            return
        best = self.best
        start = self._restarts.draw(best.profile, better=best.loss < self._peak_loss)
        self._peak_loss = best.loss
        if start is not None:  # else there is nothing to propose
            self._from, self._from_loss = start, math.nan

    def _changes(self, most: int) -> Pairs:
        """Unit and level of the single changes of the profile, (at most `most`, 2), the smaller ones if there are more.

        A bundle's move as a whole goes by its first unit.
        """
        space, units = self.space, np.arange(self.space.n)
        lowest = space.cost[:, units, space.cheapest()]  # (r, n)
        spare = space.budget[:, None] - lowest.sum(axis=1)[:, None] + lowest  # for a unit, if all others are low
        changes = space.allowed & (space.cost <= spare[:, :, None]).all(axis=0)
        changes[units, self._from] = False
        for members in space.bundles:
            low = self._is_low(members)
            changes[members[1:], (space.second if low else space.cheapest())[members[1:]]] = False
        pairs = np.argwhere(changes)
        if len(pairs) <= most:
            return pairs
        pairs = self._rng.permutation(pairs)
        number = space.allowed.cumsum(axis=1)  # of each level among the allowed ones
        steps = np.abs(number[pairs[:, 0], pairs[:, 1]] - number[pairs[:, 0], self._from[pairs[:, 0]]])
        return pairs[np.argsort(steps, kind="stable")[: max(0, most)]]

    def _changed(self, pairs: Pairs) -> Levels:
        """The profile with each of these changes, (k, 2) -> (k, n)."""
        space = self.space
        unit, level = pairs.T
        rows = np.repeat(self._from[None], len(pairs), axis=0)
        bundle = space.moves.bundle_of(unit) - space.n
        for row in np.flatnonzero(bundle >= 0):
            members = space.bundles[bundle[row]]
            if level[row] == space.cheapest()[unit[row]]:
                rows[row, members] = space.cheapest()[members]
            elif self._is_low(members):
                rows[row, members] = space.second[members]
        rows[np.arange(len(pairs)), unit] = level
        return rows

    def _is_low(self, members: NDArray[np.intp]) -> bool:
        """Whether the profile has a bundle at its lowest level."""
        return bool(self._from[members[0]] == self.space.cheapest()[members[0]])

    def _table(self) -> NDArray[np.float64]:
        """What each level of each unit adds to the profile's loss, (n, m); NaN where that is not known.

        What a bundle's move as a whole adds is shared out among its units.
        """
        space = self.space
        table = self._swept - self._from_loss
        table[np.arange(space.n), self._from] = 0.0
        for members in space.bundles:
            first, low, second = members[0], space.cheapest()[members], space.second[members]
            if self._is_low(members):
                lift = table[first, second[0]]
                table[members] += lift / len(members) - lift
                table[members, second] = lift / len(members)
                table[members, low] = 0.0
            else:
                table[members, low] = table[first, low[0]] / len(members)
        return table

    def _solve(self) -> Levels:
        """The different answers that are not the profile itself, (k, n)."""
        table, units = self._table(), np.arange(self.space.n)
        others = np.arange(self.space.m) != self._from[:, None]  # (n, m)
        gain = 0.0
        answers: dict[bytes, Levels] = {}
        for penalty in PENALTIES:
            answer = solve_separable(self.space, table + penalty * gain * others)
            changed = np.count_nonzero(answer != self._from)
            if not changed:
                break  # with a higher penalty all the more
            if penalty == 0:
                gain = max(0.0, -table[units, answer].sum() / changed)
            answers.setdefault(answer.tobytes(), answer)
        return np.stack(list(answers.values())) if answers else self._answers

    def _memory(self) -> dict[str, Any]:
        return {
            "from": pack(self._from),
            "from_loss": self._from_loss,
            "better": pack(self._better),
            "better_loss": self._better_loss,
            "sweep": pack(self._sweep),
            "swept": pack(self._swept),
            "answers": pack(self._answers),
            "peak_loss": self._peak_loss,
            "kick": self._restarts.kick,
        }

    def _recall(self, memory: dict[str, Any]) -> None:
        self._from, self._from_loss = unpack(memory["from"]), memory["from_loss"]
        self._better, self._better_loss = unpack(memory["better"]), memory["better_loss"]
        self._sweep, self._swept = unpack(memory["sweep"]), unpack(memory["swept"])
        self._answers = unpack(memory["answers"])
        self._peak_loss, self._restarts.kick = memory["peak_loss"], memory["kick"]
