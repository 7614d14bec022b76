"""What a search remembers."""

from __future__ import annotations

import json

import numpy as np
import pytest

import discopt.optimizers  # noqa: F401  (first, for the archive and the searches need each other)
from discopt.archive import CELLS, LEAST, MOST, Archive, Elite


def rows(k: int, n: int = 12) -> np.ndarray:
    return np.unique(np.random.default_rng(k).integers(0, 4, size=(2 * k, n)).astype(np.int16), axis=0)[:k]


def filled(k: int, n: int = 12) -> Archive:
    archive = Archive(n)
    archive.add(rows(k, n), np.random.default_rng(1).permutation(k).astype(float), np.zeros(k))
    return archive


# archive


def test_a_profile_is_new_until_it_was_seen_and_once_in_a_list() -> None:
    archive, profiles = Archive(12), rows(4)
    assert archive.new(np.concatenate([profiles, profiles])).tolist() == [True] * 4 + [False] * 4
    archive.remember(profiles[:1])
    archive.add(profiles[1:2], np.array([np.nan]), np.zeros(1))
    assert archive.new(profiles).tolist() == [False, False, True, True]
    assert len(archive.losses) == 0


@pytest.mark.parametrize("loss", [np.nan, np.inf, -np.inf])
def test_losses_that_are_not_finite_are_left_out(loss: float) -> None:
    archive = Archive(12)
    archive.add(rows(3), np.array([1.0, loss, 2.0]), np.array([0.1, 0.2, 0.3]))
    assert archive.losses.tolist() == [1.0, 2.0]
    assert archive.variances.tolist() == [0.1, 0.3]
    np.testing.assert_array_equal(archive.profiles, rows(3)[[0, 2]])


def test_of_equally_good_profiles_the_latest_ranks_first() -> None:
    archive = Archive(12)
    archive.add(rows(4), np.array([2.0, 1.0, 1.0, 3.0]), np.zeros(4))
    assert archive.ranked().tolist() == [2, 1, 0, 3]


def test_the_best_and_the_latest_are_chosen_half_and_half() -> None:
    archive = filled(40)
    archive.losses = np.abs(np.arange(40) - 5.4)
    assert archive.chosen(8).tolist() == [4, 5, 6, 7, 36, 37, 38, 39]
    assert archive.chosen(100).tolist() == list(range(40))
    assert archive.chosen(0).tolist() == []


@pytest.mark.parametrize(("n", "capacity"), [(4, MOST), (CELLS // 100, 100), (10**9, LEAST)])
def test_the_capacity_falls_with_the_units(n: int, capacity: int) -> None:
    assert Archive(n).capacity == capacity


def test_beyond_its_capacity_it_keeps_the_best_and_the_latest_and_remembers_all() -> None:
    archive = Archive(8)
    archive.capacity = 20
    profiles = rows(60, 8)
    for i in range(60):
        archive.add(profiles[i : i + 1], np.array([float(i % 30)]), np.zeros(1))
    assert len(archive.losses) <= 20
    assert archive.losses.min() == 0.0
    np.testing.assert_array_equal(archive.profiles[-1], profiles[59])
    assert not archive.new(profiles).any()


@pytest.mark.parametrize("k", [0, 1, 30])
def test_it_comes_back_from_json_as_it_was(k: int) -> None:
    archive, other = filled(k), Archive(12)
    other.restore(json.loads(json.dumps(archive.to_dict())))
    for name in ("profiles", "losses", "variances"):
        np.testing.assert_array_equal(getattr(other, name), getattr(archive, name))
        assert getattr(other, name).dtype == getattr(archive, name).dtype
    everything = np.concatenate([rows(k), rows(50)]) if k else rows(50)
    assert archive.new(everything).tolist() == other.new(everything).tolist()
    assert other.to_dict() == archive.to_dict()


# elite


def profile(*ones: int, n: int = 10) -> np.ndarray:
    row = np.zeros(n, dtype=np.int16)
    row[list(ones)] = 1
    return row


def test_the_elite_is_sorted_and_holds_the_best_so_far() -> None:
    elite = Elite(10, size=4, apart=2)
    rng = np.random.default_rng(2)
    seen = []
    for _ in range(50):
        population, losses = rng.integers(0, 3, size=(5, 10)).astype(np.int16), rng.normal(size=5)
        elite.offer(population, losses)
        seen.extend(losses)
        assert elite.losses[0] == min(seen)
        assert (np.diff(elite.losses) >= 0).all()
        assert len(elite.losses) == len(elite.profiles) <= 4
        distance = (elite.profiles[:, None] != elite.profiles[None]).sum(axis=2)
        assert (distance[~np.eye(len(distance), dtype=bool)] >= 2).all()


def test_a_newcomer_near_a_better_member_is_not_taken() -> None:
    elite = Elite(10, size=3, apart=3)
    elite.offer(np.stack([profile(0), profile(5, 6, 7)]), np.array([1.0, 5.0]))
    elite.offer(profile(0, 1)[None], np.array([2.0]))
    assert elite.losses.tolist() == [1.0, 5.0]


def test_a_newcomer_takes_the_place_of_all_it_is_near_to_if_it_is_no_worse_than_any() -> None:
    elite = Elite(10, size=4, apart=3)
    elite.offer(np.stack([profile(0, 1), profile(2, 3), profile(6, 7, 8, 9)]), np.array([2.0, 3.0, 4.0]))
    elite.offer(profile(0, 2)[None], np.array([2.0]))  # two units from both
    assert elite.losses.tolist() == [2.0, 4.0]
    np.testing.assert_array_equal(elite.profiles[0], profile(0, 2))


def test_a_full_elite_gives_up_its_worst() -> None:
    elite = Elite(10, size=2, apart=2)
    elite.offer(np.stack([profile(0, 1), profile(4, 5), profile(7, 8)]), np.array([3.0, 2.0, 1.0]))
    assert elite.losses.tolist() == [1.0, 2.0]
    elite.offer(profile(2, 9)[None], np.array([2.5]))
    assert elite.losses.tolist() == [1.0, 2.0]


def test_of_equals_far_apart_the_latest_comes_first() -> None:
    elite = Elite(10, size=3, apart=2)
    elite.offer(np.stack([profile(0, 1), profile(4, 5)]), np.array([1.0, 1.0]))
    np.testing.assert_array_equal(elite.profiles[0], profile(4, 5))


def test_losses_that_are_not_finite_do_not_join() -> None:
    elite = Elite(10, size=3, apart=1)
    elite.offer(np.stack([profile(0), profile(1), profile(2)]), np.array([np.nan, np.inf, 1.0]))
    assert elite.losses.tolist() == [1.0]


def test_an_elite_comes_back_from_json_as_it_was() -> None:
    elite, other = Elite(10, 3, 2), Elite(10, 3, 2)
    elite.offer(np.stack([profile(0, 1), profile(4, 5)]), np.array([0.1, 0.2]))
    other.restore(json.loads(json.dumps(elite.to_dict())))
    np.testing.assert_array_equal(other.profiles, elite.profiles)
    np.testing.assert_array_equal(other.losses, elite.losses)
    other.offer(profile(8, 9)[None], np.array([0.05]))
    assert other.losses.tolist() == [0.05, 0.1, 0.2]
