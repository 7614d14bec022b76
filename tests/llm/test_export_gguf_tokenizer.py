"""Tokenizers as fields of a GGUF file: the names that llama.cpp has for them, and what it makes of the fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from discopt_llm.errors import ModelError
from discopt_llm.export import gguf_tokenizer
from discopt_llm.export.gguf_contents import write
from discopt_llm.export.gguf_file import contents_of
from discopt_llm.export.gguf_llama import Question, ask
from discopt_llm.export.gguf_proof import PROBES
from discopt_llm.export.gguf_tokenizer import tokenizer_fields
from tests.llm.families import tiny_tokenizer
from tests.llm.gguf_models import END, VOCABULARY, byte_level, loaded, model, sentencepiece

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])


DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
STEPS: dict[str, Any] = {
    "gpt-2": None,
    "smollm": DIGITS,
    "llama-bpe": split(gguf_tokenizer._LLAMA3),
    "dbrx": split(gguf_tokenizer._LLAMA3),
    "qwen2": split(gguf_tokenizer._QWEN2),
    "tekken": split(gguf_tokenizer._TEKKEN),
    "gpt-4o": split(gguf_tokenizer._GPT4O),
}
WHOLE_WORDS_FIRST = ("llama-bpe", "tekken")


def encoded(tokenizer: PreTrainedTokenizerFast, path: Path, texts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """By llama.cpp, from a model with this tokenizer."""
    big = loaded("Llama") if len(tokenizer) <= VOCABULARY else model("Llama", vocab_size=len(tokenizer))
    write(contents_of(replace(big, tokenizer=tokenizer)), path)
    return ask(Question(str(path), (1, 2, 3, 4), 1, (), 0, tuple(texts), 1)).encoded


def own(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tokenizer(text).input_ids) for text in texts)


@pytest.mark.parametrize("name", STEPS)
def test_llama_cpp_splits_text_as_the_tokenizer_that_gets_its_name(name: str, tmp_path: Path) -> None:
    options = {"ignore_merges": True} if name in WHOLE_WORDS_FIRST else {}
    tokenizer = byte_level(STEPS[name], **options)
    fields = tokenizer_fields(tokenizer, VOCABULARY)
    assert fields["tokenizer.ggml.pre"].value == name
    pytest.importorskip("xllamacpp")
    texts = (*PROBES, f"before{END}after <tool> x")
    assert encoded(tokenizer, tmp_path / "a.gguf", texts) == own(tokenizer, texts)


@pytest.mark.parametrize("steps", ["normalizer", "metaspace", "gemma"])
def test_sentencepiece_models_come_back_from_their_merges(steps: str, tmp_path: Path) -> None:
    tokenizer = sentencepiece(steps)
    fields = tokenizer_fields(tokenizer, len(tokenizer))
    assert fields["tokenizer.ggml.model"].value == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"].value is (steps != "gemma")
    types = fields["tokenizer.ggml.token_type"].value
    assert [TokenType(kind).name for kind in types[:4]] == ["UNKNOWN", "CONTROL", "CONTROL", "BYTE"]
    scores = fields["tokenizer.ggml.scores"].value
    assert len(scores) == len(types) and min(scores) < 0 == max(scores)
    pytest.importorskip("xllamacpp")
    assert encoded(tokenizer, tmp_path / "a.gguf", PROBES) == own(tokenizer, PROBES)


def test_rows_without_a_token_are_unused_and_added_tokens_are_their_text() -> None:
    tokenizer = byte_level()
    fields = tokenizer_fields(tokenizer, VOCABULARY)
    tokens, types = fields["tokenizer.ggml.tokens"].value, fields["tokenizer.ggml.token_type"].value
    assert len(tokens) == len(types) == VOCABULARY
    assert (tokens[-1], types[-1]) == (f"[PAD{VOCABULARY - 1}]", TokenType.UNUSED)
    assert types[tokens.index("<tool>")] == TokenType.USER_DEFINED
    assert types[tokens.index(END)] == TokenType.CONTROL
    assert fields["tokenizer.ggml.eos_token_id"].value == tokens.index(END)
    assert not fields["tokenizer.ggml.add_bos_token"].value


def test_what_begins_a_text_and_the_chat_template_are_there() -> None:
    tokenizer = sentencepiece("metaspace")
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    fields = tokenizer_fields(tokenizer, len(tokenizer))
    assert fields["tokenizer.chat_template"].value == "{{ messages }}"
    begins = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    assert fields["tokenizer.ggml.add_bos_token"].value is begins


def unigram() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", -1.0)])))


def without_bytes() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))


def lower_case() -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def normal_spaces() -> PreTrainedTokenizerFast:
    tokenizer = sentencepiece("normalizer")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (tiny_tokenizer, "no name for a tokenizer that splits text by"),
        (lambda: byte_level(split(r"\s+")), r"no name for a tokenizer that splits text by .*\\\\s"),
        (lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), "no name for a tokenizer"),
        (lambda: byte_level(STEPS["qwen2"], ignore_merges=True), "no name for a tokenizer"),
        (lower_case, "does not normalize text by 'Lowercase'"),
        (normal_spaces, "writes spaces as ▁ and no more, got NFKC"),
        (unigram, "expected a tokenizer of type BPE, got Unigram"),
        (without_bytes, "falls back on bytes"),
        (object, "expected a fast tokenizer, got object"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(tokenizer: Any, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        tokenizer_fields(tokenizer(), VOCABULARY)


def test_merges_without_an_order_of_tokens_are_refused() -> None:
    vocabulary = {text: i for i, text in enumerate(["a", "b", "c", "ab", "bc", "abc", "ca"])}
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("c", "a"), ("a", "bc")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    with pytest.raises(ModelError, match="have no order of tokens: 'abc' comes twice"):
        tokenizer_fields(PreTrainedTokenizerFast(tokenizer_object=tokenizer), VOCABULARY)
