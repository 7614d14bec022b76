"""Workers killed in the middle of a stage: two of the three of `discopt solve --workers 3`, one after the other."""

from __future__ import annotations

import os
import signal
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from fault_jobs import LIMIT, OWN, SOLVE, Yard, run_answer

from discopt.sealed import whole_lines

PIDS = "pids"
WORKERS = 3
# Says which process measures, and takes its time, so that there is a middle of a stage.
SHOWS_ITSELF = f"""
import os, time
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "{OWN}")).read())
PIDS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "{PIDS}")
quick = loss

def loss(population, fidelity, seed):
    open(os.path.join(PIDS, str(os.getpid())), "w").close()
    time.sleep(0.05)
    return quick(population, fidelity, seed)

problem = Problem("small", space, loss)
"""


class Counter(Protocol):
    def count(self, faults: int, failure: str | None, *, refused: bool = False) -> None: ...


def worker_trials(yard: Yard, times: int, row: Counter) -> bool:
    """Kill two of three workers in stages that are further apart each time; False if there is no Ray."""
    if find_spec("ray") is None:
        print("worker   skipped: there is no ray here")
        return False
    (yard.path / "spread.py").write_text(SHOWS_ITSELF)
    pids = yard.path / PIDS
    pids.mkdir()
    words = [word.replace(OWN, "spread.py") for word in SOLVE.words]
    yard.clear()
    ended = yard.run(words)
    if ended.code != 0:
        raise SystemExit(f"{' '.join(words)} does not run undisturbed:\n{ended.output}")
    answer = run_answer(yard.trial / "run")
    for number in range(max(1, times // 5)):
        yard.clear()
        for old in pids.iterdir():
            old.unlink()
        began = time.monotonic()
        child = yard.start([*words, "--workers", str(WORKERS)])
        killed = _kill_two(yard.trial / "run" / "trace.jsonl", pids, child, stages=1 + number % 5)
        ended = yard.wait(child, began, LIMIT)
        if ended.code != 0:
            row.count(killed, f"ended otherwise: {ended.code} {ended.output}")
        else:
            row.count(killed, None if run_answer(yard.trial / "run") == answer else "another answer")
    return True


def _kill_two(trace: Path, pids: Path, child: int, stages: int) -> int:
    """Kill a worker after so many stages, and another after as many again; how many were killed."""
    killed: list[int] = []
    deadline = time.monotonic() + LIMIT
    while len(killed) < WORKERS - 1 and time.monotonic() < deadline:
        if len(whole_lines(trace)) >= stages * (1 + len(killed)):
            alive = [int(path.name) for path in pids.iterdir() if int(path.name) not in (*killed, child)]
            if alive:
                os.kill(alive[0], signal.SIGKILL)
                killed.append(alive[0])
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
        time.sleep(0.01)
    return len(killed)
