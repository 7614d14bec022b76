"""Where candidates come from, and what those of each source have lately been worth."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from discopt.arrays import pack, unpack
from discopt.space import Levels

Floats = NDArray[np.float64]

MODEL, SWITCH, MERGE = range(3)
UNSOURCED = -1  # a random profile, where the sources know nothing new
BLIND = (0.1, 0.9)  # least and largest share of blind switches
LEAST_WORTH = 1e-9  # of a source, that shares are made of
RATED = 0.1  # weight of a generation in what a source is worth, once there were ten
RECENT = 0.2  # weight of a generation in the share of candidates that lose what the incumbent does
SUCCESS, CHANGE = 0.2, 1.5  # share of blind switches that should be better, and how much larger they get if more are
WIDER, NARROWER, LEAST_RADIUS = 1.3, 0.95, 2.0  # the trust region after a generation that was better, or not


class Sources:
    """The sources of a generation's candidates, and how they share the next: by what they gain, on average.

    A trust region and the size of blind switches grow where candidates get better, and shrink where they do not.
    """

    def __init__(self, n: int, radius: float) -> None:
        self.n = n
        self.radius = min(radius, n)  # of the trust region, in units
        self.flat = 0.0  # share of the latest candidates that lost exactly as much as the incumbent
        self.of: NDArray[np.int8] = np.empty(0, dtype=np.int8)  # the candidates, the incumbent without
        self.siblings: Levels = np.empty((0, n), dtype=np.int16)  # a parent, and its children that beat it
        self._switches = 3.0
        self._worth = [0.0, 0.0, 0.0]  # what a candidate of each source gains, on average
        self._rated = [0, 0, 0]  # generations that it had a part in

    @property
    def blind_share(self) -> float:
        """Of the candidates, by what blind switches have lately been worth beside those of the model."""
        model, switch = (max(self._worth[source], LEAST_WORTH) for source in (MODEL, SWITCH))
        return float(np.clip(switch / (model + switch), *BLIND))

    @property
    def most_switches(self) -> int:
        """Of a blind candidate."""
        return max(1, round(self._switches))

    def rate(self, lost: Floats, worthy: NDArray[np.bool_], *, by_gain: bool, improved: bool) -> None:
        """Learn from candidates that `lost` (k,) more than the incumbent, and whether one of them replaced it.

        A source is worth what its candidates gain on average or, where losses have errors, the share of them that is
        `worthy` (k,) beyond doubt.
        """
        of = self.of[: len(lost)]
        for source in (MODEL, SWITCH, MERGE):
            if (own := of == source).any():
                gains = np.maximum(-lost[own], 0.0)
                gain = float(gains.mean() if by_gain and np.isfinite(gains).all() else worthy[own].mean())
                self._rated[source] += 1
                self._worth[source] += max(RATED, 1 / self._rated[source]) * (gain - self._worth[source])
        self.flat += RECENT * (float((lost == 0).mean()) - self.flat)
        self.radius = min(WIDER * self.radius, self.n) if improved else max(NARROWER * self.radius, LEAST_RADIUS)
        if (switched := of == SWITCH).any():
            more = float(np.sign((lost[switched] < 0).mean() - SUCCESS))
            self._switches = float(np.clip(self._switches * CHANGE**more, 1.0, self.n / 4 + 1))

    def note_siblings(self, parent: Levels, candidates: Levels, lost: Floats) -> None:
        """Keep the candidates (k, n), switched or of the model, that lost less than their parent: `lost` (k,) more.

        The best come first.
        """
        better = np.flatnonzero(np.isin(self.of[: len(lost)], [MODEL, SWITCH]) & (lost < 0))
        better = better[np.argsort(lost[better], kind="stable")]
        self.siblings = np.concatenate([parent[None], candidates[better]])

    def state(self) -> dict[str, Any]:
        """As JSON values."""
        rest = {name: getattr(self, name) for name in ("radius", "flat", "_switches", "_worth", "_rated")}
        return {"of": pack(self.of), "siblings": pack(self.siblings), "rest": rest}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self.of, self.siblings = unpack(state["of"]), unpack(state["siblings"])
        for name, value in state["rest"].items():
            setattr(self, name, list(value) if isinstance(value, list) else value)
