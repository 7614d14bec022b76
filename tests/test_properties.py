"""What holds on any space under any settings: feasible offspring, exact costs, identical resumption, limits kept."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from itertools import product
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import assume
from hypothesis import strategies as st

from discopt import (
    BudgetError,
    DiscoptError,
    EvoPress,
    EvoPressSettings,
    Limits,
    Plan,
    Query,
    SearchSpace,
    Stage,
    minimize,
)
from discopt.arrays import unpack
from discopt.enumeration import count_profiles
from discopt.exchange import exchange
from discopt.mutation import RULES, level_switch, offspring, raise_and_lower
from discopt.optimizers import ALGORITHMS, Optimizer
from discopt.optimizers.exhaustive import MAX_PROFILES
from tests.facts import Facts

MANY = int(os.environ.get("MANY", 1000))
INT64 = 2**63 - 1
SCALES = (2, 5, 2**20, 2**33, 2**53)  # of a step's cost; a space has at most 60 * 8 steps
EDGE = (0, 1, 7, 2**31, 2**53, 2**61, 2**62 - 1, 2**62, 2**63 - 2, 2**63 - 1)  # costs at which sums leave 64 bits

T = TypeVar("T")
Loss = Callable[[np.ndarray, int, int], np.ndarray]

facts = Facts()


@st.composite
def spaces(draw: st.DrawFn, units: int = 60, levels: int = 8, scales: tuple[int, ...] = SCALES) -> SearchSpace:
    """Spaces of every kind: costs large and small, forbidden levels, groups, bundles, up to three resources."""
    n, m, r = draw(st.integers(1, units)), draw(st.integers(2, levels)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    scale = draw(st.sampled_from(scales))
    allowed = rng.random((n, m)) < draw(st.sampled_from([0.7, 1.0]))
    allowed[~allowed.any(axis=1), draw(st.integers(0, m - 1))] = True
    steps = {
        "any": rng.integers(0, scale, size=(r, n, m)),
        "equal": np.full((r, n, m), scale),
        "sizes": np.repeat(rng.integers(0, scale, size=(r, n, 1)), m, axis=2),
    }[draw(st.sampled_from(["any", "equal", "sizes"]))]
    cost = steps.cumsum(axis=2) - draw(st.sampled_from([0, 1])) * rng.integers(0, scale, size=(r, n, 1))
    cost[:, ~allowed] = rng.integers(-scale, scale, size=(r, int((~allowed).sum())))  # what nobody may look at
    return SearchSpace.build(
        cost,
        drawn_budget(draw, cost, allowed),
        group=draw(st.sampled_from(["size", "none", rng.integers(0, 4, size=n)])),
        allowed=allowed,
        together=bundles(rng, allowed) if draw(st.booleans()) else None,
    )


def drawn_budget(draw: st.DrawFn, cost: np.ndarray, allowed: np.ndarray) -> list[int]:
    """Budgets between what the cheapest and the dearest profile cost, their ends often."""
    ends = [sum(int(table[i][legal][end]) for i, legal in enumerate(allowed)) for table in cost for end in (0, -1)]
    shares = st.one_of(st.sampled_from([0, 1000]), st.integers(0, 1000))
    return [low + draw(shares) * (high - low) // 1000 for low, high in zip(ends[::2], ends[1::2], strict=True)]


def bundles(rng: np.random.Generator, allowed: np.ndarray) -> np.ndarray:
    """Random labels, those of units with a single level their own: (n,)."""
    n = len(allowed)
    labels = rng.integers(0, n, size=n)
    single = np.flatnonzero(allowed.sum(axis=1) == 1)
    labels[single] = n + single
    return labels


def exact_cost(space: SearchSpace, row: np.ndarray) -> list[int]:
    """What a profile costs, in Python's integers."""
    return [sum(int(table[i, x]) for i, x in enumerate(row.tolist())) for table in space.cost]


def legal(space: SearchSpace, row: np.ndarray) -> bool:
    """Whether all levels of a profile are allowed and no bundle is torn, by the definition of both."""
    lowest = [int(np.flatnonzero(levels)[0]) for levels in space.allowed]
    is_low = {(int(label), x == low) for label, x, low in zip(space.together, row.tolist(), lowest, strict=True)}
    torn = len(is_low) > len(set(space.together.tolist()))
    return not torn and all(space.allowed[i, x] for i, x in enumerate(row.tolist()))


def meets(space: SearchSpace, row: np.ndarray) -> bool:
    """Whether a profile is one of the space."""
    limits = zip(exact_cost(space, row), space.budget.tolist(), strict=True)
    return legal(space, row) and all(cost <= limit for cost, limit in limits)


