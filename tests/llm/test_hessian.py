"""The second moment of inputs and the factor of its inverse."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from discopt_llm.hessian import InputSum, factor, quadratic_form

CPU = torch.device("cpu")


def moment(columns: int, tokens: int, seed: int = 0) -> Tensor:
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x / tokens


def damped(H: Tensor, damping: float) -> Tensor:
    return H + damping * torch.eye(len(H), dtype=H.dtype)


def test_the_sum_is_the_mean_outer_product_whatever_the_batches():
    x = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = InputSum(5, CPU, torch.float64)
    total.add_(x[:1])
    total.add_(x[1:].reshape(-1, 5))
    rows = x.reshape(-1, 5)
    assert total.tokens == 21
    torch.testing.assert_close(total.H, rows.T @ rows / 21)


def test_half_precision_inputs_are_summed_in_single_precision():
    x = torch.full((5000, 2), 3.0, dtype=torch.bfloat16)
    total = InputSum(2, CPU)
    total.add_(x)
    assert total.H.dtype == torch.float32
    torch.testing.assert_close(total.H, torch.full((2, 2), 9.0))


def test_a_sum_without_tokens_is_zero():
    total = InputSum(3, CPU)
    total.add_(torch.empty(0, 3))
    assert total.tokens == 0
    assert torch.equal(total.H, torch.zeros(3, 3))


@pytest.mark.parametrize("shape", [(4,), (2, 3), ()])
def test_inputs_of_another_width_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"expected inputs of shape \(\.\.\., 5\), got"):
        InputSum(5, CPU).add_(torch.zeros(shape))


@pytest.mark.parametrize("columns", [1, 5, 700])
def test_the_factor_is_that_of_the_inverse(columns: int):
    H = moment(columns, 2 * columns)
    factored = factor(H, 0.02)
    assert factored.damping == pytest.approx(0.02 * H.diagonal().mean().item())
    assert torch.equal(factored.U, factored.U.triu())
    assert (factored.U.diagonal() > 0).all()
    expected = torch.linalg.inv(damped(H, factored.damping))
    torch.testing.assert_close(factored.U.T @ factored.U, expected, rtol=1e-8, atol=1e-8)


def test_act_order_solves_the_largest_inputs_first():
    H = moment(6, 30) * torch.tensor([1.0, 9.0, 4.0, 1.0, 16.0, 2.0]).double().sqrt().outer(torch.ones(6).double())
    H = (H + H.T) / 2 + 20 * torch.diag(torch.tensor([1.0, 9.0, 4.0, 0.5, 16.0, 2.0]).double())
    factored = factor(H, act_order=True)
    assert factored.order is not None
    assert factored.order.tolist() == [4, 1, 2, 5, 0, 3]
    permuted = damped(H, factored.damping)[factored.order][:, factored.order]
    torch.testing.assert_close(factored.U.T @ factored.U, torch.linalg.inv(permuted))


def test_dead_inputs_stand_alone_and_do_not_count_in_the_damping():
    H = moment(6, 20)
    H[2], H[:, 2] = 0, 0
    factored = factor(H, 0.1)
    assert factored.dead.tolist() == [False, False, True, False, False, False]
    assert factored.damping == pytest.approx(0.1 * H.diagonal().sum().item() / 5)
    assert factored.U[2, 3:].eq(0).all()
    assert factored.U[:2, 2].eq(0).all()


def test_an_input_without_tokens_leaves_plain_rounding():
    factored = factor(torch.zeros(4, 4), act_order=True)
    assert torch.equal(factored.U, torch.eye(4))
    assert factored.order is None
    assert not factored.dead.any()


def test_a_rank_deficient_moment_raises_the_damping_and_says_so(caplog: pytest.LogCaptureFixture):
    H = moment(40, 3)
    with caplog.at_level(logging.WARNING, "discopt_llm.hessian"):
        factored = factor(H, 0.0)
    assert factored.damping > 0
    assert torch.isfinite(factored.U).all()
    assert "relative damping of 0: raised it to 1e-06" in caplog.text


def test_each_failure_raises_the_damping_tenfold(caplog: pytest.LogCaptureFixture):
    H = torch.tensor([[1.0, 1.3], [1.3, 1.0]])  # lowest eigenvalue -0.3
    with caplog.at_level(logging.WARNING, "discopt_llm.hessian"):
        assert factor(H, 0.01).damping == pytest.approx(1.0)
    assert [record.args for record in caplog.records] == [
        (pytest.approx(0.01), pytest.approx(0.1)),
        (pytest.approx(0.1), pytest.approx(1.0)),
    ]


def test_what_no_damping_mends_is_refused():
    H = torch.tensor([[1.0, 1e6], [1e6, 1.0]])
    with pytest.raises(ValueError, match="positive semidefinite H, got none even with a damping of"):
        factor(H)


@pytest.mark.parametrize(
    ("H", "message"),
    [
        (torch.zeros(2, 3), r"expected H of shape \(C, C\), got \(2, 3\)"),
        (torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), "expected a finite H, got NaN or infinite"),
        (torch.tensor([[1.0, 0.0], [0.0, float("inf")]]), "expected a finite H, got NaN or infinite"),
        (torch.diag(torch.tensor([1.0, -2.0])), "positive semidefinite H, got -2 on its diagonal"),
    ],
)
def test_what_is_no_second_moment_is_refused(H: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        factor(H)


@pytest.mark.parametrize("damping", [-0.1, float("nan"), float("inf")])
def test_an_impossible_damping_is_refused(damping: float):
    with pytest.raises(ValueError, match="expected a finite damping of at least 0, got"):
        factor(torch.eye(2), damping)


@pytest.mark.parametrize("columns", [3, 1100])
def test_the_quadratic_form_leaves_out_half_of_a_symmetric_product(columns: int):
    H, W = moment(columns, 50), torch.randn(2, 4, columns, generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(quadratic_form(W, H), ((W @ H) * W).sum(-1))
