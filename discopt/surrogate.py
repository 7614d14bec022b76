"""A model of the loss, learned from profiles that were measured: a Gaussian process over levels.

Two profiles are as alike as their units' levels are on average, s = mean_i exp(-|x_i - x'_i| / 2), and the covariance
is a function of s alone. With s + r s² the process is a sum of effects of single units and of pairs of units, as in
BOCS (Baptista and Poloczek, ICML 2018, arXiv 1806.08838); with exp((s - 1) / θ) it is a product over the units, as in
CASMOPOLITAN (Wan et al., ICML 2021, arXiv 2102.07188). Which of them, the data's likelihood decides. Draws from the
posterior are made by Matheron's rule (Wilson et al., ICML 2020, arXiv 2002.09309) from random effects of single units.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from discopt.space import Levels, SearchSpace

Floats = NDArray[np.float64]
Features = NDArray[np.float32]

LENGTH = 2.0  # steps between levels after which they are alike by 1/e
CONSTANT = 10.0  # prior variance of the mean, over that of the loss
LIKELIHOOD_ROWS = 250  # that the likelihood is computed on, at most


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
    *(Covariance(PAIRS, r) for r in (0.0, 0.3, 1.0, 3.0, 10.0)),
    *(Covariance(PRODUCT, theta) for theta in (0.05, 0.15, 0.4)),
)
SPREADS = np.array([0.0, 1.0, 0.5, 2.0])  # of the draws in turn, over the temperature
SLACK = 0.3  # standard deviation of what the model may be wrong by, over a loss's distance from the best
TRUST = 0.25  # prior variance of the factor to the given prior, whose mean is 1
LEAST_SCALE = 1e-6  # at which that variance stops growing, lest it drown all else
NOISES = (1e-4, 1e-3, 1e-2, 1e-1)  # variance of what the covariance cannot explain, over that of the loss


@dataclass(frozen=True)
class Shape:
    """What the likelihood decides: the covariance, what it leaves unexplained, and its scale."""

    covariance: Covariance
    noise: float
    scale: float  # variance of the standardised loss

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        return cls(**{**values, "covariance": Covariance(**values["covariance"])})


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

    @classmethod
    def fit(
        cls,
        space: SearchSpace,
        profiles: Levels,
        losses: Floats,
        variances: Floats,
        shape: Shape,
        draws: int,
        temperature: float,
        rng: np.random.Generator,
        prior: Floats | None = None,
    ) -> Self:
        """From profiles (N, n), losses (N,) and the variances of their errors (N,); `temperature` scales the draws.

        `prior` (n, m) is what each level is thought to add to the loss, up to a factor that is learned as well.
        """
        from scipy.linalg import cho_solve, cholesky

        levels = level_features(space.n, space.m)
        features = _features(profiles, levels)
        mean, deviation = standard(losses)
        target = (losses - mean) / deviation
        variances = _slackened(losses, variances)
        noise = shape.noise + variances / deviation**2 / shape.scale
        alike = (features @ features.T).astype(np.float64)
        covariance = shape.covariance(alike) + CONSTANT
        scaled = None if prior is None else _centred(prior, profiles[_better(losses)]) / deviation
        expected = np.zeros(len(target)) if scaled is None else _expected(scaled, profiles)
        trust = TRUST / max(shape.scale, LEAST_SCALE)
        covariance += trust * np.multiply.outer(expected, expected)
        covariance[np.diag_indices_from(covariance)] += noise
        factor = cholesky(covariance, lower=True, overwrite_a=True, check_finite=False)
        spread = temperature * min(1.0, np.sqrt(shape.scale))
        spread = spread * SPREADS[np.arange(draws) % len(SPREADS), None]
        linear = spread * rng.standard_normal((draws, features.shape[1]))
        drawn = linear @ features.T + spread * np.sqrt(noise) * rng.standard_normal((draws, len(target)))
        weight = cho_solve((factor, True), (target - expected - drawn).T, check_finite=False).T
        return cls(
            features=features,
            levels=levels,
            covariance=shape.covariance,
            weight=weight.astype(np.float32),
            linear=linear.astype(np.float32),
            mean=mean,
            deviation=deviation,
            prior=scaled,
            trust=1 + trust * (weight @ expected),
        )

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
    space: SearchSpace, profiles: Levels, losses: Floats, variances: Floats, prior: Floats | None = None
) -> Shape:
    """The shape under which the losses (N,) of profiles (N, n), beyond the prior (n, m), are likeliest."""
    from scipy.linalg import cholesky, solve_triangular

    rows = slice(0, LIKELIHOOD_ROWS)
    variances = _slackened(losses[rows], variances[rows])
    features = _features(profiles[rows], level_features(space.n, space.m))
    mean, deviation = standard(losses[rows])
    target = (losses[rows] - mean - (0.0 if prior is None else _expected(prior, profiles[rows]))) / deviation
    target -= target.mean()
    alike = (features @ features.T).astype(np.float64)
    diagonal = np.diag_indices_from(alike)
    found: list[tuple[float, Shape]] = []
    for covariance in COVARIANCES:
        for noise in NOISES:
            matrix = covariance(alike) + CONSTANT
            matrix[diagonal] += noise + variances / deviation**2
            factor = cholesky(matrix, lower=True, overwrite_a=True, check_finite=False)
            scale = float((solve_triangular(factor, target, lower=True, check_finite=False) ** 2).mean())
            likelihood = -0.5 * len(target) * np.log(max(scale, 1e-12)) - np.log(np.diag(factor)).sum()
            found.append((float(likelihood), Shape(covariance, noise, max(scale, 1e-12))))
    return max(found, key=lambda one: one[0])[1]


def _centred(prior: Floats, profiles: Levels) -> Floats:
    """The prior less each unit's mean over the profiles (k, n), as only differences count: (n, m) -> (n, m)."""
    return prior - prior[np.arange(len(prior)), profiles].mean(axis=0)[:, None]


def _expected(prior: Floats, profiles: Levels) -> Floats:
    """The prior's sum over the units: (n, m), (k, n) -> (k,)."""
    total: Floats = prior[np.arange(len(prior)), profiles].sum(axis=1)
    return total


def _slackened(losses: Floats, variances: Floats) -> Floats:
    """Variances (N,) with what the model may be wrong by: it is to tell the good profiles apart, not the bad."""
    return variances + (SLACK * (losses - losses.min())) ** 2


def standard(losses: Floats) -> tuple[float, float]:
    """Mean and standard deviation (1 where there is none) of the better quarter of losses (N,)."""
    better = losses[_better(losses)]
    return float(better.mean()), float(better.std()) or 1.0


def _better(losses: Floats) -> NDArray[np.intp]:
    """The rows of the better quarter of losses (N,), best first."""
    return np.argsort(losses, kind="stable")[: max(4, len(losses) // 4)]


def level_features(n: int, m: int) -> Features:
    """Features of a level (m, m), whose products are how alike two levels are, over the number of units."""
    apart = np.abs(np.subtract.outer(np.arange(m), np.arange(m)))
    return (np.linalg.cholesky(np.exp(-apart / LENGTH)) / np.sqrt(n)).astype(np.float32)


def _features(profiles: Levels, levels: Features) -> Features:
    """(k, n) -> (k, n m)."""
    return levels[profiles].reshape(len(profiles), -1)
