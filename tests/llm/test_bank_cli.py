from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from discopt.folder import RunFolder
from discopt_llm.bank_manifest import Manifest
from discopt_llm.bank_search import QuantizeRequest, resume_quantize
from tests.documents import read_document, replace_text
from tests.llm.commands import STAGES, call, refusal, resume
from tests.llm.families import tiny, tiny_tokenizer
from tests.llm.searches import contents, run, snapshot

SMALL = ["--preset", "demo", "--sequence-length", 32, "--eval-tokens", 64, "--generations", 2, "--offspring", 4]
PLAIN = ["--baselines", "none", "--start", "auto"]
ONE_THREAD = "import sys, torch; torch.set_num_threads(1)\n"

pytestmark = pytest.mark.usefixtures("_no_pictures")


@pytest.fixture(scope="module")
def search(model_folder: Path, notes: Path) -> Callable[..., Result]:
    """A small search: command, out, further words."""

    def invoke(command: str, out: Path, *words: object) -> Result:
        common = [*SMALL, *STAGES, *PLAIN, "--calibration", notes, "--out", out]
        return call(command, model_folder, *common, *words)

    return invoke


@pytest.fixture(scope="module")
def run_folder(search: Callable[..., Result], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that built its own bank, beside it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    result = search("quantize", out, "--bits", 3, "--group-size", 12, "--bank-tokens", 256)
    assert result.exit_code == 0, result.output
    return out


def test_a_bank_is_built_once(model_folder: Path, notes: Path, tmp_path: Path) -> None:
    words = [model_folder, "--bits", "2,3", "--group-size", 16, "--calibration", notes, "--sequence-length", 32]
    words += ["--calibration-tokens", 256, "--out", tmp_path / "bank"]
    first = call("bank", *words)
    assert first.exit_code == 0
    assert f"{tmp_path / 'bank'}: 56 layers by gptq at 2, 3 bits, groups of 16, made on 256 tokens" in first.stdout
    assert "bank: " in first.stderr
    before = snapshot(tmp_path / "bank")
    again = call("bank", *words)
    assert (again.exit_code, again.stdout) == (0, first.stdout)
    assert again.stderr.splitlines()[-1] == f"{tmp_path / 'bank'} is there already, built with the same options"
    summary = call("bank", *words, "--json")
    found = json.loads(summary.stdout)
    assert (found["labels"], found["layers"], found["path"]) == (["2", "3"], 56, str(tmp_path / "bank"))
    assert found["bytes"] == sum(path.stat().st_size for path in (tmp_path / "bank").iterdir())
    assert "holds a finished bank already" in refusal(call("bank", *words, "--symmetric"))
    assert snapshot(tmp_path / "bank") == before
    assert call("bank", *words, "--symmetric", "--force", "--quiet").stderr == ""
    assert contents(tmp_path / "bank").keys() == before.keys()
    assert contents(tmp_path / "bank") != {name: digest for name, (digest, _) in before.items()}


def test_a_bank_replaces_nothing_else(model_folder: Path, notes: Path, tmp_path: Path) -> None:
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "bank.json").write_text("{}")
    words = [model_folder, "--calibration", notes, "--sequence-length", 32, "--out", tmp_path / "bank", "--force"]
    assert "is not a bank's" in refusal(call("bank", *words, "--calibration-tokens", 64))
    (tmp_path / "file").write_text("")
    assert "is a file, not a folder" in refusal(call("bank", *words[:-3], "--out", tmp_path / "file"))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("quantize", ["--bpw", 6, "--group", "runtime"]),
        ("sparsify", ["--size", "0.6x", "--group", "name"]),
        ("compress", ["--size", "0.5x"]),
    ],
)
def test_a_search_ends_with_its_table(
    command: str, words: list[object], search: Callable[..., Result], banks: dict[str, str], tmp_path: Path
) -> None:
    kinds = {"quantize": ["quantization"], "sparsify": ["sparsity"], "compress": ["sparsity", "quantization"]}
    given = [word for kind in kinds[command] for word in ("--bank", banks[kind])]
    result = search(command, tmp_path / "run", *words, *given, "--json", "--baselines", "uniform,random")
    assert result.exit_code == 0, result.output
    results = json.loads(result.stdout)
    assert results == read_document(tmp_path / "run" / "results.json")
    assert results["command"] == f"llm {command}"
    assert results["asked"] == {words[0].removeprefix("--"): str(words[1])}
    assert "search: generation" in result.stderr
    methods = ["dense", "uniform", "random (best of the start candidates)", "evolved"]
    assert [row["method"] for row in results["rows"]] == methods
    again = resume(tmp_path / "run")
    assert again.exit_code == 0
    assert [line.split("  ")[0] for line in again.stdout.splitlines()[1:]] == methods
    quiet = search(command, tmp_path / "run", *words, *given, "--force", "--quiet")
    assert (quiet.exit_code, quiet.stderr) == (0, "")
    assert f"write the model: discopt llm export {tmp_path / 'run'} --to hf --out MODEL" in quiet.stdout


