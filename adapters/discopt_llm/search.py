"""`discopt llm drop`: load, search, compare on held-out text, and leave a run folder that can be gone on with."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self, get_args

from discopt.errors import RunFolderError
from discopt.folder import RunFolder, distribution_version, request_of
from discopt.optimizers.base import StopReason
from discopt.optimizers.evopress import EvoPress, EvoPressSettings, Stage
from discopt.progress import ProgressBar, task
from discopt.report import option_words
from discopt.run import Limits, Result, minimize
from discopt.space import Levels, SearchSpace
from discopt_llm import baselines
from discopt_llm.calibration import Calibration, load_calibration
from discopt_llm.drop import DropLevels, Unit, blocks_to_drop, drop_space
from discopt_llm.errors import DataError, ModelError, ProfileError
from discopt_llm.evaluator import Evaluator
from discopt_llm.fitness import fitness_by_name
from discopt_llm.heldout import Method, heldout_rows
from discopt_llm.models import LoadedModel, load_model
from discopt_llm.objective import CompressionObjective
from discopt_llm.presets import DROP_PRESETS, Preset, published_generations
from discopt_llm.report import write_run
from discopt_llm.students import read_student, sequence_length

COMMAND = "llm drop"
BASELINES = {
    "random": "random (best of the start candidates)",
    "shortgpt": "ShortGPT block influence",
    "window": "window cosine",
    "influence": "unit influence",
}
_HEURISTICS = {
    "shortgpt": baselines.shortgpt,
    "window": baselines.window_cosine,
    "influence": baselines.unit_influence,
}
STARTS = ("random", "heuristics")
START_WINDOWS = 5  # runs of units that compete for the start, beside ShortGPT's profile

Say = Callable[[str], None]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DropRequest:
    """What was asked of `discopt llm drop`, one field per option; None takes the preset's value.

    Raises ValueError for values that make no sense.
    """

    model: str
    sparsity: float
    unit: Unit = "sublayer"
    protect: tuple[int, ...] = ()
    preset: str = "fast"
    calibration: str = "builtin"
    calibration_tokens: int | None = None
    sequence_length: int | None = None
    eval_data: str | None = None  # None: the held-out side of the calibration source
    eval_tokens: int | None = None
    generations: int | None = None
    offspring: int | None = None
    stages: tuple[str, ...] = ()
    start: str | None = None  # random, heuristics, or a profile to start from
    fitness: str = "kl"
    baselines: tuple[str, ...] = tuple(BASELINES)
    max_seconds: float | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")
        if self.unit not in get_args(Unit):
            raise ValueError(f"unit must be one of {', '.join(get_args(Unit))}, got {self.unit!r}")
        if self.preset not in DROP_PRESETS:
            raise ValueError(f"preset must be one of {', '.join(DROP_PRESETS)}, got {self.preset!r}")
        if unknown := [name for name in self.baselines if name not in BASELINES]:
            raise ValueError(f"baselines must be among {', '.join(BASELINES)}, got {', '.join(unknown)}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        fitness_by_name(self.fitness)
        Limits(seconds=self.max_seconds)
        self.settings(blocks=1, dropped=0)

    @cached_property
    def chosen(self) -> Preset:
        """The preset with the options that replace its values."""
        preset = DROP_PRESETS[self.preset]
        stages = tuple(Stage.parse(stage) for stage in self.stages) or preset.stages
        given = {
            name: getattr(self, name)
            for name in ("offspring", "sequence_length", "eval_tokens", "generations", "start")
            if getattr(self, name) is not None
        }
        return replace(preset, stages=stages, **given)

    def command_line(self, out: Path) -> str:
        """The command that asks for this."""
        words = option_words(self, skip=("model",), repeated={"stages": "--stage"})
        return shlex.join(["discopt", "llm", "drop", self.model, *words, "--out", str(out)])

    def settings(self, *, blocks: int, dropped: int, start: Levels | None = None) -> EvoPressSettings:
        """Settings of the search that drops `dropped` of `blocks` blocks, or as many sub-blocks of each kind."""
        chosen = self.chosen
        generations = chosen.generations
        return EvoPressSettings(
            generations=published_generations(blocks, dropped) if generations is None else generations,
            offspring=chosen.offspring,
            stages=chosen.stages,
            start="auto" if start is None else tuple(int(level) for level in start),
            start_candidates=chosen.start_candidates,
            start_fidelity=chosen.start_fidelity,
        )


@dataclass(frozen=True, eq=False)
class Prepared:
    """Everything a search needs, loaded and checked before the run folder is made."""

    request: DropRequest
    loaded: LoadedModel
    levels: DropLevels
    space: SearchSpace
    calibration: Calibration
    heldout: Calibration
    settings: EvoPressSettings

    @classmethod
    def load(cls, request: DropRequest, say: Say) -> Self:
        """Raises DiscoptError for a model, a text or a profile that cannot be used."""
        chosen = request.chosen
        say(f"loading {request.model}")
        loaded = load_model(
            request.model,
            device=request.device,
            dtype=request.dtype,
            trust_remote_code=request.trust_remote_code,
        )
        levels = DropLevels(loaded.anatomy, request.unit)
        try:
            space = drop_space(loaded.anatomy, request.sparsity, unit=request.unit, protect=request.protect)
        except ValueError as error:  # blocks to protect that this model does not have
            raise ModelError(f"{request.model}: {error}") from error
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
        blocks = len(loaded.anatomy.blocks)
        dropped = blocks_to_drop(blocks, request.sparsity, levels.unit)
        start = None if chosen.start in STARTS else _read_start(chosen.start, loaded, levels, space)
        settings = request.settings(blocks=blocks, dropped=dropped, start=start)
        needed = max(settings.stages[-1].fidelity, settings.start_fidelity or 0)
        if needed > calibration.tokens:
            raise DataError(
                f"{request.calibration} has {calibration.tokens:,} tokens for the search, but a stage needs "
                f"{needed:,}; give smaller stages, such as --stage 1@{calibration.tokens}"
            )
        return cls(request, loaded, levels, space, calibration, heldout, settings)


def _read_start(path: str, loaded: LoadedModel, levels: DropLevels, space: SearchSpace) -> Levels:
    profile = read_student(path, loaded, unit=levels.unit)[1]
    try:
        return space.check(profile)
    except ValueError as error:
        raise ProfileError(f"{path} cannot start this search: {error}") from error


def begin_drop(request: DropRequest, out: Path, *, force: bool, quiet: bool, say: Say = _log.info) -> dict[str, Any]:
    """Run a search from its start; returns what results.json holds. The run folder is made once all is loaded."""
    RunFolder.check_free(out, force=force)
    prepared = Prepared.load(request, say)
    asked = {
        "command": COMMAND,
        "options": asdict(request),
        "seed": request.seed,
        "directory": Path.cwd(),
        "model": {"source": prepared.loaded.source, "fingerprint": prepared.loaded.fingerprint},
        "calibration": prepared.calibration.fingerprint,
        "versions": {name: distribution_version(name) for name in ("torch", "transformers")},
    }
    folder = RunFolder.create(out, asked, force=force)
    return _search(prepared, folder, quiet=quiet, resume=False)


def resume_drop(folder: RunFolder, *, quiet: bool, say: Say = _log.warning) -> dict[str, Any]:
    """Go on with a run that was stopped; returns what results.json holds.

    A time limit that ended the run is lifted. A finished run is not run again.
    """
    request = request_of(DropRequest, folder.request["options"])
    if folder.has("results.json"):
        results: dict[str, Any] = folder.read_json("results.json")
        if results.get("stop") == StopReason.TIME.value:
            request = replace(request, max_seconds=None)
        elif results.get("stop") != StopReason.INTERRUPTED.value:
            say(f"{folder.path} is finished: {results.get('stop')}")
            return results
    prepared = Prepared.load(request, say)
    for what, began, now in (
        ("model", folder.request["model"]["fingerprint"], prepared.loaded.fingerprint),
        ("calibration text", folder.request["calibration"], prepared.calibration.fingerprint),
    ):
        if began != now:
            raise RunFolderError(f"the {what} is not the one that {folder.path} began with; start a new run")
    folder.remove_leftovers()
    return _search(prepared, folder, quiet=quiet, resume=True)


def _search(prepared: Prepared, folder: RunFolder, *, quiet: bool, resume: bool) -> dict[str, Any]:
    request, settings = prepared.request, prepared.settings
    heuristics = _heuristics(prepared, quiet=quiet)
    settings = replace(settings, rivals=heuristics.rivals)
    evaluator = Evaluator(prepared.loaded, prepared.levels)
    objective = CompressionObjective(evaluator, prepared.calibration, fitness_by_name(request.fitness))
    with ProgressBar(unit="tokens", label="search", quiet=quiet) as bar:
        result = minimize(
            objective,
            prepared.space,
            optimizer=EvoPress(prepared.space, settings, seed=request.seed),
            limits=Limits(seconds=request.max_seconds),
            callbacks=(bar,),
            folder=folder,
            resume=resume,
        )
    rows: list[dict[str, Any]] = []
    if result.stop is not StopReason.INTERRUPTED:
        methods = _methods(prepared, heuristics, result)
        rows = heldout_rows(evaluator, prepared.levels, methods, prepared.heldout, quiet=quiet)
    return write_run(prepared, result, rows, folder)


@dataclass(frozen=True, eq=False)
class _Heuristics:
    """What scores of the dense model's hidden states give, and the tokens they took."""

    profiles: Mapping[str, Levels]  # (n,) each; those that are rows of the table
    rivals: tuple[tuple[int, ...], ...]  # those that compete for the start
    tokens: int


