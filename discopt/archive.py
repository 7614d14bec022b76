"""What a search remembers of the profiles it has measured."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from discopt.arrays import pack, unpack
from discopt.space import Levels

Floats = NDArray[np.float64]

CELLS = 1 << 24  # levels kept, at most
LEAST, MOST = 64, 4096  # profiles kept
_ARRAYS = ("profiles", "losses", "variances", "groups")
DIGEST = 8  # bytes that a profile is recognised by


class Archive:
    """Profiles with the loss estimated for each, the best and the latest of them once there are too many.

    Which profiles were ever measured is remembered for good.
    """

    def __init__(self, n: int) -> None:
        self.capacity = int(np.clip(CELLS // n, LEAST, MOST))
        self.profiles: Levels = np.empty((0, n), dtype=np.int16)
        self.losses: Floats = np.empty(0)  # lower is better
        self.variances: Floats = np.empty(0)  # of the losses' errors
        self.groups: NDArray[np.intp] = np.empty(0, dtype=np.intp)  # rows whose losses may share an error; -1 for none
        self.forgotten = 0  # times that rows were left out, and the others moved up
        self._seen: set[bytes] = set()

    def add(self, profiles: Levels, losses: Floats, variances: Floats, group: int = -1) -> None:
        """Take in profiles (k, n) with losses (k,) and variances (k,); those not finite are only remembered."""
        self.remember(profiles)
        finite = np.isfinite(losses)
        self.profiles = np.concatenate([self.profiles, profiles[finite]])
        self.losses = np.append(self.losses, losses[finite])
        self.variances = np.append(self.variances, variances[finite])
        self.groups = np.append(self.groups, np.full(int(finite.sum()), group))
        if len(self.losses) > self.capacity:
            kept = self.chosen(self.capacity * 3 // 4)
            self.forgotten += 1
            for name in _ARRAYS:
                setattr(self, name, getattr(self, name)[kept])

    def remember(self, profiles: Levels) -> None:
        """Never propose these (k, n) again."""
        self._seen.update(map(_digest, profiles))

    def new(self, profiles: Levels) -> NDArray[np.bool_]:
        """Which of the profiles (k, n) were not measured, nor come earlier among them, (k,)."""
        fresh, among = np.zeros(len(profiles), dtype=bool), set()
        for row, digest in enumerate(map(_digest, profiles)):
            fresh[row] = digest not in self._seen and digest not in among
            among.add(digest)
        return fresh

    def rows(self, which: NDArray[np.intp] | slice) -> tuple[Levels, Floats, Floats, NDArray[np.intp]]:
        """Profiles, losses, variances and groups of some rows."""
        return self.profiles[which], self.losses[which], self.variances[which], self.groups[which]

    def ranked(self) -> NDArray[np.intp]:
        """Rows from the best on; of equally good ones the latest first, so that plateaus are crossed."""
        return np.lexsort((-np.arange(len(self.losses)), self.losses))

    def chosen(self, count: int) -> NDArray[np.intp]:
        """The best rows and the latest, half and half, oldest first: at most `count`.

        Where losses have errors only the latest, for the best would be those with lucky errors.
        """
        if count >= len(self.losses):
            return np.arange(len(self.losses))
        if self.variances.any():
            return np.arange(len(self.losses) - count, len(self.losses))
        best = self.ranked()[: count // 2]
        return np.union1d(best, np.arange(len(self.losses) - (count - len(best)), len(self.losses)))

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        arrays = {name: pack(getattr(self, name)) for name in _ARRAYS}
        return {
            **arrays,
            "forgotten": self.forgotten,
            "seen": pack(np.frombuffer(b"".join(sorted(self._seen)), dtype=np.uint8)),
        }

    def restore(self, values: dict[str, Any]) -> None:
        """Take back what `to_dict` gave."""
        for name in _ARRAYS:
            setattr(self, name, unpack(values[name]))
        self.forgotten = values["forgotten"]
        seen = unpack(values["seen"]).tobytes()
        self._seen = {seen[first : first + DIGEST] for first in range(0, len(seen), DIGEST)}


class Elite:
    """The best profiles that are not too much alike, so that crossover has something to cross.

    A newcomer that differs from members in less than `apart` units takes the place of all of them, if it is no worse
    than the best of them; any other takes the place of the worst.
    """

    def __init__(self, n: int, size: int, apart: int) -> None:
        self.size, self.apart = size, apart
        self.profiles: Levels = np.empty((0, n), dtype=np.int16)  # best first
        self.losses: Floats = np.empty(0)

    def offer(self, profiles: Levels, losses: Floats) -> None:
        """Take in those of the profiles (k, n) with finite losses (k,) that belong here."""
        for profile, loss in zip(profiles, losses, strict=True):
            if np.isfinite(loss) and (len(self.losses) < self.size or loss <= self.losses[-1]):
                self._take(profile, float(loss))

    def _take(self, profile: Levels, loss: float) -> None:
        distance = (self.profiles != profile).sum(axis=1)
        near = distance < self.apart
        if near.any() and loss > self.losses[near].min():
            return  # a member as good as this is near
        kept = np.flatnonzero(~near)[: self.size - 1]
        place = int(np.searchsorted(self.losses[kept], loss, side="left"))  # of equals the latest first
        self.profiles = np.insert(self.profiles[kept], place, profile, axis=0)
        self.losses = np.insert(self.losses[kept], place, loss)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"profiles": pack(self.profiles), "losses": pack(self.losses)}

    def restore(self, values: dict[str, Any]) -> None:
        """Take back what `to_dict` gave."""
        self.profiles, self.losses = unpack(values["profiles"]), unpack(values["losses"])


def _digest(profile: Levels) -> bytes:
    return hashlib.blake2b(profile.tobytes(), digest_size=DIGEST).digest()
