"""What is asked of an objective, and what it answers.

A `Query` is a population with the fidelity to measure it at and the seed of the sample that all its rows
share; an `Objective` answers with losses, lower is better. A plain function serves as well: see `as_objective`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from discopt.errors import ObjectiveError

Losses = NDArray[np.float64]
Profiles = NDArray[np.int16]


@dataclass(frozen=True, eq=False)
class Query:
    """One stage's question: the losses of every row, all measured on the same sample."""

    population: Profiles  # (k, n) levels
    fidelity: int  # how much data to measure on; for a language model, tokens
    seed: int  # fixes the sample, so that the same query always has the same answer

    def __post_init__(self) -> None:
        if self.population.ndim != 2:
            raise ValueError(f"population must have shape (k, n), got {self.population.shape}")
        if self.fidelity < 1:
            raise ValueError(f"fidelity must be at least 1, got {self.fidelity}")


@runtime_checkable
class Objective(Protocol):
    """Anything that measures populations."""

    def evaluate(self, query: Query) -> Losses:
        """Losses of all rows, lower is better: (k,), or (k, s) with one per sample, whose mean is the loss."""
        ...


@dataclass(frozen=True)
class _PopulationFunction:
    function: Callable[[Profiles], Any]

    def evaluate(self, query: Query) -> Losses:
        return self.function(query.population)


@dataclass(frozen=True)
class _SampledFunction:
    function: Callable[[Profiles, int, int], Any]

    def evaluate(self, query: Query) -> Losses:
        return self.function(query.population, query.fidelity, query.seed)


def as_objective(objective: Objective | Callable[..., Any]) -> Objective:
    """Wrap a function `loss(population)` or `loss(population, fidelity, seed)`; an Objective passes through."""
    if isinstance(objective, Objective):
        return objective
    if not callable(objective):
        raise TypeError(f"expected an Objective or a function of the population, got {type(objective).__name__}")
    required = [
        p
        for p in inspect.signature(objective).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(required) == 1:
        return _PopulationFunction(objective)
    if len(required) == 3:
        return _SampledFunction(objective)
    raise TypeError(
        "a loss function takes (population) or (population, fidelity, seed), "
        f"got one with {len(required)} required arguments"
    )


def evaluate(objective: Objective, query: Query) -> Losses:
    """Ask the objective and check its answer: (k,) or (k, s) float64; raises ObjectiveError with the query."""
    where = f"{len(query.population)} profiles at fidelity {query.fidelity}, seed {query.seed}"
    try:
        answer = objective.evaluate(query)
    except Exception as error:
        raise ObjectiveError(f"the objective raised {type(error).__name__} on {where}: {error}", query) from error
    try:
        losses = np.asarray(answer, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ObjectiveError(
            f"the objective must answer with numbers, got {type(answer).__name__} on {where}", query
        ) from error
    k = len(query.population)
    if losses.ndim not in (1, 2) or losses.shape[0] != k or (losses.ndim == 2 and losses.shape[1] == 0):
        raise ObjectiveError(
            f"the objective must answer with shape ({k},) or ({k}, s), got {losses.shape} on {where}", query
        )
    return losses


def mean_loss(losses: Losses) -> Losses:
    """Losses of the rows, (k,) or (k, s) -> (k,); NaN becomes +inf, so that it ranks last."""
    mean = losses if losses.ndim == 1 else losses.mean(axis=1)
    return np.where(np.isnan(mean), np.inf, mean)
