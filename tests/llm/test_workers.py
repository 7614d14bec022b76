"""Measuring and building by several workers: the same to the last bit. The workers are in this process here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from discopt.errors import DiscoptError, WorkersError
from discopt.folder import RunFolder
from discopt.optimizers import StopReason
from discopt.workers import WorkersAt
from discopt_llm import means, parcels, workers
from discopt_llm.bank import Bank
from discopt_llm.bank_search import QuantizeRequest, resume_quantize
from discopt_llm.compare import CompareRequest, compare
from discopt_llm.drop import DropLevels
from discopt_llm.drop_search import DropRequest
from discopt_llm.errors import BankError, ModelError
from discopt_llm.evaluator import TEACHER, Evaluator
from discopt_llm.fitness import KL, Fitness, Perplexity, TopKKL, TotalVariation
from discopt_llm.heldout import MEASURES
from discopt_llm.ladder import LadderRequest, ladder
from discopt_llm.means import Means, checked_means
from discopt_llm.memory import Memory
from discopt_llm.models import LoadedModel
from discopt_llm.parcels import MissingError, Parcel
from discopt_llm.request import Prepared, SearchRequest
from discopt_llm.search import begin
from discopt_llm.spread import Answer, SpreadEvaluator, measured
from discopt_llm.workers import StudentsHolding, Worker
from tests.llm.banks import loaded
from tests.llm.commands import call, refusal
from tests.llm.families import LAYERS, tiny, tiny_tokenizer
from tests.llm.pools import Here, outcome, workers_here
from tests.llm.searches import run
from tests.llm.test_evaluator import text
from tests.llm.test_levels import bank_levels, random_profiles

ALL: tuple[Fitness, ...] = (*MEASURES, TopKKL(20), TotalVariation())
BankOf = Callable[[str, str], Bank]

pytestmark = pytest.mark.usefixtures("_no_pictures")


@dataclass
class Measures:
    """What a worker holds, without its recipe."""

    evaluator: Evaluator

    def per_call(self, length: int) -> int:
        return self.evaluator.limits.per_call(length)

    def measure(self, *args: Any) -> Answer:
        return measured(self.evaluator, *args)


def pool(count: int, model: LoadedModel, levels: Any) -> Here:
    here = Here(WorkersAt(1), dict)
    here.objects = [Measures(Evaluator(model, levels)) for _ in range(count)]
    return here


def spread(here: Any, model: LoadedModel, levels: Any, said: list[str] | None = None) -> SpreadEvaluator:
    heard = [] if said is None else said
    return SpreadEvaluator(model, levels, here, alone=lambda: Evaluator(model, levels), say=heard.append)


def measured_in(here: Here) -> list[tuple[Any, ...]]:
    """The arguments of all calls that measured."""
    return [arguments for _, method, arguments in here.calls if method == "measure"]


def dropped(k: int, seed: int = 0) -> NDArray[np.int16]:
    """Students of the tiny models' sub-blocks, (k, n)."""
    return np.random.default_rng(seed).integers(0, 2, (k, 2 * LAYERS)).astype(np.int16)


# -- measuring -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 40])
@pytest.mark.parametrize("of", ["drop", "quantization", "mixed", "gguf"])
def test_any_number_of_workers_measures_what_one_process_does(of: str, count: int, bank_of: BankOf) -> None:
    model = loaded("gemma2" if of == "gguf" else "llama")  # the former's embedding is tied
    if of == "drop":
        levels, population = DropLevels(model.anatomy), dropped(9)
    elif of == "gguf":
        request = QuantizeRequest(model="m", method="gguf", bits="8", banks=(str(bank_of("gemma2", "gguf").path),))
        levels = request.task(model, Path(), quiet=True, say=lambda line: None).levels  # type: ignore[assignment]
        population = random_profiles(levels.genome, 7)  # type: ignore[attr-defined]
    else:
        levels = bank_levels("llama", of, bank_of)  # type: ignore[assignment]
        population = random_profiles(levels.genome, 7)  # type: ignore[attr-defined]
    population = np.concatenate([population, population[2:4], np.full_like(population[:1], TEACHER)])
    sequences = text(12, 12, 5)
    alone, several = Evaluator(model, levels), spread(pool(count, model, levels), model, levels)
    expected, found = alone.measure(population, sequences, ALL), several.measure(population, sequences, ALL)
    for losses, those in zip(found, expected, strict=True):
        assert losses.tobytes() == those.tobytes()
    assert several.counts.plain_passes == alone.counts.plain_passes
    assert several.counts.plain_projected == alone.counts.plain_projected
    assert several.counts.passes >= alone.counts.passes > 0