def everyone(space: SearchSpace) -> np.ndarray:
    """Every profile of a small space with allowed levels, whatever it costs: (k, n)."""
    rows = product(*(np.flatnonzero(levels).tolist() for levels in space.allowed))
    return np.array(list(rows), dtype=np.int16)


def attempt(make: Callable[[], T]) -> T | ValueError | DiscoptError:
    """What is made, or the error that refuses it."""
    try:
        return make()
    except (ValueError, DiscoptError) as error:
        return error


def check_distinct(*populations: np.ndarray) -> None:
    rows = np.concatenate(populations)
    assert len(np.unique(rows, axis=0)) == len(rows)


def check_in(space: SearchSpace, population: np.ndarray) -> None:
    assert population.dtype == np.int16
    assert all(meets(space, row) for row in population)


def check_full(space: SearchSpace, population: np.ndarray) -> None:
    check_in(space, population)
    assert all(space.is_full(row) for row in population)


def rugged(space: SearchSpace, samples: int = 0) -> Loss:
    """A sum over units and pairs of them, (population, fidelity, seed) -> (k,), or (k, samples) with noise."""
    rng = np.random.default_rng(5)
    table, pairs = rng.normal(size=(space.n, space.m)), rng.normal(size=(space.n, space.n)) / space.n

    def loss(population: np.ndarray, fidelity: int, seed: int) -> np.ndarray:
        own = table[np.arange(space.n), population]
        clean = own.sum(axis=1) + ((own @ pairs) * own).sum(axis=1)
        if not samples:
            return clean
        return clean[:, None] + np.random.default_rng(seed).normal(size=(len(population), samples)) / fidelity

    return loss


def run(search: Optimizer, loss: Loss) -> tuple[list[Query], list[str]]:
    """All that was asked, twice each time, and the states before that as text."""
    queries, states = [], []
    while not search.done:
        states.append(json.dumps(search.state()))
        queries.append(search.ask())
        assert asked([queries[-1]]) == asked([search.ask()])
        search.tell(queries[-1], loss(queries[-1].population, queries[-1].fidelity, queries[-1].seed))
    return queries, states


def asked(queries: list[Query]) -> list[tuple[list[list[int]], int, int]]:
    return [(query.population.tolist(), query.fidelity, query.seed) for query in queries]


def check_goes_on(search: Optimizer, ended: Optimizer, queries: list[Query], state: str, loss: Loss) -> None:
    """A search restored at a state asks what one that was not disturbed did from there on, and ends as it."""
    search.restore(json.loads(state))
    rest, _ = run(search, loss)
    assert asked(rest) == asked(queries[len(queries) - len(rest) :])
    assert json.dumps(search.state()) == json.dumps(ended.state())


# costs and budgets


@facts(150)
def test_costs_are_those_of_whole_numbers(data: st.DataObject) -> None:
    space = data.draw(spaces())
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    population = rng.integers(0, space.m, size=(5, space.n), dtype=np.int16)
    assert space.cost_of(population).tolist() == [exact_cost(space, row) for row in population]
    known = np.stack([space.cheapest(), space.dearest(), space.nearest_uniform(), *space.random(2, rng)])
    population = np.concatenate([population, known])
    assert space.feasible(population).tolist() == [meets(space, row) for row in population]


@facts(120)
def test_costs_at_the_edge_of_64_bits_are_exact_or_refused(data: st.DataObject) -> None:
    n, m = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    number = st.builds(
        lambda size, sign, off: sign * (size - off), st.sampled_from(EDGE), st.sampled_from([1, -1]), st.integers(0, 2)
    )
    cost = [sorted(data.draw(number) for _ in range(m)) for _ in range(n)]
    budget = data.draw(number)
    cheapest = sum(row[0] for row in cost)
    space = attempt(lambda: SearchSpace.build(np.array(cost, dtype=np.int64), budget, group="none"))
    if isinstance(space, ValueError):
        assert "must fit 64 bits" in str(space)
        assert 2 * sum(max(map(abs, row)) for row in cost) + abs(budget) > INT64
        return
    assert isinstance(space, BudgetError) == (cheapest > budget)
    if isinstance(space, BudgetError):
        assert f"the cheapest costs {cheapest}, " in str(space)
        return
    rows, rng = everyone(space), np.random.default_rng(0)
    assert space.cost_of(rows).tolist() == [exact_cost(space, row) for row in rows]
    assert space.feasible(rows).tolist() == [meets(space, row) for row in rows]
    check_in(space, np.concatenate([space.random(3, rng), space.nearest_uniform()[None]]))
    for rule in RULES:
        check_in(space, offspring(space.random(1, rng), 4, space, rng, rule=rule))


