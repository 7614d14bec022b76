from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from discopt.compare_runs import Task, checkpoints, describe, load_algorithms, load_instance, run
from discopt.errors import DiscoptError
from discopt.optimizers import Plan
from discopt.run import Limits, minimize
from tests.compare_own import OWN

BUDGETS = (15, 40)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield str(tmp_path)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def task(folder: str, problem: str, algorithm: str, seed: int = 0, seconds: float = 60.0) -> Task:
    group = "GOOD" if algorithm in ("draw", "evopress") else "BAD"
    facts = describe(f"own.py:{problem}", folder)
    return Task(facts, algorithm, f"own.py:{group}", seed, BUDGETS, seconds, folder)


def timeless(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in ("seconds", "overhead")}


def test_checkpoints_hold_the_budgets_and_a_curve() -> None:
    points = checkpoints((300, 1000))
    assert {10, 300, 1000} <= set(points) and list(points) == sorted(points)
    assert 40 <= len(points) <= 42
    assert checkpoints((1,)) == (1,)


@pytest.mark.parametrize("problem", ["linear", "noisy"])
@pytest.mark.parametrize("algorithm", ["draw", "evopress"])
def test_the_loss_at_a_point_is_that_of_a_search_that_ends_there(folder: str, problem: str, algorithm: str) -> None:
    job = task(folder, problem, algorithm)
    line = run(job)
    truth = load_instance(job.problem.target, folder).problem()
    fidelity = job.problem.fidelity
    make = load_algorithms(job.file, folder)[algorithm]
    points = [point for point in checkpoints(BUDGETS) if point >= 16]
    expected = []
    for point in points:
        result = minimize(
            truth.objective,
            truth.space,
            optimizer=make(truth.space, Plan(BUDGETS[-1], fidelity=fidelity), 0),
            limits=Limits(fidelity=point * fidelity),
        )
        expected.append(truth.loss(result.profile[None])[0])
    assert line["losses"][-len(points) :] == expected
    assert len(set(expected)) > 1
    assert line["total_fidelity"] == line["evaluations"] * fidelity <= BUDGETS[-1] * fidelity
    assert line["feasible"] is True and line["feasible_rows"] == 1.0
    assert line["best"] == min(loss for loss in line["losses"] if loss is not None)


def test_nothing_is_known_before_the_first_query_has_ended(folder: str) -> None:
    line = run(task(folder, "linear", "draw"))  # 16 profiles at once
    known = [loss is not None for loss in line["losses"]]
    assert known == [point >= 16 for point in checkpoints(BUDGETS)]


def test_the_same_seed_gives_the_same_line_and_another_does_not(folder: str) -> None:
    first, again, other = (run(task(folder, "noisy", "evopress", seed)) for seed in (0, 0, 1))
    assert timeless(first) == timeless(again) != {**timeless(other), "seed": 0}


def test_a_budget_is_worth_as_many_full_measurements_at_any_fidelity(folder: str) -> None:
    line = run(task(folder, "noisy", "draw"))
    assert (line["evaluations"], line["total_fidelity"]) == (40, 320)


def test_an_answer_that_is_not_feasible_has_no_loss(folder: str) -> None:
    line = run(task(folder, "linear", "infeasible"))
    assert line["status"] == "done"
    assert set(line["losses"]) == {None} and line["best"] is None
    assert line["feasible"] is False and line["feasible_rows"] == 0.0


@pytest.mark.parametrize(
    ("algorithm", "status", "reason"),
    [
        ("refuses", "not applicable", "expected a smaller space, got 12 units"),
        ("absent", "missing package", "ModuleNotFoundError: No module named 'a_package_that_is_not_there'"),
        ("breaks", "failed", "TypeError: a bug of two lines"),
    ],
)
def test_an_algorithm_that_cannot_is_an_answer(folder: str, algorithm: str, status: str, reason: str) -> None:
    line = run(task(folder, "linear", algorithm))
    assert line == {"problem": "linear", "algorithm": algorithm, "seed": 0, "status": status, "reason": reason}


def test_a_run_out_of_time_says_so_and_carries_its_best_on(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAUSE", "0.02")
    line = run(task(folder, "slow", "evopress", seconds=0.01))
    assert line["out_of_time"] is True and line["evaluations"] < 40
    assert line["losses"][-1] is not None
    assert not run(task(folder, "slow", "evopress"))["out_of_time"]


def test_a_run_out_of_time_at_once_has_measured_its_first_query(folder: str) -> None:
    line = run(task(folder, "linear", "draw", seconds=1e-9))
    assert line["out_of_time"] is True
    assert 0 < line["evaluations"] < run(task(folder, "linear", "draw"))["evaluations"]
    assert line["losses"][-1] == line["best"]


def test_the_objective_and_the_measuring_aside_are_no_overhead(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAUSE", "0.05")
    line = run(task(folder, "slow", "draw"))
    assert line["seconds"] > 0.15  # 3 queries
    assert line["overhead"] * line["evaluations"] < 0.05


def test_a_problem_is_described_by_its_space_and_its_reference(folder: str) -> None:
    facts = describe("own.py:noisy", folder)
    assert (facts.name, facts.n, facts.m, facts.resources, facts.fidelity) == ("noisy", 12, 2, 1, 8)
    assert facts.reference == -4.75 < facts.random < 0
    assert describe("own.py:unknown", folder).reference is None
    assert describe("own.py:linear", folder).source == "The last four are best."


def test_the_suite_is_described_by_its_instances(folder: str) -> None:
    facts = describe("nk-16", folder)
    assert (facts.name, facts.target, facts.n, facts.multimodal) == ("nk-16", "nk-16", 16, True)


def test_what_cannot_be_loaded_is_refused(folder: str) -> None:
    with pytest.raises(DiscoptError, match=r"own.py:wrong: the objective raised ZeroDivisionError"):
        describe("own.py:wrong", folder)
    with pytest.raises(DiscoptError, match=r"own.py:NOT must be a dict of algorithms by name, got list"):
        load_algorithms("own.py:NOT", folder)
    with pytest.raises(DiscoptError, match=r"own.py has no 'nothing'"):
        load_instance("own.py:nothing", folder)
