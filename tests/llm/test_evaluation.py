"""Models and students side by side, against whole forwards in double precision."""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import normalizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from discopt_llm.bank_search import QuantizeRequest
from discopt_llm.calibration import load_calibration
from discopt_llm.drop_search import DropRequest
from discopt_llm.errors import DataError, ModelError, ProfileError
from discopt_llm.evaluation import EvalRequest, evaluate
from discopt_llm.evaluation_report import format_evaluation
from discopt_llm.export.command import ExportRequest, export_run
from discopt_llm.heldout import standard_error
from discopt_llm.models import ModelFiles, load_model
from discopt_llm.sources import open_text
from discopt_llm.students import read_student, student_
from tests.documents import read_document
from tests.llm.commands import call, refusal
from tests.llm.families import tiny, tiny_tokenizer
from tests.llm.reference import disagreement, kl, logits, negative_log_likelihood
from tests.llm.searches import run
from tests.llm.texts import write_jsonl

LENGTH = 32
MEASURED = ("perplexity", "perplexity_error", "bits_per_byte", "kl", "kl_error", "agreement", "tokens")


def save(
    folder: Path, seed: int = 1, tokenizer: PreTrainedTokenizerFast | None = None, family: str = "Llama", **changes: Any
) -> Path:
    tiny(family, seed, **changes).save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with the same tokenizer."""
    return save(tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="module")
def dropped(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of depth pruning."""
    out = tmp_path_factory.mktemp("runs") / "dropped"
    run(DropRequest(**{**small, "generations": 1}, sparsity=0.25), out)
    return out


def asked(*what: object, data: object = ("builtin",), **changes: Any) -> EvalRequest:
    texts = data if isinstance(data, tuple) else (str(data),)
    own = {"what": tuple(map(str, what)), "data": texts, "tokens": 128, "sequence_length": LENGTH}
    return EvalRequest(**{**own, **changes})


def rows_of(*what: object, **changes: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = evaluate(asked(*what, **changes), quiet=True)["rows"]
    return rows


def text_of(source: object, role: Any = "heldout") -> list[Tensor]:
    return list(
        load_calibration(str(source), tiny_tokenizer(), sequence_length=LENGTH, tokens=128, role=role).sequences
    )


def expected(model: PreTrainedModel, reference: PreTrainedModel | None, sequences: list[Tensor]) -> dict[str, Any]:
    """A row by the formulas."""
    own = logits(model, sequences)
    nll = np.array([negative_log_likelihood(x, x, ids).mean() for x, ids in zip(own, sequences, strict=True)])
    perplexity = math.exp(nll.mean())
    row: dict[str, Any] = {
        "perplexity": perplexity,
        "perplexity_error": perplexity * nll.std(ddof=1) / math.sqrt(len(nll)),
        "bits_per_byte": nll.mean() / math.log(2),  # a token of the tiny tokenizer is a byte
        "tokens": sum(map(len, sequences)),
    }
    if reference is not None:
        triples = [*zip(logits(reference, sequences), own, sequences, strict=True)]
        divergence = np.array([kl(*triple).mean() for triple in triples])
        row["kl"], row["kl_error"] = divergence.mean(), standard_error(divergence)
        row["agreement"] = 1 - np.mean([disagreement(*triple).mean() for triple in triples])
    return row


def check(row: dict[str, Any], expected: dict[str, Any]) -> None:
    found = {key: row[key] for key in expected}
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


# -- what is measured ----------------------------------------------------------------------------------------------


def test_models_are_compared_with_the_first_one(model_folder: Path, other: Path) -> None:
    first, second = rows_of(model_folder, other)
    sequences = text_of("builtin")
    models = [load_model(str(folder)).model for folder in (model_folder, other)]
    check(first, expected(models[0], models[0], sequences))
    check(second, expected(models[1], models[0], sequences))
    assert second["kl"] > 0.1
    assert [row["reference"] for row in (first, second)] == [str(model_folder)] * 2
    assert [row["bytes"] for row in (first, second)] == [
        (folder / "model.safetensors").stat().st_size for folder in (model_folder, other)
    ]


def test_the_student_of_a_run_is_compared_with_its_own_model(dropped: Path, model_folder: Path) -> None:
    model, student = rows_of(dropped)
    assert [row["model"] for row in (model, student)] == [str(model_folder), str(dropped)]
    (reported,) = (row for row in read_document(dropped / "results.json")["rows"] if row["method"] == "evolved")
    loaded = load_model(str(model_folder))
    with student_(*read_student(str(dropped), loaded)):
        sequences = text_of("builtin")
        alone = expected(loaded.model, None, sequences)
    check(student, alone)
    check(model, expected(loaded.model, loaded.model, sequences))
    assert 2 * student["bytes"] == reported["bytes"]  # which counts them in float32


@pytest.mark.parametrize("kind", ["drop", "quantize", "compress"])
def test_a_student_in_memory_is_what_its_export_is(
    kind: str, dropped: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if kind != "drop":
        run(replace(request.getfixturevalue(kind), generations=0), tmp_path / "run")
    folder = dropped if kind == "drop" else tmp_path / "run"
    export_run(ExportRequest(run=folder, to="hf", out=tmp_path / "written", device="cpu"))
    model, student, written = rows_of(folder, tmp_path / "written", reference=request.getfixturevalue("model_folder"))
    check(written, {key: student[key] for key in MEASURED})
    assert student["kl"] > 0.01 > model["kl"]


def test_a_student_can_be_compared_with_another_model(dropped: Path, model_folder: Path, other: Path) -> None:
    reference, student = rows_of(dropped, reference=str(other))
    assert reference["model"] == str(other)
    assert student["model"] == str(dropped)
    teacher, loaded = load_model(str(other)).model, load_model(str(model_folder))
    with student_(*read_student(str(dropped), loaded)):
        check(student, expected(loaded.model, teacher, text_of("builtin")))
    whole = load_model(str(model_folder)).model
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), loaded.model.parameters(), strict=True))


