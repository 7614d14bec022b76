"""`discopt llm quantize`, `sparsify` and `compress`: searches over the levels of banks as tasks of the search."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from discopt.separable import solve_separable
from discopt.space import Levels as LevelNumbers
from discopt.space import SearchSpace
from discopt_llm import allocation
from discopt_llm.allocation import Measured
from discopt_llm.bank import Bank, BankLayer
from discopt_llm.banks import METHODS, OPTIONS, BankRequest, bank_plan, bank_words, default_folder
from discopt_llm.budget import Budget
from discopt_llm.build import build_bank
from discopt_llm.errors import BankError
from discopt_llm.evaluator import Evaluator
from discopt_llm.fitness import fitness_by_name
from discopt_llm.genome import GROUPS, Genome
from discopt_llm.heldout import Method
from discopt_llm.levels import BankLevels
from discopt_llm.models import LoadedModel
from discopt_llm.presets import QUANTIZATION_PRESETS, SPARSITY_PRESETS, Preset
from discopt_llm.profile import BankReference, Profile
from discopt_llm.profile_text import labels_from_levels, text_from_labels
from discopt_llm.report import levels_listing, met_words, plot_levels
from discopt_llm.search import STARTS, Heuristics, Prepared, Say, SearchRequest, Task, feasible_start, resume
from discopt_llm.students import genome_of, open_banks, parameters_outside, read_bank_student

DROP = "drop"
KINDS = (DROP, *reversed(METHODS))
_TRADES = {
    "size": "Each layer has a level of its own; layers with as many weights may trade.",
    "name": "Each layer has a level of its own; layers of one name may trade.",
    "none": "Each layer has a level of its own; all may trade.",
    "runtime": "Layers that inference engines fuse (q, k, v; gate, up) have one level.",
}
_RENAMED = {"bits": "widths"}  # options of a bank that are called otherwise here


@dataclass(frozen=True, kw_only=True)
class BankSearchRequest(SearchRequest):
    """What the searches over banks have in common."""

    measures: ClassVar[tuple[str, ...]]  # the budgets that make sense, one of which is to be given

    bits: str | None = None  # average over the units
    bpw: str | None = None  # with scales, zero points and masks
    size: str | None = None  # of the whole model file
    sparsity: str | None = None
    banks: tuple[str, ...] = ()  # folders; () builds what is missing
    group: str = "size"
    group_size: int = 128
    symmetric: bool = False
    widths: tuple[int, ...] = (2, 3, 4, 5, 6)
    levels: int = 17
    step: int | None = None
    bank_tokens: int | None = None

    def __post_init__(self) -> None:
        given = [measure for measure in ("bits", "bpw", "size", "sparsity") if getattr(self, measure) is not None]
        if len(given) != 1 or given[0] not in self.measures:
            options = " or ".join(f"--{measure}" for measure in self.measures)
            raise ValueError(f"expected one budget, {options}, got {', '.join(given) or 'none'}")
        if self.group not in GROUPS:
            raise ValueError(f"group must be one of {', '.join(GROUPS)}, got {self.group!r}")
        _ = self.budget
        for kind in self.bank_kinds:
            self._bank_request(kind)
        self._check_bank_options()
        super().__post_init__()

    def _check_bank_options(self) -> None:
        """Raise ValueError for options that would go unheard."""
        of_kind = {_RENAMED.get(name, name): kind for kind, names in OPTIONS.items() for name in names}
        for field in fields(self):
            if field.name not in (*of_kind, "method", "bank_tokens") or getattr(self, field.name) == field.default:
                continue
            if self.banks:
                raise ValueError(f"{field.name} is an option of a bank that is built, got a bank that is there")
            if of_kind.get(field.name, self.bank_kinds[0]) not in self.bank_kinds:
                got = ", ".join(self.bank_kinds)
                raise ValueError(f"{field.name} is an option of kind {of_kind[field.name]}, got kind {got}")

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
    def unit(self) -> str:
        """What a unit is."""
        return "runtime" if self.group == "runtime" else "layer"

    def method_of(self, kind: str) -> str | None:
        """How the levels of a kind are made; None: the best way there is."""
        return getattr(self, "method", None)

    def check(self, loaded: LoadedModel) -> None:
        """Raises DiscoptError for a budget that no profile meets, as far as that is known before a bank is built."""
        # Checksums, which take reading whole banks, are compared when the task opens them.
        genome = self._genome(loaded, self._opened(loaded, verify=False)) if self.banks else self._planned(loaded)
        space = genome.space(self.budget, self.group)
        if self.chosen.start not in STARTS:
            feasible_start(self.chosen.start, read_bank_student(self.chosen.start, loaded, genome), space)

    def task(self, loaded: LoadedModel, out: Path, *, quiet: bool, say: Say) -> BankTask:
        """The units and levels of this model, with the banks that hold them."""
        banks = self._opened(loaded) if self.banks else self._built(loaded, out, quiet=quiet, say=say)
        genome = self._genome(loaded, banks)
        space = genome.space(self.budget, self.group)
        return BankTask(self, loaded, BankLevels(loaded, loaded.layers, genome, banks), space)

    def _built(self, loaded: LoadedModel, out: Path, *, quiet: bool, say: Say) -> list[Bank]:
        """The banks that the options ask for, built where they are not there yet."""
        banks = []
        for kind in self.bank_kinds:
            plan = bank_plan(
                self._bank_request(kind), loaded, at_most=self.chosen.bank_tokens, length=self.chosen.sequence_length
            )
            folder = default_folder(plan, out.parent)
            say(f"bank: {folder}")
            banks.append(build_bank(plan, folder, quiet=quiet))
        return banks

    def _planned(self, loaded: LoadedModel) -> Genome:
        """What banks that are yet to be built will make of the model, but for their errors."""
        tables: dict[str, tuple[Sequence[BankLayer], Sequence[str]]] = {}
        for kind in self.bank_kinds:
            recipe = self._bank_request(kind).recipe(loaded.layers, loaded.dtype)
            planned = map(recipe.planned, loaded.layers)
            # Errors that fall as bytes grow, so that each form is worth having.
            costs = [replace(layer, errors=-layer.bytes.astype(np.float64)) for layer in planned]
            tables[kind] = costs, recipe.labels
        return genome_of(tables, self.unit, parameters_outside(loaded), drop=self.drops)

    def _opened(self, loaded: LoadedModel, *, verify: bool = True) -> list[Bank]:
        """The banks that were given, in the order of their kinds."""
        banks = open_banks(self.banks, loaded, verify=verify)
        if sorted(bank.kind for bank in banks) != sorted(self.bank_kinds):
            got = ", ".join(f"{bank.path} of kind {bank.kind}" for bank in banks)
            raise BankError(f"expected a bank of kind {' and '.join(self.bank_kinds)}, got {got}")
        return sorted(banks, key=lambda bank: self.bank_kinds.index(bank.kind))

    def _genome(self, loaded: LoadedModel, banks: Sequence[Bank]) -> Genome:
        """What banks make of the model."""
        tables = {bank.kind: (bank.layers, bank.labels) for bank in banks}
        return genome_of(tables, self.unit, parameters_outside(loaded), drop=self.drops)

    def _bank_request(self, kind: str) -> BankRequest:
        own: dict[str, Any] = (
            {"bits": self.widths, "group_size": self.group_size, "symmetric": self.symmetric}
            if kind == "quantization"
            else {"target": self.target, "levels": self.levels, "step": self.step}
        )
        return BankRequest(
            model=self.model,
            kind=kind,
            method=self.method_of(kind),
            calibration=self.calibration,
            calibration_tokens=self.bank_tokens,
            sequence_length=self.sequence_length,
            **own,
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

    method: str = "gptq"

    @property
    def bank_kinds(self) -> tuple[str, ...]:
        return ("quantization",)


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
            raise ValueError(f"kinds must hold {' or '.join(METHODS)}, got {', '.join(self.kinds) or 'none'}")
        if self.drops and self.group in ("size", "name"):
            raise ValueError(
                f"what is dropped pays for units of any size: group must be none or runtime, got {self.group}"
            )
        super().__post_init__()

    @property
    def bank_kinds(self) -> tuple[str, ...]:
        return tuple(kind for kind in METHODS if kind in self.kinds)

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
        words = {"quantization": "Quantization", "sparsity": "Sparsity", "mixed": "Compression"}
        return f"{words[self.genome.kind]} of {self.request.model}"

    @property
    def genome(self) -> Genome:
        return self.levels.genome

    @property
    def bank_fingerprints(self) -> tuple[str, ...]:
        return tuple(bank.fingerprint for bank in self.levels.banks)

    def changes(self) -> dict[str, Any]:
        """Where units of all groups trade, budget crosses unequal costs; only an exchange drops sub-blocks."""
        group = self.request.group
        if self.space.bundles or (self.genome.kind == "mixed" and group == "runtime"):
            return {"rule": "exchange"}
        return {"rule": self.request.chosen.rule} if group == "none" else {}

    def read(self, path: str) -> LevelNumbers:
        return read_bank_student(path, self.loaded, self.genome)

    def heuristics(self, prepared: Prepared, evaluator: Evaluator, *, quiet: bool) -> Heuristics:
        """Uniform and the additive ones; the best of several random profiles, and of OWL's grid, by measurement."""
        request, space, genome = self.request, self.space, self.genome
        chosen = request.chosen
        sample = prepared.calibration.sample(min(chosen.start_fidelity, prepared.calibration.tokens), request.seed)
        measured = Measured(evaluator, sample, fitness_by_name(request.fitness), quiet=quiet)
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
        of_groups = request.group in ("size", "name") and request.chosen.algorithm == "evopress"
        group = request.group if of_groups or request.group == "runtime" else "none"
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
