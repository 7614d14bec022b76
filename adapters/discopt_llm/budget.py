"""What a person may ask of a compressed model's size, and what its levels cost.

Every measure is a ratio of whole numbers: costs of the levels are integers, and what was asked is a `Fraction`. A
budget thus becomes a table of integer costs and an integer limit, so that whether a profile meets it is exact.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from discopt.errors import BudgetError

__all__ = ["MEASURES", "Budget", "CostTables", "Measure"]

Measure = Literal["bits", "bpw", "size", "sparsity"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
DENSE_BITS = 16  # of a weight of the dense model, and of what no unit holds

PLACES, RELATIVE_PLACES = 2, 3  # decimals of the numbers in messages, at least; of multiples of the dense size
MOST_PLACES = 80  # decimals: more than it takes to tell amounts apart that mean different 64-bit limits

_SIZES = {"B": 1} | {f"{p}B": 1000**i for i, p in enumerate("KMGT", start=1)}  # bytes
_SIZES |= {f"{p}iB": 1024**i for i, p in enumerate("KMGT", start=1)}
_SPELLINGS = _SIZES | {unit.lower(): size for unit, size in _SIZES.items() if unit != "B"} | {"kB": 1000}
_TEXT = re.compile(r"([0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,40})\s*([^\s0-9]*)")
_EXPECTED = {
    "bits": "bits must be the average width of a weight, such as 3 or 2.25",
    "bpw": "bpw must be the stored bits per weight, such as 3.25",
    "size": "size must be that of the model file, such as 120MB, 0.5GiB or, as a multiple of the dense one, 0.3x",
    "sparsity": "sparsity must be the share of zeros, at least 0 and below 1, such as 0.6 or 60%",
}
_WORDS = {
    "bits": "an average of {} bits",
    "bpw": "{} bits per weight",
    "size": "a size of {}",
    "sparsity": "a sparsity of {}",
}


@dataclass(frozen=True)
class Budget:
    """What was asked: at most so many bits or bytes, or at least such a sparsity.

    measure:
        "bits": average width of the units' weights, bits; what is dropped counts with none.
        "bpw": stored bits per weight of the units, with scales, zero points and masks.
        "size": bytes of the whole model file, with what is outside of the units.
        "sparsity": share of the units' weights that are not kept.
    """

    measure: Measure
    amount: Fraction
    relative: bool = False  # only of "size": `amount` is a multiple of the dense file's bytes, in 16 bits

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {self.measure!r}")
        if self.relative and self.measure != "size":
            raise ValueError(f"only a size can be relative, got {self.measure}")
        object.__setattr__(self, "amount", Fraction(self.amount))
        if not _can_be_asked(self.measure, self.amount):
            raise ValueError(f"{_EXPECTED[self.measure]}, got {self}")

    @classmethod
    def parse(cls, measure: Measure, text: str) -> Budget:
        """What a person wrote, such as "2.25", "120MB", "0.3x" or "60%"; `str` of what comes out can be parsed again.

        KB, MB, GB and TB are powers of 1000, KiB, MiB, GiB and TiB of 1024. Raises ValueError for anything else.
        """
        if measure not in MEASURES:
            raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}")
        found = _TEXT.fullmatch(text.strip())
        number, unit = found.groups() if found else ("0", "")
        factor = _factor(measure, unit)
        if found is None or factor is None:
            raise ValueError(f"{_EXPECTED[measure]}, got {text[:100]!r}")
        try:
            return cls(measure, Fraction(number) * factor, measure == "size" and unit in ("x", "X"))
        except ValueError:  # an amount out of range
            raise ValueError(f"{_EXPECTED[measure]}, got {text[:100]!r}") from None

    def __str__(self) -> str:
        scale, unit = _shown_in(self.measure, self.relative, self.amount)
        return _decimal(self.amount / scale) + unit

    @property
    def words(self) -> str:
        """The budget in a sentence: "3.25 bits per weight", "a size of 120MB"."""
        return _WORDS[self.measure].format(self)


@dataclass(frozen=True, eq=False)
class CostTables:
    """What every level of every unit costs; raises ValueError for arrays that do not fit together."""

    weights: NDArray[np.int64]  # (n, m) weights that are kept
    bits: NDArray[np.int64]  # (n, m) weights times their width; 16 for the kept ones of a sparse layer
    bytes: NDArray[np.int64]  # (n, m) as stored, with scales, zero points and masks
    dense: NDArray[np.int64]  # (n,) weights of the unit
    rest: int  # parameters of the model outside of the units
    rest_bytes: int | None = None  # that a file holds besides the units; None: those parameters in 16 bits

    def __post_init__(self) -> None:
        n, m = np.shape(self.weights) if np.ndim(self.weights) == 2 else (0, 0)
        for name in ("weights", "bits", "bytes", "dense"):
            given = np.asarray(getattr(self, name))
            shape, lowest = ((n,), 1) if name == "dense" else ((n, m), 0)
            if 0 in (n, m) or given.shape != shape or given.dtype.kind not in "iu":
                wanted = "(n,)" if name == "dense" else "(n, m)"
                raise ValueError(f"{name} must be integers of shape {wanted}, got {given.dtype} {given.shape}")
            if given.min() < lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {given.min()}")
            if (most := _sum(given.reshape(n, -1).max(axis=1))) > np.iinfo(np.int64).max:
                raise ValueError(f"{name} must fit 64 bits in sum, got up to {most}")
            table = given.astype(np.int64)
            table.setflags(write=False)
            object.__setattr__(self, name, table)
        if (self.weights > self.dense[:, None]).any():
            unit = int((self.weights > self.dense[:, None]).any(axis=1).argmax())
            raise ValueError(f"unit {unit} has {self.dense[unit]} weights, got levels that keep {self.weights[unit]}")
        for name in ("rest", "rest_bytes"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def table(self, budget: Budget) -> tuple[NDArray[np.int64], int]:
        """The cost of every level, (n, m), and the limit on their sum that the budget means; it may be negative."""
        tables = {"bits": self.bits, "bpw": self.bytes, "size": self.bytes, "sparsity": self.weights}
        return tables[budget.measure], self._limit(budget.measure, budget.relative, budget.amount)

    def measures(self, profile: ArrayLike) -> dict[str, Fraction]:
        """What a profile (n,) comes to, exactly: "bits", "bpw", "sparsity", "bytes" and "size", their multiple."""
        x = np.asarray(profile)
        n, m = self.weights.shape
        if x.shape != (n,) or x.dtype.kind not in "iu" or x.min() < 0 or x.max() >= m:
            raise ValueError(f"a profile must be {n} levels from 0 to {m - 1}, got {x.tolist()}")
        kept, bits, stored = (_sum(t[np.arange(n), x]) for t in (self.weights, self.bits, self.bytes))
        file = stored + self._rest_bytes
        return {
            "bits": Fraction(bits, self._dense),
            "bpw": Fraction(8 * stored, self._dense),
            "bytes": Fraction(file),
            "size": Fraction(file, self._dense_bytes),
            "sparsity": 1 - Fraction(kept, self._dense),
        }

    def met(self, profile: ArrayLike) -> dict[str, Any]:
        """`measures` as numbers for JSON: "bytes" an int, the others floats."""
        return {name: int(v) if name == "bytes" else float(v) for name, v in self.measures(profile).items()}

    def check(self, budget: Budget, allowed: ArrayLike | None = None) -> None:
        """Raise BudgetError, with the nearest that can be reached, if the budget is out of the levels' range.

        That is below what the cheapest of the allowed levels (n, m) cost together, or above the dearest.
        """
        table, limit = self.table(budget)
        legal = np.ones(table.shape, dtype=np.bool_) if allowed is None else np.asarray(allowed)
        if legal.shape != table.shape or legal.dtype != np.bool_ or not legal.any(axis=1).all():
            raise ValueError(f"allowed must be bool of shape {table.shape}, some of each row, got {legal.shape}")
        cheapest = _sum(np.where(legal, table, np.iinfo(np.int64).max).min(axis=1))
        dearest = _sum(np.where(legal, table, 0).max(axis=1))
        if cheapest <= limit <= dearest:
            return
        low, high = (self._reachable(budget, cost, cheapest, dearest) for cost in (cheapest, dearest))
        nearest = low if limit < cheapest else high
        both = low if low == high else f"{low} to {high}"
        raise BudgetError(f"{budget.words} is out of reach: the levels give {both}, so the nearest is {nearest}")

    @property
    def _dense(self) -> int:
        return _sum(self.dense)

    @property
    def _rest_bytes(self) -> int:
        return self.rest * DENSE_BITS // 8 if self.rest_bytes is None else self.rest_bytes

    @property
    def _dense_bytes(self) -> int:
        return (self._dense + self.rest) * DENSE_BITS // 8

    def _limit(self, measure: Measure, relative: bool, amount: Fraction) -> int:
        """The highest integer cost that an amount of a measure allows."""
        if measure == "bits":
            return amount * self._dense // 1
        if measure == "bpw":
            return amount * self._dense // 8
        if measure == "sparsity":
            return (1 - amount) * self._dense // 1
        return (amount * self._dense_bytes if relative else amount) // 1 - self._rest_bytes

    def _amount(self, measure: Measure, relative: bool, cost: int) -> Fraction:
        """The amount of a measure that an integer cost comes to."""
        if measure == "bits":
            return Fraction(cost, self._dense)
        if measure == "bpw":
            return Fraction(8 * cost, self._dense)
        if measure == "sparsity":
            return 1 - Fraction(cost, self._dense)
        return Fraction(cost + self._rest_bytes, self._dense_bytes if relative else 1)

    def _reachable(self, budget: Budget, cost: int, cheapest: int, dearest: int) -> str:
        """A short text for a cost at an end of the range, rounded into the range, so that it can be asked for."""
        measure, relative = budget.measure, budget.relative
        amount = self._amount(measure, relative, cost)
        scale, unit = _shown_in(measure, relative, amount)
        up = (cost == cheapest) != (measure == "sparsity")
        for places in range(RELATIVE_PLACES if relative else PLACES, MOST_PLACES):
            step = scale / 10**places
            rounded = (-(-amount // step) if up else amount // step) * step
            fits = cheapest <= self._limit(measure, relative, rounded) <= dearest
            if fits and _can_be_asked(measure, rounded) >= _can_be_asked(measure, amount):
                return _decimal(rounded / scale) + unit
        raise AssertionError(f"no decimal near {amount} costs from {cheapest} to {dearest}")


def _can_be_asked(measure: Measure, amount: Fraction) -> bool:
    return 0 <= amount < 1 if measure == "sparsity" else amount > 0


def _shown_in(measure: Measure, relative: bool, amount: Fraction) -> tuple[Fraction, str]:
    """What an amount is counted in when it is written, and the sign of that."""
    if measure == "sparsity":
        return Fraction(1, 100), "%"
    if measure != "size" or relative:
        return Fraction(1), "x" if relative else ""
    unit = next((unit for unit in ("TB", "GB", "MB", "KB") if amount >= _SIZES[unit]), "B")
    return Fraction(_SIZES[unit]), unit


def _factor(measure: Measure, unit: str) -> Fraction | None:
    """What a number with that unit is to be multiplied by; None where the unit is wrong."""
    if measure != "size":
        return {"": Fraction(1), "%": Fraction(1, 100) if measure == "sparsity" else None}.get(unit)
    return Fraction(1) if unit in ("x", "X") else Fraction(_SPELLINGS[unit]) if unit in _SPELLINGS else None


def _decimal(number: Fraction) -> str:
    """The number in decimals, exact where so many places are enough, without trailing zeros."""
    exact = (places for places in range(MOST_PLACES) if 10**places % number.denominator == 0)
    places = next(exact, PLACES)
    digits = str(round(abs(number) * 10**places)).rjust(places + 1, "0")
    whole, fraction = digits[: len(digits) - places], digits[len(digits) - places :]
    return ("-" if number < 0 else "") + whole + (f".{fraction}" if fraction else "")


def _sum(values: NDArray[np.int64]) -> int:
    """Exact, however large."""
    return sum(values.tolist())
