"""`discopt llm`: compress a language model. Heavy imports wait until a command runs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from discopt.console import INTERRUPTED, checked, only_json_on_stdout, terminated_as_interrupted
from discopt.errors import DiscoptError

app = typer.Typer(name="llm", no_args_is_help=True, help="Compress a language model by search on its real loss.")

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model folder, a hub id, a .gguf file, or package:NAME (a GGUF file inside an installed package).",
        show_default=False,
    ),
]
SOURCES = "builtin, a .txt, .jsonl or .parquet file, wikitext2, c4, fineweb-edu, or hf:NAME[:CONFIG[:SPLIT[:COLUMN]]]"


def _panel(panel: str) -> Any:
    def option(*names: str, **settings: Any) -> Any:
        return typer.Option(*names, rich_help_panel=panel, **{"show_default": False, **settings})

    return option


_what, _search, _data, _run = (_panel(name) for name in ("What to drop", "The search", "Text", "The run"))

Device = Annotated[str, _run(help="Where to run: auto, cpu, cuda or cuda:N.", show_default=True)]
Dtype = Annotated[
    str, _run(help="auto (float32 on CPU, bfloat16 on CUDA), float32, bfloat16, float16.", show_default=True)
]
TrustRemoteCode = Annotated[
    bool, _run("--trust-remote-code", help="Let a model bring its own code and pickled weights.")
]
Force = Annotated[bool, _run("--force", help="Replace what is at --out.")]
Json = Annotated[bool, _run("--json", help="Print one JSON object, and nothing else.")]
Quiet = Annotated[bool, _run("--quiet", "-q", help="Show no progress.")]


@app.command()
def drop(
    model: Model,
    sparsity: Annotated[float, _what(help="Share of the blocks, or of each kind of sub-block, to drop: in [0, 1).")],
    out: Annotated[Path, _run(metavar="RUN", help="The run folder.")],
    unit: Annotated[
        str, _what(metavar="sublayer|block|pair", help="What is dropped at a time.", show_default=True)
    ] = "sublayer",
    protect: Annotated[str, _what(metavar="BLOCKS", help="Blocks never to drop, such as 0,1,28-29.")] = "",
    preset: Annotated[
        str,
        _search(
            metavar="paper|fast|demo",
            help="Settings: EvoPress' published ones, its super-fast ones, or ones for minutes on a CPU.",
            show_default=True,
        ),
    ] = "fast",
    generations: Annotated[int | None, _search(help="Generations to run.", min=0)] = None,
    offspring: Annotated[int | None, _search(help="Candidates in a generation.", min=1)] = None,
    stage: Annotated[
        list[str] | None,
        _search(metavar="SURVIVORS@TOKENS", help="A stage of selection; once for each, such as 2@2048."),
    ] = None,
    start: Annotated[
        str | None,
        _search(
            metavar="random|heuristics|RUN_OR_FILE",
            help="Start from the best of random profiles (preset paper), from that or a heuristic that beats it "
            "(fast, demo), or from a profile, JSON or the official text format.",
        ),
    ] = None,
    fitness: Annotated[
        str, _search(metavar="kl|kl-topk[:K]|ppl|tv", help="The loss to search on.", show_default=True)
    ] = "kl",
    max_seconds: Annotated[float | None, _search(help="Stop searching after this long.")] = None,
    calibration: Annotated[
        str, _data(metavar="SRC", help=f"Text to search on: {SOURCES}.", show_default=True)
    ] = "builtin",
    calibration_tokens: Annotated[int | None, _data(help="Tokens of it to use.", min=1)] = None,
    sequence_length: Annotated[int | None, _data(help="Tokens in a sequence.", min=2)] = None,
    eval_data: Annotated[
        str | None, _data(metavar="SRC", help="Held-out text; without it, the held-out side of --calibration.")
    ] = None,
    eval_tokens: Annotated[int | None, _data(help="Tokens of held-out text to measure on.", min=2)] = None,
    baselines: Annotated[
        str, _run(metavar="LIST", help="Rows to compare with, or none.", show_default=True)
    ] = "random,shortgpt,window,influence",
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    seed: Annotated[int, _run(help="Same seed, same run.", min=0, show_default=True)] = 0,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Drop attention and MLP sub-blocks, or whole blocks, chosen by evolutionary search on the real loss.

    Leaves a run folder with the profile, a table against baselines on held-out text, a report and pictures. What
    was interrupted or killed goes on with `discopt resume RUN`.

    Examples:

        discopt llm drop HuggingFaceTB/SmolLM2-135M --sparsity 0.25 --calibration fineweb-edu --out runs/smol

        discopt llm drop ./my-model --sparsity 0.2 --unit block --protect 0,1 --preset paper --out runs/blocks

        discopt llm drop model.gguf --sparsity 0.3 --stage 4@1024 --stage 1@8192 --generations 200 --out runs/g
    """
    _need_llm()
    with only_json_on_stdout(as_json), terminated_as_interrupted():
        from discopt_llm.search import DropRequest, begin_drop

        request = checked(
            lambda: DropRequest(
                model=model,
                sparsity=sparsity,
                unit=unit,  # type: ignore[arg-type]  # checked by the request
                protect=_blocks(protect),
                preset=preset,
                calibration=calibration,
                calibration_tokens=calibration_tokens,
                sequence_length=sequence_length,
                eval_data=eval_data,
                eval_tokens=eval_tokens,
                generations=generations,
                offspring=offspring,
                stages=tuple(stage or ()),
                start=start,
                fitness=fitness,
                baselines=tuple(name for name in baselines.split(",") if name not in ("", "none")),
                max_seconds=max_seconds,
                device=device,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                seed=seed,
            )
        )
        results = begin_drop(request, out, force=force, quiet=quiet, say=_say(quiet))
    _finish_run(results, as_json)


