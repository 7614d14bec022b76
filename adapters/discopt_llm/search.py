"""From a request to a run folder: load, search, compare on held-out text; the same for every kind of compression.

A kind of compression is a `Task`: where the levels come from, which profiles meet the budget, and what to compare
with. The commands' requests say how to make one.
"""

from __future__ import annotations

import logging
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from discopt.errors import BudgetError, RunFolderError
from discopt.folder import RunFolder, distribution_version, request_of
from discopt.optimizers.base import Optimizer, StopReason
from discopt.optimizers.evopress import EvoPress, EvoPressSettings, Stage
from discopt.optimizers.learning import Learning
from discopt.optimizers.learning_settings import LearningSettings
from discopt.optimizers.plan import Plan
from discopt.progress import ProgressBar
from discopt.report import option_words
from discopt.run import Limits, Result, minimize
from discopt.space import Levels as LevelNumbers
from discopt.space import SearchSpace
from discopt_llm.calibration import Calibration, load_calibration
from discopt_llm.errors import BankError, DataError, ModelError, ProfileError
from discopt_llm.evaluator import TEACHER, Evaluator
from discopt_llm.fitness import Fitness, fitness_by_name
from discopt_llm.heldout import Method, StudentLevels, heldout_scores, score_rows
from discopt_llm.heuristics import Heuristics, Remembered
from discopt_llm.models import LoadedModel, load_model
from discopt_llm.objective import CompressionObjective
from discopt_llm.presets import Preset
from discopt_llm.profile import Profile
from discopt_llm.report import write_run
from discopt_llm.report_record import samples_json

__all__ = [
    "STARTS",
    "Heuristics",
    "Prepared",
    "SearchRequest",
    "Task",
    "asked_of",
    "begin",
    "check_began_with",
    "feasible_start",
    "note_banks",
    "optimizer_of",
    "resume",
    "search_in",
]

# Where a search starts: as Algorithm 1 has it (uniform if that spends the budget, else random), from the best random
# profile, or from the best of that start and the heuristics that the task knows.
STARTS = ("auto", "random", "heuristics")
ALGORITHMS = ("learning", "evopress")
MOST_RESERVED = 1 / 4  # of the calibration text, for the final choice

