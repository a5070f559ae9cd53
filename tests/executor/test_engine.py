"""Protects generation: transformers' ``generate`` is the oracle of greedy answers, a teacher-forced
forward pass that of log-probabilities, and one process that of every layout, grouping and order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from executor.batch import SequenceBatch
from executor.context import build_contexts
from executor.generate import engine
from executor.generate.engine import generate
from executor.generate.sampling import SamplingParams
from executor.model.attention import pack
from executor.model.transformer import DecoderStage
from planner.layout import Layout
from planner.mesh import DeviceMesh
from planner.sharing import LEAST_SHARED
from profiles.errors import ConfigError
from profiles.models import ModelSpec
from tests.executor.small_models import (
    FAMILY_SPECS,
    hf_twin,
    random_buffer,
    single_stage,
    small_spec,
)
from tests.spawn import spawn

PROMPT_LENGTHS = (5, 9, 1, 5, 14, 2, 7)
STOPS = (3, 17, 40, 41, 42, 43, 50, 51)  # likely enough that answers end at different lengths
SAMPLES = (0, 3, 4, 8, 11, 12, 30)


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": 24, "stop_token_ids": STOPS, **changes})


def random_prompts(spec: ModelSpec, lengths: Sequence[int] = PROMPT_LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, spec.vocab, (length,), generator=generator) for length in lengths]


def run(stage: DecoderStage, setting: SamplingParams, **changes: Any) -> SequenceBatch:
    options: dict[str, Any] = {"samples": SAMPLES, "seed": 1, "step": 2, **changes}
    prompts = options.pop("prompts", random_prompts(stage.spec))
    return generate(stage, prompts, params=setting, **options)


def sequences_of(batch: SequenceBatch) -> dict[int, list[int]]:
    """Tokens by sample."""
    parts = batch.token_ids.split(list(batch.lengths))
    return {sample: part.tolist() for sample, part in zip(batch.samples, parts)}


# ---- against transformers -------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        small_spec(),
        small_spec(tied_embedding=True, num_kv_heads=1),
        small_spec(family="qwen2", qkv_bias=True),
    ],
    ids=["grouped", "tied", "qwen2"],
)
@pytest.mark.parametrize("min_new_tokens", [0, 6])
def test_greedy_answers_are_transformers(spec, min_new_tokens):
    stage = single_stage(spec)
    model = hf_twin(stage)
    batch = run(stage, params(greedy=True, min_new_tokens=min_new_tokens), max_rows=3)
    answers = []
    for prompt, got in zip(random_prompts(spec), sequences_of(batch).values()):
        expected = model.generate(
            prompt[None], do_sample=False, max_new_tokens=24, eos_token_id=list(STOPS),
            min_new_tokens=min_new_tokens or None, pad_token_id=0,
        )  # fmt: skip
        assert got == expected[0].tolist()
        answers.append(got[len(prompt) :])
    assert any(answer[-1] in STOPS for answer in answers)
    assert len({len(answer) for answer in answers}) > 2  # else nothing left early


# ---- what a batch says ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    [
        params(),
        params(temperature=0.7, top_k=9, top_p=0.8),
        params(greedy=True, temperature=1.5),
        params(min_new_tokens=7),
    ],
    ids=["plain", "truncated", "greedy", "min new tokens"],
)
def test_log_probs_are_those_of_a_teacher_forced_forward_pass(setting):
    stage = single_stage(small_spec())
    batch = run(stage, setting, max_rows=4)
    logits = stage.head(stage.forward(batch.token_ids, pack(batch.lengths)))
    expected = (logits / setting.temperature).log_softmax(-1)
    start = 0
    for row, length in enumerate(batch.lengths):
        prompt = PROMPT_LENGTHS[row]
        got = batch.get("log_probs")[start : start + length]
        ids = batch.token_ids[start : start + length]
        before = expected[start : start + length - 1].gather(1, ids[1:, None])[:, 0]
        torch.testing.assert_close(got[prompt:], before[prompt - 1 :], atol=1e-4, rtol=0)
        assert not got[:prompt].any()
        start += length
    assert batch.get("log_probs").dtype == torch.float32


def test_batch_says_where_prompts_end_and_which_answers_ended():
    stage = single_stage(small_spec())
    batch = run(stage, params(min_new_tokens=2))
    assert batch.samples == SAMPLES
    assert batch.get("prompt_lengths").tolist() == list(PROMPT_LENGTHS)
    finished = batch.get("finished").tolist()
    assert 0 < sum(finished) < len(finished)  # both kinds are here
    for prompt, tokens, ended in zip(
        random_prompts(stage.spec), sequences_of(batch).values(), finished
    ):
        answer = tokens[len(prompt) :]
        assert tokens[: len(prompt)] == prompt.tolist()
        assert not set(answer[:2]) & set(STOPS)
        assert not set(answer[:-1]) & set(STOPS)
        assert (answer[-1] in STOPS) == bool(ended)
        assert ended or len(answer) == 24


def test_answers_end_at_the_models_last_position():
    stage = single_stage(small_spec(max_positions=16))
    batch = run(stage, params(stop_token_ids=()))
    assert batch.lengths == (16,) * 7
    assert not batch.get("finished").any()


def test_no_prompts_give_an_empty_batch_with_all_values():
    batch = run(single_stage(small_spec()), params(), prompts=[], samples=())
    assert batch.num_sequences == batch.num_tokens == 0
    assert batch.token_ids.dtype == batch.get("prompt_lengths").dtype == torch.int64
    assert batch.get("log_probs").dtype == batch.get("finished").dtype == torch.float32


def test_values_can_enter_a_loss():
    batch = run(single_stage(small_spec()), params())
    weight = torch.ones((), requires_grad=True)
    (weight * batch.get("log_probs")).sum().backward()  # an inference tensor would refuse
    assert weight.grad is not None


# ---- independence -----------------------------------------------------------------------------


def test_neither_order_nor_company_nor_entry_changes_an_answer():
    stage = single_stage(small_spec())
    setting = params(top_p=0.95)
    expected = sequences_of(run(stage, setting))
    prompts = random_prompts(stage.spec)
    assert len({len(tokens) for tokens in expected.values()}) > 3
    for options in (
        {"max_rows": 1}, {"max_rows": 3}, {"num_groups": 3}, {"num_groups": 50},
        {"num_groups": 2, "max_rows": 5}, {"max_prompt_tokens": 1}, {"max_prompt_tokens": 12},
    ):  # fmt: skip
        assert sequences_of(run(stage, setting, **options)) == expected, options
    order = [4, 1, 6, 0]
    some = run(
        stage, setting, prompts=[prompts[i] for i in order], samples=[SAMPLES[i] for i in order]
    )
    assert sequences_of(some) == {SAMPLES[i]: expected[SAMPLES[i]] for i in order}


@pytest.mark.parametrize("change", [{"seed": 2}, {"step": 3}, {"samples": range(50, 57)}])
def test_every_key_of_the_noise_changes_answers(change):
    stage = single_stage(small_spec())
    setting = params(stop_token_ids=(), max_new_tokens=8)
    one, other = (sequences_of(run(stage, setting, **c)).values() for c in ({}, change))
    assert all(a != b for a, b in zip(one, other))


def batches(
    rank: int, world_size: int, layout: Layout, cases: list[tuple[SamplingParams, dict[str, Any]]]
) -> list[SequenceBatch]:
    """Every case on one rank; data-parallel replicas take every other prompt."""
    context = build_contexts([layout], rank=rank, device=torch.device("cpu"))[layout]
    stage = DecoderStage(context, random_buffer(layout, rank))
    mine = range(context.dp_rank, len(SAMPLES), layout.dp)
    results = []
    for setting, options in cases:
        chosen = [] if options.get("idle") == context.dp_rank else list(mine)
        prompts = random_prompts(layout.spec)
        batch = run(
            stage, setting, prompts=[prompts[i] for i in chosen],
            samples=[SAMPLES[i] for i in chosen],
            **{key: value for key, value in options.items() if key != "idle"},
        )  # fmt: skip
        results.append(batch)
    return results


LAYOUTS = {
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "pp3": {"pp": 3},
    "pp2 tp2": {"pp": 2, "tp": 2},
    "pp2 dp2": {"pp": 2, "dp": 2},
}
GROUPINGS: list[dict[str, Any]] = [
    {"num_groups": 1},
    {"num_groups": 2},
    {"num_groups": 3},
    {"num_groups": 2, "max_rows": 3},
    {"num_groups": 3, "max_rows": 2, "max_prompt_tokens": 4},
    {"num_groups": 20},
    {"num_groups": 2, "idle": 1},
]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_answers_of_one_process(name):
    spec = small_spec(tied_embedding="pp" in name)
    settings = [params(), params(greedy=True), params(top_k=12, min_new_tokens=3)]
    cases = [(settings[place % 3], options) for place, options in enumerate(GROUPINGS)]
    size = 1
    for count in LAYOUTS[name].values():
        size *= count
    layout = Layout(spec=spec, mesh=DeviceMesh(0, size), **LAYOUTS[name])
    by_rank = spawn(size, batches, layout, cases)
    reference = single_stage(spec)
    for case, (setting, options) in enumerate(cases):
        whole = run(reference, setting)
        for rank, results in enumerate(by_rank):
            _, dp_rank, _ = layout.coordinates(rank)
            mine = list(range(dp_rank, len(SAMPLES), layout.dp))
            if options.get("idle") == dp_rank:
                mine = []
            expected, got = whole.select(mine), results[case]
            assert sequences_of(got) == sequences_of(expected), (rank, options)
            assert got.lengths == expected.lengths
            assert torch.equal(got.get("finished"), expected.get("finished"))
            torch.testing.assert_close(
                got.get("log_probs"), expected.get("log_probs"), atol=1e-4, rtol=0
            )


# ---- no work for nothing ----------------------------------------------------------------------


def test_every_token_is_computed_once_and_rows_are_full_while_prompts_wait(monkeypatch):
    stage = single_stage(small_spec())
    turns: list[tuple[int, ...]] = []
    forward = stage.forward

    def counting(inputs, packed, cache):
        turns.append(packed.lengths)
        return forward(inputs, packed, cache)

    monkeypatch.setattr(stage, "forward", counting)
    batch = run(stage, params(), max_rows=3)
    # All but each answer's last token, which nobody reads.
    assert sum(map(sum, turns)) == batch.num_tokens - batch.num_sequences
    answers = [n - p for n, p in zip(batch.lengths, PROMPT_LENGTHS)]
    assert sum(map(len, turns)) == sum(answers)
    entered = 0
    for turn in turns:
        entered += sum(length > 1 for length in turn)
        assert len(turn) == 3 or (len(turn) < 3 and entered >= 6)  # one prompt has a single token
    # First come, first served: the rows' times are those of a greedy list schedule.
    ends = [0, 0, 0]
    for length in answers:
        ends[ends.index(min(ends))] += length
    assert len(turns) == max(ends)


@pytest.mark.parametrize(
    ("options", "most_prompts"),
    [({}, 4), ({"max_rows": 5}, None), ({"num_groups": 2}, 4), ({"max_prompt_tokens": 15}, 4)],
)
def test_answers_to_one_prompt_share_its_pass(monkeypatch, options, most_prompts):
    """Each as if it were alone; where all enter at once a prompt's tokens are computed once."""
    stage = single_stage(small_spec())
    prompts = [prompt for prompt in random_prompts(stage.spec)[:4] for _ in range(3)]
    samples = range(20, 32)
    expected: dict[int, list[int]] = {}
    log_probs = []
    for sample, prompt in zip(samples, prompts, strict=True):
        alone = run(stage, params(), prompts=[prompt.clone()], samples=[sample])
        expected |= sequences_of(alone)
        log_probs.append(alone.get("log_probs"))
    brought: list[int] = []
    forward = stage.forward

    def counting(inputs, packed, cache):
        brought.extend(cache.prompts.own.lengths if cache.prompts else ())
        return forward(inputs, packed, cache)

    monkeypatch.setattr(stage, "forward", counting)
    together = run(stage, params(), prompts=prompts, samples=samples, **options)
    assert sequences_of(together) == expected
    torch.testing.assert_close(together.get("log_probs"), torch.cat(log_probs), atol=1e-5, rtol=0)
    assert 4 <= len(brought) < len(prompts)
    assert most_prompts is None or len(brought) == most_prompts


