"""Banks on disk: forms come back bit by bit, damage is refused by name, a stopped build ends in the same bytes."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from discopt.encoding import checksum
from discopt_llm import bank as bank_module
from discopt_llm import bank_blocks
from discopt_llm.bank import (
    Bank,
    BankLayer,
    BankWriter,
    Costs,
    Form,
    Sparse,
    form_costs,
    quantized_costs,
    sparse_costs,
)
from discopt_llm.bank_forms import from_parts, to_parts
from discopt_llm.errors import BankError
from discopt_llm.layers import Layer
from discopt_llm.quantization import Quantized

CPU = torch.device("cpu")
BITS = (2, 3, 5)
BLOCKS = 3
SHAPES = {  # of one block's layers, (E, R, C)
    "self_attn.q_proj": (1, 7, 21),
    "self_attn.k_proj": (1, 3, 21),
    "mlp.experts.down_proj": (3, 5, 9),
}


def quantized(shape: tuple[int, int, int], bits: int, group_size: int, symmetric: bool, seed: int) -> Quantized:
    E, R, C = shape
    generator = torch.Generator().manual_seed(seed)
    groups = (E, R, -(-C // group_size))
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)
    scales = torch.rand(groups, generator=generator).half() + 0.01
    zeros = torch.randint(0, 1 << bits, groups, dtype=torch.uint8, generator=generator)
    return Quantized(codes, scales, None if symmetric else zeros, bits, group_size)


def sparse(shape: tuple[int, int, int], kept: int, dtype: torch.dtype, seed: int) -> Sparse:
    generator = torch.Generator().manual_seed(seed)
    keep = torch.zeros(math.prod(shape), dtype=torch.bool)
    keep[torch.randperm(len(keep), generator=generator)[:kept]] = True
    return Sparse.of(torch.randn(shape, generator=generator), keep.view(shape), dtype)


def parts_of(form: Form) -> dict[str, Tensor | None]:
    return {name: value for name, value in vars(form).items() if value is None or isinstance(value, Tensor)}


def same(a: Form, b: Form) -> bool:
    if type(a) is not type(b) or form_costs(a) != form_costs(b):
        return False
    pairs = zip(parts_of(a).values(), parts_of(b).values(), strict=True)
    return all(x is y if x is None or y is None else x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def header(**changes: Any) -> dict[str, Any]:
    own = {
        "kind": "quantization",
        "settings": {"bits": BITS, "group_size": 8, "method": "gptq"},
        "labels": [str(bits) for bits in BITS],
        "model": {"source": "a/model", "fingerprint": "f" * 64},
        "calibration": {"fingerprint": "c" * 64, "tokens": 4096},
        "propagate": "dense",
        "blocks": BLOCKS,
    }
    return {**own, **changes}


def described(name: str, block: int, shape: tuple[int, int, int], forms: Mapping[int, Form], m: int) -> BankLayer:
    costs = np.array([form_costs(forms[level]) if level in forms else (0, 0, 0) for level in range(m)])
    return BankLayer(
        name=name,
        block=block,
        kind="mlp" if "mlp" in name else "attention",
        input=int("mlp" in name),
        matrices=shape[0],
        rows=shape[1],
        columns=shape[2],
        transposed=False,
        present=np.array([level in forms for level in range(m)]),
        weights=costs[:, 0],
        bits=costs[:, 1],
        bytes=costs[:, 2],
        errors=np.array([0.5 / (level + 1) if level in forms else np.nan for level in range(m)]),
        outliers={"3": 0.25, "5": 0.1},
    )


def block_of(block: int) -> tuple[list[BankLayer], dict[tuple[str, int], Form]]:
    """What a builder makes of a block; the last layer of every block lacks the lowest level."""
    layers, forms = [], {}
    for i, (short, shape) in enumerate(SHAPES.items()):
        own = {
            level: quantized(shape, bits, 8, i == 1, 100 * block + 10 * i + bits)
            for level, bits in enumerate(BITS)
            if i < 2 or level > 0
        }
        name = f"layers.{block}.{short}"
        layers.append(described(name, block, shape, own, len(BITS)))
        forms |= {(name, level): form for level, form in own.items()}
    return layers, forms


def build(path: Path, stop: int = BLOCKS, **changes: Any) -> BankWriter:
    """A bank's first blocks."""
    writer = BankWriter.begin(path, header(**changes))
    for block in range(stop):
        if block not in writer.finished:
            writer.write_block(block, *block_of(block))
    return writer


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def model_layers(**changes: Any) -> list[Layer]:
    """The layers of the model that `build` makes a bank of; `changes` are those of layer 4."""
    layers = []
    for block in range(BLOCKS):
        for one in block_of(block)[0]:
            fields = ("name", "block", "kind", "input", "matrices", "rows", "columns", "transposed")
            own = {field: getattr(one, field) for field in fields}
            own |= changes if len(layers) == 4 else {}
            layers.append(Layer(index=len(layers), owner=nn.Module(), attribute="weight", **own))
    return layers


