"""Models measured by plain forward passes, beside a reference that shares no weights with them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from discopt_llm.fitness import Logits
from discopt_llm.heldout import MEASURES

__all__ = ["measure_whole"]

POSITIONS = 128  # compared at a time, in float32


@torch.inference_mode()
def measure_whole(
    model: PreTrainedModel, reference: PreTrainedModel | None, sequences: Sequence[Tensor]
) -> list[NDArray[np.float64]]:
    """Means of each of MEASURES over the positions of every sequence (L,): (1, s) each, lower is better.

    Without a reference the model is compared with itself. Logits of one sequence at a time are held, in the models'
    data type.
    """
    columns = [_measure(model, reference, ids.to(model.device)) for ids in sequences]
    return [values[None] for values in torch.stack(columns, dim=1).cpu().numpy()]


def _measure(model: PreTrainedModel, reference: PreTrainedModel | None, ids: Tensor) -> Tensor:
    """Of one sequence (L,): a mean for each of MEASURES, float64."""
    own = _logits(model, ids)
    others = own if reference is None else _logits(reference, ids)
    next_tokens = ids.roll(-1)  # of the last position one that counts for nothing
    losses: list[list[Tensor]] = [[] for _ in MEASURES]
    for start in range(0, len(ids), POSITIONS):
        chunk = slice(start, start + POSITIONS)
        student = Logits(own[chunk].float(), next_tokens[chunk])
        teacher = student if reference is None else Logits(others[chunk].float(), next_tokens[chunk])
        for measure, values in zip(MEASURES, losses, strict=True):
            values.append(measure.losses(measure.target(teacher), student))
    return torch.stack(
        [
            torch.cat(values)[: len(ids) - int(measure.predicts)].mean(dtype=torch.float64)
            for measure, values in zip(MEASURES, losses, strict=True)
        ]
    )


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """(L,) -> (L, V)."""
    logits: Tensor = model(input_ids=ids[None], use_cache=False).logits
    return logits[0]
