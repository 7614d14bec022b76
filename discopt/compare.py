"""`discopt compare`: every algorithm on every problem from several seeds, with equal means, in parallel processes.

The folder keeps a line for every run that ended (runs.jsonl), so that the same command goes on where it was stopped,
and runs only what is missing when it is given again with other algorithms or seeds. When all have ended it gets
report.md, report.json, comparison.json (the numbers behind the pictures) and the pictures.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import math
import multiprocessing
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from discopt.compare_plots import plot_comparison
from discopt.compare_report import markdown_report
from discopt.compare_runs import (
    DONE,
    NOT_APPLICABLE,
    ProblemFacts,
    Task,
    begin_worker,
    describe,
    load_algorithms,
    run,
)
from discopt.compare_summary import Comparison, numbers, summarise
from discopt.encoding import plain
from discopt.errors import DiscoptError, RunFolderError
from discopt.folder import DISTRIBUTION, START_AGAIN, RunFolder, distribution_version
from discopt.loading import split_target
from discopt.plots import is_drawn
from discopt.progress import task as progress_of
from discopt.report import option_words
from discopt.sealed import append_line, read_lines, sealed_line
from discopt.workers import cores

COMMAND = "compare"
RUNS = "runs.jsonl"
PICTURES = ("curves.png", "targets.png", "running-time.png", "ranks.png")
FILES = (RUNS, "report.json", "comparison.json", *PICTURES)
DEFAULTS = ("learning", "evopress")  # the first that takes part is what the others are tested against
_FREE = ("algorithms", "seeds", "default", "tolerance")  # options that may differ when a comparison goes on
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


@dataclass(frozen=True)
class CompareRequest:
    """What was asked of `discopt compare`, one field per option. Raises ValueError for values that make no sense."""

    problems: tuple[str, ...] = ("*",)  # names or patterns of the suite's, or FILE.py:NAME
    algorithms: tuple[str, ...] = ("*",)  # names or patterns of discopt's, or FILE.py:NAME, a dict of them
    seeds: int = 10
    budget: tuple[int, ...] = (300, 1000, 3000, 10000)  # full measurements: rows times the problem's fidelity
    default: str | None = None  # the algorithm that the others are tested against
    tolerance: float = 0.01  # a run that reaches a gap no higher has succeeded
    max_seconds_per_run: float = 600.0

    def __post_init__(self) -> None:
        for name in ("problems", "algorithms"):
            if not getattr(self, name):
                raise ValueError(f"at least one of the {name} is needed, got none")
            for target in getattr(self, name):
                if ":" in target:
                    split_target(target)
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")
        if not self.budget or min(self.budget) < 1 or list(self.budget) != sorted(set(self.budget)):
            raise ValueError(f"budgets must be positive and rise, got {self.budget}")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must lie from 0 to 1, got {self.tolerance}")
        if not (self.max_seconds_per_run > 0 and math.isfinite(self.max_seconds_per_run)):
            raise ValueError(f"max_seconds_per_run must be positive, got {self.max_seconds_per_run}")

    def command_line(self, out: Path) -> str:
        """The command that asks for this."""
        return shlex.join(["discopt", COMMAND, *option_words(self, skip=(), repeated={}), "--out", str(out)])


def compare(
    request: CompareRequest,
    out: Path,
    *,
    again: Sequence[str] = (),
    workers: int | None = None,
    force: bool = False,
    quiet: bool = False,
    directory: Path | None = None,
) -> dict[str, Any]:
    """Do all runs that `out` does not have yet, write the report, and return what report.json holds.

    Runs of algorithms whose names match one of `again` are forgotten and done anew. The result holds NaN where an
    algorithm does not apply and inf where it found nothing; the file has null there.
    `directory` is where FILE.py is looked for. Processes are spawned, so a script that calls this does it under
    `if __name__ == "__main__"`. Raises RunFolderError for the folder of a comparison on other problems or with other
    budgets, unless `force` replaces it.
    """
    place = str((directory or Path()).resolve())
    targets, left_out = _problem_targets(request.problems)
    algorithms = _algorithm_files(request.algorithms, place)
    default = _default(request, algorithms)
    renewed = _spelled_out(again, list(algorithms), "algorithm")
    asked: dict[str, Any] = {
        "command": COMMAND,
        "options": asdict(request),
        "targets": targets,
        "left_out": left_out,
        "algorithms": algorithms,
        "code": _checksums([*targets, *filter(None, algorithms.values())], place),
    }
    with _pool(workers or cores()) as pool:
        if (out / "run.json").is_file() and not force:
            folder = RunFolder.open(out)
            folder.hold()
            _check_same(folder, plain(asked, exact=False), {algorithms[name] for name in renewed})
            known = {name: {**folder.request[name], **asked[name]} for name in ("algorithms", "code")}
            folder.update_request(**{**asked, **known})
            _forget(folder, renewed)
        else:
            RunFolder.check_free(out, force=force, artefacts=FILES)
            found = [asdict(facts) for facts in _describe(targets, place, pool, quiet)]
            folder = RunFolder.create(
                out, {**asked, "problems": found, "versions": _peer_versions()}, force=force, artefacts=FILES
            )
        problems = [ProblemFacts(**facts) for facts in folder.request["problems"]]
        tasks = [
            Task(problem, name, file, seed, request.budget, request.max_seconds_per_run, place)
            for seed in range(request.seeds)
            for problem in problems
            for name, file in algorithms.items()
        ]
        lines = _do_missing(tasks, folder, pool, quiet)
    comparison = Comparison.of_runs(
        problems, tuple(algorithms), [lines[task.key] for task in tasks], request.budget, default, request.tolerance
    )
    return _write(request, comparison, folder)


def _problem_targets(patterns: Sequence[str]) -> tuple[list[str], list[str]]:
    """Patterns of the suite's names spelled out, files as they are; and those left out for want of a package."""
    from discopt.problems.suite import SUITE

    targets = _spelled_out(patterns, list(SUITE), "problem")
    needs = {name: SUITE[name].needs for name in targets if name in SUITE}
    left_out = [name for name, module in needs.items() if module is not None and find_spec(module) is None]
    for name in left_out:
        if name in patterns:
            raise DiscoptError(f"{name} needs {needs[name]}: pip install 'discopt-search[bench]'")
    return [target for target in targets if target not in left_out], left_out


