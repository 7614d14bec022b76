"""Building banks: what is solved is what plain hooks see, and each thing is solved once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from discopt.progress import Task, task
from discopt_llm import build
from discopt_llm.anatomy import run_block
from discopt_llm.bank import Bank, Sparse
from discopt_llm.build import BankPlan, build_bank
from discopt_llm.errors import BankError
from discopt_llm.hessian import InputSum
from discopt_llm.layers import eager_experts_
from discopt_llm.models import LoadedModel
from discopt_llm.quantization import QuantizationSettings, Quantized, quantize
from discopt_llm.recipes import SparsityRecipe
from discopt_llm.replay import weights_replaced_
from discopt_llm.sparsity import outlier_share, prune
from tests.llm.banks import KINDS, WIDTHS, Stopped, calibration, loaded, plan, read, stopped_after, watched
from tests.llm.families import FAMILIES, LAYERS
from tests.llm.test_layers import VARIANTS, hooked_inputs

CPU = torch.device("cpu")
MIDDLE = {"quantization": "3", "sparsity": "0"}  # a level that every layer has


def inputs_of(asked: BankPlan, block: int) -> dict[tuple[str, int], Tensor]:
    """The inputs (tokens, C) of the matrices of a block, by hooks in whole forwards of the model as it is."""
    layers = [layer for layer in asked.layers if layer.block == block]
    model = asked.loaded.model
    with torch.no_grad(), eager_experts_(model), hooked_inputs(layers) as seen:
        model(asked.calibration.sequences, use_cache=False)
    return {(layer.name, expert): torch.cat(parts) for (layer, expert), parts in seen.items()}


def moment(X: Tensor) -> Tensor:
    """Mean of x x^T of inputs (tokens, C)."""
    collected = InputSum(X.shape[-1], X.device)
    if len(X):
        collected.add_(X)
    return collected.H


def at_level(asked: BankPlan, bank: Bank, label: str, blocks: int) -> dict[str, Tensor]:
    """Parameters of the layers of the first blocks, at one level."""
    level = bank.labels.index(label)
    return {
        layer.parameter_name: layer.to_parameter(bank.weights(layer.index, level, CPU))
        for layer in asked.layers
        if layer.block < blocks
    }


def dense_weights(asked: BankPlan) -> dict[str, Tensor]:
    return {name: p.clone() for name, p in asked.loaded.model.named_parameters()}


# -- the levels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_blocks_quantized_levels_are_those_of_a_direct_solve(
    family: str, bank_of: Callable[[str, str], Bank]
) -> None:
    bank, asked = bank_of(family, "quantization"), plan(loaded(family), "quantization")
    settings, inputs = QuantizationSettings(bits=WIDTHS, group_size=12), inputs_of(asked, 0)
    for layer in (layer for layer in asked.layers if layer.block == 0):
        for expert, W in enumerate(layer.to_matrices(layer.parameter)):
            solved = quantize(W, moment(inputs[layer.name, expert]), settings)
            for level, expected in enumerate(solved.forms):
                form = bank.form(layer.index, level, CPU)
                assert isinstance(form, Quantized)
                assert form.bits == expected.bits == WIDTHS[level]
                assert torch.equal(form.scales[expert][:, 0], expected.scales[:, 0])
                same = form.codes[expert] == expected.codes
                assert same.float().mean() > 0.99  # the moments were summed in another order


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_blocks_sparse_levels_are_those_of_a_direct_solve(
    family: str, bank_of: Callable[[str, str], Bank]
) -> None:
    bank, asked = bank_of(family, "sparsity"), plan(loaded(family), "sparsity")
    recipe, inputs = asked.recipe, inputs_of(asked, 0)
    assert isinstance(recipe, SparsityRecipe)
    for layer in (layer for layer in asked.layers if layer.block == 0):
        for level in np.flatnonzero(recipe.present(layer)).tolist():
            form = bank.form(layer.index, level, CPU)
            assert isinstance(form, Sparse)
            zeros = (~form.keep).sum(dim=(1, 2)).tolist()
            assert sum(zeros) == recipe.zeros(layer)[level]
            assert max(zeros) - min(zeros) <= 1
            for expert, W in enumerate(layer.to_matrices(layer.parameter)):
                H = moment(inputs[layer.name, expert])
                expected = prune(W, H, [[zeros[expert]]], [layer.rows], recipe.settings)
                assert (form.keep[expert] == expected.keep[0]).float().mean() > 0.99
                both = form.keep[expert] & expected.keep[0]
                weights = bank.weights(layer.index, level, CPU)[expert]
                torch.testing.assert_close(weights[both], expected.weights[0][both], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gemma2", "qwen3_moe"])
def test_the_next_block_sees_what_the_dense_model_gives_it(family: str, kind: str, tmp_path: Path) -> None:
    asked, recipe = watched(loaded(family), kind)
    build_bank(asked, tmp_path / "bank", quiet=True)
    for (name, expert), X in inputs_of(asked, 1).items():
        if len(X):
            torch.testing.assert_close(recipe.H[name, expert], moment(X), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("family", "kind"), [*((f, "quantization") for f in FAMILIES), ("qwen2_moe", "sparsity")])
def test_the_next_block_sees_what_a_model_of_that_level_gives_it(family: str, kind: str, tmp_path: Path) -> None:
    asked, recipe = watched(loaded(family), kind, MIDDLE[kind])
    before = dense_weights(asked)
    bank = build_bank(asked, tmp_path / "bank", quiet=True)
    for block in (1, LAYERS - 1):
        with weights_replaced_(asked.loaded.model, at_level(asked, bank, MIDDLE[kind], block)):
            expected = inputs_of(asked, block)
        for (name, expert), X in expected.items():
            if len(X):
                torch.testing.assert_close(recipe.H[name, expert], moment(X), rtol=2e-3, atol=1e-5)
    assert all(torch.equal(p, before[name]) for name, p in asked.loaded.model.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "gpt_neox"])
def test_stacking_layers_does_not_change_their_levels(
    family: str, kind: str, bank_of: Callable[[str, str], Bank]
) -> None:
    bank = bank_of(family, kind)
    for alone in build_alone(family, kind):
        for layer, form in alone.items():
            stacked = bank.form(*layer, CPU)
            if isinstance(form, Quantized):
                assert isinstance(stacked, Quantized)
                assert (stacked.codes == form.codes).float().mean() > 0.99
            else:
                assert isinstance(stacked, Sparse)
                assert (stacked.keep == form.keep).float().mean() > 0.99


def build_alone(family: str, kind: str) -> Iterator[dict[tuple[int, int], Any]]:
    """The levels of every layer of the first block, solved one layer at a time."""
    asked = plan(loaded(family), kind)
    inputs = inputs_of(asked, 0)
    for layer in (layer for layer in asked.layers if layer.block == 0 and layer.matrices == 1):
        H = moment(inputs[layer.name, 0])
        solved = asked.recipe.solve([layer], [layer.to_matrices(layer.parameter)[0]], H, 0)
        yield {(layer.index, level): form for level, form in enumerate(solved.forms[0]) if form is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_errors_are_those_of_the_weights_in_the_bank(
    family: str, kind: str, bank_of: Callable[[str, str], Bank]
) -> None:
    bank, asked = bank_of(family, kind), plan(loaded(family), kind)
    for block in (0, LAYERS - 1):
        inputs = inputs_of(asked, block)
        for layer in (layer for layer in asked.layers if layer.block == block):
            W = layer.to_matrices(layer.parameter).double()
            X = [inputs[layer.name, expert].double() for expert in range(layer.matrices)]
            norm = sum((x @ w.T).square().sum() for x, w in zip(X, W, strict=True))
            stored = bank.layers[layer.index]
            assert np.isnan(stored.errors[~stored.present]).all()
            for level in np.flatnonzero(stored.present).tolist():
                dW = bank.weights(layer.index, level, CPU).double() - W
                error = sum((x @ w.T).square().sum() for x, w in zip(X, dW, strict=True)) / norm
                # Kept weights are rounded to 16 bits after the solve.
                assert stored.errors[level] == pytest.approx(float(error), rel=2e-2, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_shares_of_outliers_are_those_of_a_direct_call(family: str, bank_of: Callable[[str, str], Bank]) -> None:
    bank, asked = bank_of(family, "sparsity"), plan(loaded(family), "sparsity")
    inputs = inputs_of(asked, 0)
    for layer in (layer for layer in asked.layers if layer.block == 0):
        shares = [
            outlier_share(W, moment(inputs[layer.name, expert]), build.OWL_MULTIPLES)
            for expert, W in enumerate(layer.to_matrices(layer.parameter))
        ]
        found = bank.layers[layer.index].outliers
        assert [float(multiple) for multiple in found] == [*build.OWL_MULTIPLES]
        np.testing.assert_allclose([*found.values()], torch.stack(shares).mean(dim=0), atol=2e-3)


def test_a_model_in_half_precision_has_a_bank_of_its_own_weights(tmp_path: Path) -> None:
    model = read(FAMILIES["qwen2"]().bfloat16())
    asked, recipe = watched(model, "quantization", "3")
    bank = build_bank(asked, tmp_path / "bank", quiet=True)
    assert bank.header["dtype"] == "bfloat16"
    assert {H.dtype for H in recipe.H.values()} == {torch.float32}
    for layer in asked.layers:
        W = layer.to_matrices(layer.parameter).float()
        assert (bank.weights(layer.index, 3, CPU) - W).norm() < 0.1 * W.norm()


# -- experts that no token reached ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_that_no_token_reached_is_rounded_or_pruned_by_itself(kind: str, tmp_path: Path) -> None:
    text = calibration(1, 1)  # one token, for two of four experts
    asked = plan(loaded("mixtral"), kind, text=text)
    bank = build_bank(asked, tmp_path / "bank", quiet=True)
    inputs = inputs_of(asked, 0)
    for layer in (layer for layer in asked.layers if layer.block == 0 and layer.matrices > 1):
        unreached = [e for e in range(layer.matrices) if not len(inputs[layer.name, e])]
        assert len(unreached) == 2
        assert np.isfinite(bank.layers[layer.index].errors[bank.layers[layer.index].present]).all()
        for e in unreached:
            W = layer.to_matrices(layer.parameter)[e]
            for level in np.flatnonzero(bank.layers[layer.index].present).tolist():
                form, weights = bank.form(layer.index, level, CPU), bank.weights(layer.index, level, CPU)[e]
                if isinstance(form, Quantized):
                    settings = QuantizationSettings(bits=(WIDTHS[level],), method="rtn", group_size=12)
                    assert torch.equal(form.codes[e], quantize(W, torch.eye(len(W.T)), settings).forms[0].codes)
                else:
                    assert W[~form.keep[e]].abs().max() <= W[form.keep[e]].abs().min()
                    torch.testing.assert_close(weights[form.keep[e]], W[form.keep[e]], rtol=1e-3, atol=1e-4)


@cache
def separate_experts() -> LoadedModel:
    return read(VARIANTS["separate_experts"]())


@pytest.mark.parametrize("kind", KINDS)
def test_a_lone_expert_that_no_token_reached_still_prefers_its_higher_levels(kind: str, tmp_path: Path) -> None:
    asked, recipe = watched(separate_experts(), kind, text=calibration(1, 2))
    bank = build_bank(asked, tmp_path / "bank", quiet=True)
    identity = [name for (name, _), H in recipe.H.items() if torch.equal(H, torch.eye(len(H)))]
    assert identity
    for layer in (layer for layer in asked.layers if layer.name in identity):
        stored, W = bank.layers[layer.index], layer.parameter
        assert (np.diff(stored.errors[stored.present]) < 0).all()
        for level in np.flatnonzero(stored.present)[:2].tolist():
            dW = bank.weights(layer.index, level, CPU)[0] - W
            assert stored.errors[level] == pytest.approx(float(dW.square().sum() / W.square().sum()), rel=1e-2)


# -- refusals and costs --------------------------------------------------------------------------------------------


def test_an_unknown_level_to_propagate_is_refused() -> None:
    with pytest.raises(BankError, match="can be dense, 2, 3, 4, 6, got '5'"):
        plan(loaded("llama"), "quantization", "5")


def test_a_level_that_some_layers_lack_does_not_propagate() -> None:
    with pytest.raises(BankError, match=r"level 3 cannot .*: model\.layers\.0\.self_attn\.k_proj does not have it"):
        plan(loaded("llama"), "sparsity", "3")


@pytest.mark.parametrize(("propagate", "finished"), [("dense", None), ("3", None), ("dense", 2), ("3", 3)])
def test_progress_ends_at_its_total(
    propagate: str, finished: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(build.TOKENS_PER_CALL, "cpu", 64)
    asked = plan(loaded("llama"), "quantization", propagate)
    if finished is not None:
        with stopped_after(finished, monkeypatch):
            build_bank(asked, tmp_path / "bank", quiet=True)
    tasks: list[Task] = []

    def noted(*args: Any, **options: Any) -> Task:
        tasks.append(task(*args, **options))
        return tasks[-1]

    monkeypatch.setattr(build, "task", noted)
    build_bank(asked, tmp_path / "bank", quiet=True)
    (shown,) = tasks
    assert shown._done == shown._total > 0


class Allocations(TorchDispatchMode):
    """Notes how many tensors of at least so many bytes are made."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.made = least, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        if isinstance(output, Tensor) and output.untyped_storage().data_ptr() not in known:
            self.made += [str(func)] * (output.untyped_storage().nbytes() >= self.least)
        return output