def test_a_fresh_process_measures_what_the_run_reported(
    run_folder: Path, model_folder: Path, notes: Path, tmp_path: Path
) -> None:
    """From the run and its bank, from the text and a bank, and after both were moved."""
    reported = read_document(run_folder / "results.json")["rows"][-1]
    (bank,) = (run_folder.parent / "banks").iterdir()
    shutil.copytree(run_folder.parent, tmp_path / "moved")
    moved = tmp_path / "moved" / "run" / "profile.json"
    replace_text(moved, str(bank), "/nowhere/" + bank.name)
    asked = [
        [run_folder],
        [run_folder / "profile.txt", "--bank", bank],
        [tmp_path / "moved" / "run"],
    ]
    common = [model_folder, "--data", notes, "--tokens", 64, "--sequence-length", 32, "--json", "--profile"]
    lines = [["llm", "eval", *map(str, common), *map(str, words)] for words in asked]
    script = (
        ONE_THREAD + "import json\nfrom typer.testing import CliRunner\nfrom discopt.cli import app\n"
        "print(json.dumps([CliRunner().invoke(app, line).stdout for line in json.loads(sys.argv[1])]))"
    )
    done = subprocess.run([sys.executable, "-c", script, json.dumps(lines)], capture_output=True, text=True, check=True)
    answers = [json.loads(answer) for answer in json.loads(done.stdout)]
    for answer in answers:
        dense, student = answer["rows"]
        assert dense["kl"] == pytest.approx(0, abs=1e-6)
        keys = ("kl", "perplexity", "agreement", "bytes")
        assert [student[key] for key in keys] == pytest.approx([reported[key] for key in keys], rel=1e-5)


