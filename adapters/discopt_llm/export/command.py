"""`discopt llm export`: the student of a run in a format that other programs load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import PretrainedConfig

from discopt_llm.export import deci, gguf_families, gguf_file, hf, packed
from discopt_llm.export.student import StudentModel

__all__ = ["FORMATS", "ExportRequest", "Exported", "Format", "export_run"]


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What was asked of `discopt llm export`; raises ValueError for values that make no sense."""

    run: Path
    to: str  # one of FORMATS
    out: Path
    banks: tuple[str, ...] = ()
    runtime: str | None = None  # whose rules the file must meet beyond those of its format
    dtype: str = "auto"
    device: str = "auto"
    force: bool = False
    verify: bool = True

    def __post_init__(self) -> None:
        if self.to not in FORMATS:
            raise ValueError(f"the format must be one of {', '.join(FORMATS)}, got {self.to!r}")
        known = FORMATS[self.to].runtimes
        if self.runtime is not None and self.runtime not in known:
            some = f"one of {', '.join(known)}" if known else "left out"
            raise ValueError(f"for {self.to} --for must be {some}, got {self.runtime!r}")


class Exported(Protocol):
    """What was written."""

    @property
    def path(self) -> Path: ...

    @property
    def bytes(self) -> int:
        """Of all its files."""
        ...

    @property
    def verified(self) -> bool:
        """Loaded again by another reader, and its logits equal the searched student's."""
        ...

    @property
    def sentence(self) -> str:
        """All of it, in one line."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        ...


@dataclass(frozen=True)
class Format:
    """A format of files."""

    write: Callable[[StudentModel, ExportRequest], Exported]
    refuse: Callable[[PretrainedConfig], None] = lambda _: None  # raises ModelError for a family it cannot hold
    runtimes: tuple[str, ...] = ()  # whose rules it can be held to


def _hf(student: StudentModel, request: ExportRequest) -> Exported:
    return hf.write_student(student, request.out, force=request.force, verify=request.verify)


def _packed(student: StudentModel, request: ExportRequest) -> Exported:
    return packed.write_packed(
        student, request.out, runtime=request.runtime, force=request.force, verify=request.verify
    )


def _deci(student: StudentModel, request: ExportRequest) -> Exported:
    return deci.write_deci(student, request.out, force=request.force, verify=request.verify)


def _gguf(student: StudentModel, request: ExportRequest) -> Exported:
    out = request.out / f"{request.run.resolve().name}.gguf" if request.out.is_dir() else request.out
    return gguf_file.write_gguf(student, out, dtype=request.dtype, force=request.force, verify=request.verify)


FORMATS: dict[str, Format] = {
    "hf": Format(_hf),
    "gguf": Format(_gguf, gguf_families.refuse),
    "compressed-tensors": Format(_packed, packed.refuse, packed.RUNTIMES),
    "deci": Format(_deci, deci.refuse),
}
"""Every format by its name."""


def export_run(request: ExportRequest) -> Exported:
    """Write the student of a run; what the format cannot hold is refused before any weights are read.

    Raises ProfileError, BankError, ModelError or RunFolderError; then nothing new is at `out`.
    """
    form = FORMATS[request.to]
    student = StudentModel.of_run(
        request.run, banks=request.banks, device=request.device, dtype=request.dtype, check_config=form.refuse
    )
    return form.write(student, request)
