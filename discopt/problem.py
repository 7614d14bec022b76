"""A test problem: a space and an objective, with its optimum where that is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from discopt.objective import Losses, Objective, Query, as_objective, evaluate, mean_loss
from discopt.space import SearchSpace

SPREAD_PROFILES = 64


@dataclass(frozen=True, eq=False)
class Problem:
    """An objective to minimise over a space, and what is known about its minimum."""

    name: str
    space: SearchSpace
    objective: Objective | Callable[..., Any]  # or a function that `as_objective` takes; lower is better
    optimum: float | None = None  # the lowest noise-free loss of a feasible profile; None if it is not known
    note: str = ""  # what is measured, and how the optimum is known
    fidelity: int = 1  # at which the objective, or `truth`, is free of noise
    truth: Objective | Callable[..., Any] | None = (
        None  # the noise-free objective, where `objective` itself is noisy at any fidelity
    )

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a problem needs a name, got an empty one")
        if not isinstance(self.space, SearchSpace):
            raise TypeError(f"space must be a SearchSpace, got {type(self.space).__name__}")
        for name, objective in (("objective", self.objective), ("truth", self.truth)):
            if objective is not None:
                object.__setattr__(self, name, as_objective(objective))
        if self.optimum is not None and not math.isfinite(self.optimum):
            raise ValueError(f"optimum must be finite, or None if it is not known, got {self.optimum}")
        if self.fidelity < 1:
            raise ValueError(f"fidelity must be at least 1, got {self.fidelity}")

    def loss(self, population: NDArray[np.integer]) -> Losses:
        """Noise-free losses: (k, n) -> (k,), lower is better."""
        query = Query(np.asarray(population, dtype=np.int16), self.fidelity, seed=0)
        objective = self.truth if self.truth is not None else self.objective
        return mean_loss(evaluate(as_objective(objective), query))

    def gap(self, population: NDArray[np.integer]) -> Losses:
        """Noise-free losses above the optimum: (k, n) -> (k,); raises ValueError if the optimum is not known."""
        if self.optimum is None:
            raise ValueError(f"the gap to the optimum needs an optimum, got a {self.name} problem without one")
        return self.loss(population) - self.optimum

    def spread(self) -> float:
        """Standard deviation of the noise-free loss among random profiles: a scale for noise and tolerances."""
        return float(self.loss(self.space.random(SPREAD_PROFILES, np.random.default_rng(0))).std())
