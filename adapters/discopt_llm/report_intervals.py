"""Confidence intervals of what students lose on held-out text: the bootstrap over sequences.

Sequences are drawn with replacement and the mean is taken anew; BCa corrects the interval for bias and skew (Efron,
1987). A student is compared with another on the same sequences, so that what makes a text hard cancels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["CONFIDENCE", "Interval", "mean_interval", "normal_interval"]

CONFIDENCE = 0.95
RESAMPLES = 9999
FEWEST = 3  # sequences; fewer say nothing of their spread
SEED = 0  # the same samples, the same report


@dataclass(frozen=True)
class Interval:
    """A mean and where it is likely to lie; the ends are NaN where that is unknown."""

    mean: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def verdict(self) -> str:
        """Of a difference in loss to another: whether the interval leaves out 0, and on which side it is."""
        if not math.isfinite(self.mean):
            return "not finite"
        if not self.known:
            return "too few sequences to tell"
        if self.low == self.high == 0:
            return "the same"
        return "better" if self.high < 0 else "worse" if self.low > 0 else "no difference"

    def exp(self) -> Interval:
        """Of e to the mean: from a negative log-likelihood to a perplexity."""
        return Interval(*(float(np.exp(min(value, 700.0))) for value in (self.mean, self.low, self.high)))


def mean_interval(values: NDArray[np.float64]) -> Interval:
    """The mean of values (s,) and its interval by the bootstrap; NaN throughout if one of them is not finite."""
    from scipy.stats import bootstrap

    if not np.isfinite(values).all():
        return Interval(math.nan, math.nan, math.nan)
    mean = float(values.mean())
    if len(values) < FEWEST:
        return Interval(mean, math.nan, math.nan)
    if np.ptp(values) == 0:  # nothing varies: the bootstrap has no width, and BCa is undefined
        return Interval(mean, mean, mean)
    found = bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, 2**22 // len(values)),
        confidence_level=CONFIDENCE,
        method="BCa",
        random_state=np.random.default_rng(SEED),  # called rng from SciPy 1.15 on, which takes either
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))


def normal_interval(mean: float | None, error: float | None) -> Interval:
    """From a mean and its standard error alone: what there is of runs that have not kept their samples."""
    if mean is None:
        return Interval(math.nan, math.nan, math.nan)
    half = math.nan if error is None else 1.96 * error
    return Interval(mean, mean - half, mean + half)
