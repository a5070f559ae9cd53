"""Protects the tutorial's parts: data that the algorithms read, an exact reward, true curves."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from executor.records import DataKind, read_examples
from scripts import reasoning_gym_task
from scripts.draw_curves import main
from scripts.toy_task import share_in_place, write_data

REPOSITORY = Path(__file__).parents[2]
KINDS: dict[str, DataKind] = {"sft": "answers", "pairs": "pairs", "prompts": "prompts"}


@pytest.mark.parametrize("task", ["sort", "mood"])
def test_data_is_what_algorithms_read(task: str, tmp_path: Path) -> None:
    if task == "sort":
        for prefix in ("", "eval_"):
            write_data(tmp_path, seed=1, examples=30, prefix=prefix)
    else:
        script = REPOSITORY / "scripts" / "sentiment_task.py"
        subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, cwd=REPOSITORY)
    found = {
        prefix + name: read_examples(tmp_path / f"{prefix}{name}.jsonl", kind)
        for prefix in ("", "eval_")
        for name, kind in KINDS.items()
    }
    assert all(len(examples) >= 20 for examples in found.values())
    if task == "sort":
        for example in found["pairs"]:
            right, wrong = (share_in_place(str(example.prompt), a, {}) for a in example.answers)
            assert right == 1.0
            assert wrong < 1.0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("1 2 5 7", 1.0), ("1 2 7 5", 0.5), ("1 2", 0.5), ("", 0.0), ("1 2 5 7 7", 0.0)],
)
def test_digits_in_place_are_counted(answer: str, expected: float) -> None:
    assert share_in_place("sort 5 2 7 1 =", answer, {}) == expected


def test_curves_are_drawn_from_the_first_step_to_the_last(tmp_path: Path) -> None:
    run = tmp_path / "ppo"
    run.mkdir()
    rows = [{"step": s, "loss": 3.0 - s, **({"eval/loss": 1.0} if s % 2 else {})} for s in range(4)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([str(tmp_path / "c.svg"), f"{run}:loss"]) == 0
    tree = ET.parse(tmp_path / "c.svg")
    lines = [
        [tuple(map(float, point.split(","))) for point in line.get("points", "").split()]
        for line in tree.iter("{http://www.w3.org/2000/svg}polyline")
    ]
    assert [len(line) for line in lines] == [4, 2]
    falling = lines[0]
    assert [x for x, _ in falling] == sorted(x for x, _ in falling)
    assert [y for _, y in falling] == sorted(y for _, y in falling)  # SVG counts downwards


def test_a_number_that_the_run_has_not_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    with pytest.raises(SystemExit, match=r"has no rewards; it has step, loss"):
        main([str(tmp_path / "c.svg"), f"{tmp_path}:rewards"])


def test_a_verifier_of_reasoning_gym_is_a_reward(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    file = tmp_path / "prompts.jsonl"
    reasoning_gym_task.write(file, "chain_sum", examples=4, seed=1)
    for example in read_examples(file, "prompts"):
        truth = example.record["truth"]
        said = (f"I think it is {truth}.", f"{int(truth) + 1}", "")
        found = [reasoning_gym_task.score(str(example.prompt), a, example.record) for a in said]
        assert found[0] == 1.0
        assert max(found[1:]) < 0.1
