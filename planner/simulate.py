"""``simulate``: the program of a plan on a virtual clock, for several steps.

Instructions are taken in their global order, which every rank follows, so one pass over them is
the whole simulation. A call or a reallocation is a rendezvous: it starts when the last of its
ranks is free and ends on all of them together. Before a call its ranks together take what its
producers have made, one producer after another in the graph's order, each as soon as it has ended
and for the seconds of all that it brings (``transfer_bytes``). The executor's ranks take their
messages each for itself, and no more than that; what a rank waits less it waits at the call. On
CPUs those that only give weights go on before these have left, and on CUDA an Offload's bytes leave
beside what follows; both are priced as if the ranks waited. A send, Load and Free take no time; an
Average is each rank's own, as long on all; Reload and Offload take theirs right before and after
their call, which waits for its data while weights come.

A step is a max-plus linear map of the ranks' clocks; seconds per step in steady state are its
eigenvalue (``steady_step_s``), not those of the few steps that are drawn.

``StepPrices`` is what both the simulator and the search ask for seconds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import numpy as np

from planner.cost import CallCost, Costs, call_cost
from planner.cost.offload import NO_SWAP, SwapCost, swap_cost
from planner.cost.stage import VALUE_BYTES
from planner.cost.transfer import average_seconds, reallocation_seconds, transfer_seconds
from planner.graph import CallKind, ModelFunctionCall
from planner.labels import label_of
from planner.layout import Layout
from planner.mesh import DeviceMesh
from planner.plan import Allocation, ExecutionPlan, Problem
from planner.program import (
    Average,
    Function,
    Generate,
    Infer,
    Instruction,
    Program,
    Reallocate,
    Train,
)
from planner.strategy import ParallelStrategy
from planner.transfers import readers_of


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


def transfer_bytes(
    problem: Problem, producer: str, consumer: str, allocations: Mapping[str, Allocation]
) -> float:
    """Bytes that are sent at most, over all ranks, to bring a producer's outputs to a consumer.

    Every rank takes all its samples, unless the producer, or an earlier call that reads at least
    these keys, works on the same samples on each of its ranks. (The program also leaves out what
    single ranks happen to hold.)
    """
    keys = readers_of(problem, consumer)[producer]
    own = _placement(problem, consumer, allocations)
    strategy = allocations[producer].strategy
    whole = problem.graph.call(producer).kind is not CallKind.INFER or strategy.pp == 1
    if whole and _placement(problem, producer, allocations) == own:
        return 0.0
    for call in problem.graph.calls:
        if call.name == consumer:
            break
        if set(keys) <= set(call.inputs) and _placement(problem, call.name, allocations) == own:
            return 0.0
    copies = allocations[consumer].strategy.pp * allocations[consumer].strategy.tp
    return problem.workload.batch_size * copies * sample_bytes(problem, keys)


def num_splits(call: ModelFunctionCall, strategy: ParallelStrategy) -> int:
    """Mini-batches that are dealt one by one: calls of equal numbers have equal samples by rank."""
    return call.num_mini_batches if call.kind is CallKind.TRAIN and strategy.dp > 1 else 1


def _placement(
    problem: Problem, name: str, allocations: Mapping[str, Allocation]
) -> tuple[object, ...]:
    """Equal for calls that work on the same samples on each rank."""
    s = allocations[name].strategy
    splits = num_splits(problem.graph.call(name), s)
    return allocations[name].mesh, s.pp, s.tp, s.dp, splits


class Prices(Protocol):
    """What the simulator asks for: seconds of a call, of its offload, of what moves."""

    def call(self, name: str, allocation: Allocation) -> CallCost: ...

    def swap(self, name: str, allocation: Allocation) -> SwapCost: ...

    def reallocation_s(self, source: Layout, destination: Layout) -> float: ...

    def average_s(self, layout: Layout) -> float: ...

    def transfer_s(
        self, num_bytes: float, source: DeviceMesh, destination: DeviceMesh
    ) -> float: ...


class StepPrices:
    """Seconds of everything in a step of one problem; answers are kept."""

    def __init__(self, problem: Problem, model: Costs) -> None:
        self.problem = problem
        self.model = model
        self._calls: dict[tuple[str, Allocation], CallCost] = {}
        self._reallocations: dict[tuple[Layout, Layout], float] = {}
        self._transfers: dict[tuple[float, DeviceMesh, DeviceMesh], float] = {}

    def on(self, problem: Problem) -> StepPrices:
        """The same answers, for a problem that is this one on fewer of the same nodes.

        Reallocations are asked anew: a search's bound rests on those that it has asked for, and
        would else depend on the searches before it.
        """
        fewer = StepPrices(problem, self.model)
        fewer._calls, fewer._transfers = self._calls, self._transfers
        return fewer

    def call(self, name: str, allocation: Allocation) -> CallCost:
        key = (name, allocation)
        if key not in self._calls:
            self._calls[key] = call_cost(self.problem, name, allocation, self.model)
        return self._calls[key]

    def swap(self, name: str, allocation: Allocation) -> SwapCost:
        """Seconds of the Reload before a call and the Offload after it."""
        return swap_cost(self.problem, name, allocation, self.model)

    def reallocation_s(self, source: Layout, destination: Layout) -> float:
        """Seconds of one ``Reallocate``; equal for both layouts moved by whole nodes."""
        key = self._reallocation_key(source, destination)
        if key not in self._reallocations:
            self._reallocations[key] = reallocation_seconds(
                *key,
                bytes_per_value=VALUE_BYTES[self.problem.cluster.kind],
                model=self.model,
            )
        return self._reallocations[key]

    def average_s(self, layout: Layout) -> float:
        """Seconds of one ``Average``."""
        return average_seconds(layout, model=self.model)

    def known_reallocation_s(self, source: Layout, destination: Layout) -> float:
        """``reallocation_s`` where it was asked before, else 0: never more than the answer."""
        return self._reallocations.get(self._reallocation_key(source, destination), 0.0)

    def _reallocation_key(self, source: Layout, destination: Layout) -> tuple[Layout, Layout]:
        """Both moved to the first nodes of their groups, which changes no link."""
        cluster, ends = self.problem.cluster, (source.mesh.first, destination.mesh.first)
        a, b = (cluster.group_index(first) for first in ends)
        start = cluster.starts[a]
        if a != b:
            return moved(source, start - ends[0]), moved(destination, cluster.starts[b] - ends[1])
        per_node = cluster.groups[a].devices_per_node
        shift = (min(ends) - start) // per_node * per_node
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
    return replace(layout, mesh=layout.mesh.shifted(offset))


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """``label`` (a call's name, ``reallocate actor``, ``receive sequences``) busies a rank."""

    rank: int
    label: str
    kind: str  # the instruction's: generate, infer, train, function, transfer, reallocate, …
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
    step_s: float  # seconds per step in steady state
    num_ranks: int
    call_order: Sequence[str] = field(default_factory=tuple)

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


@dataclass(frozen=True, slots=True)
class StepEvent:
    """A call, a reallocation or an average: its ranks, its seconds, and what it waits for.

    ``arrivals``: (producer, seconds of its transfer) in the order in which they are taken.
    ``swap``: of a call that is offloaded. ``ahead``: of a call for the next step one more number
    among its ranks, no rank's, whose clock tells the next step when it ended.
    """

    instruction: Instruction
    ranks: Sequence[int]
    seconds: float
    call: str = ""
    arrivals: Sequence[tuple[str, float]] = ()
    swap: SwapCost = NO_SWAP
    role: str = ""
    ahead: int | None = None


def list_events(plan: ExecutionPlan, program: Program, prices: Prices) -> list[StepEvent]:
    """What takes time in a step, in the program's order."""
    ranks_of: dict[int, list[int]] = defaultdict(list)
    instructions: dict[int, Instruction] = {}
    for rank in sorted(program.step):
        for instruction in program.step[rank]:
            ranks_of[instruction.index].append(rank)
            instructions[instruction.index] = instruction
    found = []
    ahead = {call.name: plan.num_devices + n for n, call in enumerate(plan.problem.graph.ahead)}
    for index, ranks in sorted(ranks_of.items()):
        instruction = instructions[index]
        if isinstance(instruction, Reallocate):
            seconds = prices.reallocation_s(instruction.source, instruction.destination)
            found.append(StepEvent(instruction, ranks, seconds, role=instruction.role))
        elif isinstance(instruction, Average):
            seconds = prices.average_s(instruction.layout)
            found.append(StepEvent(instruction, ranks, seconds, role=instruction.role))
        elif isinstance(instruction, Generate | Infer | Train | Function):
            name = instruction.call
            arrivals = [
                (producer, _transfer_s(plan, producer, name, prices))
                for producer in readers_of(plan.problem, name)
            ]
            seconds = prices.call(name, plan.allocations[name]).seconds
            swap = prices.swap(name, plan.allocations[name])
            role = plan.problem.graph.call(name).role or ""
            own = ahead.get(name)
            ranks = ranks if own is None else [*ranks, own]
            found.append(StepEvent(instruction, ranks, seconds, name, arrivals, swap, role, own))
    return found


def _transfer_s(plan: ExecutionPlan, producer: str, consumer: str, prices: Prices) -> float:
    num_bytes = transfer_bytes(plan.problem, producer, consumer, plan.allocations)
    source, target = plan.allocations[producer].mesh, plan.allocations[consumer].mesh
    return prices.transfer_s(num_bytes, source, target)


Draw = Callable[[StepEvent, str, float, float], None]  # (event, label, start_s, end_s)


def play_step(events: Sequence[StepEvent], clock_s: dict[int, float], draw: Draw | None) -> None:
    """Move the ranks' clocks by one step; ``draw`` is told of all that busies them."""
    ended_s = {event.call: clock_s[event.ahead] for event in events if event.ahead is not None}
    for event in events:
        now_s = max(clock_s[rank] for rank in event.ranks)
        if event.swap.reload_s > 0:
            start_s, now_s = now_s, now_s + event.swap.reload_s
            if draw is not None:
                draw(event, f"reload {event.role}", start_s, now_s)
        for producer, seconds in event.arrivals:
            start_s = max(now_s, ended_s[producer])
            now_s = start_s + seconds
            if draw is not None and seconds > 0:
                draw(event, f"receive {producer}", start_s, now_s)
        end_s = now_s + event.seconds
        if draw is not None:
            draw(event, label_of(event.instruction), now_s, end_s)
        if event.swap.offload_s > 0:
            start_s, end_s = end_s, end_s + event.swap.offload_s
            if draw is not None:
                draw(event, f"offload {event.role}", start_s, end_s)
        for rank in event.ranks:
            clock_s[rank] = end_s
        ended_s[event.call] = end_s


def steady_step_s(events: Sequence[StepEvent]) -> float:
    """The eigenvalue of the step: the largest mean of a cycle of its matrix.

    Entry (a, b) is rank b's clock after a step that rank a began at 0 and all others began long
    before; ranks with the same events are one. Karp's formula: with D_k the longest paths of k
    steps, max over ends v of min over k of (D_n(v) - D_k(v)) / (n - k).
    Source: Karp 1978, "A characterization of the minimum cycle mean in a digraph".
    """
    if not all(math.isfinite(e.seconds + sum(s for _, s in e.arrivals)) for e in events):
        return math.inf
    kinds: dict[tuple[int, ...], int] = {}  # events of a rank -> the first such rank
    ranks = {rank for event in events for rank in event.ranks}
    ahead = {event.ahead for event in events}
    for rank in sorted(ranks):
        own = (-1, rank) if rank in ahead else ()
        kinds.setdefault((*own, *(i for i, e in enumerate(events) if rank in e.ranks)), rank)
    ones = sorted(kinds.values())
    thin = [replace(e, ranks=[rank for rank in ones if rank in e.ranks]) for e in events]
    matrix = np.full((len(ones), len(ones)), -np.inf)
    for a, rank in enumerate(ones):
        clock_s = {other: 0.0 if other == rank else -math.inf for other in ones}
        play_step(thin, clock_s, None)
        matrix[a] = [clock_s[other] for other in ones]
    longest = np.zeros((len(ones) + 1, len(ones)))
    for k in range(len(ones)):
        longest[k + 1] = (longest[k][:, None] + matrix).max(axis=0)
    steps = np.arange(len(ones), 0, -1)[:, None]
    return float(((longest[-1] - longest[:-1]) / steps).min(axis=0).max())


def run_program(
    plan: ExecutionPlan, program: Program, prices: Prices, *, num_steps: int = 6
) -> Timeline:
    """``simulate`` with prices that are shared with others."""
    assert num_steps >= 1, num_steps
    events = list_events(plan, program, prices)
    clock_s: dict[int, float] = defaultdict(float)
    spans: list[Span] = []
    ends_s: list[float] = []

    def draw(event: StepEvent, label: str, start_s: float, end_s: float) -> None:
        own = label == label_of(event.instruction)
        kind = type(event.instruction).__name__.lower() if own else label.partition(" ")[0]
        kind = "transfer" if kind == "receive" else kind
        step = len(ends_s)
        spans.extend(
            Span(rank=rank, label=label, kind=kind, step=step, start_s=start_s, end_s=end_s)
            for rank in event.ranks
            if rank != event.ahead
        )

    for _ in range(num_steps):
        play_step(events, clock_s, draw)
        ends_s.append(max(clock_s.values()))
    return Timeline(
        spans=tuple(spans),
        step_ends_s=tuple(ends_s),
        step_s=steady_step_s(events),
        num_ranks=plan.num_devices,
        call_order=tuple(call.name for call in plan.problem.graph.calls),
    )


def simulate(
    plan: ExecutionPlan, program: Program, costs: Costs, *, num_steps: int = 6
) -> Timeline:
    """The timeline of ``num_steps`` steps of ``program``, which ``compile_plan(plan)`` made."""
    return run_program(plan, program, StepPrices(plan.problem, costs), num_steps=num_steps)
