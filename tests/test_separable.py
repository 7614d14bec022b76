from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discopt import BudgetError, SearchSpace, solve_separable
from discopt.problems.exact import feasible_profiles

from .test_space import spaces


@given(data=st.data())
@settings(max_examples=120)
def test_it_is_the_best_of_all_profiles(data: st.DataObject) -> None:
    space = data.draw(spaces(max_units=6, max_levels=4))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    loss = rng.lognormal(sigma=2, size=(space.n, space.m)) * data.draw(st.sampled_from([1e-6, 1.0, 1e6]))
    if data.draw(st.booleans()):
        loss[rng.random(loss.shape) < 0.2] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
        loss[np.arange(space.n), space.cheapest()] = 1.0
    x = solve_separable(space, loss)
    assert space.feasible(x[None])[0]
    everyone = np.concatenate(list(feasible_profiles(space)))
    losses = loss[np.arange(space.n), everyone].sum(axis=1)
    assert loss[np.arange(space.n), x].sum() == pytest.approx(losses[np.isfinite(losses)].min(), rel=1e-9)


def test_a_profile_over_the_budget_by_less_than_the_solvers_tolerance_is_passed_over() -> None:
    space = SearchSpace.build([[700346781657, 996980410459, 1042031276457]], 1042031276456)
    assert solve_separable(space, np.array([[2.0, 5.2, 1.9]])).tolist() == [0]
    cost = 10**12 + np.arange(40)[:, None] * np.array([[0, 1]])  # every unit's upper level by itself is over it
    space = SearchSpace.build(cost, int(cost[:, 0].sum()))
    assert solve_separable(space, np.tile([1.0, 0.0], (40, 1))).tolist() == [1] + [0] * 39


def test_budgets_hold_exactly_where_costs_are_large() -> None:
    rng = np.random.default_rng(0)
    cost = rng.integers(1, 2**40, (1, 12, 4)).cumsum(axis=2)
    for share in (0.1, 0.5, 0.9):
        low, high = cost[0, :, 0].sum(), cost[0, :, -1].sum()
        space = SearchSpace.build(cost, int(low + share * (high - low)))
        assert space.feasible(solve_separable(space, -rng.random((12, 4)))[None])[0]


def test_a_budget_for_everything_takes_the_best_level_of_each_unit() -> None:
    loss = np.random.default_rng(0).standard_normal((30, 5))
    space = SearchSpace.build(np.tile(np.arange(5), (30, 1)), 200)
    assert solve_separable(space, loss).tolist() == loss.argmin(axis=1).tolist()


def test_equal_losses_are_no_difficulty() -> None:
    space = SearchSpace.cardinality(20, 5)
    assert space.feasible(solve_separable(space, np.zeros((20, 2)))[None])[0]


@pytest.mark.parametrize("bundled", [False, True])
def test_the_layers_of_a_large_model_take_less_than_100_ms(bundled: bool) -> None:
    rng = np.random.default_rng(0)
    size = np.tile([16, 4, 4, 16, 56, 56, 56], 32) * 2**20
    labels = [f"{i // 7}.{i % 7 < 4}" for i in range(224)] if bundled else None
    space = SearchSpace.build(np.outer(size, [0, 2, 3, 4, 5]), int(3.1 * size.sum()), together=labels)
    loss = rng.lognormal(size=(224, 1)) * 0.25 ** np.arange(5)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        solve_separable(space, loss)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.1


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (np.zeros((3, 2)), ValueError, r"loss must have shape \(2, 2\), got \(3, 2\)"),
        ([[np.nan, np.inf], [0, 0]], ValueError, "of finite loss, got none for unit 'unit0'"),
        ([[np.nan, 0], [np.inf, 0]], BudgetError, "got losses that forbid too many levels"),
    ],
)
def test_losses_that_allow_no_profile_are_refused(loss: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        solve_separable(SearchSpace.cardinality(2, 1), loss)


def test_losses_that_tear_a_bundle_are_refused() -> None:
    space = SearchSpace.build([[0, 1], [0, 1]], 2, together=["a", "a"])
    with pytest.raises(BudgetError, match="got losses that forbid too many levels"):
        solve_separable(space, [[np.nan, 0], [0, np.nan]])
