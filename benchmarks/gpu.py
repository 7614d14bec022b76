"""One generation of a quantization search, block by block and the plain way: `python benchmarks/gpu.py`.

A Llama-shaped model of random weights is made on the device, with a bank of its layers rounded to nearest. EvoPress
then asks for one generation at the quantization setting of its paper (METHOD: "Table 8"), and every stage is measured
(a) by the evaluator, which walks a population through the model block by block, and (b) the plain way, one candidate
at a time (see `plain`). Both must give the same losses, or nothing is recorded. With `--memory` only the evaluator
measures, for the plain way knows no bound. The aims are those of CUDA devices: twice the plain speed, half of the
card's measured matrix-product peak at 8B, and an 8B search within 24 GiB (`--memory 24GiB`).

The first generation is warm-up: it makes the bank's levels resident, as a search has them after its first generation.
The plain way's files and its teacher's logits are made before the clock starts; the evaluator's teacher runs within
its time. `--model-size larger` makes a model of 1.25 times the device's memory, which is streamed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import record
import torch
from numpy.typing import NDArray
from plain import PlainWay
from random_llama import random_llama, rounded_bank
from shapes import SHAPES, WIDTHS, Shape, larger_than, mean_keys
from torch import Tensor

from discopt import EvoPressSettings, Query, Stage
from discopt.errors import DiscoptError
from discopt.optimizers import EvoPress
from discopt_llm.budget import Budget
from discopt_llm.calibration import Calibration
from discopt_llm.errors import DeviceError
from discopt_llm.evaluator import Counts, Evaluator
from discopt_llm.fitness import KL
from discopt_llm.genome import bank_genome
from discopt_llm.levels import BankLevels
from discopt_llm.memory import Memory, total_memory
from discopt_llm.models import parse_device, parse_dtype
from discopt_llm.presets import QUANTIZATION_PRESETS

PAPER = QUANTIZATION_PRESETS["paper"]
BITS = "3"  # average width of the candidates
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}  # of a loss, relative
PEAK_SIZE = {"cuda": 8192, "cpu": 1024}  # of the square matrices that the peak is measured with
PEAK_REPEATS = 10
GIB = 2**30
T = TypeVar("T")
AIMS = {"times_over_plain": 2.0, "share_of_peak": 0.5, "peak_bytes": 24 * GIB}


@dataclass(frozen=True, eq=False)
class Asked:
    """What a stage measures."""

    population: NDArray[np.integer]  # (k, n)
    sequences: tuple[Tensor, ...]  # (L_i,) token ids each

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.sequences]


@dataclass(frozen=True, eq=False)
class Measured:
    """What measuring a stage gave and took."""

    losses: NDArray[np.float64]  # (k,)
    seconds: float
    operations: float  # of matrix products that were really computed


class Bench:
    """A model with its bank, and both ways to measure a stage."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.device = parse_device(arguments.device)
        self.shape = shape_of(arguments.model_size, self.device)
        self.dtype = parse_dtype(arguments.dtype, self.device)
        memory = Memory.parse(arguments.memory)
        self.loaded = random_llama(self.shape, self.device, self.dtype, arguments.seed, memory)
        bank = rounded_bank(self.loaded, folder / "bank", arguments.widths)
        genome = bank_genome(bank.layers, bank.labels, bank.kind, "layer", self.shape.end_weights)
        self.space = genome.space(Budget.parse("bits", BITS), "size")
        self.levels = BankLevels(self.loaded, self.loaded.layers, genome, [bank])
        self.evaluator = Evaluator(self.loaded, self.levels, memory=memory, say=print)
        self.plain = PlainWay(self.levels, folder / "levels")
        self.settings = EvoPressSettings(
            generations=1, offspring=arguments.offspring, stages=tuple(arguments.stage), start="uniform"
        )
        rng = torch.Generator().manual_seed(arguments.seed)
        length = min(arguments.sequence_length, arguments.stage[-1].fidelity)
        count = -(-arguments.stage[-1].fidelity // length)
        ids = torch.randint(self.shape.vocabulary, (count, length), generator=rng)
        self.text = Calibration(ids, "random tokens")
        self.seed = arguments.seed

    def generation(self) -> tuple[list[Asked], list[Measured]]:
        """The stages of one generation, as the evaluator's losses have chosen their candidates."""
        search = EvoPress(self.space, self.settings, seed=self.seed)
        asked: list[Asked] = []
        measured: list[Measured] = []
        while not search.done:
            query: Query = search.ask()
            asked.append(Asked(query.population, self.text.sample(query.fidelity, query.seed)))
            measured.append(self.block_wise(asked[-1]))
            search.tell(query, measured[-1].losses)
        return asked, measured

    def block_wise(self, asked: Asked) -> Measured:
        """All candidates of a stage at once, by the evaluator."""
        before = self.evaluator.counts
        ((losses,), seconds) = self._timed(lambda: self.evaluator.measure(asked.population, asked.sequences, [KL()]))
        done = self.evaluator.counts
        counts = Counts(done.passes - before.passes, projected=done.projected - before.projected)
        return Measured(losses.mean(axis=1), seconds, operations(self.shape, counts, asked.lengths))

    def one_by_one(self, asked: Asked, teacher: Sequence[Tensor]) -> Measured:
        """One candidate at a time, against the teacher's logits."""
        losses, seconds = self._timed(lambda: self.plain.measure(asked.population, asked.sequences, teacher))
        tokens = len(losses) * sum(asked.lengths)
        counts = Counts(passes=2 * self.shape.blocks * tokens, projected=tokens)
        return Measured(losses, seconds, operations(self.shape, counts, asked.lengths))

    def all_one_by_one(self, asked: Sequence[Asked], teachers: Sequence[Sequence[Tensor]]) -> list[Measured]:
        """Stage by stage."""
        with self.plain.students_():
            return [self.one_by_one(*pair) for pair in zip(asked, teachers, strict=True)]

    def peak_of(self, function: Callable[[], T]) -> tuple[T, int]:
        """An answer, and the most memory held meanwhile, bytes: of the device, or of the process on a CPU."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return function(), torch.cuda.max_memory_allocated(self.device)
        record.reset_peak_memory()
        return function(), record.peak_memory()

    def plain_peak(self, asked: Asked, teacher: Sequence[Tensor]) -> int:
        """What the plain way holds at most: one candidate and one sequence need what all need."""
        self.levels.keep_(packed=0, unpacked=0)  # what the evaluator holds is not the plain way's
        one = Asked(asked.population[:1], asked.sequences[:1])
        return self.peak_of(lambda: self.all_one_by_one([one], [teacher[:1]]))[1]

    def matmul_peak(self) -> float:
        """Operations per second of the fastest of some products of large square matrices."""
        size = PEAK_SIZE[self.device.type]
        a, b = (torch.randn(size, size, device=self.device).to(self.dtype) for _ in range(2))
        seconds = [self._timed(lambda: a @ b)[1] for _ in range(PEAK_REPEATS)]
        return 2 * size**3 / min(seconds)

    def _timed(self, function: Callable[[], Any]) -> tuple[Any, float]:
        # On a CPU the processor's time, which other processes of the machine do not change.
        clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        self._wait()
        start = clock()
        answer = function()
        self._wait()
        return answer, clock() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def shape_of(name: str, device: torch.device) -> Shape:
    """One of SHAPES, or "larger" than the device's memory."""
    return larger_than(total_memory(device)) if name == "larger" else SHAPES[name]


def operations(shape: Shape, counts: Counts, lengths: Sequence[int]) -> float:
    """Floating-point operations of what was counted; no sub-block is ever dropped here, so two passes are a block."""
    return counts.passes / 2 * shape.block_operations(mean_keys(lengths)) + counts.projected * shape.head_operations


def run(bench: Bench, repeats: int, *, with_plain: bool, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Figures of both ways in turn, stage by stage; raises SystemExit where their losses differ."""
    (asked, cold), peak = bench.peak_of(bench.generation)
    peaks = {"block_wise": peak}
    figures: dict[str, Any] = {
        "share_of_passes": bench.evaluator.counts.share,
        "cold_seconds": [stage.seconds for stage in cold],
    }
    say(f"first generation: {sum(figures['cold_seconds']):.2f} s, {figures['share_of_passes']:.3f} of all passes")
    turns: dict[str, list[list[Measured]]] = {"block_wise": []}
    forms = {"block_wise": lambda: [bench.block_wise(stage) for stage in asked]}
    if with_plain:
        teachers = [bench.plain.teacher_logits(stage.sequences) for stage in asked]
        for stage in asked:
            bench.plain.write_levels(stage.population)
        turns["plain"] = []
        forms["plain"] = lambda: bench.all_one_by_one(asked, teachers)
    for turn in range(repeats):
        for form in list(forms) if turn % 2 == 0 else list(forms)[::-1]:
            turns[form].append(forms[form]())
    if with_plain:
        peaks["plain"] = bench.plain_peak(asked[-1], teachers[-1])
        figures["largest_relative_difference"] = _checked(turns, TOLERANCE[bench.dtype])
    figures["stages"] = [_row(stage, i, turns) for i, stage in enumerate(asked)]
    figures["matmul_peak"] = bench.matmul_peak()
    return {**figures, **_total(turns, peaks, figures["matmul_peak"])}


def _checked(turns: Mapping[str, Sequence[Sequence[Measured]]], tolerance: float) -> float:
    """The largest difference between both ways' losses of one candidate, relative to the plain one's."""
    difference = max(
        float((np.abs(a.losses - b.losses) / np.abs(b.losses)).max())
        for ours, theirs in zip(turns["block_wise"], turns["plain"], strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
    if not difference <= tolerance:
        sys.exit(
            f"expected the same losses both ways, within {tolerance:g}, got a relative difference of {difference:g}"
        )
    return difference


def _row(asked: Asked, stage: int, turns: Mapping[str, Sequence[Sequence[Measured]]]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "candidates": len(asked.population),
        "tokens": sum(asked.lengths),
        "sequences": len(asked.sequences),
    }
    for form, of_form in turns.items():
        seconds = [turn[stage].seconds for turn in of_form]
        row |= {
            f"{form}_seconds": float(np.median(seconds)),
            f"{form}_all_seconds": seconds,
            f"{form}_operations": of_form[0][stage].operations,
        }
    return row


def _total(
    turns: Mapping[str, Sequence[Sequence[Measured]]], peaks: Mapping[str, int], matmul_peak: float
) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for form, of_form in turns.items():
        seconds = float(np.median([sum(stage.seconds for stage in turn) for turn in of_form]))
        computed = sum(stage.operations for stage in of_form[0])
        total[form] = {
            "seconds": seconds,
            "operations": computed,
            "share_of_peak": computed / seconds / matmul_peak,
            "peak_bytes": peaks[form],
        }
    if "plain" in total:
        total["times_over_plain"] = total["plain"]["seconds"] / total["block_wise"]["seconds"]
    return total


def verdicts(figures: dict[str, Any], model_size: str, on_cuda: bool, memory: str | None) -> dict[str, bool | None]:
    """Whether the aims are met; None where this run cannot tell."""
    at_8b = on_cuda and model_size == "8b"
    ours = figures["block_wise"]
    times = figures.get("times_over_plain")
    return {
        "times_over_plain": times >= AIMS["times_over_plain"] if on_cuda and times is not None else None,
        "share_of_peak": ours["share_of_peak"] >= AIMS["share_of_peak"] if at_8b else None,
        "peak_bytes": ours["peak_bytes"] <= AIMS["peak_bytes"] if at_8b and memory is not None else None,
    }


def show(figures: dict[str, Any]) -> None:
    """Print what `run` and `verdicts` found."""
    print(f"{'candidates':>10} {'tokens':>7} {'block-wise s':>12} {'plain s':>9}")
    for row in figures["stages"]:
        plain = f"{row['plain_seconds']:.2f}" if "plain_seconds" in row else "-"
        print(f"{row['candidates']:10} {row['tokens']:7} {row['block_wise_seconds']:12.2f} {plain:>9}")
    for form in ("block_wise", "plain"):
        if form in figures:
            f = figures[form]
            print(
                f"{form}: {f['seconds']:.2f} s, {f['operations'] / f['seconds'] / 1e12:.3f} TFLOP/s, "
                f"{f['share_of_peak']:.1%} of the measured peak of {figures['matmul_peak'] / 1e12:.3f}, "
                f"at most {f['peak_bytes'] / GIB:.2f} GiB"
            )
    if "times_over_plain" in figures:
        print(
            f"{figures['times_over_plain']:.2f} times as fast as the plain way; losses differ by at most "
            f"{figures['largest_relative_difference']:.1e}"
        )
    words = {True: "met", False: "NOT met", None: "not told by this run"}
    for aim, met in figures["met"].items():
        print(f"aim {aim} {AIMS[aim]:g}: {words[met]}")


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model-size", choices=(*SHAPES, "larger"), default="8b")
    options.add_argument("--device", default="auto")
    options.add_argument("--dtype", default="auto")
    options.add_argument("--offspring", type=int, default=PAPER.offspring)
    options.add_argument("--stage", type=Stage.parse, nargs="+", default=list(PAPER.stages), help="SURVIVORS@TOKENS")
    options.add_argument("--sequence-length", type=int, default=PAPER.sequence_length)
    options.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS), help="of the bank; 3 among them")
    options.add_argument("--memory", help="bound on the device's memory, such as 24GiB; leaves the plain way out")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument(
        "--folder", type=Path, help="for bank and level files, removed at the end; else a temporary one"
    )
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, help="default: benchmarks/results/gpu-DEVICE-SIZE.json")
    return options


def main(words: Sequence[str] | None = None) -> None:
    options = parser()
    arguments = options.parse_args(words)
    try:
        on_cuda = parse_device(arguments.device).type == "cuda"
        Memory.parse(arguments.memory)
    except (DeviceError, ValueError) as error:
        options.error(str(error))
    if arguments.model_size == "larger" and (arguments.memory is None or not on_cuda):
        options.error("--model-size larger needs CUDA and --memory")
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        bench = Bench(arguments, Path(folder))
        figures = run(bench, arguments.repeats, with_plain=arguments.memory is None)
    figures["met"] = verdicts(figures, arguments.model_size, on_cuda, arguments.memory)
    show(figures)
    name = torch.cuda.get_device_name(bench.device) if on_cuda else None
    described = {k: v for k, v in vars(arguments).items() if k not in ("out", "seed", "folder", "stage")}
    described |= {"stages": bench.settings.describe_stages(), "dtype": str(bench.dtype).removeprefix("torch.")}
    out = arguments.out or record.HERE / "results" / f"gpu-{bench.device.type}-{arguments.model_size}.json"
    shape = {**asdict(bench.shape), "weights": bench.shape.weights}
    figures = {"options": described, "shape": shape, "plan": bench.evaluator.plan.sentence, "aims": AIMS, **figures}
    record.write(out, figures, seed=arguments.seed, device=name)


if __name__ == "__main__":
    try:
        main()
    except DiscoptError as error:
        sys.exit(f"error: {error}")
