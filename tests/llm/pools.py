"""Workers in this process, for tests: an object each, and all that goes in and out is pickled."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from discopt.errors import WorkersError
from discopt.workers import WorkersAt, always
from discopt_llm import workers


def sent(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def outcome(results: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on time, place and means."""
    return {name: results[name] for name in ("profile", "rows", "met", "stop")}


class Here:
    """Stands in for `Workers`; worker i makes call i, modulo their number.

    dies_after: calls of all workers together, after which they are gone, one with each further call.
    """

    def __init__(
        self,
        at: WorkersAt,
        make: Callable[[], Any],
        *,
        seconds: float | None = None,
        cpus: float = 1,
        gpus: float = 0,
        say: Callable[[str], None] = lambda line: None,
        dies_after: int | None = None,
    ) -> None:
        assert at.count is not None
        self.objects = [sent(make)() for _ in range(at.count)]
        self.calls: list[tuple[int, str, tuple[Any, ...]]] = []
        self.left = dies_after

    def close(self) -> None:
        self.objects = []

    def __len__(self) -> int:
        return len(self.objects)

    def call(
        self, method: str, arguments: Sequence[tuple[Any, ...]], *, valid: Callable[[Any], bool] = always
    ) -> list[Any]:
        answers = []
        for i, of_one in enumerate(arguments):
            if self.left == 0:
                self.objects.pop()
            elif self.left is not None:
                self.left -= 1
            if not self.objects:
                raise WorkersError("no worker is left")
            worker = i % len(self.objects)
            self.calls.append((worker, method, of_one))
            answers.append(sent(getattr(self.objects[worker], method)(*sent(of_one))))
        return answers


def workers_here(monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Here]:
    """From now on workers are in this process; the pools that are opened."""
    opened: list[Here] = []

    def begin(*args: Any, **given: Any) -> Here:
        opened.append(Here(*args, **given, **options))
        return opened[-1]

    monkeypatch.setattr(workers, "Workers", begin)
    monkeypatch.setattr(workers, "_put", bytes)
    return opened
