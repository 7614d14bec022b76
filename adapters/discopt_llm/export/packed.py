"""A student with its quantized layers packed, in the compressed-tensors format that transformers and vLLM read.

Codes, scales and zero points are those of the bank, bit by bit; the rest is in 16 bits. What depth pruning takes away
is handled as in a dense checkpoint, but the layers of a sub-block that stays silent are packed zeros. Pruned layers of
a mixed student have no form there: they are stored dense.

The config calls for weights in the model's own data type of 16 bits. Scales are in half precision in the files: a
model that is loaded in bfloat16 rounds them to that.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from discopt_llm.errors import ModelError
from discopt_llm.export.hf import CheckpointSummary, write_student
from discopt_llm.export.plan import Plan, count
from discopt_llm.export.proof import Student, UnfitError, unfit_if
from discopt_llm.export.schemes import (
    Scheme,
    check_library,
    library,
    packed_tensors,
    quantization_config,
    reads_zero_points,
    unpacked_weights,
    zero_points_mended_,
    zeros_of,
)
from discopt_llm.export.student import StudentModel
from discopt_llm.export.vllm import StoredLayer, broken_rules, search_options
from discopt_llm.layers import Layer
from discopt_llm.levels import BankLevels
from discopt_llm.quantization import Quantized

__all__ = ["RUNTIMES", "refuse", "write_packed"]

RUNTIMES = ("vllm",)
QUANTIZATION = "quantization"  # kind of bank


def refuse(config: PretrainedConfig) -> None:
    """Raise ModelError, with the family's name, for a model with layers that are no modules of their own."""
    check_library()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception:  # code of the model's own, or a config that loading will complain about
        return
    depth = config.get_text_config().num_hidden_layers
    for blocks in model.modules():
        if isinstance(blocks, nn.ModuleList) and len(blocks) == depth:
            _check_blocks(blocks, str(config.model_type))


def write_packed(
    student: StudentModel,
    out: Path,
    *,
    runtime: str | None = None,
    force: bool = False,
    verify: bool = True,
) -> CheckpointSummary:
    """Write a student as a compressed-tensors checkpoint to the folder `out`, and prove it as `write_checkpoint` does.

    Besides, the library must unpack every packed layer to the very weights of the bank. `runtime` is a program whose
    rules must be met as well. Raises as `write_checkpoint`, and ModelError for a student that the format, or the
    runtime, cannot hold.
    """
    check_library()
    packed = _Packed(student)
    _check_forms(student, packed)
    broken = broken_rules([*packed.stored_layers])
    if runtime is not None and broken:
        reasons = [*(rule.what for rule in broken), search_options(broken)]
        raise ModelError(f"vLLM would not run this student: {'; '.join(filter(None, reasons))}")
    return write_student(student, out, stored="packed", layout=packed, force=force, verify=verify)


