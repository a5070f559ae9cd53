"""Seconds and memory of an assignment, thousands of times a second.

``Evaluator.score`` gives what ``simulate`` of the compiled plan gives, to rounding, without
compiling: ranks that belong to the same calls and receive in the same places are one *group*, and
a step is a list of operations on groups' clocks. Memory is that of ``planner.memory`` by device.
``Evaluator.worth`` answers only for assignments that may be below a threshold, and says no to
most others after much less work.

Read ``Score``, ``Evaluator.score``, then ``_Step``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np

from planner.graph import CallKind
from planner.memory import RESERVE_BYTES
from planner.plan import ExecutionPlan
from planner.search.options import Assignment, OptionSpace
from planner.simulate import sample_bytes, steady_step_s

NUM_STEPS = 6  # as simulate's default


@dataclass(frozen=True, slots=True)
class Score:
    """``step_s``: seconds per step. ``overshoot``: bytes that the fullest device lacks, as a

    share of what it has; 0 where everything fits.
    """

    step_s: float
    overshoot: float

    @property
    def energy(self) -> float:
        """What the walk minimises: seconds, dearer the less a plan fits."""
        return self.step_s * (1.0 + (0.05 + 4.0 * self.overshoot if self.overshoot > 0 else 0.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """``consumer`` reads keys of ``producer`` (positions of calls).

    ``earlier``: sets of calls; a device lacks a sample unless, in every set, one of its calls
    has brought it there before.
    """

    producer: int
    consumer: int
    earlier: tuple[tuple[int, ...], ...]
    bytes_per_sample: float


@dataclass(frozen=True, slots=True)
class _Operation:
    """``kind`` on the clocks of ``groups``: all together, each alone, or one group's receive."""

    kind: str  # together, alone, receive
    groups: Sequence[int]
    seconds: float
    call: int  # whose end this is (-1: nobody's), or on whose end a receive waits


