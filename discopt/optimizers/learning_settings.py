"""What can be set of a search that learns, and what its final choice says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from discopt.space import Levels


@dataclass(frozen=True)
class LearningSettings:
    """What can be set beside the plan.

    `rivals` are profiles found by whatever means, that the start has to beat. `references` are those that the answer
    must not be worse than: they and the uniform profile take part in the final choice. `prior` (n, m) is what each
    level of a unit is thought to add to the loss, up to a factor near 1 that is learned.
    """

    rivals: tuple[tuple[int, ...], ...] = ()
    references: tuple[tuple[int, ...], ...] = ()
    prior: NDArray[np.float64] | None = field(default=None, compare=False)
    first: int | None = None  # fidelity of a race's first round; None: an eighth of the plan's
    choice: int | None = None  # fidelity of the final choice, where measurements are noisy; None: the plan's
    candidates: int = 8  # random profiles to begin with
    share: int = 8  # of a race's candidates, one in so many goes on after each round
    model_rows: int = 1000  # measurements that the model is made of, at most
    model_cells: int = 1 << 22  # and their levels in all; a space where fewer than 64 fit gets no model
    elite: int = 128  # profiles that are crossed
    small: int = 2  # candidates of a generation to begin with, where measurements are exact
    apart: float = 0.1  # share of the units that two of these differ in, at least
    temperature: float = 0.3  # of the model's draws; 1 is Thompson sampling
    radius: float = 16.0  # of the trust region to begin with, in units

    def __post_init__(self) -> None:
        for name in ("model_rows", "model_cells", "elite", "share", "small"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.candidates < 0:
            raise ValueError(f"candidates must not be negative, got {self.candidates}")
        for name in ("first", "choice"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.apart <= 1:
            raise ValueError(f"apart must be between 0 and 1, got {self.apart}")
        if self.temperature < 0 or self.radius < 1:
            raise ValueError(
                f"temperature must not be negative and radius at least 1, got {self.temperature}, {self.radius}"
            )


@dataclass(frozen=True, eq=False)
class Finalist:
    """A profile of the final choice: how much more it lost there than the one that was chosen."""

    profile: Levels  # (n,)
    loss: float
    difference: float
    standard_error: float | None  # of the difference; None with one sample

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**vars(self), "profile": self.profile.tolist()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        return cls(**{**values, "profile": np.array(values["profile"], dtype=np.int16)})
