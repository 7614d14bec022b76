"""A student as one GGUF file, which llama.cpp and transformers load: `discopt llm export --to gguf`.

A model that came from a GGUF file keeps that file's metadata and tokenizer, and every tensor that has no level of its
own byte for byte; of a Hugging Face checkpoint both are made anew. Levels of a bank of kind "gguf" are such bytes
already. The file is written beside its place, read by others and compared with the searched student, and only then
takes its place.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import quant_shape_to_byte_shape
from numpy.typing import NDArray

from discopt.errors import RunFolderError
from discopt_llm.bank_forms import Ggml
from discopt_llm.errors import ModelError
from discopt_llm.export.folder import new_file, set_aside
from discopt_llm.export.gguf_contents import DTYPES, Contents, Stored, contents_of_file, contents_of_model, write
from discopt_llm.export.gguf_families import family_of, value
from discopt_llm.export.gguf_layout import Layout, Place
from discopt_llm.export.gguf_proof import proved
from discopt_llm.export.gguf_prune import pruned
from discopt_llm.export.proof import UnfitError
from discopt_llm.export.student import DROP, StudentModel
from discopt_llm.layers import GGUF
from discopt_llm.models import LoadedModel, gguf_file_of

__all__ = ["GgufSummary", "contents_of", "write_gguf"]

FORMAT = "discopt-gguf"
VERSION = 1
NOTE = "discopt.format"  # the field whose value FORMAT says that the file is ours to replace
SUFFIX = ".gguf"


@dataclass(frozen=True)
class GgufSummary:
    """What was written."""

    path: Path
    architecture: str  # as llama.cpp calls it
    layers_before: int
    layers_after: int
    types: dict[str, int]  # how many weights there are of each
    bytes: int
    form: str  # for people: what is there, and what was done
    readers: tuple[str, ...]  # that loaded it and answered as the searched student does
    unread: tuple[str, ...]  # why others could not

    @property
    def verified(self) -> bool:
        """Another reader has loaded it, and answered as the searched student does."""
        return bool(self.readers)

    @property
    def sentence(self) -> str:
        """All of it, in one line."""
        proof = f"loaded by {' and '.join(self.readers)}, answers as the searched student does"
        if not self.verified:
            proof = "not verified"
        why = "".join(f" ({reason})" for reason in self.unread)
        return f"{self.path}: {self.form}; {self.bytes / 1e6:,.1f} MB; {proof}{why}"

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        return {**asdict(self), "path": str(self.path), "verified": self.verified}


def write_gguf(
    student: StudentModel, out: Path, *, dtype: str = "auto", force: bool = False, verify: bool = True
) -> GgufSummary:
    """Write a student's file to `out`, NAME.gguf.

    dtype: of matrices of a Hugging Face checkpoint that have no level of their own, "auto" is float16. force: replace
        a file that was written by this function, and nothing else. verify: have other readers load it and compare.

    Raises ModelError for a model or for levels that no such file can hold, and where a reader answers otherwise than
    the searched student; then the file is kept as NAME.gguf.unverified. RunFolderError if the place cannot be had.
    """
    if student.kind not in (DROP, GGUF):
        raise ModelError(
            f"no GGUF type holds levels of {student.kind} exactly; search a bank of --kind gguf, or export to hf or "
            "compressed-tensors"
        )
    target = _target(out, force=force)
    loaded = student.loaded
    family = family_of(loaded.model.config)
    layout = Layout(family, loaded.model.config)
    full = contents_of(loaded, dtype=dtype)
    if student.placed:
        full = _with_levels(full, student, layout)
    small = pruned(full, student.dropped, loaded.anatomy, family, layout)
    form = ", ".join(part for part in (small.words, student.what, _words(small.contents.types)) if part)
    contents = _noted(small.contents, loaded, form)
    rounded = DTYPES[dtype] if gguf_file_of(loaded.source) is None else None
    readers: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    with new_file(target, lambda: _target(out, force=force)) as file:
        write(contents, file)
        if verify:
            try:
                readers, unread = proved(student, family, contents, file, rounded)
            except UnfitError as unfit:
                kept = set_aside(file, target)
                raise ModelError(f"{unfit}; what was written is kept, unverified, as {kept}") from unfit
    return GgufSummary(
        path=target,
        architecture=contents.arch,
        layers_before=len(student.dropped),
        layers_after=len(small.kept),
        types=dict(contents.types),
        bytes=target.stat().st_size,
        form=form,
        readers=readers,
        unread=unread,
    )


def contents_of(loaded: LoadedModel, *, dtype: str = "auto") -> Contents:
    """The GGUF file of an uncompressed model: the one it came from, or a new one; see `contents_of_model`.

    Its `overhead` is what any file of the model takes besides the bytes of its tensors.
    """
    family = family_of(loaded.model.config)
    source = gguf_file_of(loaded.source)
    if source is None:
        return contents_of_model(loaded, family, Layout(family, loaded.model.config), dtype)
    contents = contents_of_file(source)
    if contents.arch != family.name:
        raise ModelError(f"expected {source} to have the architecture {family.name}, got {contents.arch}")
    return contents


def _with_levels(contents: Contents, student: StudentModel, layout: Layout) -> Contents:
    """With the bytes of a bank's levels where the student has any."""
    tensors = dict(contents.tensors)
    for name, (layer, _) in student.placed.items():
        for place in layout.places(name, layer.rows):
            if place.name not in tensors:
                raise ModelError(f"expected the GGUF file of {student.loaded.source} to have {place.name}, got none")
            tensors[place.name] = _level(student, name, place, tensors[place.name].weights)
    return Contents(contents.fields, tensors).with_file_type()


