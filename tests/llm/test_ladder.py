"""Ladders: several budgets in one command, each an ordinary run that begins with the answer below it."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from discopt import RunFolder, RunFolderError, SearchSpace, StopReason
from discopt.encoding import plain
from discopt.errors import BudgetError
from discopt_llm import ladder as module
from discopt_llm import ladder_report, search
from discopt_llm.bank_search import QuantizeRequest, resume_quantize
from discopt_llm.drop_search import DropRequest
from discopt_llm.errors import ProfileError
from discopt_llm.evaluator import Evaluator
from discopt_llm.heuristics import Remembered
from discopt_llm.ladder import LadderRequest, ladder, raised, resume_ladder
from discopt_llm.ladder_report import shown_ladder
from discopt_llm.models import load_model
from discopt_llm.objective import CompressionObjective
from discopt_llm.request import SearchRequest
from discopt_llm.students import read_student
from tests.documents import read_document
from tests.llm.commands import STAGES, call, refusal
from tests.llm.searches import RUN_FILES, contents, snapshot

pytestmark = pytest.mark.usefixtures("_no_pictures")

BELOW = "answer for 2.5"


@pytest.fixture(autouse=True)
def _no_pareto(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "draws" not in request.fixturenames:
        monkeypatch.setattr(ladder_report, "_draw", lambda *_: False)


def several(request: SearchRequest, measure: Any, budgets: str, **changes: Any) -> LadderRequest:
    """A request with several budgets in place of its one."""
    options = {**asdict(request), "baselines": ("uniform", "measured"), "start": None, **changes}
    if request.command == "llm drop":
        options["baselines"] = ("shortgpt",)
    return LadderRequest.of(type(request), measure, {**options, measure: budgets})


@pytest.fixture(scope="module")
def bits(small: dict[str, Any], banks: dict[str, str]) -> LadderRequest:
    quantize = QuantizeRequest(**small, bits="3", banks=(banks["quantization"],))
    return several(quantize, "bits", "2.5,3.5,3", algorithm="learning", generations=5)


@pytest.fixture(scope="module")
def shares(small: dict[str, Any]) -> LadderRequest:
    return several(DropRequest(**small, sparsity=0.25), "sparsity", "0.125,50%,0.25", generations=2)


def run(request: LadderRequest, out: Path, **options: Any) -> dict[str, Any]:
    return ladder(request, out, quiet=True, **options)


@pytest.fixture(scope="module")
def whole(bits: LadderRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished ladder, not to be changed."""
    out = tmp_path_factory.mktemp("whole") / "l"
    run(bits, out)
    return out


