"""The test problems are what they say: optima, formulas, noise."""

from __future__ import annotations

import itertools
import math
import pickle
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from discopt.objective import Query, as_objective, mean_loss
from discopt.problems import (
    PROBLEMS,
    Problem,
    chain,
    coverage,
    exhaustive_minimum,
    feature_selection,
    jump,
    leading_ones,
    linear,
    nk,
    noisy,
    quadratic,
    royal_road,
    separable,
    separable_minimum,
    switch_constant,
    trap,
)
from discopt.space import SearchSpace


@pytest.fixture(scope="module", params=PROBLEMS)
def problem(request):
    return PROBLEMS[request.param]()


def random_rows(problem, k=6, seed=0):
    return problem.space.random(k, np.random.default_rng(seed))


def every_row(space):
    """Feasible profiles by the plainest means: (k, n)."""
    rows = np.array(list(itertools.product(range(space.m), repeat=space.n)), dtype=np.int16)
    return rows[space.feasible(rows)]


# Every problem of the registry.


def test_a_population_is_measured_as_its_rows_are(problem):
    x = random_rows(problem)
    together = problem.objective.evaluate(Query(x, problem.fidelity, seed=5))
    apart = [problem.objective.evaluate(Query(row[None], problem.fidelity, seed=5))[0] for row in x]
    np.testing.assert_allclose(together, np.stack(apart), rtol=1e-12, atol=1e-14)
    assert together.dtype == np.float64 and together.shape[0] == len(x)


def test_the_same_query_has_the_same_answer_and_stays_as_it_was(problem):
    x = random_rows(problem)
    query = Query(x.copy(), problem.fidelity, seed=5)
    first, second = problem.objective.evaluate(query), problem.objective.evaluate(query)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(query.population, x)


def test_a_problem_built_twice_is_the_same(problem):
    x, again = random_rows(problem), PROBLEMS[problem.name]()
    np.testing.assert_array_equal(problem.loss(x), again.loss(x))
    assert problem.optimum == again.optimum


def test_no_random_profile_beats_the_optimum(problem):
    if problem.optimum is not None:
        assert (problem.gap(random_rows(problem, 64)) >= -1e-12).all()


def test_an_objective_can_be_sent_to_another_process(problem):
    query = Query(random_rows(problem), problem.fidelity, seed=5)
    copy = pickle.loads(pickle.dumps(problem.objective))
    np.testing.assert_array_equal(copy.evaluate(query), problem.objective.evaluate(query))


def test_each_problem_goes_by_its_name(problem):
    assert PROBLEMS[problem.name]().name == problem.name
    assert problem.note


# Optima, found another way.


@pytest.mark.parametrize(
    "small",
    [
        linear(10, 6),
        linear(10, 3, weights="equal"),
        leading_ones(9, 5),
        jump(9, 5, 3),
        royal_road(9, 7, 3),
        trap(12, 8, 4),
        trap(10, 3, 5),
        chain(8, 4, length=4),
        chain(9, 3, length=3, costs="equal", share=0.5),
        chain(6, 5, length=6, resources=2, strength=0.3),
        separable(6, 4),
        separable(7, 4, resources=2, share=0.4),
        separable(7, 4, costs="unequal", resources=2),
        separable(7, 4, costs="unequal", priced=True),
        separable(7, 4, costs="unequal", resources=2, priced=True),
        separable(6, 4, costs="unequal", share=0.37),
        quadratic(5, 4),
        quadratic(4, 3, costs="unequal", interaction=1.0),
        quadratic(5, 4, costs="unequal", resources=2),
        nk(9, 4, 3),
        nk(6, 7, 2, m=3),
        coverage(9, 30),
        feature_selection(4, degree=1),
    ],
    ids=lambda p: p.name,
)
def test_the_optimum_is_the_lowest_loss_of_all_profiles(small):
    assert small.loss(every_row(small.space)).min() == pytest.approx(small.optimum, rel=1e-12, abs=1e-15)


