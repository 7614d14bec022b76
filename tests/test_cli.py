"""`discopt solve`, what it refuses, and the commands that other packages add."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from discopt import cli
from discopt.folder import RunFolder
from discopt.optimizers import ALGORITHMS, StopReason
from discopt.plots import plot_trace
from tests.own import OWN, answer, call, line_of, refused, solve, start

pytestmark = pytest.mark.usefixtures("own")


# solve


def test_the_optimum_of_an_own_problem_is_found_and_said() -> None:
    result = solve("linear", "--generations", "60", "--quiet")
    assert result.exit_code == 0
    assert result.stderr == ""
    lines = [line.split(maxsplit=2) for line in result.stdout.splitlines()]
    assert lines[0] == ["problem", "linear"]
    assert "best loss  -4.75 at fidelity 1" in result.stdout
    assert "optimum    -4.75 is known (gap 0)" in result.stdout
    assert "cost       4 of 4 (100.0%)" in result.stdout
    assert "level 1: 4 units: u8, u9, u10, u11" in result.stdout
    assert "stopped    no other feasible profile is in reach" in result.stdout  # all 495 are measured
    assert not list(Path().glob("run*"))


@pytest.mark.parametrize("target", ["own.py:made", "own:linear", "./own.py:linear"])
def test_a_target_is_a_problem_or_a_function_in_a_file_or_a_module(target: str) -> None:
    assert "problem    linear" in call("solve", target, "--generations", "2", "--quiet").stdout


def test_a_file_may_import_its_neighbours_and_have_any_name(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "neighbour_of_json.py").write_text(OWN)
    (tmp_path / "sub" / "json.py").write_text("from neighbour_of_json import linear\n")
    assert call("solve", "sub/json.py:linear", "--generations", "1", "--json").exit_code == 0
    assert sys.modules["json"] is json


def test_progress_goes_to_standard_error() -> None:
    result = solve("linear", "--generations", "3", "--algorithm", "evopress")
    assert "linear: generation 3 · best" in result.stderr
    assert "generation 3 ·" not in result.stdout


def test_json_is_one_object_whatever_the_problem_prints(capfd: pytest.CaptureFixture[str]) -> None:
    process = start("solve", "own.py:talks", "--generations", "2", "--json")
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0
    document = json.loads(stdout)
    assert stdout.count("\n") == 1
    assert document["problem"] == "talks"
    assert document["stop"] == StopReason.EVALUATIONS.value
    assert document["rows"][-1] == {"method": "learning", "loss": document["loss"], "fidelity": 1}
    for line in ("made", "measured", "by a child"):
        assert line in stderr.splitlines()


def test_the_profile_of_a_big_problem_is_summarised() -> None:
    result = solve("big", "--generations", "1", "--quiet")
    assert "level 0: 4,950 units\n" in result.stdout
    assert len(result.stdout) < 1000


def test_same_options_same_run() -> None:
    first, second, other = (
        json.loads(solve("noisy", "--generations", "5", "--seed", seed, "--json", "--quiet").stdout) for seed in "112"
    )
    for document in (first, second, other):
        del document["seconds"]
    assert first == second
    assert first["profile"] != other["profile"] or first["loss"] != other["loss"]


def test_every_option_arrives(tmp_path: Path) -> None:
    words = "--generations 7 --offspring 6 --parents 2 --stage 4@3 --stage 2@9 --start random --start-candidates 5 "
    words += "--start-fidelity 2 --switches 1,0,2 --rule across --max-evaluations 900 --max-fidelity 9000 "
    words += "--max-seconds 90 --target-loss -99 --stagnation 80 --seed 3 --quiet --out run"
    assert solve("noisy", *words.split()).exit_code == 0
    run = RunFolder.open("run")
    assert run.request["options"] == {
        "target": "own.py:noisy",
        "generations": 7,
        "offspring": 6,
        "parents": 2,
        "stages": ["4@3", "2@9"],
        "start": "random",
        "start_profile": None,
        "start_candidates": 5,
        "start_fidelity": 2,
        "switches": [1.0, 0.0, 2.0],
        "rule": "across",
        "algorithm": None,
        "max_evaluations": 900,
        "max_fidelity": 9000,
        "max_seconds": 90.0,
        "target_loss": -99.0,
        "stagnation": 80,
        "seed": 3,
        "workers": None,
        "worker_seconds": None,
    }
    first = run.trace()[0]
    assert (first["candidates"], first["fidelity"]) == (5, 2)
    assert {(line["stage"], line["fidelity"]) for line in run.trace()[1:]} == {(1, 3), (2, 9)}
    report = (tmp_path / "run" / "report.md").read_text()
    command = next(line for line in report.splitlines() if line.startswith("discopt solve"))
    again = call(*[word for word in command.split()[1:] if word != "run"], "again")
    assert again.exit_code == 0
    assert answer(tmp_path / "again")[1] == answer(tmp_path / "run")[1]


@pytest.mark.parametrize("name", sorted(ALGORITHMS.keys() - {"evopress"}))
def test_other_algorithms_measure_as_many_as_the_generations_would_have(name: str) -> None:
    words = ["--algorithm", name, "--generations", "5", "--offspring", "7", "--stage", "1@3", "--json", "--quiet"]
    document = json.loads(solve("noisy", *words).stdout)
    assert 28 <= document["total_fidelity"] / 3 <= 35
    assert (document["fidelity"], document["rows"][-1]["method"]) == (3, name)


def test_help_names_every_algorithm() -> None:
    words = call("solve", "--help").stdout.replace("│", " ").split()
    assert ALGORITHMS.keys() <= {word.strip(".,;") for word in words}


def test_other_algorithms_start_from_a_profile_that_is_given(tmp_path: Path) -> None:
    (tmp_path / "start.json").write_text(json.dumps([1] * 4 + [0] * 8))
    words = ["--start", "start.json", "--generations", "1", "--quiet", "--algorithm"]
    assert solve("linear", *words, "annealing", "--out", "run").exit_code == 0
    assert RunFolder.open(tmp_path / "run").trace()[0]["candidates"] == 1
    result = solve("linear", *words, "random")
    assert result.exit_code == 2
    assert "has no start" in " ".join(result.stderr.replace("│", " ").split())


def test_a_space_too_large_for_an_algorithm_is_one_line() -> None:
    line = refused(solve("big", "--algorithm", "exhaustive"))
    assert line.endswith("at most 1,048,576 feasible profiles, got one of 5000 units that has more")


@pytest.mark.parametrize(
    ("option", "value", "stop"),
    [
        ("--max-evaluations", "60", StopReason.EVALUATIONS),
        ("--max-fidelity", "60", StopReason.FIDELITY),
        ("--max-seconds", "0.000001", StopReason.TIME),
        ("--target-loss", "-3", StopReason.TARGET),
        ("--stagnation", "3", StopReason.STAGNATION),
    ],
)
def test_each_limit_stops_a_search(option: str, value: str, stop: StopReason) -> None:
    document = json.loads(solve("linear", option, value, "--json", "--quiet").stdout)
    assert document["stop"] == stop.value


def test_a_run_folder_holds_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("discopt.solve.plot_trace", plot_trace)
    result = solve("linear", "--generations", "40", "--out", "run", "--json", "--quiet")
    names = {"run.json", "trace.jsonl", "checkpoint.json", "results.json", "profile.json", "report.md", "trace.png"}
    assert {entry.name for entry in (tmp_path / "run").iterdir()} == names
    run = RunFolder.open("run")
    assert run.read_json("results.json") == json.loads(result.stdout)
    profile = run.read_json("profile.json")
    assert (profile["format"], profile["version"], profile["kind"]) == ("discopt-profile", 1, "solve")
    assert [unit["name"] for unit in profile["units"] if unit["level"]] == ["u8", "u9", "u10", "u11"]
    report = (tmp_path / "run" / "report.md").read_text()
    for part in ("# linear", "The last four are best.", "-4.75 at fidelity 1", "trace.png", "discopt resume run"):
        assert part in report


def test_without_matplotlib_there_is_no_picture_and_all_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("discopt.solve.plot_trace", plot_trace)
    assert solve("linear", "--generations", "2", "--out", "run", "--quiet").exit_code == 0
    assert not (tmp_path / "run" / "trace.png").exists()
    assert "trace.png" not in (tmp_path / "run" / "report.md").read_text()


def test_a_search_starts_from_another_ones_profile(tmp_path: Path) -> None:
    solve("linear", "--generations", "60", "--out", "run", "--quiet")
    words = ["--generations", "0", "--start-candidates", "1", "--quiet", "--json", "--start"]
    for file in ("run/profile.json", "plain.json"):
        (tmp_path / "plain.json").write_text(str([0] * 8 + [1] * 4))
        document = json.loads(solve("linear", *words, file, "--generations", "1").stdout)
        assert document["loss"] == -4.75


# what is the user's to mend


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere.py:x", "there is no file nowhere.py"),
        ("nowhere:x", "there is no module 'nowhere'"),
        ("own.py:lnear", "own.py has no 'lnear'; it has: linear, noisy, made, slow, talks"),
        ("own.py:number", "own.py:number must be a discopt.problems.Problem or return one, got int"),
        ("own.py:needs", "own.py:needs must work without arguments, but it requires n"),
        ("own.py:raises", "the objective raised ZeroDivisionError on 9 profiles at fidelity 1, seed"),
        ("own.py:raises", f"division by zero (own.py:{line_of('1 / 0')})"),
        ("own.py:bad_answer", "the objective must answer with shape (9,) or (9, s), got (8,)"),
        ("own.py:tight", "no profile meets the budget 14: the cheapest costs 15, the dearest 20"),
        ("own.py:wrong_cost", "cannot load own.py:wrong_cost: TypeError: cost must be integers"),
        ("own.py:nan", "no profile was found: all"),
        ("text.txt:x", "there is no module 'text.txt'"),
    ],
)
def test_a_mistake_in_an_own_problem_is_one_line(target: str, message: str) -> None:
    result = call("solve", target, "--generations", "2", "--quiet")
    if target == "own.py:nan":
        result.stdout_bytes = b""
    assert message in refused(result)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = (1,\ny = 2", "cannot load other.py: '(' was never closed (other.py:1)"),
        (
            "\nimport no_such_module",
            "cannot load other.py: ModuleNotFoundError: No module named 'no_such_module' (other.py:2)",
        ),
        ("def f():\n    raise ValueError('no\\nway')\nf()", "cannot load other.py: ValueError: no way (other.py:2)"),
        ("raise SystemExit(3)", "cannot load other.py: SystemExit: 3 (other.py:1)"),
        ("x = 1", "other.py has no 'problem'; it has: none that is a Problem or makes one"),
    ],
)
def test_a_file_that_does_not_load_is_one_line(tmp_path: Path, code: str, message: str) -> None:
    (tmp_path / "other.py").write_text(code)
    assert refused(call("solve", "other.py:problem", "--json")) == f"error: {message}"


def test_a_module_that_does_not_load_is_not_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("import no_such_module")
    assert "cannot load other: ModuleNotFoundError: No module named 'no_such_module'" in refused(
        call("solve", "other:x")
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("own.py", "expected FILE.py:NAME or module:NAME, got 'own.py'"),
        ("own.py:linear --stage 8", "a stage is written SURVIVORS@FIDELITY, such as 8@2048, got '8'"),
        ("own.py:linear --stage 2@5 --stage 4@9 --stage 1@10", "survivors must not grow"),
        ("own.py:linear --stage 2@5", "the last stage must keep the 1 parents, got 2@5"),
        ("own.py:linear --switches a", "switches are weights such as 5,3,1, got 'a'"),
        ("own.py:linear --switches 0,0", "switches must be weights"),
        ("own.py:linear --rule sideways", "rule must be within, across or exchange, got 'sideways'"),
        ("own.py:linear --algorithm tabu", "algorithm must be additive or annealing or"),
        ("own.py:linear --algorithm genetic --parents 2 --stage 2@1", "algorithm 'genetic' does not hear parents"),
        (
            "own.py:linear --algorithm genetic --rule across",
            "algorithm 'genetic' does not hear rule, which is for evopress",
        ),
        ("own.py:linear --algorithm additive --stage 4@1 --stage 1@2", "takes one stage, 1@FIDELITY, got 4@1 1@2"),
        ("own.py:linear --algorithm annealing --start random", "where it chooses, got start 'random'"),
        ("own.py:linear --algorithm annealing --generations 0", "evaluations must be at least 1, got 0"),
        ("own.py:linear --max-seconds -1", "the limit of seconds must be above 0, got -1"),
        ("own.py:linear --generations -1", "greater than or equal to 0"),
        ("own.py:linear --seed x", "integer"),
        ("own.py:linear --no-such-option", "No such option"),
        ("", "Missing argument"),
    ],
)
def test_a_wrong_option_exits_with_2(words: str, message: str) -> None:
    result = call("solve", *words.split())
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read start.json: No such file or directory"),
        ("{", "start.json is not JSON"),
        ('{"units": [{"name": "u0"}]}', "start.json is not ours: expected the format 'discopt-profile', got None"),
        ("[0, 1.5]", "start.json is no profile"),
        ("[0, 1]", "own.py:linear: a profile must be 12 integers, got shape (2,)"),
        (str([1] * 12), "own.py:linear: a profile must cost at most 4, got 12"),
        (str([7] * 12), "own.py:linear: level 7 of unit 'u0' is not allowed"),
    ],
)
def test_a_start_that_does_not_fit_is_one_line_and_leaves_no_folder(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "start.json").write_text(content)
    assert message in refused(solve("linear", "--start", "start.json", "--out", "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_exists_is_kept_without_force(tmp_path: Path) -> None:
    solve("linear", "--generations", "2", "--out", "run", "--quiet")
    before = {entry: entry.read_bytes() for entry in (tmp_path / "run").iterdir()}
    message = refused(solve("linear", "--out", "run"))
    assert message == "error: run exists already; choose another --out, or pass --force to replace it"
    assert {entry: entry.read_bytes() for entry in (tmp_path / "run").iterdir()} == before
    assert solve("linear", "--generations", "1", "--out", "run", "--force", "--quiet").exit_code == 0


def test_our_own_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("discopt.solve.begin", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        solve("linear")


# the program


def test_help_has_examples_and_version_is_one_line() -> None:
    for words in ([], ["solve"], ["resume"]):
        result = call(*words, "--help")
        assert result.exit_code == 0
        assert "Examples:" in result.stdout
        assert "discopt " + (words[0] if words else "solve") in result.stdout
    assert call("--version").stdout.startswith("discopt ")


def test_help_loads_neither_the_search_nor_the_pictures() -> None:
    code = (
        "import sys\nfrom discopt.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('scipy', 'matplotlib', 'torch', 'discopt.solve') if m in sys.modules], file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr.strip() == "[]"


class EntryPoint:
    def __init__(self, value: Any) -> None:
        self.value = value

    def load(self) -> Any:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


@pytest.fixture
def add_entry_points(monkeypatch: pytest.MonkeyPatch) -> Any:
    def add(group: str, **values: Any) -> None:
        found = {name: EntryPoint(value) for name, value in values.items()}
        monkeypatch.setattr(cli, "_entry_points", lambda wanted: found if wanted == group else {})

    return add


def test_other_packages_add_commands(add_entry_points: Any) -> None:
    other = typer.Typer(help="Of another package.")

    @other.command()
    def drop() -> None:
        """Drop blocks."""
        typer.echo("dropped")

    @other.command()
    def fail() -> None:
        """Fail."""
        raise cli.DiscoptError("two\nlines")

    add_entry_points(cli.COMMANDS, llm=other)
    assert "Of another package." in call("--help").stdout
    assert call("llm", "drop").stdout == "dropped\n"
    assert refused(call("llm", "fail")) == "error: two lines"


def test_a_broken_package_breaks_only_its_own_command(add_entry_points: Any) -> None:
    add_entry_points(cli.COMMANDS, llm=ImportError("No module named 'torch'"))
    assert "No module named 'torch'" in call("--help").stdout
    assert solve("linear", "--generations", "1", "--quiet").exit_code == 0
    message = refused(call("llm", "drop", "model", "--sparsity", "0.5"))
    assert message == "error: the command 'llm' cannot be loaded: ImportError: No module named 'torch'"


def test_other_packages_resume_their_runs(add_entry_points: Any, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", {"command": "llm"})
    asked: dict[str, Any] = {}

    def go_on(folder: RunFolder, *, quiet: bool) -> dict[str, Any]:
        asked.update(path=folder.path, quiet=quiet)
        return {"rows": [{"method": "evolved", "kl": 0.25, "tokens": 2048}, {"method": "dense", "kl": None}]}

    add_entry_points(cli.RESUME, llm=go_on)
    assert call("resume", folder.path, "--quiet").stdout.splitlines() == [
        "method     kl  tokens",
        "evolved  0.25   2,048",
        "dense       -       -",
    ]
    assert asked == {"path": folder.path, "quiet": True}
    assert json.loads(call("resume", folder.path, "--json").stdout)["rows"][0]["kl"] == 0.25
    result = call("resume", folder.path, "--max-evaluations", "5")
    assert result.exit_code == 2
    assert "only for runs of `discopt solve`" in " ".join(result.stderr.replace("│", " ").split())
    add_entry_points(cli.RESUME, llm=ImportError("no torch"))
    assert "what goes on with a run of 'llm' cannot be loaded: no torch" in refused(call("resume", folder.path))
