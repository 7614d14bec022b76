"""report.html: what a run was asked, what it found, how sure that is, and how to have it again, on one page."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from discopt.progress import format_count, format_loss, format_seconds
from discopt_llm import report_maps as maps
from discopt_llm import report_page as html
from discopt_llm import report_pictures as pictures
from discopt_llm.markup import Markup, join, tag
from discopt_llm.report_costs import cost_table, moves_listing
from discopt_llm.report_intervals import CONFIDENCE, Interval, mean_interval, normal_interval
from discopt_llm.report_question import asked_words, budget, question
from discopt_llm.report_record import DENSE, FOUND, RunRecord
from discopt_llm.report_words import TITLES, fitness_words, size_words

__all__ = ["Measured", "interval_cell", "measured", "run_page"]

FEW_SEQUENCES = 10
_FILES = {
    "report.md": "this report as Markdown",
    "results.json": "the table and all numbers",
    "heldout.json": "the losses on each held-out sequence",
    "profile.json": "the profile",
    "profile.txt": "the profile in the text format of the paper's code",
    "units.json": "the levels and what they cost",
    "trace.jsonl": "a line for each stage",
    "run.json": "what was asked, and versions",
    "heuristics.json": "the baselines' profiles",
    "trace.png": "picture of the loss",
    "units.png": "picture of the profile",
}


class Measured:
    """What a method lost on held-out text, with intervals."""

    def __init__(self, record: RunRecord, row: Mapping[str, Any]) -> None:
        self.row = row
        self.name: str = row["method"]
        self.versus: Interval | None = None  # the found profile's KL minus this one's; None: unknown, or itself
        if record.samples is None:
            self.kl = normal_interval(row["kl"], row.get("kl_error"))
            perplexity = row["perplexity"]
            self.perplexity = Interval(math.nan if perplexity is None else perplexity, math.nan, math.nan)
            return
        kl, nll = record.samples.of(self.name)
        self.kl, self.perplexity = mean_interval(kl), mean_interval(nll).exp()
        if self.name != FOUND:
            self.versus = mean_interval(record.samples.of(FOUND)[0] - kl)


def measured(record: RunRecord) -> dict[str, Measured]:
    """The rows of a run's table, by method."""
    return {row["method"]: Measured(record, row) for row in record.results["rows"]}


def run_page(record: RunRecord, beside: Path | None = None) -> Markup:
    """The page of one run; `beside` is the folder that it is written to, if not the run's own."""
    rows = measured(record)
    return html.page(
        f"{TITLES.get(record.profile.kind, 'Search')} of {record.model}",
        _summary(record, rows),
        html.section("The question", question(record)),
        html.section("The budget", budget(record)),
        html.section("On held-out text", *_heldout(record, rows)),
        html.section("The search", *_search(record)),
        html.section("The profile", *_profile(record)),
        html.section("How it moved", *_moves(record)),
        html.section("Again", *_again(record, beside or record.path)),
    )


def _summary(record: RunRecord, rows: Mapping[str, Measured]) -> Markup:
    results = record.results
    cards: list[tuple[str, str, str]] = []
    if FOUND in rows:
        found, dense = rows[FOUND], rows.get(DENSE)
        before = f"dense {dense.perplexity.mean:.4g}" if dense else ""
        size = f"{100 * record.size:.1f}% of the dense model" if record.size else ""
        agreement = found.row["agreement"]
        cards = [
            ("KL to the dense model", format_loss(found.kl.mean), _between(found.kl)),
            ("perplexity", f"{found.perplexity.mean:.4g}", before),
            ("same likeliest token", "-" if agreement is None else f"{agreement:.1%}", "as the dense model"),
            ("size", size_words(found.row["bytes"]), size),
            ("tokens spent", format_count(found.row["tokens"]), "with those of heuristics"),
        ]
    cards += [
        ("time", format_seconds(results["seconds"]), _generations(results)),
    ]
    listed = tag("ul", (tag("li", *_card(*card)) for card in cards), class_="cards")
    return join(tag("p", _answer(record, rows)), listed, *_unfinished(record))


def _generations(results: Mapping[str, Any]) -> str:
    number = results["generations"]
    return f"{number:,} generation{'' if number == 1 else 's'}"


def _card(what: str, much: str, more: str) -> Iterator[Markup]:
    for class_, words in (("what", what), ("much", much), ("more", more)):
        yield tag("span", words, class_=class_)


