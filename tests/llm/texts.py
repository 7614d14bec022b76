"""Texts for the tiny models, in files of every kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from discopt_llm.calibration import Calibration
from tests.llm.families import tiny_tokenizer

BOS = 256
ROWS = [f"Document {i} says {'so ' * (i % 7)}and no more." for i in range(40)]


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
