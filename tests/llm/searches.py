"""Searches on the tiny model, and what they leave."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from discopt_llm.bank_search import BankSearchRequest
from discopt_llm.profile import read_profile
from discopt_llm.profile_text import LayerLabels
from discopt_llm.request import SearchRequest
from discopt_llm.search import begin

RUN_FILES = {
    "run.json",
    "results.json",
    "trace.jsonl",
    "heuristics.json",
    "checkpoint.json",
    "profile.json",
    "profile.txt",
    "report.md",
    "report.html",
    "heldout.json",
    "units.json",
    "trace.png",
    "units.png",
}
WORDS = ("loss", "search", "level", "unit", "block", "token", "model", "budget", "profile", "group")


def write_notes(path: Path, paragraphs: int = 120) -> Path:
    """A text of its own for every paragraph, long enough for both sides."""
    rng = random.Random(0)
    path.write_text("\n\n".join(" ".join(rng.choices(WORDS, k=40)) for _ in range(paragraphs)))
    return path


def small_search(model: Path, notes: Path) -> dict[str, Any]:
    """Options that all searches have."""
    return {
        "model": str(model),
        "calibration": str(notes),
        "preset": "demo",
        "sequence_length": 32,
        "eval_tokens": 128,
        "generations": 4,
        "offspring": 6,
        "stages": ("2@32", "1@96"),
        "algorithm": "evopress",
        "start": "auto",
        "baselines": (),
    }


def compared(request: BankSearchRequest) -> BankSearchRequest:
    """With the preset's own start, and all baselines."""
    return replace(request, start=None, baselines=None)


def run(request: SearchRequest, out: Path) -> dict[str, Any]:
    return begin(request, out, force=False, quiet=True)


def labels(run: Path) -> LayerLabels:
    found = read_profile(run / "profile.txt")
    assert isinstance(found, dict)
    return found


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """Content and time of every file."""
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def contents(folder: Path) -> dict[str, str]:
    return {name: digest for name, (digest, _) in snapshot(folder).items()}
