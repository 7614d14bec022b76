"""From a profile in a file or a run to a student that can be measured or written."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from discopt.folder import RunFolder
from discopt.space import Levels as LevelNumbers
from discopt_llm.bank import Bank
from discopt_llm.drop import DropLevels, Unit
from discopt_llm.errors import BankError, ProfileError
from discopt_llm.evaluator import Levels
from discopt_llm.genome import DROP_LABEL, Genome, model_genome
from discopt_llm.heldout import StudentLevels
from discopt_llm.layers import EMBEDDING, layers_for
from discopt_llm.levels import BankLevels
from discopt_llm.models import LoadedModel
from discopt_llm.profile import BankReference, Profile, read_profile
from discopt_llm.profile_text import levels_from_decisions, levels_from_labels


def read_drop_student(path: str, loaded: LoadedModel, *, unit: Unit | None = None) -> tuple[DropLevels, LevelNumbers]:
    """The units and levels (n,) in a file or run of depth pruning; raises ProfileError for one of another model.

    `unit` is what the units must be; None takes the file's own, or sublayers for the text format, which fits any.
    """
    found = read_profile(path, blocks=len(loaded.anatomy.blocks))
    if isinstance(found, Mapping) or (isinstance(found, Profile) and found.kind != "drop"):
        raise ProfileError(f"{path} is no profile of depth pruning")
    if not isinstance(found, Profile):
        levels = DropLevels(loaded.anatomy, unit or "sublayer")
        return levels, levels_from_decisions(found, levels.unit)
    if unit is not None and found.unit != unit:
        raise ProfileError(f"{path} has units of kind {found.unit!r}, expected {unit!r}")
    levels = DropLevels(loaded.anatomy, cast(Unit, found.unit))
    found.check_model(loaded.fingerprint, levels.names)
    return levels, found.levels


def read_bank_student(path: str, loaded: LoadedModel, genome: Genome) -> LevelNumbers:
    """The levels (n,) that a file or run gives the units of a genome; raises ProfileError where they do not fit.

    By their labels, so that a profile of another bank with the same kind of levels serves as well.
    """
    found = read_profile(path)
    if isinstance(found, Profile):
        if found.kind == "drop":
            raise ProfileError(f"{path} is a profile of depth pruning, expected one of {genome.kind}")
        if genome.kind not in (found.kind, "mixed"):  # "3" is a width here and a number of steps there
            raise ProfileError(f"{path} is a profile of kind {found.kind}, expected one of {genome.kind}")
        found.check_model(loaded.fingerprint, found.names)
        labels = _layer_labels(found, genome)
    elif isinstance(found, Mapping):
        labels = _of_only_kind(found, genome)
    else:
        raise ProfileError(f"{path} is a profile of depth pruning, expected one of {genome.kind}")
    return levels_from_labels(labels, genome.layer_names, genome.labels)


def _of_only_kind(labels: Mapping[str, str], genome: Genome) -> dict[str, str]:
    """Labels as a genome has them: where it mixes one kind with dropping, "3" can only be that kind's."""
    kinds = {label.partition(":")[0] for row in genome.labels for label in row if label and label != DROP_LABEL}
    if genome.kind != "mixed" or len(kinds) > 1:
        return dict(labels)
    return {name: label if _is_mixed(label) else f"{next(iter(kinds))}:{label}" for name, label in labels.items()}


def _layer_labels(profile: Profile, genome: Genome) -> dict[str, str]:
    """The label of every layer, whatever units the profile has: name -> label."""
    mixed = genome.kind == "mixed"
    names: dict[str, str] = {}
    of_unit = _layer_names(profile, {name for names in genome.layer_names for name in names})
    for layer_names, label in zip(of_unit, profile.labels, strict=True):
        whole = f"{profile.kind}:{label}" if mixed and profile.kind != "mixed" else label
        names.update(dict.fromkeys(layer_names, whole))
    return names


def _layer_names(profile: Profile, known: Collection[str]) -> list[list[str]]:
    """The layers of each unit, from the units' names: "a.q_proj+k_proj" is "a.q_proj" and "a.k_proj"."""
    units = []
    for name in profile.names:
        first, *others = name.split("+")
        parent = first.rpartition(".")[0]
        units.append([first, *(f"{parent}.{other}" for other in others)])
    if unknown := [name for names in units for name in names if name not in known]:
        raise ProfileError(f"the profile has a layer {unknown[0]}, which this model does not have")
    return units


