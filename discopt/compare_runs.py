"""One run of a comparison: an algorithm on a problem from a seed, up to the largest budget, in a worker process."""

from __future__ import annotations

import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from discopt.errors import DiscoptError, ObjectiveError
from discopt.loading import _as_problem, _load_module, split_target
from discopt.objective import Losses, Objective, Query, as_objective
from discopt.optimizers import ALGORITHMS, Optimizer, Plan, StopReason
from discopt.problem import Problem
from discopt.run import Limits, Progress, minimize
from discopt.space import Levels, SearchSpace

if TYPE_CHECKING:
    from discopt.problems.suite import Instance

DONE, NOT_APPLICABLE, MISSING, FAILED = "done", "not applicable", "missing package", "failed"
CURVE_POINTS = 40
ROUNDING = 1e-12  # of an optimum, that a loss may be above it and still be the same
RANDOM_PROFILES = 33

Factory = Callable[[SearchSpace, Plan, int], Optimizer]


@dataclass(frozen=True)
class ProblemFacts:
    """What a report says of a problem."""

    name: str
    target: str  # its name in the suite, or FILE.py:NAME
    n: int
    m: int
    resources: int
    fidelity: int  # of a full measurement
    multimodal: bool
    reference: float | None  # the optimum, or the best loss known before
    source: str  # how the reference was got
    random: float  # median noise-free loss of random profiles that spend the budget


@dataclass(frozen=True)
class Task:
    """One run."""

    problem: ProblemFacts
    algorithm: str
    file: str | None  # FILE.py:NAME of the dict that has the algorithm; None for one of `ALGORITHMS`
    seed: int
    budgets: tuple[int, ...]  # full measurements
    seconds: float  # at most
    directory: str  # where files are looked for

    @property
    def key(self) -> tuple[str, str, int]:
        return self.problem.name, self.algorithm, self.seed


