"""``explain``: what binds a plan, from its simulated timeline and by asking "what if" of each part.

Three answers. The critical cycle: the chain of calls and moves, each starting the moment the one
before it ends, that closes on itself after one or more steps; only what is on it can make a step
shorter. Idle shares and parts of each call: where devices wait, and what their seconds are spent
on. Levers: the step simulated again with one thing faster, the plan kept as it is.

Read ``Explanation``, then ``critical_cycle``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from planner.cost import CallCost, Costs
from planner.cost.offload import SwapCost
from planner.layout import Layout
from planner.mesh import DeviceMesh
from planner.plan import Allocation, ExecutionPlan
from planner.plan_memory import Fullest, fullest_device
from planner.program import Program, compile_plan
from planner.simulate import Prices, Span, StepPrices, Timeline, run_program
from profiles.hardware import Cluster, ClusterSpec, DeviceSpec, LinkSpec

MOST_STEPS = 64  # of a simulation until its steady cycle closes


@dataclass(frozen=True, slots=True, kw_only=True)
class CycleStep:
    """One link of the critical cycle: what runs, on which ranks, for how long.

    ``step``: 0 for the first step that the cycle touches, 1 for the next one.
    """

    label: str
    kind: str
    ranks: tuple[int, ...]
    step: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticalCycle:
    """``steps`` in order of time; they take ``num_steps`` whole steps of the plan together."""

    steps: tuple[CycleStep, ...]
    num_steps: int

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankGroup:
    """Ranks that are busy with the same things equally long in a steady step."""

    ranks: tuple[int, ...]
    idle_share: float
    busy_s: Mapping[str, float]  # by label


@dataclass(frozen=True, slots=True, kw_only=True)
class Lever:
    """``what`` is changed and nothing else; ``step_s``: seconds per step of the same plan then."""

    what: str
    step_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What binds a plan; see the module. ``levers``: the largest gain first."""

    step_s: float
    cycle: CriticalCycle
    groups: tuple[RankGroup, ...]
    calls: Mapping[str, CallCost]
    levers: tuple[Lever, ...]
    fullest: Fullest


Reprice = Callable[[Cluster], Costs]


def explain(
    plan: ExecutionPlan, costs: Costs, *, links: Reprice | None, device: Reprice | None
) -> Explanation:
    """What binds ``plan`` under ``costs``.

    ``links`` and ``device`` give the costs on a cluster with other links, or with another device;
    None where those costs were measured, and so cannot be said of hardware that was not.
    """
    program, prices = compile_plan(plan), StepPrices(plan.problem, costs)
    cycle, timeline = steady_cycle(plan, program, prices)
    calls = {name: prices.call(name, a) for name, a in plan.allocations.items()}

    def seconds(changed: Prices) -> float:
        return run_program(plan, program, changed).step_s

    levers = [Lever(what=what, step_s=seconds(p)) for what, p in _faster(plan, prices, calls)]
    hardware = [*_faster_links(plan, links), *_faster_device(plan, device)]
    for what, model in hardware:
        levers.append(Lever(what=what, step_s=seconds(StepPrices(plan.problem, model))))
    return Explanation(
        step_s=timeline.step_s,
        cycle=cycle,
        groups=rank_groups(timeline),
        calls=calls,
        levers=tuple(sorted(levers, key=lambda lever: lever.step_s)),
        fullest=fullest_device(plan),
    )


# ---- the critical cycle -----------------------------------------------------------------------


def steady_cycle(
    plan: ExecutionPlan, program: Program, prices: Prices
) -> tuple[CriticalCycle, Timeline]:
    """The critical cycle, and the timeline in which it was found.

    Simulates more and more steps until a chain of spans closes on itself.
    """
    num_steps = 8
    while True:
        timeline = run_program(plan, program, prices, num_steps=num_steps)
        cycle = critical_cycle(timeline)
        if cycle is not None or num_steps >= MOST_STEPS:
            break
        num_steps *= 2
    assert cycle is not None, plan.problem.graph.name
    return cycle, timeline


