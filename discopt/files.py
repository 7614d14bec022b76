"""Files that are replaced whole, never edited.

A process that dies, or a disk that fills, leaves the old file or the new one.

What is being written is a hidden file beside its place, `.NAME.MARK.tmp`; a process that is killed leaves it behind,
and `remove_temporary` takes it away.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from discopt.errors import RunFolderError

__all__ = ["flush_folder", "os_error", "remove_temporary", "write_atomic"]

_log = logging.getLogger(__name__)


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Put `data` at `path`, whole or not at all; text is written as UTF-8.

    A temporary file in the same folder is written, flushed to the disk and renamed over the old one. On failure it
    is removed and the old file stays; OSError becomes RunFolderError.
    """
    path = Path(path)
    content = data.encode(errors="backslashreplace") if isinstance(data, str) else data
    temporary = path.parent / f".{path.name}.{os.urandom(6).hex()}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise os_error("cannot write", path, error) from error
        raise
    flush_folder(path.parent)


def remove_temporary(folder: Path, name: str) -> None:
    """Remove what processes that were killed while writing `name` left in the folder."""
    for leftover in folder.glob(f".{name}.*.tmp"):
        try:
            leftover.unlink(missing_ok=True)
        except OSError as error:
            raise os_error("cannot remove", leftover, error) from error


def flush_folder(path: Path) -> None:
    """Make the names in a folder last through a power cut, where the system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # Windows cannot open folders
        return
    try:
        os.fsync(handle)
    except OSError as error:
        _log.debug("cannot flush the folder %s: %s", path, error)
    finally:
        os.close(handle)


def os_error(what: str, path: Path, error: OSError) -> RunFolderError:
    """What the operating system said, in one line: "cannot write PATH: No space left on device"."""
    return RunFolderError(f"{what} {path}: {error.strerror or error}")
