"""Tokenization of a text, and the sample of (fidelity, seed)."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from discopt_llm.calibration import Calibration, load_calibration
from discopt_llm.errors import DataError
from tests.llm.texts import BOS, ROWS, WRITERS, decode, with_bos, write_jsonl, write_txt

# Tokenization


def test_tokens_are_rounded_up_to_whole_sequences(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = str(write_jsonl(tmp_path / "a.jsonl", ROWS))
    calibration = load_calibration(source, tokenizer, sequence_length=32, tokens=33, role="all")
    assert calibration.sequences.shape == (2, 32)
    assert calibration.sequences.dtype == torch.int64
    assert (calibration.tokens, calibration.sequence_length, calibration.source) == (64, 32, source)


def test_at_most_takes_less_where_there_is_less(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = str(write_txt(tmp_path / "a.txt", ["abcdefghij"]))

    def read(**limits: int) -> str:
        return decode(load_calibration(source, tokenizer, sequence_length=2, role="all", **limits))

    assert [read(at_most=limit) for limit in (1, 4, 1000)] == ["ab", "abcd", "abcdefghij"]
    assert read(tokens=6, at_most=2) == "abcdef"
    with pytest.raises(ValueError, match="at_most must be at least 1 token, or None, got 0"):
        read(at_most=0)


def test_the_remainder_is_dropped(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = str(write_txt(tmp_path / "a.txt", ["abcdefghij"]))
    assert decode(load_calibration(source, tokenizer, sequence_length=4, role="all")) == "abcdefgh"


def test_documents_are_parted_by_a_blank_line_if_the_tokenizer_adds_nothing(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = str(write_jsonl(tmp_path / "a.jsonl", ROWS))
    assert decode(load_calibration(source, tokenizer, sequence_length=1, role="all")) == "\n\n".join(ROWS)


def test_each_document_begins_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    tokenizer = with_bos()
    calibration = load_calibration(
        str(write_jsonl(tmp_path / "a.jsonl", ROWS)), tokenizer, sequence_length=1, role="all"
    )
    assert calibration.sequences.flatten().tolist() == [i for row in ROWS for i in tokenizer(row).input_ids]
    assert calibration.sequences.flatten()[0] == BOS


def test_one_running_text_is_encoded_without_special_tokens(tmp_path: Path) -> None:
    source = str(write_txt(tmp_path / "a.txt", ROWS * 10))
    calibration = load_calibration(source, with_bos(), sequence_length=1, role="all")
    assert decode(calibration) == "\n\n".join(ROWS * 10)


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("tokens", [1, 100, 399])
def test_fewer_tokens_are_the_beginning_of_all(
    suffix: str, tokens: int, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = str(WRITERS[suffix](tmp_path / f"a{suffix}", ROWS * 3))
    everything = load_calibration(source, tokenizer, sequence_length=10, role="all")
    some = load_calibration(source, tokenizer, sequence_length=10, tokens=tokens, role="all")
    assert torch.equal(some.sequences, everything.sequences[: -(-tokens // 10)])


def test_a_running_text_of_long_words_is_read_on_until_it_suffices(tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({"?": 0, **{f"{i:040}": i for i in range(1, 1000)}}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    lines = [f"{i:040}" for i in range(1, 1000)]  # 40 characters a token
    source = str(write_txt(tmp_path / "a.txt", lines))
    for tokens in (1, 10, 350, 999):
        calibration = load_calibration(source, tokenizer, sequence_length=1, tokens=tokens, role="all")
        assert calibration.sequences.flatten().tolist() == list(range(1, tokens + 1))
    with pytest.raises(DataError, match=r"has 999 tokens of text .*asked for 1,000"):
        load_calibration(source, tokenizer, sequence_length=1, tokens=1000, role="all")


def test_a_text_longer_than_the_models_context_is_no_reason_to_warn(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.model_max_length = 16
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[assignment, method-assign]
    logger = logging.getLogger("transformers.tokenization_utils_base")
    logger.addHandler(handler)
    try:
        for suffix in WRITERS:
            source = str(WRITERS[suffix](tmp_path / f"a{suffix}", ROWS))
            load_calibration(source, tokenizer, sequence_length=32, role="all")
        assert not records
        tokenizer("a" * 100)
        assert "longer than" in records[0].getMessage()  # what would have been said
    finally:
        logger.removeHandler(handler)


def test_too_short_a_text_is_refused_with_its_length(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = str(write_txt(tmp_path / "a.txt", ["x" * 1010]))
    with pytest.raises(DataError, match=r"has 1,010 tokens of text, fewer than one sequence of 2,048"):
        load_calibration(source, tokenizer, sequence_length=2048, role="all")
    with pytest.raises(DataError, match=r"has 1,010 tokens of text \(512 in whole sequences of 512\), asked for 1,000"):
        load_calibration(source, tokenizer, sequence_length=512, tokens=1000, role="all")
    with pytest.raises(DataError, match=r"has 1,010 tokens of search text .*asked for 5,000"):
        load_calibration(source, tokenizer, sequence_length=512, tokens=5000)
    with pytest.raises(DataError, match=r"a\.txt has no held-out text"):
        load_calibration(source, tokenizer, sequence_length=512, role="heldout")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sequence_length": 0}, "sequence_length must be at least 1 token, got 0"),
        ({"tokens": 0}, "tokens must be at least 1, or None, got 0"),
        ({"role": "test"}, "role must be one of search, heldout, all, got 'test'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    arguments: dict[str, Any], message: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match=message):
        load_calibration("builtin", tokenizer, **{"sequence_length": 8, **arguments})


def test_the_fingerprint_is_that_of_source_and_tokens() -> None:
    tokens = torch.arange(12)
    one = Calibration(tokens.reshape(3, 4), "a")
    assert one.fingerprint == Calibration(tokens.reshape(3, 4).clone(), "a").fingerprint
    others = [
        Calibration(tokens.reshape(3, 4), "b"),
        Calibration(tokens.reshape(4, 3), "a"),
        Calibration(tokens.flip(0).reshape(3, 4), "a"),
    ]
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert re.fullmatch("[0-9a-f]{64}", one.fingerprint)


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"shape \(N, L\) with N, L >= 1, got \(3,\)"),
        (torch.zeros(0, 3, dtype=torch.int64), r"shape \(N, L\) with N, L >= 1, got \(0, 3\)"),
        (torch.zeros(2, 3), r"must be int64 on the CPU, got torch.float32 on cpu"),
    ],
)
def test_sequences_of_another_shape_or_type_are_refused(sequences: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Calibration(sequences, "a")


# Samples


@st.composite
def questions(draw: st.DrawFn) -> tuple[Calibration, int, int]:
    count, length = draw(st.integers(1, 12)), draw(st.integers(1, 9))
    calibration = Calibration(torch.arange(count * length).reshape(count, length), "numbers")
    return calibration, draw(st.integers(1, count * length)), draw(st.integers(0, 2**63))


@given(questions())
def test_a_sample_has_exactly_the_tokens_asked_for_and_none_twice(question: tuple[Calibration, int, int]) -> None:
    calibration, fidelity, seed = question
    sample = calibration.sample(fidelity, seed)
    drawn = torch.cat(sample)
    assert len(drawn) == fidelity
    assert len(drawn.unique()) == fidelity
    length = calibration.sequence_length
    assert all(len(sequence) == length for sequence in sample[:-1])
    assert 1 <= len(sample[-1]) <= length
    for sequence in sample:  # each of them the beginning of a sequence
        assert sequence.tolist() == calibration.sequences[sequence[0] // length][: len(sequence)].tolist()


@given(questions())
def test_a_sample_is_a_pure_function_of_fidelity_and_seed(question: tuple[Calibration, int, int]) -> None:
    calibration, fidelity, seed = question
    np.random.seed(1)
    torch.manual_seed(1)
    first = calibration.sample(fidelity, seed)
    calibration.sample(1, seed + 1)
    np.random.seed(2)
    torch.manual_seed(2)
    second = calibration.sample(fidelity, seed)
    assert len(first) == len(second)
    assert all(map(torch.equal, first, second))


def test_a_larger_sample_is_drawn_afresh() -> None:
    calibration = Calibration(torch.arange(64).reshape(64, 1), "numbers")
    small, large = (torch.cat(calibration.sample(fidelity, seed=3)) for fidelity in (16, 32))
    assert not torch.equal(small, large[:16])


def test_every_sequence_is_drawn_equally_often() -> None:
    calibration = Calibration(torch.arange(20).reshape(10, 2), "numbers")
    drawn = torch.cat([torch.cat(calibration.sample(6, seed)) for seed in range(2000)])
    counts = torch.bincount(drawn // 2, minlength=10) / 2  # 2000 draws of 3 in 10 sequences: 600 +- 20.5 each
    assert (counts - 600).abs().max() < 5 * 20.5


def test_more_tokens_than_there_are_is_refused_with_how_many_there_are() -> None:
    calibration = Calibration(torch.zeros(300, 4, dtype=torch.int64), "numbers")
    with pytest.raises(DataError, match="numbers has 1,200 tokens, asked for a sample of 1,201"):
        calibration.sample(1201, 0)
    with pytest.raises(ValueError, match="fidelity must be at least 1 token, got 0"):
        calibration.sample(0, 0)
