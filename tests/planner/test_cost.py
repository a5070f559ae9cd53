"""Protects the seconds of calls: hand counts on a device of round numbers, and laws that hold for
every allocation (more devices, bandwidth or FLOPs are never slower; parts sum to the whole).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.ppo.graph import ALGORITHM
from planner.algorithm import make_config, make_problem
from planner.cost import CallCost, CostModel, call_cost
from planner.cost.generate import generate_parts
from planner.cost.pipeline import PipelinePass, micro_batch_sizes, pipeline_parts
from planner.cost.stage import Priced, StageCost, StageShape, stage_shapes, stage_values
from planner.cost.train import _left, _StageSums, infer_parts, train_parts
from planner.layout import Layout
from planner.mesh import DeviceMesh
from planner.plan import Allocation, Problem, allocation_problem
from planner.strategy import ParallelStrategy, legal_strategies
from profiles.catalogue import MODELS, resolve_model
from profiles.clusters import make_cluster
from profiles.collectives import Collectives
from profiles.costs import Component, Cost, Operation, Provenance
from profiles.hardware import ClusterSpec, LinkSpec
from profiles.models import ModelSpec
from profiles.roofline import RooflineCosts
from tests.planner.plans import WHOLE_RATES

BATCH, PROMPT, RESPONSE = 64, 128, 128


class RoundCosts:
    """A block takes 1 s a token forward and 2 s backward, in decode 1 s a step for each token of

    context and sequence, all times ``block``; the head and the optimizer are as given. Nothing
    depends on tp.
    """

    def __init__(
        self,
        *,
        block: float = 1.0,
        head_s: float = 0.0,
        head_row_s: float = 0.0,
        optimizer_s: float = 0.0,
        parameter_s: float = 0.0,
    ) -> None:
        self.block = block
        self.head_s, self.head_row_s = head_s, head_row_s
        self.optimizer_s, self.parameter_s = optimizer_s, parameter_s

    def layer(
        self, spec: ModelSpec, component: Component, operation: Operation, *, tp: int, size: int,
        length: int,
    ) -> Cost:  # fmt: skip
        if component == "embedding":
            return Cost(0.0, Provenance.MEASURED)
        if component == "head":
            return Cost(self.head_s + self.head_row_s * size, Provenance.MEASURED)
        decode = float(length)
        rate = {
            "forward": 1.0, "backward": 2.0, "decode": decode, "decode_alone": decode / 2,
        }[operation]  # fmt: skip
        return Cost(self.block * rate * size, Provenance.MEASURED)

    def optimizer_step(self, num_parameters: int) -> Cost:
        seconds = self.optimizer_s + self.parameter_s * num_parameters
        return Cost(seconds, Provenance.MEASURED)


def free_links(cluster: ClusterSpec) -> ClusterSpec:
    """Links and memory so fast that only the layers count."""
    link = LinkSpec(bytes_per_s=1e30, latency_s=0.0)
    device = replace(cluster.device, memory_bytes_per_s=1e30, launch_s=0.0)
    return replace(cluster, device=device, intra_link=link, inter_link=link)


def ppo(cluster: ClusterSpec, model: str = "tiny", *overrides: str) -> Problem:
    config = make_config(
        ALGORITHM.config_class,
        [f"batch_size={BATCH}", f"prompt_len={PROMPT}", f"response_len={RESPONSE}", *overrides],
    )
    spec = resolve_model(model)
    return make_problem(ALGORITHM, config, model=spec, critic=spec, cluster=cluster)


def allocate(pp: int = 1, tp: int = 1, dp: int = 1, m: int = 1, **options: object) -> Allocation:
    strategy = ParallelStrategy(pp=pp, tp=tp, dp=dp, **options)  # type: ignore[arg-type]
    return Allocation(
        mesh=DeviceMesh(0, strategy.num_devices), strategy=strategy, num_micro_batches=m
    )


def round_cost(
    call: str, allocation: Allocation, costs: RoundCosts | None = None, model: str = "tiny"
) -> CallCost:
    cluster = free_links(make_cluster("a100", 8))
    pricing = CostModel(cluster, costs or RoundCosts(), Collectives(cluster))
    return call_cost(ppo(cluster, model), call, allocation, pricing)


# ---- hand counts ------------------------------------------------------------------------------

TOKENS = BATCH * (PROMPT + RESPONSE)  # of the batch; tiny has 4 blocks


def test_infer_on_one_device_is_its_blocks() -> None:
    cost = round_cost("ref_inf", allocate())
    assert cost.seconds == pytest.approx(4 * TOKENS)
    assert cost.provenance == {Provenance.MEASURED: pytest.approx(4 * TOKENS)}


@pytest.mark.parametrize("pp, m", [(2, 1), (2, 4), (4, 2), (4, 8)])
def test_equal_stages_take_m_plus_pp_minus_one_turns(pp: int, m: int) -> None:
    cost = round_cost("ref_inf", allocate(pp=pp, m=m))
    stage_s = 4 / pp * TOKENS / m
    assert cost.seconds == pytest.approx((m + pp - 1) * stage_s)
    assert cost.parts["compute"] == pytest.approx(m * stage_s)
    assert cost.parts["pipeline_bubble"] == pytest.approx((pp - 1) * stage_s)


def test_unequal_stages_take_all_once_and_the_slowest_again() -> None:
    # 4 blocks on 3 stages: 2, 1, 1.
    cost = round_cost("ref_inf", allocate(pp=3, m=4))
    per_block = TOKENS / 4
    assert cost.seconds == pytest.approx((2 + 1 + 1) * per_block + 3 * 2 * per_block)


def test_the_head_is_on_the_last_stage() -> None:
    head_s = 10.0 * TOKENS
    cost = round_cost("ref_inf", allocate(pp=2, m=2), RoundCosts(head_s=head_s))
    # A micro-batch: 2 blocks of TOKENS / 2, and on the last stage the head as well.
    first, last = TOKENS, TOKENS + head_s
    assert cost.seconds == pytest.approx(first + last + last)


def test_training_counts_mini_batches_backward_and_the_optimizer() -> None:
    cost = round_cost("actor_train", allocate(), RoundCosts(optimizer_s=5.0))
    assert cost.parts["compute"] == pytest.approx(4 * 3 * TOKENS)
    assert cost.parts["optimizer"] == pytest.approx(4 * 5.0)  # 4 mini-batches


def test_mini_batches_of_unequal_size_are_priced_as_they_are() -> None:
    """10 sequences in 4 mini-batches: 3, 3, 2, 2; two replicas have 2, 2, 1, 1 of them at most."""
    cluster = free_links(make_cluster("a100", 8))
    problem = ppo(cluster, "tiny", "batch_size=10")
    pricing = CostModel(cluster, RoundCosts(optimizer_s=5.0), Collectives(cluster))
    for dp, sequences in ((1, 10), (2, 6)):
        parts = call_cost(problem, "actor_train", allocate(dp=dp), pricing).parts
        assert parts["compute"] == pytest.approx(4 * 3 * sequences * (PROMPT + RESPONSE))
        assert parts["optimizer"] == pytest.approx(4 * 5.0)


@pytest.mark.parametrize("stops_early", [False, True])
def test_recomputing_costs_one_more_forward_pass(stops_early: bool) -> None:
    """Up to the last product where it stops early: of products only, 1 of 4 + 3 * 2 equal ones."""
    # 4 q, k, v, o of hidden x hidden; gate, up and down of hidden x 2 hidden.
    spec = replace(
        MODELS["llama-7b"], num_heads=32, num_kv_heads=32, head_dim=128, ffn=2 * 4096, num_layers=4
    )
    cluster = free_links(make_cluster("a100", 8))
    only_products = replace(cluster.device, peak_flops=1.0)  # attention on one token is nothing
    model = CostModel(
        cluster, RoundCosts(), Collectives(cluster), kernels=RooflineCosts(only_products),
        stops_early=stops_early,
    )  # fmt: skip
    problem = ppo(cluster)
    problem = replace(
        problem, models=dict.fromkeys(problem.models, spec),
        workload=replace(problem.workload, prompt_tokens=1, response_tokens=1),
    )  # fmt: skip
    plain = call_cost(problem, "critic_train", allocate(pp=2, m=2), model).seconds
    again = call_cost(problem, "critic_train", allocate(pp=2, m=2, recompute="full"), model).seconds
    rest = 1 - 2 / 10 if stops_early else 1
    assert again / plain == pytest.approx((3 + rest) / 3, rel=1e-3)


@pytest.mark.parametrize("model", ["llama-7b", "gpt2", "mixtral-8x7b"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_sequence_parallelism_moves_the_same_bytes_and_splits_norms(
    model: str, recompute: str
) -> None:
    """Oracle: every collective of executor.parallel.tensor.Region counted by hand."""
    tp, layers = 2, MODELS[model].num_layers
    cluster = make_cluster("a100", 8)
    pricing = CostModel(cluster, RooflineCosts(cluster.device), Collectives(cluster))
    problem = ppo(cluster, model, "ppo.num_mini_batches=1")
    plain, split = (
        call_cost(problem, "critic_train", allocate(tp=tp, recompute=recompute, **more), pricing)
        for more in ({}, {"sequence_parallel": True})
    )
    hidden_bytes = 2.0 * TOKENS * MODELS[model].hidden
    gather = pricing.collectives.all_gather(hidden_bytes, range(tp)).seconds
    reduce = pricing.collectives.all_reduce(hidden_bytes, range(tp)).seconds
    halves = 2 * layers
    # What recomputation leaves: the first half of every block, where it stops early.
    left = layers if recompute == "full" else 0
    # Out of every half, forward and backward; the embedding's parts, summed.
    assert plain.parts["tensor_parallel"] == pytest.approx((2 * halves + left + 1) * reduce)
    # A gather and a scatter each (of a ring equal); the embedding's scatter and its gather in
    # backward; the final norm's gather; inputs that selective drops are gathered again.
    again = {"none": 0, "full": 0, "selective": layers * (1 if "mixtral" in model else 2)}
    entered = halves if recompute == "full" else 0
    ones = 2 * 2 * halves + entered + left + 2 + 1 + again[recompute]
    assert split.parts["tensor_parallel"] == pytest.approx(ones * gather)
    # Two norms and two sums of 2 and 3 hidden values each, half of them saved, twice in backward;
    # and the norms that selective makes again.
    rate = pricing.stages.kernels.memory_bytes_per_s
    times = {"none": 3, "selective": 3, "full": 4}[recompute]
    saved = times * layers * 10 * hidden_bytes / rate / 2 + again[recompute] * hidden_bytes / rate
    assert plain.parts["compute"] - split.parts["compute"] == pytest.approx(saved, rel=1e-6)


def test_selective_recomputation_makes_norms_and_activations_again() -> None:
    cluster = make_cluster("a100", 8)
    pricing = CostModel(cluster, RooflineCosts(cluster.device), Collectives(cluster))
    problem = ppo(cluster, "llama-7b", "ppo.num_mini_batches=1")
    none, selective, full = (
        call_cost(problem, "actor_train", allocate(recompute=which), pricing).seconds
        for which in ("none", "selective", "full")
    )
    spec, rate = MODELS["llama-7b"], pricing.stages.kernels.memory_bytes_per_s
    # Two norms, silu, and its product with up: 2 hidden each, 2 ffn, 3 ffn values of 2 bytes.
    token_bytes = 2 * (2 * 2 * spec.hidden + 5 * spec.ffn)
    assert selective - none == pytest.approx(32 * TOKENS * token_bytes / rate)
    assert none < selective < full


def test_hops_carry_the_shards_tokens() -> None:
    """1 s a byte between nodes: split over tokens, a tensor shard sends half the hidden states."""
    cluster = make_cluster("a100", 16)
    slow = LinkSpec(bytes_per_s=1.0, latency_s=0.0)
    cluster = replace(free_links(cluster), inter_link=slow)
    pricing = CostModel(cluster, RoundCosts(), Collectives(cluster, **WHOLE_RATES))
    plain, split = (
        call_cost(ppo(cluster), "ref_inf", allocate(pp=2, tp=2, dp=4, **more), pricing)
        for more in ({}, {"sequence_parallel": True})
    )
    assert split.parts["pipeline_p2p"] == pytest.approx(plain.parts["pipeline_p2p"] / 2)


def test_generation_integrates_a_growing_context() -> None:
    cost = round_cost("actor_gen", allocate())
    assert cost.parts["prefill"] == pytest.approx(4 * BATCH * PROMPT)
    # The first token comes from prefill; step i reads PROMPT + i tokens.
    steps = sum(PROMPT + i for i in range(1, RESPONSE))
    assert cost.parts["decode"] == pytest.approx(4 * BATCH * steps)


@pytest.mark.parametrize(
    "device, dp, rests", [("cpu", 1, True), ("cpu", 2, False), ("a100", 1, False)]
)
def test_one_cpu_worker_decodes_with_the_memory_of_all(device: str, dp: int, rests: bool) -> None:
    cluster = free_links(make_cluster(device, 2))
    pricing = CostModel(cluster, RoundCosts(), Collectives(cluster))
    cost = call_cost(ppo(cluster), "actor_gen", allocate(dp=dp), pricing)
    steps = sum(PROMPT + i for i in range(1, RESPONSE)) / (2 if rests else 1)
    assert cost.parts["decode"] == pytest.approx(4 * BATCH // dp * steps)
    assert cost.parts["prefill"] == pytest.approx(4 * BATCH // dp * PROMPT)


def test_pipelined_decoding_keeps_every_stage_busy_with_groups() -> None:
    alone = round_cost("actor_gen", allocate()).parts["decode"]
    # One group of all sequences visits 2 stages in turn: nothing is gained.
    assert round_cost("actor_gen", allocate(pp=2, m=1)).parts["decode"] == pytest.approx(alone)
    # Two groups fill both stages, and so do four.
    for m in (2, 4):
        cost = round_cost("actor_gen", allocate(pp=2, m=m))
        assert cost.parts["decode"] == pytest.approx(alone / 2)


def test_a_remainder_of_sequences_is_priced() -> None:
    # 64 sequences on 3 replicas: the busiest has 22.
    one, three = round_cost("ref_inf", allocate()), round_cost("ref_inf", allocate(dp=3))
    assert three.seconds == pytest.approx(one.seconds * 22 / 64)


def test_micro_batches_of_unequal_size_are_priced_as_they_are() -> None:
    # 64 sequences in 5 micro-batches: 13, 13, 13, 13, 12. One stage: the sum is the same.
    assert round_cost("ref_inf", allocate(m=5)).seconds == pytest.approx(4 * TOKENS)


def test_a_function_call_costs_its_sequences() -> None:
    cluster = make_cluster("a100", 8)
    problem = ppo(cluster, "tiny", "reward.source=vader")
    model = CostModel(cluster, RoundCosts(), Collectives(cluster), function_s=0.5)
    assert call_cost(problem, "rew_inf", allocate(dp=4), model).seconds == pytest.approx(8.0)


def test_data_parallel_gradients_are_fp32_and_zero_gathers_weights() -> None:
    base = free_links(make_cluster("a100", 8))
    cluster = replace(base, intra_link=LinkSpec(bytes_per_s=1.0, latency_s=0.0))
    model = CostModel(cluster, RoundCosts(), Collectives(cluster, **WHOLE_RATES))
    problem = ppo(cluster)
    values = problem.models["actor"].num_parameters
    plain = call_cost(problem, "actor_train", allocate(dp=2), model)
    # 4 mini-batches; 2 (n - 1) / n of 4 bytes a value.
    assert plain.parts["data_parallel"] == pytest.approx(4 * 4 * values)
    sharded = call_cost(problem, "actor_train", allocate(dp=2, zero=1), model)
    # Half of it, and (n - 1) / n of bf16 weights.
    assert sharded.parts["data_parallel"] == pytest.approx(4 * (2 * values + 1 * values))


@given(
    st.integers(1, 40), st.floats(0.0, 100.0), st.floats(0.001, 100.0), st.floats(0.0, 10.0)
)  # fmt: skip
def test_what_backward_does_not_hide_is_what_a_queue_of_buckets_leaves(
    count: int, backward_s: float, sums_s: float, rest_s: float
) -> None:
    """Oracle: buckets one after the other, each begun when it is whole and the one before is."""
    sums = _StageSums(
        StageShape(count, True, True),
        Priced(sums_s + rest_s),
        Priced(sums_s),
        Priced(rest_s),
        count,
    )
    ends_s = 0.0
    for k in range(1, count + 1):
        ends_s = max(ends_s, backward_s * k / count) + sums_s / count
    found = _left(sums, backward_s).seconds
    assert found == pytest.approx(ends_s - backward_s + rest_s, rel=1e-9, abs=1e-9)
    assert sums_s / count + rest_s <= found * (1 + 1e-9) <= (sums_s + rest_s) * (1 + 2e-9)


def test_on_gpus_backward_hides_sums_of_all_buckets_but_the_last() -> None:
    """Gradients of 0.8 GB a block; more time hides no more."""
    spec = replace(MODELS["llama-7b"], num_layers=8)
    for device, hides in (("a100", True), ("cpu", False)):
        cluster = make_cluster(device, 2)
        problem = replace(ppo(cluster), models={**ppo(cluster).models, "actor": spec})
        found = []
        for block in (1e-9, 1e-3, 1.0, 2.0):
            model = CostModel(cluster, RoundCosts(block=block), Collectives(cluster))
            parts = call_cost(problem, "actor_train", allocate(dp=2), model).parts
            found.append(parts["data_parallel"])
        assert found == sorted(found, reverse=True)
        assert (found[0] > 2 * found[2]) == hides
        assert found[2] == found[3]


def test_tensor_parallel_sums_are_two_a_block_and_the_ends() -> None:
    base = free_links(make_cluster("a100", 8))
    cluster = replace(base, intra_link=LinkSpec(bytes_per_s=1.0, latency_s=0.0))
    model = CostModel(cluster, RoundCosts(), Collectives(cluster, **WHOLE_RATES))
    found = call_cost(ppo(cluster), "ref_inf", allocate(tp=2), model).parts["tensor_parallel"]
    # tp 2 moves the tensor once: bf16 hidden states twice a block and once for the embedding,
    # and three fp32 values of each answer token (half of all) for its log-probability.
    assert found == pytest.approx((2 * 4 + 1) * TOKENS * 64 * 2 + 3 * 4 * TOKENS // 2)


def test_hops_between_nodes_take_the_network() -> None:
    base = free_links(make_cluster("a100", 16))
    cluster = replace(base, inter_link=LinkSpec(bytes_per_s=1.0, latency_s=0.0))
    model = CostModel(cluster, RoundCosts(), Collectives(cluster, **WHOLE_RATES))
    inside = call_cost(ppo(cluster), "ref_inf", allocate(pp=4, dp=2, m=2), model)
    across = call_cost(ppo(cluster), "ref_inf", allocate(pp=4, dp=4, m=2), model)
    assert inside.parts["pipeline_p2p"] == pytest.approx(0, abs=1e-6)
    # Stages of 4 devices: only the hop from stage 1 to 2 leaves the node, once a micro-batch:
    # 8 of a replica's 16 sequences, in bf16 hidden states of 64 values.
    assert across.parts["pipeline_p2p"] == pytest.approx(2 * 8 * (PROMPT + RESPONSE) * 64 * 2)
    # Gradients go back: both ways, in 4 mini-batches of as many sequences in all.
    train = call_cost(ppo(cluster), "actor_train", allocate(pp=4, dp=4, m=2), model)
    assert train.parts["pipeline_p2p"] == pytest.approx(2 * across.parts["pipeline_p2p"])


def test_generation_sums_hidden_states_and_gathers_logits() -> None:
    """tp 2, 1 s a byte: a sum moves the tensor once, a gather half of it; bf16 both."""
    model = slow_links(free_links(make_cluster("a100", 8)), intra_link=ONE_BYTE)
    spec = MODELS["tiny"]
    found = call_cost(ppo(model.cluster), "actor_gen", allocate(tp=2), model).parts
    sums, logits = (2 * 4 + 1) * spec.hidden * 2, spec.vocab * 2 // 2
    # Of a prompt the last token only is read by the head; each later token is summed and read.
    assert found["prefill"] == pytest.approx(BATCH * (PROMPT * sums + logits))
    assert found["decode"] == pytest.approx(BATCH * (RESPONSE - 1) * (sums + logits))


def slow_links(cluster: ClusterSpec, **links: LinkSpec) -> CostModel:
    """Blocks for free, so that only ``links`` count; datasheet rates are reached."""
    cluster = replace(cluster, **links)  # type: ignore[arg-type]
    collectives = Collectives(cluster, **WHOLE_RATES)
    return CostModel(cluster, RoundCosts(block=0.0), collectives)


ONE_BYTE = LinkSpec(bytes_per_s=1.0, latency_s=0.0)
ONE_SECOND = LinkSpec(bytes_per_s=1e30, latency_s=1.0)


def test_zero_updates_a_share_of_the_parameters() -> None:
    costs = RoundCosts(parameter_s=1.0)
    values = MODELS["tiny"].num_parameters
    plain = round_cost("actor_train", allocate(dp=4), costs).parts["optimizer"]
    shared = round_cost("actor_train", allocate(dp=4, zero=1), costs).parts["optimizer"]
    assert plain == pytest.approx(4 * values)
    assert shared == pytest.approx(4 * ceil(values / 4))


def test_replicas_of_shards_are_tp_apart() -> None:
    """tp 2, dp 8 on two nodes: replicas 0, 2, … 14 lie on both, so gradients take the network."""
    model = slow_links(free_links(make_cluster("a100", 16)), inter_link=ONE_BYTE)
    found = call_cost(ppo(model.cluster), "actor_train", allocate(tp=2, dp=8), model)
    shape = stage_shapes(MODELS["tiny"], 1)[0]
    num_bytes = 4 * stage_values(MODELS["tiny"], shape, 2)
    # 4 of a node's devices are in a group: each takes a quarter to the other node.
    assert found.parts["data_parallel"] == pytest.approx(4 * num_bytes / 4)


def test_gradients_of_split_experts_are_summed_over_who_holds_them() -> None:
    """dp 4: 2 (n - 1) / n of fp32 values, of experts with n = 4 / ep and an ep-th of them."""
    model = slow_links(free_links(make_cluster("a100", 8)), intra_link=ONE_BYTE)
    problem = ppo(model.cluster, "mixtral-8x7b")
    spec = problem.models["actor"]
    experts = 3 * spec.num_layers * spec.num_experts * spec.hidden * spec.ffn
    rest = spec.num_parameters - experts
    found = call_cost(problem, "actor_train", allocate(dp=4, ep=2), model).parts["data_parallel"]
    assert found == pytest.approx(4 * 4 * (1.5 * rest + experts / 2))
    found = call_cost(problem, "actor_train", allocate(dp=4, ep=4), model).parts["data_parallel"]
    assert found == pytest.approx(4 * 4 * 1.5 * rest)


def test_tokens_go_to_their_experts_and_back() -> None:
    """Of a rank's rows (ep - 1) / ep cross, twice forward and twice backward, after the counts."""
    model = slow_links(free_links(make_cluster("a100", 8)), intra_link=ONE_BYTE)
    problem = ppo(model.cluster, "mixtral-8x7b")
    spec, share = problem.models["actor"], TOKENS // 4

    def seconds(call: str, ep: int, **options: object) -> float:
        return call_cost(problem, call, allocate(dp=4, ep=ep, **options), model).parts[
            "tensor_parallel"
        ]

    rows_bytes, counts_bytes = share * 2 * spec.hidden * 2, 8 * spec.num_experts
    assert seconds("ref_inf", 1) == 0
    for ep in (2, 4):
        crossing = (ep - 1) / ep * spec.num_layers
        once = crossing * (2 * rows_bytes + counts_bytes)
        assert seconds("ref_inf", ep) == pytest.approx(once)
        assert seconds("actor_train", ep) == pytest.approx(
            once + 2 * crossing * rows_bytes + 3 * crossing * counts_bytes
        )
        again = seconds("actor_train", ep, recompute="full") - seconds("actor_train", ep)
        assert again == pytest.approx(once + 3 * crossing * counts_bytes)


