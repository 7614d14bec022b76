from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discopt import SearchSpace
from discopt.mutation import MAX_LEVEL_CHANGES, level_switch, mutate, offspring, raise_and_lower

RULES = ["within", "across", "exchange"]


@pytest.mark.parametrize("rule", RULES)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_offspring_are_feasible_distinct_and_no_parent(rule: str, data: st.DataObject) -> None:
    n, m, r = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 2))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    cost = rng.integers(0, 5, size=(r, n, m)).cumsum(axis=2)
    dearest = cost[:, :, -1].sum(axis=1)
    budget = np.maximum((dearest * data.draw(st.floats(0, 1))).astype(np.int64), cost[:, :, 0].sum(axis=1))
    allowed = rng.random((n, m)) < 0.8
    allowed[:, 0] = True
    space = SearchSpace.build(cost, budget, group=data.draw(st.sampled_from(["size", "none"])), allowed=allowed)
    parents = np.unique(space.random(3, rng), axis=0)
    rows = offspring(parents, 8, space, rng, rule=rule)
    assert len(rows) <= 8
    assert space.feasible(rows).all() if len(rows) else True
    assert len(np.unique(np.concatenate([parents, rows]), axis=0)) == len(parents) + len(rows)


def test_a_switch_moves_one_unit_down_and_one_of_its_group_up() -> None:
    space = SearchSpace.build(np.tile([0, 1, 2, 3], (30, 1)), 40, group=[0, 1, 2] * 10)
    rng = np.random.default_rng(0)
    parent = space.random(1, rng)
    children = level_switch(np.repeat(parent, 500, axis=0), np.ones(500, dtype=int), space, rng)
    change = children - parent
    assert (np.sort(change, axis=1)[:, [0, 1, -2, -1]] == [-1, 0, 0, 1]).all()
    assert (space.group[change.argmin(axis=1)] == space.group[change.argmax(axis=1)]).all()


def test_groups_are_picked_in_proportion_to_their_units() -> None:
    space = SearchSpace.build(np.tile([0, 1, 2], (10, 1)), 10, group=[0] * 8 + [1] * 2)
    rows = np.ones((6000, 10), dtype=np.int16)
    children = level_switch(rows, np.ones(6000, dtype=int), space, np.random.default_rng(0))
    share = (children[:, 8:] != 1).any(axis=1).mean()
    assert abs(share - 0.2) < 5 * np.sqrt(0.2 * 0.8 / 6000)


def test_all_pairs_are_equally_likely_also_where_few_units_can_rise() -> None:
    space = SearchSpace.cardinality(40, 38)
    parent = np.ones(40, dtype=np.int16)
    parent[[3, 30]] = 0
    children = level_switch(np.tile(parent, (8000, 1)), np.ones(8000, dtype=int), space, np.random.default_rng(0))
    raised = children[:, 3].mean()
    assert abs(raised - 0.5) < 5 * np.sqrt(0.25 / 8000)


def test_a_unit_that_is_the_only_one_that_can_move_has_no_partner() -> None:
    space = SearchSpace.build([[0, 1, 2], [5, 5, 5]], 6, group=[0, 0], allowed=[[True] * 3, [False, True, False]])
    assert len(offspring(np.array([[1, 1]]), 4, space, np.random.default_rng(0))) == 0


@pytest.mark.parametrize("rule", RULES)
def test_the_whole_neighbourhood_is_found_and_no_more(rule: str) -> None:
    space = SearchSpace.cardinality(6, 1)
    rows = offspring(np.eye(6, dtype=np.int16)[:1], 50, space, np.random.default_rng(0), rule=rule, switches=(1,))
    found = {tuple(row) for row in rows.tolist() if sum(row)}
    assert found == {tuple(row) for row in np.eye(6, dtype=int)[1:].tolist()}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ones", [0, 7])
