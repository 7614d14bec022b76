"""Simulated annealing over single exchanges of budget.

Kirkpatrick, Gelatt, Vecchi, "Optimization by simulated annealing", Science 220, 1983.
"""

from __future__ import annotations

import math
from typing import Any

from discopt.arrays import pack, unpack
from discopt.objective import Losses
from discopt.optimizers.base import StopReason
from discopt.optimizers.neighbours import Neighbours
from discopt.optimizers.one_sample import OneSample
from discopt.optimizers.plan import Plan
from discopt.space import Levels, SearchSpace

HOT = 0.001  # temperature at the start, in typical rises of the loss, for each evaluation that the plan has a unit
HOTTEST, COLD = 0.5, 0.005  # the highest start, and the temperature at the end of the plan
DRIFT = 8  # of so many units, one may have changed before exchanges are drawn anew
MEMORY = 32  # rises that the typical one is an average of, about


class Annealing(OneSample):
    """A walk to better neighbours always, and to worse ones with probability exp(-rise / temperature).

    The temperature falls geometrically over the plan's evaluations, from the higher the longer the plan. Its unit is
    what the worse of the neighbours measured lately add to the loss, on average, so that it follows the scale of the
    loss wherever the walk goes. Every query is one row. The walk starts at the plan's profile, or at
    the nearest to uniform.
    """

    algorithm = "annealing"

    def __init__(self, space: SearchSpace, plan: Plan | None = None, *, seed: int = 0) -> None:
        super().__init__(space, plan or Plan(), seed=seed)
        self._hot = min(HOTTEST, max(COLD, HOT * self.plan.evaluations / space.n))
        self._current = self._first()
        self._loss = math.inf
        self._rise, self._rises = 0.0, 0  # the typical rise, and how many it is made from
        self._neighbours = Neighbours(space, self._rng, drift=space.n // DRIFT)
        self._next()

    def _propose(self) -> Levels | StopReason:
        if not self._evaluated:
            return self._current[None]
        neighbour = self._neighbours.draw(self._current)
        return StopReason.EXHAUSTED if neighbour is None else neighbour[None]

    def _learn(self, population: Levels, losses: Losses) -> None:
        loss = float(losses[0])
        rise = loss - self._loss  # NaN from inf to inf: a plateau like any other
        if 0 < rise < math.inf:
            self._rises += 1
            self._rise += (rise - self._rise) / min(self._rises, MEMORY)
        temperature = self._rise * self._hot * (COLD / self._hot) ** self.fraction
        if not rise > 0 or (temperature > 0 and self._rng.random() < math.exp(-rise / temperature)):
            self._current, self._loss = population[0], loss

    def _memory(self) -> dict[str, Any]:
        return {
            "current": pack(self._current),
            "loss": self._loss,
            "rise": self._rise,
            "rises": self._rises,
            "neighbours": self._neighbours.state(),
        }

    def _recall(self, memory: dict[str, Any]) -> None:
        self._current = unpack(memory["current"])
        self._loss, self._rise, self._rises = memory["loss"], memory["rise"], memory["rises"]
        self._neighbours.restore(memory["neighbours"])
