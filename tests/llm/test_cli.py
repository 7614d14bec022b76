from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import Result

from discopt_llm.drop_search import DropRequest
from tests.documents import read_document
from tests.llm.commands import STAGES, call, refusal, resume
from tests.llm.families import tiny, tiny_tokenizer

SMALL = ["--preset", "demo", "--sequence-length", "32", "--eval-tokens", "64", "--generations", "3", "--offspring", "4"]
BASELINES = DropRequest.known_baselines


def drop(model: Path, out: Path, *words: object) -> Result:
    return call("drop", model, "--sparsity", "0.25", *SMALL, *STAGES, "--out", out, *words)


@pytest.fixture(scope="module")
def run_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    result = drop(model_folder, out)
    assert result.exit_code == 0, result.output
    return out


def test_drop_ends_with_its_table(model_folder: Path, tmp_path: Path) -> None:
    result = drop(model_folder, tmp_path / "run")
    table = result.stdout.splitlines()
    assert table[0].split() == [
        "method",
        "KL",
        "±",
        "KL",
        "perplexity",
        "top-1",
        "agreement",
        "search",
        "tokens",
        "bytes",
    ]
    assert [
        line[: len(name)] for line, name in zip(table[1:], ["dense", *BASELINES.values(), "evolved"], strict=False)
    ] == [
        "dense",
        *BASELINES.values(),
        "evolved",
    ]
    assert "search: generation" in result.stderr


def test_json_is_one_object_and_nothing_else(model_folder: Path, tmp_path: Path) -> None:
    result = drop(model_folder, tmp_path / "run", "--json")
    assert json.loads(result.stdout) == read_document(tmp_path / "run" / "results.json")
    assert "search: generation" in result.stderr


def test_quiet_says_nothing_on_the_way(model_folder: Path, tmp_path: Path) -> None:
    assert drop(model_folder, tmp_path / "run", "--quiet").stderr == ""


def test_baselines_are_those_asked_for(model_folder: Path, tmp_path: Path) -> None:
    for words, names in (("window", [BASELINES["window"]]), ("none", [])):
        result = drop(model_folder, tmp_path / words, "--json", "--baselines", words)
        assert [row["method"] for row in json.loads(result.stdout)["rows"]] == ["dense", *names, "evolved"]


def test_eval_measures_a_run(model_folder: Path, run_folder: Path) -> None:
    words = ["eval", model_folder, "--data", "builtin", "--tokens", 64, "--sequence-length", 32]
    result = call(*words, "--profile", run_folder, "--json")
    rows = json.loads(result.stdout)["rows"]
    assert [row["model"] for row in rows] == [str(model_folder), str(run_folder)]
    assert rows[1]["kl"] == pytest.approx(read_document(run_folder / "results.json")["rows"][-1]["kl"])
    assert "perplexity" in call(*words).stdout


def test_export_writes_what_transformers_loads(run_folder: Path, tmp_path: Path) -> None:
    result = call("export", run_folder, "--to", "hf", "--out", tmp_path / "model")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "model" / "config.json").exists()
    assert str(tmp_path / "model") in result.stdout
    again = call("export", run_folder, "--to", "hf", "--out", tmp_path / "model")
    assert "--force" in refusal(again)
    summary = json.loads(
        call("export", run_folder, "--to", "hf", "--out", tmp_path / "model", "--force", "--json").stdout
    )
    assert summary["verified"] is True


