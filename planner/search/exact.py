"""``exact`` and ``auto``: the optimum of the option space, or a plan and a proven bound.

The walk finds good plans fast; ``bounds.Proof`` shows how much better a plan can be, and finds
what the walk missed.
"""

from __future__ import annotations

import random
from dataclasses import replace

from planner.search.bounds import Proof
from planner.search.descent import descend, place_of
from planner.search.engine import Budget, Record
from planner.search.evaluate import Evaluator
from planner.search.mcmc import Walk
from planner.search.options import Assignment
from planner.search.relaxation import Relaxation

DIVES = 40  # boxes of the proof that are followed down to an assignment after each of its turns
FIRST_BOXES = 4_000  # that the proof halves before the walk goes on: about as long as its cycle


def exact(evaluator: Evaluator, starts: list[Assignment], budget: Budget, seed: int) -> Record:
    """From ``starts`` to the optimum over the options of ``OptionSpace``, or as far as time allows.

    An interrupt (Ctrl-C) ends it with the best plan and the bound so far. There is no randomness.
    """
    record = Record(evaluator=evaluator, budget=budget)
    for start in starts:
        record.score(start)
    proof = _proof(record)
    try:
        _go_on(record, proof)
    except KeyboardInterrupt:
        record.interrupt()
    record.raise_bound(proof.lower_bound_s)
    return record


def auto(evaluator: Evaluator, starts: list[Assignment], budget: Budget, seed: int) -> Record:
    """Walk and proof in turns, each turn twice as long as the one before.

    A better plan lets the proof cut off more, and the proof says when to stop walking and where
    else to look. The walk may
    look at a third of the budget's assignments. Interrupted as ``exact``. With the same seed and no
    time limit that cuts in the answer is the same.
    """
    record = Record(evaluator=evaluator, budget=budget)
    chains: Walk | None = None
    proof: Proof | None = None
    rng = random.Random(seed)
    boxes, walking = FIRST_BOXES, replace(budget, max_evaluations=budget.max_evaluations // 3)
    try:
        chains = Walk(record, starts, seed)
        while not record.spent:
            record.budget = walking
            walks = not record.spent
            if walks:
                chains.cycle()
            record.budget = budget
            proof = _proof(record) if proof is None else proof
            _go_on(record, proof, boxes if walks else None)
            if proof.closed:
                break
            _follow(record, proof, rng)
            boxes *= 2
    except KeyboardInterrupt:
        chains.interrupt() if chains is not None else record.interrupt()
    if proof is not None:
        record.raise_bound(proof.lower_bound_s)
    return record


def _follow(record: Record, proof: Proof, rng: random.Random) -> None:
    """Descend from where the proof's most promising boxes lead."""
    for assignment in proof.dives(DIVES):
        if record.spent:
            return
        record.score(assignment)
        descend(record, place_of(record.evaluator, assignment), rng)


def _proof(record: Record) -> Proof:
    return Proof(
        Relaxation(record.evaluator), best_s=lambda: record.best_score.step_s, visit=record.score
    )


def _go_on(record: Record, proof: Proof, boxes: int | None = None) -> None:
    """Halve so many boxes, or as many as the budget allows."""
    last = None if boxes is None else proof.boxes + boxes

    def stop(proof: Proof) -> bool:
        record.raise_bound(proof.lower_bound_s)
        return record.spent or (last is not None and proof.boxes >= last)

    proof.run(stop)
