"""`discopt solve`: a user's own problem from the command line, in a run folder that can be gone on with."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from discopt.errors import DiscoptError, ObjectiveError, RunFolderError, WorkersError
from discopt.executors import WorkersObjective
from discopt.folder import RunFolder, request_of
from discopt.loading import Loaded, explain, load_problem, split_target
from discopt.objective import Objective, as_objective
from discopt.optimizers import ALGORITHMS, EvoPress, EvoPressSettings, Plan, Stage, StopReason
from discopt.plots import is_drawn, plot_trace
from discopt.progress import ProgressBar
from discopt.report import option_words, profile_lines, solve_report
from discopt.run import Limits, Result, minimize
from discopt.sealed import SealError, unsealed
from discopt.workers import Workers, WorkersAt

if TYPE_CHECKING:
    from discopt.optimizers import Optimizer
    from discopt.space import SearchSpace

COMMAND = "solve"
PROFILE_FORMAT = "discopt-profile"
CHECKPOINT_SECONDS = 1.0  # what a killed process loses at most, beside the stage it was in

# What ends a search before its plan does, and the option that sets it.
LIMIT_OPTIONS = {
    StopReason.EVALUATIONS: "max_evaluations",
    StopReason.FIDELITY: "max_fidelity",
    StopReason.TIME: "max_seconds",
    StopReason.TARGET: "target_loss",
    StopReason.STAGNATION: "stagnation",
}
_FINAL = (StopReason.GENERATIONS, StopReason.EXHAUSTED)
_GOALS = (StopReason.TARGET, StopReason.STAGNATION)

_EVOPRESS_ONLY = ("parents", "start_candidates", "start_fidelity", "switches", "rule")
_WITHOUT_START = ("random", "exhaustive")

_log = logging.getLogger(__name__)

Say = Callable[[str], None]


@dataclass(frozen=True)
class SolveRequest:
    """What was asked of `discopt solve`, one field per option. Raises ValueError for values that make no sense."""

    target: str  # FILE.py:NAME or module:NAME
    generations: int = 100
    offspring: int = 16
    parents: int = 1
    stages: tuple[str, ...] = ()  # SURVIVORS@FIDELITY; without any, one stage at fidelity 1
    start: str = "auto"  # or uniform, random, the path of a profile
    start_profile: tuple[int, ...] | None = None  # what that path held when the run began
    start_candidates: int = 16
    start_fidelity: int | None = None
    switches: tuple[float, ...] = (5, 3, 1)
    rule: str = "within"
    algorithm: str | None = None  # None: evopress where an option is given that it alone hears, else learning
    max_evaluations: int | None = None
    max_fidelity: int | None = None
    max_seconds: float | None = None
    target_loss: float | None = None
    stagnation: int | None = None
    seed: int = 0
    workers: str | None = None  # see `WorkersAt`; None: this process measures
    worker_seconds: float | None = None  # that a worker may take for its part of a query; None: any time

    def __post_init__(self) -> None:
        split_target(self.target)
        if self.algorithm not in (None, *ALGORITHMS):
            raise ValueError(f"algorithm must be {' or '.join(sorted(ALGORITHMS))}, got {self.algorithm!r}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if self.workers is not None:
            WorkersAt.parse(self.workers)
        if self.worker_seconds is not None and (self.workers is None or not self.worker_seconds > 0):
            raise ValueError(f"worker_seconds must be above 0 and needs workers, got {self.worker_seconds}")
        self.settings()
        self.limits()
        if self.chosen != "evopress":
            self.plan()
            if unheard := self._unheard():
                raise ValueError(f"algorithm {self.algorithm!r} {unheard}")
            if self.start_profile is not None and self.algorithm in _WITHOUT_START:
                raise ValueError(f"algorithm {self.algorithm!r} has no start, got {self.start}")

    @property
    def chosen(self) -> str:
        """The algorithm: where none is given evopress if an option is that it alone hears, else learning."""
        if self.algorithm is not None:
            return self.algorithm
        return "evopress" if self._unheard() else "learning"

    def _unheard(self) -> str | None:
        """What is wrong with an option that EvoPress alone hears, for any other algorithm."""
        for field in fields(self):
            if field.name in _EVOPRESS_ONLY and getattr(self, field.name) != field.default:
                return f"does not hear {field.name.replace('_', '-')}, which is for evopress"
        if len(self.stages) > 1:
            return f"takes one stage, 1@FIDELITY, got {' '.join(self.stages)}"
        if self.start_profile is None and self.start != "auto":
            return f"starts from a profile, or where it chooses, got start {self.start!r}"
        return None

    def settings(self) -> EvoPressSettings:
        stages = tuple(Stage.parse(stage) for stage in self.stages) or (Stage(self.parents, 1),)
        return EvoPressSettings(
            generations=self.generations,
            offspring=self.offspring,
            stages=stages,
            parents=self.parents,
            start=self.start_profile if self.start_profile is not None else self.start,
            start_candidates=self.start_candidates,
            start_fidelity=self.start_fidelity,
            switches=self.switches,
            rule=self.rule,
        )

    def limits(self) -> Limits:
        return Limits(
            evaluations=self.max_evaluations,
            fidelity=self.max_fidelity,
            seconds=self.max_seconds,
            target=self.target_loss,
            stagnation=self.stagnation,
        )

    def plan(self) -> Plan:
        """What an algorithm without generations of its own may spend: as many profiles as they have offspring."""
        fidelity = self.settings().stages[-1].fidelity
        return Plan(self.generations * self.offspring, self.offspring, fidelity, self.start_profile)

    def optimizer(self, space: SearchSpace) -> Optimizer:
        if self.chosen == "evopress":
            return EvoPress(space, self.settings(), seed=self.seed)
        return ALGORITHMS[self.chosen](space, self.plan(), self.seed)

    def command_line(self, out: Path | None) -> str:
        """The command that asks for this."""
        words = option_words(self, skip=("target", "start_profile"), repeated={"stages": "--stage"})
        place = ["--out", str(out)] if out is not None else []
        return shlex.join(["discopt", COMMAND, self.target, *words, *place])


def read_start(path: Path) -> tuple[int, ...]:
    """The levels in a profile file: a run's profile.json, or a plain list. Raises DiscoptError for other files."""
    try:
        data = path.read_bytes()
        levels = json.loads(data)
        if isinstance(levels, dict):
            units = unsealed(data, PROFILE_FORMAT).get("units")
            levels = [unit.get("level") for unit in units] if isinstance(units, list) else None
    except OSError as error:
        raise DiscoptError(f"cannot read {path}: {error.strerror}") from error
    except SealError as error:
        raise DiscoptError(f"{path} {error.sentence('give levels written by hand as a plain list')}") from error
    except (ValueError, RecursionError, AttributeError) as error:
        raise DiscoptError(f"{path} is not JSON") from error
    if not isinstance(levels, list) or not all(type(level) is int for level in levels):
        raise DiscoptError(f"{path} is no profile: expected a list of levels, or a profile.json with its units")
    return tuple(levels)


