from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from discopt import BudgetError, SearchSpace


@st.composite
def spaces(draw: st.DrawFn, max_units: int = 9, max_levels: int = 5) -> SearchSpace:
    """Spaces with unequal costs, forbidden levels, one or two resources, and some with bundles."""
    n, m, r = draw(st.integers(1, max_units)), draw(st.integers(1, max_levels)), draw(st.integers(1, 2))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    cost = rng.integers(0, draw(st.sampled_from([2, 6, 2**40])), size=(r, n, m)).cumsum(axis=2)
    allowed = rng.random((n, m)) < draw(st.sampled_from([0.7, 1.0]))
    allowed[~allowed.any(axis=1), 0] = True
    together = rng.integers(0, n, size=n) if draw(st.booleans()) else np.arange(n)
    single = allowed.sum(axis=1) == 1
    together[single] = n + np.flatnonzero(single)
    units = np.arange(n)
    cheapest = cost[:, units, allowed.argmax(axis=1)].sum(axis=1)
    dearest = cost[:, units, m - 1 - allowed[:, ::-1].argmax(axis=1)].sum(axis=1)
    budget = cheapest + (draw(st.floats(0, 1)) * (dearest - cheapest)).astype(np.int64)
    group = draw(st.sampled_from(["size", "none"]))
    return SearchSpace.build(cost, budget, allowed=allowed, together=together, group=group)


def is_stuck(space: SearchSpace, row: np.ndarray) -> bool:
    """Whether no unit, and no bundle that is down, can go to its next allowed level; by trying each."""
    for label in np.unique(space.together):
        units = np.flatnonzero(space.together == label)
        is_down = len(units) > 1 and (row[units] == space.cheapest()[units]).all()
        for move in [units] if is_down else units[:, None]:
            higher = row.copy()
            for unit in move:
                above = np.flatnonzero(space.allowed[unit, row[unit] + 1 :])
                if not len(above):
                    break
                higher[unit] += 1 + above[0]
            else:
                if space.feasible(higher[None])[0]:
                    return False
    return True


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


@pytest.mark.parametrize(
    ("together", "message"),
    [
        ([0], "together must have a label for each of the 3 units, got 1"),
        (["a", "a", "b"], "got none for 'unit1' and one for 'unit0'"),
    ],
)
def test_bundles_that_cannot_be_are_refused(together: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchSpace.build([[0, 1], [1], [0, 1]], 3, together=together)


def test_a_bundle_is_at_its_lowest_levels_as_a_whole_or_not_at_all() -> None:
    allowed = [[True, True, True], [False, True, True], [True, True, True]]
    space = SearchSpace.build(np.tile([0, 1, 2], (3, 1)), 6, allowed=allowed, together=["a", "a", "b"])
    assert [units.tolist() for units in space.bundles] == [[0, 1]]
    rows = np.array([[0, 1, 0], [1, 1, 0], [0, 2, 0], [2, 2, 0], [1, 2, 2]])
    assert space.feasible(rows).tolist() == [True, False, False, True, True]
    assert space.up.tolist() == [[-1, 2, -1], [1, -1, -1], [1, 2, -1]]
    with pytest.raises(ValueError, match="leave their lowest level together, got 'unit1' there, 'unit0' not"):
        space.check([1, 1, 0])


def test_labels_of_single_units_tie_nothing() -> None:
    cost = np.tile([0, 1, 2], (4, 1))
    plain, labelled = SearchSpace.build(cost, 5), SearchSpace.build(cost, 5, together=list("dcba"))
    assert labelled.bundles == ()
    assert (plain.up == labelled.up).all()
    rows = [space.random(5, np.random.default_rng(0)) for space in (plain, labelled)]
    np.testing.assert_array_equal(*rows)


def test_full_counts_the_steps_of_bundles() -> None:
    space = SearchSpace.build([[0, 3], [0, 3], [0, 9]], 5, together=[0, 0, 1])
    assert space.is_full(np.array([0, 0, 0]))
    assert not SearchSpace.build([[0, 3], [0, 3], [0, 9]], 6, together=[0, 0, 1]).is_full(np.array([0, 0, 0]))


def test_nearest_uniform_is_uniform_where_that_spends_the_budget() -> None:
    sizes = np.array([16, 4, 4, 16, 56, 56, 56] * 4)
    space = SearchSpace.build(np.outer(sizes, [2, 3, 4, 5]), int(4 * sizes.sum()))
    assert space.nearest_uniform().tolist() == [2] * 28


@pytest.mark.parametrize("bits", [2.25, 2.5, 3.1, 4.75])
def test_nearest_uniform_spreads_what_is_left_evenly(bits: float) -> None:
    sizes = np.array([16, 4, 4, 16, 56, 56, 56] * 32)
    space = SearchSpace.build(np.outer(sizes, [2, 3, 4, 5]), int(bits * sizes.sum()))
    profile = space.nearest_uniform()
    base, share = int(bits) - 2, bits % 1
    assert set(profile.tolist()) == {base, base + 1}
    left = space.budget[0] - space.cost_of(profile[None])[0, 0]
    assert 0 <= left < sizes[profile == base].min()
    raised = profile == base + 1
    for half in (raised[:112], raised[112:]):
        assert abs(half.mean() - share) < 0.05
    for kind in (0, 3, 4, 5, 6):  # the small ones also get what is left in the end
        assert abs(raised[kind::7].mean() - share) < 0.1
    np.testing.assert_array_equal(profile, space.nearest_uniform())


def test_nearest_uniform_of_equal_costs_has_its_raised_units_at_even_distances() -> None:
    profile = SearchSpace.build(np.tile([0, 1, 2], (100, 1)), 125).nearest_uniform()
    places = np.flatnonzero(profile == 2)
    assert len(places) == 25
    assert set(np.diff(places).tolist()) <= {2, 3, 5}


@given(spaces())
def test_nearest_uniform_is_feasible_and_leaves_no_second_unit_to_raise(space: SearchSpace) -> None:
    profile, base = space.nearest_uniform(), space.uniform()
    np.testing.assert_array_equal(space.check(profile), profile)
    if base is None:
        assert is_stuck(space, profile)
        return
    raised = profile != base
    assert (profile[raised] == np.where(raised, space._above[np.arange(space.n), base], 0)[raised]).all()
    assert space.is_full(profile) or raised.any()


@given(spaces(), st.integers(0, 99))
def test_random_profiles_of_bundles_are_feasible_and_full(space: SearchSpace, seed: int) -> None:
    for row in space.random(4, np.random.default_rng(seed)):
        assert space.feasible(row[None])[0]
        assert space.is_full(row)
        assert is_stuck(space, row)


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
