"""Protects the trace file: a viewer opens it, and its events are the timeline's spans."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from planner.program import compile_plan
from planner.report_trace import save_trace, trace_events
from planner.resolve import make_costs
from planner.simulate import StepPrices, Timeline, run_program
from profiles.errors import ConfigError
from tests.planner.plans import random_plan


def timeline(seed: int) -> Timeline:
    plan = random_plan(random.Random(seed))
    prices = StepPrices(plan.problem, make_costs(plan.problem.cluster, None))
    return run_program(plan, compile_plan(plan), prices)


@pytest.mark.parametrize("seed", range(4))
def test_events_are_the_spans_in_microseconds(seed: int, tmp_path: Path) -> None:
    found = timeline(seed)
    file = tmp_path / "trace.json"
    save_trace(found, file)
    events = [e for e in json.loads(file.read_text())["traceEvents"] if e["ph"] == "X"]
    assert len(events) == len(found.spans)
    shown = sorted((e["tid"], e["name"], e["args"]["step"]) for e in events)
    assert shown == sorted((s.rank, s.label, s.step) for s in found.spans)
    assert sum(e["dur"] for e in events) == pytest.approx(1e6 * sum(s.seconds for s in found.spans))
    assert [e["ts"] for e in events] == sorted(e["ts"] for e in events)


def test_a_large_cluster_shows_one_rank_of_each_group() -> None:
    found = timeline(3)
    names = [e for e in trace_events(found, most_ranks=1) if e["name"] == "thread_name"]
    assert len(names) == 1
    assert found.num_ranks > 1


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        save_trace(timeline(1), tmp_path / "none" / "trace.json")
