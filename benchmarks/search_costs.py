"""Operations and bytes of one EvoPress quantization search at its published setting (METHOD: "Table 8"), counted.

How much of the work candidates share is measured on populations that the real mutation makes. `shapes` has the
formulae of the models, `scale` makes the tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray
from shapes import HALF, WIDTHS, Shape, mean_keys

from discopt import SearchSpace
from discopt.mutation import offspring
from discopt_llm.evaluator_plan import Plan, Row
from discopt_llm.memory import TOKENS_PER_CALL
from discopt_llm.presets import QUANTIZATION_PRESETS

PAPER = QUANTIZATION_PRESETS["paper"]
BITS = 3  # average width
DRIFT = 50  # generations from the uniform start to the parent whose offspring are looked at
SAMPLES = 10  # generations that figures of a population are means of
HOUR = 3600.0

Rows = NDArray[np.integer]  # (k, n) levels


@dataclass(frozen=True)
class Machine:
    """What a device holds, bytes, and what it sustains, per second; docs/scale.md says where the figures come from."""

    memory: float
    halves: float  # operations of matrix products in 16 bits
    singles: float  # and in 32
    link: float  # bytes from the host to the device
    disk: float  # bytes from the disk to the host

    @property
    def states(self) -> float:
        """What the evaluator takes for hidden states: half of the quarter that is for computing."""
        return self.memory / 8

    @property
    def weights(self) -> float:
        """What is left for weights."""
        return self.memory * 3 / 4


@dataclass(frozen=True)
class LayerLevels:
    """Levels of a bank as the evaluator's plan asks for them: every layer of every block is a unit."""

    blocks: int
    per_block: int

    @cached_property
    def block_units(self) -> tuple[NDArray[np.intp], ...]:
        return tuple(np.arange(self.blocks * self.per_block).reshape(self.blocks, self.per_block))

    @property
    def end_units(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        return np.empty(0, np.intp), np.empty(0, np.intp)

    def dense_row(self, block: int) -> None:
        """As of any bank, none."""

    def runs(self, block: int, row: Row) -> int:
        return 2


def fresh_blocks(shape: Shape, population: Rows) -> NDArray[np.int64]:
    """Blocks that distinct rows, sorted by prefix, do not share with the row before: (k,)."""
    levels = LayerLevels(shape.blocks, len(shape.layers))
    rows = Plan.of(population, levels, [False] * shape.blocks).rows[:, 1:-1]  # (k + 1, blocks), the teacher's first
    return shape.blocks - (np.diff(rows, axis=0) != 0).argmax(axis=1)


def steps(shape: Shape, fresh: NDArray[np.int64]) -> int:
    """Blocks that the evaluator runs on each token of neighbours among such rows, and of the teacher."""
    return 2 * shape.blocks + int(fresh[1:].sum())


@dataclass(frozen=True)
class Stage:
    """What measuring the population of a stage takes; means over some generations."""

    candidates: int
    tokens: int
    steps: float  # blocks that are run on each token, those of the teacher included
    forms: float  # layers at some width that are needed
    packed: float  # bytes of these

    def share(self, shape: Shape) -> float:
        """Of the blocks that one forward for each candidate and the teacher would run."""
        return self.steps / ((self.candidates + 1) * shape.blocks)

    def operations(self, shape: Shape) -> float:
        """Of the block-wise form: what is left of the blocks, and a head for each candidate and the teacher."""
        return self.tokens * (
            self.steps * shape.block_operations(keys_of(self.tokens)) + (self.candidates + 1) * shape.head_operations
        )

    def plain_operations(self, shape: Shape) -> float:
        """Of one forward for each candidate; the teacher's logits are there."""
        return self.tokens * self.candidates * forward_operations(shape, self.tokens)

    def state_bytes(self, shape: Shape) -> float:
        """Hidden states, if all candidates went through the model at once."""
        return self.tokens * (self.candidates + 1) * shape.hidden * HALF

    def passes(self, shape: Shape, machine: Machine) -> int:
        """Times that the weights go by, so that the hidden states fit."""
        return int(np.ceil(self.state_bytes(shape) / machine.states))

    def moved(self, shape: Shape, machine: Machine) -> float:
        """Bytes to the device in a pass: what does not stay there of the teacher's blocks and the forms."""
        all_of_them = HALF * shape.blocks * shape.block_weights + self.packed
        return max(0.0, all_of_them - (machine.weights - HALF * shape.end_weights))


@cache
def search_space(shape: Shape) -> SearchSpace:
    """Widths for every layer, layers of one size trading, as `quantize --bits 3 --group size`."""
    weights = np.array([rows * columns for rows, columns in shape.layers.values()] * shape.blocks)
    return SearchSpace.build(np.outer(weights, WIDTHS), BITS * int(weights.sum()), group=[str(w) for w in weights])


@cache
def generation(shape: Shape, seed: int) -> tuple[Rows, ...]:
    """Populations of the stages of one generation; who survives is drawn, as the losses are not known."""
    rng, space = np.random.default_rng(seed), search_space(shape)
    parent = np.full((1, space.n), WIDTHS.index(BITS), dtype=np.int16)
    for _ in range(DRIFT):
        parent = offspring(parent, 1, space, rng)
    population = offspring(parent, PAPER.offspring, space, rng)
    stages = [population]
    for stage in PAPER.stages[:-1]:
        chosen = rng.choice(len(stages[-1]), stage.survivors, replace=False)
        stages.append(stages[-1][np.sort(chosen)])
    stages[-1] = np.concatenate([stages[-1], parent])
    return tuple(stages)


@cache
def fresh_of(shape: Shape, seed: int) -> tuple[NDArray[np.int64], ...]:
    """`fresh_blocks` of the stages of a generation."""
    return tuple(fresh_blocks(shape, population) for population in generation(shape, seed))


@cache
def stages_of(shape: Shape) -> tuple[Stage, ...]:
    """The stages of a generation, on average."""
    sizes = [shape.layer_bytes(bits) for bits in WIDTHS]  # by width and layer of a block
    table = np.tile(np.array(sizes).T, (shape.blocks, 1))  # (n, m)
    found = []
    for i, stage in enumerate(PAPER.stages):
        populations = [generation(shape, seed)[i] for seed in range(SAMPLES)]
        used = [(p[:, :, None] == np.arange(len(WIDTHS))).any(axis=0) for p in populations]  # (n, m)
        found.append(
            Stage(
                candidates=len(populations[0]),
                tokens=stage.fidelity,
                steps=float(np.mean([steps(shape, fresh_of(shape, seed)[i]) for seed in range(SAMPLES)])),
                forms=float(np.mean([mask.sum() for mask in used])),
                packed=float(np.mean([table[mask].sum() for mask in used])),
            )
        )
    return tuple(found)


def slice_operations(shape: Shape, fresh: NDArray[np.int64], tokens: int, workers: int) -> list[float]:
    """What each of some workers computes, if they get contiguous slices of a population sorted by prefix."""
    parts = np.array_split(fresh, min(workers, len(fresh)))
    return [Stage(len(part), tokens, steps(shape, part), 0, 0).operations(shape) for part in parts]


@dataclass(frozen=True)
class SpeedUp:
    """Of some workers over one, and their work together over that of one."""

    stages: tuple[float, ...]
    generation: float
    work: float
    rows_alone: float  # of a generation, if stages were never cut by their sequences

    @classmethod
    def of(cls, shape: Shape, workers: int) -> SpeedUp:
        one, most, total, alone = np.zeros((4, len(PAPER.stages)))
        per_call = max(1, TOKENS_PER_CALL["cuda"] // PAPER.sequence_length)  # sequences
        for seed in range(SAMPLES):
            for i, (fresh, stage) in enumerate(zip(fresh_of(shape, seed), PAPER.stages, strict=True)):
                tokens = stage.fidelity
                sequences = -(-tokens // PAPER.sequence_length)
                calls = -(-sequences // per_call)
                across = min(calls, workers)
                largest = min(1.0, -(-calls // across) * per_call / sequences)
                parts = slice_operations(shape, fresh, tokens, workers // across)
                one[i] += slice_operations(shape, fresh, tokens, 1)[0]
                most[i] += largest * max(parts)
                total[i] += sum(parts)
                alone[i] += max(slice_operations(shape, fresh, tokens, workers))
        return cls(tuple(one / most), one.sum() / most.sum(), total.sum() / one.sum(), one.sum() / alone.sum())


@dataclass(frozen=True)
class BankCost:
    """Building a GPTQ bank of all widths, operations."""

    forwards: float
    hessians: float
    solves: float

    @classmethod
    def of(cls, shape: Shape, tokens: int, *, forwards: int) -> BankCost:
        """Of so many tokens; two forwards where a block's outputs are those of its quantized weights."""
        of_block = sum(count * C**2 for C, count in shape.inputs.items())
        return cls(
            forwards=float(forwards * tokens * shape.blocks * shape.block_operations(keys_of(tokens))),
            hessians=2.0 * tokens * of_block * shape.blocks,
            solves=shape.blocks * (sum(map(sweep_operations, shape.layers.values())) + _factors(shape)),
        )

    def hours(self, machine: Machine) -> float:
        """Forwards in 16 bits, the others in 32."""
        return (self.forwards / machine.halves + (self.hessians + self.solves) / machine.singles) / HOUR


def sweep_operations(layer: tuple[int, int], widths: int = len(WIDTHS)) -> float:
    """Of a layer (R, C) at all widths: R C^2 to feed errors back at each, and as many for the norm of the weights."""
    R, C = layer
    return float(R * C**2 * (widths + 1))


def factor_operations(C: int) -> float:
    """Of a Hessian (C, C): a Cholesky factorisation and a triangular inverse, C^3 / 3 each."""
    return 2 * C**3 / 3


def _factors(shape: Shape) -> float:
    return sum(count * factor_operations(C) for C, count in shape.inputs.items())


def keys_of(tokens: int) -> float:
    """Keys of a position on average, in a sample of so many tokens."""
    return mean_keys([min(tokens, PAPER.sequence_length)])


def forward_operations(shape: Shape, tokens: int) -> float:
    """Operations of one position through the whole model."""
    return shape.blocks * shape.block_operations(keys_of(tokens)) + shape.head_operations
