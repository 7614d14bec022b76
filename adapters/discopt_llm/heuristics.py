"""What is known before a search: profiles of heuristics, and measurements that searches at several budgets share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from discopt.errors import RunFolderError
from discopt.space import Levels as LevelNumbers
from discopt.space import SearchSpace
from discopt_llm.heldout import Method

__all__ = ["Heuristics", "Remembered"]


@dataclass(frozen=True, eq=False)
class Heuristics:
    """Profiles that were found without the search."""

    methods: tuple[Method, ...]  # rows of the table
    rivals: tuple[LevelNumbers, ...] = ()  # those that compete for the start
    tokens: int = 0  # that went into the rivals
    start: LevelNumbers | None = None  # where the search begins; None: as the settings have it
    references: tuple[LevelNumbers, ...] = ()  # those that the answer must not be worse than
    prior: NDArray[np.float64] | None = None  # (n, m) what a level is thought to add to the loss; inf: not there
    neighbours: tuple[Method, ...] = ()  # made from other budgets' answers: rivals and references, whatever the start

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "methods": [vars(method) for method in self.methods],
            "rivals": [*self.rivals],
            "tokens": self.tokens,
            "start": self.start,
            "references": [*self.references],
            "prior": self.prior,
            "neighbours": [vars(method) for method in self.neighbours],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], space: SearchSpace) -> Self:
        """The inverse of `to_dict`; raises RunFolderError for what are no profiles of the space."""

        def methods(values: Sequence[Mapping[str, Any]]) -> tuple[Method, ...]:
            return tuple(Method(m["name"], space.check(m["profile"]), int(m["tokens"])) for m in values)

        try:
            return cls(
                methods=methods(data["methods"]),
                rivals=tuple(space.check(rival) for rival in data["rivals"]),
                tokens=int(data["tokens"]),
                start=None if data["start"] is None else space.check(data["start"]),
                references=tuple(space.check(reference) for reference in data["references"]),
                prior=None if data["prior"] is None else np.array(data["prior"], dtype=np.float64),
                neighbours=methods(data.get("neighbours", ())),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise RunFolderError(f"heuristics.json is damaged: {error}; remove it to measure them again") from error


@dataclass(eq=False)
class Remembered:
    """What heuristics have measured, so that searches of one model measure it once."""

    values: dict[str, Any] = field(default_factory=dict)  # JSON, by what was measured on what; null: not finite
    tokens: int = 0  # that went into them

    def __post_init__(self) -> None:
        if not isinstance(self.values, dict) or not isinstance(self.tokens, int):
            raise TypeError(f"expected values by name and tokens, got {type(self.values)} and {type(self.tokens)}")

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """From JSON; raises RunFolderError for anything else than its fields."""
        try:
            return cls(**data)
        except TypeError as error:
            raise RunFolderError(f"heuristics.json is damaged: {error}; remove it to measure them again") from error

    def losses(
        self,
        population: LevelNumbers,
        sample: Sequence[Tensor],
        fitness: str,
        measure: Callable[[LevelNumbers], NDArray[np.float64]],
    ) -> NDArray[np.float64]:
        """Losses of a population (k, n) on a sample, (k,), infinite where one is not finite.

        `measure` is asked for those of new profiles alone.
        """
        text = _digest(sample)
        keys = [f"{fitness}:{text}:{hashlib.sha256(row.tobytes()).hexdigest()}" for row in population]
        new = [i for i, key in enumerate(keys) if key not in self.values]
        if new:
            for i, loss in zip(new, measure(population[new]), strict=True):
                self.values[keys[i]] = float(loss) if np.isfinite(loss) else None
            self.tokens += len(new) * sum(map(len, sample))
        known = (self.values[key] for key in keys)
        return np.array([np.inf if loss is None else loss for loss in known], dtype=np.float64)

    def of_text(
        self, what: str, sample: Sequence[Tensor], make: Callable[[], NDArray[np.float64]]
    ) -> NDArray[np.float64]:
        """What one pass of the dense model over a sample gives, made once."""
        key = f"{what}:{_digest(sample)}"
        if key not in self.values:
            self.values[key] = make().tolist()
            self.tokens += sum(map(len, sample))
        return np.array(self.values[key], dtype=np.float64)


def _digest(sample: Sequence[Tensor]) -> str:
    found = hashlib.sha256()
    for ids in sample:
        found.update(np.ascontiguousarray(ids.cpu().numpy()).tobytes() + b"\0")
    return found.hexdigest()
