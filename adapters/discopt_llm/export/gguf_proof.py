"""Readers of a GGUF file that are not ours, and comparing their answers with the searched student's.

transformers unpacks the file's weights and computes as the student does: its logits must equal the student's up to
roundings of single precision, and of the type that a checkpoint's weights were rounded to.

llama.cpp (the optional package xllamacpp, on the CPU) computes otherwise: its kernels quantize the inputs of every
product to 8 bits, or round them to half precision, so that logits differ by some thousandths to hundredths of their
spread. What is wrong in a file (rows in another order, a wrong angle, a missing norm) differs by much more than a
tenth of it; of the positions that are compared the median counts, since a token that goes to another expert for such
a difference changes more. Perplexity, in which they average out, must be within 1%, and three standard errors of that
average: a token's log-probability differs by about 0.1 nats in a 4-bit model.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from discopt_llm.calibration import load_calibration
from discopt_llm.export.gguf_contents import Contents
from discopt_llm.export.gguf_families import Family
from discopt_llm.export.gguf_llama import LlamaError, Question, ask
from discopt_llm.export.proof import UnfitError, unfit_if
from discopt_llm.export.student import StudentModel
from discopt_llm.ggml_native import INSTALL, PACKAGE
from discopt_llm.models import LoadedModel, ModelFiles
from discopt_llm.replay import skipped_, weights_replaced_

__all__ = ["Expected", "proved"]

TRANSFORMERS, LLAMA = "transformers", "llama.cpp"

TEXT = "builtin"
TOKENS = 513  # of the text that is compared on
FIRST = 16  # the positions before it count for nothing in perplexity
WHOLE = 8  # positions at which whole distributions of llama.cpp are compared
EXACT = 1e-4  # relative difference of logits by the order of sums in single precision
ROUNDINGS = 4.0  # of weights, as they add up in the logits
LLAMA_LOGITS = 0.1  # of their spread
LLAMA_PERPLEXITY = 0.01  # of the student's
NOISE = 3.0  # standard errors

PROBES = (
    "The year 1984, 3.14159 and 10,000,000 are numbers; 007 is one, too.",
    "She'll say: \"don't!\" -- (isn't it?) [sic] {x} <y> #tag @name a/b\\c e.g. 50% $5 & more...",
    "naïve café, Straße, Ελληνικά, русский язык, 日本語の文章, 한국어, עברית, हिन्दी, 🙂🚀",
    "def f(x, *, y=None):\n    if x != y:\n        return [i ** 2 for i in range(10)]\n\n\treturn x  # done\n",
    "Spaces,   more spaces \r\n\n\n and\ttabs  ",
)
"""Texts that tokenizers split in different ways: numbers, contractions and punctuation, other scripts, code, spaces.

None begins with a space, before which transformers puts no other one where SentencePiece and llama.cpp do.
"""


@dataclass(frozen=True, eq=False)
class Expected:
    """What the searched student answers on a text."""

    loaded: LoadedModel
    ids: Tensor  # (1, L) on the CPU
    logits: Tensor  # (L, V) float32 on the CPU

    @classmethod
    @torch.no_grad()
    def of(cls, student: StudentModel, context: int) -> Expected:
        """Of a text that leaves room for one more token in a context of so many."""
        loaded = student.loaded
        length = min(TOKENS, context - 1)
        text = load_calibration(TEXT, loaded.tokenizer, sequence_length=length, tokens=length, role="heldout")
        parts = zip(loaded.anatomy.sub_blocks, student.dropped.flat, strict=True)
        gone = [part for part, is_gone in parts if is_gone]
        with weights_replaced_(loaded.model, student.weights), skipped_(gone):
            return cls(loaded, text.sequences[:1], _logits(loaded.model, text.sequences[:1]))

    @property
    def log_probabilities(self) -> Tensor:
        """(L, V)."""
        return self.logits.log_softmax(-1)


def proved(
    student: StudentModel, family: Family, contents: Contents, file: Path, rounded: torch.dtype | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The readers that answer as the student does, and why others could not be asked; raises UnfitError if one differs.

    contents: what the file was written from.
    rounded: what a checkpoint's weights were rounded to, in a file whose tokenizer is new as well. None: all is as it
        was in the GGUF file that the model came from.
    """
    expected = Expected.of(student, contents.own("context_length"))
    readers, unread = [], []
    if contents.arch == family.name and family.in_transformers(student.loaded.model.config):
        _ask_transformers(expected, file, rounded)
        readers.append(TRANSFORMERS)
    else:
        unread.append(f"{TRANSFORMERS} reads no such {contents.arch} files")
    if importlib.util.find_spec(PACKAGE) is None:
        unread.append(f"{LLAMA} was not asked, which takes `{INSTALL}`")
    else:
        _ask_llama(expected, file, PROBES if rounded is not None else ())
        readers.append(LLAMA)
    return tuple(readers), tuple(unread)


