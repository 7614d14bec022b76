from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from discopt import DiscoptError, EvoPressSettings, Query, Result, RunFolder, SearchSpace, Stage, minimize
from discopt.actors import begin, import_ray
from discopt.errors import WorkersError
from discopt.executors import WorkersObjective
from discopt.objective import Losses, Objective
from discopt.workers import Workers, WorkersAt, always, slices
from tests.held import DOOMED, POISONED, FailsOnce, Held, fail
from tests.own import PROGRAM, answer, call, line_of, refused, solve

needs_ray = pytest.mark.usefixtures("ray_here")

SPACE = SearchSpace.cardinality(20, 6)
SETTINGS = EvoPressSettings(generations=1, offspring=8, stages=(Stage(4, 1), Stage(2, 4), Stage(1, 16)))


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    """A Ray of this machine with room for sixteen workers of a quarter CPU."""
    if find_spec("ray") is None:
        pytest.skip("workers need ray")
    ray = import_ray()
    before = signal.getsignal(signal.SIGTERM)
    begin(ray, None, cpus=4)
    assert signal.getsignal(signal.SIGTERM) == before
    yield
    ray.shutdown()


@contextmanager
def working(count: int, make: Callable[[], Any], seconds: float | None = None) -> Iterator[tuple[Workers, list[str]]]:
    """Workers, and what they say but that they start."""
    said: list[str] = []
    with Workers(WorkersAt(count), make, seconds=seconds, cpus=0.25, say=said.append) as workers:
        assert said.pop(0) == f"starting {count} workers"
        yield workers, said


