"""minimize(): the one loop that runs every search.

    while not optimizer.done:
        query = optimizer.ask()
        optimizer.tell(query, objective.evaluate(query))

with limits, callbacks, a trace, checkpoints and a clean end around it.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from discopt.errors import DiscoptError, RunFolderError
from discopt.executors import SpreadObjective
from discopt.folder import RunFolder
from discopt.objective import Losses, Objective, Query, as_objective, evaluate, mean_loss
from discopt.optimizers.base import Measurement, Optimizer, StopReason
from discopt.optimizers.evopress import EvoPress, EvoPressSettings
from discopt.optimizers.learning import Learning
from discopt.optimizers.plan import Plan
from discopt.space import Ints, Levels, SearchSpace
from discopt.wording import one_line

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """When to stop before the optimizer is done; None is no limit. Evaluations and fidelity are never exceeded."""

    evaluations: int | None = None  # rows measured
    fidelity: int | None = None  # total: rows times fidelity; for a language model, tokens
    seconds: float | None = None  # wall time, all parts of a resumed run together; checked after every stage
    target: float | None = None  # stop when the best loss is no higher
    stagnation: int | None = None  # generations without an improvement

    def __post_init__(self) -> None:
        for name in ("evaluations", "fidelity", "seconds", "stagnation"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"the limit of {name} must be above 0, got {value}")
        if self.target is not None and math.isnan(self.target):
            raise ValueError("the target loss must be a number, got nan")


@dataclass(frozen=True, eq=False)
class Progress:
    """What callbacks see after every stage."""

    line: dict[str, Any]  # the stage's line of the trace
    best: Measurement
    fraction: float  # of the planned work, 0 to 1
    seconds: float  # so far

    @property
    def eta(self) -> float | None:
        """Seconds left at the pace so far; None before there is one."""
        return self.seconds * (1 - self.fraction) / self.fraction if self.fraction > 0 else None


Callback = Callable[[Progress], bool | None]


@dataclass(frozen=True, eq=False)
class Result:
    """The answer of a search. `loss` was measured at `fidelity`; it is NaN, and `fidelity` 0, if nothing was."""

    profile: Levels  # (n,)
    loss: float
    fidelity: int
    standard_error: float | None  # of the loss, where the objective gave one per sample
    cost: Ints  # (r,)
    stop: StopReason
    generations: int
    evaluations: int  # rows measured
    total_fidelity: int  # rows times fidelity
    seconds: float
    not_finite: int  # rows that lost NaN or infinity
    start: Measurement | None
    trace: tuple[dict[str, Any], ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, without the trace."""
        return {
            "profile": [int(level) for level in self.profile],
            "loss": self.loss if math.isfinite(self.loss) else None,
            "fidelity": self.fidelity,
            "standard_error": self.standard_error,
            "cost": [int(c) for c in self.cost],
            "stop": self.stop.value,
            "generations": self.generations,
            "evaluations": self.evaluations,
            "total_fidelity": self.total_fidelity,
            "seconds": round(self.seconds, 3),
            "not_finite": self.not_finite,
        }