def _ask_transformers(expected: Expected, file: Path, rounded: torch.dtype | None) -> None:
    model, folder, name = expected.loaded.model, str(file.parent), file.name
    with unfit_if(f"{TRANSFORMERS} cannot load and run it"):
        config = AutoConfig.from_pretrained(folder, gguf_file=name)
        tokenizer = expected.loaded.tokenizer  # not the file's, which takes long to read and is not asked for anything
        files = ModelFiles(str(file), config, tokenizer, False, folder, name, {"gguf_file": name})
        logits = _logits(files.load(model.device, model.dtype), expected.ids)
    difference = float(torch.linalg.vector_norm(logits - expected.logits) / torch.linalg.vector_norm(expected.logits))
    allowed = max(EXACT, *(ROUNDINGS * torch.finfo(dtype).eps for dtype in (model.dtype, rounded) if dtype))
    if not difference <= allowed:
        raise UnfitError(
            f"its logits in {TRANSFORMERS} differ from the searched student's by {difference:.1e} of their size, "
            f"expected at most {allowed:.0e}"
        )


def _ask_llama(expected: Expected, file: Path, texts: tuple[str, ...]) -> None:
    ids = tuple(expected.ids[0].tolist())
    first = min(FIRST, len(ids) // 2)
    whole = tuple(np.linspace(first, len(ids) - 2, WHOLE).astype(int).tolist())
    vocabulary = expected.logits.shape[-1]
    question = Question(str(file), ids, first, whole, vocabulary, texts, threads=torch.get_num_threads())
    try:
        answer = ask(question)
    except LlamaError as error:
        raise UnfitError(f"{LLAMA} cannot load and run it: {error}") from error
    mine = expected.log_probabilities
    theirs = torch.from_numpy(answer.log_probabilities).float()
    difference = float(_differences(theirs, mine[[*whole]]).median())
    if not difference <= LLAMA_LOGITS:
        raise UnfitError(
            f"its log-probabilities in {LLAMA} differ from the searched student's by {difference:.1e} of their spread, "
            f"expected at most {LLAMA_LOGITS:.0e}"
        )
    places = torch.arange(first, len(ids) - 1)
    nll = -mine[places, expected.ids[0, 1:][places]]
    change = answer.nll - nll.double().numpy()
    noise = NOISE * float(change.std(ddof=1)) / math.sqrt(len(change))
    if not abs(change.mean()) <= math.log1p(LLAMA_PERPLEXITY) + noise:
        raise UnfitError(
            f"its perplexity in {LLAMA} differs from the searched student's by {math.expm1(change.mean()):+.1%}, "
            f"expected at most {LLAMA_PERPLEXITY:.0%}, and {math.expm1(noise):.1%} for noise"
        )
    for text, tokens in zip(question.texts, answer.encoded, strict=True):
        if [*tokens] != (own := expected.loaded.tokenizer(text).input_ids):
            raise UnfitError(f"{LLAMA} encodes {text!r} as {len(tokens)} other tokens than the tokenizer's {len(own)}")


def _logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """(L, V) float32 on the CPU."""
    device = next(model.parameters()).device
    logits: Tensor = model(input_ids=ids.to(device), use_cache=False).logits[0]
    return logits.detach().to("cpu", torch.float32)


def _differences(theirs: Tensor, mine: Tensor) -> Tensor:
    """Of log-probabilities (p, V), relative to their spread at each position: (p,)."""
    deviations = mine - mine.mean(-1, keepdim=True)
    others = theirs - theirs.mean(-1, keepdim=True)
    return torch.linalg.vector_norm(others - deviations, dim=-1) / torch.linalg.vector_norm(deviations, dim=-1)
