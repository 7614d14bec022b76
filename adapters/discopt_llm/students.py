"""From a profile in a file to a student that can be measured or written: `discopt llm eval` and `discopt llm apply`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from discopt.folder import RunFolder
from discopt.space import Levels
from discopt_llm.calibration import load_calibration
from discopt_llm.drop import DropLevels, Unit
from discopt_llm.errors import ModelError, ProfileError
from discopt_llm.evaluator import Evaluator
from discopt_llm.export.hf import CheckpointSummary, write_checkpoint
from discopt_llm.heldout import Method, heldout_rows
from discopt_llm.models import LoadedModel, load_model
from discopt_llm.profile import Profile, levels_from_decisions, read_profile
from discopt_llm.sources import Role

EVAL_SEQUENCE_LENGTH = 2048


def read_student(path: str, loaded: LoadedModel, *, unit: Unit | None = None) -> tuple[DropLevels, Levels]:
    """The units and levels (n,) in a profile file or a run folder; raises ProfileError for one of another model.

    `unit` is what the units must be; None takes the file's own, or sublayers for the text format, which fits any.
    """
    found = read_profile(path, blocks=len(loaded.anatomy.blocks))
    if not isinstance(found, Profile):
        levels = DropLevels(loaded.anatomy, unit or "sublayer")
        return levels, levels_from_decisions(found, levels.unit)
    if unit is not None and found.unit != unit:
        raise ProfileError(f"{path} has units of kind {found.unit!r}, expected {unit!r}")
    levels = DropLevels(loaded.anatomy, cast(Unit, found.unit))
    found.check_model(loaded.fingerprint, levels.names)
    return levels, found.levels


@dataclass(frozen=True)
class EvalRequest:
    """What was asked of `discopt llm eval`."""

    model: str
    data: str
    profile: str | None = None
    tokens: int | None = None
    sequence_length: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False


def evaluate_student(request: EvalRequest, *, quiet: bool) -> dict[str, Any]:
    """Measure the model, and its student under a profile, on text; returns what `discopt llm eval --json` prints."""
    loaded = load_model(
        request.model, device=request.device, dtype=request.dtype, trust_remote_code=request.trust_remote_code
    )
    levels = DropLevels(loaded.anatomy)
    methods = [Method("dense", np.ones(len(levels.units), dtype=np.int16), 0)]
    if request.profile is not None:
        levels, profile = read_student(request.profile, loaded)
        methods = [Method("dense", np.ones_like(profile), 0), Method(request.profile, profile, 0)]
    text = load_calibration(
        request.data,
        loaded.tokenizer,
        sequence_length=sequence_length(loaded, request.sequence_length, EVAL_SEQUENCE_LENGTH),
        tokens=request.tokens,
        role=_role(request),
    )
    rows = heldout_rows(Evaluator(loaded, levels), levels, methods, text, quiet=quiet)
    for row in rows:
        del row["tokens"]  # nothing was searched
    return {
        "command": "llm eval",
        "model": request.model,
        "data": {"source": text.source, "tokens": text.tokens, "sequence_length": text.sequence_length},
        "rows": rows,
    }


def _role(request: EvalRequest) -> Role:
    """The side that no search has seen where the text may have been searched on, else all of it."""
    searched = {"builtin", "fineweb-edu"}
    if request.profile is not None and Path(request.profile).is_dir():
        searched.add(RunFolder.open(request.profile).request.get("options", {}).get("calibration"))
    return "heldout" if request.data in searched else "all"


def sequence_length(loaded: LoadedModel, asked: int | None, default: int) -> int:
    """Tokens in a sequence: what was asked, else the default or the model's positions, whichever is less.

    Raises ModelError if the model has fewer positions than were asked for.
    """
    positions: int | None = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if asked is None:
        return min(default, positions or default)
    if positions is not None and asked > positions:
        raise ModelError(f"{loaded.source} has {positions:,} positions, asked for sequences of {asked:,} tokens")
    return asked


def apply_profile(run: Path, out: Path, *, dtype: str, device: str, force: bool, verify: bool) -> CheckpointSummary:
    """Write the student of a run as a checkpoint."""
    folder = RunFolder.open(run)
    options = folder.request.get("options", {})
    if not folder.has("profile.json") or "model" not in options:
        raise ProfileError(f"{run} holds no profile of a language model; expected the folder of a `discopt llm` run")
    loaded = load_model(
        options["model"], device=device, dtype=dtype, trust_remote_code=options.get("trust_remote_code", False)
    )
    levels, profile = read_student(str(run), loaded)
    return write_checkpoint(loaded, levels.dropped(profile), out, force=force, verify=verify)
