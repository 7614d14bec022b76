"""The command line: `discopt solve`, `discopt resume`, `discopt compare`, and the commands that other packages add.

A package adds a command by an entry point of the group `discopt.commands`: the command's name = a typer app. So that
`discopt resume` can go on with its runs, it adds one of the group `discopt.resume`: what run.json calls the command
= a function `(folder: RunFolder, *, quiet: bool) -> dict`, which goes on and returns what results.json holds.

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
            )
        )
        results = begin(request, out, force=force, quiet=quiet, directory=Path.cwd())
    _finish(results, as_json)


@app.command()
def resume(
    run: RunPath,
    max_evaluations: MaxEvaluations = None,
    max_fidelity: MaxFidelity = None,
    max_seconds: MaxSeconds = None,
    target_loss: TargetLoss = None,
    stagnation: Stagnation = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Go on with a run that was interrupted, killed, or ended by a limit.

    It ends as the undisturbed run would have. A finished run prints its result again.

    A limit that ended a run of `discopt solve` is lifted, or replaced by the one given here.

    Examples:

        discopt resume runs/own

        discopt resume runs/own --max-seconds 600 --json
    """
    from discopt.folder import RunFolder

    limits = {
        "max_evaluations": max_evaluations,
        "max_fidelity": max_fidelity,
        "max_seconds": max_seconds,
        "target_loss": target_loss,
        "stagnation": stagnation,
    }
    changes = {name: value for name, value in limits.items() if value is not None}
    with only_json_on_stdout(as_json), terminated_as_interrupted():
        folder = RunFolder.open(run)
        command = folder.request["command"]
        if command == "solve":
            results = _resume_solve(folder, changes, quiet)
        elif changes:
            option = "--" + next(iter(changes)).replace("_", "-")
            raise typer.BadParameter(f"only for runs of `discopt solve`, got one of {command!r}", param_hint=option)
        else:
            results = _resumer(folder)(folder, quiet=quiet)
    _finish(results, as_json)


app.command("compare")(compare_command)


def _resume_solve(folder: RunFolder, changes: Mapping[str, Any], quiet: bool) -> dict[str, Any]:
    from discopt.solve import finished, go_on

    results = finished(folder, changes)
    if results is not None:
        typer.echo(f"{folder.path} is finished: {results['stop']}", err=True)
        return results
    return go_on(folder, changes, quiet=quiet, warn=lambda line: typer.echo(f"warning: {line}", err=True))


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
        raise ValueError(f"switches are weights such as 5,3,1, got {text!r}") from error


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
