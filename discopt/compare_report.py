"""report.md of a comparison, from what report.json holds; numbers that are not finite are NaN, infinite or None."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from discopt.compare_runs import FAILED, NOT_APPLICABLE, RANDOM_PROFILES
from discopt.progress import format_loss
from discopt.report import markdown_rows

Row = Mapping[str, Any]

CAPTIONS = {
    "curves.png": "Gap over full measurements spent: medians, and quartiles as bands",
    "targets.png": "Share of target gaps reached over full measurements spent",
    "running-time.png": "Expected running time to the tolerated gap",
    "ranks.png": "Average ranks and critical differences",
}


def markdown_report(results: Mapping[str, Any], pictures: Collection[str]) -> str:
    """The whole report; `pictures` are the files that lie beside it."""
    budgets = results["budgets"]
    parts = [
        "# Comparison of searches",
        _intro(results),
        "## Over all problems",
        *(part for budget in budgets for part in (f"Budget {budget:,}:", overall_table(results, budget))),
        *(_picture(name) for name in ("targets.png", "ranks.png") if name in pictures),
        "## Where the default is not the best",
        _exceptions(results),
        "## Gaps",
        _how_to_read(results),
        *(part for budget in budgets for part in (f"### Budget {budget:,}", _gap_table(results, budget))),
        *(_picture(name) for name in ("curves.png",) if name in pictures),
        "## Success and expected running time",
        f"Share of the runs whose gap is at most {results['tolerance']:g} with the budget of {budgets[-1]:,}, and full "
        "measurements that it takes on average to get there when runs are repeated until one does "
        "(a dash: no run did).",
        _grid(results, lambda cell, run: f"{cell['success']:.0%} · {_count(run['expected_running_time'])}"),
        *(_picture(name) for name in ("running-time.png",) if name in pictures),
        "## Tests",
        *_tests(results),
        "## Overhead",
        "Microseconds of the search itself per profile measured, without the objective, while other runs went on in "
        "other processes; medians of the runs.",
        _grid(results, lambda _, run: _count(1e6 * run["overhead_seconds"])),
        "## Feasibility",
        _feasibility(results),
        "## Problems, and how each reference was got",
        _references(results),
        *_trouble(results),
        "## The same again",
        f"```\n{results['command_line']}\n```",
        "With "
        + ", ".join(f"{name} {version}" for name, version in results["versions"].items() if name != "platform")
        + ".",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def overall_table(results: Mapping[str, Any], budget: int) -> str:
    """How the algorithms did over all problems with a budget, best rank first."""
    return markdown_rows(overall_rows(results, budget))


def overall_rows(results: Mapping[str, Any], budget: int) -> list[dict[str, Any]]:
    """The same as rows of text."""
    rows = [row for row in results["rows"] if row["budget"] == budget]
    rows.sort(key=lambda row: math.inf if _missing(row["mean_rank"]) else row["mean_rank"])
    return [
        {
            "algorithm": row["algorithm"],
            "mean rank": "n/a" if _missing(row["mean_rank"]) else f"{row['mean_rank']:.2f}",
            "median gap": _gap(row["median_gap"]),
            "best on": f"{row['best_on']} of {row['problems']}",
            "success": "n/a" if _missing(row["success"]) else f"{row['success']:.0%}",
        }
        for row in rows
    ]


def exceptions_line(results: Mapping[str, Any]) -> str:
    """One line on how often the default is not the best."""
    if results["default"] is None:
        return "no algorithm is named as the default"
    pairs = {(row["problem"], row["budget"]) for row in results["exceptions"]}
    clear = {(row["problem"], row["budget"]) for row in results["exceptions"] if row["significant"]}
    total = len(results["problems"]) * len(results["budgets"])
    return (
        f"another algorithm's median gap is lower than that of {results['default']} in {len(pairs)} of {total} pairs "
        f"of a problem and a budget, significantly in {len(clear)}"
    )


def _intro(results: Mapping[str, Any]) -> str:
    return (
        f"{len(results['algorithms'])} algorithms on {len(results['problems'])} problems, {results['seeds']} seeds "
        "each, with equal means: a budget counts full measurements, that is, profiles measured at the problem's full "
        "fidelity; a profile measured at half of it counts for half. "
        "All losses here are noise-free losses of the best profile that the algorithm itself would have answered with, "
        "measured aside and not counted. gap = (loss - reference) / (random - reference), with the median loss of "
        f"{RANDOM_PROFILES} random profiles that spend the budget: 0 at the reference, 1 at a random profile.\n\n"
        f"Every run was made once, with the plan of the largest budget ({results['budgets'][-1]:,}), and read off at "
        "the smaller ones. An algorithm that knows its horizon, as annealing does, is so read off in the middle of a "
        "schedule made for the largest budget, and might do better at the smaller ones with one made for them. A query "
        "that would exceed a budget is not counted in it; a run that ends before the budget is spent, as it does at a "
        "certain optimum, carries its last best on, and so does one stopped by time, after "
        f"{results['max_seconds_per_run']:g} seconds."
    )


def _how_to_read(results: Mapping[str, Any]) -> str:
    default = results["default"]
    smallest = 2.0 ** (1 - results["seeds"]) * (len(results["algorithms"]) - 1)  # p, after the correction
    hopeless = (
        f" With {results['seeds']} seeds and {len(results['algorithms'])} algorithms, no difference on one "
        "problem can be significant after the correction, where all apply."
        if default is not None and smallest > results["alpha"]
        else ""
    )
    tests = (
        f" `+`: {default} is significantly better than this one; `-`: it is significantly worse (Wilcoxon's "
        f"signed-rank test on the runs paired by seed, p < {results['alpha']:g} after Holm's correction for all "
        "algorithms in the row)."
        if default is not None
        else ""
    )
    return (
        "Median (lower to upper quartile) over the seeds, the best of each row in bold; `=`: the best is a tie."
        f"{tests} `t`: a run was stopped by time before it had spent the budget; n/a: does not apply; "
        f"none: no feasible profile, or failed.{hopeless}"
    )


def _gap_table(results: Mapping[str, Any], budget: int) -> str:
    cells = {(c["problem"], c["algorithm"]): c for c in results["cells"] if c["budget"] == budget}
    return markdown_rows(
        [
            {
                "problem": facts["name"],
                **{name: _gap_cell(cells[facts["name"], name]) for name in results["algorithms"]},
            }
            for facts in results["problems"]
        ]
    )


def _gap_cell(cell: Row) -> str:
    median = cell["median"]
    if _missing(median):
        return "n/a"
    text = f"**{_gap(median)}**" if cell["best"] else _gap(median)
    if math.isfinite(median):
        text += f" ({_gap(cell['lower_quartile'])} to {_gap(cell['upper_quartile'])})"
    signs = "=" * cell["tied"] + {"worse": "+", "better": "-"}.get(cell["against_default"], "")
    signs += "t" * bool(cell["out_of_time"])
    return f"{text} {signs}".rstrip()


def _grid(results: Mapping[str, Any], show: Any) -> str:
    """Problems x algorithms, with what `show(cell, run)` says of the largest budget; n/a where nothing was run."""
    last = results["budgets"][-1]
    cells = {(c["problem"], c["algorithm"]): c for c in results["cells"] if c["budget"] == last}
    runs = {(r["problem"], r["algorithm"]): r for r in results["runs"]}
    keys = {facts["name"]: [(facts["name"], name) for name in results["algorithms"]] for facts in results["problems"]}
    return markdown_rows(
        [
            {
                "problem": problem,
                **{
                    key[1]: "n/a"
                    if _missing(runs[key]["seconds"]) or _missing(cells[key]["median"])
                    else show(cells[key], runs[key])
                    for key in row
                },
            }
            for problem, row in keys.items()
        ]
    )


def _exceptions(results: Mapping[str, Any]) -> str:
    line = exceptions_line(results)
    head = f"{line[0].upper()}{line[1:]}."
    if not results["exceptions"]:
        return head
    cells: dict[tuple[str, int], list[Row]] = {}
    for row in results["exceptions"]:
        cells.setdefault((row["problem"], row["budget"]), []).append(row)
    rows = [
        {
            "problem": problem,
            "budget": budget,
            f"gap of {results['default']}": _gap(better[0]["default_median"]),
            "lower, with p (Holm)": ", ".join(
                f"{row['algorithm']} {_gap(row['median'])} (p {row['p_holm']:.2g})" for row in better
            ),
            "significant": ", ".join(row["algorithm"] for row in better if row["significant"]) or "none",
        }
        for (problem, budget), better in cells.items()
    ]
    return f"{head}\n\n{markdown_rows(rows)}"


def _tests(results: Mapping[str, Any]) -> Iterable[str]:
    yield (
        "Friedman's test of the ranks of the median gaps over problems, of the algorithms that apply to all, and "
        f"Nemenyi's critical difference (at {results['alpha']:g}): average ranks that lie further apart differ."
    )
    yield markdown_rows(
        [
            {
                "problems": f"{row['problems']} ({row['count']})",
                "budget": row["budget"],
                "p": "-" if _missing(row["p"]) else f"{row['p']:.2g}",
                "critical difference": "-" if _missing(row["p"]) else f"{row['critical_difference']:.2f}",
                "average ranks": ", ".join(
                    f"{name} {value:.2f}" for name, value in sorted(row["ranks"].items(), key=lambda item: item[1])
                ),
            }
            for row in results["ranks"]
        ]
    )
    if results["tests"]:
        yield (
            f"{results['default']} against each other algorithm: problems on which its median gap is lower, the same, "
            "or higher, and Wilcoxon's signed-rank test on those medians with Holm's correction."
        )
        yield markdown_rows(
            [
                {
                    "problems": row["problems"],
                    "budget": row["budget"],
                    "against": row["algorithm"],
                    "better": row["default_better"],
                    "tie": row["ties"],
                    "worse": row["default_worse"],
                    "p": f"{row['p']:.2g}",
                    "p (Holm)": f"{row['p_holm']:.2g}",
                }
                for row in results["tests"]
            ]
        )


def _feasibility(results: Mapping[str, Any]) -> str:
    rows = []
    for name in results["algorithms"]:
        runs = [run for run in results["runs"] if run["algorithm"] == name and not _missing(run["feasible_rows"])]
        if runs:
            worst = min(runs, key=lambda run: run["feasible_rows"])
            rows.append(
                {
                    "algorithm": name,
                    "runs with a feasible answer": _share(sum(run["feasible"] for run in runs) / len(runs)),
                    "measured profiles feasible": _share(sum(run["feasible_rows"] for run in runs) / len(runs)),
                    "least": f"{_share(worst['feasible_rows'])} on {worst['problem']}",
                    "runs stopped by time": sum(run["out_of_time"] for run in runs),
                }
            )
    return markdown_rows(rows)


def _references(results: Mapping[str, Any]) -> str:
    rows = []
    for facts in results["problems"]:
        reference = facts["reference"]
        beaten = reference["beaten_by"]
        source = reference["source"] or "stated with the problem"
        if beaten:
            source = f"found here by {beaten}, better than the {reference['known']:.9g} stated ({source})"
        rows.append(
            {
                "problem": facts["name"] + (" (multimodal)" if facts["multimodal"] else ""),
                "units x levels": f"{facts['n']:,} x {facts['m']}",
                "resources": facts["resources"],
                "fidelity": facts["fidelity"],
                "reference": f"{reference['loss']:.6g}",
                "random": format_loss(facts["random"]),
                "how it was got": source,
            }
        )
    beaten = [f["name"] for f in results["problems"] if f["reference"]["beaten_by"]]
    head = f"Runs beat the stated reference of {', '.join(beaten)}: the better value is used.\n\n" if beaten else ""
    left_out = results["left_out"]
    tail = f"\n\nLeft out, for want of a package: {', '.join(left_out)}." if left_out else ""
    return head + markdown_rows(rows) + tail


def _trouble(results: Mapping[str, Any]) -> Iterable[str]:
    """What did not apply, or failed, with the reason."""
    problems: dict[tuple[str, str, str], list[str]] = {}
    for run in results["runs"]:
        if run["reason"] is not None:
            status = ", ".join(f"{count} {status}" for status, count in run["status"].items())
            problems.setdefault((run["algorithm"], status, run["reason"]), []).append(run["problem"])
    if problems:
        yield "## Not applicable, or failed"
        yield f"Runs that {FAILED} count as if they had found nothing; those {NOT_APPLICABLE} are left out."
        yield markdown_rows(
            [
                {"algorithm": name, "runs on each": status, "reason": reason, "problems": ", ".join(names)}
                for (name, status, reason), names in problems.items()
            ]
        )


def _picture(name: str) -> str:
    return f"![{CAPTIONS[name]}]({name})"


def _missing(value: float | None) -> bool:
    return value is None or math.isnan(value)


def _gap(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "n/a"
    if math.isinf(value):
        return "none"
    return f"{value:.1e}" if 0 < value < 1e-3 else f"{value:.3g}"


def _count(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:,.0f}"


def _share(value: float) -> str:
    return f"{value:.1%}" if 0 < value < 1 else f"{value:.0%}"
