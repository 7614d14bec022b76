"""Plans for memory: what is asked for, who gets what, and what cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from discopt_llm import memory as memory_module
from discopt_llm.drop import DropLevels
from discopt_llm.errors import MemoryPlanError
from discopt_llm.evaluator import Evaluator
from discopt_llm.fitness import KL
from discopt_llm.memory import LevelSizes, Memory, MemoryPlan, ModelSizes, total_memory
from tests.llm.test_evaluator import loaded, students, text
from tests.llm.test_levels import BankOf, bank_levels
from tests.llm.test_residency import streamed

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GiB = 2**30
# Llama-3-8B in bfloat16: 32 blocks, an embedding and a head of 128256 tokens.
LLAMA_8B = ModelSizes(
    ends=2101346304, blocks=(436224000,) * 32, state=8192, activation=8 * 14336 * 2, vocabulary=128256
)
BITS_2_TO_6 = LevelSizes(packed=18 * 10**9, unpacked=5 * 13958643712, row=436207616, scratch=20 * 58720256)


@pytest.fixture(autouse=True)
def _sizes_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device of 80 GiB, a host of 64."""
    real = total_memory
    assert real(CPU) > 2**28
    monkeypatch.setattr(memory_module, "total_memory", lambda device: (80 if device.type == "cuda" else 64) * GiB)


# -- what is asked for ---------------------------------------------------------------------------------------------


def test_sizes_are_read_as_people_write_them() -> None:
    assert Memory.parse("16GiB", "1.5 GB") == Memory(16 * GiB, 1_500_000_000)
    assert Memory.parse(None) == Memory()
    assert Memory.parse("500mb") == Memory(device=500_000_000)


@pytest.mark.parametrize("asked", ["", "16", "0.5x", "0GB", "many", "-1GiB", "0.1B", "16GiB of it"])
def test_anything_else_is_refused(asked: str) -> None:
    with pytest.raises(ValueError, match=r"^memory must be a size such as 16GiB or 500MB, got "):
        Memory.parse(asked)
    with pytest.raises(ValueError, match=r"^host memory must be a size such as 16GiB or 500MB, got "):
        Memory.parse(None, asked)


def test_a_bound_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="memory of the device must be at least 1 byte, got 0"):
        Memory(device=0)
    with pytest.raises(ValueError, match="memory of the host must be at least 1 byte, got -3"):
        Memory(host=-3)


def test_on_a_cpu_device_and_host_are_one() -> None:
    assert Memory(5, 3).on(CPU) == Memory(3, 5).on(CPU) == Memory(None, 3).on(CPU) == 3
    assert Memory(5, 3).on(CUDA) == 5
    assert Memory(None, 3).on(CUDA) is None


# -- who gets what -------------------------------------------------------------------------------------------------


def test_without_a_bound_all_is_resident_and_nothing_is_kept_to() -> None:
    plan = MemoryPlan.of(Memory(), CPU, LLAMA_8B, BITS_2_TO_6)
    assert plan.bound is None and plan.streamed == plan.buffers == 0
    assert plan.working == 4 * GiB
    assert MemoryPlan.of(Memory(), CUDA, LLAMA_8B).working == 20 * GiB
    plan.check_length(10**9)


def test_a_model_of_8b_is_searched_within_24_gib() -> None:
    plan = MemoryPlan.of(Memory(24 * GiB), CUDA, LLAMA_8B, BITS_2_TO_6)
    assert plan.total <= 24 * GiB
    assert plan.resident == frozenset() and plan.streamed == 32
    assert plan.packed > 12 * GiB  # what is not copied ahead comes first
    plan.check_length(2048)
    assert plan.limits().call_tokens >= 2048


def test_a_model_of_8b_that_is_pruned_is_resident_within_24_gib() -> None:
    plan = MemoryPlan.of(Memory(24 * GiB), CUDA, LLAMA_8B)
    assert plan.streamed == plan.buffers == 0 and len(plan.resident) == 32
    assert 24 * GiB - 2**20 < plan.total <= 24 * GiB  # the rest is to work with


def test_on_a_large_device_all_of_a_bank_is_kept() -> None:
    plan = MemoryPlan.of(Memory(120 * GiB), CUDA, LLAMA_8B, BITS_2_TO_6)
    assert plan.packed == BITS_2_TO_6.packed and plan.unpacked == BITS_2_TO_6.unpacked
    assert plan.streamed == 0 and plan.working == 20 * GiB


def test_the_sentence_says_who_gets_what() -> None:
    model = ModelSizes(ends=10**9, blocks=(10**8,) * 10, state=1000, activation=1000, vocabulary=1000)
    plan = MemoryPlan.of(Memory(2 * 10**9), CPU, model)
    assert plan.sentence == (
        "memory: 2.0 GB: embedding and head 1.0 GB, 3 of 10 blocks 300.0 MB, two buffers for the other 7 200.0 MB, "
        "hidden states and activations 500.0 MB (250,000 tokens x students a pass)"
    )
    plan = MemoryPlan.of(Memory(2 * 10**9), CPU, model, LevelSizes(0, 10**9, 10**8, 10**7))
    assert "levels 300.0 MB" in plan.sentence
    assert MemoryPlan.of(Memory(), CPU, model).sentence.startswith(
        "memory: no bound: embedding and head 1.0 GB, 10 of 10"
    )


