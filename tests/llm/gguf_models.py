"""Tiny models that GGUF files can hold: rows of a multiple of 32, and tokenizers that were trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from discopt_llm import ggml
from discopt_llm.anatomy import read_anatomy
from discopt_llm.bank_forms import Ggml
from discopt_llm.drop import DropLevels
from discopt_llm.export.gguf_proof import PROBES
from discopt_llm.export.student import StudentModel
from discopt_llm.layers import Layer, layers_for
from discopt_llm.models import LoadedModel
from tests.llm.families import tiny

VOCABULARY = 512
CONTEXT = 64
END = "<|end|>"
LICENSE = Path(__file__).parents[2] / "LICENSE"  # a text that stays as it is

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 96,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.08,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_WIDE = {"head_dim": 32}
_CHANGES: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": None},
    "Qwen3": _WIDE,
    "Qwen3Moe": {**_WIDE, "mlp_only_layers": [], "norm_topk_prob": True, "moe_intermediate_size": 64},
    "Gemma2": {**_WIDE, "query_pre_attn_scalar": 32, "sliding_window": CONTEXT, "tie_word_embeddings": True},
    "Olmoe": {"num_key_value_heads": 4},
    "GPT2": {"n_positions": CONTEXT},
    "GPTNeoX": {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25, "rope_type": "default"}},
}


def model(family: str, **changes: Any) -> LoadedModel:
    """A model of a family that llama.cpp can run."""
    made = tiny(family, **{**_SIZES, **_CHANGES.get(family, {}), **changes})
    return LoadedModel(made, byte_level(), "a/tiny", read_anatomy(made))


@cache
def loaded(family: str) -> LoadedModel:
    return model(family)


def dropping(model: LoadedModel, *sub_blocks: int) -> StudentModel:
    """A student without these: 2 b is the attention of block b, 2 b + 1 its MLP."""
    levels = DropLevels(model.anatomy, "sublayer")
    profile = np.ones(len(levels.names), dtype=np.int16)
    profile[[*sub_blocks]] = 0
    return StudentModel(model, levels, profile)


@dataclass(frozen=True, eq=False)
class Levelled:
    """A student with every layer, and both ends, in some type of ggml: as a StudentModel with a bank would be."""

    loaded: LoadedModel
    types: Mapping[str, str]  # layer name -> type

    kind = "gguf"
    what = "at levels of a bank"

    @property
    def dropped(self) -> NDArray[np.bool_]:
        return np.zeros((len(self.loaded.anatomy.blocks), 2), dtype=np.bool_)

    @cached_property
    def placed(self) -> dict[str, tuple[Layer, None]]:
        layers = layers_for(self.loaded, "gguf")
        return {layer.parameter_name: (layer, None) for layer in layers if layer.name in self.types}

    def form(self, name: str) -> Ggml:
        layer, _ = self.placed[name]
        kind = self.types[layer.name]
        matrices = layer.to_matrices(layer.parameter)
        return Ggml(kind, torch.stack([ggml.quantize(matrix, kind) for matrix in matrices]), layer.columns)

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: layer.to_parameter(self.form(name).dense()) for name, (layer, _) in self.placed.items()}


def levelled(model: LoadedModel, *types: str) -> Levelled:
    """All layers, in these types by turns."""
    layers = layers_for(model, "gguf")
    return Levelled(model, {layer.name: types[i % len(types)] for i, layer in enumerate(layers)})


def byte_level(pre: Any = None, size: int = VOCABULARY, **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes as GPT-2 has one, with another way to split text if one is given."""
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size - 8, initial_alphabet=alphabet, special_tokens=[END], show_progress=False
    )
    tokenizer.train_from_iterator([_text()], trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def sentencepiece(steps: str, size: int = 700) -> PreTrainedTokenizerFast:
    """A tokenizer as one is made of a SentencePiece model: every way to merge into a token, token by token."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator([_text()], trainers.BpeTrainer(vocab_size=size - 300, show_progress=False))
    pieces = [token for token, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocabulary = {text: number for number, text in enumerate(texts)}
    merges = [
        (piece[:i], piece[i:])
        for piece in pieces
        for i in range(1, len(piece))
        if piece[:i] in vocabulary and piece[i:] in vocabulary
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if steps == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif steps == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True
    )


@cache
def _text() -> str:
    """English, with numbers and code often enough to be merged; the other scripts of PROBES stay bytes."""
    return LICENSE.read_text(encoding="utf-8") + 16 * "\n".join(text for text in PROBES if text.isascii())