class Evaluator:
    """Scores assignments of one problem; answers are kept."""

    def __init__(self, space: OptionSpace) -> None:
        graph = space.problem.graph
        self.space = space
        self.prices = space.prices
        self.calls = graph.calls
        self.cluster = space.problem.cluster
        self.evaluations = 0
        position = {call.name: i for i, call in enumerate(self.calls)}
        trains = {role: graph.train_call(role) for role in graph.roles}
        # The call in whose layout a trained role lives; None for frozen roles and functions.
        self.home: list[int | None] = []
        for call in self.calls:
            train = trains.get(call.role) if call.role is not None else None
            self.home.append(None if train is None else position[train.name])
        self.pairs = self._find_pairs(position)
        self.chains = self._find_chains(position)
        self._scores: dict[Assignment, Score] = {}
        self._received: dict[tuple[int, ...], tuple[list[bool], float]] = {}
        self._orders: dict[tuple[bool, ...], tuple[tuple[int, ...], ...]] = {}

    # ---- what the graph alone decides ----

    def _find_pairs(self, position: dict[str, int]) -> list[_Pair]:
        """Producers and consumers in the order in which messages are sent."""
        graph, found = self.space.problem.graph, []
        for call in self.calls:
            keys_of: dict[int, list[str]] = {}
            for key in call.inputs:
                producer = graph.producer(key)
                if producer is not None:
                    keys_of.setdefault(position[producer.name], []).append(key)
            own = position[call.name]
            for before, keys in keys_of.items():
                readers = {
                    frozenset(i for i, c in enumerate(self.calls[:own]) if key in c.inputs)
                    for key in keys
                }
                smallest = [a for a in readers if not any(b < a for b in readers)]
                found.append(
                    _Pair(
                        producer=before, consumer=own,
                        earlier=tuple(tuple(sorted(a)) for a in sorted(smallest, key=sorted)),
                        bytes_per_sample=sample_bytes(self.space.problem, keys),
                    )
                )  # fmt: skip
        return sorted(found, key=lambda pair: (pair.producer, pair.consumer))

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
                walk((position[before.name], *path), role)

        for role in graph.roles:
            train = graph.train_call(role)
            if train is not None:
                walk((position[train.name],), role)
        return [a for a in sorted(found) if not any(set(a) < set(b) for b in found)]

    # ---- quick bounds ----

    def floor_s(self, assignment: Assignment) -> float:
        """Seconds that a step of ``assignment`` takes at least: busiest device, longest cycle."""
        # Without a trained role no step waits for the step before: there is no chain.
        cycles = (sum(assignment[i].seconds for i in chain) for chain in self.chains)
        floor = max(cycles, default=0.0)
        for here in assignment:
            first, busy = here.mesh.first, 0.0
            for other in assignment:
                if other.inside[first]:
                    busy += other.seconds
            floor = max(floor, busy)
        return floor

    def overshoot(self, assignment: Assignment) -> float:
        """Bytes that the fullest device lacks, as a share of what it has."""
        device = self.cluster.device
        resident = np.zeros(self.cluster.num_devices, dtype=np.int64)
        seen: set[tuple[str, object]] = set()
        borrowed: dict[object, list[int]] = {}  # layout -> positions of its calls
        for i, option in enumerate(assignment):
            role, home = self.calls[i].role, self.home[i]
            if role is None:
                continue
            if home is not None and assignment[home].layout != option.layout:
                borrowed.setdefault((role, option.layout), []).append(i)
            elif (home is None or home == i) and (role, option.layout) not in seen:
                seen.add((role, option.layout))
                resident += option.held
        peak = 0
        for i, option in enumerate(assignment):
            mesh = slice(option.mesh.first, option.mesh.first + option.mesh.num_devices)
            need = resident[mesh] + option.running[mesh]
            for users in borrowed.values():
                if users[0] <= i <= users[-1]:
                    need = need + assignment[users[0]].borrowed[mesh]
            peak = max(peak, int(need.max()))
        peak = max(peak, int(resident.max())) + RESERVE_BYTES[device.kind]
        return max(0.0, peak / device.memory_bytes - 1.0)

    # ---- the exact score ----

    def worth(self, assignment: Assignment, threshold_s: float) -> Score | None:
        """The score, or None where its seconds are surely above ``threshold_s``.

        First the floor, then a step in which reallocations that were never priced are free:
        routes of weights are what takes longest to find.
        """
        if assignment not in self._scores:
            if self.floor_s(assignment) > threshold_s:
                return None
            if self.step_s(assignment, free_reallocations=True) > threshold_s:
                return None
        return self.score(assignment)

    def score(self, assignment: Assignment) -> Score:
        """Seconds per step and memory."""
        found = self._scores.get(assignment)
        if found is None:
            self.evaluations += 1
            found = Score(self.step_s(assignment), self.overshoot(assignment))
            if len(self._scores) >= 200_000:
                self._scores.clear()
            self._scores[assignment] = found
        return found

    def step_s(self, assignment: Assignment, *, free_reallocations: bool = False) -> float:
        """Seconds per step in steady state, as ``simulate(...).step_s``.

        ``free_reallocations``: those that were never priced take no time.
        """
        received = [self._receivers(k, assignment) for k in range(len(self.pairs))]
        rows = list(
            dict.fromkeys(
                zip(*(option.inside for option in assignment), *(flags for flags, _ in received))
            )
        )
        operations = self._operations(assignment, rows, received, free_reallocations)
        return _run(operations, len(rows), len(self.calls))

    def _operations(
        self,
        assignment: Assignment,
        rows: Sequence[tuple[bool, ...]],
        received: Sequence[tuple[list[bool], float]],
        free_reallocations: bool,
    ) -> list[_Operation]:
        """One step as operations on the groups of ranks, in the program's order."""
        orders = [self._receive_order(row) for row in rows]
        present: set[object] = set()
        found = []
        for i, option in enumerate(assignment):
            groups = [g for g, row in enumerate(rows) if row[i]]
            home = self.home[i]
            if home is not None and home != i:
                source = assignment[home].layout
                if source != option.layout and (self.calls[i].role, option.layout) not in present:
                    present.add((self.calls[i].role, option.layout))
                    assert source is not None
                    assert option.layout is not None
                    both = [g for g, row in enumerate(rows) if row[i] or row[home]]
                    if free_reallocations:
                        seconds = self.prices.known_reallocation_s(source, option.layout)
                    else:
                        seconds = self.prices.reallocation_s(source, option.layout)
                    found.append(_Operation("together", both, seconds, -1))
            for g in groups:
                for k in orders[g][i]:
                    pair = self.pairs[k]
                    found.append(_Operation("receive", (g,), received[k][1], pair.producer))
            alone = self.calls[i].kind is CallKind.FUNCTION
            found.append(_Operation("alone" if alone else "together", groups, option.seconds, i))
        return found

    def _receivers(self, k: int, assignment: Assignment) -> tuple[list[bool], float]:
        """(does each device receive in pair ``k``, seconds of the transfer)."""
        pair = self.pairs[k]
        producer, consumer = assignment[pair.producer], assignment[pair.consumer]
        involved = [producer, consumer, *(assignment[i] for group in pair.earlier for i in group)]
        key = (k, *(option.layout_id for option in involved))
        found = self._received.get(key)
        if found is not None:
            return found
        # Devices of one tensor-parallel group are alike in every call.
        unit = gcd(*(option.tp for option in involved))
        groups = [[assignment[i].needs for i in group] for group in pair.earlier]
        flags = [False] * self.cluster.num_devices
        num_samples = 0
        needs, makes = consumer.needs, producer.makes
        for device in range(
            consumer.mesh.first, consumer.mesh.first + consumer.mesh.num_devices, unit
        ):
            missing = needs[device] & ~makes[device]
            if missing and groups:
                everywhere = -1
                for group in groups:
                    brought = 0
                    for masks in group:
                        brought |= masks[device]
                    everywhere &= brought
                missing &= ~everywhere
            if missing:
                num_samples += missing.bit_count() * unit
                flags[device : device + unit] = [True] * unit
        seconds = self.prices.transfer_s(
            num_samples * pair.bytes_per_sample, producer.mesh, consumer.mesh
        )
        if len(self._received) >= 500_000:
            self._received.clear()
        self._received[key] = (flags, seconds)
        return flags, seconds

    def _receive_order(self, row: tuple[bool, ...]) -> tuple[tuple[int, ...], ...]:
        """Pairs that a rank of this kind takes in before each call: as ``emit_receives``."""
        found = self._orders.get(row)
        if found is None:
            num_calls = len(self.calls)
            queue = [k for k in range(len(self.pairs)) if row[num_calls + k]]
            taken, before = 0, []
            for i in range(num_calls):
                wanted = [n for n, k in enumerate(queue) if self.pairs[k].consumer == i]
                end = max(taken, wanted[-1] + 1) if wanted else taken
                before.append(tuple(queue[taken:end]))
                taken = end
            found = self._orders[row] = tuple(before)
        return found

    def plan(self, assignment: Assignment, *, seed: int = 0) -> ExecutionPlan:
        """The plan of an assignment, without an estimate."""
        allocations = {option.call: option.allocation for option in assignment}
        return ExecutionPlan(problem=self.space.problem, allocations=allocations, seed=seed)


