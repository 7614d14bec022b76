"""Depth-pruning baselines: scores of units and blocks, turned into profiles of the same space.

ShortGPT's block influence (Men et al., 2024, arXiv 2403.03853) is 1 - cosine of a block's input and output; the
window rule (Gromov et al., 2024, arXiv 2403.17887) drops the consecutive run of blocks whose ends are most alike.
Weight subcloning's norm ratio (Samragh et al., 2023, arXiv 2312.09299) is how long what a block adds is, beside its
output. These look at the dense model's own hidden states. Shortened LLaMA (Kim et al., 2024, arXiv 2402.02834)
measures the perplexity that is left without a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from discopt.space import Levels, SearchSpace
from discopt_llm.anatomy import embed, run_block, skipped_
from discopt_llm.drop import DropLevels
from discopt_llm.errors import ModelError
from discopt_llm.models import LoadedModel

Similarity = NDArray[np.float64]


@torch.inference_mode()
def similarity(loaded: LoadedModel, sequences: Sequence[Tensor], done: Callable[[], None] | None = None) -> Similarity:
    """Mean cosine over tokens between the residual stream at every two places: (2 blocks + 1, 2 blocks + 1).

    Place 2b is the input of block b, 2b + 1 lies between its attention and its MLP, the last is the last output.
    `done` is called after every sequence.
    """
    total: Tensor | None = None
    for sequence in sequences:
        places = _stream(loaded, sequence)
        unit = torch.nn.functional.normalize(places.float(), dim=-1)
        products = torch.einsum("itd,jtd->ij", unit, unit).double()
        total = products if total is None else total + products
        if done is not None:
            done()
    if total is None:
        raise ValueError("similarity needs at least one sequence, got none")
    mean: Similarity = (total / sum(len(sequence) for sequence in sequences)).cpu().numpy()
    return mean


def _stream(loaded: LoadedModel, sequence: Tensor) -> Tensor:
    """The residual stream of one sequence at every place: (L,) -> (2 blocks + 1, L, d)."""
    anatomy = loaded.anatomy
    hidden, arguments = embed(loaded.model, anatomy, sequence[None].to(loaded.device))
    places = [hidden]
    for block in anatomy.blocks:
        with skipped_([block.mlp]):
            middle = run_block(block, hidden, arguments[block.index])
        hidden = run_block(block, hidden, arguments[block.index])
        places += [middle, hidden]
    return torch.cat(places)


def shortgpt(similarity: Similarity, levels: DropLevels, space: SearchSpace) -> Levels:
    """Drop the blocks (or pairs) of least influence: (n,). Both sub-blocks of a block go, as in ShortGPT."""
    influence = [1 - similarity[2 * blocks[0], 2 * blocks[-1] + 2] for blocks in levels.blocks_of]
    return drop_lowest(space, np.array(influence))


def influences(similarity: Similarity, levels: DropLevels) -> NDArray[np.float64]:
    """The influence of every unit between its own ends, (n,). Sub-blocks are told apart."""
    ends = np.cumsum([0] + [len(parts) for parts in levels.units])
    return 1 - similarity[ends[:-1], ends[1:]]


def unit_influence(similarity: Similarity, levels: DropLevels, space: SearchSpace) -> Levels:
    """Drop the units of least influence: (n,)."""
    return drop_lowest(space, influences(similarity, levels))


def window_cosine(similarity: Similarity, levels: DropLevels, space: SearchSpace) -> Levels:
    """Drop the shortest run of consecutive blocks that meets the budget, the one whose ends are most alike: (n,).

    Raises ModelError if no run does, since protected blocks are in the way.
    """
    blocks = len(similarity) // 2
    for length in range(blocks + 1):
        runs = {}
        for first in range(blocks - length + 1):
            run = range(first, first + length)
            gone = np.array([set(of) <= set(run) for of in levels.blocks_of])
            whole = set(run) == {block for of, g in zip(levels.blocks_of, gone, strict=True) if g for block in of}
            profile = np.where(gone, 0, 1).astype(np.int16)
            if whole and space.feasible(profile[None])[0]:
                runs[float(similarity[2 * first, 2 * (first + length)])] = profile
        if runs:
            return runs[max(runs)]
    raise ModelError("no run of consecutive blocks meets the budget without dropping a protected one")


def unit_windows(similarity: Similarity, levels: DropLevels, space: SearchSpace, count: int) -> list[Levels]:
    """The `count` runs of consecutive units that meet the budget and whose ends are most alike, (n,) each.

    With sub-blocks a run may begin at an MLP, which no run of whole blocks does. Fewer come back where fewer fit.
    """
    ends = np.cumsum([0] + [len(parts) for parts in levels.units])
    runs: list[tuple[float, Levels]] = []
    for first in range(space.n):
        for last in range(first, space.n + 1):
            profile = space.dearest()
            profile[first:last] = 0
            if space.feasible(profile[None])[0]:
                runs.append((float(similarity[ends[first], ends[last]]), profile))
                break
    runs.sort(key=lambda run: -run[0])
    return [profile for _, profile in runs[:count]]


@torch.inference_mode()
def norm_ratios(
    loaded: LoadedModel, sequences: Sequence[Tensor], levels: DropLevels, done: Callable[[], None] | None = None
) -> NDArray[np.float64]:
    """Mean of ‖out - in‖ / ‖out‖ over tokens for the blocks of every unit, (n,); of whole blocks, as published.

    `done` is called after every sequence.
    """
    first = [2 * blocks[0] for blocks in levels.blocks_of]
    last = [2 * blocks[-1] + 2 for blocks in levels.blocks_of]
    total = np.zeros(len(levels.units))
    for sequence in sequences:
        places = _stream(loaded, sequence).float()
        ratio = (places[last] - places[first]).norm(dim=-1) / places[last].norm(dim=-1)  # (n, L)
        total += ratio.double().sum(dim=-1).cpu().numpy()
        if done is not None:
            done()
    if not sequences:
        raise ValueError("norm ratios need at least one sequence, got none")
    return total / sum(len(sequence) for sequence in sequences)


def without_unit(levels: DropLevels) -> Levels:
    """Each unit dropped alone: (n, n), a row for each."""
    n = len(levels.units)
    return (1 - np.eye(n)).astype(np.int16)


def without_block(levels: DropLevels) -> Levels:
    """The blocks of each unit dropped alone, both sub-blocks of a block: (n, n), a row for each unit."""
    blocks_of = levels.blocks_of
    return np.array([[int(others != blocks) for others in blocks_of] for blocks in blocks_of], dtype=np.int16)


def drop_lowest(space: SearchSpace, score: NDArray[np.float64]) -> Levels:
    """From all kept, drop units from the lowest score on until every budget holds: (n,) -> (n,)."""
    profile = space.dearest()
    for unit in np.argsort(score, kind="stable"):
        over = space.cost_of(profile[None])[0] > space.budget
        saves = space.cost[:, unit, profile[unit]] > space.cost[:, unit, 0]
        if (over & saves).any() and space.allowed[unit, 0]:
            profile[unit] = 0
    return space.check(profile)
