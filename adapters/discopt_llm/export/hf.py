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
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from discopt.sealed import sealed_text
from discopt_llm.errors import ModelError
from discopt_llm.export.folder import check_target, new_folder, set_aside, size
from discopt_llm.export.plan import Plan, count, plans
from discopt_llm.export.proof import Student, UnfitError, unfit_if, without_bars
from discopt_llm.export.student import StudentModel
from discopt_llm.models import LoadedModel
from discopt_llm.replay import weights_replaced_

__all__ = ["CheckpointSummary", "Dense", "Layout", "write_checkpoint", "write_student"]

FORMAT = "discopt-hf"
VERSION = 1
SHARD = "5GB"  # of a file; larger models have several, and an index of them
NOTE = "discopt.json"  # what was done, for programs; its presence says that the folder is ours to replace

_log = logging.getLogger(__name__)


class Layout(Protocol):
    """How the tensors of a checkpoint lie in its files, and how those are read again."""

    @property
    def silent(self) -> str:
        """What becomes of a dropped sub-block whose block is there, for a sentence."""
        ...

    @property
    def proof(self) -> str:
        """What verifying it shows, for a sentence."""
        ...

    def stored(self, plan: Plan, shell: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is written of the dense tensors of a checkpoint; may change the data type and config of its shell."""
        ...

    def finish_(self, plan: Plan, folder: Path) -> None:
        """Change what transformers has written."""
        ...

    def check(self, plan: Plan, student: Student, folder: Path) -> None:
        """Read the files and compare them with the student; raises UnfitError."""
        ...

    def remarks(self, plan: Plan, folder: Path) -> tuple[str, ...]:
        """What else there is to say."""
        ...


class Dense:
    """As transformers writes a model, and reads it again."""

    silent = "kept with output projections of zeros"
    proof = "loaded back, its logits equal the searched student's"

    def stored(self, plan: Plan, shell: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors

    def finish_(self, plan: Plan, folder: Path) -> None:
        pass

    def check(self, plan: Plan, student: Student, folder: Path) -> None:
        student.check(folder)

    def remarks(self, plan: Plan, folder: Path) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class CheckpointSummary:
    """What was written."""

    path: Path
    layers_before: int
    layers_after: int
    zeroed: int  # dropped sub-blocks of layers that are there
    bytes: int  # of all files
    form: str  # for people: which layers and sub-blocks are there, and why
    verified: bool  # read again, and its logits equal the searched student's
    replaced: int = 0  # parameters in it that are not the model's own
    proof: str = Dense.proof  # what verifying it shows
    remarks: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """All of it, in one line."""
        parts = (
            self.form,
            f"{self.bytes / 1e6:,.1f} MB",
            *self.remarks,
            self.proof if self.verified else "not verified",
        )
        return f"{self.path}: {'; '.join(parts)}"

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        return {**asdict(self), "path": str(self.path), "remarks": list(self.remarks)}


def write_student(
    student: StudentModel,
    out: str | os.PathLike[str],
    *,
    stored: str = "stored dense",
    layout: Layout | None = None,
    force: bool = False,
    verify: bool = True,
) -> CheckpointSummary:
    """Write a student by `write_checkpoint`; `stored` says for the reader how its weights lie in the files."""
    return write_checkpoint(
        student.loaded,
        student.dropped,
        out,
        replaced=student.weights,
        what=student.what and f"{student.what}, {stored}",
        layout=layout,
        force=force,
        verify=verify,
    )


def write_checkpoint(
    loaded: LoadedModel,
    dropped: NDArray[np.bool_],
    out: str | os.PathLike[str],
    *,
    replaced: Mapping[str, Tensor] | None = None,
    what: str = "",
    layout: Layout | None = None,
    force: bool = False,
    verify: bool = True,
) -> CheckpointSummary:
    """Write the model without its dropped sub-blocks, (blocks, 2) attention and MLP, to the folder `out`.

    `replaced` has the student's weights by the full names of the model's parameters, each of the parameter's shape
    and of any floating-point type; `what` says for the reader what they are: "quantized to 3.00 bits on average by
    GPTQ". The mapping may make its tensors when asked: it is asked for one at a time, but all of them, cast to the
    model's data type, are held beside the model until they are written, for transformers writes a model at once.
    `layout` is how all this lies in the files; None: `Dense`.

    With `verify` the files are loaded again, which takes the memory of a second model, and must give the logits of
    the loaded model with those weights and those sub-blocks skipped, with and without a cache. `force` replaces a
    checkpoint that was written by this function, and nothing else.

    Raises RunFolderError if `out` exists or cannot be written, ModelError if no form of the checkpoint gives these
    logits, ValueError as `weights_replaced_`. In all cases what was at `out` is still there; a checkpoint that gives
    other logits is kept beside it, as `set_aside` does, and nothing else is left.
    """
    decisions = np.asarray(dropped)
    blocks = loaded.anatomy.blocks
    if decisions.shape != (len(blocks), 2) or decisions.dtype != np.bool_:
        raise ValueError(f"dropped must be bool of shape ({len(blocks)}, 2), got {decisions.dtype} {decisions.shape}")
    if getattr(loaded.model.config, "quantization_config", None) is not None:
        raise ModelError(f"{loaded.source} is quantized; a checkpoint can be written of floating-point weights only")
    target = Path(out).resolve() if os.path.islink(out) else Path(out)

    def check() -> None:
        check_target(target, NOTE, force=force)

    check()
    layout = layout or Dense()
    weights = replaced or {}
    origin = _Origin(loaded.source, loaded.fingerprint)  # before other weights are in the model
    student: Student | None = None
    refusal: UnfitError | None = None
    kept: Path | None = None
    forms = [*plans(loaded.anatomy, decisions, tuple(weights), what)]
    for plan in forms:
        form = plan.sentence(refusal, layout.silent)
        try:
            with ExitStack() as stack:
                stack.enter_context(weights_replaced_(loaded.model, weights))
                if verify and student is None:
                    student = Student.of(loaded, decisions)
                with new_folder(target, check) as folder:
                    remarks = _save(loaded, origin, plan, form, layout, folder)
                    stack.close()  # loading what was written needs the memory of the replaced weights
                    if student is not None:
                        try:
                            layout.check(plan, student, folder)
                        except UnfitError:
                            if plan is forms[-1]:
                                kept = set_aside(folder, target, NOTE)
                            raise
            return CheckpointSummary(
                path=target,
                layers_before=len(blocks),
                layers_after=len(plan.kept),
                zeroed=len(plan.zeroed),
                bytes=size(target),
                form=form,
                verified=verify,
                replaced=len(plan.written),
                proof=layout.proof,
                remarks=remarks,
            )
        except UnfitError as unfit:
            _log.info("%s, of %d layers: %s", target, len(plan.kept), unfit)
            refusal = unfit
    note = f"; what was written is kept, unverified, in {kept}" if kept else ""
    raise ModelError(f"cannot write {target}: {refusal}{note}") from refusal


# -- writing ---------------------------------------------------------------------------------------------------


def _save(loaded: LoadedModel, origin: _Origin, plan: Plan, form: str, layout: Layout, folder: Path) -> tuple[str, ...]:
    """All files of a checkpoint, and what there is to say about them.

    Raises UnfitError where the model's own config or code is in the way.
    """
    shell = _shell(loaded.model, plan)
    tensors = _tensors(loaded.model, plan)
    _check_tensors(shell, tensors)
    if plan.left_out:
        _check_blocks(shell, plan)
    tensors = layout.stored(plan, shell, tensors)
    (folder / NOTE).write_text(_note(origin, plan, form), encoding="utf-8")
    with unfit_if("it cannot be saved"), without_bars():
        shell.save_pretrained(folder, state_dict=tensors, max_shard_size=SHARD)
        loaded.tokenizer.save_pretrained(folder)
    layout.finish_(plan, folder)
    remarks = layout.remarks(plan, folder)
    (folder / "README.md").write_text(_card(origin, plan, form, layout.silent, remarks), encoding="utf-8")
    return remarks


def _shell(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """A model of the checkpoint's config without weights, made from what a reader of its config.json will see."""
    depth = len(plan.kept)
    with unfit_if(f"a model of {count(depth, 'layer')} cannot be made"):
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


def _tensors(model: PreTrainedModel, plan: Plan) -> dict[str, Tensor]:
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
    config = f"a config of {count(shell.config.get_text_config().num_hidden_layers, 'layer')}"
    for name in sorted({*wanted, *tensors}):
        if name not in tensors:
            raise UnfitError(f"{config} asks for {name}, which the model does not have")
        if name not in wanted:
            raise UnfitError(f"{config} has no place for {name}")
        if wanted[name] != (shape := tuple(tensors[name].shape)):
            raise UnfitError(f"{config} asks for {name} of shape {wanted[name]}, got {shape}")


def _check_blocks(shell: PreTrainedModel, plan: Plan) -> None:
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


def _note(origin: _Origin, plan: Plan, form: str) -> str:
    document = {
        "format": FORMAT,
        "version": VERSION,
        "model": asdict(origin),
        "form": form,
        "left_out": [plan.anatomy.blocks[i].name for i in plan.left_out],
        "zeroed": [plan.renamed(part.name) for part in plan.zeroed],
        "replaced": {"what": plan.what, "parameters": list(plan.written)},
    }
    return sealed_text(document, indent=2)


def _card(origin: _Origin, plan: Plan, form: str, silent: str, remarks: Sequence[str]) -> str:
    zeroed = ", ".join(f"`{plan.renamed(part.name)}`" for part in plan.zeroed) or "none"
    left_out = ", ".join(map(str, plan.left_out)) or "none"
    replaced = f"{len(plan.written)} ({plan.what or 'replaced'}; `{NOTE}` names them)" if plan.written else "none"
    return (
        f"{'Compressed' if plan.written else 'Depth-pruned'} by discopt from `{origin.source}`: {form}.\n\n"
        f"Blocks of the original that are left out, counted from 0: {left_out}.\n\n"
        f"Other sub-blocks that are dropped, {silent}: {zeroed}.\n\n"
        f"Weight tensors that are not the original's: {replaced}.\n"
        + ("\n" if remarks else "")
        + "".join(f"- {remark}\n" for remark in remarks)
    )
