"""What the commands of `discopt llm` do around their one call: options into a request, progress, printing, exits."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from discopt.console import INTERRUPTED, checked, only_json_on_stdout, terminated_as_interrupted
from discopt.errors import DiscoptError

if TYPE_CHECKING:
    from discopt_llm.request import SearchRequest


def need_llm() -> None:
    """Raise DiscoptError, saying what to install, if the extra `llm` is not there."""
    missing = [name for name in ("torch", "transformers", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        raise DiscoptError(f"discopt llm needs {', '.join(missing)}: pip install 'discopt-search[llm]'")


def run_search(ctx: typer.Context, kind: type[SearchRequest], **changes: Any) -> None:
    """Run the search that the options of a command ask for, or one for each of several budgets; print its table."""
    p = ctx.params
    with only_json_on_stdout(p["as_json"]), terminated_as_interrupted():
        from discopt_llm.budget import MEASURES
        from discopt_llm.ladder import LadderRequest, ladder
        from discopt_llm.search import begin

        options = request_options(kind, ctx, **changes)
        several = next((measure for measure in MEASURES if "," in str(options.get(measure))), None)
        request: Any
        run: Callable[..., dict[str, Any]]
        if several is None:
            request, run = checked(lambda: kind(**options)), begin
        else:
            request, run = checked(lambda: LadderRequest.of(kind, several, options)), ladder
        try:
            results = run(request, p["out"], force=p["force"], quiet=p["quiet"], say=say_unless(p["quiet"]))
        except KeyboardInterrupt:  # before or after the search itself, which ends in results of its own
            if (p["out"] / "run.json").is_file():
                interrupted(f"discopt resume {p['out']}")
            raise
    _finish_run(results, p["as_json"])


def request_options(kind: type[Any], ctx: typer.Context, **changes: Any) -> dict[str, Any]:
    """The options of a command that are fields of a request; `changes` are those that are written otherwise there."""
    names = {field.name for field in fields(kind)}
    given = {name: value for name, value in ctx.params.items() if name in names}
    lists: dict[str, Any] = {name: tuple(given[name] or ()) for name in ("stages", "banks") if name in given}
    if given.get("baselines") is not None:
        lists["baselines"] = tuple(name for name in parse_names(given["baselines"]) if name != "none")
    return {**given, **lists, **changes}


MOST_DIGITS = 5  # of a block's number


def parse_names(text: str) -> tuple[str, ...]:
    """a,b -> ("a", "b")."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_widths(text: str, option: str) -> tuple[int, ...]:
    """2,3,4 -> (2, 3, 4)."""
    if not all(part.isdecimal() for part in parse_names(text)) or not parse_names(text):
        raise typer.BadParameter(f"expected bit widths such as 2,3,4, got {text!r}", param_hint=option)
    return tuple(sorted({int(part) for part in parse_names(text)}))


def say_unless(quiet: bool) -> Callable[[str], None]:
    """Lines for people, on stderr."""
    return lambda line: None if quiet else typer.echo(line, err=True)


def parse_blocks(text: str) -> tuple[int, ...]:
    """0,1,28-29 -> (0, 1, 28, 29)."""
    blocks: list[int] = []
    for part in filter(None, text.split(",")):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or max(len(first), len(last)) > MOST_DIGITS:
            raise typer.BadParameter(f"expected blocks such as 0,1,28-29, got {text!r}", param_hint="--protect")
        blocks += range(int(first), int(last or first) + 1)
    return tuple(blocks)


def _finish_run(results: dict[str, Any], as_json: bool) -> None:
    """Print the table of a run or a ladder, or all of the results as JSON, and what to do next."""
    from discopt.optimizers import StopReason
    from discopt.report import format_rows
    from discopt_llm.ladder_report import shown_ladder
    from discopt_llm.report import shown_rows

    folder, points = results["folder"], results.get("points")
    if as_json:
        typer.echo(json.dumps(results, ensure_ascii=False, allow_nan=False))
    else:
        typer.echo(format_rows((shown_rows if points is None else shown_ladder)(results["rows"])))
    if results["stop"] == StopReason.INTERRUPTED.value:
        interrupted(f"discopt resume {folder}")
    if not as_json:
        run = folder if points is None else f"{folder}/{points[-1]['folder']}"
        report = f"{folder}/report.{'html' if points is None else 'md'}"
        typer.echo(f"\nreport: {report}\nwrite the model: discopt llm export {run} --to hf --out MODEL")


def interrupted(command: str) -> NoReturn:
    """Say how to go on, and end as after Ctrl-C."""
    typer.echo(f"interrupted; go on with: {command}", err=True)
    raise typer.Exit(INTERRUPTED)
