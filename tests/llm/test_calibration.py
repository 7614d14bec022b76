"""Text sources, their division between search and held-out, tokenization, and the sample of (fidelity, seed)."""

from __future__ import annotations

import json
import logging
import re
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from discopt_llm import sources
from discopt_llm.calibration import Calibration, load_calibration
from discopt_llm.errors import DataError
from discopt_llm.sources import divide, open_text
from tests.llm.families import tiny_tokenizer

BOS = 256
ROWS = [f"Document {i} says {'so ' * (i % 7)}and no more." for i in range(40)]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def with_bos() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", BOS)]
    )
    return tokenizer


def decode(calibration: Calibration) -> str:
    """The text, one token being one byte."""
    decoded = tiny_tokenizer().decode(calibration.sequences.flatten())
    assert isinstance(decoded, str)
    return decoded


def paragraphs(text: str) -> set[str]:
    return {" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to reach another machine fails the test."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        pytest.fail(f"tried to reach the network: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


# Built-in text


def test_builtin_search_and_held_out_text_share_no_paragraph() -> None:
    search = [paragraphs(document) for document in open_text("builtin", "search").documents]
    heldout = [paragraphs(document) for document in open_text("builtin", "heldout").documents]
    assert not set().union(*search) & set().union(*heldout)


def test_builtin_has_every_paragraph_once_and_none_is_lost() -> None:
    from pydoc_data.topics import topics

    found = [p for document in open_text("builtin", "all").documents for p in sources._paragraphs(document)]
    keys = [sources._words(p) for p in found]
    assert len(keys) == len(set(keys))
    assert set(keys) == {sources._words(p) for topic in topics.values() for p in sources._paragraphs(topic)} - {""}


def test_builtin_holds_out_a_fifth_of_its_text() -> None:
    lengths = {role: sum(map(len, open_text("builtin", role).documents)) for role in ("search", "heldout", "all")}
    assert lengths["search"] + lengths["heldout"] == lengths["all"]
    assert 0.15 < lengths["heldout"] / lengths["all"] < 0.25


def test_builtin_does_not_depend_on_the_order_of_the_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    import pydoc_data.topics

    before = list(open_text("builtin", "search").documents)
    shuffled = dict(reversed(pydoc_data.topics.topics.items()))
    monkeypatch.setattr(pydoc_data.topics, "topics", shuffled)
    assert list(open_text("builtin", "search").documents) == before


def test_a_python_without_pydoc_data_is_named(
    monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="comes without pydoc_data"):
        load_calibration("builtin", tokenizer, sequence_length=8)


# Division


@given(st.lists(st.text("ab \n", min_size=1, max_size=30), max_size=60))
def test_no_document_is_on_both_sides(documents: list[str]) -> None:
    sides: dict[str, set[bool]] = {}
    for document, held_out in divide(documents):
        sides.setdefault(document, set()).add(held_out)
    assert all(len(side) == 1 for side in sides.values())
    assert [document for document, _ in divide(documents)] == documents


@given(st.lists(st.integers(1, 400), min_size=2, max_size=60))
def test_the_held_out_share_is_a_fifth_up_to_one_document(lengths: list[int]) -> None:
    documents = [f"{i}".ljust(length, "x") for i, length in enumerate(lengths)]
    held_out = sum(len(document) for document, side in divide(documents) if side)
    total = sum(map(len, documents))
    assert 0 < held_out < total
    assert abs(held_out - 0.2 * total) <= max(map(len, documents))


# Local files


def write_jsonl(path: Path, rows: list[str], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": i, column: row}) + "\n" for i, row in enumerate(rows)))
    return path


def write_parquet(path: Path, rows: list[str | None], column: str = "text") -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(rows))), column: rows}), path)
    return path


def write_txt(path: Path, rows: list[str]) -> Path:
    path.write_text("\n\n".join(rows), encoding="utf-8")
    return path


