"""GGUF files of students at levels of a bank of kind "gguf": their bytes, in llama.cpp's order of rows."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader

from discopt_llm import ggml
from discopt_llm.export import gguf_proof
from discopt_llm.export.gguf_file import contents_of, write_gguf
from discopt_llm.layers import layers_for
from discopt_llm.models import load_model
from tests.llm.gguf_models import Levelled, dropping, levelled, loaded, model

PLAIN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


@pytest.fixture(autouse=True)
def _short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_proof, "TOKENS", 25)
    monkeypatch.setattr(gguf_proof, "FIRST", 4)


def write(student: Levelled, path: Path, **options: bool) -> tuple[str, ...]:
    return write_gguf(student, path, **options).readers  # type: ignore[arg-type]


def tensors_of(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


@pytest.mark.parametrize("kind", PLAIN)
def test_every_type_is_read_back_exactly(kind: str, tmp_path: Path) -> None:
    readers = write(levelled(loaded("Llama"), kind), tmp_path / "a.gguf")
    assert readers[0] == "transformers"
    types = {t.tensor_type.name for t in tensors_of(tmp_path / "a.gguf").values() if t.n_elements > 128}
    assert types == {kind}


@pytest.mark.parametrize("family", ["Llama", "Mixtral", "Qwen3Moe", "Gemma2", "Phi3", "GPT2", "GPTNeoX"])
def test_mixed_types_are_read_by_llama_cpp_in_every_layout(family: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    # With all experts at work no rounding sends a token of these random models to another one.
    everyone = model(family, num_experts_per_tok=4) if family in ("Mixtral", "Qwen3Moe") else loaded(family)
    assert "llama.cpp" in write(levelled(everyone, "Q8_0", "Q5_1", "Q5_0"), tmp_path / "a.gguf")


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_k_types_are_written_where_their_blocks_fit(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    wide = model("Llama", hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    assert write(levelled(wide, kind), tmp_path / "a.gguf") == ("transformers", "llama.cpp")


def test_rows_of_a_llama_are_the_bank_s_bytes_in_another_order(tmp_path: Path) -> None:
    student = levelled(loaded("Llama"), "Q4_0")
    write(student, tmp_path / "a.gguf", verify=False)
    written = tensors_of(tmp_path / "a.gguf")
    bank = student.form("model.layers.1.self_attn.k_proj.weight").data[0].numpy()
    heads = bank.reshape(2, 2, 16, -1)  # KV heads, halves of 32 dimensions
    assert np.array_equal(written["blk.1.attn_k.weight"].data.reshape(2, 16, 2, -1), heads.swapaxes(1, 2))
    bank = student.form("model.layers.1.self_attn.v_proj.weight").data[0].numpy()
    assert np.array_equal(written["blk.1.attn_v.weight"].data, bank)


def test_gates_and_up_projections_of_experts_are_parted(tmp_path: Path) -> None:
    student = levelled(loaded("Mixtral"), "Q4_0")
    write(student, tmp_path / "a.gguf", verify=False)
    written = tensors_of(tmp_path / "a.gguf")
    bank = student.form("model.layers.0.mlp.experts.gate_up_proj").data.numpy()
    assert np.array_equal(written["blk.0.ffn_gate_exps.weight"].data, bank[:, :96])
    assert np.array_equal(written["blk.0.ffn_up_exps.weight"].data, bank[:, 96:])
    assert written["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"


def test_what_has_no_level_stays_as_it_was_in_the_gguf_file(tmp_path: Path) -> None:
    source = tmp_path / "source.gguf"
    write(levelled(model("Qwen2", tie_word_embeddings=True), "Q8_0"), source, verify=False)
    read = load_model(str(source))
    some = {layer.name: "Q4_0" for layer in layers_for(read, "gguf") if "down_proj" in layer.name}
    readers = write(Levelled(read, some), tmp_path / "a.gguf")
    assert readers[0] == "transformers"
    before, after = tensors_of(source), tensors_of(tmp_path / "a.gguf")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if "ffn_down" in name:
            assert tensor.tensor_type.name == "Q4_0"
        else:
            assert np.array_equal(tensor.data, before[name].data)


def test_a_head_of_its_own_has_a_type_of_its_own(tmp_path: Path) -> None:
    untied = loaded("Llama")
    types = {layer.name: "Q8_0" for layer in layers_for(untied, "gguf")} | {"lm_head": "Q5_1"}
    write(Levelled(untied, types), tmp_path / "a.gguf", verify=False)
    written = tensors_of(tmp_path / "a.gguf")
    assert written["token_embd.weight"].tensor_type.name == "Q8_0"
    assert written["output.weight"].tensor_type.name == "Q5_1"


def test_the_file_weighs_what_its_levels_and_the_overhead_say(tmp_path: Path) -> None:
    student = levelled(loaded("Qwen2"), "Q4_0", "Q8_0")
    written = write_gguf(student, tmp_path / "a.gguf", verify=False)  # type: ignore[arg-type]
    levels = sum(student.form(name).data.numel() for name in student.placed)
    vectors = sum(4 * p.numel() for p in student.loaded.model.parameters() if p.dim() == 1)
    overhead = contents_of(student.loaded).overhead
    assert written.bytes == pytest.approx(levels + vectors + overhead, abs=1000)
    assert sum(written.types.values()) == sum(p.numel() for p in student.loaded.model.parameters())


def test_the_file_type_is_that_of_most_weights(tmp_path: Path) -> None:
    write(levelled(loaded("Llama"), "Q5_1"), tmp_path / "a.gguf", verify=False)
    field = GGUFReader(tmp_path / "a.gguf").get_field("general.file_type")
    assert field is not None
    assert field.contents() == gguf.LlamaFileType.MOSTLY_Q5_1


def test_zeros_are_zero_bytes_in_every_type(tmp_path: Path) -> None:
    for name, kind in ggml.types().items():
        data = torch.zeros((1, kind.bytes), dtype=torch.uint8)
        assert not ggml.dequantize(data, name).any(), name


def test_pruned_levels_of_a_gguf_file_are_zeros_of_their_type(tmp_path: Path) -> None:
    source = tmp_path / "source.gguf"
    write(levelled(model("Phi3", tie_word_embeddings=True), "Q5_0"), source, verify=False)
    written = write_gguf(dropping(load_model(str(source)), 2, 5), tmp_path / "a.gguf")
    assert written.verified
    after = tensors_of(written.path)
    for name in ("blk.1.attn_output.weight", "blk.2.ffn_down.weight"):
        assert after[name].tensor_type.name == "Q5_0"
        assert not after[name].data.any()
