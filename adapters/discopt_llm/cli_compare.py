"""`discopt llm compare`. Heavy imports wait until it runs."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from discopt.console import checked, only_json_on_stdout, terminated_as_interrupted
from discopt_llm import cli_options as o
from discopt_llm.cli_run import (
    interrupted,
    need_llm,
    parse_blocks,
    parse_names,
    parse_widths,
    request_options,
    say_unless,
)


def compare(
    ctx: typer.Context,
    model: o.Model,
    *,
    task: Annotated[str, o.budget(metavar="drop|sparsity|quantization", help="What is done to the model.")],
    target: Annotated[
        str,
        o.budget(metavar="T", help="Share of the blocks to drop, share of zeros, or average width in bits."),
    ],
    methods: Annotated[
        str,
        o.search(
            metavar="all|NAME,...",
            help="uniform, random, additive, measured, owl, shortgpt, window, perplexity, norm-ratio, influence, "
            "greedy, evopress, learning, dense: those that the task has.",
            show_default=True,
        ),
    ] = "all",
    seeds: Annotated[
        int, o.search(help="Runs of each method that chance or the text has a part in.", min=1, show_default=True)
    ] = 3,
    unit: Annotated[
        str, o.levels(metavar="sublayer|block|pair", help="What is dropped at a time.", show_default=True)
    ] = "sublayer",
    protect: Annotated[str, o.levels(metavar="BLOCKS", help="Blocks never to drop, such as 0,1,28-29.")] = "",
    banks: o.Banks = None,
    bank_method: Annotated[
        str | None,
        o.levels(metavar="METHOD", help="How a bank is built: gptq or rtn; sparsegpt, wanda or magnitude."),
    ] = None,
    group: o.Group = "size",
    widths: o.Widths = "2,3,4,5,6",
    group_size: o.GroupSize = 128,
    symmetric: o.Symmetric = False,
    levels: o.LevelCount = 17,
    step: o.Step = None,
    bank_tokens: o.BankTokens = None,
    preset: o.Preset = "fast",
    generations: Annotated[
        int | None, o.search(help="Generations of the searches; without it, the preset's, at least 40.", min=0)
    ] = None,
    offspring: o.Offspring = None,
    stages: o.Stages = None,
    fitness: o.Fitness = "kl",
    calibration: o.CalibrationSource = "builtin",
    calibration_tokens: o.CalibrationTokens = None,
    sequence_length: o.SequenceLength = None,
    eval_data: o.EvalData = None,
    eval_tokens: o.EvalTokens = None,
    out: o.Out,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    workers: o.Workers = None,
    worker_seconds: o.WorkerSeconds = None,
    memory: o.Memory = None,
    host_memory: o.HostMemory = None,
    force: o.Force = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Compare the methods: uniform, heuristics, greedy, the paper's search and ours, on one model and budget.

    All have the same levels, teacher and held-out text; the report has what each is worth, and the tokens and the
    time that it took. What was stopped goes on with the same command, which may ask for more methods or seeds.

    Examples:

        discopt llm compare HuggingFaceTB/SmolLM2-135M --task quantization --target 3 --out runs/compare

        discopt llm compare ./my-model --task drop --target 0.2 --unit block --preset demo --out runs/depth

        discopt llm compare ./my-model --task sparsity --target 60% --methods uniform,owl,learning --out runs/three

        discopt llm compare ./my-model --task quantization --target 3 --workers 2 --out runs/compare
    """
    need_llm()
    with only_json_on_stdout(as_json), terminated_as_interrupted():
        from discopt.report import format_rows
        from discopt_llm.compare import CompareRequest
        from discopt_llm.compare import compare as run
        from discopt_llm.compare_report import shown_summary

        changes = {
            "methods": None if methods.strip() == "all" else parse_names(methods),
            "protect": parse_blocks(protect),
            "widths": parse_widths(widths, "--widths"),
        }
        request = checked(lambda: CompareRequest(**request_options(CompareRequest, ctx, **changes)))
        try:
            results = run(request, out, force=force, quiet=quiet, say=say_unless(quiet))
        except KeyboardInterrupt:
            interrupted("the same command, without --force" if force else "the same command")
    if as_json:
        typer.echo(json.dumps(results, ensure_ascii=False, allow_nan=False))
    else:
        typer.echo(f"{format_rows(shown_summary(results['summary']))}\n\nreport: {out}/report.md")
