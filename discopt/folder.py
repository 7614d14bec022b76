"""A run's folder: what was asked, what happened, where it stands, what came out.

`run.json` (the request) · `trace.jsonl` (a line a stage, appended) · `checkpoint.json` (replaced atomically) ·
`results.json`, `profile.json`, `report.md`, pictures (the answer).

Files are replaced whole, never edited: a process that dies, or a disk that fills, leaves the old file or the new one.
The JSON is strict. In artefacts for readers a number that is not finite becomes `null`; in checkpoints, whose numbers
must come back exactly, it becomes `{"float": "NaN"}`, `{"float": "Infinity"}` or `{"float": "-Infinity"}`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from discopt.encoding import checksum, plain, restore
from discopt.errors import RunFolderError

RUN_FORMAT = "discopt-run"
CHECKPOINT_FORMAT = "discopt-checkpoint"
VERSION = 1  # of both formats

DISTRIBUTION = "discopt-search"  # the name on the package index, where another project owns `discopt`

# What a run may leave behind, the request last: as long as it stands, the folder is known to be a run's.
ARTEFACTS = (
    "checkpoint.json",
    "heuristics.json",
    "heldout.json",
    "units.json",
    "trace.jsonl",
    "results.json",
    "profile.json",
    "profile.txt",
    "report.md",
    "report.html",
    "trace.png",
    "units.png",
    "run.json",
)

T = TypeVar("T")

_log = logging.getLogger(__name__)


class RunFolder:
    """One run's folder. Make one with `create` or `open`."""

    def __init__(self, path: Path, request: dict[str, Any]) -> None:
        self.path = path
        self.request = request  # run.json's content

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
        occupied = cls.check_free(path, force=force, artefacts=artefacts)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _os_error("cannot make the run folder", path, error) from error
        if occupied:
            _remove_run(path, names)
        own = {"format": RUN_FORMAT, "version": VERSION, "created": datetime.now(UTC).isoformat(timespec="seconds")}
        folder = cls(path, {**own, **request, "versions": {**versions(), **request.get("versions", {})}})
        folder.write_json("run.json", folder.request)
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
            raise _os_error("cannot read the folder", path, error) from error
        if occupied:
            _check_replaceable(path, occupied, force)
        return occupied

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """The folder of a run that was begun before; RunFolderError if it is none, or is newer than this program."""
        path = Path(path)
        if not path.exists():
            raise RunFolderError(f"{path} does not exist")
        if not (path / "run.json").is_file():
            raise RunFolderError(f"{path} is not a run folder: it has no run.json")
        request = _read_object(path / "run.json")
        _check_format(path / "run.json", request, RUN_FORMAT)
        if not isinstance(request.get("command"), str):
            raise RunFolderError(f"{path / 'run.json'} is damaged: it does not say which command began the run")
        return cls(path, request)

    def update_request(self, **changes: Any) -> None:
        """Replace run.json with one that holds `changes` as well."""
        request = {**self.request, **changes}
        self.write_json("run.json", request)
        self.request = request

    def discard(self) -> None:
        """Remove the run's files, and the folder if nothing else is in it: for a run that turns out to be none."""
        _remove_run(self.path, ARTEFACTS)
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def remove_leftovers(self) -> None:
        """Remove the temporary files of a process that was killed while writing; for the folder's only writer."""
        for name in ARTEFACTS:
            _remove_temporary(self.path, name)

    def has(self, name: str) -> bool:
        return self._file(name).is_file()

    def write_json(self, name: str, obj: Any) -> None:
        """Write `obj`; numpy arrays become lists, numbers that are not finite become null."""
        text = json.dumps(plain(obj, exact=False), indent=2, ensure_ascii=False, allow_nan=False)
        write_atomic(self._file(name), text + "\n")

    def read_json(self, name: str) -> Any:
        """Raises RunFolderError if the file is missing or is not JSON."""
        return _read_json(self._file(name))

    def write_text(self, name: str, text: str) -> None:
        write_atomic(self._file(name), text)

    def append_trace(self, line: Mapping[str, Any]) -> None:
        """Add one line to trace.jsonl, behind the last whole one; on failure the file is as it was before."""
        path = self._file("trace.jsonl")
        data = json.dumps(plain(line, exact=False), ensure_ascii=False, allow_nan=False).encode() + b"\n"
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
            raise _os_error("cannot write", path, error) from error

    def trace(self) -> list[dict[str, Any]]:
        """All whole lines; a last one that was cut off when the process died is left out."""
        path = self._file("trace.jsonl")
        lines = []
        for number, data in enumerate(self._trace_lines(), start=1):
            try:
                line = json.loads(data)
            except ValueError as error:
                raise RunFolderError(f"{path} is damaged: line {number} is not JSON; {_START_AGAIN}") from error
            if not isinstance(line, dict):
                raise RunFolderError(f"{path} is damaged: line {number} is not a JSON object; {_START_AGAIN}")
            lines.append(line)
        return lines

    def truncate_trace(self, lines: int) -> None:
        """Keep the first `lines` lines; RunFolderError if there are fewer."""
        if lines < 0:
            raise ValueError(f"lines must not be negative, got {lines}")
        path = self._file("trace.jsonl")
        whole = self._trace_lines()
        if len(whole) < lines:
            raise RunFolderError(
                f"{path} is damaged: it has {len(whole)} whole lines, "
                f"the checkpoint was made after {lines}; {_START_AGAIN}"
            )
        if path.exists():
            write_atomic(path, b"".join(line + b"\n" for line in whole[:lines]))

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint; the trace it belongs to is on the disk before it."""
        self._flush_trace()
        exact = plain(state, exact=True)
        document = {"format": CHECKPOINT_FORMAT, "version": VERSION, "checksum": checksum(exact), "state": exact}
        write_atomic(self._file("checkpoint.json"), json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n")

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last state saved, exactly; None if there is none, RunFolderError if it is not what was saved."""
        path = self._file("checkpoint.json")
        if not path.exists():
            return None
        document = _read_object(path)
        _check_format(path, document, CHECKPOINT_FORMAT)
        state = document.get("state")
        if not isinstance(state, dict) or document.get("checksum") != checksum(state):
            raise RunFolderError(f"{path} is damaged: its content does not match its checksum; {_START_AGAIN}")
        restored: dict[str, Any] = restore(state)
        return restored

    def _file(self, name: str) -> Path:
        if name in ("", ".", "..") or any(separator in name for separator in "/\\\0"):
            raise ValueError(f"expected the plain name of a file in the run folder, got {name!r}")
        return self.path / name

    def _trace_lines(self) -> list[bytes]:
        path = self._file("trace.jsonl")
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _os_error("cannot read", path, error) from error
        return data.split(b"\n")[:-1]  # what follows the last newline is a line cut off, or nothing

    def _flush_trace(self) -> None:
        path = self._file("trace.jsonl")
        try:
            with contextlib.suppress(FileNotFoundError), open(path, "r+b") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise _os_error("cannot write", path, error) from error


