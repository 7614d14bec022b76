"""Sizes of Llama-shaped models, and what they cost: weights, bytes and floating-point operations.

A multiplication and an addition are two operations. Attention is causal, so a position has (L + 1) / 2 keys on average.
Norms, rotary angles and activations are left out: they are no matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from discopt_llm.bank_forms import quantized_costs

WIDTHS = (2, 3, 4, 5, 6)  # levels of METHOD's quantization setting
GROUP_SIZE = 128
HALF = 2  # bytes of a weight in 16 bits


@dataclass(frozen=True)
class Shape:
    """A decoder of equal blocks: attention with grouped keys, and a gated MLP."""

    hidden: int
    inner: int  # width of the MLP
    blocks: int
    heads: int
    key_heads: int
    vocabulary: int
    tied: bool = False  # the head is the embedding

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.heads % self.key_heads:
            raise ValueError(f"heads must divide the hidden size and key heads the heads, got {self}")

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """The weight matrices of a block, (outputs, inputs) each, in the order of use."""
        keys = self.hidden // self.heads * self.key_heads
        return {
            "q": (self.hidden, self.hidden),
            "k": (keys, self.hidden),
            "v": (keys, self.hidden),
            "o": (self.hidden, self.hidden),
            "gate": (self.inner, self.hidden),
            "up": (self.inner, self.hidden),
            "down": (self.hidden, self.inner),
        }

    @property
    def inputs(self) -> dict[int, int]:
        """Widths of the inputs that layers of a block share (q, k, v; o; gate, up; down): width -> how many."""
        return {self.hidden: 3, self.inner: 1}

    @property
    def block_weights(self) -> int:
        """In the matrices of one block."""
        return sum(rows * columns for rows, columns in self.layers.values())

    @property
    def end_weights(self) -> int:
        """In embedding and head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def weights(self) -> int:
        """In all matrices."""
        return self.blocks * self.block_weights + self.end_weights

    def layer_bytes(self, bits: int) -> list[int]:
        """The layers of a block in a bank at one width: codes, scales and zero points of groups."""
        return [
            quantized_costs(1, rows, columns, bits, min(GROUP_SIZE, columns), symmetric=False).bytes
            for rows, columns in self.layers.values()
        ]

    def packed_bytes(self, bits: int) -> int:
        """One block in a bank at one width."""
        return sum(self.layer_bytes(bits))

    def bank_bytes(self, widths: Sequence[int] = WIDTHS) -> int:
        """A bank of all blocks at all widths."""
        return self.blocks * sum(self.packed_bytes(bits) for bits in widths)

    def block_operations(self, keys: float) -> float:
        """Of one position in one block, with so many keys."""
        return 2.0 * self.block_weights + 4.0 * keys * self.hidden

    @property
    def head_operations(self) -> int:
        """Of one position in the head."""
        return 2 * self.vocabulary * self.hidden


def mean_keys(lengths: Sequence[int]) -> float:
    """Keys of a position, on average over sequences of these lengths, with causal attention."""
    return sum(n * (n + 1) / 2 for n in lengths) / sum(lengths)


SHAPES = {
    "tiny": Shape(64, 128, 4, 4, 2, 512, tied=True),
    "135m": Shape(576, 1536, 30, 9, 3, 49152, tied=True),
    "1b": Shape(2048, 8192, 16, 32, 8, 128256, tied=True),
    "8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "70b": Shape(8192, 28672, 80, 64, 8, 128256),
    "405b": Shape(16384, 53248, 126, 128, 8, 128256),
}


def larger_than(memory: int) -> Shape:
    """As many blocks of the 70B model as need a quarter more than `memory`, bytes, in 16 bits."""
    big = SHAPES["70b"]
    blocks = -(-(memory * 5 // 4 - HALF * big.end_weights) // (HALF * big.block_weights))
    return Shape(big.hidden, big.inner, max(1, blocks), big.heads, big.key_heads, big.vocabulary)
