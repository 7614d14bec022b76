from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from discopt import EvoPressSettings, ObjectiveError, Query, Result, RunFolder, SearchSpace, Stage, minimize
from discopt.candidates import Candidates
from discopt.executors import SpreadObjective
from discopt.objective import Losses, evaluate

SPACE = SearchSpace.cardinality(20, 6)
WEIGHTS = np.random.default_rng(0).permutation(20)
SETTINGS = EvoPressSettings(generations=4, offspring=8, stages=(Stage(3, 1), Stage(1, 4)), start_candidates=5)
ROWS = SPACE.random(11, np.random.default_rng(0))


def loss(population: np.ndarray, fidelity: int, seed: int) -> np.ndarray:
    """Of every row alone, (k, 2)."""
    noise = np.sin(population @ np.arange(20) + seed) / fidelity
    return np.stack([-(population @ WEIGHTS) - noise, -(population @ WEIGHTS) + 2 * noise], axis=1)


def query(rows: np.ndarray = ROWS) -> Query:
    return Query(rows, fidelity=3, seed=7, fresh=True)


@dataclass
class DiesElsewhere:
    """A loss that only its home process survives."""

    home: int = field(default_factory=os.getpid)

    def evaluate(self, query: Query) -> Losses:
        if os.getpid() != self.home:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(query.population, query.fidelity, query.seed)


def broken(population: np.ndarray) -> np.ndarray:
    raise ZeroDivisionError(f"{len(population)} rows")


class Now(Executor):
    """Measures at once, in this thread; `failing` makes the answer to a call's number fail."""

    def __init__(self, failing: Callable[[int], BaseException | None] = lambda number: None) -> None:
        self.failing, self.sizes = failing, list[int]()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.sizes.append(len(args[1]))
        problem = self.failing(len(self.sizes))
        if problem is not None:
            future.set_exception(problem)
        else:
            future.set_result(fn(*args, **kwargs))
        return future


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def same(a: Result, b: Result) -> bool:
    def timeless(result: Result) -> list[dict[str, Any]]:
        return [{k: v for k, v in line.items() if k != "seconds"} for line in result.trace]

    return bool((a.profile == b.profile).all()) and a.loss == b.loss and timeless(a) == timeless(b)


@pytest.mark.parametrize("parts", [1, 2, 3, 50])
def test_any_number_of_parts_gives_the_same_losses(parts: int) -> None:
    whole = loss(ROWS, 3, 7)
    with ThreadPoolExecutor(2) as pool:
        assert np.array_equal(SpreadObjective(loss, pool, parts=parts).evaluate(query()), whole)
        column = SpreadObjective(lambda population: population @ WEIGHTS, pool, parts=parts).evaluate(query())
        assert np.array_equal(column, ROWS @ WEIGHTS)


def test_a_search_over_processes_is_the_same(processes: ProcessPoolExecutor) -> None:
    assert same(minimize(loss, SPACE, SETTINGS, seed=1), minimize(loss, SPACE, SETTINGS, seed=1, executor=processes))


def test_the_parts_of_a_query_are_even_and_ask_the_same() -> None:
    asked: list[Query] = []

    class Asked:
        def evaluate(self, query: Query) -> Losses:
            asked.append(query)
            return np.zeros(len(query))

    changed = Candidates.changed(ROWS, [4, 4, 9], [{0: 1}, {}, {3: 0, 5: 1}])
    whole = Query(changed, fidelity=3, seed=7, fresh=True)
    SpreadObjective(Asked(), Now(), parts=2).evaluate(whole)
    assert [len(part) for part in asked] == [1, 2]
    assert all((part.fidelity, part.seed, part.fresh) == (3, 7, True) for part in asked)
    assert [len(part.candidates.bases) for part in asked] == [1, 2]  # no others are sent
    assert np.array_equal(np.concatenate([part.population for part in asked]), whole.population)


def test_what_the_objective_raises_comes_out_as_without_an_executor(processes: ProcessPoolExecutor) -> None:
    objective = SpreadObjective(broken, processes, parts=2)
    with pytest.raises(ObjectiveError, match="raised ZeroDivisionError on 11 profiles at fidelity 3, seed 7: 5 rows"):
        evaluate(objective, query())
    assert evaluate(SpreadObjective(loss, processes), query()).shape == (11, 2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda population: population[:-1, 0], r"shape \(11,\) or \(11, s\), got \(9,\)"),
        (lambda population: np.zeros((len(population), len(population))), r"equal shapes, got \(5, 5\) and \(6, 6\)"),
        (lambda population: 3.0, r"equal shapes, got \(\)"),
        (lambda population: "none", "could not convert string to float"),
    ],
)
def test_answers_of_a_wrong_shape_are_the_objectives_error(wrong: Callable[..., Any], message: str) -> None:
    with pytest.raises(ObjectiveError, match=message):
        evaluate(SpreadObjective(wrong, Now(), parts=2), query())


