"""Banks that are built by several workers, in this process here: the same to the last byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from discopt_llm import workers
from discopt_llm.bank import Bank
from discopt_llm.bank_search import QuantizeRequest
from discopt_llm.banks import BankRequest, make_bank
from discopt_llm.build import build_bank
from discopt_llm.errors import BankError
from discopt_llm.models import LoadedModel
from discopt_llm.search import begin
from discopt_llm.workers import spread_over
from tests.llm.banks import calibration, files_of, loaded, plan, stopped_after
from tests.llm.families import LAYERS
from tests.llm.pools import outcome, workers_here
from tests.llm.searches import run

BankOf = Callable[[str, str], Bank]

pytestmark = pytest.mark.usefixtures("_no_pictures")


def spread_bank(monkeypatch: pytest.MonkeyPatch, model: LoadedModel, count: str = "2", **options: Any) -> Any:
    """What solves blocks by workers that hold this very model."""
    monkeypatch.setattr(workers, "load_model", lambda *args, **kwargs: model)
    workers_here(monkeypatch, **options)
    request = BankRequest(model="m", workers=count)
    return spread_over(request, lambda line: None, trust_remote_code=False)


@pytest.mark.parametrize(
    ("family", "kind", "count"),
    [
        ("llama", "quantization", "2"),
        ("llama", "quantization", "9"),
        ("llama", "gguf", "2"),
        ("gemma2", "gguf", "3"),  # tied
        ("mixtral", "sparsity", "2"),
    ],
)
def test_a_bank_by_workers_has_the_bytes_of_one_by_a_single_process(
    family: str, kind: str, count: str, bank_of: BankOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build_bank(
        plan(loaded(family), kind),
        tmp_path / "bank",
        quiet=True,
        spread=spread_bank(monkeypatch, loaded(family), count),
    )
    assert files_of(built.path) == files_of(bank_of(family, kind).path)


def test_blocks_that_are_finished_are_not_made_again(
    bank_of: BankOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded("llama")
    with stopped_after(3, monkeypatch):
        build_bank(plan(model, "quantization"), tmp_path / "bank", quiet=True, spread=spread_bank(monkeypatch, model))
    monkeypatch.setattr(workers, "load_model", lambda *args, **kwargs: model)
    opened = workers_here(monkeypatch)
    again = spread_over(BankRequest(model="m", workers="2"), lambda line: None, trust_remote_code=False)
    built = build_bank(plan(model, "quantization"), tmp_path / "bank", quiet=True, spread=again)
    assert [block for _, _, (_, _, block) in opened[0].calls] == [*range(3, LAYERS)]
    assert files_of(built.path) == files_of(bank_of("llama", "quantization").path)
    build_bank(plan(model, "quantization"), tmp_path / "bank", quiet=True, spread=again)
    assert len(opened) == 1  # for a bank that is there, no worker is started


def test_a_build_goes_on_without_its_workers(bank_of: BankOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("llama")
    several = spread_bank(monkeypatch, model, dies_after=2)
    built = build_bank(plan(model, "quantization"), tmp_path / "bank", quiet=True, spread=several)
    assert files_of(built.path) == files_of(bank_of("llama", "quantization").path)


def test_a_bank_whose_inputs_depend_on_other_blocks_is_built_by_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, said = loaded("llama"), list[str]()
    asked = plan(model, "quantization", "3")
    build_bank(asked, tmp_path / "alone", quiet=True)

    def fail(*args: Any) -> Any:
        pytest.fail("workers were asked")

    build_bank(asked, tmp_path / "bank", quiet=True, say=said.append, spread=fail)
    assert files_of(tmp_path / "bank") == files_of(tmp_path / "alone")
    (line,) = said
    assert line.startswith(
        "this bank is built by one process: a block's inputs come from the blocks before it at level 3"
    )


def test_a_worker_that_would_build_another_bank_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("llama")
    several = spread_bank(monkeypatch, model)
    asked = plan(model, "quantization")
    other = plan(model, "quantization", text=calibration(seed=1))
    monkeypatch.setattr(workers, "BankPlan", lambda *args: other)
    with pytest.raises(BankError, match="would build another bank: its calibration is"):
        build_bank(asked, tmp_path / "bank", quiet=True, spread=several)


def test_a_search_builds_its_bank_by_workers_where_it_can(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = workers_here(monkeypatch)
    said: list[str] = []
    request: dict[str, Any] = {**small, "bits": "3", "widths": (2, 4), "group_size": 12, "bank_tokens": 256}
    several = QuantizeRequest(**request, workers="2")
    results = begin(several, tmp_path / "a" / "run", force=False, quiet=True, say=said.append)
    assert [len(here.calls) > 0 for here in opened] == [True, True]  # to build, and to search
    assert outcome(results) == outcome(run(QuantizeRequest(**request), tmp_path / "b" / "run"))
    (one,), (other,) = ((tmp_path / at / "banks").iterdir() for at in "ab")
    assert files_of(one) == files_of(other)


@pytest.mark.parametrize("propagate", ["dense", "3"])
def test_a_bank_is_the_same_where_blocks_take_turns_on_the_device(
    propagate: str, model_folder: Path, notes: Path, tmp_path: Path
) -> None:
    asked = BankRequest(
        model=str(model_folder),
        calibration=str(notes),
        calibration_tokens=512,
        sequence_length=32,
        bits=(2, 3, 4, 6),
        group_size=12,
        propagate=propagate,
    )
    whole, bounded = (
        make_bank(replace(asked, memory=memory), tmp_path / name, force=False, quiet=True, say=print)
        for name, memory in (("whole", None), ("bounded", "100KB"))
    )
    assert files_of(bounded.path) == files_of(whole.path)
