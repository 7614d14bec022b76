"""`discopt llm drop`: depth pruning as a task of the search."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
from numpy.typing import NDArray

from discopt.progress import task as progress_task
from discopt.space import Levels as LevelNumbers
from discopt.space import SearchSpace
from discopt_llm import baselines
from discopt_llm.allocation import Measured
from discopt_llm.drop import DropLevels, Unit, blocks_to_drop, drop_space
from discopt_llm.errors import ModelError
from discopt_llm.evaluator import Measurer
from discopt_llm.fitness import fitness_by_name
from discopt_llm.heldout import Method
from discopt_llm.heuristics import Heuristics, Remembered
from discopt_llm.models import LoadedModel
from discopt_llm.presets import DROP_PRESETS, Preset, published_generations
from discopt_llm.profile import Profile
from discopt_llm.profile_text import text_from_decisions
from discopt_llm.report import dropped_listing, plot_dropped
from discopt_llm.request import STARTS, Prepared, Say, SearchRequest, Task
from discopt_llm.search import feasible_start, resume
from discopt_llm.students import read_drop_student

_log = logging.getLogger(__name__)

START_WINDOWS = 5  # runs of units that compete for the start, beside ShortGPT's profile
_SCORED = {
    "shortgpt": baselines.shortgpt,
    "window": baselines.window_cosine,
    "influence": baselines.unit_influence,
}


@dataclass(frozen=True, kw_only=True)
class DropRequest(SearchRequest):
    """What was asked of `discopt llm drop`, one field per option; None takes the preset's value.

    Raises ValueError for values that make no sense.
    """

    command: ClassVar[str] = "llm drop"
    presets: ClassVar[Mapping[str, Preset]] = DROP_PRESETS
    known_baselines: ClassVar[Mapping[str, str]] = {
        "random": "random (best of the start candidates)",
        "shortgpt": "ShortGPT block influence",
        "window": "window cosine",
        "influence": "unit influence",
    }

    sparsity: float
    unit: Unit = "sublayer"
    protect: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")
        if self.unit not in get_args(Unit):
            raise ValueError(f"unit must be one of {', '.join(get_args(Unit))}, got {self.unit!r}")
        super().__post_init__()

    def check(self, loaded: LoadedModel) -> None:
        """Raises DiscoptError for a sparsity, a protected block or a start that the model cannot have."""
        space = self._space(loaded)
        if self.chosen.start not in STARTS:
            profile = read_drop_student(self.chosen.start, loaded, unit=self.unit)[1]
            feasible_start(self.chosen.start, profile, space)

    def spaces(self, loaded: LoadedModel, requests: Sequence[DropRequest]) -> list[SearchSpace]:
        return [request._space(loaded) for request in requests]

    def task(self, loaded: LoadedModel, out: Path, *, quiet: bool, say: Say) -> DropTask:
        """The units to drop of this model."""
        return DropTask(self, loaded, DropLevels(loaded.anatomy, self.unit), self._space(loaded))

    def _space(self, loaded: LoadedModel) -> SearchSpace:
        try:
            return drop_space(loaded.anatomy, self.sparsity, unit=self.unit, protect=self.protect)
        except ValueError as error:  # blocks to protect that this model does not have
            raise ModelError(f"{self.model}: {error}") from error


def share_of(text: str) -> float:
    """0.25 or 25% -> 0.25; raises ValueError for what is no number."""
    number = text.strip().removesuffix("%")
    try:
        return float(number) / (100 if number != text.strip() else 1)
    except ValueError:
        raise ValueError(f"sparsity must be a share such as 0.25 or 25%, got {text[:100]!r}") from None


@dataclass(frozen=True, eq=False)
class DropTask(Task):
    """Dropping a share of a model's attention and MLP sub-blocks, or blocks."""

    request: DropRequest
    loaded: LoadedModel
    levels: DropLevels
    space: SearchSpace

    @property
    def title(self) -> str:
        return f"Depth pruning of {self.request.model}"

    def at(self, request: DropRequest) -> DropTask:
        (space,) = request.spaces(self.loaded, [request])
        return replace(self, request=request, space=space)

    def expected(self, heuristics: Heuristics, prepared: Prepared, *, quiet: bool) -> NDArray[np.float64]:
        """Of dropping a unit, its influence."""
        alike, _ = self._similarity(prepared, quiet=quiet)
        dropped = baselines.influences(alike, self.levels)
        return np.stack([dropped, np.zeros_like(dropped)], axis=1)

    def changes(self) -> dict[str, Any]:
        """The published number of generations follows from the number of blocks to drop."""
        if self.request.chosen.generations is not None:
            return {}
        blocks = len(self.loaded.anatomy.blocks)
        dropped = blocks_to_drop(blocks, self.request.sparsity, self.levels.unit)
        return {"generations": published_generations(blocks, dropped)}

    def read(self, path: str) -> LevelNumbers:
        return read_drop_student(path, self.loaded, unit=self.levels.unit)[1]

    def heuristics(self, prepared: Prepared, evaluator: Measurer, *, quiet: bool) -> Heuristics:
        """What scores of the dense model's hidden states give; the best random profile, unless the search has it."""
        request, levels, space = self.request, self.levels, self.space
        names = [name for name in _SCORED if name in request.compared]
        competes = request.chosen.start == "heuristics"
        random = self._random(prepared, evaluator, quiet=quiet)
        if not names and not competes:
            return Heuristics(random)
        alike, tokens = self._similarity(prepared, quiet=quiet)
        methods = [*random]
        for name in names:
            try:
                methods.append(Method(request.known_baselines[name], _SCORED[name](alike, levels, space), tokens))
            except ModelError as error:
                _log.warning("no %s: %s", request.known_baselines[name], error)
        rivals: Sequence[LevelNumbers] = ()
        if competes:
            windows = baselines.unit_windows(alike, levels, space, START_WINDOWS)
            rivals = [baselines.shortgpt(alike, levels, space), *windows]
        references = tuple(method.profile for method in methods[len(random) :])
        return Heuristics(tuple(methods), tuple(rivals), tokens, references=references)

    def _similarity(self, prepared: Prepared, *, quiet: bool) -> tuple[baselines.Similarity, int]:
        """How alike the dense model's hidden states are, see `baselines.similarity`, and the tokens they are of."""
        request = self.request
        tokens = min(request.chosen.baseline_tokens, prepared.calibration.tokens)
        sample = prepared.calibration.sample(tokens, request.seed)

        def measure() -> baselines.Similarity:
            with progress_task("heuristics", len(sample), unit="sequences", quiet=quiet) as progress:
                return baselines.similarity(prepared.loaded, sample, done=progress.advance)

        remembered = prepared.remembered or Remembered()
        return remembered.of_text("similarity", sample, measure), tokens

    def _random(self, prepared: Prepared, evaluator: Measurer, *, quiet: bool) -> tuple[Method, ...]:
        request, chosen = self.request, self.request.chosen
        if chosen.algorithm == "evopress" or "random" not in request.compared:
            return ()
        sample = prepared.calibration.sample(min(chosen.start_fidelity, prepared.calibration.tokens), request.seed)
        fitness = fitness_by_name(request.fitness)
        measured = Measured(evaluator, sample, fitness, quiet=quiet, remembered=prepared.remembered)
        profile, tokens = measured.random(self.space, chosen.start_candidates, request.seed)
        return (Method(request.known_baselines["random"], profile, tokens),)

    def document(self, profile: LevelNumbers) -> Profile:
        loaded, levels = self.loaded, self.levels
        return Profile("drop", levels.unit, loaded.source, loaded.fingerprint, levels.names, profile)

    def text(self, profile: LevelNumbers) -> str:
        return text_from_decisions(self.levels.dropped(profile))

    def asked(self) -> dict[str, Any]:
        return {"sparsity": self.request.sparsity}

    def met(self, profile: LevelNumbers) -> dict[str, Any]:
        dropped = self.levels.dropped(profile)
        attention, mlp = (int(count) for count in dropped.sum(axis=0))
        return {"attention_dropped": attention, "mlp_dropped": mlp, "blocks": len(dropped)}

    def sentence(self, profile: LevelNumbers) -> str:
        request, met = self.request, self.met(profile)
        return (
            f"Asked: drop {request.sparsity:.1%} of the attention and of the MLP sub-blocks of `{request.model}`, in "
            f"units of a {request.unit}. Met: {met['attention_dropped']} attention and {met['mlp_dropped']} MLP "
            f"sub-blocks of {met['blocks']} each."
        )

    def listing(self, profile: LevelNumbers) -> str:
        return "## What is dropped\n\n" + dropped_listing(self.levels.dropped(profile))

    def draw(self, profile: LevelNumbers, path: Path) -> None:
        plot_dropped(self.levels.dropped(profile), path)


resume_drop = partial(resume, DropRequest)  # what `discopt resume` calls, by its entry point
