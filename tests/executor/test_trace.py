"""Protects the measured seconds that estimates are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from executor.trace import TraceSpan, TraceWriter, measured_seconds, read_trace, step_seconds


def span(rank: int, step: int, label: str, start_s: float, end_s: float) -> TraceSpan:
    return TraceSpan(
        rank=rank, step=step, index=0, kind="train", label=label, start_s=start_s, end_s=end_s
    )


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


def test_written_spans_are_read_back_and_a_cut_line_is_left_out(tmp_path: Path) -> None:
    with TraceWriter(tmp_path, 3) as writer:
        with writer.span(step=1, index=7, kind="infer", label="ref_inf") as counts:
            counts["num_tokens"] = 12
    with (tmp_path / "rank3.jsonl").open("a") as file:
        file.write('{"rank": 3, "st')
    (found,) = read_trace(tmp_path)
    assert (found.rank, found.step, found.index, found.label) == (3, 1, 7, "ref_inf")
    assert found.num_tokens == 12
    assert found.end_s >= found.start_s
