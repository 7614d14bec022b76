"""`discopt resume`: runs that were interrupted, killed or out of room go on to the undisturbed end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from discopt.folder import RunFolder
from discopt.optimizers import StopReason
from tests.documents import change as change_document
from tests.own import OWN, PROGRAM, answer, call, line_of, refused, solve, start, wait_for_lines

pytestmark = pytest.mark.usefixtures("own")


def test_a_finished_run_says_so_and_prints_its_result_again(tmp_path: Path) -> None:
    first = solve("linear", "--generations", "5", "--out", "run", "--json", "--quiet")
    before = {entry: entry.read_bytes() for entry in (tmp_path / "run").iterdir()}
    again = call("resume", "run", "--json")
    assert again.exit_code == 0
    assert again.stdout == first.stdout
    assert "run is finished: the limit of evaluations is reached" in again.stderr
    assert "best loss" in call("resume", "run").stdout
    assert {entry: entry.read_bytes() for entry in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize("algorithm", ["learning", "evopress", "random", "annealing", "genetic"])
@pytest.mark.parametrize("limit", [["--max-evaluations", "100"], ["--max-fidelity", "300"], ["--max-seconds", "0.001"]])
def test_a_run_that_a_limit_ended_goes_on_to_the_undisturbed_end(
    tmp_path: Path, limit: list[str], algorithm: str
) -> None:
    common = ["--generations", "12", "--stage", "1@4", "--algorithm", algorithm, "--quiet", "--out"]
    assert solve("noisy", *common, "whole").exit_code == 0
    assert solve("noisy", *common, "part", *limit).exit_code == 0
    assert answer(tmp_path / "part")[0]["evaluations"] < answer(tmp_path / "whole")[0]["evaluations"]
    assert call("resume", "part", "--quiet").exit_code == 0
    assert answer(tmp_path / "part") == answer(tmp_path / "whole")
    assert "is finished" in call("resume", "part").stderr


def test_a_limit_can_be_replaced_step_by_step(tmp_path: Path) -> None:
    common = ["--generations", "12", "--quiet", "--out"]
    solve("noisy", *common, "whole")
    solve("noisy", *common, "part", "--max-evaluations", "60")
    for limit in (100, 140):
        document = json.loads(call("resume", "part", "--max-evaluations", limit, "--json", "--quiet").stdout)
        assert limit - 17 < document["evaluations"] <= limit
        assert RunFolder.open("part").request["options"]["max_evaluations"] == limit
    call("resume", "part", "--quiet")
    assert answer(tmp_path / "part") == answer(tmp_path / "whole")


def test_a_goal_that_is_met_ends_a_run_until_there_is_another(tmp_path: Path) -> None:
    solve("linear", "--generations", "60", "--target-loss", "-3", "--quiet", "--out", "run")
    assert "run is finished: the target loss is reached" in call("resume", "run", "--quiet").stderr
    document = json.loads(call("resume", "run", "--target-loss", "-4.75", "--json", "--quiet").stdout)
    assert (document["loss"], document["stop"]) == (-4.75, StopReason.TARGET.value)


def test_a_run_can_be_resumed_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solve("linear", "--generations", "8", "--max-evaluations", "40", "--quiet", "--out", "run")
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    assert call("resume", tmp_path / "run", "--quiet").exit_code == 0


def test_an_objective_that_fails_can_be_mended_and_gone_on_with(tmp_path: Path) -> None:
    common = ["--generations", "12", "--quiet", "--out"]
    solve("fails_later", *common, "whole")
    solve("fails_later", *common, "run", "--max-evaluations", "60")
    (tmp_path / "broken").touch()
    message = refused(call("resume", "run", "--quiet"))
    assert "RuntimeError" in message
    place = f"own.py:{line_of('raise RuntimeError')}"
    assert f"the measuring broke ({place}); mend it and go on with: discopt resume run" in message
    (tmp_path / "broken").unlink()
    assert call("resume", "run", "--quiet").exit_code == 0
    assert answer(tmp_path / "run") == answer(tmp_path / "whole")


def test_another_problem_under_the_same_name_is_refused(own: Path) -> None:
    solve("linear", "--generations", "8", "--max-evaluations", "40", "--quiet", "--out", "run")
    own.write_text(OWN.replace("cardinality(12, 4", "cardinality(12, 5"))
    message = refused(call("resume", "run"))
    assert "own.py:linear is not the problem that run began with: its units, costs or budget differ" in message


def test_changed_code_is_said(own: Path) -> None:
    solve("linear", "--generations", "8", "--max-evaluations", "40", "--quiet", "--out", "run")
    own.write_text(OWN + "\n# a note\n")
    result = call("resume", "run", "--quiet")
    assert result.exit_code == 0
    assert result.stderr == "warning: own.py has changed since the run began\n"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "run.json").unlink(), "run is not a run folder: it has no run.json"),
        (lambda run: (run / "run.json").write_text("{"), "run.json is damaged: it is not whole JSON"),
        (lambda run: (run / "checkpoint.json").write_text("{}"), "checkpoint.json is not ours"),
        (lambda run: os.truncate(run / "checkpoint.json", 300), "checkpoint.json is damaged: it is not whole JSON"),
        (lambda run: (run / "trace.jsonl").unlink(), "trace.jsonl is damaged: it has 0 whole lines"),
        (lambda run: (run / "results.json").write_text("["), "results.json is damaged"),
        (
            lambda run: change(run, options={"target": "own.py:linear", "color": 3}),
            "the options in run.json are damaged",
        ),
        (lambda run: change(run, options=3), "the options in run.json are damaged"),
        (
            lambda run: change(run, options={"target": "own.py:linear", "stages": ["1"]}),
            "the options in run.json are damaged",
        ),
        (
            lambda run: change(run, command="make tea"),
            "run is a run of 'make tea', which no installed package can go on with",
        ),
    ],
)
def test_a_damaged_run_is_refused_in_one_line(tmp_path: Path, damage: Any, message: str) -> None:
    solve("linear", "--generations", "8", "--max-evaluations", "40", "--quiet", "--out", "run")
    damage(tmp_path / "run")
    assert message in refused(call("resume", "run", "--json"))


def change(run: Path, **changes: Any) -> None:
    change_document(run / "run.json", **changes)


def test_a_missing_run_is_one_line() -> None:
    assert refused(call("resume", "nowhere")) == "error: nowhere does not exist"


# signals


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_the_best_and_goes_on_to_the_undisturbed_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    common = ["own.py:slow", "--generations", "25", "--out"]
    process = start("solve", *common, "run")
    wait_for_lines(tmp_path / "run" / "trace.jsonl", 4, process)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert "interrupted; go on with: discopt resume run" in stderr
    assert "best loss" in stdout
    assert "stopped     interrupted; resume to go on" in stdout
    results, trace = answer(tmp_path / "run")
    assert results["stop"] == StopReason.INTERRUPTED.value
    assert 4 <= len(trace) < 25

    monkeypatch.setenv("PAUSE", "0")
    assert call("resume", "run", "--quiet").exit_code == 0
    assert call("solve", *common, "whole", "--quiet").exit_code == 0
    assert answer(tmp_path / "run") == answer(tmp_path / "whole")


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_killed_run_goes_on_to_the_undisturbed_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = ["own.py:slow", "--generations", "50", "--out"]
    for lines in (1, 25, 45):
        process = start("solve", *common, "run") if lines == 1 else start("resume", "run")
        wait_for_lines(tmp_path / "run" / "trace.jsonl", lines, process)
        process.kill()
        process.communicate()
    monkeypatch.setenv("PAUSE", "0")
    assert call("resume", "run", "--quiet").exit_code == 0
    assert call("solve", *common, "whole", "--quiet").exit_code == 0
    assert answer(tmp_path / "run") == answer(tmp_path / "whole")


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_an_interrupt_before_any_measurement_is_a_clean_end(tmp_path: Path) -> None:
    process = start("solve", "own.py:slow", "--out", "run", "--json", PAUSE="30")
    deadline = time.monotonic() + 30
    while not (tmp_path / "run" / "run.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert json.loads(stdout)["loss"] is None
    assert not (tmp_path / "run" / "profile.json").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_sigterm_ends_a_background_job_that_ignores_ctrl_c(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*PROGRAM, "solve", "own.py:slow", "--out", "run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    wait_for_lines(tmp_path / "run" / "trace.jsonl", 2, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert "go on with: discopt resume run" in process.communicate(timeout=20)[1]
    assert process.returncode == 130


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_a_full_disk_ends_a_run_in_one_line_and_it_goes_on_when_there_is_room(tmp_path: Path) -> None:
    import resource

    common = ["solve", "own.py:noisy", "--generations", "30", "--quiet", "--out"]
    run = subprocess.run(
        [*PROGRAM, *common, "run"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: (
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)),
        ),
    )
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == "error: cannot write run/trace.jsonl: File too large\n"
    assert call("resume", "run", "--quiet").exit_code == 0
    assert call(*common, "whole").exit_code == 0
    assert answer(tmp_path / "run") == answer(tmp_path / "whole")