@given(st.integers(0, 10**6), st.integers(1, 2), st.floats(0, 1))
def test_the_integer_program_agrees_with_looking_at_every_profile(seed, r, share):
    rng = np.random.default_rng(seed)
    n, m = 5, 4
    cost = np.sort(rng.integers(0, 12, (r, n, m)), axis=2)
    allowed = rng.random((n, m)) < 0.8
    allowed[np.arange(n), rng.integers(m, size=n)] = True
    low = np.where(allowed, cost, 99).min(axis=2).sum(axis=1)
    high = np.where(allowed, cost, -1).max(axis=2).sum(axis=1)
    space = SearchSpace.build(cost, [int(b) for b in low + share * (high - low)], allowed=allowed)
    table = rng.normal(size=(n, m))
    exact, profile = separable_minimum(space, table)
    looked_at = exhaustive_minimum(space, lambda x: table[np.arange(n), x].sum(axis=1))
    assert looked_at is not None
    assert exact == pytest.approx(looked_at[0], abs=1e-9)
    assert space.feasible(profile[None])[0]


def test_looking_at_every_profile_gives_up_on_large_spaces():
    assert exhaustive_minimum(SearchSpace.cardinality(40, 20), lambda x: x.sum(axis=1)) is None
    assert quadratic(64, 5).optimum is None
    assert nk(64, 32).optimum is None


def test_an_nk_landscape_is_cheapest_with_its_budget_spent():
    for seed in range(5):
        problem = nk(10, 5, 3, seed=seed)
        rows = every_row(problem.space)
        best = rows[problem.loss(rows).argmin()]
        assert problem.space.cost_of(best[None])[0, 0] == 5


# Reductions and parity with plain formulas.


def test_a_jump_of_one_is_linear_with_equal_weights():
    one, plain = jump(12, 7, 1, seed=3), linear(12, 7, weights="equal", seed=3)
    x = random_rows(one, 50)
    np.testing.assert_array_equal(one.loss(x), plain.loss(x))


def test_a_jump_has_its_worst_losses_just_before_the_optimum():
    problem = jump(12, 6, 3, seed=1)
    rows = every_row(problem.space)
    full = rows[rows.sum(axis=1) == 6]
    best = full[problem.loss(full) == 0]
    assert len(best) == 1
    missing = (best[0] - full == 1).sum(axis=1)
    by_missing = {int(j): set(problem.loss(full[missing == j])) for j in np.unique(missing)}
    assert by_missing == {0: {0.0}, 1: {8.0}, 2: {7.0}, 3: {3.0}, 4: {4.0}, 5: {5.0}, 6: {6.0}}


def test_leading_ones_counts_the_run_from_the_front():
    problem = leading_ones(8, 5, seed=2)
    order = np.random.default_rng(2).permutation(8)
    x = np.zeros((3, 8), dtype=np.int16)
    x[1, order[[0, 1, 3]]] = 1
    x[2, order[:5]] = 1
    np.testing.assert_array_equal(problem.loss(x), [5, 3, 0])


def test_a_quadratic_without_interaction_is_separable():
    plain, sums = quadratic(7, 4, interaction=0.0, seed=4), separable(7, 4, seed=4)
    x = random_rows(plain, 50)
    np.testing.assert_allclose(plain.loss(x), sums.loss(x), rtol=1e-12)
    assert plain.optimum == pytest.approx(sums.optimum, rel=1e-12)


def test_interaction_lets_a_dearer_level_hurt():
    problem = quadratic(seed=0)
    rows = every_row(problem.space)
    rows = rows[problem.space.cost_of(rows)[:, 0] < problem.space.budget[0]]
    rows = rows[rows[:, 0] < problem.space.m - 1]
    dearer = rows.copy()
    dearer[:, 0] += 1
    assert (problem.loss(dearer) > problem.loss(rows)).any()
    without = quadratic(seed=0, interaction=0.0)
    assert (without.loss(dearer) <= without.loss(rows)).all()


def test_two_resources_bind_beyond_the_first():
    one, two = (separable(32, 5, costs="unequal", resources=r, seed=3) for r in (1, 2))
    assert two.space.r == 2
    np.testing.assert_array_equal(one.space.cost[0], two.space.cost[0])
    assert (two.space.cost[1] != two.space.cost[0]).any()
    apart = separable_minimum(SearchSpace.build(two.space.cost[:1], two.space.budget[:1]), two.objective.table)[0]
    assert two.optimum > apart * 1.001


