"""A student of a model as a dense Hugging Face checkpoint that plain `from_pretrained` loads.

Blocks that lost both their sub-blocks are left out and the others renumbered; of every other dropped sub-block the
output projections are written as zeros. Weights that the student has instead of the model's are written in the
model's data type. The model in memory is as it was in the end: the files come from a model of the smaller config
that has no weights of its own, and from the tensors of the loaded one, replaced where the student has others.

A config may compute something from a layer's number (which layers are mixtures of experts, how wide a window is), so
leaving layers out can make another model. Then all layers are written, with zeros, and the summary says why.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from discopt_llm.anatomy import Anatomy, SubBlock
from discopt_llm.errors import ModelError
from discopt_llm.export.folder import check_target, new_folder, size
from discopt_llm.export.proof import Student, UnfitError, unfit_if, without_bars
from discopt_llm.models import LoadedModel
from discopt_llm.replay import weights_replaced_

__all__ = ["CheckpointSummary", "write_checkpoint"]

FORMAT = "discopt-hf"
VERSION = 1
NOTE = "discopt.json"  # what was done, for programs; its presence says that the folder is ours to replace

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointSummary:
    """What was written."""

    path: Path
    layers_before: int
    layers_after: int
    zeroed: int  # sub-blocks that are still there, with output projections of zeros
    bytes: int  # of all files
    form: str  # for people: which layers and sub-blocks are there, and why
    verified: bool  # loaded again, and its logits equal the searched student's
    replaced: int = 0  # parameters in it that are not the model's own

    @property
    def sentence(self) -> str:
        """All of it, in one line."""
        proof = "loaded back, its logits equal the searched student's" if self.verified else "not verified"
        return f"{self.path}: {self.form}; {self.bytes / 1e6:,.1f} MB; {proof}"

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        return {**asdict(self), "path": str(self.path)}


def write_checkpoint(
    loaded: LoadedModel,
    dropped: NDArray[np.bool_],
    out: str | os.PathLike[str],
    *,
    replaced: Mapping[str, Tensor] | None = None,
    what: str = "",
    force: bool = False,
    verify: bool = True,
) -> CheckpointSummary:
    """Write the model without its dropped sub-blocks, (blocks, 2) attention and MLP, to the folder `out`.

    `replaced` has the student's weights by the full names of the model's parameters, each of the parameter's shape
    and of any floating-point type; `what` says for the reader what they are: "quantized to 3.00 bits on average by
    GPTQ". The mapping may make its tensors when asked: it is asked for one at a time, but all of them, cast to the
    model's data type, are held beside the model until they are written, for transformers writes a model at once.

    With `verify` the files are loaded again, which takes the memory of a second model, and must give the logits of
    the loaded model with those weights and those sub-blocks skipped, with and without a cache. `force` replaces a
    checkpoint that was written by this function, and nothing else.

    Raises RunFolderError if `out` exists or cannot be written, ModelError if no form of the checkpoint gives these
    logits, ValueError as `weights_replaced_`. In all cases what was at `out` is still there, and nothing else is left.
    """
    decisions = np.asarray(dropped)
    blocks = loaded.anatomy.blocks
    if decisions.shape != (len(blocks), 2) or decisions.dtype != np.bool_:
        raise ValueError(f"dropped must be bool of shape ({len(blocks)}, 2), got {decisions.dtype} {decisions.shape}")
    if getattr(loaded.model.config, "quantization_config", None) is not None:
        raise ModelError(f"{loaded.source} is quantized; a checkpoint can be written of floating-point weights only")
    target = Path(out).resolve() if os.path.islink(out) else Path(out)
    check_target(target, NOTE, force=force)
    weights = replaced or {}
    origin = _Origin(loaded.source, loaded.fingerprint)  # before other weights are in the model
    student: Student | None = None
    refusal: UnfitError | None = None
    for plan in _plans(loaded.anatomy, decisions, tuple(weights), what):
        form = plan.sentence(refusal)
        try:
            with ExitStack() as stack:
                stack.enter_context(weights_replaced_(loaded.model, weights))
                if verify and student is None:
                    student = Student.of(loaded, decisions)
                with new_folder(target) as folder:
                    _save(loaded, origin, plan, form, folder)
                    stack.close()  # loading what was written needs the memory of the replaced weights
                    if student is not None:
                        student.check(folder)
            return CheckpointSummary(
                path=target,
                layers_before=len(blocks),
                layers_after=len(plan.kept),
                zeroed=len(plan.zeroed),
                bytes=size(target),
                form=form,
                verified=verify,
                replaced=len(plan.written),
            )
        except UnfitError as unfit:
            _log.info("%s, of %d layers: %s", target, len(plan.kept), unfit)
            refusal = unfit
    raise ModelError(f"cannot write {target}: {refusal}") from refusal


# -- forms of a checkpoint -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Plan:
    """One form a checkpoint may take."""

    anatomy: Anatomy
    dropped: NDArray[np.bool_]  # (blocks, 2)
    kept: tuple[int, ...]  # blocks that are written
    replaced: tuple[str, ...]  # parameters for which the student has other weights
    what: str  # what these weights are

    @property
    def left_out(self) -> tuple[int, ...]:
        return tuple(i for i in range(len(self.dropped)) if i not in self.kept)

    @property
    def zeroed(self) -> tuple[SubBlock, ...]:
        """Dropped sub-blocks of blocks that are written."""
        kept = [(b.attention, b.mlp) for b in (self.anatomy.blocks[i] for i in self.kept)]
        gone = self.dropped[list(self.kept)]
        return tuple(part for part, g in zip(itertools.chain(*kept), gone.flat, strict=True) if g)

    @property
    def silent(self) -> frozenset[str]:
        """Parameters that are written as zeros."""
        return frozenset(name for part in self.zeroed for name in part.outputs)

    @property
    def written(self) -> tuple[str, ...]:
        """Replaced parameters that are written, as the checkpoint calls them."""
        names = (self.renamed(name) for name in self.replaced if name not in self.silent)
        return tuple(name for name in names if name is not None)

    def renamed(self, name: str) -> str | None:
        """What a module or tensor is called in the checkpoint; None if it is left out."""
        prefix = f"{self.anatomy.layers_name}."
        if not name.startswith(prefix):
            return name
        block, _, rest = name.removeprefix(prefix).partition(".")
        return f"{prefix}{self.kept.index(int(block))}.{rest}" if int(block) in self.kept else None

    def renumbered(self, name: str, value: Sequence[Any]) -> Sequence[Any]:
        """A list in the config: cut if it says something of every layer, renumbered if it is numbers of layers."""
        n = len(self.dropped)
        make = type(value)
        if len(value) == n and "token" not in name:
            return make(value[i] for i in self.kept)  # type: ignore[call-arg]
        if "layer" in name and all(type(i) is int and 0 <= i < n for i in value):
            return make(self.kept.index(i) for i in value if i in self.kept)  # type: ignore[call-arg]
        return value

    def sentence(self, refusal: UnfitError | None) -> str:
        """What the checkpoint holds, and why not less; `refusal` is what was wrong with a smaller form."""
        n, whole = len(self.dropped), np.flatnonzero(self.dropped.all(axis=1))
        parts = [f"{len(self.kept)} of {_count(n, 'layer')}" if self.left_out else f"all {_count(n, 'layer')}"]
        if self.left_out:
            parts.append(f"{_count(len(self.left_out), 'block')} left out")
        if self.zeroed:
            parts.append(f"{_count(len(self.zeroed), 'dropped sub-block')} kept with output projections of zeros")
        if self.written:
            parts.append(f"{_count(len(self.written), 'weight tensor')} {self.what or 'replaced'}")
        if not self.dropped.any() and not self.written:
            parts.append("nothing dropped")
        if stuck := [i for i in self.kept if i in whole]:
            why = "a block by itself changes what passes through it"
            if refusal is not None:
                why = str(refusal)
            elif all(self.anatomy.blocks[i].transparent for i in stuck):
                why = "a model needs one"
            parts.append(f"{_count(len(stuck), 'whole block')} could not be left out ({why})")
        return ", ".join(parts)


def _plans(anatomy: Anatomy, dropped: NDArray[np.bool_], replaced: tuple[str, ...], what: str) -> Iterator[_Plan]:
    """The forms to try, the smallest first."""
    everything = tuple(range(len(dropped)))
    kept = tuple(i for i in everything if not (dropped[i].all() and anatomy.blocks[i].transparent))
    for blocks in dict.fromkeys((kept or everything[:1], everything)):
        yield _Plan(anatomy, dropped, blocks, replaced, what)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


# -- writing ---------------------------------------------------------------------------------------------------


def _save(loaded: LoadedModel, origin: _Origin, plan: _Plan, form: str, folder: Path) -> None:
    """All files of a checkpoint; raises UnfitError where the model's own config or code is in the way."""
    shell = _shell(loaded.model, plan)
    tensors = _tensors(loaded.model, plan)
    _check_tensors(shell, tensors)
    if plan.left_out:
        _check_blocks(shell, plan)
    (folder / NOTE).write_text(_note(origin, plan, form), encoding="utf-8")
    (folder / "README.md").write_text(_card(origin, plan, form), encoding="utf-8")
    with unfit_if("it cannot be saved"), without_bars():
        shell.save_pretrained(folder, state_dict=tensors)
        loaded.tokenizer.save_pretrained(folder)


