"""Loading a checkpoint as anyone would, and comparing it with the student that was searched."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from discopt_llm.anatomy import skipped_
from discopt_llm.errors import ModelError, one_line
from discopt_llm.export.folder import os_message
from discopt_llm.models import LoadedModel

__all__ = ["Student", "UnfitError", "unfit_if", "without_bars"]

CHECKED_TOKENS = 64  # length of the two random sequences on which the written model is compared
CACHE_SLACK = 5.0  # with a cache, products are taken in other portions, which rounds differently

_log = logging.getLogger(__name__)


class UnfitError(Exception):
    """This form of the checkpoint is not the searched student; the message says why, for a sentence to go on with."""


@dataclass(frozen=True, eq=False)
class Student:
    """What the searched student answers on two random sequences."""

    loaded: LoadedModel
    ids: Tensor  # (2, L)
    logits: Tensor  # (2, L, V) float32 on the CPU

    @classmethod
    @torch.no_grad()
    def of(cls, loaded: LoadedModel, dropped: NDArray[np.bool_]) -> Student:
        model = loaded.model
        embedding: Any = model.get_input_embeddings()
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or CHECKED_TOKENS
        shape = (2, min(CHECKED_TOKENS, positions))
        ids = torch.randint(len(embedding.weight), shape, generator=torch.Generator().manual_seed(0)).to(model.device)
        parts = zip(loaded.anatomy.sub_blocks, dropped.flat, strict=True)
        with skipped_(part for part, gone in parts if gone):
            return cls(loaded, ids, _on_cpu(model(input_ids=ids, use_cache=False).logits))

    def check(self, folder: Path, *, stored: torch.dtype | None = None) -> None:
        """Load the files as anyone would and compare; raises UnfitError.

        stored: what the files hold of the weights, where that is less exact than the loaded model.
        """
        with unfit_if("what was written cannot be loaded and run"), without_bars():
            read: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=self.loaded.model.dtype,
                output_loading_info=True,
                trust_remote_code=self.loaded.model.is_remote_code(),
            )
            model, info = read
            for problem, names in info.items():
                if names:
                    raise UnfitError(f"loading what was written reports {problem}: {', '.join(map(str, names))}")
            self.check_model(model, stored=stored)

    @torch.no_grad()
    def check_model(self, model: Any, *, stored: torch.dtype | None = None) -> None:
        """Compare a model that was made of the files; raises UnfitError. `stored` as for `check`."""
        model = model.to(self.loaded.model.device).eval()
        logits = model(input_ids=self.ids, use_cache=False).logits
        half = self.ids.shape[1] // 2
        first = model(input_ids=self.ids[:, :half], use_cache=True)
        cache = getattr(first, "past_key_values", None)
        second = None
        if cache is not None:
            second = model(input_ids=self.ids[:, half:], past_key_values=cache, use_cache=True).logits
        eps = max(torch.finfo(dtype).eps for dtype in (self.loaded.model.dtype, stored) if dtype is not None)
        allowed = max(4 * eps, 1e-4)
        self._compare(logits, self.logits, allowed, "the logits of what was written")
        if second is not None:
            self._compare(second, self.logits[:, half:], CACHE_SLACK * allowed, "with a cache its logits")

    def _compare(self, logits: Tensor, expected: Tensor, allowed: float, what: str) -> None:
        difference = torch.linalg.vector_norm(_on_cpu(logits) - expected) / torch.linalg.vector_norm(expected)
        _log.info("%s differ from the searched student's by %.1e of their size", what, difference)
        if not difference <= allowed:
            raise UnfitError(
                f"{what} differ from the searched student's by {difference:.1e} of their size, expected {allowed:.0e}"
            )


def _on_cpu(logits: Tensor) -> Tensor:
    return logits.detach().to("cpu", torch.float32)


@contextmanager
def unfit_if(what: str) -> Iterator[None]:
    """What a model's code raises is a reason against this form; what the operating system says is not."""
    try:
        yield
    except UnfitError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ModelError("too little memory to load what was written beside the model; leave out verifying") from error
    except Exception as error:  # a model's own code may raise anything
        if os_message(error) is not None:
            raise
        raise UnfitError(f"{what}: {one_line(error)}") from error


@contextmanager
def without_bars() -> Iterator[None]:
    """No progress bars of transformers while inside."""
    enabled = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            hf_logging.enable_progress_bar()
