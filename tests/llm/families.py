"""Tiny random-weight models, one per family, and a tokenizer for them; add a line and every test runs on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 260  # 256 bytes and the special tokens, rounded up
HIDDEN = 32
LAYERS = 4
POSITIONS = 128


def tiny(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A seeded model of a family in float32 and evaluation mode; `changes` go to its config."""
    config_type = getattr(transformers, f"{family}Config")
    config = config_type(**{**_SIZES, **_FAMILY_SIZES.get(family, {}), **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            # Fresh biases are zero and norms one in every model; trained ones are not.
            with torch.no_grad():
                if name.endswith("bias"):
                    parameter.normal_(std=0.05)
                elif parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8, and an end-of-text token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>")


_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,  # large enough that blocks matter
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": None,
}
_GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 24}

_FAMILY_SIZES: dict[str, dict[str, Any]] = {
    "Llama": _GROUPED,
    "Mistral": {**_GROUPED, "sliding_window": 6},
    "Qwen2": _GROUPED,
    "Qwen3": {**_GROUPED, "head_dim": 8},
    "Gemma2": {
        **_GROUPED,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 6,
        "final_logit_softcapping": 5.0,
    },
    "Phi3": _GROUPED,
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN, "init_std": 0.2},
    "GPT2": {"n_positions": POSITIONS},
    "GPTNeoX": {"use_parallel_residual": True},
    "Mixtral": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {**_GROUPED, **_EXPERTS, "head_dim": 8, "mlp_only_layers": [1]},
    "Qwen2Moe": {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": 40},
    "Olmoe": {**_GROUPED, "num_experts_per_tok": 2, "num_experts": 4},
}


def _maker(family: str) -> Callable[[], PreTrainedModel]:
    return lambda: tiny(family)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _maker("Llama"),
    "mistral": _maker("Mistral"),
    "qwen2": _maker("Qwen2"),
    "qwen3": _maker("Qwen3"),
    "gemma2": _maker("Gemma2"),
    "phi3": _maker("Phi3"),
    "opt": _maker("OPT"),
    "gpt2": _maker("GPT2"),
    "gpt_neox": _maker("GPTNeoX"),
    "mixtral": _maker("Mixtral"),
    "qwen3_moe": _maker("Qwen3Moe"),
    "qwen2_moe": _maker("Qwen2Moe"),
    "olmoe": _maker("Olmoe"),
}
