from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from discopt import SearchSpace
from discopt.enumeration import CHUNK, count_profiles, feasible_profiles
from tests.spaces import SPACES


@pytest.mark.parametrize("name", SPACES)
def test_every_feasible_profile_comes_once_in_order(name: str) -> None:
    space = SPACES[name]()
    everything = np.array(list(product(range(space.m), repeat=space.n)), dtype=np.int16)
    expected = everything[space.feasible(everything)]
    np.testing.assert_array_equal(np.concatenate(list(feasible_profiles(space))), expected)
    assert count_profiles(space, len(expected)) == len(expected)
    assert count_profiles(space, len(expected) - 1) is None


def test_many_profiles_come_in_populations_of_bounded_size() -> None:
    populations = list(feasible_profiles(SearchSpace.cardinality(18, 9)))
    assert sum(map(len, populations)) == (2**18 + 48620) // 2  # half of all, and half of those with 9 ones
    assert len(populations) > 1
    assert max(map(len, populations)) <= CHUNK


def test_what_breaks_the_budget_is_not_looked_at() -> None:
    assert count_profiles(SearchSpace.cardinality(300, 2), 10**6) == 1 + 300 + 300 * 299 // 2


def test_a_large_space_is_given_up_at_once() -> None:
    assert count_profiles(SearchSpace.cardinality(100_000, 50_000), 1000) is None