@settings(max_examples=150, deadline=None)
@given(
    bound=st.integers(1, 10**6),
    ends=st.integers(1, 10**5),
    blocks=st.lists(st.integers(1, 10**5), min_size=1, max_size=12),
    row=st.integers(0, 10**5),
    levels=st.integers(0, 10),
    packed=st.integers(0, 10**6),
    working=st.none() | st.integers(1, 10**6),
    device=st.sampled_from([CPU, CUDA]),
)
def test_no_plan_passes_its_bound_and_one_that_is_refused_is_made_with_the_least_it_names(
    bound: int,
    ends: int,
    blocks: list[int],
    row: int,
    levels: int,
    packed: int,
    working: int | None,
    device: torch.device,
) -> None:
    model = ModelSizes(ends, tuple(blocks), state=4, activation=30, vocabulary=10)
    sizes = LevelSizes(packed, row * (1 + levels), row, row // 2) if row else None
    fixed = ends + (row + row // 2) + min(sum(blocks), 2 * max(blocks)) + model.least_working(1)
    if bound < fixed:
        with pytest.raises(MemoryPlanError, match="of memory is too little"):
            MemoryPlan.of(Memory(bound), device, model, sizes, working=working)
        bound = fixed
    plan = MemoryPlan.of(Memory(bound), device, model, sizes, working=working)
    assert plan.total <= bound
    assert plan.working <= (working or bound)
    if sizes:
        assert sizes.row <= plan.unpacked <= sizes.unpacked
        assert plan.packed <= (packed if device is CUDA else 0)
    assert plan.buffers == (0 if len(plan.resident) == len(blocks) else min(sum(blocks), 2 * max(blocks)))
    more = MemoryPlan.of(Memory(10**10), device, model, sizes, working=working)
    assert more.streamed == 0


def test_blocks_that_take_turns_lie_evenly_between_the_others() -> None:
    model = ModelSizes(ends=1, blocks=(1000,) * 12, state=1, activation=1, vocabulary=1)
    for turning in range(3, 12):  # two buffers are of no use for two blocks
        plan = MemoryPlan.of(Memory(1 + 48 + 2000 + 1000 * (12 - turning)), CPU, model, working=48)
        turns = [i for i in range(12) if i not in plan.resident]
        assert len(turns) == turning
        gaps = [b - a for a, b in zip(turns, [*turns[1:], turns[0] + 12], strict=True)]
        assert max(gaps) - min(gaps) <= 1


# -- what cannot be ------------------------------------------------------------------------------------------------


def test_too_little_is_refused_with_the_least_that_would_do() -> None:
    with pytest.raises(
        MemoryPlanError,
        match=(
            r"^2\.0 GB of memory is too little: embedding and head take 2\.1 GB, two blocks 872\.4 MB, "
            r"levels 1\.6 GB and one student on one token 6\.2 MB, at least 4\.6 GB together$"
        ),
    ):
        MemoryPlan.of(Memory(2 * 10**9), CUDA, LLAMA_8B, BITS_2_TO_6)


def test_a_sequence_that_is_too_long_for_the_plan_is_refused_before_anything_runs() -> None:
    model = streamed("llama")
    levels = DropLevels(model.anatomy)
    whole = sum(p.nbytes for p in model.model.parameters())
    quiet: dict[str, Any] = {"say": lambda _: None}
    evaluator = Evaluator(model, levels, memory=Memory(whole + 20_000), **quiet)
    evaluator.measure(students(len(levels.names), 3), text(12), [KL()])
    passes = evaluator.counts.passes
    with pytest.raises(MemoryPlanError, match=r"a sequence of 64 tokens takes 196\.6 KB for hidden states") as error:
        evaluator.measure(students(len(levels.names), 3), text(64), [KL()])
    assert evaluator.counts.passes == passes
    enough = float(str(error.value).partition("ask for ")[2].partition(" KB")[0]) * 1000 + 100
    Evaluator(model, levels, memory=Memory(int(enough)), **quiet).measure(
        students(len(levels.names), 3), text(64), [KL()]
    )


def test_levels_of_a_bank_keep_to_their_part(bank_of: BankOf) -> None:
    levels: Any = bank_levels("llama", "quantization", bank_of)
    sizes, layers = levels.sizes, levels.layers
    assert sizes.row == max(sum(layer.weights for layer in layers if layer.block == b) for b in range(4)) * 4
    assert sizes.scratch == 12 * max(layer.weights for layer in layers)
    stored = [
        layer.costs(j).bytes
        for bank in levels.banks
        for layer in bank.layers
        for j in range(len(bank.labels))
        if layer.present[j]
    ]
    assert sizes.packed == sum(stored)
    model = loaded("llama")
    whole = sum(p.nbytes for p in model.model.parameters())
    memory = Memory(2 * (whole + 2 * sizes.row + sizes.scratch))
    evaluator = Evaluator(model, levels, memory=memory, memory_bytes=60_000, say=lambda _: None)
    assert levels._resident.memory_bytes == evaluator.plan.unpacked >= sizes.row
    assert levels._packed.memory_bytes == evaluator.plan.packed == 0
