"""A tiny model on disk, as a user would have one, banks of all families, and searches over banks."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from discopt_llm import report
from discopt_llm.bank import Bank
from discopt_llm.bank_search import CompressRequest, QuantizeRequest, SparsifyRequest
from discopt_llm.banks import BankRequest, make_bank
from discopt_llm.build import build_bank
from tests.llm import handmade
from tests.llm.banks import loaded, plan
from tests.llm.families import tiny, tiny_tokenizer
from tests.llm.searches import small_search, write_notes


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


@pytest.fixture(scope="session")
def bank_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Bank]:
    """The bank of a family and a kind, built when first asked for."""

    @cache
    def build(family: str, kind: str) -> Bank:
        return build_bank(plan(loaded(family), kind), tmp_path_factory.mktemp("bank") / "bank", quiet=True)

    return build


@pytest.fixture(scope="session")
def _handmade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("handmade") / "bank"
    handmade.build(path).finish()
    return path


@pytest.fixture
def bank_folder(_handmade: Path, tmp_path: Path) -> Path:
    """A finished bank of one's own, made by hand."""
    shutil.copytree(_handmade, tmp_path / "bank")
    return tmp_path / "bank"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to reach another machine fails the test."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        pytest.fail(f"tried to reach the network: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def draws() -> None:
    """For tests with pictures, where the others have none."""


@pytest.fixture
def _no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than all else in a search of a tiny model."""
    if "draws" not in request.fixturenames:
        monkeypatch.setattr(report, "_draw", lambda *_: [])


@pytest.fixture(scope="session")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_notes(tmp_path_factory.mktemp("text") / "notes.txt")


@pytest.fixture(scope="session")
def small(model_folder: Path, notes: Path) -> dict[str, Any]:
    return small_search(model_folder, notes)


@pytest.fixture(scope="session")
def banks(model_folder: Path, notes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The folder of a bank of each kind."""
    folder = tmp_path_factory.mktemp("banks")
    asked: dict[str, Any] = {
        "model": str(model_folder),
        "calibration": str(notes),
        "calibration_tokens": 512,
        "sequence_length": 32,
    }
    requests = {
        "quantization": BankRequest(kind="quantization", bits=(2, 3, 4, 6), group_size=12, **asked),
        "sparsity": BankRequest(kind="sparsity", target=0.6, levels=9, **asked),
    }
    return {
        kind: str(make_bank(request, folder / kind, force=False, quiet=True, say=lambda line: None).path)
        for kind, request in requests.items()
    }


@pytest.fixture
def quantize(small: dict[str, Any], banks: dict[str, str]) -> QuantizeRequest:
    return QuantizeRequest(**small, bits="3", banks=(banks["quantization"],))


@pytest.fixture
def sparsify(small: dict[str, Any], banks: dict[str, str]) -> SparsifyRequest:
    return SparsifyRequest(**small, sparsity="60%", banks=(banks["sparsity"],))


@pytest.fixture
def compress(small: dict[str, Any], banks: dict[str, str]) -> CompressRequest:
    return CompressRequest(**small, size="0.4x", banks=tuple(banks.values()))


@pytest.fixture
def unbuilt(small: dict[str, Any]) -> QuantizeRequest:
    """It builds its bank itself."""
    return QuantizeRequest(**small, bits="3", widths=(2, 3, 4), group_size=12, bank_tokens=256)
