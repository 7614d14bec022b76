"""Sealed documents of run folders, read and written by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from discopt.lock import LOCK, OWNER
from discopt.sealed import append_line, read_lines, sealed_text, unsealed


def read_document(path: Path) -> dict[str, Any]:
    """A document's content, without its checksum."""
    return unsealed(path.read_bytes())


def rewrite(path: Path, content: Mapping[str, Any]) -> None:
    """Put a document in a file, with a checksum that fits."""
    path.write_text(sealed_text(content))


def change(path: Path, **changes: Any) -> None:
    """Change a document, with a checksum that fits."""
    rewrite(path, {**read_document(path), **changes})


def replace_text(path: Path, old: str, new: str) -> None:
    """Put another text in a document wherever there is the old one, with a checksum that fits."""
    rewrite(path, json.loads(json.dumps(read_document(path)).replace(old, new)))


def lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a trace, without their checksums."""
    return read_lines(path, "")


def rewrite_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Put lines in a file, with checksums that fit."""
    path.write_bytes(b"")
    for line in lines:
        append_line(path, line)


def names(folder: Path) -> set[str]:
    """What is in a folder, apart from the lock of its writer."""
    return {path.name for path in folder.iterdir()} - {LOCK, OWNER}
