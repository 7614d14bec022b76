"""How far a student is from its teacher, one value per position, from logits that exist only chunk by chunk.

The evaluator projects a chunk of positions of the teacher, lets each fitness make its target of it once, and then
asks for the values of one student after another. EvoPress, Section 3 ("Fitness Environment"), compares KL divergence
with perplexity and finds KL the better guide; its appendix does the same with KL over the teacher's top tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["KL", "Disagreement", "Fitness", "Logits", "Perplexity", "TopKKL", "TotalVariation", "fitness_by_name"]


@dataclass(frozen=True, eq=False)
class Logits:
    """One model's logits on a chunk of positions, and the tokens that really came next. Not to be changed in place."""

    values: Tensor  # (c, V) float32
    next_tokens: Tensor  # (c,) int64; at the end of a sequence there is none, and the value counts for nothing

    @cached_property
    def log_normaliser(self) -> Tensor:
        """log sum_v exp(values), (c,); computed once for all fitnesses that ask."""
        return torch.logsumexp(self.values, dim=-1)


class Fitness(Protocol):
    """A loss per position, lower is better; any object with these members will do.

    Both methods run in inference mode on the model's device, and should neither wait for it nor change what they get.
    """

    @property
    def name(self) -> str:
        """What tables and traces call it."""
        ...

    @property
    def predicts(self) -> bool:
        """Whether the values depend on `next_tokens`; if so the last position of each sequence is left out."""
        ...

    def target(self, teacher: Logits) -> Any:
        """What all students of a chunk share."""
        ...

    def losses(self, target: Any, student: Logits) -> Tensor:
        """Losses of one student at the chunk's positions: (c,) float32."""
        ...


@dataclass(frozen=True)
class KL:
    """KL(teacher || student) over the whole vocabulary, nats per token: sum_v p_v (log p_v - log q_v)."""

    @property
    def name(self) -> str:
        return "kl"

    @property
    def predicts(self) -> bool:
        return False

    def target(self, teacher: Logits) -> tuple[Logits, Tensor]:
        """The teacher's logits and probabilities, both (c, V)."""
        return teacher, _probabilities(teacher)

    def losses(self, target: tuple[Logits, Tensor], student: Logits) -> Tensor:
        teacher, p = target
        # The difference comes before the sum: where teacher and student are close, nothing large cancels.
        difference: Tensor = torch.linalg.vecdot(p, teacher.values - student.values)
        return difference + (student.log_normaliser - teacher.log_normaliser)


@dataclass(frozen=True)
class TopKKL:
    """KL(teacher || student) over the k tokens the teacher finds likeliest, nats per token.

    Teacher and student are both renormalised over these k tokens, so that what is compared are two distributions.
    EvoPress finds it close to full KL for k >= 512.
    """

    k: int = 512

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")

    @property
    def name(self) -> str:
        return f"kl-topk:{self.k}"

    @property
    def predicts(self) -> bool:
        return False

    def target(self, teacher: Logits) -> tuple[Tensor, Tensor]:
        """The top tokens and the teacher's log-probabilities of them, both (c, min(k, V))."""
        values, tokens = teacher.values.topk(min(self.k, teacher.values.shape[-1]), dim=-1, sorted=False)
        return tokens, values.log_softmax(dim=-1)

    def losses(self, target: tuple[Tensor, Tensor], student: Logits) -> Tensor:
        tokens, log_p = target
        log_q = student.values.gather(-1, tokens).log_softmax(dim=-1)
        return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


@dataclass(frozen=True)
class Perplexity:
    """Negative log-likelihood of the token that came next, nats; perplexity is exp of its mean."""

    @property
    def name(self) -> str:
        return "ppl"

    @property
    def predicts(self) -> bool:
        return True

    def target(self, teacher: Logits) -> None:
        """Nothing: the teacher is the text."""

    def losses(self, target: None, student: Logits) -> Tensor:
        return student.log_normaliser - student.values.gather(-1, student.next_tokens[:, None]).squeeze(-1)


@dataclass(frozen=True)
class TotalVariation:
    """Total variation distance of the two distributions over the next token, in [0, 1]: sum_v |p_v - q_v| / 2."""

    @property
    def name(self) -> str:
        return "tv"

    @property
    def predicts(self) -> bool:
        return False

    def target(self, teacher: Logits) -> Tensor:
        """The teacher's probabilities, (c, V)."""
        return _probabilities(teacher)

    def losses(self, target: Tensor, student: Logits) -> Tensor:
        return _probabilities(student).sub_(target).abs_().sum(dim=-1) / 2


@dataclass(frozen=True)
class Disagreement:
    """1 where student and teacher find different tokens likeliest, else 0; top-1 agreement is 1 minus its mean."""

    @property
    def name(self) -> str:
        return "disagreement"

    @property
    def predicts(self) -> bool:
        return False

    def target(self, teacher: Logits) -> Tensor:
        """The teacher's likeliest tokens, (c,)."""
        return teacher.values.argmax(dim=-1)

    def losses(self, target: Tensor, student: Logits) -> Tensor:
        return (student.values.argmax(dim=-1) != target).float()


def fitness_by_name(name: str) -> Fitness:
    """The fitness called `kl`, `kl-topk`, `kl-topk:K`, `ppl` or `tv`; raises ValueError for any other name."""
    kind, colon, k = name.partition(":")
    if kind == "kl-topk" and (k.isdecimal() or not colon):
        return TopKKL(int(k)) if colon else TopKKL()
    by_name: dict[str, Fitness] = {"kl": KL(), "ppl": Perplexity(), "tv": TotalVariation()}
    if name not in by_name:
        raise ValueError(f"expected a fitness of kl, kl-topk, kl-topk:K, ppl, tv, got {name!r}")
    return by_name[name]


def _probabilities(logits: Logits) -> Tensor:
    return (logits.values - logits.log_normaliser[:, None]).exp_()