def test_export_writes_a_quantized_student(run_folder: Path, tmp_path: Path) -> None:
    result = call("export", run_folder, "--to", "hf", "--out", tmp_path / "model", "--json")
    assert json.loads(result.stdout)["verified"] is True
    shutil.copytree(run_folder, tmp_path / "alone" / "run")
    profile = tmp_path / "alone" / "run" / "profile.json"
    (bank,) = (run_folder.parent / "banks").iterdir()
    replace_text(profile, str(bank), "/nowhere/bank")
    words = ["export", tmp_path / "alone" / "run", "--to", "hf", "--out", tmp_path / "second"]
    assert "is not at /nowhere/bank any more; say with --bank where it is" in refusal(call(*words))
    again = call(*words, "--bank", bank)
    assert again.exit_code == 0, again.output
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "second"))
    assert first == second


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("quantize", [], "expected one budget, --bits or --bpw or --size, got none"),
        ("quantize", ["--bits", 3, "--size", "0.3x"], "got bits, size"),
        ("quantize", ["--bits", "many"], "such as 3 or 2.25, got 'many'"),
        ("quantize", ["--bits", 3, "--widths", "2,x"], "expected bit widths such as 2,3,4, got '2,x'"),
        ("quantize", ["--bits", 3, "--widths", "1,3"], "of 2 to 8, got (1, 3)"),
        ("quantize", ["--bits", 3, "--method", "wanda"], "must be one of gptq, rtn, gguf, got 'wanda'"),
        ("quantize", ["--bits", 3, "--group", "colour"], "got 'colour'"),
        ("quantize", ["--bits", 3, "--bank", "b", "--widths", "2,3"], "widths is an option of a bank that is built"),
        ("quantize", ["--bits", 3, "--baselines", "owl"], "got owl"),
        ("sparsify", [], "expected one budget, --sparsity or --size, got none"),
        ("sparsify", ["--sparsity", "120%"], "got '120%'"),
        (
            "sparsify",
            ["--sparsity", 0.5, "--levels", 8],
            "an odd number up to 32,767, so that one lies at the target, got 8",
        ),
        ("sparsify", ["--sparsity", 0.5, "--method", "gptq"], "got 'gptq'"),
        ("compress", ["--size", "0.3x", "--kinds", "drop"], "must hold quantization or sparsity, got drop"),
        ("compress", ["--size", "0.3x", "--kinds", "drop,glue"], "got glue"),
        ("compress", ["--size", "0.3x", "--group", "size"], "group must be none or runtime, got size"),
        ("bank", ["--kind", "both"], "kind must be one of quantization, sparsity, gguf, got 'both'"),
        ("bank", ["--kind", "sparsity", "--bits", "2,3"], "bits is an option of kind quantization, got kind sparsity"),
        ("bank", ["--levels", 5], "levels is an option of kind sparsity, got kind quantization"),
        (
            "bank",
            ["--kind", "sparsity", "--levels", 4],
            "an odd number up to 32,767, so that one lies at the target, got 4",
        ),
        ("bank", ["--kind", "sparsity", "--target", 1.5], "target must be above 0 and below 1, got 1.5"),
        ("bank", ["--kind", "sparsity", "--method", "gptq"], "sparsegpt, wanda, magnitude, got 'gptq'"),
        ("bank", ["--kind", "sparsity", "--propagate", "3bit"], "got '3bit'"),
        ("bank", ["--bits", "2,4", "--propagate", "3"], "must be one of dense, 2, 4, got '3'"),
        ("bank", ["--bits", "3,x"], "expected bit widths such as 2,3,4, got '3,x'"),
        ("bank", ["--scales", "median"], "got 'median'"),
        ("bank", ["--damping", -1], "got -1.0"),
    ],
)
def test_a_wrong_option_exits_with_2(command: str, words: list[object], message: str, tmp_path: Path) -> None:
    result = call(command, tmp_path / "no-model", "--out", tmp_path / "out", *words)
    assert message in refusal(result, 2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("quantize", ["--bits", 1.5], "out of reach: the levels give 2 to 6, so the nearest is 2"),
        ("sparsify", ["--size", "0.01x"], "a size of 0.01x is out of reach"),
        ("compress", ["--bpw", 0.5, "--kinds", "quantization"], "0.5 bits per weight is out of reach"),
        ("quantize", ["--bits", 3, "--start", "missing.txt"], "cannot read the profile missing.txt"),
        ("quantize", ["--bits", 3, "--bank", "missing"], "missing"),
        ("sparsify", ["--sparsity", "50%", "--bank-tokens", 10**9], "asked for 1,000,000,000"),
    ],
)
def test_what_cannot_be_done_exits_with_1_and_leaves_nothing(
    command: str, words: list[object], message: str, search: Callable[..., Result], tmp_path: Path
) -> None:
    assert message in refusal(search(command, tmp_path / "run", *words))
    assert not [*tmp_path.iterdir()]


def test_wrong_banks_are_one_line(
    search: Callable[..., Result], banks: dict[str, str], model_folder: Path, notes: Path, tmp_path: Path
) -> None:
    def refused(bank: object, command: str = "quantize", *budget: object) -> str:
        return refusal(search(command, tmp_path / "run", *(budget or ("--bits", 3)), "--bank", bank))

    assert "expected a bank of kind quantization, got" in refused(banks["sparsity"])
    assert "expected a bank of kind quantization and sparsity, got" in refused(
        banks["sparsity"], "compress", "--size", "0.5x"
    )
    damaged = tmp_path / "damaged"
    shutil.copytree(banks["quantization"], damaged)
    block = bytearray((damaged / "block-00003.safetensors").read_bytes())
    block[-1] ^= 1
    (damaged / "block-00003.safetensors").write_bytes(block)
    assert "block-00003.safetensors is damaged: its checksum" in refused(damaged)
    (damaged / "block-00003.safetensors").unlink()
    assert "block-00003.safetensors is missing" in refused(damaged)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(damaged, unfinished)
    header = json.loads((unfinished / "bank.json").read_text())["header"]
    (unfinished / "bank.json").write_text(Manifest(header, complete=False).to_json())
    assert "is unfinished: 7 of 8 blocks are built" in refused(unfinished)
    tiny("Llama", seed=5, num_hidden_layers=8).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    words = ["--calibration", notes, "--sequence-length", 32, "--out", tmp_path / "run", "--bits", 3]
    foreign = call("quantize", tmp_path / "other", *SMALL, *STAGES, *words, "--bank", banks["quantization"])
    assert "whose weights differ from this model's" in refusal(foreign)
    assert not (tmp_path / "run").exists()


