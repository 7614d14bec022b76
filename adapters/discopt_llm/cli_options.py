"""The options that several commands of `discopt llm` share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

_Command = TypeVar("_Command", bound=Callable[..., None])

SOURCES = "builtin, a .txt, .jsonl or .parquet file, wikitext2, c4, fineweb-edu, or hf:NAME[:CONFIG[:SPLIT[:COLUMN]]]"


def _panel(panel: str) -> Any:
    def option(*names: str, **settings: Any) -> Any:
        return typer.Option(*names, rich_help_panel=panel, **{"show_default": False, **settings})

    return option


budget, levels, search, data, tasks, run, machines = (
    _panel(name) for name in ("The budget", "The levels", "The search", "Text", "Tasks", "The run", "The machines")
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model folder, a hub id, a .gguf file, or package:NAME (a GGUF file inside an installed package).",
        show_default=False,
    ),
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)]
Out = Annotated[Path, run(metavar="RUN", help="The run folder.")]
Device = Annotated[str, run(help="Where to run: auto, cpu, cuda or cuda:N.", show_default=True)]
Dtype = Annotated[
    str, run(help="auto (float32 on CPU, bfloat16 on CUDA), float32, bfloat16, float16.", show_default=True)
]
TrustRemoteCode = Annotated[
    bool, run("--trust-remote-code", help="Let a model bring its own code and pickled weights.")
]
Workers = Annotated[
    str | None,
    machines(
        metavar="N|ray://HOST:PORT[?workers=N]",
        help="Spread the work over N processes of this machine, or over a Ray cluster (extra ray). Each holds the "
        "model and the bank, on a CUDA device of its own where models run on CUDA. The results are the same. 1: this "
        "process alone.",
    ),
]
WorkerSeconds = Annotated[
    float | None,
    machines(metavar="SECONDS", help="A worker that takes longer for one call is given up, and another takes it over."),
]
Memory = Annotated[
    str | None,
    machines(
        metavar="SIZE",
        help="Most memory of the device, such as 16GiB, for weights, levels and hidden states; blocks that find no "
        "place are there while they run. With workers, of each of them.",
    ),
]
HostMemory = Annotated[
    str | None, machines(metavar="SIZE", help="Most memory of the machine itself. With workers, for each of them.")
]
Seed = Annotated[int, run(help="Same seed, same run.", min=0, show_default=True)]
Force = Annotated[bool, run("--force", help="Replace what is at --out.")]
Json = Annotated[bool, run("--json", help="Print one JSON object, and nothing else.")]
Quiet = Annotated[bool, run("--quiet", "-q", help="Show no progress.")]
Preset = Annotated[
    str,
    search(
        metavar="paper|fast|demo",
        help="Settings: EvoPress' published ones, its super-fast ones, or ones for minutes on a CPU.",
        show_default=True,
    ),
]
Generations = Annotated[int | None, search(help="Generations to run.", min=0)]
Offspring = Annotated[int | None, search(help="Candidates in a generation.", min=1)]
Stages = Annotated[
    list[str] | None,
    search("--stage", metavar="SURVIVORS@TOKENS", help="A stage of selection; once for each, such as 2@2048."),
]
Algorithm = Annotated[
    str | None,
    search(
        metavar="learning|evopress",
        help="Search with a model of the loss that learns, and a final choice on text kept apart (presets fast and "
        "demo), or as EvoPress does (preset paper). Both spend as many tokens.",
    ),
]
Start = Annotated[
    str | None,
    search(
        metavar="auto|random|heuristics|RUN_OR_FILE",
        help="Start as the paper does (preset paper), from the best of random profiles, from that or a heuristic that "
        "beats it (fast, demo), or from a profile, JSON or the official text format.",
    ),
]
Fitness = Annotated[str, search(metavar="kl|kl-topk[:K]|ppl|tv", help="The loss to search on.", show_default=True)]
MaxSeconds = Annotated[float | None, search(help="Stop searching after this long.")]
CalibrationSource = Annotated[str, data(metavar="SRC", help=f"Text to search on: {SOURCES}.", show_default=True)]
CalibrationTokens = Annotated[int | None, data(help="Tokens of it to use.", min=1)]
SequenceLength = Annotated[int | None, data(help="Tokens in a sequence.", min=2)]
EvalData = Annotated[
    str | None, data(metavar="SRC", help="Held-out text; without it, the held-out side of --calibration.")
]
EvalTokens = Annotated[int | None, data(help="Tokens of held-out text to measure on.", min=2)]
Baselines = Annotated[str | None, run(metavar="LIST", help="Rows to compare with, or none; without it, all.")]
Banks = Annotated[
    list[str] | None,
    levels(
        "--bank",
        metavar="BANK",
        help="A bank of the model, once for each kind; without it, what is needed is built and kept beside the run.",
    ),
]
Group = Annotated[
    str,
    levels(
        metavar="size|name|none|runtime",
        help="Which units may trade in a search as EvoPress does it: those with as many weights, those of one name, or "
        "all, as in the learning one. runtime is size, with "
        "the layers that inference engines fuse (q, k, v; gate, up) as one unit.",
        show_default=True,
    ),
]
QuantizeGroup = Annotated[
    str | None,
    levels(
        "--group",
        metavar="size|name|none|runtime",
        help="Which units may trade in a search as EvoPress does it: those with as many weights (without it, unless "
        "--method is gguf), those of one name, or all (none; without it, of --method gguf), as in the learning one. "
        "runtime is size, with the layers that inference engines fuse (q, k, v; gate, up) as one unit.",
    ),
]
MixedGroup = Annotated[
    str,
    levels(
        "--group",
        metavar="none|runtime|size|name",
        help="Which units may trade: all (none), or all, with the layers that inference engines fuse as one unit "
        "(runtime). Where nothing is dropped, also those with as many weights (size) or of one name (name).",
        show_default=True,
    ),
]
Widths = Annotated[str, levels("--widths", metavar="BITS", help="Bit widths of the levels.", show_default=True)]
GroupSize = Annotated[
    int, levels(help="Weights of a row that share a scale; 0: a whole row.", min=0, show_default=True)
]
Types = Annotated[
    str | None,
    levels(
        metavar="TYPES",
        help="Types of ggml that are the levels of kind gguf, such as Q4_0,Q5_0,Q8_0; without it, those that suit the "
        "model's layers. Q2_K to Q6_K and IQ types need the package xllamacpp.",
    ),
]
Imatrix = Annotated[
    bool | None,
    levels(
        "--imatrix/--no-imatrix",
        help="Weigh the errors of types of ggml by the mean squares of their inputs; without it, where the package "
        "xllamacpp is there.",
    ),
]
Symmetric = Annotated[bool, levels("--symmetric", help="No zero points.")]
LevelCount = Annotated[int, levels("--levels", help="Sparsity levels, an odd number.", min=1, show_default=True)]
Step = Annotated[
    int | None,
    levels(metavar="WEIGHTS", help="Weights between two sparsity levels; without it, 1/32 of the mean layer.", min=1),
]
BankTokens = Annotated[int | None, data(help="Tokens of --calibration to build a bank with.", min=1)]
Bits = Annotated[
    str | None,
    budget(
        metavar="BITS",
        help="Average width of the weights, such as 3 or 2.25; with --method gguf the same as --bpw.",
    ),
]
Bpw = Annotated[str | None, budget(metavar="BITS", help="Stored bits per weight, with scales, zero points and masks.")]
Size = Annotated[
    str | None,
    budget(
        metavar="SIZE",
        help="Size of the whole model file, embeddings, norms and head included (of types of ggml, the .gguf file with "
        "its metadata): 120MB, 0.5GiB, or 0.3x the dense one in 16 bits.",
    ),
]


def with_search_options(command: _Command) -> _Command:
    """The command with the options of every search in place of its last parameter, a `**`; typer reads signatures."""
    signature = inspect.signature(command, eval_str=True)
    *own, rest = signature.parameters.values()
    assert rest.kind is rest.VAR_KEYWORD
    shared = inspect.signature(_search_options, eval_str=True).parameters.values()
    command.__signature__ = signature.replace(parameters=[*own, *shared])  # type: ignore[attr-defined]
    return command


def _search_options(
    *,
    preset: Preset = "fast",
    generations: Generations = None,
    offspring: Offspring = None,
    stages: Stages = None,
    algorithm: Algorithm = None,
    start: Start = None,
    fitness: Fitness = "kl",
    max_seconds: MaxSeconds = None,
    calibration: CalibrationSource = "builtin",
    calibration_tokens: CalibrationTokens = None,
    sequence_length: SequenceLength = None,
    eval_data: EvalData = None,
    eval_tokens: EvalTokens = None,
    out: Out,
    baselines: Baselines = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    workers: Workers = None,
    worker_seconds: WorkerSeconds = None,
    memory: Memory = None,
    host_memory: HostMemory = None,
    seed: Seed = 0,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The options of every search, in the order of `--help`."""