@pytest.mark.parametrize("call", ["actor_gen", "actor_train", "ref_inf"])
def test_split_experts_read_fewer_weights_for_the_same_rows(call: str) -> None:
    """With free links ep never takes longer; decoding, which reads weights, takes much less."""
    cluster = make_cluster("a100", 8)
    fast = LinkSpec(bytes_per_s=1e30, latency_s=0.0)
    cluster = replace(cluster, intra_link=fast, inter_link=fast)
    model = CostModel(cluster, RooflineCosts(cluster.device), Collectives(cluster))
    problem = ppo(cluster, "mixtral-8x7b")
    found = [call_cost(problem, call, allocate(dp=8, ep=ep), model).seconds for ep in (1, 2, 4, 8)]
    assert found == sorted(found, reverse=True)
    if call == "actor_gen":
        assert found[-1] < 0.5 * found[0]


def test_a_tied_embedding_is_summed_over_both_ends() -> None:
    model = slow_links(free_links(make_cluster("a100", 8)), intra_link=ONE_BYTE)
    spec = MODELS["tiny"]
    found = call_cost(ppo(model.cluster), "actor_train", allocate(pp=2), model)
    assert found.parts["data_parallel"] == pytest.approx(4 * 4 * spec.vocab * spec.hidden)
    critic = call_cost(ppo(model.cluster), "critic_train", allocate(pp=2), model)
    assert critic.parts["data_parallel"] == 0


