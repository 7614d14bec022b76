from __future__ import annotations

import numpy as np
import pytest

from discopt import Query
from discopt.candidates import Candidates
from discopt.optimizers.base import pack_query, unpack_query

BASES = np.arange(12, dtype=np.int16).reshape(2, 6) % 4
CANDIDATES = Candidates.changed(BASES, [1, 0, 1], [{0: 9, 5: 8}, {}, {2: 7}])
ROWS = BASES[[1, 0, 1]]
ROWS[0, [0, 5]] = 9, 8
ROWS[2, 2] = 7


def test_rows_are_their_bases_with_the_changes_made() -> None:
    assert (CANDIDATES.rows() == ROWS).all()
    assert all((CANDIDATES.row(i) == ROWS[i]).all() for i in range(3))


@pytest.mark.parametrize("index", [[2, 0], [1], [], [0, 0, 1, 2]])
def test_taking_rows_is_indexing(index: list[int]) -> None:
    taken = CANDIDATES.take(np.array(index, dtype=np.intp))
    assert len(taken) == len(index)
    assert (taken.rows() == ROWS[index]).all()


@pytest.mark.parametrize("profiles", [BASES, BASES[:1] + 1])
def test_profiles_follow_the_rows(profiles: np.ndarray) -> None:
    assert (CANDIDATES.followed_by(profiles).rows() == np.concatenate([ROWS, profiles])).all()


def test_rows_share_nothing_with_the_bases() -> None:
    CANDIDATES.rows()[:] = -1
    CANDIDATES.row(1)[:] = -1
    assert (CANDIDATES.rows() == ROWS).all()


def test_arrays_that_do_not_fit_are_refused() -> None:
    one = np.ones(1, dtype=np.int16)
    with pytest.raises(ValueError, match=r"shape \(k, n\), got \(6,\)"):
        Candidates.of_rows(BASES[0])
    with pytest.raises(ValueError, match=r"start must have shape \(2,\), got \(1,\)"):
        Candidates(BASES, np.array([0]), np.array([0]), one[:0], one[:0])
    with pytest.raises(ValueError, match="each of 2 changes, got 1 and 1"):
        Candidates(BASES, np.array([0]), np.array([0, 2]), one, one)


@pytest.mark.parametrize("given", [CANDIDATES, ROWS])
def test_a_query_shows_both_sides_whichever_it_was_given(given: Candidates | np.ndarray) -> None:
    query = Query(given, 1, 0)
    assert len(query) == 3
    assert (query.population == ROWS).all()
    assert (query.candidates.rows() == ROWS).all()
    assert (query.row(2) == ROWS[2]).all()


@pytest.mark.parametrize("given", [CANDIDATES, ROWS])
def test_a_query_comes_back_from_its_json(given: Candidates | np.ndarray) -> None:
    again = unpack_query(pack_query(Query(given, 3, 7)))
    assert again is not None
    assert (again.population == ROWS).all()
    assert (again.fidelity, again.seed) == (3, 7)
