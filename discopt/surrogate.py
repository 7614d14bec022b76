"""A model of the loss, learned from profiles that were measured: a Gaussian process over levels.

Two profiles are as alike as their units' levels are on average, s = mean_i exp(-|x_i - x'_i| / l), and the covariance
is a function of s alone. With s + r s² the process is a sum of effects of single units and of pairs of units, as in
BOCS (Baptista and Poloczek, ICML 2018, arXiv 1806.08838); with exp((s - 1) / θ) it is a product over the units, as in
CASMOPOLITAN (Wan et al., ICML 2021, arXiv 2102.07188). Which of them, the data's likelihood decides. Draws from the
posterior are made by Matheron's rule (Wilson et al., ICML 2020, arXiv 2002.09309) from random effects of single units.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from discopt.factor import BlockFactor, cholesky, solved
from discopt.space import Levels, SearchSpace

Floats = NDArray[np.float64]
Features = NDArray[np.float32]
Rows = NDArray[np.intp]

CONSTANT = 10.0  # prior variance of the mean, over that of the loss
GROUP = 10.0  # prior variance of the error that a group of losses shares, once these are standardised
LIKELIHOOD_ROWS = 250  # that the likelihood is computed on, at most
NOISY_ROWS = 600  # the same where losses have errors, so that each says less
ENOUGH = 200  # losses with errors, from which on the scale is fitted together with them


@dataclass(frozen=True)
class Covariance:
    """Covariance of two profiles as a function of how alike they are, s in [0, 1], and its derivative."""

    name: str
    parameter: float

    def __call__(self, s: NDArray[np.floating]) -> NDArray[np.floating]:
        if self.name == PAIRS:
            return s * (1 + self.parameter * s)
        return np.exp((s - 1) / self.parameter)

    def slope(self, s: NDArray[np.floating]) -> NDArray[np.floating]:
        if self.name == PAIRS:
            return 1 + 2 * self.parameter * s
        return np.exp((s - 1) / self.parameter) / self.parameter


PAIRS, PRODUCT = "pairs", "product"
COVARIANCES = (
    *(Covariance(PAIRS, r) for r in (0.0, 0.3, 1.0, 3.0, 10.0, 30.0)),
    *(Covariance(PRODUCT, theta) for theta in (0.05, 0.1, 0.2, 0.4)),
)
DOUBT = 3.0  # see Shape
LENGTHS = (0.5, 2.0, 8.0)  # steps between levels after which they are alike by 1/e
SLACKS = (0.0, 0.03, 0.1, 0.3)  # standard deviation of what the model may miss, over a loss's distance from the best
SPREADS = np.array([0.0, 1.0, 0.5, 2.0])  # of the draws in turn, over the temperature
SCALES = 10.0 ** np.arange(-1.5, 3.1, 0.5)  # of the loss, where its measurements have errors
TRUST = 0.25  # prior variance of the factor to the given prior, whose mean is 1
LEAST_SCALE = 1e-6  # at which that variance stops growing, lest it drown all else
NOISES = (1e-4, 1e-3, 1e-2, 1e-1)  # variance of what the covariance cannot explain, over that of the loss


@dataclass(frozen=True)
class Shape:
    """What the likelihood decides: the covariance, what it leaves unexplained, and its scale."""

    covariance: Covariance
    noise: float
    scale: float  # variance of the standardised loss
    slack: float = 0.0  # one of SLACKS
    length: float = 2.0  # one of LENGTHS
    doubt: float = 0.0  # standard errors that a loss may be above the lowest by chance, 0 or DOUBT

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        return cls(**{**values, "covariance": Covariance(**values["covariance"])})


class Posterior:
    """What is known of the loss from the profiles that were measured; more are added at little cost.

    A row that is added costs one pass over the Cholesky factor. The scale of the losses stays that of the profiles
    that it began with.
    """

    def __init__(
        self,
        space: SearchSpace,
        shape: Shape,
        profiles: Levels,
        losses: Floats,
        variances: Floats,
        groups: Rows | None = None,
        prior: Floats | None = None,
    ) -> None:
        """From profiles (N, n), losses (N,) and the variances of their errors (N,).

        Losses of one of the `groups` (N,), but -1, share an unknown error. `prior` (n, m) is what each level is thought
        to add to the loss, up to a factor that is learned as well.
        """
        self.shape = shape
        self.levels = level_features(space.n, space.m, shape.length)
        self.lowest = float(losses.min())
        self.mean, self.deviation = standard(losses)
        self.prior = None if prior is None else _centred(prior, profiles[_better(losses)]) / self.deviation
        self._trust = TRUST / max(shape.scale, LEAST_SCALE)
        self.features: Features = np.empty((0, self.levels.shape[0] * space.n), dtype=np.float32)  # (N, n m)
        self._expected, self._target, self._noise = np.empty(0), np.empty(0), np.empty(0)  # (N,) each
        self._groups = np.empty(0, dtype=np.intp)
        self._factor = BlockFactor()
        self.add(profiles, losses, variances, groups)

    def add(self, profiles: Levels, losses: Floats, variances: Floats, groups: Rows | None = None) -> None:
        """Take in profiles (k, n) with losses (k,), variances (k,) and groups (k,)."""
        groups = np.full(len(losses), -1) if groups is None else groups
        features = _features(profiles, self.levels)
        expected = np.zeros(len(losses)) if self.prior is None else _expected(self.prior, profiles)
        missed = self.shape.slack * _above(losses, variances, self.lowest, self.shape.doubt) / self.deviation
        noise = self.shape.noise + missed**2 + variances / self.deviation**2 / self.shape.scale
        own = self._covariance(features, expected, features, expected) + self._shared(groups, groups)
        own[np.diag_indices_from(own)] += noise
        known = self._covariance(self.features, self._expected, features, expected)
        known += self._shared(self._groups, groups)
        self._factor.add(known, own)
        self.features = np.concatenate([self.features, features])
        self._expected = np.append(self._expected, expected)
        self._target = np.append(self._target, (losses - self.mean) / self.deviation)
        self._noise = np.append(self._noise, noise)
        self._groups = np.append(self._groups, groups)

    def draw(self, draws: int, temperature: float, rng: np.random.Generator) -> Surrogate:
        """So many draws from what is known, the first of them the mean; `temperature` scales the others' errors."""
        spread = temperature * min(1.0, np.sqrt(self.shape.scale))
        spread = spread * SPREADS[np.arange(draws) % len(SPREADS), None]
        linear = spread * rng.standard_normal((draws, self.features.shape[1]))
        drawn = linear @ self.features.T + spread * np.sqrt(self._noise) * rng.standard_normal(
            (draws, len(self._noise))
        )
        number, row = np.unique(self._groups, return_inverse=True)
        shared = spread * np.sqrt(GROUP / self.shape.scale) * rng.standard_normal((draws, len(number)))
        drawn += shared[:, row] * (self._groups >= 0)
        weight = self._factor.solve((self._target - self._expected - drawn).T).T
        return Surrogate(
            features=self.features,
            levels=self.levels,
            covariance=self.shape.covariance,
            weight=weight.astype(np.float32),
            linear=linear.astype(np.float32),
            mean=self.mean,
            deviation=self.deviation,
            prior=self.prior,
            trust=1 + self._trust * (weight @ self._expected),
        )

    def joint(self, profiles: Levels) -> tuple[Floats, Floats]:
        """Means and covariance of the losses of profiles (k, n): (k,), (k, k)."""
        features = _features(profiles, self.levels)
        expected = np.zeros(len(profiles)) if self.prior is None else _expected(self.prior, profiles)
        known = self._covariance(self.features, self._expected, features, expected)  # (N, k)
        half = self._factor.halved(np.column_stack([known, self._target - self._expected]))
        mean = self.mean + self.deviation * (expected + half[:, :-1].T @ half[:, -1])
        left = self._covariance(features, expected, features, expected) - half[:, :-1].T @ half[:, :-1]
        return mean, self.deviation**2 * self.shape.scale * left

    def _covariance(self, one: Features, of_one: Floats, other: Features, of_other: Floats) -> Floats:
        """Of rows with features and sums of the prior (a, n m), (a,) and others (b, n m), (b,): (a, b)."""
        alike = one.astype(np.float64) @ other.astype(np.float64).T
        return self.shape.covariance(alike) + CONSTANT + self._trust * np.multiply.outer(of_one, of_other)

    def _shared(self, one: Rows, other: Rows) -> Floats:
        """Covariance of the errors that groups share: (a,), (b,) -> (a, b)."""
        return _shared(one, other) / self.shape.scale


