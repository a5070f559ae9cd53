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
from planner.trace import TraceSpan
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


def executed(rank: int, step: int, start_s: float) -> TraceSpan:
    return TraceSpan(
        rank=rank, step=step, index=0, kind="train", label="actor_train", start_s=start_s,
        end_s=start_s + 2.0, num_tokens=7,
    )  # fmt: skip


def test_executed_steps_stand_beside_the_predicted_ones(tmp_path: Path) -> None:
    spans = [executed(rank, step, 100.0 + 10 * step + rank) for step in range(3) for rank in (0, 1)]
    file = tmp_path / "trace.json"
    save_trace(timeline(1), file, spans)
    events = json.loads(file.read_text())["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert processes == {0: "predicted", 1: "executed"}
    shown = [e for e in events if e["ph"] == "X" and e["pid"] == 1]
    assert [(e["tid"], e["args"]["step"], e["ts"], e["dur"]) for e in shown] == [
        (0, 1, 0.0, 2e6), (1, 1, 1e6, 2e6), (0, 2, 10e6, 2e6), (1, 2, 11e6, 2e6),
    ]  # fmt: skip
    assert shown[0]["args"]["tokens"] == 7
