"""What a GGUF file holds, read from one or made of a model, and written through the gguf library.

Tensors are made when they are written, one at a time. They are bytes throughout: (..., bytes of a row) uint8, whatever
their type, as quantized ones cannot be anything else.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, Keys, LlamaFileType
from gguf.gguf_reader import ReaderField
from gguf.gguf_writer import GGUFValue
from gguf.quants import quant_shape_from_byte_shape, quant_shape_to_byte_shape
from numpy.typing import NDArray
from torch import Tensor

from discopt_llm.errors import ModelError, one_line
from discopt_llm.export.gguf_families import Family, Fields, head_dim, metadata, rope, value
from discopt_llm.export.gguf_layout import Layout
from discopt_llm.export.gguf_tokenizer import tokenizer_fields
from discopt_llm.models import LoadedModel

__all__ = ["DTYPES", "Contents", "Stored", "contents_of_file", "contents_of_model", "write"]

Bytes = NDArray[np.uint8]

F16, F32 = GGMLQuantizationType.F16, GGMLQuantizationType.F32
DTYPES = {"auto": torch.float16, "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_TYPES = {torch.float16: F16, torch.bfloat16: GGMLQuantizationType.BF16, torch.float32: F32}
_SINGLE = ("ffn_gate_inp.weight", "position_embd.weight")  # what llama.cpp wants in single precision, besides vectors
_VERSION_KEYS = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count")  # of the reader, not of the file


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor of a file."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]  # (..., bytes of a row)
    make: Callable[[], Bytes]

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape))

    @property
    def weights(self) -> tuple[int, ...]:
        """Its shape in weights: (..., C)."""
        return tuple(quant_shape_from_byte_shape(self.shape, self.type))

    @classmethod
    def of(cls, array: NDArray[Any], kind: GGMLQuantizationType) -> Stored:
        """A tensor that is there; float ones of any shape, others as bytes."""
        data = np.ascontiguousarray(array).view(np.uint8)
        return cls(kind, data.shape, lambda: data)

    @classmethod
    def zeros(cls, weights: tuple[int, ...], kind: GGMLQuantizationType = F16) -> Stored:
        """Weights of a shape (..., C), all zero: zero bytes, in every type."""
        shape = tuple(quant_shape_to_byte_shape(weights, kind))
        return cls(kind, shape, lambda: np.zeros(shape, dtype=np.uint8))

    def changed(self, change: Callable[[Bytes], Bytes]) -> Stored:
        """With its bytes changed, and their shape kept."""
        return replace(self, make=lambda: change(self.make()))


@dataclass(frozen=True, eq=False)
class Contents:
    """All that a GGUF file says and holds, in order."""

    fields: Fields
    tensors: dict[str, Stored]

    @property
    def arch(self) -> str:
        """What llama.cpp calls its architecture."""
        return _text(self.fields[Keys.General.ARCHITECTURE])

    @property
    def alignment(self) -> int:
        """Tensors begin at multiples of it, bytes."""
        field = self.fields.get(Keys.General.ALIGNMENT)
        return gguf.GGUF_DEFAULT_ALIGNMENT if field is None else int(field.value)

    @property
    def types(self) -> Counter[str]:
        """How many weights there are of each type."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors.values():
            counts[tensor.type.name] += int(np.prod(tensor.weights))
        return counts

    @property
    def overhead(self) -> int:
        """What the file takes besides the bytes of its tensors."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "head.gguf"
            _begun(self, path).close()
            head = path.stat().st_size
        sizes = [head, *(tensor.bytes for tensor in self.tensors.values())]
        return head + sum(-size % self.alignment for size in sizes)

    @property
    def bytes(self) -> int:
        """Of the file."""
        return self.overhead + sum(tensor.bytes for tensor in self.tensors.values())

    def own(self, key: str) -> Any:
        """The value of an architecture's field, None if it lacks it."""
        field = self.fields.get(f"{self.arch}.{key}")
        return None if field is None else field.value

    def with_fields(self, fields: Fields) -> Contents:
        """With other or more fields."""
        return replace(self, fields=self.fields | fields)

    def with_file_type(self) -> Contents:
        """With the fields that name the type that most weights have."""
        ((most, _),) = self.types.most_common(1)
        names = ("ALL_F32",) if most == "F32" else (f"MOSTLY_{most}", f"MOSTLY_{most}_M")
        known = [LlamaFileType[name].value for name in names if name in LlamaFileType.__members__]
        number = known[0] if known else LlamaFileType.GUESSED.value
        return self.with_fields(
            {
                Keys.General.FILE_TYPE: value(number),
                Keys.General.QUANTIZATION_VERSION: value(gguf.GGML_QUANT_VERSION),
            }
        )


