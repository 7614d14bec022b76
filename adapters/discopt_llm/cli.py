"""`discopt llm`: compress a language model. Heavy imports wait until a command runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from discopt.console import checked, only_json_on_stdout, terminated_as_interrupted
from discopt_llm import cli_options as o
from discopt_llm.cli_compare import compare
from discopt_llm.cli_run import (
    interrupted,
    need_llm,
    parse_blocks,
    parse_names,
    parse_widths,
    print_rows,
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
    sparsity: Annotated[float, o.budget(help="Share of the blocks, or of each kind of sub-block, to drop: in [0, 1).")],
    unit: Annotated[
        str, o.levels(metavar="sublayer|block|pair", help="What is dropped at a time.", show_default=True)
    ] = "sublayer",
    protect: Annotated[str, o.levels(metavar="BLOCKS", help="Blocks never to drop, such as 0,1,28-29.")] = "",
    **_: Any,
) -> None:
    """Drop attention and MLP sub-blocks, or whole blocks, chosen by evolutionary search on the real loss.

    Leaves a run folder with the profile, a table against baselines on held-out text, a report and pictures. What
    was interrupted or killed goes on with `discopt resume RUN`.

    Examples:

        discopt llm drop HuggingFaceTB/SmolLM2-135M --sparsity 0.25 --calibration fineweb-edu --out runs/smol

        discopt llm drop ./my-model --sparsity 0.2 --unit block --protect 0,1 --preset paper --out runs/blocks

        discopt llm drop model.gguf --sparsity 0.3 --stage 4@1024 --stage 1@8192 --generations 200 --out runs/g
    """
    need_llm()
    from discopt_llm.drop_search import DropRequest

    run_search(ctx, DropRequest, protect=parse_blocks(protect))


@app.command()
def bank(
    ctx: typer.Context,
    model: o.Model,
    *,
    kind: Annotated[
        str, o.levels(metavar="quantization|sparsity", help="What the levels are.", show_default=True)
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
    propagate: Annotated[
        str | None,
        o.levels(
            metavar="dense|LEVEL",
            help="What makes the next block's inputs; without it, 3 bits for quantization (if that is a level), dense "
            "for sparsity.",
        ),
    ] = None,
    calibration: o.CalibrationSource = "builtin",
    calibration_tokens: o.CalibrationTokens = None,
    sequence_length: o.SequenceLength = None,
    out: Annotated[Path, o.run(metavar="BANK", help="The folder of the bank.")],
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    force: o.Force = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Build a bank: every layer of a model at every bit width, or at every sparsity.

    All searches at whatever budget take their levels from it. A build that was interrupted or killed goes on after
    its last finished block when the same command is given again.

    Examples:

        discopt llm bank HuggingFaceTB/SmolLM2-135M --bits 2,3,4,5,6 --group-size 64 --out banks/smol

        discopt llm bank ./my-model --kind sparsity --target 0.6 --calibration fineweb-edu --out banks/sparse

        discopt llm bank model.gguf --method rtn --bits 2,3,4,8 --symmetric --out banks/rtn
    """
    need_llm()
    with only_json_on_stdout(as_json), terminated_as_interrupted():
        from discopt_llm.banks import BankRequest, bank_summary, make_bank

        request = checked(lambda: BankRequest(**request_options(BankRequest, ctx, bits=parse_widths(bits, "--bits"))))
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
    group: o.Group = "size",
    method: Annotated[str, o.levels(metavar="gptq|rtn", help="How a bank is built.", show_default=True)] = "gptq",
    widths: o.Widths = "2,3,4,5,6",
    group_size: o.GroupSize = 128,
    symmetric: o.Symmetric = False,
    bank_tokens: o.BankTokens = None,
    **_: Any,
) -> None:
    """Choose a bit width for every layer by evolutionary search on the real loss, within a budget.

    The bank of quantized layers is built first, if none is given, and kept in `banks` beside the run for the next
    budget. What was interrupted or killed goes on with `discopt resume RUN`.

    Examples:

        discopt llm quantize HuggingFaceTB/SmolLM2-135M --bits 3 --calibration fineweb-edu --out runs/three

        discopt llm quantize ./my-model --size 0.3x --group runtime --bank banks/smol --out runs/small

        discopt llm quantize model.gguf --bpw 2.75 --preset demo --group-size 64 --out runs/demo
    """
    need_llm()
    from discopt_llm.bank_search import QuantizeRequest

    run_search(ctx, QuantizeRequest, widths=parse_widths(widths, "--widths"))


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
    kept in `banks` beside the run. What was interrupted or killed goes on with `discopt resume RUN`.

    Examples:

        discopt llm sparsify HuggingFaceTB/SmolLM2-135M --sparsity 0.6 --calibration fineweb-edu --out runs/sparse

        discopt llm sparsify ./my-model --sparsity 55% --bank banks/sparse --group name --out runs/named
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
    sub-block frees the bytes of all its layers for the others.

    Examples:

        discopt llm compress HuggingFaceTB/SmolLM2-135M --size 0.4x --calibration fineweb-edu --out runs/mixed

        discopt llm compress ./my-model --size 120MB --kinds drop,quantization --bank banks/smol --out runs/two
    """
    need_llm()
    from discopt_llm.bank_search import CompressRequest

    run_search(ctx, CompressRequest, widths=parse_widths(widths, "--widths"), kinds=parse_names(kinds))


@app.command("eval")
def evaluate(
    model: o.Model,
    data: Annotated[
        str,
        o.data(metavar="SRC", help=f"Text to measure on: {o.SOURCES}. What a search may have seen of it is left out."),
    ],
    profile: Annotated[
        str | None,
        o.levels(metavar="RUN_OR_FILE", help="A run folder, a profile.json, or a file in the official text format."),
    ] = None,
    banks: Annotated[
        list[str] | None,
        o.levels("--bank", metavar="BANK", help="The bank with the profile's levels; without it, the profile's own."),
    ] = None,
    tokens: Annotated[int | None, o.data(help="Tokens of it to use.", min=2)] = None,
    sequence_length: Annotated[
        int | None, o.data(help="Tokens in a sequence: 2048, or the model's positions.", min=2)
    ] = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Measure a model, and its student under a profile: KL to the dense model, perplexity, top-1 agreement.

    Examples:

        discopt llm eval HuggingFaceTB/SmolLM2-135M --data wikitext2

        discopt llm eval ./my-model --profile runs/blocks --data notes.txt --tokens 8192 --json
    """
    need_llm()
    with only_json_on_stdout(as_json), terminated_as_interrupted():
        from discopt_llm.students import EvalRequest, evaluate_student

        request = EvalRequest(
            model, data, profile, tuple(banks or ()), tokens, sequence_length, device, dtype, trust_remote_code
        )
        results = evaluate_student(request, quiet=quiet)
    print_rows(results, as_json)