def _heuristics(prepared: Prepared, *, quiet: bool) -> _Heuristics:
    request, levels, space = prepared.request, prepared.levels, prepared.space
    names = [name for name in _HEURISTICS if name in request.baselines]
    competes = request.chosen.start == "heuristics"
    if not names and not competes:
        return _Heuristics({}, (), 0)
    sample = prepared.calibration.sample(min(request.chosen.baseline_tokens, prepared.calibration.tokens), request.seed)
    with task("heuristics", len(sample), unit="sequences", quiet=quiet) as progress:
        alike = baselines.similarity(prepared.loaded, sample, done=progress.advance)
    profiles = {}
    for name in names:
        try:
            profiles[name] = _HEURISTICS[name](alike, levels, space)
        except ModelError as error:
            _log.warning("no %s: %s", BASELINES[name], error)
    rivals: list[Levels] = []
    if competes:
        rivals = [
            baselines.shortgpt(alike, levels, space),
            *baselines.unit_windows(alike, levels, space, START_WINDOWS),
        ]
    return _Heuristics(profiles, tuple(tuple(rival.tolist()) for rival in rivals), sum(map(len, sample)))


def _methods(prepared: Prepared, heuristics: _Heuristics, result: Result) -> list[Method]:
    """The rows of the table: dense, the baselines asked for, and what the search found, with all it spent."""
    request, settings = prepared.request, prepared.settings
    methods = [Method("dense", prepared.space.dearest(), 0)]
    if "random" in request.baselines and result.start is not None and result.start.fidelity:
        spent = settings.start_candidates * result.start.fidelity
        methods.append(Method(BASELINES["random"], result.start.profile, spent))
    methods += [Method(BASELINES[name], profile, heuristics.tokens) for name, profile in heuristics.profiles.items()]
    guided = heuristics.tokens if heuristics.rivals else 0
    return [*methods, Method("evolved", result.profile, result.total_fidelity + guided)]
