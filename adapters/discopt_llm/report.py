"""What a depth-pruning run leaves: results.json, profile.json, the official text file, report.md and pictures."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from discopt.errors import DiscoptError, RunFolderError
from discopt.folder import RunFolder
from discopt.plots import new_figure, plot_trace, save_figure, style_axes
from discopt.progress import format_loss
from discopt.report import markdown_rows
from discopt.run import Result
from discopt_llm.profile import Profile, write_decisions

if TYPE_CHECKING:
    from discopt_llm.search import Prepared

FITNESS_WORDS = {
    "kl": "KL to the dense model, nats per token",
    "ppl": "negative log-likelihood, nats per token",
    "tv": "total variation to the dense model",
}
KEPT, DROPPED = "#cbd5e1", "#b91c1c"
_log = logging.getLogger(__name__)


def write_run(
    prepared: Prepared, result: Result, rows: Sequence[Mapping[str, Any]], folder: RunFolder
) -> dict[str, Any]:
    """Write the answer's files, results.json last, since it says that the others are there; returns its content."""
    levels, loaded = prepared.levels, prepared.loaded
    dropped = levels.dropped(result.profile)
    profile = Profile("drop", levels.unit, loaded.source, loaded.fingerprint, levels.names, result.profile)
    profile.write(folder.path / "profile.json")
    write_decisions(folder.path / "profile.txt", dropped)
    results = {
        "format": "discopt-results",
        "version": 1,
        "command": folder.request["command"],
        "rows": list(rows),
        **result.to_dict(),
        "asked": {"sparsity": prepared.request.sparsity},
        "met": _met(prepared, dropped),
        "heldout": {"source": prepared.heldout.source, "tokens": prepared.heldout.tokens},
        "seed": prepared.request.seed,
        "folder": str(folder.path),
    }
    pictures = _draw(prepared, result, dropped, folder)
    folder.write_text("report.md", _report(prepared, results, dropped, pictures, folder))
    folder.write_json("results.json", results)
    return results


def _met(prepared: Prepared, dropped: NDArray[np.bool_]) -> dict[str, Any]:
    """What the profile really drops."""
    attention, mlp = (int(count) for count in dropped.sum(axis=0))
    return {"attention_dropped": attention, "mlp_dropped": mlp, "blocks": len(dropped)}


def _draw(prepared: Prepared, result: Result, dropped: NDArray[np.bool_], folder: RunFolder) -> list[str]:
    """The pictures that could be drawn: none without matplotlib."""
    drawn = []
    fitness = prepared.request.fitness.partition(":")[0]
    try:
        if any(line["best"] is not None for line in result.trace):
            loss = FITNESS_WORDS.get(fitness, "KL over the dense model's top tokens, nats per token")
            plot_trace(result.trace, folder.path / "trace.png", unit="tokens", loss=loss)
            drawn.append("trace.png")
        plot_dropped(dropped, folder.path / "units.png")
        drawn.append("units.png")
    except RunFolderError:
        raise
    except DiscoptError as error:
        _log.info("no pictures: %s", error)
    return drawn


def plot_dropped(dropped: NDArray[np.bool_], path: Path) -> None:
    """Draw which sub-blocks go, (blocks, 2), as a map of blocks by kind; needs the extra `plot`."""
    blocks = len(dropped)
    figure = new_figure(max(4.0, 0.26 * blocks + 1.6), 1.9)
    axes = figure.add_subplot()
    style_axes(axes)
    axes.grid(False)
    for kind in range(2):
        for block in range(blocks):
            gone = dropped[block, kind]
            axes.add_patch(_cell(block, kind, gone))
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


def _cell(block: int, kind: int, gone: bool) -> Any:
    from matplotlib.patches import FancyBboxPatch

    color = DROPPED if gone else KEPT
    return FancyBboxPatch(
        (block - 0.36, kind - 0.32),
        0.72,
        0.64,
        boxstyle="round,pad=0,rounding_size=0.1",
        facecolor=color,
        edgecolor=color,
    )


def _report(
    prepared: Prepared,
    results: Mapping[str, Any],
    dropped: NDArray[np.bool_],
    pictures: Sequence[str],
    folder: RunFolder,
) -> str:
    """report.md."""
    request, met = prepared.request, results["met"]
    versions = ", ".join(f"{name} {version}" for name, version in folder.request["versions"].items())
    asked = (
        f"Asked: drop {request.sparsity:.1%} of the attention and of the MLP sub-blocks of `{request.model}`, in units "
        f"of a {request.unit}. Met: {met['attention_dropped']} attention and {met['mlp_dropped']} MLP sub-blocks of "
        f"{met['blocks']} each."
    )
    spent = (
        f"The search ended after {results['generations']} generations ({results['stop']}): "
        f"{results['evaluations']:,} candidates, {results['total_fidelity']:,} tokens, {results['seconds']:.0f} s. "
        f"Its last loss is {format_loss(results['loss'])}, measured on {results['fidelity']:,} tokens."
    )
    heldout = results["heldout"]
    table = [
        f"## On held-out text\n\n{heldout['tokens']:,} tokens of {heldout['source']} that no search has seen. KL is to "
        "the dense model, in nats per token, with its standard error over sequences; tokens are those spent searching; "
        "bytes are those of the parameters that stay.",
        markdown_rows(shown_rows(results["rows"])),
    ]
    alt = {"trace.png": "Loss over the tokens spent", "units.png": "Which sub-blocks went"}
    parts = [
        f"# Depth pruning of {request.model}",
        asked,
        spent,
        *(table if results["rows"] else ["The search was interrupted before the held-out table was made."]),
        *(f"![{alt[name]}]({name})" for name in pictures),
        "## What is dropped",
        _dropped_words(dropped),
        "## What next",
        "```\n"
        + "\n".join(
            (
                shlex.join(["discopt", "llm", "apply", str(folder.path), "--out", "MODEL"]) + "  # a checkpoint",
                shlex.join(["discopt", "resume", str(folder.path)]) + "  # go on, if it was stopped",
                request.command_line(folder.path) + "  # the same again",
            )
        )
        + "\n```",
        f"Begun {folder.request['created']} with {versions}.",
    ]
    return "\n\n".join(parts) + "\n"


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


def _dropped_words(dropped: NDArray[np.bool_]) -> str:
    lines = []
    for kind, name in enumerate(("attention", "MLP")):
        blocks = ", ".join(str(block) for block in np.flatnonzero(dropped[:, kind])) or "none"
        lines.append(f"- {name} of blocks: {blocks}")
    return "\n".join(lines)
