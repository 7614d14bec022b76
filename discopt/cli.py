"""The command line: `discopt solve`, `discopt resume`, `discopt compare`, and the commands that other packages add.

A package adds a command by an entry point of the group `discopt.commands`: the command's name = a typer app. So that
`discopt resume` can go on with its runs, it adds one of the group `discopt.resume`: what run.json calls the command
= a function `(folder: RunFolder, *, quiet: bool, **means) -> dict`, which goes on and returns what results.json holds.
`means` has the options of `discopt resume` that say what to compute with, where they were given: workers,
worker_seconds, memory, host_memory.

Exit codes: 0 done, 1 a DiscoptError (one line on standard error), 2 a wrong option, 130 interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from discopt.cli_options import (
    Algorithm,
    Force,
    Generations,
    HostMemory,
    Json,
    MaxEvaluations,
    MaxFidelity,
    MaxSeconds,
    Memory,
    Offspring,
    Out,
    Parents,
    Quiet,
    Rule,
    RunPath,
    Seed,
    Spread,
    Stages,
    Stagnation,
    Start,
    StartCandidates,
    StartFidelity,
    Switches,
    Target,
    TargetLoss,
    WorkerSeconds,
)
from discopt.compare_cli import compare_command
from discopt.console import INTERRUPTED, checked, only_json_on_stdout, terminated_as_interrupted
from discopt.errors import DiscoptError

if TYPE_CHECKING:
    from discopt.folder import RunFolder

COMMANDS, RESUME = "discopt.commands", "discopt.resume"  # groups of entry points


class Commands(TyperGroup):
    """The commands here and those of other packages, which are imported only when they are needed."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DiscoptError as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from error

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *sorted(_entry_points(COMMANDS).keys() - self.commands.keys())]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.commands:
            found = _entry_points(COMMANDS).get(cmd_name)
            if found is not None:
                self.commands[cmd_name] = _load_command(cmd_name, found)
        return super().get_command(ctx, cmd_name)