def _between(interval: Interval) -> str:
    return f"{CONFIDENCE:.0%}: {interval.low:.3g} to {interval.high:.3g}" if interval.known else "nats per token"


def _answer(record: RunRecord, rows: Mapping[str, Measured]) -> str:
    """In a sentence: how the found profile fares against each baseline."""
    asked = f"Asked: {asked_words(record)}."
    against: dict[str, list[str]] = {}
    for row in rows.values():
        if row.versus is not None and row.name != DENSE:
            against.setdefault(row.versus.verdict, []).append(row.name)
    if not against:
        return asked
    words = {
        "better": "better than",
        "worse": "worse than",
        "no difference": "no different from",
        "the same": "equal to",
    }
    told = "; ".join(f"{words.get(v, v + ':')} {', '.join(names)}" for v, names in against.items())
    return f"{asked} On held-out text the profile found is {told} (by KL, at {CONFIDENCE:.0%} confidence)."


def _unfinished(record: RunRecord) -> Iterator[Markup]:
    if not record.results["rows"]:
        words = f"The run is not finished ({record.results['stop']}): there is no held-out table yet."
        yield tag("p", words, class_="warning")


# -- what was found -------------------------------------------------------------------------------------------------


def _heldout(record: RunRecord, rows: Mapping[str, Measured]) -> Iterator[Markup]:
    if not rows:
        yield tag("p", "The search was interrupted before the held-out table was made.")
        return
    heldout = record.results["heldout"]
    how = (
        f"in brackets the {CONFIDENCE:.0%} interval of a BCa bootstrap over the {record.samples.kl.shape[1]} sequences"
        if record.samples is not None
        else f"in brackets the {CONFIDENCE:.0%} interval from its standard error"
    )
    yield tag(
        "p",
        f"{heldout['tokens']:,} tokens of {heldout['source']} that no search has seen. KL is to the dense model, in "
        f"nats per token, {how}; lower is better. Search tokens are those spent to find the profile.",
    )
    if record.samples is None:
        missing = (
            "This run has not kept its losses on each sequence, so there is no bootstrap and no paired comparison; "
            "runs of this version keep them."
        )
        yield tag("p", missing, class_="warning")
    paired = record.samples is not None
    if record.samples is not None and record.samples.kl.shape[1] < FEW_SEQUENCES:
        yield tag(
            "p", "There are few sequences: a bootstrap of so few makes its intervals too narrow.", class_="warning"
        )
    head = [
        "method",
        *(["the found one is"] if paired else []),
        "KL",
        "perplexity",
        "same token",
        "search tokens",
        "bytes",
    ]
    body = [_table_row(row, paired) for row in rows.values()]
    yield html.table("Every method on held-out text", head, body, words=1 + paired, marked=list(rows).index(FOUND))
    students = {name: row.kl for name, row in rows.items() if name != DENSE}
    if any(math.isfinite(kl.mean) for kl in students.values()):
        picture = pictures.interval_picture(
            students, "KL to the dense model, nats per token", "KL on held-out text", found=FOUND
        )
        yield html.figure(picture, "KL on held-out text and its interval; the diamond is the profile found.")
    differences = {row.name: row.versus for row in rows.values() if row.versus is not None and row.name != DENSE}
    if any(versus.verdict in ("better", "worse", "no difference") for versus in differences.values()):
        picture = pictures.interval_picture(
            differences,
            "difference in KL, nats per token",
            "Paired differences of KL to the found profile",
            zero="← better | worse →",
        )
        caption = (
            "KL of the profile found minus that of the method, on the same sequences: left of 0 the profile found is "
            "better. An interval that leaves out 0 is a difference; each is judged by itself."
        )
        yield html.figure(picture, caption)


def _table_row(row: Measured, paired: bool) -> list[html.Cell]:
    agreement = row.row["agreement"]
    versus = row.versus if row.name != DENSE else None
    return [
        row.name,
        *([_verdict(versus)] if paired else []),
        interval_cell(row.kl),
        interval_cell(row.perplexity),
        "-" if agreement is None else f"{agreement:.1%}",
        f"{row.row['tokens']:,}",
        f"{row.row['bytes']:,}",
    ]


def _verdict(versus: Interval | None) -> html.Cell:
    """Better or worse, and below it by how much."""
    if versus is None:
        return ""
    word = tag("strong", versus.verdict, class_=versus.verdict if versus.verdict in ("better", "worse") else None)
    if versus.verdict == "the same":
        return word
    return join(word, tag("br"), tag("small", pictures.difference_words(versus)))


