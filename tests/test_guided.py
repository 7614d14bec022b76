"""Offspring that follow a model keep to the space, and do what the model says where it is right."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discopt import SearchSpace
from discopt.guided import cross, trade
from discopt.proposals import merged
from tests.spaces import SPACES

from .test_space import spaces

EQUAL = SearchSpace.build(np.tile(np.arange(4), (24, 1)), 36)
UNEQUAL = SearchSpace.build(np.array([1, 2, 5] * 8)[:, None] * np.arange(4), 90)


def exact_gains(table: np.ndarray, parents: np.ndarray) -> np.ndarray:
    """Of a sum over the units: (n, m), (k, n) -> (k, n, m)."""
    return table - np.take_along_axis(table[None], parents[:, :, None].astype(np.intp), axis=2)


def total(table: np.ndarray, profiles: np.ndarray) -> np.ndarray:
    return table[np.arange(len(table)), profiles].sum(axis=1)


@given(data=st.data())
@settings(max_examples=80)
def test_a_trade_is_feasible_whatever_the_gains(data: st.DataObject) -> None:
    space = data.draw(spaces())
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    parents = np.concatenate([space.random(5, rng), space.cheapest()[None]])
    before = parents.copy()
    gains = rng.normal(size=(6, space.n, space.m)) * data.draw(st.sampled_from([0.0, 1.0, 1e9]))
    children = trade(parents, gains, rng.integers(0, 5, size=6), rng.choice([0.0, 1.0, 1e6], size=6), space, rng)
    assert space.feasible(children).all()
    assert children.dtype == np.int16
    np.testing.assert_array_equal(parents, before)


@given(data=st.data())
@settings(max_examples=80)
def test_a_child_of_two_is_feasible_and_spends_what_fits(data: st.DataObject) -> None:
    space = data.draw(spaces())
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    children = cross(space.random(6, rng), space.random(6, rng), space, rng)
    assert space.feasible(children).all()
    assert all(space.is_full(child) for child in children)


@given(data=st.data())
@settings(max_examples=40)
def test_a_child_of_one_full_profile_is_that_profile(data: st.DataObject) -> None:
    space = data.draw(spaces())
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    parents = space.random(4, rng)
    np.testing.assert_array_equal(cross(parents, parents, space, rng), parents)


def test_what_the_parents_share_changes_only_where_the_budget_asks_for_it() -> None:
    rng = np.random.default_rng(0)
    first, second = EQUAL.random(200, rng), EQUAL.random(200, rng)
    shared = first == second
    children = cross(first, second, EQUAL, rng)
    of_neither = (children != first) & (children != second)
    changed = (shared & of_neither).sum(axis=1)
    assert shared.sum(axis=1).mean() > 5
    assert np.median(of_neither.sum(axis=1)) < 0.25 * EQUAL.n
    assert changed.mean() < 0.2 * shared.sum(axis=1).mean()


@given(data=st.data())
@settings(max_examples=60)
def test_merged_changes_are_feasible(data: st.DataObject) -> None:
    space = data.draw(spaces())
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    one = merged(space.random(1, rng)[0], space.random(3, rng), space, rng)
    assert one.shape == (1, space.n)
    assert space.feasible(one).all()


def test_the_earlier_of_two_changes_of_a_unit_or_bundle_stands() -> None:
    space = SearchSpace.build(np.tile(np.arange(3), (6, 1)), 6, together=["a", "a", "b", "c", "d", "e"])
    parent = np.array([1, 2, 1, 1, 1, 0], dtype=np.int16)
    first = np.array([2, 2, 0, 1, 1, 0], dtype=np.int16)
    second = np.array([0, 0, 2, 1, 1, 2], dtype=np.int16)  # drops the bundle that the first has changed
    one = merged(parent, np.stack([first, second]), space, np.random.default_rng(0))[0]
    assert space.feasible(one[None])[0]
    assert (one[:2] > 0).all()


def test_half_of_a_child_is_from_each_parent() -> None:
    rng = np.random.default_rng(1)
    first, second = EQUAL.random(300, rng), EQUAL.random(300, rng)
    differ = first != second
    children = cross(first, second, EQUAL, rng)
    of_first = ((children == first) & differ).sum() / differ.sum()
    of_second = ((children == second) & differ).sum() / differ.sum()
    assert of_first == pytest.approx(of_second, abs=0.03)
    assert of_first > 0.4


def test_bundles_are_crossed_whole() -> None:
    space = SPACES["bundles"]()
    rng = np.random.default_rng(2)
    children = cross(space.random(200, rng), space.random(200, rng), space, rng)
    low = children == space.cheapest()
    for units in space.bundles:
        assert (low[:, units].all(axis=1) | ~low[:, units].any(axis=1)).all()


@pytest.mark.parametrize("space", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
@pytest.mark.parametrize("number", [1, 3])
def test_exact_gains_without_error_improve_a_sum(space: SearchSpace, number: int) -> None:
    rng = np.random.default_rng(3)
    table = -np.sort(-rng.normal(size=(space.n, space.m)), axis=1)  # a higher level loses less
    parents = space.random(100, rng)
    children = trade(parents, exact_gains(table, parents), np.full(100, number), np.zeros(100), space, rng)
    change = total(table, children) - total(table, parents)
    assert (change < 0).mean() > 0.9
    assert space.feasible(children).all()


def test_trades_lead_to_the_optimum_of_a_sum() -> None:
    rng = np.random.default_rng(4)
    weights = rng.random(24)
    table = -weights[:, None] * np.arange(4)
    best = total(table, np.where(np.argsort(np.argsort(-weights)) < 12, 3, 0)[None])
    here = EQUAL.nearest_uniform()[None]
    for _ in range(60):
        child = trade(here, exact_gains(table, here), np.array([1]), np.zeros(1), EQUAL, rng)
        if total(table, child)[0] < total(table, here)[0]:
            here = child
    assert total(table, here) == pytest.approx(best)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_as_many_moves_begin_an_offspring_as_were_asked_for(number: int) -> None:
    rng = np.random.default_rng(5)
    parents = EQUAL.random(300, rng)
    gains = rng.normal(size=(300, 24, 4))
    children = trade(parents, gains, np.full(300, number), np.ones(300), EQUAL, rng)
    steps = np.abs(children - parents)
    assert (children.sum(axis=1) <= 36).all()
    assert (np.maximum(children - parents, 0).sum(axis=1) <= number).all()
    assert (np.maximum(parents - children, 0).sum(axis=1) <= number + (36 - children.sum(axis=1))).all()
    assert np.median(steps.sum(axis=1)) >= number


def test_without_moves_only_what_is_left_is_spent() -> None:
    rng = np.random.default_rng(6)
    full = UNEQUAL.random(20, rng)
    gains = rng.normal(size=(20, 24, 4))
    np.testing.assert_array_equal(trade(full, gains, np.zeros(20, int), np.ones(20), UNEQUAL, rng), full)
    table = -np.ones((24, 1)) * np.arange(4)
    low = np.repeat(UNEQUAL.cheapest()[None], 20, axis=0)
    filled = trade(low, exact_gains(table, low), np.zeros(20, int), np.zeros(20), UNEQUAL, rng)
    assert all(UNEQUAL.is_full(row) for row in filled)


def test_the_refill_raises_no_unit_that_it_expects_to_do_harm() -> None:
    rng = np.random.default_rng(7)
    table = np.tile(np.arange(4.0), (24, 1))  # every step up does harm
    table[:6] *= -1  # but those of six units
    low = np.repeat(EQUAL.cheapest()[None], 20, axis=0)
    filled = trade(low, exact_gains(table, low), np.zeros(20, int), np.zeros(20), EQUAL, rng)
    assert (filled[:, :6] == 3).all()
    assert (filled[:, 6:] == 0).all()


def test_the_best_use_of_the_budget_is_raised_first() -> None:
    space = SearchSpace.build([[0, 1]] * 10 + [[0, 10]] * 2, 10)
    table = np.zeros((12, 2))
    table[:10, 1], table[10:, 1] = -1.0, -2.0  # one dear unit gains twice as much as a cheap one, for ten times as much
    low = space.cheapest()[None]
    child = trade(low, exact_gains(table, low), np.zeros(1, int), np.zeros(1), space, np.random.default_rng(8))
    assert child[0].tolist() == [1] * 10 + [0] * 2


def test_a_larger_error_makes_offspring_more_different() -> None:
    rng = np.random.default_rng(9)
    parent = EQUAL.random(1, rng)
    rows = np.repeat(parent, 300, axis=0)
    gains = exact_gains(rng.normal(size=(24, 4)), rows)
    kinds = [
        len(np.unique(trade(rows, gains, np.ones(300, int), np.full(300, error), EQUAL, rng), axis=0))
        for error in (0.0, 0.3, 3.0)
    ]
    assert kinds[0] <= 2 < kinds[1] < kinds[2]


def test_dropping_a_bundle_counts_what_all_its_units_lose() -> None:
    names = ["a", "a", "a", "b", "b", "b"]
    space = SearchSpace.build(np.tile([0, 1], (6, 1)), 3, together=names)
    table = np.zeros((6, 2))
    table[:3, 1], table[3:, 1] = [-5.0, 1.0, 1.0], -0.5  # together -3 and -1.5, though two of the first do harm
    low = space.cheapest()[None]
    child = trade(low, exact_gains(table, low), np.zeros(1, int), np.zeros(1), space, np.random.default_rng(10))
    assert child[0].tolist() == [1, 1, 1, 0, 0, 0]
