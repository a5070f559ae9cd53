"""Protects the figures: their bars and areas are the plan's and the timeline's numbers, and say so
where a plan has nothing to draw. What a browser makes of them is in ``test_report_html``.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace

import pytest

from planner.explain import explain, rank_groups
from planner.plan import ExecutionPlan
from planner.plan_memory import fullest_device, memory_over_time, plan_memory
from planner.resolve import hardware_levers, make_costs
from planner.search import estimate_plan
from planner.simulate import StepPrices, Timeline
from planner.trace import TraceSpan
from profiles.errors import ConfigError
from profiles.units import GIB
from tests.planner.plans import random_plan

pytest.importorskip("plotly", reason="figures need the extra notebook")

from planner import figures


def estimated(seed: int) -> tuple[ExecutionPlan, Timeline]:
    plan = random_plan(random.Random(seed))
    prices = StepPrices(plan.problem, make_costs(plan.problem.cluster, None))
    return estimate_plan(plan, prices, lower_bound=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_bars_of_the_timeline_add_up_to_what_ranks_do(seed: int) -> None:
    """Oracle: seconds of the spans of each group's first rank in a steady step, by label."""
    plan, steps = estimated(seed)
    figure = figures.timeline(plan, steps)
    idle, *traces = figure.data
    groups = rank_groups(steps)
    assert len(idle.y) == len(groups)
    assert idle.x[0] == pytest.approx(steps.step_s, rel=1e-3)
    drawn: dict[str, float] = defaultdict(float)
    for trace in traces:
        for row, seconds in zip(trace.y, trace.x):
            drawn[row] += seconds
            assert seconds >= 0
    for row, group in zip(idle.y, groups):
        assert drawn[row] == pytest.approx(sum(group.busy_s.values()), rel=1e-6)
    shares = {note.y: note.text for note in figure.layout.annotations}
    assert shares == {y: f"{g.idle_share:.0%} idle" for y, g in zip(idle.y, groups)}
    assert not [y for y in shares if y.isdecimal()]  # a number would be the row of that number
    assert {t.name for t in traces} <= {*steps.call_order, "reallocation", "transfer"}


@pytest.mark.parametrize("seed", range(4))
def test_memory_is_that_of_the_device_at_each_moment(seed: int) -> None:
    """Oracle: the moments' totals of the memory model; the top is what the device needs most."""
    plan, steps = estimated(seed)
    device = fullest_device(plan).device
    figure = figures.memory(plan, steps)
    totals = [sum(values) * GIB for values in zip(*(trace.y for trace in figure.data))]
    known = {m.need.total for m in memory_over_time(plan)[device]}
    for total in totals:
        assert min(abs(total - value) for value in known) < 1.0
    assert max(totals) == pytest.approx(plan_memory(plan)[device].total)
    times = figure.data[0].x
    assert list(times) == sorted(times)


def test_meshes_lie_where_calls_run() -> None:
    plan, _ = estimated(3)
    bars = {bar.y[0]: (bar.base[0], bar.x[0]) for bar in figures.meshes(plan).data}
    assert bars == {
        name: (a.mesh.first, a.mesh.num_devices) for name, a in plan.allocations.items()
    }


def test_groups_of_devices_have_their_bytes() -> None:
    plan, _ = estimated(5)
    figure = figures.fullest_moments(plan)
    totals = [sum(values) * GIB for values in zip(*(trace.x for trace in figure.data))]
    expected = sorted({need.total for need in plan_memory(plan).values()}, reverse=True)
    assert totals[:3] == pytest.approx(expected[:3])


def test_levers_are_the_largest_gains() -> None:
    plan, _ = estimated(2)
    links, device = hardware_levers(None)
    costs = make_costs(plan.problem.cluster, None)
    found = explain(plan, costs, links=links, device=device)
    (bars,) = figures.levers(found, most_rows=5).data
    saved = sorted((found.step_s - lever.step_s for lever in found.levers), reverse=True)
    assert list(bars.x) == pytest.approx([s for s in saved if s > found.step_s / 1000][:5])


def test_the_course_of_a_search_is_that_of_its_plan() -> None:
    plan, _ = estimated(1)
    with pytest.raises(ConfigError, match="the plan has no course of a search"):
        figures.search(plan)
    course = [[0.0, 1, 9.0, 4.0], [0.5, 10, 8.0, 4.0], [2.0, 30, 8.0, 6.0]]
    plan = replace(plan, provenance={"progress": course})
    best, bound = figures.search(plan).data
    assert list(best.y) == [9.0, 8.0, 8.0]
    assert list(bound.y) == [4.0, 4.0, 6.0]
    assert "30 plans looked at, gap 25.0%" in figures.search(plan).layout.title.text


def test_an_executed_step_is_drawn_from_its_first_span() -> None:
    """Oracle: two ranks, a first step that is warm-up, then one of 5 s in which rank 1 idles."""

    def span(rank: int, kind: str, label: str, start_s: float, end_s: float) -> TraceSpan:
        step = 0 if start_s < 200 else 1
        return TraceSpan(
            rank=rank, step=step, index=0, kind=kind, label=label, start_s=start_s, end_s=end_s
        )

    spans = [
        span(0, "infer", "ref_inf", 100, 190), span(0, "infer", "ref_inf", 200, 203),
        span(1, "transfer", "receive sequences", 200, 201), span(1, "infer", "ref_inf", 201, 202),
        span(0, "reallocate", "reallocate actor", 203, 204),
        span(0, "free", "free actor", 204, 204),
        span(0, "wait", "wait for reallocate actor", 204, 205),
    ]  # fmt: skip
    figure = figures.executed(spans)
    drawn = {
        (trace.name, row): (start_s, seconds)
        for trace in figure.data[1:]
        for row, start_s, seconds in zip(trace.y, trace.base, trace.x)
    }
    assert drawn == {
        ("ref_inf", "rank 0"): (0, 3), ("ref_inf", "rank 1"): (1, 1),
        ("transfer", "rank 1"): (0, 1), ("reallocation", "rank 0"): (3, 1),
        ("transfer", "rank 0"): (4, 1),
    }  # fmt: skip
    shown = {note.y: note.text for note in figure.layout.annotations}
    assert shown == {"rank 0": "20% idle", "rank 1": "80% idle"}  # whoever waits is idle
    with pytest.raises(ConfigError, match="no step"):
        figures.executed([])
