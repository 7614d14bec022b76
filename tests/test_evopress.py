from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discopt import EvoPress, EvoPressSettings, Query, SearchSpace, Stage, StopReason

WEIGHTS = np.random.default_rng(0).permutation(24)


def linear(query: Query) -> np.ndarray:
    """Loss of leaving out the units of most weight: (k, n) -> (k,)."""
    return -(query.population @ WEIGHTS[: query.population.shape[1]]).astype(float)


def noisy(query: Query) -> np.ndarray:
    rng = np.random.default_rng(query.seed)
    return linear(query) + rng.normal(size=len(query.population)) * 5 / np.sqrt(query.fidelity)


def run(optimizer: EvoPress, loss: Callable[[Query], np.ndarray] = linear, turns: int = 10**6) -> list[Query]:
    queries: list[Query] = []
    while not optimizer.done and len(queries) < turns:
        queries.append(optimizer.ask())
        optimizer.tell(queries[-1], loss(queries[-1]))
    return queries


STAGED = EvoPressSettings(generations=12, offspring=8, stages=(Stage(4, 2), Stage(2, 8), Stage(1, 32)))


def test_the_elite_joins_only_the_last_stage() -> None:
    optimizer = EvoPress(SearchSpace.cardinality(24, 8), STAGED, seed=1)
    run(optimizer, turns=1)
    for _ in range(STAGED.generations):
        elite = optimizer.best.profile
        sizes = []
        for stage in STAGED.stages:
            query = optimizer.ask()
            assert query.fidelity == stage.fidelity
            has_elite = (query.population == elite).all(axis=1)
            assert has_elite.tolist() == [False] * (len(has_elite) - 1) + [stage is STAGED.stages[-1]]
            sizes.append(len(query.population))
            optimizer.tell(query, noisy(query))
        assert sizes == [8, 4, 3]


def test_survivors_are_the_best_of_their_stage() -> None:
    optimizer = EvoPress(SearchSpace.cardinality(24, 8), STAGED, seed=1)
    run(optimizer, turns=1)
    query = optimizer.ask()
    losses = np.array([5, np.nan, 1, 7, np.inf, 2, 3, 8.0])
    optimizer.tell(query, losses)
    assert (optimizer.ask().population == query.population[[0, 2, 5, 6]]).all()


def test_every_stage_draws_a_fresh_sample() -> None:
    queries = run(EvoPress(SearchSpace.cardinality(24, 8), STAGED))
    assert len({query.seed for query in queries}) == len(queries)


def test_asking_twice_gives_the_same_query() -> None:
    optimizer = EvoPress(SearchSpace.cardinality(24, 8), STAGED)
    assert optimizer.ask() is optimizer.ask()


def test_telling_another_query_is_refused() -> None:
    optimizer = EvoPress(SearchSpace.cardinality(24, 8), STAGED)
    asked = optimizer.ask()
    other = Query(asked.population, asked.fidelity, asked.seed + 1)
    with pytest.raises(ValueError, match=f"seed {asked.seed}.*got seed {asked.seed + 1}"):
        optimizer.tell(other, np.zeros(len(asked.population)))
    run(optimizer)
    with pytest.raises(ValueError, match="done"):
        optimizer.ask()


def test_one_stage_and_one_offspring_is_plain_hill_climbing() -> None:
    space = SearchSpace.cardinality(24, 8)
    start = space.random(1, np.random.default_rng(3))[0]
    settings = EvoPressSettings.starting_at(start, generations=60, offspring=1)
    optimizer = EvoPress(space, settings, seed=5)
    parent, value = start, -(start @ WEIGHTS)
    while not optimizer.done:
        query = optimizer.ask()
        child, elite = query.population
        assert (elite == parent).all()
        if -(child @ WEIGHTS) <= value:
            parent, value = child, -(child @ WEIGHTS)
        optimizer.tell(query, linear(query))
    assert optimizer.best.loss == value
    assert (optimizer.best.profile == parent).all()


def test_the_start_is_the_best_of_the_random_candidates() -> None:
    optimizer = EvoPress(SearchSpace.cardinality(24, 8), EvoPressSettings(start_candidates=30, start_fidelity=9))
    query = optimizer.ask()
    assert query.fidelity == 9
    assert len(query.population) == 30
    optimizer.tell(query, linear(query))
    assert optimizer.start is not None
    assert optimizer.start.loss == linear(query).min()


