"""Named search settings: the published ones (EvoPress, Table 8), and smaller ones."""

from __future__ import annotations

from dataclasses import dataclass

from discopt.optimizers.evopress import Stage


@dataclass(frozen=True)
class Preset:
    """Settings of a depth-pruning search; all sizes in tokens."""

    summary: str
    offspring: int
    stages: tuple[Stage, ...]
    start_candidates: int
    start_fidelity: int
    sequence_length: int  # at most; a model with fewer positions gets its own number
    baseline_tokens: int  # for scores of the dense model
    eval_tokens: int | None  # held-out; None is all there is
    generations: int | None = None  # None: k (n - k) / 1.5 to drop k of n blocks
    start: str = "heuristics"  # "random" is the paper's; "heuristics" lets those compete with the best random one


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
    ),
}


def published_generations(blocks: int, dropped: int) -> int:
    """k (n - k) / 1.5 to drop k of n blocks (EvoPress, Table 8), at least 1."""
    return max(1, round(dropped * (blocks - dropped) / 1.5))
