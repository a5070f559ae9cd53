"""Protects what PPO's functions make of a batch: no split of it changes a loss or a gradient,
and refused rewards name their sample."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from executor.batch import SequenceBatch
from executor.context import single_process
from executor.generate.sampling import SamplingParams, sample
from experiments.advantages import normalized
from experiments.losses import response_mask
from experiments.ppo.config import PPOExperiment
from experiments.ppo.functions import make_functions
from experiments.rewards import load_reward, rewards_of
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


def head_of(width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Callable[..., Tensor]]:
    rng = torch.Generator().manual_seed(5)
    weight = torch.randn(width, SPEC.hidden, generator=rng).to(dtype)
    return weight, lambda rows: rows @ weight.T if width > 1 else (rows @ weight.T)[:, 0]


def test_reference_log_probs_are_of_each_answer_token_given_those_before() -> None:
    config = PPOExperiment()
    config.generation.temperature = 0.7
    batch, (weight, head) = experience(), head_of(SPEC.vocab)
    hidden = torch.randn(batch.num_tokens, SPEC.hidden)
    found = make_functions(config)["ref_inf"].read(head, hidden, batch, CTX)["ref_log_probs"]
    prompts = batch.get("prompt_lengths").tolist()
    for i, (start, end) in enumerate(zip(batch.offsets, batch.offsets[1:])):
        assert (found[start : start + prompts[i]] == 0).all()
        for t in range(start + prompts[i], end):
            logits = (hidden[t - 1].double() @ weight.double().T) / 0.7
            expected = logits.log_softmax(-1)[batch.token_ids[t]]
            assert float(found[t]) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("greedy", [False, True])
def test_log_probs_are_the_samplers_also_in_bfloat16(greedy: bool) -> None:
    """One state before the only answer token: the trainer's ratio starts at 1."""
    config = PPOExperiment()
    config.generation.temperature, config.generation.greedy = 0.7, greedy
    _, head = head_of(SPEC.vocab, torch.bfloat16)
    hidden = 4 * torch.randn(64, SPEC.hidden).bfloat16()
    functions = make_functions(config)
    params: SamplingParams = functions["actor_gen"].sampling((0,))
    tokens, log_probs = sample(head(hidden), torch.rand(64).double(), params)
    batch = SequenceBatch(
        samples=tuple(range(64)), lengths=(2,) * 64,
        per_token={"sequences": torch.stack([torch.zeros_like(tokens), tokens], 1).flatten()},
        per_sequence={"prompt_lengths": torch.ones(64, dtype=torch.int64)},
    )  # fmt: skip
    states = torch.stack([hidden, torch.zeros_like(hidden)], 1).flatten(0, 1)
    found = functions["ref_inf"].read(head, states, batch, CTX)["ref_log_probs"]
    assert torch.allclose(found[1::2], log_probs, atol=1e-5)


def test_scores_are_of_last_tokens_and_values_of_all() -> None:
    batch, (weight, head) = experience(), head_of(1)
    hidden = torch.randn(batch.num_tokens, SPEC.hidden)
    every = hidden @ weight[0]
    functions = make_functions(PPOExperiment())
    values = functions["critic_inf"].read(head, hidden, batch, CTX)["values"]
    scores = functions["rew_inf"].read(head, hidden, batch, CTX)["rewards"]
    assert torch.allclose(values, every)
    assert torch.allclose(scores, every[[end - 1 for end in batch.offsets[1:]]])


def test_the_critics_statistics_give_the_explained_variance() -> None:
    function = make_functions(PPOExperiment())["critic_train"]
    batch, (_, head) = function.prepare(experience(), alone), head_of(1)
    hidden = torch.randn(batch.num_tokens, SPEC.hidden)
    _, found = function.loss(head, hidden, batch, function.count(batch), CTX)
    places = response_mask(batch).nonzero()[:, 0]
    returns, values = batch.get("returns")[places], batch.get("values")[places - 1]
    expected = 1 - (returns - values).var(unbiased=False) / returns.var(unbiased=False)
    unexplained = found["error_square"] - found["mean_error"] ** 2
    explained = 1 - unexplained / (found["return_square"] - found["mean_return"] ** 2)
    assert float(explained) == pytest.approx(float(expected), abs=1e-4)


def papers_losses(batch: SequenceBatch, new_log_probs: Tensor, new_values: Tensor) -> list[float]:
    """[policy, value] loss of the whole batch in float64, sequence by sequence, with the defaults:
    beta 0.1, gamma = lambda = 1, both clips 0.2, scores clipped to 20, normalised advantages."""
    log_p, ref, values, scores, finished, prompts = (
        batch.get(key).double().numpy()
        for key in ("log_probs", "ref_log_probs", "values", "rewards", "finished", "prompt_lengths")
    )
    places, returns = [], []
    for i, (start, end) in enumerate(zip(batch.offsets, batch.offsets[1:])):
        # Without discount, what follows is the sum of rewards and, if truncated, the last value.
        follows = np.clip(scores[i], -20, 20) + (0.0 if finished[i] else values[end - 1])
        own = range(end - 1, start + int(prompts[i]) - 1, -1)
        for t in own:
            follows -= 0.1 * (log_p[t] - ref[t])
            places.append(t)
            returns.append(follows)
    at, target = np.array(places), np.array(returns)
    old = values[at - 1]
    advantages = target - old
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-5)
    ratio = np.exp(new_log_probs.double().numpy()[at] - log_p[at])
    policy = -np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages).mean()
    new = new_values.double().numpy()[at - 1]
    near = np.clip(new, old - 0.2, old + 0.2)
    value = 0.5 * np.maximum((new - target) ** 2, (near - target) ** 2).mean()
    return [float(policy), float(value)]


