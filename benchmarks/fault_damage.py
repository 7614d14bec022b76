"""Damage to each kind of file that is read again, and the commands that read it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from fault_jobs import (
    _SEARCH,
    _WIDTHS,
    BANK,
    COMPARE,
    LADDER,
    OWN,
    SOLVE,
    Yard,
    compare_answer,
    contents,
    document,
    run_answer,
)
from typer.testing import CliRunner

from discopt.cli import app
from discopt_llm.bank import Bank

WHOLE = "whole"


class Counter(Protocol):
    def count(self, faults: int, failure: str | None, *, refused: bool = False) -> None: ...


@dataclass(frozen=True)
class Damaged:
    """A file, how to make the folders with it, what reads it, and what that comes to where nothing is wrong."""

    what: str
    made: Sequence[Sequence[str]]  # commands
    files: str  # a pattern in the trial's folder
    words: Sequence[str]  # the command that reads it; (): `Bank.open`
    answer: Callable[[Path], Any]
    share: float = 1.0  # of the damages: some readers take long
    writes: bool = False  # the command changes the folder, which is put back after each
    without: str | None = None  # a file that is removed before


def damage_trials(yard: Yard, damaged: Damaged, times: int, rng: np.random.Generator, row: Counter) -> None:
    """Damage the file in turn by a flipped byte and by a cut, and read it each time."""
    yard.clear()
    for words in damaged.made:
        said = _invoke(words, yard.trial)
        if said is not None:
            raise SystemExit(f"{' '.join(words)} does not run undisturbed: {said}")
    if damaged.without is not None:
        (yard.trial / damaged.without).unlink()
    whole = yard.path / WHOLE
    shutil.rmtree(whole, ignore_errors=True)
    shutil.copytree(yard.trial, whole)
    if said := _read(damaged, yard.trial):
        raise SystemExit(f"{damaged.what} cannot be read undisturbed: {said}")
    answer = damaged.answer(yard.trial)
    files = [path.relative_to(whole) for path in sorted(whole.glob(damaged.files))]
    for number in range(max(4, int(times * damaged.share))):
        if number == 0 or damaged.writes:
            yard.clear()
            shutil.copytree(whole, yard.trial, dirs_exist_ok=True)
        file = yard.trial / files[rng.integers(len(files))]
        before = file.read_bytes()
        file.write_bytes(_harm(before, number % 2 == 0, rng))
        said = _read(damaged, yard.trial)
        if said is None:
            same = damaged.answer(yard.trial) == answer
            row.count(1, None if same else f"{file.name}: another answer")
        elif said.startswith("error: "):
            row.count(1, None, refused=True)
        else:
            row.count(1, f"{file.name}: {said}")
        file.write_bytes(before)


def _harm(data: bytes, flip: bool, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(len(data)))
    return data[:at] + bytes([data[at] ^ int(rng.integers(1, 256))]) + data[at + 1 :] if flip else data[:at]


def _read(damaged: Damaged, place: Path) -> str | None:
    """What the reader says: None if it is content, one line that begins with `error: `, or anything else."""
    if damaged.words:
        return _invoke(damaged.words, place)
    try:
        Bank.open(place / "bank")
    except Exception as error:
        return f"error: {error}" if type(error).__name__ == "BankError" and "\n" not in str(error) else repr(error)
    return None


def _invoke(words: Sequence[str], place: Path) -> str | None:
    """A command in this very process."""
    before = Path.cwd()
    os.chdir(place)
    try:
        result = CliRunner().invoke(app, [*words])
    finally:
        os.chdir(before)
    if result.exit_code == 0:
        return None
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    if result.exit_code == 1 and len(lines) == 1 and isinstance(result.exception, SystemExit):
        return lines[0]
    return f"{result.exception!r} {result.output}"


def _nothing(trial: Path) -> Any:
    return None


_STOPPED = [*SOLVE.words, "--max-evaluations", "60"]
_RESUME = ["resume", "run", "--quiet"]
_START = ["solve", f"../{OWN}:problem", "--start", "run/profile.json", "--generations", "1", "--out", "next", "--quiet"]
_QUANTIZE = ["llm", "quantize", "../model", "--bits", "3", *_WIDTHS, *_SEARCH, "--out", "run"]
_REPORT = ["llm", "report", "run", "--out", "page.html"]
_EXPORT = ["llm", "export", "run", "--to", "hf", "--out", "out", "--no-verify", "--force"]


def _page(trial: Path) -> Any:
    return (trial / "page.html").read_bytes()


def _solved(trial: Path) -> Any:
    return run_answer(trial / "run")


def _started(trial: Path) -> Any:
    return run_answer(trial / "next")


def _ladder(trial: Path) -> Any:
    return document(trial / "run" / "results.json")


def _exported(trial: Path) -> Any:
    return contents(trial / "out")


DAMAGED = (
    *(
        Damaged(f"solve: {name}", [_STOPPED], f"run/{name}", _RESUME, _solved, writes=True)
        for name in ("run.json", "checkpoint.json", "trace.jsonl", "results.json")
    ),
    Damaged("solve: profile.json", [_STOPPED], "run/profile.json", _START, _started, share=0.5, writes=True),
    *(
        Damaged(f"report: {name}", [_QUANTIZE], f"run/{name}", _REPORT, _page)
        for name in (
            "run.json",
            "results.json",
            "trace.jsonl",
            "profile.json",
            "units.json",
            "heldout.json",
            "checkpoint.json",
        )
    ),
    *(
        Damaged(
            f"quantize: {name}",
            [[*_QUANTIZE, "--max-seconds", "0.001"]],
            f"run/{name}",
            _RESUME,
            _solved,
            share=0.1,
            writes=True,
        )
        for name in ("heuristics.json", "checkpoint.json", "run.json")
    ),
    Damaged("bank.json", [BANK.words], "bank/bank.json", (), _nothing, share=3),
    Damaged("blocks of a bank", [BANK.words], "bank/block-*.safetensors", (), _nothing, share=3),
    Damaged("export: bank and run", [_QUANTIZE], "banks/*/*", _EXPORT, _exported, share=0.15),
    Damaged("export: its note", [_QUANTIZE, _EXPORT], "out/discopt.json", _EXPORT, _exported, share=0.15, writes=True),
    Damaged("ladder: its documents", [LADDER.words], "run/*.json", _RESUME, _ladder, share=0.15, writes=True),
    Damaged(
        "ladder: its runs' documents",
        [LADDER.words],
        "run/*/r*.json",
        _RESUME,
        _ladder,
        share=0.15,
        writes=True,
        without="run/results.json",  # else a ladder that is finished asks its runs no more
    ),
    Damaged(
        "comparison: results",
        [COMPARE.words],
        "run/results/*.json",
        COMPARE.words,
        lambda t: compare_answer(t / "run"),
        share=0.15,
        writes=True,
    ),
)
