"""Exhaustive search: every feasible profile of a small space."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import numpy as np

from discopt.enumeration import count_profiles, feasible_profiles
from discopt.objective import Losses
from discopt.optimizers.base import StopReason
from discopt.optimizers.one_sample import OneSample
from discopt.optimizers.plan import Plan
from discopt.space import Levels, SearchSpace

MAX_PROFILES = 1 << 20


class Exhaustive(OneSample):
    """Measures every feasible profile once, in lexicographic order, as far as the plan's evaluations go.

    The plan's start has no say. Raises ValueError for a space of more than MAX_PROFILES feasible profiles.
    """

    algorithm = "exhaustive"

    def __init__(self, space: SearchSpace, plan: Plan | None = None, *, seed: int = 0) -> None:
        super().__init__(space, plan or Plan(), seed=seed)
        if count_profiles(space, MAX_PROFILES) is None:
            raise ValueError(
                f"exhaustive search takes spaces of at most {MAX_PROFILES:,} feasible profiles, "
                f"got one of {space.n} units that has more"
            )
        self._profiles: Iterator[Levels] = chain.from_iterable(feasible_profiles(space))
        self._drawn = 0
        self._next()

    def _propose(self) -> Levels | StopReason:
        rows = list(islice(self._profiles, self.plan.batch))
        self._drawn += len(rows)
        return np.stack(rows) if rows else StopReason.EXHAUSTED

    def _learn(self, population: Levels, losses: Losses) -> None:
        """What was measured does not matter."""

    def _memory(self) -> dict[str, Any]:
        return {"drawn": self._drawn}

    def _recall(self, memory: dict[str, Any]) -> None:
        self._drawn = memory["drawn"]
        self._profiles = islice(chain.from_iterable(feasible_profiles(self.space)), self._drawn, None)
