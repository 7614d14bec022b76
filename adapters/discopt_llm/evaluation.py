"""`discopt llm eval`: models, and students of runs, side by side on text and on zero-shot tasks."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from discopt.encoding import plain
from discopt.errors import DiscoptError
from discopt_llm.calibration import Calibration
from discopt_llm.heldout import MOST_NLL, HeldoutScores, standard_error
from discopt_llm.models import ModelFiles, parse_device, parse_dtype
from discopt_llm.side_by_side import SideBySide
from discopt_llm.subjects import EvalText, Subject, common_length, find_subjects, read_text, reference_of, role_of

if TYPE_CHECKING:
    from discopt_llm.tasks import Tasks

__all__ = ["EvalRequest", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """What was asked of `discopt llm eval`; raises ValueError for values that make no sense."""

    what: tuple[str, ...]  # models and run folders
    data: tuple[str, ...] = ()
    reference: str | None = None
    profile: str | None = None
    banks: tuple[str, ...] = ()
    tokens: int | None = None
    sequence_length: int | None = None
    tasks: tuple[str, ...] = ()
    tasks_folder: Path | None = None
    limit: int | None = None  # questions of each task
    batch_size: int = 8
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not self.what:
            raise ValueError("expected models or run folders to evaluate, got none")
        if not self.data and not self.tasks:
            raise ValueError("nothing to evaluate on; say with --data which text, or with --tasks which tasks")
        if not self.data and self.reference is not None:
            raise ValueError("--reference is what others are compared with on text; say with --data which")
        if len(self.what) > 1 and (self.profile is not None or self.banks):
            raise ValueError(f"--profile and --bank go with one model or run, got {len(self.what)}")
        for name, least in (("tokens", 2), ("sequence_length", 2), ("limit", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")


def evaluate(request: EvalRequest, *, quiet: bool) -> dict[str, Any]:
    """Measure all that was asked; returns what `discopt llm eval --json` prints.

    Besides the reference one model is in memory at a time. What is missing or does not fit is refused before weights
    are read, as far as that can be seen without them.
    """
    device = parse_device(request.device)
    dtype = parse_dtype(request.dtype, device)
    if request.tasks and importlib.util.find_spec("lm_eval") is None:
        raise DiscoptError("zero-shot tasks need lm-eval: pip install 'discopt-search[eval]'")
    subjects, named = find_subjects(
        request.what,
        profile=request.profile,
        banks=request.banks,
        reference=request.reference,
        trust_remote_code=request.trust_remote_code,
    )
    models = list(dict.fromkeys([subject.files for subject in subjects] + ([named] if named else [])))
    length = common_length(models, request.sequence_length)
    texts = [
        read_text(source, role_of(source, subjects), models, sequence_length=length, tokens=request.tokens)
        for source in dict.fromkeys(request.data)
    ]
    references = {subject: reference_of(subject, named, subjects[0], texts) for subject in subjects if texts}
    itself = {subject.files for subject in subjects if subject.profile is None}
    added = {
        Subject(files.source, files, asked=False): files
        for files in dict.fromkeys(references.values())
        if files is not None and files not in itself
    }
    subjects, references = [*added, *subjects], {**added, **references}
    measured = SideBySide(texts, _load_tasks(request), device, dtype, quiet)
    for reference in dict.fromkeys(references.get(subject) for subject in subjects):
        measured.measure(reference, [subject for subject in subjects if references.get(subject) is reference])
    return _results(measured, subjects, references)


def _load_tasks(request: EvalRequest) -> Tasks | None:
    if not request.tasks:
        return None
    from discopt_llm.tasks import Tasks

    return Tasks.load(request.tasks, folder=request.tasks_folder, limit=request.limit, batch_size=request.batch_size)


def _results(
    measured: SideBySide, subjects: Sequence[Subject], references: Mapping[Subject, ModelFiles | None]
) -> dict[str, Any]:
    """All that was measured, as JSON has it."""
    answers = [{"model": subject.name, **row} for subject in subjects for row in measured.answers.get(subject, ())]
    found = {
        "command": "llm eval",
        "data": [_described(text, subjects) for text in measured.texts],
        "rows": [
            {
                "data": text.source,
                "model": subject.name,
                **_row(measured.scores[text, subject], text, subject, references[subject]),
                "bytes": measured.bytes[subject],
            }
            for text in measured.texts
            for subject in subjects
        ],
        "tasks": answers,
    }
    encoded: dict[str, Any] = plain(found, exact=False)
    return encoded


def _described(text: EvalText, subjects: Sequence[Subject]) -> dict[str, Any]:
    """A text, and who reads it as the same tokens."""
    readers: dict[str, list[str]] = {}
    for subject in subjects:
        readers.setdefault(text.of[subject.files].fingerprint, []).append(subject.name)
    (length,) = {of_model.sequence_length for of_model in text.of.values()}
    return {"source": text.source, "side": text.role, "sequence_length": length, "readers": [*readers.values()]}


def _row(scores: HeldoutScores, text: EvalText, subject: Subject, reference: ModelFiles | None) -> dict[str, Any]:
    """What a subject loses on a text.

    Perplexity and its standard error over sequences are per token, KL is in nats per token; bits per byte are of the
    text as it was before it became tokens.
    """
    of_model = text.of[subject.files]
    nll = float(scores.nll.mean())
    perplexity = math.exp(min(nll, MOST_NLL)) if math.isfinite(nll) else math.nan
    compared = reference is not None
    return {
        "reference": reference.source if reference is not None else None,
        "perplexity": perplexity,
        "perplexity_error": perplexity * float(standard_error(scores.nll)[0]),  # to first order
        "bits_per_byte": nll / math.log(2) * of_model.tokens / _bytes(of_model, subject.files),
        "kl": float(scores.kl.mean()) if compared else None,
        "kl_error": float(scores.kl_error[0]) if compared else None,
        "agreement": 1 - float(scores.disagreement.mean()) if compared else None,
        "tokens": of_model.tokens,
    }


def _bytes(text: Calibration, files: ModelFiles) -> int:
    """Of a text in UTF-8, without the tokens that stand for no text."""
    words = files.tokenizer.decode(
        text.sequences.flatten(), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert isinstance(words, str)
    return max(1, len(words.encode()))
