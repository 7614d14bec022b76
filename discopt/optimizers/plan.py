"""What a search may spend, said alike for every algorithm."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """The means of a search: profiles to measure, how many at once, how well, and where to start."""

    evaluations: int = 1000  # profiles measured at `fidelity`; what is measured at less counts for less
    batch: int = 16  # most profiles in a query
    fidelity: int = 1  # of a full measurement
    start: tuple[int, ...] | None = None  # a feasible profile; without one, the algorithm chooses

    def __post_init__(self) -> None:
        for name in ("evaluations", "batch", "fidelity"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def total_fidelity(self) -> int:
        """The whole budget: profiles times fidelity."""
        return self.evaluations * self.fidelity