def test_costs_that_need_a_64th_bit_are_refused() -> None:
    with pytest.raises(ValueError, match="cost must fit 64 bits with a sign, got up to 9223372036854775808"):
        SearchSpace.build(np.array([[0, 2**63]], dtype=np.uint64), 1)


@facts(100)
def test_a_budget_is_refused_where_no_profile_meets_it_and_nowhere_else(data: st.DataObject) -> None:
    space = data.draw(spaces(units=4, levels=4))
    less = [data.draw(st.sampled_from([0, 0, 1, 2**20])) for _ in range(space.r)]
    budget = [limit - by for limit, by in zip(space.budget.tolist(), less, strict=True)]
    rows = [row for row in everyone(space) if legal(space, row)]
    possible = [row for row in rows if all(c <= b for c, b in zip(exact_cost(space, row), budget, strict=True))]
    other = attempt(lambda: SearchSpace.build(space.cost, budget, allowed=space.allowed, together=space.together))
    if not possible:
        assert isinstance(other, BudgetError)
        return
    assert count_profiles(other, 10**6) == len(possible)
    check_in(other, other.random(3, np.random.default_rng(0)))


# offspring


@facts(80)
def test_offspring_of_every_rule_are_in_the_space_distinct_and_no_parents(data: st.DataObject) -> None:
    space = data.draw(spaces())
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    parents = np.unique(
        np.concatenate([space.random(data.draw(st.integers(1, 3)), rng), space.cheapest()[None]]), axis=0
    )
    parents = parents[: data.draw(st.integers(1, len(parents)))]
    before, count = parents.copy(), data.draw(st.integers(1, 24))
    switches = (*data.draw(st.lists(st.sampled_from([0.0, 0.5, 3.0]), max_size=3)), 1.0)
    rows = offspring(parents, count, space, rng, switches=switches, rule=data.draw(st.sampled_from(RULES)))
    assert len(rows) <= count
    check_in(space, rows)
    check_distinct(parents, rows)
    np.testing.assert_array_equal(parents, before)


@facts(150)
def test_moves_of_whole_populations_keep_every_budget(data: st.DataObject) -> None:
    space = data.draw(spaces())
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    rows = space.random(6, rng)
    number = rng.integers(1, 5, size=6)
    slack = space.budget - space.cost_of(rows)
    assert (slack >= 0).all()
    check_in(space, level_switch(rows, number, space, rng))
    check_in(space, raise_and_lower(rows, slack, number, space, rng))
    check_full(space, exchange(rows, slack, number, space, rng))


@facts(100)
def test_an_exchange_mends_what_crossover_puts_over_the_budget(data: st.DataObject) -> None:
    space = data.draw(spaces(units=12, levels=5, scales=(2,)))  # many steps cost nothing of some resource
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    mother, father = space.random(8, rng), space.random(8, rng)
    children = np.where((rng.random((8, space.n)) < 0.5)[:, space.together], mother, father)
    slack = space.budget - space.cost_of(children)
    check_full(space, exchange(children, slack, rng.integers(0, 2, size=8), space, rng))


def test_an_exchange_goes_on_down_where_the_next_step_frees_nothing_of_what_is_missing() -> None:
    space = SearchSpace.build([[[0, 1, 2]], [[0, 1, 1]]], [5, 0])
    over = np.array([[2]], dtype=np.int16)
    rng = np.random.default_rng(0)
    assert exchange(over, np.array([[3, -1]]), np.zeros(1, dtype=int), space, rng).tolist() == [[0]]


# searches


@facts(90)
def test_every_algorithm_asks_within_space_and_plan_and_goes_on_from_any_state(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(ALGORITHMS)))
    space = data.draw(spaces(units=24, levels=5))
    assume(name != "exhaustive" or count_profiles(space, MAX_PROFILES) is not None)
    start = tuple(space.random(1, np.random.default_rng(9))[0].tolist())
    plan = Plan(
        evaluations=data.draw(st.integers(1, 60)),
        batch=data.draw(st.integers(1, 9)),
        fidelity=data.draw(st.sampled_from([1, 1, 16])),
        start=data.draw(st.sampled_from([None, start])),
    )
    seed, loss = data.draw(st.integers(0, 99)), rugged(space, data.draw(st.sampled_from([0, 0, 3])))
    whole = ALGORITHMS[name](space, plan, seed)
    queries, states = run(whole, loss)
    spent = sum(len(query) * query.fidelity for query in queries)
    assert spent <= plan.total_fidelity or (name.startswith("evopress") and whole.generation <= 1)
    check_in(space, whole.best.profile[None])
    for query in queries:
        if name == "additive":  # its single changes may be over the budget
            assert space.allowed[np.arange(space.n), query.population].all()
        else:
            check_in(space, query.population)
        if name != "random":
            check_distinct(query.population)
    state = states[data.draw(st.integers(0, len(states) - 1))]
    check_goes_on(ALGORITHMS[name](space, plan, seed + 1), whole, queries, state, loss)


