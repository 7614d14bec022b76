"""Layers and their inputs: which weights they are in every family, how they are stored, what they multiply."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from discopt_llm.anatomy import embed, read_anatomy, run_block
from discopt_llm.errors import ModelError
from discopt_llm.layers import Layer, collecting_, read_layers
from tests.llm.families import FAMILIES, HIDDEN, tiny
from tests.llm.test_anatomy import _SeparateExperts, ids_of

_APART = [("self_attn.q_proj", 0), ("self_attn.k_proj", 0), ("self_attn.v_proj", 0), ("self_attn.o_proj", 1)]
_DENSE = [*_APART, ("mlp.gate_proj", 2), ("mlp.up_proj", 2), ("mlp.down_proj", 3)]
_MIXTURE = [*_APART, ("mlp.experts.gate_up_proj", 2), ("mlp.experts.down_proj", 3)]
_SHARED = ("mlp.shared_expert.gate_proj", 2), ("mlp.shared_expert.up_proj", 2), ("mlp.shared_expert.down_proj", 3)

# Layers of the first block in the order of use, and the number of the input of each.
EXPECTED: dict[str, list[tuple[str, int]]] = {
    "llama": _DENSE,
    "mistral": _DENSE,
    "qwen2": _DENSE,
    "qwen3": _DENSE,
    "gemma2": _DENSE,
    "phi3": [("self_attn.qkv_proj", 0), ("self_attn.o_proj", 1), ("mlp.gate_up_proj", 2), ("mlp.down_proj", 3)],
    "opt": [*_APART[:3], ("self_attn.out_proj", 1), ("fc1", 2), ("fc2", 3)],
    "gpt2": [("attn.c_attn", 0), ("attn.c_proj", 1), ("mlp.c_fc", 2), ("mlp.c_proj", 3)],
    "gpt_neox": [
        ("attention.query_key_value", 0),
        ("attention.dense", 1),
        ("mlp.dense_h_to_4h", 2),
        ("mlp.dense_4h_to_h", 3),
    ],
    "mixtral": _MIXTURE,
    "qwen3_moe": _MIXTURE,
    "qwen2_moe": [*_APART, *_SHARED, ("mlp.experts.gate_up_proj", 4), ("mlp.experts.down_proj", 5)],
    "olmoe": _MIXTURE,
}
MIXTURES = ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe")
VARIANTS: dict[str, Callable[[], PreTrainedModel]] = {
    "parallel": lambda: tiny("Phi"),  # attention and MLP read the very same tensor
    "separate_experts": lambda: _with_separate_experts(tiny("Llama", num_key_value_heads=2), experts=12),
}
EVERY = {**FAMILIES, **VARIANTS}


@pytest.fixture(scope="module", params=EVERY)
def read(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, tuple[Layer, ...]]:
    model = EVERY[request.param]()
    return model, read_layers(model, read_anatomy(model))


def layers_of(model: PreTrainedModel, block: int = 0) -> list[Layer]:
    return [layer for layer in read_layers(model, read_anatomy(model)) if layer.block == block]


def named(layers: list[Layer], prefix: str) -> list[tuple[str, int]]:
    return [(layer.name.removeprefix(prefix), layer.input) for layer in layers]


# -- which weights are layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_of_a_block_are_its_matrices_in_the_order_of_use(family: str) -> None:
    model = FAMILIES[family]()
    anatomy = read_anatomy(model)
    layers = read_layers(model, anatomy)
    assert [layer.index for layer in layers] == [*range(len(layers))]
    assert [layer.block for layer in layers] == sorted(layer.block for layer in layers)
    for block in anatomy.blocks:
        dense = family == "qwen3_moe" and block.index == 1
        of_block = [layer for layer in layers if layer.block == block.index]
        assert named(of_block, f"{block.name}.") == (_DENSE if dense else EXPECTED[family])
        for layer in of_block:
            part = block.attention if layer.kind == "attention" else block.mlp
            assert layer.kind == part.kind and layer.owner in [m for p in part.modules for m in p.modules()]


def test_a_layer_is_found_by_its_name_in_the_model(read: tuple[PreTrainedModel, tuple[Layer, ...]]) -> None:
    model, layers = read
    parameters = dict(model.named_parameters())
    for layer in layers:
        assert parameters[layer.parameter_name] is layer.parameter
        assert layer.name == layer.parameter_name.removesuffix(".weight")
        assert layer.weights == layer.parameter.numel()


def test_every_matrix_of_a_block_is_a_layer_but_routers_and_gates(
    read: tuple[PreTrainedModel, tuple[Layer, ...]],
) -> None:
    model, layers = read
    found = {id(layer.parameter) for layer in layers}
    blocks = [block.module for block in read_anatomy(model).blocks]
    matrices = {n: p for block in blocks for n, p in block.named_parameters() if p.dim() > 1}
    assert len(found) == len(layers)
    assert {n for n, p in matrices.items() if id(p) not in found} <= {
        "mlp.gate.weight",
        "mlp.shared_expert_gate.weight",
    }


def test_embeddings_and_the_head_are_no_layers(read: tuple[PreTrainedModel, tuple[Layer, ...]]) -> None:
    model, layers = read
    outside = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    assert not outside & {id(layer.parameter) for layer in layers}


def test_experts_are_one_layer_with_a_matrix_each() -> None:
    gate_up, down = layers_of(FAMILIES["mixtral"]())[-2:]
    assert (gate_up.matrices, gate_up.rows, gate_up.columns) == (4, 2 * 48, HIDDEN)
    assert (down.matrices, down.rows, down.columns) == (4, HIDDEN, 48)
    assert down.weights == 4 * HIDDEN * 48


def test_experts_that_are_stored_transposed_are_found_and_their_biases_are_no_layers() -> None:
    model = tiny("GptOss", num_key_value_heads=2, head_dim=8, num_local_experts=4, rope_parameters=_PLAIN_ROPE)
    layers = layers_of(model)
    assert named(layers, "model.layers.0.") == _MIXTURE
    assert [layer.transposed for layer in layers] == [False] * 4 + [True] * 2
    gate_up = layers[-2]
    assert (gate_up.matrices, gate_up.rows, gate_up.columns) == (4, 2 * 48, HIDDEN)


def test_separate_experts_are_layers_that_share_no_input_also_those_that_no_token_chose() -> None:
    layers = layers_of(VARIANTS["separate_experts"]())
    expected = [f"mlp.experts.{e}.{name}_proj" for name in ("gate", "up", "down") for e in range(12)]
    assert [layer.name for layer in layers[4:]] == [f"model.layers.0.{name}" for name in expected]
    assert [layer.input for layer in layers[4:]] == [*range(2, 2 + len(expected))]


def test_attention_and_mlp_share_an_input_where_both_read_the_same_norm() -> None:
    layers = layers_of(VARIANTS["parallel"]())
    assert {layer.name.rpartition(".")[2]: layer.input for layer in layers} == {
        "q_proj": 0,
        "k_proj": 0,
        "v_proj": 0,
        "dense": 1,
        "fc1": 0,
        "fc2": 2,
    }


def test_what_only_scales_is_no_layer_whatever_its_shape() -> None:
    model = tiny("Cohere", num_key_value_heads=2, use_qk_norm=True)
    assert model.model.layers[0].self_attn.q_norm.weight.shape == (4, 8)
    assert named(layers_of(model), "model.layers.0.") == [
        *_APART,
        ("mlp.gate_proj", 0),
        ("mlp.up_proj", 0),
        ("mlp.down_proj", 2),
    ]


def test_an_input_that_was_changed_in_place_is_another() -> None:
    model = FAMILIES["llama"]()
    mlp = model.model.layers[0].mlp

    def forward(x: Tensor) -> Tensor:
        x = x.clone()
        gate = mlp.act_fn(mlp.gate_proj(x))
        return mlp.down_proj(gate * mlp.up_proj(x.mul_(2)))

    mlp.forward = forward
    assert [layer.input for layer in layers_of(model)[4:]] == [2, 3, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_alike(dtype: torch.dtype) -> None:
    for family, make in FAMILIES.items():
        layers = layers_of(make().to(dtype))
        assert named(layers, f"{layers[0].name.split('.0.')[0]}.0.") == EXPECTED[family]


# -- how they are stored -------------------------------------------------------------------------------------------


def test_a_layer_answers_its_matrix_times_its_input(read: tuple[PreTrainedModel, tuple[Layer, ...]]) -> None:
    _, layers = read
    for layer in layers:
        if layer.matrices == 1:
            x = torch.randn(3, layer.columns, generator=torch.Generator().manual_seed(layer.index))
            (W,) = layer.to_matrices(layer.parameter)
            bias = layer.owner.bias if getattr(layer.owner, "bias", None) is not None else 0
            torch.testing.assert_close(layer.owner(x), x @ W.T + bias)


def test_matrices_and_the_stored_form_are_inverse(read: tuple[PreTrainedModel, tuple[Layer, ...]]) -> None:
    _, layers = read
    for layer in layers:
        stored = layer.parameter
        matrices = layer.to_matrices(stored)
        assert matrices.shape == (layer.matrices, layer.rows, layer.columns)
        assert matrices.data_ptr() == stored.data_ptr()
        again = layer.to_parameter(matrices.contiguous())
        assert again.is_contiguous() and torch.equal(again, stored)
        assert torch.equal(layer.to_matrices(again), matrices)


def test_other_shapes_than_that_of_the_layer_are_refused() -> None:
    layer = layers_of(FAMILIES["gpt2"]())[0]
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.attn\.c_attn to have shape \(32, 96\), got \(96, 32\)"):
        layer.to_matrices(torch.zeros(96, 32))
    with pytest.raises(ValueError, match=r"c_attn of shape \(1, 96, 32\), got \(96, 32\)"):
        layer.to_parameter(torch.zeros(96, 32))


# -- what they multiply --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_the_collected_moment_equals_that_of_the_inputs_seen_by_hooks(name: str) -> None:
    model = EVERY[name]().double()
    model.set_experts_implementation("eager")  # the others have no double precision
    anatomy = read_anatomy(model)
    layers = read_layers(model, anatomy)
    hidden, arguments = embed(model, anatomy, ids_of((3, 12)))
    for block, replay in zip(anatomy.blocks[:2], arguments, strict=False):
        of_block = [layer for layer in layers if layer.block == block.index]
        with collecting_(model, of_block, dtype=torch.float64) as sums:
            run_block(block, hidden[:2], replay)
            run_block(block, hidden[2:], replay)
        with hooked_inputs(of_block) as expected:
            after = run_block(block, hidden, replay)
        assert sorted(sums) == sorted({layer.input for layer in of_block})
        for layer in of_block:
            assert len(sums[layer.input]) == layer.matrices
            for e, collected in enumerate(sums[layer.input]):
                X = torch.cat([hidden.new_zeros(0, layer.columns), *expected[layer, e]])
                assert collected.tokens == len(X)
                torch.testing.assert_close(collected.H, X.T @ X / max(len(X), 1), rtol=1e-12, atol=1e-12)
        hidden = after


def test_sums_are_of_single_precision_unless_asked_otherwise() -> None:
    model = FAMILIES["llama"]().bfloat16()
    layers = layers_of(model)
    with collecting_(model, layers) as sums:
        model(ids_of((1, 6)), use_cache=False)
    assert {collected.H.dtype for (collected,) in sums.values()} == {torch.float32}
    assert [collected.tokens for (collected,) in sums.values()] == [6] * 4


@pytest.mark.parametrize("family", MIXTURES)
def test_an_expert_that_no_token_chose_counts_none(family: str) -> None:
    model = FAMILIES[family]()
    layers = layers_of(model)
    with collecting_(model, layers) as sums:
        model(ids_of((1, 1)), use_cache=False)
    for layer in layers[-2:]:
        assert sorted(collected.tokens for collected in sums[layer.input]) == [0, 0, 1, 1]
        for collected in sums[layer.input]:
            assert collected.H.any() == (collected.tokens > 0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_layers_and_inputs_are_the_same_without_gradients(
    family: str, mode: Callable[[], AbstractContextManager[None]]
) -> None:
    model = FAMILIES[family]()
    expected, H = named(layers_of(model), ""), _moments(model)
    with mode():
        assert named(layers_of(model), "") == expected
        assert all(torch.equal(a, b) for a, b in zip(_moments(model), H, strict=True))


def test_layers_that_are_left_out_collect_nothing() -> None:
    model = FAMILIES["llama"]()
    layers = layers_of(model)
    with collecting_(model, layers[4:]) as sums:
        model(ids_of((1, 5)), use_cache=False)
    assert {number: collected.tokens for number, (collected,) in sums.items()} == {2: 5, 3: 5}
    with collecting_(model, []) as sums:
        assert sums == {}


def test_layers_of_several_blocks_are_refused() -> None:
    model = FAMILIES["llama"]()
    layers = read_layers(model, read_anatomy(model))
    with pytest.raises(ValueError, match="expected layers of one block, got some of blocks 0, 1, 2, 3"):
        collecting_(model, layers).__enter__()


# -- the model stays as it was -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_reading_and_collecting_leave_the_model_as_it_was_also_after_an_error(family: str) -> None:
    model = FAMILIES[family]()
    before = _state(model)
    layers = layers_of(model)
    assert _state(model) == before
    with collecting_(model, layers) as sums:
        assert model.get_experts_implementation() == {"": "eager"}
        model(ids_of((1, 5)), use_cache=False)
    with pytest.raises(RuntimeError, match="in between"), collecting_(model, layers):
        raise RuntimeError("in between")
    assert _state(model) == before
    model(ids_of((1, 5)), use_cache=False)
    assert sums[0][0].tokens == 5  # those inside only


def test_a_refused_model_is_left_as_it_was() -> None:
    model = FAMILIES["mixtral"]()
    anatomy = read_anatomy(model)
    experts = model.model.layers[2].mlp.experts
    experts.forward = lambda x, *_: torch.einsum("nc,erc->nr", x, experts.gate_up_proj)[:, :HIDDEN]
    before = _state(model)
    with pytest.raises(ModelError, match="einsum"):
        read_layers(model, anatomy)
    assert _state(model) == before


# -- refusals ------------------------------------------------------------------------------------------------------


def test_a_weight_that_several_blocks_have_is_refused() -> None:
    model = FAMILIES["llama"]()
    model.model.layers[2].self_attn.q_proj = model.model.layers[0].self_attn.q_proj
    with pytest.raises(
        ModelError,
        match=r"cannot read the layers of LlamaForCausalLM: expected every layer to have weights of its own, but "
        r"model\.layers\.0\.self_attn\.q_proj\.weight and model\.layers\.2\.self_attn\.q_proj\.weight share theirs",
    ):
        read_layers(model, read_anatomy(model))


def test_blocks_that_share_everything_are_refused() -> None:
    model = FAMILIES["llama"]()
    first, *others = model.model.layers
    for other in others:
        other.self_attn, other.mlp = first.self_attn, first.mlp
    with pytest.raises(ModelError, match=r"model\.layers\.0\.\S+\.weight and model\.layers\.1\.\S+\.weight share"):
        read_layers(model, read_anatomy(model))


def test_a_weight_that_is_a_part_of_another_is_refused() -> None:
    model = FAMILIES["llama"]()
    attention = model.model.layers[1].self_attn
    attention.k_proj.weight = nn.Parameter(attention.q_proj.weight[:16], requires_grad=False)
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.k_proj\.weight and \S+\.q_proj\.weight share"):
        read_layers(model, read_anatomy(model))


def test_a_weight_that_is_tied_to_the_embedding_is_refused() -> None:
    model = tiny("Llama", num_key_value_heads=2, intermediate_size=260)
    model.model.layers[3].mlp.up_proj.weight = model.model.embed_tokens.weight
    with pytest.raises(ModelError, match=r"embed_tokens\.weight and model\.layers\.3\.mlp\.up_proj\.weight share"):
        read_layers(model, read_anatomy(model))


def _convolved(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    return lambda x: nn.functional.conv1d(x.mT, linear.weight[..., None]).mT


def _summed(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.einsum("...c,rc->...r", x, linear.weight)


def _cast(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    return lambda x: nn.functional.linear(x.double(), linear.weight.double()).float()


def _cut(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.cat([nn.functional.linear(x, linear.weight[i : i + 8]) for i in range(0, 48, 8)], dim=-1)


def _both_ways(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        once = nn.functional.linear(x, linear.weight)
        return once + nn.functional.linear(once @ linear.weight, linear.weight)

    return forward


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (_convolved, "is used by conv1d"),
        (_summed, "is used by einsum"),
        (_cast, "is used by double"),
        (_cut, "is used by linear"),
        (_both_ways, "is used both as it is and transposed"),
    ],
)
def test_a_weight_that_is_not_multiplied_by_its_input_is_refused(
    use: Callable[[nn.Linear], Callable[[Tensor], Tensor]], reason: str
) -> None:
    model = FAMILIES["llama"]()
    up = model.model.layers[1].mlp.up_proj
    up.forward = use(up)
    with pytest.raises(ModelError, match=rf"but model\.layers\.1\.mlp\.up_proj\.weight of \(48, 32\) {reason}"):
        read_layers(model, read_anatomy(model))


def test_a_weight_that_is_not_used_is_refused() -> None:
    model = FAMILIES["llama"]()
    model.model.layers[0].mlp.spare = nn.Linear(HIDDEN, HIDDEN)
    with pytest.raises(ModelError, match=r"but model\.layers\.0\.mlp\.spare\.weight of \(32, 32\) is not used"):
        read_layers(model, read_anatomy(model))


# -- plain versions ------------------------------------------------------------------------------------------------

_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@contextmanager
def hooked_inputs(layers: list[Layer]) -> Iterator[dict[tuple[Layer, int], list[Tensor]]]:
    """The inputs (tokens, C) of every matrix while inside, by forward hooks on the modules that own them."""
    seen: dict[tuple[Layer, int], list[Tensor]] = defaultdict(list)

    def on_module(layer: Layer) -> RemovableHandle:
        return layer.owner.register_forward_pre_hook(lambda _, args: seen[layer, 0].append(args[0].flatten(0, -2)))

    def on_experts(layer: Layer) -> RemovableHandle:
        def hook(experts: Any, args: tuple[Tensor, ...]) -> None:
            hidden, chosen, _ = args
            for e in range(layer.matrices):
                x = hidden[(chosen == e).any(dim=-1)]
                if layer.attribute == "down_proj":
                    gate, up = (x @ experts.gate_up_proj[e].T).chunk(2, dim=-1)
                    x = experts.act_fn(gate) * up
                seen[layer, e].append(x)

        return layer.owner.register_forward_pre_hook(hook)

    handles = [(on_module if layer.matrices == 1 else on_experts)(layer) for layer in layers]
    yield seen
    for handle in handles:
        handle.remove()


def _moments(model: PreTrainedModel) -> list[Tensor]:
    with collecting_(model, layers_of(model)) as sums:
        model(ids_of((1, 7)), use_cache=False)
    return [collected.H for of_input in sums.values() for collected in of_input]


def _with_separate_experts(model: PreTrainedModel, experts: int) -> PreTrainedModel:
    for layer in model.model.layers:
        layer.mlp = _SeparateExperts(copy.deepcopy(layer.mlp), experts)
    return model.requires_grad_(False)


def _state(model: PreTrainedModel) -> Any:
    return (
        {n: (id(p), p.double().sum().item()) for n, p in model.named_parameters()},
        [(len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for m in model.modules()],
        model.get_experts_implementation(),
        _get_current_function_mode_stack(),
    )
