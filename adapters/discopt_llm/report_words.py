"""Words that the reports of a run share: what a loss is called, and sizes for people."""

from __future__ import annotations

__all__ = ["TITLES", "fitness_words", "size_words"]

TITLES = {  # of reports, by the kind of the profile
    "drop": "Depth pruning",
    "gguf": "GGUF types",
    "mixed": "Compression",
    "quantization": "Quantization",
    "sparsity": "Sparsity",
}
_FITNESS = {
    "kl": "KL to the dense model, nats per token",
    "kl-topk": "KL over the dense model's top tokens, nats per token",
    "ppl": "negative log-likelihood, nats per token",
    "tv": "total variation to the dense model",
}
_UNITS = {"GB": 1e9, "MB": 1e6, "KB": 1e3}


def fitness_words(name: str) -> str:
    """The loss that a fitness such as "kl" or "kl-topk:512" is, with its unit."""
    return _FITNESS.get(name.partition(":")[0], name)


def size_words(number: int) -> str:
    """Bytes for people: "512 B", "75.6 KB", "138.2 MB"."""
    unit = next((unit for unit in _UNITS if number >= _UNITS[unit]), None)
    return f"{number} B" if unit is None else f"{number / _UNITS[unit]:,.1f} {unit}"
