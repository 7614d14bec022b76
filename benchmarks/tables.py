"""Tables of the documents, from the benchmarks' JSON: `python benchmarks/tables.py` refreshes docs/performance.md.

A table stands in a document between `<!-- table NAME -->` and `<!-- end -->`; what is between them is replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import record

DOCUMENT = record.HERE.parent / "docs" / "performance.md"
RESULTS = record.HERE / "results"
GIB = 2**30
SOURCES = ("gpu-*.json", "evaluator*.json", "bank-*.json", "engine.json", "mutation.json")  # of this page
NOTHING = "No result is committed yet."

_TABLE = re.compile(r"(<!-- table ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_MET = {True: "yes", False: "no", None: "-"}


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; the first column is text, the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def refreshed(text: str, tables: Mapping[str, str]) -> str:
    """The document with its tables as they are now; ValueError unless it has exactly these."""
    names = [name for _, name, _ in _TABLE.findall(text)]
    if sorted(names) != sorted(tables):
        raise ValueError(f"expected the tables {', '.join(sorted(tables))}, got {', '.join(sorted(names))}")
    return _TABLE.sub(lambda found: f"{found[1]}\n{tables[found[2]]}\n\n{found[3]}", text)


def figures(pattern: str) -> dict[str, Any]:
    """The results of these names, by file name."""
    return {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))}


def performance_tables() -> dict[str, str]:
    """Those of docs/performance.md."""
    return {
        "gpu": _gpu(),
        "gpu-stages": _gpu_stages(),
        "evaluator": _evaluator(),
        "bank": _bank(),
        "engine": _engine(),
        "mutation": _mutation(),
        "sources": _sources(),
    }


def _gpu() -> str:
    rows = []
    for name, found in figures("gpu-*.json").items():
        ours, plain, met = found["block_wise"], found.get("plain"), found["met"]
        rows.append(
            [
                f"`{name}`",
                f"{ours['seconds']:.1f}",
                f"{plain['seconds']:.1f}" if plain else "-",
                f"{found['times_over_plain']:.2f}" if plain else "-",
                _MET[met["times_over_plain"]],
                f"{ours['share_of_peak']:.0%}",
                _MET[met["share_of_peak"]],
                f"{ours['peak_bytes'] / GIB:.2f}",
                f"{plain['peak_bytes'] / GIB:.2f}" if plain else "-",
                _MET[met["peak_bytes"]],
                f"{found['largest_relative_difference']:.0e}" if plain else "-",
            ]
        )
    seconds, memory = ("block-wise s", "plain s", "times", "aim 2"), ("GiB", "plain GiB", "aim 24")
    return markdown(("file", *seconds, "of peak", "aim 50%", *memory, "differ by"), rows) if rows else NOTHING


def _gpu_stages() -> str:
    rows = [
        [
            f"`{name}`",
            stage["candidates"],
            f"{stage['tokens']:,}",
            f"{stage['block_wise_seconds']:.1f}",
            f"{stage['plain_seconds']:.1f}" if "plain_seconds" in stage else "-",
            f"{stage['block_wise_operations'] / 1e12:.3g}",
            f"{stage['plain_operations'] / 1e12:.3g}" if "plain_operations" in stage else "-",
        ]
        for name, found in figures("gpu-*.json").items()
        for stage in found["stages"]
    ]
    head = ("file", "candidates", "tokens", "block-wise s", "plain s", "block-wise TFLOP", "plain TFLOP")
    return markdown(head, rows) if rows else NOTHING


def _evaluator() -> str:
    rows = [
        [
            f"`{name}`",
            row["offspring"],
            f"{row['share']:.3f}",
            f"{row['blocks_ratio']:.3f}",
            f"{row['whole_ratio']:.3f}",
            f"{row['peak_bytes'] / GIB:.2f}",
            f"{row['plain_peak_bytes'] / GIB:.2f}",
        ]
        for name, found in figures("evaluator*.json").items()
        for row in found["rows"]
    ]
    head = ("file", "candidates", "share of passes", "time of the blocks", "whole time", "GiB", "plain GiB")
    return markdown(head, rows) if rows else NOTHING


def _bank() -> str:
    rows = [
        [
            f"`{name}`",
            row["kind"],
            row["layers"],
            row["width"],
            found["threads"],
            f"{row['ours_s']:.2f}",
            f"{row['plain_s']:.2f}",
            f"{row['times']:.1f}",
        ]
        for name, found in figures("bank-*.json").items()
        for row in found["rows"]
        if row["layers"] != "all" or len(found["rows"]) > 2  # of one layer the sum is that layer
    ]
    return (
        markdown(("file", "method", "layers", "width", "threads", "s", "plain s", "times"), rows) if rows else NOTHING
    )


def _engine() -> str:
    found = figures("engine.json")["engine.json"]["rows"]
    sizes = sorted({(row["units"], row["offspring"]) for row in found})
    times = {(row["engine"], row["units"], row["offspring"]): row["us_per_candidate"] for row in found}
    rows = []
    for engine in dict.fromkeys(row["engine"] for row in found):
        values = [times.get((engine, *size)) for size in sizes]
        rows.append([engine, *("-" if value is None else f"{value:,.1f}" for value in values)])
    return markdown(["engine", *(f"{n:,} units, {k}" for n, k in sizes)], rows)


def _mutation() -> str:
    found = figures("mutation.json")["mutation.json"]["rows"]
    rows = [
        [row["rule"], f"{row['units']:,}", row["offspring"], f"{row['median_ms']:.2f}", row["aim_ms"] or "-"]
        for row in found
    ]
    return markdown(("rule", "units", "offspring", "median ms", "aim ms"), rows)


def _sources() -> str:
    rows = [
        [f"`{name}`", found["device"], found["versions"]["torch"], found["seed"], f"`{found['commit'][:8]}`"]
        for pattern in SOURCES
        for name, found in figures(pattern).items()
    ]
    return markdown(("file", "device", "torch", "seed", "commit"), rows)


def main() -> None:
    DOCUMENT.write_text(refreshed(DOCUMENT.read_text(), performance_tables()))


if __name__ == "__main__":
    main()