@pytest.fixture(scope="module")
def marks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the workers of `three` look for what is to befall them."""
    return tmp_path_factory.mktemp("marks")


@pytest.fixture(scope="module")
def three(ray_here: None, marks: Path) -> Iterator[Workers]:
    """Workers for the tests that lose none."""
    with working(3, partial(Held, marks)) as (workers, said):
        yield workers
        assert len(workers) == 3
        assert all("gave an answer that is not valid" in line for line in said)


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("4", WorkersAt(4)),
        ("ray://head:10001", WorkersAt(None, "ray://head:10001")),
        ("ray://10.0.0.1:10001?workers=8", WorkersAt(8, "ray://10.0.0.1:10001")),
    ],
)
def test_workers_are_a_number_or_the_address_of_a_cluster(text: str, at: WorkersAt) -> None:
    assert WorkersAt.parse(text) == at
    assert str(at) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "-1",
        "1.5",
        "four",
        "head:10001",
        "http://head:10001",
        "ray://head",
        "ray://:10001",
        "ray://head:x",
        "9" * 5000,
    ]
    + [f"ray://head:10001{rest}" for rest in ("/path", "#head", "?workers=0", "?workers=", "?gpus=1", "?workers")],
)
def test_workers_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="workers must be a number such as 4 or ray://HOST:PORT, got"):
        WorkersAt.parse(text)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 100])
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_slices_are_contiguous_even_and_never_empty(count: int, parts: int) -> None:
    cut = slices(count, parts)
    sizes = [part.stop - part.start for part in cut]
    assert len(cut) == min(count, parts)
    assert sum(sizes) == count
    assert not sizes or (min(sizes) > 0 and max(sizes) - min(sizes) <= 1)
    assert not cut or cut[0].start == 0
    assert all(left.stop == right.start for left, right in pairwise(cut))


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DiscoptError, match=r"^workers need the extra ray: pip install 'discopt-search\[ray\]'$"):
        Workers(WorkersAt(2), fail, say=print)


def test_answers_come_in_order(three: Workers) -> None:
    assert three.call("double", [(number,) for number in range(20)]) == list(range(0, 40, 2))
    assert three.call("double", []) == []


def test_every_worker_takes_part_and_a_free_one_takes_the_next_call(three: Workers) -> None:
    pids = three.call("pid", [(1.0,), (0.05,), (0.05,), (0.05,), (0.05,), (0.05,)])
    assert set(pids) == set(three.pids.values())
    assert pids.count(pids[0]) == 1


def test_workers_run_where_this_process_does_and_share_its_cores(three: Workers) -> None:
    assert set(three.call("surroundings", [()] * 3)) == {(os.getcwd(), "1")}


def test_what_the_method_raises_is_raised_and_the_calls_beside_it_are_forgotten(three: Workers) -> None:
    with pytest.raises(KeyError, match="missing") as caught:
        three.call("raise_if", [(True, 0), (False, 1), (False, 2)])
    assert "held.py" in caught.value.__notes__[0]
    assert three.call("double", [(number,) for number in range(6)]) == [0, 2, 4, 6, 8, 10]


def test_an_error_that_cannot_be_sent_comes_as_text(three: Workers) -> None:
    with pytest.raises(RuntimeError, match="UnportableError: left"):
        three.call("raise_unportable", [()])


def test_arguments_that_cannot_be_sent_are_the_callers_error(three: Workers) -> None:
    with pytest.raises(TypeError, match="lock"):
        three.call("double", [(threading.Lock(),)])
    assert three.call("double", [(1,)]) == [2]


def test_an_invalid_answer_of_one_worker_is_not_believed(three: Workers) -> None:
    ill = three.pids[2]
    assert three.call("nan_if", [(ill, n) for n in range(9)], valid=np.isfinite) == list(range(9))
    assert np.isnan(three.call("nan_if", [(ill, n) for n in range(9)])).any()  # where nobody looks


def test_an_invalid_answer_of_all_workers_is_returned(three: Workers) -> None:
    answers = three.call("double", [(number,) for number in (1.0, float("nan"), 3.0)], valid=np.isfinite)
    assert answers[::2] == [2.0, 6.0]
    assert np.isnan(answers[1])


def test_threads_may_call_at_once(three: Workers) -> None:
    answers: dict[int, list[float]] = {}

    def ask(start: int) -> None:
        answers[start] = three.call("double", [(start + i,) for i in range(10)])

    threads = [threading.Thread(target=ask, args=(start,)) for start in (0, 100, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {start: [2 * (start + i) for i in range(10)] for start in (0, 100, 200)}


@needs_ray
def test_workers_are_lost_one_by_one_and_the_others_go_on(tmp_path: Path) -> None:
    with working(4, partial(Held, tmp_path), seconds=1.0) as (workers, said):
        pids = workers.pids
        numbers = list(range(8))
        assert workers.call("die_if", [(pids[2], n) for n in numbers], valid=always) == numbers  # in a call
        os.kill(pids[1], signal.SIGKILL)  # while it has nothing to do
        assert workers.call("double", [(n,) for n in numbers]) == [2 * n for n in numbers]
        began = time.monotonic()
        assert workers.call("stop_if", [(pids[4], n) for n in numbers]) == numbers  # hangs
        assert 1.0 <= time.monotonic() - began < 5.0
        assert said == [
            "worker 2 died; 3 left; its part is done by another",
            "worker 1 died; 2 left; its part is done by another",
            "worker 4 took longer than 1 s and was stopped; 1 left; its part is done by another",
        ]
        assert list(workers.pids) == [3]
        assert len(workers) == 1
        assert np.isnan(workers.call("nan_if", [(pids[3], 1)], valid=np.isfinite)[0])  # nobody is left to ask
        with pytest.raises(WorkersError, match="no worker is left: all of them died or were stopped"):
            workers.call("die_if", [(pids[3], n) for n in numbers])
        assert said[-1] == "worker 3 died; none is left"
        with pytest.raises(WorkersError, match="no worker is left"):
            workers.call("double", [(1,)])


@needs_ray
def test_a_worker_that_cannot_make_its_object_is_left_out(tmp_path: Path) -> None:
    with working(2, FailsOnce(tmp_path)) as (workers, said):
        assert len(workers) == 1
        assert said[0].endswith("did not start: no model there; 1 left")
        assert workers.call("double", [(1,), (2,)]) == [2, 4]


@needs_ray
def test_what_no_worker_can_make_is_raised_as_it_is() -> None:
    with pytest.raises(FileNotFoundError, match="no model there"):
        Workers(WorkersAt(2), fail, cpus=0.25, say=print)


@needs_ray
def test_more_workers_than_there_is_room_for_are_refused() -> None:
    message = "this machine has room for 16 workers of 0.25 CPUs and 0 GPUs each, got 17"
    with pytest.raises(WorkersError, match=message):
        Workers(WorkersAt(17), fail, cpus=0.25, say=print)
    with pytest.raises(WorkersError, match="this machine has room for 0 workers of 1 CPUs and 1 GPUs each, got 1"):
        Workers(WorkersAt(1), fail, gpus=1, say=print)


@pytest.mark.parametrize("options", [{"seconds": 0.0}, {"cpus": -1.0}, {"cpus": 0.0}])
def test_workers_check_their_options(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="got"):
        Workers(WorkersAt(1), fail, say=print, **options)


class Disturbed:
    """The objective of workers, one of which is marked by a file before every query."""

    def __init__(self, workers: Workers, folder: Path, mark: str) -> None:
        self.workers, self.folder, self.mark = workers, folder, mark
        self.marked: list[int] = []

    def evaluate(self, query: Query) -> Losses:
        number, pid = min(self.workers.pids.items())
        (self.folder / f"{self.mark}{pid}").touch()
        self.marked.append(number)
        return WorkersObjective(self.workers).evaluate(query)


def searched(objective: Objective) -> Result:
    return minimize(objective, SPACE, SETTINGS, seed=1)


def same(a: Result, b: Result) -> bool:
    def timeless(result: Result) -> list[dict[str, Any]]:
        return [{k: v for k, v in line.items() if k != "seconds"} for line in result.trace]

    return bool((a.profile == b.profile).all()) and a.loss == b.loss and timeless(a) == timeless(b)


def test_a_search_with_workers_ends_as_without(three: Workers, marks: Path) -> None:
    assert same(searched(Held(marks)), searched(WorkersObjective(three)))


def test_a_search_is_the_same_if_one_worker_answers_with_nan(three: Workers, marks: Path) -> None:
    poisoned = Disturbed(three, marks, POISONED)
    assert same(searched(Held(marks)), searched(poisoned))
    assert set(poisoned.marked) == {1}


@needs_ray
def test_a_search_survives_a_worker_killed_in_every_stage(tmp_path: Path) -> None:
    alone = searched(Held(tmp_path))
    with working(5, partial(Held, tmp_path)) as (workers, said):
        objective = Disturbed(workers, tmp_path, DOOMED)
        assert same(alone, searched(objective))
        assert objective.marked == [1, 2, 3, 4]
        assert len(alone.trace) == 4  # the start, and three stages
        assert said == [
            f"worker {number} died; {5 - number} left; its part is done by another" for number in objective.marked
        ]
        assert same(alone, searched(WorkersObjective(workers)))  # by the last one


@needs_ray
@pytest.mark.usefixtures("own")
def test_solve_with_workers_ends_as_without_and_goes_on_with_others(tmp_path: Path) -> None:
    common = ["--generations", "6", "--quiet", "--out"]
    assert solve("linear", *common, "alone").exit_code == 0
    result = solve("linear", *common, "spread", "--max-evaluations", "50", "--workers", "2", "--worker-seconds", "60")
    assert (result.exit_code, result.stderr) == (0, "starting 2 workers\n")
    assert RunFolder.open("spread").request["options"]["workers"] == "2"
    result = call("resume", "spread", "--quiet", "--workers", "1")
    assert (result.exit_code, result.stderr) == (0, "starting 1 worker\n")
    assert answer(tmp_path / "spread") == answer(tmp_path / "alone")
    assert "is finished" in call("resume", "spread", "--workers", "3").stderr


@needs_ray
@pytest.mark.usefixtures("own")
def test_what_the_objective_raises_in_a_worker_is_one_line_with_its_place() -> None:
    message = refused(solve("raises", "--quiet", "--workers", "1", "--out", "run"))
    assert message.startswith("error: the objective raised ZeroDivisionError on ")
    assert f"division by zero (own.py:{line_of('1 / 0')}); mend it and go on with: discopt resume run" in message


@needs_ray
@pytest.mark.usefixtures("own")
def test_a_search_that_loses_all_workers_says_how_to_go_on() -> None:
    message = refused(solve("slow", "--quiet", "--workers", "1", "--worker-seconds", "0.01", "--out", "run"))
    assert message == (
        "error: no worker is left: all of them died or were stopped; mend it and go on with: discopt resume run"
    )


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workers", "none"], "workers must be a number such as 4 or ray://HOST:PORT, got 'none'"),
        (["--workers", "2", "--worker-seconds", "0"], "worker_seconds must be above 0 and needs workers, got 0.0"),
        (["--worker-seconds", "1"], "worker_seconds must be above 0 and needs workers, got 1.0"),
    ],
)
def test_wrong_options_of_workers_are_one_line(words: list[str], message: str) -> None:
    result = solve("linear", *words)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.usefixtures("own")
def test_resume_refuses_options_of_other_runs() -> None:
    solve("linear", "--generations", "2", "--quiet", "--out", "run")
    for words in (["--workers", "none"], ["--memory", "1GiB"]):
        result = call("resume", "run", *words)
        assert (result.exit_code, result.stdout) == (2, "")
    assert "only for runs of `discopt llm`" in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.slow
@pytest.mark.usefixtures("own")
@pytest.mark.skipif(find_spec("ray") is None, reason="workers need ray")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_command_leaves_no_process_behind_and_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    common = ["--generations", "40", "--quiet", "--out"]
    solve("slow", *common, "whole")
    process = subprocess.Popen(
        [*PROGRAM, "solve", "own.py:slow", *common, "part", "--workers", "2"],
        env={**os.environ, "PAUSE": "0.1"},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    trace = tmp_path / "part" / "trace.jsonl"
    while not trace.exists() or trace.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    process.wait(timeout=60)
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    for _ in range(90):  # Ray's own daemons look for their parent now and then
        left = subprocess.run(["ps", "-s", str(process.pid), "-o", "pid="], capture_output=True, text=True).stdout
        if not left.strip():
            break
        time.sleep(1)
    assert not left.strip()
    assert call("resume", "part", "--quiet", "--workers", "1").exit_code == 0
    assert answer(tmp_path / "part") == answer(tmp_path / "whole")