SYSTEM = tuple(range(30, 30 + LEAST_SHARED + 3))  # what prompts have in common


def sharing_prompts(spec: ModelSpec) -> list[Tensor]:
    """SYSTEM and a tail: one is the beginning of another, one is there twice, one has another."""
    tails = [(), (1, 2), (1, 2, 5), (9,), (1, 2), (1, 2, 7, 7)]
    prompts = [torch.tensor([*SYSTEM, *tail]) for tail in tails]
    return [*prompts[:4], torch.tensor([8, 8]), *prompts[4:]]


@pytest.mark.parametrize(
    "options",
    [{}, {"max_rows": 3}, {"max_rows": 1}, {"num_groups": 2}, {"max_prompt_tokens": 22}],
)  # fmt: skip
@pytest.mark.parametrize(
    "spec", [small_spec(), small_spec(sliding_window=7), FAMILY_SPECS["gpt2"]],
    ids=["grouped", "window", "learned positions"],
)  # fmt: skip
def test_prompts_that_begin_alike_share_what_they_have_in_common(monkeypatch, options, spec):
    """Each answer as if it were alone; where all enter at once no token is computed twice."""
    stage = single_stage(spec)
    prompts = sharing_prompts(stage.spec)
    setting = params(min_new_tokens=5)
    samples = range(20, 20 + len(prompts))
    alone = [
        run(stage, setting, prompts=[prompt], samples=[sample])
        for sample, prompt in zip(samples, prompts)
    ]
    brought = 0
    forward = stage.forward

    def counting(inputs, packed, cache):
        nonlocal brought
        brought += sum(cache.prompts.own.lengths) if cache.prompts else 0
        return forward(inputs, packed, cache)

    monkeypatch.setattr(stage, "forward", counting)
    together = run(stage, setting, prompts=prompts, samples=samples, **options)
    expected = {sample: tokens for one in alone for sample, tokens in sequences_of(one).items()}
    assert sequences_of(together) == expected
    log_probs = torch.cat([one.get("log_probs") for one in alone])
    torch.testing.assert_close(together.get("log_probs"), log_probs, atol=1e-5, rtol=0)
    different = {tuple(p[:n].tolist()) for p in prompts for n in range(1, len(p) + 1)}
    assert brought < sum(map(len, prompts)) or options == {"max_rows": 1}
    assert brought == len(different) or options


