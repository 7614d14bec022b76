"""Checkpoints of students with weights of their own: what is reloaded is the student, for every family."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from discopt.errors import RunFolderError
from discopt_llm.errors import ModelError
from discopt_llm.export.hf import NOTE, write_checkpoint
from discopt_llm.models import LoadedModel, fingerprint
from tests.llm.families import FAMILIES, LAYERS, tiny
from tests.llm.test_export_hf import (
    MIXTURE,
    ONE_BLOCK,
    Pairs,
    check_reloaded,
    dropping,
    everything,
    llama,
    load,
    no_space,
    reloaded,
)
from tests.llm.test_replay import Made

CASES: dict[str, Pairs] = {"nothing dropped": (), "some dropped": MIXTURE}
WHAT = "quantized to 3.00 bits on average by GPTQ, stored dense"
Q, K = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"


@cache
def model_of(family: str) -> LoadedModel:
    return load(FAMILIES[family]())


def matrices(loaded: LoadedModel) -> dict[str, torch.Size]:
    """Weight matrices, and stacks of them, of attention and MLP."""
    inside = tuple(f"{part.name}." for part in loaded.anatomy.sub_blocks if part.modules)
    loose = tuple(f"{block.name}.fc" for block in loaded.anatomy.blocks)  # OPT's MLP
    return {
        name: parameter.shape
        for name, parameter in loaded.model.named_parameters()
        if parameter.dim() > 1 and name.startswith((*inside, *loose))
    }


def some_weights(loaded: LoadedModel, step: int = 2) -> dict[str, Tensor]:
    """Random float32 values for every second matrix, which are other ones in the next block where there are 7."""
    generator = torch.Generator().manual_seed(3)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in [*matrices(loaded).items()][::step]}


def student(loaded: LoadedModel, weights: Mapping[str, Tensor]) -> LoadedModel:
    """A copy of the model that has these weights for good."""
    model = copy.deepcopy(loaded.model)
    with torch.no_grad():
        for name, tensor in weights.items():
            model.get_parameter(name).copy_(tensor)
    return load(model)


# truth: what is loaded is the student


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_reloaded_checkpoint_gives_the_students_logits(tmp_path: Path, family: str, case: str) -> None:
    loaded, dropped = model_of(family), dropping(*CASES[case])
    before, weights = fingerprint(loaded.model), some_weights(loaded)
    summary = write_checkpoint(loaded, dropped, tmp_path / "out", replaced=weights, what=WHAT)
    assert summary.verified
    check_reloaded(tmp_path / "out", student(loaded, weights), dropped)
    assert fingerprint(loaded.model) == before
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_that_are_tested_are_of_all_forms(family: str) -> None:
    loaded = model_of(family)
    names = [*some_weights(loaded)]
    experts = {name for name, shape in matrices(loaded).items() if len(shape) == 3}
    assert bool(experts) == (family in {"mixtral", "qwen3_moe", "qwen2_moe", "olmoe"})
    assert not experts or experts.intersection(names)
    owners = [loaded.model.get_submodule(name.rpartition(".")[0]) for name in names]
    assert any(isinstance(owner, Conv1D) for owner in owners) == (family == "gpt2")
    for part in ("attention", "mlp"):  # of some block
        sub_blocks = [getattr(block, part) for block in loaded.anatomy.blocks]
        own = {id(p) for sub_block in sub_blocks for module in sub_block.modules for p in module.parameters()}
        assert any(id(loaded.model.get_parameter(name)) in own for name in names)


@pytest.mark.parametrize("family", ["GPT2", "Llama", "Qwen3Moe"])
def test_a_bfloat16_model_gets_weights_rounded_to_it(tmp_path: Path, family: str) -> None:
    loaded, dropped = load(tiny(family, dtype=torch.bfloat16)), dropping(*MIXTURE)
    weights = some_weights(loaded)
    write_checkpoint(loaded, dropped, tmp_path / "out", replaced=weights, what=WHAT)
    assert check_reloaded(tmp_path / "out", student(loaded, weights), dropped).dtype == torch.bfloat16


def test_weights_of_any_floating_point_type_will_do(tmp_path: Path) -> None:
    weights = {name: tensor.half() for name, tensor in some_weights(llama()).items()}
    write_checkpoint(llama(), dropping(), tmp_path / "out", replaced=weights)
    check_reloaded(tmp_path / "out", student(llama(), weights), dropping())


@pytest.mark.parametrize("verify", [True, False])
def test_weights_that_share_memory_are_written_each(tmp_path: Path, verify: bool) -> None:
    loaded = load(tiny("Llama", num_key_value_heads=4))
    stacked = 0.3 * torch.randn(64, 32, generator=torch.Generator().manual_seed(3))
    own = loaded.model.get_parameter(f"model.layers.{LAYERS - 1}.self_attn.q_proj.weight")
    values = (stacked[:32], stacked[32:], stacked[:32], own, stacked[16:48].T, torch.full((1, 1), 0.1).expand(32, 32))
    names = [name for name in matrices(loaded) if "attn" in name]  # each (32, 32)
    weights = dict(zip(names, values, strict=False))
    write_checkpoint(loaded, dropping(), tmp_path / "out", replaced=weights, verify=verify)
    expected = student(loaded, weights)
    model = check_reloaded(tmp_path / "out", expected, dropping())
    assert all(torch.equal(model.get_parameter(name), expected.model.get_parameter(name)) for name in weights)


def test_the_file_is_no_larger_than_the_models(tmp_path: Path) -> None:
    plain = write_checkpoint(llama(), dropping(), tmp_path / "plain").bytes
    weights = {name: tensor.double() for name, tensor in some_weights(llama()).items()}
    assert write_checkpoint(llama(), dropping(), tmp_path / "out", replaced=weights).bytes == pytest.approx(
        plain, abs=5000
    )


def test_an_untied_head_may_be_replaced(tmp_path: Path) -> None:
    loaded = load(tiny("Llama", tie_word_embeddings=False))
    weights = {"lm_head.weight": 0.1 * loaded.model.lm_head.weight}
    write_checkpoint(loaded, dropping(), tmp_path / "out", replaced=weights)
    check_reloaded(tmp_path / "out", student(loaded, weights), dropping())


@pytest.mark.parametrize("verify", [True, False])
def test_weights_may_be_made_when_asked_for(tmp_path: Path, verify: bool) -> None:
    loaded = load(tiny("Llama", dtype=torch.bfloat16))
    weights = Made(matrices(loaded))
    write_checkpoint(loaded, dropping(), tmp_path / "out", replaced=weights, verify=verify)
    assert weights.alive == [0] * (7 * LAYERS)  # each of them once
    fresh = Made(weights.shapes)
    check_reloaded(tmp_path / "out", student(loaded, {name: fresh[name] for name in fresh}), dropping())


def test_weights_stay_theirs_where_a_block_cannot_be_left_out(tmp_path: Path) -> None:
    loaded, dropped = load(tiny("GPT2", scale_attn_by_inverse_layer_idx=True)), dropping(*ONE_BLOCK)
    weights = some_weights(loaded)
    summary = write_checkpoint(loaded, dropped, tmp_path / "out", replaced=weights, what="pruned")
    assert summary.layers_after == LAYERS
    check_reloaded(tmp_path / "out", student(loaded, weights), dropped)


# what is said about it


def test_the_folder_says_what_was_done_to_which_weights(tmp_path: Path) -> None:
    loaded = load(tiny("Llama"))
    last = f"model.layers.{LAYERS - 1}.self_attn.q_proj.weight"
    gone, silent = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.o_proj.weight"
    weights = {name: loaded.model.get_parameter(name) / 2 for name in (gone, silent, last)}
    before = fingerprint(loaded.model)
    summary = write_checkpoint(loaded, dropping(*MIXTURE), tmp_path / "out", replaced=weights, what=WHAT)
    assert summary.replaced == 1
    assert summary.form == (
        "3 of 4 layers, 1 block left out, 2 dropped sub-blocks kept with output projections of zeros, "
        f"1 weight tensor {WHAT}"
    )
    assert summary.form in summary.sentence
    note = json.loads((tmp_path / "out" / NOTE).read_text())
    assert note["model"] == {"source": "tiny/model", "fingerprint": before}
    assert loaded.fingerprint == before
    assert note["replaced"] == {"what": WHAT, "parameters": ["model.layers.2.self_attn.q_proj.weight"]}  # renumbered
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("Compressed by discopt from `tiny/model`: 3 of 4 layers")
    assert f"not the original's: 1 ({WHAT}; `{NOTE}` names them)." in card


def test_weights_without_a_story_are_called_replaced(tmp_path: Path) -> None:
    summary = write_checkpoint(llama(), dropping(), tmp_path / "out", replaced=some_weights(llama()))
    assert summary.form == "all 4 layers, 14 weight tensors replaced"


def test_a_checkpoint_without_replaced_weights_says_nothing_of_them(tmp_path: Path) -> None:
    files = []
    for name, replaced in (("plain", None), ("empty", {})):
        summary = write_checkpoint(llama(), dropping(), tmp_path / name, replaced=replaced)
        assert (summary.form, summary.replaced) == ("all 4 layers, nothing dropped", 0)
        files.append(everything(tmp_path / name))
    assert files[0] == files[1]


# refusals


def test_a_student_that_does_not_come_back_is_an_error_and_kept_aside(tmp_path: Path) -> None:
    loaded = load(tiny("Llama"))
    before = fingerprint(loaded.model)
    loaded.model.lm_head.register_forward_hook(lambda *call: 2 * call[-1])  # no file can hold this
    with pytest.raises(ModelError, match="differ from the searched student's"):
        write_checkpoint(loaded, dropping(*MIXTURE), tmp_path / "out", replaced=some_weights(loaded))
    assert os.listdir(tmp_path) == ["out.unverified"]
    assert fingerprint(loaded.model) == before


def test_weights_that_are_no_numbers_do_not_pass_for_the_student(tmp_path: Path) -> None:
    weights = {Q: torch.full((32, 32), torch.nan)}
    with pytest.raises(ModelError, match="differ from the searched student's by nan of their size"):
        write_checkpoint(llama(), dropping(), tmp_path / "out", replaced=weights)
    assert os.listdir(tmp_path) == ["out.unverified"]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({Q.removesuffix(".weight"): torch.zeros(32, 32)}, "full names of the model's parameters, got 'model"),
        ({K: torch.zeros(32, 16)}, r"expected .*k_proj\.weight of shape \(16, 32\), got \(32, 16\)"),
        ({Q: torch.zeros(32, 32, dtype=torch.int8)}, r"q_proj\.weight in floating point, got torch\.int8"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_written(
    tmp_path: Path, weights: dict[str, Tensor], message: str
) -> None:
    before = fingerprint(llama().model)
    with pytest.raises(ValueError, match=message):
        write_checkpoint(llama(), dropping(), tmp_path / "out", replaced={**some_weights(llama(), 9), **weights})
    assert os.listdir(tmp_path) == []
    assert fingerprint(llama().model) == before


def test_tied_weights_are_written_once_with_their_new_values(tmp_path: Path) -> None:
    loaded = load(tiny("OPT", tie_word_embeddings=True))
    weights = {"model.decoder.embed_tokens.weight": 0.5 * loaded.model.lm_head.weight}
    summary = write_checkpoint(loaded, dropping(), tmp_path / "out", replaced=weights)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert summary.verified
    assert torch.equal(read.lm_head.weight, weights["model.decoder.embed_tokens.weight"])


def test_what_fails_while_weights_are_made_is_not_blamed_on_the_target(tmp_path: Path) -> None:
    before = fingerprint(llama().model)
    weights = Made(matrices(llama()), fails_at=K)
    with pytest.raises(OSError, match=r"^the disk is gone$"):
        write_checkpoint(llama(), dropping(), tmp_path / "out", replaced=weights)
    assert os.listdir(tmp_path) == []
    assert fingerprint(llama().model) == before


def test_a_full_disk_leaves_the_old_checkpoint_and_the_models_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(llama(), dropping(), tmp_path / "out", verify=False)
    old, before = everything(tmp_path / "out"), fingerprint(llama().model)
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", no_space)
    with pytest.raises(RunFolderError, match=re.escape("out: No space left on device")):
        write_checkpoint(llama(), dropping(), tmp_path / "out", replaced=some_weights(llama()), force=True)
    assert everything(tmp_path / "out") == old
    assert os.listdir(tmp_path) == ["out"]
    assert fingerprint(llama().model) == before


def test_the_original_is_read_again_as_it_was(tmp_path: Path) -> None:
    write_checkpoint(llama(), dropping(), tmp_path / "before")
    write_checkpoint(llama(), dropping(), tmp_path / "student", replaced=some_weights(llama()))
    write_checkpoint(llama(), dropping(), tmp_path / "after")
    assert everything(tmp_path / "before") == everything(tmp_path / "after")
    assert not torch.equal(reloaded(tmp_path / "student").get_parameter(Q), llama().model.get_parameter(Q))
