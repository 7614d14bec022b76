"""A fast tokenizer of transformers as the fields of a GGUF file.

llama.cpp knows how text is split into words by names, such as "qwen2". A name is given only to the steps and patterns
that it stands for, and a tokenizer with any others is refused: with a wrong name text would still be encoded, as other
tokens. SentencePiece models are there as merges, whose order becomes the scores again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gguf import GGUFValueType, Keys, TokenType
from gguf.gguf_writer import GGUFValue
from transformers import PreTrainedTokenizerBase

from discopt_llm.errors import ModelError, short
from discopt_llm.export.gguf_families import Fields, value

__all__ = ["tokenizer_fields"]

Step = tuple[Any, ...]

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_AND_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"

_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_TEKKEN = rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}|{_REST_AND_SLASH}"
_GPT4O = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_BEFORE}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_REST_AND_SLASH}"
)

_BYTES: Step = ("ByteLevel", False)
_GPT2: Step = ("ByteLevel", True)  # splits by a pattern of its own
_NAMES: Mapping[tuple[tuple[Step, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((("Digits", True), _GPT2), False): "smollm",
    ((("Split", _LLAMA3), _BYTES), True): "llama-bpe",
    ((("Split", _LLAMA3), _BYTES), False): "dbrx",
    ((("Split", _QWEN2), _BYTES), False): "qwen2",
    ((("Split", _TEKKEN), _BYTES), False): "tekken",
    ((("Split", _TEKKEN), _BYTES), True): "tekken",
    ((("Split", _GPT4O), _BYTES), False): "gpt-4o",
}
"""What llama.cpp calls the steps before merging; whether whole words go before merges makes a difference."""

_SPACE = "▁"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_FIRST_SPACE = (
    {"type": "Prepend", "prepend": _SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
)
_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "unknown_token_id": "unk", "padding_token_id": "pad"}


def tokenizer_fields(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Fields:
    """All fields of a tokenizer, with a token for each of so many rows of the embedding.

    Raises ModelError, saying what it is, for a tokenizer that llama.cpp does not know.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"expected a fast tokenizer, got {type(tokenizer).__name__}, which no GGUF file can hold")
    spec = json.loads(backend.to_str())
    model = spec["model"]
    if model["type"] != "BPE":
        raise ModelError(f"expected a tokenizer of type BPE, got {model['type']}, which is not written to GGUF files")
    steps = _parts(spec["pre_tokenizer"], "pretokenizers")
    byte_level = any(step["type"] == "ByteLevel" for step in steps)
    if not byte_level and not model.get("byte_fallback"):
        raise ModelError("expected a tokenizer that falls back on bytes, got one that is not written to GGUF files")
    fields = _byte_level(spec, steps) if byte_level else _sentencepiece(spec, steps)
    tokens, types = _vocabulary(spec, vocabulary, byte_level=byte_level)
    fields["tokenizer.ggml.tokens"] = value(tokens)
    fields["tokenizer.ggml.token_type"] = GGUFValue(types, GGUFValueType.ARRAY, GGUFValueType.INT32)
    if not byte_level:
        fields["tokenizer.ggml.scores"] = value(_scores(model["merges"], tokens))
    return fields | _special(tokenizer)


