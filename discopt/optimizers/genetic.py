"""A genetic algorithm whose crossover keeps the budget.

Uniform crossover (Syswerda, "Uniform crossover in genetic algorithms", ICGA 1989), tournaments, and survival of the
best of parents and offspring, no two of them alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from discopt.arrays import pack, unpack
from discopt.exchange import exchange
from discopt.objective import Losses
from discopt.optimizers.base import StopReason
from discopt.optimizers.one_sample import OneSample
from discopt.optimizers.plan import Plan
from discopt.space import Levels, SearchSpace

PER_ROOT = 4  # members per square root of the units
SMALLEST, LARGEST = 16, 128  # populations
TOURNAMENT = 4  # members, the best of which becomes a parent
MUTATED = 0.5  # of the offspring
ROUNDS = 8  # times that offspring which are members already are drawn again


class Genetic(OneSample):
    """Offspring take every unit, or bundle, from one of two parents; moves down and up then spend the budget.

    Half of the offspring also make one random move. The repair is that of `discopt.exchange`. The population is the
    best 4 sqrt(n) profiles measured so far, at least 16 and at most 128, first of all random ones and the plan's
    profile, or the nearest to uniform. Every query is a batch of offspring.
    """

    algorithm = "genetic"

    def __init__(self, space: SearchSpace, plan: Plan | None = None, *, seed: int = 0) -> None:
        super().__init__(space, plan or Plan(), seed=seed)
        self._size = min(LARGEST, max(SMALLEST, round(PER_ROOT * math.sqrt(space.n))))
        self._members = np.empty((0, space.n), dtype=np.int16)  # best first
        self._losses = np.empty(0)
        self._next()

    def _propose(self) -> Levels | StopReason:
        founders = min(self.plan.batch, self._size - self._evaluated)
        rows = self._fresh(self._founders, founders) if founders > 0 else []
        rows = rows or self._fresh(self._offspring, self.plan.batch)
        return np.stack(rows) if rows else StopReason.EXHAUSTED

    def _fresh(self, draw: Callable[[int], Levels], count: int) -> list[Levels]:
        """At most `count` different profiles that are no members, (n,) each."""
        known = {member.tobytes() for member in self._members}
        fresh: dict[bytes, Levels] = {}
        for _ in range(ROUNDS):
            for row in draw(count):
                if row.tobytes() not in known:
                    fresh.setdefault(row.tobytes(), row)
            if len(fresh) >= count:
                break
        return list(fresh.values())[:count]

    def _founders(self, count: int) -> Levels:
        """Random profiles, and to begin with the start: (count, n)."""
        rows = self.space.random(count, self._rng)
        if not self._evaluated:
            rows[0] = self._first()
        return rows

    def _offspring(self, count: int) -> Levels:
        """Crossover, mutation and repair: (count, n), all feasible."""
        drawn = self._rng.integers(len(self._members), size=(2, count, TOURNAMENT))
        mother, father = self._members[drawn.min(axis=2)]  # the best members come first
        from_mother = self._rng.random((count, self.space.n)) < 0.5
        children = np.where(from_mother[:, self.space.together], mother, father)
        mutations = (self._rng.random(count) < MUTATED).astype(np.intp)
        slack = self.space.budget - self.space.cost_of(children)
        return exchange(children, slack, mutations, self.space, self._rng)

    def _learn(self, population: Levels, losses: Losses) -> None:
        members, all_losses = np.concatenate([population, self._members]), np.concatenate([losses, self._losses])
        best = np.argsort(all_losses, kind="stable")[: self._size]  # of two that lose the same, the younger
        self._members, self._losses = members[best], all_losses[best]

    def _memory(self) -> dict[str, Any]:
        return {"members": pack(self._members), "losses": pack(self._losses)}

    def _recall(self, memory: dict[str, Any]) -> None:
        self._members, self._losses = unpack(memory["members"]), unpack(memory["losses"])
