"""What a call may choose on any mesh of one kind: ways and states, costed, then pruned.

A *way* is a strategy with micro-batches, which fixes seconds and the bytes while it runs; a
*state* is where what it holds over the step lies: ZeRO, offload. Read ``Choice``, then
``Costing.choices``.

Pruning is safe: a choice goes only if it needs more memory than a device has, or if another with
the same layout is no slower and no larger on any stage. What other calls see of a call is its
layout, so every plan keeps an equal that is at least as good. Of ways that goes before they are
put together with states, as a state adds the same seconds and bytes to each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from operator import add, le, sub

from planner.cost import call_seconds
from planner.cost.offload import NO_SWAP, SwapCost
from planner.graph import CallKind, ModelFunctionCall
from planner.layout import Layout
from planner.lock import Lock
from planner.memory import (
    RESERVE_BYTES,
    STAGING_BYTES,
    average_bytes,
    held_memory,
    leaves_device,
    running_bytes,
)
from planner.mesh import DeviceMesh
from planner.plan import Allocation, Problem
from planner.search.variants import ways, zero_and_offload
from planner.simulate import StepPrices
from planner.strategy import ParallelStrategy
from profiles.models import ModelSpec

Bytes = tuple[int, ...]  # by pipeline stage


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Choice:
    """A strategy with micro-batches on any mesh of its kind: of its size and group.

    ``seconds``: of the call and of what leaves the device after it, ``reload_s`` of what comes from
    the host before it, ``average_s`` of the average in its layout, where its role is one. Bytes by
    pipeline stage: ``held`` what stays on a device if the call's layout is a home of its role,
    ``borrowed`` if the weights come for this call, ``running`` while it runs.
    """

    strategy: ParallelStrategy
    num_micro_batches: int
    generation_batch: int = 0
    offload: bool = False
    seconds: float
    reload_s: float = 0.0
    average_s: float = 0.0
    held: Bytes
    borrowed: Bytes
    running: Bytes

    @property
    def busy_s(self) -> float:
        """Seconds of its devices, whatever it waits for."""
        return self.reload_s + self.seconds

    @property
    def axes(self) -> tuple[int, int, int, int]:
        """What fixes the layout on a given mesh: (pp, tp, dp, ep)."""
        return self.strategy.pp, self.strategy.tp, self.strategy.dp, self.strategy.ep


def undominated(choices: Sequence[Choice]) -> list[Choice]:
    """Choices of one layout without those that another equals or beats in seconds and bytes.

    >>> def choice(seconds, running):
    ...     return Choice(strategy=ParallelStrategy(), num_micro_batches=1, seconds=seconds,
    ...                   held=(0,), borrowed=(0,), running=(running,))
    >>> [c.seconds for c in undominated([choice(1, 9), choice(2, 5), choice(3, 7)])]
    [1, 2]
    """
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.seconds, sum(c.held), sum(c.running))):
        if not any(_no_larger(better, choice) for better in kept):
            kept.append(choice)
    return kept


def _no_larger(a: Choice, b: Choice) -> bool:
    return (
        a.reload_s <= b.reload_s
        and all(map(le, a.running, b.running))
        and all(map(le, a.held, b.held))
    )


def _fits(held: Bytes, running: Bytes, free_bytes: int) -> bool:
    return bool(max(map(add, held, running)) <= free_bytes)


@dataclass(frozen=True, slots=True)
class _Way:
    """An allocation that may also be offloaded, priced."""

    allocation: Allocation
    seconds: float
    running: Bytes


def _undominated_ways(priced: Sequence[_Way]) -> list[_Way]:
    kept: list[_Way] = []
    for way in sorted(priced, key=lambda way: (way.seconds, sum(way.running))):
        if not any(all(map(le, better.running, way.running)) for better in kept):
            kept.append(way)
    return kept


@dataclass(frozen=True, slots=True)
class _State:
    """``held`` between calls if nothing is offloaded, and what of it ``leaves``."""

    zero: int
    offload: bool
    held: Bytes
    leaves: Bytes
    swap: SwapCost


class Costing:
    """Choices of the calls of one problem; what several of them need is kept."""

    def __init__(self, problem: Problem, prices: StepPrices) -> None:
        self.problem, self.prices = problem, prices
        self.kind = problem.cluster.kind
        self._known_held: dict[tuple[object, ...], Bytes] = {}

    def choices(
        self, call: ModelFunctionCall, mesh: DeviceMesh, lock: Lock, *, offload: bool
    ) -> tuple[Choice, ...]:
        """Those that fit on ``mesh``, are as locked and that no other beats, fastest first."""
        layouts: Iterable[Sequence[Allocation]] = ways(self.problem, call, mesh)
        states = zero_and_offload(self.problem, call, offload=offload)
        if lock.allocation is not None:
            layouts = [[lock.allocation]]
            states = [(lock.allocation.strategy.zero, lock.allocation.offload)]
        found: list[Choice] = []
        for layout in layouts:
            allowed = [way for way in layout if lock.allows_way(way)]
            wanted = [state for state in states if lock.offload in (None, state[1])]
            if allowed and wanted:
                found += self._of_layout(call, allowed, wanted)
        return tuple(sorted(found, key=lambda c: c.busy_s))

    def _of_layout(
        self, call: ModelFunctionCall, layout: Sequence[Allocation],
        wanted: Sequence[tuple[int, bool]],
    ) -> list[Choice]:  # fmt: skip
        """Undominated ways of one (pp, tp, dp, ep), each in every state in which it fits."""
        spec = self.problem.spec_of(call.name)
        device = self.problem.cluster.group_of(layout[0].mesh.first).device
        free_bytes = device.memory_bytes - RESERVE_BYTES[self.kind]
        states = [
            self._state(call, spec, layout[0], zero, offload)
            for zero, offload in wanted if zero == 0 or layout[0].strategy.dp > 1
        ]  # fmt: skip
        running = [
            (0,) if spec is None else running_bytes(self.problem, call, allocation, spec)
            for allocation in layout
        ]
        borrowed: Bytes = (0,)
        average_s = 0.0
        if spec is not None:
            staging = STAGING_BYTES[self.kind]
            borrowed = tuple(b + staging for b in self._held(spec, layout[0].strategy, False))
            if self._is_average(call):
                place = Layout.of(spec, layout[0].mesh, layout[0].strategy)
                average_s = self.prices.average_s(place)
        found = []
        for zero in dict.fromkeys(state.zero for state in states):
            own = [state for state in states if state.zero == zero]
            # What ZeRO changes depends on the way: backward hides a part of the sums.
            ways_in = [
                self._way(call, allocation, zero, needed)
                for allocation, needed in zip(layout, running, strict=True)
                if any(_fits(state.held, needed, free_bytes) for state in own)
            ]
            for way, state in product(_undominated_ways(ways_in), own):
                # What leaves is there again while the call runs, so the sum is the same.
                if _fits(state.held, way.running, free_bytes):
                    found.append(self._choice(way, state, borrowed, average_s))
        return undominated(found)

    def _way(
        self, call: ModelFunctionCall, allocation: Allocation, zero: int, running: Bytes
    ) -> _Way:
        if allocation.strategy.zero != zero:
            allocation = replace(allocation, strategy=replace(allocation.strategy, zero=zero))
        return _Way(allocation, self._seconds(call, allocation), running)

    def _seconds(self, call: ModelFunctionCall, allocation: Allocation) -> float:
        return call_seconds(self.problem, call, allocation, self.prices.model)

    def _choice(self, way: _Way, state: _State, borrowed: Bytes, average_s: float) -> Choice:
        allocation, seconds = way.allocation, way.seconds
        return Choice(
            strategy=allocation.strategy,
            num_micro_batches=allocation.num_micro_batches,
            generation_batch=allocation.generation_batch,
            offload=state.offload,
            seconds=seconds + state.swap.offload_s,
            reload_s=state.swap.reload_s,
            average_s=average_s,
            held=tuple(map(sub, state.held, state.leaves)),
            borrowed=borrowed,
            running=tuple(map(add, way.running, state.leaves)),
        )

    def _state(
        self, call: ModelFunctionCall, spec: ModelSpec | None, way: Allocation, zero: int,
        offload: bool,
    ) -> _State:  # fmt: skip
        if spec is None:
            return _State(zero, offload, (0,), (0,), NO_SWAP)
        allocation = replace(way, strategy=replace(way.strategy, zero=zero), offload=offload)
        trained = call.kind is CallKind.TRAIN
        held = self._held(spec, allocation.strategy, trained)
        leaves: Bytes = (0,) * len(held)
        if leaves_device(allocation, self.kind):
            weights = self._held(spec, allocation.strategy, False)
            leaves = tuple(map(sub, held, weights)) if trained else weights
        if self._is_average(call):
            held = tuple(average_bytes(weights, self.kind) for weights in held)
        return _State(zero, offload, held, leaves, self.prices.swap(call.name, allocation))

    def _is_average(self, call: ModelFunctionCall) -> bool:
        return any(average.role == call.role for average in self.problem.graph.averages)

    def _held(self, spec: ModelSpec, s: ParallelStrategy, trained: bool) -> Bytes:
        """Bytes of weights and their state, by stage."""
        key = (spec, s.pp, s.tp, s.dp, s.ep, s.zero if trained else 0, trained)
        if key not in self._known_held:
            self._known_held[key] = tuple(
                held_memory(spec, s, stage, self.kind, trained=trained).total
                for stage in range(s.pp)
            )
        return self._known_held[key]
