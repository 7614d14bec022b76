"""Random search: the baseline that every other algorithm must beat."""

from __future__ import annotations

from typing import Any

from discopt.objective import Losses
from discopt.optimizers.one_sample import OneSample
from discopt.optimizers.plan import Plan
from discopt.space import Levels, SearchSpace


class RandomSearch(OneSample):
    """The best of the plan's evaluations of random feasible profiles that spend the budget."""

    algorithm = "random"

    def __init__(self, space: SearchSpace, plan: Plan | None = None, *, seed: int = 0) -> None:
        super().__init__(space, plan or Plan(), seed=seed)
        self._next()

    def _propose(self) -> Levels:
        return self.space.random(self.plan.batch, self._rng)

    def _learn(self, population: Levels, losses: Losses) -> None:
        """What was measured does not matter."""

    def _memory(self) -> dict[str, Any]:
        return {}

    def _recall(self, memory: dict[str, Any]) -> None:
        """There is nothing to take back."""