app = typer.Typer(
    name="discopt",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The program `discopt`."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        from discopt.folder import DISTRIBUTION, distribution_version

        typer.echo(f"discopt {distribution_version(DISTRIBUTION)}")
        raise typer.Exit


@app.callback()
def discopt(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Minimise a noisy, expensive loss over discrete profiles under budgets.

    Examples:

        discopt solve own.py:knapsack --generations 50 --out runs/knapsack

        discopt resume runs/knapsack

        discopt solve --help
    """


@app.command()
def solve(
    target: Target,
    generations: Generations = 100,
    offspring: Offspring = 16,
    parents: Parents = 1,
    stage: Stages = None,
    start: Start = "auto",
    start_candidates: StartCandidates = 16,
    start_fidelity: StartFidelity = None,
    switches: Switches = "5,3,1",
    rule: Rule = "within",
    algorithm: Algorithm = None,
    seed: Seed = 0,
    max_evaluations: MaxEvaluations = None,
    max_fidelity: MaxFidelity = None,
    max_seconds: MaxSeconds = None,
    target_loss: TargetLoss = None,
    stagnation: Stagnation = None,
    workers: Spread = None,
    worker_seconds: WorkerSeconds = None,
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Minimise a problem of your own.

    Examples:

        discopt solve own.py:knapsack

        discopt solve own.py:knapsack --offspring 64 --stage 8@100 --stage 1@1000 --out runs/own

        discopt solve own.py:knapsack --max-seconds 60 --json > best.json

        discopt solve own.py:knapsack --workers 4 --worker-seconds 60
    """
    from discopt.solve import SolveRequest, begin, read_start

    with only_json_on_stdout(as_json), terminated_as_interrupted():
        named = start in ("auto", "uniform", "random")
        request = checked(
            lambda: SolveRequest(
                target=target,
                generations=generations,
                offspring=offspring,
                parents=parents,
                stages=tuple(stage or ()),
                start=start,
                start_profile=None if named else read_start(Path(start)),
                start_candidates=start_candidates,
                start_fidelity=start_fidelity,
                switches=_weights(switches),
                rule=rule,
                algorithm=algorithm,
                max_evaluations=max_evaluations,
                max_fidelity=max_fidelity,
                max_seconds=max_seconds,
                target_loss=target_loss,
                stagnation=stagnation,
                seed=seed,
                workers=workers,
                worker_seconds=worker_seconds,
            )
        )
        results = begin(request, out, force=force, quiet=quiet, directory=Path.cwd(), say=_say)
    _finish(results, as_json)


@app.command()
def resume(
    run: RunPath,
    max_evaluations: MaxEvaluations = None,
    max_fidelity: MaxFidelity = None,
    max_seconds: MaxSeconds = None,
    target_loss: TargetLoss = None,
    stagnation: Stagnation = None,
    workers: Spread = None,
    worker_seconds: WorkerSeconds = None,
    memory: Memory = None,
    host_memory: HostMemory = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Go on with a run that was interrupted, killed, or ended by a limit.

    It ends as the undisturbed run would have. A finished run prints its result again.

    A limit that ended a run of `discopt solve` is lifted, or replaced by the one given here. Workers and memory may be
    others than before.

    Examples:

        discopt resume runs/own

        discopt resume runs/own --max-seconds 600 --json
    """
    from discopt.folder import RunFolder
    from discopt.workers import WorkersAt

    limits = {
        "max_evaluations": max_evaluations,
        "max_fidelity": max_fidelity,
        "max_seconds": max_seconds,
        "target_loss": target_loss,
        "stagnation": stagnation,
    }
    means = {"workers": workers, "worker_seconds": worker_seconds, "memory": memory, "host_memory": host_memory}
    with only_json_on_stdout(as_json), terminated_as_interrupted():
        if workers is not None:
            checked(lambda: WorkersAt.parse(workers))
        folder = RunFolder.open(run)
        if folder.request["command"] == "solve":
            _only_for("discopt llm", "solve", {"memory": memory, "host_memory": host_memory})
            results = _resume_solve(folder, _given(limits), _given(means), quiet)
        else:
            _only_for("discopt solve", folder.request["command"], limits)
            results = _resumer(folder)(folder, quiet=quiet, **_given(means))
    _finish(results, as_json)


app.command("compare")(compare_command)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _only_for(whose: str, command: str, options: Mapping[str, Any]) -> None:
    """Refuse options that runs of this command do not have."""
    for name in _given(options):
        option = "--" + name.replace("_", "-")
        raise typer.BadParameter(f"only for runs of `{whose}`, got one of {command!r}", param_hint=option)


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _resume_solve(
    folder: RunFolder, limits: Mapping[str, Any], means: Mapping[str, Any], quiet: bool
) -> dict[str, Any]:
    from discopt.solve import finished, go_on

    results = finished(folder, limits)
    if results is not None:
        _say(f"{folder.path} is finished: {results['stop']}")
        return results
    return go_on(folder, {**limits, **means}, quiet=quiet, warn=lambda line: _say(f"warning: {line}"), say=_say)


def _resumer(folder: RunFolder) -> Callable[..., dict[str, Any]]:
    command = folder.request["command"]
    found = _entry_points(RESUME).get(command)
    if found is None:
        raise DiscoptError(f"{folder.path} is a run of {command!r}, which no installed package can go on with")
    try:
        function: Callable[..., dict[str, Any]] = found.load()
    except (ImportError, AttributeError) as error:
        raise DiscoptError(f"what goes on with a run of {command!r} cannot be loaded: {error}") from error
    return function


def _finish(results: Mapping[str, Any], as_json: bool) -> None:
    """Print what came out, and exit with what it means."""
    from discopt.optimizers import StopReason
    from discopt.report import align, format_rows, solve_lines

    if as_json:
        import json

        typer.echo(json.dumps(results, ensure_ascii=False, allow_nan=False))
    elif results.get("command") == "solve":
        for label, text in align(solve_lines(results)):
            typer.echo(f"{typer.style(label, bold=True)}  {text}")
    else:
        typer.echo(format_rows(results.get("rows", [])))
    if results.get("stop") == StopReason.INTERRUPTED.value:
        folder = results.get("folder")
        typer.echo("interrupted" + (f"; go on with: discopt resume {folder}" if folder else ""), err=True)
        raise typer.Exit(INTERRUPTED)
    if results.get("command") == "solve" and results["loss"] is None:
        found = f"all {results['evaluations']} losses were NaN or infinite" if results["fidelity"] else results["stop"]
        raise DiscoptError(f"no profile was found: {found}")


def _weights(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"switches are weights such as 5,3,1, got {text[:100]!r}") from error


@cache
def _entry_points(group: str) -> dict[str, metadata.EntryPoint]:
    return {entry.name: entry for entry in metadata.entry_points(group=group)}


def _load_command(name: str, entry: metadata.EntryPoint) -> Any:
    """The command of another package; where that is broken, one that says so."""
    try:
        return typer.main.get_command(entry.load())
    except Exception as error:
        broken = typer.Typer(add_completion=False)
        reason = f"cannot be loaded: {type(error).__name__}: {error}"

        @broken.command(name, help=reason, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
        def fail() -> None:
            raise DiscoptError(f"the command {name!r} {reason}")

        return typer.main.get_command(broken)