def _level(student: StudentModel, parameter: str, place: Place, weights: tuple[int, ...]) -> Stored:
    """A bank's bytes for a tensor of a shape (..., R, C), read when they are written."""
    first = student.form(parameter)
    assert isinstance(first, Ggml)
    kind = GGMLQuantizationType[first.type]
    shape = tuple(quant_shape_to_byte_shape(weights, kind))

    def make() -> NDArray[np.uint8]:
        form = student.form(parameter)
        assert isinstance(form, Ggml)
        return np.ascontiguousarray(place.of(form.data.numpy(), vector=False)).reshape(shape)

    return Stored(kind, shape, make)


def _words(types: Counter[str]) -> str:
    """Of the types that hold any matrices."""
    shares = [f"{100 * n / types.total():.0f}% {name}" for name, n in types.most_common() if n >= 0.005 * types.total()]
    return f"weights in {', '.join(shares)}"


def _noted(contents: Contents, loaded: LoadedModel, form: str) -> Contents:
    """With fields that say whose work the file is, and what was done."""
    notes = {"format": FORMAT, "version": VERSION, "source": loaded.source, "fingerprint": loaded.fingerprint}
    return contents.with_fields({f"discopt.{k}": value(v) for k, v in {**notes, "form": form}.items()})


def _target(out: Path, *, force: bool) -> Path:
    """Where the file goes; raises RunFolderError if that is not free."""
    target = Path(os.path.realpath(out))
    if target.suffix != SUFFIX:
        raise RunFolderError(f"expected --out to be a file NAME{SUFFIX} or a folder that is there, got {out}")
    if not target.exists():
        return target
    if not target.is_file() or not _is_ours(target):
        raise RunFolderError(f"{target} was not written by discopt; choose another --out")
    if not force:
        raise RunFolderError(f"{target} exists already; choose another --out, or pass --force to replace it")
    return target


def _is_ours(path: Path) -> bool:
    try:
        field = GGUFReader(path).get_field(NOTE)
    except (OSError, ValueError, KeyError, IndexError):
        return False
    return field is not None and field.contents() == FORMAT
