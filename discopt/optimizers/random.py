"""Random search: the baseline that every other algorithm must beat."""

from __future__ import annotations

from typing import Any

import numpy as np

from discopt.objective import Losses, Query, mean_loss
from discopt.optimizers.base import Measurement, StopReason, check_answer, pack_query, unpack_query
from discopt.space import SearchSpace


class RandomSearch:
    """The best of `evaluations` random feasible profiles, all measured on one sample, `batch` at a time."""

    def __init__(
        self, space: SearchSpace, *, evaluations: int, batch: int = 16, fidelity: int = 1, seed: int = 0
    ) -> None:
        if evaluations < 1 or batch < 1:
            raise ValueError(f"evaluations and batch must be at least 1, got {evaluations} and {batch}")
        self.space = space
        self.start: Measurement | None = None
        self.stop: StopReason | None = None
        self.generation = 0
        self.improved_at = 0
        self._evaluations, self._batch, self._fidelity = evaluations, batch, fidelity
        self._rng = np.random.default_rng(seed)
        self._seed = int(self._rng.integers(2**31))
        self._evaluated = 0
        self._best: Measurement | None = None
        self._query: Query | None = None
        self._next()

    @property
    def done(self) -> bool:
        return self.stop is not None

    @property
    def best(self) -> Measurement:
        return self._best if self._best is not None else Measurement.unmeasured(self.ask().population[0])

    @property
    def fraction(self) -> float:
        return self._evaluated / self._evaluations

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
        row = int(means.argmin())
        if self._best is None or means[row] < self._best.loss:
            self._best = Measurement.of_row(query, losses, row)
            self.improved_at = self.generation
        self.start = self.start or self._best
        self._next()

    def state(self) -> dict[str, Any]:
        return {
            "algorithm": "random",
            "rng": self._rng.bit_generator.state,
            "generation": self.generation,
            "improved_at": self.improved_at,
            "evaluated": self._evaluated,
            "seed": self._seed,
            "stop": self.stop.name if self.stop else None,
            "start": self.start.to_dict() if self.start else None,
            "best": self._best.to_dict() if self._best else None,
            "query": pack_query(self._query),
        }

    def restore(self, state: dict[str, Any]) -> None:
        if state.get("algorithm") != "random":
            raise ValueError(f"expected the state of random, got {state.get('algorithm')}")
        self._rng.bit_generator.state = state["rng"]
        self.generation = state["generation"]
        self.improved_at = state["improved_at"]
        self._evaluated = state["evaluated"]
        self._seed = state["seed"]
        self.stop = StopReason[state["stop"]] if state["stop"] else None
        self.start = Measurement.from_dict(state["start"]) if state["start"] else None
        self._best = Measurement.from_dict(state["best"]) if state["best"] else None
        self._query = unpack_query(state["query"])

    def _next(self) -> None:
        batch = min(self._batch, self._evaluations - self._evaluated)
        self._query = Query(self.space.random(batch, self._rng), self._fidelity, self._seed) if batch else None
        self.stop = None if batch else StopReason.EVALUATIONS
