"""Readers of the engine on damaged and hostile input: what they refuse, they refuse in one line of ours."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from discopt import DiscoptError, Limits, RunFolder, SearchSpace, Stage
from discopt import solve as solving
from discopt.cli import _weights
from discopt.folder import request_of
from discopt.loading import load_problem, split_target
from discopt.optimizers import ALGORITHMS, Plan
from discopt.run import _Run
from discopt.solve import SolveRequest, finished, go_on, read_start
from discopt.workers import WorkersAt
from tests.fuzzing import (
    Reader,
    Rng,
    as_json,
    both,
    fuzz,
    mutated_bytes,
    mutated_json,
    mutated_text,
    sealed_again,
    shared_out,
)
from tests.own import solve

FEW, MANY = 1200, 50_000  # inputs in all
OWN = """\
import numpy as np
from discopt import SearchSpace
from discopt.problems import Problem

SPACE = SearchSpace.cardinality(4, 2)
CODE = {"a": [1, 2.5, None], b"x": ("é", 0x1F)}

def made():
    if not SPACE.n:
        raise ValueError("too few")
    return Problem("linear", SPACE, lambda population: -(population * np.arange(4)).sum(axis=1))
"""
SPACE = SearchSpace.cardinality(12, 4)  # of `linear`


class Stopped:
    """A stopped run of `linear`, with one of its files replaced at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._whole = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}

    def document(self, name: str) -> Any:
        return json.loads(self._whole[name])

    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self._whole["trace.jsonl"].splitlines()]

    def opened(self, name: str, data: bytes) -> RunFolder:
        for file in ("run.json", "trace.jsonl"):  # which reading changes
            (self.path / file).write_bytes(self._whole[file])
        (self.path / name).write_bytes(data)
        return RunFolder.open(self.path)


@pytest.fixture
def stopped(own: Path, monkeypatch: pytest.MonkeyPatch) -> Stopped:
    """It is gone on with up to its search."""
    assert solve("linear", "--seed", 3, "--generations", 5, "--max-evaluations", 30, "--out", "run").exit_code == 0
    for name in ("_optimizer", "_search"):
        monkeypatch.setattr(solving, name, lambda *_, **__: {})
    return Stopped(own.parent / "run")


def runs(stopped: Stopped) -> Reader:
    def read(data: bytes) -> None:
        folder = stopped.opened("run.json", data)
        assert isinstance(folder.request, dict) and isinstance(folder.request["command"], str)
        try:
            if folder.request["command"] == "solve":
                go_on(folder, {}, quiet=True, warn=lambda line: None)
        finally:
            folder.release()

    return Reader(read, both([stopped.document("run.json")]))


def checkpoints(stopped: Stopped) -> Reader:
    """Those of every algorithm."""
    plan = Plan(evaluations=60, start=tuple(SPACE.nearest_uniform().tolist()))

    def search(name: str) -> Any:
        return ALGORITHMS[name](SPACE, plan, 3)

    seeds = {}
    for name in ALGORITHMS:
        folder = stopped.opened("run.json", stopped._whole["run.json"])
        run = _Run(search(name), Limits(), folder, 0.0)
        for _ in range(2):
            query = run.optimizer.ask()
            run._record(query, -query.population.sum(axis=1).astype(float))
        run.save()
        folder.release()
        seeds[name] = json.loads((stopped.path / "checkpoint.json").read_bytes())

    def inputs(rng: Rng) -> Iterator[tuple[str, bytes]]:
        streams = {name: both([seed])(rng) for name, seed in seeds.items()}
        names = list(seeds)
        while True:
            name = names[rng.integers(len(names))]
            yield name, next(streams[name])

    def read(given: tuple[str, bytes]) -> None:
        folder = stopped.opened("checkpoint.json", given[1])
        try:
            assert isinstance(folder.load_checkpoint(), dict)
            _Run(search(given[0]), Limits(), folder, 0.0).restore()
        finally:
            folder.release()

    return Reader(read, inputs)