def critical_cycle(timeline: Timeline) -> CriticalCycle | None:
    """Walk back from the last span to end, always to one that ended when this one began.

    The simulator starts everything at the very end of what it waited for, so such a span exists
    but for the first. When the walk meets a span that it has met in a later step, the chain
    between them repeats for ever; its seconds are its number of steps times those of a step.
    None where the walk reaches time zero first. Runs in O(spans).
    """
    events = _events(timeline.spans)
    ending: dict[float, list[_Event]] = defaultdict(list)
    for event in events:
        ending[event.end_s].append(event)
    here: _Event | None = max(events, key=lambda event: (event.end_s, event.position))
    chain: list[_Event] = []
    met: dict[tuple[str, tuple[int, ...], int], int] = {}
    while here is not None:
        key = (here.label, here.ranks, here.occurrence)
        if key in met and chain[met[key]].step > here.step:
            found = chain[met[key] : len(chain)]
            return _cycle(found, num_steps=found[0].step - here.step)
        met.setdefault(key, len(chain))
        chain.append(here)
        here = _cause(here, ending[here.start_s])
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Event:
    """Spans of several ranks that are one: a call, or what its ranks take together before it."""

    label: str
    kind: str
    ranks: tuple[int, ...]
    step: int
    start_s: float
    end_s: float
    position: int  # in the simulator's order
    occurrence: int  # a rank may receive from one producer several times in a step


def _events(spans: Sequence[Span]) -> list[_Event]:
    """Spans in the simulator's order; neighbours that are alike but for the rank are one."""
    found: list[list[Span]] = []
    for span in spans:
        last = found[-1][-1] if found else None
        same = last is not None and (
            (last.label, last.step, last.start_s, last.end_s)
            == (span.label, span.step, span.start_s, span.end_s)
        )
        if same:
            found[-1].append(span)
        else:
            found.append([span])
    events, counts = [], dict[tuple[str, tuple[int, ...], int], int]()
    for position, group in enumerate(found):
        first, ranks = group[0], tuple(span.rank for span in group)
        key = (first.label, ranks, first.step)
        counts[key] = counts.get(key, -1) + 1
        events.append(
            _Event(
                label=first.label, kind=first.kind, ranks=ranks, step=first.step,
                start_s=first.start_s, end_s=first.end_s, position=position,
                occurrence=counts[key],
            )
        )  # fmt: skip
    return events


def _cause(event: _Event, candidates: Sequence[_Event]) -> _Event | None:
    """What ``event`` waited for last: of its own ranks, or for a receive the producer."""
    ranks = set(event.ranks)
    producer = event.label.removeprefix("receive ") if event.kind == "transfer" else None
    for before in reversed(candidates):
        if before.position >= event.position:
            continue
        sent = before.label == producer and before.step == event.step
        if sent or not ranks.isdisjoint(before.ranks):
            return before
    return None


def _cycle(chain: Sequence[_Event], *, num_steps: int) -> CriticalCycle:
    ordered = list(reversed(chain))
    first = ordered[0].step
    steps = tuple(
        CycleStep(
            label=e.label, kind=e.kind, ranks=e.ranks, step=e.step - first,
            seconds=e.end_s - e.start_s,
        )
        for e in ordered
    )  # fmt: skip
    return CriticalCycle(steps=_from_the_start(steps, num_steps), num_steps=num_steps)


def _from_the_start(steps: tuple[CycleStep, ...], num_steps: int) -> tuple[CycleStep, ...]:
    """A cycle has no beginning: told from the first thing of a step on."""
    starts = [i for i in range(len(steps)) if steps[i].step > steps[i - 1].step]
    if not starts:
        return steps
    turn = starts[0]
    base = steps[turn].step
    rotated = (*steps[turn:], *(replace(s, step=s.step + num_steps) for s in steps[:turn]))
    return tuple(replace(s, step=s.step - base) for s in rotated)


# ---- who waits --------------------------------------------------------------------------------


def rank_groups(timeline: Timeline) -> tuple[RankGroup, ...]:
    """Ranks by what they do in a steady step, in order of their first rank.

    Seconds that differ by less than a thousandth of a step are the same.
    """
    busy: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for span in timeline.last_step:
        busy[span.rank][span.label] += span.seconds
    grain_s = timeline.step_s / 1000 or 1.0
    groups: dict[tuple[tuple[str, int], ...], list[int]] = defaultdict(list)
    for rank in range(timeline.num_ranks):
        shares = ((label, round(s / grain_s)) for label, s in busy[rank].items())
        key = tuple(sorted((label, share) for label, share in shares if share > 0))
        groups[key].append(rank)
    return tuple(
        RankGroup(
            ranks=tuple(ranks),
            idle_share=sum(timeline.idle_share[rank] for rank in ranks) / len(ranks),
            busy_s=dict(busy[ranks[0]]),
        )
        for ranks in sorted(groups.values())
    )


