"""`discopt llm export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from discopt.console import checked, only_json_on_stdout, terminated_as_interrupted
from discopt_llm import cli_options as o
from discopt_llm.cli_run import need_llm, request_options


def export(
    ctx: typer.Context,
    run: o.RunArgument,
    *,
    to: Annotated[str, o.run(metavar="hf|gguf|compressed-tensors|deci", help="The format.")],
    out: Annotated[Path, o.run(metavar="PATH", help="Where to write it: a folder, or for gguf a .gguf file.")],
    runtime: Annotated[
        str | None,
        o.run("--for", metavar="vllm", help="With compressed-tensors: refuse what vLLM's kernels would not take."),
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

    hf: dense weights that plain `from_pretrained` loads. Whole blocks that went are left out; a sub-block that went
    alone stays with its output projection zeroed, since transformers has no models with half a block.

    gguf: one file for llama.cpp, of runs with levels of GGUF types (quantize --method gguf) and of dropping.

    compressed-tensors: packed integers for transformers and vLLM, of quantize; search with --symmetric for those.

    deci: DeciLM block configs for vLLM, in which dropped sub-blocks take no space, of dropping.

    What fails its proof is an error, and is kept beside the target as PATH.unverified.

    Examples:

        discopt llm export runs/blocks --to hf --out models/blocks

        discopt llm export runs/types --to gguf --out models/smol.gguf

        discopt llm export runs/four --to compressed-tensors --for vllm --out models/four
    """
    need_llm()
    with only_json_on_stdout(as_json), terminated_as_interrupted():
        from discopt_llm.export.command import ExportRequest, export_run

        written = export_run(checked(lambda: ExportRequest(**request_options(ExportRequest, ctx))))
    typer.echo(json.dumps(written.to_dict()) if as_json else written.sentence)