def test_the_start_is_uniform_where_the_target_is_a_level() -> None:
    costs = np.tile([2, 3, 4], (24, 1))
    assert EvoPress(SearchSpace.build(costs, 72)).best.profile.tolist() == [1] * 24
    between = EvoPress(SearchSpace.build(costs, 80))
    assert between.describe() == {"generation": 0, "stage": 0}
    with_uniform = EvoPress(SearchSpace.build(costs, 80), EvoPressSettings(start="uniform"))
    assert with_uniform.best.profile.tolist() == [1] * 24


def test_rivals_meet_the_best_start_candidate_at_the_last_fidelity() -> None:
    space = SearchSpace.cardinality(24, 8)
    best, worst = (np.isin(np.arange(24), np.argsort(WEIGHTS)[part]).astype(int) for part in (slice(16, 24), slice(8)))
    settings = EvoPressSettings(rivals=(tuple(worst), tuple(best)), stages=STAGED.stages, offspring=8)
    optimizer = EvoPress(space, settings)
    run(optimizer, turns=1)
    start = optimizer.start
    contest = optimizer.ask()
    assert optimizer.describe() == {"generation": 0, "stage": 1}
    assert contest.fidelity == 32
    assert start is not None
    assert contest.population.tolist() == [worst.tolist(), best.tolist(), start.profile.tolist()]
    optimizer.tell(contest, linear(contest))
    assert optimizer.best.profile.tolist() == best.tolist()
    assert optimizer.start is start
    assert optimizer.describe() == {"generation": 1, "stage": 1}


def test_a_rival_that_is_not_feasible_is_refused() -> None:
    with pytest.raises(ValueError, match="cost at most 1, got 2"):
        EvoPress(SearchSpace.cardinality(4, 1), EvoPressSettings(rivals=((1, 1, 0, 0),)))


def test_several_parents_are_kept_and_all_join_the_last_stage() -> None:
    settings = EvoPressSettings(generations=5, offspring=8, parents=3, stages=(Stage(5, 1), Stage(3, 4)))
    queries = run(EvoPress(SearchSpace.cardinality(24, 8), settings))
    assert [len(query.population) for query in queries] == [16] + [8, 8] * 5


def test_a_loss_that_is_never_finite_keeps_the_parent() -> None:
    space = SearchSpace.cardinality(24, 8)
    start = space.random(1, np.random.default_rng(3))[0]
    optimizer = EvoPress(space, EvoPressSettings.starting_at(start, generations=3), seed=1)
    run(optimizer, lambda query: np.full(len(query.population), np.nan))
    assert (optimizer.best.profile == start).all()


@pytest.mark.parametrize("ones", [0, 24])
def test_a_space_of_one_profile_measures_it_once_and_ends(ones: int) -> None:
    optimizer = EvoPress(SearchSpace.cardinality(24, ones), STAGED)
    queries = run(optimizer)
    assert optimizer.stop is StopReason.EXHAUSTED
    assert optimizer.best.fidelity == 32
    assert sum(len(query.population) for query in queries) <= 2


def test_a_small_neighbourhood_gives_fewer_offspring_and_skips_stages_without_a_choice() -> None:
    settings = EvoPressSettings(generations=3, offspring=16, stages=(Stage(4, 2), Stage(1, 8)), switches=(1,))
    optimizer = EvoPress(SearchSpace.cardinality(4, 1), settings)
    queries = run(optimizer)
    assert [(len(q.population), q.fidelity) for q in queries[1:]] == [(4, 8)] * 3
    assert optimizer.stop is StopReason.GENERATIONS


def test_the_best_of_a_plateau_drifts() -> None:
    optimizer = EvoPress(SearchSpace.cardinality(24, 8), EvoPressSettings(generations=1))
    run(optimizer, lambda query: np.zeros(len(query.population)), turns=1)
    before = optimizer.best.profile
    run(optimizer, lambda query: np.zeros(len(query.population)))
    assert (optimizer.best.profile != before).any()
    assert optimizer.improved_at == 0