def test_a_price_lowers_the_budget_by_little_and_proves_what_the_integer_program_finds():
    priced, plain = (separable(224, 5, costs="unequal", priced=p, seed=1) for p in (True, False))
    assert 0.98 * plain.space.budget[0] < priced.space.budget[0] <= plain.space.budget[0]
    assert priced.optimum == pytest.approx(separable_minimum(priced.space, priced.objective.table)[0], rel=1e-12)


def test_a_loose_budget_needs_no_price():
    problem = separable(8, 4, share=1.0, priced=True)
    assert problem.space.budget[0] == 24
    assert problem.optimum == pytest.approx(problem.objective.table.min(axis=1).sum(), rel=1e-12)


def test_a_chain_without_random_losses_is_separable():
    problem = chain(12, 4, length=4, strength=0.0, seed=2)
    own = problem.objective.table[:, ::4]
    assert separable_minimum(problem.space, own)[0] == pytest.approx(problem.optimum, rel=1e-12)


def test_a_chain_is_a_sum_over_neighbours_that_ends_with_each_chain():
    problem = chain(8, 3, length=4, seed=1)
    x = random_rows(problem, 4)
    table = problem.objective.table.reshape(8, 3, 3)
    for row, loss in zip(x, problem.loss(x), strict=True):
        assert loss == pytest.approx(sum(table[i, row[i], row[(i + 1) % 8]] for i in range(8)), rel=1e-12)
    last = [3, 7]
    assert (table[last] == table[last][:, :, :1]).all() and (np.ptp(table[:3], axis=2) > 0).all()


@pytest.mark.parametrize("problem", [trap(24, 12, 6, seed=1), royal_road(24, 12, 6, seed=1)], ids=lambda p: p.name)
def test_only_a_block_kept_as_a_whole_loses_nothing(problem):
    parts = problem.objective
    x = np.zeros((7, 24), dtype=np.int16)
    for kept in range(7):
        x[kept, parts.order[0, :kept]] = 1
    others = problem.loss(x)[0] - parts.table[0, 0]
    own = problem.loss(x) - others
    np.testing.assert_allclose(own, parts.table[0], atol=1e-15)
    assert parts.table[0, 6] == 0 < parts.table[0, 5]


def test_a_trap_draws_towards_half_full_blocks():
    table = trap(24, 12, 6).objective.table
    gain = -np.diff(table, axis=1)[:, :-1]  # of one more unit, short of a full block
    assert (gain > 0).all() and (np.diff(gain, axis=1) < 0).all()
    assert (table[:, 3] > 0.75 * table[:, 0]).all()  # so half of the blocks full, half empty loses less


def test_a_royal_road_is_flat_until_a_block_is_full():
    table = royal_road(24, 12, 6).objective.table
    assert (table[:, :-1] == 1 / 4).all() and (table[:, -1] == 0).all()


def test_an_nk_landscape_without_neighbours_is_separable():
    problem = nk(8, 12, 0, m=3, seed=1)
    table = np.stack([problem.loss(level * np.eye(8, dtype=np.int16)) for level in range(3)], axis=1)
    exact, _ = separable_minimum(problem.space, table)
    empty = problem.loss(np.zeros((1, 8), dtype=np.int16))[0]
    assert exact - 7 * empty == pytest.approx(problem.optimum, rel=1e-12)


def test_an_nk_landscape_is_the_mean_of_table_entries():
    problem = nk(7, 6, 2, m=3, seed=5)
    parts = problem.objective
    x = random_rows(problem, 4)
    for row, loss in zip(x, problem.loss(x), strict=True):
        entries = [
            parts.contribution[i, sum(int(row[j]) * 3**place for place, j in enumerate(parts.depends[i]))]
            for i in range(7)
        ]
        assert loss == pytest.approx(np.mean(entries) + parts.charge * (6 - row.sum()), rel=1e-12)
        assert all(len(set(units)) == 3 and units[0] == i for i, units in enumerate(parts.depends))


def test_coverage_is_the_share_of_people_out_of_reach():
    problem = coverage(8, 25, radius=0.3, seed=2)
    parts = problem.objective
    x = random_rows(problem, 5)
    for row, loss in zip(x, problem.loss(x), strict=True):
        reached = {place for site in np.flatnonzero(row) for place in np.flatnonzero(parts.covers[site])}
        assert loss == pytest.approx(1 - parts.weight[sorted(reached)].sum(), rel=1e-9)


