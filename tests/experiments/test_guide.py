"""Protects the guide of experiments/README.md: its files, somewhere else than this repository, are
planned and run, and what they train learns."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from executor.cli import main as realexec
from planner.cli import main as realplan
from scripts.toy_task import write_data, write_model

GUIDE = Path(__file__).parents[2] / "experiments" / "README.md"
# Right is an answer that begins with the smallest digit of its prompt.
VERIFIER = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    smallest = min(word for word in asked["prompt"].split() if word.isdigit())
    print(float(asked["answer"].split()[:1] == [smallest]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guide's files, a verifier, a small model and its prompts."""
    own = tmp_path_factory.mktemp("mine")
    for block in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", GUIDE.read_text(), re.S):
        (own / block[0]).write_text(block[1])
    (own / "verifier.py").write_text(VERIFIER)
    write_model(own / "model", seed=1)
    write_data(own, seed=1, examples=64)
    return own


@pytest.mark.slow
def test_the_guides_algorithm_is_planned_runs_and_learns(folder: Path) -> None:
    plan, output = folder / "plan.json", folder / "out"
    words = ["batch_size=16", "prompt_len=8", "response_len=3", "samples_per_prompt=8"]
    search = ["search", "--algorithm", str(folder / "verified.py"), "--time-limit", "1"]
    search += ["--model", str(folder / "model"), "--cluster", "local", "--gpus", "2"]
    assert realplan([*search, *words, "-o", str(plan)]) == 0
    run = ["run", str(plan), "-o", str(output), f"data.path={folder}/prompts.jsonl"]
    command = f'command="{sys.executable} {folder}/verifier.py"'
    assert realexec([*run, command, "total_steps=30", "actor.lr=1e-2"]) == 0
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["verify/rewards"] for line in lines]
    assert len(rewards) == 30
    assert sum(rewards[:3]) / 3 < 0.15  # one of fourteen words at random
    assert sum(rewards[-3:]) / 3 > 0.2, rewards
    assert list((output / "actor").glob("*/config.json"))


def test_its_mistakes_are_told_like_ours(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search = ["search", "--algorithm", str(folder / "verified.py"), "--model", "tiny"]
    assert realplan([*search, "--gpus", "1", "samples_per_prompt=1"]) == 2
    assert "samples_per_prompt: 1 is not at least 2" in capsys.readouterr().err
    assert realplan([*search, "--gpus", "1", "pases.num_epochs=2"]) == 2
    assert "passes" in capsys.readouterr().err


def test_a_graph_alone_is_planned(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = runpy.run_path(str(folder / "plan_only.py"))["found"]
    assert list(found.plan.allocations) == ["actor_gen", "judge", "actor_train"]
    assert found.gap <= 0.01
    assert capsys.readouterr().out.startswith("judged on 16 x h100, ")
