"""Models and students measured one after another, on texts and on tasks, with their reference beside them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel

from discopt.progress import task
from discopt_llm.evaluator import TEACHER, Evaluator
from discopt_llm.export.student import StudentModel
from discopt_llm.heldout import MEASURES, HeldoutScores, Measure, gather_scores
from discopt_llm.models import LoadedModel, ModelFiles, with_anatomy
from discopt_llm.students import read_student, student_
from discopt_llm.subjects import EvalText, Subject
from discopt_llm.whole import measure_whole

if TYPE_CHECKING:
    from discopt_llm.tasks import Tasks

__all__ = ["SideBySide"]


@dataclass(eq=False)
class SideBySide:
    """Measures subjects, and keeps what came out."""

    texts: Sequence[EvalText]
    tasks: Tasks | None
    device: torch.device
    dtype: torch.dtype
    quiet: bool = False
    scores: dict[tuple[EvalText, Subject], HeldoutScores] = field(default_factory=dict)  # (1, s) each
    bytes: dict[Subject, int] = field(default_factory=dict)
    answers: dict[Subject, list[dict[str, Any]]] = field(default_factory=dict)  # to the tasks

    def measure(self, reference: ModelFiles | None, subjects: Sequence[Subject]) -> None:
        """Measure subjects with the same reference; it stays in memory, other models come one after another."""
        teacher = None if reference is None else self._open(reference)
        for files in dict.fromkeys(subject.files for subject in subjects):
            of_model = [subject for subject in subjects if subject.files is files]
            if teacher is not None and files is reference:
                self._measure_together(teacher, of_model)
                self._finish(teacher, of_model)
            else:
                self._measure_apart(files, of_model, teacher)

    def _open(self, files: ModelFiles) -> _Opened:
        return _Opened(files, files.load(self.device, self.dtype))

    def _measure_together(self, teacher: _Opened, subjects: Sequence[Subject]) -> None:
        """The reference and its students, which share what they have in common."""
        (itself,) = (subject for subject in subjects if subject.profile is None)
        students = teacher.read(subjects)
        if not students:
            self._gather(teacher, [itself], partial(measure_whole, teacher.model, None))
        together = [itself]  # with the first student
        for subject, student in students.items():
            together.append(subject)
            rows = [student.profile if s is subject else np.full_like(student.profile, TEACHER) for s in together]
            evaluator = Evaluator(teacher.loaded, student.levels)
            self._gather(teacher, together, partial(evaluator.measure, np.stack(rows), fitnesses=MEASURES))
            together = []

    def _measure_apart(self, files: ModelFiles, subjects: Sequence[Subject], teacher: _Opened | None) -> None:
        """A model that is not the reference, and its students."""
        opened = self._open(files)
        opened.read(subjects)
        measure = partial(measure_whole, opened.model, None if teacher is None else teacher.model)
        for subject in subjects if self.texts else ():
            with opened.as_(subject):
                self._gather(opened, [subject], measure)
        self._finish(opened, subjects)

    def _gather(self, opened: _Opened, subjects: Sequence[Subject], measure: Measure) -> None:
        """Measure subjects together on all texts."""
        texts = [(text, text.of[opened.files]) for text in self.texts]
        sequences = sum(len(of_model.sequences) for _, of_model in texts)
        label = " and ".join(subject.name for subject in subjects)
        with task(label, sequences, unit="sequences", quiet=self.quiet) as progress:
            for text, of_model in texts:
                found = gather_scores(measure, of_model, advance=progress.advance)
                for i, subject in enumerate(subjects):
                    self.scores[text, subject] = found.row(i)

    def _finish(self, opened: _Opened, subjects: Sequence[Subject]) -> None:
        """What does not depend on the texts."""
        for subject in subjects:
            self.bytes[subject] = opened.bytes(subject)
            if self.tasks is not None and subject.asked:
                with opened.as_(subject):
                    self.answers[subject] = self.tasks.scores(
                        opened.model, opened.files.tokenizer, label=subject.name, quiet=self.quiet
                    )


@dataclass(frozen=True, eq=False)
class _Opened:
    """A model in memory, and its students once they are read."""

    files: ModelFiles
    model: PreTrainedModel
    _students: dict[Subject, StudentModel] = field(default_factory=dict)

    @cached_property
    def loaded(self) -> LoadedModel:
        """With its anatomy, which is read only where there are students."""
        return with_anatomy(self.files, self.model)

    def read(self, subjects: Sequence[Subject]) -> dict[Subject, StudentModel]:
        """The students among the subjects; what is wrong with any of them comes out before one is measured."""
        for subject in subjects:
            if subject.profile is not None:
                read = read_student(subject.profile, self.loaded, banks=subject.banks)
                self._students[subject] = StudentModel(self.loaded, *read)
        return self._students

    def as_(self, subject: Subject) -> AbstractContextManager[None]:
        """The model as the subject has it, while inside."""
        student = self._students.get(subject)
        return nullcontext() if student is None else student_(student.levels, student.profile)

    def bytes(self, subject: Subject) -> int:
        """Of the files with the model's weights, or of a file with the student's."""
        student = self._students.get(subject)
        if student is None:
            return self.files.bytes
        if student.kind == "drop":  # which counts weights as they are in memory; banks leave the others in 16 bits
            return student.bytes * 2 // self.model.dtype.itemsize
        return student.bytes
