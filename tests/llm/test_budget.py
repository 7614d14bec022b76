"""Budgets as people write them, the integer costs they become, and what is out of reach."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from discopt.errors import BudgetError
from discopt.space import SearchSpace
from discopt_llm import budget as budget_module
from discopt_llm.budget import MEASURES, Budget, CostTables, Measure

BIG = 2**33  # weights of a unit, beyond 32 bits


def tables(**changes: Any) -> CostTables:
    """Two units of 1000 and 2000 weights at 2, 3 and 4 bits, with 50 bytes of scales each, and 500 parameters more."""
    weights = np.array([[1000] * 3, [2000] * 3])
    values: dict[str, Any] = {
        "weights": weights,
        "bits": weights * [2, 3, 4],
        "bytes": weights * [2, 3, 4] // 8 + 50,
        "dense": np.array([1000, 2000]),
        "rest": 500,
    }
    return CostTables(**{**values, **changes})


def sparse_tables() -> CostTables:
    """The same units with 40%, 60% and all of their weights kept."""
    weights = np.array([[400, 600, 1000], [800, 1200, 2000]])
    return tables(weights=weights, bits=16 * weights, bytes=2 * weights + [[125], [250]])


# As people write them


@pytest.mark.parametrize(
    ("measure", "text", "amount", "relative"),
    [
        ("bits", "3", Fraction(3), False),
        ("bits", " 2.25 ", Fraction(9, 4), False),
        ("bits", "3.", Fraction(3), False),
        ("bpw", ".1", Fraction(1, 10), False),
        ("bpw", "3.3", Fraction(33, 10), False),  # not the float nearest to it
        ("size", "120MB", Fraction(120 * 10**6), False),
        ("size", "120 MB", Fraction(120 * 10**6), False),
        ("size", "1.5mb", Fraction(15 * 10**5), False),
        ("size", "7kB", Fraction(7000), False),
        ("size", "7KB", Fraction(7000), False),
        ("size", "3GB", Fraction(3 * 10**9), False),
        ("size", "2TB", Fraction(2 * 10**12), False),
        ("size", "0.5GiB", Fraction(2**29), False),
        ("size", "1KiB", Fraction(1024), False),
        ("size", "1 tib", Fraction(2**40), False),
        ("size", "123456789B", Fraction(123456789), False),
        ("size", "0.3x", Fraction(3, 10), True),
        ("size", "0.3 X", Fraction(3, 10), True),
        ("sparsity", "0.6", Fraction(3, 5), False),
        ("sparsity", "60%", Fraction(3, 5), False),
        ("sparsity", "62.5 %", Fraction(5, 8), False),
        ("sparsity", "0", Fraction(0), False),
        ("sparsity", "0.5%", Fraction(1, 200), False),
    ],
)
def test_a_budget_is_read_exactly(measure: Measure, text: str, amount: Fraction, relative: bool) -> None:
    assert Budget.parse(measure, text) == Budget(measure, amount, relative)


EXAMPLES = {
    "bits": "such as 3 or 2.25",
    "bpw": "such as 3.25",
    "size": "such as 120MB, 0.5GiB or, as a multiple of the dense one, 0.3x",
    "sparsity": "such as 0.6 or 60%",
}
WRONG_ANYWHERE = ["", "x", "-3", "+3", "1e3", "nan", "inf", "1,5", "1 000", "3 4", "0x3", "1.2.3", "3/4", "٣", "9" * 99]


@pytest.mark.parametrize(
    ("measure", "text"),
    [
        *((measure, text) for measure in MEASURES for text in WRONG_ANYWHERE),
        ("bits", "3MB"),
        ("bits", "3 bits"),
        ("bits", "3%"),
        ("bits", "0"),
        ("bpw", "0.3x"),
        ("bpw", "0.0"),
        ("size", "120"),
        ("size", "0.3"),
        ("size", "30%"),
        ("size", "120Mb"),  # megabits
        ("size", "120M"),
        ("size", "120 M B"),
        ("size", "0x"),
        ("size", "0MB"),
        ("sparsity", "60"),
        ("sparsity", "1"),
        ("sparsity", "100%"),
        ("sparsity", "0.6x"),
        ("sparsity", "60%%"),
    ],
)
def test_anything_else_is_refused_with_examples(measure: Measure, text: str) -> None:
    with pytest.raises(ValueError, match=f"^{measure} must be .*{EXAMPLES[measure]}, got {re.escape(repr(text))}$"):
        Budget.parse(measure, text)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Budget("bytes", Fraction(3)), "measure must be one of bits, bpw, size, sparsity, got 'bytes'"),
        (lambda: Budget.parse("x", "3"), "measure must be one of bits, bpw, size, sparsity, got 'x'"),
        (lambda: Budget("bits", Fraction(3), relative=True), "only a size can be relative, got bits"),
        (lambda: Budget("bits", Fraction(-7, 2)), r"bits must be .*, got -3\.5$"),
        (lambda: Budget("sparsity", Fraction(1)), "sparsity must be .* below 1, .*, got 100%"),
        (lambda: Budget("sparsity", Fraction(-1, 3)), r"sparsity must be .*, got -33\.33%"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(call: Callable[[], Budget], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("measure", "text", "words"),
    [
        ("bits", "3.0", "an average of 3 bits"),
        ("bpw", "03.250", "3.25 bits per weight"),
        ("size", "120 mb", "a size of 120MB"),
        ("size", "0.5GiB", "a size of 536.870912MB"),
        ("size", "999B", "a size of 999B"),
        ("size", ".3X", "a size of 0.3x"),
        ("sparsity", "0.6", "a sparsity of 60%"),
    ],
)
def test_a_budget_has_words(measure: Measure, text: str, words: str) -> None:
    assert Budget.parse(measure, text).words == words


@st.composite
def budgets(draw: st.DrawFn) -> Budget:
    what = draw(st.sampled_from(MEASURES))
    number = draw(st.decimals(0, 99, places=draw(st.integers(0, 12)), allow_nan=False))
    units = {"size": ["x", "B", "KB", "MB", "GB", "TB", "KiB", "MiB", "GiB", "TiB", "mib"], "sparsity": ["%"]}
    text = f"{number:f}{draw(st.sampled_from(units.get(what, [''])))}"
    assume(number > 0 or what == "sparsity")
    return Budget.parse(what, text)


@given(budgets())
def test_every_budget_comes_back_from_its_text(budget: Budget) -> None:
    assert Budget.parse(budget.measure, str(budget)) == budget


# Costs


def test_a_profile_is_stated_in_all_measures() -> None:
    met = tables().met([0, 2])
    stored = 1000 * 2 // 8 + 50 + 2000 * 4 // 8 + 50
    assert met == {
        "bits": (1000 * 2 + 2000 * 4) / 3000,
        "bpw": 8 * stored / 3000,
        "bytes": stored + 2 * 500,
        "size": (stored + 2 * 500) / (2 * 3500),
        "sparsity": 0.0,
    }
    assert isinstance(met["bytes"], int)
    assert json.loads(json.dumps(met)) == met
    assert sparse_tables().met(np.array([0, 2], dtype=np.int16))["sparsity"] == 600 / 3000


def test_a_dropped_unit_frees_all_its_bytes() -> None:
    weights = np.array([[0, 1000], [0, 1000]])
    both = CostTables(weights, weights * 4, weights // 2, np.array([1000, 1000]), 0)
    assert both.met([0, 1]) == {"bits": 2.0, "bpw": 2.0, "bytes": 500, "size": 0.125, "sparsity": 0.5}


@pytest.mark.parametrize(
    ("measure", "text", "name", "limit"),
    [
        ("bits", "3", "bits", 9000),
        ("bits", "2.33333", "bits", 6999),
        ("bpw", "3.3", "bytes", 1237),  # 1237.5
        ("size", "0.3x", "bytes", 2100 - 1000),
        ("size", "2.0009KB", "bytes", 2000 - 1000),
        ("size", "1B", "bytes", 1 - 1000),
        ("sparsity", "60%", "weights", 1200),
        ("sparsity", "0.3333", "weights", 2000),  # 2000.1
    ],
)
def test_a_budget_is_a_table_and_the_whole_number_below_it(measure: Measure, text: str, name: str, limit: int) -> None:
    costs = tables()
    table, found = costs.table(Budget.parse(measure, text))
    assert (found, type(found)) == (limit, int)
    assert np.array_equal(table, getattr(costs, name))


def test_budgets_of_large_models_are_exact() -> None:
    """At 3 bits of 2^34 weights, one bit more is too much; floats of 32 bits, and 32-bit integers, would not see it."""
    weights = np.full((2, 2), BIG)
    bits = weights * 3 + [[0, 1], [0, 0]]
    large = CostTables(weights, bits, bits // 8, np.full(2, BIG), BIG)
    table, limit = large.table(Budget.parse("bits", "3"))
    space = SearchSpace.build(table, limit, group="none")
    assert space.feasible(np.array([[0, 1], [1, 0]])).tolist() == [True, False]
    assert large.met([0, 0])["bits"] == 3
    assert large.measures([1, 0])["bits"] == 3 + Fraction(1, 2 * BIG)
    assert large.met([0, 0])["bytes"] == 2 * BIG * 3 // 8 + 2 * BIG
    large.check(Budget.parse("size", f"{2 * BIG * 3 // 8 + 2 * BIG}B"))


@st.composite
def any_tables(draw: st.DrawFn) -> CostTables:
    """Costs of 1 to 4 units with 1 to 4 levels, of a few weights or of many."""
    n, m = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    most = draw(st.sampled_from([9, 1000, 2**40]))
    dense = draw(st.lists(st.integers(1, most), min_size=n, max_size=n))
    rows: dict[str, list[list[int]]] = {"weights": [], "bits": [], "bytes": []}
    for weights in dense:
        for name, highest in (("weights", weights), ("bits", 16 * weights), ("bytes", 2 * weights + 1)):
            rows[name].append(sorted(draw(st.lists(st.integers(0, highest), min_size=m, max_size=m))))
    arrays = {name: np.array(row) for name, row in rows.items()}
    return CostTables(**arrays, dense=np.array(dense), rest=draw(st.integers(0, most)))


@given(costs=any_tables(), budget=budgets(), data=st.data())
def test_a_profile_is_feasible_exactly_when_it_meets_the_budget(
    costs: CostTables, budget: Budget, data: st.DataObject
) -> None:
    n, m = costs.weights.shape
    profile = np.array(data.draw(st.lists(st.integers(0, m - 1), min_size=n, max_size=n)))
    if data.draw(st.booleans()):  # a budget that the profile meets to the last bit, or misses by a little
        name = "bytes" if budget.measure == "size" and not budget.relative else budget.measure
        amount = costs.measures(profile)[name] * data.draw(st.sampled_from([1, Fraction(10**9 + 1, 10**9)]))
        assume(0 <= amount < 1 if budget.measure == "sparsity" else amount > 0)
        budget = Budget(budget.measure, amount, budget.relative)
    table, limit = costs.table(budget)
    feasible = sum(table[np.arange(n), profile].tolist()) <= limit
    exact, met = costs.measures(profile), costs.met(profile)
    name = "bytes" if budget.measure == "size" and not budget.relative else budget.measure
    if budget.measure == "sparsity":
        assert feasible == (exact[name] >= budget.amount)
        assert met[name] >= float(budget.amount) if feasible else met[name] <= float(budget.amount)
    else:
        assert feasible == (exact[name] <= budget.amount)
        assert met[name] <= float(budget.amount) if feasible else met[name] >= float(budget.amount)


# What is out of reach


@pytest.mark.parametrize(
    ("costs", "measure", "text", "message"),
    [
        (
            tables(),
            "bits",
            "1.5",
            "an average of 1.5 bits is out of reach: the levels give 2 to 4, so the nearest is 2",
        ),
        (tables(), "bits", "4.1", "an average of 4.1 bits is out of reach: the levels give 2 to 4, .* nearest is 4"),
        (
            tables(),
            "bpw",
            "2.25",
            "2.25 bits per weight is out of .*: the levels give 2.27 to 4.26, .* nearest is 2.27",
        ),
        (tables(), "size", "1KB", "a size of 1KB is .*: the levels give 1.85KB to 2.6KB, so the nearest is 1.85KB"),
        (tables(), "size", "3MB", "a size of 3MB is .*: the levels give 1.85KB to 2.6KB, so the nearest is 2.6KB"),
        (tables(), "size", "0.2x", "a size of 0.2x is .*: the levels give 0.265x to 0.371x, so the nearest is 0.265x"),
        (tables(), "sparsity", "60%", "a sparsity of 60% is out of reach: the levels give 0%, so the nearest is 0%"),
        (sparse_tables(), "sparsity", "0.61", "a sparsity of 61% is .*: the levels give 60% to 0%, .* nearest is 60%"),
    ],
)
def test_what_is_out_of_reach_is_refused_with_the_nearest(
    costs: CostTables, measure: Measure, text: str, message: str
) -> None:
    with pytest.raises(BudgetError, match=f"^{message}$") as caught:
        costs.check(Budget.parse(measure, text))
    nearest = str(caught.value).rpartition(" ")[2]
    costs.check(Budget.parse(measure, nearest))


@pytest.mark.parametrize(("measure", "text"), [("bits", "2"), ("bits", "4"), ("sparsity", "0")])
def test_the_ends_of_the_range_can_be_asked_for(measure: Measure, text: str) -> None:
    tables().check(Budget.parse(measure, text))


def test_only_allowed_levels_count() -> None:
    allowed = np.array([[False, True, True], [True, True, False]])
    with pytest.raises(BudgetError, match=r"the levels give 2\.34 to 3\.33, so the nearest is 2\.34"):
        tables().check(Budget.parse("bits", "2.2"), allowed)
    tables().check(Budget.parse("bits", "2.34"), allowed)


@given(costs=any_tables(), budget=budgets(), data=st.data())
def test_a_refused_budget_names_one_that_is_accepted(costs: CostTables, budget: Budget, data: st.DataObject) -> None:
    table, limit = costs.table(budget)
    n, m = table.shape
    assume(table.max(axis=1).any())  # levels that all cost nothing leave nothing to ask for
    rows = st.lists(st.booleans(), min_size=m, max_size=m).filter(any)
    allowed = np.array(data.draw(st.lists(rows, min_size=n, max_size=n)))
    assume(table[allowed].any())
    cheapest, dearest = (
        sum(pick(row[legal].tolist()) for row, legal in zip(table, allowed, strict=True)) for pick in (min, max)
    )
    if cheapest <= limit <= dearest:
        costs.check(budget, allowed)
        return
    with pytest.raises(BudgetError, match=r"is out of reach: the levels give .*, so the nearest is \S+$") as caught:
        costs.check(budget, allowed)
    nearest = Budget.parse(budget.measure, str(caught.value).rpartition(" ")[2])
    assert nearest.relative == budget.relative
    costs.check(nearest, allowed)
    assert cheapest <= costs.table(nearest)[1] <= dearest


# Arrays that do not fit


def test_tables_are_copies_that_cannot_be_written() -> None:
    dense = np.array([1000, 2000], dtype=np.int32)
    costs = tables(dense=dense)
    dense[0] = 1
    assert (costs.dense.dtype, costs.dense[0]) == (np.int64, 1000)
    with pytest.raises(ValueError, match="read-only"):
        costs.table(Budget.parse("bits", "3"))[0][0, 0] = 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": np.ones(2, dtype=int)}, r"weights must be integers of shape \(n, m\), got int64 \(2,\)"),
        ({"bits": np.ones((2, 4), dtype=int)}, r"bits must be integers of shape \(n, m\), got int64 \(2, 4\)"),
        ({"bytes": np.ones((2, 3))}, r"bytes must be integers of shape \(n, m\), got float64 \(2, 3\)"),
        ({"dense": np.ones(3, dtype=int)}, r"dense must be integers of shape \(n,\), got int64 \(3,\)"),
        ({"dense": np.array([1000, 0])}, "dense must be at least 1, got 0"),
        ({"bits": -np.ones((2, 3), dtype=int)}, "bits must be at least 0, got -1"),
        ({"bits": np.full((2, 3), 2**62)}, "bits must fit 64 bits in sum, got up to 9223372036854775808"),
        ({"dense": np.array([1000, 1999])}, "unit 1 has 1999 weights, got levels that keep .*2000"),
        ({"rest": -1}, "rest must not be negative, got -1"),
    ],
)
def test_costs_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tables(**changes)


@pytest.mark.parametrize("profile", [[0], [0, 3], [0, -1], [0.0, 1.0], [[0, 1]]])
def test_profiles_that_do_not_fit_are_refused(profile: Any) -> None:
    with pytest.raises(ValueError, match=r"a profile must be 2 levels from 0 to 2, got \["):
        tables().met(profile)


@pytest.mark.parametrize("allowed", [np.ones((2, 2), dtype=bool), np.ones((2, 3)), np.zeros((2, 3), dtype=bool)])
def test_masks_that_do_not_fit_are_refused(allowed: Any) -> None:
    with pytest.raises(ValueError, match=r"allowed must be bool of shape \(2, 3\), some of each row, got"):
        tables().check(Budget.parse("bits", "3"), allowed)


def test_everything_public_is_listed() -> None:
    assert len(budget_module.__all__) == len(set(budget_module.__all__))
    assert all(hasattr(budget_module, name) for name in budget_module.__all__)
