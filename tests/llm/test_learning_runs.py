"""Searches that learn, on banks and on blocks: their final choice, their text kept apart, and resuming."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from discopt import RunFolder, StopReason
from discopt_llm.bank_search import QuantizeRequest, resume_compress, resume_quantize, resume_sparsify
from discopt_llm.calibration import Calibration
from discopt_llm.drop_search import DropRequest, resume_drop
from discopt_llm.errors import DataError
from discopt_llm.request import Prepared, SearchRequest
from tests.llm.searches import run

KINDS = {
    "drop": resume_drop,
    "quantize": resume_quantize,
    "sparsify": resume_sparsify,
    "compress": resume_compress,
}

pytestmark = pytest.mark.usefixtures("_no_pictures")


def learning(asked: SearchRequest) -> SearchRequest:
    """With the preset's own start, all baselines, and tokens for some generations."""
    return replace(asked, algorithm="learning", start=None, baselines=None, generations=12)


@pytest.fixture
def drop(small: dict[str, Any]) -> DropRequest:
    return DropRequest(**small, sparsity=0.25)


@pytest.mark.parametrize("kind", KINDS)
def test_a_learning_search_ends_with_a_choice_and_resumes_to_it(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    asked = learning(request.getfixturevalue(kind))
    whole = run(asked, tmp_path / "whole")
    cut = run(replace(asked, max_seconds=1e-6), tmp_path / "cut")
    assert cut["stop"] == StopReason.TIME.value
    assert cut["choice"] == []
    resumed = KINDS[kind](RunFolder.open(tmp_path / "cut"), quiet=True)
    assert (resumed["profile"], resumed["rows"], resumed["choice"]) == (
        whole["profile"],
        whole["rows"],
        whole["choice"],
    )
    assert whole["generations"] > 2
    assert whole["choice"][0]["difference"] == 0
    others = whole["choice"][1:]
    assert [one["difference"] for one in others] == sorted(one["difference"] for one in others)
    assert all(one["difference"] >= -2 * one["standard_error"] for one in others if one["standard_error"] is not None)
    assert "## The final choice" in (tmp_path / "whole" / "report.md").read_text()


def test_uniform_and_the_additive_profiles_take_part_in_the_choice(quantize: QuantizeRequest, tmp_path: Path) -> None:
    results = run(learning(quantize), tmp_path / "run")
    names = {name for one in results["choice"] for name in one["method"].split(" = ")}
    assert {"uniform", "additive (layer errors)", "additive (measured losses)"} <= names
    chosen, *others = results["choice"]
    assert (chosen["loss"], chosen["difference"]) == (results["loss"], 0)
    known = [one for one in others if one["standard_error"] is not None]
    assert known
    assert all(one["difference"] >= -2 * one["standard_error"] for one in known)  # none is clearly better


def test_the_choice_is_made_on_text_that_the_search_never_sees(quantize: QuantizeRequest) -> None:
    prepared = Prepared.load(learning(quantize), print)
    assert prepared.reserved is not None
    seen, kept = ({tuple(row) for row in text.sequences.tolist()} for text in (prepared.calibration, prepared.reserved))
    assert seen
    assert kept
    assert not seen & kept
    everything = Prepared.load(replace(quantize, algorithm="evopress"), print)
    assert everything.reserved is None
    assert len(everything.calibration.sequences) == len(prepared.calibration.sequences) + len(
        prepared.reserved.sequences
    )


@pytest.mark.parametrize(("tokens", "kept"), [(1, 4), (8, 4), (9, 3), (10**6, 1)])
def test_a_split_keeps_whole_sequences_on_both_sides(tokens: int, kept: int) -> None:
    text = Calibration(torch.arange(40).reshape(5, 8), "text")
    first, last = text.split(tokens)
    assert len(first.sequences) == kept
    assert torch.equal(torch.cat([first.sequences, last.sequences]), text.sequences)


def test_one_sequence_cannot_be_split() -> None:
    with pytest.raises(DataError, match="text has one sequence of 8 tokens, which cannot be split"):
        Calibration(torch.arange(8).reshape(1, 8), "text").split(1)


def test_an_unknown_algorithm_is_refused(quantize: QuantizeRequest) -> None:
    with pytest.raises(ValueError, match="algorithm must be learning or evopress, got 'annealing'"):
        replace(quantize, algorithm="annealing")
