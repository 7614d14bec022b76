"""What searches have in common that measure every profile once, all on one sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np

from discopt.objective import Losses, Query, mean_loss
from discopt.optimizers.base import Measurement, StopReason, check_answer, check_state, pack_query, unpack_query
from discopt.optimizers.evopress import MAX_SEED
from discopt.optimizers.plan import Plan
from discopt.space import Levels, SearchSpace


class OneSample(ABC):
    """A search whose queries all have the plan's fidelity and one seed, so that any two losses compare.

    A subclass proposes populations and learns from their losses; its `__init__` ends with `self._next()`.
    """

    algorithm: ClassVar[str]  # its name in states and in `discopt.optimizers.ALGORITHMS`

    def __init__(self, space: SearchSpace, plan: Plan, *, seed: int) -> None:
        self.space = space
        self.plan = plan
        self.start: Measurement | None = None
        self.stop: StopReason | None = None
        self.generation = 0
        self.improved_at = 0
        self._rng = np.random.default_rng(seed)
        self._seed = int(self._rng.integers(MAX_SEED))
        self._evaluated = 0
        self._best: Measurement | None = None
        self._query: Query | None = None

    @abstractmethod
    def _propose(self) -> Levels | StopReason:
        """The next profiles to measure, (k, n) with k >= 1, or why there are none."""

    @abstractmethod
    def _learn(self, population: Levels, losses: Losses) -> None:
        """Take what the last proposal lost, or as much of it as was affordable: (k, n), (k,); NaN is +inf."""

    @abstractmethod
    def _memory(self) -> dict[str, Any]:
        """What `_propose` and `_learn` depend on beside what is kept here, as JSON values."""

    @abstractmethod
    def _recall(self, memory: dict[str, Any]) -> None:
        """Take back what `_memory` gave."""

    @property
    def done(self) -> bool:
        return self.stop is not None

    @property
    def best(self) -> Measurement:
        """The best feasible profile that was measured."""
        return self._best if self._best is not None else Measurement.unmeasured(self.space.nearest_uniform())

    @property
    def fraction(self) -> float:
        return 1.0 if self.done else self._evaluated / self.plan.evaluations

    def describe(self) -> dict[str, Any]:
        return {"generation": self.generation + 1, "stage": 1}

    def ask(self) -> Query:
        if self._query is None:
            raise ValueError("the search is done; check `done` first")
        return self._query

    def tell(self, query: Query, losses: Losses) -> None:
        check_answer(self._query, query)
        self.generation += 1
        self._evaluated += len(query.population)
        means = mean_loss(losses)
        row = self._better_row(query.population, means, self._best.loss if self._best is not None else np.inf)
        if row is not None:
            self._best = Measurement.of_row(query, losses, row)
            self.improved_at = self.generation
        self.start = self.start or self._best
        self._learn(query.population, means)
        self._next()

    def state(self) -> dict[str, Any]:
        return {
            "algorithm": self.algorithm,
            "shape": [self.space.n, self.space.m],
            "rng": self._rng.bit_generator.state,
            "generation": self.generation,
            "improved_at": self.improved_at,
            "evaluated": self._evaluated,
            "seed": self._seed,
            "stop": self.stop.name if self.stop else None,
            "start": self.start.to_dict() if self.start else None,
            "best": self._best.to_dict() if self._best else None,
            "query": pack_query(self._query),
            "memory": self._memory(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        check_state(state, self.algorithm, self.space)
        self._rng.bit_generator.state = state["rng"]
        self.generation = state["generation"]
        self.improved_at = state["improved_at"]
        self._evaluated = state["evaluated"]
        self._seed = state["seed"]
        self.stop = StopReason[state["stop"]] if state["stop"] else None
        self.start = Measurement.from_dict(state["start"]) if state["start"] else None
        self._best = Measurement.from_dict(state["best"]) if state["best"] else None
        self._query = unpack_query(state["query"])
        self._recall(state["memory"])

    def _first(self) -> Levels:
        """Where the search starts: the plan's profile, or the nearest to uniform, (n,)."""
        start = self.plan.start
        return self.space.nearest_uniform() if start is None else self.space.check(np.asarray(start))

    def _better_row(self, population: Levels, losses: Losses, than: float) -> int | None:
        """The feasible row of (k, n) that loses least of (k,); None if that is not less `than` this."""
        if losses.min() >= than:  # nearly always: a look at the costs would take longer than all else here
            return None
        ranked = np.where(self.space.feasible(population), losses, np.inf)
        row = int(ranked.argmin())
        return row if ranked[row] < than else None

    def _next(self) -> None:
        self._query = None
        left = self.plan.evaluations - self._evaluated
        proposed = self._propose() if left else StopReason.EVALUATIONS
        if isinstance(proposed, StopReason):
            self.stop = proposed
        else:
            self._query = Query(proposed[: min(left, self.plan.batch)], self.plan.fidelity, self._seed)