Say = Callable[[str], None]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SearchRequest(ABC):
    """What was asked of a search, one field per option; None takes the preset's value.

    Raises ValueError for values that make no sense.
    """

    command: ClassVar[str]  # as run.json has it
    presets: ClassVar[Mapping[str, Preset]]
    known_baselines: ClassVar[Mapping[str, str]]  # name -> what its row is called

    model: str
    preset: str = "fast"
    calibration: str = "builtin"
    calibration_tokens: int | None = None
    sequence_length: int | None = None
    eval_data: str | None = None  # None: the held-out side of the calibration source
    eval_tokens: int | None = None
    generations: int | None = None
    offspring: int | None = None
    stages: tuple[str, ...] = ()
    algorithm: str | None = None  # one of ALGORITHMS
    start: str | None = None  # one of STARTS, or a profile to start from
    fitness: str = "kl"
    baselines: tuple[str, ...] | None = None  # None: all
    max_seconds: float | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.preset not in self.presets:
            raise ValueError(f"preset must be one of {', '.join(self.presets)}, got {self.preset!r}")
        if unknown := [name for name in self.baselines or () if name not in self.known_baselines]:
            raise ValueError(f"baselines must be among {', '.join(self.known_baselines)}, got {', '.join(unknown)}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if self.algorithm not in (None, *ALGORITHMS):
            raise ValueError(f"algorithm must be {' or '.join(ALGORITHMS)}, got {self.algorithm!r}")
        fitness_by_name(self.fitness)
        Limits(seconds=self.max_seconds)
        self.settings()

    @cached_property
    def chosen(self) -> Preset:
        """The preset with the options that replace its values."""
        preset = self.presets[self.preset]
        stages = tuple(Stage.parse(stage) for stage in self.stages) or preset.stages
        given = {
            name: getattr(self, name)
            for name in ("offspring", "sequence_length", "eval_tokens", "generations", "start", "algorithm")
            if getattr(self, name) is not None
        }
        return replace(preset, stages=stages, **given)

    @property
    def compared(self) -> tuple[str, ...]:
        """The baselines that get a row."""
        return tuple(self.known_baselines) if self.baselines is None else self.baselines

    def command_line(self, out: Path) -> str:
        """The command that asks for this."""
        words = option_words(self, skip=("model",), repeated={"stages": "--stage", "banks": "--bank"})
        return shlex.join(["discopt", *self.command.split(), self.model, *words, "--out", str(out)])

    def settings(self, **changes: Any) -> EvoPressSettings:
        """Settings of the search; `changes` are what only the task knows."""
        chosen = self.chosen
        known: dict[str, Any] = {
            "generations": 0 if chosen.generations is None else chosen.generations,
            "offspring": chosen.offspring,
            "stages": chosen.stages,
            "start_candidates": chosen.start_candidates,
            "start_fidelity": chosen.start_fidelity,
        }
        return EvoPressSettings(**{**known, **changes})

    @abstractmethod
    def check(self, loaded: LoadedModel) -> None:
        """Raise DiscoptError if this cannot be had of the model; before anything is made that takes long."""

    @abstractmethod
    def spaces(self, loaded: LoadedModel, requests: Sequence[Any]) -> list[SearchSpace]:
        """The profiles within the budgets of requests that differ from this one in that alone, from its levels.

        Raises DiscoptError for a budget that cannot be met.
        """

    @abstractmethod
    def task(self, loaded: LoadedModel, out: Path, *, quiet: bool, say: Say) -> Task:
        """What is to be searched, with all that it needs; `out` is the run's folder."""


class Task(ABC):
    """One kind of compression of one model, with its budget."""

    request: SearchRequest
    levels: StudentLevels
    space: SearchSpace

    @property
    def bank_fingerprints(self) -> tuple[str, ...]:
        """Of the banks that the levels come from."""
        return ()

    @abstractmethod
    def at(self, request: Any) -> Self:
        """The same levels for a request with another budget; the task's request names all that was built for it."""

    @abstractmethod
    def expected(self, heuristics: Heuristics, prepared: Prepared, *, quiet: bool) -> NDArray[np.float64]:
        """What each level of a unit is thought to add to the loss, (n, m), as far as the heuristics tell."""

    @property
    @abstractmethod
    def title(self) -> str:
        """Of the report."""

    @abstractmethod
    def read(self, path: str) -> LevelNumbers:
        """The profile (n,) in a file or run folder; raises ProfileError if it is none of this model's."""

    @abstractmethod
    def heuristics(self, prepared: Prepared, evaluator: Evaluator, *, quiet: bool) -> Heuristics:
        """The baselines that were asked for, and what competes for the start."""

    @abstractmethod
    def changes(self) -> dict[str, Any]:
        """What the task makes of the search's settings."""

    @abstractmethod
    def document(self, profile: LevelNumbers) -> Profile:
        """A profile (n,) as profile.json holds it."""

    @abstractmethod
    def text(self, profile: LevelNumbers) -> str:
        """A profile (n,) in the official text format."""

    @abstractmethod
    def asked(self) -> dict[str, Any]:
        """The budget as it was asked for."""

    @abstractmethod
    def met(self, profile: LevelNumbers) -> dict[str, Any]:
        """What a profile (n,) really keeps."""

    @abstractmethod
    def sentence(self, profile: LevelNumbers) -> str:
        """What was asked and what is met, for people."""

    @abstractmethod
    def listing(self, profile: LevelNumbers) -> str:
        """The profile for people, as Markdown."""

    @abstractmethod
    def draw(self, profile: LevelNumbers, path: Path) -> None:
        """The profile as a picture; raises DiscoptError without matplotlib."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a search needs besides its task, loaded and checked before the run folder is made."""

    request: SearchRequest
    loaded: LoadedModel
    calibration: Calibration
    heldout: Calibration
    reserved: Calibration | None = None  # text for the final choice, which the search never sees
    remembered: Remembered | None = None  # what heuristics have measured, where searches share it

    @classmethod
    def load(cls, request: SearchRequest, say: Say) -> Self:
        """Raises DiscoptError for a model, a budget or a text that cannot be used."""
        chosen = request.chosen
        say(f"loading {request.model}")
        loaded = load_model(
            request.model,
            device=request.device,
            dtype=request.dtype,
            trust_remote_code=request.trust_remote_code,
        )
        request.check(loaded)
        length = sequence_length(loaded, request.sequence_length, chosen.sequence_length)
        say(f"reading {request.calibration}")
        calibration = load_calibration(
            request.calibration, loaded.tokenizer, sequence_length=length, tokens=request.calibration_tokens
        )
        heldout = load_calibration(
            request.eval_data or request.calibration,
            loaded.tokenizer,
            sequence_length=length,
            tokens=chosen.eval_tokens,
            role="heldout" if request.eval_data in (None, request.calibration) else "all",
        )
        reserved = None
        if chosen.algorithm == "learning":
            wanted = min(2 * chosen.stages[-1].fidelity, int(MOST_RESERVED * calibration.tokens))
            calibration, reserved = calibration.split(wanted)
        needed = max(chosen.stages[-1].fidelity, chosen.start_fidelity)
        if needed > calibration.tokens:
            raise DataError(
                f"{request.calibration} has {calibration.tokens:,} tokens for the search, but a stage needs "
                f"{needed:,}; give smaller stages, such as --stage 1@{calibration.tokens}"
            )
        return cls(request, loaded, calibration, heldout, reserved)

    def objective(self, evaluator: Evaluator, fitness: Fitness | None = None) -> CompressionObjective:
        """The loss to search on: the request's fitness, or another."""
        return CompressionObjective(
            evaluator, self.calibration, fitness or fitness_by_name(self.request.fitness), self.reserved
        )


def begin(request: SearchRequest, out: Path, *, force: bool, quiet: bool, say: Say = _log.info) -> dict[str, Any]:
    """Run a search from its start; returns what results.json holds. The run folder is made once all is loaded."""
    RunFolder.check_free(out, force=force)
    prepared = Prepared.load(request, say)
    folder = RunFolder.create(out, asked_of(prepared), force=force)
    try:
        task = _task(prepared, folder, quiet=quiet, say=say)
    except (BankError, BudgetError, DataError, ProfileError):
        folder.discard()  # to go on with it would fail in the same way
        raise
    return search_in(folder, prepared, task, Evaluator(prepared.loaded, task.levels), quiet=quiet, going_on=False)


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


def resume(kind: type[SearchRequest], folder: RunFolder, *, quiet: bool, say: Say = _log.warning) -> dict[str, Any]:
    """Go on with a run that was stopped; returns what results.json holds.

    A time limit that ended the run is lifted. A finished run is not run again.
    """
    request = request_of(kind, folder.request["options"])
    if folder.has("results.json"):
        results: dict[str, Any] = folder.read_json("results.json")
        if results.get("stop") == StopReason.TIME.value:
            request = replace(request, max_seconds=None)
        elif results.get("stop") != StopReason.INTERRUPTED.value:
            say(f"{folder.path} is finished: {results.get('stop')}")
            return results
    tell = _silent if quiet else say
    prepared = Prepared.load(request, tell)
    check_began_with(prepared, folder)
    folder.remove_leftovers()
    task = _task(prepared, folder, quiet=quiet, say=tell)
    return search_in(folder, prepared, task, Evaluator(prepared.loaded, task.levels), quiet=quiet, going_on=True)


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


def sequence_length(loaded: LoadedModel, asked: int | None, default: int) -> int:
    """Tokens in a sequence: what was asked, else the default or the model's positions, whichever is less.

    Raises ModelError if the model has fewer positions than were asked for.
    """
    positions: int | None = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if asked is None:
        return min(default, positions or default)
    if positions is not None and asked > positions:
        raise ModelError(f"{loaded.source} has {positions:,} positions, asked for sequences of {asked:,} tokens")
    return asked


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
    evaluator: Evaluator,
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
    """The final choice, best first: `method`, `loss`, its `difference` to the chosen one and the `standard_error`."""
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