@dataclass(frozen=True, eq=False)
class Surrogate:
    """Draws from what is known of the loss after some profiles were measured; number 0 is the mean."""

    features: Features  # (N, n m) of the measured profiles
    levels: Features  # (m, m) features of each level
    covariance: Covariance
    weight: Features  # (draws, N)
    linear: Features  # (draws, n m) random effects of single units
    mean: float
    deviation: float
    prior: Floats | None  # (n, m) what a level is thought to add to the standardised loss
    trust: Floats  # (draws,) in the prior: the factor to it

    def values(self, profiles: Levels, draw: NDArray[np.intp]) -> Floats:
        """What each profile loses by its draw: (k, n), (k,) -> (k,)."""
        features = _features(profiles, self.levels)
        known = self.covariance(features @ self.features.T)  # (k, N)
        value = np.einsum("kt,kt->k", known, self.weight[draw])
        value += np.einsum("kf,kf->k", features, self.linear[draw])
        constant = CONSTANT * self.weight.sum(axis=1)[draw]
        total = (value + constant).astype(np.float64)
        if self.prior is not None:
            total += self.trust[draw] * _expected(self.prior, profiles)
        return self.mean + self.deviation * total

    def gains(self, profiles: Levels, draw: NDArray[np.intp]) -> Floats:
        """What putting one unit to another level adds to the loss, to first order: (k, n), (k,) -> (k, n, m)."""
        k, n = profiles.shape
        features = _features(profiles, self.levels)
        slope = self.covariance.slope(features @ self.features.T) * self.weight[draw]  # (k, N)
        direction = (slope @ self.features + self.linear[draw]).reshape(k, n, -1)
        effect = (direction @ self.levels.T).astype(np.float64)  # (k, n, m)
        if self.prior is not None:
            effect += self.trust[draw, None, None] * self.prior
        here = np.take_along_axis(effect, profiles[:, :, None].astype(np.intp), axis=2)
        return self.deviation * (effect - here)


