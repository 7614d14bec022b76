"""One process at a time writes a folder; who comes second is told who is first.

The lock is the operating system's, by `filelock`, and goes with its process however that ends: a file left by one that
was killed locks nothing. The owner's name lies beside it, for the message alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import sys
import weakref
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import BaseFileLock, FileLock, Timeout

from discopt.errors import RunFolderError
from discopt.files import os_error

__all__ = ["LOCK", "OWNER", "FolderLock"]

LOCK, OWNER = ".lock", ".owner"  # in a folder that is being written; beside one that is about to be, `.NAME.lock`
SECONDS = 0.25  # an owner that is just leaving is waited for
_LONGEST = 200  # characters of a command


class FolderLock:
    """The right to write a folder, which the object holds from `acquire` to `release`, or until it is forgotten.

    A process may hold a folder several times, and holds it until the last is released. `what` names the folder for
    people, "the bank"; `beside` is for a folder that will be replaced as a whole.
    """

    def __init__(self, path: str | os.PathLike[str], what: str, *, beside: bool = False) -> None:
        self.path, self.what = Path(path), what
        place = Path(os.path.realpath(path))
        folder, prefix = (place.parent, f".{place.name}") if beside else (place, "")
        self._file, self._owner = (folder / f"{prefix}{name}" for name in (LOCK, OWNER))
        self._lock = FileLock(self._file, thread_local=False, is_singleton=True)
        self._give_back: weakref.finalize[..., FolderLock] | None = None

    def acquire(self) -> Self:
        """Raises RunFolderError, with the owner's name, if another process holds the folder."""
        if self._give_back is not None:
            return self
        try:
            os.stat(self._file.parent)  # which filelock would make
            self._lock.acquire(timeout=SECONDS)
        except Timeout:
            raise RunFolderError(f"{self.what} {self.path} is in use by {self._named()}") from None
        except OSError as error:
            raise os_error("cannot lock", self.path, error) from error
        self._give_back = weakref.finalize(self, _give_back, self._lock, (self._owner, self._file), os.getpid())
        if self._lock.lock_counter == 1:
            self._name()
        return self

    def release(self) -> None:
        """Give the folder back; nothing of the lock is left in it."""
        if self._give_back is not None:
            self._give_back()
            self._give_back = None

    def _name(self) -> None:
        """Write down who the owner is; without that, on a full disk, the lock holds as well."""
        with contextlib.suppress(OSError):
            self._owner.unlink(missing_ok=True)  # of a process that was killed
            self._owner.write_text(json.dumps(_own_name()) + "\n")  # half of it is as good as none

    def _named(self) -> str:
        """The owner, as it has written itself down."""
        try:
            name = json.loads(self._owner.read_bytes())
            return f"process {name['pid']:d} on {name['host']} since {name['time']} ({name['command']:.{_LONGEST}})"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"

    def __enter__(self) -> Self:
        return self.acquire()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


def _give_back(lock: BaseFileLock, files: tuple[Path, ...], owner: int) -> None:
    """Also called when a lock is forgotten, and when its process ends."""
    if os.getpid() != owner:  # a fork of the owner
        return
    if lock.lock_counter == 1:
        for file in files:  # whoever opened the lock before finds it gone, and makes another
            with contextlib.suppress(OSError):
                file.unlink()
    lock.release()


def _own_name() -> dict[str, object]:
    program, *words = sys.argv or [""]
    command = shlex.join([Path(program).name, *words])[:_LONGEST]
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "time": now, "command": command}
