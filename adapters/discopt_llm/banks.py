"""`discopt llm bank`, and the banks that searches build for themselves: requests, and where a bank lies."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from discopt_llm import ggml
from discopt_llm.bank import Bank
from discopt_llm.build import DENSE, BankPlan, build_bank
from discopt_llm.calibration import load_calibration
from discopt_llm.export.folder import size
from discopt_llm.layers import Layer, layers_for
from discopt_llm.means import Means
from discopt_llm.models import LoadedModel, load_model, parse_device
from discopt_llm.quantization import QuantizationSettings
from discopt_llm.recipes import GgmlRecipe, QuantizationRecipe, Recipe, SparsityRecipe
from discopt_llm.request import sequence_length
from discopt_llm.sparsity import SparsitySettings
from discopt_llm.workers import spread_over

__all__ = [
    "METHODS",
    "OPTIONS",
    "BankRequest",
    "BankSummary",
    "bank_plan",
    "bank_summary",
    "bank_words",
    "default_folder",
    "make_bank",
]

METHODS = {"quantization": ("gptq", "rtn"), "sparsity": ("sparsegpt", "wanda", "magnitude"), "gguf": ("gguf",)}
SEQUENCE_LENGTH = 2048
STEPS_PER_LAYER = 32  # of the mean layer, unless --step says more or less
OPTIONS = {  # that not all kinds have, as BankRequest has them
    "quantization": ("bits", "group_size", "symmetric", "act_order", "scales", "damping"),
    "sparsity": ("target", "levels", "step", "damping"),
    "gguf": ("types", "imatrix"),
}


@dataclass(frozen=True, kw_only=True)
class BankRequest(Means):
    """What was asked of `discopt llm bank`, one field per option.

    Raises ValueError for values that make no sense, BankError for types of ggml that cannot be made here.
    """

    model: str
    kind: str = "quantization"
    method: str | None = None  # None: the first of METHODS
    bits: tuple[int, ...] = (2, 3, 4, 5, 6)
    group_size: int = 128  # columns; 0: a whole row
    symmetric: bool = False
    act_order: bool = False
    scales: str = "minmax"
    target: float = 0.5  # share of zeros of the level in the middle
    levels: int = 17
    step: int | None = None  # weights between two levels; None: the 32nd part of the mean layer
    damping: float = 0.01
    types: tuple[str, ...] = ()  # of ggml; (): those that suit the model's layers
    imatrix: bool | None = None  # weigh errors by an importance matrix; None: where ggml's own quantizers are there
    propagate: str | None = None  # None: dense for sparsity, 3 for quantization where that is a level (EvoPress)
    calibration: str = "builtin"
    calibration_tokens: int | None = None
    sequence_length: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in METHODS:
            raise ValueError(f"kind must be one of {', '.join(METHODS)}, got {self.kind!r}")
        if self.method is not None and self.method not in METHODS[self.kind]:
            raise ValueError(
                f"method of {self.kind} must be one of {', '.join(METHODS[self.kind])}, got {self.method!r}"
            )
        defaults = {field.name: field.default for field in fields(self)}
        for name in dict.fromkeys(name for names in OPTIONS.values() for name in names):
            if name not in OPTIONS[self.kind] and getattr(self, name) != defaults[name]:
                kinds = " and ".join(kind for kind, names in OPTIONS.items() if name in names)
                raise ValueError(f"{name} is an option of kind {kinds}, got kind {self.kind}")
        object.__setattr__(self, "types", ggml.parse_types(self.types))
        if self.kind == "gguf":
            labels = self.types or tuple(ggml.types())
            ggml.check_makeable(self.types, imatrix=self._weighed)
        elif self.kind == "sparsity":
            labels = self._sparsity(step=1 if self.step is None else self.step, values=torch.float16).labels
        else:
            labels = tuple(map(str, self.bits))
            self._quantization()
        if self.propagate not in (None, DENSE, *labels):
            raise ValueError(f"propagate must be one of {', '.join((DENSE, *labels))}, got {self.propagate!r}")

    def recipe(self, layers: tuple[Layer, ...], dtype: torch.dtype) -> Recipe:
        """How the levels of these layers are made."""
        if self.kind == "gguf":
            types = self.types or ggml.default_types(layer.columns for layer in layers)
            return GgmlRecipe(types, self._weighed)
        if self.kind == "quantization":
            return QuantizationRecipe(self._quantization())
        mean = sum(layer.weights for layer in layers) // len(layers)
        values = dtype if dtype == torch.bfloat16 else torch.float16
        return self._sparsity(step=self.step or max(1, mean // STEPS_PER_LAYER), values=values)

    @property
    def propagated(self) -> str:
        """What makes the next block's inputs."""
        if self.propagate is not None:
            return self.propagate
        return "3" if self.kind == "quantization" and 3 in self.bits else DENSE

    def _quantization(self) -> QuantizationSettings:
        return QuantizationSettings(
            bits=self.bits,
            method=self._method,
            group_size=self.group_size or None,
            symmetric=self.symmetric,
            act_order=self.act_order,
            damping=self.damping,
            scales=self.scales,  # type: ignore[arg-type]  # checked by the settings
        )

    def _sparsity(self, *, step: int, values: torch.dtype) -> SparsityRecipe:
        settings = SparsitySettings(method=self._method, damping=self.damping)
        return SparsityRecipe(settings, self.target, self.levels, step, values)

    @property
    def _weighed(self) -> bool:
        return ggml.has_native() if self.imatrix is None else self.imatrix

    @property
    def _method(self) -> Any:  # one of METHODS
        return self.method or METHODS[self.kind][0]


