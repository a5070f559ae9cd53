"""Protects the options that PPO, GRPO and REINFORCE share: each against its formula in float64, and
a run with all of them on against the same run under other plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from executor.batch import SequenceBatch
from experiments.experience import MIN_STD, Experience, KLController, RunningMoments
from experiments.options import PolicyConfig
from experiments.policy import TrainPolicy
from experiments.ppo.config import PPOConfig
from experiments.ppo.functions import experience_of
from planner.algorithm import make_config
from profiles.errors import ConfigError
from tests.executor.test_plan_independence import compare
from tests.experiments.test_losses import batch_of
from tests.experiments.test_ppo_functions import CTX, SPEC, alone
from tests.runs import ALGORITHMS, OVERRIDES, Runs, make_plan, run_plans

SHAPES = [(2, 3), (1, 5), (3, 2), (2, 4)]
RESPONSE_LEN = 7


def given_advantages(batch: SequenceBatch, kl_coef: float, total: Any) -> SequenceBatch:
    return batch


def experience() -> tuple[SequenceBatch, Tensor, Tensor]:
    """(a batch with advantages of both signs, hidden [tokens, hidden], weight [vocab, hidden])."""
    rng = torch.Generator().manual_seed(3)
    batch = batch_of(SHAPES, 3)
    hidden = torch.randn(batch.num_tokens, SPEC.hidden, generator=rng) / 2
    weight = torch.randn(SPEC.vocab, SPEC.hidden, generator=rng)
    ids = torch.randint(0, SPEC.vocab, (batch.num_tokens,), generator=rng)
    states = (hidden @ weight.T).log_softmax(-1).roll(1, 0)
    log_probs = states.gather(1, ids[:, None])[:, 0]
    noise = torch.randn(3, batch.num_tokens, generator=rng)
    batch = batch.with_values(
        per_token={"sequences": ids, "advantages": 2 * noise[0],
                   "log_probs": log_probs + noise[1], "ref_log_probs": log_probs + noise[2]},
        per_sequence={"kept": torch.tensor([1.0, 1, 0, 1])},
    )  # fmt: skip
    return batch, hidden, weight


def formula(options: PolicyConfig, *, temperature: float) -> float:
    """The loss, answer by answer in float64."""
    batch, hidden, weight = experience()
    logits = (hidden.double() @ weight.double().T).numpy() / temperature
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids, prompts = batch.token_ids.numpy(), batch.get("prompt_lengths").tolist()
    a, old, ref = (
        batch.get(k).double().numpy() for k in ("advantages", "log_probs", "ref_log_probs")
    )
    losses: list[np.ndarray] = []
    for i, (start, end) in enumerate(zip(batch.offsets, batch.offsets[1:])):
        if not batch.get("kept")[i]:
            continue
        at = np.arange(start + prompts[i], end)
        p = logs[at - 1, ids[at]]
        ratio = np.exp(p - old[at])
        high = 1 + (options.clip_high or options.clip)
        loss = -np.minimum(ratio * a[at], np.clip(ratio, 1 - options.clip, high) * a[at])
        if options.dual_clip:
            loss = np.where(a[at] < 0, np.minimum(loss, -a[at] * options.dual_clip), loss)
        x = p - ref[at]
        kl = {"k1": x, "k2": x**2 / 2, "k3": np.exp(-x) - 1 + x}[options.kl_estimator]
        if options.kl_in == "loss":
            loss = loss + options.kl_coef * kl
        entropy = -(np.exp(logs[at - 1]) * logs[at - 1]).sum(-1)
        losses.append(loss - options.entropy_coef * entropy)
    if options.aggregation == "sequence":
        return float(np.mean([loss.mean() for loss in losses]))
    tokens = np.concatenate(losses)
    whole = {"token": len(tokens), "constant": len(SHAPES) * RESPONSE_LEN}
    return float(tokens.sum() / whole[options.aggregation])


OPTIONS = {
    "plain": PolicyConfig(kl_coef=0.0),
    "sequence": PolicyConfig(kl_coef=0.0, aggregation="sequence"),
    "constant": PolicyConfig(kl_coef=0.0, aggregation="constant"),
    "asymmetric": PolicyConfig(kl_coef=0.0, clip=0.1, clip_high=0.5),
    "dual": PolicyConfig(kl_coef=0.0, dual_clip=1.5),
    "k1 in the loss": PolicyConfig(kl_in="loss"),
    "k2 in the loss": PolicyConfig(kl_in="loss", kl_estimator="k2", aggregation="sequence"),
    "k3 in the loss": PolicyConfig(kl_in="loss", kl_estimator="k3"),
    "in the rewards": PolicyConfig(kl_estimator="k3"),
    "entropy": PolicyConfig(kl_coef=0.0, entropy_coef=0.3),
    "all": PolicyConfig(
        kl_in="loss", kl_estimator="k3", entropy_coef=0.3, dual_clip=1.5, clip_high=0.4,
        aggregation="constant",
    ),
}  # fmt: skip


def outcome(
    options: PolicyConfig, parts: list[list[int]], temperature: float = 0.8
) -> tuple[float, Tensor, dict[str, float]]:
    """Loss, its gradient and the statistics, summed over ``parts`` as micro-batches sum them."""
    batch, hidden, weight = experience()
    weight.requires_grad_()
    function = TrainPolicy(
        Experience(given_advantages, options), options=options, temperature=temperature,
        response_len=RESPONSE_LEN,
    )  # fmt: skip
    batch = function.prepare(batch, alone)
    denominator = sum(function.count(batch.select(part)) for part in parts)
    assert isinstance(denominator, Tensor)
    total, statistics = 0.0, dict[str, float]()
    for part in parts:
        own = [hidden[batch.offsets[i] : batch.offsets[i + 1]] for i in part]
        loss, found = function.loss(
            lambda rows: rows @ weight.T, torch.cat(own), batch.select(part), denominator, CTX
        )
        loss.backward()
        total += float(loss.detach())
        for name, value in found.items():
            statistics[name] = statistics.get(name, 0.0) + float(value)
    assert weight.grad is not None
    return total, weight.grad, statistics


@pytest.mark.parametrize("name", OPTIONS)
def test_the_loss_is_its_formula_and_no_split_changes_it(name: str) -> None:
    options = OPTIONS[name]
    loss, gradient, statistics = outcome(options, [[0, 1, 2, 3]])
    assert loss == pytest.approx(formula(options, temperature=0.8), abs=1e-5)
    parts = [[2], [3, 0], [1]]
    other_loss, other_gradient, other_statistics = outcome(options, parts)
    assert other_loss == pytest.approx(loss, abs=1e-6)
    assert other_statistics == pytest.approx(statistics, abs=1e-6)
    assert (other_gradient - gradient).abs().max() < 1e-5


@pytest.mark.parametrize("pair", [("plain", "dual"), ("plain", "asymmetric"), ("plain", "entropy"),
                                  ("k1 in the loss", "k3 in the loss")])  # fmt: skip
def test_every_option_has_an_effect_on_this_batch(pair: tuple[str, str]) -> None:
    """Guards the comparison above against options that the data never reach."""
    first, second = (outcome(OPTIONS[name], [[0, 1, 2, 3]])[0] for name in pair)
    assert abs(first - second) > 1e-3


def test_entropy_and_ratio_are_means_over_tokens_whatever_the_aggregation() -> None:
    found = [
        outcome(PolicyConfig(kl_coef=0.0, entropy_coef=0.1, aggregation=name), [[0, 1, 2, 3]])[2]
        for name in ("token", "sequence", "constant")
    ]
    for name in ("entropy", "mean_ratio", "approx_kl", "clip_fraction"):
        assert found[0][name] == pytest.approx(found[1][name], abs=1e-9)
        assert found[0][name] == pytest.approx(found[2][name], abs=1e-9)


def test_a_mini_batch_beyond_a_limit_stops() -> None:
    def stops(ratio: float, kl: float, **limits: float) -> bool:
        options = PolicyConfig(**limits)  # type: ignore[arg-type]
        function = TrainPolicy(
            Experience(given_advantages, options), options=options, temperature=1.0, response_len=1
        )
        assert function.may_stop == bool(limits)
        return function.stops({"mean_ratio": ratio, "approx_kl": kl})

    assert not stops(99.0, 99.0)
    assert stops(5.1, 0.0, max_ratio=5.0)
    assert not stops(4.9, 9.0, max_ratio=5.0)
    assert stops(1.0, 0.3, max_kl=0.2)


# ---- what is kept over steps ------------------------------------------------------------------


@given(st.lists(st.lists(st.floats(-1e3, 1e3), max_size=6), min_size=1, max_size=6))
def test_running_moments_are_those_of_all_values_at_once(steps: list[list[float]]) -> None:
    moments = RunningMoments()
    for values in steps:
        moments.update(torch.tensor(values, dtype=torch.float64), alone)
        moments.restore(json.loads(json.dumps(moments.state())))
    every = np.array([value for values in steps for value in values])
    if len(every) == 0:
        assert (moments.mean, moments.std) == (0.0, 1.0)
        return
    assert moments.mean == pytest.approx(every.mean(), abs=1e-9)
    assert moments.std == pytest.approx(max(MIN_STD, every.std()), abs=1e-6)
    x = torch.linspace(-3, 3, 5, dtype=torch.float64)
    assert torch.allclose(moments.denormalize(moments.normalize(x)), x)


def apart_by(divergence: float) -> SequenceBatch:
    """Four answers, each of ``divergence`` from the reference."""
    batch = batch_of(SHAPES, 0)
    log_probs = torch.zeros(batch.num_tokens)
    for end in batch.offsets[1:]:
        log_probs[end - 1] = divergence
    return batch.with_values(
        per_token={"log_probs": log_probs, "ref_log_probs": torch.zeros(batch.num_tokens)}
    )


@pytest.mark.parametrize(
    ("divergence", "factor"),
    [(6.0, 1 + 0.2 * 4 / 10), (0.5, 1 - 0.2 * 4 / 10), (2.2, 1 + 0.1 * 4 / 10), (2.0, 1.0)],
)
def test_the_coefficient_rises_above_the_target_and_falls_below(
    divergence: float, factor: float
) -> None:
    controller = KLController(PolicyConfig(kl_coef=0.5, kl_target=2.0, kl_horizon=10))
    controller.observe(apart_by(divergence), alone)
    assert controller.coef == pytest.approx(0.5 * factor, rel=1e-6)


def test_a_step_is_paid_with_the_coefficient_it_began_with() -> None:
    options = PolicyConfig(kl_coef=0.5, kl_target=2.0, kl_horizon=10)
    paid: list[float] = []

    def estimate(batch: SequenceBatch, kl_coef: float, total: Any) -> SequenceBatch:
        paid.append(kl_coef)
        return batch

    own = Experience(estimate, options)
    for _ in range(2):
        own.prepare(apart_by(6.0), alone)
    assert paid == pytest.approx([0.5, 0.54])
    again = Experience(estimate, options)
    again.restore(json.loads(json.dumps(own.state())))
    again.prepare(apart_by(6.0), alone)
    assert paid[-1] == pytest.approx(0.54 * 1.08)


def test_a_critic_of_normalised_values_gives_the_advantages_of_the_values_it_means() -> None:
    """Second step: its words are in units of the first step's returns."""
    options = PPOConfig(kl_coef=0.0, normalize_values=True)
    plain = experience_of(PPOConfig(kl_coef=0.0))
    own = experience_of(options)
    batch = batch_of(SHAPES, 1)
    batch = batch.with_values(per_sequence={"rewards": 5 + 3 * batch.get("scores")})
    first = own.prepare(batch, alone)
    mean, std = own.moments["returns"].mean, own.moments["returns"].std
    targets = first.get("targets")[first.get("returns") != 0].double()
    assert float(targets.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(targets.std(unbiased=False)) == pytest.approx(1.0, abs=1e-6)
    means = batch.with_values(per_token={"values": batch.get("values") * std + mean})
    assert torch.allclose(
        own.prepare(batch, alone).get("advantages"), plain.prepare(means, alone).get("advantages"),
        atol=1e-6,
    )  # fmt: skip


def test_rewards_are_normalised_over_all_steps() -> None:
    own = experience_of(PPOConfig(kl_coef=0.0, normalize_rewards=True, normalize_advantages=False))
    seen: list[float] = []
    for seed in range(3):
        batch = batch_of(SHAPES, seed)
        batch = batch.with_values(
            per_sequence={"rewards": 4 + 9 * batch.get("scores"), "finished": torch.ones(4)},
            per_token={"values": torch.zeros(batch.num_tokens)},
        )
        seen += batch.get("rewards").tolist()
        returns = own.prepare(batch, alone).get("returns")
        last = torch.tensor(batch.offsets[1:]) - 1
        wanted = (batch.get("rewards") - np.mean(seen)) / np.std(seen)
        assert torch.allclose(returns[last], wanted.to(returns), atol=1e-5)


# ---- in a run ---------------------------------------------------------------------------------

EVERYTHING = [
    *OVERRIDES, "ppo.num_epochs=2", "ppo.aggregation=sequence", "ppo.dual_clip=3",
    "ppo.clip_high=0.3", "ppo.entropy_coef=0.01", "ppo.kl_in=loss", "ppo.kl_estimator=k3",
    "ppo.kl_target=0.1", "ppo.kl_horizon=20", "ppo.ref_average=0.3", "ppo.normalize_rewards=true",
    "ppo.normalize_values=true", "ppo.score_truncated=false",
    "reward.source=model+experiments.rewards:share_of_even_tokens", "batch_size=5",
]  # fmt: skip
STOPPED = [*OVERRIDES, "ppo.num_epochs=2", "ppo.max_kl=1e-9", "actor.lr=1e-2"]
PLANS = {
    # The test reads what the first rank of a function tells: it has all sequences.
    "dp 2": (2, "0:d2p1m1:1", {"rew_fn": "0:d1p1m1:1"}),
    "moving, pp 2": (2, "0:d1p2m1:2", {"actor_gen": "0:d2p1m1:1", "critic_train": "0:d2p1m1:1",
                                       "rew_fn": "1:d1p1m1:1"}),
}  # fmt: skip


@pytest.mark.parametrize("overrides", [EVERYTHING, STOPPED], ids=["everything", "stopped"])
def test_options_give_the_same_under_every_plan(overrides: list[str], tmp_path: Path) -> None:
    runs: Runs = {"whole": (make_plan(1, "0:d1p1m1:1", overrides=overrides), None)}
    for name, (num_devices, default, calls) in PLANS.items():
        known = {k: v for k, v in calls.items() if k != "rew_fn" or overrides is EVERYTHING}
        runs[name] = make_plan(num_devices, default, overrides=overrides, **known), None
    found = run_plans(runs, tmp_path)
    whole = found["whole"][0]
    if overrides is STOPPED:
        # The first mini-batch is the sampling policy's own; the second is beyond the limit.
        assert whole.metrics["0/actor_train"]["stopped"] == 0.75
        assert "stopped" not in whole.metrics["0/critic_train"]
    else:
        coefs = [whole.metrics[f"{step}/actor_train"]["kl_coef"] for step in range(2)]
        assert coefs[0] == pytest.approx(0.1)
        assert coefs[1] != coefs[0]
    for name in PLANS:
        compare(name, found[name], whole)


@pytest.mark.parametrize("layout", [(1, "0:d1p1m1:1"), (2, "0:d2p1m1:1")], ids=["own", "moved"])
def test_a_reference_that_takes_over_the_whole_actor_is_the_actor(
    layout: tuple[int, str], tmp_path: Path
) -> None:
    """Before an optimizer step the actor is what the last step left: so is the reference, here in
    the actor's layout and in one that it is brought to."""
    words = [*OVERRIDES, "ppo.num_mini_batches=1", "actor.lr=1e-2", "total_steps=3"]
    ref = "0:d1p1m1:1" if layout[0] == 1 else "1:d1p1m1:2"
    runs: Runs = {
        f"{rate}": (
            make_plan(*layout, overrides=[*words, f"ppo.ref_average={rate}"], ref_inf=ref),
            None,
        )
        for rate in (0, 1)
    }
    found = run_plans(runs, tmp_path)
    apart = {
        rate: [own[0].metrics[f"{step}/actor_train"]["ref_kl"] for step in (1, 2)]
        for rate, own in found.items()
    }
    assert apart["1"] == pytest.approx([0.0, 0.0], abs=1e-5)
    assert min(map(abs, apart["0"])) > 1e-3


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("ppo.dual_clip=0.5", r"ppo\.dual_clip: 0\.5 is not above 1; 3 is usual"),
        ("ppo.kl_in=advantage", r"ppo\.kl_in: 'advantage' is unknown; use one of reward, loss"),
        ("ppo.num_epochs=0", r"ppo\.num_epochs: 0 is not at least 1"),
        ("ppo.ref_average=2", r"ppo\.ref_average: 2\.0 is not in \[0, 1\]"),
        ("ppo.max_ratio=-1", r"ppo\.max_ratio: -1\.0 is not at least 0"),
    ],
)
def test_a_value_out_of_range_is_named(override: str, sentence: str) -> None:
    config = make_config(ALGORITHMS["ppo"].config_class, [override])
    with pytest.raises(ConfigError, match=sentence):
        ALGORITHMS["ppo"].graph(config)


def test_a_target_without_a_reference_is_refused() -> None:
    config = make_config(ALGORITHMS["ppo"].config_class, ["ppo.kl_coef=0", "ppo.kl_target=1"])
    with pytest.raises(ConfigError, match=r"ppo\.kl_target: there is no reference"):
        ALGORITHMS["ppo"].graph(config)
