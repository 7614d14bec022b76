"""`discopt llm compare`: every method on one model, from the same levels, the same texts and the same budget.

Each run of a method with a seed leaves a file, so that the same command goes on where it was stopped, and runs only
what is missing when it is given again with more methods or seeds.
"""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from discopt.errors import DiscoptError, RunFolderError
from discopt.folder import RunFolder, distribution_version, request_of
from discopt.report import option_words
from discopt_llm.bank_search import BankTask, QuantizeRequest, SparsifyRequest
from discopt_llm.budget import Budget
from discopt_llm.compare_report import PICTURE, write_comparison
from discopt_llm.drop_search import DropRequest, DropTask
from discopt_llm.errors import ModelError
from discopt_llm.evaluator import Measurer
from discopt_llm.heldout import Method, heldout_scores, score_rows
from discopt_llm.means import MEANS, Means, checked_means
from discopt_llm.methods import DENSE, METHODS, TASKS, Context, Found, Point
from discopt_llm.request import Prepared, SearchRequest, Task
from discopt_llm.search import discarded_if_refused
from discopt_llm.workers import measuring

__all__ = ["CompareRequest", "compare", "resume_compare"]

COMMAND = "llm compare"
LEAST_GENERATIONS = 40  # of the searches, unless a number is asked for
POINTS = 12  # of a search's curve, at most
_KINDS: dict[str, type[SearchRequest]] = {
    "drop": DropRequest,
    "sparsity": SparsifyRequest,
    "quantization": QuantizeRequest,
}
_OWN = ("task", "target", "methods", "seeds", "bank_method")  # options that no search has by that name
_FREE = ("methods", "seeds", *MEANS)  # options that may differ when a comparison goes on

Say = Callable[[str], None]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CompareRequest(Means):
    """What was asked of `discopt llm compare`, one field per option; None takes the preset's value.

    Raises ValueError for values that make no sense.
    """

    model: str
    task: str  # one of TASKS
    target: str  # share to drop, share of zeros, or average bits
    methods: tuple[str, ...] | None = None  # None: all that the task has
    seeds: int = 3
    unit: str = "sublayer"
    protect: tuple[int, ...] = ()
    banks: tuple[str, ...] = ()
    bank_method: str | None = None
    group: str = "size"
    widths: tuple[int, ...] = (2, 3, 4, 5, 6)
    group_size: int = 128
    symmetric: bool = False
    levels: int = 17
    step: int | None = None
    bank_tokens: int | None = None
    preset: str = "fast"
    generations: int | None = None  # None: those of the preset, but at least LEAST_GENERATIONS
    offspring: int | None = None
    stages: tuple[str, ...] = ()
    fitness: str = "kl"
    calibration: str = "builtin"
    calibration_tokens: int | None = None
    sequence_length: int | None = None
    eval_data: str | None = None
    eval_tokens: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {self.task!r}")
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")
        known = [name for name, method in METHODS.items() if self.task in method.tasks]
        if self.methods == ():
            raise ValueError(f"methods must be all, or among {', '.join(known)}, got none")
        for name in self.methods or ():
            if name not in METHODS:
                raise ValueError(f"methods must be among {', '.join(known)}, got {name}")
            if name not in known:
                raise ValueError(f"{name} is no method for {self.task}; those are {', '.join(known)}, got {name}")
        mine = {field.name for field in fields(_KINDS[self.task])} | {*_OWN}
        for field in fields(self):
            if field.name not in mine and getattr(self, field.name) != field.default:
                raise ValueError(f"{field.name} is no option for {self.task}, got {getattr(self, field.name)}")
        if self.bank_method is not None and self.task == "drop":
            raise ValueError(f"bank_method is no option for drop, got {self.bank_method}")
        _ = self.search

    @cached_property
    def search(self) -> SearchRequest:
        """The search that all methods have their budget, levels and texts from."""
        kind = _KINDS[self.task]
        shared = {field.name for field in fields(self)} & {field.name for field in fields(kind)}
        options = {name: getattr(self, name) for name in shared}
        if self.task == "drop":
            options["sparsity"] = float(Budget.parse("sparsity", self.target).amount)
        else:
            options["bits" if self.task == "quantization" else "sparsity"] = self.target
        if self.bank_method is not None:
            options["method"] = self.bank_method
        return kind(**options, start="auto", baselines=(), algorithm="learning")

    @property
    def chosen_methods(self) -> tuple[str, ...]:
        """In the order of the table."""
        return tuple(
            name
            for name, method in METHODS.items()
            if self.task in method.tasks and (self.methods is None or name in self.methods)
        )

    @property
    def jobs(self) -> tuple[tuple[str, int], ...]:
        """Methods with their seeds; those that chance has no part in run once."""
        return tuple(
            (name, seed) for name in self.chosen_methods for seed in range(self.seeds if METHODS[name].seeded else 1)
        )

    def command_line(self, out: Path) -> str:
        """The command that asks for this."""
        words = option_words(self, skip=("model",), repeated={"stages": "--stage", "banks": "--bank"})
        return shlex.join(["discopt", *COMMAND.split(), self.model, *words, "--out", str(out)])


