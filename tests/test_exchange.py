from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discopt import EvoPress, EvoPressSettings, Problem, SearchSpace, minimize
from discopt.exchange import exchange
from discopt.mutation import offspring
from discopt.problems import coverage, separable, separable_minimum

from .test_space import is_stuck, spaces

LAYERS = np.tile([16, 4, 4, 16, 56, 56, 56], 32)  # weights of 224 layers, in some unit
BUNDLES = [f"{i // 7}.{'attention' if i % 7 < 4 else 'mlp'}" for i in range(224)]


def knapsack(n: int = 100) -> Problem:
    rng = np.random.default_rng(0)
    weight, value = rng.integers(5, 50, n), rng.random(n)
    space = SearchSpace.build(np.outer(weight, [0, 1]), int(0.36 * weight.sum()))
    optimum, _ = separable_minimum(space, np.stack([np.zeros(n), -value], axis=1))
    return Problem("knapsack", space, lambda population: -(population @ value), optimum=optimum)


def of_layers(costs=(2, 3, 4, 5, 6), **options) -> SearchSpace:
    return SearchSpace.build(np.outer(LAYERS, costs), int(3 * LAYERS.sum()), **options)


@given(data=st.data())
@settings(max_examples=150)
def test_offspring_are_feasible_full_distinct_and_no_parent(data: st.DataObject) -> None:
    space = data.draw(spaces())
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    parents = np.unique(space.random(3, rng), axis=0)
    parents = np.unique(np.concatenate([parents, space.cheapest()[None]]), axis=0)
    rows = offspring(parents, 8, space, rng, rule="exchange")
    assert len(rows) <= 8
    assert len(np.unique(np.concatenate([parents, rows]), axis=0)) == len(parents) + len(rows)
    for row in rows:
        np.testing.assert_array_equal(space.check(row), row)
        assert is_stuck(space, row)
        assert space.is_full(row)
        for units in space.bundles:
            assert len(set((row == space.cheapest())[units])) == 1


@given(data=st.data())
@settings(max_examples=60)
def test_where_all_steps_cost_the_same_it_is_a_level_switch(data: st.DataObject) -> None:
    n, m = data.draw(st.integers(2, 30)), data.draw(st.integers(2, 5))
    space = SearchSpace.build(np.tile(np.arange(m), (n, 1)), data.draw(st.integers(1, n * (m - 1))))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    parent = space.random(1, rng)
    for k in (1, 2, 3):
        rows = offspring(parent, 8, space, rng, rule="exchange", switches=(0,) * (k - 1) + (1,))
        change = rows - parent
        assert (change.sum(axis=1) == 0).all()
        assert (np.abs(change).sum(axis=1) <= 2 * k).all()
        assert all(space.is_full(row) for row in rows)


def test_a_single_switch_reaches_every_neighbour_equally_often() -> None:
    space = SearchSpace.cardinality(8, 3)
    parent = np.array([1, 1, 1, 0, 0, 0, 0, 0], dtype=np.int16)
    rows = np.tile(parent, (6000, 1))
    children = exchange(rows, np.zeros((6000, 1), int), np.ones(6000, int), space, np.random.default_rng(0))
    counts = np.unique(children, axis=0, return_counts=True)[1]
    assert len(counts) == 15
    assert abs(counts - 400).max() < 5 * np.sqrt(400)


def test_budget_moves_between_units_of_different_cost() -> None:
    space = SearchSpace.build([[0, 1]] * 10 + [[0, 5]] * 4, 15)
    parent = np.array([1] * 10 + [1] + [0] * 3, dtype=np.int16)
    rows = offspring(parent[None], 40, space, np.random.default_rng(0), rule="exchange")
    assert set(rows[:, 10:].sum(axis=1).tolist()) == {1, 2, 3}
    assert (space.cost_of(rows) == 15).all()


def test_offspring_are_small_changes() -> None:
    space = of_layers()
    rows = offspring(space.nearest_uniform()[None], 128, space, np.random.default_rng(0), rule="exchange")
    changed = (rows != 1).sum(axis=1)
    assert np.median(changed) <= 4
    assert np.quantile(changed, 0.9) <= 10


