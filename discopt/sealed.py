"""JSON documents and lines that say themselves whether they are what was written.

A sealed document is a JSON object with `format`, `version`, and the SHA-256 of all else in it as `checksum`; one that
has no format of its own gets `FORMAT`, and loses it when it is read. A sealed line, of which a file has many, is an
object with its checksum alone. A flipped byte or a cut is so refused wherever it is read, unless it changes nothing
(white space). Against people who want to deceive it is no help: anyone can compute a checksum.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from discopt.encoding import checksum, plain
from discopt.errors import RunFolderError
from discopt.files import os_error

__all__ = [
    "FORMAT",
    "SealError",
    "append_line",
    "checked_lines",
    "read_lines",
    "sealed",
    "sealed_text",
    "unsealed",
    "whole_lines",
]

FORMAT = "discopt-document"  # of documents that have none of their own
VERSION = 1
CHECKSUM = "checksum"
DEPTH = 64  # of the values in a document, ours having 8 or so: at some hundreds, Python's own limit on calls is near


class SealError(ValueError):
    """A document or line that is not what was written, or not ours to read."""

    def __init__(self, reason: str, *, damaged: bool = True) -> None:
        super().__init__(reason)
        self.damaged = damaged

    def sentence(self, hint: str) -> str:
        """What to say after the path: that it is damaged, why, and what to do; or why it is not for this program."""
        return f"is damaged: {self}; {hint}" if self.damaged else str(self)


def sealed(document: Mapping[str, Any], *, exact: bool = False) -> dict[str, Any]:
    """The document in the types JSON has, with format, version and checksum; `exact` as for `plain`."""
    head = {} if "format" in document else {"format": FORMAT, "version": VERSION}
    content = plain({**head, **document}, exact=exact)
    content.pop(CHECKSUM, None)
    first = {name: content[name] for name in ("format", "version") if name in content}
    return {**first, CHECKSUM: checksum(content), **content}


def sealed_text(document: Mapping[str, Any], *, exact: bool = False, indent: int | None = None) -> str:
    """The content of a sealed document's file."""
    return json.dumps(sealed(document, exact=exact), indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def unsealed(data: bytes | str, format: str | None = None, version: int = VERSION) -> dict[str, Any]:
    """The document in a file's content, without its checksum; raises SealError unless it is what was written.

    `format` is what it must be, None for any of ours; `version` the latest that is known.
    """
    document = _object(data)
    found = document.get("format")
    if found != format if format is not None else not str(found).startswith("discopt-"):
        expected = "one of discopt's formats" if format is None else f"the format {format!r}"
        raise SealError(f"is not ours: expected {expected}, got {found!r:.100}", damaged=False)
    number = document.get("version")
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise SealError("it has no format version")
    if number > version:
        raise SealError(
            f"was written by a newer discopt (format version {number}, this one reads up to {version}); update discopt",
            damaged=False,
        )
    content = _checked(document)
    if content["format"] == FORMAT:
        del content["format"], content["version"]
    return content


def sealed_line(line: Mapping[str, Any]) -> str:
    """The line with its checksum, and the newline."""
    content = plain(line, exact=False)
    return json.dumps({**content, CHECKSUM: checksum(content)}, ensure_ascii=False, allow_nan=False) + "\n"


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Add one sealed line, behind the last whole one; on failure the file is as it was before.

    Raises RunFolderError.
    """
    data = sealed_line(line).encode(errors="backslashreplace")
    try:
        with open(path, "a+b", buffering=0) as file:
            end = _end_of_whole_lines(file)
            file.truncate(end)
            try:
                written = 0
                while written < len(data):
                    written += file.write(data[written:])
            except BaseException:
                file.truncate(end)
                raise
    except OSError as error:
        raise os_error("cannot write", path, error) from error


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file, without one that was cut off when the process died; none if there is no file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise os_error("cannot read", path, error) from error
    return data.split(b"\n")[:-1]  # what follows the last newline is a line cut off, or nothing


def read_lines(path: Path, hint: str) -> list[dict[str, Any]]:
    """All whole lines, without their checksums; RunFolderError, ending in `hint`, for one that is damaged."""
    return checked_lines(path, whole_lines(path), hint)


def checked_lines(path: Path, lines: Sequence[bytes], hint: str) -> list[dict[str, Any]]:
    """As `read_lines`, of lines that were read before."""
    found = []
    for number, data in enumerate(lines, start=1):
        try:
            found.append(_checked(_object(data)))
        except SealError as error:
            raise RunFolderError(f"{path} is damaged: line {number}: {error}; {hint}") from error
    return found


def _object(data: bytes | str) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SealError(f"it is not whole JSON ({error!s:.100})") from None
    if not isinstance(document, dict):
        raise SealError(f"expected a JSON object, got {type(document).__name__}")
    if _is_deep(document):
        raise SealError("its values are nested too deep")
    return document


def _is_deep(document: Any) -> bool:
    level: list[Any] = [document]
    for _ in range(DEPTH):
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
        ]
    return bool(level)


def _checked(document: dict[str, Any]) -> dict[str, Any]:
    content = {name: value for name, value in document.items() if name != CHECKSUM}
    if CHECKSUM not in document:
        raise SealError("it has no checksum")
    try:
        matches = document[CHECKSUM] == checksum(content)
    except (ValueError, RecursionError):  # NaN, which no document of ours has
        matches = False
    if not matches:
        raise SealError("its content does not match its checksum")
    return content


def _end_of_whole_lines(file: BinaryIO) -> int:
    """Where the last whole line ends, read backwards from the end; leaves the file's position anywhere."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 4096)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