def _algorithm_files(patterns: Sequence[str], directory: str) -> dict[str, str | None]:
    """The algorithms by name, each with the FILE.py:NAME that has it, None for discopt's own."""
    found: dict[str, str | None] = {}
    for target in _spelled_out(patterns, list(load_algorithms(None, directory)), "algorithm"):
        file = target if ":" in target else None
        for name in load_algorithms(file, directory) if file else [target]:
            if name in found:
                raise DiscoptError(f"algorithms need different names, got {name!r} twice")
            found[name] = file
    return found


def _spelled_out(patterns: Sequence[str], names: Sequence[str], what: str) -> list[str]:
    found: dict[str, None] = {}
    for pattern in patterns:
        matching = [pattern] if ":" in pattern else fnmatch.filter(names, pattern)
        if not matching:
            raise DiscoptError(f"there is no {what} {pattern!r}; there are: {', '.join(names)}")
        found.update(dict.fromkeys(matching))
    return list(found)


def _default(request: CompareRequest, algorithms: dict[str, str | None]) -> str | None:
    if request.default is not None and request.default not in algorithms:
        raise DiscoptError(f"the default must be one of {', '.join(algorithms)}, got {request.default!r}")
    return request.default or next((name for name in DEFAULTS if name in algorithms), None)


def _checksums(targets: Sequence[str], directory: str) -> dict[str, str]:
    """SHA-256 of the files that problems and algorithms come from."""
    files = sorted({split_target(target)[0] for target in targets if ":" in target})
    paths = {file: Path(directory) / file for file in files}
    return {file: hashlib.sha256(path.read_bytes()).hexdigest() for file, path in paths.items() if path.is_file()}


