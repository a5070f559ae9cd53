"""Protects the losses of GRPO, ReMax, REINFORCE++, RLOO and RAFT's choice: float64 loops after the
papers, on answers to prompts of unequal lengths, however the groups are split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from executor.batch import SequenceBatch
from experiments.advantages import group_normalized, overlong_penalty
from experiments.losses import kl_penalty, policy_loss
from planner.algorithm import import_functions, make_config
from tests.experiments.test_losses import batch_of
from tests.experiments.test_ppo_functions import CTX, SPEC, alone
from tests.runs import ALGORITHMS

GROUP = 2
# Prompts of 2, 5 and 3 tokens: an order of lengths by answer and one by prompt differ.
SHAPES = [(2, 3), (2, 5), (5, 1), (5, 4), (3, 2), (3, 2)]
RESPONSE_LEN = 6


def experience() -> SequenceBatch:
    batch = batch_of(SHAPES, 3)
    rng = torch.Generator().manual_seed(4)
    rewards = torch.randn(6, generator=rng)
    rewards[4:] = 0.25  # a group without signal
    greedy = torch.randn(3, generator=rng).repeat_interleave(2)
    return batch.with_values(
        per_token={
            "sequences": torch.randint(0, SPEC.vocab, (batch.num_tokens,), generator=rng),
            "log_probs": batch.get("log_probs").float() / 4 - 2.5,
            "ref_log_probs": batch.get("ref_log_probs").float() / 4 - 2.5,
        },
        per_sequence={"rewards": rewards, "greedy_rewards": greedy,
                      "finished": torch.tensor([1.0, 0, 1, 1, 1, 0])},
    )  # fmt: skip


@dataclass
class Outcome:
    loss: float
    gradient: Tensor
    log_probs: list[np.ndarray]  # of each answer's tokens


def outcome(name: str, overrides: list[str], parts: list[list[int]]) -> Outcome:
    """The loss and its gradient, summed over the sequences ``parts`` as micro-batches sum it."""
    algorithm = ALGORITHMS[name]
    common = [f"samples_per_prompt={GROUP}", f"response_len={RESPONSE_LEN}",
              "reward.source=experiments.rewards:share_of_even_tokens"]  # fmt: skip
    config = make_config(algorithm.config_class, [*common, *overrides])
    function = import_functions(algorithm).make_functions(config)["actor_train"]
    batch = function.prepare(experience(), alone)
    rng = torch.Generator().manual_seed(1)
    hidden = torch.randn(batch.num_tokens, SPEC.hidden, generator=rng) / 4
    weight = torch.randn(SPEC.vocab, SPEC.hidden, generator=rng).requires_grad_()
    head: Callable[[Tensor], Tensor] = lambda rows: rows @ weight.T  # noqa: E731
    denominator = sum(function.count(batch.select(part)) for part in parts)
    total, offsets = 0.0, batch.offsets
    for part in parts:
        own = torch.cat([hidden[offsets[i] : offsets[i + 1]] for i in part] or [hidden[:0]])
        loss, _ = function.loss(head, own, batch.select(part), denominator, CTX)
        loss.backward()
        total += float(loss.detach())
    logits = (hidden.double() @ weight.detach().double().T).log_softmax(-1)
    log_probs = [
        np.array([float(logits[t - 1, batch.token_ids[t]]) for t in range(start + prompt, end)])
        for start, end, (prompt, _) in zip(offsets, offsets[1:], SHAPES)
    ]
    assert weight.grad is not None
    return Outcome(loss=total, gradient=weight.grad, log_probs=log_probs)


def answers(key: str) -> list[np.ndarray]:
    batch = experience()
    return [
        batch.get(key).double().numpy()[start + prompt : end]
        for start, end, (prompt, _) in zip(batch.offsets, batch.offsets[1:], SHAPES)
    ]


def number(key: str) -> np.ndarray:
    found: np.ndarray = experience().get(key).double().numpy()
    return found


def clipped(new: np.ndarray, old: np.ndarray, a: np.ndarray, high: float = 0.2) -> np.ndarray:
    ratio = np.exp(new - old)
    found: np.ndarray = -np.minimum(ratio * a, np.clip(ratio, 0.8, 1 + high) * a)
    return found


def grpo(new: list[np.ndarray]) -> float:
    """Shao et al. 2024, equation 3, with the k3 estimate of equation 4."""
    rewards, total = number("rewards").reshape(-1, GROUP), 0.0
    a = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)
    for p, old, ref, own in zip(new, answers("log_probs"), answers("ref_log_probs"), a.ravel()):
        kl = np.exp(ref - p) - (ref - p) - 1
        total += (clipped(p, old, own) + 0.04 * kl).mean() / len(new)
    return total


def dr_grpo(new: list[np.ndarray]) -> float:
    rewards = number("rewards").reshape(-1, GROUP)
    a = (rewards - rewards.mean(1, keepdims=True)).ravel()
    sums = [clipped(p, old, own).sum() for p, old, own in zip(new, answers("log_probs"), a)]
    return sum(sums) / (len(new) * RESPONSE_LEN)


def dapo(new: list[np.ndarray]) -> float:
    """Yu et al. 2025, equation 8: one mean over the tokens of groups with signal."""
    shaped = number("rewards")
    for i, (_, length) in enumerate(SHAPES):
        start = RESPONSE_LEN - 3
        shaped[i] += 0 if length <= start else (start - length) / 3
    groups = shaped.reshape(-1, GROUP)
    a = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
    rows = zip(new[:4], answers("log_probs"), a.ravel())
    losses = [clipped(p, old, own, high=0.28) for p, old, own in rows]
    return float(np.concatenate(losses).mean())


def masked(new: list[np.ndarray]) -> float:
    rewards = number("rewards").reshape(-1, GROUP)
    a = (rewards - rewards.mean(1, keepdims=True)).ravel()
    old, ends = answers("log_probs"), number("finished")
    return float(np.mean([clipped(new[i], old[i], a[i]).mean() for i in range(6) if ends[i]]))


def remax(new: list[np.ndarray]) -> float:
    rewards, greedy, total = number("rewards"), number("greedy_rewards"), 0.0
    for i, (old, ref) in enumerate(zip(answers("log_probs"), answers("ref_log_probs"))):
        for t in range(len(old)):
            follows = rewards[i] - 0.1 * (old[t:] - ref[t:]).sum()
            total -= (follows - greedy[i]) * new[i][t] / len(new)
    return total


def reinforce(new: list[np.ndarray], centered: bool = False) -> float:
    scores, found = number("rewards"), []
    if centered:
        scores = (scores.reshape(-1, GROUP) - scores.reshape(-1, GROUP).mean(1)[:, None]).ravel()
    for i, (old, ref) in enumerate(zip(answers("log_probs"), answers("ref_log_probs"))):
        left = np.arange(len(old))[::-1]  # steps from a token to the last
        for t in range(len(old)):
            ahead = np.arange(len(old) - t)
            penalty = (0.9**ahead * (old - ref)[t:]).sum()
            found.append(0.9 ** left[t] * scores[i] - 0.01 * penalty)
    a = np.array(found)
    a = (a - a.mean()) / (a.std() + 1e-5)
    return float(clipped(np.concatenate(new), np.concatenate(answers("log_probs")), a).mean())


def rloo(new: list[np.ndarray]) -> float:
    old, ref = answers("log_probs"), answers("ref_log_probs")
    whole = number("rewards") - 0.01 * np.array([(o - r).sum() for o, r in zip(old, ref)])
    others = whole.reshape(-1, GROUP)[:, ::-1].ravel()  # of two: the other one
    rows = zip(new, old, whole - others)
    return float(np.concatenate([clipped(p, o, a) for p, o, a in rows]).mean())


CASES: dict[str, tuple[str, list[str], Callable[[list[np.ndarray]], float]]] = {
    "grpo": ("grpo", [], grpo),
    "dr grpo": (
        "grpo",
        ["grpo.advantage_std=false", "grpo.aggregation=constant", "grpo.kl_coef=0"],
        dr_grpo,
    ),
    "dapo": (
        "grpo",
        ["grpo.clip_high=0.28", "grpo.aggregation=token", "grpo.kl_coef=0",
         "grpo.drop_equal=true", "grpo.overlong_buffer=3"],
        dapo,
    ),
    "truncated": (
        "grpo",
        ["grpo.advantage_std=false", "grpo.mask_truncated=true", "grpo.kl_coef=0"],
        masked,
    ),
    "remax": ("remax", [], remax),
    "reinforce++": ("reinforce", ["reinforce.gamma=0.9"], reinforce),
    "reinforce++ group": (
        "reinforce",
        ["reinforce.gamma=0.9", "reinforce.baseline=group"],
        lambda new: reinforce(new, centered=True),
    ),
    "rloo": ("reinforce", ["reinforce.baseline=leave_one_out"], rloo),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_the_papers_and_no_split_changes_it(case: str) -> None:
    name, overrides, reference = CASES[case]
    whole = outcome(name, overrides, [list(range(6))])
    assert whole.loss == pytest.approx(reference(whole.log_probs), abs=1e-5)
    assert whole.gradient.abs().max() > 1e-3
    for parts in ([[4, 5], [0, 1], [2, 3]], [[0, 1, 2, 3, 4, 5], []]):
        split = outcome(name, overrides, parts)
        assert split.loss == pytest.approx(whole.loss, abs=1e-6)
        assert (split.gradient - whole.gradient).abs().max() < 1e-5


def test_where_all_groups_are_equal_and_dropped_the_loss_is_zero_not_nan() -> None:
    config = make_config(ALGORITHMS["grpo"].config_class, [
        "samples_per_prompt=2", "grpo.drop_equal=true", "grpo.kl_coef=0", "reward.source=vader",
    ])  # fmt: skip
    function = import_functions(ALGORITHMS["grpo"]).make_functions(config)["actor_train"]
    batch = experience().with_values(per_sequence={"rewards": torch.ones(6)})
    batch = function.prepare(batch, alone)
    hidden = torch.randn(batch.num_tokens, SPEC.vocab)
    loss, _ = function.loss(lambda rows: rows, hidden, batch, function.count(batch), CTX)
    assert float(loss) == 0.0


def test_equal_rewards_give_no_advantage() -> None:
    assert group_normalized(torch.full((8,), 0.3), 4).abs().max() < 1e-3


def test_overlong_answers_lose_up_to_one() -> None:
    found = overlong_penalty(torch.tensor([4, 6, 8, 10]), longest=10, buffer=4)
    assert found.tolist() == [0.0, 0.0, -0.5, -1.0]
    assert overlong_penalty(torch.tensor([10]), longest=10, buffer=0).tolist() == [0.0]


@pytest.mark.parametrize(("high", "expected"), [(0.0, -1.2), (0.28, -1.28)])
def test_the_upper_clip_is_its_own(high: float, expected: float) -> None:
    loss, _ = policy_loss(
        torch.tensor(1.0), torch.tensor(0.0), torch.tensor(1.0), clip=0.2, clip_high=high
    )
    assert float(loss) == pytest.approx(expected)


def test_estimates_of_the_divergence_from_the_reference() -> None:
    """k1 and k3 in the mean over tokens drawn from pi; k2's gradient is the divergence's."""
    rng = torch.Generator().manual_seed(0)
    logits, ref = torch.randn(2, 5, generator=rng, dtype=torch.float64)
    logits.requires_grad_()
    log_p, log_ref = logits.log_softmax(-1), ref.log_softmax(-1)
    exact = (log_p.exp() * (log_p - log_ref)).sum()
    p = log_p.detach().exp()
    for estimator in ("k1", "k3"):
        found = (p * kl_penalty(log_p, log_ref, estimator=estimator)).sum()
        assert float(found.detach()) == pytest.approx(float(exact.detach()), abs=1e-12)
    second = (p * kl_penalty(log_p, log_ref, estimator="k2")).sum()
    (gradient,) = torch.autograd.grad(second, logits, retain_graph=True)
    (wanted,) = torch.autograd.grad(exact, logits)
    assert torch.allclose(gradient, wanted, atol=1e-12)


def test_raft_takes_the_best_of_each_group_under_the_groups_number() -> None:
    config = make_config(ALGORITHMS["raft"].config_class, [
        "samples_per_prompt=2", "reward.source=vader",
    ])  # fmt: skip
    select = import_functions(ALGORITHMS["raft"]).make_functions(config)["select"]
    batch = experience().with_values(
        per_sequence={"rewards": torch.tensor([0.0, 1.0, 2.0, -1.0, 0.25, 0.25])}
    )
    best = select.run(batch, [])
    assert best.samples == (0, 2, 4)
    assert best.lengths == (7, 6, 5)  # the second, the first, the first of equals
    o = batch.offsets
    wanted = torch.cat([batch.token_ids[o[i] : o[i + 1]] for i in (1, 2, 4)])
    assert torch.equal(best.get("best_sequences"), wanted)
    assert best.get("best_prompt_lengths").tolist() == [2, 5, 3]
