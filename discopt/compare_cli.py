"""The command `discopt compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from discopt.console import INTERRUPTED, checked, only_json_on_stdout, terminated_as_interrupted


def _what(*names: str, help: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel="What is compared", help=help, **settings)


def _run(*names: str, help: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel="The run", help=help, show_default=False, **settings)


def compare_command(
    out: Annotated[
        Path, _run("--out", metavar="DIR", help="Keep the runs and the report here; the same again goes on.")
    ],
    problems: Annotated[
        str, _what(metavar="A,B,...", help="Names or patterns of discopt's problems, or FILE.py:NAME, a Problem.")
    ] = "*",
    algorithms: Annotated[
        str,
        _what(
            metavar="A,B,...",
            help="Names or patterns of discopt's algorithms, or FILE.py:NAME, a dict of functions "
            "(space, plan, seed) that make an optimizer.",
        ),
    ] = "*",
    seeds: Annotated[int, _what(metavar="N", min=1, help="Runs of each algorithm on each problem.")] = 10,
    budget: Annotated[
        str, _what(metavar="N1,N2,...", help="Full measurements after which losses are compared.")
    ] = "300,1000,3000,10000",
    default: Annotated[
        str | None,
        _what(
            metavar="NAME",
            show_default=False,
            help="The algorithm that the others are tested against. Without it: learning, or else evopress.",
        ),
    ] = None,
    tolerance: Annotated[
        float, _what(metavar="GAP", help="Gap at which a run has succeeded: 0 the reference, 1 a random profile.")
    ] = 0.01,
    max_seconds_per_run: Annotated[
        float, _what(metavar="SECONDS", help="A run that takes longer is stopped, and marked so.")
    ] = 600.0,
    again: Annotated[
        str, _run(metavar="A,B,...", help="Forget the runs of these algorithms, names or patterns, and do them anew.")
    ] = "",
    workers: Annotated[int | None, _run(metavar="N", min=1, help="Processes. Without it: one for each core.")] = None,
    force: Annotated[bool, _run("--force", help="Replace another comparison in that folder.")] = False,
    as_json: Annotated[bool, _run("--json", help="Print one JSON object, and nothing else.")] = False,
    quiet: Annotated[bool, _run("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Compare algorithms on problems with known optima, with equal means.

    A comparison that was stopped goes on with the same command, which may ask for other algorithms or seeds.

    Examples:

        discopt compare --out runs/compare

        discopt compare --problems 'nk-*,own.py:knapsack' --algorithms random,evopress --seeds 3 --out runs/own

        discopt compare --algorithms '*,peers.py:PEERS' --budget 300,1000 --out runs/peers
    """
    with only_json_on_stdout(as_json), terminated_as_interrupted():
        from discopt.compare import CompareRequest, compare

        request = checked(
            lambda: CompareRequest(
                problems=_names(problems),
                algorithms=_names(algorithms),
                seeds=seeds,
                budget=_numbers(budget),
                default=default,
                tolerance=tolerance,
                max_seconds_per_run=max_seconds_per_run,
            )
        )
        try:
            results = compare(request, out, again=_names(again), workers=workers, force=force, quiet=quiet)
        except KeyboardInterrupt as error:
            typer.echo(f"interrupted; go on with: {request.command_line(out)}", err=True)
            raise typer.Exit(INTERRUPTED) from error
    _print(results, as_json)


def _print(results: dict[str, Any], as_json: bool) -> None:
    if as_json:
        import json

        from discopt.encoding import plain

        typer.echo(json.dumps(plain(results, exact=False), ensure_ascii=False, allow_nan=False))
        return
    from discopt.compare_report import exceptions_line, overall_rows
    from discopt.report import format_rows

    for number in results["budgets"]:
        typer.echo(typer.style(f"budget {number:,}", bold=True))
        typer.echo(format_rows(overall_rows(results, number)) + "\n")
    typer.echo(exceptions_line(results))
    typer.echo(f"report: {results['folder']}/report.md")


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str) -> tuple[int, ...]:
    parts = _names(text)
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"budgets are numbers such as 300,1000, got {text!r}")
    return tuple(int(part) for part in parts)