def test_a_decode_step_hops_forward_and_back() -> None:
    model = slow_links(free_links(make_cluster("a100", 8)), intra_link=ONE_SECOND)
    found = call_cost(ppo(model.cluster), "actor_gen", allocate(pp=4), model)
    assert found.parts["prefill"] == pytest.approx(3)
    assert found.parts["decode"] == pytest.approx((RESPONSE - 1) * 4)


def test_what_the_cache_does_not_hold_goes_in_waves() -> None:
    """A wave of all rows is no wave; of 64 sequences 24 at once, 24 + 24 + 16 take their turns."""
    whole, costs = allocate(m=2), RoundCosts(head_s=1.0)

    def parts(num_sequences: int, batch: int) -> Mapping[str, float]:
        cluster = free_links(make_cluster("a100", 8))
        problem = ppo(cluster)
        workload = replace(problem.workload, batch_size=num_sequences)
        model = CostModel(cluster, costs, Collectives(cluster))
        allocation = replace(whole, generation_batch=batch)
        return call_cost(replace(problem, workload=workload), "actor_gen", allocation, model).parts

    assert parts(BATCH, BATCH) == parts(BATCH, 0)
    assert parts(BATCH, 4 * BATCH) == parts(BATCH, 0)
    for name, seconds in parts(BATCH, 24).items():
        assert seconds == pytest.approx(2 * parts(24, 0)[name] + parts(16, 0)[name])