WRITERS: dict[str, Callable[[Path, Any], Path]] = {".txt": write_txt, ".jsonl": write_jsonl, ".parquet": write_parquet}


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("role", ["search", "heldout"])
@pytest.mark.parametrize("suffix", ["builtin", *WRITERS])
def test_local_sources_reach_for_no_network(
    suffix: str, role: sources.Role, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = suffix if suffix == "builtin" else str(WRITERS[suffix](tmp_path / f"a{suffix}", ROWS * 10))
    assert load_calibration(source, tokenizer, sequence_length=16, tokens=20, role=role).tokens == 32


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_file_is_divided_between_the_roles(suffix: str, tmp_path: Path) -> None:
    rows = [f"{i} {'x' * 3000}" for i in range(20)]  # each of them a document, in a .txt file too
    source = str(WRITERS[suffix](tmp_path / f"a{suffix}", rows))
    search, heldout = (list(open_text(source, role).documents) for role in ("search", "heldout"))
    assert sorted(search + heldout) == sorted(rows)
    assert len(heldout) == 4
    assert list(open_text(source, "all").documents) == rows


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_another_column_is_named_after_the_file(
    suffix: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / f"a{suffix}"
    {".jsonl": write_jsonl, ".parquet": write_parquet}[suffix](path, list(ROWS), column="body")  # type: ignore[operator]
    calibration = load_calibration(f"{path}:body", tokenizer, sequence_length=8, role="all")
    assert decode(calibration).startswith(f"{ROWS[0]}\n\n{ROWS[1]}\n\n")
    with pytest.raises(DataError, match="no column 'text'; there is 'id', 'body'"):
        load_calibration(str(path), tokenizer, sequence_length=8)


def test_paragraphs_of_a_text_file_are_gathered_into_passages(tmp_path: Path) -> None:
    parts = [f"paragraph {i}\n  goes on {'x' * 500}" for i in range(10)]
    path = tmp_path / "a.TXT"
    path.write_bytes("\r\n \r\n\r\n".join(parts).encode().replace(b"\n  ", b"\r\n  "))
    passages = list(open_text(str(path), "all").documents)
    assert [passage.count("paragraph") for passage in passages] == [4, 4, 2]
    assert "\n\n".join(passages) == "\n\n".join(parts)


def test_empty_cells_and_blank_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": null}\n{"text": "  "}\n\n{"text": "one"}\n')
    assert list(open_text(str(path), "all").documents) == ["one"]
    assert list(open_text(str(write_parquet(tmp_path / "a.parquet", [None, "", "one"])), "all").documents) == ["one"]


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one", encoding="utf-8-sig")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}', encoding="utf-8-sig")
    assert [list(open_text(str(tmp_path / name), "all").documents) for name in ("a.txt", "a.jsonl")] == [["one"]] * 2


def test_a_large_parquet_file_is_read_only_as_far_as_needed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "a.parquet", [f"row {i}" for i in range(5000)])
    read = 0
    cell = sources._cell

    def counting(*args: Any) -> str:
        nonlocal read
        read += 1
        return cell(*args)

    monkeypatch.setattr(sources, "_cell", counting)
    load_calibration(str(path), tokenizer, sequence_length=10, tokens=100)
    assert read < 20


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ab\xffcd", r"a\.txt: not UTF-8 text: byte 0xff at position 2"),
        ("a.txt", b" \n\n ", r"a\.txt has no text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2: not UTF-8 text: byte 0xff"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: not JSON: Expecting value"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1: not JSON: "),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl, line 1: expected a JSON object, got list"),
        ("a.jsonl", b'{"text": 3}\n', r"line 1: column 'text' holds int, expected text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"line 1: column 'text' holds half a character"),
        ("a.jsonl", b'{"body": "a", "id": 3}\n', r"line 1: no column 'text'; there is 'body', 'id'"),
        ("a.jsonl", b"{}\n", r"line 1: no column 'text'; there is none at all"),
        ("a.jsonl", b"", r"a\.jsonl has no text"),
        ("a.parquet", b"no parquet", r"a\.parquet is not a readable parquet file: "),
        ("a.parquet", b"", r"a\.parquet is not a readable parquet file: "),
    ],
)
def test_a_damaged_file_is_refused(
    name: str, content: bytes, message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_calibration(str(tmp_path / name), tokenizer, sequence_length=4, role="all")
    assert "\n" not in str(caught.value)


def test_a_parquet_column_of_numbers_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = f"{write_parquet(tmp_path / 'a.parquet', ['a'])}:id"
    with pytest.raises(DataError, match="column 'id' holds int, expected text"):
        load_calibration(source, tokenizer, sequence_length=4)


def test_a_parquet_file_with_damaged_pages_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_parquet(tmp_path / "a.parquet", [f"row {i}" * 50 for i in range(1000)])
    content = bytearray(path.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet is damaged after row 0: "):
        load_calibration(str(path), tokenizer, sequence_length=4)


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_missing_file_is_refused(suffix: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=rf"cannot read .*a{re.escape(suffix)}: No such file"):
        load_calibration(str(tmp_path / f"a{suffix}"), tokenizer, sequence_length=4)
    (tmp_path / f"b{suffix}").mkdir()
    with pytest.raises(DataError, match=rf"cannot read .*b{re.escape(suffix)}: Is a directory"):
        load_calibration(str(tmp_path / f"b{suffix}"), tokenizer, sequence_length=4)


def test_parquet_without_pyarrow_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_parquet(tmp_path / "a.parquet", list(ROWS))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match="needs pyarrow, which is not installed"):
        load_calibration(str(path), tokenizer, sequence_length=4)


@pytest.mark.parametrize("source", ["wikitext", "", "a.csv", "a.txt:text", "built-in", "a.jsonl:", "hf", ".txt"])
def test_an_unknown_source_is_refused_with_what_is_accepted(source: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"unknown text source .*expected builtin, wikitext2, c4, .* or hf:NAME"):
        load_calibration(source, tokenizer, sequence_length=4)


def documents_or_error(source: str) -> list[str] | DataError:
    try:
        return list(open_text(source, "all").documents)
    except DataError as error:
        return error


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    source=st.text(max_size=30) | st.from_regex(r"(hf:)?[a-z:/.]*\.?(txt|jsonl|parquet)?(:.*)?"),
    content=st.binary(max_size=60) | st.text('{}[]":,\n\\texud8 ', max_size=40).map(str.encode),
)
def test_whatever_is_given_only_a_data_error_comes_out(source: str, content: bytes, tmp_path: Path) -> None:
    for name in (source, *(str(tmp_path / f"a{suffix}") for suffix in WRITERS)):
        if name != source:
            Path(name).write_bytes(content)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sources, "_hub_obstacle", lambda name: "no network")
            patch.setattr(datasets, "load_dataset", lambda *args, **kwargs: {"train": [{"text": 1}]}["no"])
            answer = documents_or_error(name)
        if isinstance(answer, DataError):
            assert len(str(answer).splitlines()) == 1
        else:
            assert all(isinstance(document, str) for document in answer)


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


