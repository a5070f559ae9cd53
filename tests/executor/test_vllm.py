"""Protects vLLM as a back end: our own engine is the oracle of greedy answers, before and after the
weights change, and a training forward pass that of log-probabilities. What cannot run is refused
before anything is loaded. All that needs vLLM is skipped where it is not installed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from executor.batch import SequenceBatch
from executor.context import build_contexts
from executor.generate import engine
from executor.generate.sampling import SamplingParams
from executor.generate.vllm import VLLM, one_tp
from executor.model.attention import pack
from executor.model.hf_save import checkpoint_tensors
from executor.model.transformer import DecoderStage
from executor.run import configure, resolve
from executor.summary import answers_are_plan_independent
from planner.layout import Layout
from planner.mesh import DeviceMesh
from profiles.errors import ConfigError, PlanError
from profiles.models import ModelSpec
from tests.executor.small_models import (
    FAMILY_SPECS,
    random_buffer,
    single_layout,
    single_stage,
    small_spec,
)
from tests.runs import Outcome, make_plan, run_rank
from tests.spawn import spawn

needs_vllm = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vLLM is not installed: pip install 'realplan[vllm]'"
)

# What vLLM's attention on CPUs can do: heads of 32 at least.
WIDE = {"hidden": 128, "head_dim": 32, "ffn": 64}
SPECS = {
    "llama": small_spec(**WIDE),
    **{
        name: replace(FAMILY_SPECS[name], **WIDE)
        for name in (
            "qwen2 tied",
            "qwen3",
            "mistral window",
            "llama biases",
            "gemma",
            "gpt2",
            "phi3",
        )
    },
}
STOPS = (3, 17, 40, 41, 42, 43, 50, 51)  # likely enough that answers end at different lengths
PROMPT_LENGTHS = (5, 9, 1, 5, 36, 2, 7)  # one fills a block of vLLM's cache
RUN = [
    "batch_size=8", "samples_per_prompt=4", "prompt_len=2", "response_len=6", "init=random",
    "reward.source=experiments.rewards:share_of_even_tokens", "actor.lr=1e-2",
]  # fmt: skip
LEARNER = ModelSpec(
    name="learner", num_layers=2, hidden=64, num_heads=2, num_kv_heads=2, head_dim=32, ffn=64,
    vocab=16, max_positions=64,
)  # fmt: skip


def grpo(
    num_devices: int, default: str, *more: str, spec: ModelSpec = LEARNER, **calls: str
) -> Any:
    overrides = [*RUN, "generation_backend=vllm", *more]
    return make_plan(
        num_devices, default, algorithm="grpo", overrides=overrides, spec=spec, **calls
    )  # fmt: skip


# ---- without vLLM -----------------------------------------------------------------------------


def test_a_missing_package_is_told_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    text = r"generation_backend: vllm is not installed; .*pip install 'realplan\[vllm\]'"
    with pytest.raises(ConfigError, match=text):
        resolve(grpo(1, "0:d1p1m1:1"), [])
    with pytest.raises(ConfigError, match=text):
        VLLM(tp=1, longest_tokens=8, device=torch.device("cpu"))


def test_an_unknown_back_end_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"generation_backend: 'sglang' is unknown; .*own, vllm"):
        make_plan(1, "0:d1p1m1:1", overrides=["generation_backend=sglang"])


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        (
            lambda: grpo(2, "0:d1p2m1:2", rew_inf="0:d1p1m1:1"),
            "allocations.actor_gen: .*not with pp 2",
        ),
        (lambda: grpo(3, "0:d1p1m1:1", actor_gen="0:d1p1m2:1"), "3 devices into groups of tp 2"),
        (
            lambda: grpo(1, "0:d1p1m1:1", spec=replace(FAMILY_SPECS["mixtral"], vocab=16)),
            "goes on with the experts that it began with",
        ),
    ],
    ids=["pipeline", "left over", "experts"],
)
def test_what_vllm_cannot_have_is_refused_before_anything_starts(plan: Any, problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        resolve(plan(), [])


def test_the_record_says_whether_other_plans_give_these_answers() -> None:
    def independent(*overrides: str) -> bool:
        return answers_are_plan_independent(configure(grpo(1, "0:d1p1m1:1", *overrides), []))

    assert not independent()
    assert independent("generation.greedy=true")
    assert independent("generation_backend=own")


def test_calls_of_two_sizes_are_refused() -> None:
    plan = make_plan(
        2, "0:d2p1m1:1", algorithm="remax", spec=LEARNER,
        overrides=[*RUN[:1], *RUN[2:], "generation_backend=vllm"], actor_gen="0:d1p1m2:1",
    )  # fmt: skip
    with pytest.raises(PlanError, match="one tp in a process"):
        one_tp(plan)
    assert one_tp(grpo(2, "0:d2p1m1:1", actor_gen="0:d1p1m2:1")) == 2


def _tensors_of(rank: int, world_size: int, name: str) -> dict[str, Tensor]:
    layout = Layout(spec=SPECS[name], mesh=DeviceMesh(0, world_size), tp=world_size)
    ctx = build_contexts([layout], rank=rank, device=torch.device("cpu"))[layout]
    found = checkpoint_tensors(ctx, random_buffer(layout, rank), layout.spec)
    return {key: value.clone() for key, value in found}


def test_every_shard_hands_over_the_whole_model() -> None:
    """As one process does; that one's answers are compared with ours below."""
    buffer, spec = random_buffer(single_layout(SPECS["phi3"])), SPECS["phi3"]
    whole = dict(checkpoint_tensors(single_stage(spec).ctx, buffer, spec))
    for tensors in spawn(2, _tensors_of, "phi3"):
        torch.testing.assert_close(tensors, whole, rtol=0, atol=0)


