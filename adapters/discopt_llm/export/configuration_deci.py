"""Config of a Llama that lacks some attentions and MLPs, as vLLM's DeciLMForCausalLM reads it."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig


class Section(dict[str, Any]):
    """A part of the config whose entries are attributes as well."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):
    """A Llama's config with an entry for each block."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: list[dict[str, dict[str, Any]]] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block_configs = [
            Section({name: Section(part) for name, part in block.items()}) for block in block_configs or []
        ]