def minimize(
    objective: Objective | Callable[..., Any],
    space: SearchSpace,
    settings: EvoPressSettings | Plan | None = None,
    *,
    seed: int = 0,
    optimizer: Optimizer | None = None,
    limits: Limits | None = None,
    callbacks: Sequence[Callback] = (),
    folder: RunFolder | None = None,
    checkpoint_seconds: float = 0.0,
    resume: bool = False,
    executor: Executor | None = None,
) -> Result:
    """Search for the profile of the space with the lowest loss.

    `objective` is an `Objective`, or a function of (population) or (population, fidelity, seed). The search is
    `Learning` with a plan, by default the usual one; EvoPress with its settings; or any `optimizer` on the same space.
    With a `folder`, every stage is appended to trace.jsonl and the state saved to checkpoint.json, at most once in
    `checkpoint_seconds`; `resume` goes on from there and ends in the profile of an undisturbed run. A callback that
    returns True stops the search, and so does Ctrl-C: the result is then the best so far.

    With an `executor`, every query is measured in slices by its workers, which is for objectives whose answer to a row
    does not depend on the rows beside it; `SpreadObjective` has the options.

        with ProcessPoolExecutor() as pool:  # or Dask's client.get_executor(), or mpi4py's MPIPoolExecutor()
            result = minimize(loss, space, seed=0, executor=pool)

    Raises ObjectiveError if the objective fails, RunFolderError for a checkpoint that cannot be used.
    """
    if optimizer is not None and settings is not None:
        raise ValueError("give settings or an optimizer, got both")
    if isinstance(settings, EvoPressSettings):
        optimizer = EvoPress(space, settings, seed=seed)
    elif optimizer is None:
        optimizer = Learning(space, settings, seed=seed)
    elif optimizer.space is not space:
        raise ValueError("the optimizer must search the given space, got one with another space")
    run = _Run(optimizer, limits or Limits(), folder, checkpoint_seconds)
    if resume:
        run.restore()
    objective = as_objective(objective)
    stop = run.loop(SpreadObjective(objective, executor) if executor is not None else objective, callbacks)
    run.save()
    return run.result(stop)


