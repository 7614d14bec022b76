"""The model of the loss: against a Gaussian process written out in float64, and against functions it should learn."""

from __future__ import annotations

import json

import numpy as np
import pytest

from discopt import SearchSpace, surrogate
from discopt.mutation import offspring
from discopt.surrogate import (
    CONSTANT,
    COVARIANCES,
    GROUP,
    SLACKS,
    TRUST,
    BlockFactor,
    Covariance,
    Posterior,
    Shape,
    Surrogate,
    best_shape,
    cholesky,
)

N, M = 20, 4
SPACE = SearchSpace.build(np.tile(np.arange(M), (N, 1)), 30)
UNITS = np.arange(N)
LINEAR, PAIRS, PRODUCT = Covariance("pairs", 0.0), Covariance("pairs", 3.0), Covariance("product", 0.15)


def table_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(N, M)).cumsum(axis=1)


def total(table: np.ndarray, profiles: np.ndarray) -> np.ndarray:
    return table[UNITS, profiles].sum(axis=1)


def interacting(profiles: np.ndarray) -> np.ndarray:
    pairs = np.random.default_rng(7).normal(size=(N, N))
    return total(table_of(1), profiles) + 0.2 * np.einsum("ki,ij,kj->k", profiles, pairs, profiles)


def fit(profiles, losses, shape=None, *, variances=None, draws=1, temperature=0.3, prior=None, seed=0) -> Surrogate:
    variances = np.zeros(len(losses)) if variances is None else variances
    shape = shape or best_shape(SPACE, profiles, losses, variances, prior=prior)
    rng = np.random.default_rng(seed)
    return Posterior(SPACE, shape, profiles, losses, variances, prior=prior).draw(draws, temperature, rng)


def mean_of(model: Surrogate, profiles: np.ndarray) -> np.ndarray:
    return model.values(profiles, np.zeros(len(profiles), dtype=np.intp))


def alikeness(one: np.ndarray, other: np.ndarray, length: float) -> np.ndarray:
    return np.exp(-np.abs(one[:, None, :] - other[None, :, :]) / length).mean(axis=2)