def best_shape(
    space: SearchSpace,
    profiles: Levels,
    losses: Floats,
    variances: Floats,
    groups: Rows | None = None,
    prior: Floats | None = None,
    near: Shape | None = None,
) -> Shape:
    """The shape under which the losses (N,) of profiles (N, n), beyond the prior (n, m), are likeliest.

    Found by coordinate ascent, from `near` on.
    """
    noisy = bool(variances.any()) and len(losses) >= ENOUGH
    rows = slice(0, NOISY_ROWS if noisy else LIKELIHOOD_ROWS)
    profiles, losses, variances = profiles[rows], losses[rows], variances[rows]
    mean, deviation = standard(losses)
    target = (losses - mean - (0.0 if prior is None else _expected(prior, profiles))) / deviation
    target -= target.mean()
    doubt = DOUBT if noisy else 0.0
    above = _above(losses, variances, losses.min(), doubt) / deviation
    shared = 0.0 if groups is None else _shared(groups[rows], groups[rows])
    alike: dict[float, Floats] = {}
    # Without errors, or too little to tell them apart from effects, the likeliest scale follows from the rest.
    scales: list[dict[str, Any]] = [{"scale": float(scale)} for scale in SCALES] if noisy else []
    shape, best = near or Shape(Covariance(PAIRS, 1.0), NOISES[0], 1.0, SLACKS[-1]), -np.inf
    shape = replace(shape, doubt=doubt)
    for options in (
        scales,
        [{"covariance": c, "slack": slack} for c in COVARIANCES for slack in SLACKS],
        scales,
        [{"length": length} for length in LENGTHS if space.m > 2],
        [{"noise": noise, "slack": slack} for noise in NOISES for slack in SLACKS],
        scales,
    ):
        for option in options:
            tried = replace(shape, **option)
            if tried.length not in alike:
                features = _features(profiles, level_features(space.n, space.m, tried.length)).astype(np.float64)
                alike[tried.length] = features @ features.T
            unit = tried.scale if noisy else 1.0  # of the variances; 1 is a guess, where little is known
            noise = tried.noise + (tried.slack * above) ** 2 + variances / deviation**2 / unit
            known = np.asarray(tried.covariance(alike[tried.length]) + CONSTANT + shared / unit)
            likelihood, scale = _likelihood(known, noise, target, tried.scale if noisy else None)
            if likelihood > best:
                best, shape = likelihood, replace(tried, scale=scale)
    return shape