def test_stages_share_what_prompts_have_in_common():
    """Stages and shards keep the same books of it."""
    layout = Layout(spec=small_spec(), mesh=DeviceMesh(0, 4), pp=2, tp=2)
    expected = sequences_of(
        run(single_stage(layout.spec), params(), prompts=sharing_prompts(layout.spec))
    )
    assert spawn(4, answers_that_share, layout) == [expected] * 4


def answers_that_share(rank: int, world_size: int, layout: Layout) -> dict[int, list[int]]:
    context = build_contexts([layout], rank=rank, device=torch.device("cpu"))[layout]
    stage = DecoderStage(context, random_buffer(layout, rank))
    options = {"num_groups": 2, "max_rows": 5}
    return sequences_of(run(stage, params(), prompts=sharing_prompts(layout.spec), **options))


def test_stages_of_a_pipeline_work_at_once():
    """Four answers of 6 tokens on two stages: one group crosses both for every token; two groups
    take twice the turns and only the tick of the last one's second half more.
    """
    layout = Layout(spec=small_spec(), mesh=DeviceMesh(0, 2), pp=2)
    assert spawn(2, count_ticks, layout, [1, 2])[0] == [2 * 6, 2 * 6 + 1]


def count_ticks(rank: int, world_size: int, layout: Layout, groupings: list[int]) -> list[int]:
    """Ticks with each number of groups: calls of what ends a tick."""
    context = build_contexts([layout], rank=rank, device=torch.device("cpu"))[layout]
    stage = DecoderStage(context, random_buffer(layout, rank))
    counts, exchange = [0] * len(groupings), engine._Ticks._exchange
    for place, num_groups in enumerate(groupings):

        def counting(self, result, place=place):
            counts[place] += 1
            return exchange(self, result)

        engine._Ticks._exchange = counting  # this process ends with the test
        prompts = random_prompts(layout.spec, [3] * 4)
        setting = params(stop_token_ids=(), max_new_tokens=6)
        run(stage, setting, prompts=prompts, samples=range(4), num_groups=num_groups)
    return counts


# ---- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompts": [torch.zeros(0).long()], "samples": [9]}, "prompt of sample 9: no token"),
        (
            {"prompts": [torch.zeros(32).long()], "samples": [9]},
            "sample 9: 32 tokens leave no room for an answer; small has 32 positions",
        ),
        ({"prompts": [torch.tensor([64])], "samples": [9]}, "token 64 is outside the vocabulary"),
        ({"num_groups": 0}, "num_groups is 0"),
        ({"max_rows": 0}, "max_rows is 0"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        run(single_stage(small_spec(max_positions=32)), params(), **options)


def test_stop_tokens_of_another_tokenizer_are_refused():
    with pytest.raises(ConfigError, match="token 900 is outside the vocabulary of 64 of small"):
        run(single_stage(small_spec()), params(stop_token_ids=(900,)))


def test_damaged_weights_are_reported_with_the_sample():
    stage = single_stage(small_spec())
    stage.buffer.view("layers.1.down.weight")[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="sample 0 at position 5 are not finite"):
        run(stage, params())