def test_resume_of_a_finished_run_prints_its_table_again(run_folder: Path) -> None:
    result = resume(run_folder, "--json")
    assert json.loads(result.stdout) == read_document(run_folder / "results.json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sparsity", "1"], "sparsity must be in [0, 1), got 1.0"),
        (["--preset", "slow"], "got 'slow'"),
        (["--unit", "neuron"], "got 'neuron'"),
        (["--protect", "1-a"], "expected blocks such as 0,1,28-29, got '1-a'"),
        (["--stage", "1@32", "--stage", "2@64"], "must not grow"),
        (["--baselines", "owl"], "got owl"),
        (["--fitness", "accuracy"], "got 'accuracy'"),
    ],
)
def test_a_wrong_option_exits_with_2(model_folder: Path, words: list[str], message: str, tmp_path: Path) -> None:
    result = call("drop", model_folder, "--sparsity", "0.25", *SMALL, "--out", tmp_path / "run", *words)
    assert message in refusal(result, 2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--calibration", "missing.txt"], "missing.txt"),
        (["--calibration", "webtext"], "unknown text source 'webtext'; expected builtin"),
        (["--protect", "0-7"], "no profile meets the budget"),
        (["--protect", "99"], "blocks to protect must be in 0..7, got 99"),
        (["--sequence-length", "999"], "has 128 positions, asked for sequences of 999 tokens"),
        (["--start", "missing.json"], "cannot read the profile missing.json"),
    ],
)
def test_what_cannot_be_done_exits_with_1_and_leaves_nothing(
    model_folder: Path, words: list[str], message: str, tmp_path: Path
) -> None:
    assert message in refusal(drop(model_folder, tmp_path / "run", *words))
    assert not (tmp_path / "run").exists()


def test_an_unknown_model_is_one_line(tmp_path: Path) -> None:
    assert "got 'nothing_here'" in refusal(drop(Path("package:nothing_here"), tmp_path / "run"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_asked_for_and_absent_is_one_line(model_folder: Path, tmp_path: Path) -> None:
    assert "CUDA" in refusal(drop(model_folder, tmp_path / "run", "--device", "cuda"))


def test_an_existing_run_is_refused_without_force(model_folder: Path, run_folder: Path) -> None:
    assert "pass --force to replace it" in refusal(drop(model_folder, run_folder))


def test_a_text_that_is_too_short_is_one_line(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    assert "fewer than one sequence" in refusal(
        drop(model_folder, tmp_path / "run", "--calibration", tmp_path / "short.txt")
    )


def test_a_profile_of_another_model_is_refused(run_folder: Path, tmp_path: Path) -> None:
    tiny("Llama", seed=5, num_hidden_layers=8).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    result = call("eval", tmp_path / "other", "--profile", run_folder, "--data", "builtin", "--tokens", 64)
    assert "whose weights differ from this model's" in refusal(result)


def test_a_damaged_checkpoint_is_one_line(model_folder: Path, tmp_path: Path) -> None:
    drop(model_folder, tmp_path / "run", "--max-seconds", "0.000001")
    checkpoint = tmp_path / "run" / "checkpoint.json"
    checkpoint.write_text(checkpoint.read_text().replace('"generation": ', '"generation": 7'))
    result = resume(tmp_path / "run")
    assert "does not match its checksum" in refusal(result)


def test_without_its_packages_the_command_says_what_to_install(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "datasets" else find(name))
    assert "needs datasets: pip install 'discopt-search[llm]'" in refusal(drop(model_folder, tmp_path / "run"))


def test_help_has_examples_and_loads_no_torch() -> None:
    script = (
        "import sys\nfrom typer.testing import CliRunner\nfrom discopt.cli import app\n"
        "for name in ('drop', 'bank', 'quantize', 'sparsify', 'compress', 'eval', 'export'):\n"
        "    out = CliRunner().invoke(app, ['llm', name, '--help']).output\n"
        "    assert out.count(f'discopt llm {name} ') >= 2, out\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_stopped_command_ends_cleanly_and_resume_ends_as_the_whole_run(model_folder: Path, tmp_path: Path) -> None:
    words = [model_folder, "--sparsity", "0.25", *SMALL, *STAGES, "--generations", "40", "--seed", "3"]
    whole = json.loads(call("drop", *words, "--out", tmp_path / "whole", "--json").stdout)
    command = [sys.executable, "-c", "import torch; torch.set_num_threads(1); from discopt.cli import main; main()"]
    out = tmp_path / "cut"
    process = subprocess.Popen(
        [*command, "llm", "drop", *map(str, words), "--out", str(out)], stderr=subprocess.PIPE, text=True
    )
    while not (out / "checkpoint.json").exists() and process.poll() is None:
        time.sleep(0.01)
    process.terminate()  # as Ctrl-C does, but no shell has it ignored in the background
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"interrupted; go on with: discopt resume {out}" in said
    resumed = json.loads(resume(out, "--json").stdout)
    assert resumed["profile"] == whole["profile"]
    assert resumed["rows"] == whole["rows"]
