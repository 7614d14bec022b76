"""What a run leaves: results.json, profile.json, the official text file, report.md and pictures."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from discopt.folder import RunFolder
from discopt.plots import is_drawn, new_figure, plot_trace, save_figure, style_axes
from discopt.progress import format_loss
from discopt.report import markdown_rows
from discopt.run import Result
from discopt_llm.drop import DropLevels
from discopt_llm.genome import DROP_LABEL, Genome
from discopt_llm.levels import BankLevels
from discopt_llm.report_html import run_page
from discopt_llm.report_page import write_page
from discopt_llm.report_record import RunRecord
from discopt_llm.report_units import Units, form_words, short_names
from discopt_llm.report_words import fitness_words, size_words

if TYPE_CHECKING:
    from discopt_llm.request import Prepared, Task

KEPT, DEAREST, DROPPED = "#e2e8f0", "#3b82c4", "#dc6b6b"
_PICTURE_WORDS = {
    "quantization": "width of the weights, bits",
    "sparsity": "zeros, %",
    "gguf": "type of the weights",
    "mixed": "width in bits, zeros in %, – for dropped",
}
_SPARSE = "sparse"
_STATISTICS: dict[str, Callable[[NDArray[np.float64]], float]] = {"least": np.min, "mean": np.mean, "most": np.max}


def write_run(
    prepared: Prepared,
    task: Task,
    result: Result,
    rows: Sequence[Mapping[str, Any]],
    folder: RunFolder,
    choice: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Write the answer's files, results.json last, since it says that the others are there; returns its content."""
    task.document(result.profile).write(folder.path / "profile.json")
    folder.write_text("units.json", _units(task).to_json())
    folder.write_text("profile.txt", task.text(result.profile))
    results = {
        "format": "discopt-results",
        "version": 1,
        "command": folder.request["command"],
        "rows": list(rows),
        **result.to_dict(),
        "asked": task.asked(),
        "met": task.met(result.profile),
        "choice": list(choice),
        "heldout": {"source": prepared.heldout.source, "tokens": prepared.heldout.tokens},
        "seed": prepared.request.seed,
        "settings": _settings(prepared),
        "command_line": prepared.request.command_line(folder.path),
        "folder": str(folder.path),
    }
    pictures = _draw(prepared, task, result, folder)
    folder.write_text("report.md", _report(prepared, task, result, results, pictures, folder))
    write_page(folder.path / "report.html", run_page(RunRecord.read(folder.path, results)))
    folder.write_json("results.json", results)
    return results


def _units(task: Task) -> Units:
    """What is known of the units and their levels."""
    levels = task.levels
    if isinstance(levels, BankLevels):
        return Units.of_genome(levels.genome, len(levels.loaded.anatomy.blocks))
    assert isinstance(levels, DropLevels)
    return Units.of_sub_blocks(levels)


def _settings(prepared: Prepared) -> dict[str, Any]:
    """What the preset, and the options that replace its values, come to."""
    chosen, reserved = prepared.request.chosen, prepared.reserved
    return {
        "algorithm": chosen.algorithm,
        "start": chosen.start,
        "stages": [str(stage) for stage in chosen.stages],
        "sequence_length": prepared.calibration.sequence_length,
        "calibration_tokens": prepared.calibration.tokens,
        "reserved_tokens": reserved.tokens if reserved is not None else 0,
    }


def _draw(prepared: Prepared, task: Task, result: Result, folder: RunFolder) -> list[str]:
    """The pictures that could be drawn: none without matplotlib."""
    trace, units = folder.path / "trace.png", folder.path / "units.png"
    loss = fitness_words(prepared.request.fitness)
    plots: dict[str, Callable[[], object]] = {units.name: lambda: task.draw(result.profile, units)}
    if any(line["best"] is not None for line in result.trace):
        plots = {trace.name: lambda: plot_trace(result.trace, trace, unit="tokens", loss=loss), **plots}
    return [name for name, plot in plots.items() if is_drawn(plot)]


