"""What a search is asked, and what a kind of compression brings to it: requests, tasks, and what is loaded for them."""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from discopt.optimizers.evopress import EvoPressSettings, Stage
from discopt.report import option_words
from discopt.run import Limits
from discopt.space import Levels as LevelNumbers
from discopt.space import SearchSpace
from discopt_llm.calibration import Calibration, load_calibration
from discopt_llm.errors import DataError, ModelError
from discopt_llm.evaluator import Measurer
from discopt_llm.fitness import Fitness, fitness_by_name
from discopt_llm.heldout import StudentLevels
from discopt_llm.heuristics import Heuristics, Remembered
from discopt_llm.means import Means
from discopt_llm.models import LoadedModel, load_model, parse_device
from discopt_llm.objective import CompressionObjective
from discopt_llm.presets import Preset
from discopt_llm.profile import Profile

__all__ = ["ALGORITHMS", "STARTS", "Prepared", "Say", "SearchRequest", "Task", "sequence_length"]

# Where a search starts: as Algorithm 1 has it (uniform if that spends the budget, else random), from the best random
# profile, or from the best of that start and the heuristics that the task knows.
STARTS = ("auto", "random", "heuristics")
ALGORITHMS = ("learning", "evopress")
MOST_RESERVED = 1 / 4  # of the calibration text, for the final choice

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class SearchRequest(Means, ABC):
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
        super().__post_init__()
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
    def heuristics(self, prepared: Prepared, evaluator: Measurer, *, quiet: bool) -> Heuristics:
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
            memory=request.bounds_here(parse_device(request.device)),
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

    def objective(self, evaluator: Measurer, fitness: Fitness | None = None) -> CompressionObjective:
        """The loss to search on: the request's fitness, or another."""
        return CompressionObjective(
            evaluator, self.calibration, fitness or fitness_by_name(self.request.fitness), self.reserved
        )


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
