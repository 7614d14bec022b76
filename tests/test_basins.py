"""Where a search goes on when nothing gets better."""

from __future__ import annotations

import json

import numpy as np
import pytest

from discopt import SearchSpace
from discopt.basins import FIRST_KICK, LEAST_ELITE, PATIENCE, Basins

SPACE = SearchSpace.build(np.tile(np.arange(4), (30, 1)), 45)
ROWS = SPACE.random(40, np.random.default_rng(0))


def begun(loss: float = 1.0) -> Basins:
    basins = Basins(SPACE)
    basins.learn(ROWS[:1], np.array([loss]))
    return basins


def test_the_center_is_the_best_and_of_equals_the_latest() -> None:
    basins = begun()
    basins.learn(ROWS[1:4], np.array([2.0, 0.5, 0.7]))
    np.testing.assert_array_equal(basins.center, ROWS[2])
    basins.learn(ROWS[4:5], np.array([0.5]))
    np.testing.assert_array_equal(basins.center, ROWS[4])
    basins.learn(ROWS[5:7], np.array([np.inf, 0.6]))
    np.testing.assert_array_equal(basins.center, ROWS[4])


def test_a_center_without_value_gives_way_to_one_with_a_value() -> None:
    basins = begun(np.inf)
    basins.learn(ROWS[1:2], np.array([7.0]))
    np.testing.assert_array_equal(basins.center, ROWS[1])


def test_a_basin_is_left_when_nothing_got_better_for_long() -> None:
    basins = begun()
    basins.learn(ROWS[:PATIENCE], np.full(PATIENCE, 1.5))
    assert not basins.stuck
    basins.learn(ROWS[:1], np.array([0.9]))
    basins.learn(ROWS[:PATIENCE], np.full(PATIENCE, 0.9))  # no worse is no better
    assert not basins.stuck
    basins.learn(ROWS[:1], np.array([1.5]))
    assert basins.stuck


def test_the_start_of_a_basin_is_its_center_though_it_is_worse() -> None:
    basins = begun()
    basins.learn(ROWS[:40], np.full(40, 1.5))
    basins.move(ROWS[0])
    assert basins.moving
    basins.learn(ROWS[9:10], np.array([3.0]))
    np.testing.assert_array_equal(basins.center, ROWS[9])
    assert basins.loss == 3.0 and not basins.moving and not basins.stuck


def test_kicks_grow_until_they_lead_to_something_better() -> None:
    basins, rng, none = begun(), np.random.default_rng(1), np.empty((0, 30), dtype=np.int16)

    def apart(loss: float) -> float:
        starts = basins.starts(ROWS[0], loss, none, rng)
        assert SPACE.feasible(starts).all()
        return float((starts != ROWS[0]).sum(axis=1).mean())

    first, *later = [apart(1.0) for _ in range(8)]
    assert first <= 2 * FIRST_KICK < later[-1]
    assert sorted([first, *later])[:3] == pytest.approx(sorted([first, *later][:3]))
    assert apart(0.5) <= 2 * FIRST_KICK


def test_kicks_begin_anew_after_the_largest() -> None:
    basins, rng, none = begun(), np.random.default_rng(1), np.empty((0, 30), dtype=np.int16)
    kicks = []
    for _ in range(40):
        basins.starts(ROWS[0], 1.0, none, rng)
        kicks.append(basins.state()["rest"]["_kick"])
    assert max(kicks) == 15 and kicks.count(FIRST_KICK) >= 2


def test_some_basins_begin_between_two_of_an_elite() -> None:
    basins, rng = begun(), np.random.default_rng(2)
    elite = ROWS[:LEAST_ELITE]
    best = ROWS[30]
    between = 0
    for _ in range(30):
        starts = basins.starts(best, 0.1, elite, rng)
        near_best = (starts != best).sum(axis=1).min() < (starts[:, None] != elite).sum(axis=2).min()
        between += not near_best
    assert 5 < between < 30


def test_they_go_through_json() -> None:
    basins = begun()
    basins.learn(ROWS[1:9], np.linspace(1, 2, 8))
    basins.move(ROWS[0])
    other = Basins(SPACE)
    other.restore(json.loads(json.dumps(basins.state())))
    assert json.dumps(other.state()) == json.dumps(basins.state())
    np.testing.assert_array_equal(other.center, basins.center)


def test_a_basin_keeps_half_as_far_from_the_best_as_it_began() -> None:
    basins = begun()
    assert basins.inside(ROWS).all()
    basins.move(ROWS[0])
    basins.learn(ROWS[9:10], np.array([3.0]))
    apart = int((ROWS[9] != ROWS[0]).sum()) // 2
    walk = np.where(np.arange(30)[None] < np.arange(31)[:, None], ROWS[9], ROWS[0])  # from the best to the start
    differ = (walk != ROWS[0]).sum(axis=1)
    np.testing.assert_array_equal(basins.inside(walk), differ >= apart)
    basins.learn(ROWS[9:10], np.array([2.0]))  # another measurement begins no basin
    np.testing.assert_array_equal(basins.inside(walk), differ >= apart)
    again = Basins(SPACE)
    again.restore(json.loads(json.dumps(basins.state())))
    np.testing.assert_array_equal(again.inside(walk), differ >= apart)