def _likelihood(covariance: Floats, noise: Floats, target: Floats, scale: float | None) -> tuple[float, float]:
    """Logarithm of the likelihood, but for a constant, and the scale: that given, or the likeliest."""
    factor = cholesky(covariance + np.diag(noise))
    square = float((solved(factor, target[:, None]) ** 2).mean())
    scale = max(square, 1e-12) if scale is None else scale
    likelihood = -0.5 * len(target) * (np.log(scale) + square / scale) - np.log(np.diag(factor)).sum()
    return float(likelihood), scale


def _above(losses: Floats, variances: Floats, lowest: float, doubt: float) -> Floats:
    """How much higher than the lowest losses (N,) are, beyond so many standard errors: (N,)."""
    return np.maximum(losses - lowest - doubt * np.sqrt(variances), 0.0)


def _shared(one: Rows, other: Rows) -> Floats:
    """Covariance of the errors that groups share: (a,), (b,) -> (a, b)."""
    return GROUP * ((one[:, None] == other) & (other >= 0))


def _centred(prior: Floats, profiles: Levels) -> Floats:
    """The prior less each unit's mean over the profiles (k, n), as only differences count: (n, m) -> (n, m)."""
    return prior - prior[np.arange(len(prior)), profiles].mean(axis=0)[:, None]


def _expected(prior: Floats, profiles: Levels) -> Floats:
    """The prior's sum over the units: (n, m), (k, n) -> (k,)."""
    total: Floats = prior[np.arange(len(prior)), profiles].sum(axis=1)
    return total


def standard(losses: Floats) -> tuple[float, float]:
    """Mean and standard deviation (1 where there is none) of the better quarter of losses (N,)."""
    better = losses[_better(losses)]
    return float(better.mean()), float(better.std()) or 1.0


def _better(losses: Floats) -> NDArray[np.intp]:
    """The rows of the better quarter of losses (N,), best first."""
    return np.argsort(losses, kind="stable")[: max(4, len(losses) // 4)]


def level_features(n: int, m: int, length: float = 2.0) -> Features:
    """Features of a level (m, m), whose products are how alike two levels are, over the number of units."""
    apart = np.abs(np.subtract.outer(np.arange(m), np.arange(m)))
    return (np.linalg.cholesky(np.exp(-apart / length)) / np.sqrt(n)).astype(np.float32)


def _features(profiles: Levels, levels: Features) -> Features:
    """(k, n) -> (k, n m)."""
    return levels[profiles].reshape(len(profiles), -1)
