"""What a model's folder may not make us read: files elsewhere, and pickles, which can run code.

transformers joins whatever names an index of weights has to the folder's path, and takes weights that a config or an
adapter names from pickles, if only by torch's restricted reader. A folder whose author is trusted is not checked.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from discopt_llm.errors import ModelError, short

__all__ = ["check_model_folder"]

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json", "adapter_model.safetensors.index.json")
SAFE = (".safetensors", ".safetensors.index.json")


def check_model_folder(folder: Path) -> None:
    """Raise ModelError for a folder that names weights outside of it, or weights that are pickles.

    What is no folder, or cannot be read, is left to the loader's own words.
    """
    for name in INDEXES:
        for file in _weight_map(folder / name):
            if not is_inside(file):
                raise ModelError(f"{folder / name} names weights outside of the model's folder: {short(file)}")
    named = _object(folder / "config.json").get("transformers_weights")
    if named is not None and not (is_inside(named) and str(named).endswith(SAFE)):
        raise ModelError(f"expected weights as safetensors in {folder}, got {short(named)} in its config.json")
    adapter = folder / "adapter_config.json"
    if adapter.is_file() and not any(folder.glob("adapter_model*.safetensors")):
        raise ModelError(f"expected the adapter's weights as safetensors in {folder}, got none")


def is_inside(name: Any) -> bool:
    """Whether it is the name of a file in a folder or below it, on any system."""
    return isinstance(name, str) and all(
        not path.anchor and path.parts and ".." not in path.parts
        for path in (PurePosixPath(name), PureWindowsPath(name))
    )


def _weight_map(index: Path) -> list[Any]:
    found = _object(index).get("weight_map")
    return [*found.values()] if isinstance(found, dict) else []


def _object(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
