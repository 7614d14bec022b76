"""The same object held by several processes, here or on a cluster, and calls spread over them (Ray actors).

    with Workers(WorkersAt.parse("4"), load_model, say=print) as workers:
        losses = workers.call("measure", [(rows,) for rows in parts])

A worker that dies, hangs or answers with nonsense has its calls made on another one; the rest go on without it. Which
worker makes which call is left to chance, so that calls must not depend on the calls before them.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from discopt.actors import Holder, Raised, begin, import_ray
from discopt.errors import WorkersError
from discopt.wording import one_line

START_SECONDS = 120.0  # for the process of a worker to come up, without what it then loads

_NONE_LEFT = "no worker is left: all of them died or were stopped"


def always(answer: Any) -> bool:
    """Every answer is valid."""
    return True


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def slices(count: int, parts: int) -> list[slice]:
    """`count` rows in at most `parts` contiguous slices, none of them empty, whose sizes differ by one at most."""
    if count < 0 or parts < 1:
        raise ValueError(f"expected rows and at least one part, got {count} rows in {parts} parts")
    parts = min(parts, count)
    return [slice(count * part // parts, count * (part + 1) // parts) for part in range(parts)]


@dataclass(frozen=True)
class WorkersAt:
    """Where the workers are and how many; raises ValueError for what makes no sense."""

    count: int | None  # None: as many as the cluster has room for
    address: str | None = None  # ray://HOST:PORT of a cluster; None: processes of this machine

    def __post_init__(self) -> None:
        if (self.count is None and self.address is None) or (self.count is not None and self.count < 1):
            raise ValueError(_expected(self.count))

    @classmethod
    def parse(cls, text: str) -> Self:
        """`"4"`, `"ray://HOST:PORT"`, or `"ray://HOST:PORT?workers=8"`."""
        if text.isdecimal():
            return cls(_count(text, text))
        try:
            parts = urlsplit(text)
            port, query = parts.port, parse_qs(parts.query, strict_parsing=bool(parts.query), keep_blank_values=True)
        except ValueError as error:
            raise ValueError(_expected(text)) from error
        if (
            parts.scheme != "ray"
            or not parts.hostname
            or not port
            or parts.path + parts.fragment
            or query.keys() - {"workers"}
        ):
            raise ValueError(_expected(text))
        count = _count(query["workers"][-1], text) if query else None
        return cls(count, f"ray://{parts.netloc}")

    def __str__(self) -> str:
        if self.address is None:
            return str(self.count)
        return self.address + (f"?workers={self.count}" if self.count is not None else "")


def _count(number: str, text: str) -> int:
    if not number.isdecimal() or len(number) > 9 or int(number) < 1:
        raise ValueError(_expected(text))
    return int(number)


def _expected(got: object) -> str:
    return f"workers must be a number such as 4 or ray://HOST:PORT, got {got!r:.100}"


class Workers:
    """Processes that each hold the object that `make()` gave there; use it as a context manager.

    `make` is pickled, by cloudpickle, as are arguments and answers. Local workers find modules and files as this
    process does and share its cores; a cluster must have the same packages and files, and the environment Ray's token
    if the cluster asks for one. `cpus` and `gpus` are what one worker takes. `seconds` bounds one call. `say` hears a
    line when workers start and when one is lost. A Ray that this process has begun before is used and left as it is.

    Raises WorkersError where no worker can be started or reached; what `make` raises everywhere is raised here.
    """

    def __init__(
        self,
        at: WorkersAt,
        make: Callable[[], Any],
        *,
        seconds: float | None = None,
        cpus: float = 1,
        gpus: float = 0,
        say: Callable[[str], None],
    ) -> None:
        if seconds is not None and not seconds > 0:
            raise ValueError(f"the seconds of a call must be above 0, got {seconds}")
        if cpus < 0 or gpus < 0 or cpus + gpus == 0:
            raise ValueError(f"a worker needs CPUs or GPUs, got {cpus} and {gpus}")
        self._at, self._seconds, self._say = at, seconds, say
        self._lock = threading.Lock()
        self._alive: list[_Worker] = []
        self._under_way: dict[Any, _Call] = {}
        self._ray = import_ray()
        self._begun_here = not self._ray.is_initialized()
        say(f"starting {_workers(at.count)}" if at.count is not None else f"starting workers at {at.address}")
        try:
            if self._begun_here:
                begin(self._ray, at.address, math.ceil(cpus * (at.count or 0)))
            self._start(make, cpus, gpus)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Workers that are alive, as far as is known."""
        return len(self._alive)

    @property
    def pids(self) -> dict[int, int]:
        """Process ids of the live workers by their number, from 1; on the machines where they run."""
        return {worker.number: worker.pid for worker in self._alive}

    def call(
        self, method: str, arguments: Sequence[tuple[Any, ...]], *, valid: Callable[[Any], bool] = always
    ) -> list[Any]:
        """Answers of `object.method(*arguments[i])`, in order; a worker makes one call at a time.

        A call whose worker dies, takes too long (it is killed), or gives an answer that is not `valid` is made again
        on another one; an answer that two workers agree to be invalid, or that no other is left to check, is returned.
        What the method raises is raised here. Raises WorkersError when no worker is left.
        """
        with self._lock:
            batch = _Batch(deque(range(len(arguments))))
            try:
                while len(batch.answers) < len(arguments):
                    with self._connected():
                        self._hand_out(batch, method, arguments)
                        finished = self._finished(batch)
                    for call, answer in finished:
                        if isinstance(answer, Raised):
                            raise answer.error
                        batch.take(call, answer, valid, self._say)
            finally:  # after an error or Ctrl-C, the calls that go on belong to nobody
                for call in self._under_way.values():
                    call.batch = None
            return [batch.answers[index] for index in range(len(arguments))]

    def close(self) -> None:
        """End the workers, and the Ray that was begun for them; a cluster, or a Ray that was there before, goes on."""
        for worker in self._alive:
            self._kill(worker)
        self._alive, self._under_way = [], {}
        if self._begun_here:
            self._begun_here = False
            self._ray.shutdown()

    def _start(self, make: Callable[[], Any], cpus: float, gpus: float) -> None:
        count = self._room(cpus, gpus)
        local = self._at.address is None
        threads = max(1, cores() // count) if local else None
        actor = self._ray.remote(Holder).options(num_cpus=cpus, num_gpus=gpus, max_restarts=0)
        handles = [actor.remote(list(sys.path), os.getcwd(), threads, local) for _ in range(count)]
        self._alive = [_Worker(number, handle) for number, handle in enumerate(handles, start=1)]
        asked = {worker.handle.pid.remote(): worker for worker in self._alive}
        for ref in self._ray.wait(list(asked), num_returns=count, timeout=START_SECONDS)[1]:
            self._lose(asked.pop(ref), f"did not start within {START_SECONDS:g} s")
        for worker, pid in self._from_all(asked):
            worker.pid = pid
        self._from_all({worker.handle.make.remote(make): worker for worker in self._alive})

    def _from_all(self, asked: dict[Any, _Worker]) -> list[tuple[_Worker, Any]]:
        """What workers answer while they start, those that fail are lost; raises what went wrong if all of them do."""
        answers, failed = [], []
        for ref, worker in asked.items():
            try:
                answer = self._answer(ref)
            except _LostError as lost:
                answer = Raised(WorkersError(f"a worker died while it was starting: {lost}"))
            if isinstance(answer, Raised):
                failed.append((worker, answer.error))
            else:
                answers.append((worker, answer))
        if not answers:
            raise failed[0][1] if failed else WorkersError("no worker could be started")
        for worker, error in failed:
            self._lose(worker, f"did not start: {one_line(error)}")
        return answers

    def _room(self, cpus: float, gpus: float) -> int:
        """How many workers to start; raises WorkersError if there is not enough room."""
        where = "this machine" if self._at.address is None else f"the cluster at {self._at.address}"
        count = self._at.count
        found = self._ray.available_resources() if count is None else self._ray.cluster_resources()
        room = min(int(found.get(name, 0) // need) for name, need in (("CPU", cpus), ("GPU", gpus)) if need)
        if room < (count or 1):
            raise WorkersError(
                f"{where} has room for {_workers(room)} of {cpus:g} CPUs and {gpus:g} GPUs each, got {count or 'none'}"
            )
        return count or room

    def _hand_out(self, batch: _Batch, method: str, arguments: Sequence[tuple[Any, ...]]) -> None:
        """Give waiting calls to workers that have nothing to do."""
        if not self._alive:
            raise WorkersError(_NONE_LEFT)
        busy = [call.worker for call in self._under_way.values()]
        free = [worker for worker in self._alive if worker not in busy]
        for index in list(batch.waiting):
            if not free:
                return
            doubter = batch.doubted_by(index)
            if self._alive == [doubter]:
                batch.believe(index)
                continue
            worker = next((worker for worker in free if worker is not doubter), None)
            if worker is None:
                continue
            free.remove(worker)
            batch.waiting.remove(index)
            ref = worker.handle.call.remote(method, arguments[index])
            until = time.monotonic() + self._seconds if self._seconds is not None else math.inf
            self._under_way[ref] = _Call(worker, index, until, batch)

    def _finished(self, batch: _Batch) -> list[tuple[_Call, Any]]:
        """Wait for an answer or the end of somebody's time; the answers that came to calls of this batch."""
        if not self._under_way:
            return []
        until = min(call.until for call in self._under_way.values())
        timeout = max(0.0, until - time.monotonic()) if until < math.inf else None
        ready, _ = self._ray.wait(list(self._under_way), num_returns=1, timeout=timeout)
        finished = []
        for ref in ready:
            call = self._under_way.pop(ref)
            try:
                answer = self._answer(ref)
            except _LostError:
                self._lose_in_call(call, "died", batch)
            else:
                if call.batch is batch:
                    finished.append((call, answer))
        now = time.monotonic()
        for ref, call in [(ref, call) for ref, call in self._under_way.items() if call.until <= now]:
            del self._under_way[ref]
            self._lose_in_call(call, f"took longer than {self._seconds:g} s and was stopped", batch)
        return finished

    def _answer(self, ref: Any) -> Any:
        """What a worker answered, `Raised` included; raises _LostError if the worker is no more."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(ref)
        except errors.RayTaskError as error:  # the arguments cannot be read there, or the answer cannot be sent
            return Raised(error.cause if isinstance(error.cause, Exception) else WorkersError(one_line(error)))
        except errors.RaySystemError as error:  # the answer cannot be read here
            return Raised(WorkersError(f"a worker's answer cannot be read: {one_line(error)}"))
        except errors.RayError as error:
            raise _LostError(one_line(str(error).strip().rpartition("\n")[2])) from error  # the cause comes last

    def _lose_in_call(self, call: _Call, how: str, batch: _Batch) -> None:
        mine = call.batch is batch
        if mine:
            batch.waiting.appendleft(call.index)
        self._lose(call.worker, how, "; its part is done by another" if mine else "")

    def _lose(self, worker: _Worker, how: str, then: str = "") -> None:
        self._kill(worker)
        self._alive.remove(worker)
        left = f"{len(self._alive)} left" if self._alive else "none is left"
        self._say(f"worker {worker.number} {how}; {left}" + (then if self._alive else ""))

    def _kill(self, worker: _Worker) -> None:
        if self._ray.is_initialized():  # else Ray would look for another cluster
            with suppress(self._ray.exceptions.RayError, ConnectionError):
                self._ray.kill(worker.handle)

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Say it in a line when the cluster itself is gone."""
        try:
            if not self._ray.is_initialized():
                raise ConnectionError("the connection was closed")
            yield
        except ConnectionError as error:
            raise WorkersError(f"lost the Ray at {self._at}: {one_line(error)}") from error


@dataclass(eq=False)
class _Worker:
    number: int  # from 1
    handle: Any
    pid: int = 0


@dataclass(eq=False)
class _Call:
    """A call that a worker is making."""

    worker: _Worker
    index: int
    until: float  # monotonic seconds
    batch: _Batch | None  # None: nobody waits for its answer any more


@dataclass(eq=False)
class _Batch:
    """What is left of one round of calls."""

    waiting: deque[int]
    answers: dict[int, Any] = field(default_factory=dict)
    doubted: dict[int, tuple[_Worker, Any]] = field(default_factory=dict)  # answers that were not valid

    def doubted_by(self, index: int) -> _Worker | None:
        return self.doubted[index][0] if index in self.doubted else None

    def believe(self, index: int) -> None:
        """Take an invalid answer that nobody is left to check; without one, there is no worker at all."""
        if index not in self.doubted:
            raise WorkersError(_NONE_LEFT)
        self.waiting.remove(index)
        self.answers[index] = self.doubted[index][1]

    def take(self, call: _Call, answer: Any, valid: Callable[[Any], bool], say: Callable[[str], None]) -> None:
        """Keep an answer, or let another worker check it."""
        first = self.doubted_by(call.index)
        if valid(answer):
            if first is not None:
                say(f"worker {first.number} gave an answer that is not valid, worker {call.worker.number} one that is")
        elif first is None:
            self.doubted[call.index] = call.worker, answer
            self.waiting.appendleft(call.index)
            return
        self.answers[call.index] = answer


class _LostError(Exception):
    """A worker is no more."""


def _workers(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"
