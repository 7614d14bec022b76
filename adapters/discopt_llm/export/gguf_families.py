"""The families that llama.cpp runs and whose GGUF metadata is written here, and what each asks for.

One record per family: its name there, where its numbers stand in the config of transformers, which values llama.cpp's
code takes for granted, and how its rows lie. What a config says beyond that is refused by name, before any weights are
read. Source: llama.cpp's model code and converter, for their behaviour.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import gguf
from gguf import GGUFValueType, Keys
from gguf.gguf_writer import GGUFValue
from transformers import PretrainedConfig

from discopt_llm.errors import ModelError, short

__all__ = ["FAMILIES", "Family", "Fields", "family_of", "head_dim", "metadata", "refuse", "rope", "value"]

Fields = dict[str, GGUFValue]
Rows = Literal["plain", "interleaved", "fused"]

_LLAMA_KEYS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_SILU = {"hidden_act": ("silu",)}
_NO_BIAS = {"attention_bias": (False,)}


@dataclass(frozen=True, kw_only=True)
class Family:
    """What llama.cpp makes of a model type of transformers."""

    arch: gguf.MODEL_ARCH
    keys: Mapping[str, str] = field(default_factory=lambda: _LLAMA_KEYS)  # metadata key -> attribute of the config
    positions: str = "max_position_embeddings"  # attribute of the config
    holds: Mapping[str, tuple[Any, ...]]  # attributes of the config -> the values llama.cpp computes with
    also: Callable[[PretrainedConfig], str | None] = lambda _: None  # what else is in the way, for a sentence
    rows: Rows = "plain"  # of the projections that are rotated; see `gguf_layout`
    ropes: tuple[str, ...] = ("default", "linear")  # (): none
    norm_offset: float = 0.0  # what its norms add to their weights
    transposed: bool = False  # matrices of its blocks are stored (C, R)
    alternating: bool = False  # every other layer has a sliding window, by its number
    deci: bool = False  # with sub-blocks of its own per layer it is llama.cpp's architecture `deci`
    assumed: Mapping[str, Any] | None = None  # attributes that transformers takes for these when it reads a GGUF file

    @property
    def name(self) -> str:
        """What llama.cpp calls it."""
        return gguf.MODEL_ARCH_NAMES[self.arch]

    def in_transformers(self, config: PretrainedConfig) -> bool:
        """Whether transformers reads GGUF files of such a model, and all in them that makes a difference."""
        if self.assumed is None:
            return False
        plain = {"rope_type": "default", "partial_rotary_factor": 1.0}
        turns = rope(config)
        if self.ropes and any(turns.get(key, default) != default for key, default in plain.items()):
            return False
        return all(getattr(config, name, None) == content for name, content in self.assumed.items())


def _gemma2(config: PretrainedConfig) -> str | None:
    if config.query_pre_attn_scalar != config.head_dim:
        return f"query_pre_attn_scalar {config.query_pre_attn_scalar}, expected the head's {config.head_dim}"
    expected = [("sliding_attention", "full_attention")[i % 2] for i in range(config.num_hidden_layers)]
    if [*config.layer_types] != expected:
        return "layers whose sliding windows do not alternate"
    lacking = [n for n in ("attn_logit_softcapping", "final_logit_softcapping") if getattr(config, n) is None]
    return f"no {lacking[0]}" if lacking else None


def _olmoe(config: PretrainedConfig) -> str | None:
    if config.num_key_value_heads != config.num_attention_heads:
        return f"{config.num_key_value_heads} heads of keys, expected as many as of queries"
    return None


_LLAMA = Family(
    arch=gguf.MODEL_ARCH.LLAMA,
    holds=_SILU,
    rows="interleaved",
    ropes=("default", "linear", "llama3"),
    deci=True,
    assumed={"attention_bias": False, "mlp_bias": False},
)
_EXPERTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}

FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, assumed={}),
    "mixtral": Family(
        arch=gguf.MODEL_ARCH.LLAMA,
        keys=_LLAMA_KEYS | _EXPERTS,
        holds=_SILU,
        rows="interleaved",
    ),
    "qwen2": Family(arch=gguf.MODEL_ARCH.QWEN2, holds=_SILU, deci=True, assumed={}),
    "qwen3": Family(arch=gguf.MODEL_ARCH.QWEN3, holds=_SILU | _NO_BIAS, assumed={"head_dim": 128}),
    "qwen3_moe": Family(
        arch=gguf.MODEL_ARCH.QWEN3MOE,
        keys=_LLAMA_KEYS | _EXPERTS | {"expert_feed_forward_length": "moe_intermediate_size"},
        holds=_SILU | _NO_BIAS | {"norm_topk_prob": (True,), "mlp_only_layers": ([],), "decoder_sparse_step": (1,)},
        assumed={"moe_intermediate_size": 768},
    ),
    "olmoe": Family(
        arch=gguf.MODEL_ARCH.OLMOE,
        keys=_LLAMA_KEYS | _EXPERTS,
        holds=_SILU | _NO_BIAS | {"norm_topk_prob": (False,), "clip_qkv": (None,)},
        also=_olmoe,
    ),
    "gemma2": Family(
        arch=gguf.MODEL_ARCH.GEMMA2,
        keys=_LLAMA_KEYS
        | {
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
            "attention.sliding_window": "sliding_window",
        },
        holds=_NO_BIAS | {"hidden_activation": ("gelu_pytorch_tanh",), "tie_word_embeddings": (True,)},
        also=_gemma2,
        norm_offset=1.0,
        alternating=True,
        assumed={"query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "phi3": Family(arch=gguf.MODEL_ARCH.PHI3, holds=_SILU, ropes=("default",), assumed={}),
    "gpt2": Family(
        arch=gguf.MODEL_ARCH.GPT2,
        keys={
            "embedding_length": "n_embd",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        positions="n_positions",
        holds={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        ropes=(),
        transposed=True,
        assumed={"n_positions": 1024, "n_inner": None},
    ),
    "gpt_neox": Family(
        arch=gguf.MODEL_ARCH.GPTNEOX,
        keys={
            "embedding_length": "hidden_size",
            "feed_forward_length": "intermediate_size",
            "attention.head_count": "num_attention_heads",
            "attention.layer_norm_epsilon": "layer_norm_eps",
            "use_parallel_residual": "use_parallel_residual",
        },
        holds={
            "hidden_act": ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"),  # llama.cpp has the tanh form only
            "attention_bias": (True,),
            "tie_word_embeddings": (False,),
        },
        rows="fused",
    ),
}
"""By `model_type` of the config."""


def family_of(config: PretrainedConfig) -> Family:
    """The record of a config's family; raises ModelError, naming it, if a GGUF file cannot hold such a model."""
    text = config.get_text_config()
    found = FAMILIES.get(text.model_type)
    if found is None or text is not config:
        known = ", ".join(FAMILIES)
        raise ModelError(f"cannot write GGUF files of the family {config.model_type!r}, only of {known}")
    obstacle = found.also(text)
    for name, values in found.holds.items():
        if (got := getattr(text, name, None)) not in values:
            wanted = " or ".join(map(repr, values))
            obstacle = f"{name} {short(got)}, and llama.cpp computes with {wanted} only"
    kind = rope(text).get("rope_type", "default")
    if found.ropes and kind not in found.ropes:
        obstacle = f"rotary embeddings of type {kind!r}, expected one of {', '.join(found.ropes)}"
    if obstacle is not None:
        raise ModelError(f"cannot write a GGUF file of this {text.model_type} model: it has {obstacle}")
    return found


