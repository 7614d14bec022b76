"""`discopt llm`: compress a language model. Heavy imports wait until a command runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from discopt.console import checked, only_json_on_stdout, terminated_as_interrupted
from discopt_llm import cli_options as o
from discopt_llm.cli_compare import compare
from discopt_llm.cli_export import export
from discopt_llm.cli_report import report
from discopt_llm.cli_run import (
    interrupted,
    need_llm,
    parse_blocks,
    parse_names,
    parse_widths,
    request_options,
    run_search,
    say_unless,
)

app = typer.Typer(name="llm", no_args_is_help=True, help="Compress a language model by search on its real loss.")


@app.command()
@o.with_search_options
def drop(
    ctx: typer.Context,
    model: o.Model,
    *,
    sparsity: Annotated[
        str, o.budget(metavar="SHARE", help="Share of the blocks, or of each kind of sub-block, to drop: in [0, 1).")
    ],
    unit: Annotated[
        str, o.levels(metavar="sublayer|block|pair", help="What is dropped at a time.", show_default=True)
    ] = "sublayer",
    protect: Annotated[str, o.levels(metavar="BLOCKS", help="Blocks never to drop, such as 0,1,28-29.")] = "",
    **_: Any,
) -> None:
    """Drop attention and MLP sub-blocks, or whole blocks, chosen by evolutionary search on the real loss.

    Leaves a run folder with the profile, a table against baselines on held-out text, a report and pictures. What
    was interrupted or killed goes on with `discopt resume RUN`. Several shares, with commas between them, make a
    ladder: a run for each, which begins with what the one before it found.

    Examples:

        discopt llm drop HuggingFaceTB/SmolLM2-135M --sparsity 0.25 --calibration fineweb-edu --out runs/smol

        discopt llm drop ./my-model --sparsity 0.2 --unit block --protect 0,1 --preset paper --out runs/blocks

        discopt llm drop model.gguf --sparsity 0.3 --stage 4@1024 --stage 1@8192 --generations 200 --out runs/g

        discopt llm drop ./my-model --sparsity 0.1,0.2,0.3 --out runs/ladder

        discopt llm drop ./my-model --sparsity 0.2 --workers 'ray://head:10001?workers=8' --out runs/cluster
    """
    need_llm()
    from discopt_llm.drop_search import DropRequest, share_of

    share = sparsity if "," in sparsity else checked(lambda: share_of(sparsity))
    run_search(ctx, DropRequest, protect=parse_blocks(protect), sparsity=share)


@app.command()
def bank(
    ctx: typer.Context,
    model: o.Model,
    *,
    kind: Annotated[
        str,
        o.levels(
            metavar="quantization|sparsity|gguf",
            help="What the levels are; gguf: the types of ggml in which llama.cpp stores weights.",
            show_default=True,
        ),
    ] = "quantization",
    method: Annotated[
        str | None,
        o.levels(
            metavar="METHOD", help="gptq or rtn (round to nearest); sparsegpt, wanda or magnitude. First: the default."
        ),
    ] = None,
    bits: Annotated[str, o.levels(metavar="BITS", help="Bit widths of the levels.", show_default=True)] = "2,3,4,5,6",
    group_size: o.GroupSize = 128,
    symmetric: o.Symmetric = False,
    act_order: Annotated[
        bool, o.levels("--act-order", help="Quantize the inputs that vary most first; scales are set beforehand.")
    ] = False,
    scales: Annotated[
        str,
        o.levels(
            metavar="minmax|mse", help="Scales from the range, or from the least rounding error.", show_default=True
        ),
    ] = "minmax",
    target: Annotated[
        float, o.levels(metavar="SHARE", help="Zeros of the sparsity level in the middle.", show_default=True)
    ] = 0.5,
    levels: o.LevelCount = 17,
    step: o.Step = None,
    damping: Annotated[
        float, o.levels(help="Added to the Hessian's diagonal, relative to its mean.", show_default=True)
    ] = 0.01,
    types: o.Types = None,
    imatrix: o.Imatrix = None,
    propagate: Annotated[
        str | None,
        o.levels(
            metavar="dense|LEVEL",
            help="What makes the next block's inputs; without it, 3 bits for quantization (if that is a level), dense "
            "for the others.",
        ),
    ] = None,
    calibration: o.CalibrationSource = "builtin",
    calibration_tokens: o.CalibrationTokens = None,
    sequence_length: o.SequenceLength = None,
    out: Annotated[Path, o.run(metavar="BANK", help="The folder of the bank.")],
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
    """Build a bank: every layer of a model at every bit width, at every sparsity, or in every type of ggml.

    Of kind gguf, embedding and head have levels too, and a layer has those types that its rows are whole blocks of:
    32 weights, or 256 for K-types and most IQ types.

    All searches at whatever budget take their levels from it. A build that was interrupted or killed goes on after
    its last finished block when the same command is given again. Workers share the blocks of a bank where the dense
    model makes their inputs (--propagate dense), to the same bytes.

    Examples:

        discopt llm bank HuggingFaceTB/SmolLM2-135M --bits 2,3,4,5,6 --group-size 64 --out banks/smol

        discopt llm bank ./my-model --kind sparsity --target 0.6 --calibration fineweb-edu --out banks/sparse

        discopt llm bank model.gguf --method rtn --bits 2,3,4,8 --symmetric --out banks/rtn

        discopt llm bank ./my-model --kind gguf --types Q4_0,Q4_1,Q5_0,Q5_1,Q8_0 --no-imatrix --out banks/types

        discopt llm bank ./my-model --kind sparsity --workers 4 --out banks/sparse
    """
    need_llm()
    with only_json_on_stdout(as_json), terminated_as_interrupted():
        from discopt_llm.banks import BankRequest, bank_summary, make_bank

        changes = {"bits": parse_widths(bits, "--bits"), "types": parse_names(types or "")}
        request = checked(lambda: BankRequest(**request_options(BankRequest, ctx, **changes)))
        try:
            built = make_bank(request, out, force=force, quiet=quiet, say=say_unless(quiet))
        except KeyboardInterrupt:
            interrupted("the same command, without --force" if force else "the same command")
    summary = bank_summary(built)
    typer.echo(json.dumps(summary.to_dict()) if as_json else summary.sentence)


@app.command()
@o.with_search_options
def quantize(
    ctx: typer.Context,
    model: o.Model,
    *,
    bits: o.Bits = None,
    bpw: o.Bpw = None,
    size: o.Size = None,
    banks: o.Banks = None,
    group: o.QuantizeGroup = None,
    method: Annotated[
        str,
        o.levels(
            metavar="gptq|rtn|gguf",
            help="How a bank is built; gguf: of types of ggml, of embedding and head as well. Say so of a --bank too.",
            show_default=True,
        ),
    ] = "gptq",
    widths: o.Widths = "2,3,4,5,6",
    group_size: o.GroupSize = 128,
    symmetric: o.Symmetric = False,
    types: o.Types = None,
    imatrix: o.Imatrix = None,
    bank_tokens: o.BankTokens = None,
    **_: Any,
) -> None:
    """Choose a bit width, or a type of ggml, for every layer by evolutionary search on the real loss, within a budget.

    The bank of quantized layers is built first, if none is given, and kept in `banks` beside the run for the next
    budget. Several budgets, with commas between them, make a ladder: a run for each, which begins with what the one
    below it found, and the Pareto table of all. What was interrupted or killed goes on with `discopt resume RUN`.

    Examples:

        discopt llm quantize HuggingFaceTB/SmolLM2-135M --bits 3 --calibration fineweb-edu --out runs/three

        discopt llm quantize ./my-model --bits 2.5,3,3.5,4 --out runs/ladder

        discopt llm quantize ./my-model --size 0.3x --group runtime --bank banks/smol --out runs/small

        discopt llm quantize model.gguf --bpw 2.75 --preset demo --group-size 64 --out runs/demo

        discopt llm quantize ./my-model --method gguf --size 100MB --out runs/types

        discopt llm quantize ./my-model --bits 3 --workers 2 --memory 16GiB --out runs/two-gpus
    """
    need_llm()
    from discopt_llm.bank_search import QuantizeRequest

    run_search(ctx, QuantizeRequest, widths=parse_widths(widths, "--widths"), types=parse_names(types or ""))


@app.command()
@o.with_search_options
def sparsify(
    ctx: typer.Context,
    model: o.Model,
    *,
    sparsity: Annotated[
        str | None, o.budget(metavar="SHARE", help="Share of the weights that become zero: 0.6 or 60%.")
    ] = None,
    size: o.Size = None,
    banks: o.Banks = None,
    group: o.Group = "size",
    method: Annotated[
        str, o.levels(metavar="sparsegpt|wanda|magnitude", help="How a bank is built.", show_default=True)
    ] = "sparsegpt",
    levels: o.LevelCount = 17,
    step: o.Step = None,
    bank_tokens: o.BankTokens = None,
    **_: Any,
) -> None:
    """Choose a sparsity for every layer by evolutionary search on the real loss, within a budget.

    The bank of pruned layers is built first, if none is given, with its middle level at the sparsity asked for, and
    kept in `banks` beside the run. Several budgets, with commas between them, make a ladder, as in `quantize`; its
    bank has the middle between the outer sparsities in its middle. What was interrupted or killed goes on with
    `discopt resume RUN`.

    Examples:

        discopt llm sparsify HuggingFaceTB/SmolLM2-135M --sparsity 0.6 --calibration fineweb-edu --out runs/sparse

        discopt llm sparsify ./my-model --sparsity 55% --bank banks/sparse --group name --out runs/named

        discopt llm sparsify ./my-model --sparsity 50%,60%,70% --out runs/ladder
    """
    need_llm()
    from discopt_llm.bank_search import SparsifyRequest

    run_search(ctx, SparsifyRequest)


@app.command()
@o.with_search_options
def compress(
    ctx: typer.Context,
    model: o.Model,
    *,
    size: o.Size = None,
    bpw: o.Bpw = None,
    kinds: Annotated[
        str, o.levels(metavar="LIST", help="What a unit's levels may be.", show_default=True)
    ] = "drop,sparsity,quantization",
    banks: o.Banks = None,
    group: o.MixedGroup = "none",
    widths: o.Widths = "2,3,4,5,6",
    group_size: o.GroupSize = 128,
    symmetric: o.Symmetric = False,
    levels: o.LevelCount = 17,
    step: o.Step = None,
    bank_tokens: o.BankTokens = None,
    **_: Any,
) -> None:
    """Mix dropping, sparsity and quantization: one search over all of them, at one size.

    A unit's levels are dropping it, its sparse forms and its bit widths, ordered by the bytes they take; a dropped
    sub-block frees the bytes of all its layers for the others. Several budgets, with commas between them, make a
    ladder, as in `quantize`.

    Examples:

        discopt llm compress HuggingFaceTB/SmolLM2-135M --size 0.4x --calibration fineweb-edu --out runs/mixed

        discopt llm compress ./my-model --size 120MB --kinds drop,quantization --bank banks/smol --out runs/two
    """
    need_llm()
    from discopt_llm.bank_search import CompressRequest

    run_search(ctx, CompressRequest, widths=parse_widths(widths, "--widths"), kinds=parse_names(kinds))


@app.command("eval")
def evaluate(
    ctx: typer.Context,
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="WHAT",
            help="Model folders, hub ids, .gguf files, package:NAME, and run folders, whose students are measured.",
            show_default=False,
        ),
    ],
    data: Annotated[
        str,
        o.data(
            metavar="SRC[,SRC]", help=f"Text to measure on: {o.SOURCES}. What a search may have seen of it is left out."
        ),
    ] = "",
    reference: Annotated[
        str | None,
        o.run(metavar="MODEL", help="What KL is measured to; without it, a run's own model, or the first one given."),
    ] = None,
    profile: Annotated[
        str | None,
        o.levels(
            metavar="RUN_OR_FILE",
            help="Also measure the student of the one model given under a profile: that of a run folder, a "
            "profile.json, or a file in the official text format.",
        ),
    ] = None,
    banks: Annotated[
        list[str] | None,
        o.levels("--bank", metavar="BANK", help="The bank with the profile's levels; without it, the profile's own."),
    ] = None,
    tokens: Annotated[int | None, o.data(help="Tokens of each text to use.", min=2)] = None,
    sequence_length: Annotated[
        int | None, o.data(help="Tokens in a sequence: 2048, or the models' positions.", min=2)
    ] = None,
    tasks: Annotated[
        str, o.tasks(metavar="LIST", help="Tasks of lm-eval, such as arc_easy,hellaswag; needs the extra eval.")
    ] = "",
    tasks_folder: Annotated[
        Path | None, o.tasks(metavar="DIR", help="A folder with task files of your own, as lm-eval reads them.")
    ] = None,
    limit: Annotated[int | None, o.tasks(help="Questions of each task to ask; without it, all.", min=1)] = None,
    batch_size: Annotated[int, o.tasks(help="Answers to measure at a time.", min=1, show_default=True)] = 8,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Measure models and the students of runs side by side: perplexity, KL, top-1 agreement, size, zero-shot tasks.

    The student of a run is made in memory, without writing it first.

    Examples:

        discopt llm eval HuggingFaceTB/SmolLM2-135M runs/three runs/sparse --data wikitext2,c4

        discopt llm eval runs/three models/three.gguf --data notes.txt --tokens 8192 --json

        discopt llm eval ./my-model runs/blocks --tasks arc_easy,hellaswag --limit 500

        discopt llm eval ./my-model --profile configs/levels.txt --bank banks/smol --data wikitext2
    """
    need_llm()
    with only_json_on_stdout(), terminated_as_interrupted():
        from discopt_llm.evaluation import EvalRequest
        from discopt_llm.evaluation import evaluate as measure
        from discopt_llm.evaluation_report import format_evaluation

        changes = {"what": tuple(what), "data": parse_names(data), "tasks": parse_names(tasks)}
        results = measure(checked(lambda: EvalRequest(**request_options(EvalRequest, ctx, **changes))), quiet=quiet)
    typer.echo(json.dumps(results, ensure_ascii=False, allow_nan=False) if as_json else format_evaluation(results))


app.command("compare")(compare)
app.command("export")(export)
app.command("report")(report)
