"""The walk: Metropolis chains that cool and are heated again, side by side on several threads.

Energy is ``Score.energy``: seconds per step, dearer where memory lacks, so the walk may cross what
does not fit; only what fits is returned. A chain's temperature follows the share of proposals
that it accepts, which falls over a *cycle* from ``HOT`` to ``COLD``: so it needs no knowledge of
what a second is worth. A cycle ends with a coordinate descent; the next is twice as long, half of
the chains go on from the best of all, whoever found it, and half from their own best: not from
what others have found, so that two ways of looking do not end in one place. With ``kicks`` a line
of kicked descents goes on from the best start beside the chains, once something fits: where walking
finds little this does, and the other way round.

All that is random follows from one seed, chains do not see each other within a cycle, and the
budget counts evaluations: the answer is the same whatever the threads do. The clock is looked at
between rounds of at most ``ROUND`` proposals. Read ``Walk``; the loop is ``chain.run_chain``.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from planner.search.bounds import DEEPEST, DIVES, Proof
from planner.search.chain import DONE, Chain, run_chain
from planner.search.descent import (
    Place,
    beside,
    fastest,
    iterate,
    make_found,
    merge,
    place_at,
    place_of,
    side_by_side,
)
from planner.search.engine import Budget, Record
from planner.search.evaluate import Evaluator
from planner.search.options import Assignment
from planner.search.records import Ints, Scratch

NUM_CHAINS = 4
ROUND = 8_192  # proposals of a chain between two looks at the clock: a twentieth of a second
FIRST_CYCLE = 4  # rounds of the first cycle
HOT, COLD = 0.2, 0.004  # shares of proposals that are accepted
KICKED = 8  # evaluations of kicked descents for each proposal of the chains
STALE_CYCLES = 2  # without a better plan before the walk ends
FIRST_BOXES = 1_000  # that are halved, where nothing fits, before the first are followed down


@dataclass(kw_only=True)
class _Walker:
    """A chain with its room for evaluations."""

    chain: Chain
    scratch: Scratch

    @classmethod
    def of(cls, evaluator: Evaluator, seed: int) -> _Walker:
        shape = (2, len(evaluator.calls))
        chain = Chain(
            mesh=np.zeros(shape, dtype=np.int64), row=np.zeros(shape, dtype=np.int64),
            numbers=np.zeros(3), counts=np.zeros(5, dtype=np.int64),
            state=np.array([seed], dtype=np.uint64), found=make_found(evaluator),
        )  # fmt: skip
        return cls(chain=chain, scratch=evaluator.make_scratch())

    def start(self, place: Place) -> None:
        """Go on from ``place``; the next temperature is found anew from a warm one."""
        self.chain.mesh[:], self.chain.row[:] = place.mesh, place.row
        self.chain.numbers[:] = place.energy, 0.05, 0.0
        self.chain.counts[:] = 0

    def run(self, record: Record, proposals: int, accept: float) -> int:
        """Propose so many times, or until the clock is up while prices are asked; how many."""
        evaluator, before = record.evaluator, int(self.chain.counts[1])
        self.chain.counts[0] = proposals
        known = evaluator.reallocations
        while run_chain(
            evaluator.tables, known.table, self.scratch, self.chain, accept
        ) != DONE:  # fmt: skip
            if record.late:
                break
            known.add(int(self.scratch.missing[0]))
        return int(self.chain.counts[1]) - before

    @property
    def best(self) -> tuple[Ints, Ints]:
        """(mesh, row) of its best that fits; where none does, of what lacks least."""
        found = self.chain.found
        kind = 0 if math.isfinite(found.values[0]) else 1
        return found.mesh[kind], found.row[kind]


class Walk:
    """A walk that goes on cycle by cycle from ``starts``, none of which is lost."""

    def __init__(
        self, record: Record, starts: Sequence[Assignment], seed: int, *, kicks: bool = False
    ) -> None:
        self.record = record
        self.kicks = kicks
        self.rng = random.Random(seed)
        evaluator = record.evaluator
        self.walkers = [_Walker.of(evaluator, self.rng.getrandbits(64)) for _ in range(NUM_CHAINS)]
        starts = [*starts, fastest(evaluator)]
        for start in starts:
            record.score(start)
        places = sorted((place_of(evaluator, s) for s in starts), key=lambda place: place.energy)
        self.ends = [places[k % len(places)] for k in range(NUM_CHAINS)]
        # As the ``descent`` engine begins, so that the line finds what that finds.
        self.kicked, self.kicks_rng = places[0], random.Random(seed)
        self.rounds, self.stale = FIRST_CYCLE, 0

    def cycle(self) -> None:
        """One cycle, or what the budget leaves of it; the next is twice as long.

        ``stale``: so many cycles in a row have found nothing better.
        """
        before_s = self.record.best_score.step_s
        if self.kicks and self.record.best is not None:
            self._cycle_beside_kicks()
        else:
            self._cycle()
        self.stale = 0 if self.record.best_score.step_s < before_s * (1 - 1e-6) else self.stale + 1
        self.rounds *= 2

    def _cycle_beside_kicks(self) -> None:
        record = self.record
        assert record.best is not None
        left = record.budget.max_evaluations - record.evaluations
        most = min(left // 2, KICKED * NUM_CHAINS * ROUND * self.rounds)
        if record.evaluator.score_vectors(self.kicked.mesh, self.kicked.row).overshoot > 0:
            self.kicked = place_of(record.evaluator, record.best)
        kicks = partial(iterate, start=self.kicked, rng=self.kicks_rng)
        with beside(record, most, kicks) as line:
            self._cycle()
            self.kicked = line.result()  # all of it, though the gap be reached: its share is fixed

    def _cycle(self) -> None:
        """All chains from hot to cold, in rounds, and descents from where they have been."""
        record = self.record
        ends = self.ends
        if record.best is not None:  # which others than the chains may have found
            ends = [*ends, place_of(record.evaluator, record.best)]
        best = min(ends, key=lambda place: place.energy)
        for k, walker in enumerate(self.walkers):
            walker.start(best if k % 2 == 0 else self.ends[k])
        with ThreadPoolExecutor(min(NUM_CHAINS, os.cpu_count() or 1)) as pool:
            for n in range(self.rounds):
                left = (record.budget.max_evaluations - record.evaluations) // NUM_CHAINS
                if record.spent or left <= 0:
                    return
                accept = HOT * (COLD / HOT) ** (n / max(1, self.rounds - 1))
                proposals = min(ROUND, left)
                jobs = [
                    pool.submit(walker.run, record, proposals, accept) for walker in self.walkers
                ]
                record.evaluations += sum(job.result() for job in jobs)
                for walker in self.walkers:
                    merge(record, walker.chain.found)
        if not record.spent:  # else a chain may not even have begun
            places = [place_at(record.evaluator, *walker.best) for walker in self.walkers]
            self.ends = side_by_side(record, places, self.rng)

    def interrupt(self) -> None:
        """Ctrl-C: what the chains have found is not lost."""
        for walker in self.walkers:
            merge(self.record, walker.chain.found)
        self.record.interrupt()


def walk(
    evaluator: Evaluator, starts: Sequence[Assignment], budget: Budget, seed: int
) -> Record:  # fmt: skip
    """The record of a walk from ``starts``.

    Ends when the budget is spent, or after ``STALE_CYCLES`` cycles that found nothing better; an
    interrupt (Ctrl-C) ends it with what it has. Where a cycle met nothing that fits, the walk goes
    on from what ``_first_fit`` finds.
    """
    record = Record(evaluator=evaluator, budget=budget)
    chains: Walk | None = None
    try:
        chains = Walk(record, starts, seed, kicks=True)
        while chains.stale < STALE_CYCLES and not record.spent:
            chains.cycle()
            if record.best is None and not record.spent:
                _first_fit(record, chains.rng)
                if record.best is None:
                    break
                chains.ends, chains.stale = [place_of(evaluator, record.best)] * NUM_CHAINS, 0
    except KeyboardInterrupt:
        chains.interrupt() if chains is not None else record.interrupt()
    return record


def _first_fit(record: Record, rng: random.Random) -> None:
    """Let branch and bound, whose boxes know memory, find something that fits, or prove that

    nothing does. The walk may not: where what fits is slow, all that lacks a little is better.
    """
    proof, boxes = Proof.of(record), FIRST_BOXES

    def stop(proof: Proof) -> bool:
        return record.best is not None or record.spent or proof.boxes >= boxes

    while record.best is None and not record.spent and not proof.closed:
        proof.run(stop)
        for assignment in proof.dives(rng, DIVES, most=DEEPEST):
            record.score(assignment)
        boxes *= 2
    if record.best is None and proof.closed:
        record.raise_bound(proof.lower_bound_s)