class _Run:
    """The counters around an optimizer, and their way to disk."""

    def __init__(
        self, optimizer: Optimizer, limits: Limits, folder: RunFolder | None, checkpoint_seconds: float
    ) -> None:
        self.optimizer, self.limits, self.folder = optimizer, limits, folder
        self.checkpoint_seconds = checkpoint_seconds
        self.trace: list[dict[str, Any]] = []
        self.evaluations = self.total_fidelity = self.not_finite = 0
        self._seconds_before = 0.0
        self._began = self._saved = time.monotonic()

    @property
    def seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._began

    def loop(self, objective: Objective, callbacks: Sequence[Callback]) -> StopReason:
        interrupts = _Interrupts()
        try:
            with interrupts.watched():
                while (stop := self._stop()) is None:
                    query = self.optimizer.ask()
                    losses = evaluate(objective, query)
                    with interrupts:
                        line = self._record(query, losses)
                        if time.monotonic() - self._saved >= self.checkpoint_seconds:
                            self.save()
                    if callbacks:
                        progress = Progress(line, self.optimizer.best, self.optimizer.fraction, self.seconds)
                        if any(callback(progress) for callback in callbacks):
                            return self.optimizer.stop or StopReason.CALLBACK
        except KeyboardInterrupt:
            logger.info("interrupted after %d evaluations", self.evaluations)
            return StopReason.INTERRUPTED
        return stop

    def _stop(self) -> StopReason | None:
        limits, best = self.limits, self.optimizer.best
        if self.optimizer.done:
            return self.optimizer.stop
        if limits.target is not None and best.loss <= limits.target:
            return StopReason.TARGET
        idle = self.optimizer.generation - self.optimizer.improved_at
        if limits.stagnation is not None and idle >= limits.stagnation:
            return StopReason.STAGNATION
        if limits.seconds is not None and self.evaluations and self.seconds >= limits.seconds:
            return StopReason.TIME
        query = self.optimizer.ask()
        if limits.evaluations is not None and self.evaluations + len(query) > limits.evaluations:
            return self._at_limit(StopReason.EVALUATIONS, len(query))
        spent = len(query) * query.fidelity
        if limits.fidelity is not None and self.total_fidelity + spent > limits.fidelity:
            return self._at_limit(StopReason.FIDELITY, spent)
        return None

    def _at_limit(self, reason: StopReason, needed: int) -> StopReason:
        if not self.evaluations:
            raise DiscoptError(f"{reason.value} before the first query, which needs {needed}; raise the limit")
        return reason

    def _record(self, query: Query, losses: Losses) -> dict[str, Any]:
        where = self.optimizer.describe()
        means = mean_loss(losses).tolist()
        before = self.optimizer.best.profile
        self.optimizer.tell(query, losses)
        finite = sorted(filter(math.isfinite, means))
        self.evaluations += len(means)
        self.total_fidelity += len(means) * query.fidelity
        self.not_finite += len(means) - len(finite)
        best = self.optimizer.best.loss
        line = {
            **where,
            "fidelity": query.fidelity,
            "candidates": len(means),
            "loss": finite[0] if finite else None,
            "median": _middle(finite) if finite else None,
            "best": best if math.isfinite(best) else None,
            "not_finite": len(means) - len(finite),
            "evaluations": self.evaluations,
            "total_fidelity": self.total_fidelity,
            "seconds": round(self.seconds, 3),
            "seed": query.seed,
            "moved": _moves(before, self.optimizer.best.profile),
        }
        self.trace.append(line)
        if self.folder is not None:
            self.folder.append_trace(line)
        return line

    def save(self) -> None:
        if self.folder is None:
            return
        self.folder.save_checkpoint(
            {
                "optimizer": self.optimizer.state(),
                "trace_lines": len(self.trace),
                "evaluations": self.evaluations,
                "total_fidelity": self.total_fidelity,
                "not_finite": self.not_finite,
                "seconds": self.seconds,
            }
        )
        self._saved = time.monotonic()

    def restore(self) -> None:
        """Go on from the folder's checkpoint, or from the start if there is none yet."""
        if self.folder is None:
            raise ValueError("resume needs a folder, got None")
        state = self.folder.load_checkpoint()
        if state is None:
            self.folder.truncate_trace(0)
            return
        try:
            self.optimizer.restore(state["optimizer"])
            self.evaluations, self.total_fidelity = state["evaluations"], state["total_fidelity"]
            self.not_finite, self._seconds_before = state["not_finite"], state["seconds"]
            lines = state["trace_lines"]
            if type(lines) is not int or lines < 0:
                raise ValueError(f"expected a number of lines, got {lines!r}")
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, zlib.error) as error:
            line = one_line(error)
            raise RunFolderError(f"the checkpoint in {self.folder.path} does not fit this run: {line}") from error
        self.folder.truncate_trace(lines)
        self.trace = self.folder.trace()

    def result(self, stop: StopReason) -> Result:
        best = self.optimizer.best
        return Result(
            profile=best.profile,
            loss=best.loss,
            fidelity=best.fidelity,
            standard_error=best.standard_error,
            cost=self.optimizer.space.cost_of(best.profile[None])[0],
            stop=stop,
            generations=self.optimizer.generation,
            evaluations=self.evaluations,
            total_fidelity=self.total_fidelity,
            seconds=self.seconds,
            not_finite=self.not_finite,
            start=self.optimizer.start,
            trace=tuple(self.trace),
        )


def _moves(before: Levels, after: Levels) -> list[list[int]]:
    """The units in which profiles (n,) differ, each with its levels before and after: [unit, before, after]."""
    if after is before:
        return []
    units = (before != after).nonzero()[0].tolist()
    return [[unit, before.item(unit), after.item(unit)] for unit in units]


def _middle(ordered: Sequence[float]) -> float:
    """The median of losses in order; np.median would take longer than all else in a line of the trace."""
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


class _Interrupts:
    """Ctrl-C held back inside `with`, so that the optimizer and the run folder always agree; else as it ever was."""

    def __init__(self) -> None:
        self._before: Any = None
        self._holding = False
        self._held: list[tuple[int, FrameType | None]] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While this lasts; from other threads than the main one, and where Ctrl-C is ignored, it does nothing."""
        before = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or not callable(before):
            yield
            return
        self._before = before
        signal.signal(signal.SIGINT, self._take)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._holding:
            self._held.append((number, frame))
        else:
            self._before(number, frame)

    def __enter__(self) -> None:
        self._holding = True

    def __exit__(self, *error: object) -> None:
        self._holding = False
        if self._held:
            self._before(*self._held.pop())
