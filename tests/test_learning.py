"""The learning search: its protocol, its promises, and the corners where little or nothing is left to propose."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from discopt import Plan, Query, SearchSpace, StopReason
from discopt.enumeration import feasible_profiles
from discopt.objective import as_objective, evaluate
from discopt.optimizers import Learning, LearningSettings
from discopt.problems import leading_ones, linear, noisy, quadratic, separable
from tests.spaces import SPACES

Loss = Callable[..., np.ndarray]
LARGE = SearchSpace.build(np.tile(np.arange(5), (24, 1)), 48)
EXACT, NOISY = Plan(60, 8), Plan(30, 6, 16)


def table_of(space: SearchSpace, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(space.n, space.m)) - np.arange(space.m)


def additive(space: SearchSpace, seed: int = 5) -> Loss:
    table = table_of(space, seed)
    return lambda population: table[np.arange(space.n), population].sum(axis=1)


def shaken(loss: Loss, deviation: float = 1.0) -> Loss:
    """Per sample and with noise of its own that falls with fidelity: (k, n) -> (k, 4)."""

    def measure(population: np.ndarray, fidelity: int, seed: int) -> np.ndarray:
        rng = np.random.default_rng([seed, fidelity])
        return loss(population)[:, None] + deviation * np.sqrt(4 / fidelity) * rng.normal(size=(len(population), 4))

    return measure


def run(search: Learning, loss: Loss, turns: int = 10**5) -> list[Query]:
    """What was asked, up to so many turns."""
    queries, objective = [], as_objective(loss)
    while not search.done and len(queries) < turns:
        queries.append(search.ask())
        search.tell(queries[-1], evaluate(objective, queries[-1]))
    return queries


def rows(queries: list[Query]) -> np.ndarray:
    return np.concatenate([query.population for query in queries])


def spent(queries: list[Query]) -> int:
    return sum(len(query) * query.fidelity for query in queries)


def same(profile: np.ndarray, population: np.ndarray) -> bool:
    return bool((population == profile).all(axis=1).any())


# protocol


def test_a_query_stays_the_same_until_it_is_told() -> None:
    space = SPACES["equal"]()
    for plan in (EXACT, NOISY):
        search = Learning(space, plan)
        for _ in range(4):
            assert search.ask() is search.ask()
            search.tell(search.ask(), additive(space)(search.ask().population))


def test_only_the_answer_to_the_last_query_is_taken() -> None:
    space = SPACES["equal"]()
    search = Learning(space, EXACT)
    with pytest.raises(ValueError, match="seed 1, fidelity 1"):
        search.tell(Query(search.ask().population, 1, 1), np.zeros(len(search.ask())))
    run(search, additive(space))
    with pytest.raises(ValueError, match="done"):
        search.ask()


@pytest.mark.parametrize("plan", [EXACT, NOISY], ids=["exact", "noisy"])
@pytest.mark.parametrize("name", SPACES)
def test_every_proposal_is_feasible_and_the_plan_is_kept(name: str, plan: Plan) -> None:
    space = SPACES[name]()
    search = Learning(space, plan, seed=1)
    queries = run(search, additive(space) if plan is EXACT else shaken(additive(space)))
    assert space.feasible(rows(queries)).all()
    assert spent(queries) <= plan.total_fidelity
    assert search.fraction == 1.0
    assert space.feasible(search.best.profile[None])[0]


@pytest.mark.parametrize("name", ["equal", "everything"])
def test_no_profile_is_measured_twice_where_measurements_are_exact(name: str) -> None:
    space = SPACES[name]()
    asked = rows(run(Learning(space, Plan(120, 16), seed=2), additive(space)))
    assert len(np.unique(asked, axis=0)) == len(asked)


def test_no_profile_comes_twice_in_a_race() -> None:
    problem = noisy(quadratic(16, 4), samples=4)
    for query in run(Learning(problem.space, Plan(60, 16, 16), seed=2), problem.objective):
        assert len(np.unique(query.population, axis=0)) == len(query)


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("fidelity", [1, 16])
def test_a_generation_is_no_larger_than_the_batch(batch: int, fidelity: int) -> None:
    space = SPACES["unequal"]()
    search = Learning(space, Plan(50, batch, fidelity), seed=3)
    queries = run(search, additive(space))
    incumbent = int(fidelity > 1)  # takes part in every race
    assert max(len(query) for query in queries[1:]) <= max(batch + incumbent, 9)
    assert spent(queries) <= 50 * fidelity
    later = [query for query in queries if query is not queries[0] and not query.fresh]
    races = [query for query in later if query.fidelity == (1 if fidelity == 1 else 2)]
    assert races and max(len(query) for query in races) <= batch + incumbent


@pytest.mark.parametrize("evaluations", [1, 2, 3, 5, 9, 13, 30])
@pytest.mark.parametrize("fidelity", [1, 2, 3, 16])
def test_no_budget_is_too_small_nor_exceeded(evaluations: int, fidelity: int) -> None:
    space = SPACES["unequal"]()
    uniform = tuple(space.nearest_uniform().tolist())
    for settings in (None, LearningSettings(references=(tuple(space.cheapest().tolist()), uniform), choice=50)):
        search = Learning(space, Plan(evaluations, 6, fidelity), settings, seed=4)
        queries = run(search, shaken(additive(space)) if fidelity > 1 else additive(space))
        assert 0 < spent(queries) <= evaluations * fidelity
        assert search.done and np.isfinite(search.best.loss)


@pytest.mark.parametrize("choice", [1, 2, 3, 4, 7])
def test_many_references_do_not_exceed_the_budget_either(choice: int) -> None:
    space = SPACES["unequal"]()
    references = tuple(tuple(row.tolist()) for row in np.unique(space.random(30, np.random.default_rng(3)), axis=0))
    for evaluations in range(6, 60, 3):
        plan = Plan(evaluations, 2, 2)
        search = Learning(space, plan, LearningSettings(references=references, choice=choice, candidates=0), seed=1)
        assert spent(run(search, shaken(additive(space)))) <= plan.total_fidelity


@pytest.mark.parametrize("plan", [EXACT, NOISY], ids=["exact", "noisy"])
def test_a_seed_fixes_the_search_and_another_changes_it(plan: Plan) -> None:
    space = SPACES["unequal"]()
    loss = additive(space) if plan is EXACT else shaken(additive(space))
    first, again, other = (rows(run(Learning(space, plan, seed=seed), loss)).tolist() for seed in (1, 1, 2))
    assert first == again != other


# checkpoints


@pytest.mark.parametrize(
    ("name", "fidelity", "evaluations"),
    [("equal", 1, 60), ("everything", 1, 60), ("everything", 16, 40), ("unequal", 16, 40)],
)
def test_a_search_restored_at_any_turn_goes_on_as_if_nothing_had_happened(name, fidelity, evaluations) -> None:
    space = SPACES[name]()
    loss = additive(space) if fidelity == 1 else shaken(additive(space))
    plan, settings = Plan(evaluations, 6, fidelity), LearningSettings(prior=table_of(space, 6))
    whole = Learning(space, plan, settings, seed=3)
    states, asked = [], []
    while not whole.done:
        states.append(json.dumps(whole.state()))
        asked.extend(run(whole, loss, turns=1))
    last = json.dumps(whole.state())
    phases = {json.loads(state)["plain"]["_phase"] for state in states}
    assert phases == ({"start", "search"} if fidelity == 1 else {"start", "search", "choice"})
    for turn in [*range(0, len(states), 6), len(states) - 1]:
        other = Learning(space, plan, settings, seed=99)
        other.restore(json.loads(states[turn]))
        assert json.dumps(other.state()) == states[turn]
        assert rows(run(other, loss)).tolist() == rows(asked[turn:]).tolist()
        assert json.dumps(other.state()) == last
        assert other.describe() == whole.describe()
    done = Learning(space, plan, settings)
    done.restore(json.loads(last))
    assert done.done and done.stop is whole.stop
    assert [one.to_dict() for one in done.choice] == [one.to_dict() for one in whole.choice]


def test_a_search_restored_before_any_finite_loss_goes_on() -> None:
    space = SPACES["equal"]()
    search, other = (Learning(space, EXACT, seed=seed) for seed in (1, 2))
    run(search, lambda population: np.full(len(population), np.inf), turns=1)
    other.restore(json.loads(json.dumps(search.state())))
    assert rows(run(search, additive(space))).tolist() == rows(run(other, additive(space))).tolist()
    assert np.isfinite(other.best.loss)


def test_the_state_of_another_search_is_refused() -> None:
    state = Learning(SPACES["equal"](), EXACT).state()
    with pytest.raises(ValueError, match="7 units of 3 levels, got learning on"):
        Learning(SPACES["equal"](), EXACT).restore({**state, "shape": [8, 3]})
    with pytest.raises(ValueError, match="got tabu"):
        Learning(SPACES["equal"](), EXACT).restore({**state, "algorithm": "tabu"})


# what it promises


@pytest.mark.parametrize("name", SPACES)
def test_an_exact_answer_is_no_worse_than_uniform_start_rivals_and_references(name: str) -> None:
    space = SPACES[name]()
    loss = additive(space)
    start, rival, reference = (tuple(row.tolist()) for row in space.random(3, np.random.default_rng(7)))
    settings = LearningSettings(rivals=(rival,), references=(reference,))
    search = Learning(space, Plan(12, 4, start=start), settings, seed=5)
    known = np.array([start, space.nearest_uniform(), rival, reference])
    assert all(same(row, search.ask().population) for row in known)
    np.testing.assert_array_equal(search.ask().population[0], start)
    np.testing.assert_array_equal(search.best.profile, start)
    run(search, loss)
    assert search.best.loss <= loss(known).min()
    assert search.best.loss == loss(search.best.profile[None])[0]
    assert search.start is not None and search.best.loss <= search.start.loss


def test_the_final_choice_is_among_uniform_references_and_the_best_on_fresh_data() -> None:
    space = SPACES["unequal"]()
    reference = tuple(space.random(1, np.random.default_rng(8))[0].tolist())
    search = Learning(space, NOISY, LearningSettings(references=(reference,)), seed=6)
    queries = run(search, shaken(additive(space)))
    fresh = [query for query in queries if query.fresh]
    assert fresh and queries[-len(fresh) :] == fresh
    assert not {query.seed for query in fresh} & {query.seed for query in queries if not query.fresh}
    assert same(np.array(reference), fresh[0].population)
    assert same(space.nearest_uniform(), fresh[0].population)
    assert len(search.choice) == len(fresh[0])
    np.testing.assert_array_equal(search.choice[0].profile, search.best.profile)
    assert search.choice[0].difference == 0.0
    assert [one.difference for one in search.choice] == sorted(one.difference for one in search.choice)
    assert sum(query.fidelity for query in fresh) <= 2 * 16


def test_the_start_and_what_the_model_thinks_best_are_finalists() -> None:
    space = SPACES["unequal"]()
    search = Learning(space, Plan(60, 6, 16), seed=6)
    queries = run(search, shaken(additive(space)))
    finalists = next(query.population for query in queries if query.fresh)
    assert search.start is not None and same(search.start.profile, finalists)
    posterior = search._model()
    assert posterior is not None
    believed = search._believed(posterior)
    assert posterior.joint(finalists)[0].min() <= posterior.joint(believed)[0][0] + 1e-6


def test_a_larger_budget_compares_the_best_again_and_again() -> None:
    def fresh(seed: int, settings: LearningSettings | None = None) -> list[Query]:
        queries = run(Learning(LARGE, Plan(200, 6, 16), settings, seed=seed), shaken(additive(LARGE), 20.0))
        choice = [query for query in queries if query.fresh]
        least = 190 * 16 if len(choice) > 3 else 0  # a choice that is clear ends earlier
        assert least < spent(queries) <= 200 * 16
        return choice

    longest = 0
    for seed in range(3):
        queries = fresh(seed)
        longest = max(longest, len(queries))
        assert {query.fidelity for query in queries[1:]} == {16}
        assert {len(query) for query in queries[2:]} <= {2}
        assert len({query.seed for query in queries}) == len(queries)
        assert spent(queries[2:]) <= 0.03 * 200 * 16
    assert longest > 3
    assert len(fresh(0, LearningSettings(choice=16))) <= 2  # where that is all the data there is for it


def test_what_the_model_thinks_best_races_again() -> None:
    search, raced = Learning(LARGE, Plan(60, 6, 16), seed=6), 0
    loss = as_objective(shaken(additive(LARGE), 8.0))
    while not search.done:
        query, generation = search.ask(), search.generation
        search.tell(query, evaluate(loss, query))
        asked, posterior = search._query, search._model()
        if asked is None or asked.fresh or posterior is None or search.generation == generation or search._sources.flat:
            continue
        believed = search._believed(posterior)[0]
        assert same(believed, asked.population)
        raced += not (believed == search.best.profile).all()
    assert raced


def test_rounds_take_more_data_the_more_was_spent() -> None:
    search = Learning(LARGE, Plan(100, 6, 64), LearningSettings(model_rows=200), seed=6)
    queries = [query for query in run(search, shaken(additive(LARGE), 4.0)) if not query.fresh]
    first = [query.fidelity for query in queries if len(query) == 7]  # the incumbent and six candidates
    assert first[0] == 8 and first == sorted(first)
    assert first[-1] == pytest.approx(100 * 64 / 200, rel=0.2)


def test_exact_searches_make_no_choice() -> None:
    space = SPACES["unequal"]()
    search = Learning(space, EXACT)
    assert not any(query.fresh for query in run(search, additive(space)))
    assert search.choice == ()


def test_where_uniform_is_best_noise_does_not_lead_away_from_it() -> None:
    space = SearchSpace.build(np.tile(np.arange(5), (16, 1)), 32)

    def loss(population: np.ndarray) -> np.ndarray:
        return ((population - 2.0) ** 2).sum(axis=1) / 8

    answers = []
    for seed in range(15):
        search = Learning(space, Plan(40, 8, 32), seed=seed)
        run(search, shaken(loss, 1.0))
        answers.append(loss(search.best.profile[None])[0])
    assert np.mean(np.array(answers) == 0.0) >= 0.8
    assert max(answers) <= 0.5  # two switches away, within the noise of the choice


def test_where_nothing_matters_the_noise_is_not_believed() -> None:
    space = SPACES["equal"]()
    search = Learning(space, NOISY, seed=7)
    run(search, shaken(lambda population: np.zeros(len(population))))
    assert abs(search.choice[-1].difference) < 5 * 1.0 / np.sqrt(8)


@pytest.mark.parametrize(
    ("problem", "evaluations"),
    [
        (linear(32, 24), 150),
        (separable(16, 4, costs="unequal"), 400),
        (leading_ones(16, 12), 400),  # plateaus
    ],
    ids=["linear", "unequal", "plateaus"],
)
def test_small_optima_are_found(problem, evaluations) -> None:
    gaps = []
    for seed in range(3):
        search = Learning(problem.space, Plan(evaluations), seed=seed)
        run(search, problem.objective)
        gaps.append(problem.gap(search.best.profile[None])[0])
    assert np.median(gaps) <= 1e-9
    assert max(gaps) <= 0.2 * problem.spread()


def test_noisy_measurements_lead_to_a_better_profile() -> None:
    problem = noisy(separable(24, 4), samples=8)
    for seed in range(3):
        search = Learning(problem.space, Plan(150, 16, 32), seed=seed)
        run(search, problem.objective)
        uniform = problem.gap(problem.space.nearest_uniform()[None])[0]
        assert problem.gap(search.best.profile[None])[0] < 0.4 * uniform


@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_a_prior_helps_whatever_is_added_to_it(offset: float) -> None:
    space = SearchSpace.build(np.tile(np.arange(4), (48, 1)), 72)
    loss, table = additive(space), table_of(space)

    def reached(prior):
        answers = []
        for seed in range(4):
            search = Learning(space, Plan(40, 8), LearningSettings(prior=prior), seed=seed)
            run(search, loss)
            answers.append(search.best.loss)
        return np.mean(answers)

    about = table + 0.3 * np.random.default_rng(9).normal(size=table.shape) + offset
    assert reached(about) < reached(None) - 2.0


# corners


@pytest.mark.parametrize("fidelity", [1, 8])
def test_a_space_of_few_profiles_is_exhausted(fidelity: int) -> None:
    space = SearchSpace.cardinality(3, 1)  # (1, 0, 0) and its like; less is never proposed
    search = Learning(space, Plan(400, 8, fidelity), seed=0)
    queries = run(search, lambda population: -population @ np.array([1.0, 2.0, 3.0]))
    assert search.stop is StopReason.EXHAUSTED
    assert search.best.profile.tolist() == [0, 0, 1]
    assert bool(search.choice) == (fidelity > 1)
    assert len(queries) < 20


@pytest.mark.parametrize("fidelity", [1, 8])
@pytest.mark.parametrize("m", [1, 2, 5])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_spaces_of_one_to_three_units_are_searched(n: int, m: int, fidelity: int) -> None:
    space = SearchSpace.build(np.arange(1, n + 1)[:, None] * np.arange(m), n * (n + 1) * (m - 1) // 4)
    loss = additive(space)
    search = Learning(space, Plan(100, 8, fidelity), seed=1)
    queries = run(search, loss)
    assert search.done
    assert space.feasible(rows(queries)).all()
    full = np.array([row for row in np.concatenate(list(feasible_profiles(space))) if space.is_full(row)])
    assert search.best.loss <= loss(full).min()  # a higher level is better by one on average


def test_nothing_is_missed_in_a_space_smaller_than_the_budget() -> None:
    space = SearchSpace.cardinality(8, 4)
    for seed in range(5):
        needle = space.random(1, np.random.default_rng(seed))[0]
        search = Learning(space, Plan(200, 8), seed=seed)
        run(search, lambda population, needle=needle: (population != needle).any(axis=1) - 1.0)
        assert search.best.loss == -1.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("plan", [EXACT, NOISY], ids=["exact", "noisy"])
def test_losses_that_are_all_without_value_end_the_plan(plan: Plan, bad: float) -> None:
    space = SPACES["everything"]()
    search = Learning(space, plan)
    queries = run(search, lambda population: np.full(len(population), bad))
    assert search.done and spent(queries) <= plan.total_fidelity
    assert space.feasible(search.best.profile[None])[0]


@pytest.mark.parametrize("plan", [EXACT, NOISY], ids=["exact", "noisy"])
def test_a_search_recovers_from_a_start_without_value(plan: Plan) -> None:
    space = SPACES["unequal"]()
    search, queries = Learning(space, plan, seed=2), []

    def loss(population: np.ndarray, fidelity: int, seed: int) -> np.ndarray:
        queries.append(seed)
        return np.full(len(population), np.nan) if len(queries) < 3 else additive(space)(population)

    run(search, loss)
    assert np.isfinite(search.best.loss)
    assert search.best.loss <= additive(space)(space.nearest_uniform()[None])[0]


def test_an_incumbent_without_value_leaves_no_mark_on_the_model() -> None:
    space = SPACES["unequal"]()
    uniform = space.nearest_uniform()
    search = Learning(space, NOISY, seed=3)
    run(search, lambda population: np.where((population == uniform).all(axis=1), np.inf, additive(space)(population)))
    assert not same(uniform, search._archive.profiles)
    assert np.isfinite(search.best.loss)


@pytest.mark.parametrize("fidelity", [1, 8])
def test_a_space_too_large_for_the_model_is_searched_without(fidelity: int) -> None:
    space = SearchSpace.build(np.tile(np.arange(3), (2000, 1)), 2000)
    loss = additive(space)
    search = Learning(space, Plan(40, 8, fidelity), LearningSettings(model_cells=10**5), seed=4)
    queries = run(search, loss)
    assert search._model() is None
    assert space.feasible(rows(queries)).all()
    assert search.best.loss < loss(space.nearest_uniform()[None])[0]


def test_sources_belong_to_the_candidates_that_were_asked() -> None:
    space = SPACES["unequal"]()
    search = Learning(space, Plan(60, 8), seed=5)
    while not search.done:
        query = search.ask()
        if search.describe()["phase"] == "search":
            assert len(search._sources.of) == len(query)
        search.tell(query, additive(space)(query.population))


def test_changes_of_siblings_that_beat_one_parent_are_merged() -> None:
    """In a race as well, where the parent has by then been replaced by the best of them."""
    space = SearchSpace.build(np.tile(np.arange(3), (40, 1)), 40)
    loss = additive(space)
    search = Learning(space, Plan(300, 16, 8), seed=6)
    compared = 0
    while not search.done:
        before = search.best.profile
        phase = search.describe()["phase"]
        generation = search.generation
        run(search, loss, turns=1)
        if phase == "search" and search.generation > generation and len(search._sources.siblings) > 1:
            np.testing.assert_array_equal(search._sources.siblings[0], before)
            assert (loss(search._sources.siblings[1:]) < loss(before[None])).all()
            compared += 1
    assert compared > 3


# refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_rows": 0}, "model_rows must be at least 1, got 0"),
        ({"share": 0}, "share must be at least 1, got 0"),
        ({"small": 0}, "small must be at least 1, got 0"),
        ({"candidates": -1}, "candidates must not be negative, got -1"),
        ({"first": 0}, "first must be at least 1, got 0"),
        ({"choice": 0}, "choice must be at least 1, got 0"),
        ({"apart": 1.5}, "apart must be between 0 and 1, got 1.5"),
        ({"temperature": -1.0}, "temperature must not be negative and radius at least 1, got -1.0"),
        ({"radius": 0.5}, r"radius at least 1, got 0\.3, 0\.5"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        LearningSettings(**settings)


@pytest.mark.parametrize(
    ("prior", "message"),
    [(np.zeros((7, 2)), r"shape \(7, 3\), got \(7, 2\)"), (np.full((7, 3), np.nan), "finite where allowed, got 21")],
)
def test_a_prior_that_does_not_fit_is_refused(prior, message) -> None:
    with pytest.raises(ValueError, match=message):
        Learning(SPACES["equal"](), EXACT, LearningSettings(prior=prior))


def test_a_prior_may_be_infinite_where_a_level_is_forbidden() -> None:
    space = SPACES["forbidden levels"]()
    prior = np.where(space.allowed, table_of(space), np.inf)
    search = Learning(space, EXACT, LearningSettings(prior=prior))
    run(search, additive(space))
    assert search.done


@pytest.mark.parametrize("where", ["start", "rivals", "references"])
def test_a_known_profile_over_the_budget_is_refused(where: str) -> None:
    over = (2,) * 7
    plan = Plan(start=over) if where == "start" else Plan()
    settings = LearningSettings() if where == "start" else LearningSettings(**{where: (over,)})
    with pytest.raises(ValueError, match="cost at most 7, got 14"):
        Learning(SPACES["equal"](), plan, settings)
