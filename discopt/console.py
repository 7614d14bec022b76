"""What every command does around its one call: wrong options, signals, a standard output that holds one object."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeVar

import typer

T = TypeVar("T")

INTERRUPTED = 130  # exit code of a command that Ctrl-C or SIGTERM ended


def checked(make: Callable[[], T]) -> T:
    """What the options make; where they make no sense, alone or together, a wrong option."""
    try:
        return make()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@contextlib.contextmanager
def only_json_on_stdout(wanted: bool = True) -> Iterator[None]:
    """Send what is printed inside to standard error, by this process and by its children."""
    if not wanted:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as undo:
        with contextlib.suppress(OSError):  # a process may have closed one of them
            kept = os.dup(1)
            undo.callback(os.close, kept)
            os.dup2(2, 1)
            undo.callback(os.dup2, kept, 1)
        yield


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, as Ctrl-C does; also where a shell has Ctrl-C ignored in the background."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM or not ignored:
            raise KeyboardInterrupt

    def on_terminate(number: int, frame: FrameType | None) -> None:
        handler = signal.getsignal(signal.SIGINT)  # a search holds interrupts back while it writes
        if callable(handler):
            handler(number, frame)

    before_interrupt = signal.signal(signal.SIGINT, on_interrupt)
    before_terminate = signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before_interrupt)
        signal.signal(signal.SIGTERM, before_terminate)