@pytest.fixture(scope="module")
def dropped(shares: LadderRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished ladder of depth pruning, not to be changed."""
    out = tmp_path_factory.mktemp("dropped") / "l"
    run(shares, out)
    return out


def results_of(folder: Path) -> Any:
    return read_document(folder / "results.json")


# -- whole ladders -------------------------------------------------------------------------------------------------


def test_every_budget_gets_an_ordinary_run_and_a_row(bits: LadderRequest, whole: Path) -> None:
    results = results_of(whole)
    assert [row["budget"] for row in results["rows"]] == ["dense", "3.5", "3", "2.5"]
    for name in bits.budgets:
        assert {path.name for path in (whole / name).iterdir()} >= RUN_FILES
        own = results_of(whole / name)
        row = next(row for row in results["rows"] if row["budget"] == name)
        assert own["met"]["bits"] <= float(name)
        assert {key: own["rows"][-1][key] for key in ("kl", "bytes", "perplexity", "tokens")}.items() <= row.items()
        uniform = next(other for other in own["rows"] if other["method"] == "uniform")
        assert (row["uniform_kl"], row["uniform_perplexity"]) == (uniform["kl"], uniform["perplexity"])
        assert RunFolder.open(whole / name).request["command"] == "llm quantize"
    assert [row["bytes"] for row in results["rows"]] == sorted((r["bytes"] for r in results["rows"]), reverse=True)
    assert shown_ladder(results["rows"])[1]["uniform KL"] == results["rows"][1]["uniform_kl"]
    report = (whole / "report.md").read_text()
    assert bits.command_line(whole) in report
    assert "[an average of 3.5 bits](3.5/report.md)" in report
    assert "pareto.png" in report and (whole / "pareto.png").read_bytes()[:4] == b"\x89PNG"


def test_a_search_begins_with_the_answer_below_it_and_that_raised(whole: Path) -> None:
    low, middle = (read_document(whole / name / "heuristics.json") for name in ("2.5", "3"))
    assert low["neighbours"] == []
    answer, higher = middle["neighbours"]
    below = results_of(whole / "2.5")
    assert (answer["name"], answer["profile"]) == (BELOW, below["profile"])
    assert answer["tokens"] == below["rows"][-1]["tokens"]
    assert (np.array(higher["profile"]) >= np.array(answer["profile"])).all()
    assert higher["profile"] != answer["profile"]
    own = results_of(whole / "3")
    assert [row["method"] for row in own["rows"]][-3:] == [BELOW, f"{BELOW}, raised", "evolved"]
    finalists = {name for finalist in own["choice"] for name in finalist["method"].split(" = ")}
    assert {BELOW, f"{BELOW}, raised"} <= finalists


@pytest.mark.parametrize("algorithm", ["evopress", "learning"])
def test_a_better_answer_below_is_taken_over(
    algorithm: str, shares: LadderRequest, dropped: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All but one profile of the smallest budget lose more, so that it is the best at every budget."""
    lowest = results_of(dropped / "50")["profile"]
    measure = Evaluator.measure

    def rigged(self: Evaluator, population: Any, sequences: Any, fitnesses: Any) -> Any:
        others = (np.asarray(population) != np.array(lowest)).any(axis=1)[:, None]
        return [losses + 10 * others for losses in measure(self, population, sequences, fitnesses)]

    monkeypatch.setattr(Evaluator, "measure", rigged)
    start = dropped / "50" / "profile.json"
    options = {"algorithm": algorithm, "start": str(start), "generations": 8 if algorithm == "learning" else 1}
    results = run(replace(shares, options={**shares.options, **options, "baselines": ()}), tmp_path / "l")
    assert [point["profile"] for point in results["points"]] == [lowest] * 3
    assert [point["as_below"] for point in results["points"]] == [True, True, False]
    report = (tmp_path / "l" / "report.md").read_text()
    assert "nothing found for it beat the answer for a sparsity of 50%, which is taken over" in report


def test_dropping_makes_a_ladder(shares: LadderRequest, dropped: Path) -> None:
    results = results_of(dropped)
    assert [row["budget"] for row in results["rows"]] == ["dense", "12.5", "25", "50"]
    assert [point["met"]["mlp_dropped"] for point in results["points"]] == [1, 2, 4]
    assert results["rows"][1]["shortgpt_kl"] > 0
    begun = read_document(dropped / "25" / "heuristics.json")
    answer, higher = (np.array(neighbour["profile"]) for neighbour in begun["neighbours"])
    assert (answer <= higher).all() and answer.sum() + 4 == higher.sum()
    model = load_model(shares.options["model"])
    assert read_student(str(dropped / "25"), model)[1].tolist() == results["points"][1]["profile"]


@pytest.mark.parametrize("start", ["auto", "random"])
def test_what_comes_from_below_competes_whatever_the_start(shares: LadderRequest, start: str, tmp_path: Path) -> None:
    options = {**shares.options, "start": start, "baselines": (), "generations": 0}
    run(replace(shares, options=options, budgets=("0.25", "0.5")), tmp_path / "l")
    contest = next(line for line in RunFolder.open(tmp_path / "l" / "25").trace() if line["stage"] == 1)
    assert contest["candidates"] == 3  # the best random profile, and two from below
    assert "shortgpt_kl" not in results_of(tmp_path / "l")["rows"][1]


def test_mixed_kinds_make_a_ladder(compress: Any, tmp_path: Path) -> None:
    request = several(compress, "size", "0.4x,0.5x", algorithm="learning", generations=4)
    results = run(request, tmp_path / "l")
    sizes = [point["met"]["size"] for point in results["points"]]
    assert sizes[0] <= 0.5 and sizes[1] <= 0.4


def test_units_are_measured_once_for_all_budgets(whole: Path) -> None:
    results = results_of(whole)
    measured = len(read_document(whole / "heuristics.json")["values"])
    units = len(results["points"][0]["profile"])
    assert units + 1 < measured < 3 * (units + 1)
    assert results["tokens"]["heuristics"] == 256 * measured
    searched = sum(results_of(whole / point["folder"])["total_fidelity"] for point in results["points"])
    assert results["tokens"]["together"] == searched + 256 * measured
    alone = results["points"][0]["rows"][2]  # as if it had measured all by itself
    assert (alone["method"], alone["tokens"]) == ("additive (measured losses)", 256 * (units + 1))


def test_what_was_measured_is_not_measured_again() -> None:
    asked: list[list[int]] = []

    def measure(rows: Any) -> Any:
        asked.append(rows[:, 0].tolist())
        return np.where(rows[:, 0] == 2, np.inf, rows[:, 0])

    remembered, sample = Remembered(), [torch.arange(4), torch.arange(3)]
    for rows in ([1, 2], [2, 3], [3, 1]):
        found = remembered.losses(np.array(rows)[:, None], sample, "kl", measure)
        assert found.tolist() == [np.inf if row == 2 else row for row in rows]
    assert asked == [[1, 2], [3]] and remembered.tokens == 3 * 7
    remembered.losses(np.array([[1]]), sample, "ppl", measure)
    remembered.losses(np.array([[1]]), sample[:1], "kl", measure)
    assert asked[2:] == [[1], [1]]
    again = Remembered.from_dict(json.loads(json.dumps(plain(asdict(remembered), exact=False))))
    assert again.losses(np.array([[2], [3]]), sample, "kl", measure).tolist() == [np.inf, 3]
    assert len(asked) == 4
    with pytest.raises(RunFolderError, match=r"heuristics\.json is damaged: .*unexpected keyword argument 'other'"):
        Remembered.from_dict({"other": 1})


def test_the_first_budget_ends_as_it_would_alone(bits: LadderRequest, whole: Path, tmp_path: Path) -> None:
    alone = search.begin(bits.rungs[0].request, tmp_path / "alone", force=False, quiet=True)
    point = results_of(whole)["points"][-1]
    assert (point["profile"], point["rows"]) == (alone["profile"], alone["rows"])


def test_a_bank_is_built_once_and_reaches_all_sparsities(sparsify: Any, tmp_path: Path) -> None:
    own = replace(sparsify, banks=(), levels=9, bank_tokens=256)
    request = several(own, "sparsity", "50%,0.7", algorithm="learning", generations=2, baselines=("uniform",))
    assert request.foundation.target == pytest.approx(0.6)  # type: ignore[attr-defined]
    results = run(request, tmp_path / "runs" / "l")
    (bank,) = (tmp_path / "runs" / "banks").iterdir()
    for point, least in zip(results["points"], (0.5, 0.7), strict=True):
        assert least <= point["met"]["sparsity"] < least + 0.02
        options = read_document(tmp_path / "runs" / "l" / point["folder"] / "run.json")["options"]
        assert options["banks"] == [str(bank)]
        assert options["levels"] == 17  # said of a bank that is built


# -- going on ------------------------------------------------------------------------------------------------------


class Stopped(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize(("name", "budget"), [("minimize", "25"), ("write_run", "50"), ("write_run", "12.5")])
def test_a_ladder_that_died_goes_on_to_the_same_end(
    shares: LadderRequest, dropped: Path, name: str, budget: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole, original = results_of(dropped), getattr(search, name)

    def die(*args: Any, **options: Any) -> Any:
        folder = options.get("folder") or next(value for value in args if isinstance(value, RunFolder))
        if folder.path.name == budget:
            raise Stopped
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(search, name, die)
        with pytest.raises(Stopped):
            run(shares, tmp_path / "cut")
    done = [rung.name for rung in shares.rungs if (tmp_path / "cut" / rung.name / "results.json").is_file()]
    before = {name: snapshot(tmp_path / "cut" / name) for name in done}
    said: list[str] = []
    resumed = resume_ladder(RunFolder.open(tmp_path / "cut"), quiet=False, say=said.append)
    assert [point["profile"] for point in resumed["points"]] == [point["profile"] for point in whole["points"]]
    assert [point["rows"] for point in resumed["points"]] == [point["rows"] for point in whole["points"]]
    assert resumed["tokens"] == whole["tokens"]
    assert {name: snapshot(tmp_path / "cut" / name) for name in done} == before
    assert sum(" of 3: a sparsity of" in line for line in said) == 3 - len(done)


def test_an_interrupted_budget_goes_on_from_its_checkpoint(
    bits: LadderRequest, whole: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    evaluate, trace = CompressionObjective.evaluate, tmp_path / "cut" / "3" / "trace.jsonl"

    def interrupt(self: CompressionObjective, query: Any) -> Any:
        if trace.exists() and len(trace.read_text().splitlines()) == 4:
            raise KeyboardInterrupt
        return evaluate(self, query)

    with monkeypatch.context() as patch:
        patch.setattr(CompressionObjective, "evaluate", interrupt)
        cut = run(bits, tmp_path / "cut")
    assert cut["stop"] == StopReason.INTERRUPTED.value
    assert [point["budget"] for point in cut["points"]] == ["2.5"]
    assert "Interrupted; `discopt resume" in (tmp_path / "cut" / "report.md").read_text()
    before = trace.read_text()
    resumed = resume_ladder(RunFolder.open(tmp_path / "cut"), quiet=True)
    assert trace.read_text().startswith(before)
    assert [point["rows"] for point in resumed["points"]] == [point["rows"] for point in results_of(whole)["points"]]


def test_a_finished_ladder_is_not_run_again(dropped: Path) -> None:
    before = contents(dropped)
    said: list[str] = []
    assert resume_ladder(RunFolder.open(dropped), quiet=True, say=said.append) == results_of(dropped)
    assert said == [f"{dropped} is finished"] and contents(dropped) == before


def test_one_budget_goes_on_by_itself(bits: LadderRequest, tmp_path: Path) -> None:
    options = {**bits.options, "max_seconds": 1e-6, "baselines": ("uniform",)}
    results = run(replace(bits, options=options, budgets=("2.5", "3")), tmp_path / "l")
    assert {point["stop"] for point in results["points"]} == {StopReason.TIME.value}
    own = resume_quantize(RunFolder.open(tmp_path / "l" / "3"), quiet=True)
    assert own["stop"] == StopReason.EVALUATIONS.value
    assert own["rows"][-2]["method"] == f"{BELOW}, raised"


def test_a_ladder_goes_on_with_its_own_text_alone(dropped: Path, tmp_path: Path) -> None:
    shutil.copytree(dropped, tmp_path / "l")
    folder = RunFolder.open(tmp_path / "l")
    (folder.path / "results.json").unlink()
    folder.update_request(calibration="another")
    with pytest.raises(RunFolderError, match="the calibration text is not the one that"):
        resume_ladder(folder, quiet=True)


# -- folders -------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_taken_is_refused_unless_forced(shares: LadderRequest, dropped: Path, tmp_path: Path) -> None:
    out = tmp_path / "l"
    shutil.copytree(dropped, out)
    (out / "50" / "mine.txt").write_text("kept")
    before = snapshot(out)
    with pytest.raises(RunFolderError, match="exists already"):
        run(shares, out)
    assert snapshot(out) == before
    results = run(replace(shares, budgets=("0.125", "0.25")), out, force=True)
    assert [row["budget"] for row in results["rows"]] == ["dense", "12.5", "25"]
    assert [path.name for path in (out / "50").iterdir()] == ["mine.txt"]


def test_the_run_of_a_budget_is_not_overwritten(bits: LadderRequest, tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "l" / "3", {"command": "llm drop"})
    with pytest.raises(RunFolderError, match="3 exists already"):
        run(bits, tmp_path / "l")
    (tmp_path / "l" / "3" / "run.json").write_text("{}")
    with pytest.raises(RunFolderError, match="is not a run folder"):
        run(bits, tmp_path / "l", force=True)


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ("2.5,2.50", "--bits must name each budget once, got 2.5 and 2.50"),
        ("2.5,", "--bits takes one budget, or several with commas between them, got 2.5"),
        (",", "got none"),
        ("2.5,three", "bits must be the average width of a weight, such as 3 or 2.25, got 'three'"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(quantize: QuantizeRequest, budgets: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        several(quantize, "bits", budgets)


def test_two_kinds_of_budget_are_refused(quantize: QuantizeRequest) -> None:
    with pytest.raises(ValueError, match=r"expected one budget, .* got bits, bpw"):
        several(quantize, "bits", "2,3", bpw="3,4")


def test_a_budget_out_of_reach_is_refused_before_any_search(
    bits: LadderRequest, shares: LadderRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "search_in", lambda *_, **__: pytest.fail("searched"))
    for request in (bits, replace(bits, options={**bits.options, "banks": (), "widths": (2, 3, 4, 6)})):
        with pytest.raises(BudgetError, match="an average of 1 bits is out of reach"):
            run(replace(request, budgets=("3", "1")), tmp_path / "l")
    protected = replace(shares, options={**shares.options, "protect": tuple(range(6))})
    with pytest.raises(BudgetError):
        run(protected, tmp_path / "l")
    assert not [*tmp_path.iterdir()]


def test_budgets_that_come_to_the_same_are_refused(shares: LadderRequest, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"a sparsity of 25% and a sparsity of 26% come to the same for .*; leave"):
        run(replace(shares, budgets=("0.25", "0.26")), tmp_path / "l")
    assert not [*tmp_path.iterdir()]


def test_a_given_start_has_to_meet_the_smallest_budget(shares: LadderRequest, dropped: Path, tmp_path: Path) -> None:
    dearer = {**shares.options, "start": str(dropped / "25" / "profile.json")}
    with pytest.raises(ProfileError, match="cannot start this search: a profile must cost at most"):
        run(replace(shares, options=dearer), tmp_path / "never")
    assert not (tmp_path / "never").exists()


# -- raising -------------------------------------------------------------------------------------------------------


def test_raising_is_the_best_that_lowers_nothing() -> None:
    rng = np.random.default_rng(0)
    space = SearchSpace.build(rng.integers(1, 5, (5, 1)) * np.arange(3), 9, group="none")
    effects = -np.sort(-rng.random((5, 3)), axis=1)
    for profile in space.random(6, rng):
        low = np.minimum(profile, rng.integers(0, 3, 5)).astype(np.int16)
        every = np.stack(np.meshgrid(*[range(3)] * 5), axis=-1).reshape(-1, 5)
        above = every[(every >= low).all(axis=1) & space.feasible(every)]
        best = effects[np.arange(5), above].sum(axis=1).min()
        found = raised(space, low, effects)
        assert (found >= low).all() and space.feasible(found[None])[0]
        assert effects[np.arange(5), found].sum() == pytest.approx(best)


# -- command line --------------------------------------------------------------------------------------------------


def words(request: LadderRequest, out: Path) -> list[str]:
    return [str(word) for word in request.command_line(out).split()[2:]]


def test_commas_in_a_budget_make_a_ladder(shares: LadderRequest, tmp_path: Path) -> None:
    result = call(*words(shares, tmp_path / "l"))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["budget", "dense", "12.5", "25", "50"]
    assert lines[-1] == f"write the model: discopt llm export {tmp_path / 'l' / '50'} --to hf --out MODEL"
    assert "2 of 3: a sparsity of 25%" in result.stderr and "25 (2 of 3): generation" in result.stderr
    options = read_document(tmp_path / "l" / "run.json")["options"]
    assert options == json.loads(json.dumps(asdict(shares)))


def test_json_is_all_that_a_ladder_prints(shares: LadderRequest, tmp_path: Path) -> None:
    shares = replace(shares, budgets=("0.25", "0.5"))
    result = call(*words(shares, tmp_path / "l"), "--json", "--quiet")
    assert result.exit_code == 0 and result.stderr == ""
    assert json.loads(result.stdout) == read_document(tmp_path / "l" / "results.json")


def test_an_interrupted_ladder_says_how_to_go_on(
    shares: LadderRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "heldout_scores", interrupt)
    result = call(*words(shares, tmp_path / "l"))
    assert result.exit_code == 130
    assert f"interrupted; go on with: discopt resume {tmp_path / 'l'}" in result.stderr


@pytest.mark.parametrize(
    ("command", "budget", "message", "code"),
    [
        ("quantize", ["--bits", "3,3.0"], "--bits must name each budget once, got 3 and 3.0", 2),
        ("quantize", ["--bits", "3,9"], "an average of 9 bits is out of reach", 1),
        ("sparsify", ["--sparsity", "50%,120%"], "got '120%'", 2),
        ("drop", ["--sparsity", "0.1,much"], "sparsity must be a share such as 0.25 or 25%, got 'much'", 2),
        ("drop", ["--sparsity", "much"], "sparsity must be a share such as 0.25 or 25%, got 'much'", 2),
        ("compress", ["--size", "0.4x,1TB"], "out of reach", 1),
    ],
)
def test_the_commands_refuse_in_one_line(
    command: str, budget: list[str], message: str, code: int, small: dict[str, Any], tmp_path: Path
) -> None:
    text = ["--calibration", small["calibration"], "--sequence-length", 32, "--eval-tokens", 128]
    asked = [small["model"], *budget, *text, "--preset", "demo", *STAGES, "--out", tmp_path / "l"]
    assert message in refusal(call(command, *asked), code)
    assert not (tmp_path / "l").exists()


@pytest.mark.slow
def test_a_ladder_killed_at_random_moments_ends_in_the_same_profiles(
    shares: LadderRequest, dropped: Path, tmp_path: Path
) -> None:
    script = "import sys, torch; torch.set_num_threads(1); from discopt.cli import app; app()"
    rng, killed = random.Random(0), 0
    for attempt in range(5):
        out = tmp_path / str(attempt)
        command = [sys.executable, "-c", script, "llm", *words(shares, out), "--quiet"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while not (out / "run.json").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 3))
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        resumed = resume_ladder(RunFolder.open(out), quiet=True)
        assert [point["rows"] for point in resumed["points"]] == [p["rows"] for p in results_of(dropped)["points"]]
        assert not [*out.rglob("*.tmp")]
    assert killed >= 3
