"""Models whose blocks are on the device only while they run, against the same models loaded whole."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from discopt_llm import evaluator
from discopt_llm.anatomy import block_modules, read_anatomy
from discopt_llm.bank import Bank
from discopt_llm.banks import BankRequest, make_bank
from discopt_llm.baselines import similarity
from discopt_llm.drop import DropLevels
from discopt_llm.errors import MemoryPlanError
from discopt_llm.evaluator import Evaluator
from discopt_llm.fitness import KL, Perplexity
from discopt_llm.genome import mixed_genome
from discopt_llm.lanes import HostLane, is_out_of_memory
from discopt_llm.levels import BankLevels
from discopt_llm.memory import Memory
from discopt_llm.models import LoadedModel, load_model
from discopt_llm.replay import weights_replaced_
from discopt_llm.residency import Residency, _MappedFiles, on_device_
from discopt_llm.students import student_
from tests.llm.banks import KINDS
from tests.llm.families import FAMILIES, tiny, tiny_tokenizer
from tests.llm.test_evaluator import loaded, students, text
from tests.llm.test_levels import BankOf, random_profiles

ALL = (KL(), Perplexity())
CPU = torch.device("cpu")


def streamed(family: str, resident: Sequence[int] = (), **options: Any) -> LoadedModel:
    """A model of a family, its blocks in files."""
    model = FAMILIES[family]()
    residency = Residency(model, block_modules(model), CPU, **options)
    found = LoadedModel(model, tiny_tokenizer(), "test", read_anatomy(model), residency)
    found.place_(resident)
    return found


def where(model: LoadedModel) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in model.model.named_parameters()}


@pytest.mark.parametrize("resident", [(), (1,)])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_that_come_and_go_change_no_loss_of_a_whole_model(family: str, resident: Sequence[int]) -> None:
    model = streamed(family, resident)
    before = where(model)
    levels = DropLevels(model.anatomy)
    population, sequences = students(len(levels.names), 4), text(12, 12, 5)
    found = Evaluator(model, levels).measure(population, sequences, ALL)
    expected = Evaluator(loaded(family), DropLevels(loaded(family).anatomy)).measure(population, sequences, ALL)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert where(model) == before
    assert model.fingerprint == loaded(family).fingerprint


@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_runs_a_block_finds_its_weights(family: str) -> None:
    model, whole = streamed(family), loaded(family)
    before = where(model)
    ids = text(12)[0][None]
    assert torch.equal(model.model(input_ids=ids).logits, whole.model(input_ids=ids).logits)
    assert np.array_equal(similarity(model, text(12, 7)), similarity(whole, text(12, 7)))
    assert [(a.name, a.kind, a.transposed, a.input) for a in model.layers] == [
        (b.name, b.kind, b.transposed, b.input) for b in whole.layers
    ]
    assert where(model) == before


def mixed_levels(model: LoadedModel, family: str, bank_of: BankOf, **options: Any) -> BankLevels:
    banks: list[Bank] = [bank_of(family, kind) for kind in KINDS]
    tables = {bank.kind: (bank.layers, bank.labels) for bank in banks}
    return BankLevels(model, model.layers, mixed_genome(tables, "layer", 0, drop=True), banks, **options)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_levels_of_banks_replace_weights_that_come_and_go(family: str, bank_of: BankOf) -> None:
    model = streamed(family, (2,))
    levels, plain = (mixed_levels(one, family, bank_of) for one in (model, loaded(family)))
    population, sequences = random_profiles(levels.genome, 5), text(12, 12)
    found = Evaluator(model, levels).measure(population, sequences, ALL)
    expected = Evaluator(loaded(family), plain).measure(population, sequences, ALL)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    ids = sequences[0][None]
    with student_(levels, population[0]), student_(plain, population[0]):  # which puts levels before there is a block
        assert torch.equal(model.model(input_ids=ids).logits, loaded(family).model(input_ids=ids).logits)


def test_the_device_holds_the_ends_two_buffers_and_the_resident_blocks() -> None:
    model = streamed("llama")
    assert model.residency is not None
    sizes = model.residency.sizes
    ends = sum(p.nbytes for p in model.model.parameters()) - sum(
        p.nbytes for block in model.anatomy.blocks for p in block.module.parameters()
    )
    assert ends <= model.residency.ends <= ends + 1000  # and rotary angles
    levels = DropLevels(model.anatomy)
    for resident in [(), (0, 2), (1,), (0, 1, 2, 3)]:
        model.place_(resident)
        Evaluator(model, levels).measure(students(len(levels.names), 3), text(12), ALL)
        buffers = 2 * max(sizes) if len(resident) < 4 else 0
        assert model.residency.held == model.residency.ends + buffers + sum(sizes[i] for i in resident)
    assert model.residency.most_held == model.residency.held


# -- buffers -------------------------------------------------------------------------------------------------------


class Watched(HostLane):
    """Notes what is copied where; marks are numbers."""

    def __init__(self) -> None:
        self.copies: list[tuple[int, Any]] = []  # address of the first target, the mark before
        self.marks = 0
        self.waits: list[Any] = []

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Any) -> Any:  # type: ignore[override]
        self.copies.append((pairs[0][0].data_ptr(), after))
        super().copy(pairs, after)
        return f"copy {len(self.copies)}"

    def mark(self) -> Any:  # type: ignore[override]
        self.marks += 1
        return self.marks

    def wait(self, mark: Any) -> None:
        self.waits.append(mark)


def test_the_next_block_is_copied_while_one_runs_and_never_over_one_in_use() -> None:
    model = streamed("llama", lane=(lane := Watched()))
    assert model.residency is not None
    lane.copies.clear()
    lane.waits.clear()
    lane.marks = 0  # two when the buffers are made, then one whenever a block has run
    for index in (0, 1, 2, 3, 0, 1):
        with model.residency.block_(index):
            for buffer in model.residency._buffers:
                assert buffer.coming is not None
                buffer.coming.result()
    addresses = [address for address, _ in lane.copies]
    assert len(addresses) == 7  # each once, and the one after the last
    assert len({*addresses}) == 2
    assert all(a != b for a, b in pairwise(addresses))
    # A copy waits for the last use of its buffer, and what runs in it for the copy.
    assert [after for _, after in lane.copies] == [1, 2, 3, 4, 5, 6, 7]
    assert lane.waits == [f"copy {i}" for i in range(1, 7)]


def test_a_block_that_is_there_still_is_not_copied_again() -> None:
    model = streamed("llama", lane=(lane := Watched()))
    lane.copies.clear()
    for _ in range(5):
        with on_device_(model.anatomy.blocks[1].module), on_device_(model.anatomy.blocks[1].module):
            pass
    assert model.residency is not None
    model.place_(())
    assert len(lane.copies) == 2  # it, and the one after it


def test_weights_with_other_values_keep_them() -> None:
    model = streamed("llama")
    name, ids = "model.layers.1.mlp.up_proj.weight", text(12)[0][None]
    before = where(model)
    parameter = dict(model.model.named_parameters())[name]
    other = torch.zeros_like(parameter)
    with weights_replaced_(model.model, {name: other}):
        with on_device_(model.anatomy.blocks[1].module):
            assert parameter.data_ptr() == other.data_ptr()
        replaced = model.model(input_ids=ids).logits
    assert where(model) == before
    assert not torch.allclose(replaced, model.model(input_ids=ids).logits)


def test_an_error_in_a_block_leaves_it_where_it_was() -> None:
    model = streamed("gpt2")
    before = where(model)
    block = model.anatomy.blocks[2].module
    with pytest.raises(RuntimeError, match="normalized_shape"), on_device_(block):
        block(torch.zeros(1, 1, 7))
    assert where(model) == before


def test_an_error_of_a_copy_comes_out_where_the_block_is_needed_and_the_next_try_copies_again() -> None:
    class Failing(HostLane):
        fails = False

        def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Any) -> None:
            if self.fails:
                raise MemoryError("no room")
            super().copy(pairs, after)

    model = streamed("llama", lane=(lane := Failing()))
    model.place_(())
    lane.fails = True
    ids = text(12)[0][None]
    with pytest.raises(MemoryError, match="no room"):
        model.model(input_ids=ids)
    lane.fails = False
    assert torch.equal(model.model(input_ids=ids).logits, loaded("llama").model(input_ids=ids).logits)


def test_inference_mode_and_others_share_the_buffers() -> None:
    model, ids = streamed("llama"), text(12)[0][None]
    answers = []
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            answers.append(model.model(input_ids=ids).logits)
    assert all(torch.equal(answer, answers[0]) for answer in answers)


# -- loading -------------------------------------------------------------------------------------------------------


def test_blocks_of_a_folder_are_mapped_from_its_file(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("discopt_llm.residency._spilled", lambda _: pytest.fail("wrote a file"))
    whole = load_model(str(model_folder), device="cpu")
    model = load_model(str(model_folder), device="cpu", memory=Memory(device=10**6))
    assert whole.residency is None and model.residency is not None
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split(maxsplit=5) for line in lines if str(model_folder) in line]
    for block in model.anatomy.blocks:
        for parameter in block.module.parameters():
            address = parameter.data_ptr()
            assert any(start <= address < end for start, end in (_span(span[0]) for span in spans))
    embedding = model.model.get_input_embeddings().weight.data_ptr()
    assert not any(start <= embedding < end for start, end in (_span(span[0]) for span in spans))
    assert model.fingerprint == whole.fingerprint


def _span(text: str) -> tuple[int, int]:
    start, end = text.split("-")
    return int(start, 16), int(end, 16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_blocks_in_another_data_type_go_to_a_file_of_their_own(model_folder: Path, dtype: str) -> None:
    whole = load_model(str(model_folder), device="cpu", dtype=dtype)
    model = load_model(str(model_folder), device="cpu", dtype=dtype, memory=Memory(host=10**6))
    assert model.residency is not None
    for block in model.residency._blocks:
        assert block.in_file is not None and not any(p.data.untyped_storage().resizable() for p in block.parameters)
    ids = text(12)[0][None]
    assert torch.equal(model.model(input_ids=ids).logits, whole.model(input_ids=ids).logits)


def test_a_file_that_cannot_be_written_is_one_line(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("discopt_llm.residency.save_file", full)
    with pytest.raises(MemoryPlanError, match="No space left on device; the environment variable TMPDIR"):
        load_model(str(model_folder), device="cpu", dtype="bfloat16", memory=Memory(device=10**6))


@contextmanager
def live_bytes() -> Iterator[list[int]]:
    """Bytes of all tensors made inside that are no files, whenever a block or the head has run."""
    held: list[int] = []
    calls = count()

    def noting(function: Any) -> Any:
        def noted(*args: Any) -> Any:
            result = function(*args)
            if next(calls) % 29:  # looking takes long
                return result
            files = _MappedFiles()
            storages = {
                tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
                for tensor in gc.get_objects()
                if isinstance(tensor, Tensor) and not files.hold(tensor)
            }
            held.append(sum(storages.values()))
            return result

        return noted

    gc.collect()
    gc.freeze()  # so that only what comes is looked at
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("run_block", "project"):
                patch.setattr(evaluator, name, noting(getattr(evaluator, name)))
            yield held
    finally:
        gc.unfreeze()


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose embedding and head are a small part of it."""
    folder = tmp_path_factory.mktemp("deep")
    tiny("Llama", num_hidden_layers=16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def deep_banks(deep: Path, notes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A small bank of it of each kind."""
    folder = tmp_path_factory.mktemp("deep banks")
    asked: dict[str, Any] = {"model": str(deep), "calibration": str(notes)}
    asked |= {"calibration_tokens": 256, "sequence_length": 32}
    requests = [
        BankRequest(kind="quantization", bits=(3, 4), group_size=16, propagate="dense", **asked),
        BankRequest(kind="sparsity", method="magnitude", levels=3, **asked),
    ]
    made = [
        make_bank(request, folder / request.kind, force=False, quiet=True, say=lambda _: None) for request in requests
    ]
    return {bank.kind: str(bank.path) for bank in made}


def half(folder: Path) -> tuple[LoadedModel, int]:
    """The model loaded whole, and half of what its weights take."""
    whole = load_model(str(folder), device="cpu")
    return whole, sum(p.nbytes for p in whole.model.parameters()) // 2


def test_half_the_memory_of_the_model_changes_no_loss_of_dropping_and_is_never_passed(deep: Path) -> None:
    whole, bound = half(deep)
    levels = DropLevels(whole.anatomy)
    population, sequences = students(len(levels.names), 3), text(12, 12)
    expected = Evaluator(whole, levels, memory_bytes=40_000).measure(population, sequences, ALL)
    with live_bytes() as held:
        model = load_model(str(deep), device="cpu", memory=Memory(device=bound))
        lines: list[str] = []
        options: dict[str, Any] = {"memory": Memory(device=bound), "memory_bytes": 40_000, "say": lines.append}
        evaluator = Evaluator(model, DropLevels(model.anatomy), **options)
        found = evaluator.measure(population, sequences, ALL)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert lines == [evaluator.plan.sentence]
    assert evaluator.plan.streamed > 0
    assert model.residency is not None
    assert model.residency.most_held == model.residency.held <= evaluator.plan.total - evaluator.plan.working
    assert max(held) <= evaluator.plan.total <= bound


@pytest.mark.parametrize("kind", KINDS)
def test_half_the_memory_of_the_model_changes_no_loss_of_a_bank_and_is_never_passed(
    deep: Path, deep_banks: dict[str, str], kind: str
) -> None:
    whole, bound = half(deep)
    levels = of_bank(whole, deep_banks[kind])
    population, sequences = random_profiles(levels.genome, 3), text(12, 12)
    expected = Evaluator(whole, levels, memory_bytes=40_000).measure(population, sequences, ALL)
    with live_bytes() as held:
        model = load_model(str(deep), device="cpu", memory=Memory(device=bound))
        levels = of_bank(model, deep_banks[kind])
        evaluator = Evaluator(model, levels, memory=Memory(device=bound), memory_bytes=40_000, say=lambda _: None)
        found = [evaluator.measure(population, sequences, ALL) for _ in range(2)]
    for losses in found:
        assert all(np.array_equal(a, b) for a, b in zip(losses, expected, strict=True))
    assert evaluator.plan.streamed > 0 and levels._resident.memory_bytes == evaluator.plan.unpacked
    assert max(held) <= evaluator.plan.total <= bound


def of_bank(model: LoadedModel, path: str) -> BankLevels:
    bank = Bank.open(path)
    genome = mixed_genome({bank.kind: (bank.layers, bank.labels)}, "layer", 0, drop=True)
    return BankLevels(model, model.layers, genome, [bank])


def test_a_model_that_was_loaded_whole_cannot_be_made_smaller(deep: Path) -> None:
    whole, bound = half(deep)
    with pytest.raises(MemoryPlanError, match="the whole model is on the device: load it with the same bound"):
        Evaluator(whole, DropLevels(whole.anatomy), memory=Memory(device=bound), memory_bytes=40_000)
    Evaluator(whole, DropLevels(whole.anatomy), memory=Memory(device=8 * bound), say=lambda _: None)


def test_errors_that_mean_a_full_memory_are_told_from_others() -> None:
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
    ):
        assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))
