from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from discopt import cli
from discopt.cli import app
from discopt.compare import CompareRequest, compare
from discopt.errors import DiscoptError, RunFolderError
from discopt.sealed import read_lines
from tests.compare_own import OWN
from tests.documents import read_document

PROGRAM = [sys.executable, "-c", "from discopt.cli import main; main()"]
ASKED = ("--problems", "own.py:linear,own.py:noisy", "--algorithms", "own.py:GOOD", "--seeds", "3", "--budget", "8,40")


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with own.py in it, as the current one; no pictures, which take their time."""
    path = tmp_path / "own.py"
    path.write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("discopt.compare.plot_comparison", lambda *_: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(cli.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    )
    yield path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def call(*words: str | Path) -> Any:
    result = CliRunner().invoke(app, ["compare", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def lines(out: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """runs.jsonl by run, without what tells the time."""
    rows = read_lines(out / "runs.jsonl", "")
    assert len({(row["problem"], row["algorithm"], row["seed"]) for row in rows}) == len(rows)
    return {
        (row["problem"], row["algorithm"], row["seed"]): {
            key: value for key, value in row.items() if key not in ("seconds", "overhead")
        }
        for row in rows
    }


def report(out: Path) -> dict[str, Any]:
    """report.json without what tells the time, or the folder."""
    text = (out / "report.json").read_text()
    text = re.sub(r'"(overhead_seconds|seconds)": [\d.e-]+', r'"\1": 0', text).replace(out.name, "OUT")
    return {name: value for name, value in json.loads(text).items() if name != "checksum"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison by one process that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "own.py").write_text(OWN)
    words = [*PROGRAM, "compare", *ASKED, "--workers", "1", "--out", "whole", "--json"]
    path = os.pathsep.join([str(Path(cli.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        words, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == read_document(folder / "whole" / "report.json")
    return folder / "whole"


def test_a_finished_folder_has_all_runs_the_report_and_the_pictures(whole: Path) -> None:
    assert len(lines(whole)) == 2 * 2 * 3
    names = {path.name for path in whole.iterdir()}
    assert {"run.json", "runs.jsonl", "report.md", "report.json", "comparison.json"} <= names
    if "curves.png" in names:  # needs matplotlib
        assert {"targets.png", "running-time.png", "ranks.png"} <= names
        assert "(running-time.png)" in (whole / "report.md").read_text()


def test_the_reports_numbers_are_those_of_the_runs(whole: Path) -> None:
    document = read_document(whole / "report.json")
    points = read_document(whole / "comparison.json")["points"]
    runs = lines(whole)
    facts = {row["name"]: row for row in document["problems"]}
    assert document["default"] == "evopress"
    for cell in document["cells"]:
        problem = facts[cell["problem"]]
        at = points.index(cell["budget"])
        losses = [runs[cell["problem"], cell["algorithm"], seed]["losses"][at] for seed in range(3)]
        scale = problem["random"] + 4.75
        gaps = [None if loss is None else (loss + 4.75) / scale for loss in losses]
        if None in gaps:
            assert (cell["budget"], cell["median"]) == (8, None)  # 16 profiles at once exceed it
        else:
            assert cell["median"] == pytest.approx(statistics.median(gaps), abs=1e-9)
            assert cell["success"] == pytest.approx(sum(gap <= 0.01 for gap in gaps) / 3)


def test_two_processes_find_what_one_does(whole: Path, tmp_path: Path) -> None:
    assert call(*ASKED, "--workers", "2", "--out", "two", "--quiet").exit_code == 0
    assert lines(tmp_path / "two") == lines(whole)
    assert report(tmp_path / "two") == {**report(whole), "command_line": report(tmp_path / "two")["command_line"]}


def test_a_rerun_does_only_what_is_missing_and_ends_alike(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "part"
    out.mkdir()
    (out / "run.json").write_bytes((whole / "run.json").read_bytes())
    kept = (whole / "runs.jsonl").read_text().splitlines(keepends=True)
    (out / "runs.jsonl").write_text("".join(kept[:7]) + kept[7][:50])  # the eighth was cut off
    result = call(*ASKED, "--workers", "1", "--out", out)
    assert "5 of 5 runs" in result.stderr
    assert (out / "runs.jsonl").read_text().startswith("".join(kept[:7]))
    assert lines(out) == lines(whole)
    assert report(out)["cells"] == report(whole)["cells"]
    before = (out / "runs.jsonl").read_bytes()
    assert call(*ASKED, "--out", out, "--quiet").exit_code == 0  # nothing is left to do
    assert (out / "runs.jsonl").read_bytes() == before


def wait_for_lines(path: Path, count: int) -> None:
    until = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < until
        time.sleep(0.02)


def begun(out: str) -> tuple[subprocess.Popen[str], list[str]]:
    """A slow comparison in a process group of its own, of which two runs have ended."""
    words = ["--problems", "own.py:slow", "--algorithms", "own.py:GOOD", "--seeds", "4", "--budget", "40"]
    words += ["--workers", "1", "--out", out]
    process = subprocess.Popen(
        [*PROGRAM, "compare", *words],
        env={**os.environ, "PAUSE": "0.03"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A background shell has it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_for_lines(Path(out) / "runs.jsonl", 2)
    return process, words


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(sys.platform == "win32", reason="needs process groups")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_comparison_leaves_no_process_and_goes_on(tmp_path: Path, how: signal.Signals) -> None:
    process, words = begun("stopped")
    if how is signal.SIGINT:
        os.killpg(process.pid, how)  # as a terminal does
    else:
        process.send_signal(how)
    _, stderr = process.communicate(timeout=60)
    if how is not signal.SIGKILL:
        assert process.returncode == 130
        assert "Traceback" not in stderr
        assert stderr.splitlines()[-1].startswith("interrupted; go on with: discopt compare --problems own.py:slow")
    until = time.monotonic() + 30
    while alive(process.pid):
        assert time.monotonic() < until
        time.sleep(0.02)
    some = len((tmp_path / "stopped" / "runs.jsonl").read_bytes().splitlines())
    assert 2 <= some < 8
    assert not (tmp_path / "stopped" / "report.json").exists()
    if how is signal.SIGINT:
        return  # to go on is the same
    result = call(*words)
    assert result.exit_code == 0 and f"{8 - some} of {8 - some} runs" in result.stderr
    assert len(lines(tmp_path / "stopped")) == 8


def test_algorithms_that_cannot_are_told_and_tried_again_only_where_that_may_help(tmp_path: Path) -> None:
    words = ["--problems", "own.py:linear", "--algorithms", "random,own.py:BAD", "--seeds", "1", "--budget", "20"]
    result = call(*words, "--workers", "1", "--out", "bad")
    assert "5 of 5 runs" in result.stderr
    text = (tmp_path / "bad" / "report.md").read_text()
    assert "| refuses | 1 not applicable | expected a smaller space, got 12 units | linear |" in text
    assert "| absent | 1 missing package | ModuleNotFoundError: No module named" in text
    assert "| breaks | 1 failed | TypeError: a bug of two lines | linear |" in text
    again = call(*words, "--workers", "1", "--out", "bad")
    assert "2 of 2 runs" in again.stderr
    assert result.stdout == again.stdout


def test_a_worker_that_dies_ends_the_comparison_in_one_line(tmp_path: Path) -> None:
    words = ["--problems", "own.py:linear", "--algorithms", "own.py:DEADLY", "--seeds", "1", "--budget", "20"]
    result = call(*words, "--workers", "1", "--quiet", "--out", "dead")
    assert result.exit_code == 1
    assert result.stderr == ("error: a worker process died; the same command goes on with the runs that are left\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--problems", "own.py:linear"), 'its problems is ["own.py:linear", "own.py:noisy"], got ["own.py:linear"]'),
        (("--budget", "8,41"), "its budget is [8, 40], got [8, 41]"),
        (("--max-seconds-per-run", "5"), "its max_seconds_per_run is 600.0, got 5.0"),
    ],
)
def test_the_folder_of_another_request_is_refused(whole: Path, change: tuple[str, str], message: str) -> None:
    before = (whole / "runs.jsonl").read_bytes()
    result = call(*ASKED, *change, "--out", whole)
    assert result.exit_code == 1 and result.stdout == ""
    assert f"was made by another request: {message}; choose another --out, or pass --force" in result.stderr
    assert (whole / "runs.jsonl").read_bytes() == before


def test_a_changed_file_makes_another_request(whole: Path, own: Path) -> None:
    own.write_text(OWN + "\n# changed\n")
    result = call(*ASKED, "--out", whole)
    assert result.exit_code == 1
    assert "was made by another request: its own.py is" in result.stderr


def copied(whole: Path, to: Path) -> Path:
    """A folder with the runs of another."""
    to.mkdir()
    for name in ("run.json", "runs.jsonl"):
        (to / name).write_bytes((whole / name).read_bytes())
    return to


def test_more_algorithms_and_seeds_run_only_what_is_missing(whole: Path, tmp_path: Path) -> None:
    out = copied(whole, tmp_path / "more")
    before = (out / "runs.jsonl").read_bytes()
    words = (*ASKED, "--algorithms", "own.py:GOOD,random", "--seeds", "4", "--workers", "1", "--quiet", "--out", out)
    assert call(*words).exit_code == 0
    assert (out / "runs.jsonl").read_bytes().startswith(before)
    found = lines(out)
    assert {key: found[key] for key in lines(whole)} == lines(whole)
    assert {key[1:] for key in found} == {(a, s) for a in ("draw", "evopress", "random") for s in range(4)}
    assert call(*ASKED, "--quiet", "--out", out).exit_code == 0  # and fewer again
    assert {row["algorithm"] for row in report(out)["cells"]} == {row["algorithm"] for row in report(whole)["cells"]}


def test_a_changed_algorithm_runs_anew_where_asked_and_the_others_stay(tmp_path: Path) -> None:
    words = ("--problems", "own.py:linear", "--algorithms", "random,mine.py:GOOD", "--seeds", "2", "--budget", "8,40")
    words = (*words, "--workers", "1", "--quiet", "--out", "own")
    mine = tmp_path / "mine.py"
    mine.write_text(OWN)
    assert call(*words).exit_code == 0
    before = lines(tmp_path / "own")
    mine.write_text(OWN.replace("draw(space, plan, seed):", "draw(space, plan, seed):\n    seed += 1"))
    refused = call(*words)
    assert refused.exit_code == 1 and "its mine.py is" in refused.stderr
    assert lines(tmp_path / "own") == before
    assert call(*words, "--again", "dr*,evopress").exit_code == 0
    after = lines(tmp_path / "own")
    assert after.keys() == before.keys()
    assert {key[1] for key in after if after[key] != before[key]} == {"draw"}
    assert call(*words, "--again", "none").stderr.startswith("error: there is no algorithm 'none'")


def test_a_folder_of_something_else_is_refused_even_with_force(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "runs.jsonl").write_text("mine\n")
    result = call(*ASKED, "--out", "mine", "--force")
    assert result.exit_code == 1 and "holds runs.jsonl but is not a run folder" in result.stderr
    assert (tmp_path / "mine" / "runs.jsonl").read_text() == "mine\n"


def test_a_damaged_line_is_refused(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_bytes((whole / "run.json").read_bytes())
    (tmp_path / "broken" / "runs.jsonl").write_text("{\n")
    result = call(*ASKED, "--out", "broken", "--quiet")
    assert result.exit_code == 1 and "runs.jsonl is damaged" in result.stderr


def test_a_file_that_cannot_be_read_is_one_line(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "odd" / "runs.jsonl").mkdir(parents=True)
    (tmp_path / "odd" / "run.json").write_bytes((whole / "run.json").read_bytes())
    result = call(*ASKED, "--out", "odd", "--quiet")
    assert (result.exit_code, result.stderr) == (1, "error: cannot read odd/runs.jsonl: Is a directory\n")


def test_force_replaces_a_comparison(whole: Path, tmp_path: Path) -> None:
    copied(whole, tmp_path / "old")
    words = ["--problems", "own.py:linear", "--algorithms", "random", "--seeds", "1", "--budget", "5", "--quiet"]
    assert call(*words, "--workers", "1", "--out", "old", "--force").exit_code == 0
    assert [key[1] for key in lines(tmp_path / "old")] == ["random"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--problems", "nothing-*"), "there is no problem 'nothing-*'; there are: "),
        (("--algorithms", "nothing"), "there is no algorithm 'nothing'; there are: "),
        (("--algorithms", "random,own.py:GOOD,own.py:GOOD,own.py:BAD", "--default", "x"), "the default must be one of"),
        (("--algorithms", "own.py:NOT"), "own.py:NOT must be a dict of algorithms by name, got list"),
        (("--problems", "own.py:linear,own.py:made"), "own.py has no 'made'"),
    ],
)
def test_what_is_not_there_is_refused_before_a_folder_is_made(
    tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    asked = {"--problems": "own.py:linear", "--algorithms": "random"} | dict(zip(words[::2], words[1::2], strict=True))
    result = call(*(word for pair in asked.items() for word in pair), "--workers", "1", "--quiet", "--out", "none")
    assert result.exit_code == 1 and message in " ".join(result.stderr.split())
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--budget", "300,100"), "budgets must be positive and rise, got (300, 100)"),
        (("--budget", "many"), "budgets are numbers such as 300,1000, got 'many'"),
        (("--tolerance", "1.5"), "tolerance must lie from 0 to 1, got 1.5"),
        (("--max-seconds-per-run", "0"), "max_seconds_per_run must be positive, got 0.0"),
        (("--problems", ","), "at least one of the problems is needed, got none"),
        (("--algorithms", "own.py:"), "expected FILE.py:NAME or module:NAME, got 'own.py:'"),
    ],
)
def test_options_that_make_no_sense_are_wrong_options(words: tuple[str, ...], message: str) -> None:
    result = call(*words, "--out", "none")
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_problems_and_algorithms_need_different_names(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(OWN)
    with pytest.raises(DiscoptError, match="algorithms need different names, got 'draw' twice"):
        compare(CompareRequest(("own.py:linear",), ("own.py:GOOD", "other.py:GOOD")), tmp_path / "out")
    with pytest.raises(DiscoptError, match="problems need different names, got 'linear' twice"):
        compare(
            CompareRequest(("own.py:linear", "other.py:linear"), ("random",)), tmp_path / "out", workers=1, quiet=True
        )


def test_a_solve_folder_is_not_a_comparison(tmp_path: Path) -> None:
    from discopt.folder import RunFolder

    RunFolder.create(tmp_path / "solved", {"command": "solve"})
    with pytest.raises(RunFolderError, match='its command is "solve", got "compare"'):
        compare(CompareRequest(("own.py:linear",), ("random",)), tmp_path / "solved", workers=1)


def test_a_request_and_its_command_line_are_one() -> None:
    request = CompareRequest(("nk-*", "own.py:linear"), ("random",), seeds=3, budget=(10, 20), default="random")
    assert request.command_line(Path("runs/a b")) == (
        "discopt compare --problems 'nk-*,own.py:linear' --algorithms random --seeds 3 --budget 10,20 "
        "--default random --out 'runs/a b'"
    )


def test_help_names_the_options_and_loads_nothing_heavy() -> None:
    assert "Examples:" in call("--help").stdout
    code = (
        "import sys\nfrom discopt.cli import app\n"
        "try: app(['compare', '--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('scipy', 'matplotlib', 'discopt.compare') if m in sys.modules], file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr.strip() == "[]"
