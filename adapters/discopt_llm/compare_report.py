"""What a comparison leaves: results.json, report.md and the picture of the searches' curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from discopt.folder import RunFolder
from discopt.plots import BEST, INK, MUTED, STAGES, is_drawn, new_figure, save_figure, style_axes
from discopt.report import markdown_rows
from discopt_llm.heldout import standard_error
from discopt_llm.methods import DENSE, METHODS, OURS, REFERENCES, Context

if TYPE_CHECKING:
    from discopt_llm.compare import CompareRequest

PICTURE = "curves.png"
CONFIDENCE = 0.95
PAPER = "evopress"
_MEASURED = ("kl", "kl_error", "perplexity", "agreement", "tokens", "bytes", "seconds")
_COLORS = {OURS: BEST, PAPER: STAGES[2]}
Record = Mapping[str, Any]


def write_comparison(
    request: CompareRequest, context: Context, records: Sequence[Record], folder: RunFolder
) -> dict[str, Any]:
    """Write the report's files, results.json last; returns its content.

    records: what each run of a method left, as `compare` writes them.
    """
    done = [record for record in records if "error" not in record]
    summary = summarised(done)
    heldout = context.prepared.heldout
    results = {
        "format": "discopt-llm-comparison",
        "version": 1,
        "command": folder.request["command"],
        "model": request.model,
        "task": request.task,
        "asked": context.task.asked(),
        "generations": context.prepared.request.chosen.generations,
        "seeds": request.seeds,
        "heldout": {"source": heldout.source, "tokens": heldout.tokens, "sequences": len(heldout.sequences)},
        "best": best_method(done),
        "summary": summary,
        "rows": rows_of(done),
        "guarantee": guarantee(done),
        "reached": reached(done),
        "missing": [dict(record) for record in records if "error" in record],
        "runs": [dict(record) for record in done],
        "folder": str(folder.path),
    }
    drawn = _draw(done, folder)
    folder.write_text("report.md", _report(request, context, results, drawn, folder))
    folder.write_json("results.json", results)
    return dict(folder.read_json("results.json"))


def shown_summary(summary: Sequence[Record]) -> list[dict[str, Any]]:
    """The table of methods under the headings that people read."""
    headings = {
        "title": "method",
        "kl": "KL",
        "kl_error": "± KL",
        "spread": "seeds",
        "perplexity": "perplexity",
        "agreement": "top-1 agreement",
        "bytes": "bytes",
        "tokens": "search tokens",
        "seconds": "seconds",
    }
    lines = []
    for row in summary:
        low, high = row["kl_range"]
        spread = "-" if row["seeds"] == 1 or low is None else f"{low:.4g} to {high:.4g}"
        lines.append({heading: {**row, "spread": spread}[key] for key, heading in headings.items()})
    return lines


# -- numbers -------------------------------------------------------------------------------------------------------


def rows_of(records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row for each run, with its paired differences in KL to uniform and to the best method, and their errors."""
    best = best_method(records)
    rows = []
    for record in records:
        row = {"name": record["method"], "seed": record["seed"], **record["row"]}
        for what, name in (("uniform", "uniform"), ("best", best)):
            row |= dict(zip((f"minus_{what}", f"minus_{what}_error"), paired(records, record, name), strict=True))
        rows.append(row)
    return rows