def _shell(model: PreTrainedModel, plan: _Plan) -> PreTrainedModel:
    """A model of the checkpoint's config without weights, made from what a reader of its config.json will see."""
    depth = len(plan.kept)
    with unfit_if(f"a model of {_count(depth, 'layer')} cannot be made"):
        config = copy.deepcopy(model.config)
        text = config.get_text_config()
        text.num_hidden_layers = depth
        for name, value in [*vars(text).items()]:
            if isinstance(value, list | tuple):
                setattr(text, name, plan.renumbered(name, value))
        config = type(config).from_dict(json.loads(config.to_json_string()))
        config._attn_implementation = model.config._attn_implementation
        with torch.device("meta"):
            shell = type(model)(config).eval()
            shell.to(dtype=model.dtype)
        if model.can_generate():
            shell.generation_config = copy.deepcopy(model.generation_config)
    return shell


def _tensors(model: PreTrainedModel, plan: _Plan) -> dict[str, Tensor]:
    """The checkpoint's tensors by name: the model's own as they are now, and zeros."""
    silent, replaced = plan.silent, frozenset(plan.replaced)
    state = model.state_dict()
    users = Counter(tensor.untyped_storage().data_ptr() for tensor in state.values())
    tensors = {}
    for name, tensor in state.items():
        if (new := plan.renamed(name)) is None:
            continue
        if name in silent:
            tensors[new] = torch.zeros_like(tensor)
        elif name in replaced and users[tensor.untyped_storage().data_ptr()] > 1:
            tensors[new] = tensor.clone()  # tensors that share memory would be taken for tied ones
        else:
            tensors[new] = tensor
    return tensors


