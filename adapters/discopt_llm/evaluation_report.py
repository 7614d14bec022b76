"""What `discopt llm eval` prints: a table for every text, and one for the tasks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from discopt.report import format_rows

__all__ = ["format_evaluation"]

_TEXT = {
    "model": "model",
    "perplexity": "perplexity",
    "perplexity_error": "±",
    "bits_per_byte": "bits per byte",
    "reference": "reference",
    "kl": "KL",
    "kl_error": "± KL",
    "agreement": "top-1 agreement",
    "tokens": "tokens",
    "bytes": "bytes",
}
_TASKS = {
    "task": "task",
    "metric": "metric",
    "model": "model",
    "value": "value",
    "error": "±",
    "questions": "questions",
}
_COMPARED = ("reference", "kl", "kl_error", "agreement")
_SIDES = {"heldout": "what a search may not have seen of ", "all": ""}


def format_evaluation(results: Mapping[str, Any]) -> str:
    """The tables of what `evaluate` returns, with what has to be known to read them."""
    parts = [_text(text, [row for row in results["rows"] if row["data"] == text["source"]]) for text in results["data"]]
    if results["tasks"]:
        places = {(row["task"], row["metric"]): i for i, row in reversed([*enumerate(results["tasks"])])}
        rows = sorted(results["tasks"], key=lambda row: places[row["task"], row["metric"]])  # models side by side
        parts.append(f"Tasks:\n{_table(rows, _TASKS)}")
    return "\n\n".join(parts)


def _text(text: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    references = {row["reference"] for row in rows} - {None}
    compared = f"; KL to {references.copy().pop()}, nats per token" if len(references) == 1 else ""
    hidden = _COMPARED if not references else ("reference",) if len(references) == 1 else ()
    lines = [
        f"On {_SIDES[text['side']]}{text['source']}, in sequences of {text['sequence_length']:,} tokens{compared}:",
        _table(rows, _TEXT, hidden),
    ]
    if len(text["readers"]) > 1:
        groups = " | ".join(", ".join(names) for names in text["readers"])
        lines.append(
            f"Their tokenizers differ ({groups}): perplexity can be compared on the same side of a bar only, bits per "
            "byte throughout."
        )
    return "\n".join(lines)


def _table(rows: Sequence[Mapping[str, Any]], headings: Mapping[str, str], hidden: Collection[str] = ()) -> str:
    return format_rows([{heading: row[key] for key, heading in headings.items() if key not in hidden} for row in rows])
