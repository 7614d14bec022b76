"""Several runs beside each other: a table, and a Pareto picture of size against loss."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from discopt.progress import format_seconds
from discopt_llm import report_page as html
from discopt_llm.markup import Markup, tag
from discopt_llm.report_html import Measured, interval_cell, measured, run_page
from discopt_llm.report_intervals import CONFIDENCE
from discopt_llm.report_page import check_page, write_page
from discopt_llm.report_pictures import Point, difference_words, interval_words, pareto_picture
from discopt_llm.report_question import asked_words
from discopt_llm.report_record import DENSE, FOUND, RunRecord
from discopt_llm.report_svg import MARKS, key, mark
from discopt_llm.report_words import TITLES

__all__ = ["Comparison", "write_reports"]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_KINDS = tuple(TITLES)  # their order gives them their marks
_MEASURED = ("bytes", "kl", "perplexity", "agreement")


def write_reports(runs: Sequence[Path], out: Path | None = None, *, force: bool) -> tuple[Path, Comparison | None]:
    """Write the report of one run anew, or the comparison of several; returns where, and the comparison.

    out: the page; None: report.html in the one run's folder, or in the current one. Raises RunFolderError, before
        anything is written, for what is no run or has no results, and unless `force` is on for a file at `out` that
        is no report.
    """
    target = out or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    check_page(target, force=force)
    if len(runs) == 1:
        write_page(target, run_page(RunRecord.read(runs[0]), beside=target.parent))
        return target, None
    comparison = Comparison.of(runs)
    write_page(target, comparison.page(target.parent))
    return target, comparison


@dataclass(frozen=True, eq=False)
class Comparison:
    """Runs of searches over a language model, in the order given."""

    records: tuple[RunRecord, ...]
    rows: tuple[Mapping[str, Measured], ...]  # of each run, its methods on held-out text; {}: not measured

    @classmethod
    def of(cls, paths: Sequence[Path]) -> Comparison:
        """Read run folders; raises RunFolderError for one that is no run, or has no results."""
        if not paths:
            raise ValueError("expected at least one run, got none")
        records = tuple(RunRecord.read(path) for path in paths)
        return cls(records, tuple(measured(record) for record in records))

    def to_dict(self) -> dict[str, Any]:
        """As JSON values: a row for each run; `front` says that no other is both smaller and better."""
        rows = []
        for i, (record, found) in enumerate(zip(self.records, self._found, strict=True)):
            row = {"run": str(record.path), "kind": record.profile.kind, "asked": record.results["asked"]}
            row |= {"met": record.results["met"], "size": record.size}
            row |= dict.fromkeys(_MEASURED) if found is None else {name: found.row[name] for name in _MEASURED}
            row["kl_interval"] = [found.kl.low, found.kl.high] if found is not None and found.kl.known else None
            rows.append({**row, "front": i in self.front})
        return {"rows": rows, "warnings": self.warnings()}

    def table(self) -> list[dict[str, Any]]:
        """A row for each run, under the headings that people read."""
        rows = []
        for i, (row, record) in enumerate(zip(self.to_dict()["rows"], self.records, strict=True)):
            ends = row["kl_interval"]
            rows.append(
                {
                    "": _letter(i),
                    "run": row["run"],
                    "asked": asked_words(record),
                    "size": _percent(row["size"]),
                    "bytes": row["bytes"],
                    "KL": row["kl"],
                    f"{CONFIDENCE:.0%}": f"{ends[0]:.3g} to {ends[1]:.3g}" if ends else "-",
                    "perplexity": row["perplexity"],
                    "top-1 agreement": row["agreement"],
                    "unbeaten": "yes" if row["front"] else "",
                }
            )
        return rows

    @property
    def _found(self) -> list[Measured | None]:
        return [rows.get(FOUND) for rows in self.rows]

    @property
    def front(self) -> frozenset[int]:
        """The runs that no other beats in size and loss, and that equal none before them in both."""
        places = {i: place for i in range(len(self.records)) if (place := self._place(i)) is not None}

        def beats(j: int, i: int) -> bool:
            no_worse = all(a <= b for a, b in zip(places[j], places[i], strict=True))
            return no_worse and (places[j] != places[i] or j < i)

        return frozenset(i for i in places if not any(beats(j, i) for j in places if j != i))

    def _place(self, i: int) -> tuple[float, float] | None:
        """Size over the dense model's, and held-out KL; None where either is unknown."""
        found, size = self._found[i], self.records[i].size
        return None if found is None or size is None or not math.isfinite(found.kl.mean) else (size, found.kl.mean)

    def warnings(self) -> list[str]:
        """What keeps the runs from being compared, and what is missing."""
        said = []
        for what, of in (
            ("models", [r.request.get("model", {}).get("fingerprint") for r in self.records]),
            (
                "held-out texts",
                [_heldout(record, rows) for record, rows in zip(self.records, self.rows, strict=True) if rows],
            ),
        ):
            if len(set(of)) > 1:
                said.append(f"The runs have different {what}: their losses are not measured alike, and do not compare.")
        unmeasured = [
            str(record.path) for record, found in zip(self.records, self._found, strict=True) if found is None
        ]
        if unmeasured:
            said.append(f"Not measured on held-out text, since not finished: {', '.join(unmeasured)}.")
        if any(rows and record.samples is None for record, rows in zip(self.records, self.rows, strict=True)):
            said.append(
                "Some runs have not kept their losses on each sequence: their intervals come from standard errors."
            )
        return said

    def page(self, beside: Path) -> Markup:
        """The page, to be written to the folder `beside`."""
        models = list(dict.fromkeys(record.model for record in self.records))
        return html.page(
            f"{len(self.records)} runs of {', '.join(models)}",
            *(tag("p", warning, class_="warning") for warning in self.warnings()),
            html.section("Size against loss", *self._picture()),
            html.section("The runs", self._rows(beside)),
            html.section("Against the baselines", *self._baselines()),
        )

    def _picture(self) -> Iterator[Markup]:
        points = []
        for i, (record, found) in enumerate(zip(self.records, self._found, strict=True)):
            if found is not None and (place := self._place(i)) is not None:
                name = f"{record.path.name}, {asked_words(record)}"
                points.append(Point(_letter(i), name, place[0], found.kl, _shape(record.profile.kind), i in self.front))
        if not points:
            yield tag("p", "No run has a finite loss on held-out text.")
            return
        kinds = dict.fromkeys(record.profile.kind for record in self.records)
        marks = key(*((mark(_shape(kind), 14, 7, "dot other"), TITLES.get(kind, kind).lower()) for kind in kinds))
        caption = (
            "Held-out KL to the dense model, nats per token, over the size as a share of the dense model in the same "
            f"data type, with {CONFIDENCE:.0%} intervals. Filled, and joined by a line: the runs that no other beats "
            "in both."
        )
        loss = "held-out KL to the dense model, nats per token"
        yield tag("figure", pareto_picture(points, loss), marks, tag("figcaption", caption))

    def _rows(self, beside: Path) -> Markup:
        rows: list[list[html.Cell]] = []
        for i, (record, found) in enumerate(zip(self.records, self._found, strict=True)):
            target = Path(os.path.relpath(record.path, beside)) / "report.html"
            cells: list[html.Cell] = [
                tag("span", tag("strong", f"{_letter(i)} "), tag("a", str(record.path), href=quote(target.as_posix()))),
                f"{TITLES.get(record.profile.kind, record.profile.kind)}: {asked_words(record)}",
                _percent(record.size),
            ]
            if found is None:
                cells += ["-"] * 4
            else:
                agreement = found.row["agreement"]
                cells += [f"{found.row['bytes']:,}", interval_cell(found.kl), interval_cell(found.perplexity)]
                cells.append("-" if agreement is None else f"{agreement:.1%}")
            cells += [f"{record.results['total_fidelity']:,}", format_seconds(record.results["seconds"])]
            rows.append(cells)
        head = [
            "run",
            "asked",
            "size, % of dense",
            "bytes",
            "KL",
            "perplexity",
            "same token",
            "tokens searched",
            "time",
        ]
        return html.table(f"Held-out losses, in brackets {CONFIDENCE:.0%} intervals", head, rows, words=2)

    def _baselines(self) -> Iterator[Markup]:
        rows: list[list[html.Cell]] = []
        for i, methods in enumerate(self.rows):
            for method in methods.values():
                if method.name in (DENSE, FOUND):
                    continue
                versus = method.versus
                verdict = "-" if versus is None else f"{versus.verdict}: {difference_words(versus)}"
                rows.append([_letter(i), method.name, interval_words(method.kl), verdict])
        if not rows:
            yield tag("p", "No run was compared with a baseline.")
            return
        yield html.table(
            "KL of each run's baselines, and the difference of its found profile to them on the same sequences",
            ("run", "baseline", "KL", "the found one is"),
            rows,
            words=2,
        )


def _heldout(record: RunRecord, rows: Mapping[str, Measured]) -> tuple[Any, ...]:
    """What tells held-out texts apart: source, tokens, and the dense model's perplexity there."""
    heldout, dense = record.results["heldout"], rows.get(DENSE)
    perplexity = None if dense is None or dense.row["perplexity"] is None else f"{dense.row['perplexity']:.4g}"
    return heldout["source"], heldout["tokens"], perplexity


def _letter(i: int) -> str:
    """A, B, ..., Z, A2, B2, ..."""
    return LETTERS[i % len(LETTERS)] + ("" if i < len(LETTERS) else str(1 + i // len(LETTERS)))


def _shape(kind: str) -> str:
    return MARKS[_KINDS.index(kind) % len(MARKS)] if kind in _KINDS else MARKS[-1]


def _percent(size: float | None) -> str:
    return "-" if size is None else f"{100 * size:.1f}%"
