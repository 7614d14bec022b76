"""Time to solve one Llama-shaped block at every level, against the plain form: `python benchmarks/bank.py`.

The plain form is what the official GPTQ and SparseGPT codes do: one layer and one level at a time, each with its own
damping, Cholesky factorisation, inverse and second factorisation of the layer's Hessian, columns in blocks of 128 with
rank-one updates inside. Both forms start from the same weights and Hessians, keep every level they made, and run in
turn in one process. The aim is to be at least three times faster on the CPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import record
import torch
from torch import Tensor

from discopt_llm.quantization import QuantizationSettings, quantize
from discopt_llm.sparsity import SparsitySettings, prune

BITS = (2, 3, 4, 5, 6)
BLOCK = 128  # columns, and those of a group
DAMPING = 0.01
TARGET = 0.6  # sparsity of the middle level
STEP = 0.025
AIM = 3.0


@dataclass(frozen=True)
class Stack:
    """Layers with a common input."""

    names: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int


def llama_block(width: int, rows_share: float) -> tuple[Stack, ...]:
    """Shapes like those of Llama-3: keys and values a quarter as wide, MLPs 3.5 times.

    `rows_share` is the part of each layer's rows that is solved. With fewer rows the factorisations weigh more, in
    favour of doing only one: shares below 1 are for a quick look.
    """
    keys, inner = width // 4, width * 7 // 2
    stacks = (
        Stack(("q", "k", "v"), (width, keys, keys), width),
        Stack(("o",), (width,), width),
        Stack(("gate", "up"), (inner, inner), width),
        Stack(("down",), (width,), inner),
    )
    return tuple(Stack(s.names, tuple(max(int(r * rows_share), 1) for r in s.rows), s.columns) for s in stacks)


def plain(W: Tensor, H: Tensor, block_of: Callable[[Tensor, Tensor], Callable[[int, Tensor], Tensor]]) -> Tensor:
    """One layer (R, C) at one level; `block_of` sees a block's weights and U's and says what its columns become."""
    W, H = W.clone(), H.clone()
    C = len(H)
    dead = H.diagonal() == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    H.diagonal().add_(DAMPING * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    Q, losses = torch.zeros_like(W), torch.zeros_like(W)
    for start in range(0, C, BLOCK):
        stop = min(start + BLOCK, C)
        W1, U1 = W[:, start:stop].clone(), U[start:stop, start:stop]
        E1 = torch.zeros_like(W1)
        column = block_of(W1, U1)
        for i in range(stop - start):
            w, d = W1[:, i], U1[i, i]
            q = column(i, w)
            Q[:, start + i] = q
            losses[:, start + i] = (w - q) ** 2 / d**2
            E = (w - q) / d
            W1[:, i:] -= E.unsqueeze(1).matmul(U1[i, i:].unsqueeze(0))
            E1[:, i] = E
        W[:, stop:] -= E1.matmul(U[start:stop, stop:])
    losses.sum()
    return Q


def plain_gptq(bits: int) -> Callable[[Tensor, Tensor], Callable[[int, Tensor], Tensor]]:
    """Asymmetric rounding; a group is a block."""
    top = 2**bits - 1

    def block_of(W1: Tensor, _: Tensor) -> Callable[[int, Tensor], Tensor]:
        low, high = W1.amin(1).clamp(max=0), W1.amax(1).clamp(min=0)
        scale = ((high - low) / top).half().to(W1)
        zero = torch.round(-low / scale)
        return lambda _, w: scale * (torch.clamp(torch.round(w / scale) + zero, 0, top) - zero)

    return block_of


def plain_sparsegpt(share: float) -> Callable[[Tensor, Tensor], Callable[[int, Tensor], Tensor]]:
    """The mask of a block by a full sort."""

    def block_of(W1: Tensor, U1: Tensor) -> Callable[[int, Tensor], Tensor]:
        scores = W1**2 / U1.diagonal().reshape(1, -1) ** 2
        mask = scores <= torch.sort(scores.flatten())[0][int(scores.numel() * share)]

        def column(i: int, w: Tensor) -> Tensor:
            q = w.clone()
            q[mask[:, i]] = 0
            return q

        return column

    return block_of


def forms(stack: Stack, kind: str, levels: int, layers: list[Tensor], H: Tensor) -> dict[str, Callable[[], object]]:
    """Both ways to solve a stack at all levels."""
    if kind == "gptq":
        settings = QuantizationSettings(BITS, group_size=BLOCK, damping=DAMPING)
        return {
            "ours": lambda: quantize(torch.cat(layers), H, settings),
            "plain": lambda: [plain(W, H, plain_gptq(bits)) for bits in BITS for W in layers],
        }
    shares = [TARGET + STEP * (i - levels // 2) for i in range(levels)]
    zeros = [[int(share * W.numel()) for W in layers] for share in shares]
    return {
        "ours": lambda: prune(torch.cat(layers), H, zeros, stack.rows, SparsitySettings(damping=DAMPING)),
        "plain": lambda: [plain(W, H, plain_sparsegpt(share)) for share in shares for W in layers],
    }


def measure(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def inputs(stack: Stack, device: torch.device, rng: torch.Generator) -> tuple[list[Tensor], Tensor]:
    """Random weights of a stack and the Hessian of correlated inputs."""
    C = stack.columns
    x = torch.randn(C + 512, C, generator=rng)
    x += x.roll(1, 1) + 0.5 * x.roll(7, 1)
    x = x.to(device)
    return [0.02 * torch.randn(r, C, generator=rng).to(device) for r in stack.rows], x.T @ x / len(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--layers", nargs="+", choices=("q", "o", "gate", "down"), help="stacks, by their first layer")
    parser.add_argument("--kinds", nargs="+", choices=("gptq", "sparsegpt"), default=["gptq", "sparsegpt"])
    parser.add_argument("--levels", type=int, default=17, help="of sparsity")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--rows-share", type=float, default=1.0, help="part of every layer's rows")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=record.HERE / "results" / "bank.json")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    rng = torch.Generator().manual_seed(arguments.seed)

    warm = Stack(("q",), (64,), 256)
    for kind in arguments.kinds:
        for run in forms(warm, kind, 3, *inputs(warm, device, rng)).values():
            run()
    rows = []
    print(f"{'width':>6} {'kind':10} {'layers':8} {'plain s':>9} {'ours s':>9} {'times':>6}")
    for width in arguments.width:
        stacks = [s for s in llama_block(width, arguments.rows_share) if s.names[0] in (arguments.layers or s.names)]
        for kind in arguments.kinds:
            sums = {"plain": 0.0, "ours": 0.0}
            for stack in stacks:
                runs = forms(stack, kind, arguments.levels, *inputs(stack, device, rng))
                times: dict[str, list[float]] = {"plain": [], "ours": []}
                for _ in range(arguments.repeats):
                    for form, run in runs.items():
                        times[form].append(measure(run, device))
                seconds = {form: statistics.median(all_) for form, all_ in times.items()}
                sums = {form: sums[form] + seconds[form] for form in sums}
                rows.append(report(width, kind, "+".join(stack.names), seconds))
            rows.append(report(width, kind, "all", sums))
    figures = {
        "bits": BITS,
        "sparsity_levels": arguments.levels,
        "rows_share": arguments.rows_share,
        "repeats": arguments.repeats,
        "threads": torch.get_num_threads(),
        "aim": AIM,
        "rows": rows,
    }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    record.write(arguments.out, figures, seed=arguments.seed, device=name)


def report(width: int, kind: str, layers: str, seconds: dict[str, float]) -> dict[str, object]:
    """Print a line and return it for the JSON."""
    times = seconds["plain"] / seconds["ours"]
    print(f"{width:6} {kind:10} {layers:8} {seconds['plain']:9.2f} {seconds['ours']:9.2f} {times:6.2f}", flush=True)
    return {"width": width, "kind": kind, "layers": layers, **{f"{k}_s": s for k, s in seconds.items()}, "times": times}


if __name__ == "__main__":
    main()
