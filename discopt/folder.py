"""A run's folder: what was asked, what happened, where it stands, what came out.

`run.json` (the request) · `trace.jsonl` (a line a stage, appended) · `checkpoint.json` (replaced atomically) ·
`results.json`, `profile.json`, `report.md`, pictures (the answer).

Files are replaced whole, never edited: a process that dies, or a disk that fills, leaves the old file or the new one.
Every document and every line of the trace has a checksum, which is checked when it is read (see `sealed`). Whoever
writes holds the folder's lock, from its first write until it is done; readers need none.

The JSON is strict. In artefacts for readers a number that is not finite becomes `null`; in checkpoints, whose numbers
must come back exactly, it becomes `{"float": "NaN"}`, `{"float": "Infinity"}` or `{"float": "-Infinity"}`.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from discopt.encoding import restore
from discopt.errors import RunFolderError
from discopt.files import os_error, remove_temporary, write_atomic
from discopt.lock import LOCK, FolderLock
from discopt.sealed import SealError, append_line, checked_lines, read_lines, sealed_text, unsealed, whole_lines
from discopt.typed import check_types
from discopt.wording import one_line

RUN_FORMAT = "discopt-run"
CHECKPOINT_FORMAT = "discopt-checkpoint"
VERSION = 1  # of both formats

DISTRIBUTION = "discopt-search"  # the name on the package index, where another project owns `discopt`

TRACE = "trace.jsonl"

# What a run may leave behind, the request last: as long as it stands, the folder is known to be a run's.
ARTEFACTS = (
    "checkpoint.json",
    "heuristics.json",
    "heldout.json",
    "units.json",
    TRACE,
    "results.json",
    "profile.json",
    "profile.txt",
    "report.md",
    "report.html",
    "trace.png",
    "units.png",
    "run.json",
)

WHAT = "the run folder"
START_AGAIN = "start the run again in another folder, or with --force in this one"

T = TypeVar("T")


class RunFolder:
    """One run's folder. Make one with `create` or `open`."""

    def __init__(self, path: Path, request: dict[str, Any]) -> None:
        self.path = path
        self.request = request  # run.json's content
        self._lock: FolderLock | None = None

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        request: Mapping[str, Any],
        *,
        force: bool = False,
        artefacts: Iterable[str] = (),
    ) -> RunFolder:
        """Make the folder and write its run.json from `request`: at least `command`, as a rule `options` and `seed`.

        `artefacts` names what this kind of run leaves beside the usual files. With `force` the files of an
        earlier run go first, and only those. Raises RunFolderError where the folder cannot be had.
        """
        if not isinstance(request.get("command"), str):
            raise ValueError(f"request must name its command, got {sorted(request)}")
        path = Path(path)
        names = tuple(dict.fromkeys((*artefacts, *ARTEFACTS)))
        cls.check_free(path, force=force, artefacts=artefacts)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise os_error("cannot make the run folder", path, error) from error
        own = {"format": RUN_FORMAT, "version": VERSION, "created": datetime.now(UTC).isoformat(timespec="seconds")}
        folder = cls(path, {**own, **request, "versions": {**versions(), **request.get("versions", {})}})
        folder.hold()
        try:
            if cls.check_free(path, force=force, artefacts=artefacts):  # anew: another process may have been faster
                _remove_run(path, names)
            folder.write_json("run.json", folder.request)
        except BaseException:
            folder.release()
            raise
        return folder

    @classmethod
    def check_free(
        cls, path: str | os.PathLike[str], *, force: bool = False, artefacts: Iterable[str] = ()
    ) -> list[str]:
        """Raise RunFolderError where `create` would refuse, for before long work; the files it would replace."""
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise RunFolderError(f"{path} is a file, not a folder; choose another --out")
        try:
            occupied = [name for name in dict.fromkeys((*artefacts, *ARTEFACTS)) if os.path.lexists(path / name)]
        except OSError as error:
            raise os_error("cannot read the folder", path, error) from error
        if occupied:
            _check_replaceable(path, occupied, force)
        if (path / LOCK).exists():
            with FolderLock(path, WHAT):
                pass
        return occupied

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """The folder of a run that was begun before; RunFolderError if it is none, or is newer than this program."""
        path = Path(path)
        if not path.exists():
            raise RunFolderError(f"{path} does not exist")
        if not (path / "run.json").is_file():
            raise RunFolderError(f"{path} is not a run folder: it has no run.json")
        request = _read_document(path / "run.json", RUN_FORMAT)
        if not isinstance(request.get("command"), str):
            raise RunFolderError(f"{path / 'run.json'} is damaged: it does not say which command began the run")
        return cls(path, request)

    def hold(self) -> None:
        """Take the folder's lock until `release`, or until this object is forgotten; the first write does so as well.

        Raises RunFolderError, with the owner's name, if another process has it.
        """
        if self._lock is None:
            self._lock = FolderLock(self.path, WHAT).acquire()

    def release(self) -> None:
        """Give the folder's lock back, if this object has it."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def update_request(self, **changes: Any) -> None:
        """Replace run.json with one that holds `changes` as well."""
        request = {**self.request, **changes}
        self.write_json("run.json", request)
        self.request = request

    def discard(self) -> None:
        """Remove the run's files, and the folder if nothing else is in it: for a run that turns out to be none."""
        self.hold()
        _remove_run(self.path, ARTEFACTS)
        self.release()
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def remove_leftovers(self) -> None:
        """Remove the temporary files of a process that was killed while writing; for the folder's only writer."""
        self.hold()
        for name in ARTEFACTS:
            remove_temporary(self.path, name)

    def has(self, name: str) -> bool:
        return self._file(name).is_file()

    def write_json(self, name: str, obj: Mapping[str, Any]) -> None:
        """Write a document; numpy arrays become lists, numbers that are not finite become null."""
        self.write_text(name, sealed_text(obj, indent=2))

    def read_json(self, name: str) -> Any:
        """What `write_json` was given, as JSON has it; RunFolderError if it is missing, or not what was written."""
        return _read_document(self._file(name))

    def write_text(self, name: str, text: str) -> None:
        path = self._file(name)
        self.hold()
        write_atomic(path, text)

    def append_trace(self, line: Mapping[str, Any]) -> None:
        """Add one line to trace.jsonl, behind the last whole one; on failure the file is as it was before."""
        self.hold()
        append_line(self._file(TRACE), line)

    def trace(self) -> list[dict[str, Any]]:
        """All whole lines; a last one that was cut off when the process died is left out."""
        return read_lines(self._file(TRACE), START_AGAIN)

    def whole_trace(self) -> list[dict[str, Any]]:
        """As `trace`, and RunFolderError if lines are missing that were there when the checkpoint was made."""
        lines, state = self.trace(), self.load_checkpoint()
        self._check_length(len(lines), (state or {}).get("trace_lines", 0))
        return lines

    def truncate_trace(self, lines: int) -> None:
        """Keep the first `lines` lines; RunFolderError if there are fewer, or one of them is damaged."""
        if lines < 0:
            raise ValueError(f"lines must not be negative, got {lines}")
        self.hold()
        path = self._file(TRACE)
        whole = whole_lines(path)
        self._check_length(len(whole), lines)
        checked_lines(path, whole[:lines], START_AGAIN)
        if path.exists():
            write_atomic(path, b"".join(line + b"\n" for line in whole[:lines]))

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint; the trace it belongs to is on the disk before it."""
        self.hold()
        self._flush_trace()
        document = {"format": CHECKPOINT_FORMAT, "version": VERSION, "state": state}
        write_atomic(self._file("checkpoint.json"), sealed_text(document, exact=True))

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last state saved, exactly; None if there is none, RunFolderError if it is not what was saved."""
        path = self._file("checkpoint.json")
        if not path.exists():
            return None
        state = _read_document(path, CHECKPOINT_FORMAT).get("state")
        if not isinstance(state, dict):
            raise RunFolderError(f"{path} is damaged: it has no state; {START_AGAIN}")
        restored: dict[str, Any] = restore(state)
        return restored

    def _file(self, name: str) -> Path:
        if name in ("", ".", "..") or any(separator in name for separator in "/\\\0"):
            raise ValueError(f"expected the plain name of a file in the run folder, got {name!r}")
        return self.path / name

    def _check_length(self, there: int, lines: int) -> None:
        if there < lines:
            raise RunFolderError(
                f"{self._file(TRACE)} is damaged: it has {there} whole lines, "
                f"the checkpoint was made after {lines}; {START_AGAIN}"
            )

    def _flush_trace(self) -> None:
        path = self._file(TRACE)
        try:
            with contextlib.suppress(FileNotFoundError), open(path, "r+b") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise os_error("cannot write", path, error) from error


