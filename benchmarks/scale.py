"""What a search over a large model costs on paper: `python benchmarks/scale.py` refreshes the tables of docs/scale.md.

Operations and bytes are counted in `search_costs`; times follow from the rates of an assumed machine.
"""

from __future__ import annotations

import numpy as np
import record
from search_costs import (
    BITS,
    HOUR,
    PAPER,
    BankCost,
    Machine,
    SpeedUp,
    factor_operations,
    forward_operations,
    keys_of,
    stages_of,
    sweep_operations,
)
from shapes import HALF, SHAPES, WIDTHS, Shape
from tables import figures, markdown, refreshed

DOCUMENT = record.HERE.parent / "docs" / "scale.md"
SIZES = ("8b", "70b", "405b")
WORKERS = (1, 2, 4, 8, 16, 32, 64, 128)
SINGLE, COUNT, ID = 4, 8, 8  # bytes of a float32, of a loss, of a token id
GB, TFLOP, PFLOP, EFLOP = 1e9, 1e12, 1e15, 1e18

H100 = Machine(memory=80e9, halves=0.5 * 989e12, singles=0.5 * 67e12, link=0.8 * 64e9, disk=5e9)


def tables(machine: Machine = H100) -> dict[str, str]:
    """Those of docs/scale.md."""
    return {
        "measured": _measured(),
        "models": _models(),
        "shares": _shares(),
        "search": _search(machine),
        "memory": _memory(machine),
        "stream": _stream(machine),
        "hidden": _hidden(machine),
        "workers": _workers(),
        "bank": _bank(machine),
        "driver": _driver(),
    }


def _measured() -> str:
    gptq = next(row for row in figures("bank-4096-o.json")["bank-4096-o.json"]["rows"] if row["layers"] == "o")
    C = gptq["width"]
    rate = (sweep_operations((C, C)) + factor_operations(C)) / gptq["ours_s"]
    (engine,) = (
        row["us_per_candidate"]
        for row in figures("engine.json")["engine.json"]["rows"]
        if (row["engine"], row["units"], row["offspring"]) == ("evopress, rows", 224, 128)
    )
    rows = [
        ["GPTQ at five widths, 4096 x 4096, GFLOP/s", f"{rate / 1e9:.0f}", "`bank-4096-o.json`"],
        ["the engine's part of a candidate, 224 units, µs", f"{engine:.1f}", "`engine.json`"],
    ]
    for name, found in figures("gpu-*.json").items():
        part = f"{found['block_wise']['share_of_peak']:.2f}"
        rows.append(["block-wise generation, share of the measured peak", part, f"`{name}`"])
    return markdown(("what", "figure", "file"), rows)


def _each() -> list[tuple[str, Shape]]:
    return [(name.upper(), SHAPES[name]) for name in SIZES]


def _models() -> str:
    rows = [
        [
            name,
            shape.blocks,
            shape.blocks * len(shape.layers),
            f"{shape.weights / 1e9:.1f}",
            f"{HALF * shape.weights / GB:.0f}",
            f"{shape.bank_bytes() / GB:.0f}",
            f"{shape.bank_bytes([BITS]) / GB:.0f}",
            f"{forward_operations(shape, PAPER.sequence_length) / TFLOP:.3f}",
        ]
        for name, shape in _each()
    ]
    head = ("model", "blocks", "units", "weights, 10^9", "16 bits, GB", "bank, GB", "3 bits, GB", "TFLOP a token")
    return markdown(head, rows)


def _shares() -> str:
    rows = [
        [
            name,
            *(f"{stage.share(shape):.3f}" for stage in stages_of(shape)),
            *(f"{stage.forms / (shape.blocks * len(shape.layers)):.2f}" for stage in stages_of(shape)),
        ]
        for name, shape in _each()
    ]
    names = [f"{stage.candidates} @ {stage.tokens:,}" for stage in stages_of(SHAPES[SIZES[0]])]
    head = ("model", *(f"share, {stage}" for stage in names), *(f"forms a unit, {stage}" for stage in names))
    return markdown(head, rows)


def _search(machine: Machine) -> str:
    rows = []
    for name, shape in _each():
        ours = sum(stage.operations(shape) for stage in stages_of(shape))
        plain = sum(stage.plain_operations(shape) for stage in stages_of(shape))
        whole = ours * (PAPER.generations or 0)
        rows.append(
            [
                name,
                *(f"{stage.operations(shape) / PFLOP:.1f}" for stage in stages_of(shape)),
                f"{ours / PFLOP:.1f}",
                f"{plain / PFLOP:.1f}",
                f"{ours / plain:.2f}",
                f"{whole / EFLOP:.1f}",
                f"{whole / machine.halves / HOUR:.1f}",
            ]
        )
    names = [f"stage {i}, PFLOP" for i in range(1, len(PAPER.stages) + 1)]
    return markdown(("model", *names, "generation", "plain", "ours / plain", "search, EFLOP", "hours"), rows)


