from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from discopt import (
    DiscoptError,
    EvoPress,
    EvoPressSettings,
    Limits,
    ObjectiveError,
    Plan,
    Progress,
    Query,
    RandomSearch,
    Result,
    RunFolder,
    RunFolderError,
    SearchSpace,
    Stage,
    StopReason,
    minimize,
)

SPACE = SearchSpace.cardinality(20, 6)
WEIGHTS = np.random.default_rng(0).permutation(20)
SETTINGS = EvoPressSettings(generations=10, offspring=6, stages=(Stage(3, 1), Stage(1, 4)), start_candidates=5)


def loss(population: np.ndarray, fidelity: int, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=len(population)) / np.sqrt(fidelity)
    return -(population @ WEIGHTS) + noise


def folder(path: Path) -> RunFolder:
    return RunFolder.create(path, {"command": "test"})


def same(a: Result, b: Result) -> bool:
    def timeless(result: Result) -> list[dict]:
        return [{k: v for k, v in line.items() if k != "seconds"} for line in result.trace]

    return bool((a.profile == b.profile).all()) and a.loss == b.loss and timeless(a) == timeless(b)


def test_the_result_counts_what_was_spent() -> None:
    result = minimize(loss, SPACE, SETTINGS, seed=1)
    assert result.stop is StopReason.GENERATIONS
    assert result.generations == 10
    assert result.evaluations == 5 + 10 * (6 + 4)
    assert result.total_fidelity == 5 + 10 * (6 * 1 + 4 * 4)
    assert result.fidelity == 4
    assert result.cost.tolist() == [6]
    assert len(result.trace) == 21
    assert result.trace[-1]["total_fidelity"] == result.total_fidelity


def test_the_same_seed_gives_the_same_run() -> None:
    assert same(minimize(loss, SPACE, SETTINGS, seed=1), minimize(loss, SPACE, SETTINGS, seed=1))
    assert not same(minimize(loss, SPACE, SETTINGS, seed=1), minimize(loss, SPACE, SETTINGS, seed=2))


@pytest.mark.parametrize(
    ("limits", "stop"),
    [
        (Limits(evaluations=30), StopReason.EVALUATIONS),
        (Limits(fidelity=60), StopReason.FIDELITY),
        (Limits(seconds=1e-9), StopReason.TIME),
        (Limits(target=-40.0), StopReason.TARGET),
        (Limits(stagnation=1), StopReason.STAGNATION),
    ],
)
def test_limits_stop_the_search(limits: Limits, stop: StopReason) -> None:
    result = minimize(loss, SPACE, SETTINGS, seed=1, limits=limits)
    assert result.stop is stop
    assert result.evaluations > 0
    assert limits.evaluations is None or result.evaluations <= limits.evaluations
    assert limits.fidelity is None or result.total_fidelity <= limits.fidelity
    assert limits.target is None or result.loss <= limits.target


def test_a_limit_below_the_first_query_is_refused() -> None:
    with pytest.raises(DiscoptError, match="before the first query, which needs 5"):
        minimize(loss, SPACE, SETTINGS, limits=Limits(evaluations=4))


@pytest.mark.parametrize("arguments", [{"evaluations": 0}, {"seconds": -1.0}, {"target": float("nan")}])
def test_limits_check_themselves(arguments: dict) -> None:
    with pytest.raises(ValueError, match="got"):
        Limits(**arguments)


@pytest.mark.parametrize("turns", range(1, 21))
def test_a_run_stopped_after_any_stage_resumes_identically(turns: int, tmp_path: Path) -> None:
    def stop_after(progress: Progress) -> bool:
        return progress.line["evaluations"] >= whole.trace[turns - 1]["evaluations"]

    whole = minimize(loss, SPACE, SETTINGS, seed=1)
    first = minimize(loss, SPACE, SETTINGS, seed=1, folder=folder(tmp_path / "run"), callbacks=[stop_after])
    assert len(first.trace) == turns
    again = RunFolder.open(tmp_path / "run")
    resumed = minimize(loss, SPACE, SETTINGS, seed=1, folder=again, resume=True)
    assert same(whole, resumed)
    assert again.trace() == list(resumed.trace)


def test_a_resumed_run_drops_what_was_traced_after_the_last_checkpoint(tmp_path: Path) -> None:
    run = folder(tmp_path / "run")
    whole = minimize(loss, SPACE, SETTINGS, seed=1)
    minimize(loss, SPACE, SETTINGS, seed=1, folder=run, callbacks=[lambda progress: progress.line["stage"] == 2])
    run.append_trace({"generation": 99, "stage": 1})
    resumed = minimize(loss, SPACE, SETTINGS, seed=1, folder=run, resume=True)
    assert same(whole, resumed)


def test_a_run_without_a_checkpoint_starts_over(tmp_path: Path) -> None:
    run = folder(tmp_path / "run")
    run.append_trace({"generation": 0, "stage": 0})
    assert same(minimize(loss, SPACE, SETTINGS, folder=run, resume=True), minimize(loss, SPACE, SETTINGS))


