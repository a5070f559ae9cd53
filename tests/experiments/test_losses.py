"""Protects PPO's mathematics on packed sequences, against loops in float64 that follow the papers
line by line."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from executor.batch import SequenceBatch
from experiments.losses import (
    gae,
    kl_estimates,
    policy_loss,
    response_mask,
    token_rewards,
    value_loss,
)

shapes = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=5)
unit = st.floats(0.0, 1.0)


def batch_of(shape: list[tuple[int, int]], seed: int) -> SequenceBatch:
    """Sequences of (prompt, answer) tokens with random quantities in float64."""
    rng = torch.Generator().manual_seed(seed)
    lengths = tuple(p + a for p, a in shape)
    tokens = sum(lengths)

    def random(count: int) -> torch.Tensor:
        return torch.randn(count, generator=rng, dtype=torch.float64)

    return SequenceBatch(
        samples=tuple(range(len(shape))),
        lengths=lengths,
        per_token={
            "sequences": torch.zeros(tokens, dtype=torch.int64),
            "log_probs": random(tokens), "ref_log_probs": random(tokens), "values": random(tokens),
            "rewards_in": random(tokens),
        },
        per_sequence={
            "prompt_lengths": torch.tensor([p for p, _ in shape]),
            "finished": (random(len(shape)) > 0).double(),
            "scores": random(len(shape)),
        },
    )  # fmt: skip


def loop_gae(
    batch: SequenceBatch, rewards: list[float], values: list[float], gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    advantages, returns = [0.0] * batch.num_tokens, [0.0] * batch.num_tokens
    for i, (start, end) in enumerate(zip(batch.offsets, batch.offsets[1:])):
        after = 0.0 if batch.get("finished")[i] else values[end - 1]
        carried = 0.0
        for t in range(end - 1, start + int(batch.get("prompt_lengths")[i]) - 1, -1):
            delta = rewards[t] + gamma * after - values[t - 1]
            carried = delta + gamma * lam * carried
            advantages[t], returns[t] = carried, carried + values[t - 1]
            after = values[t - 1]
    return advantages, returns


@settings(max_examples=60, deadline=None)
@given(shape=shapes, gamma=unit, lam=unit, seed=st.integers(0, 99))
def test_gae_is_the_loop_over_each_answer(
    shape: list[tuple[int, int]], gamma: float, lam: float, seed: int
) -> None:
    batch = batch_of(shape, seed)
    rewards, values = batch.get("rewards_in"), batch.get("values")
    advantages, returns = gae(batch, rewards, values, gamma=gamma, lam=lam)
    expected = loop_gae(batch, rewards.tolist(), values.tolist(), gamma, lam)
    assert advantages.tolist() == pytest.approx(expected[0], abs=1e-9)
    assert returns.tolist() == pytest.approx(expected[1], abs=1e-9)


def test_without_discount_the_return_is_the_sum_of_what_follows() -> None:
    batch = batch_of([(2, 3)], 0)
    batch = batch.with_values(per_sequence={"finished": torch.ones(1)})
    rewards = torch.tensor([9.0, 9.0, 1.0, 2.0, 4.0], dtype=torch.float64)
    _, returns = gae(batch, rewards, batch.get("values"), gamma=1.0, lam=1.0)
    assert returns.tolist() == pytest.approx([0.0, 0.0, 7.0, 6.0, 4.0])


def test_of_no_sequences_there_are_no_advantages() -> None:
    batch = batch_of([(1, 1)], 0).select([])
    advantages, returns = gae(
        batch, batch.get("rewards_in"), batch.get("values"), gamma=1.0, lam=1.0
    )
    assert advantages.numel() == returns.numel() == 0


@given(shape=shapes, seed=st.integers(0, 99))
def test_rewards_are_the_penalty_of_answer_tokens_and_the_score_at_the_last(
    shape: list[tuple[int, int]], seed: int
) -> None:
    batch = batch_of(shape, seed)
    log_probs, ref = batch.get("log_probs"), batch.get("ref_log_probs")
    rewards = token_rewards(batch, batch.get("scores"), log_probs, ref, kl_coef=0.3)
    mask = response_mask(batch)
    for i, (start, end) in enumerate(zip(batch.offsets, batch.offsets[1:])):
        for t in range(start, end):
            is_answer = t - start >= shape[i][0]
            assert bool(mask[t]) == is_answer
            expected = -0.3 * float(log_probs[t] - ref[t]) if is_answer else 0.0
            expected += float(batch.get("scores")[i]) if t == end - 1 else 0.0
            assert float(rewards[t]) == pytest.approx(expected, abs=1e-12)


def test_both_estimates_of_the_divergence_are_right_in_the_mean() -> None:
    rng = torch.Generator().manual_seed(0)
    old, new = torch.randn(2, 5, generator=rng, dtype=torch.float64).log_softmax(-1)
    exact = float((old.exp() * (old - new)).sum())
    k1, k3 = kl_estimates(new, old)
    assert float((old.exp() * k1).sum()) == pytest.approx(exact, abs=1e-12)
    assert float((old.exp() * k3).sum()) == pytest.approx(exact, abs=1e-12)
    assert (k3 >= 0).all()


@given(
    new=st.floats(-3, 3),
    old=st.floats(-3, 3),
    advantage=st.floats(-2, 2),
    clip=st.floats(0.05, 0.5),
)
def test_policy_loss_is_the_papers_formula(
    new: float, old: float, advantage: float, clip: float
) -> None:
    ratio = math.exp(new - old)
    surrogate = min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)
    loss, clipped = policy_loss(
        torch.tensor(new, dtype=torch.float64), torch.tensor(old, dtype=torch.float64),
        torch.tensor(advantage, dtype=torch.float64), clip=clip,
    )  # fmt: skip
    assert float(loss) == pytest.approx(-surrogate, abs=1e-9)
    assert bool(clipped) == (-surrogate > -ratio * advantage)


@given(new=st.floats(-3, 3), old=st.floats(-3, 3), target=st.floats(-3, 3))
def test_value_loss_takes_the_worse_of_free_and_clipped(
    new: float, old: float, target: float
) -> None:
    near = min(max(new, old - 0.2), old + 0.2)
    tensors = (torch.tensor(x, dtype=torch.float64) for x in (new, old, target))
    loss, _ = value_loss(*tensors, clip=0.2)
    expected = 0.5 * max((new - target) ** 2, (near - target) ** 2)
    assert float(loss) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_clipped_ratio_has_no_gradient_where_it_would_go_further(advantage: float) -> None:
    far = torch.tensor(0.5 if advantage > 0 else -0.5, requires_grad=True)
    loss, clipped = policy_loss(far, torch.tensor(0.0), torch.tensor(advantage), clip=0.2)
    loss.backward()
    assert clipped
    assert far.grad == 0.0
