"""Races: the best candidate wins, and most data goes to those that might."""

from __future__ import annotations

import json

import numpy as np
import pytest

import discopt.optimizers  # noqa: F401  (first, for races and the searches need each other)
from discopt.racing import Race

FIDELITIES = (4, 16, 64)


def candidates(k: int) -> np.ndarray:
    return np.arange(k, dtype=np.int16)[:, None] * np.ones(3, dtype=np.int16)


def run(race: Race, truth: np.ndarray, rng: np.random.Generator, *, noise: float, samples: int | None = 8) -> int:
    """To the end, on samples whose difficulty all candidates share; what it took, rows times fidelity."""
    spent = 0
    while not race.done:
        rows, columns = race.population[:, 0], samples or 1
        spent += len(rows) * race.fidelity
        scale = noise * np.sqrt(columns / race.fidelity)
        answer = truth[rows][:, None] + scale * rng.normal(size=(len(rows), columns))
        answer += 10 * rng.normal(size=columns)
        race.tell(answer if samples else answer[:, 0])
    return spent


@pytest.mark.parametrize("samples", [None, 8])
def test_the_best_wins_for_less_than_measuring_all(samples: int | None) -> None:
    truth = np.linspace(1.0, 0.0, 17)  # the incumbent is the worst, the last the best
    rng = np.random.default_rng(0)
    won, behind, spent = [], [], []
    for _ in range(100):
        race = Race(candidates(17), FIDELITIES)
        spent.append(run(race, truth, rng, noise=0.2, samples=samples))
        won.append(race.winner == 16)
        behind.append(truth[race.winner])
    assert np.mean(won) > 0.7
    assert np.mean(behind) < 0.03  # the next is behind by 0.06
    assert max(spent) < 0.3 * 17 * 64


def test_one_far_better_than_all_others_wins_every_time() -> None:
    truth = np.append(np.ones(16), 0.0)
    rng = np.random.default_rng(1)
    for _ in range(50):
        race = Race(candidates(17), FIDELITIES)
        run(race, truth, rng, noise=0.5)
        assert race.winner == race.leader == 16


def test_the_incumbent_keeps_its_place_against_those_that_are_worse() -> None:
    truth = np.append(0.0, np.ones(16))
    rng = np.random.default_rng(2)
    winners = []
    for _ in range(50):
        race = Race(candidates(17), FIDELITIES)
        run(race, truth, rng, noise=0.5)
        winners.append(race.winner)
    assert winners == [0] * 50


def test_the_incumbent_stays_to_the_end_however_far_behind() -> None:
    race = Race(candidates(9), FIDELITIES)
    while not race.done:
        assert race.running[0] == 0
        race.tell(np.where(race.running == 0, 100.0, race.running)[:, None] + np.zeros(8))
    assert np.isfinite(race.latest[0])
    assert race.fidelity_of(0) == sum(FIDELITIES)


def test_those_clearly_behind_drop_out_and_ties_do_not() -> None:
    race = Race(candidates(5), (8, 8), share=1)
    jitter = 0.01 * np.random.default_rng(3).normal(size=(5, 8))
    race.tell(np.array([1.0, 1.0, 1.0, 3.0, 1.0])[:, None] + jitter)
    assert race.running.tolist() == [0, 1, 2, 4]
    race = Race(candidates(5), (8, 8), share=1)
    race.tell(np.ones((5, 8)))
    assert race.running.tolist() == [0, 1, 2, 3, 4]


def test_all_but_the_incumbent_behind_is_the_end() -> None:
    race = Race(candidates(4), (8, 16, 32))
    jitter = 0.01 * np.random.default_rng(4).normal(size=(4, 8))
    race.tell(np.array([0.0, 5.0, 6.0, 7.0])[:, None] + jitter)
    assert race.done
    assert race.round == 1
    assert race.winner == race.leader == 0


@pytest.mark.parametrize(("others", "share", "kept"), [(16, 4, 4), (17, 4, 5), (3, 8, 1), (6, 1, 6)])
def test_at_most_a_share_of_the_others_goes_on(others: int, share: int, kept: int) -> None:
    race = Race(candidates(others + 1), FIDELITIES, share)
    race.tell(np.random.default_rng(5).normal(size=others + 1))
    assert len(race.running) == kept + 1
    best = 1 + np.argsort(race.latest[1:])[:kept]
    assert sorted(race.running[1:]) == sorted(best)


def test_with_one_sample_no_one_is_clearly_behind() -> None:
    race = Race(candidates(6), FIDELITIES, share=1)
    race.tell(np.arange(6.0))
    behind, error = race.differences(0)
    assert behind.tolist() == list(range(6))
    assert error[0] == 0.0 and np.isinf(error[1:]).all()
    assert len(race.running) == 6