# ---- answers ----------------------------------------------------------------------------------

Pair = tuple[SequenceBatch, SequenceBatch]  # of our engine and of vLLM


def _prompts(spec: ModelSpec, lengths: Sequence[int] = PROMPT_LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, spec.vocab, (length,), generator=generator) for length in lengths]


def _forward(stage: DecoderStage, batch: SequenceBatch, temperature: float) -> Tensor:
    """[tokens]: log-probabilities as training finds them, teacher-forced; 0 in prompts."""
    with torch.no_grad():
        hidden = stage.forward(batch.token_ids, pack(batch.lengths, torch.device("cpu")))
        logits = stage.head(hidden) / temperature
    found = torch.zeros(batch.num_tokens)
    found[1:] = logits[:-1].log_softmax(-1).gather(1, batch.token_ids[1:, None])[:, 0]
    starts = torch.tensor([0, *batch.lengths[:-1]]).cumsum(0)
    for start, length in zip(starts.tolist(), batch.get("prompt_lengths").tolist()):
        found[start : start + length] = 0
    return found


def _alone(rank: int, world_size: int) -> dict[str, Any]:
    """Everything that one process answers: the engine takes long to start."""
    os.environ.pop("OMP_NUM_THREADS", None)
    torch.set_num_threads(2)  # vLLM would leave one of them
    vllm = VLLM(tp=1, longest_tokens=60, device=torch.device("cpu"))
    found: dict[str, Any] = {}

    def ask(generate: Any, stage: DecoderStage, step: int = 2, **changes: Any) -> SequenceBatch:
        settings = {"max_new_tokens": 24, "stop_token_ids": STOPS, "min_new_tokens": 2, **changes}
        prompts = _prompts(stage.spec)
        prompts[3] = prompts[4]
        batch: SequenceBatch = generate(
            stage, prompts, samples=(0, 3, 4, 8, 11, 12, 30), params=SamplingParams(**settings),
            seed=1, step=step, max_rows=5,
        )  # fmt: skip
        return batch

    def both(stage: DecoderStage) -> Pair:
        return ask(engine.generate, stage, greedy=True), ask(vllm.generate, stage, greedy=True)

    for name, spec in SPECS.items():
        stage = single_stage(spec)
        found[f"{name} first"] = both(stage)
        # As an optimizer's step: other values in the same buffer.
        stage.buffer.flat.add_(
            0.1 * torch.randn(stage.buffer.flat.shape, generator=torch.Generator().manual_seed(1))
        )
        found[f"{name} then"] = both(stage)
    stage = single_stage(SPECS["llama"])
    sampled = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_new_tokens": 6}
    found["sampled"] = ask(vllm.generate, stage, **sampled)
    found["again"] = ask(vllm.generate, stage, **sampled)
    found["next step"] = ask(vllm.generate, stage, step=3, **sampled)
    found["forward"] = _forward(stage, found["sampled"], 0.7)
    found["cold greedy"] = ask(vllm.generate, stage, greedy=True, temperature=0.7)
    found["cold forward"] = _forward(stage, found["cold greedy"], 0.7)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert torch.get_num_threads() == 1
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    (found,) = spawn(1, _alone, timeout_s=280.0)
    return dict(found)


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("when", ["first", "then"])
@pytest.mark.parametrize("name", SPECS)
def test_greedy_answers_are_those_of_our_engine(
    name: str, when: str, alone: dict[str, Any]
) -> None:
    ours, theirs = alone[f"{name} {when}"]
    assert theirs.lengths == ours.lengths
    assert theirs.samples == ours.samples
    for key in ("sequences", "prompt_lengths", "finished"):
        assert torch.equal(theirs.get(key), ours.get(key)), key
    torch.testing.assert_close(
        theirs.get("log_probs"), ours.get("log_probs"), rtol=0, atol=LOG_PROB_TOLERANCE
    )


