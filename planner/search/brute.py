"""``brute``: every assignment of a small space, the oracle of the tests."""

from __future__ import annotations

import numpy as np

from planner.search.chain import DONE, sweep
from planner.search.descent import make_found, merge
from planner.search.engine import Budget, Record
from planner.search.evaluate import Evaluator
from planner.search.options import Assignment
from profiles.errors import ConfigError

MAX_PLANS = 5e7  # minutes
PART = 100_000  # assignments between two looks at the clock


def brute(evaluator: Evaluator, starts: list[Assignment], budget: Budget, seed: int) -> Record:
    """Score every assignment, or stop when the time is up.

    Raises:
        ConfigError: the space is larger than ``MAX_PLANS``.
    """
    space, t, known = evaluator.space, evaluator.tables, evaluator.reallocations
    if space.num_plans > MAX_PLANS:
        raise ConfigError(
            f"{space.num_plans:.3g} plans are too many to try all", where="--engine brute",
            remedy="use --engine auto",
        )  # fmt: skip
    record = Record(evaluator=evaluator, budget=budget)
    found, scratch = make_found(evaluator), evaluator.make_scratch()
    place = np.zeros((4, len(evaluator.calls)), dtype=np.int64)
    try:
        for start in starts:
            record.score(start)
        while place[0, 0] < len(space.meshes[evaluator.calls[0].name]) and not record.cut_by_time:
            while sweep(t, known.table, scratch, place, PART, found) != DONE:
                known.add(int(scratch.missing[0]))
            record.evaluations += PART
            merge(record, found)
            record.look_at_clock()
        if not record.cut_by_time:
            record.evaluations = int(space.num_plans)
            record.raise_bound(record.best_score.step_s)  # inf where nothing fits
    except KeyboardInterrupt:
        merge(record, found)
        record.interrupt()
    return record
