"""What the fault trials disturb: small commands on a tiny random model, each with a way to go on and an answer.

Every command runs in a fork of a process that has imported all it needs, so that a trial takes less than a second
where a new interpreter would take ten; from its first line to its last it is the command line as users have it. All
trials run at one path, so that files that name a path can be compared byte by byte.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from discopt.lock import LOCK, OWNER
from discopt.sealed import read_lines, unsealed

MODEL, NOTES, OWN, TRIAL, OUTPUT = "model", "notes.txt", "own.py", "trial", "output.txt"
LIMIT = 120.0  # seconds for any command
_IMPORTED = (
    "discopt.solve",
    "discopt_llm.compare",
    "discopt_llm.evaluation",
    "discopt_llm.export.command",
    "discopt_llm.ladder",
    "discopt_llm.cli",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
)
WORDS = ("the", "search", "drops", "blocks", "and", "keeps", "others", "while", "a", "teacher", "says", "how", "far")
TELLS_TIME = ("seconds", "continued", "overhead", "overhead_seconds", "created")
PROBLEM = """
import time
import numpy as np
from discopt import Problem, SearchSpace

space = SearchSpace.cardinality(16, 5)
weight = np.random.default_rng(0).random(16)

def loss(population, fidelity, seed):
    time.sleep(0.004)
    noise = np.random.default_rng(seed).random(16) / (10 * fidelity)
    return -(population @ (weight + noise))

problem = Problem("small", space, loss)
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int | None  # None: it was killed
    output: str
    seconds: float

    @property
    def refusal(self) -> str | None:
        """The one line of a command that refused; None if it did anything else."""
        errors = [line for line in self.output.splitlines() if line.startswith("error: ")]
        return errors[0] if self.code == 1 and len(errors) == 1 and "Traceback" not in self.output else None


@dataclass(frozen=True)
class Job:
    """A command, how one goes on with it, and what it comes to; all with the trial's folder as the current one."""

    name: str
    words: Sequence[str]
    answer: Callable[[Path], Any]
    resumed: str | None = None  # the run folder that `discopt resume` goes on with, once it is there
    done: str | None = None  # what a refusal says where there is nothing left to do
    needs: Sequence[str] = ()  # folders that `Yard.make` has kept

    def next(self, trial: Path) -> Sequence[str]:
        """The command to go on with."""
        if self.resumed is not None and (trial / self.resumed / "run.json").is_file():
            return ["resume", self.resumed, "--quiet"]
        return self.words

    def ended_well(self, ended: Ended) -> bool:
        return ended.code == 0 or (self.done is not None and self.done in (ended.refusal or ""))


class Yard:
    """The folder in which all trials take place: inputs, what jobs need, and the trial's own folder."""

    def __init__(self, path: Path) -> None:
        self.path, self.trial = path.resolve(), path.resolve() / TRIAL
        sys.modules["matplotlib.backends.backend_agg"] = None  # type: ignore[assignment]  # pictures take most of the time
        for module in _IMPORTED:
            importlib.import_module(module)
        path.mkdir(parents=True, exist_ok=True)
        _write_model(path / MODEL)
        rng = random.Random(0)
        (path / NOTES).write_text("\n\n".join(" ".join(rng.choices(WORDS, k=40)) for _ in range(60)))
        (path / OWN).write_text(PROBLEM)

    def clear(self, job: Job | None = None) -> None:
        """An empty folder for a trial, with what the job needs."""
        self.trial.mkdir(exist_ok=True)
        for entry in self.trial.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for name in job.needs if job is not None else ():
            shutil.copytree(self.path / name, self.trial / name)

    def make(self, words: Sequence[str], **kept: str) -> None:
        """Run a command undisturbed in an empty folder; keep what it made, under other names, for those who need it."""
        self.clear()
        ended = self.run(words)
        if ended.code != 0:
            raise SystemExit(f"{' '.join(words)} does not run undisturbed:\n{ended.output}")
        for name, there in kept.items():
            shutil.copytree(self.trial / there, self.path / name, dirs_exist_ok=True)

    def run(self, words: Sequence[str], *, kill_after: float | None = None, file_limit: int | None = None) -> Ended:
        """Run a command to its end, or kill it after so many seconds; `file_limit` is in bytes."""
        began = time.monotonic()
        child = self.start(words, file_limit=file_limit)
        return self.wait(child, began, LIMIT if kill_after is None else kill_after)

    def start(self, words: Sequence[str], *, file_limit: int | None = None, output: str = OUTPUT) -> int:
        """Begin a command in a process of its own; its id."""
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            _run(words, self.trial, self.path / output, file_limit)
        return child

    def wait(self, child: int, began: float, seconds: float, output: str = OUTPUT) -> Ended:
        """Wait until it ends, and kill it after so many seconds."""
        while True:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                break
            if time.monotonic() - began >= seconds:
                os.kill(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
                break
            time.sleep(0.0005)
        code = None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        return Ended(code, (self.path / output).read_text(errors="replace"), time.monotonic() - began)


def _run(words: Sequence[str], place: Path, output: Path, file_limit: int | None) -> None:
    """The child: the command line, and the end of the process."""
    code = 1
    try:
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.chdir(place)
        if file_limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        from discopt.cli import app

        try:
            app([*words], prog_name="discopt")
        except SystemExit as end:
            code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# -- answers ---------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, but for the lock of a killed process."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (LOCK, OWNER)
    }


