"""A folder that appears at its place whole, or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from discopt.errors import RunFolderError

__all__ = ["check_target", "new_folder", "os_message", "size"]


def check_target(target: Path, note: str, *, force: bool) -> None:
    """Raise RunFolderError unless `target` is absent or empty, or `force` is on and it holds the file `note`.

    That file says that we wrote the folder, so that no other one is ever replaced.
    """
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
    if not force:
        raise RunFolderError(f"{target} exists already; choose another --out, or pass --force to replace it")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its place at the end; after an error it is gone and `target` as before.

    What the operating system refuses inside becomes a RunFolderError; other errors pass.
    """
    mark = os.urandom(6).hex()
    folder, before = (target.parent / f".{target.name}.{mark}.{kind}" for kind in ("tmp", "old"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        yield folder
        _flush(folder)
        if target.exists():
            os.replace(target, before)
        os.replace(folder, target)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if before.exists() and not target.exists():
            os.replace(before, target)
        message = os_message(error)
        if message is None:
            raise
        raise RunFolderError(f"cannot write {target}: {message}") from error
    shutil.rmtree(before, ignore_errors=True)


def size(folder: Path) -> int:
    """Of all files in a folder and those below it, bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def os_message(error: BaseException) -> str | None:
    """What the operating system said, also through a library in Rust; None for any other error."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror or str(error)
    found = re.search(r"([^:]+) \(os error \d+\)", str(error))
    return found[1].strip() if found else None


def _flush(folder: Path) -> None:
    """Have all files on the disk, which may turn out to be full only now."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "r+b") as file:
                os.fsync(file.fileno())
