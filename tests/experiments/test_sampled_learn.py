"""Protects that GRPO, ReMax, REINFORCE++, RLOO and RAFT raise a reward that can be computed (the
share of even tokens), with the same curve where generation, rewards and training are spread."""

from __future__ import annotations

from pathlib import Path

import pytest

from profiles.models import ModelSpec
from tests.runs import make_plan, run_plan

MODEL = ModelSpec(
    name="learner", num_layers=2, hidden=64, num_heads=4, num_kv_heads=2, head_dim=16, ffn=128,
    vocab=32, max_positions=64,
)  # fmt: skip
STEPS = 20
OVERRIDES = [
    "batch_size=8", "samples_per_prompt=4", "prompt_len=4", "response_len=8", "init=random",
    f"total_steps={STEPS}", "actor.lr=3e-3",
    "reward.source=experiments.rewards:share_of_even_tokens",
]  # fmt: skip
VARIANTS = {
    "grpo": [],
    "grpo dr": ["grpo.advantage_std=false", "grpo.aggregation=constant", "grpo.kl_coef=0"],
    "grpo dapo": ["grpo.clip_high=0.28", "grpo.aggregation=token", "grpo.kl_coef=0",
                  "grpo.drop_equal=true", "grpo.overlong_buffer=2"],
    "remax": ["remax.kl_coef=0.01"],
    "reinforce": [],
    "reinforce rloo": ["reinforce.baseline=leave_one_out"],
    "raft": ["actor.lr=5e-3"],
}  # fmt: skip


def curve(name: str, layout: tuple[int, str], folder: Path, **calls: str) -> list[float]:
    plan = make_plan(
        *layout, algorithm=name.split()[0], overrides=[*OVERRIDES, *VARIANTS[name]], spec=MODEL,
        **calls,
    )  # fmt: skip
    metrics = run_plan(plan, folder)[0].metrics
    return [metrics[f"{step}/rew_inf"]["rewards"] for step in range(STEPS)]


@pytest.mark.parametrize("name", VARIANTS)
def test_reward_rises_and_its_curve_is_that_of_another_plan(name: str, tmp_path: Path) -> None:
    whole = curve(name, (1, "0:d1p1m1:1"), tmp_path / "whole")
    start, end = sum(whole[:3]) / 3, sum(whole[-3:]) / 3
    assert start == pytest.approx(0.5, abs=0.1)
    assert end > 0.75, whole
    # Rewards are told by each rank of a function; the first tells all where it is alone.
    spread = curve(
        name, (2, "0:d2p1m1:2"), tmp_path / "dp", actor_gen="0:d1p1m2:1", rew_inf="1:d1p1m1:1"
    )
    assert spread[:5] == pytest.approx(whole[:5], abs=2e-3)
    assert sum(spread[-3:]) / 3 == pytest.approx(end, abs=0.1)
