from __future__ import annotations

import itertools

import numpy as np
import pytest

from discopt.space import Levels, SearchSpace
from discopt_llm.greedy import greedy_descent


class Counted:
    """A loss that remembers what it was asked."""

    def __init__(self, effect: np.ndarray, pairs: np.ndarray | None = None) -> None:
        self.effect, self.pairs = effect, pairs
        self.asked: list[Levels] = []

    def __call__(self, population: Levels) -> np.ndarray:
        self.asked += list(population)
        n, m = self.effect.shape
        losses = self.effect[np.arange(n), population].sum(axis=1)
        if self.pairs is not None:
            low = (m - 1 - population).astype(float)
            losses = losses + np.einsum("ki,ij,kj->k", low, self.pairs, low)
        return losses


def plainly(space: SearchSpace, losses: Counted) -> Levels:
    """Remove the unit whose removal raises the loss least, repeat."""
    profile = space.dearest()
    while not space.feasible(profile[None])[0]:
        over = space.cost_of(profile[None])[0] > space.budget
        options = []
        for unit in np.flatnonzero(profile == 1):
            if space.allowed[unit, 0] and space.cost[over, unit, 1].any():
                lower = profile.copy()
                lower[unit] = 0
                options.append((losses(lower[None])[0], lower))
        profile = min(options, key=lambda option: option[0])[1]
    return profile


def dropping(n: int, kept: int) -> SearchSpace:
    """Two kinds of units, each with a budget of its own."""
    kind = np.arange(n) % 2
    return SearchSpace.build(np.stack([np.outer(kind == r, (0, 1)) for r in (0, 1)]), [kept, kept], group=kind)


@pytest.mark.parametrize("seed", range(5))
def test_measuring_every_step_is_the_plain_algorithm(seed: int) -> None:
    rng = np.random.default_rng(seed)
    effect = np.stack([rng.random(12), np.zeros(12)], axis=1)
    pairs = rng.normal(size=(12, 12)) * 0.3
    space = dropping(12, 3)
    profile, measured = greedy_descent(space, losses := Counted(effect, pairs), limit=1000)
    assert profile.tolist() == plainly(space, plain := Counted(effect, pairs)).tolist()
    assert measured == len(losses.asked) == 1 + len(plain.asked)


def test_the_lazy_one_takes_the_same_steps_where_effects_add_up() -> None:
    effect = np.stack([np.random.default_rng(0).random(20), np.zeros(20)], axis=1)
    space = SearchSpace.cardinality(20, 12)
    every, many = greedy_descent(space, Counted(effect), limit=1000)
    lazy, few = greedy_descent(space, Counted(effect), limit=1000, at_once=1)
    assert lazy.tolist() == every.tolist()
    assert few < many / 2


def test_convex_separable_losses_of_equal_steps_are_solved() -> None:
    steps = -np.sort(-np.random.default_rng(1).random((5, 3)), axis=1)  # the lower a step, the more it loses
    effect = np.concatenate([steps[:, ::-1].cumsum(axis=1)[:, ::-1], np.zeros((5, 1))], axis=1)
    space = SearchSpace.build(np.tile(np.arange(4), (5, 1)), 8)
    profile, _ = greedy_descent(space, Counted(effect), limit=1000, at_once=1)
    everything = np.array([x for x in itertools.product(range(4), repeat=5) if sum(x) <= 8], dtype=np.int16)
    assert Counted(effect)(profile[None])[0] == pytest.approx(Counted(effect)(everything).min())


def test_errors_say_what_an_unmeasured_step_loses() -> None:
    """With measurements for the first steps alone, errors in the true proportions are as good as all of them."""
    scale = np.random.default_rng(0).uniform(0.5, 2, 12)
    effect = scale[:, None] * 4.0 ** -np.arange(4)
    effect -= effect[:, -1:]
    space = SearchSpace.build(np.tile(np.arange(4), (12, 1)), 18)
    whole, _ = greedy_descent(space, Counted(effect), limit=1000)
    guessed, measured = greedy_descent(space, Counted(effect), limit=1, at_once=1, errors=effect / scale[:, None])
    blind, _ = greedy_descent(space, Counted(effect), limit=1, at_once=1)
    assert measured == 13
    assert guessed.tolist() == whole.tolist() != blind.tolist()


def test_what_the_last_step_saved_too_much_is_spent_again() -> None:
    cost = [[0, 2], [0, 3], [0, 10]]
    effect = np.array([[0.1, 0], [0.2, 0], [5, 0]], dtype=float)
    profile, _ = greedy_descent(SearchSpace.build(cost, 5, group="none"), Counted(effect), limit=100)
    assert profile.tolist() == [1, 1, 0]


@pytest.mark.parametrize("at_once", [None, 1, 3])
def test_the_limit_is_kept_and_the_budget_met_without_further_measurements(at_once: int | None) -> None:
    effect = np.stack([np.random.default_rng(0).random(16), np.zeros(16)], axis=1)
    space = SearchSpace.cardinality(16, 4)
    for limit in (1, 20, 40):
        profile, measured = greedy_descent(space, losses := Counted(effect), limit=limit, at_once=at_once)
        assert measured == len(losses.asked) <= max(limit, 17)
        assert space.feasible(profile[None])[0] and profile.sum() == 4


def test_losses_that_are_not_finite_are_never_chosen_where_others_are_there() -> None:
    effect = np.array([[np.inf, 0], [1, 0], [np.inf, 0], [2, 0]])
    profile, _ = greedy_descent(SearchSpace.cardinality(4, 2), Counted(effect), limit=100)
    assert profile.tolist() == [1, 0, 1, 0]
    profile, _ = greedy_descent(SearchSpace.cardinality(4, 1), Counted(effect), limit=100)
    assert profile.sum() == 1