# -- interrupted and killed ----------------------------------------------------------------------------------------


def started(request: QuantizeRequest, out: Path) -> subprocess.Popen[str]:
    words = request.command_line(out).split()[1:]
    script = ONE_THREAD + "from discopt.cli import main; main()"
    return subprocess.Popen([sys.executable, "-c", script, *words, "--quiet"], stderr=subprocess.PIPE, text=True)


def has_blocks(folder: Path, blocks: int) -> bool:
    return (folder / "run" / "run.json").exists() and len([*folder.glob("banks/*/block-*")]) >= blocks


def has_trace(folder: Path, lines: int) -> bool:
    trace = folder / "run" / "trace.jsonl"
    return trace.exists() and trace.read_bytes().count(b"\n") >= lines


def wait_for(process: subprocess.Popen[str], found: Callable[[], object]) -> None:
    while process.poll() is None and not found():
        time.sleep(0.005)


@pytest.fixture(scope="module")
def slower(small: dict[str, Any]) -> QuantizeRequest:
    """Builds its bank, and takes long enough to be killed in the middle."""
    own: dict[str, Any] = {"bank_tokens": 8192, "generations": 40, "baselines": ("uniform",)}
    return QuantizeRequest(**{**small, **own}, bits="3", widths=(2, 3, 4), group_size=12)


@pytest.fixture(scope="module")
def whole(slower: QuantizeRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What the undisturbed run ends in, and its folder of banks."""
    folder = tmp_path_factory.mktemp("whole")
    return run(slower, folder / "run"), folder / "banks"


@pytest.mark.parametrize(
    ("when", "how"), [("bank", signal.SIGTERM), ("bank", signal.SIGKILL), ("search", signal.SIGKILL)]
)
def test_a_run_that_was_stopped_ends_as_the_whole_one(
    slower: QuantizeRequest, whole: tuple[dict[str, Any], Path], when: str, how: signal.Signals, tmp_path: Path
) -> None:
    results, banks = whole
    out = tmp_path / "cut" / "run"
    process = started(slower, out)
    pattern = "banks/*/block-00001.safetensors" if when == "bank" else "run/checkpoint.json"
    wait_for(process, lambda: [*(tmp_path / "cut").glob(pattern)])
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    if how == signal.SIGTERM:
        assert process.returncode == 130
        assert said.splitlines()[-1] == f"interrupted; go on with: discopt resume {out}"
    assert (out / "checkpoint.json").exists() == (when == "search")
    result = resume(out, "--json")
    assert result.exit_code == 0, result.output
    resumed = json.loads(result.stdout)
    assert (resumed["profile"], resumed["rows"]) == (results["profile"], results["rows"])
    assert contents(tmp_path / "cut" / "banks") == contents(banks)


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_ends_in_the_same_profile(
    slower: QuantizeRequest, whole: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    results, banks = whole
    rng = random.Random(0)
    killed = 0
    for attempt in range(20):
        folder = tmp_path / f"cut{attempt}"
        process = started(slower, folder / "run")
        if attempt % 2:
            wait_for(process, partial(has_trace, folder, rng.randrange(80)))
        else:
            wait_for(process, partial(has_blocks, folder, rng.randrange(8)))
        time.sleep(rng.uniform(0, 0.1))
        killed += process.poll() is None
        process.kill()
        process.communicate()
        resumed = resume_quantize(RunFolder.open(folder / "run"), quiet=True)
        assert (resumed["profile"], resumed["rows"]) == (results["profile"], results["rows"])
        assert contents(folder / "banks") == contents(banks)
        assert not [name for _, _, names in os.walk(folder) for name in names if name.endswith(".tmp")]
    assert killed >= 15
