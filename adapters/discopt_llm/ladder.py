"""A ladder: one search for each of several budgets of a model, from the smallest budget up.

The searches share the model, the banks and their unpacked weights, the texts, and what heuristics measure: what a unit
loses by itself at a level is the same at every budget. Each begins with what the one before it found, as it is and
raised to its own budget: the most that the units' own effects promise for the budget that came free, no unit lowered.
These are candidates beside all that a search at that budget begins with by itself, and they take part in its final
choice. Searching upwards, what was found for less is always within the next budget, so that a larger model is taken
over from a smaller one wherever that one loses less on the text of the choice. Lowered answers of larger budgets have
no such claim; and where the effects add up, lowering by them leads to the additive profile, which takes part anyway.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from discopt.errors import BudgetError, RunFolderError
from discopt.folder import RunFolder, request_of
from discopt.optimizers.base import StopReason
from discopt.report import option_words
from discopt.separable import solve_separable
from discopt.space import Levels as LevelNumbers
from discopt.space import SearchSpace
from discopt_llm.bank_search import BankSearchRequest, CompressRequest, QuantizeRequest, SparsifyRequest
from discopt_llm.budget import Budget, Measure
from discopt_llm.drop_search import DropRequest, share_of
from discopt_llm.evaluator import Measurer
from discopt_llm.heldout import Method
from discopt_llm.heuristics import Heuristics, Remembered
from discopt_llm.ladder_report import PICTURE, write_ladder
from discopt_llm.means import checked_means
from discopt_llm.request import STARTS, Prepared, Say, SearchRequest, Task
from discopt_llm.search import (
    asked_of,
    check_began_with,
    discarded_if_refused,
    feasible_start,
    note_banks,
    search_in,
)
from discopt_llm.workers import measuring

__all__ = ["LadderRequest", "Rung", "ladder", "raised", "resume_ladder"]

COMMAND = "llm ladder"  # as run.json has it
SHARED = "heuristics.json"  # of the ladder: what has been measured for all budgets
_KINDS: dict[str, type[SearchRequest]] = {
    kind.command: kind for kind in (QuantizeRequest, SparsifyRequest, CompressRequest, DropRequest)
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rung:
    """One budget of a ladder."""

    budget: Budget
    request: SearchRequest

    @property
    def name(self) -> str:
        """Of its folder, and in tables: "3", "2.5", "60" for a sparsity of 60%, "0.5x", "80MB"."""
        return str(self.budget).removesuffix("%")


@dataclass(frozen=True)
class LadderRequest:
    """What was asked of a search with several budgets. Raises ValueError for values that make no sense."""

    search: str  # its command, such as "llm quantize"
    measure: Measure  # the option that holds the budgets
    budgets: tuple[str, ...]
    options: Mapping[str, Any]  # all others, as the search's request has them

    def __post_init__(self) -> None:
        if self.search not in _KINDS:
            raise ValueError(f"search must be one of {', '.join(_KINDS)}, got {self.search!r}")
        if len(self.budgets) < 2:
            got = ", ".join(self.budgets) or "none"
            raise ValueError(f"--{self.measure} takes one budget, or several with commas between them, got {got}")
        seen: dict[str, str] = {}
        for rung, text in zip(self.rungs, self.budgets, strict=True):
            if rung.name in seen:
                raise ValueError(f"--{self.measure} must name each budget once, got {seen[rung.name]} and {text}")
            seen[rung.name] = text

    @classmethod
    def of(cls, kind: type[SearchRequest], measure: Measure, options: Mapping[str, Any]) -> LadderRequest:
        """From a request's options, one of which has several budgets with commas between them."""
        budgets = tuple(part.strip() for part in options[measure].split(",") if part.strip())
        return cls(kind.command, measure, budgets, {name: v for name, v in options.items() if name != measure})

    @cached_property
    def rungs(self) -> tuple[Rung, ...]:
        """The budgets with their searches, in the order in which they were given."""
        options: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in self.options.items()}
        rungs = []
        for text in self.budgets:
            options[self.measure] = share_of(text) if self.search == DropRequest.command else text
            rungs.append(Rung(Budget.parse(self.measure, text), _KINDS[self.search](**options)))
        return tuple(rungs)

    @property
    def foundation(self) -> SearchRequest:
        """The search whose model, texts and levels all share.

        A sparsity bank that is built for a sparsity has that in its middle: here it is midway between the outer ones.
        """
        request = self.rungs[0].request
        if self.measure != "sparsity" or not isinstance(request, BankSearchRequest) or request.banks:
            return request
        amounts = [rung.budget.amount for rung in self.rungs]
        return replace(request, sparsity=str(Budget(self.measure, (min(amounts) + max(amounts)) / 2)))

    def ascending(self, prepared: Prepared) -> tuple[Rung, ...]:
        """The budgets as this model has them, smallest first; raises BudgetError for one that cannot be met.

        And for two that come to the same.
        """
        rungs, loaded = self.rungs, prepared.loaded
        spaces = self.foundation.spaces(loaded, [rung.request for rung in rungs])
        order = sorted(range(len(rungs)), key=lambda i: spaces[i].budget.tolist())
        for i, j in pairwise(order):
            if (spaces[i].budget == spaces[j].budget).all():
                words = " and ".join(rungs[k].budget.words for k in sorted((i, j)))
                raise BudgetError(f"{words} come to the same for {loaded.source}; leave one out")
        return tuple(rungs[i] for i in order)

    def command_line(self, out: Path) -> str:
        """The command that asks for this."""
        request = self.rungs[0].request
        repeated = {"stages": "--stage", "banks": "--bank"}
        words = option_words(request, skip=("model", self.measure), repeated=repeated)
        budgets = [f"--{self.measure}", ",".join(self.budgets)]
        return shlex.join(["discopt", *self.search.split(), request.model, *budgets, *words, "--out", str(out)])