@pytest.fixture(scope="module")
def _finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("banks") / "bank"
    build(path).finish()
    return path


@pytest.fixture
def folder(_finished: Path, tmp_path: Path) -> Path:
    """A finished bank of one's own."""
    shutil.copytree(_finished, tmp_path / "bank")
    return tmp_path / "bank"


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


def test_a_bank_gives_back_every_form_and_its_weights_exactly(folder: Path) -> None:
    bank = Bank.open(folder)
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


def test_a_bank_says_what_it_is(folder: Path) -> None:
    bank = Bank.open(folder)
    assert (bank.kind, bank.labels) == ("quantization", ("2", "3", "5"))
    assert bank.settings == {"bits": [*BITS], "group_size": 8, "method": "gptq"}
    assert bank.model["source"] == "a/model" and bank.calibration["tokens"] == 4096
    expected = [layer for block in range(BLOCKS) for layer in block_of(block)[0]]
    assert [layer.to_json() for layer in bank.layers] == [layer.to_json() for layer in expected]


def test_the_fingerprint_changes_with_what_is_stored(folder: Path, tmp_path: Path) -> None:
    writer = build(tmp_path / "other", stop=BLOCKS - 1)
    layers, forms = block_of(BLOCKS - 1)
    key = (layers[0].name, 0)
    form = forms[key]
    assert isinstance(form, Quantized)
    form.codes[0, 0, 0] ^= 1
    writer.write_block(BLOCKS - 1, layers, forms)
    assert writer.finish().fingerprint != Bank.open(folder).fingerprint == Bank.open(folder).fingerprint