def test_prefill_gives_a_head_to_last_tokens_only() -> None:
    cost = round_cost("actor_gen", allocate(), RoundCosts(block=0.0, head_row_s=1.0))
    assert cost.parts["prefill"] == pytest.approx(BATCH)
    assert cost.parts["decode"] == pytest.approx(BATCH * (RESPONSE - 1))


# ---- pieces -----------------------------------------------------------------------------------


def _simulated(stages: list[float], counts: list[tuple[float, int]]) -> float:
    """A forward pipeline played step by step: stage s starts a micro-batch when s - 1 has ended

    it and s has ended the one before. ``counts``: (factor of the stages' seconds, how many).
    """
    free = [0.0] * len(stages)
    for factor, count in counts:
        for _ in range(count):
            ready = 0.0
            for index, seconds in enumerate(stages):
                free[index] = ready = max(ready, free[index]) + factor * seconds
    return free[-1]


@given(
    st.lists(st.floats(0.1, 10.0), min_size=1, max_size=6),
    st.integers(1, 8),
    st.integers(0, 8),
    st.floats(0.5, 1.0),
)
def test_the_pipeline_formula_is_the_played_schedule(
    stages: list[float], large: int, small: int, factor: float
) -> None:
    def costs(scale: float) -> list[StageCost]:
        return [StageCost(compute=Priced.modelled(scale * seconds)) for seconds in stages]

    hops = [Priced()] * len(stages)
    kinds = [PipelinePass(costs(1.0), hops, large), PipelinePass(costs(factor), hops, small)]
    found = sum(part.seconds for part in pipeline_parts(kinds, [1] * len(stages)).values())
    played = _simulated(stages, [(1.0, large), (factor, small)])
    # Exact for equal micro-batches; smaller ones at the end drain a little sooner.
    assert found == pytest.approx(played, rel=1e-9) if not small else found >= played * (1 - 1e-9)
    assert found <= _simulated(stages, [(1.0, large + small)]) * (1 + 1e-9)


