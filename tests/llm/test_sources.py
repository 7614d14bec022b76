"""Text built in and in local files, its division between search and held-out, and what is refused."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from discopt_llm import sources
from discopt_llm.calibration import load_calibration
from discopt_llm.errors import DataError
from discopt_llm.sources import divide, open_text, whereabouts
from tests.llm.texts import ROWS, WRITERS, decode, write_jsonl, write_parquet


def paragraphs(text: str) -> set[str]:
    return {" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()}


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


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("role", ["search", "heldout"])
@pytest.mark.parametrize("suffix", ["builtin", *WRITERS])
def test_local_sources_reach_for_no_network(
    suffix: str, role: sources.Role, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = suffix if suffix == "builtin" else str(WRITERS[suffix](tmp_path / f"a{suffix}", ROWS * 10))
    assert load_calibration(source, tokenizer, sequence_length=16, tokens=20, role=role).tokens == 32


def test_a_source_is_known_by_what_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    assert whereabouts("b.txt", tmp_path / "a") == whereabouts("a/../a/b.txt") == str(tmp_path / "a" / "b.txt")
    assert whereabouts("b.txt") != whereabouts("b.txt", tmp_path / "a")
    assert whereabouts("b.jsonl:one") != whereabouts("b.jsonl:two")
    for source in ("builtin", "wikitext2", "c4", "fineweb-edu", "hf:some/name:test"):
        assert whereabouts(source) == whereabouts(source, tmp_path / "a") == source


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
