"""Protects batch inference: every answer once, the same under every plan."""

from __future__ import annotations

import json
from pathlib import Path

from tests.runs import make_plan, run_plan

OVERRIDES = ["batch_size=5", "samples_per_prompt=2", "prompt_len=6", "response_len=5",
             "total_steps=2", "init=random"]  # fmt: skip


def lines(num_devices: int, layout: str, folder: Path, **calls: str) -> dict[tuple[str, int], str]:
    plan = make_plan(
        num_devices, layout, algorithm="generation",
        overrides=[*OVERRIDES, f"output={folder}"], **calls,
    )  # fmt: skip
    run_plan(plan, folder)
    found = [
        json.loads(line)
        for file in (folder / "answers").glob("*.jsonl")
        for line in file.read_text().splitlines()
    ]
    assert len(found) == 2 * 5 * 2
    return {(line["id"], line["sample"]): line["answer"] for line in found}


def test_every_answer_is_written_once_under_every_plan(tmp_path: Path) -> None:
    whole = lines(1, "0:d1p1m1:1", tmp_path / "whole")
    assert set(whole) == {
        (f"{step}-{i}", k) for step in range(2) for i in range(5) for k in range(2)
    }
    assert len(set(whole.values())) > 15
    assert lines(2, "0:d2p1m1:1", tmp_path / "dp", actor_gen="0:d1p1m2:1") == whole
