"""Zero-shot tasks of lm-eval, offline: a task file of our own, against log-likelihoods by hand."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import datasets
import pytest
import torch
from transformers import PreTrainedModel

from discopt.errors import DiscoptError
from discopt_llm.bank_search import QuantizeRequest
from discopt_llm.drop_search import DropRequest
from discopt_llm.errors import DataError
from discopt_llm.evaluation import EvalRequest, evaluate
from discopt_llm.models import load_model
from discopt_llm.students import read_student, student_
from tests.llm.commands import call, refusal
from tests.llm.families import tiny_tokenizer
from tests.llm.searches import run

pytest.importorskip("lm_eval")

RNG = random.Random(0)
# Answers of about the same length: a random model would always take the shortest.
QUESTIONS: list[dict[str, Any]] = [
    {
        "question": f"Number {i} is",
        "choices": ["".join(RNG.choices(ascii_lowercase, k=length)) for length in (5, 5, 6, 5)],
        "answer": i % 4,
    }
    for i in range(16)
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the task `sums`."""
    (tmp_path / "tasks").mkdir()
    file = tmp_path / "tasks" / "sums.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (tmp_path / "tasks" / "sums.yaml").write_text(TASK.format(name="sums", file=file))
    return tmp_path / "tasks"


def asked(*what: object, folder: Path, **changes: Any) -> EvalRequest:
    return EvalRequest(**{"what": tuple(map(str, what)), "tasks": ("sums",), "tasks_folder": folder, **changes})


@torch.no_grad()
def by_hand(model: PreTrainedModel, questions: Sequence[dict[str, Any]] = QUESTIONS) -> dict[str, float]:
    """Accuracy by the sum of the log-likelihoods of an answer's tokens, and by the sum over its length."""
    tokenizer = tiny_tokenizer()
    right = {"acc": 0, "acc_norm": 0}
    for question in questions:
        start = tokenizer(question["question"]).input_ids
        sums = []
        for choice in question["choices"]:
            answer = tokenizer(f" {choice}").input_ids
            log_p = model(torch.tensor([start + answer])).logits[0].double().log_softmax(-1)
            sums.append(sum(log_p[len(start) + i - 1, token].item() for i, token in enumerate(answer)))
        normed = [total / len(choice) for total, choice in zip(sums, question["choices"], strict=True)]
        for metric, scores in (("acc", sums), ("acc_norm", normed)):
            right[metric] += scores.index(max(scores)) == question["answer"]
    return {metric: count / len(questions) for metric, count in right.items()}


def values(rows: Sequence[dict[str, Any]], model: object) -> dict[str, float]:
    return {row["metric"]: row["value"] for row in rows if row["model"] == str(model)}


def test_a_model_scores_what_its_log_likelihoods_say(model_folder: Path, folder: Path) -> None:
    found = evaluate(asked(model_folder, folder=folder), quiet=True)
    assert found["data"] == found["rows"] == []
    expected = by_hand(load_model(str(model_folder)).model)
    assert values(found["tasks"], model_folder) == pytest.approx(expected)
    assert {row["task"] for row in found["tasks"]} == {"sums"}
    accuracy = expected["acc"]
    error = (accuracy * (1 - accuracy) / (len(QUESTIONS) - 1)) ** 0.5
    assert found["tasks"][0]["error"] == pytest.approx(error)
    assert {row["questions"] for row in found["tasks"]} == {len(QUESTIONS)}


@pytest.mark.parametrize("kind", ["drop", "quantize"])
def test_a_student_answers_without_being_written(
    kind: str, small: dict[str, Any], quantize: QuantizeRequest, model_folder: Path, folder: Path, tmp_path: Path
) -> None:
    drop = DropRequest(**small, sparsity=0.5)
    run(replace(drop if kind == "drop" else replace(quantize, bits="2"), generations=0), tmp_path / "run")
    loaded = load_model(str(model_folder))
    with student_(*read_student(str(tmp_path / "run"), loaded)):
        expected = by_hand(loaded.model)
    assert expected != by_hand(loaded.model)  # so that it shows who answered
    found = evaluate(asked(tmp_path / "run", model_folder, folder=folder), quiet=True)
    assert values(found["tasks"], tmp_path / "run") == pytest.approx(expected)
    assert values(found["tasks"], model_folder) == pytest.approx(by_hand(loaded.model))


def test_a_limit_asks_the_first_questions(model_folder: Path, folder: Path) -> None:
    found = evaluate(asked(model_folder, folder=folder, limit=3, batch_size=2), quiet=True)
    expected = by_hand(load_model(str(model_folder)).model, QUESTIONS[:3])
    assert values(found["tasks"], model_folder) == pytest.approx(expected)
    assert {row["questions"] for row in found["tasks"]} == {3}


def test_text_and_tasks_go_together(model_folder: Path, folder: Path) -> None:
    words = ["eval", model_folder, "--data", "builtin", "--tokens", 64, "--sequence-length", 32]
    words += ["--tasks", "sums", "--tasks-folder", folder]
    result = call(*words)
    text, tasks = result.stdout.split("\n\n")
    assert text.startswith("On what a search may not have seen of builtin")
    title, heads, *rows = tasks.strip().splitlines()
    assert title == "Tasks:"
    assert heads.split() == ["task", "metric", "model", "value", "±", "questions"]
    assert [row.split()[:3] for row in rows] == [["sums", metric, str(model_folder)] for metric in ("acc", "acc_norm")]
    *_, last = result.stderr.strip().splitlines()
    assert last.startswith(f"{model_folder}, tasks: 64 of 64 answers · 100%")
    answer = call(*words, "--json", "--quiet")
    assert answer.stderr == ""
    assert len(json.loads(answer.stdout)["tasks"]) == 2


def test_tasks_that_cannot_be_read_are_refused_before_weights_are(
    model_folder: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from discopt_llm import tasks
    from discopt_llm.models import ModelFiles

    monkeypatch.setattr(ModelFiles, "load", lambda *_: pytest.fail("weights were read"))
    own = tasks.TaskManager

    def local(include_path: Path, include_defaults: bool = True) -> Any:
        return own(include_path=include_path, include_defaults=False)  # its own tasks take long to look up

    monkeypatch.setattr(tasks, "TaskManager", local)
    with pytest.raises(DataError, match=r"lm-eval has no task 'sum'; did you mean sums\?"):
        evaluate(asked(model_folder, folder=folder, tasks=("sums", "sum")), quiet=True)
    with pytest.raises(DataError, match=r"expected a folder with tasks, got .*nowhere, and no such folder exists"):
        evaluate(asked(model_folder, folder=folder / "nowhere"), quiet=True)
    (folder / "sums.jsonl").unlink()
    with pytest.raises(DataError, match=r"cannot read the tasks sums: .*sums\.jsonl"):
        evaluate(asked(model_folder, folder=folder), quiet=True)


def test_without_lm_eval_the_command_says_what_to_install(
    model_folder: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(DiscoptError, match="need lm-eval: pip install 'discopt-search"):
        evaluate(asked(model_folder, folder=folder), quiet=True)
    line = refusal(call("eval", model_folder, "--tasks", "sums", "--tasks-folder", folder))
    assert line == "error: zero-shot tasks need lm-eval: pip install 'discopt-search[eval]'"
