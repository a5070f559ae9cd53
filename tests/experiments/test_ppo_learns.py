"""Protects the point of it all: PPO raises a reward that can be computed.

A small random model is rewarded by the share of its answer's tokens that are even; at random
half of them are. The same curve must come out of a plan with one layout and of one that moves
the actor between generation and training.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from profiles.models import ModelSpec
from tests.runs import make_plan, run_plan

MODEL = ModelSpec(
    name="learner", num_layers=2, hidden=64, num_heads=4, num_kv_heads=2, head_dim=16, ffn=128,
    vocab=32, max_positions=64,
)  # fmt: skip
STEPS = 30
OVERRIDES = (
    "batch_size=32", "prompt_len=4", "response_len=8", f"total_steps={STEPS}", "init=random",
    "ppo.num_mini_batches=4", "ppo.kl_coef=0.01", "ppo.reward_scale=2", "actor.lr=2e-3",
    "critic.lr=2e-3", "reward.source=experiments.rewards:share_of_even_tokens",
)  # fmt: skip


def rewards(plan_text: str, folder: Path, **calls: str) -> list[float]:
    plan = make_plan(2, plan_text, overrides=OVERRIDES, spec=MODEL, **calls)
    metrics = run_plan(plan, folder)[0].metrics
    return [metrics[f"{step}/rew_inf"]["rewards"] for step in range(STEPS)]


def test_reward_rises_and_its_curve_is_that_of_another_plan(tmp_path: Path) -> None:
    moving = rewards("0:d2p1m1:1", tmp_path / "a", actor_gen="0:d1p1m2:1", rew_inf="0:d1p1m1:1")
    start, end = sum(moving[:3]) / 3, sum(moving[-3:]) / 3
    assert start == pytest.approx(0.5, abs=0.1)
    assert end > 0.85, moving
    fixed = rewards("0:d2p1m1:1", tmp_path / "b", rew_inf="0:d1p1m1:1")
    # Rounding differs between layouts and grows with the steps: the same curve, not the same bits.
    assert fixed[:5] == pytest.approx(moving[:5], abs=1e-3)
    assert sum(fixed[-3:]) / 3 > 0.85
