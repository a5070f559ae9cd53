"""Protects the measured seconds that estimates are compared with."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from planner.trace import (
    TraceSpan,
    first_warm_step,
    measured_seconds,
    read_trace,
    step_seconds,
)
from profiles.errors import ConfigError


def span(rank: int, step: int, label: str, start_s: float, end_s: float) -> TraceSpan:
    return TraceSpan(
        rank=rank, step=step, index=0, kind="train", label=label, start_s=start_s, end_s=end_s
    )


def good(**changed: object) -> str:
    """A line of a trace with some values changed."""
    return json.dumps({**asdict(span(0, 0, "a", 1.0, 2.0)), **changed})


def test_a_call_lasts_from_its_last_start_to_its_last_end() -> None:
    spans = [span(0, 0, "a", 1.0, 5.0), span(1, 0, "a", 3.0, 6.0)]
    assert measured_seconds(spans) == {"a": 3.0}


def test_the_median_leaves_out_the_steps_before_the_first() -> None:
    spans = [
        span(0, step, "a", 10.0 * step, 10.0 * step + d) for step, d in enumerate((9, 1, 2, 3))
    ]
    assert measured_seconds(spans, first_step=1)["a"] == pytest.approx(2.0)


def test_a_step_lasts_from_end_to_end() -> None:
    spans = [span(0, step, "a", 10.0 * step, 10.0 * step + 8) for step in range(3)]
    assert step_seconds(spans, first_step=1) == pytest.approx(10.0)
    assert step_seconds(spans[:1]) == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{broken", "not a line of JSON"),
        ("[1, 2]", "not a span"),
        ('{"rank": 0}', "not a span"),
        (good(colour=1), "not a span"),
        (good(step="1"), "step is '1'"),
        (good(step=True), "step is True"),
        (good(rank=-1), "rank is -1"),
        (good(num_bytes=10**400), "num_bytes is 1000"),
        (good(end_s=10**400), "end_s is 1000"),
        (good(start_s=None), "start_s is None"),
        (good(end_s=0.5), "is no time"),
        (good(end_s=float("nan")), "is no time"),
    ],
)
def test_a_line_that_is_no_span_is_named(line: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "rank0.jsonl").write_text(good() + "\n" + line + "\n")
    with pytest.raises(ConfigError, match=problem) as caught:
        read_trace(tmp_path)
    assert caught.value.where == f"{tmp_path / 'rank0.jsonl'}:2"


def test_the_first_step_is_left_out_where_there_are_more() -> None:
    spans = [span(0, step, "a", step, step + 1) for step in (4, 5, 6)]
    assert first_warm_step(spans) == 5
    assert first_warm_step(spans[:1]) == 4
    assert first_warm_step([]) is None
