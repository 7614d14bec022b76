"""What a run says at its end: aligned lines for a terminal, report.md for the folder."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from discopt.progress import format_count, format_loss, format_seconds

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from discopt.space import SearchSpace

NAMED_UNITS = 40  # spaces with no more units have them listed by name


def profile_lines(space: SearchSpace, profile: ArrayLike) -> list[str]:
    """The profile by level, `level 1: 3 units: a, b, c`; names only where there are few units."""
    import numpy as np

    levels = np.asarray(profile)
    lines = []
    for level in np.unique(levels):
        units = np.flatnonzero(levels == level)
        names = ": " + ", ".join(space.names[i] for i in units) if space.n <= NAMED_UNITS else ""
        lines.append(f"level {level}: {len(units):,} unit{'s' if len(units) != 1 else ''}{names}")
    return lines


def solve_lines(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What `discopt solve` prints last: (label, text), from what results.json holds."""
    lines = [("problem", str(results["problem"]))]
    if results["fidelity"]:
        lines += [("best loss", _loss(results)), *_optimum(results), *_start(results)]
        lines += [
            ("cost", _cost(cost, budget)) for cost, budget in zip(results["cost"], results["budget"], strict=True)
        ]
        lines += [("profile", line) for line in results["profile_summary"]]
    else:
        lines.append(("best loss", "none: nothing was measured"))
    lines.append(("work", _work(results)))
    if results["not_finite"]:
        lines.append(("not finite", f"{results['not_finite']:,} losses were NaN or infinite"))
    lines.append(("stopped", str(results["stop"])))
    if results["folder"]:
        lines.append(("run folder", results["folder"]))
    return lines


def align(lines: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The same lines with labels of one width; a label that repeats is shown once."""
    pairs = list(lines)
    width = max((len(label) for label, _ in pairs), default=0)
    before: Sequence[str] = ["", *(label for label, _ in pairs)]
    return [
        ((label if label != last else "").ljust(width), text)
        for (label, text), last in zip(pairs, before, strict=False)
    ]


def format_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """A results.json's rows as a text table: a column per key, numbers to the right."""
    head, cells = _cells(rows)
    width = [max(len(row[i]) for row in [head, *cells]) for i in range(len(head))]
    text = [head, *cells]
    right = [all(_is_number(row.get(key)) for row in rows) for key in head]
    return "\n".join(
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, width, right, strict=True)).rstrip()
        for line in text
    )


def markdown_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same table in Markdown."""
    head, cells = _cells(rows)
    rule = ["---:" if all(_is_number(row.get(key)) for row in rows) else "---" for key in head]
    return "\n".join("| " + " | ".join(_escape(cell) for cell in line) + " |" for line in [head, rule, *cells])


def solve_report(results: Mapping[str, Any], request: Mapping[str, Any], command: str, note: str, picture: bool) -> str:
    """report.md of `discopt solve`. `command` asks for the same run again."""
    table = "\n".join(f"| {label} | {_escape(text)} |" for label, text in align(solve_lines(results)))
    versions = ", ".join(f"{name} {version}" for name, version in request["versions"].items())
    parts = [
        f"# {results['problem']}",
        note,
        f"| | |\n|---|---|\n{table}",
        "![Best loss over the fidelity spent](trace.png)" if picture else "",
        "## The same again",
        f"```\n{command}\n```",
        f"Begun {request['created']} in `{request['directory']}`, with {versions}. A run that was stopped goes on, "
        f"to the same end, with",
        f"```\ndiscopt resume {results['folder']}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def option_words(request: Any, *, skip: Collection[str], repeated: Mapping[str, str]) -> list[str]:
    """The command-line options that make this request: a dataclass with a field per option.

    Fields at their default are left out, as are those in `skip`. A tuple becomes one comma-separated option, or, for
    the fields in `repeated`, the option given there once for each element; True becomes a flag.
    """
    words: list[str] = []
    for field in fields(request):
        value = getattr(request, field.name)
        option = "--" + field.name.replace("_", "-")
        if field.name in skip or value == field.default:
            continue
        if field.name in repeated:
            words += [word for element in value for word in (repeated[field.name], str(element))]
        elif isinstance(value, tuple):
            words += [option, ",".join(f"{e:g}" if isinstance(e, float) else str(e) for e in value)]
        elif value is True:
            words.append(option)
        else:
            words += [option, str(value)]
    return words


def _escape(text: str) -> str:
    """Text in a Markdown table's cell."""
    return text.replace("|", "\\|")


def _cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    head = list(dict.fromkeys(key for row in rows for key in row))
    return head, [[_cell(row.get(key)) for key in head] for row in rows]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else format_loss(value)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _loss(results: Mapping[str, Any]) -> str:
    error = results["standard_error"]
    spread = f" ± {error:.2g}" if error is not None and math.isfinite(error) else ""
    loss = "not finite" if results["loss"] is None else format_loss(results["loss"])
    return f"{loss}{spread} at fidelity {format_count(results['fidelity'])}"


def _optimum(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    optimum, loss = results["optimum"], results["loss"]
    if optimum is None:
        return []
    gap = f" (gap {format_loss(loss - optimum)})" if loss is not None else ""
    return [("optimum", f"{format_loss(optimum)} is known{gap}")]


def _start(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("start", f"{format_loss(row['loss'])} at fidelity {format_count(row['fidelity'])}")
        for row in results["rows"]
        if row["method"] == "start"
    ]


def _cost(cost: int, budget: int) -> str:
    share = f" ({cost / budget:.1%})" if budget > 0 else ""
    return f"{cost:,} of {budget:,}{share}"


def _work(results: Mapping[str, Any]) -> str:
    return (
        f"{results['generations']:,} generations, {results['evaluations']:,} evaluations, "
        f"total fidelity {format_count(results['total_fidelity'])}, {format_seconds(results['seconds'])}"
    )
