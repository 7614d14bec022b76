"""What a run folder holds, read for a report: without torch, the model, or the bank.

Runs made before a file was introduced lack it; what that leaves unknown is None, and the report says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from discopt.errors import RunFolderError
from discopt.folder import RunFolder
from discopt.lock import LOCK, OWNER
from discopt.sealed import sealed_text
from discopt.space import Levels
from discopt_llm.errors import ProfileError
from discopt_llm.profile import Profile, read_profile
from discopt_llm.report_units import Units

__all__ = ["DENSE", "FOUND", "Move", "RunRecord", "Samples", "samples_json"]

DENSE, FOUND = "dense", "evolved"  # what the table's first and last rows are called
_NEEDED = (  # of results.json
    *("rows", "heldout", "seed", "loss", "fidelity", "stop", "generations", "evaluations", "total_fidelity"),
    *("seconds", "not_finite"),
)
SAMPLES_FORMAT, SAMPLES_VERSION = "discopt-heldout", 1


@dataclass(frozen=True, eq=False)
class Samples:
    """What each method lost on each held-out sequence, (k, s); NaN where a student answers nothing finite."""

    methods: tuple[str, ...]  # (k,)
    kl: NDArray[np.float64]  # to the dense model, nats per token
    nll: NDArray[np.float64]  # nats per token

    def __post_init__(self) -> None:
        for name in ("kl", "nll"):
            table = getattr(self, name)
            if table.ndim != 2 or len(table) != len(self.methods) or table.shape != self.kl.shape:
                raise ValueError(f"{name} must have shape ({len(self.methods)}, s), got {table.shape}")

    def of(self, method: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """KL and negative log-likelihood of a method, (s,) each."""
        row = self.methods.index(method)
        return self.kl[row], self.nll[row]

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """What heldout.json holds; raises RunFolderError for anything else."""
        try:
            if (data["format"], data["version"]) != (SAMPLES_FORMAT, SAMPLES_VERSION):
                raise ValueError(f"expected {SAMPLES_FORMAT} {SAMPLES_VERSION}, got {data['format']} {data['version']}")
            kl, nll = (np.array(data[name], dtype=np.float64) for name in ("kl", "nll"))  # null becomes NaN
            return cls(tuple(map(str, data["methods"])), kl, nll)
        except (KeyError, TypeError, ValueError) as error:
            raise RunFolderError(f"heldout.json is damaged: {error}") from error


@dataclass(frozen=True, eq=False)
class Move:
    """A stage that ended with another best profile than it began with."""

    generation: int  # 0: the choice of the start
    tokens: int  # spent by then
    changes: tuple[tuple[int, int, int], ...]  # unit, level before, level after
    final: bool  # by the final choice, on text that the search had not seen


@dataclass(frozen=True, eq=False)
class RunRecord:
    """A run of `discopt llm` that has results."""

    path: Path
    request: Mapping[str, Any]  # run.json
    results: Mapping[str, Any]  # results.json
    trace: Sequence[Mapping[str, Any]]
    profile: Profile
    units: Units
    samples: Samples | None  # None: the run has not kept them
    moves: tuple[Move, ...] | None  # in order; None: the run has not kept them
    files: tuple[str, ...]  # names of all that is in the folder, or is about to be

    @classmethod
    def read(cls, path: Path, results: Mapping[str, Any] | None = None) -> Self:
        """Read a run folder; `results` are those that are about to be written there.

        Raises RunFolderError for what is no run of a search over a model, has no results yet, or is damaged.
        """
        folder = RunFolder.open(path)
        if results is None:
            if not folder.has("results.json"):
                raise RunFolderError(f"{path} has no results yet; finish it with: discopt resume {path}")
            results = folder.read_json("results.json")
        if not {"met", "asked"} <= results.keys() or not folder.has("profile.json"):
            what = folder.request["command"]
            raise RunFolderError(f"{path} is no run of a search over a language model, but of `discopt {what}`")
        if missing := [key for key in _NEEDED if key not in results]:
            raise RunFolderError(f"{path / 'results.json'} is damaged: it has no {', '.join(missing)}")
        try:
            profile = read_profile(path)
        except ProfileError as error:
            raise RunFolderError(str(error)) from error
        if not isinstance(profile, Profile):
            raise RunFolderError(f"{path / 'profile.json'} is not a profile of ours")
        trace = folder.whole_trace()
        samples = Samples.from_json(folder.read_json("heldout.json")) if folder.has("heldout.json") else None
        if samples is not None and list(samples.methods) != [row["method"] for row in results["rows"]]:
            samples = None  # of an earlier part of a run that was stopped again before its table
        return cls(
            path=path,
            request=folder.request,
            results=results,
            trace=trace,
            profile=profile,
            units=_units(folder, profile),
            samples=samples,
            moves=_moves(trace, profile.levels),
            files=tuple(sorted({"results.json", *(p.name for p in path.iterdir() if p.is_file())} - {LOCK, OWNER})),
        )

    @property
    def row(self) -> Mapping[str, Any] | None:
        """The held-out row of the profile that was found; None if it was not measured."""
        return self.row_of(FOUND)

    def row_of(self, method: str) -> Mapping[str, Any] | None:
        """The held-out row of a method, None if there is none."""
        return next((row for row in self.results["rows"] if row["method"] == method), None)

    @property
    def size(self) -> float | None:
        """Bytes of the student over those of its dense model, both as the table has them."""
        found, dense = self.row, self.row_of(DENSE)
        return found["bytes"] / dense["bytes"] if found and dense and dense["bytes"] else None

    @property
    def model(self) -> str:
        """As it was asked for."""
        return str(self.request.get("options", {}).get("model", self.profile.model_source))


def samples_json(methods: Sequence[str], kl: NDArray[np.float64], nll: NDArray[np.float64]) -> str:
    """heldout.json: what each of k methods lost on each of s sequences, (k, s); the inverse is `Samples.from_json`."""
    document = {"format": SAMPLES_FORMAT, "version": SAMPLES_VERSION, "methods": methods, "kl": kl, "nll": nll}
    return sealed_text(document)


def _units(folder: RunFolder, profile: Profile) -> Units:
    if not folder.has("units.json"):
        return Units.of_profile(profile)
    units = Units.from_json(folder.read_json("units.json"))
    if units.names != profile.names:
        raise RunFolderError(f"{folder.path}: units.json and profile.json are of different units")
    return units


def _moves(trace: Sequence[Mapping[str, Any]], found: Levels) -> tuple[Move, ...] | None:
    """The moves that end in the profile found, (n,); None if the trace does not say, or not of every stage."""
    if not trace or not all("moved" in line for line in trace):
        return None
    moves = [
        Move(
            int(line["generation"]),
            int(line["total_fidelity"]),
            tuple((int(unit), int(before), int(after)) for unit, before, after in line["moved"]),
            line.get("phase") == "choice",
        )
        for line in trace
        if line["moved"]
    ]
    levels = found.copy()
    for move in reversed(moves):
        for unit, before, after in move.changes:
            if not 0 <= unit < len(levels) or levels[unit] != after:
                return None
            levels[unit] = before
    return tuple(moves)
