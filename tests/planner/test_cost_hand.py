"""Protects the sum of a call's parts: random allocations against one list of everything that a
stage computes, sends and sums, on a device that takes a second a token and block, and links of a
byte a second. What is counted twice, not at all or on another stage shows here.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from planner.cost import CostModel, call_cost
from planner.layout import Layout
from planner.mesh import DeviceMesh
from planner.plan import Allocation, allocation_problem
from planner.strategy import ParallelStrategy
from profiles.collectives import Collectives
from profiles.hardware import LinkSpec
from profiles.models import ModelSpec
from tests.planner.plans import SPEC, WHOLE_RATES, make_test_cluster, ppo
from tests.planner.test_cost import RoundCosts, free_links

PROMPT, ANSWER = 3, 2
HEAD_ROW_S, PARAMETER_S = 7.0, 0.25
VALUE_BYTES = 4  # on CPUs, which hide no sums behind backward


def shares(count: int, parts: int) -> list[int]:
    """As equal as can be, larger ones first, none of nothing."""
    return [n for i in range(parts) if (n := count // parts + (i < count % parts))]


def reduce_s(num_bytes: float, count: int) -> float:
    return 2 * (count - 1) / count * num_bytes


def gather_s(num_bytes: float, count: int) -> float:
    """Or to scatter what is reduced."""
    return (count - 1) / count * num_bytes


def stage_s(spec: ModelSpec, s: ParallelStrategy, stage: int, sequences: int, train: bool) -> float:
    """One micro-batch on a stage, forward and, of a trained model, again and backward."""
    layers = spec.num_layers // s.pp + (stage < spec.num_layers % s.pp)
    tokens, answers = sequences * (PROMPT + ANSWER), sequences * ANSWER
    first, last, lm = stage == 0, stage == s.pp - 1, spec.head == "lm"
    full = s.recompute == "full"
    hidden_bytes = tokens * spec.hidden * VALUE_BYTES
    one, half = reduce_s(hidden_bytes, s.tp), gather_s(hidden_bytes, s.tp)
    entered, left = (half, half) if s.sequence_parallel else (0.0, one)
    seconds = layers * (tokens + 2 * (entered + left))  # forward
    seconds += first * left  # parts of the vocabulary
    if last:
        seconds += HEAD_ROW_S * (answers if lm else tokens) + entered
        seconds += 3 * reduce_s(4 * answers, s.tp) if lm else 0.0
    if train:
        seconds += layers * 2 * (tokens + entered + left)
        seconds += full * layers * (tokens + 2 * (entered + left))
        seconds += first * entered  # the gradients of all tokens, for own rows of the vocabulary
        if last:
            seconds += HEAD_ROW_S * (answers if lm else tokens) + (one if lm else 0.0)
    return seconds


def pipeline_s(spec: ModelSpec, s: ParallelStrategy, parts: list[int], train: bool) -> float:
    """The largest micro-batch passes all stages, the others the slowest once more."""

    def each(sequences: int) -> list[float]:
        hidden_bytes = sequences * (PROMPT + ANSWER) * spec.hidden * VALUE_BYTES
        rows = -(-sequences * (PROMPT + ANSWER) // s.tp) * spec.hidden * VALUE_BYTES
        hop_s = (2 if train else 1) * (rows if s.sequence_parallel else hidden_bytes)
        return [
            stage_s(spec, s, stage, sequences, train) + (hop_s if stage < s.pp - 1 else 0.0)
            for stage in range(s.pp)
        ]

    longest = each(parts[0])
    busiest = longest.index(max(longest))
    return sum(longest) + sum(each(sequences)[busiest] for sequences in parts[1:])


def update_s(spec: ModelSpec, s: ParallelStrategy) -> float:
    """Sums of gradients over replicas, of a tied embedding over its ends; the optimizer."""
    layout = Layout.of(spec, DeviceMesh(0, s.num_devices), s)
    values = [layout.num_values(layout.device(stage, 0, 0)) for stage in range(s.pp)]
    most = max(values)
    if s.zero:
        sums_s = gather_s((4 + VALUE_BYTES) * most, s.dp)
    else:
        sums_s = reduce_s(4 * most, s.dp)
    if spec.tied_embedding and s.pp > 1:
        sums_s += reduce_s(4 * spec.vocab * spec.hidden / s.tp, 2)
    return sums_s + PARAMETER_S * (-(-most // s.dp) if s.zero else most)


@st.composite
def strategies(draw: st.DrawFn, train: bool) -> ParallelStrategy:
    tp = draw(st.sampled_from([1, 2, 4]))
    return ParallelStrategy(
        pp=draw(st.sampled_from([1, 2, 4])), tp=tp, dp=draw(st.sampled_from([1, 2, 4])),
        sequence_parallel=tp > 1 and draw(st.booleans()),
        zero=draw(st.sampled_from([0, 1])) if train else 0,
        recompute=draw(st.sampled_from(["none", "full"])) if train else "none",
    )  # fmt: skip


@settings(deadline=None, max_examples=100)
@given(
    st.data(), st.sampled_from(["ref_inf", "critic_inf", "actor_train", "critic_train"]),
    st.integers(5, 9), st.booleans(), st.integers(1, 3), st.integers(1, 4), st.integers(0, 9),
)  # fmt: skip
def test_a_call_is_the_sum_of_what_its_stages_do(
    data: st.DataObject, call: str, layers: int, tied: bool, mini_batches: int, m: int, more: int
) -> None:
    """Batches that mini-batches, replicas and micro-batches divide, and others."""
    train = call.endswith("train")
    s = data.draw(strategies(train))
    cluster = free_links(make_test_cluster(1, 64))
    cluster = replace(cluster, intra_link=LinkSpec(bytes_per_s=1.0, latency_s=0.0))
    overrides = [
        f"batch_size={mini_batches * s.dp * m + more}", f"ppo.num_mini_batches={mini_batches}",
        f"prompt_len={PROMPT}", f"response_len={ANSWER}",
    ]  # fmt: skip
    problem = ppo(cluster, overrides, replace(SPEC, num_layers=layers + 1, tied_embedding=tied))
    allocation = Allocation(
        mesh=DeviceMesh(0, s.num_devices), strategy=s, num_micro_batches=m
    )  # fmt: skip
    assert allocation_problem(problem, call, allocation) is None
    costs = RoundCosts(head_row_s=HEAD_ROW_S, parameter_s=PARAMETER_S)
    model = CostModel(cluster, costs, Collectives(cluster, **WHOLE_RATES), stops_early=False)
    spec = problem.spec_of(call)
    assert spec is not None
    expected = 0.0
    for mini_batch in shares(problem.workload.batch_size, mini_batches if train else 1):
        parts = shares(-(-mini_batch // s.dp), m)
        expected += pipeline_s(spec, s, parts, train) + (update_s(spec, s) if train else 0.0)
    assert call_cost(problem, call, allocation, model).seconds == pytest.approx(expected)


@settings(deadline=None, max_examples=60)
@given(
    st.data(), st.integers(5, 9), st.integers(1, 4), st.integers(0, 9), st.integers(1, 3),
    st.integers(0, 5),
)  # fmt: skip
def test_a_generation_is_the_sum_of_what_its_stages_do(
    data: st.DataObject, layers: int, m: int, more: int, answer: int, batch: int
) -> None:
    """Every wave's prefill, then every token's turn of all groups, one by one."""
    s = data.draw(strategies(train=False))
    s = replace(s, sequence_parallel=False)
    cluster = free_links(make_test_cluster(1, 64))
    cluster = replace(cluster, intra_link=LinkSpec(bytes_per_s=1.0, latency_s=0.0))
    overrides = [f"batch_size={s.dp * m + more}", "ppo.num_mini_batches=1",
                 f"prompt_len={PROMPT}", f"response_len={answer}"]  # fmt: skip
    problem = ppo(cluster, overrides, replace(SPEC, num_layers=layers))
    allocation = Allocation(
        mesh=DeviceMesh(0, s.num_devices), strategy=s, num_micro_batches=m, generation_batch=batch
    )
    assume(allocation_problem(problem, "actor_gen", allocation) is None)
    costs = RoundCosts(head_row_s=HEAD_ROW_S)
    model = CostModel(cluster, costs, Collectives(cluster, **WHOLE_RATES))
    spec = problem.models["actor"]
    num_sequences = -(-problem.workload.batch_size // s.dp)
    most = batch or num_sequences
    alone = 2 if s.num_devices == 1 else 1  # one CPU worker decodes with the memory of all

    def each(tokens: int, rows: int, block_s: float) -> tuple[list[float], list[float]]:
        """Seconds of every stage, and of its hop."""
        hidden_bytes = tokens * spec.hidden * VALUE_BYTES
        one = reduce_s(hidden_bytes, s.tp)
        found = []
        for stage in range(s.pp):
            own = layers // s.pp + (stage < layers % s.pp)
            head_s = HEAD_ROW_S * rows + gather_s(rows * spec.vocab * VALUE_BYTES, s.tp)
            found.append(own * (block_s + 2 * one) + (stage == 0) * one
                         + (head_s if stage == s.pp - 1 else 0.0))  # fmt: skip
        back = [8 * rows] if s.pp > 1 else [0]
        return found, [float(hidden_bytes)] * (s.pp - 1) + [float(b) for b in back]

    expected = 0.0
    waves = [most] * (num_sequences // most) + (
        [num_sequences % most] if num_sequences % most else []
    )
    for rows in waves:
        prompts = []
        for count in shares(rows, min(m, rows)):
            seconds, hops = each(count * PROMPT, count, count * PROMPT)
            prompts.append([a + b for a, b in zip(seconds, [*hops[:-1], 0.0])])
        expected += sum(prompts[0]) + sum(p[prompts[0].index(max(prompts[0]))] for p in prompts[1:])
        group = max(shares(rows, min(m, rows)))
        for context in range(PROMPT + 1, PROMPT + answer):
            seconds, hops = each(group, group, group * context / alone)
            both = [a + b for a, b in zip(seconds, hops)]
            expected += max(sum(both), max(both) * -(-rows // group))
    assert call_cost(problem, "actor_gen", allocation, model).seconds == pytest.approx(expected)
