from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from discopt.cli import app
from discopt.errors import BudgetError, DiscoptError, RunFolderError
from discopt.folder import RunFolder
from discopt_llm import compare_report
from discopt_llm.compare import LEAST_GENERATIONS, POINTS, CompareRequest, compare, resume_compare, thinned
from discopt_llm.compare_report import best_method, guarantee, paired, reached, rows_of, summarised
from discopt_llm.drop import DropLevels
from discopt_llm.methods import METHODS, TASKS, Contender, Context, Found, Point
from discopt_llm.request import Prepared
from tests.documents import read_document
from tests.llm.reference import kl, negative_log_likelihood, plain_losses
from tests.llm.searches import snapshot

TARGETS = {"drop": "0.25", "sparsity": "60%", "quantization": "3"}


@pytest.fixture(autouse=True)
def _no_picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than the methods on a tiny model."""
    if "draws" not in request.fixturenames:
        monkeypatch.setattr(compare_report, "_draw", lambda *_: False)


@pytest.fixture
def requests(small: dict[str, Any], banks: dict[str, str]) -> dict[str, CompareRequest]:
    """A small comparison for each task, of all methods."""
    common = {name: value for name, value in small.items() if name not in ("start", "baselines", "algorithm")}
    common |= {"generations": 2, "calibration_tokens": 384}
    return {
        task: CompareRequest(
            task=task, target=TARGETS[task], seeds=2, banks=(banks[task],) if task in banks else (), **common
        )
        for task in TASKS
    }


def run(request: CompareRequest, out: Path, **options: Any) -> dict[str, Any]:
    return compare(request, out, quiet=True, **options)


# -- whole comparisons ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_every_method_of_a_task_meets_its_budget(
    task: str, requests: dict[str, CompareRequest], tmp_path: Path
) -> None:
    results = run(requests[task], tmp_path / "c")
    of_task = [name for name, method in METHODS.items() if task in method.tasks]
    assert [row["name"] for row in results["summary"]] == of_task
    assert [(row["name"], row["seed"]) for row in results["rows"]] == [
        (name, seed) for name in of_task for seed in range(2 if METHODS[name].seeded else 1)
    ]
    for found in results["runs"]:
        if found["method"] != "dense":
            met = found["met"]
            assert met == {"attention_dropped": 2, "mlp_dropped": 2, "blocks": 8} if task == "drop" else True
            assert task != "sparsity" or met["sparsity"] >= 0.6
            assert task != "quantization" or met["bits"] <= 3
            assert found["row"]["kl"] == pytest.approx(np.mean(found["kl"]))
    rows = {(row["name"], row["seed"]): row for row in results["rows"]}
    assert rows["dense", 0]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows["uniform", 0]["tokens"] == 0
    assert rows["random", 1]["tokens"] == 16 * 256
    evopress = 2 * (6 * 32 + 3 * 96) + (16 * 256 if task == "drop" else 0)
    assert rows["evopress", 0]["tokens"] == evopress
    assert rows["learning", 0]["tokens"] > 0
    assert 0 < rows["greedy", 0]["tokens"] <= 32 * max(2 * 6, 1 + len(results["runs"][0]["profile"]))
    assert len(results["guarantee"]["comparisons"]) == 2 * (2 if task == "drop" else 3)
    report = (tmp_path / "c" / "report.md").read_text()
    assert all(METHODS[name].title in report for name in of_task)
    assert requests[task].command_line(tmp_path / "c") in report
    assert results == read_document(tmp_path / "c" / "results.json")


def test_curves_end_in_what_the_search_found(requests: dict[str, CompareRequest], tmp_path: Path) -> None:
    request = replace(requests["quantization"], methods=("evopress", "learning", "uniform"), generations=6)
    results = run(request, tmp_path / "c")
    uniform, *searches = results["runs"]
    assert not uniform["curve"]
    for found in searches:
        curve = found["curve"]
        assert len(curve) <= POINTS
        assert [at["tokens"] for at in curve] == sorted(at["tokens"] for at in curve)
        assert curve[-1]["profile"] == found["profile"]
        assert curve[-1]["kl"] == pytest.approx(found["row"]["kl"])
        assert curve[-1]["tokens"] <= found["row"]["tokens"]
    paper = next(found for found in searches if found["method"] == "evopress")
    assert paper["curve"][0] | {"kl_error": None} == {
        "tokens": 0,
        "profile": uniform["profile"],
        "kl": pytest.approx(uniform["row"]["kl"]),
        "kl_error": None,
    }


def test_the_picture_is_drawn(requests: dict[str, CompareRequest], draws: None, tmp_path: Path) -> None:
    run(replace(requests["drop"], methods=("uniform", "measured", "evopress"), seeds=1), tmp_path / "c")
    assert (tmp_path / "c" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "curves.png" in (tmp_path / "c" / "report.md").read_text()


def test_the_same_seed_gives_the_same_comparison(requests: dict[str, CompareRequest], tmp_path: Path) -> None:
    request = replace(requests["drop"], methods=("random", "greedy", "evopress"), seeds=1)
    first, again = (run(request, tmp_path / name)["runs"] for name in "ab")
    assert [found["profile"] for found in first] == [found["profile"] for found in again]


def test_generations_are_at_least_forty(
    requests: dict[str, CompareRequest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []

    def look(context: Context, seed: int) -> Found:
        seen.append(context.prepared.request.chosen.generations)
        return Found(context.space.nearest_uniform())

    monkeypatch.setitem(METHODS, "evopress", Contender("look", look))
    for task, preset in (("drop", "fast"), ("quantization", "demo"), ("sparsity", "paper")):
        request = replace(requests[task], preset=preset, generations=None, methods=("evopress",), seeds=1)
        small = {"offspring": 16, "calibration_tokens": 3072}
        run(replace(request, **small), tmp_path / task)
    assert seen == [LEAST_GENERATIONS, LEAST_GENERATIONS, 400]


def test_perplexity_ranks_by_a_plain_forward_without_each_block(
    requests: dict[str, CompareRequest], tmp_path: Path
) -> None:
    request = replace(requests["drop"], unit="block", methods=("perplexity", "measured"), seeds=1)
    found = {found["method"]: found["profile"] for found in run(request, tmp_path / "c")["runs"]}
    prepared = Prepared.load(request.search, lambda line: None)
    levels = DropLevels(prepared.loaded.anatomy, "block")
    sample = prepared.calibration.sample(prepared.calibration.tokens, 0)
    rows = 1 - np.eye(8, dtype=np.int16)
    ranked = plain_losses(prepared.loaded.model, levels, rows, sample, [negative_log_likelihood, kl])
    for name, losses in zip(("perplexity", "measured"), ranked, strict=True):
        dropped = np.argsort(losses.mean(axis=1))[:2]
        assert sorted(dropped.tolist()) == np.flatnonzero(np.array(found[name]) == 0).tolist()


# -- going on ------------------------------------------------------------------------------------------------------


def test_a_stopped_comparison_goes_on(
    requests: dict[str, CompareRequest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    request = replace(requests["sparsity"], methods=("uniform", "additive", "random", "owl"))
    whole = run(request, tmp_path / "whole")

    def stopped(context: Context, seed: int) -> Found:
        if seed == 1:
            raise KeyboardInterrupt
        return whole_owl(context, seed)

    whole_owl = METHODS["owl"].run
    with monkeypatch.context() as patched:
        patched.setitem(METHODS, "owl", replace(METHODS["owl"], run=stopped))
        with pytest.raises(KeyboardInterrupt):
            run(request, tmp_path / "c")
    before = snapshot(tmp_path / "c" / "results")
    assert before.keys() == {"uniform-0.json", "additive-0.json", "random-0.json", "random-1.json", "owl-0.json"}
    results = resume_compare(RunFolder.open(tmp_path / "c"), quiet=True)
    after = snapshot(tmp_path / "c" / "results")
    assert {name: after[name] for name in before} == before
    assert after.keys() == before.keys() | {"owl-1.json"}
    assert [found["profile"] for found in results["runs"]] == [found["profile"] for found in whole["runs"]]


def test_more_methods_and_seeds_go_on(requests: dict[str, CompareRequest], tmp_path: Path) -> None:
    request = replace(requests["quantization"], methods=("uniform", "random"))
    run(request, tmp_path / "c")
    before = snapshot(tmp_path / "c" / "results")
    more = run(replace(request, methods=("uniform", "random", "additive"), seeds=3), tmp_path / "c")
    assert [(row["name"], row["seed"]) for row in more["rows"]] == [
        ("uniform", 0),
        *(("random", seed) for seed in range(3)),
        ("additive", 0),
    ]
    assert before.items() <= snapshot(tmp_path / "c" / "results").items()


def test_other_options_are_refused_unless_forced(requests: dict[str, CompareRequest], tmp_path: Path) -> None:
    request = replace(requests["quantization"], methods=("uniform", "random"))
    run(request, tmp_path / "c")
    other = replace(request, target="3.5", methods=("uniform",))
    before = snapshot(tmp_path / "c")
    with pytest.raises(RunFolderError, match=r"comparison with target 3, got 3\.5"):
        run(other, tmp_path / "c")
    assert snapshot(tmp_path / "c") == before
    assert len(run(other, tmp_path / "c", force=True)["rows"]) == 1
    assert [path.name for path in (tmp_path / "c" / "results").iterdir()] == ["uniform-0.json"]


def test_a_folder_of_something_else_is_refused(requests: dict[str, CompareRequest], tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", {"command": "llm drop"})
    with pytest.raises(RunFolderError, match="is a run of discopt llm drop"):
        run(requests["drop"], tmp_path / "run")


def test_another_text_is_refused(requests: dict[str, CompareRequest], tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text(Path(requests["drop"].calibration).read_text())
    request = replace(requests["drop"], methods=("uniform",), calibration=str(notes))
    run(request, tmp_path / "c")
    notes.write_text(notes.read_text().upper())
    with pytest.raises(RunFolderError, match="the calibration is not that of"):
        run(request, tmp_path / "c")


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("drop", {"task": "shrink"}, "task must be one of drop, sparsity, quantization, got 'shrink'"),
        ("drop", {"methods": ("uniform", "magic")}, "methods must be among .*shortgpt.*, got magic"),
        ("drop", {"methods": ("owl",)}, "owl is no method for drop; those are .*greedy.*, got owl"),
        ("quantization", {"methods": ("window",)}, "window is no method for quantization"),
        ("drop", {"methods": ()}, "got none"),
        ("drop", {"seeds": 0}, "seeds must be at least 1, got 0"),
        ("drop", {"target": "1.5"}, "sparsity must be the share of zeros, .* got '1.5'"),
        ("quantization", {"target": "three"}, "bits must be the average width .* got 'three'"),
        ("drop", {"group_size": 64}, "group_size is no option for drop, got 64"),
        ("drop", {"bank_method": "rtn"}, "bank_method is no option for drop, got rtn"),
        ("sparsity", {"unit": "block"}, "unit is no option for sparsity, got block"),
        ("sparsity", {"widths": (2, 3), "banks": ()}, "widths is an option of kind quantization, got kind sparsity"),
        ("quantization", {"preset": "slow"}, "preset must be one of .* got 'slow'"),
    ],
)
def test_what_makes_no_sense_is_refused(
    task: str, changes: dict[str, Any], message: str, requests: dict[str, CompareRequest]
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(requests[task], **changes)


def test_a_target_out_of_reach_is_refused_before_a_folder_is_made(
    requests: dict[str, CompareRequest], tmp_path: Path
) -> None:
    for task, target in (("quantization", "7"), ("sparsity", "5%")):
        with pytest.raises(BudgetError, match="so the nearest is"):
            run(replace(requests[task], target=target), tmp_path / "c")
    assert not [*tmp_path.iterdir()]


def test_a_method_without_a_profile_is_named_and_the_others_go_on(
    requests: dict[str, CompareRequest], tmp_path: Path
) -> None:
    request = replace(requests["drop"], unit="block", target="0.5", protect=(1, 3, 5), methods=("uniform", "window"))
    results = run(replace(request, seeds=1), tmp_path / "c")
    assert [row["name"] for row in results["rows"]] == ["uniform"]
    assert [found["method"] for found in results["missing"]] == ["window"]
    assert "No window cosine, seed 0: " in (tmp_path / "c" / "report.md").read_text()
    with pytest.raises(DiscoptError, match="no method has a profile"):
        run(replace(request, methods=("window",)), tmp_path / "alone")


# -- numbers -------------------------------------------------------------------------------------------------------


def record(
    method: str, seed: int, losses: list[float], *, tokens: int = 10, curve: tuple[tuple[int, float], ...] = ()
) -> Any:
    row = {"method": method, "kl": float(np.mean(losses)), "kl_error": 0.1, "perplexity": 2.0, "agreement": 0.5}
    row |= {"tokens": tokens, "bytes": 7, "seconds": 1.0}
    points = [{"tokens": at, "kl": value, "kl_error": 0.1} for at, value in curve]
    return {"method": method, "seed": seed, "kl": losses, "row": row, "curve": points, "profile": [0]}


def test_differences_are_paired_by_sequence_and_seed() -> None:
    uniform = record("uniform", 0, [2.0, 4.0, 9.0])
    random = [record("random", 0, [1.0, 3.0, 8.0]), record("random", 1, [2.0, 5.0, 10.0])]
    records = [uniform, *random]
    assert paired(records, random[0], "uniform") == (pytest.approx(-1), pytest.approx(0))
    assert paired(records, random[1], "uniform") == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert paired(records, random[1], "owl") == (None, None)
    assert paired(records[:2], record("greedy", 1, [1.0, 1.0, 1.0]), "random") == (None, None)
    assert best_method(records) == "random"
    rows = rows_of(records)
    assert [row["minus_uniform"] for row in rows] == pytest.approx([0, -1, 2 / 3])
    assert [row["minus_best"] for row in rows] == pytest.approx([1 / 6, 0, 0])  # uniform: to the mean over the seeds
    table = {row["name"]: row for row in summarised(records)}
    assert table["random"]["minus_uniform"] == pytest.approx(-1 / 6)
    assert table["random"]["kl_range"] == pytest.approx([4, 17 / 3])
    assert table["random"]["tokens"] == 10


def test_the_dense_model_is_never_the_best_method() -> None:
    assert best_method([record("dense", 0, [0.0, 0.0])]) is None


@pytest.mark.parametrize(
    ("ours", "holds"),
    [([1.0, 2.0, 3.0], True), ([3.1, 4.0, 5.2], True), ([3.3, 4.4, 5.35], False), ([float("nan"), 1.0, 1.0], None)],
)
def test_the_guarantee_is_a_paired_interval(ours: list[float], holds: bool | None) -> None:
    uniform = record("uniform", 0, [3.0, 4.1, 5.0])
    found = guarantee([uniform, record("learning", 0, ours)])
    assert found["holds"] is holds
    assert [comparison["against"] for comparison in found["comparisons"]] == ["uniform"]
    text = compare_report._guarantee_words(found)
    assert ("beyond" in text) is (holds is not None)
    assert text.startswith({True: "In none of 1", False: "Ours is worse", None: "The held-out text"}[holds])


def test_the_guarantee_needs_something_to_compare() -> None:
    assert guarantee([record("uniform", 0, [1.0, 2.0])])["holds"] is None


def test_tokens_to_the_same_loss_are_read_from_the_curve() -> None:
    paper = record("evopress", 0, [2.0, 2.0], tokens=1000)
    ours = record("learning", 0, [1.0, 1.0], curve=((0, 3.0), (100, 2.5), (200, 1.9), (300, 1.0)))
    (found,) = reached([paper, ours])
    assert (found["tokens"], found["share"]) == (200, 0.2)
    (never,) = reached([paper, record("learning", 0, [3.0, 3.0], curve=((0, 3.0),))])
    assert (never["tokens"], never["share"]) == (None, None)


def test_a_long_curve_is_thinned_evenly_in_the_logarithm() -> None:
    trace = tuple(Point(tokens, np.array([tokens])) for tokens in (0, *range(100, 100_100, 100)))
    points = thinned(Found(trace[-1].profile, 100_000, trace))
    tokens = [point.tokens for point in points]
    assert len(points) <= POINTS and (tokens[0], tokens[-1]) == (0, 100_000)
    ratios = np.diff(np.log(tokens[4:]))
    assert ratios == pytest.approx(np.full(len(ratios), np.log(1000) / (POINTS - 2)), rel=0.2)
    assert [*thinned(Found(trace[-1].profile, 0, trace[:3]))] == [*trace[:3]]


# -- command line --------------------------------------------------------------------------------------------------


def call(*words: object) -> Result:
    return CliRunner().invoke(app, ["llm", "compare", *map(str, words)])


def test_the_command_ends_with_its_table(requests: dict[str, CompareRequest], tmp_path: Path) -> None:
    request = replace(requests["drop"], methods=("uniform", "shortgpt", "evopress"), seeds=1)
    *words, out = request.command_line(tmp_path / "c").split()[3:]
    result = call(*words, out)
    assert result.exit_code == 0, result.output
    assert [line.split("  ")[0] for line in result.stdout.splitlines()[:4]] == [
        "method",
        *(METHODS[name].title for name in ("uniform", "shortgpt", "evopress")),
    ]
    assert "3 of 3: EvoPress (paper), seed 0" in result.stderr and "evopress: generation 2" in result.stderr
    again = call(*words, out, "--json", "--quiet")
    assert again.stderr == ""
    assert json.loads(again.stdout) == read_document(tmp_path / "c" / "results.json")
    options = read_document(tmp_path / "c" / "run.json")["options"]
    assert options == json.loads(json.dumps(asdict(request)))


def test_the_command_refuses_in_one_line(requests: dict[str, CompareRequest], tmp_path: Path) -> None:
    words = [requests["drop"].model, "--out", tmp_path / "c", "--task", "drop"]
    wrong = call(*words, "--target", "0.2", "--methods", "owl")
    assert wrong.exit_code == 2 and "owl is no method for drop" in " ".join(wrong.stderr.replace("│", " ").split())
    protected = call(*words, "--target", "0.9", "--protect", "0-7", "--preset", "demo")
    assert protected.exit_code == 1
    assert protected.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in protected.stderr
