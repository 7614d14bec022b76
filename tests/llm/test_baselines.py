from __future__ import annotations

import numpy as np
import pytest
import torch

from discopt_llm import baselines
from discopt_llm.anatomy import read_anatomy
from discopt_llm.drop import DropLevels, drop_space
from discopt_llm.errors import ModelError
from discopt_llm.models import LoadedModel
from tests.llm.families import FAMILIES, LAYERS, tiny, tiny_tokenizer

SEQUENCES = tuple(
    torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(length)) for length in (9, 6)
)


def load(family: str) -> LoadedModel:
    model = FAMILIES[family]() if family in FAMILIES else tiny(family)
    return LoadedModel(model, tiny_tokenizer(), family, read_anatomy(model))


def block_ends(loaded: LoadedModel, sequence: torch.Tensor) -> list[torch.Tensor]:
    """Input of the first block and output of every block in a plain forward, (1, L, d) each."""
    states: list[torch.Tensor] = []
    blocks = [block.module for block in loaded.anatomy.blocks]
    hooks = [
        blocks[0].register_forward_pre_hook(
            lambda _, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    ]
    for block in blocks:
        hooks.append(
            block.register_forward_hook(lambda _, args, out: states.append(out[0] if isinstance(out, tuple) else out))
        )
    loaded.model(sequence[None])
    for hook in hooks:
        hook.remove()
    return states


@pytest.mark.parametrize("family", FAMILIES)
def test_similarity_is_that_of_the_models_own_hidden_states(family: str) -> None:
    loaded = load(family)
    alike = baselines.similarity(loaded, SEQUENCES)
    total = np.zeros((LAYERS + 1, LAYERS + 1))
    for sequence in SEQUENCES:
        places = torch.cat(block_ends(loaded, sequence)).double()
        unit = places / places.norm(dim=-1, keepdim=True)
        total += torch.einsum("itd,jtd->ij", unit, unit).numpy()
    assert alike.shape == (2 * LAYERS + 1, 2 * LAYERS + 1)
    assert alike[::2, ::2] == pytest.approx(total / sum(map(len, SEQUENCES)), abs=1e-5)


def test_the_place_inside_a_block_is_before_its_mlp() -> None:
    loaded = load("llama")
    alike = baselines.similarity(loaded, SEQUENCES[:1])
    seen: list[torch.Tensor] = []
    block = loaded.anatomy.blocks[1].module
    block.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    block.post_attention_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    loaded.model(SEQUENCES[0][None])
    assert alike[2, 3] == pytest.approx(torch.cosine_similarity(*seen, dim=-1).mean().item(), abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("unit", ["sublayer", "block", "pair"])
def test_norm_ratios_are_those_of_the_models_own_hidden_states(family: str, unit: str) -> None:
    loaded = load(family)
    levels = DropLevels(loaded.anatomy, unit)
    ratios = []
    for sequence in SEQUENCES:
        ends = block_ends(loaded, sequence)
        ends[0] = ends[0].reshape(ends[1].shape)
        of_units = [
            [
                float((after - before).norm() / after.norm())
                for before, after in zip(ends[blocks[0]][0], ends[blocks[-1] + 1][0], strict=True)
            ]
            for blocks in levels.blocks_of
        ]
        ratios.append(np.array(of_units))
    found = baselines.norm_ratios(loaded, SEQUENCES, levels)
    assert found == pytest.approx(np.concatenate(ratios, axis=1).mean(axis=1), rel=1e-4)


def test_norm_ratios_need_a_sequence() -> None:
    loaded = load("llama")
    with pytest.raises(ValueError, match="at least one sequence, got none"):
        baselines.norm_ratios(loaded, (), DropLevels(loaded.anatomy))


def test_units_and_blocks_are_removed_one_at_a_time(anatomy: object) -> None:
    sublayers, pairs = DropLevels(anatomy, "sublayer"), DropLevels(anatomy, "pair")
    assert baselines.without_unit(sublayers).tolist() == (1 - np.eye(8)).tolist()
    blocks = baselines.without_block(sublayers)
    assert [np.flatnonzero(row == 0).tolist() for row in blocks] == [[i // 2 * 2, i // 2 * 2 + 1] for i in range(8)]
    assert baselines.without_block(pairs).tolist() == [[0, 1], [1, 0]]


def chain(influence: list[float]) -> np.ndarray:
    """A similarity whose neighbouring places have these influences, by angles that add up."""
    angles = np.cumsum([0.0, *np.arccos(1 - np.array(influence))])
    return np.cos(angles[:, None] - angles[None, :])


INFLUENCE = [0.02, 0.09, 0.04, 0.01, 0.03, 0.03, 0.08, 0.002]  # attention and MLP of four blocks


@pytest.fixture(scope="module")
def anatomy() -> object:
    return read_anatomy(FAMILIES["llama"]())


def test_shortgpt_drops_whole_blocks_of_least_influence(anatomy: object) -> None:
    for unit, expected in (("sublayer", [1, 1, 0, 0, 1, 1, 1, 1]), ("block", [1, 0, 1, 1])):
        levels = DropLevels(anatomy, unit)
        profile = baselines.shortgpt(chain(INFLUENCE), levels, drop_space(anatomy, 0.25, unit=unit))
        assert profile.tolist() == expected


def test_unit_influence_drops_each_kind_by_its_own_score(anatomy: object) -> None:
    levels = DropLevels(anatomy, "sublayer")
    profile = baselines.unit_influence(chain(INFLUENCE), levels, drop_space(anatomy, 0.25))
    assert profile.tolist() == [0, 1, 1, 1, 1, 1, 1, 0]


def test_the_window_is_the_run_whose_ends_are_most_alike(anatomy: object) -> None:
    for unit, expected in (("sublayer", [1, 1, 0, 0, 0, 0, 1, 1]), ("block", [1, 0, 0, 1]), ("pair", [1, 0])):
        levels = DropLevels(anatomy, unit)
        profile = baselines.window_cosine(chain(INFLUENCE), levels, drop_space(anatomy, 0.5, unit=unit))
        assert profile.tolist() == expected


def test_windows_of_sub_blocks_may_begin_at_an_mlp(anatomy: object) -> None:
    levels = DropLevels(anatomy, "sublayer")
    found = baselines.unit_windows(chain(INFLUENCE), levels, drop_space(anatomy, 0.5), 3)
    first = [profile.argmin() for profile in found]
    assert first == [2, 4, 3]
    assert all(
        (profile[start : start + 4] == 0).all() and profile.sum() == 4
        for start, profile in zip(first, found, strict=True)
    )
    blocks = baselines.unit_windows(
        chain(INFLUENCE), DropLevels(anatomy, "block"), drop_space(anatomy, 0.5, unit="block"), 9
    )
    assert [profile.tolist() for profile in blocks] == [[1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1]]


def test_protected_blocks_stay(anatomy: object) -> None:
    levels, space = DropLevels(anatomy, "block"), drop_space(anatomy, 0.5, unit="block", protect=(1, 2))
    for baseline in (baselines.shortgpt, baselines.unit_influence):
        assert baseline(chain(INFLUENCE), levels, space).tolist() == [0, 1, 1, 0]
    with pytest.raises(ModelError, match="without dropping a protected one"):
        baselines.window_cosine(chain(INFLUENCE), levels, space)


def test_nothing_is_dropped_where_nothing_is_asked(anatomy: object) -> None:
    levels, space = DropLevels(anatomy, "block"), drop_space(anatomy, 0.0, unit="block")
    for baseline in (baselines.shortgpt, baselines.unit_influence, baselines.window_cosine):
        assert baseline(chain(INFLUENCE), levels, space).tolist() == [1, 1, 1, 1]
