"""A student on its way to a file: the model it is of, its profile, and the forms that its layers are stored in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig

from discopt.space import Levels as LevelNumbers
from discopt_llm.bank import Form as StoredForm
from discopt_llm.genome import Form
from discopt_llm.heldout import StudentLevels
from discopt_llm.layers import Layer
from discopt_llm.levels import BankLevels
from discopt_llm.models import LoadedModel, load_model
from discopt_llm.students import read_student, run_options

__all__ = ["StudentModel"]

DROP = "drop"
_WORDS = {
    "quantization": "quantized to {bits:.2f} bits on average",
    "sparsity": "pruned to {sparsity:.1%} zeros",
    "gguf": "stored in GGUF types of {bits:.2f} bits on average",
    "mixed": "compressed to {bpw:.2f} bits per weight",
}


@dataclass(frozen=True, eq=False)
class StudentModel:
    """A model under a profile."""

    loaded: LoadedModel
    levels: StudentLevels
    profile: LevelNumbers  # (n,)

    @classmethod
    def of_run(
        cls,
        run: Path,
        *,
        banks: Sequence[str] = (),
        device: str = "auto",
        dtype: str = "auto",
        check_config: Callable[[PretrainedConfig], None] = lambda _: None,
    ) -> StudentModel:
        """The student that a run found; raises ProfileError, BankError or ModelError where something is amiss.

        `check_config` is that of `load_model`.
        """
        options = run_options(run)
        loaded = load_model(
            options["model"],
            device=device,
            dtype=dtype,
            trust_remote_code=options.get("trust_remote_code", False),
            check_config=check_config,
        )
        return cls(loaded, *read_student(str(run), loaded, banks=banks))

    @property
    def kind(self) -> str:
        """ "drop", or what its levels are: "quantization", "sparsity", "gguf", "mixed"."""
        return self.levels.genome.kind if isinstance(self.levels, BankLevels) else DROP

    @cached_property
    def dropped(self) -> NDArray[np.bool_]:
        """Which sub-blocks it lacks: (blocks, 2), attention then MLP."""
        return self.levels.dropped(self.profile)

    @cached_property
    def placed(self) -> Mapping[str, tuple[Layer, Form]]:
        """Parameters that it has in other forms than its teacher: name -> layer and the form's place in a bank."""
        return self.levels.weights(self.profile) if isinstance(self.levels, BankLevels) else {}

    def form(self, name: str) -> StoredForm:
        """One of these as it is stored, on the CPU."""
        assert isinstance(self.levels, BankLevels)
        layer, form = self.placed[name]
        return self.levels.banks[form.bank].form(layer.index, form.level, torch.device("cpu"))

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Their weights, as the loaded model would hold them; made when asked for."""
        return _Weights(self)

    @property
    def bytes(self) -> int:
        """What the search counted for it."""
        return self.levels.bytes_of(self.loaded.model, self.profile)

    @property
    def what(self) -> str:
        """What was done to its weights: "quantized to 3.00 bits on average"; empty if nothing."""
        if not isinstance(self.levels, BankLevels):
            return ""
        genome = self.levels.genome
        return _WORDS[genome.kind].format(**genome.costs.met(self.profile))


class _Weights(Mapping[str, Tensor]):
    """Weights by parameter name, unpacked when asked for."""

    def __init__(self, student: StudentModel) -> None:
        self._student = student

    def __getitem__(self, name: str) -> Tensor:
        assert isinstance(self._student.levels, BankLevels)
        return self._student.levels.parameter(*self._student.placed[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._student.placed)

    def __len__(self) -> int:
        return len(self._student.placed)
