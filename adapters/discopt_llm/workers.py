"""Workers that measure students of one model, or solve blocks of its bank: what they hold, and how that comes to them.

A worker loads the model and opens the banks by a `Holding`, and refuses to work with any but those of the process that
asked. Nothing is built there. Where a folder of the asking process cannot be seen, its files are sent, once.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from discopt.errors import WorkersError
from discopt.progress import Task as ProgressTask
from discopt.progress import task as progress_task
from discopt.workers import Workers, always
from discopt_llm.bank import Form
from discopt_llm.build import BankPlan, BlockSolver, SolvedBlock, Spread
from discopt_llm.calibration import Calibration
from discopt_llm.errors import BankError, DeviceError, ModelError
from discopt_llm.evaluator import Evaluator, Measurer
from discopt_llm.layers import layers_for
from discopt_llm.means import Means
from discopt_llm.memory import Memory
from discopt_llm.models import LoadedModel, load_model
from discopt_llm.parcels import MissingError, Parcel, absolute, is_here, located
from discopt_llm.recipes import Recipe
from discopt_llm.request import Prepared, Say, SearchRequest, Task
from discopt_llm.spread import Answer, SpreadEvaluator, measured

__all__ = ["Crew", "Holding", "Worker", "measuring", "spread_over"]

Sent = Mapping[str, Parcel]  # by source


class Holding(Protocol):
    """How a worker comes to what it holds."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The models and banks that it needs, as the asking process has them."""
        ...

    def open(self, sent: Sent) -> Any:
        """What it holds; `sent` has the sources that this machine lacks."""
        ...


class Worker:
    """What lives in a worker: opened as it starts where all sources are there, else with the first call."""

    def __init__(self, holding: Holding) -> None:
        self._holding = holding
        self._held = holding.open({}) if all(map(is_here, holding.sources)) else None

    def ask(self, sent: Sent, method: str, *arguments: Any) -> Any:
        """Call a method of what it holds; raises MissingError for sources that are neither here nor sent."""
        if self._held is None:
            if missing := [source for source in self._holding.sources if not is_here(source) and source not in sent]:
                raise MissingError(*missing)
            self._held = self._holding.open(sent)
        return getattr(self._held, method)(*arguments)


class Crew:
    """Workers by the calls of what they hold; use it as a context manager.

    They are sent the sources that they turn out to lack, each read once, by `put`. When the last one is lost, as many
    are started again, if they have answered anything since they were started.
    """

    def __init__(self, start: Callable[[], Workers], put: Callable[[bytes], Any], say: Say) -> None:
        self._start, self._put, self._say = start, put, say
        self._workers = start()
        self._answered = False
        self._sent: dict[str, Parcel] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._workers.close()

    def __len__(self) -> int:
        return len(self._workers)

    def call(
        self, method: str, arguments: Sequence[tuple[Any, ...]], *, valid: Callable[[Any], bool] = always
    ) -> list[Any]:
        """See `Workers.call`."""
        while True:  # each time with more sources, of which there are few, or after a call that was answered
            calls = [(self._sent, method, *of_one) for of_one in arguments]
            try:
                answers = self._workers.call("ask", calls, valid=valid)
            except MissingError as missing:
                self._send(missing)
            except WorkersError:
                if not self._answered:
                    raise
                self._answered = False
                self._workers.close()
                self._workers = self._start()
            else:
                self._answered = True
                return answers

    def _send(self, missing: MissingError) -> None:
        new = [source for source in missing.sources if source not in self._sent]
        if not new:
            raise missing
        for source in new:
            self._say(f"sending {source} to workers that do not see it")
            self._sent[source] = Parcel.of(source, self._put)


@dataclass(frozen=True)
class _Model:
    """A model that a worker loads."""

    source: str
    fingerprint: str
    device: str
    dtype: str
    trust_remote_code: bool
    memory: Memory

    @classmethod
    def of(cls, loaded: LoadedModel, means: Means, *, trust_remote_code: bool) -> Self:
        return cls(
            absolute(loaded.source),
            loaded.fingerprint,
            loaded.device.type,
            str(loaded.dtype).removeprefix("torch."),
            trust_remote_code,
            means.bounds,
        )

    def load(self, sent: Sent) -> LoadedModel:
        """Raises ModelError for another model than that of the asking process."""
        loaded = load_model(
            located(sent, self.source),
            device=self.device,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
            memory=self.memory,
        )
        if loaded.fingerprint != self.fingerprint:
            raise ModelError(
                f"{self.source} is another model on {socket.gethostname()}: "
                f"{_differing(self.fingerprint, loaded.fingerprint)}"
            )
        return loaded


@dataclass(frozen=True)
class StudentsHolding:
    """An evaluator for the levels of a task."""

    model: _Model
    request: SearchRequest  # with the banks that there are
    banks: tuple[str, ...]  # their fingerprints

    @classmethod
    def of(cls, loaded: LoadedModel, task: Task) -> Self:
        """As this process has it."""
        request: Any = task.at(task.request).request
        if folders := getattr(request, "banks", ()):
            request = replace(request, banks=tuple(map(absolute, folders)))
        model = _Model.of(loaded, request, trust_remote_code=request.trust_remote_code)
        return cls(model, request, task.bank_fingerprints)

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.model.source, *getattr(self.request, "banks", ()))

    def open(self, sent: Sent) -> _Students:
        """Raises ModelError or BankError for others than those of the asking process."""
        loaded = self.model.load(sent)
        request: Any = self.request
        if self.banks:
            request = replace(request, banks=tuple(located(sent, bank) for bank in request.banks))
        task = request.task(loaded, Path(), quiet=True, say=_unheard)
        for mine, asked in zip(task.bank_fingerprints, self.banks, strict=True):
            if mine != asked:
                places = " and ".join(request.banks)
                raise BankError(f"{places}: another bank on {socket.gethostname()}: {_differing(asked, mine)}")
        return _Students(Evaluator(loaded, task.levels, memory=self.model.memory, say=_unheard))