@app.command("eval")
def evaluate(
    model: Model,
    data: Annotated[
        str, _data(metavar="SRC", help=f"Text to measure on: {SOURCES}. What a search may have seen of it is left out.")
    ],
    profile: Annotated[
        str | None,
        _what(metavar="RUN_OR_FILE", help="A run folder, a profile.json, or a text file with a line for each block."),
    ] = None,
    tokens: Annotated[int | None, _data(help="Tokens of it to use.", min=2)] = None,
    sequence_length: Annotated[
        int | None, _data(help="Tokens in a sequence: 2048, or the model's positions.", min=2)
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a model, and its student under a profile: KL to the dense model, perplexity, top-1 agreement.

    Examples:

        discopt llm eval HuggingFaceTB/SmolLM2-135M --data wikitext2

        discopt llm eval ./my-model --profile runs/blocks --data notes.txt --tokens 8192 --json
    """
    _need_llm()
    with only_json_on_stdout(as_json), terminated_as_interrupted():
        from discopt_llm.students import EvalRequest, evaluate_student

        request = EvalRequest(model, data, profile, tokens, sequence_length, device, dtype, trust_remote_code)
        results = evaluate_student(request, quiet=quiet)
    _print_rows(results, as_json)


@app.command("apply")
def apply_run(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)],
    out: Annotated[Path, _run(metavar="DIR", help="Where to write the checkpoint.")],
    verify: Annotated[
        bool, _run("--verify/--no-verify", help="Load it back and compare logits.", show_default=True)
    ] = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write the student of a run as a Hugging Face checkpoint that plain `from_pretrained` loads.

    Whole blocks that went are left out; a sub-block that went alone stays with its output projection zeroed, since
    transformers has no models with half a block.

    Examples:

        discopt llm apply runs/blocks --out models/blocks

        discopt llm apply runs/smol --out models/smol --dtype bfloat16
    """
    _need_llm()
    with only_json_on_stdout(as_json), terminated_as_interrupted():
        from discopt_llm.students import apply_profile

        summary = apply_profile(run, out, dtype=dtype, device=device, force=force, verify=verify)
    typer.echo(json.dumps(summary.to_dict()) if as_json else summary.sentence)


def _need_llm() -> None:
    missing = [name for name in ("torch", "transformers", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        raise DiscoptError(f"discopt llm needs {', '.join(missing)}: pip install 'discopt-search[llm]'")


def _say(quiet: bool) -> Any:
    return lambda line: None if quiet else typer.echo(line, err=True)


def _blocks(text: str) -> tuple[int, ...]:
    """0,1,28-29 -> (0, 1, 28, 29)."""
    blocks: list[int] = []
    for part in filter(None, text.split(",")):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise typer.BadParameter(f"expected blocks such as 0,1,28-29, got {text!r}", param_hint="--protect")
        blocks += range(int(first), int(last or first) + 1)
    return tuple(blocks)


def _finish_run(results: dict[str, Any], as_json: bool) -> None:
    from discopt.optimizers import StopReason

    _print_rows(results, as_json)
    folder = results["folder"]
    if results["stop"] == StopReason.INTERRUPTED.value:
        typer.echo(f"interrupted; go on with: discopt resume {folder}", err=True)
        raise typer.Exit(INTERRUPTED)
    if not as_json:
        typer.echo(f"\nreport: {folder}/report.md\nwrite the model: discopt llm apply {folder} --out MODEL")


def _print_rows(results: dict[str, Any], as_json: bool) -> None:
    from discopt.report import format_rows
    from discopt_llm.report import shown_rows

    if as_json:
        typer.echo(json.dumps(results, ensure_ascii=False, allow_nan=False))
    else:
        typer.echo(format_rows(shown_rows(results["rows"])))