@app.command("export")
def export(
    ctx: typer.Context,
    run: o.RunArgument,
    *,
    to: Annotated[str, o.run(metavar="hf", help="The format: hf is a dense checkpoint.")],
    out: Annotated[Path, o.run(metavar="PATH", help="Where to write it.")],
    runtime: Annotated[
        str | None, o.run("--for", metavar="NAME", help="Hold it to the rules of a runtime besides.")
    ] = None,
    banks: Annotated[
        list[str] | None,
        o.levels("--bank", metavar="BANK", help="The bank with the profile's levels; without it, the run's own."),
    ] = None,
    verify: Annotated[
        bool, o.run("--verify/--no-verify", help="Load it back and compare logits.", show_default=True)
    ] = True,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    force: o.Force = False,
    as_json: o.Json = False,
) -> None:
    """Write the student of a run in a format that other programs load, and prove it by loading it back.

    hf: a Hugging Face checkpoint with dense weights that plain `from_pretrained` loads. Whole blocks that went are
    left out; a sub-block that went alone stays with its output projection zeroed, since transformers has no models
    with half a block.

    Examples:

        discopt llm export runs/blocks --to hf --out models/blocks

        discopt llm export runs/smol --to hf --out models/smol --dtype bfloat16
    """
    need_llm()
    with only_json_on_stdout(as_json), terminated_as_interrupted():
        from discopt_llm.export.command import ExportRequest, export_run

        written = export_run(checked(lambda: ExportRequest(**request_options(ExportRequest, ctx))))
    typer.echo(json.dumps(written.to_dict()) if as_json else written.sentence)


app.command("compare")(compare)
