"""A model that learns what was measured since it was last asked for."""

from __future__ import annotations

import json

import numpy as np
import pytest

from discopt import SearchSpace
from discopt.knowledge import LEAST_ROWS, Knowledge, _shuffled

N, M = 12, 4
SPACE = SearchSpace.build(np.tile(np.arange(M), (N, 1)), 18)
PROFILES = SPACE.random(300, np.random.default_rng(0))


def loss(profiles: np.ndarray) -> np.ndarray:
    table = np.random.default_rng(1).normal(size=(N, M)).cumsum(axis=1)
    return table[np.arange(N), profiles].sum(axis=1) + 0.1 * np.prod(profiles[:, :3], axis=1)


def grown(*sizes: int, rows: int = 1000, noise: float = 0.0) -> tuple[Knowledge, np.random.Generator]:
    """Knowledge asked for its model after each part of the profiles."""
    knowledge, rng, begin = Knowledge(SPACE, rows=rows, cells=1 << 22), np.random.default_rng(2), 0
    for size in sizes:
        part = PROFILES[begin : begin + size]
        knowledge.archive.add(part, loss(part), np.full(size, noise), -1)
        knowledge.model(begin + size, rng)
        begin += size
    return knowledge, rng


def mean(knowledge: Knowledge, rng: np.random.Generator) -> np.ndarray:
    posterior = knowledge.model(0, rng)
    assert posterior is not None
    return posterior.joint(PROFILES[200:])[0]


def test_there_is_no_model_of_too_little_nor_of_too_large_a_space() -> None:
    assert grown(LEAST_ROWS - 1)[0].model(3, np.random.default_rng(0)) is None
    knowledge = Knowledge(SPACE, rows=1000, cells=N * M * 10)
    knowledge.archive.add(PROFILES[:50], loss(PROFILES[:50]), np.zeros(50))
    assert knowledge.model(50, np.random.default_rng(0)) is None


def test_what_was_added_is_known_at_once() -> None:
    knowledge, rng = grown(90, 3, 2)
    posterior = knowledge.model(95, rng)
    assert posterior is not None and len(posterior.features) == 95
    assert posterior is knowledge.model(95, rng)  # it grew, and nothing is learned twice
    np.testing.assert_allclose(posterior.joint(PROFILES[:95])[0], loss(PROFILES[:95]), atol=0.3)


@pytest.mark.parametrize("sizes", [(90,), (90, 5, 5), (40, 5, 30, 2), (150, 10, 10)])
def test_restored_it_has_the_same_model_to_the_last_bit(sizes: tuple[int, ...]) -> None:
    knowledge, rng = grown(*sizes, rows=160)
    other = Knowledge(SPACE, rows=160, cells=1 << 22)
    other.restore(json.loads(json.dumps(knowledge.state())))
    same = np.random.default_rng()
    same.bit_generator.state = rng.bit_generator.state
    np.testing.assert_array_equal(mean(other, same), mean(knowledge, rng))


def test_it_never_has_more_rows_than_it_may() -> None:
    knowledge, rng = grown(*[7] * 40, rows=100)
    posterior = knowledge.model(280, rng)
    assert posterior is not None and len(posterior.features) <= 100
    best = int(loss(PROFILES[:280]).argmin())
    assert posterior.joint(PROFILES[best : best + 1])[0][0] == pytest.approx(
        loss(PROFILES[best : best + 1])[0], abs=0.3
    )


def test_of_noisy_losses_it_knows_the_latest_not_the_luckiest() -> None:
    exact, noisy = (grown(280, rows=100, noise=noise)[0].archive for noise in (0.0, 0.5))
    assert noisy.chosen(75).tolist() == list(range(205, 280))
    assert int(loss(PROFILES[:280]).argmin()) in exact.chosen(75)


def test_groups_stay_together_when_rows_are_shuffled() -> None:
    rows, groups = np.arange(100, 130), np.repeat([-1, 3, 5, -1, 8], 6)
    shuffled = _shuffled(rows, groups, np.random.default_rng(0))
    np.testing.assert_array_equal(np.sort(shuffled), rows)
    places = [np.flatnonzero(groups[shuffled - 100] == group) for group in (3, 5, 8)]
    assert all(np.ptp(place) == 5 for place in places)
    alone = np.flatnonzero(groups[shuffled - 100] < 0)
    assert np.ptp(alone) > len(alone) and (np.diff(shuffled[alone]) < 0).any()
