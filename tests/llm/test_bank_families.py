"""Bank, search, checkpoint and back, for every family and kind."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from discopt_llm.bank_search import BankSearchRequest, CompressRequest, QuantizeRequest, SparsifyRequest
from discopt_llm.export.command import ExportRequest, export_run
from discopt_llm.levels import BankLevels
from discopt_llm.models import load_model
from discopt_llm.search import begin
from discopt_llm.students import read_student
from tests.llm.families import FAMILIES, tiny_tokenizer

REQUESTS: dict[str, tuple[type[BankSearchRequest], dict[str, Any]]] = {
    "quantization": (QuantizeRequest, {"bits": "2.75", "widths": (2, 3, 4), "group_size": 12}),
    "sparsity": (SparsifyRequest, {"sparsity": "55%", "levels": 5}),
    "mixed": (CompressRequest, {"bpw": "3.5", "widths": (2, 4), "levels": 5, "group_size": 12}),
}
IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))


pytestmark = pytest.mark.usefixtures("_no_pictures")


@pytest.fixture
def family_folder(family: str, tmp_path: Path) -> Path:
    FAMILIES[family]().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def search(kind: str, model: Path, notes: Path, out: Path, **changes: Any) -> dict[str, Any]:
    request, own = REQUESTS[kind]
    asked = {
        "model": str(model),
        "calibration": str(notes),
        "preset": "demo",
        "sequence_length": 16,
        "eval_tokens": 32,
        "generations": 2,
        "offspring": 3,
        "stages": ("2@16", "1@32"),
        "bank_tokens": 256,
        "baselines": (),
        "start": "random",
    }
    return begin(request(**{**asked, **own, **changes}), out, force=False, quiet=True)


@torch.no_grad()
def student_logits(model: Path, run: Path) -> tuple[Tensor, Tensor]:
    """Of the student as the search had it, and of the dense model."""
    loaded = load_model(str(model))
    levels, profile = read_student(str(run), loaded)
    assert isinstance(levels, BankLevels)
    dense = loaded.model(IDS).logits
    with ExitStack() as stack:
        for block, units in enumerate(levels.block_units):
            stack.enter_context(levels.applied_(block, tuple(profile[units].tolist())))
        return loaded.model(IDS).logits, dense


@torch.no_grad()
def check(kind: str, model: Path, notes: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Search, write and reload: the logits are the searched student's, and not the dense model's."""
    results = search(kind, model, notes, folder / "run", **changes)
    summary = export_run(ExportRequest(run=folder / "run", to="hf", out=folder / "out", device="cpu"))
    assert summary.verified
    student, dense = student_logits(model, folder / "run")
    written = load_model(str(folder / "out")).model
    torch.testing.assert_close(written(IDS).logits, student, atol=2e-5, rtol=1e-4)
    assert (student - dense).abs().max() > 1e-2
    before = dict(load_model(str(model)).model.named_parameters())
    after = dict(written.named_parameters())
    labels = dict(line.split(": ") for line in (folder / "run" / "profile.txt").read_text().splitlines())
    if after.keys() == before.keys():  # no block went as a whole
        changed = {name.removesuffix(".weight") for name in before if not torch.equal(after[name], before[name])}
        assert {name for name, label in labels.items() if label != "drop"} <= changed
        assert changed - labels.keys() <= {name.replace("weight", "bias") for name in before}
    return results


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["quantization", "sparsity"])
def test_every_family_is_compressed_written_and_reloaded(
    kind: str, family: str, family_folder: Path, notes: Path, tmp_path: Path
) -> None:
    met = check(kind, family_folder, notes, tmp_path)["met"]
    if kind == "quantization":
        assert 2.5 < met["bits"] <= 2.75
        assert met["sparsity"] == 0
    else:
        assert 0.55 <= met["sparsity"] < 0.58


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_mixes_the_kinds(family: str, family_folder: Path, notes: Path, tmp_path: Path) -> None:
    assert check("mixed", family_folder, notes, tmp_path)["met"]["bpw"] <= 3.5


@pytest.mark.parametrize("family", ["gpt2", "qwen2_moe"])
def test_a_student_with_all_kinds_of_levels_is_written_and_reloaded(
    family: str, family_folder: Path, notes: Path, tmp_path: Path
) -> None:
    own: dict[str, Any] = {"bpw": "8", "widths": (2,), "generations": 0}
    search("mixed", family_folder, notes, tmp_path / "first", **own)
    loaded = load_model(str(family_folder))
    levels, _ = read_student(str(tmp_path / "first"), loaded)
    assert isinstance(levels, BankLevels)
    genome = levels.genome
    gone = genome.sub_block[int(np.flatnonzero(genome.block_of == 1)[-1])]  # the MLP of block 1
    assert gone == (1, "mlp")
    wanted = {}
    for unit, row in enumerate(genome.labels):
        forms = [label for label in row if label not in (None, "drop")]
        kind = ("sparsity", "quantization")[unit % 2]
        label = "drop" if genome.sub_block[unit] == gone else next((x for x in forms if x.startswith(kind)), forms[0])
        wanted.update(dict.fromkeys(genome.layer_names[unit], label))
    assert {label.partition(":")[0] for label in wanted.values()} == {"drop", "sparsity", "quantization"}
    (tmp_path / "all.txt").write_text("".join(f"{name}: {label}\n" for name, label in wanted.items()))
    results = check("mixed", family_folder, notes, tmp_path, start=str(tmp_path / "all.txt"), **own)
    assert (tmp_path / "run" / "profile.txt").read_text() == (tmp_path / "all.txt").read_text()
    assert 0 < results["met"]["sparsity"] < 1
