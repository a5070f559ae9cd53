"""``simulate``: the program of a plan on a virtual clock, for several steps.

Instructions are taken in their global order, which every rank follows, so one pass over them is
the whole simulation. A call or a reallocation starts when the last of its ranks is free and ends
on all of them together; a FUNCTION runs on each rank for itself; a send costs its rank nothing
and is on its way as soon as the producer has ended on all its ranks; a receive ends at
``max(own free, producer's end) + transfer seconds``, the seconds being those of all that the
transfer brings to all its ranks. Load and Free take no time.

``StepPrices`` is what both the simulator and the search ask for seconds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from planner.cost import CallCost, CostModel, call_cost
from planner.cost.stage import VALUE_BYTES
from planner.cost.transfer import reallocation_seconds, transfer_seconds
from planner.layout import Layout
from planner.mesh import DeviceMesh
from planner.plan import Allocation, ExecutionPlan, Problem
from planner.program import (
    Free,
    Function,
    Instruction,
    Load,
    Program,
    Reallocate,
    Transfer,
)


def sample_bytes(problem: Problem, keys: Iterable[str]) -> float:
    """Bytes of one group's values of ``keys``, at the expected number of tokens.

    A prompt is not sent between calls: every rank reads it from the data set.
    """
    total = 0.0
    for name in keys:
        key = problem.graph.key(name)
        tokens = problem.workload.expected_tokens if key.per == "token" else 1.0
        sequences = 1 if key.once else problem.workload.group_size
        total += sequences * tokens * key.bytes_per_value
    return total


class Prices(Protocol):
    """What the simulator asks for: seconds of a call, of a reallocation, of a transfer."""

    def call(self, name: str, allocation: Allocation) -> CallCost: ...

    def reallocation_s(self, source: Layout, destination: Layout) -> float: ...

    def transfer_s(
        self, num_bytes: float, source: DeviceMesh, destination: DeviceMesh
    ) -> float: ...


class StepPrices:
    """Seconds of everything in a step of one problem; answers are kept."""

    def __init__(self, problem: Problem, model: CostModel) -> None:
        self.problem = problem
        self.model = model
        self._calls: dict[tuple[str, Allocation], CallCost] = {}
        self._reallocations: dict[tuple[Layout, Layout], float] = {}
        self._transfers: dict[tuple[float, DeviceMesh, DeviceMesh], float] = {}

    def call(self, name: str, allocation: Allocation) -> CallCost:
        key = (name, allocation)
        if key not in self._calls:
            self._calls[key] = call_cost(self.problem, name, allocation, self.model)
        return self._calls[key]

    def reallocation_s(self, source: Layout, destination: Layout) -> float:
        """Seconds of one ``Reallocate``; equal for both layouts moved by whole nodes."""
        key = self._reallocation_key(source, destination)
        if key not in self._reallocations:
            self._reallocations[key] = reallocation_seconds(
                *key,
                bytes_per_value=VALUE_BYTES[self.problem.cluster.device.kind],
                model=self.model,
            )
        return self._reallocations[key]

    def known_reallocation_s(self, source: Layout, destination: Layout) -> float:
        """``reallocation_s`` where it was asked before, else 0: never more than the answer."""
        return self._reallocations.get(self._reallocation_key(source, destination), 0.0)

    def _reallocation_key(self, source: Layout, destination: Layout) -> tuple[Layout, Layout]:
        per_node = self.problem.cluster.devices_per_node
        shift = min(source.mesh.first, destination.mesh.first) // per_node * per_node
        return (moved(source, -shift), moved(destination, -shift)) if shift else (
            source, destination,
        )  # fmt: skip

    def transfer_s(self, num_bytes: float, source: DeviceMesh, destination: DeviceMesh) -> float:
        """Seconds in which ``num_bytes``, over all ranks, go from one mesh to the other."""
        key = (num_bytes, source, destination)
        if key not in self._transfers:
            self._transfers[key] = transfer_seconds(num_bytes, source, destination, self.model)
        return self._transfers[key]


def moved(layout: Layout, offset: int) -> Layout:
    """The same layout ``offset`` devices further."""
    mesh = DeviceMesh(layout.mesh.first + offset, layout.mesh.num_devices)
    return Layout(spec=layout.spec, mesh=mesh, pp=layout.pp, tp=layout.tp, dp=layout.dp)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """``label`` (a call's name, ``reallocate actor``, ``receive sequences``) busies a rank."""

    rank: int
    label: str
    kind: str  # the instruction: generate, infer, train, function, transfer, reallocate
    step: int
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """When every rank does what, over ``len(step_ends_s)`` steps from time zero."""

    spans: Sequence[Span]
    step_ends_s: Sequence[float]  # when the last rank ends each step
    num_ranks: int
    call_order: Sequence[str] = field(default_factory=tuple)

    @property
    def step_s(self) -> float:
        """Seconds per step in steady state: over the second half of the steps."""
        return steady_step_s(self.step_ends_s)

    @cached_property
    def last_step(self) -> Sequence[Span]:
        """Spans of the last step, which is as every later one."""
        last = len(self.step_ends_s) - 1
        return tuple(span for span in self.spans if span.step == last)

    @cached_property
    def idle_share(self) -> Mapping[int, float]:
        """Share of a steady step in which each rank of the cluster computes and moves nothing."""
        busy: dict[int, float] = defaultdict(float)
        for span in self.last_step:
            busy[span.rank] += span.seconds
        whole = self.step_s
        return {
            rank: min(1.0, max(0.0, 1.0 - busy[rank] / whole)) if whole > 0 else 0.0
            for rank in range(self.num_ranks)
        }


def steady_step_s(step_ends_s: Sequence[float]) -> float:
    """(end of step n - end of step n / 2) / (n - n / 2).

    >>> steady_step_s([5.0, 7.0, 9.0, 11.0])
    2.0
    """
    count = len(step_ends_s)
    half = count // 2
    before = step_ends_s[half - 1] if half else 0.0
    return (step_ends_s[-1] - before) / (count - half)


class _Simulator:
    """The clock of every rank; lives for one ``run_program``."""

    def __init__(self, plan: ExecutionPlan, program: Program, prices: Prices) -> None:
        self.plan = plan
        self.prices = prices
        self.transfer_s = _transfer_seconds(plan, program, prices)
        self.free_s: dict[int, float] = defaultdict(float)
        self.ended_s: dict[str, float] = {}  # call -> when it ended, this step
        self.spans: list[Span] = []
        self.step = 0

    def add(self, rank: int, label: str, kind: str, start_s: float, end_s: float) -> None:
        self.free_s[rank] = end_s
        self.spans.append(
            Span(rank=rank, label=label, kind=kind, step=self.step, start_s=start_s, end_s=end_s)
        )

    def together(self, ranks: Sequence[int], label: str, kind: str, seconds: float) -> float:
        """A rendezvous of ``ranks``; when it ends."""
        start_s = max(self.free_s[rank] for rank in ranks)
        for rank in ranks:
            self.add(rank, label, kind, start_s, start_s + seconds)
        return start_s + seconds

    def run(self, instruction: Instruction, ranks: Sequence[int]) -> None:
        kind = type(instruction).__name__.lower()
        if isinstance(instruction, Reallocate):
            seconds = self.prices.reallocation_s(instruction.source, instruction.destination)
            self.together(ranks, f"reallocate {instruction.role}", kind, seconds)
        elif isinstance(instruction, Load | Free):
            return
        elif isinstance(instruction, Transfer):
            for rank in ranks:
                self.receive(instruction, rank)
        else:
            name = instruction.call
            seconds = self.prices.call(name, self.plan.allocations[name]).seconds
            if isinstance(instruction, Function):
                for rank in ranks:
                    self.together((rank,), name, kind, seconds)
                self.ended_s[name] = max(self.free_s[rank] for rank in ranks)
            else:
                self.ended_s[name] = self.together(ranks, name, kind, seconds)

    def receive(self, transfer: Transfer, rank: int) -> None:
        start_s = max(self.free_s[rank], self.ended_s[transfer.producer])
        end_s = start_s + self.transfer_s[transfer.transfer]
        self.add(rank, f"receive {transfer.producer}", "transfer", start_s, end_s)


def _transfer_seconds(plan: ExecutionPlan, program: Program, prices: Prices) -> Mapping[int, float]:
    """Seconds of each transfer, by its number."""
    num_samples: dict[int, int] = defaultdict(int)
    found: dict[int, Transfer] = {}
    for instructions in program.step.values():
        for instruction in instructions:
            if isinstance(instruction, Transfer):
                found[instruction.transfer] = instruction
                num_samples[instruction.transfer] += sum(
                    len(parcel.samples) for parcel in instruction.receives
                )
    return {
        number: prices.transfer_s(
            num_samples[number] * sample_bytes(plan.problem, transfer.keys),
            plan.allocations[transfer.producer].mesh,
            plan.allocations[transfer.consumer].mesh,
        )
        for number, transfer in found.items()
    }


def in_global_order(program: Program) -> list[tuple[Instruction, list[int]]]:
    """Instructions that take time, by index, each with its ranks: a receive has one."""
    ranks: dict[int, list[int]] = defaultdict(list)
    found: dict[int, Instruction] = {}
    for rank in sorted(program.step):
        for instruction in program.step[rank]:
            if isinstance(instruction, Transfer) and not instruction.receives:
                continue  # a send takes no time
            ranks[instruction.index].append(rank)
            found[instruction.index] = instruction
    return [(found[index], ranks[index]) for index in sorted(found)]


def run_program(
    plan: ExecutionPlan, program: Program, prices: Prices, *, num_steps: int = 6
) -> Timeline:
    """``simulate`` with prices that are shared with others."""
    assert num_steps >= 1, num_steps
    simulator = _Simulator(plan, program, prices)
    ordered = in_global_order(program)
    ends_s: list[float] = []
    for step in range(num_steps):
        simulator.step = step
        for instruction, ranks in ordered:
            simulator.run(instruction, ranks)
        ends_s.append(max(simulator.free_s.values()))
    return Timeline(
        spans=tuple(simulator.spans),
        step_ends_s=tuple(ends_s),
        num_ranks=plan.num_devices,
        call_order=tuple(call.name for call in plan.problem.graph.calls),
    )


def simulate(
    plan: ExecutionPlan, program: Program, costs: CostModel, *, num_steps: int = 6
) -> Timeline:
    """The timeline of ``num_steps`` steps of ``program``, which ``compile_plan(plan)`` made."""
    return run_program(plan, program, StepPrices(plan.problem, costs), num_steps=num_steps)