@dataclass(frozen=True, eq=False)
class _Packed:
    """How the tensors of one student lie in the files."""

    student: StudentModel
    silent: ClassVar[str] = "kept as packed zeros"

    @cached_property
    def schemes(self) -> Mapping[str, Scheme]:
        """Of all layers that are packed, by the names of their parameters."""
        levels = self.student.levels
        assert isinstance(levels, BankLevels)
        found = {}
        for name, (layer, form) in self.student.placed.items():
            bank = levels.banks[form.bank]
            if bank.kind == QUANTIZATION:
                size = bank.settings["group_size"]
                whole = size is None or size >= layer.columns
                found[name] = Scheme(
                    int(bank.labels[form.level]), bank.settings["symmetric"], None if whole else int(size)
                )
        narrowest = min((scheme.bits for scheme in found.values()), default=0)
        zeros = {layer.parameter_name: Scheme(narrowest, True, None) for layer in self.unused} if narrowest else {}
        return {**found, **zeros}

    @cached_property
    def unused(self) -> tuple[Layer, ...]:
        """The layers of dropped sub-blocks, which are zeros where they cannot be left out."""
        dropped = self.student.dropped
        place = {"attention": 0, "mlp": 1}
        return tuple(
            layer
            for layer in self.student.loaded.layers
            if layer.kind in place and dropped[layer.block, place[layer.kind]]
        )

    @cached_property
    def dense(self) -> tuple[str, ...]:
        """Replaced parameters that are not packed."""
        return tuple(name for name in self.student.placed if name not in self.schemes)

    @property
    def stored_layers(self) -> Iterator[StoredLayer]:
        """All layers, as they are stored."""
        for layer in self.student.loaded.layers:
            yield StoredLayer(
                layer.name,
                layer.block,
                layer.kind,
                layer.input,
                layer.rows,
                layer.columns,
                self.schemes.get(layer.parameter_name),
            )

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of what is not packed."""
        return self._sixteen_bits[0]

    @cached_property
    def _sixteen_bits(self) -> tuple[torch.dtype, bool]:
        """A data type for the rest, and whether no value is rounded: the model's own, or what it was made from."""
        model = self.student.loaded.model
        if model.dtype in (torch.float16, torch.bfloat16):
            return model.dtype, True
        rest = [p for name, p in model.named_parameters() if name not in self.schemes]
        for dtype in (torch.bfloat16, torch.float16):
            if all(torch.equal(p, p.to(dtype).to(p.dtype)) for p in rest):
                return dtype, True
        fits = all(bool(p.half().isfinite().all()) for p in rest)
        return (torch.float16 if fits else torch.bfloat16), False

    @property
    def proof(self) -> str:
        """What verifying it shows."""
        mended = "" if self.loads else f" by transformers with {library()} mended"
        return f"loaded back{mended}, packed weights are the bank's and its logits equal the searched student's"

    @cached_property
    def loads(self) -> bool:
        """Whether transformers loads it with the installed library."""
        return all(scheme.symmetric for scheme in self.schemes.values()) or reads_zero_points()

    def stored(self, plan: Plan, shell: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The packed layers in place of the dense ones, the rest in 16 bits."""
        modules = self._modules(plan)
        cast = _Cast(self.dtype)
        stored = {name: cast(tensor) for name, tensor in tensors.items() if name.removesuffix(".weight") not in modules}
        for module, name in modules.items():
            stored |= {f"{module}.{part}": tensor for part, tensor in packed_tensors(self._form(name)).items()}
        shell.to(self.dtype)  # type: ignore[arg-type]
        linear = [name for name, module in shell.named_modules() if isinstance(module, nn.Linear)]
        ignored = [name for name in linear if name not in modules]
        shell.config.quantization_config = quantization_config(self._schemes(modules), ignored)
        return stored

    def finish_(self, plan: Plan, folder: Path) -> None:
        pass

    def check(self, plan: Plan, student: Student, folder: Path) -> None:
        """The library unpacks the bank's weights, and transformers gives the student's logits."""
        modules = self._modules(plan)
        schemes = self._schemes(modules)
        with unfit_if("what was written cannot be unpacked"):
            for module, tensors in _by_module(folder, modules):
                form = self._form(modules[module])
                if not torch.equal(unpacked_weights(tensors, schemes[module]), form.dequantized()[0]):
                    raise UnfitError(f"{module} unpacks to other weights than those of the bank")
        exact = self._sixteen_bits[1]
        with zero_points_mended_(), redirect_stderr(io.StringIO()):  # the library draws bars that nothing switches off
            student.check(folder, stored=None if exact else self.dtype)

    def remarks(self, plan: Plan, folder: Path) -> tuple[str, ...]:
        """Its size beside what the search counted, and who reads it."""
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        counted = self.student.bytes
        parts = [f"weights {weights / 1e6:,.1f} MB, {weights / counted - 1:+.1%} from what the search counted"]
        if self.dense:
            parts.append(f"{count(len(self.dense), 'pruned layer')} stored dense")
        broken = broken_rules([*self.stored_layers])
        parts.append(f"breaks vLLM's rules ({search_options(broken)})" if broken else "meets vLLM's rules")
        if not self.loads:
            parts.append(f"transformers cannot load zero points with {library()} (search with --symmetric)")
        return tuple(parts)

    def _modules(self, plan: Plan) -> dict[str, str]:
        """The packed modules that are written, as the checkpoint calls them -> names of their parameters here."""
        named = {plan.renamed(name): name for name in self.schemes}
        return {new.removesuffix(".weight"): name for new, name in named.items() if new is not None}

    def _schemes(self, modules: Mapping[str, str]) -> dict[str, Scheme]:
        return {module: self.schemes[name] for module, name in modules.items()}

    def _form(self, name: str) -> Quantized:
        """A packed layer, on the CPU."""
        if name in self.student.placed:
            form = self.student.form(name)
            assert isinstance(form, Quantized)
            return form
        layer = next(layer for layer in self.unused if layer.parameter_name == name)
        return zeros_of(layer.rows, layer.columns, self.schemes[name].bits)


class _Cast:
    """Floating-point tensors in another data type; those that share memory still do."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._done: dict[tuple[int, torch.Size, tuple[int, ...]], Tensor] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if key not in self._done:
            self._done[key] = tensor.to(self.dtype)
        return self._done[key]


def _by_module(folder: Path, modules: Iterable[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tensors of each module, by their names in it, as they lie in the files of a folder."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    files = json.loads(index.read_text())["weight_map"] if index.is_file() else None
    if files is None:
        with safe_open(single, "pt") as file:
            files = dict.fromkeys(file.keys(), single.name)
    names: dict[str, list[str]] = {}
    for name in files:
        names.setdefault(name.rpartition(".")[0], []).append(name)
    for module in modules:
        tensors = {}
        for name in names.get(module, []):
            with safe_open(folder / files[name], "pt") as file:
                tensors[name.rpartition(".")[2]] = file.get_tensor(name)
        yield module, tensors


# -- refusals --------------------------------------------------------------------------------------------------


def _check_blocks(blocks: nn.ModuleList, family: str) -> None:
    """Every matrix in the blocks of a model is that of a linear module; routers do not matter."""
    weights = [
        (module, name, parameter)
        for module in blocks.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1
        and not isinstance(module, nn.Linear)
        and not type(module).__module__.startswith("torch.nn.")
    ]
    lists = [len(module) for module in blocks.modules() if isinstance(module, nn.ModuleList) and module is not blocks]
    experts = max([len(p) for _, _, p in weights if p.dim() == 3] + lists, default=0)
    for module, name, parameter in weights:
        if parameter.dim() == 3 or min(parameter.shape) > experts:
            what = "stacked matrices of experts" if parameter.dim() == 3 else f"{type(module).__name__} modules"
            raise ModelError(
                f"compressed-tensors holds layers that are nn.Linear modules of their own; "
                f"{family} has {what} ({name} of {type(module).__name__})"
            )


def _check_forms(student: StudentModel, packed: _Packed) -> None:
    """The student has something to pack, and all of it can be."""
    if not isinstance(student.levels, BankLevels) or not packed.schemes:
        raise ModelError(
            f"compressed-tensors holds quantized layers; this student of kind {student.kind} has none; try --to hf"
        )
    layers = {layer.parameter_name: layer for layer in student.loaded.layers}
    for name in packed.schemes:
        layer = layers[name]
        if not isinstance(layer.owner, nn.Linear):
            raise ModelError(
                f"compressed-tensors holds layers that are nn.Linear modules of their own; {layer.name} of "
                f"{student.loaded.model.config.model_type} is one of {type(layer.owner).__name__}"
            )
    sizes = {scheme.group_size for scheme in packed.schemes.values() if scheme.group_size is not None}
    for name, scheme in packed.schemes.items():
        if scheme.group_size is not None and layers[name].columns % scheme.group_size:
            common = gcd(*sizes, *(layers[other].columns for other in packed.schemes))
            raise ModelError(
                f"compressed-tensors takes groups that are all of one size, got {layers[name].columns} columns in "
                f"groups of {scheme.group_size} in {layers[name].name}; search with --group-size {common}"
            )
