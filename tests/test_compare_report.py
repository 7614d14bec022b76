from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from discopt.compare_report import exceptions_line, markdown_report, overall_rows
from discopt.compare_runs import ProblemFacts, checkpoints
from discopt.compare_summary import Comparison, numbers, summarise
from discopt.encoding import plain

BUDGETS = (20, 100)
SEEDS = 10


def facts(name: str, reference: float | None = 0.0, multimodal: bool = False) -> ProblemFacts:
    return ProblemFacts(name, name, 16, 3, 1, 1, multimodal, reference, f"how {name} is known", random=10.0)


def line(problem: str, algorithm: str, seed: int, losses: tuple[float | None, ...], **changes: Any) -> dict[str, Any]:
    """A run that has the first loss up to the first budget, and the second from there on."""
    early, late = losses
    return {
        "problem": problem,
        "algorithm": algorithm,
        "seed": seed,
        "status": "done",
        "losses": [early if point <= BUDGETS[0] else late for point in checkpoints(BUDGETS)],
        "best": min((loss for loss in losses if loss is not None), default=None),
        "evaluations": 100,
        "total_fidelity": 100,
        "feasible": True,
        "feasible_rows": 1.0,
        "overhead": 25e-6,
        "seconds": 0.5,
        "out_of_time": False,
        "stop": "the limit of total fidelity is reached",
        **changes,
    }


def compared(
    problems: list[ProblemFacts], lines: list[dict[str, Any]], default: str | None = "ours", tolerance: float = 0.01
) -> tuple[Comparison, dict[str, Any]]:
    names = tuple(dict.fromkeys(entry["algorithm"] for entry in lines))
    comparison = Comparison.of_runs(problems, names, lines, BUDGETS, default, tolerance)
    head = {"command_line": "discopt compare --out here", "versions": {"discopt": "1", "platform": "secret"}}
    more = {"seeds": SEEDS, "max_seconds_per_run": 60.0, "left_out": ["feature-selection"]}
    return comparison, {**head, **more, **summarise(comparison)}


def two() -> tuple[Comparison, dict[str, Any]]:
    """Ours is ahead on `easy` and behind on `hard`, by the seed's small amount; random is at 5 everywhere."""
    lines = []
    for seed in range(SEEDS):
        lines += [line("easy", "ours", seed, (2.0, 0.01 * seed)), line("hard", "ours", seed, (3.0, 1 + 0.1 * seed))]
        lines += [line("easy", "theirs", seed, (2.0, 0.5)), line("hard", "theirs", seed, (3.0, 0.5 + 0.01 * seed))]
        lines += [line(name, "random", seed, (6.0, 5.0)) for name in ("easy", "hard")]
    return compared([facts("easy"), facts("hard", multimodal=True)], lines)


def cell(results: dict[str, Any], problem: str, algorithm: str, budget: int) -> dict[str, Any]:
    key = {"problem": problem, "algorithm": algorithm, "budget": budget}
    return next(c for c in results["cells"] if key.items() <= c.items())


def test_a_cell_has_the_median_and_the_quartiles_of_its_runs() -> None:
    _, results = two()
    ours = cell(results, "hard", "ours", 100)
    assert (ours["lower_quartile"], ours["median"], ours["upper_quartile"]) == pytest.approx((0.12, 0.145, 0.17))
    assert cell(results, "easy", "ours", 100)["success"] == 1.0
    assert cell(results, "hard", "ours", 100)["success"] == 0.0


def test_the_best_is_marked_and_so_are_ties() -> None:
    _, results = two()
    marks = {
        name: (c["best"], c["tied"]) for name in ("ours", "theirs", "random") for c in [cell(results, "easy", name, 20)]
    }
    assert marks == {"ours": (True, True), "theirs": (True, True), "random": (False, False)}
    assert cell(results, "easy", "ours", 100)["best"] and not cell(results, "easy", "ours", 100)["tied"]
    report = markdown_report(results, ())
    assert "| easy | **0.2** (0.2 to 0.2) = | **0.2** (0.2 to 0.2) = | 0.6 (0.6 to 0.6) + |" in report
    assert "| hard | 0.145 (0.12 to 0.17) | **0.0545** (0.052 to 0.057) - | 0.5 (0.5 to 0.5) + |" in report