def interval_cell(interval: Interval) -> Markup:
    """A mean, and below it where it may lie."""
    if not interval.known:
        return join(pictures.interval_words(interval))
    mean, ends = pictures.interval_words(interval).split(" ", maxsplit=1)
    return join(mean, tag("br"), tag("small", ends))


def _search(record: RunRecord) -> Iterator[Markup]:
    results = record.results
    spent = (
        f"{_generations(results)}, {results['evaluations']:,} candidates, "
        f"{results['total_fidelity']:,} tokens and {format_seconds(results['seconds'])}; it ended because "
        f"{results['stop']}. The last loss is {format_loss(results['loss'])}, on {results['fidelity']:,} tokens."
    )
    yield tag("p", spent)
    if results["not_finite"]:
        yield tag("p", f"{results['not_finite']:,} losses were NaN or infinite.", class_="warning")
    if not pictures.shows_loss(record.trace):
        yield tag("p", "The trace holds no measured loss, so there is no picture of it.", class_="note")
    else:
        fitness = record.request.get("options", {}).get("fitness", "kl")
        caption = (
            "Every stage is measured on a sample of its own, so that losses of different stages differ by chance as "
            "well; the best profile's is its latest."
        )
        yield html.figure(pictures.loss_picture(record.trace, fitness_words(fitness)), caption)
    if choice := results.get("choice"):
        rows = [
            (
                finalist["method"],
                format_loss(finalist["loss"]),
                format_loss(finalist["difference"]),
                format_loss(finalist["standard_error"]),
            )
            for finalist in choice
        ]
        caption = (
            f"The final choice, on {results['fidelity']:,} tokens that the search has not seen; the first is taken"
        )
        yield html.table(caption, ("profile", "loss", "above the least", "± (paired)"), rows, marked=0)


def _profile(record: RunRecord) -> Iterator[Markup]:
    units, levels = record.units, record.profile.levels
    caption = "The level of every unit: a row is a block, the darker the dearer. Point at a cell for its unit's name."
    yield html.figure(maps.level_map(units, levels), caption)
    if units.bytes is None:
        missing = "This run has not written down what its levels cost; its bank, or the model, has that."
        yield tag("p", missing, class_="note")
    else:
        yield html.details("What each unit's level costs", cost_table(units, levels))


def _moves(record: RunRecord) -> Iterator[Markup]:
    if record.moves is None:
        missing = "This run has not kept how its best profile changed; runs of this version keep it."
        yield tag("p", missing, class_="note")
        return
    levels = record.profile.levels
    start = maps.start_of(record.moves, levels)
    moved = int(np.count_nonzero(start != levels))
    later = [move for move in record.moves if move.generation > 0]
    if not later:
        yield tag("p", "The best profile stayed where the search began.")
        return
    times = "once" if len(later) == 1 else f"{len(later):,} times"
    final = " The last of them was the final choice." if later[-1].final else ""
    yield tag(
        "p",
        f"The best profile changed {times} after the start was chosen, and ended with {moved} of {record.units.n} "
        f"units on another level.{final}",
    )
    tokens = int(record.results["total_fidelity"])
    yield html.figure(
        maps.distance_picture(record.moves, start, tokens), "How far the best profile went from its start."
    )
    yield html.figure(maps.move_map(record.units, start, levels), "From the start to the end, in levels.")
    yield html.details("Every move", moves_listing(record.units, later))


# -- and again ------------------------------------------------------------------------------------------------------


def _again(record: RunRecord, beside: Path) -> Iterator[Markup]:
    command = record.results.get("command_line")
    if command is None:
        yield tag("p", "The command is in report.md; this run has not written it down elsewhere.", class_="note")
    else:
        yield html.code(command)
    versions = ", ".join(f"{name} {version}" for name, version in record.request.get("versions", {}).items())
    yield tag("p", f"Begun {record.request.get('created')} with {versions}.")
    fingerprints = [("model", record.request.get("model", {}).get("fingerprint"))]
    fingerprints += [("text", record.request.get("calibration"))]
    yield html.facts([(f"Fingerprint of the {what}", str(value)[:16]) for what, value in fingerprints if value])
    folder = os.path.relpath(record.path, beside)
    there = [name for name in _FILES if name in record.files]
    links = [
        tag("li", tag("a", name, href=quote(name if folder == "." else f"{folder}/{name}")), f": {_FILES[name]}")
        for name in there
    ]
    if links:
        yield tag("h3", "Files of the run")
        yield tag("ul", links, class_="files")
