"""Searches over types of ggml: from the command to the profile, and back from its files."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from discopt_llm.bank_search import QuantizeRequest
from discopt_llm.errors import BankError, ProfileError
from discopt_llm.models import load_model
from discopt_llm.profile import Profile, read_profile
from discopt_llm.students import read_bank_student, read_student
from tests.documents import read_document
from tests.llm.commands import STAGES, call, refusal
from tests.llm.searches import compared, labels, run, snapshot

TYPES = ("Q4_0", "Q5_1", "Q8_0", "F16")

pytestmark = pytest.mark.usefixtures("_no_pictures")


@pytest.fixture(scope="module")
def bank(model_folder: Path, notes: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("types") / "bank"
    words = ["--types", "q8_0,Q4_0,F16,q5_1", "--no-imatrix", "--calibration-tokens", 256, "--sequence-length", 32]
    result = call("bank", model_folder, "--kind", "gguf", *words, "--calibration", notes, "--out", out, "--quiet")
    assert result.exit_code == 0, result.output
    assert "58 layers as Q4_0, Q5_1, Q8_0, F16, without an importance matrix, made on 256 tokens" in result.stdout
    return str(out)


@pytest.fixture
def asked(small: dict[str, Any], bank: str) -> QuantizeRequest:
    return QuantizeRequest(**small, method="gguf", bits="9.5", banks=(bank,))


@pytest.mark.parametrize("algorithm", ["evopress", "learning"])
def test_a_search_ends_within_its_budget_and_before_its_baselines(
    algorithm: str, asked: QuantizeRequest, tmp_path: Path
) -> None:
    results = run(compared(replace(asked, algorithm=algorithm)), tmp_path / "run")
    assert [row["method"] for row in results["rows"]] == [
        "dense",
        "uniform",
        "random (best of the start candidates)",
        "additive (layer errors)",
        "additive (measured losses)",
        "evolved",
    ]
    assert results["met"]["bits"] == results["met"]["bpw"] <= 9.5
    assert all(row["bytes"] <= results["met"]["bytes"] * 1.02 for row in results["rows"][1:])
    found = labels(tmp_path / "run")
    assert {"model.embed_tokens", "lm_head"} <= found.keys() and {*found.values()} <= {*TYPES}
    assert {label for name, label in found.items() if name.endswith("down_proj")} == {"F16"}  # of rows of 48


def test_a_profile_says_the_same_in_all_its_files(asked: QuantizeRequest, bank: str, tmp_path: Path) -> None:
    run(asked, tmp_path / "run")
    model = load_model(asked.model)
    profile = read_profile(tmp_path / "run")
    assert isinstance(profile, Profile) and profile.kind == "gguf"
    levels, found = read_student(str(tmp_path / "run"), model)
    np.testing.assert_array_equal(found, profile.levels)
    assert levels.names == profile.names
    text = str(tmp_path / "run" / "profile.txt")
    np.testing.assert_array_equal(read_student(text, model, banks=[bank])[1], found)
    met = read_document(tmp_path / "run" / "results.json")["met"]
    assert levels.bytes_of(model.model, found) == met["bytes"]
    wrong = re.sub("lm_head: .*", "lm_head: Q2_K", Path(text).read_text())
    (tmp_path / "wrong.txt").write_text(wrong)
    with pytest.raises(ProfileError, match=r"the label of lm_head must be one of Q4_0, Q5_1, Q8_0, F16, got 'Q2_K'"):
        read_bank_student(str(tmp_path / "wrong.txt"), model, levels.genome)  # type: ignore[union-attr]


def test_a_bank_is_built_beside_the_run_and_used_again(
    model_folder: Path, notes: Path, tmp_path: Path, small: dict[str, Any]
) -> None:
    words = [
        "--method",
        "gguf",
        "--types",
        "Q4_0,Q8_0,F16",
        "--no-imatrix",
        "--bank-tokens",
        256,
        "--calibration",
        notes,
    ]
    words += ["--preset", "demo", "--sequence-length", 32, "--eval-tokens", 64, "--generations", 1, "--offspring", 4]
    words += [*STAGES, "--baselines", "none", "--start", "auto", "--quiet"]
    first = call("quantize", model_folder, "--size", "0.7x", *words, "--out", tmp_path / "a")
    assert first.exit_code == 0, first.output
    (bank,) = (tmp_path / "banks").iterdir()
    assert bank.name.startswith(f"{model_folder.name}-gguf-")
    before = snapshot(bank)
    assert call("quantize", model_folder, "--bpw", 9, *words, "--out", tmp_path / "b").exit_code == 0
    assert snapshot(bank) == before and len([*(tmp_path / "banks").iterdir()]) == 1


def test_all_units_may_trade_unless_said_otherwise(small: dict[str, Any], bank: str) -> None:
    options = {**small, "banks": (bank,)}
    assert QuantizeRequest(**options, bits="9", method="gguf").trade == "none"
    assert QuantizeRequest(**options, bits="9", method="gguf", group="runtime").trade == "runtime"
    assert QuantizeRequest(**options, bits="3").trade == "size"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bits", 3, "--types", "Q4_0"], "types is an option of kind gguf, got kind quantization"),
        (["--bits", 3, "--imatrix"], "imatrix is an option of kind gguf, got kind quantization"),
        (
            ["--bits", 5, "--method", "gguf", "--widths", "2,3"],
            "widths is an option of kind quantization, got kind gguf",
        ),
        (["--bits", 5, "--method", "gguf", "--types", "Q4_9"], "got Q4_9"),
        (["--bits", 5, "--method", "awq"], "method must be one of gptq, rtn, gguf, got 'awq'"),
    ],
)
def test_options_that_make_no_sense_are_refused(words: list[object], message: str, tmp_path: Path) -> None:
    said = refusal(call("quantize", "any", *words, "--out", tmp_path / "run"), code=2)
    assert message in said and not (tmp_path / "run").exists()


def test_a_bank_that_is_there_has_its_types(
    asked: QuantizeRequest, bank: str, banks: dict[str, str], tmp_path: Path
) -> None:
    options = asdict(asked)
    with pytest.raises(ValueError, match="types is an option of a bank that is built, got a bank that is there"):
        QuantizeRequest(**{**options, "types": ("Q4_0",)})
    with pytest.raises(BankError, match=r"kind quantization, got .* of kind gguf; quantize takes .* --method gguf"):
        run(QuantizeRequest(**{**options, "method": "gptq"}), tmp_path / "a")
    with pytest.raises(BankError, match=r"expected a bank of kind gguf, got .* of kind quantization"):
        run(QuantizeRequest(**{**options, "banks": (banks["quantization"],)}), tmp_path / "b")