def test_a_finished_run_resumes_to_the_same_result_without_measuring(tmp_path: Path) -> None:
    run = folder(tmp_path / "run")
    whole = minimize(loss, SPACE, SETTINGS, folder=run)

    def never(population: np.ndarray) -> np.ndarray:
        raise AssertionError("measured again")

    assert same(whole, minimize(never, SPACE, SETTINGS, folder=run, resume=True))


def test_a_checkpoint_of_another_space_is_refused(tmp_path: Path) -> None:
    run = folder(tmp_path / "run")
    minimize(loss, SPACE, SETTINGS, folder=run)
    with pytest.raises(RunFolderError, match="does not fit this run: expected the state of evopress on 5 units"):
        minimize(loss, SearchSpace.cardinality(5, 2), SETTINGS, folder=run, resume=True)


def test_ctrl_c_ends_with_the_best_so_far_and_resumes_identically(tmp_path: Path) -> None:
    calls = 0

    def interrupted(population: np.ndarray, fidelity: int, seed: int) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(population, fidelity, seed)

    run = folder(tmp_path / "run")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has it ignored
    try:
        result = minimize(interrupted, SPACE, SETTINGS, seed=1, folder=run)
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.stop is StopReason.INTERRUPTED
    assert np.isfinite(result.loss)
    assert same(
        minimize(loss, SPACE, SETTINGS, seed=1, folder=run, resume=True), minimize(loss, SPACE, SETTINGS, seed=1)
    )


def test_nan_and_infinity_rank_last_and_are_counted() -> None:
    def broken(population: np.ndarray) -> np.ndarray:
        losses = -(population @ WEIGHTS).astype(float)
        losses[::3], losses[1::3] = np.nan, np.inf
        return losses

    result = minimize(broken, SPACE, SETTINGS)
    assert np.isfinite(result.loss)
    assert result.not_finite == sum(line["not_finite"] for line in result.trace) > 0


def test_a_search_that_measures_nothing_says_so() -> None:
    settings = EvoPressSettings.starting_at([1] * 6 + [0] * 14, generations=0)
    result = minimize(loss, SPACE, settings)
    assert np.isnan(result.loss)
    assert result.fidelity == 0
    assert result.to_dict()["loss"] is None


def test_losses_per_sample_give_a_standard_error() -> None:
    def sampled(query_population: np.ndarray, fidelity: int, seed: int) -> np.ndarray:
        return -(query_population @ WEIGHTS)[:, None] + np.array([[-1.0, 0.0, 1.0]])

    result = minimize(sampled, SPACE, SETTINGS)
    assert result.standard_error == pytest.approx(1 / np.sqrt(3))


def test_a_failing_objective_keeps_the_stages_before_it(tmp_path: Path) -> None:
    def failing(population: np.ndarray) -> np.ndarray:
        if len(run.trace()) == 3:
            raise RuntimeError("no data")
        return loss(population, 1, 0)

    run = folder(tmp_path / "run")
    with pytest.raises(ObjectiveError, match=r"raised RuntimeError on 6 profiles at fidelity 1.*no data"):
        minimize(failing, SPACE, SETTINGS, folder=run)
    assert len(run.trace()) == 3
    assert run.load_checkpoint() is not None


def test_callbacks_see_progress_and_time_left() -> None:
    seen: list[Progress] = []
    minimize(loss, SPACE, SETTINGS, callbacks=[lambda progress: seen.append(progress)])
    fractions = [progress.fraction for progress in seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    assert seen[-1].eta == 0


def test_an_optimizer_of_another_space_is_refused() -> None:
    with pytest.raises(ValueError, match="got one with another space"):
        minimize(loss, SPACE, optimizer=EvoPress(SearchSpace.cardinality(20, 6)))
    with pytest.raises(ValueError, match="got both"):
        minimize(loss, SPACE, SETTINGS, optimizer=EvoPress(SPACE))


def test_random_search_returns_the_best_it_saw_and_resumes(tmp_path: Path) -> None:
    seen: list[float] = []

    def watched(query: Query) -> np.ndarray:
        losses = -(query.population @ WEIGHTS).astype(float)
        seen.extend(losses)
        return losses

    class Watched:
        def evaluate(self, query: Query) -> np.ndarray:
            return watched(query)

    def search() -> RandomSearch:
        return RandomSearch(SPACE, Plan(evaluations=50, batch=8), seed=3)

    whole = minimize(Watched(), SPACE, optimizer=search())
    assert len(seen) == 50
    assert whole.loss == min(seen)
    run = folder(tmp_path / "run")
    minimize(Watched(), SPACE, optimizer=search(), folder=run, callbacks=[lambda p: p.line["generation"] == 3])
    assert same(whole, minimize(Watched(), SPACE, optimizer=search(), folder=run, resume=True))
