"""A problem of the user's own, named on the command line as FILE.py:NAME or module:NAME.

Loading runs the user's code. What is wrong there becomes a DiscoptError of one line that says where.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from discopt.errors import DiscoptError, ObjectiveError
from discopt.wording import one_line

if TYPE_CHECKING:
    from discopt.problems import Problem


@dataclass(frozen=True, eq=False)
class Loaded:
    """A problem, and the file whose code made it."""

    problem: Problem
    path: Path | None  # None for a module without a file

    @property
    def checksum(self) -> str | None:
        """SHA-256 of the file: whether a resumed run still runs the code it began with."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest() if self.path is not None else None


def split_target(target: str) -> tuple[str, str]:
    """`"dir/own.py:knapsack"` -> `("dir/own.py", "knapsack")`; ValueError for anything else."""
    where, colon, name = target.rpartition(":")
    if not colon or not where or not name.isidentifier():
        raise ValueError(f"expected FILE.py:NAME or module:NAME, got {target[:100]!r}")
    return where, name


def load_problem(target: str, directory: str | os.PathLike[str] = ".") -> Loaded:
    """The problem that `target` names; files and modules are looked for in `directory`.

    NAME is a `discopt.problems.Problem`, or a function without required arguments that returns one. Raises
    ValueError for a target that is not written FILE.py:NAME or module:NAME, DiscoptError for all else.
    """
    where, name = split_target(target)
    module = _load_module(where, Path(directory))
    if not hasattr(module, name):
        found = ", ".join(_candidates(module)) or "none that is a Problem or makes one"
        raise DiscoptError(f"{one_line(where)} has no {name[:100]!r}; it has: {one_line(found)}")
    path = Path(module.__file__) if module.__file__ else None
    return Loaded(_as_problem(getattr(module, name), target, path), path)


def explain(error: ObjectiveError, path: Path | None) -> str:
    """The error's text, with the place in the user's file where the objective failed."""
    place = _place(error.__cause__, path) if error.__cause__ is not None else ""
    return f"{error} ({place})" if place else str(error)


def _load_module(where: str, directory: Path) -> ModuleType:
    if where.endswith(".py") or os.sep in where:
        return _load_file(where, directory)
    _put_on_path(directory)
    try:
        with _users_code(where, None):
            return importlib.import_module(where)
    except ModuleNotFoundError as error:
        hint = f"; for a file, write {one_line(where)}.py:NAME" if _is_file(directory / f"{where}.py") else ""
        raise DiscoptError(f"there is no module {one_line(where)!r}{hint}") from error


def _load_file(where: str, directory: Path) -> ModuleType:
    if not _is_file(directory / where):
        raise DiscoptError(f"there is no file {one_line(where)}")
    path = (directory / where).resolve()
    name = _free_module_name(path.stem)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise DiscoptError(f"{one_line(where)} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _put_on_path(path.parent)
    try:
        with _users_code(where, path):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or has a null byte
        return False


def _free_module_name(stem: str) -> str:
    """A name under which the user's file hides no other module: random.py must not become `random`."""
    try:
        taken = stem in sys.modules or importlib.util.find_spec(stem) is not None
    except (ImportError, ValueError):
        taken = False
    return f"discopt_file_{stem}" if taken or not stem.isidentifier() else stem


def _put_on_path(folder: Path) -> None:
    """Let the user's code import what lies beside it, as a script can, now and when its functions run."""
    entry = str(folder.resolve())
    if entry not in sys.path:
        sys.path.insert(0, entry)


@contextmanager
def _users_code(where: str, path: Path | None) -> Iterator[None]:
    """Turn whatever the user's code raises while it is loaded into one line."""
    try:
        yield
    except DiscoptError:
        raise
    except SyntaxError as error:
        place = f"{_short(error.filename)}:{error.lineno}"
        raise DiscoptError(f"cannot load {one_line(where)}: {one_line(error.msg)} ({one_line(place)})") from error
    except ModuleNotFoundError as error:
        if path is None and error.name is not None and (where == error.name or where.startswith(f"{error.name}.")):
            raise
        raise _failed(where, error, path) from error
    except (Exception, SystemExit) as error:
        raise _failed(where, error, path) from error


def _failed(where: str, error: BaseException, path: Path | None) -> DiscoptError:
    place = _place(error, path)
    what = one_line(" ".join(f"{type(error).__name__}: {error}".split()).rstrip(": "))
    return DiscoptError(f"cannot load {one_line(where)}: {what}" + (f" ({place})" if place else ""))


def _as_problem(value: Any, target: str, path: Path | None) -> Problem:
    from discopt.problems import Problem

    if inspect.isroutine(value):
        required = [p.name for p in inspect.signature(value).parameters.values() if _is_required(p)]
        if required:
            wanted = one_line(", ".join(required))
            raise DiscoptError(f"{one_line(target)} must work without arguments, but it requires {wanted}")
        with _users_code(target, path):
            value = value()
    if not isinstance(value, Problem):
        raise DiscoptError(
            f"{one_line(target)} must be a discopt.problems.Problem or return one, got {type(value).__name__}"
        )
    return value


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind not in (
        parameter.VAR_POSITIONAL,
        parameter.VAR_KEYWORD,
    )


def _candidates(module: ModuleType) -> list[str]:
    """Names in the module that are problems, or functions of its own that need no arguments."""
    from discopt.problems import Problem

    names = []
    for name, value in vars(module).items():
        own = inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
        if isinstance(value, Problem) or (
            own and not any(map(_is_required, inspect.signature(value).parameters.values()))
        ):
            names.append(name)
    return names


def _place(error: BaseException | None, path: Path | None) -> str:
    """`own.py:12`: the last line of the traceback in the user's file, or in its folder; empty if there is none."""
    if error is None or path is None:
        return ""
    frames = [(Path(frame.filename).resolve(), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    own = [frame for frame in frames if frame[0] == path.resolve()]
    return f"{_short(own[-1][0])}:{own[-1][1]}" if own else ""


def _short(path: str | Path | None) -> str:
    """The path as seen from here, where that is shorter."""
    if path is None:
        return "?"
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