def dense(profiles, losses, variances, shape, queries, prior=None):
    """The same process in float64, from its textbook formula: the mean at the queries (q, n), (q,)."""
    better = np.argsort(losses)[: len(losses) // 4]
    mean, deviation = losses[better].mean(), losses[better].std()
    sums, at_queries = (np.zeros(len(x)) if prior is None else total(prior, x) for x in (profiles, queries))
    offset = sums[better].mean()
    sums, at_queries = (sums - offset) / deviation, (at_queries - offset) / deviation

    def covariance(one, other, of_one, of_other):
        return shape.scale * (shape.covariance(alikeness(one, other, shape.length)) + CONSTANT) + TRUST * np.outer(
            of_one, of_other
        )

    noise = np.diag(shape.scale * shape.noise + variances / deviation**2)
    known = covariance(profiles, profiles, sums, sums) + noise
    weight = np.linalg.solve(known, (losses - mean) / deviation - sums)
    return mean + deviation * (at_queries + covariance(queries, profiles, at_queries, sums) @ weight)


@pytest.fixture(autouse=True)
def _as_certain_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """All profiles count alike here, the bad as much as the good, but where a test says otherwise."""
    monkeypatch.setattr(surrogate, "SLACKS", (0.0,))


@pytest.fixture(scope="module")
def profiles() -> np.ndarray:
    return SPACE.random(60, np.random.default_rng(0))


@pytest.fixture(scope="module")
def others() -> np.ndarray:
    return SPACE.random(200, np.random.default_rng(1))


@pytest.mark.parametrize("covariance", [LINEAR, PAIRS, PRODUCT])
def test_its_mean_is_that_of_the_process_written_out(covariance: Covariance, profiles, others) -> None:
    losses = interacting(profiles)
    variances = np.random.default_rng(2).uniform(0, 0.1, len(losses)) * losses.var()
    shape = Shape(covariance, 1e-2, 0.8)
    model = fit(profiles, losses, shape, variances=variances)
    expected = dense(profiles, losses, variances, shape, others)
    assert np.abs(mean_of(model, others) - expected).max() < 1e-3 * losses.std()


def test_with_a_prior_as_well(profiles, others) -> None:
    losses, prior = interacting(profiles), table_of(1) + np.arange(N)[:, None]
    shape, variances = Shape(PAIRS, 1e-2, 0.8), np.zeros(60)
    model = fit(profiles, losses, shape, prior=prior)
    expected = dense(profiles, losses, variances, shape, others, prior)
    assert np.abs(mean_of(model, others) - expected).max() < 1e-3 * losses.std()


def test_an_additive_loss_is_learned_from_fewer_profiles_than_it_has_effects(others) -> None:
    table = table_of(3)
    profiles = SPACE.random(40, np.random.default_rng(2))  # of 60 effects
    guess = mean_of(fit(profiles, total(table, profiles)), others)
    assert np.corrcoef(guess, total(table, others))[0, 1] > 0.7
    enough = SPACE.random(120, np.random.default_rng(2))
    guess = mean_of(fit(enough, total(table, enough)), others)
    assert np.abs(guess - total(table, others)).max() < 0.05 * total(table, others).std()


def test_what_was_measured_without_noise_is_predicted_as_it_was(profiles) -> None:
    losses = interacting(profiles)
    assert (
        np.abs(mean_of(fit(profiles, losses, Shape(PAIRS, 1e-4, 1.0)), profiles) - losses).max() < 0.05 * losses.std()
    )


@pytest.mark.parametrize(("loss", "pairs"), [(lambda x: total(table_of(1), x), False), (interacting, True)])
def test_pairs_are_in_the_shape_where_they_are_in_the_loss(loss, pairs) -> None:
    profiles = SPACE.random(250, np.random.default_rng(4))
    shape = best_shape(SPACE, profiles, loss(profiles), np.zeros(250))
    assert shape.covariance.name == "pairs"
    assert (shape.covariance.parameter > 0) == pairs


def test_what_is_random_is_taken_for_noise(profiles, others) -> None:
    losses = np.random.default_rng(5).normal(size=60)
    assert best_shape(SPACE, profiles, losses, np.zeros(60)).noise == 0.1
    additive = total(table_of(1), profiles)
    assert best_shape(SPACE, profiles, additive, np.zeros(60)).noise == 1e-4


def test_gains_of_a_linear_model_are_differences_of_its_values(profiles, others) -> None:
    model = fit(profiles, interacting(profiles), Shape(LINEAR, 1e-3, 1.0), draws=4, prior=table_of(2))
    draw = np.arange(4)
    gains = model.gains(others[:4], draw)
    for unit, level in ((0, 0), (3, 1), (11, 2), (19, 3)):
        moved = others[:4].copy()
        moved[:, unit] = level
        change = model.values(moved, draw) - model.values(others[:4], draw)
        np.testing.assert_allclose(gains[:, unit, level], change, atol=2e-4 * model.deviation)


@pytest.mark.parametrize("covariance", [PAIRS, PRODUCT])
def test_gains_of_other_models_rank_single_moves_as_their_values_do(covariance: Covariance, profiles, others) -> None:
    model = fit(profiles, interacting(profiles), Shape(covariance, 1e-3, 1.0))
    here = others[:1]
    gains = model.gains(here, np.zeros(1, dtype=np.intp))[0]
    moved = np.repeat(here, N * M, axis=0)
    moved[np.arange(N * M), np.repeat(UNITS, M)] = np.tile(np.arange(M), N)
    change = (mean_of(model, moved) - mean_of(model, here)).reshape(N, M)
    assert (gains[UNITS, here[0]] == 0).all()
    assert np.corrcoef(gains.ravel(), change.ravel())[0, 1] > 0.97
    large = np.abs(change) > np.median(np.abs(change))
    assert (np.sign(gains) == np.sign(change))[large].mean() > 0.95


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_the_slope_is_the_derivative(covariance: Covariance) -> None:
    s = np.linspace(0.1, 0.9, 9)
    difference = (covariance(s + 1e-6) - covariance(s - 1e-6)) / 2e-6
    np.testing.assert_allclose(covariance.slope(s), difference, rtol=1e-6)


def test_noisy_rows_count_for_less(profiles, others) -> None:
    losses = total(table_of(1), profiles)
    wrong = losses.copy()
    wrong[::2] += 5 * losses.std() * np.random.default_rng(6).normal(size=30)
    variances = np.where(np.arange(60) % 2, 0.0, 25 * losses.var())
    truth = total(table_of(1), others)

    def error(variances):
        return np.abs(mean_of(fit(profiles, wrong, variances=variances), others) - truth).mean()

    assert error(variances) < 0.7 * error(np.zeros(60))


def test_the_best_profiles_count_most(others, monkeypatch) -> None:
    table, rng = table_of(1), np.random.default_rng(12)

    def rugged(profiles):  # additive where it is good, a cliff where it is not
        sums = total(table, profiles)
        return sums + np.where(sums > np.median(total(table, others)), 100 * np.abs(np.sin(37 * sums)), 0.0)

    profiles = SPACE.random(120, rng)
    good = others[total(table, others) < np.median(total(table, others))]

    def likeness():
        return np.corrcoef(mean_of(fit(profiles, rugged(profiles)), good), rugged(good))[0, 1]

    alike = likeness()
    monkeypatch.setattr(surrogate, "SLACKS", SLACKS)
    assert likeness() > max(alike, 0.5)


def test_a_right_prior_makes_up_for_measurements(others) -> None:
    table = table_of(1)
    prior = table + 0.3 * np.random.default_rng(8).normal(size=table.shape)
    few = SPACE.random(10, np.random.default_rng(9))
    truth = total(table, others)
    without, given = (mean_of(fit(few, total(table, few), prior=p), others) for p in (None, prior))
    assert np.corrcoef(given, truth)[0, 1] > 0.9 > np.corrcoef(without, truth)[0, 1]


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_the_factor_to_the_prior_is_learned(factor: float) -> None:
    table = table_of(1)
    profiles = SPACE.random(100, np.random.default_rng(10))
    losses = factor * total(table, profiles) + 0.05 * interacting(profiles)
    model = fit(profiles, losses, prior=table)
    assert model.trust[0] == pytest.approx(factor, abs=0.15)


@pytest.mark.parametrize("offset", [1.0, 100.0])
def test_only_differences_of_the_prior_count(offset: float, others) -> None:
    few = SPACE.random(12, np.random.default_rng(11))
    losses, prior = interacting(few), table_of(1)
    plain, moved = (fit(few, losses, prior=p) for p in (prior, prior + offset))
    np.testing.assert_allclose(mean_of(moved, others), mean_of(plain, others), atol=1e-3 * losses.std())
    assert moved.trust[0] == pytest.approx(plain.trust[0], abs=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1.0, 100.0])
