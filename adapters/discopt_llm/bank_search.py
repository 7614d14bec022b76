"""`discopt llm quantize`, `sparsify` and `compress`: searches over the levels of banks as tasks of the search."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from discopt.separable import solve_separable
from discopt.space import Levels as LevelNumbers
from discopt.space import SearchSpace
from discopt_llm import allocation
from discopt_llm.allocation import Measured
from discopt_llm.bank import Bank
from discopt_llm.banks import METHODS, OPTIONS, BankRequest, bank_plan, bank_words, default_folder
from discopt_llm.budget import Budget
from discopt_llm.build import build_bank
from discopt_llm.errors import BankError
from discopt_llm.evaluator import Measurer
from discopt_llm.fitness import fitness_by_name
from discopt_llm.genome import GROUPS, Genome, Tables, model_genome
from discopt_llm.heldout import Method
from discopt_llm.heuristics import Heuristics
from discopt_llm.layers import GGUF, layers_for
from discopt_llm.levels import BankLevels
from discopt_llm.models import LoadedModel
from discopt_llm.presets import QUANTIZATION_PRESETS, SPARSITY_PRESETS, Preset
from discopt_llm.profile import BankReference, Profile
from discopt_llm.profile_text import labels_from_levels, text_from_labels
from discopt_llm.report import levels_listing, met_words, plot_levels
from discopt_llm.request import STARTS, Prepared, Say, SearchRequest, Task
from discopt_llm.search import feasible_start, resume
from discopt_llm.students import open_banks, read_bank_student
from discopt_llm.workers import spread_over

DROP = "drop"
KINDS = (DROP, "sparsity", "quantization")  # that mix
_TRADES = {
    "size": "Each layer has a level of its own; layers with as many weights may trade.",
    "name": "Each layer has a level of its own; layers of one name may trade.",
    "none": "Each layer has a level of its own; all may trade.",
    "runtime": "Layers that inference engines fuse (q, k, v; gate, up) have one level.",
}
_RENAMED = {"bits": "widths"}  # options of a bank that are called otherwise here
_OF_KIND = {_RENAMED.get(name, name): kind for kind, names in OPTIONS.items() for name in names}
_BANK_OPTIONS = (*_OF_KIND, "method", "bank_tokens")  # of a bank that is built


@dataclass(frozen=True, kw_only=True)
class BankSearchRequest(SearchRequest):
    """What the searches over banks have in common."""

    measures: ClassVar[tuple[str, ...]]  # the budgets that make sense, one of which is to be given

    bits: str | None = None  # average over the units
    bpw: str | None = None  # with scales, zero points and masks
    size: str | None = None  # of the whole model file
    sparsity: str | None = None
    banks: tuple[str, ...] = ()  # folders; () builds what is missing
    group: str | None = None  # one of GROUPS; None: what suits the kind
    group_size: int = 128
    symmetric: bool = False
    widths: tuple[int, ...] = (2, 3, 4, 5, 6)
    levels: int = 17
    step: int | None = None
    types: tuple[str, ...] = ()  # of ggml; (): those that suit the model's layers
    imatrix: bool | None = None
    bank_tokens: int | None = None

    def __post_init__(self) -> None:
        given = [measure for measure in ("bits", "bpw", "size", "sparsity") if getattr(self, measure) is not None]
        if len(given) != 1 or given[0] not in self.measures:
            options = " or ".join(f"--{measure}" for measure in self.measures)
            raise ValueError(f"expected one budget, {options}, got {', '.join(given) or 'none'}")
        if self.trade not in GROUPS:
            raise ValueError(f"group must be one of {', '.join(GROUPS)}, got {self.group!r}")
        _ = self.budget
        for kind in self.bank_kinds:
            self._bank_request(kind)
        self._check_bank_options()
        super().__post_init__()

    def _check_bank_options(self) -> None:
        """Raise ValueError for options that would go unheard."""
        for field in fields(self):
            if field.name not in self._building or getattr(self, field.name) == field.default:
                continue
            if self.banks:
                raise ValueError(f"{field.name} is an option of a bank that is built, got a bank that is there")
            if _OF_KIND.get(field.name, self.bank_kinds[0]) not in self.bank_kinds:
                got = ", ".join(self.bank_kinds)
                raise ValueError(f"{field.name} is an option of kind {_OF_KIND[field.name]}, got kind {got}")

    @property
    def _building(self) -> tuple[str, ...]:
        """The options of a bank that is built; which kind it is, is said of one that is there as well."""
        return tuple(name for name in _BANK_OPTIONS if name != "method" or GGUF not in self.bank_kinds)

    @property
    @abstractmethod
    def bank_kinds(self) -> tuple[str, ...]:
        """Those of its banks."""

    @property
    def drops(self) -> bool:
        """Whether units may be dropped."""
        return False

    @cached_property
    def budget(self) -> Budget:
        """What the student may weigh."""
        measure = next(m for m in ("bits", "bpw", "size", "sparsity") if getattr(self, m) is not None)
        return Budget.parse(measure, getattr(self, measure))  # type: ignore[arg-type]  # one of its measures

    @property
    def trade(self) -> str:
        """Which units may trade: one of GROUPS. Of types of ggml no two layers need have steps of equal cost."""
        return self.group or ("none" if GGUF in self.bank_kinds else "size")

    @property
    def unit(self) -> str:
        """What a unit is."""
        return "runtime" if self.trade == "runtime" else "layer"

    def method_of(self, kind: str) -> str | None:
        """How the levels of a kind are made; None: the best way there is."""
        return getattr(self, "method", None)

    def check(self, loaded: LoadedModel) -> None:
        """Raises DiscoptError for a budget that no profile meets, as far as that is known before a bank is built."""
        genome = self._expected(loaded)
        space = genome.space(self.budget, self.trade)
        if self.chosen.start not in STARTS:
            feasible_start(self.chosen.start, read_bank_student(self.chosen.start, loaded, genome), space)

    def spaces(self, loaded: LoadedModel, requests: Sequence[BankSearchRequest]) -> list[SearchSpace]:
        genome = self._expected(loaded)
        return [genome.space(request.budget, request.trade) for request in requests]

    def with_banks(self, banks: Sequence[Bank]) -> Self:
        """The same with banks that are there, and without the options that they were built by."""
        if self.banks:
            return self
        fallen: dict[str, Any] = {field.name: field.default for field in fields(self) if field.name in self._building}
        return replace(self, **fallen, banks=tuple(str(bank.path.resolve()) for bank in banks))

    def task(self, loaded: LoadedModel, out: Path, *, quiet: bool, say: Say) -> BankTask:
        """The units and levels of this model, with the banks that hold them."""
        banks = self._opened(loaded) if self.banks else self._built(loaded, out, quiet=quiet, say=say)
        genome = self._genome(loaded, banks)
        space = genome.space(self.budget, self.trade)
        return BankTask(self, loaded, BankLevels(loaded, layers_for(loaded, banks[0].kind), genome, banks), space)

    def _built(self, loaded: LoadedModel, out: Path, *, quiet: bool, say: Say) -> list[Bank]:
        """The banks that the options ask for, built where they are not there yet."""
        banks = []
        for kind in self.bank_kinds:
            plan = bank_plan(
                self._bank_request(kind), loaded, at_most=self.chosen.bank_tokens, length=self.chosen.sequence_length
            )
            folder = default_folder(plan, out.parent)
            say(f"bank: {folder}")
            spread = spread_over(self, say, trust_remote_code=self.trust_remote_code)
            banks.append(build_bank(plan, folder, quiet=quiet, say=say, spread=spread))
        return banks

    def _expected(self, loaded: LoadedModel) -> Genome:
        """What the banks make of the model; of banks that are yet to be built, but for their errors."""
        # Checksums, which take reading whole banks, are compared when the task opens them.
        return self._genome(loaded, self._opened(loaded, verify=False)) if self.banks else self._planned(loaded)

    def _planned(self, loaded: LoadedModel) -> Genome:
        """What banks that are yet to be built will make of the model, but for their errors."""
        tables: dict[str, Any] = {}
        for kind in self.bank_kinds:
            layers = layers_for(loaded, kind)
            recipe = self._bank_request(kind).recipe(layers, loaded.dtype)
            # Errors that fall as bytes grow, so that each form is worth having.
            costs = [replace(one, errors=-one.bytes.astype(np.float64)) for one in map(recipe.planned, layers)]
            tables[kind] = costs, recipe.labels
        return model_genome(loaded, tables, self.unit, drop=self.drops)

    def _opened(self, loaded: LoadedModel, *, verify: bool = True) -> list[Bank]:
        """The banks that were given, in the order of their kinds."""
        banks = open_banks(self.banks, loaded, verify=verify)
        if sorted(bank.kind for bank in banks) != sorted(self.bank_kinds):
            got = ", ".join(f"{bank.path} of kind {bank.kind}" for bank in banks)
            hint = (
                "; quantize takes banks of types of ggml with --method gguf"
                if any(b.kind == GGUF for b in banks)
                else ""
            )
            raise BankError(f"expected a bank of kind {' and '.join(self.bank_kinds)}, got {got}{hint}")
        return sorted(banks, key=lambda bank: self.bank_kinds.index(bank.kind))

    def _genome(self, loaded: LoadedModel, banks: Sequence[Bank]) -> Genome:
        """What banks make of the model."""
        tables: Tables = {bank.kind: (bank.layers, bank.labels) for bank in banks}
        return model_genome(loaded, tables, self.unit, drop=self.drops)

    def _bank_request(self, kind: str) -> BankRequest:
        own: dict[str, dict[str, Any]] = {
            "quantization": {"bits": self.widths, "group_size": self.group_size, "symmetric": self.symmetric},
            "sparsity": {"target": self.target, "levels": self.levels, "step": self.step},
            GGUF: {"types": self.types, "imatrix": self.imatrix},
        }
        return BankRequest(
            model=self.model,
            kind=kind,
            method=self.method_of(kind),
            calibration=self.calibration,
            calibration_tokens=self.bank_tokens,
            sequence_length=self.sequence_length,
            **own[kind],
        )

    @property
    def target(self) -> float:
        """The level in the middle of a sparsity bank."""
        return float(self.budget.amount) if self.budget.measure == "sparsity" else 0.5


_BASELINES = {
    "uniform": "uniform",
    "random": "random (best of the start candidates)",
    "additive": "additive (layer errors)",
    "measured": "additive (measured losses)",
}


@dataclass(frozen=True, kw_only=True)
class QuantizeRequest(BankSearchRequest):
    """What was asked of `discopt llm quantize`."""

    command: ClassVar[str] = "llm quantize"
    presets: ClassVar[Mapping[str, Preset]] = QUANTIZATION_PRESETS
    known_baselines: ClassVar[Mapping[str, str]] = _BASELINES
    measures: ClassVar[tuple[str, ...]] = ("bits", "bpw", "size")

    method: str = "gptq"  # or rtn, or gguf: the types of ggml

    def __post_init__(self) -> None:
        if self.method not in (known := (*METHODS["quantization"], GGUF)):
            raise ValueError(f"method must be one of {', '.join(known)}, got {self.method!r}")
        super().__post_init__()

    @property
    def bank_kinds(self) -> tuple[str, ...]:
        return (GGUF,) if self.method == GGUF else ("quantization",)


@dataclass(frozen=True, kw_only=True)
class SparsifyRequest(BankSearchRequest):
    """What was asked of `discopt llm sparsify`."""

    command: ClassVar[str] = "llm sparsify"
    presets: ClassVar[Mapping[str, Preset]] = SPARSITY_PRESETS
    known_baselines: ClassVar[Mapping[str, str]] = {**_BASELINES, "owl": "OWL (best of its grid)"}
    measures: ClassVar[tuple[str, ...]] = ("sparsity", "size")

    method: str = "sparsegpt"

    @property
    def bank_kinds(self) -> tuple[str, ...]:
        return ("sparsity",)


@dataclass(frozen=True, kw_only=True)
class CompressRequest(BankSearchRequest):
    """What was asked of `discopt llm compress`."""

    command: ClassVar[str] = "llm compress"
    presets: ClassVar[Mapping[str, Preset]] = QUANTIZATION_PRESETS
    known_baselines: ClassVar[Mapping[str, str]] = _BASELINES
    measures: ClassVar[tuple[str, ...]] = ("size", "bpw")

    group: str = "none"
    kinds: tuple[str, ...] = KINDS

    def __post_init__(self) -> None:
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise ValueError(f"kinds must be among {', '.join(KINDS)}, got {', '.join(unknown)}")
        if not self.bank_kinds:
            raise ValueError(f"kinds must hold {' or '.join(KINDS[:0:-1])}, got {', '.join(self.kinds) or 'none'}")
        if self.drops and self.trade in ("size", "name"):
            raise ValueError(
                f"what is dropped pays for units of any size: group must be none or runtime, got {self.trade}"
            )
        super().__post_init__()

    @property
    def bank_kinds(self) -> tuple[str, ...]:
        return tuple(kind for kind in METHODS if kind in self.kinds and kind in KINDS)

    @property
    def drops(self) -> bool:
        return DROP in self.kinds


@dataclass(frozen=True, eq=False)
class BankTask(Task):
    """Giving every unit of a model one of its levels."""

    request: BankSearchRequest
    loaded: LoadedModel
    levels: BankLevels
    space: SearchSpace

    @property
    def title(self) -> str:
        words = {"quantization": "Quantization", "sparsity": "Sparsity", "mixed": "Compression", GGUF: "Quantization"}
        return f"{words[self.genome.kind]} of {self.request.model}"

    @property
    def genome(self) -> Genome:
        return self.levels.genome

    @property
    def bank_fingerprints(self) -> tuple[str, ...]:
        return tuple(bank.fingerprint for bank in self.levels.banks)

    def at(self, request: BankSearchRequest) -> BankTask:
        space = self.genome.space(request.budget, request.trade)
        return replace(self, request=request.with_banks(self.levels.banks), space=space)

    def expected(self, heuristics: Heuristics, prepared: Prepared, *, quiet: bool) -> NDArray[np.float64]:
        """Of what was measured, else of the layer errors."""
        return self.genome.errors if heuristics.prior is None else heuristics.prior

    def changes(self) -> dict[str, Any]:
        """Where units of all groups trade, budget crosses unequal costs; only an exchange drops sub-blocks."""
        group = self.request.trade
        if self.space.bundles or (self.genome.kind == "mixed" and group == "runtime"):
            return {"rule": "exchange"}
        return {"rule": self.request.chosen.rule} if group == "none" else {}

    def read(self, path: str) -> LevelNumbers:
        return read_bank_student(path, self.loaded, self.genome)

    def heuristics(self, prepared: Prepared, evaluator: Measurer, *, quiet: bool) -> Heuristics:
        """Uniform and the additive ones; the best of several random profiles, and of OWL's grid, by measurement."""
        request, space, genome = self.request, self.space, self.genome
        chosen = request.chosen
        sample = prepared.calibration.sample(min(chosen.start_fidelity, prepared.calibration.tokens), request.seed)
        fitness = fitness_by_name(request.fitness)
        measured = Measured(evaluator, sample, fitness, quiet=quiet, remembered=prepared.remembered)
        uniform = allocation.uniform(genome, space)
        profiles: dict[str, tuple[LevelNumbers, int]] = {}
        effects: NDArray[np.float64] | None = None
        competes = chosen.start == "heuristics"
        for name in request.known_baselines:
            if name not in request.compared and not (competes and name != "random"):
                continue
            if name == "uniform":
                profiles[name] = uniform, 0
            elif name == "additive":
                profiles[name] = allocation.additive(genome, space), 0
            elif name == "measured":
                effects, tokens = measured.effects(genome, uniform)
                profiles[name] = solve_separable(space, effects), tokens
            elif name == "random":
                profiles[name] = measured.random(space, chosen.start_candidates, request.seed)
            elif name == "owl":
                profiles[name] = measured.best("OWL", allocation.owl(self.levels.banks[0], genome, space))
        rivals = [profile for name, (profile, _) in profiles.items() if name not in ("uniform", "random")]
        return Heuristics(
            methods=tuple(
                Method(request.known_baselines[name], profile, tokens)
                for name, (profile, tokens) in profiles.items()
                if name in request.compared
            ),
            rivals=tuple(rivals),
            tokens=sum(tokens for name, (_, tokens) in profiles.items() if name != "random"),
            start=uniform,
            references=tuple(
                profile for name, (profile, _) in profiles.items() if name in ("uniform", "additive", "measured")
            ),
            prior=effects,
        )

    def document(self, profile: LevelNumbers) -> Profile:
        genome, loaded = self.genome, self.loaded
        return Profile(
            genome.kind,
            genome.unit,
            loaded.source,
            loaded.fingerprint,
            genome.names,
            profile,
            banks=tuple(BankReference(str(bank.path.resolve()), bank.fingerprint) for bank in self.levels.banks),
            labels=genome.labels_of(profile),
        )

    def text(self, profile: LevelNumbers) -> str:
        return text_from_labels(labels_from_levels(profile, self.genome.layer_names, self.genome.labels))

    def asked(self) -> dict[str, Any]:
        return {self.request.budget.measure: str(self.request.budget)}

    def met(self, profile: LevelNumbers) -> dict[str, Any]:
        return self.genome.costs.met(profile)

    def sentence(self, profile: LevelNumbers) -> str:
        request = self.request
        of_groups = request.trade in ("size", "name") and request.chosen.algorithm == "evopress"
        group = request.trade if of_groups or request.trade == "runtime" else "none"
        banks = [f"- `{bank.path}`: {bank_words(bank)}" for bank in self.levels.banks]
        return (
            f"Asked: {request.budget.words} for `{request.model}`. Met: {met_words(self.met(profile))}.\n\n"
            f"{_TRADES[group]} The levels come from\n\n" + "\n".join(banks)
        )

    def listing(self, profile: LevelNumbers) -> str:
        return "## The levels\n\n" + levels_listing(self.genome, profile)

    def draw(self, profile: LevelNumbers, path: Path) -> None:
        plot_levels(self.genome, profile, path)


# What `discopt resume` calls, by entry points.
resume_quantize = partial(resume, QuantizeRequest)
resume_sparsify = partial(resume, SparsifyRequest)
resume_compress = partial(resume, CompressRequest)
