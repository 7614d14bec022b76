"""GGUF files of students: what others read in them, what they keep, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFReader, Keys

from discopt.errors import RunFolderError
from discopt_llm.errors import ModelError
from discopt_llm.export import gguf_contents, gguf_families, gguf_layout, gguf_proof
from discopt_llm.export.command import FORMATS
from discopt_llm.export.gguf_file import contents_of, gguf_file_of, write_gguf
from discopt_llm.models import load_model
from discopt_llm.replay import skipped_
from tests.llm import families
from tests.llm.commands import STAGES, call, refusal
from tests.llm.gguf_models import CONTEXT, byte_level, dropping, loaded, model

FAMILIES = ("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Qwen3Moe", "Olmoe", "Gemma2", "Phi3", "GPT2", "GPTNeoX")
IN_TRANSFORMERS = ("Llama", "Mistral", "Qwen2", "Phi3")  # of these sizes


@pytest.fixture(autouse=True)
def _short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_proof, "TOKENS", 25)
    monkeypatch.setattr(gguf_proof, "FIRST", 4)


@pytest.fixture
def without_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if xllamacpp were not installed."""
    monkeypatch.setattr(gguf_proof, "PACKAGE", "no_such_package")


def value_of(path: Path, key: str) -> Any:
    field = GGUFReader(path).get_field(key)
    return None if field is None else field.contents()


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_answers_as_the_student_does(family: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    written = write_gguf(dropping(loaded(family), 2, 3), tmp_path / "a.gguf")
    assert written.verified
    readers = ("transformers", "llama.cpp") if family in IN_TRANSFORMERS else ("llama.cpp",)
    assert written.readers == readers
    depth = 4 if family == "Gemma2" else 3  # whose layers would swap windows
    assert written.layers_after == depth == value_of(written.path, f"{written.architecture}.block_count")


@pytest.mark.parametrize("family", IN_TRANSFORMERS)
def test_transformers_gives_the_student_s_logits(family: str, tmp_path: Path, without_llama: None) -> None:
    written = write_gguf(dropping(loaded(family), 2, 3), tmp_path / "a.gguf", dtype="float32")
    assert written.readers == ("transformers",)
    assert "llama.cpp was not asked, which takes `pip install xllamacpp`" in written.sentence
    read = load_model(str(written.path)).model
    ids = torch.arange(40)[None]
    block = loaded(family).anatomy.blocks[1]
    with torch.no_grad(), skipped_([block.attention, block.mlp]):
        expected = loaded(family).model(input_ids=ids).logits
    with torch.no_grad():
        torch.testing.assert_close(read(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_dropped_sub_blocks_are_absent_in_deci(family: str, tmp_path: Path) -> None:
    # Block 0 loses its attention, 1 its MLP, 2 both, 3 nothing.
    student = dropping(loaded(family), 0, 3, 4, 5)
    written = write_gguf(student, tmp_path / "a.gguf", verify=False)
    tensors = {tensor.name for tensor in GGUFReader(written.path).tensors}
    assert written.architecture == "deci"
    assert value_of(written.path, "deci.attention.head_count") == [1, 4, 4]
    assert value_of(written.path, "deci.attention.head_count_kv") == [1, 2, 2]
    assert value_of(written.path, "deci.feed_forward_length") == [96, 32, 96]
    assert value_of(written.path, "deci.attention.key_length") == 32
    assert not any("blk.3" in name for name in tensors)
    assert not written.verified
    pytest.importorskip("xllamacpp")
    assert write_gguf(student, tmp_path / "b.gguf").readers == ("llama.cpp",)


def test_an_attention_left_out_takes_its_bytes_with_it(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    whole = write_gguf(dropping(loaded("Llama")), tmp_path / "a.gguf", verify=False)
    part = write_gguf(dropping(loaded("Llama"), 2), tmp_path / "b.gguf")
    attention = sum(p.numel() for n, p in loaded("Llama").model.named_parameters() if "layers.1.self_attn" in n)
    assert whole.bytes - part.bytes == pytest.approx(2 * attention, abs=2000)
    assert value_of(part.path, "deci.attention.head_count") == [4, 0, 4, 4]


@pytest.mark.parametrize("family", ["Qwen3", "GPT2", "GPTNeoX", "Mixtral"])
def test_elsewhere_a_dropped_sub_block_is_zeros_and_the_sentence_says_so(family: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    whole = write_gguf(dropping(loaded(family)), tmp_path / "a.gguf", verify=False)
    written = write_gguf(dropping(loaded(family), 2, 5), tmp_path / "b.gguf")
    assert "1 attention and 1 MLP sub-blocks dropped by output projections of zeros" in written.sentence
    assert "no smaller" in written.sentence
    assert written.bytes == pytest.approx(whole.bytes, rel=1e-3)


def test_a_model_without_any_block_keeps_a_silent_one(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    written = write_gguf(dropping(loaded("Llama"), *range(8)), tmp_path / "a.gguf")
    assert written.layers_after == 1
    assert value_of(written.path, "deci.feed_forward_length") == [32]


def test_renumbered_layers_of_gemma_keep_their_windows(tmp_path: Path) -> None:
    written = write_gguf(dropping(loaded("Gemma2"), 2, 3, 4, 5), tmp_path / "a.gguf", verify=False)
    assert written.layers_after == 2  # 0 and 3, a window and none


def test_the_context_ends_where_a_sliding_window_would_begin_to_matter(tmp_path: Path) -> None:
    windowed = model("Mistral", sliding_window=24)
    written = write_gguf(dropping(windowed), tmp_path / "a.gguf")
    assert value_of(written.path, "llama.context_length") == 24
    assert written.verified


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dense_weights_are_stored_in_the_type_asked_for(dtype: str, tmp_path: Path) -> None:
    written = write_gguf(dropping(loaded("Llama")), tmp_path / "a.gguf", dtype=dtype)
    assert written.verified
    name = {"float32": "F32", "bfloat16": "BF16"}[dtype]
    assert max(written.types, key=written.types.__getitem__) == name
    assert set(written.types) <= {name, "F32"}


def test_weights_beyond_half_precision_are_refused_by_name(tmp_path: Path) -> None:
    huge = model("Llama")
    with torch.no_grad():
        huge.model.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] = 1e6
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight has weights that half precision cannot"):
        write_gguf(dropping(huge), tmp_path / "a.gguf")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_scaled_rotary_angles_are_llama_cpp_s_too(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    angles = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, **(more if kind == "llama3" else {})}
    written = write_gguf(dropping(model("Llama", rope_parameters=angles), 3), tmp_path / "a.gguf")
    assert written.readers == ("llama.cpp",)


def test_biases_of_a_llama_are_written(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    biased = model("Llama", attention_bias=True, mlp_bias=True)
    assert write_gguf(dropping(biased), tmp_path / "a.gguf").readers == ("llama.cpp",)
    assert write_gguf(dropping(biased, 2), tmp_path / "b.gguf").readers == ("llama.cpp",)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("OPT", {}, "cannot write GGUF files of the family 'opt', only of llama, mistral"),
        ("Qwen2Moe", {}, "of the family 'qwen2_moe'"),
        ("Llama", {"hidden_act": "gelu"}, "hidden_act 'gelu', and llama.cpp computes with 'silu' only"),
        ("Qwen3Moe", {"norm_topk_prob": False, "mlp_only_layers": []}, "norm_topk_prob False"),
        ("Qwen3Moe", {"norm_topk_prob": True}, r"mlp_only_layers \[1\]"),
        ("Olmoe", {"num_key_value_heads": 2}, "2 heads of keys"),
        ("Gemma2", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar 16, expected the head's 8"),
        ("Gemma2", {"attn_logit_softcapping": None}, "no attn_logit_softcapping"),
        ("Qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "'yarn', expected"),
        ("GPTNeoX", {"hidden_act": "relu"}, "hidden_act 'relu'"),
    ],
)
def test_a_family_that_no_file_can_hold_is_refused_by_its_config(
    family: str, changes: dict[str, Any], reason: str
) -> None:
    sizes = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "head_dim": 8}
    config = getattr(transformers, f"{family}Config")(**{**sizes, **families._FAMILY_SIZES.get(family, {}), **changes})
    with pytest.raises(ModelError, match=reason):
        FORMATS["gguf"].refuse(config)


@pytest.mark.parametrize("kind", ["quantization", "sparsity", "mixed"])
def test_levels_that_no_type_holds_are_refused(kind: str, tmp_path: Path) -> None:
    class Quantized:
        pass

    student = Quantized()
    student.kind = kind  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match=f"levels of {kind} exactly; search a bank of --kind gguf"):
        write_gguf(student, tmp_path / "a.gguf")  # type: ignore[arg-type]


# -- from a GGUF file ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of a Llama as others might have written it, in Q4_1, Q8_0 and F32, with fields of its own."""
    path = tmp_path_factory.mktemp("source") / "own.gguf"
    full = contents_of(model("Llama", tie_word_embeddings=True))
    kind = gguf.GGMLQuantizationType
    tensors = {}
    for name, tensor in full.tensors.items():
        dense = gguf.quants.dequantize(tensor.make(), tensor.type)
        to = kind.F32 if dense.ndim == 1 else kind.Q8_0 if name == "token_embd.weight" else kind.Q4_1
        tensors[name] = gguf_contents.Stored.of(gguf.quants.quantize(dense, to), to)
    more = {"general.license": "mit", "general.languages": ["en", "de"], "llama.of_layers": [1, 2, 3, 4]}
    fields = {key: gguf_families.value(content) for key, content in more.items()}
    fields["tokenizer.ggml.tokens"] = replace(full.fields["tokenizer.ggml.tokens"])
    gguf_contents.write(replace(full.with_fields(fields), tensors=tensors), path)
    return path


def test_a_gguf_file_keeps_its_fields_and_the_bytes_of_its_tensors(source: Path, tmp_path: Path) -> None:
    written = write_gguf(dropping(load_model(str(source)), 2, 3), tmp_path / "a.gguf")
    assert written.verified and written.readers[0] == "transformers"
    before, after = GGUFReader(source), GGUFReader(written.path)
    changed = {"llama.block_count": 3, "llama.of_layers": [1, 3, 4]}
    for key, field in before.fields.items():
        if not key.startswith("GGUF."):
            assert after.fields[key].types == field.types
            assert after.fields[key].contents() == changed.get(key, field.contents())
    assert {key for key in after.fields if key not in before.fields} == {
        f"discopt.{name}" for name in ("format", "version", "source", "fingerprint", "form")
    }
    own = {tensor.name: tensor for tensor in before.tensors}
    for tensor in after.tensors:
        old = own[tensor.name.replace("blk.2", "blk.3").replace("blk.1", "blk.2")]
        assert tensor.tensor_type == old.tensor_type
        assert np.array_equal(tensor.data, old.data)


def test_sub_blocks_of_a_gguf_file_are_left_out_in_its_types(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    written = write_gguf(dropping(load_model(str(source)), 2, 5), tmp_path / "a.gguf")
    assert written.readers == ("llama.cpp",)
    assert value_of(written.path, "general.license") == "mit"
    own = {tensor.name: tensor.data for tensor in GGUFReader(source).tensors}
    for tensor in GGUFReader(written.path).tensors:
        if not tensor.name.startswith("blk.2.ffn"):
            assert np.array_equal(tensor.data, own[tensor.name])


def test_the_file_of_a_package_is_found_without_importing_it() -> None:
    assert gguf_file_of("a/checkpoint") is None
    with pytest.raises(ModelError, match="got 'no_such_package'"):
        gguf_file_of("package:no_such_package")


# -- the place, and what does not verify ---------------------------------------------------------------------------


def test_only_our_own_file_is_replaced_and_only_if_asked(tmp_path: Path) -> None:
    student, path = dropping(loaded("Llama")), tmp_path / "deep" / "a.gguf"
    write_gguf(student, path, verify=False)
    with pytest.raises(RunFolderError, match="exists already; choose another --out, or pass --force"):
        write_gguf(student, path, verify=False)
    write_gguf(dropping(loaded("Llama"), 2, 3), path, force=True, verify=False)
    assert value_of(path, "llama.block_count") == 3
    assert [file.name for file in path.parent.iterdir()] == ["a.gguf"]
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF of someone else")
    with pytest.raises(RunFolderError, match="was not written by discopt"):
        write_gguf(student, other, force=True, verify=False)
    with pytest.raises(RunFolderError, match=r"expected --out to be a file NAME\.gguf"):
        write_gguf(student, tmp_path / "a.bin", verify=False)
    with pytest.raises(RunFolderError, match=r"cannot write .*: File exists"):
        write_gguf(student, other / "a.gguf", verify=False)


@pytest.mark.parametrize("reader", ["transformers", "llama.cpp"])
def test_a_file_that_answers_otherwise_is_kept_aside(
    reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if reader == "transformers":
        request.getfixturevalue("without_llama")
    else:
        pytest.importorskip("xllamacpp")
        monkeypatch.setattr(gguf_families.Family, "in_transformers", lambda *_: False)
    monkeypatch.setattr(gguf_layout, "interleaved", lambda rows, heads: np.arange(rows))
    with pytest.raises(ModelError, match=f"in {reader} differ from the searched student's by .*kept, unverified"):
        write_gguf(dropping(loaded("Llama")), tmp_path / "a.gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["a.gguf.unverified"]


def test_a_tokenizer_that_llama_cpp_reads_otherwise_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    from discopt_llm.export import gguf_tokenizer

    monkeypatch.setattr(gguf_tokenizer, "_NAMES", dict.fromkeys(gguf_tokenizer._NAMES, "smollm"))
    with pytest.raises(ModelError, match=r"llama\.cpp encodes .* as \d+ other tokens than"):
        write_gguf(dropping(loaded("Llama")), tmp_path / "a.gguf")


def test_a_file_that_llama_cpp_cannot_load_is_refused_with_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr(gguf_families.Family, "in_transformers", lambda *_: False)
    lacking = replace(gguf_families.FAMILIES["llama"], keys={"embedding_length": "hidden_size"})
    monkeypatch.setitem(gguf_families.FAMILIES, "llama", lacking)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"llama\.cpp cannot load and run it: .*error"):
        write_gguf(dropping(loaded("Llama")), tmp_path / "a.gguf")


def test_the_size_is_known_before_the_file_is_written(tmp_path: Path) -> None:
    student = dropping(loaded("Llama"))
    written = write_gguf(student, tmp_path / "a.gguf", verify=False)
    contents = gguf_contents.contents_of_file(written.path)
    assert contents.bytes == written.bytes
    notes = written.bytes - contents_of(loaded("Llama")).bytes
    assert 0 < notes < 1000  # the fields that say whose work it is


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(tmp_path: Path) -> None:
    small = replace(loaded("Llama"), tokenizer=byte_level(size=520))
    with pytest.raises(ModelError, match="has a token 512, but the model only 512 rows"):
        write_gguf(dropping(small), tmp_path / "a.gguf")


def test_the_summary_says_all_of_it(tmp_path: Path) -> None:
    written = write_gguf(dropping(loaded("Llama"), 2, 3), tmp_path / "a.gguf", verify=False)
    assert written.sentence.startswith(f"{tmp_path / 'a.gguf'}: 3 of 4 layers, weights in 100% F16; ")
    assert written.sentence.endswith("not verified")
    assert written.to_dict()["types"]["F16"] > 100_000
    assert value_of(written.path, "discopt.form") == "3 of 4 layers, weights in 100% F16"
    assert value_of(written.path, Keys.General.FILE_TYPE) == gguf.LlamaFileType.MOSTLY_F16
    assert value_of(written.path, "llama.context_length") == CONTEXT


def test_the_command_writes_under_the_run_s_name_into_a_folder(tmp_path: Path) -> None:
    own = model("Llama", num_hidden_layers=3)
    own.model.save_pretrained(tmp_path / "model")
    own.tokenizer.save_pretrained(tmp_path / "model")
    run = tmp_path / "short"
    options = ["--unit", "block", "--sparsity", "0.34", "--preset", "demo", "--sequence-length", "32"]
    drop = call(
        "drop", tmp_path / "model", *options, "--eval-tokens", "64", "--generations", "1", *STAGES, "--out", run
    )
    assert drop.exit_code == 0, drop.output
    result = call("export", run, "--to", "gguf", "--out", tmp_path, "--no-verify", "--json")
    assert result.exit_code == 0, result.output
    written = json.loads(result.stdout)
    assert written["path"] == str(tmp_path / "short.gguf")
    assert (written["layers_after"], written["verified"]) == (2, False)
    again = call("export", run, "--to", "gguf", "--out", tmp_path)
    assert "short.gguf exists already" in refusal(again)
