"""A tiny model on disk, as a user would have one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.llm.families import tiny, tiny_tokenizer


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny products are slower on several threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of eight tiny blocks with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tiny("Llama", num_hidden_layers=8).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
