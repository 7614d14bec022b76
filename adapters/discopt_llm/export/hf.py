"""A depth-pruned model as a Hugging Face checkpoint that plain `from_pretrained` loads.

Blocks that lost both their sub-blocks are left out and the others renumbered; of every other dropped sub-block the
output projections are written as zeros. The model in memory is only read: the files come from a model of the smaller
config that has no weights of its own, and from the tensors of the loaded one.

A config may compute something from a layer's number (which layers are mixtures of experts, how wide a window is), so
leaving layers out can make another model. Then all layers are written, with zeros, and the summary says why.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as hf_logging

from discopt_llm.anatomy import Anatomy, SubBlock, skipped_
from discopt_llm.errors import ModelError
from discopt_llm.export.folder import check_target, new_folder, os_message, size
from discopt_llm.models import LoadedModel

__all__ = ["CheckpointSummary", "write_checkpoint"]

FORMAT = "discopt-hf"
VERSION = 1
NOTE = "discopt.json"  # what was done, for programs; its presence says that the folder is ours to replace
CHECKED_TOKENS = 64  # length of the two random sequences on which the written model is compared
CACHE_SLACK = 5.0  # with a cache, products are taken in other portions, which rounds differently

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
    force: bool = False,
    verify: bool = True,
) -> CheckpointSummary:
    """Write the model without its dropped sub-blocks, (blocks, 2) attention and MLP, to the folder `out`.

    With `verify` the files are loaded again, which takes the memory of a second model, and must give the logits of
    the loaded model with those sub-blocks skipped, with and without a cache. `force` replaces a checkpoint that was
    written by this function, and nothing else.

    Raises RunFolderError if `out` exists or cannot be written, ModelError if no form of the checkpoint gives these
    logits. Either way what was at `out` is still there, and nothing else is left.
    """
    decisions = np.asarray(dropped)
    blocks = loaded.anatomy.blocks
    if decisions.shape != (len(blocks), 2) or decisions.dtype != np.bool_:
        raise ValueError(f"dropped must be bool of shape ({len(blocks)}, 2), got {decisions.dtype} {decisions.shape}")
    if getattr(loaded.model.config, "quantization_config", None) is not None:
        raise ModelError(f"{loaded.source} is quantized; a checkpoint can be written of floating-point weights only")
    target = Path(out).resolve() if os.path.islink(out) else Path(out)
    check_target(target, NOTE, force=force)
    student = _Student.of(loaded, decisions) if verify else None
    refusal: _UnfitError | None = None
    for plan in _plans(loaded.anatomy, decisions):
        form = plan.sentence(refusal)
        try:
            with new_folder(target) as folder:
                _save(loaded, plan, form, folder)
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
            )
        except _UnfitError as unfit:
            _log.info("%s, of %d layers: %s", target, len(plan.kept), unfit)
            refusal = unfit
    raise ModelError(f"cannot write {target}: {refusal}") from refusal


# -- forms of a checkpoint -------------------------------------------------------------------------------------


class _UnfitError(Exception):
    """This form of the checkpoint is not the searched student; the message says why, for a sentence to go on with."""


@dataclass(frozen=True, eq=False)
class _Plan:
    """One form a checkpoint may take."""

    anatomy: Anatomy
    dropped: NDArray[np.bool_]  # (blocks, 2)
    kept: tuple[int, ...]  # blocks that are written

    @property
    def left_out(self) -> tuple[int, ...]:
        return tuple(i for i in range(len(self.dropped)) if i not in self.kept)

    @property
    def zeroed(self) -> tuple[SubBlock, ...]:
        """Dropped sub-blocks of blocks that are written."""
        kept = [(b.attention, b.mlp) for b in (self.anatomy.blocks[i] for i in self.kept)]
        gone = self.dropped[list(self.kept)]
        return tuple(part for part, g in zip(itertools.chain(*kept), gone.flat, strict=True) if g)

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

    def sentence(self, refusal: _UnfitError | None) -> str:
        """What the checkpoint holds, and why not less; `refusal` is what was wrong with a smaller form."""
        n, whole = len(self.dropped), np.flatnonzero(self.dropped.all(axis=1))
        parts = [f"{len(self.kept)} of {_count(n, 'layer')}" if self.left_out else f"all {_count(n, 'layer')}"]
        if self.left_out:
            parts.append(f"{_count(len(self.left_out), 'block')} left out")
        if self.zeroed:
            parts.append(f"{_count(len(self.zeroed), 'dropped sub-block')} kept with output projections of zeros")
        if not self.dropped.any():
            parts.append("nothing dropped")
        if stuck := [i for i in self.kept if i in whole]:
            why = "a block by itself changes what passes through it"
            if refusal is not None:
                why = str(refusal)
            elif all(self.anatomy.blocks[i].transparent for i in stuck):
                why = "a model needs one"
            parts.append(f"{_count(len(stuck), 'whole block')} could not be left out ({why})")
        return ", ".join(parts)


def _plans(anatomy: Anatomy, dropped: NDArray[np.bool_]) -> Iterator[_Plan]:
    """The forms to try, the smallest first."""
    everything = tuple(range(len(dropped)))
    kept = tuple(i for i in everything if not (dropped[i].all() and anatomy.blocks[i].transparent))
    for blocks in dict.fromkeys((kept or everything[:1], everything)):
        yield _Plan(anatomy, dropped, blocks)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


# -- writing ---------------------------------------------------------------------------------------------------


def _save(loaded: LoadedModel, plan: _Plan, form: str, folder: Path) -> None:
    """All files of a checkpoint; raises _UnfitError where the model's own config or code is in the way."""
    shell = _shell(loaded.model, plan)
    tensors = _tensors(loaded.model, plan)
    _check_tensors(shell, tensors)
    if plan.left_out:
        _check_blocks(shell, plan)
    (folder / NOTE).write_text(_note(loaded, plan, form), encoding="utf-8")
    (folder / "README.md").write_text(_card(loaded, plan, form), encoding="utf-8")
    with _unfit_if("it cannot be saved"), _without_bars():
        shell.save_pretrained(folder, state_dict=tensors)
        loaded.tokenizer.save_pretrained(folder)


