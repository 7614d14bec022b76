"""Calibration and held-out text as token sequences of one length, and the sample that (fidelity, seed) draws.

Documents become one run of tokens, which is cut into sequences; the remainder is dropped. Where the documents of a
source are separate texts, each is encoded as the tokenizer encodes a text by default, so that a tokenizer that puts
a BOS token in front (Llama, Gemma) does so for every document; if it adds no special tokens, a blank line parts
them. Where they are pieces of one running text (a .txt file, and the benchmarks WikiText-2 and C4), they are joined
by blank lines and encoded at once, without special tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from discopt_llm.errors import DataError
from discopt_llm.sources import Role, open_text

__all__ = ["Calibration", "load_calibration"]

TokenIds = NDArray[np.int64]

_ROLE_WORDS: dict[Role, str] = {"search": "search text", "heldout": "held-out text", "all": "text"}


@dataclass(frozen=True, eq=False)
class Calibration:
    """Token sequences of one length, the data that losses are measured on."""

    sequences: Tensor  # (N, L) int64, on the CPU
    source: str
    fingerprint: str = ""  # sha256 of the source's name and the token ids; computed unless given

    def __post_init__(self) -> None:
        sequences = self.sequences
        if sequences.ndim != 2 or 0 in sequences.shape:
            raise ValueError(f"sequences must have shape (N, L) with N, L >= 1, got {tuple(sequences.shape)}")
        if sequences.dtype != torch.int64 or sequences.device.type != "cpu":
            raise ValueError(f"sequences must be int64 on the CPU, got {sequences.dtype} on {sequences.device}")
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", _fingerprint(self.source, sequences))

    @property
    def sequence_length(self) -> int:
        """L, tokens of a whole sequence."""
        return self.sequences.shape[1]

    @property
    def tokens(self) -> int:
        """N * L, the most that a sample can have."""
        return self.sequences.numel()

    def split(self, tokens: int) -> tuple[Calibration, Calibration]:
        """All but the last whole sequences that hold `tokens`, and these; each side has one at least.

        Raises DataError if there is a single sequence.
        """
        count = len(self.sequences)
        if count < 2:
            raise DataError(f"{self.source} has one sequence of {self.sequence_length:,} tokens, which cannot be split")
        kept = min(max(count - -(-tokens // self.sequence_length), 1), count - 1)
        return Calibration(self.sequences[:kept], self.source), Calibration(self.sequences[kept:], self.source)

    def sample(self, fidelity: int, seed: int) -> tuple[Tensor, ...]:
        """Draw exactly `fidelity` tokens: whole sequences without replacement, the last one cut: tuple of (L_i,).

        A pure function of (fidelity, seed). Raises DataError if there are fewer tokens.
        """
        if fidelity < 1:
            raise ValueError(f"fidelity must be at least 1 token, got {fidelity}")
        if fidelity > self.tokens:
            raise DataError(f"{self.source} has {self.tokens:,} tokens, asked for a sample of {fidelity:,}")
        rng = np.random.default_rng((seed, fidelity))
        drawn = rng.permutation(len(self.sequences))[: -(-fidelity // self.sequence_length)]
        cut = fidelity - (len(drawn) - 1) * self.sequence_length  # tokens left for the last sequence, 1..L
        *whole, last = (self.sequences[i] for i in drawn.tolist())
        return (*whole, last[:cut])


def load_calibration(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    tokens: int | None = None,
    at_most: int | None = None,
    role: Role = "search",
) -> Calibration:
    """Read `source` as sequences of `sequence_length` tokens.

    source: `builtin`, a .txt, .jsonl[:COLUMN] or .parquet[:COLUMN] file, `wikitext2`, `c4`, `fineweb-edu`, or
        `hf:NAME[:CONFIG[:SPLIT[:COLUMN]]]`; see `sources.open_text`.
    tokens: at least this many, rounded up to whole sequences and taken from the start of the text, which is read no
        further than that. None takes all of a local source, WikiText-2's test split or the first 1,100 documents of
        C4's validation split, and up to 131,072 tokens of any other text of the hub.
    at_most: without `tokens`, so many as far as there are, rounded in the same way.
    role: search text and held-out text of one source never share a document.

    Raises DataError if the text cannot be read, or is shorter than one sequence or than `tokens`.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length must be at least 1 token, got {sequence_length}")
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens must be at least 1, or None, got {tokens}")
    if at_most is not None and at_most < 1:
        raise ValueError(f"at_most must be at least 1 token, or None, got {at_most}")
    text = open_text(source, role)
    asked = tokens or at_most or text.default_tokens
    needed = None if asked is None else -(-asked // sequence_length) * sequence_length
    with closing(text.documents):
        read = _joined_ids if text.joined else _document_ids
        ids = read(text.documents, tokenizer, needed)[:needed]

    there = f"{source} has {len(ids):,} tokens of {_ROLE_WORDS[role]}"
    count = len(ids) // sequence_length
    if len(ids) == 0:
        raise DataError(f"{source} has no {_ROLE_WORDS[role]}")
    if count == 0:
        raise DataError(f"{there}, fewer than one sequence of {sequence_length:,}")
    if tokens is not None and count * sequence_length < tokens:
        whole = f"{count * sequence_length:,} in whole sequences of {sequence_length:,}"
        raise DataError(f"{there} ({whole}), asked for {tokens:,}")
    sequences = torch.from_numpy(ids[: count * sequence_length].reshape(count, sequence_length).copy())
    return Calibration(sequences, source)


def _document_ids(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, needed: int | None) -> TokenIds:
    """Ids of one document after another, `needed` of them or more if the text has them: (t,)."""
    adds_specials = len(_encode(tokenizer, "a", special=True)) > len(_encode(tokenizer, "a", special=False))
    blank_line = _encode(tokenizer, "\n\n", special=False)
    parts: list[TokenIds] = []
    count = 0
    for document in documents:
        ids = _encode(tokenizer, document, special=True)
        parts.append(ids if adds_specials or not parts else np.concatenate((blank_line, ids)))
        count += len(parts[-1])
        if needed is not None and count >= needed:
            break
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _joined_ids(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, needed: int | None) -> TokenIds:
    """Ids of the documents joined by blank lines, `needed` of them or more if the text has them: (t,)."""
    pieces: list[str] = []
    characters = 0
    enough = float("inf") if needed is None else 8 * needed  # English has 4 to 5 characters a token
    for document in documents:
        pieces.append(document)
        characters += len(document)
        if characters >= enough:
            ids = _encode(tokenizer, "\n\n".join(pieces), special=False)
            if needed is not None and len(ids) > needed:
                return ids
            enough *= 2
    text = "\n\n".join(pieces)
    return _encode(tokenizer, text, special=False) if text.strip() else np.empty(0, np.int64)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> TokenIds:
    # verbose=False: a text longer than the model's context is the point here, not a mistake to warn of
    encoded = tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)
    return np.asarray(encoded["input_ids"], dtype=np.int64)


def _fingerprint(source: str, sequences: Tensor) -> str:
    digest = hashlib.sha256(f"{source}\0{tuple(sequences.shape)}\0".encode(errors="replace"))
    digest.update(sequences.contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()
