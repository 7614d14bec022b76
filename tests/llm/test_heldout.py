from __future__ import annotations

import math

import numpy as np
import pytest

from discopt_llm.drop import DropLevels
from discopt_llm.evaluator import TEACHER, Evaluator
from discopt_llm.heldout import Method, heldout_rows, heldout_scores, standard_error
from tests.llm.banks import calibration, loaded


def test_the_rows_are_means_over_the_sequences() -> None:
    model, text = loaded("llama"), calibration(count=5)
    levels = DropLevels(model.anatomy)
    evaluator = Evaluator(model, levels)
    profile = np.array([1, 0, 1, 1, 0, 1, 1, 1], dtype=np.int16)
    methods = [Method("dense", np.full(8, TEACHER, dtype=np.int16), 0), Method("some", profile, 7)]
    scores = heldout_scores(evaluator, np.stack([m.profile for m in methods]), text, quiet=True)
    rows = heldout_rows(evaluator, levels, methods, text, quiet=True)
    assert scores.kl.shape == scores.nll.shape == scores.disagreement.shape == (2, 5)
    for i, row in enumerate(rows):
        assert row["kl"] == pytest.approx(scores.kl[i].mean(), abs=1e-9)
        assert row["kl_error"] == pytest.approx(scores.kl[i].std(ddof=1) / math.sqrt(5), abs=1e-9)
        assert row["perplexity"] == pytest.approx(math.exp(scores.nll[i].mean()))
        assert row["agreement"] == pytest.approx(1 - scores.disagreement[i].mean())
    assert rows[1]["tokens"] == 7


def test_one_sequence_has_no_standard_error() -> None:
    assert np.isnan(standard_error(np.ones((2, 1)))).all()
    assert standard_error(np.array([1.0, 3.0])) == pytest.approx(1)
