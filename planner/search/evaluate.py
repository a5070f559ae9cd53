"""``Evaluator``: seconds and memory of an assignment, from the compiled kernels.

It owns the problem's tables and the prices of reallocations, which it asks for when a kernel
needs them, and knows what the graph alone decides. ``score`` gives what ``simulate`` and
``planner.memory`` say of the compiled plan, to rounding.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

import numpy as np

from planner.plan import ExecutionPlan
from planner.search.kernels import energy_of, evaluate, evaluate_many
from planner.search.options import Assignment, OptionSpace
from planner.search.prices import ReallocationPrices
from planner.search.records import NO_KEY, Floats, Ints, Scratch
from planner.search.tables import make_index, make_scratch, make_tables


@dataclass(frozen=True, slots=True)
class Score:
    """``step_s``: seconds per step. ``overshoot``: bytes that the fullest device lacks, as a

    share of what it has; 0 where everything fits.
    """

    step_s: float
    overshoot: float

    @property
    def energy(self) -> float:
        """What searches minimise: seconds, dearer the less a plan fits."""
        return energy_of(self.step_s, self.overshoot)


@dataclass(frozen=True, slots=True)
class Pair:
    """Call ``consumer`` reads keys of call ``producer`` (positions)."""

    producer: int
    consumer: int


class Evaluator:
    """Scores assignments of one problem."""

    def __init__(self, space: OptionSpace) -> None:
        self.space = space
        self.prices = space.prices
        self.calls = space.calls
        self.cluster = space.problem.cluster
        self.index = make_index(space)
        self.tables = make_tables(self.index)
        self.reallocations = ReallocationPrices(self.index, self.tables, space.prices)
        self._own = threading.local()
        position = {call.name: i for i, call in enumerate(self.calls)}
        # The call in whose layout a trained role lives; None for frozen roles and functions.
        self.home = [None if i < 0 else int(i) for i in self.tables.calls["home"]]
        self.pairs = [
            Pair(int(self.tables.pairs[k]["producer"]), i)
            for i, call in enumerate(self.tables.calls)
            for k in range(call["pair_start"], call["pair_stop"])
        ]
        self.chains = self._find_chains(position)

    def _find_chains(self, position: dict[str, int]) -> list[tuple[int, ...]]:
        """Paths of calls from a reader of a trained role's weights to its training.

        Each is a cycle over steps: the next step's reader waits for this step's training.
        """
        graph = self.space.problem.graph
        found: set[tuple[int, ...]] = set()

        def walk(path: tuple[int, ...], role: str) -> None:
            if self.calls[path[0]].role == role:
                found.add(path)
            for before in graph.predecessors(self.calls[path[0]]):
                if before in graph.ahead:
                    continue
                walk((position[before.name], *path), role)

        for role in graph.roles:
            train = graph.train_call(role)
            if train is not None:
                walk((position[train.name],), role)
        return [a for a in sorted(found) if not any(set(a) < set(b) for b in found)]

    def make_scratch(self) -> Scratch:
        """Room for the evaluations of one thread."""
        return make_scratch(self.tables)

    @property
    def _scratch(self) -> Scratch:
        """Of the thread that asks."""
        if not hasattr(self._own, "scratch"):
            self._own.scratch = self.make_scratch()
        found: Scratch = self._own.scratch
        return found

    # ---- scores ----

    def score(self, assignment: Assignment) -> Score:
        """Seconds per step and memory."""
        return self.score_vectors(*self.index.vectors(assignment))

    def score_vectors(self, mesh: Ints, row: Ints) -> Score:
        """As ``score``, of (mesh, row) of each call."""
        known, scratch = self.reallocations, self._scratch
        while True:
            step_s, overshoot = evaluate(self.tables, known.table, mesh, row, math.inf, scratch)
            if scratch.missing[0] == NO_KEY:
                return Score(step_s, overshoot)
            known.add(int(scratch.missing[0]))

    def score_many(self, mesh: Ints, row: Ints) -> Floats:
        """(seconds, overshoot) [N, 2] of assignments [N, calls] whose prices were asked before.

        An unknown price counts as nothing.
        """
        out = np.zeros((len(mesh), 2))
        known = self.reallocations
        evaluate_many(self.tables, known.table, mesh, row, out, self._scratch)
        return out

    def overshoot(self, assignment: Assignment) -> float:
        """Bytes that the fullest device lacks, as a share of what it has."""
        mesh, row = self.index.vectors(assignment)
        known = self.reallocations
        return evaluate(self.tables, known.table, mesh, row, math.inf, self._scratch)[1]

    def floor_s(self, assignment: Assignment) -> float:
        """Seconds that a step takes at least: busiest first device of a mesh, longest chain."""
        # Without a trained role no step waits for the step before: there is no chain.
        cycles = (sum(assignment[i].seconds for i in chain) for chain in self.chains)
        busy = (
            sum(other.choice.busy_s for other in assignment if here.mesh.first in other.mesh)
            for here in assignment
        )
        return max(max(cycles, default=0.0), max(busy))

    def plan(self, assignment: Assignment, *, seed: int = 0) -> ExecutionPlan:
        """The plan of an assignment, without an estimate."""
        allocations = {option.call: option.allocation for option in assignment}
        return ExecutionPlan(problem=self.space.problem, allocations=allocations, seed=seed)
