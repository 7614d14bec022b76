"""Models and banks on their way to machines that do not have them, once for each machine.

A worker opens a model or a bank where the process that asked for it has them, if that is a folder both can see. If not,
it says so, is sent the files through Ray's object store, and keeps them in a folder named by their content.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from discopt.encoding import checksum
from discopt.errors import DiscoptError
from discopt.files import write_atomic
from discopt_llm.errors import ModelError
from discopt_llm.models import gguf_file_of

__all__ = ["MissingError", "Parcel", "absolute", "is_here", "located"]

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")  # never opened, so not sent

Put = Callable[[bytes], Any]


class MissingError(DiscoptError):
    """A machine lacks models or banks, by their sources."""

    def __init__(self, *sources: str) -> None:
        super().__init__(*sources)
        self.sources = sources

    def __str__(self) -> str:
        return f"{' and '.join(self.sources)} cannot be found there"


@dataclass(frozen=True)
class _Sent:
    """A file of a parcel."""

    name: str  # within the parcel's folder
    sha256: str
    content: Any  # bytes, or what Ray has of them


@dataclass(frozen=True)
class Parcel:
    """The files of a folder, or one file."""

    files: tuple[_Sent, ...]
    whole: bool  # a folder, not a file

    @classmethod
    def of(cls, source: str, put: Put) -> Parcel:
        """Of a model's or a bank's source, as it is here; `put` makes of bytes what is sent in their place.

        Raises MissingError if there is no such file or folder.
        """
        single = gguf_file_of(source)
        place = Path(source) if single is None else single
        try:
            names = [place] if single else sorted(path for path in place.iterdir() if path.is_file())
            return cls(tuple(_sent(path, put) for path in names if path.suffix not in PICKLES), single is None)
        except OSError as error:
            raise MissingError(source) from error

    @property
    def name(self) -> str:
        """Of the content."""
        return checksum([[file.name, file.sha256] for file in self.files])

    def opened(self) -> Path:
        """Where the files are on this machine: in its user's cache, where those that are not there yet are written.

        Raises RunFolderError if they cannot be.
        """
        folder = _cache() / self.name
        folder.mkdir(parents=True, exist_ok=True)
        for file in self.files:
            if not _holds(folder / file.name, file.sha256):
                write_atomic(folder / file.name, _content(file.content))
        return folder if self.whole else folder / self.files[0].name


def absolute(source: str) -> str:
    """The source of a model, so that it means the same in another working directory of this machine."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def is_here(source: str) -> bool:
    """Whether this machine has the file or folder that a source stands for; models of the hub come from there."""
    try:
        file = gguf_file_of(source)
    except ModelError:
        return False
    return file is not None or not Path(source).is_absolute() or Path(source).is_dir()


def located(sources: Mapping[str, Parcel], source: str) -> str:
    """What to open for a source: itself, or what was sent of it; raises MissingError if there is neither."""
    if is_here(source):
        return source
    if source not in sources:
        raise MissingError(source)
    return str(sources[source].opened())


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "discopt" / "sent"


def _sent(path: Path, put: Put) -> _Sent:
    data = path.read_bytes()
    return _Sent(path.name, hashlib.sha256(data).hexdigest(), put(data))


def _content(content: Any) -> bytes:
    if isinstance(content, bytes):
        return content
    import ray

    fetched: bytes = ray.get(content)
    return fetched


def _holds(path: Path, sha256: str) -> bool:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except OSError:
        return False