# The hub, with its answers made up


class Hub:
    """Stands in for the hub: rows of every split, and what was asked for and read."""

    def __init__(self, splits: dict[str, list[Any]]) -> None:
        self.splits = splits
        self.asked: list[tuple[str, str | None, str | None]] = []
        self.read = 0

    def load_dataset(self, name: str, config: str | None = None, *, split: str | None, streaming: bool) -> Any:
        assert streaming
        self.asked.append((name, config, split))
        return self._rows(split) if split else {name: self._rows(name) for name in self.splits}

    def _rows(self, split: str) -> Iterator[Any]:
        for row in self.splits[split]:
            self.read += 1
            if isinstance(row, Exception):
                raise row
            yield row


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub({split: [{"text": f"{split} {row}"} for row in ROWS] for split in ("train", "validation", "test")})
    monkeypatch.setattr(datasets, "load_dataset", fake.load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, **_: None)
    return fake


@pytest.mark.parametrize(
    ("source", "role", "asked"),
    [
        ("wikitext2", "search", ("Salesforce/wikitext", "wikitext-2-raw-v1", "train")),
        ("wikitext2", "heldout", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")),
        ("c4", "search", ("allenai/c4", "en", "train")),
        ("c4", "heldout", ("allenai/c4", "en", "validation")),
        ("fineweb-edu", "search", ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train")),
        ("fineweb-edu", "heldout", ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train")),
        ("hf:some/name", "search", ("some/name", None, None)),
        ("hf:some/name:small:test", "search", ("some/name", "small", "test")),
        ("hf:some/name::train:text", "heldout", ("some/name", None, "train")),
    ],
)
def test_each_role_reads_its_own_split(
    source: str, role: sources.Role, asked: tuple[str, str, str], hub: Hub, tokenizer: PreTrainedTokenizerFast
) -> None:
    load_calibration(source, tokenizer, sequence_length=8, tokens=16, role=role)
    assert hub.asked == [asked]


@pytest.mark.parametrize(
    ("splits", "search", "heldout"),
    [
        (("train", "validation", "test"), "train", "test"),
        (("validation", "train"), "train", "validation"),
        (("train",), "train", "train"),
        (("test",), "test", "test"),
        (("first", "second"), "first", "first"),
    ],
)
def test_splits_are_chosen_by_name_and_a_single_one_is_divided(
    splits: tuple[str, ...], search: str, heldout: str, hub: Hub
) -> None:
    hub.splits = {split: [{"text": f"{split} {row}"} for row in ROWS] for split in splits}
    seen = {role: list(open_text("hf:some/name", role).documents) for role in ("search", "heldout", "all")}
    assert {text.split()[0] for text in seen["search"]} == {search}
    assert {text.split()[0] for text in seen["heldout"]} == {heldout}
    assert not set(seen["search"]) & set(seen["heldout"])
    assert seen["all"] == [f"{heldout} {row}" for row in ROWS]


@pytest.mark.parametrize("source", ["fineweb-edu", "hf:some/name:small:train"])
def test_one_split_for_both_roles_is_divided(source: str, hub: Hub) -> None:
    search, heldout = (list(open_text(source, role).documents) for role in ("search", "heldout"))
    assert sorted(search + heldout) == sorted(f"train {row}" for row in ROWS)


def test_wikitext_is_joined_by_blank_lines_with_its_empty_lines(hub: Hub) -> None:
    lines = ["", " = A title = \n", "", " Text of it . \n", " More of it . \n", ""]
    hub.splits["test"] = [{"text": line} for line in lines]
    calibration = load_calibration("wikitext2", with_bos(), sequence_length=1, role="heldout")
    assert decode(calibration) == "\n\n".join(lines)


def test_c4_is_its_first_1100_documents(hub: Hub) -> None:
    hub.splits["validation"] = [{"text": f"document {i}"} for i in range(3000)]
    calibration = load_calibration("c4", with_bos(), sequence_length=1, role="heldout")
    assert decode(calibration) == "\n\n".join(f"document {i}" for i in range(1100))
    assert hub.read == 1100


@pytest.mark.parametrize("source", ["wikitext2", "c4", "fineweb-edu", "hf:some/name"])
@pytest.mark.parametrize("role", ["search", "heldout"])
def test_only_the_documents_needed_are_streamed(
    source: str, role: sources.Role, hub: Hub, tokenizer: PreTrainedTokenizerFast
) -> None:
    hub.splits = {split: [{"text": f"{i:07} {'x' * 92}"} for i in range(10_000)] for split in hub.splits}
    load_calibration(source, tokenizer, sequence_length=100, tokens=900, role=role)
    assert hub.read <= 80  # 9 documents; 8 times as many for a joined text, 5 for a divided one


def test_without_a_number_a_default_is_streamed(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert sources.HUB_TOKENS == 131_072
    monkeypatch.setattr(sources, "HUB_TOKENS", 100)
    assert load_calibration("c4", tokenizer, sequence_length=16).tokens == 112
    hub.splits["train"] = [{"text": "x" * 40}]
    assert load_calibration("c4", tokenizer, sequence_length=16).tokens == 32  # all there is
    assert load_calibration("c4", tokenizer, sequence_length=16, role="heldout").tokens > 1000


def test_settings_of_datasets_are_put_back(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    before = {"STREAMING_READ_MAX_RETRIES": 77, "STREAMING_OPEN_MAX_RETRIES": 78, "HF_HUB_OFFLINE": False}
    for name, value in before.items():
        monkeypatch.setattr(datasets.config, name, value)
    datasets.enable_progress_bars()
    seen: list[int] = []

    def rows(split: str) -> Iterator[dict[str, str]]:
        for i in range(10_000):
            seen.append(datasets.config.STREAMING_READ_MAX_RETRIES)
            yield {"text": f"document {i}"}

    hub._rows = rows  # type: ignore[method-assign]
    load_calibration("c4", tokenizer, sequence_length=8, tokens=64)
    assert set(seen) == {sources.HUB_RETRIES}
    assert {name: getattr(datasets.config, name) for name in before} == before
    assert not datasets.are_progress_bars_disabled()


@pytest.mark.usefixtures("offline")
def test_a_folder_in_the_hubs_layout_is_read_by_datasets_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "mine").mkdir()
    write_jsonl(tmp_path / "mine" / "train.jsonl", [f"train {row}" for row in ROWS])
    write_jsonl(tmp_path / "mine" / "test.jsonl", [f"test {row}" for row in ROWS])
    for role, split in (("search", "train"), ("heldout", "test")):
        calibration = load_calibration("hf:mine", tokenizer, sequence_length=1, role=role)  # type: ignore[arg-type]
        assert decode(calibration) == "\n\n".join(f"{split} {row}" for row in ROWS)
    with pytest.raises(DataError, match="cannot load hf:mine::nosuch: Bad split: nosuch"):
        load_calibration("hf:mine::nosuch", tokenizer, sequence_length=1)
    with pytest.raises(DataError, match="cannot load hf:mine:nosuch: BuilderConfig 'nosuch' not found"):
        load_calibration("hf:mine:nosuch", tokenizer, sequence_length=1)
    with pytest.raises(DataError, match="hf:mine:::body: no column 'body'; there is 'id', 'text'"):
        load_calibration("hf:mine:::body", tokenizer, sequence_length=1)


def test_without_a_network_the_hub_is_tried_once_and_then_the_cache(
    monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    looked_up = 0

    def no_name(*args: Any, **kwargs: Any) -> Any:
        nonlocal looked_up
        looked_up += 1
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    huggingface_hub.close_session()
    message = r"cannot reach the Hugging Face hub for c4 \(.*Name or service not known\), and the local cache does not"
    with pytest.raises(DataError, match=message):
        load_calibration("c4", tokenizer, sequence_length=8)
    assert looked_up <= 2  # `huggingface_hub` asks once in a process on its own account; `datasets` would ask 6 times


def test_a_dataset_that_does_not_exist_is_refused(
    monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    def missing(self: Any, name: str, **_: Any) -> Any:
        error = huggingface_hub.errors.RepositoryNotFoundError
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", missing)
    with pytest.raises(DataError, match="the Hugging Face hub has no dataset 'no/such'"):
        load_calibration("hf:no/such", tokenizer, sequence_length=8)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["json", "parquet", "a b", "a/b/c"])
def test_a_name_no_dataset_can_have_is_refused_without_asking(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=f"the Hugging Face hub has no dataset '{name}'"):
        load_calibration(f"hf:{name}", tokenizer, sequence_length=8)


@pytest.mark.parametrize("source", ["hf:", "hf::en", "hf:a:b:c:d:e"])
def test_a_malformed_hub_source_is_refused(source: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=rf"expected hf:NAME\[:CONFIG.*, got '{source}'"):
        load_calibration(source, tokenizer, sequence_length=8)


def test_a_stream_that_breaks_is_refused_with_the_reason(hub: Hub, tokenizer: PreTrainedTokenizerFast) -> None:
    hub.splits["train"] = [{"text": "one"}, ConnectionError("Server Disconnected\nand more")]
    with pytest.raises(DataError, match=r"^cannot load c4: Server Disconnected$"):
        load_calibration("c4", tokenizer, sequence_length=8)


def test_rows_without_text_are_refused(hub: Hub, tokenizer: PreTrainedTokenizerFast) -> None:
    hub.splits["train"] = [{"text": ["one"], "body": "two"}]
    with pytest.raises(DataError, match="c4: column 'text' holds list, expected text"):
        load_calibration("c4", tokenizer, sequence_length=8)
    hub.splits["train"] = [{"body": "two"}]
    with pytest.raises(DataError, match="c4: no column 'text'; there is 'body'"):
        load_calibration("c4", tokenizer, sequence_length=8)


def test_the_hub_without_datasets_is_refused(
    monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="needs the package 'datasets', which is not installed"):
        load_calibration("wikitext2", tokenizer, sequence_length=8)