def _check_same(folder: RunFolder, asked: dict[str, Any], renewed: set[str | None]) -> None:
    """Raise RunFolderError unless the folder's runs are those of the comparison asked for, as far as they go.

    `renewed` are the files, FILE.py:NAME, whose algorithms run anew, so that they may have changed.
    """
    before, free = folder.request, {split_target(target)[0] for target in renewed if target}
    bound = [name for name in asked["options"] if name not in _FREE]
    _check_equal(folder, ("command",), before, asked)
    _check_equal(folder, bound, before["options"], asked["options"])
    _check_equal(folder, ("targets", "left_out"), before, asked)
    for what, names in (("code", before["code"].keys() - free), ("algorithms", before["algorithms"])):
        _check_equal(folder, sorted(set(names) & asked[what].keys()), before[what], asked[what])


def _check_equal(folder: RunFolder, names: Iterable[str], before: dict[str, Any], asked: dict[str, Any]) -> None:
    for name in names:
        if before.get(name) != asked[name]:
            raise RunFolderError(
                f"{folder.path} was made by another request: its {name} is {_short(before.get(name))}, "
                f"got {_short(asked[name])}; choose another --out, or pass --force to replace it"
            )


def _forget(folder: RunFolder, algorithms: Sequence[str]) -> None:
    """Remove the runs of these algorithms."""
    if not algorithms:
        return
    lines = read_lines(folder.path / RUNS, START_AGAIN)
    folder.write_text(RUNS, "".join(sealed_line(line) for line in lines if line["algorithm"] not in algorithms))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _describe(targets: list[str], directory: str, pool: ProcessPoolExecutor, quiet: bool) -> list[ProblemFacts]:
    with progress_of("problems", len(targets), quiet=quiet) as bar:
        facts = []
        for fact in pool.map(describe, targets, [directory] * len(targets)):
            facts.append(fact)
            bar.advance()
    twice = {fact.name for fact in facts if sum(fact.name == other.name for other in facts) > 1}
    if twice:
        raise DiscoptError(f"problems need different names, got {sorted(twice)[0]!r} twice")
    return facts


def _do_missing(
    tasks: Sequence[Task], folder: RunFolder, pool: ProcessPoolExecutor, quiet: bool
) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The lines of all runs, those that the folder has and those that are done now."""
    path = folder.path / RUNS
    found = read_lines(path, START_AGAIN)
    lines = {(line["problem"], line["algorithm"], line["seed"]): line for line in found}
    final = {key for key, line in lines.items() if line["status"] in (DONE, NOT_APPLICABLE)}
    missing = [task for task in tasks if task.key not in final]
    with progress_of("comparison", len(missing), unit="runs", quiet=quiet) as bar:
        futures: dict[Future[dict[str, Any]], Task] = {pool.submit(run, task): task for task in missing}
        for future in as_completed(futures):
            line = plain(future.result(), exact=False)
            append_line(path, line)
            lines[futures[future].key] = line
            bar.advance()
    return lines


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes of one thread each, which end with this block, at once if it is left by an error or Ctrl-C."""
    others = set(multiprocessing.active_children())
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))  # spawned processes read it when they import NumPy
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), begin_worker)
    try:
        yield pool
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
        if isinstance(error, BrokenProcessPool):
            raise DiscoptError("a worker process died; the same command goes on with the runs that are left") from error
        raise
    finally:
        pool.shutdown()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _peer_versions() -> dict[str, str]:
    """Versions of what is installed of the extra `bench`: problems and other people's algorithms come from there."""
    try:
        requirements = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return {}
    names = [re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in requirements if re.search(r"extra == .bench.", text)]
    found = {name: distribution_version(name) for name in names}
    return {name: version for name, version in found.items() if version != "unknown"}


def _write(request: CompareRequest, comparison: Comparison, folder: RunFolder) -> dict[str, Any]:
    """The answer's files, report.json last, for it says that the others are there."""
    results = {
        "format": "discopt-comparison",
        "version": 1,
        "command": COMMAND,
        "command_line": request.command_line(folder.path),
        "versions": folder.request["versions"],
        "seeds": request.seeds,
        "max_seconds_per_run": request.max_seconds_per_run,
        "left_out": folder.request["left_out"],
        **summarise(comparison),
        "folder": str(folder.path),
    }
    drawn = is_drawn(lambda: plot_comparison(comparison, folder.path, PICTURES))
    folder.write_json("comparison.json", numbers(comparison))
    folder.write_text("report.md", markdown_report(results, PICTURES if drawn else ()))
    folder.write_json("report.json", results)
    return results