def traces(stopped: Stopped) -> Reader:
    lines = stopped.lines()
    text = b"".join(as_json(line) + b"\n" for line in lines)

    def inputs(rng: Rng) -> Iterator[bytes]:
        mutated, raw = mutated_json(lines, rng, sealed_again), mutated_bytes([text], rng)
        while True:
            yield (
                b"\n".join([as_json(lines[0]), next(mutated), as_json(lines[1]), b""]) if rng.integers(4) else next(raw)
            )

    def read(data: bytes) -> None:
        folder = stopped.opened("trace.jsonl", data)
        found = folder.trace()
        try:
            folder.truncate_trace(min(2, len(found)))
            assert folder.trace() == found[:2]
        finally:
            folder.release()

    return Reader(read, inputs)


def results(stopped: Stopped) -> Reader:
    def read(data: bytes) -> None:
        found = finished(stopped.opened("results.json", data), {})
        assert found is None or isinstance(found, dict)

    return Reader(read, both([stopped.document("results.json")]))


def starts(stopped: Stopped) -> Reader:
    def read(data: bytes) -> None:
        (stopped.path / "start.json").write_bytes(data)
        levels = read_start(stopped.path / "start.json")
        assert all(type(level) is int for level in levels)
        with suppress(ValueError):  # none of this space
            assert SPACE.feasible(SPACE.check(np.array(levels))[None])[0]

    return Reader(read, both([stopped.document("profile.json"), [0, 1] * 6]))


def code(stopped: Stopped) -> Reader:
    def read(data: bytes) -> None:
        (stopped.path / "fuzzed.py").write_bytes(data)
        load_problem("fuzzed.py:made", stopped.path)

    return Reader(read, lambda rng: mutated_bytes([OWN.encode()], rng))


def targets(stopped: Stopped) -> Reader:
    seeds = ["own.py:linear", "a/b.py:x", "./own.py:made", "own.py:bad_answer"]

    def read(text: str) -> None:
        where, name = split_target(text)
        assert where and name.isidentifier()
        if ".py" in where or "/" in where:  # no module of this computer is loaded for a name drawn at random
            load_problem(text, stopped.path)

    return Reader(read, lambda rng: mutated_text(seeds, rng), (DiscoptError, ValueError))


def options(_: Stopped) -> Reader:
    seed = asdict(SolveRequest("own.py:linear", stages=("4@2", "1@8"), parents=1, switches=(5.0, 3.0)))

    def inputs(rng: Rng) -> Iterator[bytes]:
        for data in mutated_json([seed], rng):
            with suppress(ValueError, RecursionError):
                json.loads(data)
                yield data

    def read(data: bytes) -> None:
        request = request_of(SolveRequest, json.loads(data))
        assert request_of(SolveRequest, asdict(request)) == request

    return Reader(read, inputs)


def stages(_: Stopped) -> Reader:
    def read(text: str) -> None:
        stage = Stage.parse(text)
        assert Stage.parse(str(stage)) == stage

    return Reader(read, lambda rng: mutated_text(["8@2048", " 1@1 "], rng), (ValueError,))


def workers(_: Stopped) -> Reader:
    seeds = ["4", "ray://10.0.0.1:10001", "ray://host:1?workers=8", "ray://[::1]:6"]

    def read(text: str) -> None:
        at = WorkersAt.parse(text)
        assert WorkersAt.parse(str(at)) == at

    return Reader(read, lambda rng: mutated_text(seeds, rng), (ValueError,))


def switches(_: Stopped) -> Reader:
    return Reader(_weights, lambda rng: mutated_text(["5,3,1", "1"], rng), (ValueError,))


READERS: dict[Callable[[Stopped], Reader], int] = {  # and their shares of the inputs
    runs: 3,
    checkpoints: 4,
    traces: 2,
    results: 3,
    starts: 4,
    code: 2,
    targets: 3,
    options: 4,
    stages: 2,
    workers: 3,
    switches: 1,
}


@pytest.mark.parametrize(("reader", "count"), shared_out(FEW, READERS))
def test_a_reader_reads_or_refuses_in_one_line(
    reader: Callable[[Stopped], Reader], count: int, stopped: Stopped
) -> None:
    assert fuzz(reader(stopped), count).inputs == count


@pytest.mark.slow
@pytest.mark.parametrize(("reader", "count"), shared_out(MANY, READERS))
def test_it_also_does_on_many_more(reader: Callable[[Stopped], Reader], count: int, stopped: Stopped) -> None:
    assert fuzz(reader(stopped), count, seed=1).inputs == count