def test_differences_are_paired_and_weighed_by_their_data() -> None:
    race = Race(candidates(2), (4, 12), share=1)
    race.tell(np.array([[1.0, 11.0], [0.0, 10.0]]))
    race.tell(np.array([5.0, 9.0]))
    behind, error = race.differences(0)
    weights, apart = np.array([2, 2, 12]) / 16, np.array([-1.0, -1.0, 4.0])
    assert behind[1] == pytest.approx(weights @ apart)
    spread = weights**2 @ (apart - behind[1]) ** 2
    assert error[1] == pytest.approx(np.sqrt(spread * 3 / 2))
    back, same = race.differences(1)
    assert back[0] == pytest.approx(-behind[1])
    assert same[0] == pytest.approx(error[1])


def test_the_error_of_a_difference_is_about_what_it_claims() -> None:
    rng = np.random.default_rng(6)
    claimed, actual = [], []
    for _ in range(300):
        race = Race(candidates(3), (16,), share=1)
        race.tell(rng.normal(size=(3, 16)))
        behind, error = race.differences(0)
        claimed.append(error[1:])
        actual.append(behind[1:])
    assert np.mean(claimed) == pytest.approx(np.std(actual), rel=0.15)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("samples", [1, 4])
def test_candidates_without_a_finite_loss_are_the_first_to_go(bad: float, samples: int) -> None:
    race = Race(candidates(5), (4, 8, 16), share=2)
    losses = np.tile(np.array([1.0, 0.3, 0.0, 2.0, 0.4])[:, None], (1, samples))
    losses[2, 0] = bad
    race.tell(losses)
    assert 2 not in race.running
    while not race.done:
        race.tell(np.where(race.running == 1, 0.0, 1.0))
    assert race.winner == 1
    behind, error = race.differences(0)
    assert behind[2] == np.inf and error[2] == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_incumbent_without_a_finite_loss_is_beaten(bad: float) -> None:
    race = Race(candidates(3), (4, 8))
    while not race.done:
        race.tell(np.where(race.running == 0, bad, 1.0 + race.running))
    assert race.winner == race.leader == 1


@pytest.mark.parametrize("samples", [1, 4])
def test_without_any_finite_loss_the_incumbent_stays(samples: int) -> None:
    race = Race(candidates(4), (4, 8))
    while not race.done:
        race.tell(np.full((len(race.running), samples), np.nan))
    assert race.winner == race.leader == 0


def test_infinite_samples_of_both_leave_neither_ahead() -> None:
    race = Race(candidates(2), (4, 8))
    race.tell(np.array([[1.0, np.inf], [np.inf, 1.0]]))
    assert race.differences(0)[0][1] == np.inf
    assert race.differences(1)[0][0] == np.inf
    assert race.running[0] == 0


def test_the_winner_is_that_of_the_last_round_and_the_leader_that_of_all() -> None:
    race = Race(candidates(3), (12, 4), share=1)
    race.tell(np.array([1.0, 0.0, 0.5]))
    race.tell(np.array([1.0, 0.9, 0.8]))
    assert race.winner == 2
    assert race.leader == 1


def test_a_race_of_one_is_over_after_a_round() -> None:
    race = Race(candidates(1), FIDELITIES)
    assert not race.done
    race.tell(np.array([1.0]))
    assert race.done and race.winner == race.leader == 0


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_a_race_comes_back_from_json_as_it_was(turn: int) -> None:
    rng = np.random.default_rng(7)
    race = Race(candidates(17), FIDELITIES)
    for _ in range(turn):
        race.tell(rng.normal(size=(len(race.running), 4)))
    other = Race.from_dict(json.loads(json.dumps(race.to_dict())))
    assert other.to_dict() == race.to_dict()
    while not race.done:
        np.testing.assert_array_equal(other.population, race.population)
        assert other.fidelity == race.fidelity
        losses = rng.normal(size=(len(race.running), 4))
        race.tell(losses)
        other.tell(losses)
    assert other.done and other.winner == race.winner
    np.testing.assert_array_equal(other.differences(0), race.differences(0))


@pytest.mark.parametrize(
    ("k", "fidelities", "share", "got"), [(0, (1,), 4, "got 0,"), (2, (), 4, r"got 2, \(\)"), (2, (1,), 0, "0$")]
)
def test_a_race_without_runners_rounds_or_share_is_refused(k, fidelities, share, got) -> None:
    with pytest.raises(ValueError, match=got):
        Race(candidates(k), fidelities, share)


def test_each_round_says_how_much_more_than_the_incumbent_was_lost_in_it() -> None:
    race = Race(candidates(5), FIDELITIES, share=2)
    answers = []
    for turn in range(2):
        race = Race.from_dict(json.loads(json.dumps(race.to_dict())))
        rows = race.population[:, 0]
        answers.append((race.fidelity, rows, np.arange(len(rows))[:, None] * [1.0, 3.0] + 10 * turn))
        race.tell(answers[-1][2])
    assert len(answers[1][1]) < len(answers[0][1])
    for (fidelity, rows, answer), (said, these, more) in zip(answers, race.rounds(), strict=True):
        assert said == fidelity
        np.testing.assert_array_equal(these, rows)
        np.testing.assert_allclose(more, answer.mean(axis=1) - answer[0].mean())
