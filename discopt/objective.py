"""What is asked of an objective, and what it answers.

A `Query` is a population with the fidelity to measure it at and the seed of the sample that all its rows
share; an `Objective` answers with losses, lower is better. A plain function serves as well: see `as_objective`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from discopt.candidates import Candidates, Profiles
from discopt.errors import ObjectiveError

Losses = NDArray[np.float64]


class Query:
    """One stage's question: the losses of every row, all measured on the same sample.

    The rows are given as an array (k, n) or as `Candidates`, and either can be read from it: `population` is built
    when it is first asked for, and an objective that can price a few changes of a known profile, for less than a row,
    reads `candidates` and never pays for it. A `fresh` query wants a sample that no other has seen, where the objective
    keeps one apart; elsewhere a seed of its own has to do.
    """

    def __init__(self, population: Profiles | Candidates, fidelity: int, seed: int, *, fresh: bool = False) -> None:
        if isinstance(population, Candidates):
            self.candidates = population
        elif population.ndim != 2:
            raise ValueError(f"population must have shape (k, n), got {population.shape}")
        else:
            self.population = population
        if fidelity < 1:
            raise ValueError(f"fidelity must be at least 1, got {fidelity}")
        self.fidelity: Final = fidelity  # how much data to measure on; for a language model, tokens
        self.seed: Final = seed  # fixes the sample, so that the same query always has the same answer
        self.fresh: Final = fresh
        self._k = len(population)

    def __len__(self) -> int:
        return self._k

    @cached_property
    def population(self) -> Profiles:
        """Levels, (k, n)."""
        return self.candidates.rows()

    @cached_property
    def candidates(self) -> Candidates:
        """The same as profiles and their changes; without any, where the rows were given as an array."""
        return Candidates.of_rows(self.population)

    def row(self, index: int) -> Profiles:
        """One profile, (n,)."""
        return self.candidates.row(index)


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
    try:
        answer = objective.evaluate(query)
    except Exception as error:
        raise ObjectiveError(
            f"the objective raised {type(error).__name__} on {_where(query)}: {error}", query
        ) from error
    try:
        losses = np.asarray(answer, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ObjectiveError(
            f"the objective must answer with numbers, got {type(answer).__name__} on {_where(query)}", query
        ) from error
    k = len(query)
    if losses.ndim not in (1, 2) or losses.shape[0] != k or (losses.ndim == 2 and losses.shape[1] == 0):
        raise ObjectiveError(
            f"the objective must answer with shape ({k},) or ({k}, s), got {losses.shape} on {_where(query)}", query
        )
    return losses


def _where(query: Query) -> str:
    return f"{len(query)} profiles at fidelity {query.fidelity}, seed {query.seed}"


def mean_loss(losses: Losses) -> Losses:
    """Losses of the rows, (k,) or (k, s) -> (k,); NaN becomes +inf, so that it ranks last."""
    mean = losses if losses.ndim == 1 else losses.mean(axis=1)
    return np.fmin(mean, np.inf)  # of a NaN and a number, fmin takes the number