def request_of(kind: type[T], options: Mapping[str, Any]) -> T:
    """The request, a dataclass that checks itself, that run.json holds as `options`; lists become tuples.

    Raises RunFolderError if they make no such request.
    """
    try:
        if not isinstance(options, Mapping):
            raise TypeError(f"expected an object, got {type(options).__name__}")
        check_types(kind, options)
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in options.items()})
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise RunFolderError(f"the options in run.json are damaged: {one_line(error)}") from error


def versions() -> dict[str, str]:
    """What a run depends on, without importing it."""
    found = {name: distribution_version(name) for name in ("numpy", "scipy")}
    discopt = distribution_version(DISTRIBUTION)
    return {"python": platform.python_version(), "discopt": discopt, **found, "platform": platform.platform()}


def distribution_version(name: str) -> str:
    """The version of an installed distribution, or `unknown`."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"


def _check_replaceable(path: Path, occupied: list[str], force: bool) -> None:
    """Only a folder with a run.json of ours may be cleared, and only if that was asked for."""
    try:
        ours = "run.json" in occupied and RUN_FORMAT.encode() in (path / "run.json").read_bytes()  # a damaged one too
    except OSError:
        ours = False
    if not ours:
        raise RunFolderError(f"{path} holds {occupied[0]} but is not a run folder; choose another --out")
    if not force:
        raise RunFolderError(f"{path} exists already; choose another --out, or pass --force to replace it")


def _remove_run(path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        remove_temporary(path, name)
        try:
            (path / name).unlink(missing_ok=True)
        except OSError as error:
            raise os_error("cannot remove", path / name, error) from error


def _read_document(path: Path, format: str | None = None) -> dict[str, Any]:
    try:
        return unsealed(path.read_bytes(), format)
    except FileNotFoundError as error:
        raise RunFolderError(f"{path} does not exist") from error
    except OSError as error:
        raise os_error("cannot read", path, error) from error
    except SealError as error:
        raise RunFolderError(f"{path} {error.sentence(START_AGAIN)}") from error
