"""Zero-shot tasks by lm-eval (the extra `eval`), with models that are in memory already."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TextIO

from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from discopt.progress import Task, task
from discopt_llm.errors import DataError, one_line

__all__ = ["Tasks"]

BOOTSTRAPS = 1000  # for the standard errors of metrics that are no means


@dataclass(frozen=True, eq=False)
class Tasks:
    """Tasks with their questions, to be put to one model after another."""

    found: Mapping[str, Any]  # as lm-eval's TaskManager loads them
    limit: int | None  # questions of each task; None: all
    batch_size: int  # answers measured at a time

    @classmethod
    def load(cls, names: Sequence[str], *, folder: Path | None, limit: int | None, batch_size: int) -> Tasks:
        """Tasks, groups or tags of lm-eval, or of the YAML files in a folder; raises DataError.

        A task that does not say how many examples go before a question has none.
        """
        if folder is not None and not folder.is_dir():
            raise DataError(f"expected a folder with tasks, got {folder}, and no such folder exists")
        with _quiet():
            manager = TaskManager(include_path=folder, include_defaults=False)
            if any(name not in manager.all_tasks for name in names):  # reading its own 14,000 takes a while
                manager = TaskManager(include_path=folder)
            for name in names:
                if name not in manager.all_tasks:
                    raise DataError(f"lm-eval has no task {name!r}{_meant(name, manager.all_tasks)}")
            try:
                found = manager.load([*names])
                for one in found["tasks"].values():
                    if one.get_config("num_fewshot") is None:
                        one.set_config(key="num_fewshot", value=0)
                    one.set_fewshot_seed(seed=0)
            except Exception as error:  # reads data sets, and runs what a task's file says
                raise DataError(f"cannot read the tasks {', '.join(names)}: {one_line(error)}") from error
        return cls(found, limit, batch_size)

    def scores(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, label: str, quiet: bool
    ) -> list[dict[str, Any]]:
        """What a model, as it is now, scores: rows of `task`, `metric`, `value`, `error` (standard), `questions`.

        Raises DataError where a task cannot be put to the model.
        """
        stream = sys.stderr
        try:
            with _quiet():
                watched = _Watched(model, tokenizer, self.batch_size, lambda total: _bar(label, total, quiet, stream))
                answer: Any = evaluate(
                    lm=watched,
                    task_dict=self.found,
                    limit=self.limit,
                    bootstrap_iters=BOOTSTRAPS,
                    log_samples=False,
                )
        except Exception as error:  # the code of tasks and metrics may raise anything
            raise DataError(f"cannot put the tasks to {label}: {one_line(error)}") from error
        return [row for name, metrics in answer["results"].items() for row in _rows(name, metrics, answer)]


class _Watched(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """lm-eval's view of a model, with our progress bar for choices between given answers."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        bar: Callable[[int], Task],
    ) -> None:
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, softmax_dtype="float32"
        )
        self._bar = bar

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        done = 0
        with self._bar(len(requests)) as bar:

            def advance(_: Any, args: tuple[Any, ...], __: Any) -> None:
                nonlocal done
                done += len(args[0])
                bar.advance(len(args[0]))

            hook = self.model.register_forward_hook(advance)
            try:
                answer: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
            finally:
                hook.remove()
            bar.advance(len(requests) - done)  # answers of one token with the same question take one pass
        return answer


def _bar(label: str, total: int, quiet: bool, stream: TextIO) -> Task:
    return task(f"{label}, tasks", total, unit="answers", quiet=quiet, stream=stream)


def _rows(name: str, metrics: Mapping[str, Any], answer: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The metrics of a task or group: "acc,none", each beside its "acc_stderr,none"."""
    for key, value in metrics.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = metrics.get(f"{metric}_stderr,{chosen}")
        yield {
            "task": name,
            "metric": metric if chosen == "none" else f"{metric}, {chosen}",
            "value": float(value),
            "error": float(error) if isinstance(error, int | float) else None,
            "questions": answer["n-samples"].get(name, {}).get("effective"),
        }


def _meant(name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name, known)
    return f"; did you mean {' or '.join(close)}?" if close else ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing of what lm-eval and its data sets print, log and warn of, while inside."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