@given(st.integers(1, 1000), st.integers(1, 100))
def test_micro_batches_hold_every_sequence(num_sequences: int, num_micro_batches: int) -> None:
    sizes = micro_batch_sizes(num_sequences, num_micro_batches)
    assert sum(size * count for size, count in sizes) == num_sequences
    assert max(size for size, count in sizes if count) == ceil(num_sequences / num_micro_batches)


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("name", ["tiny", "qwen2.5-0.5b", "tinyllama-1.1b"])
def test_stage_values_are_the_layouts(name: str, head: str) -> None:
    spec = resolve_model(name, head=head)  # type: ignore[arg-type]
    for pp, tp in ((1, 1), (1, 2), (2, 1), (3, 2)):
        layout = Layout(spec=spec, mesh=DeviceMesh(0, pp * tp), pp=pp, tp=tp)
        for stage, shape in enumerate(stage_shapes(spec, pp)):
            device = layout.device(stage, 0, 0)
            assert stage_values(spec, shape, tp) == layout.num_values(device)


# ---- laws on real devices ---------------------------------------------------------------------

CALLS = ("actor_gen", "rew_inf", "ref_inf", "critic_inf", "actor_train", "critic_train")


def pricing(cluster: ClusterSpec) -> CostModel:
    return CostModel(cluster, RooflineCosts(cluster.device), Collectives(cluster))