def request_of(kind: type[T], options: Mapping[str, Any]) -> T:
    """The request, a dataclass that checks itself, that run.json holds as `options`; lists become tuples.

    Raises RunFolderError if they make no such request.
    """
    try:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in options.items()})
    except (TypeError, ValueError, AttributeError) as error:
        raise RunFolderError(f"the options in run.json are damaged: {error}") from error


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Put `data` at `path`, whole or not at all; text is written as UTF-8.

    A temporary file in the same folder is written, flushed to the disk and renamed over the old one. On failure it
    is removed and the old file stays; OSError becomes RunFolderError.
    """
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
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
            raise _os_error("cannot write", path, error) from error
        raise
    _flush_directory(path.parent)


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


_START_AGAIN = "start the run again in another folder, or with --force in this one"


def _check_replaceable(path: Path, occupied: list[str], force: bool) -> None:
    """Only a folder with a run.json of ours may be cleared, and only if that was asked for."""
    if "run.json" in occupied:
        try:
            ours = _read_object(path / "run.json").get("format") == RUN_FORMAT
        except RunFolderError:
            ours = False
    else:
        ours = False
    if not ours:
        raise RunFolderError(f"{path} holds {occupied[0]} but is not a run folder; choose another --out")
    if not force:
        raise RunFolderError(f"{path} exists already; choose another --out, or pass --force to replace it")


def _remove_run(path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        _remove_temporary(path, name)
        try:
            (path / name).unlink(missing_ok=True)
        except OSError as error:
            raise _os_error("cannot remove", path / name, error) from error


def _remove_temporary(path: Path, name: str) -> None:
    for leftover in path.glob(f".{name}.*.tmp"):
        try:
            leftover.unlink(missing_ok=True)
        except OSError as error:
            raise _os_error("cannot remove", leftover, error) from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise RunFolderError(f"{path} does not exist") from error
    except OSError as error:
        raise _os_error("cannot read", path, error) from error
    except (ValueError, RecursionError) as error:
        raise RunFolderError(f"{path} is damaged: it is not whole JSON; {_START_AGAIN}") from error


def _read_object(path: Path) -> dict[str, Any]:
    document = _read_json(path)
    if not isinstance(document, dict):
        raise RunFolderError(
            f"{path} is damaged: expected a JSON object, got {type(document).__name__}; {_START_AGAIN}"
        )
    return document


def _check_format(path: Path, document: Mapping[str, Any], expected: str) -> None:
    """Ours, and not newer than this program."""
    if document.get("format") != expected:
        raise RunFolderError(f"{path} is not ours: expected the format {expected!r}, got {document.get('format')!r}")
    version = document.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise RunFolderError(f"{path} is damaged: it has no format version; {_START_AGAIN}")
    if version > VERSION:
        raise RunFolderError(
            f"{path} was written by a newer discopt (format version {version}, this one reads up to {VERSION}); "
            "update discopt"
        )


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


def _flush_directory(path: Path) -> None:
    """Make a rename last through a power cut, where the system can."""
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


def _os_error(what: str, path: Path, error: OSError) -> RunFolderError:
    return RunFolderError(f"{what} {path}: {error.strerror or error}")
