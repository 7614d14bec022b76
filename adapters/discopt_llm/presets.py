"""Named search settings: the published ones (EvoPress, Table 8), and smaller ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

from discopt.optimizers.evopress import Stage


@dataclass(frozen=True)
class Preset:
    """Settings of a search; all sizes in tokens."""

    summary: str
    offspring: int
    stages: tuple[Stage, ...]
    start_candidates: int
    start_fidelity: int
    sequence_length: int  # at most; a model with fewer positions gets its own number
    baseline_tokens: int  # for scores of the dense model
    eval_tokens: int | None  # held-out; None is all there is
    generations: int | None = None  # None: k (n - k) / 1.5 to drop k of n blocks
    start: str = "heuristics"  # see search.STARTS
    bank_tokens: int | None = None  # to build a bank with; None is all there is
    algorithm: str = "evopress"  # or learning
    rule: str = "exchange"  # how budget crosses groups where units of all groups may trade


DROP_PRESETS = {
    "paper": Preset(
        "EvoPress, Table 8: 32 offspring, 2@2048 1@32768",
        offspring=32,
        stages=(Stage(2, 2048), Stage(1, 32768)),
        start_candidates=64,
        start_fidelity=2048,
        sequence_length=8192,
        baseline_tokens=32768,
        eval_tokens=None,
        start="random",
    ),
    "fast": Preset(
        "EvoPress, Table 8, super-fast: 16 offspring, 1@512 1@8192",
        offspring=16,
        stages=(Stage(1, 512), Stage(1, 8192)),
        start_candidates=32,
        start_fidelity=512,
        sequence_length=2048,
        baseline_tokens=8192,
        eval_tokens=16384,
        algorithm="learning",
    ),
    "demo": Preset(
        "minutes on two CPU cores for a model of 100M parameters",
        offspring=16,
        stages=(Stage(2, 256), Stage(1, 1024)),
        start_candidates=16,
        start_fidelity=256,
        sequence_length=256,
        baseline_tokens=2048,
        eval_tokens=4096,
        generations=11,
        algorithm="learning",
    ),
}

_PUBLISHED = Preset(
    "EvoPress, Table 8: 64 offspring, 8@2048 2@16384 1@65536, 400 generations",
    offspring=64,
    stages=(Stage(8, 2048), Stage(2, 16384), Stage(1, 65536)),
    start_candidates=64,
    start_fidelity=2048,
    sequence_length=8192,
    baseline_tokens=32768,
    eval_tokens=None,
    generations=400,
    start="auto",
    bank_tokens=2**23,
    rule="across",
)
_SMALL = {
    "fast": replace(
        DROP_PRESETS["fast"],
        summary="EvoPress, Table 8, super-fast: 16 offspring, 1@512 1@8192, 400 generations",
        generations=400,
    ),
    "demo": replace(
        DROP_PRESETS["demo"],
        stages=(Stage(2, 512), Stage(1, 2048)),
        generations=8,
        bank_tokens=16384,
    ),
}
SPARSITY_PRESETS = {"paper": _PUBLISHED, **_SMALL}
QUANTIZATION_PRESETS = {
    "paper": replace(
        _PUBLISHED,
        summary="EvoPress, Table 8: 128 offspring, 16@2048 4@16384 1@131072, 150 generations",
        offspring=128,
        stages=(Stage(16, 2048), Stage(4, 16384), Stage(1, 131072)),
        generations=150,
    ),
    **_SMALL,
}


def published_generations(blocks: int, dropped: int) -> int:
    """k (n - k) / 1.5 to drop k of n blocks (EvoPress, Table 8), at least 1."""
    return max(1, round(dropped * (blocks - dropped) / 1.5))
