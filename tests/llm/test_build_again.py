"""Builds that were stopped end in the same bytes, and finished banks are built by no one again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from discopt_llm import build
from discopt_llm.anatomy import run_block
from discopt_llm.bank import Bank, BankWriter
from discopt_llm.budget import Budget
from discopt_llm.build import BankPlan, build_bank
from discopt_llm.errors import BankError
from discopt_llm.evaluator import Evaluator
from discopt_llm.fitness import KL
from discopt_llm.genome import bank_genome
from discopt_llm.levels import BankLevels
from discopt_llm.quantization import QuantizationSettings
from discopt_llm.recipes import QuantizationRecipe
from tests.llm.banks import KINDS, calibration, files_of, loaded, plan, stopped_after, watched
from tests.llm.families import LAYERS

# -- stopped builds ------------------------------------------------------------------------------------------------

STOPPABLE = [
    ("llama", "quantization", "dense"),
    ("llama", "quantization", "3"),
    ("llama", "sparsity", "0"),
    ("qwen2_moe", "quantization", "dense"),
    ("mixtral", "quantization", "3"),
    ("olmoe", "sparsity", "dense"),
]


@pytest.mark.parametrize(("family", "kind", "propagate"), STOPPABLE)
def test_a_stopped_build_goes_on_after_its_last_finished_block_and_ends_in_the_same_bytes(
    family: str, kind: str, propagate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(family)
    whole, recipe = watched(model, kind, propagate)
    build_bank(whole, tmp_path / "whole", quiet=True)
    per_block = recipe.solves[0]
    for finished in (1, LAYERS - 1):
        folder = tmp_path / f"stopped{finished}"
        before = model.model.get_experts_implementation()
        with stopped_after(finished, monkeypatch):
            build_bank(plan(model, kind, propagate), folder, quiet=True)
        assert model.model.get_experts_implementation() == before
        asked, recipe = watched(model, kind, propagate)
        build_bank(asked, folder, quiet=True)
        assert sorted(recipe.solves) == [*range(finished, LAYERS)]
        assert recipe.solves[LAYERS - 1] <= per_block
        assert files_of(folder) == files_of(tmp_path / "whole")


@pytest.mark.parametrize("propagate", ["dense", "3"])
def test_experts_run_in_one_way_also_in_a_build_that_goes_on(
    propagate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = plan(loaded("mixtral"), "quantization", propagate)
    ways = []

    def noted(*args: Any) -> Tensor:
        ways.append(asked.loaded.model.get_experts_implementation())
        return run_block(*args)

    monkeypatch.setattr(build, "run_block", noted)
    with stopped_after(2, monkeypatch):
        build_bank(asked, tmp_path / "bank", quiet=True)
    build_bank(asked, tmp_path / "bank", quiet=True)
    assert len(ways) > 2 * LAYERS - 2 and all(way == {"": "eager"} for way in ways)


@pytest.mark.parametrize("propagate", ["dense", "3"])
def test_a_block_that_is_missing_in_the_middle_is_built_alone(
    propagate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded("llama")
    build_bank(plan(model, "quantization", propagate), tmp_path / "whole", quiet=True)
    with stopped_after(3, monkeypatch):
        build_bank(plan(model, "quantization", propagate), tmp_path / "bank", quiet=True)
    (tmp_path / "bank" / "block-00001.safetensors").unlink()
    asked, recipe = watched(model, "quantization", propagate)
    build_bank(asked, tmp_path / "bank", quiet=True)
    assert sorted(recipe.solves) == [1, 3]
    assert files_of(tmp_path / "bank") == files_of(tmp_path / "whole")


def test_a_build_that_lacks_its_manifest_alone_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = plan(loaded("llama"), "quantization")
    with monkeypatch.context() as patch:
        patch.setattr(BankWriter, "finish", lambda self: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception, match="killed"):
            build_bank(asked, tmp_path / "bank", quiet=True)
    monkeypatch.setattr(build, "embed", lambda *_: pytest.fail("the text is run again"))
    build_bank(asked, tmp_path / "bank", quiet=True)
    assert (tmp_path / "bank" / "bank.json").is_file()


KILLED = """
import os, random, shutil, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from discopt_llm.bank_manifest import Manifest
from discopt_llm.build import build_bank
from tests.llm.banks import loaded, plan

