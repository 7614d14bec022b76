"""Readers of profiles, banks, models and text on damaged and hostile input: what they refuse, in one line of ours."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer

from discopt import DiscoptError
from discopt.encoding import checksum
from discopt.folder import request_of
from discopt_llm import ggml
from discopt_llm.bank import Bank, BankWriter
from discopt_llm.bank_blocks import StoredBlock
from discopt_llm.bank_manifest import Manifest
from discopt_llm.bank_search import CompressRequest, QuantizeRequest, SparsifyRequest
from discopt_llm.banks import BankRequest
from discopt_llm.budget import MEASURES, Budget
from discopt_llm.calibration import load_calibration
from discopt_llm.cli_run import parse_blocks, parse_names, parse_widths
from discopt_llm.drop_search import DropRequest, share_of
from discopt_llm.fitness import fitness_by_name
from discopt_llm.memory import Memory
from discopt_llm.models import ModelFiles, parse_device, parse_dtype
from discopt_llm.profile import BankReference, Profile, read_profile
from discopt_llm.profile_text import decisions_from_text, labels_from_text, text_from_decisions, text_from_labels
from discopt_llm.sources import open_text
from tests.fuzzing import Reader, Rng, as_json, both, fuzz, mutated_bytes, mutated_json, mutated_text, shared_out
from tests.llm import handmade
from tests.llm.families import FAMILIES, tiny_tokenizer
from tests.llm.test_models import write_gguf
from tests.llm.texts import ROWS, write_jsonl, write_parquet, write_txt

DROP = "none\nattn\nattn+mlp\nmlp\n"
LABELS = "layers.0.up_proj: 3\nlayers.1.up_proj: quantization:4\nlayers.2.a: -2\nb: Q4_K\nc: drop\n"
FEW, MANY = 1000, 50_000  # inputs in all


def bank_profile() -> Profile:
    return Profile(
        kind="mixed",
        unit="layer",
        model_source="a/model",
        model_fingerprint="f" * 64,
        names=("layers.0.a", "layers.0.b", "layers.1.a"),
        levels=np.array([0, 3, 1]),
        banks=(BankReference("banks/a", "a" * 64), BankReference("banks/b", "b" * 64)),
        labels=("drop", "quantization:3", "sparsity:-2"),
    )


def drop_profile() -> Profile:
    return Profile("drop", "block", "a/model", "f" * 64, ("0", "1", "2"), np.array([0, 1, 1]))


def damaged_block(data: bytes) -> Callable[[Rng], Iterator[bytes]]:
    """A block's file with its own description mutated and sealed again, or safetensors' header, or its bytes."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    document = json.loads(header["__metadata__"]["discopt"])

    def file(head: bytes) -> bytes:
        return len(head).to_bytes(8, "little") + head + data[8 + size :]

    def seal(document: Any) -> Any:
        if isinstance(document, dict) and "state" in document:
            with contextlib.suppress(ValueError, RecursionError):
                return {**document, "checksum": checksum(json.loads(as_json(document["state"])))}
        return document

    def inputs(rng: Rng) -> Iterator[bytes]:
        described = mutated_json([document], rng, seal)
        heads, raw = mutated_json([header], rng), mutated_bytes([data[: 8 + size + 64]], rng)
        while True:
            match rng.integers(4):
                case 0:
                    yield file(next(heads))
                case 1:
                    yield next(raw) + data[8 + size + 64 :]
                case _:
                    text = next(described).decode()
                    yield file(json.dumps({**header, "__metadata__": {"discopt": text}}).encode())

    return inputs


