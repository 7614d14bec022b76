"""SparseGPT against a reference straight from the paper; exact counts of zeros for every method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from discopt_llm import sweep
from discopt_llm.sparsity import Method, SparsitySettings, outlier_share, prune
from tests.llm.test_quantization import errors, layer

METHODS = get_args(Method)


def sparsegpt(W: Tensor, H: Tensor, zeros: int, damping: float, block: int = 128) -> Tensor:
    """Frantar and Alistarh (2023), Algorithm 1, one column at a time, with masks chosen block by block."""
    rows, columns = W.shape
    damped = H + damping * H.diagonal().mean() * torch.eye(columns, dtype=H.dtype)
    U = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    W, mask = W.clone(), torch.ones_like(W)
    for j in range(columns):
        if j % block == 0:
            end = min(j + block, columns)
            least = (W[:, j:end] / U.diagonal()[j:end]).square().flatten().argsort()
            share = zeros * end // columns - zeros * j // columns
            mask[:, j:end] = torch.ones(rows * (end - j), dtype=W.dtype).index_fill(0, least[:share], 0).view(rows, -1)
        E = (W[:, j] - W[:, j] * mask[:, j]) / U[j, j]
        W[:, j] *= mask[:, j]
        W[:, j + 1 :] -= E.outer(U[j, j + 1 :])
    return W


def counts(shares: Sequence[float], rows: Sequence[int], columns: int) -> list[list[int]]:
    return [[int(share * r * columns) for r in rows] for share in shares]


@pytest.mark.parametrize("columns", [30, 128, 200, 300])
def test_all_levels_equal_the_reference_column_by_column(columns: int):
    W, H = layer(17, columns)
    rows = (5, 12)
    zeros = counts((0.0, 0.3, 0.55, 0.9, 1.0), rows, columns)
    pruned = prune(W, H, zeros, rows, SparsitySettings())
    for i, level in enumerate(zeros):
        expected = torch.cat([sparsegpt(w, H, k, 0.01) for w, k in zip(W.split(list(rows)), level, strict=True)])
        torch.testing.assert_close(pruned.weights[i], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_every_layer_has_exactly_as_many_zeros_as_asked(method: Any):
    W, H = layer(11, 150)
    W = W.mul(2).round()  # many weights are equal, and many are zero
    H[7], H[:, 7] = 0, 0
    rows = (3, 1, 7)
    zeros = [[0, 0, 0], [1, 149, 7], [217, 83, 600], [449, 1, 1049], [450, 150, 1050]]
    pruned = prune(W, H, zeros, rows, SparsitySettings(method))
    for i, level in enumerate(zeros):
        gone = [int((~part).sum()) for part in pruned.keep[i].split(list(rows))]
        assert gone == level
        assert pruned.weights[i][~pruned.keep[i]].eq(0).all()
        assert not torch.signbit(pruned.weights[i][~pruned.keep[i]]).any()


@pytest.mark.parametrize("method", METHODS)
def test_row_errors_are_undamped_and_of_the_stored_weights(method: Any):
    W, H = layer(8, 140)
    H[[2, 130]], H[:, [2, 130]] = 0, 0
    pruned = prune(W, H, counts((0.2, 0.5, 0.8), (8,), 140), (8,), SparsitySettings(method, damping=0.1))
    torch.testing.assert_close(pruned.row_errors, errors(W, pruned.weights, H), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(pruned.row_norms, ((W @ H) * W).sum(-1))


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_sparsegpt_is_better_than_wanda_is_better_than_magnitude(share: float):
    W, H = layer(64, 192)
    zeros = counts((share,), (64,), 192)
    losses = [prune(W, H, zeros, (64,), SparsitySettings(method)).row_errors.sum() for method in METHODS]
    assert losses[0] < 0.8 * losses[1] < 0.8 * 0.9 * losses[2]


def test_more_zeros_are_worse():
    W, H = layer(16, 96)
    totals = prune(W, H, counts((0, 0.2, 0.4, 0.6, 0.8, 1), (16,), 96), (16,), SparsitySettings()).row_errors.sum(1)
    assert totals[0] == 0
    assert (totals.diff() > 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_no_zeros_leave_the_weights_alone(method: Any):
    W, H = layer(4, 40)
    pruned = prune(W, H, [[0]], (4,), SparsitySettings(method))
    assert torch.equal(pruned.weights[0], W)
    assert not pruned.row_errors.any()


def test_magnitude_keeps_the_largest():
    W, H = layer(6, 20)
    pruned = prune(W, H, [[70]], (6,), SparsitySettings("magnitude"))
    assert W[pruned.keep[0]].abs().min() > W[~pruned.keep[0]].abs().max()
    assert torch.equal(pruned.weights[0], W * pruned.keep[0])


def test_wanda_gives_every_row_its_share():
    W, H = layer(6, 20)
    pruned = prune(W, H, [[63]], (6,), SparsitySettings("wanda"))
    gone = (~pruned.keep[0]).sum(1)
    assert sorted(gone.tolist()) == [10, 10, 10, 11, 11, 11]
    scores = W.abs() * H.diagonal().sqrt()
    for score, keep in zip(scores, pruned.keep[0], strict=True):
        assert score[keep].min() > score[~keep].max()


@pytest.mark.parametrize("method", METHODS)
def test_without_a_token_magnitude_decides(method: Any):
    W, _ = layer(5, 140)
    H = torch.zeros(140, 140, dtype=torch.float64)
    pruned = prune(W, H, [[300], [500]], (5,), SparsitySettings(method))
    plain = prune(W, torch.eye(140, dtype=torch.float64), [[300], [500]], (5,), SparsitySettings("magnitude"))
    assert torch.equal(pruned.weights, plain.weights)
    assert not pruned.row_errors.any()


def test_weights_of_dead_inputs_go_first():
    W, H = layer(6, 40)
    dead = [1, 39]
    H[dead], H[:, dead] = 0, 0
    W[:, dead] = 100.0
    pruned = prune(W, H, [[0], [12]], (6,), SparsitySettings())
    assert pruned.weights[:, :, dead].eq(0).all()
    assert pruned.row_errors.eq(0).all()
    assert not pruned.keep[1][:, dead].any()


def test_a_rank_deficient_moment_is_solved_with_more_damping(caplog: pytest.LogCaptureFixture):
    W, H = layer(8, 60, tokens=10)
    pruned = prune(W, H, [[240]], (8,), SparsitySettings(damping=0.0))
    assert "raised it to" in caplog.text
    assert pruned.row_errors.sum() < prune(W, H, [[240]], (8,), SparsitySettings("wanda")).row_errors.sum()


def test_outlier_columns_are_kept():
    W, H = layer(16, 64)
    size = torch.ones(64, dtype=torch.float64)
    size[[5, 40]] = 100.0
    pruned = prune(W, H * size.outer(size), [[512]], (16,), SparsitySettings())
    assert pruned.keep[0][:, [5, 40]].double().mean() > 0.9


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("width", [1, 20, 64])
def test_results_do_not_depend_on_how_levels_are_cut(method: Any, width: int, monkeypatch: pytest.MonkeyPatch):
    W, H = layer(13, 150)
    zeros = counts((0.1, 0.4, 0.5, 0.7, 0.8), (6, 7), 150)
    whole = prune(W, H, zeros, (6, 7), SparsitySettings(method))
    monkeypatch.setitem(sweep._WIDTH, "cpu", width)
    cut = prune(W, H, zeros, (6, 7), SparsitySettings(method))
    assert torch.equal(whole.keep, cut.keep)
    torch.testing.assert_close(whole.weights, cut.weights)
    torch.testing.assert_close(whole.row_errors, cut.row_errors)


@pytest.mark.parametrize("method", METHODS)
def test_results_do_not_depend_on_the_layers_and_levels_beside_them(method: Any):
    W, H = layer(13, 150)
    zeros = counts((0.4, 0.6), (6, 7), 150)
    together = prune(W, H, zeros, (6, 7), SparsitySettings(method))
    for i, level in enumerate(zeros):
        parts = zip(W.split([6, 7]), level, strict=True)
        alone = [prune(part, H, [[k]], (len(part),), SparsitySettings(method)) for part, k in parts]
        assert torch.equal(together.keep[i], torch.cat([pruned.keep[0] for pruned in alone]))
        torch.testing.assert_close(together.weights[i], torch.cat([pruned.weights[0] for pruned in alone]))


def test_single_precision_comes_back_in_single_precision():
    W, H = layer(6, 40)
    pruned = prune(W.bfloat16(), H.float(), [[100]], (6,), SparsitySettings())
    assert pruned.weights.dtype == torch.float32
    torch.testing.assert_close(pruned.row_errors, errors(W.bfloat16(), pruned.weights, H), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [1, 5])
def test_arguments_are_left_alone(rows: int, method: Any):
    W, H = layer(rows, 20)
    H[3], H[:, 3] = 0, 0
    before = W.clone(), H.clone()
    prune(W, H, [[10 * rows]], (rows,), SparsitySettings(method))
    assert torch.equal(W, before[0])
    assert torch.equal(H, before[1])


def test_outlier_share_counts_what_is_above_multiples_of_the_mean():
    W = torch.tensor([[1.0, -1.0, 1.0, 1.0], [1.0, 1.0, -6.0, 0.0]])
    H = torch.diag(torch.tensor([1.0, 1.0, 4.0, 1.0]))  # scores 1 1 2 1, 1 1 12 0, their mean 2.375
    assert outlier_share(W, H, (0.1, 0.8, 3.0, 6.0)).tolist() == [7 / 8, 2 / 8, 1 / 8, 0.0]
    assert outlier_share(W, torch.zeros(4, 4), (3.0,)).tolist() == [1 / 8]


@pytest.mark.parametrize(
    ("zeros", "rows", "message"),
    [
        ([[1, 2]], (2, 2), r"expected rows of the layers that add up to 3, got \[2, 2\]"),
        ([[1, 2]], (3, 0), r"expected rows of the layers that add up to 3, got \[3, 0\]"),
        ([[1]], (), "expected rows of the layers that add up to 3"),
        ([[1]], (1, 2), r"expected zeros of 0 to \[4, 8\] for the layers, got \[1\]"),
        ([[1, 9]], (1, 2), r"got \[1, 9\]"),
        ([[-1, 0]], (1, 2), r"got \[-1, 0\]"),
    ],
)
def test_counts_that_do_not_fit_are_refused(zeros: list[list[int]], rows: tuple[int, ...], message: str):
    with pytest.raises(ValueError, match=message):
        prune(torch.ones(3, 4), torch.eye(4), zeros, rows, SparsitySettings())


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="expected finite W, got NaN"):
        prune(torch.full((1, 2), float("nan")), torch.eye(2), [[1]], (1,), SparsitySettings())
    with pytest.raises(ValueError, match="expected finite H, got NaN"):
        prune(torch.ones(1, 2), torch.full((2, 2), float("inf")), [[1]], (1,), SparsitySettings())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "obs"}, "expected a method of sparsegpt, wanda, magnitude, got 'obs'"),
        ({"damping": float("nan")}, "expected a finite damping of at least 0, got nan"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        SparsitySettings(**change)