def _memory(machine: Machine) -> str:
    rows = []
    for name, shape in _each():
        last = stages_of(shape)[-1]
        rows.append(
            [
                name,
                f"{HALF * shape.end_weights / GB:.1f}",
                f"{HALF * shape.blocks * shape.block_weights / GB:.0f}",
                f"{2 * HALF * shape.block_weights / GB:.1f}",
                f"{stages_of(shape)[0].packed / GB:.1f}",
                *(f"{stage.state_bytes(shape) / GB:.1f}" for stage in stages_of(shape)),
                f"{last.tokens * shape.hidden * HALF / GB:.1f}",
                f"{last.tokens * shape.vocabulary * HALF / GB:.1f}",
                "yes" if stages_of(shape)[0].moved(shape, machine) == 0 else "no",
            ]
        )
    states = [f"states, stage {i}" for i in range(1, len(PAPER.stages) + 1)]
    head = ("model", "ends", "blocks", "two blocks", "forms, stage 1", *states, "teacher", "its logits", "all fits")
    return markdown(head, rows)


def _stream(machine: Machine) -> str:
    rows = []
    for name, shape in _each():
        for number, stage in enumerate(stages_of(shape), start=1):
            moved = stage.passes(shape, machine) * stage.moved(shape, machine)
            seconds = stage.operations(shape) / machine.halves
            times = [moved / machine.link, moved / machine.disk]
            rows.append(
                [
                    name,
                    number,
                    stage.passes(shape, machine),
                    f"{stage.moved(shape, machine) / GB:.0f}",
                    f"{seconds:.1f}",
                    *(f"{time:.1f}" for time in times),
                    *("yes" if time <= seconds else "no" for time in times),
                ]
            )
    head = ("model", "stage", "passes", "GB a pass", "compute s", "link s", "disk s", "link hidden", "disk hidden")
    return markdown(head, rows)


def _hidden(machine: Machine) -> str:
    shape = SHAPES["70b"]
    of_token = shape.block_operations(keys_of(PAPER.sequence_length)) / machine.halves  # seconds
    sizes = {"16 bits": HALF * shape.block_weights, **{f"{b} bits": shape.packed_bytes(b) for b in WIDTHS}}
    rows = [
        [label, *(f"{size / rate / of_token:,.0f}" for rate in (machine.link, machine.disk))]
        for label, size in sizes.items()
    ]
    return markdown(("a 70B block in", "tokens x rows, host", "tokens x rows, disk"), rows)


def _workers() -> str:
    rows = []
    for workers in WORKERS:
        up = SpeedUp.of(SHAPES["70b"], workers)
        times = (*up.stages, up.generation)
        rows.append([workers, *(f"{t:.1f}" for t in times), f"{up.work:.2f}", f"{up.rows_alone:.1f}"])
    names = [f"stage {i}" for i in range(1, len(PAPER.stages) + 1)]
    return markdown(("workers", *names, "generation", "work", "by rows alone"), rows)


def _bank(machine: Machine) -> str:
    rows = []
    tokens = PAPER.bank_tokens or 0
    for name, shape in _each():
        cost = BankCost.of(shape, tokens, forwards=2)
        widest = max(shape.inputs)
        rows.append(
            [
                name,
                *(f"{part / EFLOP:.2f}" for part in (cost.forwards, cost.hessians, cost.solves)),
                f"{cost.hours(machine):.1f}",
                f"{tokens * shape.hidden * HALF / GB:.0f}",
                f"{SINGLE * widest**2 / GB:.1f}",
                f"{shape.bank_bytes() / GB:.0f}",
            ]
        )
    head = (
        "model", "forwards, EFLOP", "Hessians", "solves", "hours", "inputs, GB", "largest H, GB", "bank, GB"
    )  # fmt: skip
    return markdown(head, rows)


def _driver() -> str:
    rows = []
    for name, shape in _each():
        stages = stages_of(shape)
        units = shape.blocks * len(shape.layers)
        largest = max(stage.candidates for stage in stages)
        sequences = [-(-stage.tokens // PAPER.sequence_length) for stage in stages]
        losses = max(stage.candidates * count for stage, count in zip(stages, sequences, strict=True))
        rows.append(
            [
                name,
                f"{HALF * shape.weights / GB:.0f}",
                f"{largest * units * np.dtype(np.int16).itemsize / 1e3:.0f}",
                f"{stages[-1].tokens * ID / 1e6:.2f}",
                f"{losses * COUNT / 1e3:.1f}",
            ]
        )
    return markdown(("model", "model in 16 bits, GB", "population, KB", "token ids, MB", "losses, KB"), rows)


def main() -> None:
    DOCUMENT.write_text(refreshed(DOCUMENT.read_text(), tables()))


if __name__ == "__main__":
    main()
