"""Asking llama.cpp, in a process of its own: what it makes of a GGUF file, without a model of ours.

llama.cpp ends its process on files that it does not like, and logs where it likes; here neither does any harm. The
request comes as JSON on standard input, the answer goes to a file. This module is run by its path, with nothing but
NumPy and the package xllamacpp, so that it starts at once.
"""

from __future__ import annotations

import http.client
import importlib
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

__all__ = ["Answer", "LlamaError", "Question", "ask"]

SECONDS = 3600.0  # at most, for all answers
FORCED = 1e4  # added to a logit; what is asked for is drawn then, and its probability still the model's own


class LlamaError(Exception):
    """llama.cpp cannot load or run a file; the message says what it said."""


@dataclass(frozen=True)
class Question:
    """What to find out about a file."""

    file: str
    ids: Sequence[int]  # tokens of a text
    first: int  # the first position whose next token counts for perplexity
    whole: Sequence[int]  # positions, before the last, whose log-probabilities of all next tokens are wanted
    vocabulary: int
    texts: Sequence[str]  # to encode
    threads: int


@dataclass(frozen=True, eq=False)
class Answer:
    """What llama.cpp says."""

    nll: NDArray[np.float64]  # (len(ids) - first - 1,), nats: of the tokens behind `first`
    log_probabilities: NDArray[np.float64]  # (len(whole), vocabulary)
    encoded: tuple[tuple[int, ...], ...]  # of every text


def ask(question: Question) -> Answer:
    """Put a question to llama.cpp; raises LlamaError."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answer.npz"
        command = [sys.executable, "-P", __file__, str(path)]
        try:
            done = subprocess.run(
                command, input=json.dumps(asdict(question)).encode(), capture_output=True, timeout=SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise LlamaError(f"gave no answer within {SECONDS:.0f} seconds") from error
        if done.returncode or not path.exists():
            lines = (done.stderr + done.stdout).decode(errors="replace").strip().splitlines()
            raise LlamaError(_reason(lines) or f"ended with status {done.returncode}")
        with np.load(path) as found:
            ends = np.cumsum(found["lengths"], dtype=np.intp).tolist()
            tokens = found["encoded"].tolist()
            encoded = tuple(tuple(tokens[start:end]) for start, end in pairwise([0, *ends]))
            return Answer(found["nll"], found["log_probabilities"], encoded)


def _reason(lines: Sequence[str]) -> str | None:
    """The first line that tells of an error, else the last one."""
    telling = [line for line in lines if "error" in line.lower() or "GGML_ASSERT" in line]
    return next(iter([*telling, *reversed(lines)]), None)


class _Server:
    """llama.cpp's server inside this process."""

    def __init__(self, question: Question) -> None:
        xllamacpp = importlib.import_module("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = question.file
        params.n_ctx = len(question.ids) + 1
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = question.threads
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.warmup = False
        self.server: Any = xllamacpp.Server(params)

    def log_probabilities(self, ids: Sequence[int], drawn: int, count: int) -> dict[int, float]:
        """Of the likeliest `count` next tokens, and of one that is made to be drawn: by token, nats."""
        reply = self.server.handle_completions(
            {
                "prompt": [*ids],
                "max_tokens": 1,
                "n_probs": count,
                "temperature": 0,
                "cache_prompt": True,
                "logit_bias": [[drawn, FORCED]],  # a token that ends a text would come without any
            }
        )
        if "choices" not in reply:
            raise RuntimeError(reply)
        (place,) = reply["choices"][0]["logprobs"]["content"]
        return {token["id"]: token["logprob"] for token in (*place["top_logprobs"], place)}

    def encode(self, text: str) -> list[int]:
        address = urlsplit(self.server.listening_address)
        connection = http.client.HTTPConnection(address.hostname or "", address.port)
        try:
            body = json.dumps({"content": text, "add_special": True})
            connection.request("POST", "/tokenize", body, {"Content-Type": "application/json"})
            tokens: list[int] = json.loads(connection.getresponse().read())["tokens"]
        finally:
            connection.close()
        return tokens


def _answer(question: Question) -> Answer:
    server = _Server(question)
    ids = question.ids
    whole = np.full((len(question.whole), question.vocabulary), -math.inf)
    for row, position in zip(whole, question.whole, strict=True):
        found = server.log_probabilities(ids[: position + 1], ids[position + 1], question.vocabulary)
        row[[*found]] = [*found.values()]
    nll = [-server.log_probabilities(ids[:i], ids[i], 1)[ids[i]] for i in range(question.first + 1, len(ids))]
    return Answer(np.array(nll), whole, tuple(tuple(server.encode(text)) for text in question.texts))


def _main() -> None:
    fields: dict[str, Any] = json.load(sys.stdin)
    answer = _answer(Question(**fields))
    np.savez(
        sys.argv[1],
        nll=answer.nll,
        log_probabilities=answer.log_probabilities,
        encoded=np.array([token for tokens in answer.encoded for token in tokens], dtype=np.int64),
        lengths=np.array([len(tokens) for tokens in answer.encoded]),
    )


if __name__ == "__main__":
    _main()