def test_a_prior_that_explains_all_is_kept(offset: float, profiles, others) -> None:
    table = table_of(1)
    model = fit(profiles, total(table, profiles), prior=table + offset)
    assert model.trust[0] == pytest.approx(1.0, abs=0.01)
    assert np.abs(mean_of(model, others) - total(table, others)).max() < 0.05 * total(table, others).std()


def test_draws_differ_most_where_least_was_measured(others) -> None:
    start = SPACE.nearest_uniform()
    near = np.repeat(start[None], 40, axis=0)
    near[np.arange(40), np.arange(40) % N] = np.arange(40) % M  # single changes of one profile
    near = np.unique(near, axis=0)
    draws = 200
    model = fit(near, interacting(near), draws=draws, temperature=1.0)

    def spread(rows):
        each = np.stack([model.values(np.repeat(row[None], draws, axis=0), np.arange(draws)) for row in rows])
        return each[:, 1:].std(axis=1).mean()

    assert spread(others[:20]) > 3 * spread(near[:20])


def test_without_temperature_every_draw_is_the_mean(profiles, others) -> None:
    model = fit(profiles, interacting(profiles), draws=3, temperature=0.0)
    rows = others[:3]
    np.testing.assert_allclose(model.values(rows, np.arange(3)), mean_of(model, rows), rtol=1e-5)


def test_the_first_of_hotter_draws_is_still_the_mean(profiles, others) -> None:
    losses = interacting(profiles)
    cold, hot = (fit(profiles, losses, draws=8, temperature=t) for t in (0.0, 1.0))
    np.testing.assert_allclose(mean_of(hot, others), mean_of(cold, others), rtol=1e-5)


@pytest.mark.parametrize("shape", [Shape(PAIRS, 1e-3, 0.8), Shape(PRODUCT, 1e-2, 1.2, slack=0.1, length=8.0)])
def test_profiles_added_one_after_the_other_are_known_as_well(shape: Shape, profiles, others) -> None:
    losses, prior = interacting(profiles), table_of(2)
    variances, groups = np.linspace(0, 0.1, 60) * losses.var(), np.arange(60) // 7 - 1
    first = np.argsort(losses)[:30]  # with the best among them, by which the losses are scaled
    rest = np.setdiff1d(np.arange(60), first)
    grown = Posterior(SPACE, shape, profiles[first], losses[first], variances[first], groups[first], prior)
    for part in (rest[:1], rest[1:20], rest[20:]):
        grown.add(profiles[part], losses[part], variances[part], groups[part])
    matrix = grown._covariance(grown.features, grown._expected, grown.features, grown._expected)
    same = np.equal.outer(grown._groups, grown._groups) & (grown._groups >= 0)
    matrix += np.diag(grown._noise) + GROUP / shape.scale * same
    weight = np.linalg.solve(matrix, grown._target - grown._expected)
    np.testing.assert_allclose(grown.draw(1, 0.0, np.random.default_rng(0)).weight[0], weight, rtol=1e-4, atol=1e-4)
    mean, covariance = grown.joint(others[:5])
    np.testing.assert_allclose(mean, mean_of(grown.draw(1, 0.0, np.random.default_rng(0)), others[:5]), rtol=1e-3)
    assert np.linalg.eigvalsh(covariance).min() > 0