@st.composite
def allocations(draw: st.DrawFn, spec: ModelSpec, cluster: ClusterSpec) -> Allocation:
    size = draw(st.sampled_from([1, 2, 4, 8, 16]))
    mesh = DeviceMesh(0, size)
    strategy = draw(st.sampled_from(list(legal_strategies(spec, mesh, cluster, max_dp=8))))
    m = draw(st.sampled_from([m for m in (1, 2, 4) if m * strategy.dp <= 16]))
    return Allocation(mesh=mesh, strategy=strategy, num_micro_batches=m)


CLUSTER = make_cluster("a100", 16)
PROBLEM = ppo(CLUSTER, "llama-7b")


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(CALLS), allocations(MODELS["llama-7b"], CLUSTER))
def test_parts_and_origins_sum_to_the_seconds(call: str, allocation: Allocation) -> None:
    assert allocation_problem(PROBLEM, call, allocation) is None
    cost = call_cost(PROBLEM, call, allocation, pricing(CLUSTER))
    assert cost.seconds > 0
    assert all(seconds >= 0 for seconds in cost.parts.values())
    assert sum(cost.parts.values()) == pytest.approx(cost.seconds)
    assert sum(cost.provenance.values()) == pytest.approx(cost.seconds)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(CALLS), allocations(MODELS["llama-7b"], CLUSTER),
    st.sampled_from(["peak_flops", "memory_bytes_per_s", "intra_link", "inter_link"]),
    st.floats(1.0, 10.0),
)  # fmt: skip
def test_better_hardware_is_never_slower(
    call: str, allocation: Allocation, what: str, factor: float
) -> None:
    def better() -> ClusterSpec:
        if what.endswith("link"):
            link = getattr(CLUSTER, what)
            return replace(CLUSTER, **{what: replace(link, bytes_per_s=link.bytes_per_s * factor)})
        rate = getattr(CLUSTER.device, what) * factor
        return replace(CLUSTER, device=replace(CLUSTER.device, **{what: rate}))

    fast = better()
    slow_s = call_cost(PROBLEM, call, allocation, pricing(CLUSTER)).seconds
    fast_s = call_cost(replace(PROBLEM, cluster=fast), call, allocation, pricing(fast)).seconds
    assert fast_s <= slow_s * (1 + 1e-9)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(CALLS), allocations(MODELS["llama-7b"], CLUSTER),
    st.sampled_from(["batch_size", "prompt_tokens", "response_tokens"]), st.integers(2, 4),
)  # fmt: skip
def test_more_work_is_never_faster(
    call: str, allocation: Allocation, what: str, factor: int
) -> None:
    more = replace(PROBLEM.workload, **{what: getattr(PROBLEM.workload, what) * factor})
    model = pricing(CLUSTER)
    less_s = call_cost(PROBLEM, call, allocation, model).seconds
    more_s = call_cost(replace(PROBLEM, workload=more), call, allocation, model).seconds
    assert more_s >= less_s * (1 - 1e-9)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(CALLS), allocations(MODELS["llama-7b"], CLUSTER), st.data())