def test_every_pair_where_the_default_is_behind_is_an_exception_with_its_numbers() -> None:
    _, results = two()
    (row,) = results["exceptions"]
    assert {**row, "p_holm": 0, "default_median": 0, "median": 0} == {
        "problem": "hard",
        "budget": 100,
        "algorithm": "theirs",
        "default_median": 0,
        "median": 0,
        "p_holm": 0,
        "significant": True,
    }
    assert (row["default_median"], row["median"]) == pytest.approx((0.145, 0.0545))
    assert row["p_holm"] == pytest.approx(2 * 2 / 2**10)  # all ten pairs, two algorithms tested
    assert exceptions_line(results).endswith(
        "than that of ours in 1 of 4 pairs of a problem and a budget, significantly in 1"
    )
    assert "| hard | 100 | 0.145 | theirs 0.0545 (p 0.0039) | theirs |" in markdown_report(results, ())


def test_the_overall_table_is_ordered_by_rank() -> None:
    _, results = two()
    rows = overall_rows(results, 100)
    assert [(row["algorithm"], row["mean rank"], row["best on"]) for row in rows] == [
        ("ours", "1.50", "1 of 2"),
        ("theirs", "1.50", "1 of 2"),
        ("random", "3.00", "0 of 2"),
    ]


def test_multimodal_problems_are_also_looked_at_alone() -> None:
    comparison, results = two()
    assert {name: list(rows) for name, rows in comparison.subsets.items()} == {"all": [0, 1], "multimodal": [1]}
    tests = {(t["problems"], t["budget"], t["algorithm"]): t for t in results["tests"]}
    assert [tests["all", 100, "theirs"][key] for key in ("default_better", "ties", "default_worse")] == [1, 0, 1]
    assert [tests["multimodal", 100, "theirs"][key] for key in ("default_better", "ties", "default_worse")] == [0, 0, 1]


def test_a_run_better_than_the_reference_becomes_it_and_is_named() -> None:
    lines = [line("a", "ours", seed, (4.0, 2.0)) for seed in range(SEEDS)]
    lines += [line("a", "random", seed, (5.0, -2.0 if seed == 3 else 4.0)) for seed in range(SEEDS)]
    comparison, results = compared([facts("a")], lines)
    assert (comparison.references[0].loss, comparison.references[0].beaten_by) == (-2.0, "random")
    assert cell(results, "a", "ours", 100)["median"] == pytest.approx(4 / 12)
    report = markdown_report(results, ())
    assert "Runs beat the stated reference of a: the better value is used." in report
    assert "found here by random, better than the 0 stated (how a is known)" in report


def test_rounding_does_not_beat_a_reference() -> None:
    comparison, _ = compared([facts("a")], [line("a", "ours", 0, (1.0, -1e-12))])
    assert comparison.references[0].beaten_by is None
    assert comparison.gaps.min() == 0.0


def test_without_a_reference_the_best_run_is_it() -> None:
    comparison, results = compared([facts("a", reference=None)], [line("a", "ours", 0, (3.0, 2.0))])
    assert (comparison.references[0].loss, comparison.references[0].known) == (2.0, None)
    assert "best of this comparison, by ours" in markdown_report(results, ())


def test_an_infeasible_answer_is_worse_than_any_and_beats_no_reference() -> None:
    lines = [line("a", "ours", seed, (3.0, 2.0)) for seed in range(SEEDS)]
    lines += [line("a", "cheat", seed, (None, None), feasible=False, feasible_rows=0.25) for seed in range(SEEDS)]
    _, results = compared([facts("a")], lines)
    assert math.isinf(cell(results, "a", "cheat", 100)["median"])
    assert cell(results, "a", "cheat", 100)["against_default"] == "worse"
    report = markdown_report(results, ())
    assert "| a | **0.2** (0.2 to 0.2) | none + |" in report
    assert "| cheat | 0% | 25.0% | 25.0% on a | 0 |" in report


