from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from discopt import RunFolder, RunFolderError, StopReason
from discopt_llm import bank as bank_module
from discopt_llm import models
from discopt_llm.allocation import Measured
from discopt_llm.bank import Bank, BankWriter
from discopt_llm.bank_search import (
    BankSearchRequest,
    QuantizeRequest,
    SparsifyRequest,
    resume_compress,
    resume_quantize,
    resume_sparsify,
)
from discopt_llm.banks import BankRequest, make_bank
from discopt_llm.errors import BankError, ProfileError
from discopt_llm.evaluation import EvalRequest, evaluate
from discopt_llm.models import load_model
from discopt_llm.request import Prepared
from discopt_llm.students import read_student
from tests.llm.families import tiny, tiny_tokenizer
from tests.llm.searches import compared, contents, run, snapshot

BLOCKS = 8

pytestmark = pytest.mark.usefixtures("_no_pictures")


# -- one bank, many budgets ----------------------------------------------------------------------------------------


def test_a_bank_serves_any_budget_untouched(quantize: QuantizeRequest, tmp_path: Path) -> None:
    bank = Path(quantize.banks[0])
    before = snapshot(bank)
    for i, budget in enumerate(({"bits": "2.5"}, {"bpw": "5"}, {"size": "0.5x"})):
        run(replace(quantize, **{"bits": None, **budget}, generations=1), tmp_path / f"run{i}")
    assert snapshot(bank) == before
    assert not (tmp_path / "banks").exists()


def test_a_bank_that_a_search_built_serves_the_next(unbuilt: QuantizeRequest, tmp_path: Path) -> None:
    run(unbuilt, tmp_path / "three")
    (bank,) = (tmp_path / "banks").iterdir()
    before = snapshot(bank)
    for name, budget in (("two", {"bits": "2.5"}), ("size", {"bits": None, "size": "0.5x"})):
        run(replace(unbuilt, **budget, generations=1), tmp_path / name)
    assert [*(tmp_path / "banks").iterdir()] == [bank]
    assert snapshot(bank) == before
    run(replace(unbuilt, group_size=16, generations=0), tmp_path / "wide")
    assert len([*(tmp_path / "banks").iterdir()]) == 2
    assert snapshot(bank) == before


def test_a_bank_is_made_on_what_the_preset_says_and_the_model_can_take(small: dict[str, Any], tmp_path: Path) -> None:
    request = QuantizeRequest(**{**small, "sequence_length": None, "generations": 0}, bits="3")
    run(request, tmp_path / "run")
    (folder,) = (tmp_path / "banks").iterdir()
    calibration = Bank.open(folder).calibration
    assert calibration["sequence_length"] == 128  # the demo's 256 are more than the model's positions
    assert calibration["tokens"] == request.chosen.bank_tokens == 16384


