"""What survives what: `python benchmarks/faults.py [--times N] [--seed S] [--kinds kill,disk,...] [--out JSON]`.

Disturbs small runs of the real command line on a tiny random model, goes on with them as a user would, and compares
what comes out with the undisturbed answer, byte by byte where there is no time in it:

kill     kill -9 at random moments through bank build, search, ladder, comparison, solve and export, again and again
disk     a disk (a tmpfs, where one may be mounted; else a limit on file sizes) that is full at a random point
damage   a byte flipped, or the end cut off, in each kind of file that is read again
two      two processes with one command, on one folder, at the same moment
worker   a worker process of `discopt solve --workers` killed in the middle of a stage

A fault counts as recovered if every command ended well, or in one line that says what is wrong, and the answer in the
end is the undisturbed one; of a damaged file also if it was refused in one line. `--times` is the number of trials of
every job; a trial has several kills, and every file is damaged many more times (see KILLS and DAMAGES). Rows that are
in `--out` already are not tried again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import record
from fault_damage import DAMAGED, damage_trials
from fault_jobs import BANK, DROP, EXPORTS, KILLED, QUANTIZE, SOLVE, Job, Yard
from fault_workers import worker_trials

DISK_JOBS = (BANK, DROP, QUANTIZE, SOLVE, *EXPORTS)
TWICE = (BANK, QUANTIZE, SOLVE, EXPORTS[0])
KILLS = 6  # in a trial
DAMAGES = 40  # of a file, for each trial of a job
TAKEN = ("in use by process", "exists already", "holds a finished bank already")  # what the second is told
PAGE = 4096  # bytes of a page, of which a tmpfs is made
ROOM = "256m"


@dataclass
class Row:
    """What was tried of a kind of fault on a job or a file, and how often it did no harm."""

    kind: str
    what: str
    tried: int = 0
    recovered: int = 0
    refused: int = 0  # of damages: by one line
    failures: list[str] = field(default_factory=list)  # the first few

    def count(self, faults: int, failure: str | None, *, refused: bool = False) -> None:
        self.tried += faults
        self.refused += faults * refused
        if failure is None:
            self.recovered += faults
        elif len(self.failures) < 5:
            self.failures.append(failure[-600:])


def main() -> None:
    arguments = _arguments()
    rng = np.random.default_rng(arguments.seed)
    began = time.monotonic()
    base = Path(tempfile.mkdtemp(prefix="faults-"))
    rows, before = _before(arguments)
    done = {(row.kind, row.what) for row in rows}
    try:
        for row in trials(Yard(base), arguments.kinds, arguments.times, rng, done):
            rows.append(row)
            print(f"{row.kind:8} {row.what:28} tried {row.tried:5}  recovered {row.recovered:5}", flush=True)
            for failure in row.failures:
                print(f"         {failure}", flush=True)
            if arguments.out is not None:
                taken = before + round(time.monotonic() - began)
                figures = {"times": arguments.times, "seconds": taken, "rows": [*map(asdict, rows)]}
                record.write(arguments.out, figures, seed=arguments.seed)
    finally:
        _unmount(base / "trial")
        shutil.rmtree(base, ignore_errors=True)
    if any(row.recovered < row.tried for row in rows):
        raise SystemExit("not all recovered")


def trials(
    yard: Yard, kinds: list[str], times: int, rng: np.random.Generator, done: Collection[tuple[str, str]] = ()
) -> Iterator[Row]:
    """One row after the other, of the kinds in this order, without those that are done."""
    if {*kinds} & {"kill", "disk", "two", "damage"}:
        yard.make(QUANTIZE.words, quantized="run", banks="banks")
        yard.make(DROP.words, dropped="run")
    whole: dict[str, tuple[Any, float]] = {}
    makers: dict[str, tuple[tuple[Any, ...], Callable[..., None]]] = {
        "kill": (KILLED, kill_trials),
        "disk": (DISK_JOBS, disk_trials),
        "two": (TWICE, two_trials),
    }
    for kind in kinds:
        if kind in makers:
            jobs, make = makers[kind]
            for job in [job for job in jobs if (kind, job.name) not in done]:
                if job.name not in whole:
                    whole[job.name] = undisturbed(yard, job)
                row = Row(kind, job.name)
                make(yard, job, *whole[job.name], times, rng, row)
                yield row
        elif kind == "damage":
            for damaged in [damaged for damaged in DAMAGED if (kind, damaged.what) not in done]:
                row = Row(kind, damaged.what)
                damage_trials(yard, damaged, DAMAGES * times, rng, row)
                yield row
        elif (kind, "solve --workers 3") not in done:
            row = Row(kind, "solve --workers 3")
            if worker_trials(yard, times, row):
                yield row


def undisturbed(yard: Yard, job: Job) -> tuple[Any, float]:
    """The answer of a job, and the seconds that it takes."""
    yard.clear(job)
    ended = yard.run(job.words)
    if ended.code != 0:
        raise SystemExit(f"{job.name} does not run undisturbed:\n{ended.output}")
    return job.answer(yard.trial), ended.seconds


def kill_trials(
    yard: Yard, job: Job, answer: Any, seconds: float, times: int, rng: np.random.Generator, row: Row
) -> None:
    """Kill a command at any moment, go on, kill that, and so on; then let it end.

    One that is through before it can be killed is begun anew.
    """
    for _ in range(times):
        yard.clear(job)
        kills = left = KILLS
        for _ in range(4 * KILLS):
            begun = kills == left
            ended = yard.run(job.next(yard.trial), kill_after=float(rng.uniform(0, 0.7 * seconds)))
            if ended.code is None:
                left -= 1
                if left == 0:
                    break
                continue
            row.count(kills - left, _through(yard, job, answer))
            if begun:
                seconds = min(seconds, ended.seconds)
            kills = left
            yard.clear(job)
        row.count(kills - left, _through(yard, job, answer))


def disk_trials(
    yard: Yard, job: Job, answer: Any, seconds: float, times: int, rng: np.random.Generator, row: Row
) -> None:
    """Run on a disk that is too small, then on one with room."""
    yard.clear(job)
    inputs = _bytes(yard.trial)
    yard.run(job.words)
    most, largest = _bytes(yard.trial) - inputs, max(f.stat().st_size for f in yard.trial.rglob("*") if f.is_file())
    for _ in range(times):
        _unmount(yard.trial)
        yard.clear(job)
        share = float(rng.uniform(0.02, 0.98))
        if mounted := _mount(yard.trial, inputs + int(share * most) + PAGE):
            yard.clear(job)
        ended = yard.run(job.words, file_limit=None if mounted else int(share * largest))
        failure = None
        if ended.code != 0:
            words = "No space left on device" if mounted else "File too large"
            if words not in (ended.refusal or ""):
                failure = f"not one line about {words}: {ended.code} {ended.output}"
            if mounted:
                _mount_command("-o", f"remount,size={ROOM}", str(yard.trial))
            failure = failure or _through(yard, job, answer)
            row.count(1, failure)
        elif job.answer(yard.trial) != answer:
            row.count(1, "another answer, on a disk that was large enough")
    _unmount(yard.trial)


def two_trials(
    yard: Yard, job: Job, answer: Any, seconds: float, times: int, rng: np.random.Generator, row: Row
) -> None:
    """Two processes begin the same, the second no later than the first ends."""
    for _ in range(times):
        yard.clear(job)
        began = time.monotonic()
        first = yard.start(job.words, output="first.txt")
        time.sleep(float(rng.choice([0, rng.uniform(0, 0.8 * seconds)])))
        second = yard.start(job.words, output="second.txt")
        ends = [
            yard.wait(child, began, 120, output) for child, output in ((first, "first.txt"), (second, "second.txt"))
        ]
        failure = None
        if all(ended.code != 0 for ended in ends):
            failure = f"neither came through: {ends}"
        for ended in ends:
            said = ended.refusal or ""
            if ended.code != 0 and not any(words in said for words in TAKEN):
                failure = f"refused otherwise: {ended.code} {ended.output}"
        if failure is None and job.answer(yard.trial) != answer:
            failure = "another answer"
        row.count(1, failure)


def _through(yard: Yard, job: Job, answer: Any) -> str | None:
    """Go on until the job is done; what is wrong then, None if nothing is."""
    ended = yard.run(job.next(yard.trial))
    if not job.ended_well(ended):
        return f"did not go on: {ended.code} {ended.output}"
    return None if job.answer(yard.trial) == answer else "another answer"


def _bytes(folder: Path) -> int:
    """What a folder takes on a tmpfs, which gives a page to every file and folder."""
    sizes = [path.stat().st_size if path.is_file() else 0 for path in folder.rglob("*")]
    return sum(-(-size // PAGE) * PAGE for size in sizes)


def _mount(place: Path, size: int) -> bool:
    """Whether a small disk lies at the place now."""
    return _mount_command("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place))


def _mount_command(*words: str) -> bool:
    return shutil.which("mount") is not None and not subprocess.run(["mount", *words], capture_output=True).returncode


def _unmount(place: Path) -> None:
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


def _before(arguments: argparse.Namespace) -> tuple[list[Row], int]:
    """The rows of an earlier part of this very run, and the seconds it took."""
    if arguments.out is None or not arguments.out.is_file():
        return [], 0
    before = json.loads(arguments.out.read_text())
    if (before["times"], before["seed"]) != (arguments.times, arguments.seed):
        raise SystemExit(f"{arguments.out} holds figures of other --times or --seed")
    return [Row(**row) for row in before["rows"]], before.get("seconds", 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kinds", type=lambda text: text.split(","), default=["kill", "disk", "damage", "two", "worker"]
    )
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
