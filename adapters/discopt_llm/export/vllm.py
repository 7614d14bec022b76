"""What vLLM asks of a quantized model beyond the compressed-tensors format, so that a file is known to fit beforehand.

Read from vLLM 0.33.0: `layers/quantization/compressed_tensors` (its config, the scheme WNA16, the matching of fused
layers) and the kernels for products of mixed precision. Layers that it computes in one product share a scheme. Its
kernels for 4 and 8 bits (Machete, Marlin) run on most NVIDIA GPUs and take a scale for each row, or for 32, 64 or 128
columns; other widths go through a kernel named Humming. That takes zero points of other widths as well, which releases
before it refuse: only 4 and 8 bits are counted on here. Codes of a row, and zero points of a column, must fill words
of 32 bits, so that those of fused layers can be joined and split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from discopt_llm.export.schemes import Scheme

__all__ = ["BrokenRule", "StoredLayer", "broken_rules", "search_options"]

WIDTHS = range(2, 9)
ZERO_POINT_WIDTHS = (4, 8)
GROUP_SIZES = (32, 64, 128)
WORD = 32  # bits


@dataclass(frozen=True)
class StoredLayer:
    """A layer in a file."""

    name: str
    block: int
    kind: str  # of the sub-block it belongs to
    input: int  # of its block; layers of a sub-block with the same one are fused
    rows: int
    columns: int
    scheme: Scheme | None  # None: not quantized


@dataclass(frozen=True)
class BrokenRule:
    """Why vLLM would not run a file."""

    what: str
    option: str  # to search with; empty if none helps


def broken_rules(layers: Sequence[StoredLayer]) -> tuple[BrokenRule, ...]:
    """The rules that some layers break, each once, with an example."""
    found: dict[str, BrokenRule] = {}
    for rule in (_fused(layers), *(rule for layer in layers for rule in _of_layer(layer, layers))):
        if rule is not None:
            found.setdefault(rule.what.partition(",")[0], rule)
    return tuple(found.values())


def search_options(rules: Sequence[BrokenRule]) -> str:
    """What to search with so that these rules hold: "search with --group runtime"; empty if nothing is known."""
    options = " ".join(dict.fromkeys(rule.option for rule in rules if rule.option))
    return options and f"search with {options}"


def _fused(layers: Sequence[StoredLayer]) -> BrokenRule | None:
    """Layers that are one product there must be quantized alike."""
    members: dict[tuple[int, str, int], list[StoredLayer]] = {}
    for layer in layers:
        members.setdefault((layer.block, layer.kind, layer.input), []).append(layer)
    for fused in members.values():
        schemes = {layer.scheme: None for layer in fused}
        if len(schemes) > 1:
            names = " and ".join([fused[0].name, *(layer.name.rpartition(".")[2] for layer in fused[1:])])
            words = " and ".join("16 bits" if scheme is None else scheme.words for scheme in schemes)
            return BrokenRule(f"it computes layers with one input together, got {names} in {words}", "--group runtime")
    return None


def _of_layer(layer: StoredLayer, layers: Sequence[StoredLayer]) -> list[BrokenRule]:
    scheme = layer.scheme
    if scheme is None:
        return []
    rules = []
    if scheme.bits not in WIDTHS:
        rules.append(BrokenRule(f"it takes 2 to 8 bits, got {scheme.bits} in {layer.name}", "--widths 4,8"))
    if not scheme.symmetric and scheme.bits not in ZERO_POINT_WIDTHS:
        what = f"it takes zero points at 4 and 8 bits only, got {scheme.bits} in {layer.name}"
        rules.append(BrokenRule(what, "--symmetric"))
    if scheme.group_size not in (None, *GROUP_SIZES):
        sizes = [size for size in GROUP_SIZES if all(other.columns % size == 0 for other in layers)]
        what = f"it takes a scale for 32 or 64 or 128 columns or a whole row, got {scheme.group_size} in {layer.name}"
        rules.append(BrokenRule(what, f"--group-size {max(sizes, default=0)}"))
    if layer.columns * scheme.bits % WORD:
        what = f"it takes rows of whole words of {WORD} bits, got {layer.columns} columns of {scheme.bits} bits"
        whole = ",".join(str(bits) for bits in (4, 8) if layer.columns * bits % WORD == 0)
        rules.append(BrokenRule(f"{what} in {layer.name}", f"--widths {whole}" if whole else ""))
    if not scheme.symmetric and layer.rows * scheme.bits % WORD:
        what = f"it takes columns of zero points in whole words of {WORD} bits, got {layer.rows} of {scheme.bits} bits"
        rules.append(BrokenRule(f"{what} in {layer.name}", "--symmetric"))
    return rules