def checkpoints(budgets: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers of full measurements at which a run's loss is kept: the budgets, and points for the curves."""
    last = budgets[-1]
    curve = np.geomspace(min(10, last), last, CURVE_POINTS).round().astype(int)
    return tuple(sorted({*budgets, *curve.tolist()}))


def run(task: Task) -> dict[str, Any]:
    """Do it, and say what came out, as JSON values; an algorithm that fails is an answer as well.

    `losses` has the noise-free loss of the best profile at each of the `checkpoints`, after the last query that did
    not exceed it: null while nothing is measured, and where that profile is not feasible. A run ends at the optimum.
    """
    key = {"problem": task.problem.name, "algorithm": task.algorithm, "seed": task.seed}
    problem = load_instance(task.problem.target, task.directory).problem()
    meter = _Meter(problem)
    plan = Plan(evaluations=task.budgets[-1], fidelity=task.problem.fidelity)
    curve = _Curve(problem, [point * plan.fidelity for point in checkpoints(task.budgets)])
    began = time.perf_counter()
    try:
        optimizer = load_algorithms(task.file, task.directory)[task.algorithm](problem.space, plan, task.seed)
        result = minimize(
            meter,
            problem.space,
            optimizer=optimizer,
            limits=Limits(fidelity=plan.total_fidelity, seconds=task.seconds, target=_certain(problem)),
            callbacks=(curve,),
        )
    except Exception as error:  # whatever it is, the other algorithms go on
        return {**key, "status": _status(error, meter.rows), "reason": _one_line(error)}
    overhead = time.perf_counter() - began - meter.seconds - curve.seconds
    curve.finish()
    finite = [loss for loss in curve.losses if loss is not None]
    return {
        **key,
        "status": DONE,
        "losses": curve.losses,
        "best": min(finite, default=None),
        "evaluations": result.evaluations,
        "total_fidelity": result.total_fidelity,
        "feasible": _is_feasible(problem.space, result.profile),
        "feasible_rows": meter.feasible / meter.rows if meter.rows else None,
        "overhead": overhead / meter.rows if meter.rows else None,  # seconds, without the objective
        "seconds": result.seconds,
        "out_of_time": result.stop is StopReason.TIME,
        "stop": result.stop.value,
    }


def _certain(problem: Problem) -> float | None:
    """The loss at which there is nothing left to find, where the optimum is known and seen without noise."""
    if problem.optimum is None or problem.truth is not None:
        return None
    return problem.optimum + ROUNDING * max(1.0, abs(problem.optimum))


def describe(target: str, directory: str) -> ProblemFacts:
    """Load a problem and look at it; raises DiscoptError where it cannot be loaded or measured."""
    instance = load_instance(target, directory)
    problem = instance.problem()
    profiles = problem.space.random(RANDOM_PROFILES, np.random.default_rng(0))
    try:
        losses = problem.loss(profiles)
    except ObjectiveError as error:
        raise DiscoptError(f"{target}: {error}") from None  # an ObjectiveError's query does not travel
    return ProblemFacts(
        name=instance.name,
        target=target,
        n=problem.space.n,
        m=problem.space.m,
        resources=problem.space.r,
        fidelity=instance.fidelity,
        multimodal=instance.multimodal,
        reference=instance.reference,
        source=problem.note if problem.optimum is not None else instance.source,
        random=float(np.median(losses)),
    )


@cache
def load_instance(target: str, directory: str) -> Instance:
    """The suite's instance of that name, or the Problem or Instance that FILE.py:NAME holds."""
    from discopt.problems.suite import SUITE, Instance

    if ":" not in target:
        return SUITE[target]
    value, path = _load_object(target, directory)
    if isinstance(value, Instance):
        return value
    problem: Problem = _as_problem(value, target, path)
    return Instance(name=problem.name, make=lambda: problem, fidelity=problem.fidelity)


@cache
def load_algorithms(file: str | None, directory: str) -> Mapping[str, Factory]:
    """The algorithms by name in the dict that FILE.py:NAME holds; without one, discopt's own."""
    if file is None:
        return ALGORITHMS
    value, _ = _load_object(file, directory)
    if not isinstance(value, Mapping) or not all(isinstance(k, str) and callable(v) for k, v in value.items()):
        raise DiscoptError(f"{file} must be a dict of algorithms by name, got {type(value).__name__}")
    return value


def begin_worker() -> None:
    """Leave Ctrl-C to the parent process, and end with it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


class _Meter:
    """The problem's objective, with its time and its rows counted."""

    def __init__(self, problem: Problem) -> None:
        self._objective: Objective = as_objective(problem.objective)
        self._space = problem.space
        self.seconds = 0.0
        self.rows = self.feasible = 0

    def evaluate(self, query: Query) -> Losses:
        began = time.perf_counter()
        try:
            return self._objective.evaluate(query)
        finally:
            self.rows += len(query.population)
            self.feasible += int(_feasible_rows(self._space, query.population).sum())
            self.seconds += time.perf_counter() - began


class _Curve:
    """A callback that keeps the noise-free loss of the best profile so far at each point."""

    def __init__(self, problem: Problem, spends: Sequence[int]) -> None:
        self._problem = problem
        self._spends = spends  # total fidelity
        self._profile: Levels | None = None
        self.losses: list[float | None] = []
        self.seconds = 0.0

    def __call__(self, progress: Progress) -> None:
        began = time.perf_counter()
        self._fill(progress.line["total_fidelity"])
        self._profile = np.array(progress.best.profile)  # an optimizer may go on writing into its own
        self.seconds += time.perf_counter() - began

    def finish(self) -> None:
        """Carry the last best profile on to all points that are left."""
        self._fill(math.inf)

    def _fill(self, spent: float) -> None:
        """Take the losses at all points that come before `spent`."""
        todo = [spend for spend in self._spends[len(self.losses) :] if spend < spent]
        if todo:
            self.losses += [self._loss()] * len(todo)

    def _loss(self) -> float | None:
        if self._profile is None or not _is_feasible(self._problem.space, self._profile):
            return None
        loss = float(self._problem.loss(self._profile[None])[0])
        return loss if math.isfinite(loss) else None


def _feasible_rows(space: SearchSpace, population: Levels) -> NDArray[np.bool_]:
    """Which rows are profiles of the space, whatever they hold: (k, n) -> (k,)."""
    inside = np.logical_and.reduce((population >= 0) & (population < space.m), axis=1)
    feasible: NDArray[np.bool_] = inside & space.feasible(population.clip(0, space.m - 1))
    return feasible


def _is_feasible(space: SearchSpace, profile: Levels) -> bool:
    return bool(_feasible_rows(space, profile[None])[0])


def _status(error: Exception, measured: int) -> str:
    """A refusal before anything was measured is the algorithm's right; all else is a failure."""
    if isinstance(error, ImportError):
        return MISSING
    refused = isinstance(error, ValueError | DiscoptError) and not isinstance(error, ObjectiveError)
    return NOT_APPLICABLE if refused and not measured else FAILED


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | DiscoptError) else f"{type(error).__name__}: {text}"


def _load_object(target: str, directory: str) -> tuple[Any, Path | None]:
    """What FILE.py:NAME or module:NAME is, and its file."""
    where, name = split_target(target)
    module = _load_module(where, Path(directory))
    if not hasattr(module, name):
        raise DiscoptError(f"{where} has no {name!r}")
    return getattr(module, name), Path(module.__file__) if module.__file__ else None