def compare(
    request: CompareRequest, out: Path, *, force: bool = False, quiet: bool = False, say: Say = _log.info
) -> dict[str, Any]:
    """Run every method with every seed, but for those that have run; returns what results.json holds.

    `force` replaces what is in the folder. Raises DiscoptError for a target that cannot be met, and RunFolderError for
    a folder that holds something else, or a comparison with other options.
    """
    going_on = not force and (out / "run.json").is_file()
    if going_on:
        folder = RunFolder.open(out)
        _check_same(request, folder)
        folder.hold()
    else:
        RunFolder.check_free(out, force=force, artefacts=(PICTURE,))
    prepared = Prepared.load(request.search, say)
    same = {
        "model": {"source": prepared.loaded.source, "fingerprint": prepared.loaded.fingerprint},
        "calibration": prepared.calibration.fingerprint,
        "heldout": prepared.heldout.fingerprint,
    }
    if going_on:
        _check_began_with(folder, same)
        folder.update_request(options=asdict(request))
        folder.remove_leftovers()
    else:
        versions = {name: distribution_version(name) for name in ("torch", "transformers")}
        asked = {"command": COMMAND, "options": asdict(request), "directory": Path.cwd(), **same, "versions": versions}
        folder = RunFolder.create(out, asked, force=force, artefacts=(PICTURE,))
        _forget_runs(folder)
    with ExitStack() as stack:
        with nullcontext() if going_on else discarded_if_refused(folder):
            task = _task(request, prepared, folder, quiet=quiet, say=say)
            evaluator = stack.enter_context(measuring(prepared, task, say))
        context = _context(request, prepared, task, evaluator, quiet=quiet)
        records = _run_all(request, context, folder, say)
        return write_comparison(request, context, records, folder)


def resume_compare(folder: RunFolder, *, quiet: bool, say: Say = _log.warning, **means: Any) -> dict[str, Any]:
    """Go on with a comparison that was stopped; `means` are options that may be others now, see `MEANS`."""
    request = request_of(CompareRequest, {**folder.request["options"], **checked_means(means)})
    return compare(request, folder.path, quiet=quiet, say=say)


def _check_same(request: CompareRequest, folder: RunFolder) -> None:
    """Raise RunFolderError unless the folder holds this comparison, with whatever methods and seeds."""
    path = folder.path
    if folder.request["command"] != COMMAND:
        raise RunFolderError(f"{path} is a run of discopt {folder.request['command']}; choose another --out")
    before = request_of(CompareRequest, folder.request["options"])
    for field in fields(request):
        was, now = getattr(before, field.name), getattr(request, field.name)
        if field.name not in _FREE and was != now:
            raise RunFolderError(
                f"{path} holds a comparison with {field.name} {was}, got {now}; choose another --out, or pass --force"
            )


def _check_began_with(folder: RunFolder, now: dict[str, Any]) -> None:
    for what, value in now.items():
        if folder.request.get(what, value) != value:
            raise RunFolderError(f"the {what} is not that of {folder.path} any more; choose another --out")