def test_students_of_one_model_are_measured_as_if_alone(
    dropped: Path, quantize: QuantizeRequest, model_folder: Path, tmp_path: Path
) -> None:
    run(replace(quantize, generations=0), tmp_path / "run")
    together = rows_of(tmp_path / "run", model_folder, dropped)
    assert [row["model"] for row in together] == [str(tmp_path / "run"), str(model_folder), str(dropped)]
    for row in together:
        alone = next(one for one in rows_of(row["model"]) if one["model"] == row["model"])
        check(row, {key: alone[key] for key in (*MEASURED, "bytes")})


def test_every_text_has_its_rows(model_folder: Path, notes: Path) -> None:
    first, second = rows_of(model_folder, data=("builtin", str(notes)))
    assert [row["data"] for row in (first, second)] == ["builtin", str(notes)]
    model = load_model(str(model_folder)).model
    check(first, expected(model, model, text_of("builtin")))
    check(second, expected(model, model, text_of(notes, "all")))


def test_all_models_read_sequences_that_the_shortest_can(model_folder: Path, tmp_path: Path) -> None:
    short = save(tmp_path / "short", max_position_embeddings=24)
    found = evaluate(asked(model_folder, short, sequence_length=None), quiet=True)
    assert found["data"][0]["sequence_length"] == 24
    assert {row["tokens"] for row in found["rows"]} == {144}


# -- vocabularies --------------------------------------------------------------------------------------------------


def test_without_one_vocabulary_there_is_no_kl(model_folder: Path, tmp_path: Path) -> None:
    wide = save(tmp_path / "wide", vocab_size=300)
    found = evaluate(asked(model_folder, wide), quiet=True)
    assert found["rows"][1]["kl"] is found["rows"][1]["agreement"] is found["rows"][1]["reference"] is None
    assert found["rows"][1]["perplexity"] > 1
    with pytest.raises(ModelError, match=f"expected models with the vocabulary of {model_folder}, got another one in"):
        rows_of(wide, reference=str(model_folder))


