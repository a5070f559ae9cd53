"""``descent``: iterated coordinate descent with kicks, the bar that the walk has to clear.

A coordinate is a call, or all calls of its role in one layout; each in turn takes the best of all
its options, until none improves. Then two calls are kicked anywhere, and it starts again from
there; the result is kept if it is no worse. A walk's cycles end in descents.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from planner.search.chain import DONE, Found, scan_call
from planner.search.engine import Budget, Record
from planner.search.evaluate import Evaluator, Score
from planner.search.options import Assignment
from planner.search.records import Floats, Ints, Scratch


@dataclass(kw_only=True)
class Place:
    """An assignment as vectors over calls, and its energy."""

    mesh: Ints
    row: Ints
    energy: float

    def copy(self) -> Place:
        return Place(mesh=self.mesh.copy(), row=self.row.copy(), energy=self.energy)


def make_found(evaluator: Evaluator) -> Found:
    """Nothing found yet."""
    shape = (2, len(evaluator.calls))
    return Found(
        mesh=np.zeros(shape, dtype=np.int64), row=np.zeros(shape, dtype=np.int64),
        values=np.full(2, np.inf),
    )  # fmt: skip


def merge(record: Record, found: Found) -> None:
    """Into the record what a kernel has found."""
    index = record.evaluator.index
    step_s, overshoot = (float(value) for value in found.values)
    if step_s < record.best_score.step_s:
        record.remember(index.assignment(found.mesh[0], found.row[0]), Score(step_s, 0.0))
    least = record.least_unfit[0] if record.least_unfit is not None else np.inf
    if overshoot < least:
        assignment = index.assignment(found.mesh[1], found.row[1])
        record.remember(assignment, Score(np.inf, overshoot))


def place_of(evaluator: Evaluator, assignment: Assignment) -> Place:
    return place_at(evaluator, *evaluator.index.vectors(assignment))


def place_at(evaluator: Evaluator, mesh: Ints, row: Ints) -> Place:
    return Place(mesh=mesh, row=row, energy=evaluator.score_vectors(mesh, row).energy)


def fastest(evaluator: Evaluator) -> Assignment:
    """Every call at its fastest on the first mesh of its kind, memory not looked at."""
    space = evaluator.space
    return tuple(
        min(
            (
                space.option(call.name, space.meshes_of(call.name, kind)[0], choices[0])
                for kind, choices in space.choices[call.name].items()
            ),
            key=lambda option: option.seconds,
        )
        for call in space.calls
    )


def descend(record: Record, start: Place, rng: random.Random) -> Place:
    """Coordinate descent from ``start`` until nothing improves or the budget is spent."""
    evaluator, here = record.evaluator, start.copy()
    found, scratch = make_found(evaluator), evaluator.make_scratch()
    found.values[0] = record.best_score.step_s
    coordinates = [(i, False) for i in range(len(evaluator.calls))]
    coordinates += [(i, True) for i, call in enumerate(evaluator.calls) if _shares_role(
        evaluator, i)]  # fmt: skip
    rng.shuffle(coordinates)
    fixed = 0  # coordinates in a row that did not improve
    while fixed < len(coordinates) and not record.spent:
        i, whole_role = coordinates[0]
        coordinates = coordinates[1:] + coordinates[:1]
        improved = _best_of(record, here, i, whole_role, scratch, found)
        fixed = 0 if improved else fixed + 1
        merge(record, found)
    return here


def _shares_role(evaluator: Evaluator, i: int) -> bool:
    roles = [call.role for call in evaluator.calls]
    return roles[i] is not None and roles.count(roles[i]) > 1


def _best_of(
    record: Record, here: Place, i: int, whole_role: bool, scratch: Scratch, found: Found
) -> bool:  # fmt: skip
    """Give one coordinate its best value; did it change?"""
    evaluator = record.evaluator
    t, known = evaluator.tables, evaluator.reallocations
    state: Ints = np.array([0, 0, 0, -1, -1], dtype=np.int64)
    best: Floats = np.array([here.energy])
    meshes, rows = np.stack([here.mesh, here.mesh]), np.stack([here.row, here.row])
    while scan_call(t, known.table, scratch, meshes, rows, i, whole_role,
                    state, best, found) != DONE:  # fmt: skip
        if record.late:
            break
        known.add(int(scratch.missing[0]))
    record.evaluations += int(state[2])
    if state[3] < 0:
        return False
    mesh, row = int(state[3]), int(state[4])
    for j in range(len(here.mesh)):
        if whole_role and j != i and t.calls["role"][j] == t.calls["role"][i]:
            here.mesh[j] = mesh
            here.row[j] = t.like_rows[t.like["start"][j, t.rows["axes"][row]]]
    here.mesh[i], here.row[i] = mesh, row
    here.energy = float(best[0])
    return True


def kicked(evaluator: Evaluator, here: Place, rng: random.Random) -> Place:
    """Two calls with any option."""
    t, there = evaluator.tables, here.copy()
    for i in rng.sample(range(len(evaluator.calls)), min(2, len(evaluator.calls))):
        there.mesh[i] = t.call_meshes[rng.randrange(*t.calls[i][["mesh_start", "mesh_stop"]])]
        kind = t.meshes["kind"][there.mesh[i]]
        first, count = t.row_ranges[i, kind]
        there.row[i] = first + rng.randrange(count)
    there.energy = evaluator.score_vectors(there.mesh, there.row).energy
    return there


def iterate(record: Record, start: Place, rng: random.Random) -> Place:
    """Descents from ``start`` and then from kicks of the best end so far, until the budget ends."""
    here = descend(record, start, rng)
    while not record.spent:
        there = descend(record, kicked(record.evaluator, here, rng), rng)
        here = there if there.energy <= here.energy else here
    return here


@contextmanager
def beside(
    record: Record, most: int, look: Callable[[Record], Place]
) -> Iterator[Future[Place]]:  # fmt: skip
    """While the block runs, ``look`` does on a thread of its own, at ``most`` assignments.

    Neither sees what the other finds, so that the answer does not depend on the threads; the record
    learns of it at the end. Ctrl-C, or an error, in the block ends it, and what it found is kept.
    """
    budget = record.budget
    own = Record(
        evaluator=record.evaluator, best=record.best, best_score=record.best_score,
        lower_bound_s=record.lower_bound_s,
        budget=replace(budget, max_evaluations=most, progress=None),
    )  # fmt: skip
    record.budget = replace(budget, max_evaluations=budget.max_evaluations - most)
    try:
        with ThreadPoolExecutor(1) as thread:
            try:
                yield thread.submit(look, own)
            except BaseException:
                own.interrupted = True
                raise
    finally:
        record.budget = budget
        record.evaluations += own.evaluations
        record.cut_by_time |= own.cut_by_time
        record.learn(own)


def side_by_side(record: Record, starts: Sequence[Place], rng: random.Random) -> list[Place]:
    """Descents from each start on a thread of its own, each with its share of the budget."""
    most = (record.budget.max_evaluations - record.evaluations) // len(starts)
    with ExitStack() as threads:
        jobs = [
            threads.enter_context(
                beside(
                    record, most,
                    partial(descend, start=start, rng=random.Random(rng.getrandbits(64))),
                )
            )
            for start in starts
        ]  # fmt: skip
        return [job.result() for job in jobs]


def descent(evaluator: Evaluator, starts: list[Assignment], budget: Budget, seed: int) -> Record:
    """Descents from the best start and from kicks of the best end so far."""
    record = Record(evaluator=evaluator, budget=budget)
    rng = random.Random(seed)
    try:
        for start in [*starts, fastest(evaluator)]:
            record.score(start)
        places = [place_of(evaluator, start) for start in [*starts, fastest(evaluator)]]
        iterate(record, min(places, key=lambda place: place.energy), rng)
    except KeyboardInterrupt:
        record.interrupt()
    return record