def test_a_killed_process_breaks_the_pool_and_all_is_measured_here(caplog: pytest.LogCaptureFixture) -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        alone = minimize(loss, SPACE, SETTINGS, seed=1)
        spread = minimize(DiesElsewhere(), SPACE, SETTINGS, seed=1, executor=pool)
    assert same(alone, spread)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert caplog.messages[0].startswith("the executor is broken, all else is measured here: ")


def test_a_pool_that_was_shut_down_is_done_without(caplog: pytest.LogCaptureFixture) -> None:
    with ThreadPoolExecutor(2) as pool:
        objective = SpreadObjective(loss, pool, parts=2)
    for _ in range(2):
        assert np.array_equal(objective.evaluate(query()), loss(ROWS, 3, 7))
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("problem", [OSError("the connection is lost"), CancelledError("cancelled")])
def test_a_part_that_the_executor_fails_at_is_measured_here(
    problem: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    pool = Now(lambda number: problem if number == 2 else None)
    assert np.array_equal(SpreadObjective(loss, pool, parts=3).evaluate(query()), loss(ROWS, 3, 7))
    assert caplog.messages == [f"4 profiles are measured here, for the executor failed: {problem}"]


def test_a_part_that_hangs_is_measured_here(caplog: pytest.LogCaptureFixture) -> None:
    release = threading.Event()
    here = threading.get_ident()

    def hanging(population: np.ndarray) -> np.ndarray:
        if threading.get_ident() != here and (population == ROWS[-1]).all(axis=1).any():
            release.wait(30)
        return population @ WEIGHTS

    with ThreadPoolExecutor(2) as pool:
        began = time.monotonic()
        losses = SpreadObjective(hanging, pool, parts=2, seconds=0.2).evaluate(query())
        assert time.monotonic() - began < 10
        release.set()
    assert np.array_equal(losses, ROWS @ WEIGHTS)
    assert caplog.messages == ["6 profiles took longer than 0.2 s; they are measured here"]


def test_losses_that_are_not_finite_are_measured_once_more() -> None:
    seen: list[int] = []

    def sometimes(population: np.ndarray) -> np.ndarray:
        seen.append(len(population))
        losses = loss(population, 3, 7)
        if len(seen) == 2:
            losses[1, 0] = np.nan
        return losses

    assert np.array_equal(SpreadObjective(sometimes, Now(), parts=3).evaluate(query()), loss(ROWS, 3, 7))
    assert seen == [3, 4, 4, 1]


def test_losses_that_stay_not_finite_are_believed() -> None:
    pool = Now()
    objective = SpreadObjective(lambda population: np.where(population[:, 0] > 0, np.inf, 1.0), pool, parts=2)
    losses = objective.evaluate(query())
    assert np.array_equal(losses, np.where(ROWS[:, 0] > 0, np.inf, 1.0))
    assert sum(pool.sizes) == len(ROWS) + (ROWS[:, 0] > 0).sum() < 2 * len(ROWS)


@pytest.mark.parametrize("options", [{"parts": 0}, {"seconds": 0.0}])
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="got 0"):
        SpreadObjective(loss, Now(), **options)


def test_a_search_with_an_executor_resumes_without_one(tmp_path: Path) -> None:
    whole = minimize(loss, SPACE, SETTINGS, seed=1)
    folder = RunFolder.create(tmp_path / "run", {"command": "test"})
    with ThreadPoolExecutor(2) as pool:
        stop = minimize(loss, SPACE, SETTINGS, seed=1, folder=folder, callbacks=[lambda _: True], executor=pool)
    assert len(stop.trace) == 1
    assert same(whole, minimize(loss, SPACE, SETTINGS, seed=1, folder=folder, resume=True))


def test_an_objective_that_cannot_be_sent_is_measured_here(
    processes: ProcessPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    objective = SpreadObjective(lambda population: population @ WEIGHTS, processes, parts=2)
    assert np.array_equal(objective.evaluate(query()), ROWS @ WEIGHTS)
    assert all("are measured here, for the executor failed: " in message for message in caplog.messages)
    assert len(caplog.messages) == 2
