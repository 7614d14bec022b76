"""The plain way to measure candidates, as the official EvoPress code does it (METHOD: "Level databases").

One candidate after another: the layers whose level changed since the candidate before are read from files of
dequantized weights and copied into the model, which then runs whole on one sequence after another. The teacher's
logits are computed once, kept on the host, and compared with the candidate's in full.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from discopt_llm.genome import Form
from discopt_llm.layers import Layer
from discopt_llm.levels import BankLevels

_DENSE = -1  # stands for a layer's own weights


class PlainWay:
    """Candidates of one model, one at a time; its levels lie as files in a folder."""

    def __init__(self, levels: BankLevels, folder: Path) -> None:
        self.levels, self.model, self.folder = levels, levels.loaded.model, folder
        self._current = np.full(levels.genome.n, _DENSE)
        folder.mkdir(parents=True, exist_ok=True)

    @torch.no_grad()
    def write_levels(self, population: NDArray[np.integer]) -> None:
        """The dequantized weights of every level that a population (k, n) uses, as files."""
        for unit in range(population.shape[1]):
            for level in np.unique(population[:, unit]).tolist():
                if not (path := self._file(unit, level)).exists():
                    weight = self.levels.parameter(self._layer(unit), Form(0, level))
                    save_file({"weight": weight.cpu()}, path)

    @torch.inference_mode()
    def teacher_logits(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        """Of the model as it is, (L, V) for each sequence, on the host; once for a whole search."""
        return [self._logits(ids).cpu() for ids in sequences]

    @torch.inference_mode()
    def measure(
        self, population: NDArray[np.integer], sequences: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> NDArray[np.float64]:
        """KL to the teacher's logits of every row of levels (k, n): (k,) nats per token, lower is better."""
        losses = np.zeros(len(population))
        for i, row in enumerate(population):
            self._switch_(row)
            for ids, logits in zip(sequences, teacher, strict=True):
                log_p = logits.to(self.model.device).float().log_softmax(-1)
                log_q = self._logits(ids).float().log_softmax(-1)
                losses[i] += (log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64).item()
        return losses / sum(len(ids) for ids in sequences)

    @contextmanager
    def students_(self) -> Iterator[None]:
        """While inside the model's weights are a student's; afterwards they are its own again, from a copy on the host.

        They are overwritten where they are, so that the device never holds two models.
        """
        parameters = [self._layer(unit).parameter for unit in range(self.levels.genome.n)]
        own = [parameter.detach().cpu().clone() for parameter in parameters]
        try:
            yield
        finally:
            for parameter, weight in zip(parameters, own, strict=True):
                parameter.data.copy_(weight)
            self._current[:] = _DENSE

    def _switch_(self, row: NDArray[np.integer]) -> None:
        for unit in np.flatnonzero(row != self._current).tolist():
            weight = load_file(self._file(unit, int(row[unit])))["weight"]
            self._layer(unit).parameter.data.copy_(weight)
        self._current[:] = row

    def _layer(self, unit: int) -> Layer:
        (index,) = self.levels.genome.layers[unit]
        return self.levels.layers[index]

    def _logits(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids[None].to(self.model.device), use_cache=False).logits[0]

    def _file(self, unit: int, level: int) -> Path:
        return self.folder / f"{unit}-{level}.safetensors"