def test_nothing_to_trade_gives_no_offspring(rule: str, ones: int) -> None:
    space = SearchSpace.cardinality(7, ones)
    parent = np.full((1, 7), int(ones > 0))
    rng = np.random.default_rng(0)
    assert offspring(parent, 5, space, rng, rule=rule).shape == (0, 7)


def test_the_across_rule_trades_between_units_of_different_cost() -> None:
    space = SearchSpace.build([[0, 1]] * 10 + [[0, 5]] * 4, 15)
    parent = np.array([1] * 10 + [1] + [0] * 3, dtype=np.int16)
    rng = np.random.default_rng(0)
    within = offspring(parent[None], 40, space, rng)
    across = offspring(parent[None], 40, space, rng, rule="across")
    assert (within[:, 10:].sum(axis=1) == 1).all()
    assert (across[:, 10:].sum(axis=1) != 1).any()
    assert (np.abs(across - parent).sum(axis=1) <= MAX_LEVEL_CHANGES).all()


def test_offspring_that_free_far_more_than_they_spend_are_thrown_away() -> None:
    space = SearchSpace.build([[0, 1], [0, 10]], 10, group="none")
    parent = np.array([[0, 1]] * 50, dtype=np.int16)
    kept = raise_and_lower(parent, np.zeros((50, 1), int), np.ones(50, int), space, np.random.default_rng(0))
    assert not (kept[:, 1] < 1).any()


@pytest.mark.parametrize("rule", RULES)
def test_the_parents_are_left_alone(rule: str) -> None:
    space = SearchSpace.cardinality(20, 10)
    parents = space.random(2, np.random.default_rng(0))
    before = parents.copy()
    offspring(parents, 10, space, np.random.default_rng(1), rule=rule)
    assert (parents == before).all()


def test_offspring_change_only_what_differs_from_their_parent() -> None:
    space = SearchSpace.build(np.tile([0, 1, 2], (5, 1)), 5)
    children = mutate(np.ones((1, 5)), 30, space, np.random.default_rng(0), switches=(1, 1, 1, 1))
    assert len(children) > 15
    assert (children.level != 1).all()
    assert all(len(set(change)) == len(change) for change in np.split(children.unit, children.start[1:-1]))


def test_the_weights_of_the_switches_are_those_of_the_numbers_of_changes() -> None:
    space = SearchSpace.build(np.tile(np.arange(9), (3000, 1)), 12_000)
    count = 4000
    children = mutate(np.full((1, 3000), 4), count, space, np.random.default_rng(0))
    changes = np.bincount(np.diff(children.start), minlength=7)[[2, 4, 6]] / count  # of 1, 2 and 3 switches
    expected = np.array([5, 3, 1]) / 9
    assert (np.abs(changes - expected) < 5 * np.sqrt(expected * (1 - expected) / count) + 0.003).all()


def test_a_group_without_a_pair_leaves_its_share_to_the_others() -> None:
    space = SearchSpace.build(np.tile([0, 1, 2], (12, 1)), 14, group=[0] * 6 + [1] * 4 + [2] * 2)
    parent = np.array([2] * 6 + [0, 0, 1, 1] + [0, 0], dtype=np.int16)
    children = level_switch(np.tile(parent, (300, 1)), np.ones(300, dtype=int), space, np.random.default_rng(0))
    assert (children[:, 6:10] != parent[6:10]).any(axis=1).all()
    assert (np.delete(children, range(6, 10), axis=1) == np.delete(parent, range(6, 10))).all()


def test_where_steps_differ_within_a_group_offspring_over_the_budget_are_left_out() -> None:
    space = SearchSpace.build([[0, 1], [0, 2], [0, 3], [0, 4]], 5, group="none")
    found = offspring(np.array([[0, 1, 1, 0]]), 20, space, np.random.default_rng(0), switches=(1,))
    assert {tuple(row) for row in found.tolist()} == {(1, 0, 1, 0), (1, 1, 0, 0)}
