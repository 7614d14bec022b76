"""The options of `discopt solve` and `discopt resume`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def _option(*names: str, panel: str, **settings: Any) -> Any:
    """An option in a panel of --help."""
    return typer.Option(*names, rich_help_panel=panel, **settings)


def _search(help: str, **settings: Any) -> Any:
    return _option(panel="The search", help=help, **settings)


def _stop(help: str, **settings: Any) -> Any:
    return _option(panel="When to stop early", help=help, show_default=False, **settings)


def _run(*names: str, help: str, **settings: Any) -> Any:
    return _option(*names, panel="The run", help=help, show_default=False, **settings)


Target = Annotated[
    str,
    typer.Argument(
        metavar="FILE.py:NAME",
        help="A discopt.problems.Problem, or a function without arguments that returns one; also module:NAME.",
    ),
]
Generations = Annotated[int, _search("Generations to run.", metavar="N", min=0)]
Offspring = Annotated[int, _search("Candidates in a generation.", metavar="N", min=1)]
Parents = Annotated[int, _search("Profiles that live on.", metavar="N", min=1)]
Stages = Annotated[
    list[str] | None,
    _search(
        "A stage of selection; once for each. Without any: one stage at fidelity 1.",
        metavar="SURVIVORS@FIDELITY",
        show_default=False,
    ),
]
Start = Annotated[
    str,
    _search(
        "Start from the same level everywhere, from the best of random profiles, from the one of the two that spends "
        "the budget, or from a profile.json.",
        metavar="auto|uniform|random|FILE.json",
    ),
]
StartCandidates = Annotated[int, _search("Random profiles to choose the start from.", metavar="N", min=1)]
StartFidelity = Annotated[
    int | None,
    _search("Fidelity to choose it at. Without it: the first stage's.", metavar="N", min=1, show_default=False),
]
Switches = Annotated[str, _search("Weights of 1, 2, ... level switches in a mutation.", metavar="W1,W2,...")]
Rule = Annotated[
    str,
    _search(
        "Switch levels within groups of equal cost, or across; or exchange budget between units and spend all of it.",
        metavar="within|across|exchange",
    ),
]
Algorithm = Annotated[
    str | None,
    _search(
        "learning, evopress-1, additive, annealing, exhaustive, genetic, hill-climbing or random, which measure as "
        "many profiles as the generations have offspring; or evopress, which hears all options of this panel. Without "
        "it: evopress where an option is given that it alone hears, else learning.",
        metavar="NAME",
        show_default=False,
    ),
]
Seed = Annotated[int, _search("Same seed, same run.", metavar="N", min=0)]

MaxEvaluations = Annotated[int | None, _stop("Profiles measured.", metavar="N", min=1)]
MaxFidelity = Annotated[int | None, _stop("Total fidelity spent.", metavar="N", min=1)]
MaxSeconds = Annotated[float | None, _stop("Wall time, all parts of a resumed run together.", metavar="SECONDS")]
TargetLoss = Annotated[float | None, _stop("A loss that is good enough.", metavar="LOSS")]
Stagnation = Annotated[int | None, _stop("Generations without a better profile.", metavar="N", min=1)]

RunPath = Annotated[
    Path, typer.Argument(metavar="RUN", help="The folder of a run that was stopped or killed.", show_default=False)
]
Out = Annotated[
    Path | None,
    _run(metavar="RUN", help="Keep the run in this folder, so that it can be resumed. Without it: nothing is kept."),
]
Force = Annotated[bool, _run("--force", help="Replace the run in that folder.")]
Json = Annotated[bool, _run("--json", help="Print one JSON object, and nothing else.")]
Quiet = Annotated[bool, _run("--quiet", "-q", help="Show no progress.")]

Spread = Annotated[
    str | None,
    _run(
        "--workers",
        metavar="N|ray://HOST:PORT",
        help="Measure in N processes of this machine, or on a Ray cluster (extra ray); the result is the same.",
    ),
]
WorkerSeconds = Annotated[
    float | None,
    _run(metavar="SECONDS", help="A worker that takes longer for its part of a measurement is given up."),
]
Memory = Annotated[
    str | None,
    _run("--memory", metavar="SIZE", help="Of the device, at most, such as 16GiB; for runs of `discopt llm`."),
]
HostMemory = Annotated[
    str | None, _run("--host-memory", metavar="SIZE", help="Of the machine, at most; for runs of `discopt llm`.")
]
