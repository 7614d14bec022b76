"""`discopt` on problems of the user's own, called in this process or in one of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from discopt.cli import app
from discopt.folder import RunFolder
from tests.documents import read_document

PROGRAM = [sys.executable, "-c", "from discopt.cli import main; main()"]
OWN = """
import json, os, time
import numpy as np
from discopt import SearchSpace, as_objective
from discopt.problems import Problem

SPACE = SearchSpace.cardinality(12, 4, names=[f"u{i}" for i in range(12)])
WEIGHT = np.arange(12) / 8  # best: the last four

def total(population):
    return -(population * WEIGHT).sum(axis=1)

def sampled(population, fidelity, seed):
    noise = np.random.default_rng(seed).normal(size=(len(population), 4))
    return total(population)[:, None] + noise / fidelity

linear = Problem("linear", SPACE, as_objective(total), optimum=-4.75, note="The last four are best.")
noisy = Problem("noisy", SPACE, as_objective(sampled))
number = 3

def made():
    return linear

def needs(n, m=1):
    return linear

def slow():
    def loss(population):
        time.sleep(float(os.environ.get("PAUSE", "0.05")))
        return total(population)
    return Problem("slow", SPACE, as_objective(loss))

def talks():
    print("made")
    def loss(population):
        print("measured")
        os.system("echo by a child")
        return total(population)
    return Problem("talks", SPACE, as_objective(loss))

def bad_answer():
    return Problem("bad", SPACE, as_objective(lambda population: total(population)[:-1]))

def raises():
    def loss(population):
        return 1 / 0
    return Problem("raises", SPACE, as_objective(loss))

def fails_later():
    def loss(population):
        if os.path.exists("broken"):
            raise RuntimeError("the measuring\\nbroke")
        return total(population)
    return Problem("later", SPACE, as_objective(loss))

def nan():
    return Problem("nan", SPACE, as_objective(lambda population: np.full(len(population), np.nan)))

def big():
    space = SearchSpace.cardinality(5000, 50)
    return Problem("big", space, as_objective(lambda population: -population[:, :100].sum(axis=1)))

def tight():
    return Problem("tight", SearchSpace.build(np.tile([3, 4], (5, 1)), 14), as_objective(total))

def wrong_cost():
    return Problem("wrong", SearchSpace.build(np.zeros((2, 2)), 14), as_objective(total))
"""


def line_of(code: str) -> int:
    """The line of own.py that holds `code`."""
    return next(number for number, line in enumerate(OWN.splitlines(), start=1) if code in line)


def call(*words: str | Path) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def solve(name: str, *words: str | Path) -> Any:
    return call("solve", f"own.py:{name}", *words)


def refused(result: Any, code: int = 1) -> str:
    """The one line of a command that failed for the user's sake."""
    assert result.exit_code == code
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert result.stdout == ""
    return str(lines[0])


def answer(path: Path) -> Any:
    """All of a run's result that does not tell the time."""
    results = read_document(path / "results.json")
    trace = [{k: v for k, v in line.items() if k != "seconds"} for line in RunFolder.open(path).trace()]
    return {k: v for k, v in results.items() if k not in ("seconds", "folder", "continued")}, trace


def start(*words: str | Path, **environment: str) -> subprocess.Popen[str]:
    """The program in a process of its own, with Ctrl-C as on a terminal."""
    return subprocess.Popen(
        [*PROGRAM, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError(f"no {count} lines in {path}")
