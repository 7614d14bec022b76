"""Live progress on standard error: a bar on a terminal, a plain line now and then elsewhere.

`ProgressBar` is a callback of `discopt.run.minimize`; `task` shows any other long work with the same look.
Both are context managers, and say nothing when `quiet`.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

    from discopt.run import Progress

LINE_EVERY = 10.0  # seconds between plain lines

Clock = Callable[[], float]


class _Display(Protocol):
    """Where progress is shown."""

    def update(self, text: str, fraction: float, left: float | None) -> None:
        """Show what is going on, the share done (0 to 1), and the seconds left, None if unknown."""
        ...

    def close(self) -> None: ...


class ProgressBar:
    """Shows a search: generation, best loss, fidelity spent in its unit, share done, time gone, time left."""

    def __init__(
        self,
        *,
        unit: str = "evaluations",
        label: str = "search",
        quiet: bool = False,
        stream: TextIO | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._unit, self._label = unit, label
        self._open: Callable[[], _Display] = lambda: _display(label, quiet, stream, clock)
        self._display: _Display | None = None

    def __enter__(self) -> Self:
        self._display = self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._display is not None:
            self._display.close()
            self._display = None

    def __call__(self, progress: Progress) -> None:
        """Take the progress after a stage."""
        if self._display is None:
            self._display = self._open()
        line = progress.line
        best = line.get("best")
        parts = (
            f"generation {line.get('generation', 0):,}",
            f"best {format_loss(best)}",
            f"{format_count(line.get('total_fidelity', 0))} {self._unit}",
        )
        self._display.update(" · ".join(parts), progress.fraction, progress.eta)


class Task:
    """Progress of `total` equal steps; see `task`."""

    def __init__(self, total: int, unit: str, display: _Display, clock: Clock) -> None:
        self._total, self._unit, self._display, self._clock = total, unit, display, clock
        self._done = 0
        self._start = clock()

    def __enter__(self) -> Self:
        self.advance(0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.close()

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        fraction = min(1.0, self._done / self._total) if self._total > 0 else 1.0
        gone = self._clock() - self._start
        left = gone * (1 - fraction) / fraction if fraction > 0 else None
        done = f"{format_count(self._done)} of {format_count(self._total)}"
        self._display.update(f"{done} {self._unit}".rstrip(), fraction, left)


def task(
    description: str,
    total: int,
    *,
    unit: str = "",
    quiet: bool = False,
    stream: TextIO | None = None,
    clock: Clock = time.monotonic,
) -> Task:
    """`with task("held-out text", 12, unit="sequences") as t: t.advance()`."""
    return Task(total, unit, _display(description, quiet, stream, clock), clock)


def format_count(number: int) -> str:
    """1234 -> "1,234", 1234567 -> "1.23M"."""
    for size, letter in ((10**12, "T"), (10**9, "G"), (10**6, "M")):
        if abs(number) >= size:
            return f"{number / size:.2f}{letter}"
    return f"{number:,}"


def format_loss(loss: float | None) -> str:
    """Five digits, or a dash for none."""
    return "-" if loss is None or math.isnan(loss) else f"{loss:.5g}"


def format_seconds(seconds: float | None) -> str:
    """Seconds as 0:07, 12:34 or 1:02:03; `--:--` for none."""
    if seconds is None or not math.isfinite(seconds):
        return "--:--"
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _display(label: str, quiet: bool, stream: TextIO | None, clock: Clock) -> _Display:
    stream = sys.stderr if stream is None else stream
    if quiet:
        return _Silence()
    if stream.isatty():
        return _Bar(label, stream)
    return _Lines(label, stream, clock)


class _Silence:
    def update(self, text: str, fraction: float, left: float | None) -> None:
        pass

    def close(self) -> None:
        pass


class _Lines:
    """A line at once, then at most every `LINE_EVERY` seconds, and the last state at the end."""

    def __init__(self, label: str, stream: TextIO, clock: Clock) -> None:
        self._label, self._stream, self._clock = label, stream, clock
        self._start = clock()
        self._shown_at: float | None = None
        self._pending: tuple[str, float, float | None] | None = None

    def update(self, text: str, fraction: float, left: float | None) -> None:
        self._pending = (text, fraction, left)
        if self._shown_at is None or self._clock() - self._shown_at >= LINE_EVERY:
            self._show()

    def close(self) -> None:
        self._show()

    def _show(self) -> None:
        if self._pending is None:
            return
        text, fraction, left = self._pending
        self._pending = None
        self._shown_at = self._clock()
        gone = format_seconds(self._shown_at - self._start)
        end = f", {format_seconds(left)} left" if left is not None and fraction < 1 else ""
        print(f"{self._label}: {text} · {fraction:.0%} in {gone}{end}", file=self._stream, flush=True)


class _Bar:
    """rich's progress bar; it stays on the screen when done."""

    def __init__(self, label: str, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(file=stream)
        self._bar: RichProgress = Progress(
            TextColumn("{task.fields[label]}", style="bold", markup=False),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=min(20, max(4, console.width - len(label) - 70))),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            redirect_stdout=False,
        )
        self._task: Any = self._bar.add_task("", total=1.0, label=label, left="")
        self._bar.start()

    def update(self, text: str, fraction: float, left: float | None) -> None:
        shown = f"{format_seconds(left)} left" if left is not None and fraction < 1 else ""
        self._bar.update(self._task, description=text, completed=fraction, left=shown)

    def close(self) -> None:
        self._bar.stop()