def test_forms_do_not_share_memory_with_the_file(folder: Path) -> None:
    bank = Bank.open(folder)
    for part in parts_of(bank.form(0, 0, CPU)).values():
        if part is not None:
            part.zero_()
    assert same(bank.form(0, 0, CPU), block_of(0)[1][bank.layers[0].name, 0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_level_is_unpacked_on_the_device_that_asks(folder: Path) -> None:
    bank = Bank.open(folder)
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


def test_levels_and_layers_that_are_not_there_are_refused(folder: Path) -> None:
    bank = Bank.open(folder)
    with pytest.raises(ValueError, match="layer must be 0 to 8, got 9"):
        bank.form(9, 0, CPU)
    with pytest.raises(ValueError, match="level must be 0 to 2, got -1"):
        bank.form(0, -1, CPU)
    with pytest.raises(ValueError, match=r"a level that layers\.0\.mlp\.experts\.down_proj has, got '2'"):
        bank.form(2, 0, CPU)


# the model it belongs to


def test_a_bank_fits_the_model_it_was_made_from(folder: Path) -> None:
    Bank.open(folder).check_model("f" * 64, model_layers())


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
def test_a_bank_of_another_model_says_what_differs(folder: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(BankError, match=f"belongs to a/model: its .*{reason}"):
        Bank.open(folder).check_model("f" * 64, model_layers(**changes))


def test_a_bank_of_fewer_layers_or_other_weights_is_refused(folder: Path) -> None:
    bank = Bank.open(folder)
    with pytest.raises(BankError, match="has 9 layers, but this model has 8"):
        bank.check_model("f" * 64, model_layers()[:8])
    with pytest.raises(BankError, match=r"weights differ from this model's \(fingerprint ffffffffffff, here 0{12}\)"):
        bank.check_model("0" * 64, model_layers())


# damage


@pytest.mark.parametrize("at", [0, 4, 100, 3000, -1])
def test_a_changed_byte_is_refused(folder: Path, at: int) -> None:
    file = folder / "block-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    with pytest.raises(BankError, match=r"block-00001\.safetensors is damaged: its checksum"):
        Bank.open(folder)


def test_a_short_file_is_refused_without_reading_it(folder: Path) -> None:
    file = folder / "block-00001.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BankError, match=rf"block-00001\.safetensors is damaged: expected {size} bytes, got {size - 1}"):
        Bank.open(folder, verify=False)


def test_a_missing_file_is_refused(folder: Path) -> None:
    (folder / "block-00002.safetensors").unlink()
    with pytest.raises(BankError, match=r"block-00002\.safetensors is missing; build the bank again"):
        Bank.open(folder, verify=False)


def test_a_folder_in_a_files_place_is_refused(folder: Path) -> None:
    (folder / "block-00002.safetensors").unlink()
    (folder / "block-00002.safetensors").mkdir()
    with pytest.raises(BankError, match=r"block-00002\.safetensors"):
        Bank.open(folder)


def test_a_file_that_was_exchanged_is_refused_even_unverified(folder: Path) -> None:
    """Two blocks of equal size: only the file itself can tell."""
    first, second = (folder / f"block-0000{i}.safetensors" for i in (0, 1))
    assert first.stat().st_size == second.stat().st_size
    shutil.copy(first, second)
    with pytest.raises(BankError, match=r"block-00001\.safetensors is damaged: its checksum"):
        Bank.open(folder)
    bank = Bank.open(folder, verify=False)
    with pytest.raises(BankError, match=r"block-00001\.safetensors is not block 1 of this bank"):
        bank.form(3, 0, CPU)


def test_a_file_that_vanishes_later_is_refused(folder: Path) -> None:
    bank = Bank.open(folder)
    (folder / "block-00000.safetensors").unlink()
    with pytest.raises(BankError, match=r"block-00000\.safetensors is missing"):
        bank.weights(0, 0, CPU)


def test_what_is_no_bank_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BankError, match=r"nowhere is not a bank: there is no such folder"):
        Bank.open(tmp_path / "nowhere")
    with pytest.raises(BankError, match=r"is not a bank: it has no bank\.json"):
        Bank.open(tmp_path)
    (tmp_path / "bank.json").write_text('{"format": "account"}')
    with pytest.raises(BankError, match=r"bank\.json is not ours: expected format 'discopt-bank', got 'account'"):
        Bank.open(tmp_path)


@pytest.mark.parametrize("stop", [0, 2, 3])
def test_an_unfinished_bank_says_how_far_it_came(tmp_path: Path, stop: int) -> None:
    build(tmp_path, stop)
    with pytest.raises(BankError, match=rf"is unfinished: {stop} of 3 blocks are built; build it with the same"):
        Bank.open(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", "[" * 100_000, '{"format": "discopt-bank"}'])
def test_a_manifest_that_is_not_whole_is_refused(folder: Path, text: str) -> None:
    (folder / "bank.json").write_text(text, encoding="latin-1")
    with pytest.raises(BankError, match=r"bank\.json"):
        Bank.open(folder)


def test_every_cut_of_the_manifest_is_refused(folder: Path) -> None:
    data = (folder / "bank.json").read_bytes()
    for end in range(0, len(data) - 2, 97):
        (folder / "bank.json").write_bytes(data[:end])
        with pytest.raises(BankError, match=r"bank\.json"):
            Bank.open(folder, verify=False)


def test_every_changed_byte_of_the_manifest_is_refused(folder: Path) -> None:
    data = (folder / "bank.json").read_bytes()
    for at in range(0, len(data), 31):
        changed = bytearray(data)
        changed[at] ^= 0xFF
        (folder / "bank.json").write_bytes(changed)
        with pytest.raises(BankError, match=r"bank\.json"):
            Bank.open(folder, verify=False)


@pytest.mark.parametrize("version", [0, 2, True, "1", None])
def test_a_manifest_of_another_version_is_refused(folder: Path, version: Any) -> None:
    document = json.loads((folder / "bank.json").read_text())
    (folder / "bank.json").write_text(json.dumps({**document, "version": version}))
    with pytest.raises(BankError, match=rf"bank\.json: expected version 1, got {version!r}"):
        Bank.open(folder)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where everything is in a JSON document, the document itself left out."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def changed(document: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    document = copy.deepcopy(document)
    at = document
    for key in path[:-1]:
        at = at[key]
    change(at, path[-1])
    return document


def signed(document: Any) -> Any:
    """With a fingerprint that fits, as somebody might who writes manifests by hand."""
    return {**document, "fingerprint": checksum({key: document.get(key) for key in ("header", "files", "layers")})}


def refuses(folder: Path, document: Any) -> None:
    (folder / "bank.json").write_text(json.dumps(document))
    with pytest.raises(BankError, match=r"bank\.json"):
        Bank.open(folder, verify=False)


FREE = ("settings", "calibration", "propagate")  # what a header says in there is the builder's business


def small_manifest(folder: Path) -> Any:
    """The manifest of a bank of one block and one layer."""
    shutil.rmtree(folder)
    writer = BankWriter.begin(folder, header(blocks=1))
    layers, forms = block_of(0)
    writer.write_block(0, layers[-1:], {key: form for key, form in forms.items() if key[0] == layers[-1].name})
    writer.finish()
    document = json.loads((folder / "bank.json").read_text())
    assert document == signed(document)
    return document


WRONG = ({"no": 1}, ["no"], "no", 7.5, -3, 10**40, True, None)


def test_a_wrong_value_anywhere_in_the_manifest_is_refused(folder: Path) -> None:
    document = small_manifest(folder)
    for path in places(document):
        for value in WRONG:
            wrong = changed(document, path, lambda at, key, value=value: at.__setitem__(key, value))  # type: ignore[misc]
            if wrong != document:
                refuses(folder, wrong)


def test_a_wrong_type_anywhere_in_the_manifest_is_refused_whatever_its_fingerprint(folder: Path) -> None:
    document = small_manifest(folder)
    other = {str: 7, int: "7", float: "7", bool: 7, list: {}, dict: []}
    for path in places(document):
        if path[:1] != ("fingerprint",) and not (path[0] == "header" and path[1:2] and path[1] in FREE and path[2:]):
            if path == ("header", "propagate"):
                continue
            wrong = changed(document, path, lambda at, key: at.__setitem__(key, other[type(at[key])]))
            refuses(folder, signed(wrong))


def test_whatever_the_manifest_lacks_is_missed(folder: Path) -> None:
    document = small_manifest(folder)
    for path in places(document):
        lacking = changed(document, path, lambda at, key: at.pop(key))
        refuses(folder, lacking)
        free = path[0] == "header" and path[1:2] and path[1] in FREE and (path[2:] or path[1] == "propagate")
        if not free and path != ("fingerprint",) and path[1:2] != ("labels",) and path[2:3] != ("outliers",):
            refuses(folder, signed(lacking))


@pytest.mark.parametrize(
    "name", ["../block-00000.safetensors", "/etc/passwd", "", ".", "a\0b", "block-00001.safetensors"]
)
def test_a_file_name_that_is_not_the_blocks_own_is_refused(folder: Path, name: str) -> None:
    shutil.copy(folder / "block-00000.safetensors", folder.parent)
    document = json.loads((folder / "bank.json").read_text())
    document["files"][0]["name"] = name
    (folder / "bank.json").write_text(json.dumps(signed(document)))
    with pytest.raises(BankError, match=r"bank\.json is damaged: the file of block 0 must be block-00000\.safetensors"):
        Bank.open(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"present": [False, False, False]}, "must have a level, got none of 3"),
        ({"rows": 0}, r"must be at least 1, got \(3, 0, 9\)"),
        ({"rows": 2**52}, "at least 1, got"),
        ({"block": 1}, r"come block by block, 0 to 0, got \[1\]"),
        ({"block": -1}, "must not be negative, got -1"),
        ({"kind": "norm"}, "kind must be one of attention, mlp, got 'norm'"),
        ({"weights": [0, 136, 135]}, "weights of level 1 must be 0 to 135, got 136"),
        ({"weights": [1, 135, 135]}, "weights of level 0 must be 0 to 0, got 1"),
        ({"bytes": [0, -1, 5]}, "bytes of level 1 must be 0 to 9007199254740992, got -1"),
        ({"errors": [0.5]}, "errors must have 3 entries, one a level, got 1"),
        ({"more": 1}, "a layer must have name, .*, outliers, got name, .*, more"),
    ],
)
def test_layers_that_cannot_be_are_refused(folder: Path, changes: dict[str, Any], reason: str) -> None:
    document = small_manifest(folder)
    document["layers"][0] |= changes
    (folder / "bank.json").write_text(json.dumps(signed(document)))
    with pytest.raises(BankError, match=rf"bank\.json is damaged: .*{reason}"):
        Bank.open(folder)


def test_costs_that_the_file_does_not_bear_out_are_refused(folder: Path) -> None:
    document = small_manifest(folder)
    document["layers"][0]["bytes"][1] -= 1
    (folder / "bank.json").write_text(json.dumps(signed(document)))
    with pytest.raises(BankError, match=r"block-00000\.safetensors is damaged: expected .* to cost .*, got Costs"):
        Bank.open(folder).form(0, 1, CPU)


# building


def test_the_same_build_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    build(tmp_path / "again").finish()
    assert content(tmp_path / "again") == content(folder)


@pytest.mark.parametrize("stop", range(BLOCKS + 1))
def test_a_build_stopped_after_any_block_ends_in_the_same_bytes(folder: Path, tmp_path: Path, stop: int) -> None:
    build(tmp_path / "stopped", stop)
    writer = BankWriter.begin(tmp_path / "stopped", header())
    assert writer.finished == {*range(stop)}
    build(tmp_path / "stopped").finish()
    assert content(tmp_path / "stopped") == content(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, 2000, -1])
