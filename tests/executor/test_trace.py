"""Protects the trace that a run leaves: whole spans, and the memory that was held in each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from executor.trace import TraceWriter, write_json
from planner.trace import read_trace
from tests.spawn import spawn


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


def write_often(rank: int, world_size: int, path: str) -> None:
    for _ in range(300):
        write_json(Path(path), {"from": rank})


def test_several_may_write_one_file(tmp_path: Path) -> None:
    # As the agents of all nodes do that SLURM tells to stop.
    spawn(2, write_often, str(tmp_path / "stop.json"))
    assert json.loads((tmp_path / "stop.json").read_text())["from"] in (0, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["stop.json"]


SIZE = 256 << 20


def leave_three_spans(rank: int, world_size: int, folder: str) -> None:
    with TraceWriter(Path(folder), 0, torch.device("cpu")) as writer:
        for index in range(3):
            with writer.span(step=0, index=index, kind="train", label="a"):
                if index == 1:
                    torch.ones(SIZE // 4).sum()  # freed before the span ends


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's clear_refs")
def test_a_span_knows_the_most_memory_that_was_held_in_it(tmp_path: Path) -> None:
    # In a process of its own: what others have freed may be used again, or be taken by the kernel.
    spawn(1, leave_three_spans, str(tmp_path))
    before, during, after = (span.peak_bytes for span in read_trace(tmp_path))
    assert before > 0
    assert during - before == pytest.approx(SIZE, rel=0.1)
    assert after == pytest.approx(before, rel=0.1)
