"""The same on a CUDA device: losses of the CPU, streaming, and no waiting inside of a stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from discopt_llm.bank import Bank
from discopt_llm.drop import DropLevels
from discopt_llm.evaluator import Evaluator
from discopt_llm.fitness import KL, Perplexity, TopKKL, TotalVariation
from discopt_llm.genome import mixed_genome
from discopt_llm.levels import BankLevels
from discopt_llm.memory import Memory
from discopt_llm.models import LoadedModel, load_model
from discopt_llm.packing import pack_bits, unpack_bits
from tests.llm.test_evaluator import students, text
from tests.llm.test_levels import random_profiles

ALL = (KL(), TopKKL(20), Perplexity(), TotalVariation())
TIGHT = Memory(device=260_000)  # for a model of 315 KB: two of its eight blocks stay, and there is room to work
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device is an error."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def on(device: str, folder: Path, **options: Any) -> LoadedModel:
    return load_model(str(folder), device=device, dtype="float32", **options)


def of_bank(model: LoadedModel, banks: dict[str, str], kind: str) -> BankLevels:
    bank = Bank.open(banks[kind])
    genome = mixed_genome({bank.kind: (bank.layers, bank.labels)}, "layer", 0, drop=True)
    return BankLevels(model, model.layers, genome, [bank])


def tight(model: LoadedModel, levels: Any) -> Evaluator:
    """Some blocks take turns."""
    evaluator = Evaluator(model, levels, memory=TIGHT, memory_bytes=40_000, say=lambda _: None)
    assert evaluator.plan.streamed > 0
    return evaluator


def test_losses_are_those_of_the_cpu(model_folder: Path) -> None:
    found = []
    for device in ("cpu", "cuda"):
        model = on(device, model_folder)
        levels = DropLevels(model.anatomy)
        found.append(Evaluator(model, levels).measure(students(len(levels.names), 6), text(12, 12, 5), ALL))
    for cpu, cuda in zip(*found, strict=True):
        np.testing.assert_allclose(cuda, cpu, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("host", [None, 200_000])
def test_blocks_that_come_and_go_change_no_loss(model_folder: Path, host: int | None) -> None:
    """From pinned memory, and where the host's is bounded from a file."""
    whole, model = on("cuda", model_folder), on("cuda", model_folder, memory=Memory(TIGHT.device, host))
    levels = DropLevels(model.anatomy)
    population, sequences = students(len(levels.names), 6), text(*[12] * 8)
    found = tight(model, levels).measure(population, sequences, ALL)
    plain = Evaluator(whole, DropLevels(whole.anatomy), memory_bytes=40_000)
    assert all(np.array_equal(a, b) for a, b in zip(found, plain.measure(population, sequences, ALL), strict=True))


@pytest.mark.parametrize("kind", ["quantization", "sparsity"])
def test_levels_of_banks_are_those_of_the_cpu(model_folder: Path, banks: dict[str, str], kind: str) -> None:
    found = []
    for device in ("cpu", "cuda"):
        model = on(device, model_folder)
        levels = of_bank(model, banks, kind)
        found.append(Evaluator(model, levels).measure(random_profiles(levels.genome, 4), text(12, 12), ALL))
        layer, form = levels.layers[3], next(form for form in levels.genome.forms[3] if form is not None)
        found[-1].append(levels.parameter(layer, form).cpu().numpy())
        levels.keep_(packed=10**9, unpacked=0)  # as they are stored, on the device
        assert np.array_equal(levels.parameter(layer, form).cpu().numpy(), found[-1][-1])
    assert np.array_equal(found[0].pop(), found[1].pop())
    for cpu, cuda in zip(*found, strict=True):
        np.testing.assert_allclose(cuda, cpu, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("streamed", [False, True])
def test_nothing_waits_for_the_device_while_blocks_and_head_run(
    model_folder: Path, streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = on("cuda", model_folder, **({"memory": TIGHT} if streamed else {}))
    levels = DropLevels(model.anatomy)
    evaluator = tight(model, levels) if streamed else Evaluator(model, levels)
    population, sequences = students(len(levels.names), 6), text(12, 12, 12)
    expected = evaluator.measure(population, sequences, ALL)
    for name in ("_step", "_score"):
        run = getattr(evaluator, name)

        def watched(*args: Any, run: Any = run) -> Any:
            with no_waiting():
                return run(*args)

        monkeypatch.setattr(evaluator, name, watched)
    found = evaluator.measure(population, sequences, ALL)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_levels_that_were_stored_on_the_device_are_unpacked_without_waiting(
    model_folder: Path, banks: dict[str, str]
) -> None:
    model = on("cuda", model_folder)
    levels = of_bank(model, banks, "quantization")
    levels.keep_(packed=10**9, unpacked=0)
    form = next(form for form in levels.genome.forms[0] if form is not None)
    first = levels.parameter(levels.layers[0], form)
    with no_waiting():
        again = levels.parameter(levels.layers[0], form)
    assert torch.equal(first, again)


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_packed_and_unpacked_on_the_device(bits: int) -> None:
    codes = torch.randint(1 << bits, (1000,), dtype=torch.uint8)
    packed = pack_bits(codes.cuda(), bits)
    assert torch.equal(packed.cpu(), pack_bits(codes, bits))
    with no_waiting():
        unpacked = unpack_bits(packed, bits, len(codes))
    assert torch.equal(unpacked.cpu(), codes)


def test_memory_on_the_device_stays_within_the_plan(model_folder: Path) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = on("cuda", model_folder, memory=TIGHT)
    evaluator = tight(model, DropLevels(model.anatomy))
    evaluator.measure(students(len(model.anatomy.sub_blocks), 6), text(*[12] * 8), ALL)
    held = torch.cuda.max_memory_allocated() - before
    # The libraries that multiply keep a workspace of their own.
    assert held <= evaluator.plan.total + 64 * 2**20