def test_between_tokenizers_only_bits_per_byte_are_compared(model_folder: Path, tmp_path: Path, notes: Path) -> None:
    half = tiny_tokenizer()  # every letter twice, so that a byte of text is two tokens
    half.backend_tokenizer.normalizer = normalizers.Replace("l", "ll")
    twice = save(tmp_path / "twice", seed=0, tokenizer=half, num_hidden_layers=8)
    found = evaluate(asked(model_folder, twice, data=notes), quiet=True)
    assert found["data"][0]["readers"] == [[str(model_folder)], [str(twice)]]
    assert found["rows"][1]["kl"] is None
    note = format_evaluation(found).splitlines()[-1]
    assert note.startswith(f"Their tokenizers differ ({model_folder} | {twice}): perplexity can be compared")


def test_bits_per_byte_count_the_bytes_of_the_text(tmp_path: Path) -> None:
    """The same model and text, each token being a byte: 8 bits for one that knows nothing."""
    folder = save(tmp_path / "model")
    model = tiny("Llama", 1)
    model.get_output_embeddings().weight.data.zero_()
    model.save_pretrained(folder)
    (row,) = rows_of(folder)
    assert row["perplexity"] == pytest.approx(260)
    assert row["bits_per_byte"] == pytest.approx(math.log2(260))
    (wide,) = rows_of(folder, data=write_jsonl(tmp_path / "wide.jsonl", ["é" * 80]))
    assert wide["bits_per_byte"] == pytest.approx(math.log2(260))


# -- text ----------------------------------------------------------------------------------------------------------