# Of log-probabilities in fp32; measured: 1.3e-4 at most over these models, whose weights are large.
LOG_PROB_TOLERANCE = 5e-4


@needs_vllm
@pytest.mark.slow
def test_new_weights_make_other_answers(alone: dict[str, Any]) -> None:
    for name in SPECS:
        (_, first), (_, then) = alone[f"{name} first"], alone[f"{name} then"]
        assert first.token_ids.tolist() != then.token_ids.tolist(), name


@needs_vllm
@pytest.mark.slow
def test_log_probabilities_are_those_of_a_training_forward(alone: dict[str, Any]) -> None:
    """At a temperature, with tokens left out: of the whole softmax, as the trainer finds them."""
    for batch, forward in (("sampled", "forward"), ("cold greedy", "cold forward")):
        torch.testing.assert_close(
            alone[batch].get("log_probs"), alone[forward], rtol=0, atol=LOG_PROB_TOLERANCE
        )


@needs_vllm
@pytest.mark.slow
def test_noise_is_of_seed_step_and_sample(alone: dict[str, Any]) -> None:
    sampled, again, other = (_answers(alone[k]) for k in ("sampled", "again", "next step"))
    assert sampled == again
    assert sampled != other
    assert sampled[8] != sampled[11]  # two samples of one prompt


@needs_vllm
@pytest.mark.slow
def test_answers_end_at_a_stop_token_and_not_too_early(alone: dict[str, Any]) -> None:
    batch = alone["sampled"]
    for (sample, answer), finished in zip(_answers(batch).items(), batch.get("finished").tolist()):
        assert not set(answer[:6]) & set(STOPS), sample
        assert not set(answer[:-1]) & set(STOPS), sample
        assert finished == (answer[-1] in STOPS), sample
        assert len(answer) == 24 or finished, sample
    assert batch.get("finished").any()


def _answers(batch: SequenceBatch) -> dict[int, list[int]]:
    rows = batch.token_ids.split(list(batch.lengths))
    starts = batch.get("prompt_lengths").tolist()
    return {s: row[n:].tolist() for s, row, n in zip(batch.samples, rows, starts, strict=True)}


# ---- runs -------------------------------------------------------------------------------------

STEPS = 12
PLANS: dict[str, Any] = {
    # Trained on one worker, so that weights move to the other in every step.
    "dp2": ("0:d2p1m1:2", {"actor_train": "0:d1p1m1:1", "rew_inf": "1:d1p1m1:1"}),
    "tp2": ("0:d1p1m2:1", {"rew_inf": "1:d1p1m1:1"}),
    "one of two": ("0:d2p1m1:1", {"actor_gen": "1:d1p1m1:1", "rew_inf": "1:d1p1m1:1"}),
}


def _run(name: str, folder: Path, *more: str) -> list[Outcome]:
    default, calls = PLANS[name]
    plan = grpo(2, default, f"total_steps={STEPS}", *more, **calls)
    return spawn(2, run_rank, plan, str(folder), timeout_s=280.0)


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_grpo_learns_from_vllms_answers(name: str, tmp_path: Path) -> None:
    outcome = _run(name, tmp_path)[0]
    rewards = [outcome.metrics[f"{step}/rew_inf"]["rewards"] for step in range(STEPS)]
    assert rewards[0] == pytest.approx(0.5, abs=0.15)
    assert sum(rewards[-3:]) / 3 > 0.75, rewards
    for step in range(STEPS):
        # The trainer's probabilities are those that vLLM told: its weights are of this step.
        assert outcome.metrics[f"{step}/actor_train"]["mean_ratio"] == pytest.approx(1, abs=1e-4)
