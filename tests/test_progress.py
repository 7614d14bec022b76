from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from discopt.optimizers import EvoPressSettings, Measurement
from discopt.progress import LINE_EVERY, ProgressBar, format_count, format_loss, format_seconds, task
from discopt.run import Progress, minimize
from discopt.space import SearchSpace


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def progress(
    generation: int = 3, *, best: float | None = 0.125, fraction: float = 0.25, tokens: int = 4096
) -> Progress:
    line: dict[str, Any] = {"generation": generation, "best": best, "total_fidelity": tokens}
    return Progress(line, Measurement.unmeasured(np.zeros(2, dtype=np.int16)), fraction, seconds=20.0)


def test_a_plain_line_shows_generation_best_fidelity_share_and_time() -> None:
    stream, clock = io.StringIO(), Clock()
    with ProgressBar(unit="tokens", label="drop", stream=stream, clock=clock) as bar:
        clock.now += 65
        bar(progress())
    assert stream.getvalue() == "drop: generation 3 · best 0.125 · 4,096 tokens · 25% in 1:05, 1:00 left\n"


def test_plain_lines_come_at_once_then_every_ten_seconds_and_at_the_end() -> None:
    stream, clock = io.StringIO(), Clock()
    with ProgressBar(stream=stream, clock=clock) as bar:
        for second in range(26):
            bar(progress(second))
            clock.now += 1
    shown = [int(line.split()[2]) for line in stream.getvalue().splitlines()]
    assert shown == [0, 10, 20, 25]
    assert LINE_EVERY == 10


def test_the_last_line_is_not_said_twice() -> None:
    stream = io.StringIO()
    with ProgressBar(stream=stream, clock=Clock()) as bar:
        bar(progress())
    assert len(stream.getvalue().splitlines()) == 1


def test_nothing_measured_is_a_dash_and_no_progress_is_silence() -> None:
    stream = io.StringIO()
    with ProgressBar(stream=stream) as bar:
        pass
    assert stream.getvalue() == ""
    with bar:
        bar(progress(best=None, fraction=0.0))
    assert "best - · 4,096 evaluations · 0% in" in stream.getvalue()
    assert "left" not in stream.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_quiet_says_nothing(stream: io.StringIO) -> None:
    with ProgressBar(quiet=True, stream=stream) as bar, task("bank", 3, quiet=True, stream=stream) as work:
        bar(progress())
        work.advance()
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar() -> None:
    stream = Terminal()
    with ProgressBar(unit="tokens", label="drop [all]", stream=stream) as bar:
        bar(progress(best=0.5, fraction=0.5))
    shown = stream.getvalue()
    for part in ("drop [all]", "generation 3", "best 0.5", "4,096 tokens", "50%", "0:20 left", "━"):
        assert part in shown


def test_the_bar_follows_a_search() -> None:
    stream, clock = io.StringIO(), Clock()
    space = SearchSpace.cardinality(8, 3)
    with ProgressBar(stream=stream, clock=clock) as bar:
        result = minimize(
            lambda x: -x.sum(axis=1), space, EvoPressSettings(generations=5, offspring=4), callbacks=[bar]
        )
    last = stream.getvalue().splitlines()[-1]
    assert f"generation {result.generations} · best -3 · {result.total_fidelity} evaluations · 100%" in last


def test_a_task_counts_and_estimates() -> None:
    stream, clock = io.StringIO(), Clock()
    with task("held-out text", 4, unit="sequences", stream=stream, clock=clock) as work:
        clock.now += 30
        work.advance()
        work.advance(3)
    assert stream.getvalue().splitlines() == [
        "held-out text: 0 of 4 sequences · 0% in 0:00",
        "held-out text: 1 of 4 sequences · 25% in 0:30, 1:30 left",
        "held-out text: 4 of 4 sequences · 100% in 0:30",
    ]


def test_a_task_without_steps_is_done() -> None:
    stream = io.StringIO()
    with task("nothing", 0, stream=stream, clock=Clock()):
        pass
    assert stream.getvalue() == "nothing: 0 of 0 · 100% in 0:00\n"


def test_the_display_ends_when_the_work_raises() -> None:
    stream = Terminal()
    bar = ProgressBar(stream=stream)
    with contextlib.suppress(KeyboardInterrupt), bar:
        bar(progress())
        raise KeyboardInterrupt
    assert "\x1b[?25h" in stream.getvalue()  # the cursor is back


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (format_count, 999_999, "999,999"),
        (format_count, 1_234_567, "1.23M"),
        (format_count, 3 * 10**9, "3.00G"),
        (format_loss, 1234.5678, "1234.6"),
        (format_loss, float("nan"), "-"),
        (format_seconds, 59.6, "1:00"),
        (format_seconds, 3723.0, "1:02:03"),
        (format_seconds, -1.0, "0:00"),
        (format_seconds, float("inf"), "--:--"),
        (format_seconds, None, "--:--"),
    ],
)
def test_numbers_are_short(function: Any, value: Any, text: str) -> None:
    assert function(value) == text


def test_importing_it_loads_no_rich() -> None:
    code = "import sys, discopt.progress; sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
