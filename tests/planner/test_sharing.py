"""Protects what the planner takes sequences of one prompt to share: tokens by hand, pairs of tokens
by counting them, memory for whatever a batch may bring, and prices that follow."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.dpo.graph import ALGORITHM as DPO
from experiments.grpo.graph import ALGORITHM as GRPO
from planner.activations import kept_bytes
from planner.algorithm import Algorithm, make_config, make_problem
from planner.cost import CostModel, call_cost
from planner.memory import running_memory
from planner.plan import Problem, Workload
from planner.sharing import (
    LEAST_SHARED,
    attended_tokens,
    expected_group,
    group_tokens,
    largest_groups,
    spares_enough,
)
from planner.strategy import ParallelStrategy
from profiles.catalogue import MODELS, resolve_model
from profiles.clusters import make_cluster
from profiles.collectives import Collectives
from profiles.hardware import ClusterSpec, DeviceKind
from profiles.roofline import RooflineCosts
from tests.planner.test_cost import RoundCosts, allocate, free_links

PROMPT, RESPONSE, GROUPS = 256, 128, 8


def problem(
    cluster: ClusterSpec, num_samples: int, *, algorithm: Algorithm = GRPO, model: str = "tiny",
    prompt: int = PROMPT, response: int = RESPONSE,
) -> Problem:  # fmt: skip
    words = [f"batch_size={GROUPS}", f"prompt_len={prompt}", f"response_len={response}"]
    if algorithm is GRPO:
        words.append(f"samples_per_prompt={max(2, num_samples)}")
    spec, config = resolve_model(model), make_config(algorithm.config_class, words)
    found = make_problem(algorithm, config, model=spec, critic=spec, cluster=cluster)
    return replace(found, workload=replace(found.workload, group_size=num_samples))


@pytest.mark.parametrize("m", [1, 2, 8])
@pytest.mark.parametrize("algorithm, num_samples", [(GRPO, 4), (GRPO, 8), (DPO, 2)])
def test_a_group_computes_its_prompt_once(algorithm: Algorithm, num_samples: int, m: int) -> None:
    """Blocks that take a second a token, four of them, and nothing else."""
    cluster = free_links(make_cluster("a100", 8))
    model = CostModel(cluster, RoundCosts(), Collectives(cluster))
    own = problem(cluster, num_samples, algorithm=algorithm)
    cost = call_cost(own, "ref_inf", allocate(m=m), model)
    assert cost.seconds == pytest.approx(4 * GROUPS * (PROMPT + num_samples * RESPONSE))


def test_training_goes_over_the_same_tokens() -> None:
    cluster = free_links(make_cluster("a100", 8))
    model = CostModel(cluster, RoundCosts(head_row_s=1.0), Collectives(cluster))
    cost = call_cost(problem(cluster, 4), "actor_train", allocate(m=2), model)
    blocks = 4 * 3 * GROUPS * (PROMPT + 4 * RESPONSE)
    head = 2 * GROUPS * 4 * RESPONSE  # of every answer's tokens, forward and backward
    assert cost.seconds == pytest.approx(blocks + head)


@pytest.mark.parametrize("device", ["a100", "laptop"])
@pytest.mark.parametrize("call", ["ref_inf", "actor_train"])
def test_one_sequence_a_group_costs_as_without_sharing(
    device: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, of seconds and bytes: there is nothing to share."""
    cluster = make_cluster(device, 1)
    alone = problem(cluster, 1)

    def price() -> tuple[object, ...]:
        model = CostModel(cluster, RooflineCosts(cluster.device), Collectives(cluster))
        need = running_memory(alone, alone.graph.call(call), allocate(m=2), MODELS["llama-7b"], 0)
        return call_cost(alone, call, allocate(m=2), model).seconds, need

    before = price()
    monkeypatch.setattr("planner.sharing.LEAST_SHARED", 10**9)
    assert price() == before
    assert attended_tokens(alone.workload, "cuda") == alone.workload.attended_tokens


@pytest.mark.parametrize("device", ["a100", "laptop"])
@pytest.mark.parametrize("call", ["ref_inf", "actor_train"])
def test_more_samples_are_never_cheaper_and_cost_less_than_prompts_of_their_own(
    device: str, call: str
) -> None:
    cluster = make_cluster(device, 1)
    model = CostModel(cluster, RooflineCosts(cluster.device), Collectives(cluster))
    costs, needs = [], []
    for count in (1, 2, 3, 4, 8, 16):
        own = problem(cluster, count)
        costs.append(call_cost(own, call, allocate(m=2), model).seconds)
        needs.append(running_memory(own, own.graph.call(call), allocate(m=2), resolve_model("tiny"),
                                    0).total)  # fmt: skip
    assert costs == sorted(costs)
    assert needs == sorted(needs)
    assert costs[-1] < 0.8 * 16 * costs[0]