def _run(operations: Sequence[_Operation], num_groups: int, num_calls: int) -> float:
    """Steady seconds per step of ``operations`` repeated ``NUM_STEPS`` times.

    Once all clocks move by the same amount in a step they do so for ever; if that is before the
    second half begins, the rest need not be played.
    """
    clock, ended = [0.0] * num_groups, [0.0] * num_calls
    used = sorted({g for operation in operations for g in operation.groups})
    ends: list[float] = []
    for step in range(NUM_STEPS):
        before = clock.copy()
        for operation in operations:
            groups, seconds = operation.groups, operation.seconds
            if operation.kind == "together":
                end = max([clock[g] for g in groups]) + seconds
                for g in groups:
                    clock[g] = end
                if operation.call >= 0:
                    ended[operation.call] = end
            elif operation.kind == "receive":
                g = groups[0]
                ready = ended[operation.call]
                clock[g] = (ready if ready > clock[g] else clock[g]) + seconds
            else:
                for g in groups:
                    clock[g] += seconds
                ended[operation.call] = max([clock[g] for g in groups])
        ends.append(max(clock))
        if 0 < step <= NUM_STEPS // 2:
            moved = [clock[g] - before[g] for g in used]
            if max(moved) - min(moved) <= 1e-12 * ends[-1]:
                return moved[0]
    return steady_step_s(ends)