def test_the_joint_spread_is_that_of_the_draws(profiles, others) -> None:
    shape = Shape(LINEAR, 1e-2, 1.0)
    known = Posterior(SPACE, shape, profiles[:20], interacting(profiles[:20]), np.zeros(20))
    draws = 4000
    model = known.draw(draws, 2.0, np.random.default_rng(0))  # of spread 2, 1 and 4 in turn
    values = np.stack([model.values(np.repeat(row[None], draws, axis=0), np.arange(draws)) for row in others[:4]])
    covariance = known.joint(others[:4])[1]
    np.testing.assert_allclose(np.cov(values[:, 2::4]), covariance, rtol=0.25, atol=0.1 * covariance.max())


def test_an_error_that_a_group_shares_does_not_mislead(others) -> None:
    table, rng = table_of(1), np.random.default_rng(13)
    profiles, groups = SPACE.random(80, rng), np.arange(80) // 8
    losses = total(table, profiles) + 3 * total(table, others).std() * rng.normal(size=10)[groups]
    shape = Shape(LINEAR, 1e-3, 1.0)
    truth, none = total(table, others), np.zeros(80)

    def likeness(groups):
        model = Posterior(SPACE, shape, profiles, losses, none, groups).draw(1, 0.0, rng)
        return np.corrcoef(mean_of(model, others), truth)[0, 1]

    assert likeness(groups) > 0.95 > likeness(None)


def test_a_factor_grows_as_the_whole_one_is() -> None:
    rng = np.random.default_rng(14)
    root = rng.normal(size=(12, 12))
    matrix, target = root @ root.T + np.eye(12), rng.normal(size=(12, 3))
    factor = BlockFactor()
    for first, last in ((0, 5), (5, 6), (6, 12)):
        factor.add(matrix[:first, first:last], matrix[first:last, first:last])
    np.testing.assert_allclose(factor.solve(target), np.linalg.solve(matrix, target), rtol=1e-9)
    np.testing.assert_allclose(factor.halved(target), np.linalg.solve(np.linalg.cholesky(matrix), target), rtol=1e-9)


def test_a_matrix_that_rounding_made_indefinite_still_has_a_factor() -> None:
    flat = np.ones((6, 6)) - 1e-12 * np.eye(6)
    lower = cholesky(flat)
    np.testing.assert_allclose(lower @ lower.T, flat, atol=1e-4)


def test_losses_that_are_all_alike_are_no_error(profiles, others) -> None:
    for variance in (0.0, 0.1):
        model = fit(profiles, np.full(60, 3.0), variances=np.full(60, variance), draws=4, prior=table_of(1) * 0)
        np.testing.assert_allclose(mean_of(model, others), 3.0, atol=1e-3)


def test_a_shape_goes_through_json() -> None:
    shape = Shape(PRODUCT, 1e-3, 0.7)
    assert Shape.from_dict(json.loads(json.dumps(shape.to_dict()))) == shape


@pytest.mark.parametrize(("error", "likeness"), [(0.1, 0.97), (1.0, 0.91), (5.0, 0.4)])
def test_the_scale_is_that_of_the_loss_whatever_the_errors(error: float, likeness: float) -> None:
    """Around one profile, as a search measures, differences from the truth are as large as the model says."""
    rng, table = np.random.default_rng(15), table_of(1)
    base, groups = SPACE.random(1, rng), np.arange(400) // 16
    profiles = offspring(base, 400, SPACE, rng, switches=(1.0, 1.0))
    others = offspring(base, 100, SPACE, rng, switches=(1.0, 1.0, 1.0, 1.0))
    truth = total(table, others)
    error *= truth.std()
    losses = total(table, profiles) + error * (rng.normal(size=400) + rng.normal(size=25)[groups])
    variances = np.full(400, error**2)
    shape = best_shape(SPACE, profiles, losses, variances, groups)
    mean, covariance = Posterior(SPACE, shape, profiles, losses, variances, groups).joint(others)
    assert np.corrcoef(mean, truth)[0, 1] > likeness
    centre = np.eye(len(others)) - 1 / len(others)  # only differences count
    spread = np.sqrt((((centre @ (mean - truth)) ** 2).sum()) / np.trace(centre @ covariance @ centre))
    assert 0.5 < spread < 2