def summarised(records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row for each method: medians over the seeds, and the lowest and highest KL.

    `minus_uniform` and `minus_best` are differences of KLs averaged over the seeds, paired by sequence.
    """
    best = best_method(records)
    rows = []
    for name in dict.fromkeys(record["method"] for record in records):
        runs = [record for record in records if record["method"] == name]
        row: dict[str, Any] = {"name": name, "title": METHODS[name].title, "seeds": len(runs)}
        for key in _MEASURED:
            values = [run["row"][key] for run in runs]
            middle = None if None in values else float(np.median(values))
            row[key] = round(middle) if middle is not None and key in ("tokens", "bytes") else middle
        kls = [run["row"]["kl"] for run in runs]
        row["kl_range"] = [None, None] if None in kls else [min(kls), max(kls)]
        for what, other in (("uniform", "uniform"), ("best", best)):
            found = [difference for run in runs if (difference := _difference(records, run, other)) is not None]
            mean = np.mean(found, axis=0) if found else None
            row |= dict(zip((f"minus_{what}", f"minus_{what}_error"), _mean_and_error(mean), strict=True))
        rows.append(row)
    return rows


def best_method(records: Sequence[Record]) -> str | None:
    """The method of the lowest median KL over seeds, the dense model aside; None if there is none."""
    kls: dict[str, list[float]] = {}
    for record in records:
        if record["method"] != DENSE:
            kls.setdefault(record["method"], []).append(float(_kl(record).mean()))
    medians = {name: float(np.median(values)) for name, values in kls.items()}
    finite = [name for name, median in medians.items() if np.isfinite(median)]
    return min(finite, key=medians.__getitem__, default=None)


def paired(records: Sequence[Record], record: Record, name: str | None) -> tuple[float | None, float | None]:
    """Mean difference in a run's KL to a method, below 0 where the run is better, and its standard error.

    Both are over sequences that the two have in common, so that what makes a text hard cancels. Where both ran with
    several seeds it is the run with the same one, else the mean of the method's runs.
    """
    return _mean_and_error(_difference(records, record, name))


def guarantee(records: Sequence[Record]) -> dict[str, Any]:
    """Whether a run of ours is worse than uniform or an additive profile, beyond the confidence interval.

    `holds` is None where there is nothing to compare, or too few sequences for an interval.
    """
    from scipy.stats import t

    comparisons = []
    for record in records:
        for name in REFERENCES if record["method"] == OURS else ():
            if not any(other["method"] == name for other in records):
                continue
            difference, error = paired(records, record, name)
            half = None if error is None else float(t.ppf((1 + CONFIDENCE) / 2, len(record["kl"]) - 1)) * error
            worse = None if difference is None or half is None else difference > half
            interval = {"difference": difference, "half_width": half, "worse": worse}
            comparisons.append({"seed": record["seed"], "against": name, **interval})
    answers = [comparison["worse"] for comparison in comparisons]
    holds = False if True in answers else None if not answers or None in answers else True
    return {"confidence": CONFIDENCE, "holds": holds, "comparisons": comparisons}


def reached(records: Sequence[Record]) -> list[dict[str, Any]]:
    """For each seed, the tokens after which ours had the KL that the paper's search ends with; None if never."""
    found = []
    seeds = {record["seed"]: record for record in records if record["method"] == OURS}
    for paper in (record for record in records if record["method"] == PAPER and record["seed"] in seeds):
        ours, goal = seeds[paper["seed"]], paper["row"]["kl"]
        if goal is None:
            continue
        there = [at["tokens"] for at in ours["curve"] if at["kl"] is not None and at["kl"] <= goal]
        spent = paper["row"]["tokens"]
        tokens = min(there, default=None)
        share = None if tokens is None or not spent else tokens / spent
        found.append({"seed": paper["seed"], "kl": goal, "paper_tokens": spent, "tokens": tokens, "share": share})
    return found


def _difference(records: Sequence[Record], record: Record, name: str | None) -> NDArray[np.float64] | None:
    """A run's KL minus a method's on each sequence, (s,); None if the method has no run to set beside it."""
    runs = [other for other in records if other["method"] == name]
    if runs and METHODS[record["method"]].seeded and METHODS[runs[0]["method"]].seeded:
        runs = [other for other in runs if other["seed"] == record["seed"]]
    return _kl(record) - np.mean([_kl(other) for other in runs], axis=0) if runs else None


def _mean_and_error(values: NDArray[np.float64] | None) -> tuple[float | None, float | None]:
    return (None, None) if values is None else (_number(values.mean()), _number(standard_error(values)))


def _kl(record: Record) -> NDArray[np.float64]:
    """KL of each held-out sequence, (s,); NaN where a student answers nothing finite."""
    return np.array(record["kl"], dtype=np.float64)


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


# -- report --------------------------------------------------------------------------------------------------------


def _report(
    request: CompareRequest, context: Context, results: Mapping[str, Any], drawn: bool, folder: RunFolder
) -> str:
    """report.md."""
    heldout, best = results["heldout"], results["best"]
    chosen = context.prepared.request.chosen
    versions = ", ".join(f"{name} {version}" for name, version in folder.request["versions"].items())
    of_best = next((run for run in results["runs"] if run["method"] == best), None)
    parts = [
        f"# {context.task.title}: the methods compared",
        context.task.sentence(np.array(of_best["profile"])) if of_best is not None else "",
        f"Every method has the same levels, the same budget, and {heldout['tokens']:,} tokens of {heldout['source']} "
        f"in {heldout['sequences']} sequences that no method has seen to be measured on. Those that chance or the "
        f"sample of calibration text has a part in ran with {_seeds(results['seeds'])}; their rows are medians. The "
        f"searches had {chosen.generations} generations of {chosen.offspring} offspring, selected at "
        f"{', then '.join(str(stage) for stage in chosen.stages)} (survivors @ tokens); greedy measured at most "
        f"{(chosen.generations or 0) * chosen.offspring:,} profiles, or one for each unit if that is more, on "
        f"{chosen.stages[0].fidelity:,} tokens.",
        "KL is to the dense model, in nats per token, ± its standard error over sequences. Tokens are what a method "
        "measured before it had its profile: profiles times tokens of the sample. Seconds are its wall time; levels "
        "that one method has unpacked are in memory for the next.",
        markdown_rows(shown_summary(results["summary"])),
        *(f"No {METHODS[run['method']].title}, seed {run['seed']}: {run['error']}." for run in results["missing"]),
        *([f"![Held-out KL over the tokens spent]({PICTURE})"] if drawn else []),
        *_reached_words(results["reached"]),
        "## Against uniform and additive",
        _guarantee_words(results["guarantee"]),
        "## Paired differences",
        "Differences in KL on the same sequences, below 0 where a method is better, ± their standard errors; the best "
        f"method is the one of the lowest median, {METHODS[best].title if best else 'none'}.",
        markdown_rows(_paired_rows(results["summary"])),
        "## Every run",
        markdown_rows(
            [{"method": row["name"], "seed": row["seed"], **{k: row[k] for k in _MEASURED}} for row in results["rows"]]
        ),
        "## The same again",
        f"```\n{request.command_line(folder.path)}\n```",
        f"Begun {folder.request['created']} with {versions}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _seeds(count: int) -> str:
    return f"{count} seed{'s' * (count != 1)}"


def _paired_rows(summary: Sequence[Record]) -> list[dict[str, Any]]:
    return [
        {
            "method": row["title"],
            "− uniform": row["minus_uniform"],
            "± uniform": row["minus_uniform_error"],
            "− best": row["minus_best"],
            "± best": row["minus_best_error"],
        }
        for row in summary
        if row["name"] != DENSE
    ]


def _guarantee_words(found: Record) -> str:
    comparisons = found["comparisons"]
    if not comparisons:
        return "Nothing to compare: ours, or uniform and the additive profiles, were not asked for."
    interval = f"its {found['confidence']:.0%} confidence interval"
    if found["holds"]:
        return (
            f"In none of {len(comparisons)} comparisons is a run of ours worse than uniform or an additive profile "
            f"beyond {interval} of the paired difference."
        )
    lines = [
        f"- seed {c['seed']} against {METHODS[c['against']].title}: {c['difference']:+.4g} ± {c['half_width']:.2g}"
        for c in comparisons
        if c["worse"]
    ]
    if not lines:
        return "The held-out text is too short to tell: an interval needs two sequences and finite losses."
    return f"Ours is worse beyond {interval} of the paired difference:\n\n" + "\n".join(lines)


def _reached_words(found: Sequence[Record]) -> list[str]:
    if not found:
        return []
    lines = []
    for at in found:
        goal = f"- seed {at['seed']}: the paper's search ends at {at['kl']:.4g} after {at['paper_tokens']:,} tokens; "
        if at["tokens"] is None:
            lines.append(goal + "ours does not get there")
        else:
            share = "" if at["share"] is None else f", {at['share']:.1%} of that"
            lines.append(goal + f"ours is there after {at['tokens']:,}{share}")
    return ["## Tokens to the same loss", "As far as the points of the curves tell.", "\n".join(lines)]


# -- picture -------------------------------------------------------------------------------------------------------


def _draw(records: Sequence[Record], folder: RunFolder) -> bool:
    """Whether there is a picture: not without a search, nor without matplotlib."""
    if not any(point["tokens"] > 0 and point["kl"] is not None for record in records for point in record["curve"]):
        return False
    return is_drawn(lambda: plot_curves(records, folder.path / PICTURE))


def plot_curves(records: Sequence[Record], path: Path) -> None:
    """Draw the held-out KL of every search's best so far over its tokens, all seeds; needs the extra `plot`."""
    figure = new_figure(7.0, 4.2)
    axes = figure.add_subplot()
    curves = {
        (record["method"], record["seed"]): [
            (point["tokens"], point["kl"]) for point in record["curve"] if point["kl"] is not None
        ]
        + [(record["row"]["tokens"], record["curve"][-1]["kl"])]
        for record in records
        if record["curve"] and record["curve"][-1]["kl"] is not None
    }
    first = min(tokens for curve in curves.values() for tokens, _ in curve if tokens > 0)
    named: set[str] = set()
    for (name, _seed), curve in curves.items():
        tokens, kl = zip(*curve, strict=True)
        axes.plot(
            np.maximum(tokens, first / 2),  # what was there at no cost, at the left end
            kl,
            drawstyle="steps-post",
            color=_COLORS.get(name, INK),
            linewidth=1.8,
            alpha=0.85,
            label=None if name in named else METHODS[name].title,
        )
        named.add(name)
    for style, name in zip(("--", ":", "-."), REFERENCES, strict=True):
        kls = [record["row"]["kl"] for record in records if record["method"] == name]
        if kls and None not in kls:
            axes.axhline(float(np.median(kls)), color=MUTED, linestyle=style, linewidth=1, label=METHODS[name].title)
    axes.set_xscale("log")
    axes.set_xlabel("tokens spent")
    axes.set_ylabel("held-out KL to the dense model,\nnats per token (lower is better)")
    style_axes(axes)
    axes.legend(edgecolor="none", framealpha=0.9, fontsize=9, labelcolor=INK)
    save_figure(figure, path)
