"""Text from the hub, with its answers made up."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from discopt_llm import sources
from discopt_llm.calibration import load_calibration
from discopt_llm.errors import DataError
from discopt_llm.evaluation import EvalRequest, evaluate
from discopt_llm.sources import open_text
from tests.llm.families import tiny
from tests.llm.texts import ROWS, decode, with_bos, write_jsonl


class Hub:
    """Stands in for the hub: rows of every split, and what was asked for and read."""

    def __init__(self, splits: dict[str, list[Any]]) -> None:
        self.splits = splits
        self.asked: list[tuple[str, str | None, str | None]] = []
        self.read = 0

    def load_dataset(self, name: str, config: str | None = None, *, split: str | None, streaming: bool) -> Any:
        assert streaming
        self.asked.append((name, config, split))
        return self._rows(split) if split else {name: self._rows(name) for name in self.splits}

    def _rows(self, split: str) -> Iterator[Any]:
        for row in self.splits[split]:
            self.read += 1
            if isinstance(row, Exception):
                raise row
            yield row


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub({split: [{"text": f"{split} {row}"} for row in ROWS] for split in ("train", "validation", "test")})
    monkeypatch.setattr(datasets, "load_dataset", fake.load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, **_: None)
    return fake


@pytest.mark.parametrize(
    ("source", "role", "asked"),
    [
        ("wikitext2", "search", ("Salesforce/wikitext", "wikitext-2-raw-v1", "train")),
        ("wikitext2", "heldout", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")),
        ("c4", "search", ("allenai/c4", "en", "train")),
        ("c4", "heldout", ("allenai/c4", "en", "validation")),
        ("fineweb-edu", "search", ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train")),
        ("fineweb-edu", "heldout", ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train")),
        ("hf:some/name", "search", ("some/name", None, None)),
        ("hf:some/name:small:test", "search", ("some/name", "small", "test")),
        ("hf:some/name::train:text", "heldout", ("some/name", None, "train")),
    ],
)
def test_each_role_reads_its_own_split(
    source: str, role: sources.Role, asked: tuple[str, str, str], hub: Hub, tokenizer: PreTrainedTokenizerFast
) -> None:
    load_calibration(source, tokenizer, sequence_length=8, tokens=16, role=role)
    assert hub.asked == [asked]


@pytest.mark.parametrize(
    ("splits", "search", "heldout"),
    [
        (("train", "validation", "test"), "train", "test"),
        (("validation", "train"), "train", "validation"),
        (("train",), "train", "train"),
        (("test",), "test", "test"),
        (("first", "second"), "first", "first"),
    ],
)
def test_splits_are_chosen_by_name_and_a_single_one_is_divided(
    splits: tuple[str, ...], search: str, heldout: str, hub: Hub
) -> None:
    hub.splits = {split: [{"text": f"{split} {row}"} for row in ROWS] for split in splits}
    seen = {role: list(open_text("hf:some/name", role).documents) for role in ("search", "heldout", "all")}
    assert {text.split()[0] for text in seen["search"]} == {search}
    assert {text.split()[0] for text in seen["heldout"]} == {heldout}
    assert not set(seen["search"]) & set(seen["heldout"])
    assert seen["all"] == [f"{heldout} {row}" for row in ROWS]


@pytest.mark.parametrize("source", ["fineweb-edu", "hf:some/name:small:train"])
def test_one_split_for_both_roles_is_divided(source: str, hub: Hub) -> None:
    search, heldout = (list(open_text(source, role).documents) for role in ("search", "heldout"))
    assert sorted(search + heldout) == sorted(f"train {row}" for row in ROWS)


def test_wikitext_is_joined_by_blank_lines_with_its_empty_lines(hub: Hub) -> None:
    lines = ["", " = A title = \n", "", " Text of it . \n", " More of it . \n", ""]
    hub.splits["test"] = [{"text": line} for line in lines]
    calibration = load_calibration("wikitext2", with_bos(), sequence_length=1, role="heldout")
    assert decode(calibration) == "\n\n".join(lines)


def test_c4_is_its_first_1100_documents(hub: Hub) -> None:
    hub.splits["validation"] = [{"text": f"document {i}"} for i in range(3000)]
    calibration = load_calibration("c4", with_bos(), sequence_length=1, role="heldout")
    assert decode(calibration) == "\n\n".join(f"document {i}" for i in range(1100))
    assert hub.read == 1100


@pytest.mark.parametrize(("source", "split", "documents"), [("wikitext2", "test", 1300), ("c4", "validation", 1100)])
def test_perplexity_on_the_benchmarks_is_the_published_one(
    source: str, split: str, documents: int, hub: Hub, tmp_path: Path
) -> None:
    """One text joined by blank lines, no BOS anywhere, sequences that do not overlap, the first token of each given."""
    texts = [f"{i * 7919:06}" for i in range(1300)]
    hub.splits[split] = [{"text": text} for text in texts]
    model, tokenizer = tiny("Llama"), with_bos()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = torch.tensor(tokenizer("\n\n".join(texts[:documents]), add_special_tokens=False).input_ids)
    sequences = ids[: len(ids) // 64 * 64].view(-1, 64)
    with torch.no_grad():
        logits = model(sequences).logits.double()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), sequences[:, 1:].flatten())
    asked = EvalRequest(what=(str(tmp_path),), data=(source,), sequence_length=64)
    (row,) = evaluate(asked, quiet=True)["rows"]
    assert row["tokens"] == sequences.numel()
    assert row["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-5)


@pytest.mark.parametrize("source", ["wikitext2", "c4", "fineweb-edu", "hf:some/name"])
@pytest.mark.parametrize("role", ["search", "heldout"])
def test_only_the_documents_needed_are_streamed(
    source: str, role: sources.Role, hub: Hub, tokenizer: PreTrainedTokenizerFast
) -> None:
    hub.splits = {split: [{"text": f"{i:07} {'x' * 92}"} for i in range(10_000)] for split in hub.splits}
    load_calibration(source, tokenizer, sequence_length=100, tokens=900, role=role)
    assert hub.read <= 80  # 9 documents; 8 times as many for a joined text, 5 for a divided one


def test_without_a_number_a_default_is_streamed(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert sources.HUB_TOKENS == 131_072
    monkeypatch.setattr(sources, "HUB_TOKENS", 100)
    assert load_calibration("c4", tokenizer, sequence_length=16).tokens == 112
    hub.splits["train"] = [{"text": "x" * 40}]
    assert load_calibration("c4", tokenizer, sequence_length=16).tokens == 32  # all there is
    assert load_calibration("c4", tokenizer, sequence_length=16, role="heldout").tokens > 1000


def test_settings_of_datasets_are_put_back(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    before = {"STREAMING_READ_MAX_RETRIES": 77, "STREAMING_OPEN_MAX_RETRIES": 78, "HF_HUB_OFFLINE": False}
    for name, value in before.items():
        monkeypatch.setattr(datasets.config, name, value)
    datasets.enable_progress_bars()
    seen: list[int] = []

    def rows(split: str) -> Iterator[dict[str, str]]:
        for i in range(10_000):
            seen.append(datasets.config.STREAMING_READ_MAX_RETRIES)
            yield {"text": f"document {i}"}

    hub._rows = rows  # type: ignore[method-assign]
    load_calibration("c4", tokenizer, sequence_length=8, tokens=64)
    assert set(seen) == {sources.HUB_RETRIES}
    assert {name: getattr(datasets.config, name) for name in before} == before
    assert not datasets.are_progress_bars_disabled()


@pytest.mark.usefixtures("offline")
def test_a_folder_in_the_hubs_layout_is_read_by_datasets_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "mine").mkdir()
    write_jsonl(tmp_path / "mine" / "train.jsonl", [f"train {row}" for row in ROWS])
    write_jsonl(tmp_path / "mine" / "test.jsonl", [f"test {row}" for row in ROWS])
    for role, split in (("search", "train"), ("heldout", "test")):
        calibration = load_calibration("hf:mine", tokenizer, sequence_length=1, role=role)  # type: ignore[arg-type]
        assert decode(calibration) == "\n\n".join(f"{split} {row}" for row in ROWS)
    with pytest.raises(DataError, match="cannot load hf:mine::nosuch: Bad split: nosuch"):
        load_calibration("hf:mine::nosuch", tokenizer, sequence_length=1)
    with pytest.raises(DataError, match="cannot load hf:mine:nosuch: BuilderConfig 'nosuch' not found"):
        load_calibration("hf:mine:nosuch", tokenizer, sequence_length=1)
    with pytest.raises(DataError, match="hf:mine:::body: no column 'body'; there is 'id', 'text'"):
        load_calibration("hf:mine:::body", tokenizer, sequence_length=1)


def test_without_a_network_the_hub_is_tried_once_and_then_the_cache(
    monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    looked_up = 0

    def no_name(*args: Any, **kwargs: Any) -> Any:
        nonlocal looked_up
        looked_up += 1
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    huggingface_hub.close_session()
    message = r"cannot reach the Hugging Face hub for c4 \(.*Name or service not known\), and the local cache does not"
    with pytest.raises(DataError, match=message):
        load_calibration("c4", tokenizer, sequence_length=8)
    assert looked_up <= 2  # `huggingface_hub` asks once in a process on its own account; `datasets` would ask 6 times


def test_a_dataset_that_does_not_exist_is_refused(
    monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    def missing(self: Any, name: str, **_: Any) -> Any:
        error = huggingface_hub.errors.RepositoryNotFoundError
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", missing)
    with pytest.raises(DataError, match="the Hugging Face hub has no dataset 'no/such'"):
        load_calibration("hf:no/such", tokenizer, sequence_length=8)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["json", "parquet", "a b", "a/b/c"])
def test_a_name_no_dataset_can_have_is_refused_without_asking(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=f"the Hugging Face hub has no dataset '{name}'"):
        load_calibration(f"hf:{name}", tokenizer, sequence_length=8)


@pytest.mark.parametrize("source", ["hf:", "hf::en", "hf:a:b:c:d:e"])
def test_a_malformed_hub_source_is_refused(source: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=rf"expected hf:NAME\[:CONFIG.*, got '{source}'"):
        load_calibration(source, tokenizer, sequence_length=8)


def test_a_stream_that_breaks_is_refused_with_the_reason(hub: Hub, tokenizer: PreTrainedTokenizerFast) -> None:
    hub.splits["train"] = [{"text": "one"}, ConnectionError("Server Disconnected\nand more")]
    with pytest.raises(DataError, match=r"^cannot load c4: Server Disconnected$"):
        load_calibration("c4", tokenizer, sequence_length=8)


def test_rows_without_text_are_refused(hub: Hub, tokenizer: PreTrainedTokenizerFast) -> None:
    hub.splits["train"] = [{"text": ["one"], "body": "two"}]
    with pytest.raises(DataError, match="c4: column 'text' holds list, expected text"):
        load_calibration("c4", tokenizer, sequence_length=8)
    hub.splits["train"] = [{"body": "two"}]
    with pytest.raises(DataError, match="c4: no column 'text'; there is 'body'"):
        load_calibration("c4", tokenizer, sequence_length=8)


def test_the_hub_without_datasets_is_refused(
    monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="needs the package 'datasets', which is not installed"):
        load_calibration("wikitext2", tokenizer, sequence_length=8)
