from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from discopt import BudgetError, SearchSpace


def test_costs_are_exact_beyond_32_bits() -> None:
    big = 2**40 + 1
    space = SearchSpace.build(np.full((5, 2), [0, big]), 4 * big)
    assert space.cost_of(np.ones((1, 5), dtype=np.int16))[0, 0] == 5 * big
    assert space.feasible(np.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])).tolist() == [True, False]


def test_units_may_have_different_numbers_of_levels() -> None:
    space = SearchSpace.build([[1, 2], [1, 2, 3], [5]], 9)
    assert space.cheapest().tolist() == [0, 0, 0]
    assert space.dearest().tolist() == [1, 2, 0]
    assert space.m == 3
    with pytest.raises(ValueError, match="level 2 of unit 'unit0' is not allowed"):
        space.check([2, 0, 0])


def test_steps_leap_over_forbidden_levels() -> None:
    allowed = np.array([[True, False, True], [True, True, True]])
    space = SearchSpace.build([[0, 1, 2], [0, 1, 2]], 4, allowed=allowed)
    assert space.up.tolist() == [[2, 2, -1], [1, 2, -1]]
    assert space.down.tolist() == [[-1, 0, 0], [-1, 0, 1]]


def test_groups_by_size_hold_units_whose_steps_cost_the_same() -> None:
    space = SearchSpace.build([[0, 2, 4], [1, 3, 5], [0, 3, 6], [4, 6, 8]], 20)
    assert space.group.tolist() == [0, 0, 1, 0]
    assert space.steady


def test_a_group_with_unequal_steps_is_not_steady() -> None:
    assert not SearchSpace.build([[0, 1, 3], [0, 1, 3]], 4).steady
    assert not SearchSpace.build([[0, 1], [0, 2]], 2, group="none").steady


def test_uniform_is_the_dearest_same_level_that_fits() -> None:
    space = SearchSpace.build(np.tile([2, 3, 4], (4, 1)), 13)
    uniform = space.uniform()
    assert uniform is not None
    assert uniform.tolist() == [1, 1, 1, 1]
    assert not space.is_full(uniform)
    assert SearchSpace.build(np.tile([2, 3, 4], (4, 1)), 12).is_full(uniform)


def test_no_uniform_profile_where_none_is_allowed() -> None:
    assert SearchSpace.build([[0, 1], [0, 1]], 2, allowed=[[True, False], [False, True]]).uniform() is None


def test_an_impossible_budget_is_refused_with_the_cheapest_and_the_dearest_cost() -> None:
    with pytest.raises(BudgetError, match="budget 3: the cheapest costs 4, the dearest 8"):
        SearchSpace.build(np.tile([2, 4], (2, 1)), 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cost": [[0.5, 1.0]], "budget": 1}, TypeError, "cost must be integers.*got float64"),
        ({"cost": [0, 1], "budget": 1}, ValueError, r"cost must have shape \(n, m\) or \(r, n, m\), got \(2,\)"),
        ({"cost": [[1, 0]], "budget": 1}, ValueError, "got a step of -1 from level 0 of unit 'unit0'"),
        ({"cost": [[0, 1]], "budget": [1, 2]}, ValueError, r"budget must have shape \(1,\), got \(2,\)"),
        ({"cost": [[0, 1]], "budget": 1, "names": ["a", "b"]}, ValueError, "1 different strings, got 2"),
        ({"cost": [[0, 1]], "budget": 1, "group": "big"}, ValueError, "got 'big'"),
        ({"cost": [[0, 1]], "budget": 1, "group": [0, 1]}, ValueError, "each of the 1 units, got 2"),
        ({"cost": [[0, 1]], "budget": 1, "allowed": [[False, False]]}, ValueError, "got none for unit 'unit0'"),
        ({"cost": [[0, 2**62], [0, 2**62]], "budget": 1}, ValueError, "must fit 64 bits"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SearchSpace.build(**arguments)


def test_random_subsets_are_uniform() -> None:
    space = SearchSpace.cardinality(5, 2)
    rows = space.random(4000, np.random.default_rng(0))
    assert (rows.sum(axis=1) == 2).all()
    counts = np.unique(rows, axis=0, return_counts=True)[1]
    assert len(counts) == 10
    assert abs(counts - 400).max() < 5 * np.sqrt(400)


@given(st.data())
def test_random_profiles_are_feasible_and_leave_no_step_that_fits(data: st.DataObject) -> None:
    r, n, m = (data.draw(st.integers(1, top)) for top in (2, 7, 5))
    steps = data.draw(arrays(np.int64, (r, n, m), elements=st.integers(0, 2**40)))
    cost = steps.cumsum(axis=2)
    cheapest, dearest = cost[:, :, 0].sum(axis=1), cost[:, :, -1].sum(axis=1)
    share = data.draw(st.floats(0, 1))
    space = SearchSpace.build(cost, (cheapest + (share * (dearest - cheapest)).astype(np.int64)).tolist())
    rows = space.random(4, np.random.default_rng(data.draw(st.integers(0, 99))))
    assert space.feasible(rows).all()
    exact = [[sum(int(cost[j, i, row[i]]) for i in range(n)) for j in range(r)] for row in rows]
    assert space.cost_of(rows).tolist() == exact
    for row in rows:
        stuck = row >= 0
        for i in np.flatnonzero(space.up[np.arange(n), row] >= 0):
            higher = row.copy()
            higher[i] += 1
            stuck[i] = not space.feasible(higher[None])[0]
        assert stuck.all()
        assert space.is_full(row)
