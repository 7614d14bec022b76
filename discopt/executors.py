"""An objective spread over the workers of any `concurrent.futures` executor, or over `Workers`.

    with ProcessPoolExecutor(4) as pool:
        result = minimize(SpreadObjective(loss, pool, parts=4), space)

Every query is cut into contiguous slices and the answers are put together in order, so that the number of workers
changes nothing where what a row gets does not depend on the rows beside it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, wait
from typing import Any

import numpy as np

from discopt.actors import Raised, portable
from discopt.candidates import Candidates, Rows
from discopt.objective import Losses, Objective, Query, as_objective
from discopt.wording import one_line
from discopt.workers import Workers, cores, slices

_log = logging.getLogger(__name__)


class SpreadObjective:
    """The objective, measured in `parts` slices by an executor: threads, processes, Dask's, MPI's.

    `parts` is best the number of its workers; by default, that of the CPU cores here. What the executor fails to
    measure, because it broke or within `seconds` of the query, is logged and measured in this process; what the
    objective raises is raised here. Rows whose loss is not finite are measured once more before that is believed.
    """

    def __init__(
        self,
        objective: Objective | Callable[..., Any],
        executor: Executor,
        *,
        parts: int | None = None,
        seconds: float | None = None,
    ) -> None:
        if parts is not None and parts < 1:
            raise ValueError(f"an objective is spread over at least 1 part, got {parts}")
        if seconds is not None and not seconds > 0:
            raise ValueError(f"the seconds of a query must be above 0, got {seconds}")
        self._objective, self._executor = as_objective(objective), executor
        self._parts, self._seconds = parts or cores(), seconds
        self._broken = False

    def evaluate(self, query: Query) -> Losses:
        """Losses of all rows, (k,) or (k, s), as the objective itself answers."""
        losses = self._measure(query)
        if len(losses) == len(query):
            again = np.flatnonzero(~_finite_rows(losses))
            if len(again):
                losses[again] = self._measure(_part(query, again))
        return losses

    def _measure(self, query: Query) -> Losses:
        if self._broken:
            return _numbers(self._objective.evaluate(query))
        parts = _parts(query, self._parts)
        futures = [self._submitted(part) for part in parts]
        try:
            wait([future for future in futures if future is not None], timeout=self._seconds)
            return _joined([self._answer(future, part) for future, part in zip(futures, parts, strict=True)])
        finally:
            for future in futures:
                if future is not None:
                    future.cancel()

    def _submitted(self, part: Query) -> Future[Any] | None:
        """None if the executor takes nothing any more."""
        try:
            return self._executor.submit(measured, self._objective, part)
        except RuntimeError as error:  # it is broken, or was shut down
            self._give_up(error)
            return None

    def _answer(self, future: Future[Any] | None, part: Query) -> Losses:
        """The losses of a slice, from here if the executor has none."""
        answer = None
        if future is not None and not future.done():
            _log.warning("%d profiles took longer than %g s; they are measured here", len(part), self._seconds)
        elif future is not None:
            answer = self._outcome(future, part)
        if answer is None:
            answer = measured(self._objective, part)
        if isinstance(answer, Raised):
            raise answer.error
        return answer

    def _outcome(self, future: Future[Any], part: Query) -> Losses | Raised | None:
        """What the executor answered; None if it failed for reasons of its own."""
        if future.cancelled():
            problem: BaseException | None = RuntimeError("it was cancelled")
        else:
            problem = future.exception()
        if problem is None:
            return future.result()
        if isinstance(problem, BrokenExecutor):
            self._give_up(problem)
        else:
            _log.warning("%d profiles are measured here, for the executor failed: %s", len(part), one_line(problem))
        return None

    def _give_up(self, error: BaseException) -> None:
        if not self._broken:
            self._broken = True
            _log.warning("the executor is broken, all else is measured here: %s", one_line(error))


class WorkersObjective:
    """The objective that `workers` hold, a slice for each of them; raises WorkersError when none is left.

    A slice with a loss that is not finite is measured by another worker before that is believed.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def evaluate(self, query: Query) -> Losses:
        """Losses of all rows, (k,) or (k, s), as the objective itself answers."""
        parts = _parts(query, max(1, len(self._workers)))
        return _joined(self._workers.call("evaluate", [(part,) for part in parts], valid=_all_finite))


def measured(objective: Objective, query: Query) -> Losses | Raised:
    """What an executor's worker does; what the objective raises is told from what happens to the worker."""
    try:
        return _numbers(objective.evaluate(query))
    except Exception as error:
        return Raised(portable(error))


def _parts(query: Query, count: int) -> list[Query]:
    rows = np.arange(len(query))
    return [_part(query, rows[part]) for part in slices(len(query), count)]


def _part(query: Query, rows: Rows) -> Query:
    """The query of some rows, (i,), with only the profiles that these change."""
    taken = query.candidates.take(rows)
    used, base = np.unique(taken.base, return_inverse=True)
    part = Candidates(taken.bases[used], base, taken.start, taken.unit, taken.level)
    return Query(part, query.fidelity, query.seed, fresh=query.fresh)


def _joined(answers: Sequence[Losses]) -> Losses:
    """Losses of slices as those of the whole; raises ValueError if some have samples and others do not."""
    if len({answer.shape[1:] for answer in answers}) > 1 or not all(answer.ndim for answer in answers):
        shapes = " and ".join(sorted({str(answer.shape) for answer in answers}))
        raise ValueError(f"slices of a query must be answered with equal shapes, got {shapes}")
    return np.concatenate(answers) if answers else np.empty(0)


def _numbers(answer: Any) -> Losses:
    """As an array of its own, to be sent and changed."""
    return np.array(answer, dtype=np.float64)


def _finite_rows(losses: Losses) -> Any:
    return np.isfinite(losses).all(axis=tuple(range(1, losses.ndim)))


def _all_finite(answer: Any) -> bool:
    return bool(np.isfinite(answer).all())
