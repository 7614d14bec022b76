"""From a request to a run folder: load, search, compare on held-out text; the same for every kind of compression.

What differs between the kinds is in `discopt_llm.request`: a request makes a `Task`, which says where the levels come
from, which profiles meet the budget, and what to compare with.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from discopt.errors import DiscoptError, RunFolderError
from discopt.folder import RunFolder, distribution_version, request_of
from discopt.optimizers.base import Optimizer, StopReason
from discopt.optimizers.evopress import EvoPress, EvoPressSettings
from discopt.optimizers.learning import Learning
from discopt.optimizers.learning_settings import LearningSettings
from discopt.optimizers.plan import Plan
from discopt.progress import ProgressBar
from discopt.run import Limits, Result, minimize
from discopt.space import Levels as LevelNumbers
from discopt.space import SearchSpace
from discopt_llm.errors import ProfileError
from discopt_llm.evaluator import TEACHER, Measurer
from discopt_llm.heldout import Method, heldout_scores, score_rows
from discopt_llm.heuristics import Heuristics
from discopt_llm.means import checked_means
from discopt_llm.report import write_run
from discopt_llm.report_record import samples_json
from discopt_llm.request import STARTS, Prepared, Say, SearchRequest, Task
from discopt_llm.workers import measuring

__all__ = [
    "asked_of",
    "begin",
    "check_began_with",
    "discarded_if_refused",
    "feasible_start",
    "note_banks",
    "optimizer_of",
    "resume",
    "search_in",
]

_log = logging.getLogger(__name__)


def begin(request: SearchRequest, out: Path, *, force: bool, quiet: bool, say: Say = _log.info) -> dict[str, Any]:
    """Run a search from its start; returns what results.json holds. The run folder is made once all is loaded."""
    RunFolder.check_free(out, force=force)
    prepared = Prepared.load(request, say)
    folder = RunFolder.create(out, asked_of(prepared), force=force)
    with ExitStack() as stack:
        with discarded_if_refused(folder):
            task = _task(prepared, folder, quiet=quiet, say=say)
            evaluator = stack.enter_context(measuring(prepared, task, say))
        return search_in(folder, prepared, task, evaluator, quiet=quiet, going_on=False)


@contextmanager
def discarded_if_refused(folder: RunFolder) -> Iterator[None]:
    """A run that cannot be had leaves no folder: to go on with it would fail in the same way."""
    try:
        yield
    except RunFolderError:  # such as a full disk
        raise
    except DiscoptError:
        folder.discard()
        raise


def asked_of(prepared: Prepared) -> dict[str, Any]:
    """What run.json says of a search."""
    request = prepared.request
    return {
        "command": request.command,
        "options": asdict(request),
        "seed": request.seed,
        "directory": Path.cwd(),
        "model": {"source": prepared.loaded.source, "fingerprint": prepared.loaded.fingerprint},
        "calibration": prepared.calibration.fingerprint,
        "versions": {name: distribution_version(name) for name in ("torch", "transformers")},
    }


def resume(
    kind: type[SearchRequest], folder: RunFolder, *, quiet: bool, say: Say = _log.warning, **means: Any
) -> dict[str, Any]:
    """Go on with a run that was stopped; returns what results.json holds.

    A time limit that ended the run is lifted. A finished run is not run again. `means` are options that may be others
    than those that the run began with, see `MEANS`.
    """
    request = request_of(kind, {**folder.request["options"], **checked_means(means)})
    if folder.has("results.json"):
        results: dict[str, Any] = folder.read_json("results.json")
        if results.get("stop") == StopReason.TIME.value:
            request = replace(request, max_seconds=None)
        elif results.get("stop") != StopReason.INTERRUPTED.value:
            say(f"{folder.path} is finished: {results.get('stop')}")
            return results
    folder.hold()
    tell = _silent if quiet else say
    prepared = Prepared.load(request, tell)
    check_began_with(prepared, folder)
    folder.remove_leftovers()
    task = _task(prepared, folder, quiet=quiet, say=tell)
    with measuring(prepared, task, tell) as evaluator:
        return search_in(folder, prepared, task, evaluator, quiet=quiet, going_on=True)


def check_began_with(prepared: Prepared, folder: RunFolder) -> None:
    """Raise RunFolderError unless the run in the folder began with this model and this text."""
    for what, began, now in (
        ("model", folder.request["model"]["fingerprint"], prepared.loaded.fingerprint),
        ("calibration text", folder.request["calibration"], prepared.calibration.fingerprint),
    ):
        if began != now:
            raise RunFolderError(f"the {what} is not the one that {folder.path} began with; start a new run")


def _silent(line: str) -> None:
    """Say nothing."""


def _task(prepared: Prepared, folder: RunFolder, *, quiet: bool, say: Say) -> Task:
    """What is to be searched; RunFolderError if its banks are not those that the run began with."""
    request = prepared.request
    task = request.task(prepared.loaded, folder.path, quiet=quiet, say=say)
    _given_start(request, task)
    note_banks(task, folder)
    return task


def note_banks(task: Task, folder: RunFolder) -> None:
    """Write down which banks a run takes its levels from; RunFolderError if it began with others."""
    banks = list(task.bank_fingerprints)
    if folder.request.get("banks", banks) != banks:
        raise RunFolderError(f"the bank is not the one that {folder.path} began with; start a new run")
    if banks:
        folder.update_request(banks=banks)


def _given_start(request: SearchRequest, task: Task) -> LevelNumbers | None:
    """The profile (n,) to start from, if one was given."""
    start = request.chosen.start
    return None if start in STARTS else feasible_start(start, task.read(start), task.space)


def search_in(
    folder: RunFolder,
    prepared: Prepared,
    task: Task,
    evaluator: Measurer,
    *,
    quiet: bool,
    going_on: bool,
    label: str = "search",
) -> dict[str, Any]:
    """Search in a run folder, from its checkpoint and its heuristics if it goes on and has them; `label` names it.

    Returns what results.json holds.
    """
    request = prepared.request
    given = _given_start(request, task)
    if going_on and folder.has("heuristics.json"):
        heuristics = Heuristics.from_dict(folder.read_json("heuristics.json"), task.space)
    else:
        heuristics = task.heuristics(prepared, evaluator, quiet=quiet)
        folder.write_json("heuristics.json", heuristics.to_dict())
    optimizer = optimizer_of(prepared, task, heuristics, given)
    objective = prepared.objective(evaluator)
    with ProgressBar(unit="tokens", label=label, quiet=quiet) as bar:
        result = minimize(
            objective,
            task.space,
            optimizer=optimizer,
            limits=Limits(seconds=request.max_seconds),
            callbacks=(bar,),
            folder=folder,
            resume=going_on,
        )
    rows: list[dict[str, Any]] = []
    if result.stop is not StopReason.INTERRUPTED:
        methods = _methods(prepared, task, heuristics, result)
        profiles = np.stack([method.profile for method in methods])
        scores = heldout_scores(evaluator, profiles, prepared.heldout, quiet=quiet)
        rows = score_rows(scores, evaluator.model, task.levels, methods)
        folder.write_text("heldout.json", samples_json([m.name for m in methods], scores.kl, scores.nll))
    choice = _choice(optimizer, heuristics) if isinstance(optimizer, Learning) else []
    return write_run(prepared, task, result, rows, folder, choice)


def feasible_start(path: str, profile: LevelNumbers, space: SearchSpace) -> LevelNumbers:
    """The profile (n,) read from `path`; raises ProfileError if it does not meet the budget."""
    try:
        return space.check(profile)
    except ValueError as error:
        raise ProfileError(f"{path} cannot start this search: {error}") from error


def _choice(optimizer: Learning, heuristics: Heuristics) -> list[dict[str, Any]]:
    """The final choice, the chosen first: `method`, `loss`, `difference` to the chosen one and `standard_error`."""
    names: dict[bytes, list[str]] = {}
    for method in (*heuristics.methods, *heuristics.neighbours):
        names.setdefault(method.profile.tobytes(), []).append(method.name)
    return [
        {
            "method": " = ".join(names.get(finalist.profile.tobytes(), ["found by the search"])),
            "loss": finalist.loss,
            "difference": finalist.difference,
            "standard_error": finalist.standard_error,
        }
        for finalist in optimizer.choice
    ]


def optimizer_of(
    prepared: Prepared, task: Task, heuristics: Heuristics, given: LevelNumbers | None = None
) -> Optimizer:
    """The search that was asked for; `given` (n,) is a profile to start from instead of the heuristics'.

    A learning search spends what the generations of EvoPress would.
    """
    request = prepared.request
    settings = _settings(request, task, heuristics, given)
    if request.chosen.algorithm == "evopress":
        return EvoPress(task.space, settings, seed=request.seed)
    fidelity = settings.stages[-1].fidelity
    start = given if given is not None else heuristics.start
    random = request.chosen.start != "heuristics" and start is None
    plan = Plan(
        evaluations=max(1, round(settings.generations * settings.generation_fidelity / fidelity)),
        batch=settings.offspring,
        fidelity=fidelity,
        start=None if start is None else _numbers(start),
    )
    assert prepared.reserved is not None
    references = (*heuristics.references, *(method.profile for method in heuristics.neighbours))
    learning = LearningSettings(
        rivals=settings.rivals,
        references=tuple(map(_numbers, references)),
        prior=heuristics.prior,
        first=settings.stages[0].fidelity,
        choice=prepared.reserved.tokens,
        candidates=settings.start_candidates if random else 0,
    )
    return Learning(task.space, plan, learning, seed=request.seed)


def _settings(
    request: SearchRequest, task: Task, heuristics: Heuristics, given: LevelNumbers | None
) -> EvoPressSettings:
    changes = task.changes()
    rivals = [method.profile for method in heuristics.neighbours]
    if given is not None:
        changes["start"] = _numbers(given)
    elif request.chosen.start == "heuristics":
        if heuristics.start is not None:
            changes["start"] = _numbers(heuristics.start)
        rivals = [*heuristics.rivals, *rivals]
    elif request.chosen.start == "random":
        changes["start"] = "random"
    return request.settings(**changes, rivals=tuple(map(_numbers, rivals)))


def _numbers(profile: LevelNumbers) -> tuple[int, ...]:
    return tuple(int(level) for level in profile)


def _methods(prepared: Prepared, task: Task, heuristics: Heuristics, result: Result) -> Sequence[Method]:
    """The rows of the table: dense, the baselines asked for, and what the search found, with all it spent."""
    request = prepared.request
    methods = [Method("dense", np.full(task.space.n, TEACHER, dtype=np.int16), 0)]
    random = request.known_baselines["random"]
    measured = any(method.name == random for method in heuristics.methods)
    if "random" in request.compared and not measured and result.start is not None and result.start.fidelity:
        spent = request.chosen.start_candidates * result.start.fidelity
        methods.append(Method(random, result.start.profile, spent))
    guided = heuristics.tokens if request.chosen.start == "heuristics" else 0
    methods += [*heuristics.methods, *heuristics.neighbours]
    return [*methods, Method("evolved", result.profile, result.total_fidelity + guided)]