def manifest_sealed(document: Any) -> Any:
    if not isinstance(document, dict):
        return document
    own = {name: document.get(name, []) for name in ("header", "files", "layers")}
    try:
        return {**document, "fingerprint": checksum(json.loads(as_json(own)))}
    except (ValueError, RecursionError):
        return document


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tiny model in `model`."""
    folder = tmp_path_factory.mktemp("fuzz")
    FAMILIES["llama"]().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    return folder


def profiles(folder: Path) -> Reader:
    def read(data: bytes) -> None:
        (folder / "profile").write_bytes(data)
        found = read_profile(folder / "profile")
        if isinstance(found, Profile):
            assert Profile.from_json(found.to_json()).to_json() == found.to_json()
        elif isinstance(found, dict):
            assert labels_from_text(text_from_labels(found)) == found
        else:
            assert decisions_from_text(text_from_decisions(found)).tolist() == found.tolist()

    documents = [json.loads(profile.to_json()) for profile in (bank_profile(), drop_profile())]

    def inputs(rng: Rng) -> Iterator[bytes]:
        kinds = both(documents)(rng), mutated_bytes([DROP.encode(), LABELS.encode()], rng)
        while True:
            yield next(kinds[rng.choice(2, p=[0.7, 0.3])])

    return Reader(read, inputs)


def manifests(folder: Path) -> Reader:
    bank = folder / "bank"
    handmade.build(bank).finish()
    whole = json.loads((bank / "bank.json").read_bytes())
    begun = json.loads(Manifest(whole["header"], complete=False).to_json())

    def read(data: bytes) -> None:
        (bank / "bank.json").write_bytes(data)
        found = Manifest.read(bank)
        assert Manifest._of(json.loads(found.to_json())).to_json() == found.to_json()
        if found.complete:
            Bank.open(bank, verify=False)

    return Reader(read, both([whole, begun], manifest_sealed))


def unfinished(folder: Path) -> Reader:
    bank = folder / "unfinished"
    handmade.build(bank, 1)
    begun = json.loads((bank / "bank.json").read_bytes())

    def read(data: bytes) -> None:
        (bank / "bank.json").write_bytes(data)
        BankWriter.begin(bank, handmade.header())

    return Reader(read, both([begun], manifest_sealed))


def blocks(folder: Path) -> Reader:
    bank = folder / "blocks"
    header = handmade.build(bank).finish().header
    path = bank / "block-00001.safetensors"

    def read(data: bytes) -> None:
        other = folder / "block"
        other.unlink(missing_ok=True)  # the old one is memory-mapped
        other.write_bytes(data)
        stored = StoredBlock.open(other, header, 1)
        stored.verify()
        for layer in stored.layers:
            for level in np.flatnonzero(layer.present).tolist():
                stored.form(layer, level, handmade.CPU)

    return Reader(read, damaged_block(path.read_bytes()))


def text_reader(folder: Path, kind: str) -> Reader:
    path = folder / f"text{kind}"
    tokenizer = tiny_tokenizer()
    rows = [*ROWS[:5], "Grüße aus Москва 🙂", ""]
    seed = {".txt": write_txt, ".jsonl": write_jsonl, ".parquet": write_parquet}[kind](path, rows).read_bytes()

    def read(data: bytes) -> None:
        path.write_bytes(data)
        for document in open_text(str(path), "all").documents:
            assert isinstance(document, str)
            document.encode()
        load_calibration(str(path), tokenizer, sequence_length=8)

    def inputs(rng: Rng) -> Iterator[bytes]:
        raw = mutated_bytes([seed], rng)
        documents = [{"id": i, "text": row} for i, row in enumerate(rows)]
        lines = mutated_json(documents, rng)
        while True:
            if kind == ".jsonl" and rng.integers(2):
                yield b"\n".join([as_json(documents[0]), next(lines), next(lines)])
            else:
                yield next(raw)

    return Reader(read, inputs)


def plain_text(folder: Path) -> Reader:
    return text_reader(folder, ".txt")


def json_lines(folder: Path) -> Reader:
    return text_reader(folder, ".jsonl")


def parquet(folder: Path) -> Reader:
    return text_reader(folder, ".parquet")


def model_reader(folder: Path, name: str, use: Callable[[ModelFiles], Any] = lambda files: None) -> Reader:
    """One of the files of the model, and what is done with the model after it was found."""
    file = folder / "model" / name
    whole = file.read_bytes() if file.exists() else None
    seed = {"weight_map": {"lm_head.weight": "model.safetensors"}} if whole is None else json.loads(whole)

    def read(data: bytes) -> None:
        file.write_bytes(data)
        try:
            use(ModelFiles.find(str(file.parent)))
        finally:
            file.unlink() if whole is None else file.write_bytes(whole)

    return Reader(read, both([seed]))


def configs(folder: Path) -> Reader:
    return model_reader(folder, "config.json")


def tokenizers(folder: Path) -> Reader:
    return model_reader(folder, "tokenizer.json")


def tokenizer_configs(folder: Path) -> Reader:
    return model_reader(folder, "tokenizer_config.json")


def indices(folder: Path) -> Reader:
    return model_reader(folder, "model.safetensors.index.json", lambda files: files.bytes)


def weights(folder: Path) -> Reader:
    file = folder / "model" / "model.safetensors"
    whole = file.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:size])

    def inputs(rng: Rng) -> Iterator[bytes]:
        heads, raw = mutated_json([header], rng), mutated_bytes([whole[: size + 100]], rng)
        while True:
            head = next(heads)
            yield (len(head).to_bytes(8, "little") + head if rng.integers(2) else next(raw)) + whole[size:]

    def read(data: bytes) -> None:
        file.unlink()  # it may be memory-mapped
        file.write_bytes(data)
        try:
            ModelFiles.find(str(file.parent)).load(handmade.CPU, torch.float32)
        finally:
            file.unlink()
            file.write_bytes(whole)

    return Reader(read, inputs)


def gguf_files(folder: Path) -> Reader:
    file = write_gguf(FAMILIES["llama"](), folder / "tiny.gguf")
    whole = file.read_bytes()
    head = whole.index(b"output.weight") + 200  # about; what follows are numbers

    def inputs(rng: Rng) -> Iterator[bytes]:
        return (data + whole[head:] for data in mutated_bytes([whole[:head]], rng))

    def read(data: bytes) -> None:
        file.unlink()
        file.write_bytes(data)
        ModelFiles.find(str(file))

    return Reader(read, inputs)


def requests(_: Path) -> Reader:
    common: dict[str, Any] = {"model": "m", "stages": ("2@4", "1@8")}
    known = [
        BankRequest(model="m", bits=(2, 4), group_size=32),
        QuantizeRequest(**common, bits="3", banks=("a",)),
        SparsifyRequest(**common, sparsity="60%"),
        CompressRequest(**common, size="0.4x", banks=("a", "b")),
        DropRequest(**common, sparsity=0.25),
    ]

    def inputs(rng: Rng) -> Iterator[tuple[type, bytes]]:
        streams = [(type(request), mutated_json([asdict(request)], rng)) for request in known]
        while True:
            kind, stream = streams[rng.integers(len(streams))]
            data = next(stream)
            with contextlib.suppress(ValueError, RecursionError):
                json.loads(data)
                yield kind, data

    def read(given: tuple[type, bytes]) -> None:
        kind, data = given
        request = request_of(kind, json.loads(data))
        assert request_of(kind, asdict(request)) == request

    return Reader(read, inputs)


def budgets(_: Path) -> Reader:
    def read(text: str) -> None:
        for measure in MEASURES:
            with contextlib.suppress(ValueError):
                budget = Budget.parse(measure, text)
                assert Budget.parse(measure, str(budget)) == budget
        memory = Memory.parse(text)
        assert memory.device is None or memory.device > 0
        Budget.parse("size", text)

    seeds = ("2.25", "3", "120MB", "0.5GiB", "0.3x", "60%", "0.6", ".5", "1e3", "12 kB")
    return Reader(read, lambda rng: mutated_text(seeds, rng), (ValueError,))


def words(_: Path) -> Reader:
    """Options of the command line that are a few words."""
    known: dict[Callable[[str], Any], list[str]] = {
        share_of: ["0.25", "25%", "1e-3"],
        lambda text: ggml.parse_types(parse_names(text)): ["q4_k,Q8_0", "F16"],
        fitness_by_name: ["kl", "kl-topk:20", "ppl"],
        parse_device: ["cpu", "cuda:0", "auto"],
        lambda text: parse_dtype(text, handmade.CPU): ["auto", "bfloat16"],
        lambda text: parse_widths(text, "--bits"): ["2,3,4", "8"],
        parse_blocks: ["0,1,28-29", "3"],
    }
    parsers = list(known)
    chosen = parsers[0]

    def inputs(rng: Rng) -> Iterator[str]:
        nonlocal chosen
        streams = [mutated_text(seeds, rng) for seeds in known.values()]
        while True:
            number = int(rng.integers(len(parsers)))
            chosen = parsers[number]
            yield next(streams[number])

    return Reader(lambda text: chosen(text), inputs, (DiscoptError, ValueError, typer.BadParameter))


READERS: dict[Callable[[Path], Reader], int] = {  # and their shares of the inputs
    profiles: 24,
    manifests: 16,
    unfinished: 4,
    blocks: 10,
    plain_text: 8,
    json_lines: 8,
    parquet: 8,
    configs: 2,
    tokenizers: 2,
    tokenizer_configs: 2,
    indices: 2,
    weights: 1,
    gguf_files: 1,
    requests: 12,
    budgets: 12,
    words: 16,
}


@pytest.mark.parametrize(("reader", "count"), shared_out(FEW, READERS))
def test_a_reader_reads_or_refuses_in_one_line(
    reader: Callable[[Path], Reader], count: int, folder: Path, offline: None
) -> None:
    assert fuzz(reader(folder), count).inputs == count


@pytest.mark.slow
@pytest.mark.parametrize(("reader", "count"), shared_out(MANY, READERS))
def test_it_also_does_on_many_more(reader: Callable[[Path], Reader], count: int, folder: Path, offline: None) -> None:
    assert fuzz(reader(folder), count, seed=1).inputs == count
