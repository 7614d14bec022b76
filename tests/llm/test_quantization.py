"""GPTQ against a reference straight from the paper, and what its forms hold."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from discopt_llm import sweep
from discopt_llm.quantization import QuantizationSettings, Quantized, Solved, quantize


def layer(rows: int, columns: int, seed: int = 0, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """Random weights and the second moment of correlated inputs of unequal size, in double precision."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=rng, dtype=torch.float64) / columns**0.5
    x = torch.randn(tokens or 3 * columns, columns, generator=rng, dtype=torch.float64)
    x = (x + 2 * x @ mix) * torch.exp(0.5 * torch.randn(columns, generator=rng, dtype=torch.float64))
    return torch.randn(rows, columns, generator=rng, dtype=torch.float64), x.T @ x / len(x)


def grid(W: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    top = 2**bits - 1
    low, high = W.amin(1).clamp(max=0), W.amax(1).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scale = ((high - low) / top).half().double()
    return scale, torch.full_like(scale, (top + 1) // 2) if symmetric else (-low / scale).round().clamp(0, top)


def to_grid(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return scale * ((w / scale + zero).round().clamp(0, 2**bits - 1) - zero)


def gptq(W: Tensor, H: Tensor, bits: int, group: int, symmetric: bool, act_order: bool, damping: float) -> Tensor:
    """Frantar et al. (2022), one column at a time; with act-order, groups are cut and scaled before the solve."""
    columns = W.shape[1]
    order = H.diagonal().argsort(descending=True) if act_order else torch.arange(columns)
    grids = {j: grid(W[:, j : j + group], bits, symmetric) for j in range(0, columns, group)}
    damped = H + damping * H.diagonal().mean() * torch.eye(columns, dtype=H.dtype)
    U = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    W = W[:, order].clone()
    Q = torch.zeros_like(W)
    for j, place in enumerate(order.tolist()):
        if not act_order and j % group == 0:
            grids[j] = grid(W[:, j : j + group], bits, symmetric)
        Q[:, j] = to_grid(W[:, j], *grids[place // group * group], bits)
        W[:, j:] -= ((W[:, j] - Q[:, j]) / U[j, j]).outer(U[j, j:])
    return Q[:, order.argsort()]


def errors(W: Tensor, Q: Tensor, H: Tensor) -> Tensor:
    dW = Q.double() - W.double()
    return ((dW @ H.double()) * dW).sum(-1)


def dequantized(solved: Solved) -> Tensor:
    return torch.stack([form.dequantized() for form in solved.forms])


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("columns", "group"),
    [(64, 16), (64, 64), (150, 64), (70, 24), (60, None), (300, 150), (33, 5), (260, None), (9, 1)],
)
def test_all_widths_equal_the_reference_column_by_column(
    columns: int, group: int | None, symmetric: bool, act_order: bool
):
    W, H = layer(12, columns)
    settings = QuantizationSettings((2, 3, 4, 8), group_size=group, symmetric=symmetric, act_order=act_order)
    solved = quantize(W, H, settings)
    for form, bits in zip(solved.forms, settings.bits, strict=True):
        expected = gptq(W, H, bits, group or columns, symmetric, act_order, settings.damping)
        torch.testing.assert_close(form.dequantized().double(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group", [16, 50, None])
def test_row_errors_are_undamped_and_of_the_stored_weights(method: Any, act_order: bool, group: int | None):
    W, H = layer(10, 100)
    settings = QuantizationSettings((2, 4, 6), method, group_size=group, act_order=act_order, damping=0.1)
    solved = quantize(W, H, settings)
    assert solved.row_errors.dtype == torch.float64
    torch.testing.assert_close(solved.row_errors, errors(W, dequantized(solved), H), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(solved.row_norms, ((W @ H) * W).sum(-1))


def test_row_errors_hold_in_single_precision():
    W, H = layer(40, 300, tokens=200)  # rank-deficient: most of the damped error is damping
    solved = quantize(W.float(), H.float(), QuantizationSettings((2, 3, 4, 8), group_size=64))
    torch.testing.assert_close(solved.row_errors, errors(W.float(), dequantized(solved), H), rtol=1e-2, atol=0)
    torch.testing.assert_close(
        solved.row_errors.sum(1), errors(W.float(), dequantized(solved), H).sum(1), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dequantized_is_what_the_solver_fed_back_bit_for_bit(
    symmetric: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    W, H = layer(9, 70)
    fed_back: list[Tensor] = []

    def recording(W: Tensor, factored: Any, block: int, choice: sweep.Choice) -> Tensor:
        class Recorder:
            begin, end = choice.begin, choice.end

            def column(self, j: int, w: Tensor) -> Tensor:
                value = choice.column(j, w)
                fed_back.append(value.clone())
                return value

        return sweep.sweep_(W, factored, block, Recorder())

    monkeypatch.setattr("discopt_llm.quantization.sweep_", recording)
    settings = QuantizationSettings((2, 5, 8), group_size=32, symmetric=symmetric)
    solved = quantize(W.to(dtype), H.to(dtype), settings)
    used = torch.stack(fed_back, -1).view(3, 9, 70)
    assert torch.equal(dequantized(solved).to(dtype), used)


@pytest.mark.parametrize("bits", range(2, 9))
def test_gptq_is_better_than_rounding_to_nearest(bits: int):
    W, H = layer(32, 96)
    gptq_, rtn = (quantize(W, H, QuantizationSettings((bits,), method, group_size=32)) for method in ("gptq", "rtn"))
    assert gptq_.row_errors.sum() < 0.8 * rtn.row_errors.sum()


def test_rounding_to_nearest_is_the_nearest_point():
    W, H = layer(6, 40)
    form = quantize(W, H, QuantizationSettings((3,), "rtn", group_size=20)).forms[0]
    expected = torch.cat([to_grid(part.T, *grid(part, 3, False), 3).T for part in W.split(20, 1)], 1)
    assert torch.equal(form.dequantized().double(), expected)


@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_scales_round_with_less_error_than_minmax(symmetric: bool):
    W, _ = layer(64, 128)
    settings = QuantizationSettings((2, 3, 4), "rtn", group_size=64, symmetric=symmetric)
    H = torch.eye(128, dtype=torch.float64)
    minmax = quantize(W, H, settings).row_errors
    mse = quantize(W, H, dataclasses.replace(settings, scales="mse")).row_errors
    assert (mse <= minmax + 1e-12).all()
    assert mse[0].sum() < 0.8 * minmax[0].sum()


def test_wider_is_better():
    W, H = layer(16, 64)
    totals = quantize(W, H, QuantizationSettings((2, 3, 4, 5, 6, 7, 8))).row_errors.sum(1)
    assert (totals.diff() < 0).all()


def test_without_a_token_it_rounds_to_nearest():
    W, _ = layer(5, 24)
    W[:, 3] = 7.0
    H = torch.zeros(24, 24, dtype=torch.float64)
    gptq_, rtn = (quantize(W, H, QuantizationSettings((3, 4), method, group_size=8)) for method in ("gptq", "rtn"))
    assert torch.equal(dequantized(gptq_), dequantized(rtn))
    assert not gptq_.row_errors.any()
    assert not gptq_.row_norms.any()


@pytest.mark.parametrize("act_order", [False, True])
def test_weights_of_dead_inputs_become_zero_and_do_not_set_scales(act_order: bool):
    W, H = layer(7, 30)
    dead = [0, 4, 29]
    H[dead], H[:, dead] = 0, 0
    loud = W.clone()
    loud[:, dead] = 1e3
    settings = QuantizationSettings((2, 4), group_size=8, act_order=act_order)
    solved, other = quantize(W, H, settings), quantize(loud, H, settings)
    assert dequantized(solved)[..., dead].eq(0).all()
    assert torch.equal(dequantized(solved), dequantized(other))
    torch.testing.assert_close(solved.row_errors, errors(W, dequantized(solved), H), rtol=1e-8, atol=1e-10)


def test_a_rank_deficient_moment_is_solved_with_more_damping(caplog: pytest.LogCaptureFixture):
    W, H = layer(8, 60, tokens=10)
    solved = quantize(W, H, QuantizationSettings((3,), group_size=20, damping=0.0))
    assert "raised it to" in caplog.text
    assert solved.row_errors.sum() < quantize(W, H, QuantizationSettings((3,), "rtn", group_size=20)).row_errors.sum()


@pytest.mark.parametrize("act_order", [False, True])
def test_with_outlier_columns_it_is_still_better_than_rounding(act_order: bool):
    W, H = layer(48, 64)
    size = torch.ones(64, dtype=torch.float64)
    size[[5, 40]] = 10.0
    H = H * size.outer(size)
    solved = quantize(W, H, QuantizationSettings((2, 3, 4), group_size=16, act_order=act_order))
    rtn = quantize(W, H, QuantizationSettings((2, 3, 4), "rtn", group_size=16))
    assert (solved.row_errors.sum(1) < rtn.row_errors.sum(1)).all()
    assert torch.isfinite(dequantized(solved)).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-7, 1e7, 1e15])
def test_scales_neither_vanish_nor_overflow(size: float, symmetric: bool):
    W, H = layer(4, 16)
    for method in ("gptq", "rtn"):
        form = quantize(
            (W * size).float(), H.float(), QuantizationSettings((2,), method, group_size=8, symmetric=symmetric)
        ).forms[0]
        assert (form.scales > 0).all()
        assert torch.isfinite(form.scales).all()
        assert torch.isfinite(form.dequantized()).all()


def test_a_group_of_zeros_stays_zero():
    W, _ = layer(3, 32)
    W[:, :16] = 0
    form = quantize(W, torch.eye(32).double(), QuantizationSettings((2,), group_size=16)).forms[0]
    assert form.dequantized()[:, :16].eq(0).all()
    assert torch.isfinite(form.dequantized()).all()


@pytest.mark.parametrize("width", [1, 7, 64])
@pytest.mark.parametrize("settings", [{}, {"act_order": True}, {"method": "rtn"}])
def test_results_do_not_depend_on_how_rows_are_cut(
    width: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    W, H = layer(23, 40)
    asked = QuantizationSettings((2, 3, 5), group_size=16, **settings)
    whole = quantize(W, H, asked)
    monkeypatch.setitem(sweep._WIDTH, "cpu", width)
    cut = quantize(W, H, asked)
    for a, b in zip(whole.forms, cut.forms, strict=True):
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.scales, b.scales)
    torch.testing.assert_close(whole.row_errors, cut.row_errors)


def test_results_do_not_depend_on_the_layers_and_widths_beside_them():
    W, H = layer(20, 40)
    together = quantize(W, H, QuantizationSettings((2, 3, 4)))
    for i, bits in enumerate((2, 3, 4)):
        alone = [quantize(part, H, QuantizationSettings((bits,))) for part in W.split([13, 7])]
        assert torch.equal(together.forms[i].codes, torch.cat([solved.forms[0].codes for solved in alone]))
        torch.testing.assert_close(together.row_errors[i], torch.cat([solved.row_errors[0] for solved in alone]))


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_arguments_are_left_alone(rows: int, method: Any):
    W, H = layer(rows, 20)
    H[3], H[:, 3] = 0, 0
    before = W.clone(), H.clone()
    quantize(W, H, QuantizationSettings((2, 3), method, act_order=True))
    quantize(W, H, QuantizationSettings((4,), method))
    assert torch.equal(W, before[0])
    assert torch.equal(H, before[1])


def test_shapes_and_codes_are_as_stored():
    W, H = layer(6, 50)
    settings = QuantizationSettings((2, 4), group_size=16)
    for form, bits in zip(quantize(W, H, settings).forms, settings.bits, strict=True):
        assert form.codes.shape == (6, 50)
        assert form.codes.dtype == torch.uint8
        assert form.codes.max() <= 2**bits - 1
        assert form.scales.shape == (6, 4)
        assert form.scales.dtype == torch.float16
        assert form.zeros is not None
        assert form.zeros.shape == (6, 4)
    symmetric = quantize(W, H, dataclasses.replace(settings, symmetric=True))
    assert all(form.zeros is None for form in symmetric.forms)


def test_leading_dimensions_are_dequantized_alike():
    W, H = layer(6, 50)
    form = quantize(W, H, QuantizationSettings((3,), group_size=16)).forms[0]
    assert form.zeros is not None
    stacked = Quantized(*(t.view(2, 3, -1) for t in (form.codes, form.scales, form.zeros)), form.bits, form.group_size)
    assert torch.equal(stacked.dequantized(), form.dequantized().view(2, 3, 50))


def test_half_precision_weights_are_solved_in_single_precision():
    W, H = layer(4, 16)
    solved = quantize(W.bfloat16(), H.float(), QuantizationSettings((4,)))
    assert torch.equal(
        solved.forms[0].codes, quantize(W.bfloat16().float(), H.float(), QuantizationSettings((4,))).forms[0].codes
    )


@pytest.mark.parametrize(
    ("W", "H", "message"),
    [
        (torch.zeros(3), torch.eye(3), r"expected W of shape \(R, C\), got \(3,\)"),
        (torch.zeros(0, 3), torch.eye(3), r"expected W of shape \(R, C\), got \(0, 3\)"),
        (torch.ones(2, 3), torch.eye(4), r"expected H of shape \(3, 3\), got \(4, 4\)"),
        (torch.tensor([[1.0, float("nan")]]), torch.eye(2), "expected finite W, got NaN or infinite values"),
        (torch.ones(1, 2), torch.tensor([[1.0, float("inf")], [0.0, 1.0]]), "expected finite H, got NaN or infinite"),
        (torch.ones(1, 2), -torch.eye(2), "expected a positive semidefinite H, got -1"),
    ],
)
def test_what_cannot_be_solved_is_refused(W: Tensor, H: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        quantize(W, H, QuantizationSettings((4,)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": ()}, r"expected distinct ascending bits of 2 to 8, got \(\)"),
        ({"bits": (3, 2)}, r"got \(3, 2\)"),
        ({"bits": (3, 3)}, r"got \(3, 3\)"),
        ({"bits": (1, 2)}, r"got \(1, 2\)"),
        ({"bits": (9,)}, r"got \(9,\)"),
        ({"method": "awq"}, "expected a method of gptq, rtn, got 'awq'"),
        ({"group_size": 0}, "expected a group size of at least 1, or None, got 0"),
        ({"damping": -1.0}, "expected a finite damping of at least 0, got -1"),
        ({"scales": "max"}, "expected scales of minmax, mse, got 'max'"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        QuantizationSettings(**{"bits": (2, 3), **change})