def _check_tensors(shell: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
    """The config must ask for exactly these tensors."""
    wanted = {name: tuple(tensor.shape) for name, tensor in shell.state_dict().items()}
    config = f"a config of {_count(shell.config.get_text_config().num_hidden_layers, 'layer')}"
    for name in sorted({*wanted, *tensors}):
        if name not in tensors:
            raise UnfitError(f"{config} asks for {name}, which the model does not have")
        if name not in wanted:
            raise UnfitError(f"{config} has no place for {name}")
        if wanted[name] != (shape := tuple(tensors[name].shape)):
            raise UnfitError(f"{config} asks for {name} of shape {wanted[name]}, got {shape}")


def _check_blocks(shell: PreTrainedModel, plan: _Plan) -> None:
    """The renumbered blocks must be those that were kept, also in what a short text cannot show (a wide window)."""
    layers = shell.get_submodule(plan.anatomy.layers_name)
    assert isinstance(layers, nn.ModuleList)
    for new, old in enumerate(plan.kept):
        originals = dict(plan.anatomy.blocks[old].module.named_modules())
        for name, module in layers[new].named_modules():
            mine, theirs = _settings(originals.get(name)), _settings(module)
            for key in sorted({*mine, *theirs}):
                a, b = mine.get(key), theirs.get(key)
                numbered = type(a) is type(b) is int and b - a == new - old  # it is, or counts from, the layer's number
                if a != b and not numbered:
                    where = f"{name}.{key}" if name else key
                    raise UnfitError(f"block {old} as layer {new} would have another {where}: {b}, not {a}")


def _settings(module: nn.Module | None) -> dict[str, Any]:
    """What a module is besides its tensors: its class and its plain public attributes."""
    if module is None:
        return {}
    plain = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str | None) and not key.startswith("_") and key != "training"
    }
    return {"class": type(module).__name__, **plain}


@dataclass(frozen=True)
class _Origin:
    """Which model a checkpoint is made of."""

    source: str
    fingerprint: str


def _note(origin: _Origin, plan: _Plan, form: str) -> str:
    document = {
        "format": FORMAT,
        "version": VERSION,
        "model": asdict(origin),
        "form": form,
        "left_out": [plan.anatomy.blocks[i].name for i in plan.left_out],
        "zeroed": [plan.renamed(part.name) for part in plan.zeroed],
        "replaced": {"what": plan.what, "parameters": list(plan.written)},
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _card(origin: _Origin, plan: _Plan, form: str) -> str:
    zeroed = ", ".join(f"`{plan.renamed(part.name)}`" for part in plan.zeroed) or "none"
    left_out = ", ".join(map(str, plan.left_out)) or "none"
    replaced = f"{len(plan.written)} ({plan.what or 'replaced'}; `{NOTE}` names them)" if plan.written else "none"
    return (
        f"{'Compressed' if plan.written else 'Depth-pruned'} by discopt from `{origin.source}`: {form}.\n\n"
        f"Blocks of the original that are left out, counted from 0: {left_out}.\n\n"
        f"Sub-blocks that contribute nothing because their output projections are zeros: {zeroed}.\n\n"
        f"Weight tensors that are not the original's: {replaced}.\n"
    )
