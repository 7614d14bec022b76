"""Compressed models as an objective of the engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from discopt.objective import Objective, Query, evaluate
from discopt_llm.anatomy import read_anatomy
from discopt_llm.calibration import Calibration
from discopt_llm.drop import DropLevels, drop_space
from discopt_llm.errors import DataError
from discopt_llm.evaluator import Evaluator
from discopt_llm.fitness import KL
from discopt_llm.models import LoadedModel
from discopt_llm.objective import CompressionObjective
from tests.llm import reference
from tests.llm.families import FAMILIES, tiny_tokenizer


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    llama = FAMILIES["llama"]()
    return LoadedModel(llama, tiny_tokenizer(), "test", read_anatomy(llama))


@pytest.fixture
def objective(model: LoadedModel) -> CompressionObjective:
    sequences = torch.randint(200, (6, 16), generator=torch.Generator().manual_seed(0))
    return CompressionObjective(Evaluator(model, DropLevels(model.anatomy)), Calibration(sequences, "random"), KL())


def rows(model: LoadedModel, k: int) -> np.ndarray:
    return drop_space(model.anatomy, 0.5).random(k, np.random.default_rng(0))


def test_it_measures_all_rows_on_the_sample_of_the_query(model: LoadedModel, objective: CompressionObjective) -> None:
    assert isinstance(objective, Objective)
    population = rows(model, 3)
    losses = evaluate(objective, Query(population, 40, seed=7))
    sample = objective.calibration.sample(40, 7)
    levels = objective.evaluator.levels
    (expected,) = reference.plain_losses(model.model, levels, population, sample, [reference.kl])
    assert losses.shape == (3, 3)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)


def test_the_same_query_has_the_same_answer_and_another_seed_another(
    model: LoadedModel, objective: CompressionObjective
) -> None:
    population = rows(model, 3)
    first, again, other = (objective.evaluate(Query(population, 40, seed)) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_more_tokens_than_there_are_is_refused(model: LoadedModel, objective: CompressionObjective) -> None:
    with pytest.raises(DataError, match="has 96 tokens, asked for a sample of 97"):
        objective.evaluate(Query(rows(model, 1), 97, seed=0))
