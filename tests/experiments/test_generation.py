"""Protects batch inference: every answer once, the same under every plan."""

from __future__ import annotations

import json
from pathlib import Path

from tests.runs import Runs, make_plan, run_plans

OVERRIDES = ["batch_size=5", "samples_per_prompt=2", "prompt_len=6", "response_len=5",
             "total_steps=2", "init=random"]  # fmt: skip


def test_every_answer_is_written_once_under_every_plan(tmp_path: Path) -> None:
    layouts: dict[str, tuple[int, str, dict[str, str]]] = {
        "whole": (1, "0:d1p1m1:1", {}),
        "dp": (2, "0:d2p1m1:1", {"actor_gen": "0:d1p1m2:1"}),
    }
    runs: Runs = {}
    for name, (num_devices, layout, calls) in layouts.items():
        overrides = [*OVERRIDES, f"output={tmp_path / name}"]
        plan = make_plan(num_devices, layout, algorithm="generation", overrides=overrides, **calls)
        runs[name] = plan, None
    run_plans(runs, tmp_path)
    whole, dp = (answers(tmp_path / name) for name in layouts)
    assert set(whole) == {
        (f"{step}-{i}", k) for step in range(2) for i in range(5) for k in range(2)
    }
    assert len(set(whole.values())) > 15
    assert dp == whole


def answers(output: Path) -> dict[tuple[str, int], str]:
    """By the prompt's id and the place among its answers."""
    found = [
        json.loads(line)
        for file in (output / "answers").glob("*.jsonl")
        for line in file.read_text().splitlines()
    ]
    assert len(found) == 2 * 5 * 2
    return {(line["id"], line["sample"]): line["answer"] for line in found}