def contents_of_file(path: Path) -> Contents:
    """All of a GGUF file but empty lists, its tensors mapped from the disk; ModelError for one that cannot be read."""
    try:
        reader = GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ModelError(f"cannot read {path} as a GGUF file: {one_line(error)}") from error
    if reader.byte_order != "I":
        raise ModelError(f"expected {path} to have this machine's byte order, got the other one")
    fields = {key: _field(field) for key, field in reader.fields.items() if key not in _VERSION_KEYS and field.data}
    return Contents(fields, {t.name: Stored.of(t.data, t.tensor_type) for t in reader.tensors})


def contents_of_model(loaded: LoadedModel, family: Family, layout: Layout, dtype: str = "auto") -> Contents:
    """What a GGUF file of a model holds: vectors and routers in F32, all else in F16 or in `dtype`.

    Raises ModelError for a model with a parameter, or a tokenizer, that a GGUF file has no place for.
    """
    model, config = loaded.model, loaded.model.config
    fields = metadata(family, config)
    fields["general.name"] = value(loaded.source.rstrip("/").rpartition("/")[2])
    fields |= tokenizer_fields(loaded.tokenizer, config.vocab_size)
    tensors: dict[str, Stored] = {}
    if rope(config).get("rope_type") == "llama3":
        tensors["rope_freqs.weight"] = Stored.of(_frequency_factors(loaded), F32)
    inside = f"{loaded.anatomy.layers_name}."
    for name, parameter in model.named_parameters():
        turned = family.transposed and name.startswith(inside) and parameter.dim() == 2
        stored = parameter.mT if turned else parameter
        vector = parameter.dim() == 1
        offset = family.norm_offset if vector and "norm" in name else 0.0
        for place in layout.places(name, len(stored) if vector else stored.shape[-2]):
            kind = F32 if vector or place.name.endswith(_SINGLE) else _TYPES[DTYPES[dtype]]
            tensors[place.name] = _dense(stored, place.of, vector, offset, kind, name)
    return Contents(fields, tensors).with_file_type()


def write(contents: Contents, path: Path) -> None:
    """Write a GGUF file; raises OSError."""
    writer = _begun(contents, path)
    try:
        for tensor in contents.tensors.values():
            writer.write_tensor_data(tensor.make())
    finally:
        writer.close()


def _begun(contents: Contents, path: Path) -> GGUFWriter:
    """A file with all but the tensors' data."""
    writer = GGUFWriter(path, contents.arch)
    writer.data_alignment = contents.alignment
    for key, field in contents.fields.items():
        if key != Keys.General.ARCHITECTURE:  # it is there already
            writer.add_key_value(key, field.value, field.type, field.sub_type)
    for name, tensor in contents.tensors.items():
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.uint8), tensor.bytes, raw_dtype=tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def _dense(
    stored: Tensor,
    rows: Callable[..., NDArray[Any]],
    vector: bool,
    offset: float,
    kind: GGMLQuantizationType,
    name: str,
) -> Stored:
    """A parameter's rows in a floating-point type."""

    def make() -> Bytes:
        dense = rows(stored.detach().to("cpu", torch.float32).numpy(), vector=vector) + np.float32(offset)
        if kind == F16 and not np.abs(dense).max(initial=0.0) <= np.finfo(np.float16).max:
            raise ModelError(f"{name} has weights that half precision cannot hold; pass --dtype bfloat16 or float32")
        return gguf.quants.quantize(np.ascontiguousarray(dense), kind).view(np.uint8)

    share = rows(np.empty((*stored.shape[:-1], 0) if not vector else stored.shape, dtype=np.uint8), vector=vector)
    weights = share.shape if vector else (*share.shape[:-1], stored.shape[-1])
    return Stored(kind, tuple(quant_shape_to_byte_shape(weights, kind)), make)


def _frequency_factors(loaded: LoadedModel) -> NDArray[np.float32]:
    """By what llama.cpp divides every rotary frequency, (half a head,)."""
    config = loaded.model.config
    [rotary] = [m for n, m in loaded.model.named_modules() if n.endswith("rotary_emb") and hasattr(m, "inv_freq")]
    scaled = rotary.inv_freq.detach().double().cpu().numpy()
    dim = head_dim(config)
    plain = rope(config)["rope_theta"] ** -(np.arange(0, dim, 2) / dim)
    return (plain / scaled).astype(np.float32)


def _field(field: ReaderField) -> GGUFValue:
    """A field as the file has it; strings stay bytes, which need not be text."""
    kind, parts = field.types[0], field.parts
    if kind == GGUFValueType.STRING:
        return GGUFValue(bytes(parts[-1]), kind)
    if kind != GGUFValueType.ARRAY:
        return GGUFValue(parts[-1][0].item(), kind)
    sub_type = field.types[-1]
    if sub_type == GGUFValueType.STRING:
        return GGUFValue([bytes(parts[i]) for i in field.data], kind, sub_type)
    return GGUFValue([parts[i][0].item() for i in field.data], kind, sub_type)


def _text(field: GGUFValue) -> str:
    return field.value.decode() if isinstance(field.value, bytes) else str(field.value)