@given(
    prompt=st.integers(1, 40),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    group_size=st.integers(1, 6),
    kind=st.sampled_from(["cuda", "cpu"]),
)
def test_attended_tokens_are_twice_the_pairs_of_tokens(
    prompt: int, lengths: list[int], group_size: int, kind: DeviceKind
) -> None:
    """Counted query by query, in the limit of fine tokens: each of ten thousand parts."""
    workload = Workload(
        batch_size=1, prompt_tokens=prompt, response_tokens=max(lengths),
        response_lengths=tuple(sorted(lengths)), group_size=group_size,
    )  # fmt: skip
    group = expected_group(workload)
    if not group.shares:
        assert attended_tokens(workload, kind) == workload.attended_tokens
        return
    pairs, tokens, fine = 0.0, 0.0, 1 / 8
    for length in lengths:
        first = round((prompt + length) / fine)
        own = round(length / fine)
        seen = sum(i * fine + fine / 2 for i in range(first))
        for i in range(own):
            place = prompt + (length if kind == "cpu" else i * fine + fine / 2)
            seen += (group_size - 1) * place
        pairs += seen * fine
        tokens += prompt + group_size * length
    assert attended_tokens(workload, kind) == pytest.approx(2 * pairs / tokens)


@given(
    longest=st.tuples(st.integers(1, 80), st.integers(1, 120)),
    n=st.integers(2, 9),
    data=st.data(),
)
def test_no_batch_computes_more_than_the_largest_group(
    longest: tuple[int, int], n: int, data: st.DataObject
) -> None:
    """Whatever its lengths are, and whether or not it shares: a plan that fits, fits for all."""
    workload = Workload(
        batch_size=1, prompt_tokens=longest[0], response_tokens=longest[1], group_size=n
    )
    most = max(group.computed for group in largest_groups(workload))
    groups = data.draw(
        st.lists(
            st.tuples(
                st.integers(1, longest[0]),
                st.lists(st.integers(1, longest[1]), min_size=n, max_size=n),
            ),
            min_size=1, max_size=4,
        )
    )  # fmt: skip
    whole = sum(n * prompt + sum(answers) for prompt, answers in groups)
    spared = sum((n - 1) * prompt for prompt, _ in groups if prompt >= LEAST_SHARED)
    computed = whole - spared if spares_enough(spared, whole) else whole
    assert computed <= len(groups) * most


def test_groups_by_hand() -> None:
    assert group_tokens(32, 32, 4) == (32 + 4 * 32, 4 * 64)
    assert group_tokens(15, 8, 4) == (4 * 23, 4 * 23)  # too few to be looked for
    assert not group_tokens(100, 1000, 1).shares
    assert not group_tokens(20, 1000, 8).shares
    whole = Workload(batch_size=1, prompt_tokens=900, response_tokens=700, group_size=2)
    shared, apart = largest_groups(whole)
    assert shared == (900 + 2 * 700, 2 * 1600)
    assert apart.computed == 2 * (ceil(700 / 3) - 1 + 700)  # 233 of 933 tokens: 12.49% spared


def test_memory_of_a_group_by_hand() -> None:
    """LLaMA-7B in bf16 on one device: all heads have keys of their own, of hidden in all."""
    cluster, spec = make_cluster("a100", 1), MODELS["llama-7b"]
    own = problem(cluster, 4, model="llama-7b")
    need = running_memory(own, own.graph.call("actor_train"), allocate(m=2), spec, 0)
    groups, hidden = GROUPS // 2, spec.hidden
    computed, whole = groups * (PROMPT + 4 * RESPONSE), groups * 4 * (PROMPT + RESPONSE)
    block = computed * kept_bytes(spec, ParallelStrategy(), value_bytes=2, length=384)
    copies = 2 * 2 * hidden * (whole - computed)
    working = 2 * (computed * 3 * hidden + max(
        computed * 7 * hidden + whole * 2 * hidden, computed * 3 * spec.ffn
    ))  # fmt: skip
    assert need.activations == pytest.approx(32 * (block + copies) + working, rel=1e-3)
    answers = groups * 4 * RESPONSE
    assert need.logits == 2 * (2 * answers * spec.vocab + whole * hidden)