def begin(
    request: SolveRequest, out: Path | None, *, force: bool, quiet: bool, directory: Path, say: Say = _log.warning
) -> dict[str, Any]:
    """Run a search from its start; returns what results.json holds.

    `directory` is where the target is looked for; `say` takes a line when workers start or are lost.
    """
    if out is not None:
        RunFolder.check_free(out, force=force)
    loaded = load_problem(request.target, directory)
    optimizer = _optimizer(request, loaded)  # what does not fit the problem is refused before a folder is made
    with _measuring(request, loaded, directory, say) as objective:
        folder = None
        if out is not None:
            asked = {
                "command": COMMAND,
                "options": asdict(request),
                "seed": request.seed,
                "directory": directory.resolve(),
                "code": loaded.checksum,
                "space": _space_checksum(loaded.problem.space),
            }
            folder = RunFolder.create(out, asked, force=force)
        return _search(request, loaded, objective, optimizer, folder, quiet=quiet, resume=False)


def finished(folder: RunFolder, changes: Mapping[str, Any]) -> dict[str, Any] | None:
    """The results of a run that has nothing left to do, else None. `changes` are new limits."""
    results = _current_results(folder)
    if results is None:
        return None
    stop = _stop(results)
    done = stop in _FINAL or results.get("complete", False) or (stop in _GOALS and not changes)
    return {**results, "folder": str(folder.path)} if done else None