def test_a_mesh_costs_the_same_wherever_it_lies(
    call: str, allocation: Allocation, data: st.DataObject
) -> None:
    """Answers are shared between places: here each place is priced by a model of its own, whose

    groups are built at that place.
    """
    size = allocation.mesh.num_devices
    first = data.draw(st.sampled_from(range(0, 16, size)))
    moved = replace(allocation, mesh=DeviceMesh(first, size))
    parts = {"actor_gen": generate_parts, "ref_inf": infer_parts, "rew_inf": infer_parts,
             "critic_inf": infer_parts}  # fmt: skip
    spec = PROBLEM.spec_of(call)
    assert spec is not None
    if call in parts:
        there = parts[call](spec, PROBLEM.workload, moved, pricing(CLUSTER))
    else:
        there = train_parts(spec, PROBLEM.workload, moved, pricing(CLUSTER), num_mini_batches=4)
    here = call_cost(PROBLEM, call, moved, pricing(CLUSTER))
    assert here.parts == pytest.approx({name: p.seconds for name, p in there.items()})


@pytest.mark.parametrize("call", ["ref_inf", "rew_inf"])
def test_twice_the_replicas_halve_inference(call: str) -> None:
    model = pricing(CLUSTER)
    costs: Mapping[int, CallCost] = {
        dp: call_cost(PROBLEM, call, allocate(tp=2, dp=dp), model) for dp in (1, 2, 4, 8)
    }
    for dp in (2, 4, 8):
        assert costs[dp].seconds == pytest.approx(costs[1].seconds / dp, rel=0.02)


