"""A search that learns a model of the loss from all it measures, and proposes where that expects most.

Candidates of a generation come from four sources: descents on draws from the model (`discopt.surrogate`) within a
trust region; crossover of the best profiles, and level switches of them, both screened by the model; and the merged
changes of siblings that all beat their parent. A source gets as many candidates as its own have lately been worth.
Where measurements are noisy, a generation is a race against the incumbent (`discopt.racing`) whose last round is
fresh data, and the search ends with a choice among its best, the uniform profile and the rivals on data that it has
not seen. What earned its place, and by how much, is in docs/algorithms.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from discopt import proposals
from discopt.archive import Archive, Elite
from discopt.arrays import pack, unpack
from discopt.objective import Losses, Query, mean_loss
from discopt.optimizers.base import (
    Measurement,
    StopReason,
    check_answer,
    check_state,
    distinct,
    pack_query,
    unpack_query,
)
from discopt.optimizers.evopress import MAX_SEED
from discopt.optimizers.learning_settings import Finalist, LearningSettings
from discopt.optimizers.plan import Plan
from discopt.racing import Race
from discopt.space import Levels, SearchSpace
from discopt.sums import ROWS, Sums
from discopt.surrogate import PRODUCT, Shape, Surrogate, best_shape

RUNNERS_UP = 1  # of the final choice
SOURCES = ("descent", "crossover", "switch", "merge")
UNSOURCED = -1  # a random profile, where the sources know nothing new
FIRST = 8  # candidates of the first generations, enough to tell whether the loss is a sum, and where it is rugged
DRAWS = 4  # candidates of a generation where the loss is a sum
REFIT = 1.5  # times as many measurements after which the model's shape is looked for again
_START, _SEARCH, _CHOICE = "start", "search", "choice"  # what a query is for


class Learning:
    """The search as an ask/tell optimizer; one ask/tell turn is one round of a generation."""

    algorithm = "learning"

    def __init__(
        self, space: SearchSpace, plan: Plan | None = None, settings: LearningSettings | None = None, *, seed: int = 0
    ) -> None:
        self.space = space
        self.plan = plan if plan is not None else Plan()
        self.settings = settings if settings is not None else LearningSettings()
        self.generation = 0
        self.improved_at = 0
        self.stop: StopReason | None = None
        self.start: Measurement | None = None
        self.choice: tuple[Finalist, ...] = ()  # the final choice, best first; () before it, or without one
        self._rng = np.random.default_rng(seed)
        self._seed = int(self._rng.integers(MAX_SEED))  # of every query, where measurements are exact
        self._archive = Archive(space.n)
        self._elite = Elite(space.n, self.settings.elite, 1 + round(self.settings.apart * space.n))
        self._shape: tuple[int, Shape] | None = None  # and how many measurements it was found with
        self._sums = Sums(space)
        self._radius = min(self.settings.radius, space.n)
        self._switches = 3.0
        self._worth = dict.fromkeys(SOURCES, 0.5)
        self._flat = 0.0  # share of the latest candidates that lost exactly as much as the incumbent
        self._sources: NDArray[np.int8] = np.empty(0, dtype=np.int8)  # of the candidates, the incumbent without
        self._siblings: Levels = np.empty((0, space.n), dtype=np.int16)  # a parent, and its children that beat it
        self._level = 0.0  # what the incumbent is thought to lose, where measurements are noisy
        self._noise = 0.0  # variance of a paired difference at fidelity 1
        self._spent = 0
        self._exhausted = False
        self._phase = _START
        given = [np.asarray(p) for p in ([self.plan.start] if self.plan.start is not None else [])]
        known = [*given, *map(np.asarray, (*self.settings.rivals, *self.settings.references))]
        self._uniform = space.nearest_uniform()
        first = [*map(space.check, known[: len(given)]), self._uniform, *map(space.check, known[len(given) :])]
        self._prior = self._checked_prior()
        random = space.random(self.settings.candidates, self._rng)
        self._best = Measurement.unmeasured(first[0])
        self._race: Race | None = None
        self._query: Query | None = None
        self._begin(distinct(np.concatenate([np.stack(first), random])))

    @property
    def exact(self) -> bool:
        """Whether a profile is measured once, all on one sample."""
        return self.plan.fidelity == 1

    @property
    def done(self) -> bool:
        return self.stop is not None

    @property
    def best(self) -> Measurement:
        return self._best

    @property
    def fraction(self) -> float:
        return 1.0 if self.done else min(1.0, self._spent / self.plan.total_fidelity)

    def describe(self) -> dict[str, Any]:
        round_ = self._race.round if self._race is not None else 0
        return {"generation": self.generation + (self._phase != _START), "stage": round_ + 1, "phase": self._phase}

    def ask(self) -> Query:
        if self._query is None:
            raise ValueError("the search is done; check `done` first")
        return self._query

    def tell(self, query: Query, losses: Losses) -> None:
        check_answer(self._query, query)
        self._spent += query.fidelity * len(query.population)
        if self._race is None:
            self._learn_exact(query, losses)
        else:
            self._race.tell(losses)
            alone = self._phase != _SEARCH and self._race.round < len(self._race.fidelities)
            if self._phase == _START:  # until the race is over
                self._best = Measurement.of_row(query, losses, int(mean_loss(losses).argmin()))
            if not self._race.done or alone:  # the start and the answer are measured in full, even by themselves
                self._ask_round()
                return
            self._learn_race(query, losses)
        self._next()

    def _learn_exact(self, query: Query, losses: Losses) -> None:
        means = mean_loss(losses)
        if self._phase == _SEARCH:
            self._sums.learn(self._best.profile, self._best.loss, query.population, means)
        row = int(means.argmin())
        before = self._best.loss if np.isfinite(self._best.loss) else np.inf
        lost = np.subtract(means, before, out=np.full(len(means), np.inf), where=np.isfinite(means))
        self._note_siblings(self._best.profile, query.population, lost)
        self._archive.add(query.population, means, np.zeros(len(means)))
        self._elite.offer(query.population, means)
        if means[row] <= before:
            self._best = Measurement.of_row(query, losses, row)
        self._rate(means < before, improved=bool(means[row] < before), lost=lost)
        self._advance(improved=bool(means[row] < before))

    def _learn_race(self, query: Query, losses: Losses) -> None:
        race = self._race
        assert race is not None
        behind, error = race.differences(0)
        known = np.isfinite(error) & np.isfinite(behind)
        fidelity = np.array([race.fidelity_of(row) for row in range(len(behind))])
        if known[1:].any():
            noise = float(np.median((error[1:] ** 2 * fidelity[1:])[known[1:]]))
            self._noise = noise if not self._noise else 0.8 * self._noise + 0.2 * noise
        variance = np.where(known, error**2, self._noise / fidelity)
        winner = race.leader if self._phase == _CHOICE else race.winner
        if self._phase != _CHOICE:
            self._archive.add(race.candidates[1:], self._level + behind[1:], variance[1:])
            self._elite.offer(race.candidates[1:], self._level + behind[1:] + np.sqrt(variance[1:]))
        if self._phase == _START:
            level = self._level if np.isfinite(race.latest[0]) else np.inf
            self._archive.add(race.candidates[:1], np.array([level]), np.zeros(1))
        last = int(np.flatnonzero((query.population == race.candidates[winner]).all(axis=1))[0])
        if winner or self._phase != _SEARCH or query.fidelity >= self._best.fidelity:
            self._best = Measurement.of_row(query, losses, last)
        if np.isfinite(race.latest[[0, winner]]).all():  # of the last round alone, which did not choose the winner
            self._level += float(race.latest[winner] - race.latest[0])
        if self._phase == _CHOICE:
            self.choice = _choice_of(race, winner)
        if self._phase == _SEARCH:
            lost = np.where(known[1:], behind[1:] + error[1:], np.inf)
            self._note_siblings(race.candidates[0], race.candidates[1:], lost)
            self._rate(behind[1:] < -error[1:], improved=winner > 0, lost=behind[1:])
        self._advance(improved=winner > 0)

    def _advance(self, *, improved: bool) -> None:
        if self._phase == _START:
            self.start = self._best
        else:
            self.generation += 1
            if improved:
                self.improved_at = self.generation

    def _rate(self, worthy: NDArray[np.bool_], *, improved: bool, lost: NDArray[np.float64]) -> None:
        """Learn what the sources are worth, how far to go, and how many switches to make."""
        if self._phase != _SEARCH:
            return
        for number, source in enumerate(SOURCES):
            if (own := self._sources[: len(worthy)] == number).any():
                self._worth[source] += 0.2 * (float(worthy[own].mean()) - self._worth[source])
        self._flat += 0.2 * (float((lost == 0).mean()) - self._flat)
        self._radius = min(1.3 * self._radius, self.space.n) if improved else max(0.95 * self._radius, 2.0)
        switched = self._sources[: len(lost)] == SOURCES.index("switch")
        if switched.any():
            share = float((lost[switched] < 0).mean())
            self._switches = float(np.clip(self._switches * 1.5 ** np.sign(share - 0.2), 1.0, self.space.n / 4 + 1))

    def _note_siblings(self, parent: Levels, candidates: Levels, lost: NDArray[np.float64]) -> None:
        """Keep the switched candidates (k, n) that lost less than their parent (n,), `lost` (k,) more, best first."""
        if self._phase != _SEARCH:
            return
        better = np.flatnonzero((self._sources[: len(lost)] == SOURCES.index("switch")) & (lost < 0))
        better = better[np.argsort(lost[better], kind="stable")]
        self._siblings = np.concatenate([parent[None], candidates[better]])

    # -- the next query ------------------------------------------------------------------------------------------

    def _next(self) -> None:
        left = self.plan.total_fidelity - self._spent
        enough = 1 if self.exact else self._race_cost(1 + self.plan.batch) + self._choice_cost()
        if self._phase != _CHOICE and left >= enough:
            self._phase = _SEARCH
            candidates = self._propose(min(left, self._batch) if self.exact else self.plan.batch)
            if len(candidates):
                self._begin(candidates if self.exact else np.concatenate([self._best.profile[None], candidates]))
                return
            self._exhausted = True
        finalists = self._finalists()
        fidelity = min(4 * left // (len(finalists) + 12), self._choice_fidelity)
        rounds: tuple[int, ...] = (fidelity // 4, fidelity)  # the first parts with those that are clearly worse
        if fidelity < 4:
            fidelity = min(left // len(finalists), self._choice_fidelity)
            rounds = (fidelity,)
        if self.exact or self._phase == _CHOICE or fidelity < 1:
            self.stop = StopReason.EXHAUSTED if self._exhausted else StopReason.EVALUATIONS
            self._query, self._race = None, None
            return
        self._phase = _CHOICE
        self._race = Race(finalists, rounds, max(1, len(finalists) // 2))
        self._ask_round()

    @property
    def _batch(self) -> int:
        """Exact measurements are best learned from a few at a time, until there are many, or the loss is rugged."""
        rugged = self._shape is not None and self._shape[1].covariance.name == PRODUCT
        small = FIRST if rugged or (self._sums.open and self._spent < FIRST**2) else self.settings.small
        return min(self.plan.batch, max(small, self._spent // 256))

    def _rounds(self) -> tuple[int, ...]:
        first = min(self.settings.first or max(1, self.plan.fidelity // 8), self.plan.fidelity)
        rounds = [first]
        while 4 * rounds[-1] < self.plan.fidelity:
            rounds.append(4 * rounds[-1])
        return (*rounds, self.plan.fidelity) if rounds[-1] < self.plan.fidelity else tuple(rounds)

    def _race_cost(self, candidates: int) -> int:
        """What a race of so many, the incumbent among them, takes at most."""
        cost, others = 0, candidates - 1
        for fidelity in self._rounds():
            cost += (1 + others) * fidelity
            others = -(-others // self.settings.share)
        return cost

    def _begin(self, candidates: Levels) -> None:
        """Measure as many of the candidates, the first ones, as there is budget for."""
        left = self.plan.total_fidelity - self._spent
        if self.exact:
            self._query = Query(candidates[:left], 1, self._seed)
            return
        while len(candidates) > 1 and self._race_cost(len(candidates)) > left:
            candidates = candidates[:-1]
        rounds = self._rounds() if len(candidates) > 1 else (self.plan.fidelity,)
        self._race = Race(candidates, rounds, self.settings.share)
        self._ask_round()

    def _ask_round(self) -> None:
        assert self._race is not None
        seed = int(self._rng.integers(MAX_SEED))
        fresh = self._phase == _CHOICE
        self._query = Query(self._race.population, self._race.fidelity, seed, fresh=fresh)

    def _finalists(self) -> Levels:
        """Those of the final choice, the best first: (k, n)."""
        references = [np.array(profile, dtype=np.int16) for profile in self.settings.references]
        known = [self._best.profile, self._uniform, *references, *self._elite.profiles[:RUNNERS_UP]]
        return distinct(np.stack(known))

    @property
    def _choice_fidelity(self) -> int:
        return self.settings.choice or self.plan.fidelity

    def _choice_cost(self) -> int:
        """What the final choice takes at most: three profiles in the last round, all in a quarter of that before."""
        finalists = 2 + len(self.settings.references) + RUNNERS_UP
        return (finalists + 12) * self._choice_fidelity // 4

    def _propose(self, count: int) -> Levels:
        """New candidates, (at most count, n)."""
        # Draws explore; while there are fewer measurements than effects, every other generation makes the best of them.
        effects = self.space.n * (self.space.m - 1)
        drawing = self.generation % 2 == 0 or len(self._archive.losses) >= effects
        if self._sums.proven and not self._sums.solved and drawing and len(solved := self._solve(count)):
            self._sources = np.full(len(solved), UNSOURCED, dtype=np.int8)
        else:
            solved = self._mix(count)
        probe = self._sums.probe[: count - 1]
        probe = probe[self._archive.new(probe)]
        self._archive.remember(probe)
        kept = solved[: count - len(probe)]
        self._sources = np.append(self._sources[: len(kept)], np.full(len(probe), UNSOURCED, dtype=np.int8))
        return np.concatenate([kept, probe])

    def _solve(self, count: int) -> Levels:
        """Candidates if the loss is a sum, (at most count, n); none once its lowest profile is known."""
        rows = self._archive.chosen(ROWS)
        known = self._archive.profiles[rows], self._archive.losses[rows]
        solved = distinct(self._sums.draws(*known, min(count, DRAWS), self._rng))
        solved = solved[self._archive.new(solved)]
        self._archive.remember(solved)
        self._sums.solved = not len(solved)
        return solved

    def _mix(self, count: int) -> Levels:
        """Candidates of all sources, (at most count, n)."""
        rng, archive, space = self._rng, self._archive, self.space
        elite = self._elite.profiles
        incumbent = elite[0] if self.exact and len(elite) else self._best.profile
        # On a plateau a model has nothing to tell candidates apart by, and would stay where it is.
        model = self._model() if rng.random() >= self._flat else None
        shares = self._shares(count, model is not None)
        found: list[Levels] = []
        sources: list[int] = []
        for number, source in enumerate(SOURCES):
            if not (wanted := shares[source]):
                continue
            pool = wanted * (proposals.SCREENED if model is not None else 1)
            if source == "descent" and model is not None:
                starts = np.repeat(incumbent[None], wanted, axis=0)
                if len(elite) >= self.settings.elite:
                    starts[1::2] = elite[rng.integers(len(elite), size=len(starts[1::2]))]
                new = proposals.descend(model, starts, np.arange(wanted), int(self._radius), archive, space, rng)
            elif source == "crossover":
                new = proposals.screen(model, proposals.crossed(elite, pool, space, rng), wanted, archive)
            elif source == "merge":
                new = proposals.screen(None, self._merge(), wanted, archive)
            else:
                parents = np.concatenate([incumbent[None], *found])
                switches = max(1, round(self._switches))
                new = proposals.screen(model, proposals.switched(parents, pool, switches, space, rng), wanted, archive)
            archive.remember(new)
            found.append(new)
            sources += [number] * len(new)
        if not sources:  # the neighbours are all known
            found = [proposals.screen(model, space.random(proposals.SCREENED * count, rng), count, archive)]
            archive.remember(found[0])
            sources = [UNSOURCED] * len(found[0])
        self._sources = np.array(sources, dtype=np.int8)
        return np.concatenate(found)

    def _shares(self, count: int, modelled: bool) -> dict[str, int]:
        """How many candidates each source is to give."""
        shares = dict.fromkeys(SOURCES, 0)
        if len(self._siblings) > 2 and count > 1:
            shares["merge"] = 1
        crossing = (
            modelled and len(self._elite.losses) > 0 and len(self._archive.losses) >= self.settings.crossover_from
        )
        able = [s for s, can in (("descent", modelled), ("crossover", crossing), ("switch", True)) if can]
        worth = np.array([max(self._worth[source], 0.05) for source in able])
        count -= shares["merge"]
        least = int(count >= len(able))
        parts = self._rng.multinomial(count - least * len(able), worth / worth.sum())
        for source, part in zip(able, parts, strict=True):
            shares[source] = least + int(part)
        return shares

    def _merge(self) -> Levels:
        return proposals.merged(self._siblings[0], self._siblings[1:], self.space, self._rng)

    def _model(self) -> Surrogate | None:
        """The model of the best and latest measurements; None where there are too few, or the space is too large."""
        s, archive = self.settings, self._archive
        rows = archive.chosen(min(s.model_rows, s.model_cells // (self.space.n * self.space.m)))
        if len(rows) < 4 or s.model_cells // (self.space.n * self.space.m) < 64:
            return None
        profiles, losses, variances = archive.profiles[rows], archive.losses[rows], archive.variances[rows]
        if self._shape is None or self._spent > REFIT * self._shape[0]:
            shuffled = self._rng.permutation(len(rows))
            found = best_shape(self.space, profiles[shuffled], losses[shuffled], variances[shuffled], self._prior)
            self._shape = self._spent, found
        draws = max(self.plan.batch, 2)
        return Surrogate.fit(
            self.space, profiles, losses, variances, self._shape[1], draws, s.temperature, self._rng, self._prior
        )

    def _checked_prior(self) -> NDArray[np.float64] | None:
        if self.settings.prior is None:
            return None
        prior = np.asarray(self.settings.prior, dtype=np.float64)
        shape = (self.space.n, self.space.m)
        if prior.shape != shape:
            raise ValueError(f"prior must have shape {shape}, got {prior.shape}")
        if not (finite := np.isfinite(prior[self.space.allowed])).all():
            raise ValueError(f"prior must be finite where allowed, got {(~finite).sum()} values that are not")
        return np.where(self.space.allowed, prior, 0.0)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    _PLAIN = (
        "generation",
        "improved_at",
        "_seed",
        "_radius",
        "_switches",
        "_worth",
        "_flat",
        "_level",
        "_noise",
        "_spent",
        "_exhausted",
        "_phase",
    )

    def state(self) -> dict[str, Any]:
        return {
            "algorithm": self.algorithm,
            "shape": [self.space.n, self.space.m],
            "rng": self._rng.bit_generator.state,
            "plain": {name: getattr(self, name) for name in self._PLAIN},
            "stop": self.stop.name if self.stop else None,
            "start": self.start.to_dict() if self.start else None,
            "best": self._best.to_dict(),
            "archive": self._archive.to_dict(),
            "elite": self._elite.to_dict(),
            "choice": [finalist.to_dict() for finalist in self.choice],
            "covariance": [self._shape[0], self._shape[1].to_dict()] if self._shape else None,
            "sums": self._sums.state(),
            "sources": pack(self._sources),
            "siblings": pack(self._siblings),
            "race": self._race.to_dict() if self._race else None,
            "query": pack_query(self._query),
        }

    def restore(self, state: dict[str, Any]) -> None:
        check_state(state, self.algorithm, self.space)
        self._rng.bit_generator.state = state["rng"]
        for name in self._PLAIN:
            setattr(self, name, state["plain"][name])
        self._worth = dict(self._worth)
        self.stop = StopReason[state["stop"]] if state["stop"] else None
        self.start = Measurement.from_dict(state["start"]) if state["start"] else None
        self._best = Measurement.from_dict(state["best"])
        self._archive.restore(state["archive"])
        self._elite.restore(state["elite"])
        self.choice = tuple(map(Finalist.from_dict, state["choice"]))
        self._sums.restore(state["sums"])
        known = state["covariance"]
        self._shape = (known[0], Shape.from_dict(known[1])) if known else None
        self._sources, self._siblings = unpack(state["sources"]), unpack(state["siblings"])
        self._race = Race.from_dict(state["race"]) if state["race"] else None
        self._query = unpack_query(state["query"])


def _choice_of(race: Race, winner: int) -> tuple[Finalist, ...]:
    apart, error = race.differences(winner)
    order = np.argsort(apart, kind="stable")
    return tuple(
        Finalist(
            race.candidates[row],
            float(race.latest[row]),
            float(apart[row]),
            float(error[row]) if np.isfinite(error[row]) else None,
        )
        for row in order
    )