def timeless(value: Any) -> Any:
    """JSON without what tells the time."""
    if isinstance(value, dict):
        return {key: timeless(entry) for key, entry in value.items() if key not in TELLS_TIME}
    return [timeless(entry) for entry in value] if isinstance(value, list) else value


def document(path: Path) -> Any:
    return timeless(unsealed(path.read_bytes()))


def run_answer(folder: Path) -> Any:
    """All that a run found: profile, results and trace."""
    trace = timeless(read_lines(folder / "trace.jsonl", ""))
    return (folder / "profile.json").read_bytes(), document(folder / "results.json"), trace


def compare_answer(folder: Path) -> Any:
    records = {path.name: document(path) for path in sorted((folder / "results").glob("*.json"))}
    return records, document(folder / "results.json")


def engine_compare_answer(folder: Path) -> Any:
    lines = [json.dumps(timeless(line), sort_keys=True) for line in read_lines(folder / "runs.jsonl", "")]
    return sorted(lines), document(folder / "comparison.json")


def ladder_answer(folder: Path) -> Any:
    rungs = {path.parent.name: run_answer(path.parent) for path in sorted(folder.glob("*/run.json"))}
    return rungs, document(folder / "results.json")


# -- jobs ------------------------------------------------------------------------------------------------------

_SEARCH = ["--calibration", f"../{NOTES}", "--sequence-length", "32", "--eval-tokens", "64", "--generations", "2"]
_SEARCH += ["--offspring", "4", "--stage", "2@32", "--stage", "1@64", "--preset", "demo", "--quiet"]
_PLAIN = ["--start", "auto", "--baselines", "random"]  # the usual heuristics measure every unit first
_BANK = ["--bits", "2,3,4", "--group-size", "16", "--calibration", f"../{NOTES}", "--sequence-length", "32"]
_WIDTHS = ["--widths", "2,3,4", "--group-size", "16", "--bank-tokens", "256"]
_MODEL = f"../{MODEL}"


def _search(name: str, *words: str) -> Job:
    whole = ["llm", name, _MODEL, *words, *_SEARCH, "--out", "run"]
    return Job(name, whole, lambda trial: run_answer(trial / "run"), resumed="run")


def _export(to: str, run: str, out: str) -> Job:
    words = ["llm", "export", run, "--to", to, "--out", out]
    needs = ("banks", "quantized", "dropped")
    return Job(f"export {to}", words, _export_answer, done="exists already", needs=needs)


def _export_answer(trial: Path) -> Any:
    left = [path.name for path in trial.iterdir() if path.name.startswith(".") and path.name.endswith((".tmp", ".old"))]
    return contents(trial / "out"), left


BANK = Job(
    "bank",
    ["llm", "bank", _MODEL, *_BANK, "--calibration-tokens", "256", "--out", "bank", "--quiet"],
    lambda trial: contents(trial / "bank"),
)
DROP = _search("drop", "--sparsity", "0.25", "--start", "random")
QUANTIZE = _search("quantize", "--bits", "3", *_WIDTHS, *_PLAIN)
SOLVE = Job(
    "solve",
    ["solve", f"../{OWN}:problem", "--generations", "12", "--stage", "1@4", "--out", "run", "--quiet"],
    lambda trial: run_answer(trial / "run"),
    resumed="run",
)
LADDER = Job(
    "ladder",
    ["llm", "quantize", _MODEL, "--bits", "2.5,3", *_WIDTHS, *_PLAIN, *_SEARCH, "--out", "run"],
    lambda trial: ladder_answer(trial / "run"),
    resumed="run",
)
_METHODS = ["--task", "drop", "--target", "25%", "--methods", "uniform,random,evopress", "--seeds", "1"]
COMPARE = Job(
    "compare",
    ["llm", "compare", _MODEL, *_METHODS, *_SEARCH, "--out", "run"],
    lambda trial: compare_answer(trial / "run"),
)
EXPORTS = (
    _export("hf", "quantized", "out"),
    _export("compressed-tensors", "quantized", "out"),
    _export("deci", "dropped", "out"),
)
KILLED = (BANK, DROP, QUANTIZE, SOLVE, LADDER, COMPARE, *EXPORTS)


def _write_model(folder: Path) -> None:
    """A random llama of four tiny blocks, with a tokenizer of bytes."""
    import torch

    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from tests.llm.families import tiny, tiny_tokenizer

    torch.set_num_threads(1)
    tiny("Llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