def _shell(model: PreTrainedModel, plan: _Plan) -> PreTrainedModel:
    """A model of the checkpoint's config without weights, made from what a reader of its config.json will see."""
    depth = len(plan.kept)
    with _unfit_if(f"a model of {_count(depth, 'layer')} cannot be made"):
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
    """The checkpoint's tensors by name: the model's own, and zeros."""
    silent = {name for part in plan.zeroed for name in part.outputs}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if (new := plan.renamed(name)) is not None:
            tensors[new] = torch.zeros_like(tensor) if name in silent else tensor
    return tensors


def _check_tensors(shell: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
    """The config must ask for exactly these tensors."""
    wanted = {name: tuple(tensor.shape) for name, tensor in shell.state_dict().items()}
    config = f"a config of {_count(shell.config.get_text_config().num_hidden_layers, 'layer')}"
    for name in sorted({*wanted, *tensors}):
        if name not in tensors:
            raise _UnfitError(f"{config} asks for {name}, which the model does not have")
        if name not in wanted:
            raise _UnfitError(f"{config} has no place for {name}")
        if wanted[name] != (shape := tuple(tensors[name].shape)):
            raise _UnfitError(f"{config} asks for {name} of shape {wanted[name]}, got {shape}")


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
                    raise _UnfitError(f"block {old} as layer {new} would have another {where}: {b}, not {a}")


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


def _note(loaded: LoadedModel, plan: _Plan, form: str) -> str:
    document = {
        "format": FORMAT,
        "version": VERSION,
        "model": {"source": loaded.source, "fingerprint": loaded.fingerprint},
        "form": form,
        "left_out": [plan.anatomy.blocks[i].name for i in plan.left_out],
        "zeroed": [plan.renamed(part.name) for part in plan.zeroed],
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _card(loaded: LoadedModel, plan: _Plan, form: str) -> str:
    zeroed = ", ".join(f"`{plan.renamed(part.name)}`" for part in plan.zeroed) or "none"
    left_out = ", ".join(map(str, plan.left_out)) or "none"
    return (
        f"Depth-pruned by discopt from `{loaded.source}`: {form}.\n\n"
        f"Blocks of the original that are left out, counted from 0: {left_out}.\n\n"
        f"Sub-blocks that contribute nothing because their output projections are zeros: {zeroed}.\n"
    )


# -- checking --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Student:
    """What the searched student answers on two random sequences."""

    loaded: LoadedModel
    ids: Tensor  # (2, L)
    logits: Tensor  # (2, L, V) float32 on the CPU

    @classmethod
    @torch.no_grad()
    def of(cls, loaded: LoadedModel, dropped: NDArray[np.bool_]) -> _Student:
        model = loaded.model
        embedding: Any = model.get_input_embeddings()
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or CHECKED_TOKENS
        shape = (2, min(CHECKED_TOKENS, positions))
        ids = torch.randint(len(embedding.weight), shape, generator=torch.Generator().manual_seed(0)).to(model.device)
        parts = zip(loaded.anatomy.sub_blocks, dropped.flat, strict=True)
        with skipped_(part for part, gone in parts if gone):
            return cls(loaded, ids, _on_cpu(model(input_ids=ids, use_cache=False).logits))

    @torch.no_grad()
    def check(self, folder: Path) -> None:
        """Load the files as anyone would and compare; raises _UnfitError."""
        with _unfit_if("what was written cannot be loaded and run"), _without_bars():
            read: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=self.loaded.model.dtype,
                output_loading_info=True,
                trust_remote_code=self.loaded.model.is_remote_code(),
            )
            model, info = read
            for problem, names in info.items():
                if names:
                    raise _UnfitError(f"loading what was written reports {problem}: {', '.join(map(str, names))}")
            model = model.to(self.loaded.model.device).eval()
            logits = model(input_ids=self.ids, use_cache=False).logits
            half = self.ids.shape[1] // 2
            first = model(input_ids=self.ids[:, :half], use_cache=True)
            cache = getattr(first, "past_key_values", None)
            second = None
            if cache is not None:
                second = model(input_ids=self.ids[:, half:], past_key_values=cache, use_cache=True).logits
        self._compare(logits, self.logits, 1.0, "the logits of what was written")
        if second is not None:
            self._compare(second, self.logits[:, half:], CACHE_SLACK, "with a cache its logits")

    def _compare(self, logits: Tensor, expected: Tensor, slack: float, what: str) -> None:
        difference = torch.linalg.vector_norm(_on_cpu(logits) - expected) / torch.linalg.vector_norm(expected)
        allowed = slack * max(4 * torch.finfo(self.loaded.model.dtype).eps, 1e-4)
        if not difference <= allowed:
            raise _UnfitError(
                f"{what} differ from the searched student's by {difference:.1e} of their size, expected {allowed:.0e}"
            )


def _on_cpu(logits: Tensor) -> Tensor:
    return logits.detach().to("cpu", torch.float32)


@contextmanager
def _unfit_if(what: str) -> Iterator[None]:
    """What a model's code raises is a reason against this form; what the operating system says is not."""
    try:
        yield
    except _UnfitError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ModelError("too little memory to load what was written beside the model; leave out verifying") from error
    except Exception as error:  # a model's own code may raise anything
        if os_message(error) is not None:
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise _UnfitError(f"{what}: {lines[0]}") from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bars of transformers while inside."""
    enabled = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            hf_logging.enable_progress_bar()
