"""Banks on disk: forms come back bit by bit, and damaged files are refused by name."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from discopt_llm.bank import Bank, BankLayer, BankWriter, Costs, Form, Sparse, form_costs, quantized_costs, sparse_costs
from discopt_llm.bank_forms import from_parts, to_parts
from discopt_llm.errors import BankError
from discopt_llm.quantization import Quantized
from tests.llm.handmade import (
    BITS,
    BLOCKS,
    CPU,
    block_of,
    build,
    described,
    header,
    model_layers,
    parts_of,
    quantized,
    same,
    sparse,
)

# forms

shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 70))


def there_and_back(form: Form, shape: tuple[int, int, int]) -> Form:
    parts, description = to_parts(form)
    assert sum(part.numel() * part.element_size() for part in parts.values()) == form_costs(form).bytes
    return from_parts(parts.__getitem__, json.loads(json.dumps(description)), shape, CPU)


@settings(deadline=None)
@given(shapes, st.integers(2, 8), st.integers(1, 80), st.booleans(), st.integers(0, 2**32))
def test_quantized_forms_come_back_bit_by_bit(
    shape: tuple[int, int, int], bits: int, group_size: int, symmetric: bool, seed: int
) -> None:
    form = quantized(shape, bits, group_size, symmetric, seed)
    back = there_and_back(form, shape)
    assert same(back, form) and isinstance(back, Quantized)
    assert torch.equal(back.dequantized(), form.dequantized())
    assert form_costs(form) == quantized_costs(*shape, bits, group_size, symmetric=symmetric)


@settings(deadline=None)
@given(shapes, st.floats(0, 1), st.sampled_from((torch.float16, torch.bfloat16)), st.integers(0, 2**32))
def test_sparse_forms_come_back_bit_by_bit(
    shape: tuple[int, int, int], share: float, dtype: torch.dtype, seed: int
) -> None:
    kept = round(share * math.prod(shape))
    form = sparse(shape, kept, dtype, seed)
    back = there_and_back(form, shape)
    assert same(back, form) and isinstance(back, Sparse)
    assert torch.equal(back.dense(), form.dense())
    assert form_costs(form) == sparse_costs(math.prod(shape), kept)


def test_a_sparse_form_is_the_weights_that_are_kept_and_zeros() -> None:
    weights = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    keep = torch.tensor([[[True, False], [False, True]]])
    form = Sparse.of(weights, keep, torch.float16)
    assert form.values.tolist() == [1.0, 4.0]
    assert form.dense().tolist() == [[[1.0, 0.0], [0.0, 4.0]]] and form.dense().dtype == torch.float32


def test_costs_count_codes_scales_and_zero_points() -> None:
    # 5 columns in groups of 2 are 3 groups a row: 6 scales of 2 bytes, 6 zero points of 3 bits, 10 codes of 3 bits
    assert quantized_costs(1, 2, 5, 3, 2, symmetric=False) == Costs(weights=10, bits=30, bytes=4 + 12 + 3)
    assert quantized_costs(1, 2, 5, 3, None, symmetric=True) == Costs(weights=10, bits=30, bytes=4 + 4)
    assert sparse_costs(10, 3) == Costs(weights=3, bits=48, bytes=2 + 6)


def test_forms_that_are_none_are_refused() -> None:
    keep = torch.ones(1, 2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"bool of shape \(E, R, C\), got torch\.bool \(2, 2\)"):
        Sparse(keep[0], torch.zeros(4, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"float16 or bfloat16 of shape \(nnz,\), got torch\.float32 \(4,\)"):
        Sparse(keep, torch.zeros(4))
    with pytest.raises(ValueError, match=r"finite in torch\.float16, got one that is not"):
        Sparse.of(torch.full((1, 2, 2), 1e6), keep, torch.float16)
    with pytest.raises(ValueError, match="a value for each of the 4 weights kept, got 3"):
        to_parts(Sparse(keep, torch.zeros(3, dtype=torch.float16)))


# a whole bank


def test_a_bank_gives_back_every_form_and_its_weights_exactly(bank_folder: Path) -> None:
    bank = Bank.open(bank_folder)
    for index, layer in enumerate(bank.layers):
        forms = block_of(layer.block)[1]
        for level in range(len(BITS)):
            if layer.present[level]:
                form = forms[layer.name, level]
                assert isinstance(form, Quantized)
                assert same(bank.form(index, level, CPU), form)
                weights = bank.weights(index, level, CPU)
                assert weights.dtype == torch.float32 and torch.equal(weights, form.dequantized())


def test_a_bank_of_sparse_forms_comes_back(tmp_path: Path) -> None:
    shape, kept = (1, 6, 11), (0, 20, 66)
    forms: dict[int, Form] = {j: sparse(shape, nnz, torch.bfloat16, j) for j, nnz in enumerate(kept)}
    name = "layers.0.self_attn.q_proj"
    writer = BankWriter.begin(tmp_path, header(kind="sparsity", labels=["1", "0", "-1"], blocks=1))
    writer.write_block(0, [described(name, 0, shape, forms, 3)], {(name, j): form for j, form in forms.items()})
    bank = writer.finish()
    assert bank.layers[0].weights.tolist() == [*kept]
    for level, form in forms.items():
        assert isinstance(form, Sparse)
        assert same(bank.form(0, level, CPU), form) and torch.equal(bank.weights(0, level, CPU), form.dense())


def test_a_bank_says_what_it_is(bank_folder: Path) -> None:
    bank = Bank.open(bank_folder)
    assert (bank.kind, bank.labels) == ("quantization", ("2", "3", "5"))
    assert bank.settings == {"bits": [*BITS], "group_size": 8, "method": "gptq"}
    assert bank.model["source"] == "a/model" and bank.calibration["tokens"] == 4096
    expected = [layer for block in range(BLOCKS) for layer in block_of(block)[0]]
    assert [layer.to_json() for layer in bank.layers] == [layer.to_json() for layer in expected]


def test_the_fingerprint_changes_with_what_is_stored(bank_folder: Path, tmp_path: Path) -> None:
    writer = build(tmp_path / "other", stop=BLOCKS - 1)
    layers, forms = block_of(BLOCKS - 1)
    key = (layers[0].name, 0)
    form = forms[key]
    assert isinstance(form, Quantized)
    form.codes[0, 0, 0] ^= 1
    writer.write_block(BLOCKS - 1, layers, forms)
    assert writer.finish().fingerprint != Bank.open(bank_folder).fingerprint == Bank.open(bank_folder).fingerprint


def test_forms_do_not_share_memory_with_the_file(bank_folder: Path) -> None:
    bank = Bank.open(bank_folder)
    for part in parts_of(bank.form(0, 0, CPU)).values():
        if part is not None:
            part.zero_()
    assert same(bank.form(0, 0, CPU), block_of(0)[1][bank.layers[0].name, 0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_level_is_unpacked_on_the_device_that_asks(bank_folder: Path) -> None:
    bank = Bank.open(bank_folder)
    weights = bank.weights(2, 1, torch.device("cuda"))
    assert weights.is_cuda and torch.equal(weights.cpu(), bank.weights(2, 1, CPU))


def test_the_files_are_hardly_larger_than_their_packed_parts_and_the_manifest_says_so(tmp_path: Path) -> None:
    """A block of the smallest model that people quantize, 2 to 6 bits in groups of 64."""
    widths = (2, 3, 4, 5, 6)
    shapes = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
    shapes |= {"gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}
    writer = BankWriter.begin(tmp_path, header(labels=[str(bits) for bits in widths], blocks=1))
    layers, forms = [], {}
    for name, shape in shapes.items():
        own: dict[int, Form] = {j: quantized((1, *shape), bits, 64, False, j) for j, bits in enumerate(widths)}
        forms |= {(name, j): form for j, form in own.items()}
        costs = np.array([form_costs(form) for form in own.values()])
        errors = np.zeros(5)
        layers.append(
            BankLayer(name, 0, "mlp", 0, 1, *shape, False, errors == 0, *costs.T, errors=errors, outliers={"3": 0.1})
        )
    writer.write_block(0, layers, forms)
    bank = writer.finish()
    packed = sum(int(layer.bytes.sum()) for layer in bank.layers)
    tensors = load_file(tmp_path / "block-00000.safetensors").values()
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) == packed
    assert packed <= sum(file.stat().st_size for file in tmp_path.iterdir()) <= 1.05 * packed


def test_levels_and_layers_that_are_not_there_are_refused(bank_folder: Path) -> None:
    bank = Bank.open(bank_folder)
    with pytest.raises(ValueError, match="layer must be 0 to 8, got 9"):
        bank.form(9, 0, CPU)
    with pytest.raises(ValueError, match="level must be 0 to 2, got -1"):
        bank.form(0, -1, CPU)
    with pytest.raises(ValueError, match=r"a level that layers\.0\.mlp\.experts\.down_proj has, got '2'"):
        bank.form(2, 0, CPU)


# the model it belongs to


def test_a_bank_fits_the_model_it_was_made_from(bank_folder: Path) -> None:
    Bank.open(bank_folder).check_model("f" * 64, model_layers())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"name": "layers.1.self_attn.qkv"},
            r"layer 4 has the name layers\.1\.self_attn\.k_proj, but .* has layers\.1",
        ),
        ({"columns": 22}, r"layers\.1\.self_attn\.k_proj has the columns 21, but this model's has 22"),
        ({"rows": 4}, "the rows 3, but this model's has 4"),
        ({"matrices": 2}, "the matrices 1, but this model's has 2"),
        ({"transposed": True}, "the transposed False, but this model's has True"),
        ({"input": 7}, "the input 0, but this model's has 7"),
        ({"kind": "mlp"}, "the kind attention, but this model's has mlp"),
    ],
)
def test_a_bank_of_another_model_says_what_differs(bank_folder: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(BankError, match=f"belongs to a/model: its .*{reason}"):
        Bank.open(bank_folder).check_model("f" * 64, model_layers(**changes))


def test_a_bank_of_fewer_layers_or_other_weights_is_refused(bank_folder: Path) -> None:
    bank = Bank.open(bank_folder)
    with pytest.raises(BankError, match="has 9 layers, but this model has 8"):
        bank.check_model("f" * 64, model_layers()[:8])
    with pytest.raises(BankError, match=r"weights differ from this model's \(fingerprint ffffffffffff, here 0{12}\)"):
        bank.check_model("0" * 64, model_layers())


# damage


@pytest.mark.parametrize("at", [0, 4, 100, 3000, -1])
def test_a_changed_byte_is_refused(bank_folder: Path, at: int) -> None:
    file = bank_folder / "block-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    with pytest.raises(BankError, match=r"block-00001\.safetensors is damaged: its checksum"):
        Bank.open(bank_folder)


def test_a_short_file_is_refused_without_reading_it(bank_folder: Path) -> None:
    file = bank_folder / "block-00001.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BankError, match=rf"block-00001\.safetensors is damaged: expected {size} bytes, got {size - 1}"):
        Bank.open(bank_folder, verify=False)


def test_a_missing_file_is_refused(bank_folder: Path) -> None:
    (bank_folder / "block-00002.safetensors").unlink()
    with pytest.raises(BankError, match=r"block-00002\.safetensors is missing; build the bank again"):
        Bank.open(bank_folder, verify=False)


def test_a_folder_in_a_files_place_is_refused(bank_folder: Path) -> None:
    (bank_folder / "block-00002.safetensors").unlink()
    (bank_folder / "block-00002.safetensors").mkdir()
    with pytest.raises(BankError, match=r"block-00002\.safetensors"):
        Bank.open(bank_folder)


def test_a_file_that_was_exchanged_is_refused_even_unverified(bank_folder: Path) -> None:
    """Two blocks of equal size: only the file itself can tell."""
    first, second = (bank_folder / f"block-0000{i}.safetensors" for i in (0, 1))
    assert first.stat().st_size == second.stat().st_size
    shutil.copy(first, second)
    with pytest.raises(BankError, match=r"block-00001\.safetensors is damaged: its checksum"):
        Bank.open(bank_folder)
    bank = Bank.open(bank_folder, verify=False)
    with pytest.raises(BankError, match=r"block-00001\.safetensors is not block 1 of this bank"):
        bank.form(3, 0, CPU)


def test_a_file_that_vanishes_later_is_refused(bank_folder: Path) -> None:
    bank = Bank.open(bank_folder)
    (bank_folder / "block-00000.safetensors").unlink()
    with pytest.raises(BankError, match=r"block-00000\.safetensors is missing"):
        bank.weights(0, 0, CPU)
