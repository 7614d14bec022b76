"""Types of ggml: which there are, and that what is written is what gguf reads, whoever wrote it."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from numpy._core import _multiarray_umath
from torch import Tensor

from discopt_llm import ggml, ggml_native
from discopt_llm.errors import BankError
from discopt_llm.ggml_native import Native, load_native

PLAIN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
# Squared errors of normal weights, relative, at most: a code that was read with another one's scale is far above.
WORST = {"TQ1_0": 0.9, "TQ2_0": 0.9, "IQ1_S": 0.3, "IQ1_M": 0.4, "IQ2_XXS": 0.15, "IQ2_XS": 0.1, "Q2_K": 0.1}


def weights(rows: int = 6, columns: int = 512, seed: int = 0) -> Tensor:
    return 0.05 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def moment(columns: int = 512) -> Tensor:
    """Of inputs of very different sizes, one of which is never there."""
    x = torch.randn(64, columns, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, columns)
    x[:, 7] = 0
    return x.T @ x / 64


def error(W: Tensor, name: str, importance: Tensor | None, weighing: Tensor | None = None) -> float:
    change = (ggml.dequantize(ggml.quantize(W, name, importance), name) - W).square()
    scale = 1 if weighing is None else weighing
    return float((change * scale).sum() / (W.square() * scale).sum())


def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "load_native", lambda: None)


# -- what there is -------------------------------------------------------------------------------------------------


def test_types_are_those_that_can_be_read_and_save_bits_from_the_fewest_on() -> None:
    types = ggml.types()
    assert {*PLAIN, "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "F16", "BF16"} <= types.keys()
    assert not {"F32", "F64", "I8", "Q8_K", "Q8_1"} & types.keys()  # too wide, or nothing that a file holds
    bits = [found.bits for found in types.values()]
    assert bits == sorted(bits) and bits[-1] == 16
    assert types["Q4_0"].bits == types["Q4_K"].bits == Fraction(9, 2)
    names = [*types]
    assert names.index("Q4_0") < names.index("IQ4_NL") < names.index("Q4_K") < names.index("Q4_1")


def test_rows_are_whole_blocks() -> None:
    assert [ggml.types()["Q4_K"].takes(columns) for columns in (256, 576, 1536)] == [True, False, True]
    assert ggml.types()["Q4_0"].row_bytes(576) == 576 // 32 * 18
    with pytest.raises(ValueError, match="Q4_K takes rows of a multiple of 256 weights, got 576"):
        ggml.types()["Q4_K"].row_bytes(576)
    with pytest.raises(ValueError, match="Q4_0 takes rows of a multiple of 32 weights, got 48"):
        ggml.quantize(torch.zeros(2, 48), "Q4_0")


def test_names_are_taken_in_any_case_and_order() -> None:
    assert ggml.parse_types(["q8_0", "Q4_K", "q4_0", "Q8_0"]) == ("Q4_0", "Q4_K", "Q8_0")
    with pytest.raises(ValueError, match=r"among .*Q4_0.* or, with the package xllamacpp, .*Q4_K.*, got Q4_X"):
        ggml.parse_types(["Q4_0", "q4_x"])


@pytest.mark.parametrize(
    ("columns", "native", "expected"),
    [
        ([576, 1536], False, PLAIN),
        ([32, 48], False, (*PLAIN, "F16")),
        ([256, 4096], True, ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")),
        ([576, 1536], True, ("Q2_K", "Q3_K", "IQ4_NL", "Q4_K", "Q5_0", "Q5_K", "Q5_1", "Q6_K", "Q8_0")),
        ([64], True, ("IQ4_NL", "Q5_0", "Q5_1", "Q8_0")),
        ([40], True, ("F16",)),
    ],
)
def test_by_default_every_length_of_rows_has_a_ladder(
    columns: list[int], native: bool, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ggml, "has_native", lambda: native)
    assert ggml.default_types(columns) == expected


def test_without_the_package_its_types_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    without_native(monkeypatch)
    ggml.check_makeable([*PLAIN, "F16", "MXFP4"], imatrix=False)
    with pytest.raises(BankError, match="Q4_K, IQ2_S need the package xllamacpp: pip install xllamacpp"):
        ggml.check_makeable(["Q4_0", "Q4_K", "IQ2_S"], imatrix=False)
    with pytest.raises(
        BankError, match=r"an importance matrix needs the package xllamacpp \(pip install xllamacpp\); leave"
    ):
        ggml.check_makeable(["Q4_0"], imatrix=True)
    with pytest.raises(BankError, match="Q4_K needs the package xllamacpp"):
        ggml.quantize(weights(), "Q4_K")
    assert ggml.libraries(PLAIN, imatrix=False) == ()


def test_a_library_that_is_not_ggml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        BankError, match=r"expected .*_multiarray_umath.* to export ggml's ggml_quantize_chunk, got none"
    ):
        Native(Path(_multiarray_umath.__file__))
    (tmp_path / "broken.so").write_text("no library")
    with pytest.raises(BankError, match=r"cannot load .*broken\.so"):
        Native(tmp_path / "broken.so")


def test_a_package_without_a_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "xllamacpp").mkdir()
    (tmp_path / "xllamacpp" / "__init__.py").write_text("")
    monkeypatch.setattr(ggml_native.importlib.util, "find_spec", lambda name: None)
    assert ggml_native.load_native.__wrapped__() is None
    monkeypatch.undo()
    monkeypatch.delitem(sys.modules, "xllamacpp", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BankError, match="expected the package xllamacpp to have an extension module, got none"):
        ggml_native.load_native.__wrapped__()


# -- what is written -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PLAIN, "MXFP4", "TQ2_0", "F16", "BF16"])
def test_plain_types_are_what_gguf_makes(name: str) -> None:
    W = weights()
    stored = ggml.quantize(W, name)
    found = ggml.types()[name]
    assert stored.dtype == torch.uint8 and stored.shape == (6, found.row_bytes(512))
    np.testing.assert_array_equal(stored.numpy(), gguf.quants.quantize(W.numpy(), found.kind).view(np.uint8))
    assert error(W, name, None) < WORST.get(name, 0.02)


def test_stacks_of_rows_are_read_as_they_lie() -> None:
    W = weights()
    stored = ggml.quantize(W, "Q5_1")
    assert torch.equal(ggml.dequantize(stored.view(2, 3, -1), "Q5_1"), ggml.dequantize(stored, "Q5_1").view(2, 3, -1))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, 1e6])
@pytest.mark.parametrize("name", ["Q4_0", "Q4_K"])
def test_weights_that_cannot_be_stored_are_refused(name: str, wrong: float) -> None:
    W = weights()
    W[2, 5] = wrong
    with pytest.raises(ValueError, match=f"weights must be finite and at most 65504 to be stored as {name}"):
        ggml.quantize(W, name)


def test_importance_is_the_mean_square_of_the_inputs() -> None:
    H = moment()
    importance = ggml.importance_of(H)
    assert importance.mean().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(importance[8:] * H.diagonal().mean(), H.diagonal()[8:])
    assert importance[7] > 0  # an input that is never there
    assert torch.equal(ggml.importance_of(torch.zeros(4, 4)), torch.ones(4))


# -- ggml's own quantizers -----------------------------------------------------------------------------------------


@pytest.fixture
def native() -> Native:
    pytest.importorskip("xllamacpp")
    found = load_native()
    assert found is not None
    return found


def test_both_make_the_same_bytes_of_plain_types(native: Native) -> None:
    W = weights(rows=33)
    for name in sorted(ggml._in_numpy()):
        stored = native.quantize(W.numpy(), ggml.types()[name].kind, None)
        np.testing.assert_array_equal(stored, ggml.quantize(W, name).numpy(), err_msg=name)


@pytest.mark.parametrize(
    "name",
    [
        # The first use of the smallest types fills tables for seconds.
        pytest.param(name, marks=[pytest.mark.slow] if name.startswith(("IQ1", "IQ2")) else [])
        for name in ggml.types()
    ],
)
def test_gguf_reads_what_ggml_writes(name: str, native: Native) -> None:
    W, importance = weights(), ggml.importance_of(moment())
    ggml.check_makeable([name], imatrix=True)
    assert native.knows(ggml.types()[name].kind)
    assert error(W, name, importance, importance) < WORST.get(name, 0.06)
    assert torch.equal(ggml.quantize(W, name, importance)[3:4], ggml.quantize(W[3:4], name, importance))


@pytest.mark.parametrize("name", [*PLAIN[:4], "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ3_S"])
def test_with_importance_the_weighted_error_is_smaller(name: str, native: Native) -> None:
    W, importance = weights(rows=32), ggml.importance_of(moment())
    assert error(W, name, importance, importance) < error(W, name, None, importance)


def test_threads_change_nothing(native: Native) -> None:
    W, importance = weights(rows=37).numpy(), ggml.importance_of(moment()).numpy()
    kind = ggml.types()["Q4_K"].kind
    alone = native.quantize(W, kind, importance)
    for threads in (3, 64):
        np.testing.assert_array_equal(native.quantize(W, kind, importance, threads), alone)


def test_rows_of_zeros_and_inputs_of_zeros_stay_finite(native: Native) -> None:
    W, H = weights(), moment()
    W[0], W[1, :256] = 0, 0
    H[:256] = 0
    for name in ("Q2_K", "Q4_K", "Q6_K", "IQ4_NL", "IQ3_S"):
        dense = ggml.dequantize(ggml.quantize(W, name, ggml.importance_of(H)), name)
        assert dense.isfinite().all() and not dense[0].any()


def test_what_ggml_would_end_the_process_on_is_refused(native: Native) -> None:
    W, kinds = weights().numpy(), ggml.types()
    with pytest.raises(ValueError, match="a type of ggml that takes rows of 512, got I8"):
        native.quantize(W, gguf.GGMLQuantizationType.I8, None)
    with pytest.raises(ValueError, match="takes rows of 100, got Q4_K"):
        native.quantize(W[:, :100], kinds["Q4_K"].kind, None)
    with pytest.raises(ValueError, match="IQ2_XXS needs an importance matrix, got none"):
        native.quantize(W, kinds["IQ2_XXS"].kind, None)
    for wrong in (np.zeros(512, np.float32), np.ones(511, np.float32)):
        with pytest.raises(ValueError, match=r"importance must be positive of shape \(512,\), got"):
            native.quantize(W, kinds["Q4_K"].kind, wrong)
    with pytest.raises(BankError, match="IQ2_XXS cannot be made without an importance matrix"):
        ggml.check_makeable(["Q4_0", "IQ2_XXS"], imatrix=False)