def test_a_torn_block_is_built_again_and_the_others_are_not(
    folder: Path, tmp_path: Path, keep: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "stopped"
    build(path, 2)
    torn = path / "block-00000.safetensors"
    torn.write_bytes(torn.read_bytes()[:keep])
    assert BankWriter.begin(path, header()).finished == {1}
    assert "block 0 is built again" in caplog.text and "block-00000.safetensors is damaged" in caplog.text
    build(path).finish()
    assert content(path) == content(folder)


def test_a_changed_byte_anywhere_in_a_block_is_noticed_by_the_block_itself(tmp_path: Path) -> None:
    build(tmp_path, 1)
    file = tmp_path / "block-00000.safetensors"
    data = file.read_bytes()
    header_ = json.loads((tmp_path / "bank.json").read_text())["header"]
    bank_blocks.StoredBlock.open(file, header_, 0).verify()
    for at in range(0, len(data), 13):
        file.write_bytes(data[:at] + bytes([data[at] ^ 0x15]) + data[at + 1 :])
        with pytest.raises(BankError, match=r"block-00000\.safetensors"):
            bank_blocks.StoredBlock.open(file, header_, 0).verify()


def test_a_stray_temporary_file_is_cleared_away(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "stopped"
    build(path, 1)
    (path / ".block-00001.safetensors.0a1b2c.tmp").write_bytes(b"half a bl")
    (path / ".bank.json.0a1b2c.tmp").write_bytes(b"{")
    build(path).finish()
    assert content(path) == content(folder)


def test_a_build_killed_while_it_writes_ends_in_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each of its writes in turn, it is begun again until it is through."""
    path = tmp_path / "killed"
    write, deaths = bank_module.write_atomic, []

    def dying(file: Path, data: bytes | str) -> None:
        if file.name not in deaths:
            deaths.append(file.name)
            (file.parent / f".{file.name}.0a1b2c.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        write(file, data)
        if f"after {file.name}" not in deaths:
            deaths.append(f"after {file.name}")
            raise KeyboardInterrupt

    monkeypatch.setattr(bank_module, "write_atomic", dying)
    for _ in range(20):
        try:
            build(path).finish()
        except KeyboardInterrupt:
            continue
        except BankError:  # killed right after the last write: it is finished
            break
    assert len(deaths) == 2 * (BLOCKS + 1)
    assert content(path) == content(folder)
    Bank.open(path)


def test_blocks_of_another_bank_are_built_again(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "stopped"
    build(tmp_path / "other", propagate="3")
    build(path, 0)
    shutil.copy(tmp_path / "other" / "block-00000.safetensors", path)
    assert BankWriter.begin(path, header()).finished == frozenset()
    build(path).finish()
    assert content(path) == content(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"propagate": "3"}, "propagate: 'dense' there, '3' here"),
        ({"settings": {"bits": BITS, "group_size": 64, "method": "gptq"}}, "settings group_size: 8 there, 64 here"),
        ({"settings": {"bits": (2, 3, 4), "group_size": 8, "method": "gptq"}}, r"settings bits: \[2, 3, 5\] there"),
        ({"settings": {"bits": BITS, "group_size": 8}}, "settings method: only there"),
        ({"model": {"source": "a/model", "fingerprint": "0"}}, "model fingerprint: 'f*' there, '0' here"),
        ({"act_order": None}, "act_order: only here"),
    ],
)
def test_an_unfinished_bank_of_other_options_is_left_alone(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    build(tmp_path, 1)
    before = content(tmp_path)
    with pytest.raises(BankError, match=rf"begun with other options \({reason}"):
        BankWriter.begin(tmp_path, header(**changes))
    assert content(tmp_path) == before


def test_a_finished_bank_is_replaced_only_by_force(folder: Path, tmp_path: Path) -> None:
    before = content(folder)
    with pytest.raises(BankError, match="holds a finished bank already; use it, choose another folder, or replace it"):
        BankWriter.begin(folder, header())
    assert content(folder) == before
    (folder / "notes.txt").write_text("mine")
    writer = BankWriter.begin(folder, header(propagate="3"), force=True)
    assert writer.finished == frozenset() and {*content(folder)} == {"bank.json", "notes.txt"}
    with pytest.raises(BankError, match="is unfinished: 0 of 3"):
        Bank.open(folder)


def test_force_replaces_a_damaged_bank_but_nothing_else(folder: Path, tmp_path: Path) -> None:
    manifest = folder / "bank.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 7}))
    with pytest.raises(BankError, match="expected version 1, got 7"):
        BankWriter.begin(folder, header())
    BankWriter.begin(folder, header(), force=True)
    for text in ('{"format": "account"}', "not JSON"):
        manifest.write_text(text)
        with pytest.raises(BankError, match=r"holds a bank\.json that is not a bank's"):
            BankWriter.begin(folder, header(), force=True)
        assert manifest.read_text() == text


def test_folders_that_are_none_of_ours_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BankError, match="is a file, not a folder"):
        BankWriter.begin(tmp_path / "file", header(), force=True)
    with pytest.raises(BankError, match="cannot make the bank"):
        BankWriter.begin(tmp_path / "file" / "bank", header())
    (tmp_path / "block-00000.safetensors").write_text("mine")
    with pytest.raises(BankError, match=r"holds block-00000\.safetensors but no bank\.json"):
        BankWriter.begin(tmp_path, header(), force=True)
    assert (tmp_path / "block-00000.safetensors").read_text() == "mine"


def test_a_writer_gives_back_what_its_finished_blocks_hold(tmp_path: Path) -> None:
    build(tmp_path, 1)
    writer = build(tmp_path, 2)
    for block in (0, 1):
        for (name, level), form in block_of(block)[1].items():
            assert isinstance(form, Quantized)
            assert same(writer.form(block, name, level, CPU), form)
            assert torch.equal(writer.weights(block, name, level, CPU), form.dequantized())
    with pytest.raises(ValueError, match=r"a layer in a finished block, got layers\.2\.self_attn\.q_proj in block 2"):
        writer.form(2, "layers.2.self_attn.q_proj", 1, CPU)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "drop"}, "kind must be one of quantization, sparsity, got 'drop'"),
        ({"labels": ["2", "2"]}, r"labels must be different names without a slash, got \['2', '2'\]"),
        ({"labels": []}, r"got \[\]"),
        ({"labels": ["a/b"]}, r"got \['a/b'\]"),
        ({"labels": [2]}, "a label must be text, got 2"),
        ({"blocks": 0}, "blocks must be at least 1, got 0"),
        ({"blocks": True}, "blocks must be a whole number, got True"),
        ({"model": {"source": "a"}}, "model's fingerprint must be text, got None"),
        ({"settings": None}, "settings must be an object, got None"),
        ({"calibration": "text"}, "calibration must be an object, got 'text'"),
    ],
)
def test_headers_that_lack_something_are_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        BankWriter.begin(tmp_path / "bank", header(**changes))
    assert not (tmp_path / "bank").exists()


def test_blocks_that_are_not_what_their_layers_say_are_refused(tmp_path: Path) -> None:
    writer = build(tmp_path, 1)
    layers, forms = block_of(1)
    name = layers[0].name
    lacking = {key: form for key, form in forms.items() if key != (name, 1)}
    with pytest.raises(ValueError, match=r"got forms that lack layers\.1\.self_attn\.q_proj at 1"):
        writer.write_block(1, layers, lacking)
    with pytest.raises(ValueError, match="got forms that must not hold other at 0"):
        writer.write_block(1, layers, {**forms, ("other", 0): forms[name, 0]})
    with pytest.raises(ValueError, match=r"q_proj at level 1 must cost Costs\(weights=147, bits=441.*bits=735"):
        writer.write_block(1, layers, {**forms, (name, 1): forms[name, 2]})
    with pytest.raises(ValueError, match=r"must have shape \(1, 7, 21\), got \(1, 21, 7\)"):
        writer.write_block(1, layers, {**forms, (name, 1): quantized((1, 21, 7), 3, 8, False, 0)})
    with pytest.raises(ValueError, match="must be of block 2 and have 3 levels, got block 1 and 3 levels"):
        writer.write_block(2, layers, forms)
    with pytest.raises(ValueError, match=r"names of layers must differ, got 'layers\.1\.self_attn\.q_proj' 2 times"):
        writer.write_block(1, [*layers, layers[0]], forms)
    with pytest.raises(ValueError, match="a block of 0 to 2 not yet written, got 0"):
        writer.write_block(0, *block_of(0))
    with pytest.raises(ValueError, match="a block of 0 to 2 not yet written, got 3"):
        writer.write_block(3, layers, forms)
    with pytest.raises(ValueError, match=r"all 3 blocks to be written, got none for \[1, 2\]"):
        writer.finish()
    assert {*content(tmp_path)} == {"bank.json", "block-00000.safetensors"}
