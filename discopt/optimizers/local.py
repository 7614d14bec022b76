"""Hill climbing with restarts: iterated local search.

Lourenço, Martin, Stützle, "Iterated local search", Handbook of Metaheuristics, 2003.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from discopt.arrays import pack, unpack
from discopt.objective import Losses
from discopt.optimizers.base import StopReason
from discopt.optimizers.neighbours import Neighbours, Restarts
from discopt.optimizers.one_sample import OneSample
from discopt.optimizers.plan import Plan
from discopt.space import Levels, SearchSpace

PATIENCE = 16  # neighbours in a row, per unit, that may fail to be better before a climb ends
REPEATS = 128  # neighbours in a row that were measured before; then the profile counts as a local optimum


class HillClimbing(OneSample):
    """Climbs to the first neighbour that is no worse, in random order, none measured twice in a climb.

    A climb ends at a local optimum, or after PATIENCE * n neighbours that are not better. The next one starts some
    random moves from the best peak (`Restarts`). Every query is one row. The first climb starts at the plan's profile,
    or the nearest to uniform.
    """

    algorithm = "hill-climbing"

    def __init__(self, space: SearchSpace, plan: Plan | None = None, *, seed: int = 0) -> None:
        super().__init__(space, plan or Plan(), seed=seed)
        self._current = self._peak = self._first()
        self._loss = self._peak_loss = math.inf
        self._failures = 0
        self._seen: dict[bytes, None] = {}  # the rows measured in this climb, in their order
        self._neighbours = Neighbours(space, self._rng)
        self._restarts = Restarts(space, self._rng)
        self._next()

    def _propose(self) -> Levels | StopReason:
        if not self._evaluated:
            return self._current[None]
        for _ in range(REPEATS):
            neighbour = self._neighbours.draw(self._current)
            if neighbour is None or self._failures >= PATIENCE * self.space.n:
                break
            if neighbour.tobytes() not in self._seen:
                return neighbour[None]
        return self._restart()

    def _restart(self) -> Levels | StopReason:
        """Where the next climb starts, (1, n)."""
        better = self._loss < self._peak_loss
        if self._loss <= self._peak_loss:
            self._peak, self._peak_loss = self._current, self._loss
        start = self._restarts.draw(self._peak, better=better)
        if start is None:
            return StopReason.EXHAUSTED
        self._loss, self._failures = math.inf, 0
        self._seen.clear()
        return start[None]

    def _learn(self, population: Levels, losses: Losses) -> None:
        loss = float(losses[0])
        self._seen[population[0].tobytes()] = None
        self._failures = 0 if loss < self._loss else self._failures + 1
        if loss <= self._loss:
            self._current, self._loss = population[0], loss

    def _memory(self) -> dict[str, Any]:
        seen = np.frombuffer(b"".join(self._seen), dtype=self._current.dtype).reshape(-1, self.space.n)
        return {
            "current": pack(self._current),
            "loss": self._loss,
            "peak": pack(self._peak),
            "peak_loss": self._peak_loss,
            "failures": self._failures,
            "kick": self._restarts.kick,
            "seen": pack(seen),
            "neighbours": self._neighbours.state(),
        }

    def _recall(self, memory: dict[str, Any]) -> None:
        self._current, self._loss = unpack(memory["current"]), memory["loss"]
        self._peak, self._peak_loss = unpack(memory["peak"]), memory["peak_loss"]
        self._failures, self._restarts.kick = memory["failures"], memory["kick"]
        self._seen = dict.fromkeys(row.tobytes() for row in unpack(memory["seen"]))
        self._neighbours.restore(memory["neighbours"])
