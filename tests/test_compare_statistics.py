from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from discopt.compare_statistics import (
    cliques,
    expected_running_time,
    first_hits,
    holm,
    normalised,
    quartiles,
    rank,
    signed_rank,
    success_rate,
)


def test_the_gap_is_0_at_the_reference_and_1_at_a_random_profile() -> None:
    assert normalised([2.0, 6.0, 10.0, math.inf], 2.0, 10.0).tolist() == [0.0, 0.5, 1.0, math.inf]


def test_rounding_below_the_reference_is_no_gap() -> None:
    assert normalised([1.0 - 1e-15], 1.0, 2.0).tolist() == [0.0]


def test_where_random_is_no_worse_than_the_reference_the_gap_is_the_difference() -> None:
    assert normalised([3.0], 1.0, 1.0).tolist() == [2.0]


def test_quartiles_are_observed_and_survive_infinite_and_missing_gaps() -> None:
    gaps = np.array([[4.0, 1.0, math.nan], [1.0, math.inf, 1.0], [3.0, math.inf, 1.0], [2.0, math.inf, 1.0]])
    low, median, high = quartiles(gaps)
    assert low[:2].tolist() == [1.0, 1.0]
    assert median[:2].tolist() == [2.5, math.inf]
    assert high[:2].tolist() == [3.0, math.inf]
    assert np.isnan([low[2], median[2], high[2]]).all()


def test_success_is_the_share_of_runs_within_the_tolerance() -> None:
    gaps = np.array([[0.01, 0.2], [0.02, math.inf], [0.0, math.nan]])
    assert success_rate(gaps, 0.01).tolist()[:1] == [2 / 3]
    assert math.isnan(success_rate(gaps, 0.01)[1])


def test_expected_running_time_counts_what_failed_runs_spent() -> None:
    points = (10, 100, 1000)
    gaps = np.array([[1.0, 0.1, 0.0], [0.1, 0.3, 0.1], [1.0, 1.0, 1.0]])
    assert first_hits(gaps, points, 0.1).tolist() == [100.0, 10.0, math.inf]
    assert expected_running_time(gaps, points, 0.1) == (100 + 10 + 1000) / 2
    assert expected_running_time(gaps, points, 0.0) == (1000 + 1000 + 1000) / 1
    assert expected_running_time(gaps[2:], points, 0.5) == math.inf


def test_ranks_and_their_test_are_those_of_scipy_and_of_demsar() -> None:
    medians = np.random.default_rng(0).random((14, 4)) + np.array([0.3, 0.0, 0.2, 0.1])
    found = rank(medians)
    assert found.ranks == pytest.approx(stats.rankdata(medians, axis=1).mean(axis=0))
    assert found.p == pytest.approx(stats.friedmanchisquare(*medians.T).pvalue)
    assert found.critical_difference == pytest.approx(1.25, abs=0.005)  # 4 algorithms on 14 data sets, in his paper


def test_ties_share_ranks_and_nothing_but_ties_is_chance() -> None:
    assert rank(np.array([[1.0, 1.0, 2.0], [math.inf, 0.0, math.inf]])).ranks.tolist() == [2.0, 1.25, 2.75]
    assert rank(np.ones((5, 3))).p == 1.0


@pytest.mark.parametrize("shape", [(1, 5), (7, 2)])
def test_too_little_is_ranked_but_not_tested(shape: tuple[int, int]) -> None:
    found = rank(np.arange(float(np.prod(shape))).reshape(shape))
    assert found.ranks.tolist() == list(range(1, shape[1] + 1))
    assert math.isnan(found.p) and math.isnan(found.critical_difference)


@pytest.mark.parametrize("k", [1, 3, 8, 10, 30])
@pytest.mark.parametrize("digits", [1, 3])
def test_the_signed_rank_test_is_that_of_scipy(k: int, digits: int) -> None:
    rng = np.random.default_rng(k)
    first, second = rng.random((2, k)).round(digits)
    expected = stats.wilcoxon((first - second).round(12), zero_method="zsplit").pvalue
    assert signed_rank(first, second) == pytest.approx(expected)


def test_infinite_gaps_are_the_worst_and_tie_with_each_other() -> None:
    finite, infinite = np.linspace(0, 1, 10), np.full(10, np.inf)
    assert signed_rank(infinite, infinite) == 1.0
    assert signed_rank(finite, infinite) == pytest.approx(2 / 2**10)
    mixed = np.array([0.0] * 5 + [np.inf] * 5)
    assert signed_rank(mixed, np.array([0.1] * 5 + [np.inf] * 5)) == pytest.approx(2 / 2**5)


def test_holm_multiplies_by_what_is_left_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_cliques_are_the_widest_stretches_within_the_critical_difference() -> None:
    assert cliques([1.0, 3.0, 1.5, 2.4], 1.0) == [(1.0, 1.5), (1.5, 2.4), (2.4, 3.0)]
    assert cliques([1.0, 3.0, 1.5, 2.4], 5.0) == [(1.0, 3.0)]
    assert cliques([1.0, 3.0], 1.0) == []
