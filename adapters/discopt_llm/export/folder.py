"""A folder that appears at its place whole, or not at all.

While it is written it is a hidden folder beside its place, `.NAME.MARK.tmp`; what it replaces is `.NAME.MARK.old` for
a moment. One process at a time has the place's lock. One that is killed leaves those folders behind, and the next that
writes to the same place clears up after it.

What was written whole but does not verify never comes to its place: `set_aside(written, target, note)` moves a file or
a folder to `TARGET.unverified` and says where that is, for the error to tell.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from discopt.errors import RunFolderError
from discopt.files import flush_folder
from discopt.lock import FolderLock
from discopt.sealed import SealError, unsealed

__all__ = ["check_target", "new_file", "new_folder", "os_message", "place_lock", "set_aside", "size"]

_log = logging.getLogger(__name__)


def check_target(target: Path, note: str, *, force: bool) -> None:
    """Raise RunFolderError unless `target` is absent or empty, or `force` is on and it holds the file `note`.

    That file is a sealed document, which says that we wrote the folder, so that no other one is ever replaced. A
    folder that a killed process had moved out of the way, and not yet replaced, is put back first.
    """
    with place_lock(target):
        _put_back(target)
    if not target.exists():
        return
    if not target.is_dir():
        raise RunFolderError(f"{target} is a file, not a folder; choose another --out")
    try:
        empty = not any(target.iterdir())
    except OSError as error:
        raise RunFolderError(f"cannot read {target}: {os_message(error)}") from error
    if empty:
        return
    if not (target / note).is_file():
        raise RunFolderError(f"{target} holds files that discopt did not write; choose another --out")
    if wrong := _wrong(target / note):
        raise RunFolderError(f"{target / note} {wrong}")
    if not force:
        raise RunFolderError(f"{target} exists already; choose another --out, or pass --force to replace it")


@contextmanager
def new_folder(target: Path, check: Callable[[], object] = lambda: None) -> Iterator[Path]:
    """A folder beside `target` that takes its place at the end; after an error it is gone and `target` as before.

    `check` is called once no other process can write there, and may raise. What killed processes have left of this
    target is removed first. What the operating system refuses inside becomes a RunFolderError; other errors pass.
    """
    mark = os.urandom(6).hex()
    folder, before = (target.parent / f".{target.name}.{mark}.{kind}" for kind in ("tmp", "old"))
    with _explained(target), place_lock(target):
        check()
        _remove_leftovers(target)
        try:
            folder.mkdir()
            yield folder
            _flush(folder)
            if target.exists():
                os.replace(target, before)
            os.replace(folder, target)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            if before.exists() and not target.exists():
                os.replace(before, target)
            raise
        flush_folder(target.parent)
        shutil.rmtree(before, ignore_errors=True)


@contextmanager
def new_file(target: Path, check: Callable[[], object] = lambda: None) -> Iterator[Path]:
    """As `new_folder`, a file: where it is to be written, with the suffix of its place."""
    mark = os.urandom(6).hex()
    file = target.parent / f".{target.stem}.{mark}{target.suffix}"
    with _explained(target), place_lock(target):
        check()
        pattern = re.compile(rf"\.{re.escape(target.stem)}\.[0-9a-f]{{12}}{re.escape(target.suffix)}")
        for left in [path for path in target.parent.iterdir() if pattern.fullmatch(path.name) and path.is_file()]:
            _log.info("removing %s, left by a process that was killed", left)
            left.unlink()
        try:
            yield file
            _flush_file(file)
            os.replace(file, target)
        except BaseException:
            with suppress(OSError):
                file.unlink()
            raise
        flush_folder(target.parent)


def place_lock(target: Path) -> FolderLock:
    """The right to write a target; makes the folder that it goes into. RunFolderError if another process has it."""
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    return FolderLock(target, "the place", beside=True)


def set_aside(written: Path, target: Path, note: str | None = None) -> Path:
    """Keep a written file or folder that does not verify: move it to `TARGET.unverified`, and return that path.

    What lies there already is replaced if it is of the same kind, a folder only if it holds the file `note`; anything
    else is in the way and raises RunFolderError. Inside of `new_folder` it may be called with the folder that is being
    written; then raise, for there is nothing left that could take the target's place.
    """
    kept = target.with_name(f"{target.name}.unverified")
    try:
        if kept.is_dir():
            if not written.is_dir() or note is None or _wrong(kept / note):
                raise RunFolderError(f"cannot keep what did not verify: {kept} is in the way")
            shutil.rmtree(kept)
        os.replace(written, kept)
    except OSError as error:
        raise RunFolderError(f"cannot keep what did not verify at {kept}: {os_message(error)}") from error
    return kept


def size(folder: Path) -> int:
    """Of all files in a folder and those below it, bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def os_message(error: BaseException) -> str | None:
    """What the operating system said, also through a library in Rust; None for any other error."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror or str(error)
    found = re.search(r"([^:]+) \(os error \d+\)", str(error))
    return found[1].strip() if found else None


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    """What the operating system refuses becomes a RunFolderError."""
    try:
        yield
    except RunFolderError:
        raise
    except BaseException as error:
        message = os_message(error)
        if message is None:
            raise
        raise RunFolderError(f"cannot write {target}: {message}") from error


def _wrong(note: Path) -> str | None:
    """What is wrong with the file that says that a folder is ours; None if nothing is."""
    try:
        unsealed(note.read_bytes())
    except OSError as error:
        return f"cannot be read: {os_message(error)}"
    except SealError as error:
        return error.sentence(f"remove {note.parent} yourself, or choose another --out")
    return None


def _flush(folder: Path) -> None:
    """Have all files on the disk, which may turn out to be full only now."""
    for path in folder.rglob("*"):
        if path.is_file():
            _flush_file(path)
        elif path.is_dir():
            flush_folder(path)
    flush_folder(folder)


def _flush_file(path: Path) -> None:
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def _put_back(target: Path) -> None:
    """Where there is no target because a process was killed between two renames, have the old one again."""
    if target.exists() or target.is_symlink():
        return
    if before := _leftovers(target, "old"):
        with suppress(OSError):
            max(before, key=lambda folder: folder.stat().st_ctime_ns).rename(target)  # the last that was moved
            _log.info("put back %s, which a process was replacing when it was killed", target)


def _remove_leftovers(target: Path) -> None:
    """Remove what killed processes left, old folders only once there is one in their place.

    What cannot be removed does no harm.
    """
    kinds = ("tmp", "old") if target.exists() else ("tmp",)
    for folder in [found for kind in kinds for found in _leftovers(target, kind)]:
        _log.info("removing %s, left by a process that was killed", folder)
        shutil.rmtree(folder, ignore_errors=True)


def _leftovers(target: Path, kind: str) -> list[Path]:
    """Our hidden folders beside the target, which nobody writes: we have the target's lock."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{12}}\.{kind}")
    found = []
    with suppress(OSError):
        for path in target.parent.iterdir():
            if pattern.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                found.append(path)
    return found
