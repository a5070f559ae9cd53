"""``exact`` and ``auto``: the optimum of the option space, or a plan and a proven bound.

The walk finds good plans fast; ``bounds.prove`` shows how much better a plan can be, and finds
what the walk missed.
"""

from __future__ import annotations

import time
from dataclasses import replace

from planner.search.bounds import Proof, prove
from planner.search.engine import Budget, Record
from planner.search.evaluate import Evaluator
from planner.search.mcmc import walk
from planner.search.options import Assignment
from planner.search.relaxation import Relaxation


def exact(evaluator: Evaluator, starts: list[Assignment], budget: Budget, seed: int) -> Record:
    """From ``starts`` to the optimum over the options of ``OptionSpace``, or as far as time allows.

    An interrupt (Ctrl-C) ends it with the best plan and the bound so far. There is no randomness.
    """
    record = Record(evaluator=evaluator, budget=budget)
    for start in starts:
        record.score(start)
    return _proven(record)


def auto(evaluator: Evaluator, starts: list[Assignment], budget: Budget, seed: int) -> Record:
    """The walk for a third of the budget, then a proof that also finds what the walk missed.

    Interrupted as ``exact``. With the same seed and no time limit that cuts in the answer is the
    same.
    """
    now = time.monotonic()
    first = replace(
        budget,
        max_evaluations=budget.max_evaluations // 3,
        deadline_s=now + (budget.deadline_s - now) / 3,
    )
    record = walk(evaluator, starts, first, seed)
    record.budget = budget
    return record if record.interrupted else _proven(record)


def _proven(record: Record) -> Record:
    """``record`` with the bound and the plans that a proof finds in what is left of the budget."""
    proof = Proof()
    try:
        prove(
            Relaxation(record.evaluator),
            best_s=lambda: record.best_score.step_s,
            visit=record.score,
            stop=lambda proof: _stop(record, proof),
            proof=proof,
        )
    except KeyboardInterrupt:
        record.interrupt()
    record.raise_bound(proof.lower_bound_s)
    return record


def _stop(record: Record, proof: Proof) -> bool:
    record.raise_bound(proof.lower_bound_s)
    return record.spent