def _forget_runs(folder: RunFolder) -> None:
    """Remove the runs of a comparison that was here before."""
    for name in METHODS:
        for path in (folder.path / "results").glob(f"{name}-[0-9]*.json"):
            path.unlink()


def _task(request: CompareRequest, prepared: Prepared, folder: RunFolder, *, quiet: bool, say: Say) -> Task:
    """The levels and the budget that all methods share."""
    task = request.search.task(prepared.loaded, folder.path, quiet=quiet, say=say)
    banks = {"banks": list(task.bank_fingerprints)}
    _check_began_with(folder, banks)
    folder.update_request(**banks)
    return task


def _context(request: CompareRequest, prepared: Prepared, task: Task, evaluator: Measurer, *, quiet: bool) -> Context:
    """What all methods share, with the number of generations that the searches get."""
    assert isinstance(task, DropTask | BankTask)
    context = Context(prepared, task, evaluator, quiet)
    if request.generations is not None:
        return context
    planned = request.search.settings(**task.changes()).generations
    return context.asked(request.search.seed, generations=max(planned, LEAST_GENERATIONS))


def _run_all(request: CompareRequest, context: Context, folder: RunFolder, say: Say) -> list[dict[str, Any]]:
    """The records of all jobs, those that were there already read back."""
    try:
        (folder.path / "results").mkdir(exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"cannot make {folder.path / 'results'}: {error.strerror}") from error
    runs = RunFolder(folder.path / "results", folder.request)
    for leftover in runs.path.glob(".*.tmp"):  # of a process that was killed while writing
        leftover.unlink()
    records = []
    for number, (name, seed) in enumerate(request.jobs, start=1):
        file = f"{name}-{seed}.json"
        if not runs.has(file):
            say(f"{number} of {len(request.jobs)}: {METHODS[name].title}, seed {seed}")
            runs.write_json(file, _record(context, name, seed, say))
        records.append(runs.read_json(file))
    if all("error" in record for record in records):
        raise DiscoptError(f"no method has a profile for this: {records[0]['error']}")
    return records


def _record(context: Context, name: str, seed: int, say: Say) -> dict[str, Any]:
    """What a method found, what that took, and what it is worth on the held-out text."""
    began = time.monotonic()
    try:
        found = METHODS[name].run(context, seed)
    except ModelError as error:  # such as protected blocks in the way of a window
        say(f"no {METHODS[name].title}: {error}")
        return {"method": name, "seed": seed, "error": str(error)}
    seconds = time.monotonic() - began
    shown = [Point(found.tokens, found.profile), *thinned(found)]
    methods = [Method(METHODS[name].title, point.profile, point.tokens) for point in shown]
    population = np.stack([method.profile for method in methods])
    scores = heldout_scores(context.evaluator, population, context.prepared.heldout, quiet=context.quiet)
    row, *curve = score_rows(scores, context.prepared.loaded.model, context.task.levels, methods)
    return {
        "method": name,
        "seed": seed,
        "profile": found.profile,
        "met": None if name == DENSE else context.task.met(found.profile),
        "row": {**row, "seconds": round(seconds, 3)},
        "kl": scores.kl[0],
        "curve": [
            {"tokens": point.tokens, "kl": at["kl"], "kl_error": at["kl_error"], "profile": point.profile}
            for point, at in zip(shown[1:], curve, strict=True)
        ],
    }


def thinned(found: Found) -> Sequence[Point]:
    """What a search had found at no more than POINTS times, evenly in the logarithm of the tokens, first and last."""
    trace = found.trace
    if len(trace) <= POINTS:
        return trace
    first = max(trace[0].tokens, trace[1].tokens)
    times = np.geomspace(first, trace[-1].tokens, POINTS - 1)
    at = np.searchsorted([point.tokens for point in trace], times * (1 + 1e-9), side="right") - 1
    return [trace[i] for i in sorted({0, *at.tolist(), len(trace) - 1})]
