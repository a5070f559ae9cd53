"""Protects the virtual clock: hand-computed timelines, and laws that every timeline obeys."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise

import pytest

from planner.cost import CallCost, CostModel
from planner.layout import Layout
from planner.mesh import DeviceMesh
from planner.plan import Allocation, ExecutionPlan
from planner.program import Function, compile_plan
from planner.simulate import (
    Span,
    StepEvent,
    StepPrices,
    Timeline,
    list_events,
    play_step,
    run_program,
    simulate,
    steady_step_s,
)
from planner.strategy import ParallelStrategy
from profiles.collectives import Collectives
from profiles.roofline import RooflineCosts
from tests.planner.plans import make_test_cluster, ppo, random_plan


class FixedPrices(StepPrices):
    """Seconds by call name; every reallocation and every transfer that brings bytes as told."""

    def __init__(self, plan: ExecutionPlan, calls: Mapping[str, float], *, move_s: float = 0.0):
        cluster = plan.problem.cluster
        model = CostModel(cluster, RooflineCosts(cluster.device), Collectives(cluster))
        super().__init__(plan.problem, model)
        self.seconds = calls
        self.move_s = move_s

    def call(self, name: str, allocation: Allocation) -> CallCost:
        return CallCost(seconds=self.seconds[name], parts={}, provenance={})

    def reallocation_s(self, source: Layout, destination: Layout) -> float:
        return 10 * self.move_s

    def transfer_s(self, num_bytes: float, source: DeviceMesh, destination: DeviceMesh) -> float:
        return self.move_s if num_bytes else 0.0


SECONDS = {
    "actor_gen": 4.0, "rew_inf": 1.0, "ref_inf": 2.0, "critic_inf": 1.0, "actor_train": 3.0,
    "critic_train": 2.0,
}  # fmt: skip


def one(first: int, count: int = 1, **axes: int) -> Allocation:
    return Allocation(mesh=DeviceMesh(first, count), strategy=ParallelStrategy(**axes))


def timeline(allocations: Mapping[str, Allocation], *, num_devices: int, move_s: float) -> Timeline:
    problem = ppo(make_test_cluster(1, num_devices), ["batch_size=24"])
    plan = ExecutionPlan(problem=problem, allocations=allocations)
    return run_program(plan, compile_plan(plan), FixedPrices(plan, SECONDS, move_s=move_s))


def test_one_device_runs_calls_one_after_another() -> None:
    found = timeline(dict.fromkeys(SECONDS, one(0)), num_devices=1, move_s=0.5)
    assert found.step_s == pytest.approx(sum(SECONDS.values()))
    assert found.idle_share == {0: pytest.approx(0.0)}
    assert [span.label for span in found.last_step] == list(SECONDS)


def test_two_devices_by_hand() -> None:
    """Actor and reference on device 0, critic and reward on device 1, every message 0.5 s.

    Device 0: gen 0-4, ref 4-6, receives rewards and values, train. Device 1 receives sequences
    4-4.5 for rew_inf 4.5-5.5, critic_inf 5.5-6.5 (it has the sequences). Device 0 takes the
    rewards 6-6.5 and the values, ready at 6.5, 6.5-7, trains 7-10. Device 1 takes log-probs of
    the generation before those of the reference (order of producers): 6.5-7, 7-7.5, trains
    7.5-9.5. The next step starts at 10 on device 0: 10 s a step.
    """
    allocations = {
        "actor_gen": one(0), "ref_inf": one(0), "actor_train": one(0),
        "rew_inf": one(1), "critic_inf": one(1), "critic_train": one(1),
    }  # fmt: skip
    found = timeline(allocations, num_devices=2, move_s=0.5)
    first = {(s.rank, s.label): (s.start_s, s.end_s) for s in found.spans if s.step == 0}
    assert first[(1, "rew_inf")] == (4.5, 5.5)
    assert first[(1, "critic_inf")] == (5.5, 6.5)
    assert first[(0, "receive critic_inf")] == (6.5, 7.0)
    assert first[(0, "actor_train")] == (7.0, 10.0)
    assert first[(1, "critic_train")] == (7.5, 9.5)
    assert found.step_s == pytest.approx(10.0)
    assert found.idle_share[1] == pytest.approx(1 - (0.5 + 1 + 1 + 0.5 + 0.5 + 2) / 10)


def test_a_reallocation_waits_for_both_sides() -> None:
    """Generation on both devices, training on one: weights go out before every generation."""
    allocations = {**dict.fromkeys(SECONDS, one(0)), "actor_gen": one(0, 2, dp=2)}
    found = timeline(allocations, num_devices=2, move_s=0.1)
    moves = [s for s in found.spans if s.label == "reallocate actor"]
    assert len(moves) == 2 * 6
    for step in range(1, 6):
        trained = max(s.end_s for s in found.spans if s.step == step - 1)
        starts = [s.start_s for s in moves if s.step == step]
        assert starts == pytest.approx([trained, trained])
    # 1 s of moving weights; device 0 fetches the other half of the sequences for rew_inf, and
    # of their log-probs for actor_train.
    assert found.step_s == pytest.approx(sum(SECONDS.values()) + 1.0 + 0.1 + 0.1)


@pytest.mark.parametrize("seed", range(25))
def test_every_timeline_obeys_the_laws(seed: int) -> None:
    """No rank does two things at once, a call's ranks run together, producers come first, and

    a step is no shorter than any rank's work.
    """
    plan = random_plan(random.Random(seed))
    cluster = plan.problem.cluster
    costs = CostModel(cluster, RooflineCosts(cluster.device), Collectives(cluster))
    found = simulate(plan, compile_plan(plan), costs)
    by_rank: dict[int, list[Span]] = defaultdict(list)
    for span in found.spans:
        by_rank[span.rank].append(span)
    for spans in by_rank.values():
        for before, after in pairwise(spans):
            assert after.start_s >= before.end_s - 1e-12
    times = {(s.step, s.label, s.rank): (s.start_s, s.end_s) for s in found.spans}
    for call in plan.problem.graph.calls:
        ranks = plan.allocations[call.name].mesh.devices
        for step in range(6):
            own = [times[(step, call.name, rank)] for rank in ranks]
            if call.role is not None:
                assert len(set(own)) == 1
            for before in plan.problem.graph.predecessors(call):
                if set(before.outputs) & set(call.inputs):
                    mesh = plan.allocations[before.name].mesh
                    ended = max(times[(step, before.name, rank)][1] for rank in mesh.devices)
                    assert max(start for start, _ in own) >= ended - 1e-12
    busy = [sum(s.seconds for s in spans if s.step == 5) for spans in by_rank.values()]
    assert found.step_s >= max(busy) * (1 - 1e-9)
    assert all(0 <= share <= 1 for share in found.idle_share.values())


@pytest.mark.parametrize("seed", range(25))
def test_seconds_per_step_are_those_of_the_long_run(seed: int) -> None:
    """Karp's formula against the clock: the mean of steps 121 to 240, whatever the period."""
    plan = random_plan(random.Random(seed))
    cluster = plan.problem.cluster
    costs = CostModel(cluster, RooflineCosts(cluster.device), Collectives(cluster))
    events = list_events(plan, compile_plan(plan), StepPrices(plan.problem, costs))
    clock_s: dict[int, float] = defaultdict(float)
    ends_s = [0.0]
    for _ in range(240):
        play_step(events, clock_s, None)
        ends_s.append(max(clock_s.values()))
    assert steady_step_s(events) == pytest.approx((ends_s[240] - ends_s[120]) / 120, rel=1e-9)


def test_seconds_per_step_are_not_those_of_the_first_steps() -> None:
    """A reader that lags hides the slower device for eighteen steps.

    Device 0 takes 10 s a step. Device 1 takes 9.5 s and device 2 reads what it made, 9 s more:
    step k ends at ``max(10 k, 9.5 k + 9)``, so early steps seem to take 9.5 s.
    """
    events = [
        StepEvent(Function(index=0, call="slow"), [0], 10.0, "slow"),
        StepEvent(Function(index=1, call="make"), [1], 9.5, "make"),
        StepEvent(Function(index=2, call="read"), [2], 9.0, "read", [("make", 0.0)]),
    ]
    clock_s: dict[int, float] = defaultdict(float)
    for _ in range(6):
        play_step(events, clock_s, None)
    assert max(clock_s.values()) == pytest.approx(9.5 * 6 + 9)
    assert steady_step_s(events) == pytest.approx(10.0)