def ladder(
    request: LadderRequest, out: Path, *, force: bool = False, quiet: bool = False, say: Say = _log.info
) -> dict[str, Any]:
    """Search at every budget; returns what results.json holds.

    The folder gets an ordinary run folder for each budget. All budgets are checked before anything long is begun.
    Raises DiscoptError for a budget that cannot be met, and RunFolderError for a folder that is taken.
    """
    _check_free(request, out, force=force)
    prepared = Prepared.load(request.foundation, say)
    rungs = request.ascending(prepared)
    _clear(request, out)
    asked = {**asked_of(prepared), "command": COMMAND, "options": asdict(request)}
    folder = RunFolder.create(out, asked, force=force, artefacts=(PICTURE,))
    with ExitStack() as stack:
        with discarded_if_refused(folder):
            task = _task(prepared, rungs, folder, quiet=quiet, say=say)
            evaluator = stack.enter_context(measuring(prepared, task, say))
        return _Climb(request, prepared, task, evaluator, Remembered(), folder, quiet, say).run(rungs)


def resume_ladder(folder: RunFolder, *, quiet: bool, say: Say = _log.warning, **means: Any) -> dict[str, Any]:
    """Go on with a ladder that was stopped; returns what results.json holds. Finished budgets are not run again.

    `means` are options that may be others than those that it began with, see `MEANS`.
    """
    began = folder.request["options"]
    request = request_of(LadderRequest, {**began, "options": {**began["options"], **checked_means(means)}})
    if folder.has("results.json"):
        results: dict[str, Any] = folder.read_json("results.json")
        if results.get("stop") != StopReason.INTERRUPTED.value:
            say(f"{folder.path} is finished")
            return results
    folder.hold()
    tell: Say = (lambda line: None) if quiet else say
    prepared = Prepared.load(request.foundation, tell)
    check_began_with(prepared, folder)
    folder.remove_leftovers()
    remembered = Remembered.from_dict(folder.read_json(SHARED)) if folder.has(SHARED) else Remembered()
    rungs = request.ascending(prepared)
    task = _task(prepared, rungs, folder, quiet=quiet, say=tell)
    with measuring(prepared, task, tell) as evaluator:
        return _Climb(request, prepared, task, evaluator, remembered, folder, quiet, tell).run(rungs)


def raised(space: SearchSpace, profile: LevelNumbers, effects: NDArray[np.float64]) -> LevelNumbers:
    """The profile (n,) with units raised until the sum of effects (n, m) is least, none of them lowered: (n,).

    `profile` must be one of the space.
    """
    levels = np.arange(space.m)
    return solve_separable(space, np.where(levels >= profile[:, None], effects, np.inf))


