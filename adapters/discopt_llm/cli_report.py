"""`discopt llm report`. Heavy imports wait until it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from discopt_llm import cli_options as o


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="The folders of runs that have results.", show_default=False)
    ],
    *,
    out: Annotated[
        Path | None,
        o.run(
            metavar="FILE.html",
            help="Where to write the page; without it, report.html in the run's folder, or, of several runs, here.",
        ),
    ] = None,
    force: Annotated[bool, o.run("--force", help="Replace a file at --out that is not a report.")] = False,
    as_json: o.Json = False,
) -> None:
    """Write the report of a run anew, or compare several runs: a table, and a Pareto picture of size against loss.

    A page is one file that opens anywhere, without a network. Neither the model nor the bank is read.

    Examples:

        discopt llm report runs/three

        discopt llm report runs/two runs/three runs/four --out sizes.html
    """
    from discopt.report import format_rows
    from discopt_llm.report_several import write_reports

    written, comparison = write_reports(runs, out, force=force)
    if as_json:
        document = {"report": str(written), **(comparison.to_dict() if comparison else {})}
        typer.echo(json.dumps(document, ensure_ascii=False, allow_nan=False))
        return
    if comparison is not None:
        typer.echo(format_rows(comparison.table()) + "\n")
        for warning in comparison.warnings():
            typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"report: {written}")
