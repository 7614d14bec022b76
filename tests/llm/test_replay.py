"""Other weights in a model for a while: cheap, and undone whatever happens inside."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from discopt_llm.models import fingerprint
from discopt_llm.replay import weights_replaced_
from tests.llm.families import FAMILIES, LAYERS, VOCABULARY, tiny

Q, DOWN = "model.layers.0.self_attn.q_proj.weight", "model.layers.2.mlp.down_proj.weight"
MODES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@cache
def llama() -> PreTrainedModel:
    return FAMILIES["llama"]()


def other(*names: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(llama().get_parameter(name).shape, generator=generator) for name in names}


def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.arange(20)[None] % VOCABULARY
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


class Made(Mapping[str, Tensor]):
    """Makes each tensor when it is asked for, and counts how many of them are alive when the next one is made."""

    def __init__(self, shapes: Mapping[str, torch.Size], fails_at: str | None = None) -> None:
        self.shapes, self.fails_at = shapes, fails_at
        self.made: list[weakref.ref[Tensor]] = []
        self.alive: list[int] = []

    def __getitem__(self, name: str) -> Tensor:
        if name == self.fails_at:
            raise OSError("the disk is gone")
        self.alive.append(sum(tensor() is not None for tensor in self.made))
        tensor = torch.randn(self.shapes[name], generator=torch.Generator().manual_seed(len(self.made)))
        self.made.append(weakref.ref(tensor))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


# truth


def test_the_model_answers_as_one_with_those_weights() -> None:
    model, weights = FAMILIES["llama"](), other(Q, DOWN)
    before = logits(llama())
    with weights_replaced_(llama(), weights):
        found = logits(llama())
    model.load_state_dict(weights, strict=False)
    assert torch.equal(found, logits(model))
    assert torch.equal(logits(llama()), before)


@pytest.mark.parametrize("used", MODES)
@pytest.mark.parametrize("made", MODES)
def test_weights_made_in_any_mode_stand_in_without_a_copy_in_any_mode(made: str, used: str) -> None:
    layer = nn.Linear(4, 4)
    own, values = layer.weight, layer.weight.detach().clone()
    place = own.data_ptr()
    with MODES[made]():
        weights = {"weight": torch.randn(4, 4)}
    with MODES[used](), weights_replaced_(layer, weights):
        assert layer.weight is own
        assert own.data_ptr() == weights["weight"].data_ptr()
        x = torch.randn(2, 4)
        torch.testing.assert_close(layer(x), x @ weights["weight"].T + layer.bias)
    assert own.data_ptr() == place
    assert torch.equal(own, values)
    assert own.requires_grad and not own.is_inference()
    layer(torch.randn(2, 4)).sum().backward()  # as trainable as before
    assert own.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_cast_to_the_models_type(dtype: torch.dtype) -> None:
    model, weights = tiny("Llama", dtype=dtype), {name: w.double() for name, w in other(Q).items()}
    with weights_replaced_(model, weights):
        assert torch.equal(model.get_parameter(Q), weights[Q].to(dtype))


def test_inner_weights_win_while_they_last() -> None:
    outer, inner = other(Q, DOWN), {Q: torch.zeros_like(other(Q)[Q])}
    with weights_replaced_(llama(), outer):
        with weights_replaced_(llama(), inner):
            assert not llama().get_parameter(Q).any()
            assert torch.equal(llama().get_parameter(DOWN), outer[DOWN])
        assert torch.equal(llama().get_parameter(Q), outer[Q])


def test_weights_may_be_made_of_the_models_own() -> None:
    k, v = (f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "kv")
    own = {name: llama().get_parameter(name).clone() for name in (k, v)}
    with weights_replaced_(llama(), {k: llama().get_parameter(v), v: llama().get_parameter(k)}):
        assert torch.equal(llama().get_parameter(k), own[v])
        assert torch.equal(llama().get_parameter(v), own[k])
    assert all(torch.equal(llama().get_parameter(name), own[name]) for name in (k, v))


def test_tensors_are_made_one_at_a_time() -> None:
    model = tiny("Llama", dtype=torch.bfloat16)
    weights = Made({name: p.shape for name, p in model.named_parameters() if name.endswith("proj.weight")})
    with weights_replaced_(model, weights):
        assert weights.alive == [0] * (7 * LAYERS)
        assert not any(tensor() is not None for tensor in weights.made)


def test_a_part_of_a_model_has_names_of_its_own() -> None:
    attention, weights = llama().model.layers[0].self_attn, other(Q)
    with weights_replaced_(attention, {"q_proj.weight": weights[Q]}):
        assert torch.equal(llama().get_parameter(Q), weights[Q])


# undone


def test_the_models_weights_come_back_after_an_error_inside() -> None:
    before = fingerprint(llama())
    with pytest.raises(KeyboardInterrupt), weights_replaced_(llama(), other(Q, DOWN)):
        raise KeyboardInterrupt
    assert fingerprint(llama()) == before


def test_the_models_weights_come_back_when_a_tensor_cannot_be_made() -> None:
    before = fingerprint(llama())
    weights = Made({name: tensor.shape for name, tensor in other(Q, DOWN).items()}, fails_at=DOWN)
    with pytest.raises(OSError, match="the disk is gone"), weights_replaced_(llama(), weights):
        pass
    assert len(weights.made) == 1
    assert fingerprint(llama()) == before


# refusals


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj", "model.layers.9.self_attn.q_proj.weight"])
def test_unknown_names_are_refused_before_a_tensor_is_made(name: str) -> None:
    weights = Made({Q: llama().get_parameter(Q).shape, name: torch.Size((1,))})
    with pytest.raises(ValueError, match=f"full names of the model's parameters, got '{name}'"):
        weights_replaced_(llama(), weights).__enter__()
    assert not weights.made


def test_other_shapes_are_refused() -> None:
    before = fingerprint(llama())
    weights = {**other(Q), "model.layers.0.self_attn.k_proj.weight": torch.zeros(32, 16)}
    with pytest.raises(ValueError, match=r"expected model\.layers\.0\.self_attn\.k_proj\.weight of shape \(16, 32\), "):
        weights_replaced_(llama(), weights).__enter__()
    assert fingerprint(llama()) == before


def test_integers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"q_proj\.weight in floating point, got torch\.uint8"):
        weights_replaced_(llama(), {Q: other(Q)[Q].to(torch.uint8)}).__enter__()


@pytest.mark.parametrize("name", ["lm_head.weight", "transformer.wte.weight"])
def test_a_tied_parameter_is_replaced_wherever_it_is_used(name: str) -> None:
    model = tiny("GPT2", tie_word_embeddings=True)
    before = model.lm_head.weight.clone()
    with weights_replaced_(model, {name: torch.ones_like(before)}):
        assert (model.lm_head.weight == 1).all()
        assert (model.transformer.wte.weight == 1).all()
    assert (model.lm_head.weight == before).all()
    assert (model.transformer.wte.weight == before).all()


def test_two_names_of_a_tied_parameter_are_refused() -> None:
    model = tiny("GPT2", tie_word_embeddings=True)
    weights = dict.fromkeys(("lm_head.weight", "transformer.wte.weight"), torch.zeros_like(model.lm_head.weight))
    with pytest.raises(ValueError, match=r"one name of a tied parameter, got lm_head\.weight and transformer\.wte"):
        weights_replaced_(model, weights).__enter__()