def go_on(
    folder: RunFolder, changes: Mapping[str, Any], *, quiet: bool, warn: Say = _log.warning, say: Say = _log.warning
) -> dict[str, Any]:
    """Go on with a stopped run; returns what results.json holds.

    `changes` replaces limits and workers. The limit that ended the run before is lifted where it is not replaced, so
    that the run ends as one without that limit would have. `warn` takes a line the user should see, `say` one when
    workers start or are lost.
    """
    request = request_of(SolveRequest, folder.request.get("options", {}))
    results = _current_results(folder)
    lifted = LIMIT_OPTIONS.get(_stop(results)) if results is not None else None
    try:
        request = replace(request, **{**({lifted: None} if lifted else {}), **changes})
    except ValueError as error:
        raise DiscoptError(str(error)) from error
    folder.hold()
    directory = begun_in(folder)
    loaded = load_problem(request.target, directory)
    if folder.request.get("space") != _space_checksum(loaded.problem.space):
        raise RunFolderError(
            f"{request.target} is not the problem that {folder.path} began with: its units, costs or budget differ"
        )
    if folder.request.get("code") != loaded.checksum:
        warn(f"{request.target.rpartition(':')[0]} has changed since the run began")
    optimizer = _optimizer(request, loaded)
    with _measuring(request, loaded, directory, say) as objective:
        folder.remove_leftovers()
        folder.update_request(options=asdict(request), continued=parts_of(folder) + 1)
        return _search(request, loaded, objective, optimizer, folder, quiet=quiet, resume=True)


@dataclass(frozen=True)
class _Target:
    """Makes the objective in a worker, from the same file."""

    target: str
    directory: str
    checksum: str | None

    def __call__(self) -> Objective:
        loaded = load_problem(self.target, self.directory)
        if loaded.checksum != self.checksum:
            raise DiscoptError(f"{self.target} has other code in a worker than in the process that began it")
        return as_objective(loaded.problem.objective)


@contextmanager
def _measuring(request: SolveRequest, loaded: Loaded, directory: Path, say: Say) -> Iterator[Objective]:
    """The problem's objective, of this process or of the workers that were asked for."""
    if request.workers is None:
        yield as_objective(loaded.problem.objective)
        return
    target = _Target(request.target, str(directory.resolve()), loaded.checksum)
    with Workers(WorkersAt.parse(request.workers), target, seconds=request.worker_seconds, say=say) as workers:
        yield WorkersObjective(workers)


def begun_in(folder: RunFolder) -> Path:
    """Where the run was begun, if that folder still is there; else the current one."""
    with suppress(KeyError, OSError, TypeError, ValueError):  # no text, or no name of a folder
        if (directory := Path(folder.request["directory"])).is_dir():
            return directory
    return Path()


def parts_of(folder: RunFolder) -> int:
    """How often the run was gone on with."""
    continued = folder.request.get("continued", 0)
    return continued if type(continued) is int else 0


def _optimizer(request: SolveRequest, loaded: Loaded) -> Optimizer:
    try:
        return request.optimizer(loaded.problem.space)
    except ValueError as error:  # a start that this space does not allow
        raise DiscoptError(f"{request.target}: {error}") from error


def _search(
    request: SolveRequest,
    loaded: Loaded,
    objective: Objective,
    optimizer: Optimizer,
    folder: RunFolder | None,
    *,
    quiet: bool,
    resume: bool,
) -> dict[str, Any]:
    try:
        with ProgressBar(unit=_unit(request), label=loaded.problem.name, quiet=quiet) as bar:
            result = minimize(
                objective,
                loaded.problem.space,
                optimizer=optimizer,
                limits=request.limits(),
                callbacks=(bar,),
                folder=folder,
                checkpoint_seconds=CHECKPOINT_SECONDS,
                resume=resume,
            )
    except ObjectiveError as error:
        again = f"; mend it and go on with: discopt resume {folder.path}" if folder is not None else ""
        if isinstance(error.__cause__, WorkersError):
            raise WorkersError(f"{error.__cause__}{again}") from error
        raise ObjectiveError(explain(error, loaded.path) + _place_there(error, loaded) + again, error.query) from error
    results = {**_results(request, loaded, result, folder), "complete": optimizer.done}
    if folder is not None:
        _write(request, loaded, result, results, folder)
    return results


