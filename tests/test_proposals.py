"""Which candidates are taken, and that none is taken twice."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from discopt.archive import Archive
from discopt.proposals import Batch, choose
from discopt.surrogate import Posterior

N = 6
INCUMBENT = np.zeros(N, dtype=np.int16)
POOL = np.eye(N, dtype=np.int16)


class Told:
    """A posterior that says what it was told of the incumbent and the pool."""

    def __init__(self, mean: Any, covariance: Any) -> None:
        self.mean, self.covariance = np.array(mean, dtype=float), np.array(covariance, dtype=float)

    def joint(self, profiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert len(profiles) == len(self.mean) and not profiles[0].any()
        return self.mean, self.covariance


def chosen(mean: Any, covariance: Any, count: int) -> list[int]:
    posterior = cast(Posterior, Told(mean, covariance))
    pool = POOL[: len(mean) - 1]
    return choose(posterior, INCUMBENT, pool, count, np.random.default_rng(0)).tolist()


def test_where_all_is_certain_the_lowest_is_taken() -> None:
    assert chosen([0, 3, -2, 1], 1e-12 * np.eye(4), 1) == [1]


def test_an_uncertain_candidate_may_be_worth_more_than_a_sure_small_gain() -> None:
    assert chosen([0, -0.1, 0.5], np.diag([1e-12, 1e-12, 9.0]), 1) == [1]
    assert chosen([0, -0.1, 0.5], np.diag([1e-12, 1e-12, 1e-4]), 1) == [0]


def test_two_that_gain_together_are_not_taken_both() -> None:
    covariance = np.diag([1e-9, 1.0, 1.0, 0.8])
    covariance[1, 2] = covariance[2, 1] = 1 - 1e-6  # the first two say the same
    first, second = chosen([0, 0, 0, 0], covariance, 2)
    assert {first, second} in ({0, 2}, {1, 2})


def test_the_gain_is_over_the_incumbent_as_it_is_drawn() -> None:
    """What all share with the incumbent is no gain."""
    shared = np.full((3, 3), 100.0) + np.diag([0.0, 0.0, 1.0])
    assert chosen([0, 0.01, 0.02], shared, 1) == [1]


@pytest.mark.parametrize("count", [1, 3, 9])
def test_there_are_as_many_as_asked_for_or_all(count: int) -> None:
    rows = chosen(np.arange(5.0), 1e-9 * np.eye(5), count)  # none is expected to gain
    assert len(rows) == len(set(rows)) == min(count, 4)
    assert rows[0] == 0


def test_a_batch_has_no_candidate_twice_nor_one_that_was_measured() -> None:
    archive = Archive(N)
    archive.add(POOL[:2], np.zeros(2), np.zeros(2))
    batch = Batch(archive, N)
    assert batch.take(POOL[[0, 2, 2, 3]], 4, 1) == 2
    assert batch.take(POOL[[3, 4, 5]], 1, 2) == 1
    np.testing.assert_array_equal(batch.rows, POOL[[2, 3, 4]])
    assert batch.sources.tolist() == [1, 1, 2]