@pytest.mark.parametrize("propagate", ["dense", "3"])
def test_the_text_on_its_way_through_the_model_is_held_once(propagate: str, tmp_path: Path) -> None:
    text = calibration(256, 32)
    asked = plan(loaded("llama"), "quantization", propagate, text=text)
    with Allocations(text.tokens * 32 * 4) as seen:
        build_bank(asked, tmp_path / "bank", quiet=True)
    assert seen.made == ["aten.empty.memory_format"]


def test_how_the_text_is_cut_changes_the_moments_by_rounding_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, whole = watched(loaded("qwen3_moe"), "quantization")
    build_bank(asked, tmp_path / "whole", quiet=True)
    monkeypatch.setitem(build.TOKENS_PER_CALL, "cpu", 48)
    asked, cut = watched(loaded("qwen3_moe"), "quantization")
    build_bank(asked, tmp_path / "cut", quiet=True)
    for key, H in whole.H.items():
        torch.testing.assert_close(cut.H[key], H, rtol=1e-3, atol=1e-5)


def test_the_model_is_left_as_it_was_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = plan(loaded("mixtral"), "quantization", "3")
    before, forwards = dense_weights(asked), [sorted(vars(m)) for m in asked.loaded.model.modules()]

    replays = iter((run_block, run_block))  # the first block to collect, and at its level

    def fail_at_the_third(*args: Any) -> Tensor:
        try:
            return next(replays)(*args)
        except StopIteration:
            raise Stopped from None

    monkeypatch.setattr(build, "run_block", fail_at_the_third)
    with pytest.raises(Stopped):
        build_bank(asked, tmp_path / "bank", quiet=True)
    assert all(torch.equal(p, before[name]) for name, p in asked.loaded.model.named_parameters())
    assert [sorted(vars(m)) for m in asked.loaded.model.modules()] == forwards


def test_every_layer_is_solved_once_for_each_input(tmp_path: Path) -> None:
    for family in ("llama", "qwen2_moe"):
        asked, recipe = watched(loaded(family), "quantization")
        build_bank(asked, tmp_path / family, quiet=True)
        inputs = defaultdict[int, dict[int, int]](dict)
        for layer in asked.layers:
            inputs[layer.block][layer.input] = layer.matrices
        assert recipe.solves == {block: sum(of.values()) for block, of in inputs.items()}
