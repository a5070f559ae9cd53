"""``exact`` and ``auto``: the optimum of the option space, or a plan and a proven bound.

The walk finds good plans fast; ``bounds.Proof`` shows how much better a plan can be, and finds
what the walk missed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from planner.search.bounds import DEEPEST, DIVES, Proof
from planner.search.descent import descend, place_of, side_by_side
from planner.search.engine import Budget, Record
from planner.search.evaluate import Evaluator
from planner.search.mcmc import Walk
from planner.search.options import Assignment

DESCENTS = 4  # after each turn of the proof, from the best of where its dives lead
FIRST_BOXES = 3_000  # that the proof halves before the walk goes on: about as long as its cycle


def exact(evaluator: Evaluator, starts: list[Assignment], budget: Budget, seed: int) -> Record:
    """From ``starts`` to the optimum over the options of ``OptionSpace``, or as far as time allows.

    An interrupt (Ctrl-C) ends it with the best plan and the bound so far. There is no randomness.
    """
    record = Record(evaluator=evaluator, budget=budget)
    for start in starts:
        record.score(start)
    proof = Proof.of(record)
    try:
        _go_on(record, proof)
    except KeyboardInterrupt:
        record.interrupt()
    record.raise_bound(proof.lower_bound_s)
    return record


def auto(evaluator: Evaluator, starts: list[Assignment], budget: Budget, seed: int) -> Record:
    """Proof and walk in turns, each turn twice as long as the one before.

    The proof says when to stop, and where else to look: descents start where its best boxes lead.
    A better plan lets it cut off more. The walk may look at a third of the budget's assignments,
    and so may the descents. A plan that is near enough to the bound is improved by one descent
    more: that is far less work than what was done. Interrupted as ``exact``. With the same seed
    and no time limit that cuts in the answer is the same.
    """
    record = Record(evaluator=evaluator, budget=budget)
    chains: Walk | None = None
    proof: Proof | None = None
    rng, boxes = random.Random(seed), FIRST_BOXES
    to_walk = to_follow = budget.max_evaluations // 3
    try:
        chains = Walk(record, starts, seed)
        proof = Proof.of(record)
        while not record.spent:
            _go_on(record, proof, boxes if to_walk + to_follow > 0 else None)
            if proof.closed:
                break
            to_follow -= _spend(record, to_follow, partial(_follow, record, proof, rng))
            to_walk -= _spend(record, to_walk, chains.cycle)
            boxes *= 2
        _polish(record, rng)
    except KeyboardInterrupt:
        chains.interrupt() if chains is not None else record.interrupt()
    if proof is not None:
        record.raise_bound(proof.lower_bound_s)
    return record


def _spend(record: Record, most: int, work: Callable[[], None]) -> int:
    """Let ``work`` look at so many assignments; how many it did."""
    budget, before = record.budget, record.evaluations
    record.budget = replace(budget, max_evaluations=min(budget.max_evaluations, before + most))
    if not record.spent:
        work()
    record.budget = budget
    return record.evaluations - before


def _follow(record: Record, proof: Proof, rng: random.Random) -> None:
    """Descend from the best of where the proof's most promising boxes lead."""
    found = list(proof.dives(rng, DIVES, most=DEEPEST))
    for assignment in found:
        record.score(assignment)
    places = sorted(
        (place_of(record.evaluator, assignment) for assignment in found),
        key=lambda place: place.energy,
    )
    if places and not record.spent:
        side_by_side(record, places[:DESCENTS], rng)


def _polish(record: Record, rng: random.Random) -> None:
    """Descend from the best, though it be within the budget's gap."""
    budget = record.budget
    record.budget = replace(budget, gap=0.0)
    if record.best is not None and not record.spent:
        descend(record, place_of(record.evaluator, record.best), rng)
    record.budget = budget


def _go_on(record: Record, proof: Proof, boxes: int | None = None) -> None:
    """Halve so many boxes, or as many as the budget allows."""
    last = None if boxes is None else proof.boxes + boxes

    def stop(proof: Proof) -> bool:
        record.raise_bound(proof.lower_bound_s)
        return record.spent or (last is not None and proof.boxes >= last)

    proof.run(stop)
