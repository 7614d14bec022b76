"""What a model's folder from elsewhere cannot make us read."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from discopt_llm.errors import ModelError
from discopt_llm.models import load_model
from discopt_llm.untrusted import check_model_folder, is_inside


class Bomb:
    """What unpickles by running code."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit('a pickle was loaded')",)


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors", "parts/a.safetensors"])
def test_names_in_the_folder_are_inside(name: str) -> None:
    assert is_inside(name)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "a/../../x", "/etc/passwd", "C:\\x", "..\\x", "\\\\host\\share\\x", "", ".", 3, None]
)
def test_names_elsewhere_are_not(name: Any) -> None:
    assert not is_inside(name)


def test_an_index_cannot_lead_out_of_the_folder(folder: Path) -> None:
    shutil.move(folder / "model.safetensors", folder.parent / "model.safetensors")
    names = torch.nn.Module.state_dict(load_model(str(_whole(folder)), device="cpu").model)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../model.safetensors")}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"names weights outside of the model's folder: '\.\./model\.safetensors'"):
        load_model(str(folder), device="cpu")


def _whole(folder: Path) -> Path:
    shutil.copy(folder.parent / "model.safetensors", folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("file", ["pytorch_model.bin", "adapter_model.bin"])
def test_no_pickle_is_loaded(folder: Path, file: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(pickle.dumps(Bomb()))
    if file == "adapter_model.bin":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": file}))
    with pytest.raises(ModelError, match="expected weights as safetensors in "):
        load_model(str(folder), device="cpu")


def test_an_adapter_of_pickles_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelError, match="expected the adapter's weights as safetensors"):
        check_model_folder(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"")
    check_model_folder(folder)


@pytest.mark.parametrize("content", ["", "[", "[1]", '{"weight_map": 3}', '{"weight_map": {"a": "a.safetensors"}}'])
def test_what_cannot_be_read_is_left_to_the_loader(tmp_path: Path, content: str) -> None:
    check_model_folder(tmp_path / "missing")
    for name in ("config.json", "model.safetensors.index.json"):
        (tmp_path / name).write_text(content)
    check_model_folder(tmp_path)