def test_feature_selection_equals_scikit_learns_ridge_fold_by_fold():
    from sklearn.linear_model import Ridge

    problem = feature_selection(6, degree=2, ridge=2.5)
    parts = problem.objective
    x = random_rows(problem, 3)
    query = Query(x, 200, seed=7)
    folds = parts._folds(200, 7)
    for row, losses in zip(x, parts.evaluate(query), strict=True):
        X = parts.X[:, row == 1]
        for held_out, test in enumerate(folds):
            train = np.concatenate([rows for fold, rows in enumerate(folds) if fold != held_out])
            model = Ridge(alpha=2.5).fit(X[train], parts.y[train])
            error = np.mean((model.predict(X[test]) - parts.y[test]) ** 2)
            assert losses[held_out] == pytest.approx(error, rel=1e-8)


def test_feature_selection_draws_every_row_at_most_once():
    folds = feature_selection(degree=1).objective._folds(231, seed=3)
    rows = np.concatenate(folds)
    assert len(rows) == len(set(rows)) == 231
    assert {len(fold) for fold in folds} == {46, 47}


def test_feature_selection_is_less_noisy_with_more_rows_and_exact_with_all():
    problem = feature_selection(5, degree=1)
    x = random_rows(problem, 8)

    def range_over_samples(rows):
        losses = [mean_loss(problem.objective.evaluate(Query(x, rows, seed))) for seed in range(30)]
        return np.ptp(losses, axis=0).mean()

    few, more, most = range_over_samples(50), range_over_samples(150), range_over_samples(400)
    assert few > 1.3 * more > 1.3 * 1.3 * most
    assert range_over_samples(442) == 0


def test_the_switch_constant_inverts_the_theorem():
    assert switch_constant(generations=120, offspring=16, n=64, ones=48) == pytest.approx(120 * 16 / (16 * 48))


# Noise.


@pytest.mark.parametrize("kind", ["shared", "independent"])
@pytest.mark.parametrize("samples", [None, 5])
@pytest.mark.parametrize("fidelity", [1, 3, 64])
def test_noise_has_mean_0_and_falls_with_the_root_of_fidelity(kind, samples, fidelity):
    problem = noisy(separable(24, 3), 0.7, kind=kind, samples=samples)
    x = random_rows(problem, 4)
    seeds = 600
    answers = [mean_loss(problem.objective.evaluate(Query(x, fidelity, seed))) for seed in range(seeds)]
    noise = np.stack(answers) - problem.loss(x)  # (seeds, k)
    expected = 0.7 / math.sqrt(fidelity)
    assert noise.std(axis=0) == pytest.approx(expected, rel=4 / math.sqrt(2 * seeds))
    assert noise.mean(axis=0) == pytest.approx(0, abs=4 * expected / math.sqrt(seeds))


def test_alike_rows_share_their_noise_in_proportion():
    n, apart = 32, 8
    problem = noisy(linear(n, 16), 1.0)
    x = random_rows(problem, 1).repeat(2, axis=0)
    x[1, :apart] = 1 - x[1, :apart]
    noise = np.stack([problem.objective.evaluate(Query(x, 1, seed)) for seed in range(2000)]) - problem.loss(x)
    assert (noise[:, 0] - noise[:, 1]).std() == pytest.approx(math.sqrt(2 * apart / n), rel=0.07)


def test_independent_noise_is_unrelated_even_between_neighbours():
    problem = noisy(linear(32, 16), 1.0, kind="independent")
    x = random_rows(problem, 1).repeat(2, axis=0)
    x[1, 0] = 1 - x[1, 0]
    noise = np.stack([problem.objective.evaluate(Query(x, 1, seed)) for seed in range(2000)]) - problem.loss(x)
    assert abs(np.corrcoef(noise.T)[0, 1]) < 4 / math.sqrt(2000)


def test_samples_are_one_column_each_and_no_more_than_the_fidelity():
    problem = noisy(linear(), samples=8)
    x = random_rows(problem)
    assert problem.objective.evaluate(Query(x, 64, 0)).shape == (6, 8)
    assert problem.objective.evaluate(Query(x, 3, 0)).shape == (6, 3)
    assert noisy(linear()).objective.evaluate(Query(x, 64, 0)).shape == (6,)


def test_no_noise_is_the_problem_itself():
    plain, silent = quadratic(), noisy(quadratic(), 0.0)
    x = random_rows(plain)
    np.testing.assert_array_equal(silent.objective.evaluate(Query(x, 1, 9)), plain.loss(x))
    assert silent.optimum == plain.optimum


