"""The statistics of a comparison, on arrays of gaps; lower is better.

gap = (loss - reference) / (random - reference), where `random` is the median noise-free loss of random profiles that
spend the budget: 0 at the reference, 1 at a random profile. It is +inf where a run had no feasible profile yet or
failed, and NaN where an algorithm does not apply to a problem.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Gaps = NDArray[np.float64]

ALPHA = 0.05  # of all tests
EXACT_PAIRS = 12  # up to so many, the signed-rank test looks at all signs; SciPy does so too, but slowly with ties
DIGITS = 9  # gaps that agree to so many decimals are ties


def normalised(loss: ArrayLike, reference: float, random: float) -> Gaps:
    """Gaps of losses, any shape; where random profiles are no worse than the reference, the differences themselves."""
    scale = random - reference
    gap = (np.asarray(loss, dtype=np.float64) - reference) / (scale if scale > 0 else 1.0)
    return np.maximum(gap.round(DIGITS), 0.0)


def quartiles(gaps: Gaps) -> tuple[Gaps, Gaps, Gaps]:
    """Lower quartile, median and upper quartile over the first axis; the quartiles are gaps that were observed."""
    with np.errstate(invalid="ignore"):  # NaN stays NaN
        low, high = np.quantile(gaps, [0.25, 0.75], axis=0, method="inverted_cdf")
        return low, np.median(gaps, axis=0), high


def success_rate(gaps: Gaps, tolerance: float) -> Gaps:
    """Share of the runs along the first axis with a gap of at most the tolerance; NaN where there is a NaN."""
    share = (gaps <= tolerance).mean(axis=0)
    return np.where(np.isnan(gaps).any(axis=0), np.nan, share)


def first_hits(gaps: Gaps, points: ArrayLike, target: float) -> Gaps:
    """What each run had spent when its gap first was no higher than the target: (s, t), (t,) -> (s,); inf if never."""
    hit = gaps <= target
    return np.where(hit.any(axis=1), np.asarray(points, dtype=np.float64)[hit.argmax(axis=1)], np.inf)


def expected_running_time(gaps: Gaps, points: Sequence[int], target: float) -> float:
    """What it takes on average to reach the target when runs are repeated until one does: (s, t), (t,) -> number.

    All that the runs spent, until they hit it or to the end, over the number of those that did (Hansen et al., COCO);
    inf if none did.
    """
    hits = first_hits(gaps, points, target)
    succeeded = np.isfinite(hits)
    return float(np.where(succeeded, hits, points[-1]).sum() / succeeded.sum()) if succeeded.any() else math.inf


@dataclass(frozen=True, eq=False)
class Ranking:
    """Average ranks of a algorithms over p problems, 1 is best."""

    ranks: Gaps  # (a,)
    statistic: float  # Friedman's
    p: float  # that the ranks differ by chance alone
    critical_difference: float  # Nemenyi's: average ranks further apart differ at `ALPHA`


def rank(medians: Gaps) -> Ranking:
    """Ranks by median gaps, (p, a) without NaN, ties shared; p is NaN with fewer than 2 problems or 3 algorithms.

    Demsar, "Statistical comparisons of classifiers over multiple data sets", JMLR 2006.
    """
    p, a = medians.shape
    ranks = stats.rankdata(medians, axis=1).mean(axis=0)
    if p < 2 or a < 3:
        return Ranking(ranks, math.nan, math.nan, math.nan)
    q = float(stats.studentized_range.ppf(1 - ALPHA, a, np.inf)) / math.sqrt(2)
    critical = q * math.sqrt(a * (a + 1) / (6 * p))
    if (medians == medians[:, :1]).all():  # nothing but ties
        return Ranking(ranks, 0.0, 1.0, critical)
    statistic, probability = stats.friedmanchisquare(*medians.T)
    return Ranking(ranks, float(statistic), float(probability), critical)


def signed_rank(first: Gaps, second: Gaps) -> float:
    """p that pairs differ by chance alone, two-sided Wilcoxon signed-rank test: (k,), (k,) -> p.

    Pairs that tie count half for either side. A gap of +inf is worse than any other and ties with itself.
    """
    finite = np.concatenate([first, second])
    finite = finite[np.isfinite(finite)]
    worst = 2 * float(finite.max(initial=0.0)) + 1  # differences to it rank above all others
    difference = np.where(np.isinf(first), worst, first) - np.where(np.isinf(second), worst, second)
    difference = difference.round(DIGITS)
    if not difference.any():
        return 1.0
    if len(difference) > EXACT_PAIRS:
        return float(stats.wilcoxon(difference, zero_method="zsplit").pvalue)
    ranks = np.where(difference == 0, 0.0, stats.rankdata(np.abs(difference)))  # zeros give both sides the same
    flips = 1 - 2 * ((np.arange(2 ** len(ranks))[:, None] >> np.arange(len(ranks))) & 1)  # all ways it could have come
    observed = abs(float(np.sign(difference) @ ranks))
    return float((np.abs(flips @ ranks) >= observed - 1e-9).mean())


def holm(p: Sequence[float]) -> list[float]:
    """Holm's correction of p values for testing all of them, in the same order."""
    corrected = [0.0] * len(p)
    highest = 0.0
    for position, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (len(p) - position) * p[index]))
        corrected[index] = highest
    return corrected


def cliques(ranks: Sequence[float], critical_difference: float) -> list[tuple[float, float]]:
    """The widest stretches of average ranks within a critical difference that hold two ranks or more."""
    ordered = sorted(ranks)
    found: list[tuple[float, float]] = []
    for i, low in enumerate(ordered):
        high = max(rank for rank in ordered if rank - low <= critical_difference)
        if len([rank for rank in ordered[i:] if rank <= high]) > 1 and (not found or high > found[-1][1]):
            found.append((low, high))
    return found
