"""Ray's side of workers: how it is begun, and what lives in a worker."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from discopt.errors import DiscoptError, WorkersError
from discopt.wording import one_line

# Ray prints this on standard output, whatever it is told of logs; the user has heard of the worker already.
_UNWANTED = "^A worker died or was killed"


@dataclass(frozen=True)
class Raised:
    """What a method raised, on its way from the worker."""

    error: Exception


class Holder:
    """What lives in the worker."""

    def __init__(self, path: list[str], directory: str, threads: int | None, local: bool) -> None:
        added = [entry for entry in path if entry not in sys.path]
        sys.path[:] = [*added, *sys.path] if local else [*sys.path, *added]
        if os.path.isdir(directory):
            os.chdir(directory)
        if threads is not None:  # read by numpy and torch when they are imported
            os.environ["OMP_NUM_THREADS"] = str(threads)
        self._held: Any = None

    def pid(self) -> int:
        return os.getpid()

    def make(self, make: Callable[[], Any]) -> Raised | None:
        try:
            self._held = make()
        except Exception as error:
            return Raised(portable(error))
        return None

    def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        try:
            return getattr(self._held, method)(*arguments)
        except Exception as error:
            return Raised(portable(error))


def portable(error: Exception) -> Exception:
    """The error with its place in the worker as a note; its text where it cannot be sent."""
    trace = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a class of somebody else's does there
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"in a worker:\n{trace}")
    return error


def import_ray() -> Any:
    """The module ray; raises DiscoptError if it is not installed."""
    with warnings.catch_warnings(), _environment(RAY_DEDUP_LOGS_SKIP_REGEX=_UNWANTED):
        warnings.simplefilter("ignore")  # about its own insides
        try:
            import ray
        except ImportError as error:
            raise DiscoptError("workers need the extra ray: pip install 'discopt-search[ray]'") from error
    return ray


def begin(ray: Any, address: str | None, cpus: int) -> None:
    """Reach the cluster, or start a Ray of this machine alone with so many CPUs; raises WorkersError."""
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    with warnings.catch_warnings(), _own_sigterm():
        warnings.simplefilter("ignore")
        try:
            if address is not None:
                ray.init(address, **quiet)
                return
            with _environment(PYTHONPATH=os.pathsep.join(sys.path)):  # so that workers find this package
                ray.init("local", num_cpus=cpus, include_dashboard=False, **quiet)
        except (ConnectionError, ValueError, RuntimeError, ImportError) as error:
            what = f"cannot reach {address}" if address is not None else "Ray does not start on this machine"
            raise WorkersError(f"{what}: {one_line(error)}") from error


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's handler of SIGTERM, which Ray replaces by one that exits."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Environment variables for what is started or imported inside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