def test_the_default_noise_is_as_large_as_the_spread_of_random_profiles():
    assert noisy(nk()).objective.sigma == nk().spread()
    assert PROBLEMS["noisy-nk"](12, 6, sigma=0.3, kind="independent").objective.sigma == 0.3


# Refusals.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: linear(8, 8), "ones must lie between 0 and n = 8, got 8"),
        (lambda: linear(weights="odd"), "weights must be random or equal, got 'odd'"),
        (lambda: jump(8, 4, 5), "gap must be from 1 to 4, got 5"),
        (lambda: separable(1), "at least 2 units and 2 levels, got n = 1"),
        (lambda: separable(costs="free"), "costs must be equal or unequal, got 'free'"),
        (lambda: separable(share=1.5), "share must lie from 0 to 1, got 1.5"),
        (lambda: separable(resources=3), "resources must be 1 or 2, got 3"),
        (lambda: chain(10, 3, length=4), "length must be from 2 to n = 10 and divide it, got 4"),
        (lambda: chain(strength=-1), "strength must not be negative, got -1"),
        (lambda: trap(10, 5, 4), "size must be from 2 to n = 10 and divide it, got 4"),
        (lambda: royal_road(8, 8, 4), "ones must lie between 0 and n = 8, got 8"),
        (lambda: quadratic(interaction=-1), "interaction must lie from 0 to 1, got -1"),
        (lambda: nk(4, 2, 4), "k must lie from 0 to n - 1 = 3, got 4"),
        (lambda: nk(64, 2, 40), "got m = 2 and k = 40"),
        (lambda: nk(8, 9), "budget must lie from 1 to 8, got 9"),
        (lambda: coverage(1), "at least 2 sites and 1 place, got 1 and 200"),
        (lambda: coverage(radius=0), r"expected a radius above 0 .* got 0"),
        (lambda: feature_selection(10, degree=1), "features must lie between 0 and 10, got 10"),
        (lambda: feature_selection(degree=3), "degree must be 1 or 2, got 3"),
        (lambda: feature_selection(ridge=0), "ridge must be above 0, got 0"),
        (lambda: noisy(nk(), -1.0), "sigma must be finite and not negative, got -1"),
        (lambda: noisy(nk(), kind="loud"), "kind must be shared or independent, got 'loud'"),
        (lambda: noisy(nk(), samples=0), "samples must be at least 1, got 0"),
        (lambda: separable_minimum(SearchSpace.cardinality(4, 2), np.zeros((4, 3))), r"\(4, 2\), got \(4, 3\)"),
    ],
)
def test_a_problem_that_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_problem_checks_itself():
    space, zero = SearchSpace.cardinality(4, 2), as_objective(lambda x: np.zeros(len(x)))
    with pytest.raises(ValueError, match="needs a name, got an empty one"):
        Problem("", space, zero)
    with pytest.raises(TypeError, match="space must be a SearchSpace, got int"):
        Problem("p", 4, zero)
    with pytest.raises(TypeError, match="expected an Objective or a function of the population, got str"):
        Problem("p", space, "loss")
    with pytest.raises(ValueError, match="optimum must be finite, or None if it is not known, got nan"):
        Problem("p", space, zero, optimum=math.nan)
    with pytest.raises(ValueError, match="fidelity must be at least 1, got 0"):
        Problem("p", space, zero, fidelity=0)
    with pytest.raises(ValueError, match="needs an optimum, got a p problem without one"):
        Problem("p", space, zero).gap(np.zeros((1, 4), dtype=np.int16))


def test_a_plain_function_is_an_objective():
    problem = Problem("p", SearchSpace.cardinality(4, 2), lambda x: x.sum(axis=1))
    np.testing.assert_array_equal(problem.loss(np.array([[0, 1, 0, 1], [0, 0, 0, 0]])), [2, 0])


def test_feature_selection_says_how_many_rows_there_are():
    problem = feature_selection(degree=1)
    with pytest.raises(ValueError, match="fidelity must be from 50 to 442 rows, got 443"):
        problem.objective.evaluate(Query(random_rows(problem), 443, 0))


def test_feature_selection_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'discopt-search\[bench\]'"):
        feature_selection()