model = loaded("mixtral")
asked = plan(model, "quantization", "3")
build_bank(asked, Path(sys.argv[1]), quiet=True)
begun = time.monotonic()
build_bank(asked, Path(sys.argv[1]), quiet=True, force=True)
whole = time.monotonic() - begun
rng = random.Random(0)
killed = finished = 0
for attempt in range(60):
    if killed == 6:
        break
    child = os.fork()
    if not child:
        build_bank(asked, Path(sys.argv[2]), quiet=True)
        os._exit(0)
    time.sleep(rng.uniform(0, whole * 0.7))
    os.kill(child, signal.SIGKILL)
    if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):  # it was done before: begin anew
        shutil.rmtree(sys.argv[2])
        finished = 0
        continue
    killed += 1
    written = len([*Path(sys.argv[2]).glob("block-*.safetensors")])
    assert written >= finished, (written, finished)
    finished = written
print(killed)
build_bank(asked, Path(sys.argv[2]), quiet=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_a_build_killed_at_random_moments_loses_no_finished_block_and_ends_in_the_same_bytes(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "whole", tmp_path / "killed"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == 6
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


# -- finished banks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_bank_of_the_same_plan_is_opened(kind: str, tmp_path: Path) -> None:
    first = build_bank(plan(loaded("llama"), kind), tmp_path / "bank", quiet=True)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "bank").iterdir()}
    asked, recipe = watched(loaded("llama"), kind)
    again = build_bank(asked, tmp_path / "bank", quiet=True)
    assert again.fingerprint == first.fingerprint
    assert not recipe.solves
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "bank").iterdir()} == before


OTHER: Mapping[str, Callable[[BankPlan], BankPlan]] = {
    "settings bits": lambda p: replace(p, recipe=QuantizationRecipe(QuantizationSettings(bits=(3, 4), group_size=12))),
    "propagate": lambda p: replace(p, propagate="4"),
    "calibration": lambda p: replace(p, calibration=calibration(seed=1)),
    "model": lambda p: plan(loaded("mistral"), "quantization", p.propagate),
}


@pytest.mark.parametrize("what", OTHER)
def test_a_bank_of_another_plan_is_refused_and_left_alone(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = plan(loaded("llama"), "quantization")
    with stopped_after(2, monkeypatch):
        build_bank(first, tmp_path / "bank", quiet=True)
    other = OTHER[what](first)
    if what == "model":
        model = loaded("mistral")
        other = replace(other, loaded=replace(model, source="elsewhere"))
    stopped = files_of(tmp_path / "bank")
    with pytest.raises(BankError, match=f"begun with other options \\({what}"):
        build_bank(other, tmp_path / "bank", quiet=True)
    assert files_of(tmp_path / "bank") == stopped
    build_bank(first, tmp_path / "bank", quiet=True)
    whole = files_of(tmp_path / "bank")
    with pytest.raises(BankError, match="holds a finished bank already"):
        build_bank(other, tmp_path / "bank", quiet=True)
    assert files_of(tmp_path / "bank") == whole
    replaced = build_bank(other, tmp_path / "bank", quiet=True, force=True)
    assert replaced.fingerprint == Bank.open(tmp_path / "bank").fingerprint


def test_a_finished_bank_that_is_damaged_is_refused(tmp_path: Path) -> None:
    asked = plan(loaded("llama"), "quantization")
    build_bank(asked, tmp_path / "bank", quiet=True)
    file = tmp_path / "bank" / "block-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(BankError, match="its checksum is not the one"):
        build_bank(asked, tmp_path / "bank", quiet=True)


def test_one_bank_of_four_widths_serves_three_budgets_as_it_is(bank_of: Callable[[str, str], Bank]) -> None:
    bank, model = bank_of("llama", "quantization"), loaded("llama")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in bank.path.iterdir()}
    layers = plan(model, "quantization").layers
    genome = bank_genome(bank.layers, bank.labels, bank.kind, "layer", 0)
    levels = BankLevels(model, layers, genome, [bank])
    losses = []
    for bits in ("2.25", "3", "4.5"):
        budget = Budget("bits", Fraction(bits))
        profile = genome.space(budget, "size").nearest_uniform()
        assert Fraction(bits) - Fraction(1, 50) < genome.costs.measures(profile)["bits"] <= Fraction(bits)
        (kl,) = Evaluator(model, levels).measure(profile[None], [*calibration(seed=3).sequences], [KL()])
        losses.append(kl.mean())
    assert losses == sorted(losses, reverse=True) and losses[-1] > 0
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in bank.path.iterdir()} == before