def test_a_search_reads_its_bank_and_its_layers_once(
    unbuilt: QuantizeRequest, quantize: QuantizeRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run(replace(unbuilt, generations=0), tmp_path / "builds")
    digest, find = bank_module._sha256, models.read_layers
    read: list[str] = []
    monkeypatch.setattr(bank_module, "_sha256", lambda path: read.append(path.name) or digest(path))
    monkeypatch.setattr(models, "read_layers", lambda *model: read.append("layers") or find(*model))
    for name, request in {"built": unbuilt, "given": quantize}.items():
        run(replace(request, generations=0), tmp_path / name)
        assert sorted(read) == [*(f"block-0000{block}.safetensors" for block in range(BLOCKS)), "layers"]
        read.clear()


# -- heuristics ----------------------------------------------------------------------------------------------------


def test_heuristics_are_measured_once(
    sparsify: SparsifyRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = run(compared(sparsify), tmp_path / "whole")
    cut = run(replace(compared(sparsify), max_seconds=1e-6), tmp_path / "cut")
    assert cut["stop"] == StopReason.TIME.value
    monkeypatch.setattr(Measured, "_losses", None)
    resumed = resume_sparsify(RunFolder.open(tmp_path / "cut"), quiet=True)
    assert resumed["rows"] == whole["rows"]


def test_damaged_heuristics_are_refused(quantize: QuantizeRequest, tmp_path: Path) -> None:
    run(replace(compared(quantize), max_seconds=1e-6), tmp_path / "run")
    folder = RunFolder.open(tmp_path / "run")
    found = folder.read_json("heuristics.json")
    for changes in ({"tokens": None}, {"start": [9]}, {"rivals": 3}, {"methods": [{}]}):
        folder.write_json("heuristics.json", {**found, **changes})
        with pytest.raises(RunFolderError, match=r"heuristics\.json is damaged: .*; remove it to measure them again"):
            resume_quantize(folder, quiet=True)


# -- a run and its bank, later -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["quantize", "sparsify", "compress"])
def test_eval_measures_what_the_run_reported(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    asked: BankSearchRequest = request.getfixturevalue(kind)
    results = run(asked, tmp_path / "run")

    def measured(profile: str, *banks: str) -> dict[str, Any]:
        evaluation = EvalRequest(
            what=(asked.model,),
            data=(asked.calibration,),
            profile=str(tmp_path / profile),
            banks=banks,
            tokens=128,
            sequence_length=32,
        )
        row: dict[str, Any] = evaluate(evaluation, quiet=True)["rows"][1]
        return row

    expected = {key: results["rows"][-1][key] for key in ("kl", "perplexity", "agreement", "bytes")}
    for found in (measured("run"), measured("run/profile.json"), measured("run/profile.txt", *asked.banks)):
        assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ProfileError, match="names no bank; say with --bank which one"):
        measured("run/profile.txt")


def test_the_loss_of_the_search_itself_is_measured_again(quantize: QuantizeRequest, tmp_path: Path) -> None:
    request = replace(quantize, calibration_tokens=256, stages=("1@256",))
    results = run(request, tmp_path / "run")
    prepared = Prepared.load(request, lambda line: None)
    searched = tmp_path / "searched.txt"
    searched.write_text(prepared.loaded.tokenizer.decode(prepared.calibration.sequences.flatten()))
    evaluation = EvalRequest(what=(str(tmp_path / "run"),), data=(str(searched),), sequence_length=32)
    found = evaluate(evaluation, quiet=True)
    assert found["rows"][1]["tokens"] == 256
    assert found["rows"][1]["kl"] == pytest.approx(results["loss"], rel=1e-5)


def test_a_run_that_moved_with_its_banks_is_measured_alike(unbuilt: QuantizeRequest, tmp_path: Path) -> None:
    results = run(unbuilt, tmp_path / "runs" / "run")
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    for name in ("run", "run/profile.json"):
        evaluation = EvalRequest(
            what=(unbuilt.model,),
            data=(unbuilt.calibration,),
            profile=str(tmp_path / "elsewhere" / name),
            tokens=128,
            sequence_length=32,
        )
        row = evaluate(evaluation, quiet=True)["rows"][1]
        assert row["kl"] == pytest.approx(results["rows"][-1]["kl"], rel=1e-5)
    shutil.rmtree(tmp_path / "elsewhere" / "banks")
    with pytest.raises(BankError, match=r"is not at .* any more; say with --bank where it is"):
        read_student(str(tmp_path / "elsewhere" / "run"), load_model(unbuilt.model))


def test_banks_that_do_not_fit_are_refused(
    quantize: QuantizeRequest, banks: dict[str, str], notes: Path, tmp_path: Path
) -> None:
    run(replace(quantize, generations=0), tmp_path / "run")
    loaded = load_model(quantize.model)
    with pytest.raises(ProfileError, match="is a profile of kind quantization, expected one of sparsity"):
        read_student(str(tmp_path / "run"), loaded, banks=[banks["sparsity"]])
    with pytest.raises(BankError, match="banks of different kinds, got 2 of kind quantization"):
        read_student(str(tmp_path / "run"), loaded, banks=[banks["quantization"]] * 2)
    with pytest.raises(BankError, match=r"expected a bank of kind quantization, got .* of kind sparsity"):
        run(replace(quantize, banks=(banks["sparsity"],)), tmp_path / "kind")
    with pytest.raises(BankError, match="nowhere"):
        run(replace(quantize, banks=(str(tmp_path / "nowhere"),)), tmp_path / "nothing")
    other = tmp_path / "other"
    tiny("Llama", seed=1, num_hidden_layers=BLOCKS).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    with pytest.raises(BankError, match="whose weights differ from this model's"):
        run(replace(quantize, model=str(other)), tmp_path / "foreign")
    assert not any((tmp_path / name).exists() for name in ("kind", "nothing", "foreign"))


# -- going on ------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("blocks", [0, 3])
def test_a_run_that_died_building_its_bank_goes_on(
    unbuilt: QuantizeRequest, blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(unbuilt, tmp_path / "whole" / "run")
    write = BankWriter.write_block

    def die(self: BankWriter, block: int, *rest: Any) -> None:
        if block == blocks:
            raise Killed
        write(self, block, *rest)

    monkeypatch.setattr(BankWriter, "write_block", die)
    with pytest.raises(Killed):
        run(unbuilt, tmp_path / "cut" / "run")
    monkeypatch.setattr(BankWriter, "write_block", write)
    (bank,) = (tmp_path / "cut" / "banks").iterdir()
    before = snapshot(bank)
    assert sum(name.startswith("block") for name in before) == blocks
    resumed = resume_quantize(RunFolder.open(tmp_path / "cut" / "run"), quiet=True)
    after = snapshot(bank)
    assert all(after[name] == before[name] for name in before if name.startswith("block"))
    assert contents(bank) == contents(tmp_path / "whole" / "banks" / bank.name)
    assert (resumed["profile"], resumed["rows"]) == (whole["profile"], whole["rows"])


@pytest.mark.parametrize("kind", ["quantize", "sparsify", "compress"])
def test_a_time_limit_ends_the_search_and_resume_lifts_it(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    asked = compared(request.getfixturevalue(kind))
    resume = {"quantize": resume_quantize, "sparsify": resume_sparsify, "compress": resume_compress}[kind]
    whole = run(asked, tmp_path / "whole")
    cut = run(replace(asked, max_seconds=1e-6), tmp_path / "cut")
    assert cut["stop"] == StopReason.TIME.value
    resumed = resume(RunFolder.open(tmp_path / "cut"), quiet=True)
    assert (resumed["profile"], resumed["rows"]) == (whole["profile"], whole["rows"])
    said: list[str] = []
    assert resume(RunFolder.open(tmp_path / "cut"), quiet=True, say=said.append) == resumed
    assert said == [f"{tmp_path / 'cut'} is finished: {resumed['stop']}"]


def test_a_run_goes_on_only_with_its_own_bank(quantize: QuantizeRequest, notes: Path, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    shutil.copytree(quantize.banks[0], bank)
    run(replace(quantize, banks=(str(bank),), max_seconds=1e-6), tmp_path / "run")
    shutil.rmtree(bank)
    with pytest.raises(BankError, match=f"{bank}"):
        resume_quantize(RunFolder.open(tmp_path / "run"), quiet=True)
    another = BankRequest(
        model=quantize.model, bits=(2, 3, 4), calibration=str(notes), calibration_tokens=64, sequence_length=32
    )
    make_bank(another, bank, force=False, quiet=True, say=lambda line: None)
    with pytest.raises(RunFolderError, match=r"the bank is not the one that .* began with; start a new run"):
        resume_quantize(RunFolder.open(tmp_path / "run"), quiet=True)


def test_a_bank_of_a_run_that_is_gone_is_built_again(unbuilt: QuantizeRequest, tmp_path: Path) -> None:
    whole = run(unbuilt, tmp_path / "whole")
    run(replace(unbuilt, max_seconds=1e-6), tmp_path / "cut")
    shutil.rmtree(tmp_path / "banks")
    resumed = resume_quantize(RunFolder.open(tmp_path / "cut"), quiet=True)
    assert (resumed["profile"], resumed["rows"]) == (whole["profile"], whole["rows"])