def test_equal_students_go_to_one_worker_once() -> None:
    model = loaded("llama")
    levels = DropLevels(model.anatomy)
    here = pool(3, model, levels)
    kept, gone = np.ones((1, levels.block_units[-1][-1] + 1), dtype=np.int16), dropped(1)
    teacher = np.full_like(kept, TEACHER)
    losses = spread(here, model, levels).measure(np.concatenate([kept, gone, teacher, gone]), text(8), [KL()])[0]
    assert sum(len(rows) for rows, *_ in measured_in(here)) == 2
    assert losses[0] == losses[2] and losses[1] == losses[3]


def test_students_with_a_common_beginning_go_to_one_worker() -> None:
    model = loaded("llama")
    levels = DropLevels(model.anatomy)
    population = np.ones((8, 2 * LAYERS), dtype=np.int16)
    population[::2, 0] = 0  # shuffled: every other one begins otherwise
    population[np.arange(8), -1 - np.arange(8) // 2] = 0
    here = pool(2, model, levels)
    spread(here, model, levels).measure(population, text(8), [KL()])
    first, second = ({row[0] for row in rows.tolist()} for rows, *_ in measured_in(here))
    assert (first, second) in (({0}, {1}), ({1}, {0}))


def test_fewer_students_than_workers_take_fewer_workers() -> None:
    model = loaded("llama")
    levels = DropLevels(model.anatomy)
    here = pool(5, model, levels)
    spread(here, model, levels).measure(dropped(2), text(8), [KL()])
    assert [len(rows) for rows, *_ in measured_in(here)] == [1, 1]


@pytest.mark.parametrize(("count", "cut"), [(2, [(3, 2), (3, 3)]), (3, 3 * [(3, 2)]), (6, 3 * [(1, 2)] + 3 * [(2, 2)])])
def test_sequences_are_cut_before_students_and_by_whole_calls(count: int, cut: list[tuple[int, int]]) -> None:
    model = loaded("llama")
    levels = DropLevels(model.anatomy)
    population, sequences = dropped(3), text(8, 8, 8, 8, 8)
    here = Here(WorkersAt(1), dict)
    here.objects = [Measures(Evaluator(model, levels, tokens_per_call=16)) for _ in range(count)]
    found = spread(here, model, levels).measure(population, sequences, ALL)
    expected = Evaluator(model, levels, tokens_per_call=16).measure(population, sequences, ALL)
    assert [losses.tobytes() for losses in found] == [losses.tobytes() for losses in expected]
    sizes = [(len(rows), len(texts)) for rows, texts, _ in measured_in(here)]
    assert sizes == [
        (rows, min(texts, 1) if i % 3 == 2 and count > 2 else texts) for i, (rows, texts) in enumerate(cut)
    ]


def test_without_workers_this_process_measures_and_says_so() -> None:
    model = loaded("llama")
    levels, population, sequences = DropLevels(model.anatomy), dropped(6), text(8, 8)
    here, said = pool(2, model, levels), list[str]()
    here.left = 3
    several = spread(here, model, levels, said)
    expected = Evaluator(model, levels).measure(population, sequences, ALL)
    for _ in range(4):
        for losses, those in zip(several.measure(population, sequences, ALL), expected, strict=True):
            assert losses.tobytes() == those.tobytes()
    assert said == ["no worker is left; this process measures by itself"]


@pytest.mark.parametrize(("wrong", "finite"), [(None, True), (np.nan, False), (np.inf, False)])
def test_losses_that_are_not_numbers_are_checked_by_another_worker(wrong: float | None, finite: bool) -> None:
    losses = np.zeros((2, 2))
    losses[1, 0] = 0 if wrong is None else wrong
    assert Answer([np.zeros((2, 2)), losses], 0, 0).finite is finite


def test_a_fitness_that_workers_do_not_know_is_refused() -> None:
    class Mine(KL):
        name = "mine"  # type: ignore[assignment]

    model = loaded("llama")
    levels = DropLevels(model.anatomy)
    for fitness, match in ((Mine(), "expected a fitness of .*, got 'mine'"), (Other(), "know kl as another fitness")):
        with pytest.raises(ValueError, match=match):
            spread(pool(1, model, levels), model, levels).measure(dropped(2), text(8), [fitness])


class Other(Perplexity):
    name = "kl"  # type: ignore[assignment]


def test_a_population_of_another_width_is_refused() -> None:
    model = loaded("llama")
    levels = DropLevels(model.anatomy)
    with pytest.raises(ValueError, match=r"shape \(k, 8\), got \(2, 7\)"):
        spread(pool(1, model, levels), model, levels).measure(dropped(2)[:, 1:], text(8), [KL()])


# -- searches ------------------------------------------------------------------------------------------------------


@pytest.fixture
def drop(small: dict[str, Any]) -> DropRequest:
    return DropRequest(**{**small, "generations": 2, "offspring": 4}, sparsity=0.25)


def test_a_search_by_workers_is_the_search_of_one_process(
    drop: DropRequest, quantize: QuantizeRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learning = replace(quantize, algorithm="learning", start=None, generations=2)
    guided = replace(drop, start=None, baselines=("random", "window"))
    for name, request in {"drop": guided, "quantize": learning}.items():
        alone = run(request, tmp_path / f"{name}-alone")
        with monkeypatch.context() as patch:
            opened = workers_here(patch)
            several = run(replace(request, workers="3"), tmp_path / name)
            assert outcome(several) == outcome(alone)
            (here,) = opened
            assert {worker for worker, *_ in here.calls} == {0, 1, 2}
        files = [(tmp_path / folder / "trace.jsonl").read_text().splitlines() for folder in (f"{name}-alone", name)]
        assert len(files[0]) == len(files[1]) > 0


def test_a_run_begun_with_workers_goes_on_without(
    quantize: QuantizeRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = run(quantize, tmp_path / "alone")
    with monkeypatch.context() as patch:
        workers_here(patch)
        cut = run(replace(quantize, workers="2", max_seconds=1e-9), tmp_path / "run")
    assert cut["stop"] == StopReason.TIME.value and cut["profile"] != alone["profile"]
    resumed = resume_quantize(RunFolder.open(tmp_path / "run"), quiet=True, workers=None)
    assert outcome(resumed) == outcome(alone)


def test_a_search_goes_on_when_its_workers_die(
    drop: DropRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = run(drop, tmp_path / "alone")
    opened = workers_here(monkeypatch, dies_after=5)
    several = run(replace(drop, workers="2"), tmp_path / "run")
    assert outcome(several) == outcome(alone)
    assert len(opened) > 2  # they are started again, and again


def test_workers_that_die_before_they_answer_are_not_started_again(
    drop: DropRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*args: Any, **options: Any) -> Any:
        raise WorkersError("no worker is left")

    alone = run(drop, tmp_path / "alone")
    opened = workers_here(monkeypatch)
    monkeypatch.setattr(Here, "call", die)
    said: list[str] = []
    several = begin(replace(drop, workers="2"), tmp_path / "run", force=False, quiet=True, say=said.append)
    assert outcome(several) == outcome(alone)
    assert "no worker is left; this process measures by itself" in said
    assert len(opened) == 1


def test_a_ladder_and_a_comparison_use_one_pool(
    small: dict[str, Any], banks: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**small, "banks": (banks["quantization"],), "generations": 1}
    asked: dict[str, Any] = {name: options[name] for name in options if name not in ("start", "baselines", "algorithm")}
    comparing = CompareRequest(**asked, task="quantization", target="3", methods=("uniform", "evopress"), seeds=1)
    climbing = LadderRequest("llm quantize", "bits", ("3", "4"), options)
    alone = ladder(climbing, tmp_path / "ladder", quiet=True), compare(comparing, tmp_path / "compare", quiet=True)
    opened = workers_here(monkeypatch)
    spread_ladder = ladder(replace(climbing, options={**options, "workers": "2"}), tmp_path / "ladder-2", quiet=True)
    assert [row["kl"] for row in spread_ladder["rows"]] == [row["kl"] for row in alone[0]["rows"]]
    compared = compare(replace(comparing, workers="2"), tmp_path / "compare-2", quiet=True)
    assert [found["row"]["kl"] for found in compared["runs"]] == [found["row"]["kl"] for found in alone[1]["runs"]]
    assert [found["profile"] for found in compared["runs"]] == [found["profile"] for found in alone[1]["runs"]]
    assert len(opened) == 2
    # The same comparison with other means is the same comparison.
    compare(replace(comparing, workers=None), tmp_path / "compare-2", quiet=True)


def test_a_search_whose_workers_do_not_start_leaves_no_folder(
    drop: DropRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise DiscoptError("workers need the extra ray")

    monkeypatch.setattr(workers, "Workers", refuse)
    with pytest.raises(DiscoptError, match="the extra ray"):
        run(replace(drop, workers="2"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -- what workers hold ---------------------------------------------------------------------------------------------


def holding(request: SearchRequest) -> StudentsHolding:
    prepared = Prepared.load(request, lambda line: None)
    return StudentsHolding.of(prepared.loaded, request.task(prepared.loaded, Path(), quiet=True, say=print))


def test_another_model_at_the_same_place_is_refused(drop: DropRequest, tmp_path: Path) -> None:
    tiny("Llama").save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    asked = holding(replace(drop, model=str(tmp_path / "m")))
    Worker(asked)
    tiny("Llama", seed=1).save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match=r"m is another model on .*: fingerprint \w{12} there, \w{12} here"):
        Worker(asked)


def test_another_bank_is_refused(quantize: QuantizeRequest) -> None:
    asked = holding(quantize)
    with pytest.raises(BankError, match=r"another bank on .*: fingerprint \w{12} there, abcd here"):
        Worker(replace(asked, banks=("abcd",)))


def test_what_a_machine_does_not_see_is_sent_to_it_once(
    quantize: QuantizeRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize = replace(quantize, generations=1)
    alone = run(quantize, tmp_path / "alone")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (opened,) = [workers_here(monkeypatch)]
    hidden = {str(Path(quantize.model).resolve()), *map(str, map(Path, quantize.banks))}
    for module in (parcels, workers):
        monkeypatch.setattr(module, "is_here", lambda source: source not in hidden)
    packed: list[str] = []
    of = Parcel.of
    monkeypatch.setattr(Parcel, "of", lambda source, put: packed.append(source) or of(source, put))
    said: list[str] = []
    asked = replace(quantize, workers="2")
    several = begin(asked, tmp_path / "run", force=False, quiet=True, say=said.append)
    assert outcome(several) == outcome(alone)
    assert sorted(packed) == sorted(hidden)
    assert sum("sending" in line for line in said) == 2
    kept = sorted((tmp_path / "cache").rglob("*.*"))
    assert {"model.safetensors", "config.json", "bank.json", "block-00000.safetensors"} <= {path.name for path in kept}
    # What is there already is not written again, unless it is damaged.
    before = {path: path.stat().st_ino for path in kept}
    config = next(path for path in kept if path.name == "config.json")
    config.write_text("{")
    run(asked, tmp_path / "again")
    after = {path: path.stat().st_ino for path in kept}
    assert {path for path in kept if before[path] != after[path]} == {config}
    assert len(opened) == 2


def test_a_source_that_is_nowhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="gone cannot be found there"):
        Parcel.of(str(tmp_path / "gone"), bytes)
    with pytest.raises(MissingError, match="gone"):
        parcels.located({}, str(tmp_path / "gone"))


def test_pickles_are_not_sent(tmp_path: Path) -> None:
    for name in ("config.json", "pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    assert {file.name for file in Parcel.of(str(tmp_path), bytes).files} == {"config.json", "model.safetensors"}


# -- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--workers", "0", "workers must be a number such as 4 or ray://HOST:PORT, got '0'"),
        ("--workers", "many", "workers must be a number"),
        ("--worker-seconds", "0", "worker_seconds must be above 0, got 0.0"),
        ("--memory", "lots", "memory must be a size such as 16GiB or 500MB, got 'lots'"),
        ("--host-memory", "-1", "host memory must be a size"),
    ],
)
@pytest.mark.parametrize("command", ["drop", "quantize", "compare", "bank"])
def test_means_that_make_no_sense_are_refused(
    command: str, option: str, value: str, message: str, tmp_path: Path
) -> None:
    own = {
        "drop": ["--sparsity", "0.2"],
        "quantize": ["--bits", "3"],
        "compare": ["--task", "drop", "--target", "0.2"],
        "bank": [],
    }
    result = call(command, "nowhere", *own[command], "--out", tmp_path / "out", option, value)
    assert message in refusal(result, code=2)


def test_means_of_a_run_that_goes_on_are_checked() -> None:
    assert checked_means({"workers": "2", "memory": None}) == {"workers": "2", "memory": None}
    with pytest.raises(DiscoptError, match="memory must be a size such as 16GiB or 500MB, got 'lots'"):
        checked_means({"memory": "lots"})


def test_with_workers_on_cuda_the_model_here_waits_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(means, "total_memory", lambda device: 2**34)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert Means().bounds_here(cuda) == Means(workers="1").bounds_here(cuda) == Memory()
    assert Means(workers="2").bounds_here(cpu) == Means(workers="2").bounds == Memory()
    assert Means(workers="2", host_memory="1GB").bounds_here(cuda) == Memory(device=2**34, host=10**9)
    assert Means(workers="2", memory="1GB").bounds_here(cuda) == Memory(device=10**9)


def test_a_cluster_of_cpus_needs_a_number_of_workers(drop: DropRequest, tmp_path: Path) -> None:
    asked = replace(drop, workers="ray://head:10001")
    with pytest.raises(DiscoptError, match=r"say how many workers .*: ray://head:10001\?workers=8"):
        run(asked, tmp_path / "run")


def test_a_run_says_what_it_was_to_compute_with(
    drop: DropRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers_here(monkeypatch)
    said: list[str] = []
    asked = replace(drop, workers="2", memory="1GiB", worker_seconds=60.0)
    results = begin(asked, tmp_path / "run", force=False, quiet=True, say=said.append)
    assert RunFolder.open(tmp_path / "run").request["options"]["workers"] == "2"
    assert "--workers 2 --worker-seconds 60.0 --memory 1GiB" in asked.command_line(tmp_path / "run")
    assert sum(line.startswith("each worker: memory: ") for line in said) == 1
    assert outcome(results) == outcome(run(drop, tmp_path / "alone"))
