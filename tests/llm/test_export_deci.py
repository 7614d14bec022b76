"""Llamas that lack attentions and MLPs, as vLLM's DeciLMForCausalLM describes them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel

from discopt_llm.drop import DropLevels
from discopt_llm.errors import ModelError
from discopt_llm.export import deci
from discopt_llm.export.command import FORMATS
from discopt_llm.export.deci import read_deci, refuse, write_deci
from discopt_llm.export.proof import UnfitError
from discopt_llm.export.student import StudentModel
from discopt_llm.models import LoadedModel
from tests.llm.families import FAMILIES, LAYERS, tiny
from tests.llm.test_export_hf import ATTENTION, MLP, dropping, llama, load, some_ids, student_logits

CASES: dict[str, tuple[tuple[int, int], ...]] = {
    "nothing": (),
    "sub-blocks": ((1, ATTENTION), (0, MLP), (LAYERS - 1, MLP)),
    "a block": ((2, ATTENTION), (2, MLP)),
    "the first attention": ((0, ATTENTION), (2, MLP)),
    "the first block and an attention": ((0, ATTENTION), (0, MLP), (1, ATTENTION)),
    "all": tuple((block, part) for block in range(LAYERS) for part in (ATTENTION, MLP)),
}


def student(loaded: LoadedModel, dropped: NDArray[np.bool_]) -> StudentModel:
    return StudentModel(loaded, DropLevels(loaded.anatomy), np.where(dropped, 0, 1).astype(np.int16).ravel())


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=some_ids(), use_cache=False).logits
    return found


def config_of(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    return config


@pytest.mark.parametrize("case", CASES)
def test_the_model_that_the_files_describe_is_the_student(tmp_path: Path, case: str) -> None:
    dropped = dropping(*CASES[case])
    summary = write_deci(student(llama(), dropped), tmp_path / "out")
    assert summary.verified
    assert summary.sentence.endswith("its logits equal the searched student's (vLLM itself was not run)")
    model = read_deci(tmp_path / "out", torch.float32)
    torch.testing.assert_close(logits(model), student_logits(llama(), dropped), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_what_is_dropped_has_no_tensors_but_the_first_attention(tmp_path: Path, case: str) -> None:
    dropped = dropping(*CASES[case])
    summary = write_deci(student(llama(), dropped), tmp_path / "out", verify=False)
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    blocks = config_of(tmp_path / "out")["block_configs"]
    kept = [block for block in range(LAYERS) if not dropped[block].all()] or [0]
    assert len(blocks) == summary.layers_after == len(kept)
    for new, old in enumerate(kept):
        attention = not dropped[old, ATTENTION] or new == 0
        for section, module, norm, there in (
            ("attention", "self_attn", "input_layernorm", attention),
            ("ffn", "mlp", "post_attention_layernorm", not dropped[old, MLP]),
        ):
            assert blocks[new][section]["no_op"] == (not there)
            for inner in (module, norm):
                assert any(name.startswith(f"model.layers.{new}.{inner}.") for name in names) == there
    zero_first = bool(dropped[kept[0], ATTENTION])
    assert ("the first block keeps an attention whose output is zero" in summary.remarks) == zero_first


def test_a_file_is_smaller_by_what_it_lacks(tmp_path: Path) -> None:
    whole = write_deci(student(llama(), dropping()), tmp_path / "whole", verify=False).bytes
    dropped = dropping((1, ATTENTION), (2, MLP))
    less = write_deci(student(llama(), dropped), tmp_path / "less", verify=False).bytes
    blocks = llama().anatomy.blocks
    gone = 4 * (blocks[1].attention.parameters + blocks[2].mlp.parameters)
    assert less == pytest.approx(whole - gone, abs=2500)  # names, and the two norms


def test_vllm_finds_what_it_asks_for_in_the_config(tmp_path: Path) -> None:
    loaded = load(tiny("Llama", intermediate_size=512))
    write_deci(student(loaded, dropping((1, ATTENTION), (2, MLP))), tmp_path / "out")
    config: Any = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert (config.architectures, config.model_type) == (["DeciLMForCausalLM"], "nemotron-nas")
    first, second, third = config.block_configs[:3]
    assert config.num_attention_heads // first.attention.n_heads_in_group == 2
    assert (first.attention.no_op, second.attention.no_op, second.ffn.no_op, third.ffn.no_op) == (
        False,
        True,
        False,
        True,
    )
    assert first.ffn.ffn_mult == 1.5 * 512 / 32
    assert not hasattr(first.ffn, "intermediate_size")
    assert json.loads(config.to_json_string())["block_configs"] == config_of(tmp_path / "out")["block_configs"]
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_width_that_no_ratio_gives_is_named(tmp_path: Path) -> None:
    write_deci(student(llama(), dropping()), tmp_path / "out")
    config: Any = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert config.block_configs[0].ffn.intermediate_size == 48
    assert not hasattr(config.block_configs[0].ffn, "ffn_mult")


@pytest.mark.parametrize(("width", "hidden"), [(1536, 576), (8192, 2048), (14336, 4096), (28672, 8192), (512, 32)])
def test_ratios_of_real_models_give_their_widths(width: int, hidden: int) -> None:
    said = deci._width({"intermediate_size": width, "hidden_size": hidden})
    assert "ffn_mult" in said
    assert deci._width_of(said, hidden) == width


def test_biases_and_tied_embeddings_come_along(tmp_path: Path) -> None:
    loaded = load(tiny("Llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True))
    dropped = dropping((0, ATTENTION), (1, MLP))
    write_deci(student(loaded, dropped), tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    model = read_deci(tmp_path / "out", torch.float32)
    torch.testing.assert_close(logits(model), student_logits(loaded, dropped), rtol=1e-5, atol=1e-5)


def test_a_mistral_without_a_window_is_a_llama(tmp_path: Path) -> None:
    loaded = load(tiny("Mistral", sliding_window=None))
    dropped = dropping((1, ATTENTION))
    assert write_deci(student(loaded, dropped), tmp_path / "out").verified


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
def test_other_families_are_refused_by_name_from_their_config(family: str) -> None:
    config = FAMILIES[family]().config
    with pytest.raises(ModelError, match=rf"DeciLMForCausalLM .*\b{family}\b"):
        FORMATS["deci"].refuse(config)
    refuse(llama().model.config)


def test_files_that_do_not_agree_are_not_read(tmp_path: Path) -> None:
    write_deci(student(llama(), dropping((1, ATTENTION))), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    with pytest.raises(
        UnfitError, match=r"config and its tensors disagree about model\.layers\.2\.mlp\.up_proj\.weight"
    ):
        read_deci(tmp_path / "out", torch.float32)


def test_a_llama_that_is_none_does_not_pass(tmp_path: Path) -> None:
    loaded = load(tiny("Llama"))
    loaded.model.lm_head.register_forward_hook(lambda *call: 2 * call[-1])  # no file can hold this
    with pytest.raises(
        ModelError, match=r"differ from the searched student's .* kept, unverified, in .*out\.unverified"
    ):
        write_deci(student(loaded, dropping((1, ATTENTION))), tmp_path / "out")
    assert os.listdir(tmp_path) == ["out.unverified"]