def bank_plan(
    request: BankRequest, loaded: LoadedModel, *, at_most: int | None = None, length: int = SEQUENCE_LENGTH
) -> BankPlan:
    """The bank that was asked for, before anything is built; raises DiscoptError for what this model cannot have.

    at_most: tokens of the text to use where the request does not say how many; less where there is less.
    length: tokens in a sequence where the request does not say; less where the model has fewer positions.
    """
    layers = layers_for(loaded, request.kind)
    recipe = request.recipe(layers, loaded.dtype)
    text = load_calibration(
        request.calibration,
        loaded.tokenizer,
        sequence_length=sequence_length(loaded, request.sequence_length, length),
        tokens=request.calibration_tokens,
        at_most=at_most,
    )
    return BankPlan(loaded, layers, recipe, text, request.propagated)


def default_folder(plan: BankPlan, runs: Path) -> Path:
    """Where searches in the folder `runs` keep this bank: the same for the same plan."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", Path(plan.loaded.source.removeprefix("package:")).name).strip("-.") or "model"
    key = hashlib.sha256(json.dumps(plan.header, sort_keys=True).encode()).hexdigest()[:8]
    made = dict.fromkeys((plan.recipe.kind, plan.header["settings"]["method"]))
    return runs / "banks" / "-".join((name, *made, key))


@dataclass(frozen=True)
class BankSummary:
    """What a bank holds."""

    path: Path
    kind: str
    method: str
    labels: tuple[str, ...]
    layers: int
    weights: int  # of all layers, dense
    bytes: int  # of all its files
    fingerprint: str
    words: str  # for people

    @property
    def sentence(self) -> str:
        """All of it, in one line."""
        return f"{self.path}: {self.words}; {self.bytes / 1e6:,.1f} MB"

    def to_dict(self) -> dict[str, Any]:
        """All but the words, as JSON has it."""
        return {name: value for name, value in asdict(self).items() if name != "words"} | {"path": str(self.path)}


def bank_summary(bank: Bank) -> BankSummary:
    """What a bank holds."""
    return BankSummary(
        path=bank.path,
        kind=bank.kind,
        method=bank.settings["method"],
        labels=bank.labels,
        layers=len(bank.layers),
        weights=sum(layer.dense for layer in bank.layers),
        bytes=size(bank.path),
        fingerprint=bank.fingerprint,
        words=bank_words(bank),
    )


def bank_words(bank: Bank) -> str:
    """What a bank holds, for people: "56 layers by gptq at 2, 3, 4 bits in groups of 128, made on ..."."""
    settings, text = bank.settings, bank.calibration
    if bank.kind == "quantization":
        size = settings["group_size"]
        grouped = "a scale for each row" if size is None else f"groups of {size}"
        levels = f"at {', '.join(bank.labels)} bits, {grouped}{', symmetric' if settings['symmetric'] else ''}"
    elif bank.kind == "gguf":
        levels = f"as {', '.join(bank.labels)}, {'with' if settings['imatrix'] else 'without'} an importance matrix"
    else:
        levels = (
            f"at {len(bank.labels)} levels around {settings['target']:.1%} zeros, {settings['step']:,} weights apart"
        )
    made = f"made on {text['tokens']:,} tokens of {text['source']}"
    by = "" if bank.kind == "gguf" else f" by {settings['method']}"
    return f"{len(bank.layers)} layers{by} {levels}, {made}"


def make_bank(request: BankRequest, out: Path, *, force: bool, quiet: bool, say: Callable[[str], None]) -> Bank:
    """Load the model and build a bank of it; where that very bank is there already, say so and open it."""
    say(f"loading {request.model}")
    loaded = load_model(
        request.model,
        device=request.device,
        dtype=request.dtype,
        trust_remote_code=request.trust_remote_code,
        memory=request.bounds_here(parse_device(request.device)),
    )
    spread = spread_over(request, say, trust_remote_code=request.trust_remote_code)
    return build_bank(bank_plan(request, loaded), out, force=force, quiet=quiet, say=say, spread=spread)