@pytest.mark.parametrize("seed", range(4))
def test_both_losses_are_the_papers_from_scores_to_the_mean(seed: int) -> None:
    batch = experience(seed)
    hidden = torch.randn(batch.num_tokens, SPEC.hidden, generator=torch.Generator().manual_seed(9))
    (_, lm_head), (_, value_head) = head_of(SPEC.vocab), head_of(1)
    functions = make_functions(PPOExperiment())
    new = functions["ref_inf"].read(lm_head, hidden, batch, CTX)["ref_log_probs"]
    # Old log-probabilities near the new ones, so that some ratios are clipped and some are not.
    near = 0.2 * torch.randn(new.shape, generator=torch.Generator().manual_seed(seed))
    batch = batch.with_values(per_token={"log_probs": new + near})
    losses, clipped = [], []
    for call, head in (("actor_train", lm_head), ("critic_train", value_head)):
        prepared = functions[call].prepare(batch, alone)
        loss, found = functions[call].loss(
            head, hidden, prepared, functions[call].count(batch), CTX
        )
        losses.append(float(loss))
        clipped.append(float(found["clip_fraction"]))
    assert losses == pytest.approx(papers_losses(batch, new, value_head(hidden)), abs=1e-5)
    assert all(0 < fraction < 1 for fraction in clipped)


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


def test_a_truncated_answer_is_scored_by_default_and_goes_on_from_its_last_value() -> None:
    config = PPOExperiment()
    config.ppo.kl_coef, config.ppo.normalize_advantages = 0.0, False
    values = torch.full((experience().num_tokens,), 0.25)
    batch = experience().with_values(
        per_token={"values": values},
        per_sequence={"finished": torch.tensor([1.0, 0.0, 1.0, 0.0]), "rewards": torch.ones(4)},
    )
    returns = make_functions(config)["critic_train"].prepare(batch, alone).get("returns")
    last = torch.tensor(batch.offsets[1:]) - 1
    assert returns[last].tolist() == [1.0, 1.25, 1.0, 1.25]


def test_scores_are_shifted_scaled_and_then_clipped() -> None:
    config = PPOExperiment()
    config.ppo.kl_coef, config.ppo.normalize_advantages = 0.0, False
    config.ppo.reward_bias, config.ppo.reward_scale, config.ppo.reward_clip = 1.0, 2.0, 5.0
    batch = experience().with_values(
        per_token={"values": torch.zeros(experience().num_tokens)},
        per_sequence={"finished": torch.ones(4), "rewards": torch.tensor([0.0, 2.0, 9.0, -9.0])},
    )
    returns = make_functions(config)["critic_train"].prepare(batch, alone).get("returns")
    last = torch.tensor(batch.offsets[1:]) - 1
    assert returns[last].tolist() == [-2.0, 2.0, 5.0, -5.0]


def lengths_of_answers(
    prompts: list[str], answers: list[str], records: list[dict[str, str]]
) -> list[int]:
    return [len(answer) for answer in answers if answer]


lengths_of_answers.takes_lists = True  # type: ignore[attr-defined]


def test_a_function_of_lists_is_called_once_for_all_answers() -> None:
    records = [{"id": i, "prompt": "p", "answer": "a" * i} for i in (3, 1)]
    assert rewards_of(lengths_of_answers, records) == [3.0, 1.0]
    with pytest.raises(ConfigError, match="1 rewards of 2 answers"):
        rewards_of(lengths_of_answers, [records[0], {**records[1], "answer": ""}])


def test_a_reward_that_is_a_word_is_refused() -> None:
    with pytest.raises(ConfigError, match="the reward of sample 4 is 'good'"):
        rewards_of(lambda *_: "good", [{"id": 4, "prompt": "p", "answer": "a"}])


@pytest.mark.parametrize(
    ("name", "answer", "ids", "expected"),
    [
        ("share_of_even_tokens", "", [2, 4, 5, 0], 0.75),
        ("share_of_distinct_words", "a b A c", [], 0.75),
        ("share_of_distinct_words", "", [], 0.0),
    ],
)
def test_toy_rewards(name: str, answer: str, ids: list[int], expected: float) -> None:
    assert load_reward(f"experiments.rewards:{name}")("", answer, {"answer_ids": ids}) == expected


def test_without_its_package_vader_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ConfigError, match="vaderSentiment is not installed"):
        load_reward("vader")


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
        (":f", "not a reward"),
        (".near:f", "not a reward"),
        ("no.such.module:f", "no module 'no'"),
        ("math:nothing", "no function 'nothing' in math"),
    ],
)
def test_unknown_rewards_are_refused(source: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_reward(source)