def plot_dropped(dropped: NDArray[np.bool_], path: Path) -> None:
    """Draw which sub-blocks go, (blocks, 2), as a map of blocks by kind; needs the extra `plot`."""
    blocks = len(dropped)
    figure = new_figure(max(4.0, 0.26 * blocks + 1.6), 1.9)
    axes = figure.add_subplot()
    style_axes(axes)
    axes.grid(False)
    for kind in range(2):
        for block in range(blocks):
            axes.add_patch(_cell(block, kind, DROPPED if dropped[block, kind] else KEPT))
    axes.set_xlim(-0.6, blocks - 0.4)
    axes.set_ylim(1.6, -0.6)
    axes.set_yticks([0, 1], ["attention", "MLP"])
    axes.set_xticks(range(0, blocks, max(1, blocks // 15)))
    axes.set_xlabel("block")
    counts = dropped.sum(axis=0)
    axes.set_title(
        f"dropped: {counts[0]} of {blocks} attention, {counts[1]} of {blocks} MLP sub-blocks", loc="left", fontsize=10
    )
    save_figure(figure, path)


def _cell(block: int, row: int, color: str) -> Any:
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch(
        (block - 0.36, row - 0.32),
        0.72,
        0.64,
        boxstyle="round,pad=0,rounding_size=0.1",
        facecolor=color,
        edgecolor=color,
    )


def plot_levels(genome: Genome, profile: NDArray[np.integer], path: Path) -> None:
    """Draw the level of every unit (n,) as a map of blocks by units, the darker the dearer; needs the extra `plot`."""
    kinds = unit_kinds(genome)
    rows = list(dict.fromkeys(kinds))
    first, blocks = int(genome.block_of.min()), int(genome.block_of.max()) + 1
    figure = new_figure(max(4.6, 0.3 * blocks + 2.2), 0.32 * len(rows) + 1.2)
    axes = figure.add_subplot()
    style_axes(axes)
    axes.grid(False)
    costs = genome.costs.bytes / genome.costs.dense[:, None]
    forms = genome.present & np.array([[label != DROP_LABEL for label in row] for row in genome.labels])
    least, most = costs[forms].min(), costs[forms].max()
    for unit, (level, word) in enumerate(zip(np.asarray(profile).tolist(), level_words(genome, profile), strict=True)):
        share = (costs[unit, level] - least) / max(most - least, 1e-9)
        x, y = int(genome.block_of[unit]), rows.index(kinds[unit])
        dropped = genome.labels[unit][level] == DROP_LABEL
        axes.add_patch(_cell(x, y, DROPPED if dropped else _shade(share)))
        axes.text(x, y, "–" if dropped else word, ha="center", va="center", fontsize=6)
    axes.set_xlim(first - 0.6, blocks - 0.4)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(0, blocks, max(1, blocks // 15)))
    axes.set_xlabel("block")
    axes.set_title(_PICTURE_WORDS[genome.kind], loc="left", fontsize=10)
    save_figure(figure, path)


def _shade(share: float) -> str:
    """Between KEPT and DEAREST."""
    ends = [[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in (KEPT, DEAREST)]
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(*ends, strict=True))


def unit_kinds(genome: Genome) -> list[str]:
    """What the layers of each unit are called in their block, (n,): "q_proj+k_proj", "attn.c_proj", "mlp.c_proj"."""
    return short_names(genome.names, genome.block_of.tolist())


def level_words(genome: Genome, profile: NDArray[np.integer]) -> list[str]:
    """What each unit's level is, (n,): a width as "3", zeros as "60" or, where kinds are mixed, "60%", or "drop"."""
    zeros = 1 - genome.costs.weights / genome.costs.dense[:, None]
    words = []
    for unit, (level, label) in enumerate(zip(np.asarray(profile).tolist(), genome.labels_of(profile), strict=True)):
        if genome.kind == "sparsity" or label.startswith("sparsity:"):
            sign = "%" if genome.kind == "mixed" else ""
            words.append(f"{100 * zeros[unit, level]:.0f}{sign}")
        else:
            words.append(label.rpartition(":")[2])
    return words


def levels_listing(genome: Genome, profile: NDArray[np.integer]) -> str:
    """The levels by what the units are called in their block, as a Markdown table: how many have which, or zeros."""
    kinds = np.array(unit_kinds(genome))
    names = dict.fromkeys(kinds.tolist())
    zeros = 1 - (genome.costs.weights / genome.costs.dense[:, None])[np.arange(genome.n), profile]
    if genome.kind == "sparsity":
        rows = [
            {"layers": name, **{what: f"{f(zeros[kinds == name]):.1%}" for what, f in _STATISTICS.items()}}
            for name in names
        ]
        return "Share of zeros.\n\n" + markdown_rows(rows)
    words = np.array([form_words(label) for label in genome.labels_of(profile)])
    ranked = dict.fromkeys(form_words(label) for label in Units.of_genome(genome, blocks=0).ranked)
    columns = sorted((word for word in ranked if word in words), key=lambda word: word == _SPARSE)
    rows = [
        {"layers": name, **{word: int(((kinds == name) & (words == word)).sum()) for word in columns}} for name in names
    ]
    sparse = zeros[words == _SPARSE]
    note = f" The sparse ones have {sparse.min():.1%} to {sparse.max():.1%} zeros." if len(sparse) else ""
    return f"How many have which form.{note}\n\n" + markdown_rows(rows)


def met_words(met: Mapping[str, Any]) -> str:
    """What a student weighs, in all measures."""
    return (
        f"{met['bits']:.3f} bits on average, {met['bpw']:.3f} stored bits per weight with scales, zero points and "
        f"masks, {met['sparsity']:.1%} zeros, a file of {size_words(met['bytes'])} ({met['size']:.3f}x the dense one "
        "in 16 bits)"
    )


def _report(
    prepared: Prepared,
    task: Task,
    result: Result,
    results: Mapping[str, Any],
    pictures: Sequence[str],
    folder: RunFolder,
) -> str:
    """report.md."""
    request = prepared.request
    versions = ", ".join(f"{name} {version}" for name, version in folder.request["versions"].items())
    spent = (
        f"The search ended after {results['generations']} generations ({results['stop']}): "
        f"{results['evaluations']:,} candidates, {results['total_fidelity']:,} tokens, {results['seconds']:.0f} s. "
        f"Its last loss is {format_loss(results['loss'])}, measured on {results['fidelity']:,} tokens."
    )
    heldout = results["heldout"]
    table = [
        f"## On held-out text\n\n{heldout['tokens']:,} tokens of {heldout['source']} that no search has seen. KL is to "
        "the dense model, in nats per token, with its standard error over sequences; tokens are those spent searching; "
        "bytes are those of the whole model file, with what is not compressed.",
        markdown_rows(shown_rows(results["rows"])),
    ]
    choice = [
        "## The final choice\n\nWhat the search found, and what it must not be worse than, on calibration text that "
        f"the search has not seen ({results['fidelity']:,} tokens). The first is the answer: what the search found, "
        "unless another lost less by more than two standard errors of the difference, or uniform or a baseline's "
        "profile by more than one.",
        markdown_rows([_shown_finalist(finalist) for finalist in results["choice"]]),
    ]
    alt = {"trace.png": "Loss over the tokens spent", "units.png": "The levels of the units"}
    parts = [
        f"# {task.title}",
        task.sentence(result.profile),
        spent,
        *(table if results["rows"] else ["The search was interrupted before the held-out table was made."]),
        *(choice if results["choice"] else []),
        *(f"![{alt[name]}]({name})" for name in pictures),
        task.listing(result.profile),
        "## What next",
        "```\n"
        + "\n".join(
            (
                shlex.join(["discopt", "llm", "export", str(folder.path), "--to", "hf", "--out", "MODEL"])
                + "  # a checkpoint",
                shlex.join(["discopt", "resume", str(folder.path)]) + "  # go on, if it was stopped",
                request.command_line(folder.path) + "  # the same again",
            )
        )
        + "\n```",
        f"Begun {folder.request['created']} with {versions}.",
    ]
    return "\n\n".join(parts) + "\n"


def _shown_finalist(finalist: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "profile": finalist["method"],
        "loss": finalist["loss"],
        "above the least": finalist["difference"],
        "± (paired)": finalist["standard_error"],
    }


def shown_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The table's rows under the headings that people read."""
    headings = {
        "method": "method",
        "kl": "KL",
        "kl_error": "± KL",
        "perplexity": "perplexity",
        "agreement": "top-1 agreement",
        "tokens": "search tokens",
        "bytes": "bytes",
    }
    return [{heading: row[key] for key, heading in headings.items() if key in row} for row in rows]


def dropped_listing(dropped: NDArray[np.bool_]) -> str:
    """Which sub-blocks go, (blocks, 2), as Markdown."""
    lines = []
    for kind, name in enumerate(("attention", "MLP")):
        blocks = ", ".join(str(block) for block in np.flatnonzero(dropped[:, kind])) or "none"
        lines.append(f"- {name} of blocks: {blocks}")
    return "\n".join(lines)
