"""What every algorithm of the registry owes, on spaces of every kind; then what each one owes by itself."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from discopt import (
    Additive,
    Annealing,
    EvoPress,
    Exhaustive,
    Genetic,
    HillClimbing,
    Plan,
    Query,
    SearchSpace,
    StopReason,
    minimize,
    solve_separable,
)
from discopt.enumeration import feasible_profiles
from discopt.optimizers import ALGORITHMS, Optimizer
from discopt.optimizers import annealing as annealing_module
from discopt.problems import quadratic, separable
from tests.spaces import SPACES

BASELINES = ("hill-climbing", "annealing", "genetic", "additive")  # those that learn from what they measure
ONE_SAMPLE = ("random", "exhaustive", *BASELINES)
Loss = Callable[[np.ndarray], np.ndarray]


def table_of(space: SearchSpace) -> np.ndarray:
    return np.random.default_rng(5).normal(size=(space.n, space.m)) - np.arange(space.m)


def rugged(space: SearchSpace) -> Loss:
    """A sum over the units and over pairs of them: (k, n) -> (k,)."""
    table, pairs = table_of(space), np.random.default_rng(6).normal(size=(space.n, space.n)) / space.n
    units = np.arange(space.n)

    def loss(population: np.ndarray) -> np.ndarray:
        own = table[units, population]
        return own.sum(axis=1) + ((own @ pairs) * own).sum(axis=1)

    return loss


def run(optimizer: Optimizer, loss: Loss, turns: int = 10**6) -> list[Query]:
    """What was asked, up to so many turns."""
    queries = []
    while not optimizer.done and len(queries) < turns:
        queries.append(optimizer.ask())
        optimizer.tell(queries[-1], loss(queries[-1].population))
    return queries


def rows(queries: list[Query]) -> np.ndarray:
    return np.concatenate([query.population for query in queries])


@pytest.mark.parametrize("space_name", SPACES)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_keeps_to_its_plan_and_answers_feasibly(name: str, space_name: str) -> None:
    space = SPACES[space_name]()
    plan = Plan(evaluations=100, batch=6, fidelity=16)
    optimizer = ALGORITHMS[name](space, plan, 3)
    queries = run(optimizer, rugged(space))
    assert optimizer.done
    assert optimizer.fraction == 1.0
    assert sum(len(query.population) * query.fidelity for query in queries) <= plan.total_fidelity
    assert max(query.fidelity for query in queries) == 16
    assert space.feasible(optimizer.best.profile[None])[0]
    assert optimizer.best.loss == pytest.approx(rugged(space)(optimizer.best.profile[None])[0])
    assert optimizer.start is not None
    assert not optimizer.best.loss > optimizer.start.loss  # NaN for a start that was not measured
    if name in ONE_SAMPLE:
        assert len({(query.seed, query.fidelity) for query in queries}) == 1
        assert max(len(query.population) for query in queries) <= 6
    if name == "additive":  # its single changes may be over the budget
        assert space.allowed[np.arange(space.n), rows(queries)].all()
    else:
        assert space.feasible(rows(queries)).all()


@pytest.mark.parametrize("name", ONE_SAMPLE)
def test_the_best_is_the_best_feasible_profile_that_was_measured(name: str) -> None:
    space = SPACES["everything"]()
    optimizer = ALGORITHMS[name](space, Plan(evaluations=60, batch=6), 3)
    seen = rows(run(optimizer, rugged(space)))
    assert optimizer.best.loss == rugged(space)(seen[space.feasible(seen)]).min()


@pytest.mark.parametrize("space_name", ["equal", "everything"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_search_restored_at_any_turn_goes_on_as_if_nothing_had_happened(name: str, space_name: str) -> None:
    space = SPACES[space_name]()
    plan = Plan(evaluations=120, batch=6, fidelity=4)
    whole = ALGORITHMS[name](space, plan, 3)
    states, asked = [], []
    while not whole.done:
        states.append(json.dumps(whole.state()))
        asked.append(whole.ask().population.tolist())
        whole.tell(whole.ask(), rugged(space)(whole.ask().population))
    for turn in range(0, len(states), max(1, len(states) // 4)):
        other = ALGORITHMS[name](space, plan, 99)
        other.restore(json.loads(states[turn]))
        assert [query.population.tolist() for query in run(other, rugged(space))] == asked[turn:]
        assert other.best.loss == whole.best.loss
        assert json.dumps(other.state()) == json.dumps(whole.state())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_losses_that_are_not_finite_do_no_harm(name: str) -> None:
    space = SPACES["unequal"]()

    def holes(population: np.ndarray) -> np.ndarray:
        losses = rugged(space)(population)
        return np.where(population[:, 0] == 1, np.nan, np.where(population[:, 1] == 2, np.inf, losses))

    optimizer = ALGORITHMS[name](space, Plan(evaluations=90, batch=6), 3)
    run(optimizer, holes)
    assert optimizer.done
    assert np.isfinite(optimizer.best.loss)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_loss_that_says_nothing_ends_the_plan(name: str, value: float) -> None:
    space = SPACES["everything"]()
    optimizer = ALGORITHMS[name](space, Plan(evaluations=90, batch=6), 3)
    run(optimizer, lambda population: np.full(len(population), value))
    assert optimizer.done
    assert space.feasible(optimizer.best.profile[None])[0]


@pytest.mark.parametrize("name", ["exhaustive", *BASELINES])
def test_a_space_of_one_profile_is_exhausted(name: str) -> None:
    optimizer = ALGORITHMS[name](SearchSpace.build(np.tile([2, 3], (4, 1)), 8), Plan(evaluations=50), 0)
    queries = run(optimizer, lambda population: population.sum(axis=1) * 1.0)
    assert rows(queries).tolist() == [[0, 0, 0, 0]]
    assert optimizer.stop is StopReason.EXHAUSTED


@pytest.mark.parametrize("name", [*BASELINES, "evopress", "evopress-1"])
def test_the_plans_start_is_measured_first(name: str) -> None:
    space = SPACES["everything"]()
    start = space.random(1, np.random.default_rng(8))[0]
    optimizer = ALGORITHMS[name](space, Plan(100, 6, start=tuple(start.tolist())), 0)
    assert start.tolist() in optimizer.ask().population.tolist()


@pytest.mark.parametrize("name", BASELINES)
def test_a_start_over_the_budget_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cost at most 7, got 14"):
        ALGORITHMS[name](SPACES["equal"](), Plan(start=(2,) * 7), 0)


@pytest.mark.parametrize("name", ONE_SAMPLE)
def test_a_state_of_another_search_is_refused(name: str) -> None:
    space = SPACES["equal"]()
    state = ALGORITHMS[name](space, Plan(), 0).state()
    with pytest.raises(ValueError, match="got tabu"):
        ALGORITHMS[name](space, Plan(), 0).restore({**state, "algorithm": "tabu"})


# hill climbing


def test_a_climb_that_starts_at_the_optimum_measures_every_neighbour_once() -> None:
    space = SearchSpace.cardinality(6, 3)
    weights = np.array([6, 5, 4, 3, 2, 1])
    optimizer = HillClimbing(space, Plan(start=(1, 1, 1, 0, 0, 0)), seed=0)
    measured = rows(run(optimizer, lambda population: -(population @ weights), turns=1 + 9))
    assert len(np.unique(measured, axis=0)) == 10
    assert (np.abs(measured[1:] - measured[0]).sum(axis=1) == 2).all()


def test_restarts_leave_a_local_optimum() -> None:
    space = SearchSpace.cardinality(8, 4)
    trap = np.array([1, 1, 1, 1, 0, 0, 0, 0])

    def loss(population: np.ndarray) -> np.ndarray:
        """Best opposite to the trap, from which every path leads back but one of four exchanges."""
        wrong = (population & trap).sum(axis=1)
        return np.where(wrong == 0, -1.0, 4.0 - wrong)

    optimizer = HillClimbing(space, Plan(evaluations=2000, start=tuple(trap.tolist())), seed=0)
    run(optimizer, loss)
    assert optimizer.best.loss == -1.0


# annealing


def test_without_heat_the_walk_never_leads_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annealing_module, "HOT", 0.0)
    monkeypatch.setattr(annealing_module, "COLD", 1e-300)
    problem = quadratic(12, 4)
    optimizer = Annealing(problem.space, Plan(evaluations=300), seed=1)
    while not optimizer.done:
        query = optimizer.ask()
        if optimizer.start is not None:
            assert np.count_nonzero(query.population[0] != optimizer.best.profile) == 2
        optimizer.tell(query, problem.loss(query.population))


def test_with_heat_it_does() -> None:
    problem = quadratic(12, 4)
    optimizer = Annealing(problem.space, Plan(evaluations=300), seed=1)
    distance = []
    while not optimizer.done:
        query = optimizer.ask()
        distance.append(np.count_nonzero(query.population[0] != optimizer.best.profile))
        optimizer.tell(query, problem.loss(query.population))
    assert max(distance) > 2


def test_the_scale_of_the_loss_does_not_change_the_walk() -> None:
    problem = quadratic(12, 4)
    plain, scaled = (Annealing(problem.space, Plan(evaluations=300), seed=1) for _ in range(2))
    queries = run(plain, problem.loss)
    np.testing.assert_array_equal(rows(queries), rows(run(scaled, lambda x: problem.loss(x) * 2.0**40)))


# genetic


def test_no_member_of_the_population_is_measured_again() -> None:
    space = SearchSpace.build(np.tile([0, 1], (5, 1)), 2, group="none")
    optimizer = Genetic(space, Plan(evaluations=500, batch=4), seed=0)
    queries = run(optimizer, lambda population: population @ np.arange(5.0))
    assert len(np.unique(rows(queries), axis=0)) == len(rows(queries)) == 10  # full ones, fewer than members
    assert optimizer.stop is StopReason.EXHAUSTED


def test_crossover_finds_what_its_parents_have_in_halves() -> None:
    """Two blocks, each of which counts only as a whole, so that no exchange of a unit helps."""
    space = SearchSpace.cardinality(16, 8)
    wanted = np.array([1, 0] * 8, dtype=np.int16)

    def loss(population: np.ndarray) -> np.ndarray:
        right = (population == wanted).reshape(-1, 4, 4).all(axis=2).sum(axis=1)
        return -right.astype(float)

    optimizer = Genetic(space, Plan(evaluations=4000), seed=0)
    run(optimizer, loss)
    assert optimizer.best.loss == -4.0


# additive


@pytest.mark.parametrize("space_name", SPACES)
def test_a_sum_over_units_is_solved_by_the_first_turn(space_name: str) -> None:
    space = SPACES[space_name]()
    table = table_of(space)

    def loss(population: np.ndarray) -> np.ndarray:
        return table[np.arange(space.n), population].sum(axis=1)

    optimizer = Additive(space, Plan(evaluations=space.allowed.sum() + 1), seed=0)
    run(optimizer, loss)
    assert optimizer.best.loss == pytest.approx(loss(solve_separable(space, table)[None])[0], abs=1e-12)


@pytest.mark.parametrize("space_name", SPACES)
@pytest.mark.parametrize("start", [0, 1, 2])
def test_the_first_answer_is_the_best_sum_wherever_the_changes_were_measured(space_name: str, start: int) -> None:
    space = SPACES[space_name]()
    everyone = np.concatenate(list(feasible_profiles(space)))
    profile = everyone[start * (len(everyone) - 1) // 2]
    table = table_of(space)
    optimizer = Additive(space, Plan(evaluations=100, start=tuple(profile.tolist())), seed=0)
    run(optimizer, lambda x: table[np.arange(space.n), x].sum(axis=1), turns=2 + space.allowed.sum() // 16)
    optimum = table[np.arange(space.n), solve_separable(space, table)].sum()
    assert optimizer.best.loss == pytest.approx(optimum, abs=1e-12)


def test_single_changes_come_first_and_once() -> None:
    problem = separable(8, 4)
    start = problem.space.nearest_uniform()
    optimizer = Additive(problem.space, Plan(evaluations=26, batch=5), seed=0)
    measured = rows(run(optimizer, problem.loss))
    assert len(np.unique(measured[:25], axis=0)) == 25
    np.testing.assert_array_equal(measured[0], start)
    assert (np.count_nonzero(measured[1:25] != start, axis=1) == 1).all()
    assert problem.gap(measured[25:]) == pytest.approx(0, abs=1e-12)


def test_a_plan_too_short_for_every_change_measures_the_smaller_ones() -> None:
    problem = separable(30, 5)
    optimizer = Additive(problem.space, Plan(evaluations=40), seed=0)
    measured = rows(run(optimizer, problem.loss))
    assert len(measured) == 40
    assert (np.abs(measured[1:39] - measured[0]).sum(axis=1) == 1).all()
    assert problem.loss(measured[39:]) < problem.loss(measured[:1])


def test_levels_whose_loss_is_not_finite_are_not_in_the_answer() -> None:
    problem = separable(8, 4)

    def loss(population: np.ndarray) -> np.ndarray:
        return np.where((population == 3).any(axis=1), np.nan, problem.loss(population))

    optimizer = Additive(problem.space, Plan(evaluations=26), seed=0)
    answer = rows(run(optimizer, loss))[25]
    assert answer.max() < 3


def test_later_turns_go_on_where_the_loss_is_no_sum() -> None:
    problem = quadratic(16, 4)
    one_turn, many = (Additive(problem.space, Plan(evaluations=k), seed=0) for k in (55, 600))
    for optimizer in (one_turn, many):
        run(optimizer, problem.loss)
    assert many.best.loss < one_turn.best.loss < many.start.loss


# exhaustive


@pytest.mark.parametrize("space_name", SPACES)
def test_every_feasible_profile_is_measured_once(space_name: str) -> None:
    space = SPACES[space_name]()
    everyone = np.concatenate(list(feasible_profiles(space)))
    optimizer = Exhaustive(space, Plan(evaluations=10**6, batch=50), seed=0)
    np.testing.assert_array_equal(rows(run(optimizer, rugged(space))), everyone)
    assert optimizer.stop is StopReason.EXHAUSTED
    assert optimizer.best.loss == rugged(space)(everyone).min()


def test_a_space_too_large_to_look_through_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 1,048,576 feasible profiles, got one of 60 units"):
        Exhaustive(SearchSpace.cardinality(60, 30))


# EvoPress by its plan


@pytest.mark.parametrize("fidelity", [1, 5, 64])
@pytest.mark.parametrize("name", ["evopress", "evopress-1"])
def test_evopress_uses_its_plan_up_to_a_generation(name: str, fidelity: int) -> None:
    problem = quadratic(20, 4)
    plan = Plan(evaluations=300, batch=16, fidelity=fidelity)
    result = minimize(problem.objective, problem.space, optimizer=ALGORITHMS[name](problem.space, plan, 0))
    assert result.stop is StopReason.GENERATIONS
    assert plan.total_fidelity - 17 * fidelity < result.total_fidelity <= plan.total_fidelity


def test_evopress_exchanges_where_budget_has_to_cross_groups() -> None:
    rules = {}
    for name, make in SPACES.items():
        optimizer = ALGORITHMS["evopress"](make(), Plan(), 0)
        assert isinstance(optimizer, EvoPress)
        rules[name] = optimizer.settings.rule
    assert rules.pop("equal") == "within"
    assert set(rules.values()) == {"exchange"}