def open_banks(paths: Sequence[str | Path], loaded: LoadedModel, *, verify: bool = True) -> list[Bank]:
    """Banks of a model; raises BankError for one that is of another model, or damaged, as far as `verify` looks."""
    banks = [Bank.open(path, verify=verify) for path in paths]
    for bank in banks:
        bank.check_model(loaded.fingerprint, layers_for(loaded, bank.kind))
    return banks


def read_student(path: str, loaded: LoadedModel, *, banks: Sequence[str] = ()) -> tuple[StudentLevels, LevelNumbers]:
    """The levels and the profile (n,) in a file or run folder of any kind.

    banks: folders of the banks to take the weights from; () takes those that the profile names, which must be as they
        were. Raises ProfileError or BankError for a profile or a bank that does not belong to the model.
    """
    found = read_profile(path)
    if not isinstance(found, Mapping) and not (isinstance(found, Profile) and found.kind != "drop"):
        if banks:
            raise ProfileError(f"{path} is a profile of depth pruning, which takes no bank")
        return read_drop_student(path, loaded)
    folders = [*banks]
    if not folders and isinstance(found, Profile):
        folders = [_bank_of(reference, path) for reference in found.banks]
    if not folders:
        raise ProfileError(f"{path} names no bank; say with --bank which one holds its levels")
    opened = open_banks(folders, loaded)
    if isinstance(found, Profile) and not banks:
        found.check_banks([bank.fingerprint for bank in opened])
    unit = found.unit if isinstance(found, Profile) else "layer"
    mixed = found.kind == "mixed" if isinstance(found, Profile) else any(map(_is_mixed, found.values()))
    tables = {bank.kind: (bank.layers, bank.labels) for bank in opened}
    if len(tables) < len(opened):
        raise BankError(f"expected banks of different kinds, got {len(opened)} of kind {opened[0].kind}")
    genome = model_genome(loaded, tables, unit, drop=mixed)
    levels = BankLevels(loaded, layers_for(loaded, opened[0].kind), genome, opened)
    return levels, read_bank_student(path, loaded, genome)


def run_folder(path: str) -> Path | None:
    """The run that a profile is of: a run folder, or one that a file lies in."""
    found = Path(path).resolve()
    folder = found if found.is_dir() else found.parent
    return folder if (folder / "run.json").is_file() else None


def run_options(run: str | Path) -> Mapping[str, Any]:
    """What a run that found a profile of a language model was asked; raises ProfileError for any other folder."""
    folder = RunFolder.open(run)
    options: Mapping[str, Any] = folder.request.get("options", {})
    if not folder.has("profile.json") or "model" not in options:
        raise ProfileError(f"{run} holds no profile of a language model; expected the folder of a `discopt llm` run")
    return options


@contextmanager
def student_(levels: Levels, profile: NDArray[np.integer]) -> Iterator[None]:
    """The whole model as a profile (n,) has it, for plain forward passes, while inside.

    All weights of the student are in memory then, besides the model's own.
    """
    embedding, head = levels.end_units
    with ExitStack() as stack:
        for block, units in enumerate((embedding, *levels.block_units, head), start=EMBEDDING):
            if len(units):
                stack.enter_context(levels.applied_(block, tuple(np.asarray(profile)[units].tolist())))
        yield


def _is_mixed(label: str) -> bool:
    """Whether a label says of which kind it is: "quantization:3", "drop"."""
    return label == DROP_LABEL or ":" in label


def _bank_of(reference: BankReference, path: str) -> str:
    """Where a profile's bank is: as it was written down, or beside the run if that was moved."""
    there = Path(reference.path)
    run = run_folder(path) or Path(path).resolve()
    for parent in () if there.is_dir() else run.parents[:2]:  # the second for a run of a ladder
        if (moved := parent / "banks" / there.name).is_dir():
            return str(moved)
    if not there.is_dir():
        raise BankError(f"the bank of {path} is not at {there} any more; say with --bank where it is")
    return reference.path
