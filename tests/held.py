"""What workers hold in tests: it answers, sleeps, fails or dies as it is told."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from discopt.objective import Losses, Query

WEIGHTS = np.random.default_rng(0).permutation(20)
DOOMED, POISONED = "doomed", "poisoned"  # files in a folder, named so and by the process id that they are for


class UnportableError(Exception):
    """Cannot be read where it is sent."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)


class Held:
    """Answers calls, and is an objective; a file in its folder may say that a process is to die, or to answer NaN."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def evaluate(self, query: Query) -> Losses:
        if (self.folder / f"{DOOMED}{os.getpid()}").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        noise = np.sin(query.population @ np.arange(20) + query.seed) / query.fidelity
        losses = -(query.population @ WEIGHTS) + noise
        if (self.folder / f"{POISONED}{os.getpid()}").exists():
            losses[0] = np.nan
        return losses

    def double(self, number: float) -> float:
        return 2 * number

    def pid(self, seconds: float = 0) -> int:
        time.sleep(seconds)
        return os.getpid()

    def stop_if(self, pid: int, number: float) -> float:
        """A process of that id stops, and answers nothing."""
        if os.getpid() == pid:
            time.sleep(600)
        return number

    def die_if(self, pid: int, number: float) -> float:
        if os.getpid() == pid:
            os.kill(pid, signal.SIGKILL)
        return number

    def nan_if(self, pid: int, number: float) -> float:
        time.sleep(0.02)  # so that all workers take part
        return float("nan") if os.getpid() == pid else number

    def raise_if(self, wanted: bool, number: float) -> float:
        if wanted:
            raise KeyError("missing")
        time.sleep(0.3)
        return number

    def raise_unportable(self) -> None:
        raise UnportableError("left", "right")

    def surroundings(self) -> tuple[str, str]:
        return os.getcwd(), os.environ["OMP_NUM_THREADS"]


def fail() -> Any:
    raise FileNotFoundError("no model there")


class FailsOnce:
    """Makes `Held`, but in the first process that asks."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "failed"

    def __call__(self) -> Held:
        try:
            self.path.touch(exist_ok=False)
        except FileExistsError:
            return Held(self.path.parent)
        raise FileNotFoundError("no model there")