def test_a_search_can_afford_the_cost_model() -> None:
    """Every allocation of a call on 16 devices, priced anew: well below a millisecond each."""
    model = pricing(CLUSTER)
    options = [
        Allocation(mesh=DeviceMesh(0, 16), strategy=strategy, num_micro_batches=m)
        for strategy in legal_strategies(MODELS["llama-7b"], DeviceMesh(0, 16), CLUSTER, max_dp=16)
        for m in (1, 2, 4)
    ]
    start_s = time.process_time()
    for call in CALLS:
        for option in options:
            call_cost(PROBLEM, call, option, model)
    first_s = (time.process_time() - start_s) / (len(CALLS) * len(options))
    start_s = time.process_time()
    for call in CALLS:
        for option in options:
            call_cost(PROBLEM, call, option, model)
    again_s = (time.process_time() - start_s) / (len(CALLS) * len(options))
    assert first_s < 10e-3
    assert again_s < 0.2e-3


def test_a_second_pass_over_the_batch_costs_as_much_as_the_first() -> None:
    problems = [
        make_problem(
            ALGORITHM,
            make_config(ALGORITHM.config_class, ["batch_size=16", f"ppo.num_epochs={epochs}"]),
            model=resolve_model("tiny"), critic=resolve_model("tiny"), cluster=CLUSTER,
        )
        for epochs in (1, 2)
    ]  # fmt: skip
    allocation = Allocation(mesh=DeviceMesh(0, 1), strategy=ParallelStrategy())
    model = pricing(CLUSTER)
    for name, factor in (("actor_train", 2), ("actor_gen", 1)):
        once, twice = (call_cost(p, name, allocation, model).seconds for p in problems)
        assert twice == pytest.approx(factor * once)