def _byte_level(spec: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> Fields:
    """Of a tokenizer whose tokens are bytes (GPT-2, Llama 3, Qwen)."""
    model = spec["model"]
    known = tuple(_step(step) for step in steps)
    name = _NAMES.get((known, bool(model.get("ignore_merges"))))
    if name is None:
        raise ModelError(f"llama.cpp knows no name for a tokenizer that splits text by {short(known)}; use --to hf")
    if strange := [n for n in _parts(spec["normalizer"], "normalizers") if n["type"] != "NFC"]:
        raise ModelError(f"llama.cpp does not normalize text by {short(strange[0]['type'])}, as this tokenizer does")
    merges = [merge if isinstance(merge, str) else _merge(merge) for merge in model["merges"]]
    if not merges:
        raise ModelError("llama.cpp needs a tokenizer with merges, got one without any")
    return {
        "tokenizer.ggml.model": value("gpt2"),
        "tokenizer.ggml.pre": value(name),
        "tokenizer.ggml.merges": value(merges),
    }


def _sentencepiece(spec: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> Fields:
    """Of a tokenizer made from a SentencePiece model (Llama 2, Mistral, Gemma)."""
    normalizers = _parts(spec["normalizer"], "normalizers")
    before = [step for step in steps if not (step["type"] == "Split" and step["pattern"] == {"String": " "})]
    if normalizers in ([*_FIRST_SPACE], [_FIRST_SPACE[1]]) and not before:
        prefix = len(normalizers) == 2
    elif not normalizers and [s["type"] for s in before] == ["Metaspace"] and before[0]["replacement"] == _SPACE:
        prefix = before[0]["prepend_scheme"] != "never"
    else:
        names = [part["type"] for part in (*normalizers, *steps)]
        raise ModelError(f"expected a tokenizer that writes spaces as {_SPACE} and no more, got {', '.join(names)}")
    return {
        "tokenizer.ggml.model": value("llama"),
        "tokenizer.ggml.pre": value("default"),
        "tokenizer.ggml.add_space_prefix": value(prefix),
    }


def _scores(merges: Sequence[Any], tokens: Sequence[str]) -> list[float]:
    """What merges into a token earlier has a higher score; what is no merge has the lowest."""
    scores: dict[str, float] = {}
    latest = ""
    for merge in merges:
        token = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        if token != latest and token in scores:
            raise ModelError(f"the merges of this tokenizer have no order of tokens: {short(token)} comes twice")
        scores.setdefault(token, -float(len(scores)))
        latest = token
    return [scores.get(token, -float(len(scores))) for token in tokens]


def _vocabulary(spec: Mapping[str, Any], size: int, *, byte_level: bool) -> tuple[list[str], list[int]]:
    """The text and the type of every token; rows of the embedding beyond the tokenizer's are unused ones."""
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [TokenType.UNUSED] * size
    unknown = spec["model"].get("unk_token")

    def put(number: int, text: str, kind: TokenType) -> None:
        if number >= size:
            raise ModelError(f"the tokenizer has a token {number}, but the model only {size} rows of embeddings")
        tokens[number], types[number] = text, kind

    for text, number in spec["model"]["vocab"].items():
        is_byte = not byte_level and _BYTE.fullmatch(text)
        put(number, text, TokenType.BYTE if is_byte else TokenType.NORMAL)
    for token in spec["added_tokens"]:
        text = token["content"]
        if token["special"]:
            put(token["id"], text, TokenType.UNKNOWN if text == unknown else TokenType.CONTROL)
        else:
            put(token["id"], text.replace(_SPACE, " "), TokenType.USER_DEFINED)
    return tokens, [int(kind) for kind in types]


def _special(tokenizer: PreTrainedTokenizerBase) -> Fields:
    """Numbers of special tokens, which of them begin and end a text, and the chat template."""
    numbers = {key: getattr(tokenizer, f"{name}_token_id", None) for key, name in _IDS.items()}
    fields = {f"tokenizer.ggml.{key}": value(number) for key, number in numbers.items() if number is not None}
    ids = tokenizer("a").input_ids
    fields[Keys.Tokenizer.ADD_BOS] = value(len(ids) > 1 and ids[0] == numbers["bos_token_id"])
    fields[Keys.Tokenizer.ADD_EOS] = value(len(ids) > 1 and ids[-1] == numbers["eos_token_id"])
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    return fields | ({Keys.Tokenizer.CHAT_TEMPLATE: value(template)} if template else {})


def _parts(step: Mapping[str, Any] | None, name: str) -> list[Any]:
    """The steps of a sequence, or the single one."""
    if step is None:
        return []
    return [*step[name]] if step["type"] == "Sequence" else [step]


def _step(step: Mapping[str, Any]) -> Step:
    """What matters of a step before merging."""
    kind = step["type"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return (kind, step["use_regex"])
    if kind == "Digits":
        return (kind, step["individual_digits"])
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return (kind, step["pattern"].get("Regex"))
    return (kind, json.dumps(step, sort_keys=True))


def _merge(pair: Sequence[str]) -> str:
    """The two parts with a space between; spaces in them as the byte alphabet has them."""
    return " ".join(part.replace(" ", "Ġ") for part in pair)
