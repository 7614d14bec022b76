"""A search that learns a model of the loss from all it measures, and proposes where that expects most.

Candidates of a generation come from three sources. Most are those of a pool that together are expected to improve most
by the model (`discopt.surrogate`); the pool has descents on draws from the model within a trust region, level switches
of the incumbent, and crossover of the best profiles. Some are blind switches, as many as these have lately been worth.
One is the merged changes of siblings that all beat their parent.

Where measurements are exact, the search goes on elsewhere when nothing gets better (`discopt.basins`). Where they are
noisy, a generation is a race against the incumbent (`discopt.racing`) whose last round is fresh data, and the model
says who won it. Such a search ends with a choice among its best, the uniform profile and the rivals on data that it has
not seen. What earned its place, and by how much, is in docs/algorithms.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from discopt import proposals
from discopt.archive import Elite
from discopt.basins import Basins
from discopt.knowledge import Knowledge
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
from discopt.racing import BEHIND, Race, race_cost, rounds_to
from discopt.sources import MERGE, MODEL, SWITCH, UNSOURCED, Sources
from discopt.space import Levels, SearchSpace
from discopt.sums import ROWS, Sums
from discopt.surrogate import Posterior

NOISY = 3  # times as many rows of the model where measurements are noisy, and each says less
RUNNERS_UP = 1  # of the final choice
CHOICE_SHARE = 0.03  # of the budget, at most, for comparing its two best
FIRST = 8  # candidates of the first generations, enough to tell whether the loss is a sum, and where it is rugged
DESCENTS = 4  # on draws from the model, in a generation
SWITCHED, CROSSED = 64, 16  # of the pool
PLATEAU = 0.5  # share of candidates that lose what the incumbent does, from which on the search stays where it is
DRAWS = 4  # candidates of a generation where the loss is a sum
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
        self.choice: tuple[Finalist, ...] = ()  # the final choice, the chosen first; () before it, or without one
        self._rng = np.random.default_rng(seed)
        self._seed = int(self._rng.integers(MAX_SEED))  # of every query, where measurements are exact
        self._elite = Elite(space.n, self.settings.elite, 1 + round(self.settings.apart * space.n))
        self._sums = Sums(space)
        self._sources = Sources(space.n, self.settings.radius)
        self._basins = Basins(space)
        self._level = 0.0  # what the incumbent is thought to lose, where measurements are noisy
        self._steady = False  # whether full measurements have no noise
        self._noise = 0.0  # variance of a paired difference at fidelity 1
        self._rounds = 0  # of all races
        self._spent = 0
        self._exhausted = False
        self._phase = _START
        given = [np.asarray(p) for p in ([self.plan.start] if self.plan.start is not None else [])]
        known = [*given, *map(np.asarray, (*self.settings.rivals, *self.settings.references))]
        self._uniform = space.nearest_uniform()
        first = [*map(space.check, known[: len(given)]), self._uniform, *map(space.check, known[len(given) :])]
        rows, cells = self.settings.model_rows * (1 if self.exact else NOISY), self.settings.model_cells
        self._knowledge = Knowledge(space, rows=rows, cells=cells, prior=self._checked_prior())
        self._archive = self._knowledge.archive
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
            alone = self._phase != _SEARCH and query.fidelity < self._race.fidelities[-1]
            if self._phase == _START:  # until the race is over
                self._best = Measurement.of_row(query, losses, int(mean_loss(losses).argmin()))
            if not self._race.done or alone:  # the start and the answer are measured in full, even by themselves
                self._ask_round()
                return
            self._learn_race(query, losses)
        self._next()

    def _learn_exact(self, query: Query, losses: Losses) -> None:
        means, basins = mean_loss(losses), self._basins
        lost = np.subtract(means, basins.loss, out=np.full(len(means), np.inf), where=np.isfinite(means))
        if self._phase == _SEARCH and basins.center is not None:
            self._sums.learn(basins.center, basins.loss, query.population, means)
            self._sources.note_siblings(basins.center, query.population, lost)
        self._archive.add(query.population, means, np.zeros(len(means)))
        self._elite.offer(query.population, means)
        row = int(means.argmin())
        improved = bool(means[row] < self._best.loss) or not np.isfinite(self._best.loss)
        if improved or means[row] == self._best.loss:
            self._best = Measurement.of_row(query, losses, row)
        if self._phase == _SEARCH and not basins.moving:
            self._sources.rate(lost, lost < 0, by_gain=True, improved=bool(lost[row] < 0))
        basins.learn(query.population, means)
        self._advance(improved=improved)

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
        steady = query.fidelity == self.plan.fidelity and self._is_steady(race)
        if steady:  # the last round said all there is to know of those in it
            behind[race.last], variance[race.last] = race.latest[race.last] - race.latest[0], 0.0
        winner = self._chosen(race) if self._phase == _CHOICE else race.winner
        if self._phase != _CHOICE:
            if steady:
                self._archive.add(race.candidates, self._level + behind, variance / 2)
            else:
                self._learn_rounds(race, variance * fidelity)
            self._elite.offer(race.candidates[1:], self._level + behind[1:] + np.sqrt(variance[1:]))
        if self._phase == _SEARCH and not steady and (posterior := self._model()) is not None:
            mean, _ = posterior.joint(race.candidates[race.last])
            winner = int(race.last[mean.argmin()])
            self._level = float(mean.min())
        elif np.isfinite(race.latest[[0, winner]]).all():
            self._level += float(race.latest[winner] - race.latest[0])
        last = int(np.flatnonzero((query.population == race.candidates[winner]).all(axis=1))[0])
        if winner or self._phase != _SEARCH or query.fidelity >= self._best.fidelity:
            self._best = Measurement.of_row(query, losses, last)
        if self._phase == _CHOICE:
            self.choice = _choice_of(race, winner)
        if self._phase == _SEARCH:
            lost = np.where(known[1:], behind[1:] + error[1:], np.inf)
            self._sources.note_siblings(race.candidates[0], race.candidates[1:], lost)
            self._sources.rate(behind[1:], behind[1:] < -error[1:], by_gain=False, improved=winner > 0)
        self._advance(improved=winner > 0)

    def _learn_rounds(self, race: Race, variance: NDArray[np.float64]) -> None:
        """Take in each round by itself, for the incumbent's error is shared by all losses that are compared with it.

        The variances (k,) are those of differences to the incumbent at fidelity 1; half of each is the candidate's own.
        """
        variance[0] = self._noise
        for fidelity, rows, more in race.rounds():
            own = variance[rows] / fidelity / 2
            self._archive.add(race.candidates[rows], self._level + more, own, self._rounds)
            self._rounds += 1

    def _is_steady(self, race: Race) -> bool:
        """Whether the incumbent lost exactly as much as when it was last measured in full: then there is no noise."""
        if self._phase == _SEARCH and self._best.fidelity == self.plan.fidelity:
            self._steady = bool(race.latest[0] == self._best.loss)
        return self._steady

    def _chosen(self, race: Race) -> int:
        """The finalist to answer with: the search's best, unless another is better here by more than the error.

        That is two standard errors, for the search has seen much more data than there is for the choice; but one for
        the uniform profile and the references, which the answer must not be worse than.
        """
        behind, error = race.differences(0)
        promised = [(race.candidates == profile).all(axis=1) for profile in (self._uniform, *self.settings.references)]
        least = np.where(np.any(promised, axis=0), 1.0, BEHIND) * np.where(np.isfinite(error), error, 0.0)
        better = [int(row) for row in race.last if behind[row] < -least[row]]
        return min(better, key=lambda row: behind[row], default=0)

    def _advance(self, *, improved: bool) -> None:
        if self._phase == _START:
            self.start = self._best
        else:
            self.generation += 1
            if improved:
                self.improved_at = self.generation

    # -- the next query ------------------------------------------------------------------------------------------

    def _next(self) -> None:
        left = self.plan.total_fidelity - self._spent
        enough = 1 if self.exact else race_cost(1 + self.plan.batch, *self._rules) + self._choice_cost()
        if self._phase != _CHOICE and left >= enough:
            self._phase = _SEARCH
            candidates = self._propose(min(left, self._batch) if self.exact else self.plan.batch)
            if len(candidates):
                self._begin(candidates if self.exact else np.concatenate([self._best.profile[None], candidates]))
                return
            self._exhausted = True
        finalists = self._finalists()
        rounds = self._choice_rounds(len(finalists), left)
        if self.exact or self._phase == _CHOICE or not rounds:
            self.stop = StopReason.EXHAUSTED if self._exhausted else StopReason.EVALUATIONS
            self._query, self._race = None, None
            return
        self._phase = _CHOICE
        self._race = Race(finalists, rounds, max(2, len(finalists) // 2))
        self._ask_round()

    @property
    def _batch(self) -> int:
        """Exact measurements are best learned from a few at a time, until there are many, or the loss is rugged."""
        small = FIRST if self._knowledge.rugged or (self._sums.open and self._spent < FIRST**2) else self.settings.small
        return min(self.plan.batch, max(small, self._spent // 256))

    @property
    def _rules(self) -> tuple[tuple[int, ...], int]:
        """Rounds of a race, and the share that goes on after each.

        The first ones grow, so that the model's rows, which are bounded, hold most of what was measured.
        """
        first = max(self.settings.first or self.plan.fidelity // 8, self._spent // self.settings.model_rows, 1)
        return rounds_to(self.plan.fidelity, first), self.settings.share

    def _begin(self, candidates: Levels) -> None:
        """Measure as many of the candidates, the first ones, as there is budget for."""
        left = self.plan.total_fidelity - self._spent
        if self.exact:
            self._query = Query(candidates[:left], 1, self._seed)
            return
        rounds, share = self._rules
        while len(candidates) > 1 and race_cost(len(candidates), rounds, share) > left:
            candidates = candidates[:-1]
        self._race = Race(candidates, rounds if len(candidates) > 1 else (self.plan.fidelity,), share)
        self._ask_round()

    def _ask_round(self) -> None:
        assert self._race is not None
        seed = int(self._rng.integers(MAX_SEED))
        fresh = self._phase == _CHOICE
        self._query = Query(self._race.population, self._race.fidelity, seed, fresh=fresh)

    def _finalists(self) -> Levels:
        """Those of the final choice, the best first: (k, n)."""
        references = [np.array(profile, dtype=np.int16) for profile in self.settings.references]
        begun = [self.start.profile] if self.start is not None else []
        known = [self._best.profile, *begun, self._uniform, *references, *self._elite.profiles[:RUNNERS_UP]]
        if not self.exact and (posterior := self._model()) is not None:
            starts, draw = np.repeat(self._best.profile[None], DESCENTS, axis=0), np.arange(DESCENTS)
            model = posterior.draw(DESCENTS, 0.0, self._rng)  # their mean, each time
            found = proposals.descend(model, starts, draw, self.space.n, self._archive, self.space, self._rng)
            found = np.concatenate([self._believed(posterior), found])
            known.append(found[posterior.joint(found)[0].argmin()])
        return distinct(np.stack(known))

    @property
    def _choice_fidelity(self) -> int:
        return self.settings.choice or self.plan.fidelity

    def _choice_cost(self) -> int:
        """What the final choice takes at most: three profiles in the second round, all in a quarter of that before."""
        finalists = 4 + len(self.settings.references) + RUNNERS_UP
        return (finalists + 12 + 8 * self._choice_repeats) * self._choice_fidelity // 4

    @property
    def _choice_repeats(self) -> int:
        """Rounds of the two best that follow, where there is more to measure them on."""
        return 0 if self.settings.choice else int(CHOICE_SHARE * self.plan.evaluations / 2)

    def _choice_rounds(self, finalists: int, left: int) -> tuple[int, ...]:
        """Fidelities of the final choice's rounds, for which so much of the budget is left; none if that is too little.

        The first, with less data, parts with those that are clearly worse.
        """
        fidelity = min(4 * left // (finalists + 12), self._choice_fidelity)
        if fidelity < 4:
            fidelity = min(left // finalists, self._choice_fidelity)
            return (fidelity,) if fidelity else ()
        repeats = min((4 * left // fidelity - finalists - 12) // 8, self._choice_repeats)
        return (fidelity // 4, *[fidelity] * (1 + repeats))

    def _propose(self, count: int) -> Levels:
        """New candidates, (at most count, n)."""
        # Draws explore; while there are fewer measurements than effects, every other generation makes the best of them.
        effects = self.space.n * (self.space.m - 1)
        drawing = self.generation % 2 == 0 or len(self._archive.losses) >= effects
        if self._sums.proven and not self._sums.solved and drawing and len(solved := self._solve(count)):
            self._sources.of = np.full(len(solved), UNSOURCED, dtype=np.int8)
        else:
            solved = self._mix(count)
        probe = self._sums.probe[: count - 1]
        probe = probe[self._archive.new(probe)]
        self._archive.remember(probe)
        kept = solved[: count - len(probe)]
        self._sources.of = np.append(self._sources.of[: len(kept)], np.full(len(probe), UNSOURCED, dtype=np.int8))
        return np.concatenate([kept, probe])

    def _solve(self, count: int) -> Levels:
        """Candidates if the loss is a sum, (at most count, n); none once its lowest profile is known."""
        profiles, losses, *_ = self._archive.rows(self._archive.chosen(ROWS))
        solved = distinct(self._sums.draws(profiles, losses, min(count, DRAWS), self._rng))
        solved = solved[self._archive.new(solved)]
        self._archive.remember(solved)
        self._sums.solved = not len(solved)
        return solved

    def _mix(self, count: int) -> Levels:
        """Candidates of all sources, (at most count, n)."""
        rng, space, basins = self._rng, self.space, self._basins
        batch = proposals.Batch(self._archive, space.n)
        if self._is_stuck and batch.take(self._elsewhere(), 1, UNSOURCED):
            basins.move(self._best.profile)
            self._sources.of = batch.sources
            return batch.rows
        center = basins.center if self.exact and basins.center is not None else self._best.profile
        # On a plateau a model has nothing to tell candidates apart by, and would stay where it is.
        posterior = self._model() if rng.random() >= self._sources.flat else None
        if len(self._sources.siblings) > 2 and count > 1:
            batch.take(proposals.merged(self._sources.siblings[0], self._sources.siblings[1:], space, rng), 1, MERGE)
        if posterior is not None and not self.exact:
            believed = self._believed(posterior)
            batch.put(believed[(believed != center).any(axis=1)], MODEL)
        left = count - len(batch.sources)
        blind = int(rng.binomial(left, self._sources.blind_share if posterior is not None else 1.0))
        if blind:
            switched = proposals.switched(center[None], 2 * blind, self._sources.most_switches, space, rng)
            batch.take(switched[basins.inside(switched)], blind, SWITCH)
        left = count - len(batch.sources)
        if posterior is not None and left and len(pool := self._pool(posterior, center)):
            batch.take(pool[proposals.choose(posterior, center, pool, left, rng)], left, MODEL)
        if not len(batch.sources):  # the neighbours are all known
            batch.take(space.random(count, rng), count, UNSOURCED)
        self._sources.of = batch.sources
        return batch.rows

    def _believed(self, posterior: Posterior) -> Levels:
        """Of the profiles that the posterior knows the best, though it may have lost its race: (1, n)."""
        rows = distinct(self._archive.profiles[-len(posterior.features) :])
        mean = posterior.draw(1, 0.0, self._rng)
        return rows[[mean.values(rows, np.zeros(len(rows), dtype=np.intp)).argmin()]]

    def _pool(self, posterior: Posterior, center: Levels) -> Levels:
        """New profiles that the model may choose from, (k, n)."""
        rng, archive, space, elite = self._rng, self._archive, self.space, self._elite.profiles
        model = posterior.draw(DESCENTS, self.settings.temperature, rng)
        starts, draw = np.repeat(center[None], DESCENTS, axis=0), np.arange(DESCENTS)
        inside = self._basins.inside
        pool = [
            proposals.descend(model, starts, draw, int(self._sources.radius), archive, space, rng, inside),
            proposals.switched(center[None], SWITCHED, self._sources.most_switches, space, rng),
        ]
        if len(elite) > 1:
            pool.append(proposals.crossed(elite, CROSSED, space, rng))
        rows = np.concatenate(pool)
        return rows[archive.new(rows) & inside(rows)]

    @property
    def _is_stuck(self) -> bool:
        """Whether exact measurements have not bettered the center for long, on no plateau, and no sum is solved."""
        return self.exact and self._basins.stuck and not self._sums.proven and self._sources.flat < PLATEAU

    def _elsewhere(self) -> Levels:
        """Profiles to search around next, those first of which the model expects most: (k, n)."""
        self._sources.radius = min(self.settings.radius, self.space.n)
        starts = self._basins.starts(self._best.profile, self._best.loss, self._elite.profiles, self._rng)
        posterior = self._model()
        mean = posterior.draw(1, 0.0, self._rng) if posterior is not None else None
        return proposals.screen(mean, starts, 1, self._archive)

    def _model(self) -> Posterior | None:
        return self._knowledge.model(self._spent, self._rng)

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
        "_steady",
        "_level",
        "_noise",
        "_rounds",
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
            "basins": self._basins.state(),
            "stop": self.stop.name if self.stop else None,
            "start": self.start.to_dict() if self.start else None,
            "best": self._best.to_dict(),
            "knowledge": self._knowledge.state(),
            "elite": self._elite.to_dict(),
            "choice": [finalist.to_dict() for finalist in self.choice],
            "sums": self._sums.state(),
            "sources": self._sources.state(),
            "race": self._race.to_dict() if self._race else None,
            "query": pack_query(self._query),
        }

    def restore(self, state: dict[str, Any]) -> None:
        check_state(state, self.algorithm, self.space)
        self._rng.bit_generator.state = state["rng"]
        for name in self._PLAIN:
            setattr(self, name, state["plain"][name])
        self._basins.restore(state["basins"])
        self.stop = StopReason[state["stop"]] if state["stop"] else None
        self.start = Measurement.from_dict(state["start"]) if state["start"] else None
        self._best = Measurement.from_dict(state["best"])
        self._knowledge.restore(state["knowledge"])
        self._elite.restore(state["elite"])
        self.choice = tuple(map(Finalist.from_dict, state["choice"]))
        self._sums.restore(state["sums"])
        self._sources.restore(state["sources"])
        self._race = Race.from_dict(state["race"]) if state["race"] else None
        self._query = unpack_query(state["query"])


def _choice_of(race: Race, winner: int) -> tuple[Finalist, ...]:
    """The winner and then the others, the better the earlier."""
    apart, error = race.differences(winner)
    order = np.argsort(np.where(np.arange(len(apart)) == winner, -np.inf, apart), kind="stable")
    return tuple(
        Finalist(
            race.candidates[row],
            float(race.latest[row]),
            float(apart[row]),
            float(error[row]) if np.isfinite(error[row]) else None,
        )
        for row in order
    )