def refuse(config: PretrainedConfig) -> None:
    """Raise ModelError, naming the family, for a model that no GGUF file of ours can hold."""
    family_of(config)


def metadata(family: Family, config: PretrainedConfig) -> Fields:
    """The fields that say how a model computes: key -> value."""
    arch = family.name
    numbers = {key: getattr(config, attribute) for key, attribute in family.keys.items()}
    numbers["block_count"] = config.num_hidden_layers
    numbers["context_length"] = min(n for n in (getattr(config, family.positions), _window(family, config)) if n)
    numbers["vocab_size"] = config.vocab_size
    if family.arch == gguf.MODEL_ARCH.GPT2:
        numbers["feed_forward_length"] = config.n_inner or 4 * config.n_embd
    if family.arch == gguf.MODEL_ARCH.PHI3:
        numbers["attention.sliding_window"] = 0  # without it, llama.cpp assumes one; see `_window`
    if family.ropes:
        angles = rope(config)
        numbers["attention.key_length"] = numbers["attention.value_length"] = head_dim(config)
        numbers["rope.dimension_count"] = int(head_dim(config) * angles.get("partial_rotary_factor", 1.0))
        numbers["rope.freq_base"] = float(angles["rope_theta"])
        if angles.get("rope_type") == "linear":
            numbers |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(angles["factor"])}
    own = {f"{arch}.{key}": value(number) for key, number in numbers.items()}
    return {Keys.General.ARCHITECTURE: value(arch), Keys.General.TYPE: value("model"), **own}


def head_dim(config: PretrainedConfig) -> int:
    """Of one attention head."""
    dim: int | None = getattr(config, "head_dim", None)
    return dim or config.hidden_size // config.num_attention_heads


def rope(config: PretrainedConfig) -> Mapping[str, Any]:
    """How positions are rotated, as transformers has it; empty for a family without."""
    return getattr(config, "rope_parameters", None) or {}


def value(content: Any) -> GGUFValue:
    """A field of the type that llama.cpp expects of such a value; lists must not be empty."""
    if isinstance(content, list):
        return GGUFValue(content, GGUFValueType.ARRAY, value(content[0]).type)
    types = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
    return GGUFValue(content, types.get(type(content), GGUFValueType.STRING))


def _window(family: Family, config: PretrainedConfig) -> int | None:
    """How far attention sees, where llama.cpp would see further: beyond so many tokens it is another model."""
    types = getattr(config, "layer_types", None)
    if family.alternating or (types is not None and "sliding_attention" not in types):
        return None
    return getattr(config, "sliding_window", None)