def _place_there(error: ObjectiveError, loaded: Loaded) -> str:
    """` (own.py:12)`, where an error of a worker brings the place in the user's file along."""
    notes = "\n".join(getattr(error.__cause__, "__notes__", ()))
    lines = re.findall(rf'File "{re.escape(str(loaded.path))}", line (\d+)', notes)
    return f" ({loaded.path.name}:{lines[-1]})" if loaded.path is not None and lines else ""


def _results(request: SolveRequest, loaded: Loaded, result: Result, folder: RunFolder | None) -> dict[str, Any]:
    """What results.json holds and `--json` prints; numbers that are not finite are null."""
    problem = loaded.problem
    rows = []
    if result.start is not None and result.start.fidelity:
        rows.append({"method": "start", "loss": _number(result.start.loss), "fidelity": result.start.fidelity})
    if result.fidelity:
        rows.append({"method": request.chosen, "loss": _number(result.loss), "fidelity": result.fidelity})
    return {
        "format": "discopt-results",
        "version": 1,
        "command": COMMAND,
        "problem": problem.name,
        "rows": rows,
        **result.to_dict(),
        "budget": [int(limit) for limit in problem.space.budget],
        "optimum": _number(problem.optimum),
        "seed": request.seed,
        "profile_summary": profile_lines(problem.space, result.profile),
        "continued": folder.request.get("continued", 0) if folder is not None else 0,
        "folder": str(folder.path) if folder is not None else None,
    }


def _write(request: SolveRequest, loaded: Loaded, result: Result, results: dict[str, Any], folder: RunFolder) -> None:
    """The answer's files; results.json last, for it says that the others are there."""
    picture = False
    if result.fidelity:
        space = loaded.problem.space
        units = [{"name": name, "level": int(level)} for name, level in zip(space.names, result.profile, strict=True)]
        kept = {key: results[key] for key in ("problem", "loss", "fidelity", "cost", "budget")}
        folder.write_json(
            "profile.json", {"format": PROFILE_FORMAT, "version": 1, "kind": COMMAND, **kept, "units": units}
        )
        picture = _draw(request, loaded, result, folder)
    command = request.command_line(folder.path)
    folder.write_text("report.md", solve_report(results, folder.request, command, loaded.problem.note, picture))
    folder.write_json("results.json", results)


def _draw(request: SolveRequest, loaded: Loaded, result: Result, folder: RunFolder) -> bool:
    """Whether there is a picture of the trace: not without matplotlib, nor if nothing finite was measured."""
    if not any(line["best"] is not None for line in result.trace):
        return False
    path, title = folder.path / "trace.png", loaded.problem.name
    return is_drawn(lambda: plot_trace(result.trace, path, unit=_unit(request), title=title))


def _unit(request: SolveRequest) -> str:
    """At fidelity 1 throughout, fidelity spent is the number of evaluations."""
    stages = request.settings().stages
    plain = all(stage.fidelity == 1 for stage in stages) and request.start_fidelity in (None, 1)
    return "evaluations" if plain else "fidelity"


def _current_results(folder: RunFolder) -> dict[str, Any] | None:
    """The results of the run's last part; None if that part was killed, or has not ended."""
    if not folder.has("results.json"):
        return None
    results = folder.read_json("results.json")
    if not isinstance(results, dict) or results.get("continued", 0) != folder.request.get("continued", 0):
        return None
    return results


def _stop(results: Mapping[str, Any]) -> StopReason:
    try:
        return StopReason(results.get("stop"))
    except ValueError:
        return StopReason.INTERRUPTED


def _space_checksum(space: SearchSpace) -> str:
    digest = hashlib.sha256(repr((space.names, space.cost.shape)).encode())
    for array in (space.cost, space.budget, space.group, space.allowed):
        digest.update(array.tobytes())
    if space.bundles:  # without any, the checksum is that of runs made before there were bundles
        digest.update(space.together.tobytes())
    return digest.hexdigest()


def _number(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