@dataclass(frozen=True, eq=False)
class _Climb:
    """A ladder on its way up."""

    request: LadderRequest
    prepared: Prepared  # as the task, for the foundation
    task: Task
    evaluator: Measurer
    remembered: Remembered
    folder: RunFolder
    quiet: bool
    say: Say

    def run(self, rungs: Sequence[Rung]) -> dict[str, Any]:
        """Search at the budgets that are not finished, up to one that is interrupted."""
        found: list[tuple[Rung, dict[str, Any]]] = []
        interrupted = False
        for number, rung in enumerate(rungs, start=1):
            place = f"{number} of {len(rungs)}"
            results = self._search(rung, found[-1] if found else None, place)
            interrupted = results["stop"] == StopReason.INTERRUPTED.value
            if interrupted:
                break
            found.append((rung, results))
        points = [(rung.name, rung.budget.words, results) for rung, results in reversed(found)]
        return write_ladder(
            self.folder,
            points,
            title=self.task.title,
            command_line=self.request.command_line(self.folder.path),
            baselines=self.task.request.known_baselines,
            shared_tokens=self.remembered.tokens,
            interrupted=interrupted,
        )

    def _search(self, rung: Rung, below: tuple[Rung, dict[str, Any]] | None, place: str) -> dict[str, Any]:
        """What a budget's results.json holds, once it is there."""
        task = self.task.at(rung.request)
        prepared = replace(self.prepared, request=task.request, remembered=self.remembered)
        path = self.folder.path / rung.name
        begun = (path / "run.json").is_file()
        folder = RunFolder.open(path) if begun else RunFolder.create(path, asked_of(prepared))
        if folder.has("results.json"):
            results: dict[str, Any] = folder.read_json("results.json")
            if results["stop"] != StopReason.INTERRUPTED.value:
                return results
        self.say(f"{place}: {rung.budget.words}")
        note_banks(task, folder)
        folder.remove_leftovers()
        if not folder.has("heuristics.json"):
            heuristics = task.heuristics(prepared, self.evaluator, quiet=self.quiet)
            if below is not None:
                heuristics = replace(heuristics, neighbours=self._neighbours(task, prepared, heuristics, *below))
            self.folder.write_json(SHARED, asdict(self.remembered))
            folder.write_json("heuristics.json", heuristics.to_dict())
        label = f"{rung.name} ({place})"
        return search_in(folder, prepared, task, self.evaluator, quiet=self.quiet, going_on=True, label=label)

    def _neighbours(
        self, task: Task, prepared: Prepared, heuristics: Heuristics, rung: Rung, results: Mapping[str, Any]
    ) -> tuple[Method, ...]:
        """The answer of the next smaller budget, as it is and raised to this one."""
        answer = task.space.check(np.array(results["profile"]))
        effects = task.expected(heuristics, prepared, quiet=self.quiet)
        tokens = results["rows"][-1]["tokens"]
        name = f"answer for {rung.budget}"
        higher = raised(task.space, answer, effects)
        return Method(name, answer, tokens), Method(f"{name}, raised", higher, tokens)


def _task(prepared: Prepared, rungs: Sequence[Rung], folder: RunFolder, *, quiet: bool, say: Say) -> Task:
    """The levels that all budgets share; raises DiscoptError where they, or a given start, do not fit the ladder."""
    request = prepared.request
    task = request.task(prepared.loaded, folder.path, quiet=quiet, say=say)
    note_banks(task, folder)
    smallest, *_ = [task.at(rung.request).space for rung in rungs]
    if request.chosen.start not in STARTS:
        feasible_start(request.chosen.start, task.read(request.chosen.start), smallest)
    return task


def _check_free(request: LadderRequest, out: Path, *, force: bool) -> None:
    """Raise RunFolderError where the ladder's folder, or that of a budget, cannot be had."""
    RunFolder.check_free(out, force=force, artefacts=(PICTURE,))
    for rung in request.rungs:
        RunFolder.check_free(out / rung.name, force=force)


def _clear(request: LadderRequest, out: Path) -> None:
    """Remove the runs of a ladder that was here before, and those that are where the new ones will be."""
    rungs = [*request.rungs]
    with suppress(RunFolderError):  # where there was none
        before = RunFolder.open(out)
        if before.request["command"] == COMMAND:
            rungs += request_of(LadderRequest, before.request["options"]).rungs
    for name in {rung.name for rung in rungs}:
        if (out / name / "run.json").is_file():
            RunFolder.open(out / name).discard()