def test_a_sub_block_is_dropped_and_another_brought_back() -> None:
    space = of_layers((0, 2, 3, 4, 5), together=BUNDLES)
    parent = space.nearest_uniform()
    parent[:4] = 0
    parent = space._fill(parent, np.random.default_rng(0))
    parent[:4] = 0
    rows = offspring(parent[None], 256, space, np.random.default_rng(0), rule="exchange")
    dropped = (rows == 0).reshape(len(rows), 32, 7)[:, :, [0, 4]].sum(axis=(1, 2))
    was = int((parent == 0).reshape(32, 7)[:, [0, 4]].sum())
    assert dropped.min() < was < dropped.max()


def test_rules_that_know_no_bundles_leave_them_as_they_are() -> None:
    space = of_layers((0, 2, 3, 4, 5), together=BUNDLES, group="none")
    parent = space.random(1, np.random.default_rng(0))
    for rule in ("within", "across"):
        rows = offspring(parent, 32, space, np.random.default_rng(0), rule=rule)
        assert len(rows) == 32
        assert ((rows == 0) == (parent == 0)).all()
        assert space.feasible(rows).all()


def test_a_unit_no_budget_can_pay_for_is_not_tried() -> None:
    space = SearchSpace.build([[0, 1]] * 6 + [[0, 100]], 3)
    parent = space.random(1, np.random.default_rng(0))
    rows = exchange(
        np.repeat(parent, 500, axis=0), np.zeros((500, 1), int), np.ones(500, int), space, np.random.default_rng(0)
    )
    assert ((rows != parent).sum(axis=1) <= 2).all()


def test_a_step_that_frees_nothing_may_lead_to_one_that_does() -> None:
    space = SearchSpace.build(np.tile([[[0, 1, 2]], [[0, 1, 1]]], (1, 3, 1)), [6, 2])
    over = np.full((20, 3), 2, dtype=np.int16)
    slack = space.budget - space.cost_of(over)
    rows = exchange(over, slack, np.zeros(20, int), space, np.random.default_rng(0))
    assert space.feasible(rows).all()
    assert (np.sort(rows, axis=1) == [0, 2, 2]).all()


def test_parents_over_the_budget_are_refused() -> None:
    space = SearchSpace.build(np.tile([1, 2], (4, 1)), 4, group="none")
    moves = np.ones(1, dtype=int)
    with pytest.raises(ValueError, match="parents must be feasible, got one that costs 3 too much"):
        exchange(np.zeros((1, 4), np.int16), np.array([[-3]]), moves, space, np.random.default_rng(0))


PROBLEMS = {
    "separable-unequal": lambda: separable(64, 5, costs="unequal"),
    "coverage": lambda: coverage(40, 200),
    "knapsack": knapsack,
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_it_ends_closer_to_the_optimum_than_within_and_no_farther_than_across(name: str) -> None:
    problem = PROBLEMS[name]()

    def gap(rule: str) -> float:
        plan = EvoPressSettings(generations=60, offspring=16, rule=rule)
        runs = [minimize(problem.objective, problem.space, plan, seed=seed) for seed in range(5)]
        return float(np.median([problem.gap(run.profile[None])[0] for run in runs]))

    found = gap("exchange")
    assert found < gap("within")
    assert found <= gap("across")


def test_a_search_repeats_and_goes_on_from_its_state() -> None:
    space = of_layers((0, 2, 3, 4, 5), together=BUNDLES)
    weight = np.random.default_rng(0).random(224)
    plan = EvoPressSettings(generations=6, offspring=8, rule="exchange")

    def run(stop: int) -> EvoPress:
        search = EvoPress(space, plan, seed=3)
        for turn in range(10**3):
            if search.done:
                break
            if turn == stop:
                state, search = search.state(), EvoPress(space, plan, seed=4)
                search.restore(state)
            query = search.ask()
            search.tell(query, -(query.population @ weight))
        return search

    np.testing.assert_array_equal(run(3).best.profile, run(-1).best.profile)


@pytest.mark.parametrize("together", [None, BUNDLES])
def test_128_offspring_of_224_units_take_less_than_50_ms(together: list[str] | None) -> None:
    space = of_layers((0, 2, 3, 4, 5), together=together)
    parent, rng = space.nearest_uniform()[None], np.random.default_rng(0)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        assert len(offspring(parent, 128, space, rng, rule="exchange")) == 128
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05
