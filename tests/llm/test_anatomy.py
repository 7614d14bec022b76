"""Reading models: what is found in every family, that it does what it says, and which models are refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn
from transformers import PreTrainedModel

from discopt_llm.anatomy import Anatomy, SubBlock, embed, last_hidden, project, read_anatomy, run_block, skipped_
from discopt_llm.errors import ModelError
from tests.llm.families import FAMILIES, LAYERS, VOCABULARY, tiny

# Where the blocks are, then what silences attention and MLP in each of them.
ANATOMIES: dict[str, tuple[str, set[str], set[str]]] = {
    "llama": ("model.layers", {"self_attn.o_proj.weight"}, {"mlp.down_proj.weight"}),
    "mistral": ("model.layers", {"self_attn.o_proj.weight"}, {"mlp.down_proj.weight"}),
    "qwen2": ("model.layers", {"self_attn.o_proj.weight"}, {"mlp.down_proj.weight"}),
    "qwen3": ("model.layers", {"self_attn.o_proj.weight"}, {"mlp.down_proj.weight"}),
    "gemma2": ("model.layers", {"self_attn.o_proj.weight"}, {"mlp.down_proj.weight"}),
    "phi3": ("model.layers", {"self_attn.o_proj.weight"}, {"mlp.down_proj.weight"}),
    "opt": (
        "model.decoder.layers",
        {"self_attn.out_proj.weight", "self_attn.out_proj.bias"},
        {"fc2.weight", "fc2.bias"},
    ),
    "gpt2": ("transformer.h", {"attn.c_proj.weight", "attn.c_proj.bias"}, {"mlp.c_proj.weight", "mlp.c_proj.bias"}),
    "gpt_neox": (
        "gpt_neox.layers",
        {"attention.dense.weight", "attention.dense.bias"},
        {"mlp.dense_4h_to_h.weight", "mlp.dense_4h_to_h.bias"},
    ),
    "mixtral": ("model.layers", {"self_attn.o_proj.weight"}, {"mlp.experts.down_proj"}),
    "qwen2_moe": (
        "model.layers",
        {"self_attn.o_proj.weight"},
        {"mlp.experts.down_proj", "mlp.shared_expert.down_proj.weight"},
    ),
    "olmoe": ("model.layers", {"self_attn.o_proj.weight"}, {"mlp.experts.down_proj"}),
}

VARIANTS = {
    "opt_with_norms_after": lambda: tiny("OPT", do_layer_norm_before=False, word_embed_proj_dim=16),
    "gpt_neox_in_sequence": lambda: tiny("GPTNeoX", use_parallel_residual=False),
    "gpt_oss": lambda: tiny("GptOss", num_key_value_heads=2, head_dim=8, num_local_experts=4, sliding_window=6),
    "olmo2": lambda: tiny("Olmo2", num_key_value_heads=2),
}
EVERY = {**FAMILIES, **VARIANTS}
every_model = pytest.mark.parametrize("model_name", EVERY)


@pytest.fixture(scope="module", params=EVERY)
def read(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, Anatomy]:
    model = EVERY[request.param]()
    return model, read_anatomy(model)


def ids_of(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


def replayed(model: PreTrainedModel, anatomy: Anatomy, ids: Tensor) -> Tensor:
    hidden, arguments = embed(model, anatomy, ids)
    for block, recorded in zip(anatomy.blocks, arguments, strict=True):
        hidden = run_block(block, hidden, recorded)
    return project(model, anatomy, last_hidden(anatomy, hidden))


@pytest.mark.parametrize("family", ANATOMIES)
def test_blocks_and_output_projections_have_the_names_the_family_gives_them(family: str) -> None:
    layers, attention, mlp = ANATOMIES[family]
    anatomy = read_anatomy(FAMILIES[family]())
    assert anatomy.layers_name == layers
    for index, block in enumerate(anatomy.blocks):
        assert set(block.attention.outputs) == {f"{layers}.{index}.{name}" for name in attention}
        assert set(block.mlp.outputs) == {f"{layers}.{index}.{name}" for name in mlp}


def test_every_block_has_one_attention_and_one_mlp(read: tuple[PreTrainedModel, Anatomy]) -> None:
    model, anatomy = read
    assert len(anatomy.blocks) == LAYERS
    assert [part.kind for part in anatomy.sub_blocks] == ["attention", "mlp"] * LAYERS
    assert len({part.name for part in anatomy.sub_blocks}) == 2 * LAYERS
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    assert [*modules[anatomy.layers_name]] == [block.module for block in anatomy.blocks]
    assert modules[anatomy.layers_name] in anatomy.backbone.children()
    for index, block in enumerate(anatomy.blocks):
        assert block.index == index and modules[block.name] is block.module
        for part in (block.attention, block.mlp):
            assert part.name.startswith(f"{block.name}.")
            assert part.outputs and set(part.outputs) <= set(parameters)
            assert part.parameters == sum(p.numel() for module in part.modules for p in module.parameters())


def test_loose_layers_of_opt_form_one_mlp() -> None:
    block = read_anatomy(FAMILIES["opt"]()).blocks[2]
    assert block.mlp.name == "model.decoder.layers.2.mlp"
    assert block.mlp.modules == (block.module.fc1, block.module.fc2)


def test_dense_blocks_among_mixtures_of_experts_are_read_by_themselves() -> None:
    blocks = read_anatomy(FAMILIES["qwen3_moe"]()).blocks
    outputs = [block.mlp.outputs[0].removeprefix(f"{block.name}.") for block in blocks]
    assert outputs == ["mlp.experts.down_proj", "mlp.down_proj.weight", *["mlp.experts.down_proj"] * 2]


def test_experts_that_no_probe_token_chose_have_outputs_too() -> None:
    model = FAMILIES["llama"]()
    for layer in model.model.layers:
        layer.mlp = _SeparateExperts(layer.mlp, experts=24)
    outputs = read_anatomy(model).blocks[0].mlp.outputs
    assert outputs == tuple(f"model.layers.0.mlp.experts.{e}.down_proj.weight" for e in range(24))


def test_only_blocks_that_normalise_their_sum_are_not_transparent() -> None:
    opaque = {name for name, make in EVERY.items() if not all(b.transparent for b in read_anatomy(make()).blocks)}
    assert opaque == {"opt_with_norms_after"}


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_dropping_a_sub_block_equals_zeroing_its_outputs(read: tuple[PreTrainedModel, Anatomy], kind: str) -> None:
    model, anatomy = read
    ids = ids_of((2, 12))
    for index in (0, 1, LAYERS - 1):
        part: SubBlock = getattr(anatomy.blocks[index], kind)
        zeroed = copy.deepcopy(model)
        for name in part.outputs:
            zeroed.get_parameter(name).zero_()
        with skipped_([part]):
            dropped = model(ids, use_cache=False).logits
        torch.testing.assert_close(dropped, zeroed(ids, use_cache=False).logits)
        assert not torch.allclose(dropped, model(ids, use_cache=False).logits, atol=1e-3)


def test_dropping_both_sub_blocks_of_a_transparent_block_passes_its_input_on(
    read: tuple[PreTrainedModel, Anatomy],
) -> None:
    model, anatomy = read
    hidden, arguments = embed(model, anatomy, ids_of((2, 12)))
    block = anatomy.blocks[1]
    with skipped_([block.attention, block.mlp]):
        assert torch.equal(run_block(block, hidden, arguments[1]), hidden) == block.transparent


@pytest.mark.parametrize("batch", [1, 5])
def test_replayed_blocks_give_the_logits_of_the_model(read: tuple[PreTrainedModel, Anatomy], batch: int) -> None:
    model, anatomy = read
    ids = ids_of((batch, 12))  # longer than the sliding windows
    torch.testing.assert_close(replayed(model, anatomy, ids), model(ids, use_cache=False).logits)


def test_arguments_of_one_sequence_replay_other_tokens(read: tuple[PreTrainedModel, Anatomy]) -> None:
    model, anatomy = read
    _, arguments = embed(model, anatomy, ids_of((1, 12), seed=1))
    ids = ids_of((3, 12), seed=2)
    hidden, _ = embed(model, anatomy, ids)
    for block, recorded in zip(anatomy.blocks, arguments, strict=True):
        hidden = run_block(block, hidden, recorded)
    logits = project(model, anatomy, last_hidden(anatomy, hidden))
    torch.testing.assert_close(logits, model(ids, use_cache=False).logits)


def test_projection_takes_any_leading_shape(read: tuple[PreTrainedModel, Anatomy]) -> None:
    model, anatomy = read
    hidden = model.base_model(ids_of((2, 7)), use_cache=False).last_hidden_state
    logits = model(ids_of((2, 7)), use_cache=False).logits
    assert project(model, anatomy, hidden).shape == (2, 7, VOCABULARY)
    torch.testing.assert_close(project(model, anatomy, hidden[1, 3]), logits[1, 3])


def test_embedding_runs_no_block() -> None:
    model = FAMILIES["llama"]()
    anatomy = read_anatomy(model)
    with _counting(nn.Linear) as runs:
        embed(model, anatomy, ids_of((3, 9)))
    assert runs == []


@every_model
def test_a_dropped_sub_block_runs_nothing_inside(model_name: str) -> None:
    model = EVERY[model_name]()
    part = read_anatomy(model).blocks[0].mlp
    inner = [m for module in part.modules for m in module.modules() if m not in part.modules]
    ran = []
    for module in inner:
        module.register_forward_hook(lambda m, *_: ran.append(m))
    with skipped_([part]):
        model(ids_of((1, 5)), use_cache=False)
    assert ran == []


def test_dropping_nests_and_ends_also_after_an_error() -> None:
    model = FAMILIES["opt"]()
    parts = read_anatomy(model).sub_blocks
    ids = ids_of((1, 9))
    before = model(ids).logits
    with skipped_(parts[:2]):
        once = model(ids).logits
        with pytest.raises(RuntimeError, match="in between"), skipped_(parts[1:4]):
            raise RuntimeError("in between")
        assert torch.equal(model(ids).logits, once)
    assert torch.equal(model(ids).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_dropping_leaves_a_forward_that_was_set_before_in_place() -> None:
    model = FAMILIES["llama"]()
    parts = read_anatomy(model).sub_blocks
    for module in model.modules():
        add_hook_to_module(module, ModelHook())
    hooked = [vars(module)["forward"] for module in model.modules()]
    ids = ids_of((1, 9))
    before = model(ids).logits
    assert read_anatomy(model).sub_blocks[0].outputs == parts[0].outputs
    with skipped_(parts):
        assert not torch.equal(model(ids).logits, before)
    assert [vars(module)["forward"] for module in model.modules()] == hooked
    assert torch.equal(model(ids).logits, before)


@every_model
def test_reading_leaves_the_model_untouched(model_name: str) -> None:
    model = EVERY[model_name]().train()
    model.get_submodule(read_anatomy(model).layers_name)[0].eval()
    before = _state(model)
    generator = torch.get_rng_state()
    read_anatomy(model)
    assert _state(model) == before
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_model
def test_half_precision_is_read_alike(model_name: str, dtype: torch.dtype) -> None:
    expected = [part.outputs for part in read_anatomy(EVERY[model_name]()).sub_blocks]
    anatomy = read_anatomy(EVERY[model_name]().to(dtype))
    assert [part.outputs for part in anatomy.sub_blocks] == expected


@every_model
def test_a_model_that_lost_sub_blocks_before_is_read_alike(model_name: str) -> None:
    model = EVERY[model_name]()
    expected = [part.outputs for part in read_anatomy(model).sub_blocks]
    for name in (name for outputs in expected[:3] for name in outputs):
        model.get_parameter(name).zero_()
    assert [part.outputs for part in read_anatomy(model).sub_blocks] == expected


def test_a_residual_added_inside_a_part_is_refused() -> None:
    with pytest.raises(ModelError, match=r"BloomForCausalLM: in transformer.h.0 .* self_attention .* residual inside"):
        read_anatomy(tiny("Bloom"))


def test_blocks_without_attention_and_mlp_are_refused() -> None:
    config = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(ModelError, match=r"looked for one part .* mixes tokens .* found mixer \(mixes\)"):
        read_anatomy(transformers.MambaForCausalLM(config).eval())


def test_a_model_without_logits_is_refused() -> None:
    with pytest.raises(ModelError, match=r"LlamaModel: expected .* logits for each, got NoneType"):
        read_anatomy(FAMILIES["llama"]().model)


def test_a_model_that_needs_more_than_tokens_is_refused() -> None:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    with pytest.raises(ModelError, match="expected it to run on token ids alone, got ValueError"):
        read_anatomy(transformers.T5ForConditionalGeneration(config).eval())


def test_a_module_without_a_config_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot read Linear: looked for num_hidden_layers in its config, found none"):
        read_anatomy(nn.Linear(2, 2))


def test_a_list_of_another_length_is_refused() -> None:
    model = FAMILIES["llama"]()
    model.config.num_hidden_layers = LAYERS - 1
    with pytest.raises(ModelError, match=f"looked for one list of {LAYERS - 1} blocks .* found none"):
        read_anatomy(model)


def test_a_block_that_stands_twice_in_the_list_is_refused() -> None:
    model = tiny("Llama")
    model.model.layers[2] = model.model.layers[0]
    with pytest.raises(ModelError, match=r"run once each, but model\.layers\.0 and model\.layers\.2 are one$"):
        read_anatomy(model)


def test_blocks_called_with_something_that_depends_on_the_tokens_are_refused() -> None:
    model = FAMILIES["llama"]()
    rotary = model.model.rotary_emb
    angles = rotary.forward
    rotary.forward = lambda x, position_ids: tuple(part * x.std() for part in angles(x, position_ids))
    with pytest.raises(ModelError, match=r"model\.layers\.0 is called with besides depends on the tokens"):
        read_anatomy(model)


def test_blocks_that_serve_one_batch_size_only_are_refused() -> None:
    with pytest.raises(ModelError, match=r"looked for blocks that run one by one, but got .*[Mm]ask"):
        read_anatomy(tiny("XGLM", d_model=32, attention_heads=4, ffn_dim=32, num_layers=LAYERS))


def test_blocks_that_write_into_their_input_are_refused() -> None:
    model = FAMILIES["llama"]()
    block = model.model.layers[1]
    forward = block.forward
    block.forward = lambda hidden, **others: forward(hidden.mul_(2), **others)
    with pytest.raises(ModelError, match=r"leave their input alone, but model\.layers\.1 writes into it"):
        read_anatomy(model)


def test_a_backbone_that_does_more_than_its_modules_is_refused() -> None:
    model = FAMILIES["llama"]()
    backbone = model.model.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        output = backbone(*args, **kwargs)
        output.last_hidden_state = 2 * output.last_hidden_state
        return output

    model.model.forward = doubled
    with pytest.raises(ModelError, match="one by one gives other logits than the model"):
        read_anatomy(model)


def test_refusals_are_one_line() -> None:
    for make in (lambda: tiny("Bloom"), lambda: nn.Linear(2, 2)):
        with pytest.raises(ModelError) as caught:
            read_anatomy(make())
        assert re.fullmatch(r"cannot read \w+: .+", str(caught.value))


class _SeparateExperts(nn.Module):
    """A mixture of experts as separate modules, of which each token uses one."""

    def __init__(self, expert: nn.Module, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(32, experts, bias=False)
        nn.init.normal_(self.gate.weight, generator=torch.Generator().manual_seed(0))
        self.experts = nn.ModuleList(copy.deepcopy(expert) for _ in range(experts))

    def forward(self, hidden: Tensor) -> Tensor:
        output = torch.zeros_like(hidden)
        chosen = self.gate(hidden).argmax(-1)
        for index in chosen.unique().tolist():
            output[chosen == index] = self.experts[index](hidden[chosen == index])
        return output


@contextmanager
def _counting(kind: type[nn.Module]) -> Iterator[list[nn.Module]]:
    ran: list[nn.Module] = []
    original = kind.forward

    def forward(self: nn.Module, *args: Any) -> Any:
        ran.append(self)
        return original(self, *args)

    kind.forward = forward  # type: ignore[method-assign]
    try:
        yield ran
    finally:
        kind.forward = original  # type: ignore[method-assign]


def _state(model: PreTrainedModel) -> dict[str, Any]:
    return {
        "parameters": {n: (id(p), p.requires_grad, p.double().sum().item()) for n, p in model.named_parameters()},
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "modes": [m.training for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "config": model.config.to_dict(),
    }