def test_what_does_not_apply_is_left_out_and_what_failed_is_last() -> None:
    lines = []
    for seed in range(SEEDS):
        lines += [line(name, "ours", seed, (3.0, 2.0)) for name in ("a", "b")]
        lines += [line("a", "small", seed, (3.0, 0.0))]
        key = {"problem": "b", "algorithm": "small", "seed": seed}
        lines += [{**key, "status": "not applicable", "reason": "too large"}]
        lines += [line("a", "breaks", seed, (3.0, 2.0)), line("b", "breaks", seed, (3.0, 2.0))]
        lines[-1] = {**key, "algorithm": "breaks", "status": "failed", "reason": "TypeError: a bug"}
    comparison, results = compared([facts("a"), facts("b")], lines)
    assert comparison.everywhere.tolist() == [True, False, True]
    assert set(results["ranks"][0]["ranks"]) == {"ours", "breaks"}
    assert math.isinf(cell(results, "b", "breaks", 100)["median"])
    report = markdown_report(results, ())
    assert "| b | **0.2** (0.2 to 0.2) | n/a | none + |" in report
    assert "| small | 10 not applicable | too large | b |" in report
    assert "| breaks | 10 failed | TypeError: a bug | b |" in report


def test_a_run_stopped_by_time_is_marked_at_the_budgets_it_did_not_reach() -> None:
    lines = [line("a", "ours", 0, (3.0, 2.0), out_of_time=True, total_fidelity=50, evaluations=50)]
    _, results = compared([facts("a")], lines)
    assert [cell(results, "a", "ours", budget)["out_of_time"] for budget in BUDGETS] == [0, 1]
    assert "| a | **0.2** (0.2 to 0.2) t |" in markdown_report(results, ())


def test_a_run_that_measured_nothing_has_no_overhead() -> None:
    nothing = {"overhead": None, "feasible_rows": None, "out_of_time": True, "total_fidelity": 0}
    _, results = compared([facts("a")], [line("a", "ours", 0, (None, None), **nothing)])
    assert math.isnan(results["runs"][0]["overhead_seconds"])
    assert "| a | none t |" in markdown_report(results, ())


def test_without_a_default_nothing_is_tested() -> None:
    lines = [line("a", "x", 0, (3.0, 2.0)), line("a", "y", 0, (3.0, 1.0))]
    _, results = compared([facts("a")], lines, default=None)
    assert (results["tests"], results["exceptions"]) == ([], [])
    assert "No algorithm is named as the default." in markdown_report(results, ())


def test_the_report_says_how_it_was_got() -> None:
    _, results = two()
    report = markdown_report(results, ("curves.png", "ranks.png"))
    for text in ("discopt compare --out here", "discopt 1", "how hard is known", "feature-selection", "annealing"):
        assert text in report
    assert "(curves.png)" in report and "(targets.png)" not in report
    assert "secret" not in report


def test_all_that_is_written_is_strict_json() -> None:
    comparison, results = two()
    for document in (results, numbers(comparison)):
        json.dumps(plain(document, exact=False), allow_nan=False)
    gaps = numbers(comparison)["gaps"]["hard"]["ours"]
    assert np.array(gaps)[:, 1] == pytest.approx(0.1 + 0.01 * np.arange(SEEDS))


@pytest.mark.parametrize("few", [True, False])
def test_the_pictures_are_drawn_whatever_was_found(tmp_path: Path, few: bool) -> None:
    pytest.importorskip("matplotlib")
    from discopt.compare import PICTURES
    from discopt.compare_plots import plot_comparison

    lines = [line("a", "ours", 0, (None, None))]
    comparison = compared([facts("a")], lines)[0] if few else two()[0]
    plot_comparison(comparison, tmp_path, PICTURES)
    for name in PICTURES:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_an_algorithm_looks_the_same_in_every_picture_and_no_two_look_alike() -> None:
    pytest.importorskip("matplotlib")
    from discopt.compare_plots import _marker, _style

    lines = [line("a", f"x{i}", 0, (3.0, 2.0)) for i in range(20)]
    comparison, _ = compared([facts("a")], lines, default="x3")
    looks = [_style(comparison, a) for a in range(20)]
    assert len({(look["color"], look["linestyle"]) for look in looks}) == 20
    assert len({(look["color"], _marker(comparison, a)) for a, look in enumerate(looks)}) == 20
