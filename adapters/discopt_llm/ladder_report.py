"""What a ladder leaves: the Pareto table in results.json, report.md and a picture."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from discopt.folder import RunFolder
from discopt.optimizers.base import StopReason
from discopt.plots import BEST, INK, MUTED, is_drawn, new_figure, save_figure, style_axes
from discopt.report import markdown_rows

__all__ = ["PICTURE", "plot_ladder", "shown_ladder", "write_ladder"]

PICTURE = "pareto.png"
DECADE = 10  # of losses, from which on their axis is logarithmic
DONE = "done"  # why a ladder stopped that was not interrupted
REFERENCES = ("uniform", "shortgpt")  # the baseline with columns of its own: the first that a search knows
_OF_STUDENT = ("bytes", "kl", "kl_error", "perplexity", "agreement")
Record = Mapping[str, Any]


def write_ladder(
    folder: RunFolder,
    found: Sequence[tuple[str, str, Record]],
    *,
    title: str,
    command_line: str,
    baselines: Mapping[str, str],
    shared_tokens: int,
    interrupted: bool,
) -> dict[str, Any]:
    """Write the report's files, results.json last; returns its content.

    found: for each budget, largest first, its folder's name, its words, and what its results.json holds.
    baselines: what the rows of a search's baselines are called.
    shared_tokens: those that heuristics measured for all budgets.
    """
    reference = next((name for name in REFERENCES if name in baselines), None)
    points = _points(found, None if reference is None else baselines[reference])
    searched = sum(results["total_fidelity"] for _, _, results in found)
    results = {
        "format": "discopt-llm-ladder",
        "version": 1,
        "command": folder.request["command"],
        "search": folder.request["options"]["search"],
        "model": folder.request["model"]["source"],
        "rows": _rows(points, reference),
        "points": points,
        "reference": reference,
        "heldout": found[0][2]["heldout"] if found else None,
        "tokens": {"searches": searched, "heuristics": shared_tokens, "together": searched + shared_tokens},
        "seed": folder.request["seed"],
        "stop": StopReason.INTERRUPTED.value if interrupted else DONE,
        "folder": str(folder.path),
    }
    drawn = _draw(points, folder)
    folder.write_text("report.md", _report(results, title, command_line, drawn, folder))
    folder.write_json("results.json", results)
    return dict(folder.read_json("results.json"))


def shown_ladder(rows: Sequence[Record]) -> list[dict[str, Any]]:
    """The Pareto table under the headings that people read."""
    headings = {
        "budget": "budget",
        "bytes": "bytes",
        "kl": "KL",
        "kl_error": "± KL",
        "perplexity": "perplexity",
        "agreement": "top-1 agreement",
        **{f"{name}_{what}": f"{name} {word}" for name in REFERENCES for what, word in _REFERENCE_COLUMNS.items()},
        "tokens": "search tokens",
    }
    known = {key for row in rows for key in row}
    return [{heading: row.get(key) for key, heading in headings.items() if key in known} for row in rows]


_REFERENCE_COLUMNS = {"kl": "KL", "perplexity": "perplexity"}


def _points(found: Sequence[tuple[str, str, Record]], reference: str | None) -> list[dict[str, Any]]:
    """Each budget with what was asked and met, and its rows; and whether a smaller one has a lower held-out KL."""
    points = [
        {
            "budget": name,
            "words": words,
            "folder": name,
            "asked": results["asked"],
            "met": results["met"],
            "stop": results["stop"],
            "seconds": results["seconds"],
            "found": results["rows"][-1],
            "reference": next((row for row in results["rows"] if row["method"] == reference), None),
            "rows": results["rows"],
            "profile": results["profile"],
        }
        for name, words, results in found
    ]
    for i, point in enumerate(points):
        point["dominated_by"] = [other["words"] for other in points[i + 1 :] if _less(other["found"], point["found"])]
        point["as_below"] = i + 1 < len(points) and point["profile"] == points[i + 1]["profile"]
    return points


def _less(one: Record, other: Record) -> bool:
    """Whether a student has a lower KL than another; one that answers nothing finite never has."""
    return one["kl"] is not None and (other["kl"] is None or one["kl"] < other["kl"])


def _rows(points: Sequence[Record], reference: str | None) -> list[dict[str, Any]]:
    """The Pareto table: the dense model, and a row for each budget."""
    rows = []
    if points:
        dense = points[0]["rows"][0]
        rows.append({"budget": dense["method"], **{key: dense[key] for key in _OF_STUDENT}, "tokens": 0})
    for point in points:
        row = {"budget": point["budget"], **{key: point["found"][key] for key in _OF_STUDENT}}
        if point["reference"] is not None:
            row |= {f"{reference}_{key}": point["reference"][key] for key in _REFERENCE_COLUMNS}
        rows.append({**row, "tokens": point["found"]["tokens"]})
    return rows


def _report(results: Record, title: str, command_line: str, drawn: bool, folder: RunFolder) -> str:
    """report.md."""
    points, tokens = results["points"], results["tokens"]
    parts = [f"# {title}: a ladder of {len(points)} budgets"]
    if results["stop"] != DONE:
        parts.append(f"Interrupted; `{shlex.join(['discopt', 'resume', str(folder.path)])}` goes on.")
    if points:
        heldout = results["heldout"]
        parts += [
            f"Measured on {heldout['tokens']:,} tokens of {heldout['source']} that no search has seen. KL is to the "
            "dense model, in nats per token, ± its standard error over sequences. The search at a budget began with "
            "the answer of the next smaller one, as it is and raised, beside all that it begins with by itself; its "
            "tokens are those of itself and of its heuristics. What the heuristics of several budgets measure alike "
            f"was measured once: together the ladder spent {tokens['together']:,} tokens.",
            markdown_rows(shown_ladder(results["rows"])),
            *([f"![Held-out KL over size]({PICTURE})"] if drawn else []),
            *_taken_words(points),
            "## The budgets",
            "\n".join(_point_line(point) for point in points),
            "## What next",
            _commands(points, folder),
        ]
    versions = ", ".join(f"{name} {version}" for name, version in folder.request["versions"].items())
    parts += [
        "## The same again",
        f"```\n{command_line}\n```",
        f"Begun {folder.request['created']} with {versions}.",
    ]
    return "\n\n".join(parts) + "\n"


def _taken_words(points: Sequence[Record]) -> list[str]:
    """What is odd about the budgets: answers that were taken over, and those that lose more than a smaller one."""
    lines = [
        f"- {point['words']}: nothing found for it beat the answer for {below['words']}, which is taken over"
        for point, below in pairwise(points)
        if point["as_below"]
    ]
    lines += [
        f"- {point['words']}: on this text it loses more than {' and '.join(point['dominated_by'])}, though not on "
        "that of the final choice"
        for point in points
        if point["dominated_by"]
    ]
    return ["\n".join(lines)] if lines else []


def _point_line(point: Record) -> str:
    stop = "" if point["stop"] != StopReason.TIME.value else ", ended by its time limit"
    return f"- [{point['words']}]({point['folder']}/report.md): {point['found']['bytes']:,} bytes{stop}"


def _commands(points: Sequence[Record], folder: RunFolder) -> str:
    run = str(folder.path / points[-1]["folder"])
    lines = [
        shlex.join(["discopt", "llm", "export", run, "--to", "hf", "--out", "MODEL"]) + "  # any budget's student",
    ]
    return "```\n" + "\n".join(lines) + "\n```"


def _draw(points: Sequence[Record], folder: RunFolder) -> bool:
    """Whether there is a picture: not without a finite loss, nor without matplotlib."""
    if not any(point["found"]["kl"] is not None for point in points):
        return False
    return is_drawn(lambda: plot_ladder(points, folder.path / PICTURE))


def plot_ladder(points: Sequence[Record], path: Path) -> None:
    """Draw the held-out KL over the size of every budget's student, and of the reference; needs the extra `plot`.

    points: as results.json has them.
    """
    figure = new_figure(7.0, 4.2)
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes = figure.add_subplot()
    dense = points[0]["rows"][0]["bytes"]
    for key, color, style in (("reference", MUTED, "--"), ("found", BEST, "-")):
        rows = [(point["budget"], point[key]) for point in points if point[key] is not None]
        drawn = [(name, row) for name, row in rows if row["kl"] is not None and row["kl"] > 0]
        if not drawn:
            continue
        x, y = [row["bytes"] / 1e6 for _, row in drawn], [row["kl"] for _, row in drawn]
        label = "found by the search" if key == "found" else drawn[0][1]["method"]
        error = [row["kl_error"] or 0.0 for _, row in drawn]
        axes.errorbar(x, y, error, color=color, linestyle=style, marker="o", markersize=4, capsize=2, label=label)
        for (name, _), at, loss in zip(drawn, x, y, strict=True):
            if key == "found":
                axes.annotate(
                    name, (at, loss), xytext=(-4, -11), textcoords="offset points", color=INK, fontsize=9, ha="right"
                )
    low, high = axes.dataLim.intervaly
    if high > DECADE * low > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"size of the student, MB (dense: {dense / 1e6:,.1f} MB)")
    axes.set_ylabel("held-out KL to the dense model,\nnats per token (lower is better)")
    style_axes(axes)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    save_figure(figure, path)
