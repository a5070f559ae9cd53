"""Protects the point of it all: PPO, GRPO, ReMax, REINFORCE++, RLOO and RAFT raise a reward that
can be computed, with the same curve under a plan that spreads generation, rewards and training.

A small random model is rewarded by the share of its answer's tokens that are even; at random half
of them are.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from planner.plan import ExecutionPlan
from profiles.models import ModelSpec
from tests.runs import make_plan, run_plans

MODEL = ModelSpec(
    name="learner", num_layers=2, hidden=32, num_heads=2, num_kv_heads=2, head_dim=16, ffn=64,
    vocab=16, max_positions=64,
)  # fmt: skip
STEPS = 12
OVERRIDES = [
    "batch_size=8", "samples_per_prompt=4", "prompt_len=2", "response_len=6", "init=random",
    f"total_steps={STEPS}", "actor.lr=1e-2",
    "reward.source=experiments.rewards:share_of_even_tokens",
]  # fmt: skip
VARIANTS = {
    "ppo": ["ppo.kl_coef=0.01", "ppo.num_mini_batches=2", "ppo.num_epochs=2", "critic.lr=1e-2"],
    "grpo": [],
    "grpo dr": ["grpo.advantage_std=false", "grpo.aggregation=constant", "grpo.kl_coef=0"],
    "grpo dapo": ["grpo.clip_high=0.28", "grpo.aggregation=token", "grpo.kl_coef=0",
                  "grpo.drop_equal=true", "grpo.overlong_buffer=2"],
    "remax": ["remax.kl_coef=0.01"],
    "reinforce": [],
    "reinforce rloo": ["reinforce.baseline=leave_one_out"],
    "raft": [],
}  # fmt: skip
Curve = list[float]


def plan(name: str, layout: tuple[int, str], **calls: str) -> ExecutionPlan:
    return make_plan(
        *layout, algorithm=name.split()[0], overrides=[*OVERRIDES, *VARIANTS[name]], spec=MODEL,
        **calls,
    )  # fmt: skip


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Curve, Curve]]:
    """Rewards by step of every variant: in one process, and spread over two."""
    # Ranks of a function tell of their own answers; the test reads the first, so it has them all.
    spread = {"actor_gen": "0:d1p1m2:1", "rew_inf": "1:d1p1m1:1"}
    runs = {f"{name} whole": (plan(name, (1, "0:d1p1m1:1")), None) for name in VARIANTS}
    runs |= {f"{name} spread": (plan(name, (2, "0:d2p1m1:2"), **spread), None) for name in VARIANTS}
    found = run_plans(runs, tmp_path_factory.mktemp("runs"))

    def curve(name: str) -> Curve:
        metrics = found[name][0].metrics
        return [metrics[f"{step}/rew_inf"]["rewards"] for step in range(STEPS)]

    return {name: (curve(f"{name} whole"), curve(f"{name} spread")) for name in VARIANTS}


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_reward_rises_where_generation_runs_a_step_ahead(name: str, tmp_path: Path) -> None:
    """On a device of its own, with weights that lack one update: their log-probabilities are what
    the ratio is taken against."""
    turns = plan(name, (2, "0:d1p1m1:1"), actor_gen="1:d1p1m1:1")
    graph = replace(turns.problem.graph, max_staleness=1)
    ahead = replace(turns, problem=replace(turns.problem, graph=graph))
    metrics = run_plans({name: (ahead, None)}, tmp_path)[name][0].metrics
    rewards = [metrics[f"{step}/rew_inf"]["rewards"] for step in range(STEPS)]
    assert rewards[0] == pytest.approx(0.5, abs=0.15)
    assert sum(rewards[-3:]) / 3 > 0.75, rewards
    late = [metrics[f"{step}/actor_gen"]["staleness"] for step in range(STEPS)]
    assert late == [0.0] + [1.0] * (STEPS - 1)
    if name == "grpo":  # one optimizer step: in turns the ratio would be 1 in all of them
        ratios = [metrics[f"{step}/actor_train"]["approx_kl"] for step in range(STEPS)]
        assert ratios[0] == pytest.approx(0.0, abs=1e-6)
        assert min(ratios[1:]) > 1e-6


@pytest.mark.parametrize("name", VARIANTS)
def test_reward_rises_and_its_curve_is_that_of_another_plan(
    name: str, curves: dict[str, tuple[Curve, Curve]]
) -> None:
    whole, spread = curves[name]
    start, end = whole[0], sum(whole[-3:]) / 3
    assert start == pytest.approx(0.5, abs=0.15)
    assert end > 0.75, whole
    # Rounding differs between layouts and grows with the steps: the same curve, not the same bits.
    assert spread[:5] == pytest.approx(whole[:5], abs=2e-3)
    assert sum(spread[-3:]) / 3 == pytest.approx(end, abs=0.1)
