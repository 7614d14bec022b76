from __future__ import annotations

import sys

import numpy as np
import pytest

from benchmarks.peers import PEERS
from discopt import Limits, Plan, Problem, RunFolder, SearchSpace, minimize
from discopt.optimizers import RandomSearch
from discopt.problems import quadratic, separable

PACKAGES = {
    "cp-sat": "ortools",
    "deap-mu+lambda": "deap",
    "nevergrad-1+1": "nevergrad",
    "nevergrad-ngopt": "nevergrad",
    "optuna-tpe": "optuna",
    "pymoo-ga": "pymoo",
}
PLAN, SHORT = Plan(evaluations=200, batch=16), Plan(evaluations=60, batch=16)

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers' own


def solve(name: str, problem: Problem, plan: Plan = PLAN, **arguments):
    pytest.importorskip(PACKAGES[name])
    optimizer = PEERS[name](problem.space, plan, 3)
    return minimize(problem.objective, problem.space, optimizer=optimizer, **arguments)


def test_every_peer_has_its_package_named() -> None:
    assert PACKAGES.keys() == PEERS.keys()


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("make", [lambda: quadratic(24, 4), lambda: separable(24, 4, costs="unequal")])
def test_a_peers_answer_is_feasible_and_repeatable(name: str, make) -> None:
    problem = make()
    first, second = solve(name, problem, SHORT), solve(name, problem, SHORT)
    assert problem.space.feasible(first.profile[None])[0]
    assert first.evaluations <= SHORT.evaluations
    np.testing.assert_array_equal(first.profile, second.profile)


@pytest.mark.parametrize("name", [name for name in PEERS if name != "cp-sat"])
def test_a_peer_finds_more_than_random_profiles_do(name: str) -> None:
    problem = quadratic(24, 4)
    blind = minimize(problem.objective, problem.space, optimizer=RandomSearch(problem.space, PLAN, seed=0))
    assert solve(name, problem).loss < blind.loss


def test_cp_sat_solves_a_separable_problem_exactly() -> None:
    problem = separable(12, 4, costs="unequal")
    assert problem.gap(solve("cp-sat", problem).profile[None])[0] <= 1e-9


@pytest.mark.parametrize("name", [name for name in PEERS if name != "cp-sat"])
def test_levels_that_differ_and_bundles_are_repaired(name: str) -> None:
    space = SearchSpace.build(
        [[0, 2, 3], [0, 1, 1], [0, 4, 9], [0, 1, 2], [5, 5, 5], [0, 3, 4]],
        13,
        allowed=[[1, 1, 1], [1, 0, 1], [1, 1, 1], [1, 1, 0], [0, 1, 0], [1, 1, 1]],
        together=[0, 1, 2, 0, 3, 2],
    )
    pytest.importorskip(PACKAGES[name])
    optimizer = PEERS[name](space, Plan(evaluations=60, batch=8), 0)
    while not optimizer.done:
        query = optimizer.ask()
        assert space.feasible(query.population).all()
        optimizer.tell(query, -query.population.sum(axis=1).astype(float))


@pytest.mark.parametrize("name", PEERS)
def test_a_stopped_peer_resumes_identically(name: str, tmp_path) -> None:
    problem = quadratic(8, 4)
    whole = solve(name, problem, SHORT)
    folder = RunFolder.create(tmp_path / "run", {"command": "test"})
    solve(name, problem, SHORT, folder=folder, limits=Limits(evaluations=33))
    resumed = solve(name, problem, SHORT, folder=folder, resume=True)
    np.testing.assert_array_equal(whole.profile, resumed.profile)
    assert [line["loss"] for line in whole.trace] == [line["loss"] for line in resumed.trace]


@pytest.mark.parametrize("name", PEERS)
def test_a_missing_package_is_named_with_how_to_get_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for m in sys.modules if m.split(".")[0] == PACKAGES[name]] + [PACKAGES[name]]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'discopt-search\[peers\]'"):
        PEERS[name](SearchSpace.cardinality(6, 3), PLAN, 0)


def test_cp_sat_refuses_units_that_go_together() -> None:
    pytest.importorskip("ortools")
    space = SearchSpace.build([[0, 1]] * 4, 2, together=[0, 0, 1, 2])
    with pytest.raises(ValueError, match="no units that go together, got 1"):
        PEERS["cp-sat"](space, PLAN, 0)
