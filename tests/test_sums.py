import json
from collections.abc import Callable

import numpy as np
import pytest

from discopt.objective import Query, evaluate
from discopt.optimizers.learning import Learning
from discopt.optimizers.plan import Plan
from discopt.problems import PROBLEMS
from discopt.separable import solve_separable
from discopt.space import Levels, SearchSpace
from discopt.sums import CELLS, LEAST_CHILDREN, PROOFS, Sums, draw_effects

SPACE = SearchSpace.build(np.broadcast_to([0, 1, 2], (12, 3)), budget=12)
RNG = np.random.default_rng(0)
EFFECTS = RNG.random((12, 3))


def total(profiles: Levels) -> np.ndarray:
    return EFFECTS[np.arange(12), profiles].sum(axis=1)


def curved(profiles: Levels) -> np.ndarray:
    return np.exp(total(profiles))


def family(loss: Callable[[Levels], np.ndarray], parent: Levels, pairs: list[tuple[int, int]]) -> tuple:
    """A parent, and children that each move one step of budget between a pair of units."""
    children = np.repeat(parent[None], len(pairs), axis=0)
    for child, (up, down) in zip(children, pairs, strict=True):
        child[up] += 1
        child[down] -= 1
    return parent, float(loss(parent[None])[0]), children, loss(children)


def turned(sums: Sums, loss: Callable[[Levels], np.ndarray], times: int) -> None:
    """So many generations whose children fit together, with the probe among them once there is one."""
    parent = np.ones(12, dtype=np.int16)
    for turn in range(times):
        order = np.random.default_rng(turn).permutation(12)
        _, level, children, losses = family(loss, parent, [(order[2 * i], order[2 * i + 1]) for i in range(4)])
        probe = sums.probe
        sums.learn(parent, level, np.concatenate([children, probe]), np.append(losses, loss(probe)))


def test_a_sum_is_proven_by_two_probes() -> None:
    sums = Sums(SPACE)
    turned(sums, total, PROOFS)
    assert not sums.proven and sums.open
    turned(sums, total, 1)
    assert sums.proven and not sums.open


def test_one_probe_that_is_off_refutes_it_for_good() -> None:
    sums = Sums(SPACE)
    turned(sums, curved, 2)
    assert not sums.open
    turned(sums, total, 4)
    assert not sums.proven
    assert len(sums.probe) == 0


def test_children_that_touch_the_same_units_make_no_probe() -> None:
    sums = Sums(SPACE)
    sums.learn(*family(total, np.ones(12, dtype=np.int16), [(0, 1), (1, 2), (0, 2), (2, 0)]))
    assert LEAST_CHILDREN > 1
    assert len(sums.probe) == 0


def test_a_probe_is_in_the_space() -> None:
    sums = Sums(SPACE)
    parent = np.ones(12, dtype=np.int16)
    children = np.repeat(parent[None], 12, axis=0)
    children[np.arange(12), np.arange(12)] += 1  # each alone is over the budget
    sums.learn(parent, 0.0, children, total(children))
    assert len(sums.probe) == 0


def test_a_space_too_large_to_solve_is_left_alone() -> None:
    n = CELLS // 2 + 1
    sums = Sums(SearchSpace.build(np.broadcast_to([0, 1], (n, 2)), budget=n // 2))
    assert not sums.open


def test_the_state_goes_through_json() -> None:
    sums, again = Sums(SPACE), Sums(SPACE)
    turned(sums, total, 2)
    again.restore(json.loads(json.dumps(sums.state())))
    assert (again.probe == sums.probe).all()
    for one in (sums, again):
        turned(one, total, 1)
    assert again.state() == sums.state()
    assert again.proven


def test_enough_measurements_give_the_effects() -> None:
    profiles = SPACE.random(80, np.random.default_rng(1))
    mean, drawn = draw_effects(SPACE, profiles, total(profiles), 2, np.random.default_rng(2))
    expected = EFFECTS - EFFECTS[:, :1]
    for table in (mean, drawn):  # nothing is left to draw
        relative = table - table[:, :1]
        shift = relative[:, 1] - expected[:, 1]  # a step costs the same anywhere, so their common value does not count
        np.testing.assert_allclose(relative - np.outer(np.full(12, shift[0]), [0, 1, 2]), expected, atol=1e-4)


def test_effects_that_are_small_beside_others_are_seen_as_well() -> None:
    rng = np.random.default_rng(1)
    profiles = SPACE.random(400, rng)
    size = 10.0 ** rng.uniform(-5, 0, size=(SPACE.n, 1))
    table = size * rng.normal(size=(SPACE.n, SPACE.m))
    losses = table[np.arange(SPACE.n), profiles].sum(axis=1)
    (mean,) = draw_effects(SPACE, profiles, losses, 1, np.random.default_rng(2))
    apart = mean - mean[:, :1] - (table - table[:, :1])
    apart -= np.outer(np.ones(SPACE.n), apart[0])  # what a step costs anywhere does not count
    assert np.abs(apart).max() < 1e-13


def test_measurements_that_no_sum_explains_refute_it() -> None:
    sums = Sums(SPACE)
    turned(sums, total, 3)
    profiles = SPACE.random(80, np.random.default_rng(1))
    assert len(sums.draws(profiles, total(profiles), 2, np.random.default_rng(2))) == 2
    assert len(sums.draws(profiles, curved(profiles), 2, np.random.default_rng(2))) == 0
    assert not sums.proven


def test_draws_differ_where_little_is_known() -> None:
    profiles = SPACE.random(5, np.random.default_rng(1))
    tables = draw_effects(SPACE, profiles, total(profiles), 3, np.random.default_rng(2))
    assert len({table.tobytes() for table in tables}) == 3
    for table in tables:  # but all agree on what was measured
        sums = table[np.arange(12), profiles].sum(axis=1)
        np.testing.assert_allclose(sums - sums[0], total(profiles) - total(profiles)[0], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "sizes", "evaluations"), [("linear", {"n": 40, "ones": 20}, 150), ("separable", {"n": 24, "m": 4}, 250)]
)
def test_a_search_finds_the_optimum_of_a_sum(name: str, sizes: dict[str, int], evaluations: int) -> None:
    problem = PROBLEMS[name](**sizes)
    search = Learning(problem.space, Plan(evaluations=evaluations, batch=16), seed=0)
    while not search.done:
        query = search.ask()
        search.tell(query, evaluate(problem.objective, query))
    assert search.best.loss == pytest.approx(problem.optimum, abs=1e-9)


def test_a_rounded_relaxation_is_feasible_and_near_the_optimum() -> None:
    exact, rounded = (solve_separable(SPACE, EFFECTS, exact=exact) for exact in (True, False))
    assert SPACE.feasible(rounded[None])[0]
    assert total(exact[None])[0] <= total(rounded[None])[0] <= total(exact[None])[0] + 1.0
    assert (exact != rounded).sum() <= 2


def test_exact_searches_measure_on_one_sample() -> None:
    search = Learning(SPACE, Plan(evaluations=100, batch=8), seed=0)
    seeds = set()
    while not search.done:
        query: Query = search.ask()
        seeds.add(query.seed)
        search.tell(query, total(query.population))
    assert len(seeds) == 1
