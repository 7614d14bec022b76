"""What the trace says of how the best profile moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import discopt
from discopt import Limits, Plan, RunFolder
from discopt.optimizers import EvoPress, Learning
from discopt.problems import PROBLEMS


def optimizer(name: str, space: discopt.SearchSpace) -> Any:
    if name == "learning":
        return Learning(space, Plan(evaluations=60, fidelity=8), seed=3)
    stages = (discopt.Stage(3, 1), discopt.Stage(1, 4))
    return EvoPress(space, discopt.EvoPressSettings(generations=12, offspring=6, stages=stages), seed=3)


def search(name: str, folder: RunFolder | None = None, limit: int | None = None, resume: bool = False) -> Any:
    problem = PROBLEMS["noisy-quadratic"](n=16, m=3)
    return discopt.minimize(
        problem.objective,
        problem.space,
        optimizer=optimizer(name, problem.space),
        limits=Limits(evaluations=limit),
        folder=folder,
        resume=resume,
    )


def moved(trace: Any) -> list[list[list[int]]]:
    return [line["moved"] for line in trace]


@pytest.mark.parametrize("name", ["evopress", "learning"])
def test_the_moves_lead_from_the_start_to_the_answer(name: str) -> None:
    result = search(name)
    changed = [line for line in result.trace if line["moved"] and line["generation"]]
    assert changed
    levels = result.start.profile.copy()
    for line in changed:
        for unit, before, after in line["moved"]:
            assert levels[unit] == before != after
            levels[unit] = after
    assert np.array_equal(levels, result.profile)


@pytest.mark.parametrize("name", ["evopress", "learning"])
def test_a_resumed_search_has_the_moves_of_an_undisturbed_one(name: str, tmp_path: Path) -> None:
    whole = search(name)
    folder = RunFolder.create(tmp_path / "run", {"command": "solve"})
    search(name, folder, limit=25)
    resumed = search(name, folder, resume=True)
    assert moved(resumed.trace) == moved(whole.trace) == moved(folder.trace())