@st.composite
def evopress_settings(draw: st.DrawFn, space: SearchSpace) -> EvoPressSettings:
    survivors = sorted(draw(st.lists(st.integers(1, 8), min_size=1, max_size=3)), reverse=True)
    fidelities = sorted(draw(st.lists(st.integers(1, 9), min_size=len(survivors), max_size=len(survivors))))
    known = [tuple(row) for row in space.random(3, np.random.default_rng(draw(st.integers(0, 99)))).tolist()]
    return EvoPressSettings(
        generations=draw(st.integers(0, 6)),
        offspring=draw(st.integers(survivors[0], 12)),
        stages=tuple(Stage(kept, fidelity) for kept, fidelity in zip(survivors, fidelities, strict=True)),
        parents=survivors[-1],
        start=draw(st.sampled_from(["auto", "random", known[0]])),
        start_candidates=draw(st.integers(1, 9)),
        start_fidelity=draw(st.sampled_from([None, 1, 20])),
        rivals=tuple(known[1 : draw(st.integers(1, 3))]),
        rule=draw(st.sampled_from(RULES)),
    )


@facts(80)
def test_evopress_selects_as_its_stages_say_and_goes_on_from_any_state(data: st.DataObject) -> None:
    space = data.draw(spaces(units=24, levels=5))
    plan, seed = data.draw(evopress_settings(space)), data.draw(st.integers(0, 99))
    loss = rugged(space, data.draw(st.sampled_from([0, 3])))
    search = EvoPress(space, plan, seed=seed)
    queries, states = run(search, loss)
    for query, state in zip(queries, map(json.loads, states), strict=True):
        check_in(space, query.population)
        check_distinct(query.population)
        if state["phase"] == "generations":
            parents = unpack(state["parents"])
            assert query.fidelity == plan.stages[state["stage"]].fidelity
            assert len(query) <= plan.offspring + len(parents)
            elite = query.population[-len(parents) :]
            assert np.array_equal(elite, parents) == (state["stage"] == len(plan.stages) - 1)
    check_in(space, search.best.profile[None])
    if states:
        state = states[data.draw(st.integers(0, len(states) - 1))]
        check_goes_on(EvoPress(space, plan, seed=seed + 1), search, queries, state, loss)


@facts(60)
def test_no_limit_is_exceeded_and_a_seed_tells_the_run(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(ALGORITHMS.keys() - {"exhaustive"})))
    space = data.draw(spaces(units=16, levels=4))
    plan = Plan(evaluations=50, batch=data.draw(st.integers(1, 8)), fidelity=data.draw(st.sampled_from([1, 8])))
    limits = Limits(
        evaluations=data.draw(st.one_of(st.none(), st.integers(1, 60))),
        fidelity=data.draw(st.one_of(st.none(), st.integers(1, 500))),
        stagnation=data.draw(st.one_of(st.none(), st.integers(1, 5))),
    )
    seed, loss = data.draw(st.integers(0, 9)), rugged(space)
    searches = [ALGORITHMS[name](space, plan, seed) for _ in range(2)]
    query = searches[0].ask()
    one, two = (
        attempt(lambda search=search: minimize(loss, space, optimizer=search, limits=limits)) for search in searches
    )
    first = (len(query), limits.evaluations), (len(query) * query.fidelity, limits.fidelity)
    if any(limit is not None and needed > limit for needed, limit in first):
        assert isinstance(one, DiscoptError)
        return
    assert {**one.to_dict(), "seconds": 0} == {**two.to_dict(), "seconds": 0}
    assert one.evaluations == sum(line["candidates"] for line in one.trace) <= (limits.evaluations or INT64)
    assert one.total_fidelity <= (limits.fidelity or INT64)
    assert one.generations - searches[0].improved_at <= (limits.stagnation or INT64)
    check_in(space, one.profile[None])
    assert one.cost.tolist() == exact_cost(space, one.profile)


@pytest.mark.slow
@pytest.mark.parametrize("name", facts.names)
def test_it_also_holds_on_many_more(name: str) -> None:
    facts.check(name, MANY)