@given(turns=st.integers(0, 40), seed=st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_a_state_restored_at_any_stage_goes_on_identically(turns: int, seed: int) -> None:
    space = SearchSpace.cardinality(24, 8)
    staged = replace(STAGED, rivals=(tuple(space.random(1, np.random.default_rng(9))[0].tolist()),))
    straight = EvoPress(space, staged, seed=seed)
    queries = run(straight, noisy)
    stopped = EvoPress(space, staged, seed=seed)
    run(stopped, noisy, turns)
    resumed = EvoPress(space, staged, seed=seed + 1)
    resumed.restore(json.loads(json.dumps(stopped.state())))
    rest = run(resumed, noisy)
    assert [q.seed for q in rest] == [q.seed for q in queries[turns:]]
    assert (resumed.best.profile == straight.best.profile).all()
    assert resumed.best.loss == straight.best.loss
    assert resumed.improved_at == straight.improved_at
    assert resumed.fraction == straight.fraction == 1


def test_the_state_of_another_space_is_refused() -> None:
    state = EvoPress(SearchSpace.cardinality(24, 8)).state()
    with pytest.raises(ValueError, match="25 units of 2 levels, got evopress on \\[24, 2\\]"):
        EvoPress(SearchSpace.cardinality(25, 8)).restore(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"offspring": 4, "stages": (Stage(8, 1), Stage(1, 2))}, "must not grow from 4 offspring on, got 8@1 1@2"),
        ({"stages": (Stage(2, 1), Stage(4, 2))}, "must not grow"),
        ({"stages": (Stage(2, 8), Stage(1, 4))}, "must not fall from stage to stage, got 2@8 1@4"),
        ({"stages": (Stage(2, 1),)}, "must keep the 1 parents, got 2@1"),
        ({"stages": ()}, "got none"),
        ({"offspring": 0}, "offspring must be at least 1, got 0"),
        ({"generations": -1}, "got -1"),
        ({"start": "best"}, "got 'best'"),
        ({"start_fidelity": 0}, "got 0"),
        ({"switches": (0, 0)}, r"got \(0, 0\)"),
        ({"switches": (1, math.nan)}, "got .*nan"),
        ({"rule": "over"}, "got 'over'"),
    ],
)
def test_settings_check_themselves(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvoPressSettings(**arguments)


def test_a_start_that_does_not_fit_is_refused() -> None:
    space = SearchSpace.cardinality(4, 1)
    with pytest.raises(ValueError, match="cost at most 1, got 2"):
        EvoPress(space, EvoPressSettings(start=(1, 1, 0, 0)))
    odd = SearchSpace.build([[0, 1], [0, 1]], 2, allowed=[[True, False], [False, True]])
    with pytest.raises(ValueError, match="no profile with one level everywhere"):
        EvoPress(odd, EvoPressSettings(start="uniform"))


@pytest.mark.parametrize("text", ["8", "8@", "@2", "a@b", "8@2@1", "0@4", "-1@4", "8@" + "9" * 5000])
def test_a_stage_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="got"):
        Stage.parse(text)


def test_a_stage_reads_as_it_is_written() -> None:
    assert Stage.parse(str(Stage(8, 2048))) == Stage(8, 2048)


def linear_on_moves(query: Query) -> np.ndarray:
    """As `linear`, from the losses of the bases and what each row changes of one."""
    rows = query.candidates
    owner = np.repeat(np.arange(len(rows)), np.diff(rows.start))
    change = WEIGHTS[rows.unit] * (rows.level - rows.bases[rows.base[owner], rows.unit])
    return -((rows.bases @ WEIGHTS)[rows.base] + np.bincount(owner, change, minlength=len(rows)))


def test_rows_are_built_only_for_objectives_that_read_them() -> None:
    space = SearchSpace.cardinality(24, 9)
    chosen = EvoPressSettings(generations=20, offspring=8, stages=(Stage(4, 1), Stage(2, 2)), parents=2, start="random")
    on_moves, on_rows = EvoPress(space, chosen), EvoPress(space, chosen)
    generations = run(on_moves, linear_on_moves)[1:]
    run(on_rows)
    assert (on_moves.best.profile == on_rows.best.profile).all()
    assert on_moves.best.loss == on_rows.best.loss
    assert not any("population" in vars(query) for query in generations)
