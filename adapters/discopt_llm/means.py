"""What a command may compute with: other processes, and how much memory. None of it changes what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch

from discopt.errors import DiscoptError
from discopt.workers import WorkersAt
from discopt_llm.memory import Memory, total_memory

__all__ = ["MEANS", "Means", "checked_means"]


@dataclass(frozen=True, kw_only=True)
class Means:
    """Options of the commands that search, compare and build banks. Raises ValueError for values that make no sense."""

    workers: str | None = None  # see `WorkersAt`; None: this process alone
    worker_seconds: float | None = None  # that one call may take before its worker is given up; None: any time
    memory: str | None = None  # of the device that a model runs on, at most, such as 16GiB; None: no bound
    host_memory: str | None = None  # of the machine's own memory

    def __post_init__(self) -> None:
        _ = self.workers_at, self.bounds
        if self.worker_seconds is not None and not self.worker_seconds > 0:
            raise ValueError(f"worker_seconds must be above 0, got {self.worker_seconds}")

    @cached_property
    def workers_at(self) -> WorkersAt | None:
        """Where the workers are and how many; None: this process alone, which is what one worker here would be."""
        at = None if self.workers is None else WorkersAt.parse(self.workers)
        return None if at == WorkersAt(1) else at

    @cached_property
    def bounds(self) -> Memory:
        """On memory, of this process or of each worker."""
        return Memory.parse(self.memory, self.host_memory)

    def bounds_here(self, device: torch.device) -> Memory:
        """On memory of this process, whose model runs on a device.

        Where workers have the CUDA devices, all of one's memory is a bound: with a bound, a model's blocks wait on the
        host for what runs them.
        """
        if self.workers_at is None or device.type == "cpu" or self.bounds.device is not None:
            return self.bounds
        return replace(self.bounds, device=total_memory(device))


def checked_means(means: Mapping[str, Any]) -> Mapping[str, Any]:
    """Options of `Means` for a run that goes on, as they are; raises DiscoptError for values that make no sense."""
    try:
        Means(**means)
    except ValueError as error:
        raise DiscoptError(str(error)) from error
    return means


MEANS = tuple(field.name for field in fields(Means))
"""The names of these options: those that may differ when a run goes on."""