@dataclass(frozen=True, eq=False)
class _Students:
    """What measures, in a worker."""

    evaluator: Evaluator

    def plan(self) -> str:
        """How memory is shared out, in a line."""
        return self.evaluator.plan.sentence

    def per_call(self, length: int) -> int:
        """How many sequences of so many tokens run in one call of a block."""
        return self.evaluator.limits.per_call(length)

    def measure(self, rows: NDArray[np.integer], texts: Sequence[NDArray[np.int64]], names: Sequence[str]) -> Answer:
        """See `measured`."""
        return measured(self.evaluator, rows, texts, names)


@dataclass(frozen=True, eq=False)
class BlocksHolding:
    """A solver for the blocks of a bank whose inputs the dense model makes."""

    model: _Model
    recipe: Recipe
    calibration: Calibration
    header: Mapping[str, Any]

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.model.source,)

    def open(self, sent: Sent) -> _Blocks:
        """Raises BankError where the bank would be another one here, for other versions of libraries, say."""
        loaded = self.model.load(sent)
        plan = BankPlan(loaded, layers_for(loaded, self.recipe.kind), self.recipe, self.calibration)
        for what, asked in self.header.items():
            mine = plan.header.get(what)
            if mine != asked and what != "model":  # whose source may be another, and whose weights are the same
                raise BankError(f"{socket.gethostname()} would build another bank: its {what} is {mine}, not {asked}")
        return _Blocks(BlockSolver(plan))


@dataclass(frozen=True, eq=False)
class _Blocks:
    """What solves, in a worker."""

    solver: BlockSolver

    def solve(self, number: int) -> SolvedBlock:
        """A block, on the CPU."""
        with _no_progress() as progress:
            layers, forms = self.solver.solve(number, progress)
        return layers, {of: _on_cpu(form) for of, form in forms.items()}


@contextmanager
def measuring(prepared: Prepared, task: Task, say: Say) -> Iterator[Measurer]:
    """What measures the students of a task with the means of its request: workers while inside, or this process."""
    request, loaded = prepared.request, prepared.loaded
    alone = partial(Evaluator, loaded, task.levels, memory=request.bounds_here(loaded.device), say=say)
    if request.workers_at is None:
        yield alone()
        return
    holding = StudentsHolding.of(loaded, task)
    with _started(request, holding, loaded, say) as workers:
        if holding.model.memory != Memory():
            say(f"each worker: {workers.call('plan', [()])[0]}")
        yield SpreadEvaluator(loaded, task.levels, workers, alone=alone, say=say)


def spread_over(means: Means, say: Say, *, trust_remote_code: bool) -> Spread | None:
    """What solves blocks of a bank by workers, if there are to be any; what they leave is solved by this process.

    Each round gives every worker one block, the next ones of the model: the text then only ever moves forward in a
    worker, whichever block it gets, and finished blocks can be written after each round.
    """
    if means.workers_at is None:
        return None

    def solve(plan: BankPlan, numbers: Sequence[int]) -> Iterator[tuple[int, SolvedBlock]]:
        model = _Model.of(plan.loaded, means, trust_remote_code=trust_remote_code)
        holding = BlocksHolding(model, plan.recipe, plan.calibration, plan.header)
        left = list(numbers)
        with _started(means, holding, plan.loaded, say) as workers:
            while left:
                part = left[: max(1, len(workers))]
                try:
                    solved = workers.call("solve", [(number,) for number in part])
                except WorkersError as error:
                    say(f"{error}; this process goes on by itself")
                    break
                yield from zip(part, solved, strict=True)
                del left[: len(part)]
        yield from _solved_here(plan, left)

    return solve


def _solved_here(plan: BankPlan, numbers: Iterable[int]) -> Iterator[tuple[int, SolvedBlock]]:
    solver = BlockSolver(plan)
    with _no_progress() as progress:
        for number in numbers:
            yield number, solver.solve(number, progress)


def _started(means: Means, holding: Holding, loaded: LoadedModel, say: Say) -> Crew:
    """Workers that hold the same; on CUDA each has a device of its own."""
    at = means.workers_at
    assert at is not None
    gpus = int(loaded.device.type == "cuda")
    if not gpus and at.count is None:  # one for each core would be as many models in the memory of each machine
        raise DeviceError(f"say how many workers a cluster is to have where they run on CPUs: {at}?workers=8")
    seconds, make = means.worker_seconds, partial(Worker, holding)
    return Crew(lambda: Workers(at, make, seconds=seconds, gpus=gpus, say=say), _put, say)


def _put(content: bytes) -> Any:
    import ray

    return ray.put(content)


def _on_cpu(form: Form) -> Form:
    values = {field.name: getattr(form, field.name) for field in fields(form)}
    moved: Any = {name: value.cpu() for name, value in values.items() if isinstance(value, Tensor)}
    return replace(form, **moved)


def _no_progress() -> ProgressTask:
    return progress_task("", 0, quiet=True)


def _differing(asked: str, got: str) -> str:
    return f"fingerprint {got[:12]} there, {asked[:12]} here"


def _unheard(line: str) -> None:
    """Say nothing."""
