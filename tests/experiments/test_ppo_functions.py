"""Protects what PPO's functions make of a batch: no split of it changes a loss or a gradient,
and refused rewards name their sample."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from executor.batch import SequenceBatch
from executor.context import single_process
from experiments.ppo.config import PPOExperiment
from experiments.ppo.functions import make_functions, normalized
from experiments.rewards import load_reward
from planner.layout import Layout
from planner.mesh import DeviceMesh
from profiles.errors import ConfigError
from profiles.models import ModelSpec
from tests.experiments.test_losses import batch_of

SPEC = ModelSpec(
    name="x", num_layers=1, hidden=8, num_heads=1, num_kv_heads=1, head_dim=8, ffn=8, vocab=12
)
CTX = single_process(Layout(spec=SPEC, mesh=DeviceMesh(0, 1)))


def alone(value: Tensor) -> Tensor:
    return value


def experience(seed: int = 0) -> SequenceBatch:
    batch = batch_of([(2, 3), (1, 5), (3, 2), (2, 4)], seed)
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, SPEC.vocab, (batch.num_tokens,), generator=rng)
    return batch.with_values(
        per_token={"sequences": ids, **{
            key: batch.get(key).float() for key in ("log_probs", "ref_log_probs", "values")
        }},
        per_sequence={"rewards": batch.get("scores").float()},
    )  # fmt: skip


def loss_and_gradient(call: str, parts: list[list[int]]) -> tuple[float, Tensor]:
    """Summed over ``parts`` of the batch, as micro-batches or data-parallel ranks sum it."""
    function = make_functions(PPOExperiment())[call]
    batch = function.prepare(experience(), alone)
    rng = torch.Generator().manual_seed(1)
    hidden = torch.randn(batch.num_tokens, SPEC.hidden, generator=rng)
    width = SPEC.vocab if call == "actor_train" else 1
    weight = torch.randn(width, SPEC.hidden, generator=rng).requires_grad_()

    def head(rows: Tensor) -> Tensor:
        out = rows @ weight.T
        return out if call == "actor_train" else out[:, 0]

    denominator = sum(function.count(batch.select(part)) for part in parts)
    total = 0.0
    offsets = batch.offsets
    for part in parts:
        own = torch.cat([hidden[offsets[i] : offsets[i + 1]] for i in part] or [hidden[:0]])
        loss, _ = function.loss(head, own, batch.select(part), denominator, CTX)
        loss.backward()
        total += float(loss.detach())
    assert weight.grad is not None
    return total, weight.grad


@pytest.mark.parametrize("call", ["actor_train", "critic_train"])
@pytest.mark.parametrize("parts", [[[0], [1], [2], [3]], [[3, 1], [0, 2]], [[2, 0, 1, 3], []]])
def test_no_split_changes_loss_or_gradient(call: str, parts: list[list[int]]) -> None:
    whole, whole_gradient = loss_and_gradient(call, [[0, 1, 2, 3]])
    loss, gradient = loss_and_gradient(call, parts)
    assert loss == pytest.approx(whole, abs=1e-6)
    assert (gradient - whole_gradient).abs().max() < 1e-5
    assert whole_gradient.abs().max() > 0


def test_normalised_over_two_ranks_is_normalised_over_one() -> None:
    values, mask = torch.randn(20), torch.rand(20) > 0.3
    halves = [(values[:7], mask[:7]), (values[7:], mask[7:])]

    def ranks(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Each rank's sums in lock step: a rank is run again for every exchange."""
        sums: list[Tensor] = []

        def exchange(own: int) -> Callable[[Tensor], Tensor]:
            place = iter(range(len(sums) + 1))

            def total(value: Tensor) -> Tensor:
                at = next(place)
                if at < len(sums):
                    return sums[at]
                raise _Need(value)

            return total

        for _ in range(2):
            needed = []
            for part, keep in parts:
                try:
                    normalized(part, keep, exchange(0))
                except _Need as need:
                    needed.append(need.value)
            sums.append(torch.stack(needed).sum(0))
        return torch.cat([normalized(part, keep, exchange(0)) for part, keep in parts])

    together = normalized(values, mask, alone)
    assert torch.allclose(ranks(halves), together, atol=1e-6)
    assert together[mask].mean().abs() < 1e-6
    assert together[mask].std(unbiased=False) == pytest.approx(1.0, abs=1e-3)
    assert (together[~mask] == 0).all()


class _Need(Exception):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


def test_a_truncated_answer_gets_no_score_where_that_is_asked() -> None:
    config = PPOExperiment()
    config.ppo.score_truncated = False
    config.ppo.kl_coef, config.ppo.normalize_advantages = 0.0, False
    batch = experience().with_values(
        per_token={"values": torch.zeros(experience().num_tokens)},
        per_sequence={"finished": torch.tensor([1.0, 0.0, 1.0, 0.0]), "rewards": torch.ones(4)},
    )
    returns = make_functions(config)["critic_train"].prepare(batch, alone).get("returns")
    last = torch.tensor(batch.offsets[1:]) - 1
    assert returns[last].tolist() == [1.0, 0.0, 1.0, 0.0]


def not_a_number(prompt: str, answer: str, record: dict[str, str]) -> float:
    return float("nan")


def test_a_reward_that_is_no_number_names_the_sample() -> None:
    config = PPOExperiment()
    config.reward.source = "tests.experiments.test_ppo_functions:not_a_number"
    function = make_functions(config)["rew_inf"]
    records = [{"id": "q7", "prompt": "p", "answer": "a"}]
    with pytest.raises(ConfigError, match="the reward of sample q7 is nan"):
        function.run(experience().select([0]), records)


def test_vader_tells_good_from_bad() -> None:
    reward = load_reward("vader")
    assert reward("", "I love this wonderful day!", {}) > 0.5
    assert reward("", "What a horrible, awful mess.", {}) < -0.5


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("nonsense", "not a reward"),
        ("no.such.module:f", "no module 'no'"),
        ("math:nothing", "no function 'nothing' in math"),
    ],
)
def test_unknown_rewards_are_refused(source: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_reward(source)
