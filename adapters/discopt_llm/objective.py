"""The loss of compressed models as an objective of the engine: a population, measured on calibration text."""

from __future__ import annotations

from dataclasses import dataclass

from discopt.objective import Losses, Query
from discopt_llm.calibration import Calibration
from discopt_llm.evaluator import Measurer
from discopt_llm.fitness import Fitness

__all__ = ["CompressionObjective"]


@dataclass(frozen=True, eq=False)
class CompressionObjective:
    """Fitness of students on the sample of calibration text that fidelity (tokens) and seed draw.

    Fresh queries are answered from `reserved` text, where there is some.
    """

    evaluator: Measurer
    calibration: Calibration
    fitness: Fitness
    reserved: Calibration | None = None

    def evaluate(self, query: Query) -> Losses:
        """Losses of all rows on each sequence of the sample, (k, s), lower is better; see `Evaluator.measure`."""
        text = self.reserved if query.fresh and self.reserved is not None else self.calibration
        sequences = text.sample(query.fidelity, query.seed)
        (losses,) = self.evaluator.measure(query.population, sequences, [self.fitness])
        return losses
