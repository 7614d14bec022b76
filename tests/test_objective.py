from __future__ import annotations

import numpy as np
import pytest

from discopt import ObjectiveError, Query, as_objective
from discopt.objective import evaluate, mean_loss

QUERY = Query(np.zeros((3, 2), dtype=np.int16), fidelity=4, seed=7)


def test_a_function_of_the_population_is_an_objective() -> None:
    assert evaluate(as_objective(lambda population: population.sum(axis=1)), QUERY).tolist() == [0, 0, 0]


def test_a_function_of_population_fidelity_and_seed_is_an_objective() -> None:
    objective = as_objective(lambda population, fidelity, seed: [fidelity + seed] * len(population))
    assert evaluate(objective, QUERY).tolist() == [11, 11, 11]


def test_losses_per_sample_are_averaged() -> None:
    losses = evaluate(as_objective(lambda population: [[1, 3], [2, 2], [np.nan, 1]]), QUERY)
    assert mean_loss(losses).tolist() == [2, 2, np.inf]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda population: [1, 2], r"shape \(3,\) or \(3, s\), got \(2,\) on 3 profiles at fidelity 4, seed 7"),
        (lambda population: np.zeros((3, 0)), r"got \(3, 0\)"),
        (lambda population: "high", "numbers, got str"),
        (lambda population: 1 // 0, "raised ZeroDivisionError on 3 profiles at fidelity 4, seed 7"),
    ],
)
def test_a_wrong_answer_is_reported_with_its_query(function: object, message: str) -> None:
    with pytest.raises(ObjectiveError, match=message) as caught:
        evaluate(as_objective(function), QUERY)  # type: ignore[arg-type]
    assert caught.value.query is QUERY


def test_other_signatures_are_refused() -> None:
    with pytest.raises(TypeError, match="got one with 2 required"):
        as_objective(lambda population, fidelity: 0)
    with pytest.raises(TypeError, match="got int"):
        as_objective(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(("population", "fidelity"), [(np.zeros(3), 1), (np.zeros((1, 3)), 0)])
def test_a_query_checks_itself(population: np.ndarray, fidelity: int) -> None:
    with pytest.raises(ValueError, match="got"):
        Query(population, fidelity, seed=0)
