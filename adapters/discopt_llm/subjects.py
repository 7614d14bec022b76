"""What `discopt llm eval` is given, found before weights are read: models, students, texts, what goes with what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from discopt.folder import RunFolder
from discopt_llm.calibration import Calibration, load_calibration
from discopt_llm.errors import ModelError
from discopt_llm.models import ModelFiles
from discopt_llm.sources import Role, whereabouts
from discopt_llm.students import run_folder, run_options

__all__ = ["EvalText", "Subject", "common_length", "find_subjects", "read_text", "reference_of", "role_of"]

SEQUENCE_LENGTH = 2048


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, or the student that a profile makes of it."""

    name: str
    files: ModelFiles  # of the model; those of the same model are the same object
    profile: str | None = None  # a run folder, or a file with a profile
    banks: tuple[str, ...] = ()
    asked: bool = True  # or it is here to compare with


@dataclass(frozen=True, eq=False)
class EvalText:
    """A text, as the tokenizer of each model has it."""

    source: str
    role: Role
    of: Mapping[ModelFiles, Calibration]


def find_subjects(
    what: Sequence[str],
    *,
    profile: str | None = None,
    banks: Sequence[str] = (),
    reference: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[list[Subject], ModelFiles | None]:
    """Models, and the students of run folders, in the order given; and the model to compare all with, if one is named.

    profile: a run or a file with a profile of the one model given; its student comes after the model. `banks` hold
    the levels of this student, or of that of the one run given. Raises ModelError, ProfileError or RunFolderError for
    what cannot be evaluated.
    """
    known: dict[str, ModelFiles] = {}

    def files(source: str, trust: bool = trust_remote_code) -> ModelFiles:
        path = Path(source).expanduser()
        place = str(path.resolve()) if path.exists() else source
        if place not in known:
            known[place] = ModelFiles.find(source, trust_remote_code=trust, packed=True)
        return known[place]

    subjects = []
    for name in what:
        if (Path(name) / "run.json").is_file():
            options = run_options(name)
            trust = trust_remote_code or options.get("trust_remote_code", False)
            subjects.append(Subject(name, files(options["model"], trust), name, tuple(banks)))
        else:
            subjects.append(Subject(name, files(name)))
            if profile is not None:
                subjects.append(Subject(profile, files(name), profile, tuple(banks)))
    itself: dict[ModelFiles, str] = {}
    for subject in subjects:
        if subject.profile is None and itself.setdefault(subject.files, subject.name) != subject.name:
            raise ModelError(f"{subject.name} is the same model as {itself[subject.files]}")
    return subjects, None if reference is None else files(reference)


def role_of(source: str, subjects: Sequence[Subject]) -> Role:
    """The side of a text that no search has seen where it may have been searched on, else all of it."""
    searched = {"builtin", "fineweb-edu"}
    for subject in subjects:
        if subject.profile is not None and (run := run_folder(subject.profile)) is not None:
            request = RunFolder.open(run).request
            text = request.get("options", {}).get("calibration")
            searched.add(whereabouts(text, request.get("directory", ".")) if text else "")
    return "heldout" if whereabouts(source) in searched else "all"


def common_length(models: Sequence[ModelFiles], asked: int | None) -> int:
    """Tokens in a sequence, for all models: what was asked, else 2048 or the fewest positions, whichever is less.

    Raises ModelError if a model has fewer positions than were asked for.
    """
    lengths = [SEQUENCE_LENGTH]
    for files in models:
        of_model: int | None = getattr(files.config.get_text_config(), "max_position_embeddings", None)
        if asked is not None and of_model is not None and asked > of_model:
            raise ModelError(f"{files.source} has {of_model:,} positions, asked for sequences of {asked:,} tokens")
        lengths.append(of_model or SEQUENCE_LENGTH)
    return asked or min(lengths)


def read_text(
    source: str, role: Role, models: Sequence[ModelFiles], *, sequence_length: int, tokens: int | None
) -> EvalText:
    """A text for every model; it is read once for all that have the same tokenizer. Raises DataError."""
    by_tokenizer: dict[str, Calibration] = {}
    of = {}
    for files in models:
        tokenizer = files.tokenizer
        fast = getattr(tokenizer, "backend_tokenizer", None)
        key = str(id(tokenizer)) if fast is None else fast.to_str()
        if key not in by_tokenizer:
            by_tokenizer[key] = load_calibration(
                source, tokenizer, sequence_length=sequence_length, tokens=tokens, role=role
            )
        of[files] = by_tokenizer[key]
    return EvalText(source, role, of)


def reference_of(
    subject: Subject, named: ModelFiles | None, first: Subject, texts: Sequence[EvalText]
) -> ModelFiles | None:
    """The model that a subject is compared with: the one named, a student's own model, or the first one given.

    None if their vocabularies differ. Raises ModelError if that is so of the one named.
    """
    reference = named or (subject if subject.profile is not None else first).files
    if reference is subject.files or _one_vocabulary(subject.files, reference, texts):
        return reference
    if named is None:
        return None
    raise ModelError(f"expected models with the vocabulary of {named.source}, got another one in {subject.name}")


def _one_vocabulary(one: ModelFiles, other: ModelFiles, texts: Sequence[EvalText]) -> bool:
    """As many tokens, and all texts read alike."""
    sizes = [files.config.get_text_config().vocab_size for files in (one, other)]
    return sizes[0] == sizes[1] and all(text.of[one].fingerprint == text.of[other].fingerprint for text in texts)