def test_text_that_a_run_has_searched_is_left_out(
    dropped: Path, model_folder: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(notes.parent)
    sides = {}
    for what in (model_folder, dropped):
        found = evaluate(asked(what, data=notes.name), quiet=True)
        sides[what] = found["data"][0]["side"]
        role = sides[what]
        check(found["rows"][0], expected(load_model(str(model_folder)).model, None, text_of(notes, role)))
    assert sides == {model_folder: "all", dropped: "heldout"}
    searched = set(open_text(str(notes), "search").documents)
    assert not searched & set(open_text(str(notes), "heldout").documents)


# -- checkpoints that are not plain --------------------------------------------------------------------------------


def test_a_packed_checkpoint_is_measured_as_it_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("compressed_tensors")
    dense, packed = save(tmp_path / "dense"), tmp_path / "packed"
    rounded = write_packed(packed)
    capfd.readouterr()
    reference, row = rows_of(dense, packed)
    assert capfd.readouterr() == ("", "")
    check(row, expected(rounded, load_model(str(dense)).model, text_of("builtin")))
    assert row["bytes"] == (packed / "model.safetensors").stat().st_size < reference["bytes"]


def write_packed(folder: Path) -> PreTrainedModel:
    """`save`'s model in 4 bits, as compressed-tensors stores it; returns what it stands for."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    model, rounded = tiny("Llama", 1), tiny("Llama", 1)
    arguments = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=8)
    config = QuantizationConfig(
        config_groups={"all": QuantizationScheme(targets=["Linear"], weights=arguments)},
        ignore=["lm_head"],
        format="pack-quantized",
        quantization_status="compressed",
    )
    apply_quantization_config(model, config)
    for name, module in model.named_modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.data.unflatten(1, (-1, 8))
            scale = groups.abs().amax(-1) / 7
            module.weight_scale.data.copy_(scale)
            steps = (groups / scale[..., None]).round().clamp(-8, 7)
            rounded.get_submodule(name).weight.data.copy_((steps * scale[..., None]).flatten(1))
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    tiny_tokenizer().save_pretrained(folder)
    return rounded


def test_one_model_besides_the_reference_is_in_memory(
    quantize: QuantizeRequest, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(replace(quantize, generations=0), tmp_path / "run")
    alive: list[weakref.ref[PreTrainedModel]] = []
    most = 0
    load: Callable[..., PreTrainedModel] = ModelFiles.load

    def counted(*args: Any) -> PreTrainedModel:
        nonlocal most
        model = load(*args)
        alive.append(weakref.ref(model))
        most = max(most, sum(ref() is not None for ref in alive))
        return model

    monkeypatch.setattr(ModelFiles, "load", counted)
    rows_of(tmp_path / "run", save(tmp_path / "third", 2), save(tmp_path / "fourth", 3), reference=str(other))
    assert len(alive) == 4
    assert most == 2
    assert all(ref() is None for ref in alive)


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"what": ()}, "expected models or run folders"),
        ({"data": ()}, "nothing to evaluate on"),
        ({"data": (), "tasks": ("a",), "reference": "b"}, "--reference is what others are compared with on text"),
        ({"what": ("a", "b"), "profile": "c"}, "--profile and --bank go with one model or run, got 2"),
        ({"tokens": 1}, "tokens must be at least 2, got 1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
    ],
)
def test_requests_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        asked("model", **changes)


def test_what_cannot_be_evaluated_is_refused_before_weights_are_read(
    model_folder: Path, other: Path, dropped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelFiles, "load", lambda *_: pytest.fail("weights were read"))
    (tmp_path / "run.json").write_text((dropped / "run.json").read_text())
    os.symlink(model_folder, tmp_path / "link")
    for what, changes, error, message in [
        ((model_folder, tmp_path / "nowhere"), {}, ModelError, "nowhere"),
        ((model_folder, other), {"sequence_length": 500}, ModelError, "has 128 positions, asked for sequences of 500"),
        ((model_folder, other), {"data": (str(tmp_path / "no.txt"),)}, DataError, "cannot read"),
        ((model_folder, tmp_path), {}, ProfileError, "holds no profile of a language model"),
        ((model_folder, tmp_path / "link"), {}, ModelError, f"link is the same model as {model_folder}"),
        ((dropped,), {"reference": str(dropped)}, ModelError, "expected a model's config.json in the folder"),
    ]:
        with pytest.raises(error, match=message):
            rows_of(*what, **changes)


def test_students_of_two_models_are_each_compared_with_their_own(
    dropped: Path, model_folder: Path, other: Path, small: dict[str, Any], tmp_path: Path
) -> None:
    run(DropRequest(**{**small, "model": str(other), "generations": 0}, sparsity=0.25), tmp_path / "run")
    found = evaluate(asked(dropped, tmp_path / "run"), quiet=True)
    assert [(row["model"], row["reference"]) for row in found["rows"]] == [
        (str(model_folder), str(model_folder)),
        (str(other), str(other)),
        (str(dropped), str(model_folder)),
        (str(tmp_path / "run"), str(other)),
    ]
    title, heads, *_ = format_evaluation(found).splitlines()
    assert title.endswith("in sequences of 32 tokens:")
    assert "reference" in heads


# -- the command ---------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_for_each_text(model_folder: Path, dropped: Path, notes: Path) -> None:
    words = ["eval", model_folder, dropped, "--data", f"builtin,{notes}", "--tokens", 64, "--sequence-length", 32]
    result = call(*words)
    first, second = result.stdout.split("\n\n")
    for table, source in ((first, "builtin"), (second, notes)):
        title, heads, *rows = table.strip().splitlines()
        assert title == (
            f"On what a search may not have seen of {source}, in sequences of 32 tokens; KL to {model_folder}, nats "
            "per token:"
        )
        assert heads.replace("  ", "\t").replace("\t ", "\t").split("\t")[0] == "model"
        assert [row.split()[0] for row in rows] == [str(model_folder), str(dropped)]
    assert f"{model_folder} and {dropped}: " in result.stderr
    assert "sequences" in result.stderr
    answer = call(*words, "--json", "--quiet")
    assert answer.stderr == ""
    assert len(json.loads(answer.stdout)["rows"]) == 4


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "nothing to evaluate on"),
        (["--data", "nothing"], 1, "unknown text source 'nothing'"),
        (["--data", "builtin", "--device", "tpu"], 1, "got 'tpu'"),
        (["more", "--data", "builtin", "--profile", "some"], 2, "--profile and --bank go with one model or run, got 2"),
    ],
)
def test_the_command_refuses_in_one_line(model_folder: Path, words: list[str], code: int, message: str) -> None:
    assert message in refusal(call("eval", model_folder, *words), code)