# ---- levers -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scaled:
    """Prices of a step with some of them multiplied."""

    prices: Prices
    calls: Mapping[str, float]  # call -> factor of its seconds
    parts: Mapping[str, float]  # part of a call -> factor, in all calls
    reallocation: float = 1.0
    transfer: float = 1.0
    host: float = 1.0

    def call(self, name: str, allocation: Allocation) -> CallCost:
        cost = self.prices.call(name, allocation)
        saved = sum(s * (1.0 - self.parts.get(part, 1.0)) for part, s in cost.parts.items())
        return replace(cost, seconds=(cost.seconds - saved) * self.calls.get(name, 1.0))

    def swap(self, name: str, allocation: Allocation) -> SwapCost:
        cost = self.prices.swap(name, allocation)
        return SwapCost(cost.reload_s * self.host, cost.offload_s * self.host)

    def reallocation_s(self, source: Layout, destination: Layout) -> float:
        return self.prices.reallocation_s(source, destination) * self.reallocation

    def average_s(self, layout: Layout) -> float:
        return self.prices.average_s(layout)

    def transfer_s(self, num_bytes: float, source: DeviceMesh, destination: DeviceMesh) -> float:
        return self.prices.transfer_s(num_bytes, source, destination) * self.transfer


def _faster(
    plan: ExecutionPlan, prices: Prices, calls: Mapping[str, CallCost]
) -> Iterator[tuple[str, Prices]]:
    """Each call a tenth shorter; each part of all calls, and all that moves, in half the time."""
    for call in plan.problem.graph.calls:
        yield (
            f"{call.name} takes 10% less",
            _Scaled(prices=prices, calls={call.name: 0.9}, parts={}),
        )
    parts = dict.fromkeys(part for cost in calls.values() for part, s in cost.parts.items() if s)
    for part in parts:
        what = f"{part.replace('_', ' ')} takes half, in all calls"
        yield what, _Scaled(prices=prices, calls={}, parts={part: 0.5})
    yield (
        "reallocations take half",
        _Scaled(prices=prices, calls={}, parts={}, reallocation=0.5),
    )
    yield "transfers take half", _Scaled(prices=prices, calls={}, parts={}, transfer=0.5)
    if any(allocation.offload for allocation in plan.allocations.values()):
        yield "host links 2x", _Scaled(prices=prices, calls={}, parts={}, host=0.5)


def _faster_links(plan: ExecutionPlan, links: Reprice | None) -> Iterator[tuple[str, Costs]]:
    """Of all groups at once: what goes between two takes the networks of both."""
    cluster = plan.problem.cluster
    if links is None:
        return

    def twice(link: LinkSpec) -> LinkSpec:
        return replace(link, bytes_per_s=2 * link.bytes_per_s)

    every = range(len(cluster.groups))
    inside = _changed(cluster, every, lambda g: replace(g, intra_link=twice(g.intra_link)))
    yield "links inside nodes 2x", links(inside)
    if cluster.num_nodes > 1:
        between = _changed(cluster, every, lambda g: replace(g, inter_link=twice(g.inter_link)))
        yield "network between nodes 2x", links(between)


def _faster_device(plan: ExecutionPlan, device: Reprice | None) -> Iterator[tuple[str, Costs]]:
    """Of each group by itself."""
    cluster = plan.problem.cluster
    if device is None:
        return
    for index, group in enumerate(cluster.groups):
        of = f" of {group.name}" if len(cluster.groups) > 1 else ""
        for what, field in (("FLOP/s", "peak_flops"), ("memory bandwidth", "memory_bytes_per_s")):
            faster = replace(group.device, **{field: 2 * getattr(group.device, field)})
            changed = _changed(cluster, [index], partial(_with_device, device=faster))
            yield f"{what}{of} 2x", device(changed)


def _with_device(group: ClusterSpec, *, device: DeviceSpec) -> ClusterSpec:
    return replace(group, device=device)


def _changed(
    cluster: Cluster, indices: Sequence[int], change: Callable[[ClusterSpec], ClusterSpec]
) -> Cluster:
    """``cluster`` with some of its groups changed."""
    if isinstance(cluster, ClusterSpec):
        return change(cluster)
    groups = tuple(change(g) if i in indices else g for i, g in enumerate(cluster.groups))
    return replace(cluster, groups=groups)
