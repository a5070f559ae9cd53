"""Protects the memory model: hand counts, what borrowed layouts add, and the refusal's sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.generation.graph import ALGORITHM as GENERATION
from experiments.ppo.graph import ALGORITHM
from planner.activations import BlockKernels, kept_bytes, working_values
from planner.algorithm import make_config, make_problem
from planner.layout import Layout
from planner.lending import stored_values
from planner.memory import (
    RESERVE_BYTES,
    STAGING_BYTES,
    MemoryBreakdown,
    cache_memory,
    call_memory,
    held_memory,
    running_bytes,
    running_memory,
)
from planner.mesh import DeviceMesh
from planner.plan import Allocation, ExecutionPlan, Problem
from planner.plan_memory import (
    KEPT_SHARE,
    check_memory,
    home_strategies,
    kept_caches,
    kept_layouts,
    memory_over_time,
    plan_memory,
)
from planner.program import Generate, Reserve, compile_plan, home_layouts
from planner.program_check import check_program
from planner.strategy import ParallelStrategy
from profiles.catalogue import MODELS, resolve_model
from profiles.clusters import make_cluster
from profiles.errors import InfeasibleError
from profiles.hardware import ClusterSpec
from profiles.units import GIB

BATCH, TOKENS = 64, 256  # sequences; prompt 128 and answer 128
SPEC = MODELS["llama-7b"]
CLUSTER = make_cluster("a100", 8)


def ppo(cluster: ClusterSpec = CLUSTER, model: str = "llama-7b") -> Problem:
    overrides = [f"batch_size={BATCH}", "prompt_len=128", "response_len=128"]
    config = make_config(ALGORITHM.config_class, overrides)
    spec = resolve_model(model)
    return make_problem(ALGORITHM, config, model=spec, critic=spec, cluster=cluster)


def allocate(
    pp: int = 1, tp: int = 1, dp: int = 1, m: int = 1, first: int = 0, **options: int
) -> Allocation:
    strategy = ParallelStrategy(pp=pp, tp=tp, dp=dp, **options)  # type: ignore[arg-type]
    return Allocation(
        mesh=DeviceMesh(first, strategy.num_devices), strategy=strategy, num_micro_batches=m
    )


def plan_of(default: Allocation, *, problem: Problem | None = None, **calls: Allocation):  # type: ignore[no-untyped-def]
    problem = problem or ppo()
    names = [call.name for call in problem.graph.calls]
    return ExecutionPlan(
        problem=problem, allocations={name: calls.get(name, default) for name in names}
    )


def block_values(tp: int = 1, **options: Any) -> int:
    """What a block of LLaMA-7B keeps of a token, in bf16 values."""
    strategy = ParallelStrategy(tp=tp, **options)
    return kept_bytes(SPEC, strategy, value_bytes=2, length=TOKENS) // 2


@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.parametrize("zero", [0, 1])
def test_split_experts_are_held_once_in_ep_ranks(ep: int, zero: int) -> None:
    """Oracle: the layout's slices; state of experts over dp / ep ranks, of the rest over dp."""
    spec = replace(MODELS["mixtral-8x7b"], num_layers=3)
    strategy = ParallelStrategy(dp=4, tp=2, ep=ep, zero=zero)
    layout = Layout.of(spec, DeviceMesh(0, 8), strategy)
    pieces = layout.slices(3)
    experts = sum(piece.num_values for piece in pieces if piece.is_expert)
    rest = sum(piece.num_values for piece in pieces) - experts
    assert experts == 3 * 3 * 8 * 4096 * 14336 // (2 * ep)
    held = held_memory(spec, strategy, 0, "cuda", trained=True)
    assert held.weights == 2 * (experts + rest)
    assert held.gradients == 4 * (experts + rest)
    own = rest / 4 + experts / (4 // ep) if zero else rest + experts
    assert held.optimizer == pytest.approx(12 * own, abs=24)


# ---- one call ---------------------------------------------------------------------------------


def test_training_state_of_one_gpu_is_18_bytes_a_parameter() -> None:
    need = call_memory(ppo(), "actor_train", allocate(m=16))
    n = SPEC.num_parameters
    # bf16 weights, fp32 gradients, fp32 master and two moments.
    assert (need.weights, need.gradients, need.optimizer) == (2 * n, 4 * n, 12 * n)
    assert need.reserve == RESERVE_BYTES["cuda"]


def test_training_state_of_a_cpu_is_16_bytes_a_parameter() -> None:
    device = replace(CLUSTER.device, kind="cpu")
    need = call_memory(ppo(replace(CLUSTER, device=device)), "actor_train", allocate(m=16))
    n = SPEC.num_parameters
    assert (need.weights, need.gradients, need.optimizer) == (4 * n, 4 * n, 8 * n)
    assert need.reserve == RESERVE_BYTES["cpu"]


def test_zero_divides_the_optimizer_over_replicas_only() -> None:
    plain = call_memory(ppo(), "actor_train", allocate(dp=4))
    sharded = call_memory(ppo(), "actor_train", allocate(dp=4, zero=1))
    assert sharded.optimizer == -(-SPEC.num_parameters // 4) * 12
    assert (sharded.weights, sharded.gradients) == (plain.weights, plain.gradients)


def test_activations_of_a_block_by_hand() -> None:
    """LLaMA-7B: 4 hidden + 3 (q + kv) + 3 ffn values a token; nothing squared in the length."""
    assert block_values() == 4 * 4096 + 3 * (4096 + 4096) + 3 * 11008
    assert block_values(tp=2) - 4 * 4096 == (block_values() - 4 * 4096) // 2
    # Split over tokens: what halves start from; the products' inputs are gathered, whole.
    split = block_values(tp=2, sequence_parallel=True)
    assert block_values(tp=2) - split == 2 * 4096 // 2
    # Selective: neither the inputs nor silu(gate) up.
    assert block_values() - block_values(recompute="selective") == 2 * 4096 + 11008
    assert block_values(recompute="full") == 4096
    assert block_values(tp=2, recompute="full", sequence_parallel=True) == 2048


@pytest.mark.parametrize("tp, sequence_parallel, recompute, formula", [
    (8, False, "none", lambda s, h, a, t: h * (10 + 24 / t + 5 * a * s / (h * t))),
    (8, False, "selective", lambda s, h, a, t: h * (10 + 24 / t)),
    (8, True, "none", lambda s, h, a, t: h / t * (34 + 5 * a * s / h)),
    (8, True, "selective", lambda s, h, a, t: 34 * h / t),
    (8, False, "full", lambda s, h, a, t: 2 * h),
])  # fmt: skip
def test_eager_attention_with_dropout_keeps_what_its_paper_says(
    tp: int, sequence_parallel: bool, recompute: str, formula: Callable[..., float]
) -> None:
    """Oracle: Korthikanti et al. 2022, table 2, bytes of one token in one block."""
    spec = replace(
        MODELS["gpt2"], hidden=6144, num_heads=64, num_kv_heads=64, head_dim=96, ffn=4 * 6144
    )
    strategy = ParallelStrategy(tp=tp, sequence_parallel=sequence_parallel, recompute=recompute)  # type: ignore[arg-type]
    kernels = BlockKernels(attention="eager", dropout=True, gather_again=True)
    found = kept_bytes(spec, strategy, value_bytes=2, length=2048, kernels=kernels)
    assert found == pytest.approx(formula(2048, 6144, 64, tp))


def test_training_keeps_all_layers_or_only_their_inputs() -> None:
    # 4 mini-batches, 16 micro-batches: one sequence of 256 tokens at a time.
    kept = call_memory(ppo(), "actor_train", allocate(m=16))
    block, working = block_values(), working_values(SPEC, ParallelStrategy())
    assert kept.activations == 2 * TOKENS * (32 * block + working)
    again = call_memory(ppo(), "actor_train", allocate(m=16, recompute="full"))
    assert again.activations == 2 * TOKENS * (32 * 4096 + block + working)
    # bf16 logits of the answers of one micro-batch (half its tokens) and their gradient.
    assert kept.logits == 2 * 2 * (TOKENS // 2) * 32000


def test_the_first_stage_of_1f1b_keeps_as_many_micro_batches_as_stages() -> None:
    few = call_memory(ppo(), "actor_train", allocate(pp=4, m=16))
    block, working = block_values(), working_values(SPEC, ParallelStrategy())
    # A stage goes back through what it gave on, which no block keeps.
    assert few.activations == 2 * TOKENS * (4 * (8 * block + 4096) + working)


def test_later_stages_keep_fewer_micro_batches() -> None:
    # 8 sequences a micro-batch: training is every device's fullest moment.
    need = plan_memory(plan_of(allocate(pp=4, m=2)))
    block, working = block_values(), working_values(SPEC, ParallelStrategy())
    for stage, in_flight in enumerate((2, 2, 2, 1)):
        sent = 4096 if stage < 3 else 0
        kept = in_flight * (8 * block + sent)
        assert need[stage].activations == 2 * 8 * TOKENS * (kept + working)


def test_the_largest_gradient_is_there_once_more() -> None:
    need = call_memory(ppo(), "actor_train", allocate(m=16))
    assert need.buffers == 2 * max(32000 * 4096, 2 * 11008 * 4096)


def test_a_groups_logits_while_tokens_are_chosen() -> None:
    """64 sequences in 4 groups: parts and whole in bf16, three copies in fp32. Graphs of decode

    turns, which experts have none of, keep theirs while prompts enter.
    """
    need = call_memory(ppo(), "actor_gen", allocate(m=4))
    assert need.logits == 2 * 16 * 32000 * (2 * 2 + 3 * 4)
    need = call_memory(ppo(model="mixtral-8x7b"), "actor_gen", allocate(m=4))
    assert need.logits == 16 * 32000 * (2 * 2 + 3 * 4)


def test_generation_holds_keys_and_values_of_the_whole_replica() -> None:
    need = call_memory(ppo(), "actor_gen", allocate(dp=2, m=4))
    assert need.kv_cache == BATCH // 2 * TOKENS * SPEC.kv_bytes_per_token()
    halves = call_memory(ppo(), "actor_gen", allocate(dp=2, tp=2, m=4))
    assert halves.kv_cache * 2 == need.kv_cache


def test_a_generation_batch_bounds_keys_and_values() -> None:
    whole = call_memory(ppo(), "actor_gen", allocate(dp=2, m=4))
    batch = replace(allocate(dp=2, m=4), generation_batch=BATCH // 8)
    waves = call_memory(ppo(), "actor_gen", batch)
    assert waves.kv_cache * 4 == whole.kv_cache
    assert waves.logits * 4 == whole.logits
    ample = call_memory(ppo(), "actor_gen", replace(batch, generation_batch=BATCH))
    assert ample == whole


def test_inference_needs_no_state() -> None:
    need = call_memory(ppo(), "ref_inf", allocate(m=8))
    assert (need.gradients, need.optimizer, need.kv_cache) == (0, 0, 0)
    assert need.weights == 2 * SPEC.num_parameters


@settings(deadline=None)
@given(
    st.sampled_from(["actor_gen", "ref_inf", "actor_train"]),
    st.sampled_from([(1, 1), (2, 1), (1, 2), (4, 2)]),
    st.sampled_from([1, 2, 4]),
)
def test_more_micro_batches_or_shards_never_need_more(
    call: str, pp_tp: tuple[int, int], m: int
) -> None:
    pp, tp = pp_tp
    need = call_memory(ppo(), call, allocate(pp=pp, tp=tp, m=m))
    assert call_memory(ppo(), call, allocate(pp=pp, tp=tp, m=2 * m)).total <= need.total
    assert call_memory(ppo(), call, allocate(pp=pp, tp=2 * tp, m=m)).total <= need.total


# ---- plans ------------------------------------------------------------------------------------


def test_homes_are_the_programs() -> None:
    plan = plan_of(allocate(dp=2, tp=4, m=4), actor_gen=allocate(dp=8, m=2))
    ours = {role: tuple(layouts) for role, layouts in home_strategies(plan).items()}
    assert ours == home_layouts(plan)


def test_every_role_stays_and_the_worst_call_is_added() -> None:
    allocation = allocate(tp=8, m=16)
    plan = plan_of(allocation)
    need = plan_memory(plan, kept=frozenset())
    assert set(need) == set(range(8))
    actor = call_memory(plan.problem, "actor_train", allocation)
    critic = call_memory(plan.problem, "critic_train", allocation)
    ref = call_memory(plan.problem, "ref_inf", allocation)
    reward = call_memory(plan.problem, "rew_inf", allocation)
    held = sum(c.weights + c.gradients + c.optimizer for c in (actor, critic, ref, reward))
    calls = ["actor_gen", "rew_inf", "ref_inf", "critic_inf", "actor_train", "critic_train"]
    running = max(
        c.activations + c.logits + c.kv_cache + c.buffers
        for c in (call_memory(plan.problem, name, allocation) for name in calls)
    )
    assert need[0].total == held + running + RESERVE_BYTES["cuda"]
    assert len({n.total for n in need.values()}) == 1


def test_an_unused_device_holds_its_reserve() -> None:
    need = plan_memory(plan_of(allocate(tp=4, m=16)))
    assert need[7] == MemoryBreakdown(reserve=RESERVE_BYTES["cuda"])


def test_a_borrowed_layout_is_there_while_its_call_runs() -> None:
    home, other = allocate(tp=8, m=16), allocate(tp=4, first=0, m=16)
    small = replace(
        ppo(), workload=replace(ppo().workload, prompt_tokens=1, response_tokens=1)
    )  # so that weights outweigh what runs
    together = plan_memory(plan_of(home, problem=small))
    apart = plan_memory(plan_of(home, problem=small, actor_gen=other), kept=frozenset())
    weights = call_memory(small, "actor_gen", other).weights
    assert apart[0].weights == together[0].weights + weights
    assert apart[0].buffers >= STAGING_BYTES["cuda"]
    # Devices 4 to 7 do not generate and borrow nothing.
    assert apart[7].weights == together[7].weights


def test_a_devices_step_is_told_call_by_call() -> None:
    home, other = allocate(tp=8, m=16), allocate(tp=4, m=16)
    plan = plan_of(home, actor_gen=other, critic_inf=allocate(tp=4, first=4, m=16))
    moments = memory_over_time(plan, kept=frozenset())
    order = [call.name for call in plan.problem.graph.calls]
    # Devices 0 to 3 do all but critic_inf, the others all but actor_gen.
    for device, without in ((0, "critic_inf"), (7, "actor_gen")):
        assert [m.call for m in moments[device]] == ["", *(n for n in order if n != without)]
    between = moments[0][0].need
    assert between.activations == between.kv_cache == between.logits == between.buffers == 0
    for call_name, need, _ in moments[0][1:]:
        alone = call_memory(plan.problem, call_name, plan.allocations[call_name])
        running = alone.activations + alone.logits + alone.kv_cache + alone.buffers
        borrowed = call_name == "actor_gen"
        weights = alone.weights + STAGING_BYTES["cuda"] if borrowed else 0
        assert need.total == between.total + running + weights


def test_a_borrowed_layout_is_gone_when_the_role_trains_unless_its_memory_is_kept() -> None:
    home, other = allocate(tp=8, m=1), allocate(tp=4, m=16)
    together, apart = plan_of(home), plan_of(home, actor_gen=other)
    # One micro-batch: training is the fullest moment, with or without the borrowed weights.
    without = plan_memory(together, kept=frozenset())[0]
    assert plan_memory(apart, kept=frozenset())[0] == without
    assert without.gradients > 0
    layouts = [Layout.of(SPEC, one.mesh, one.strategy) for one in (home, other)]
    assert kept_layouts(apart) == {("actor", layouts[1])}
    stored_bytes = 2 * stored_values(*layouts, 0)
    assert (
        stored_bytes > 0.9 * call_memory(apart.problem, "actor_gen", other).weights
    )  # norms are lent
    need = plan_memory(apart, kept=kept_layouts(apart))
    assert need[0] == replace(without, weights=without.weights + stored_bytes)
    assert need[7] == plan_memory(together, kept=frozenset())[7]


def test_memory_is_kept_where_a_tenth_of_the_device_stays_free() -> None:
    """And the program says so: it reserves what is kept."""
    apart = plan_of(allocate(tp=8, m=1), actor_gen=allocate(tp=4, m=16))
    need = plan_memory(apart, kept=kept_layouts(apart))[0].total
    for limit, kept in ((need / KEPT_SHARE + 1, True), (need / KEPT_SHARE - 1, False)):
        cluster = apart.problem.cluster.with_memory_limit(int(limit))
        plan = replace(apart, problem=replace(apart.problem, cluster=cluster))
        check_memory(plan)
        assert bool(kept_layouts(plan)) == kept
        program = compile_plan(plan)
        reserved = {
            rank: [(i.role, i.destination) for i in own if isinstance(i, Reserve)]
            for rank, own in program.setup.items()
        }
        other = plan.allocations["actor_gen"]
        layout = Layout.of(SPEC, other.mesh, other.strategy)
        for rank, own in reserved.items():
            assert own == ([("actor", layout)] if kept and rank in layout.mesh else [])
        check_program(plan, program)


def test_a_kept_cache_is_there_at_all_times_and_counted_once() -> None:
    """Also what decode graphs share, which on each stage is that stage's."""
    plan = plan_of(allocate(pp=2, tp=4, m=4))
    assert kept_caches(plan, frozenset()) == {"actor_gen"}
    call, allocation = plan.problem.graph.call("actor_gen"), plan.allocations["actor_gen"]
    moments = memory_over_time(plan)
    for device, without in memory_over_time(plan, kept=frozenset()).items():
        stage = device // 4
        cache = cache_memory(plan.problem, call, allocation, SPEC, stage)
        assert cache.kv_cache == BATCH * TOKENS * 16 * 2 * 4096 // 4 * 2
        group = BATCH // 4
        assert cache.logits == (group * SPEC.vocab * (2 * 2 + 3 * 4) if stage else 0)
        assert cache.activations > 0
        for before, now in zip(without, moments[device], strict=True):
            more = MemoryBreakdown() if now.call == "actor_gen" else cache
            assert now.need == before.need + more, (device, now.call)


def test_a_cache_is_kept_where_a_tenth_of_the_device_stays_free() -> None:
    """And the program says so, in an evaluation's step as well."""
    whole = plan_of(allocate(tp=8, m=1))
    need = plan_memory(whole, kept=frozenset(), caches=frozenset({"actor_gen"}))[0].total
    graph = replace(whole.problem.graph, max_staleness=1)
    for limit, kept in ((need / KEPT_SHARE + 1, True), (need / KEPT_SHARE - 1, False)):
        cluster = whole.problem.cluster.with_memory_limit(int(limit))
        problem = replace(whole.problem, cluster=cluster)
        plan = replace(whole, problem=problem)
        check_memory(plan)
        assert kept_caches(plan, frozenset()) == ({"actor_gen"} if kept else set())
        ahead = compile_plan(replace(plan, problem=replace(problem, graph=graph)))
        assert ahead.ahead is not None
        steps = [compile_plan(plan).step, ahead.step, ahead.ahead.first, ahead.ahead.alone]
        for step in steps:
            (generate,) = (i for i in step[3] if isinstance(i, Generate))
            assert generate.keeps == kept


def test_no_cache_is_kept_whose_weights_come_and_go() -> None:
    """What is captured of its decode turns would know where they were."""
    apart = plan_of(allocate(tp=8, m=16), actor_gen=allocate(tp=4, m=16))
    layouts = kept_layouts(apart)
    assert layouts
    assert kept_caches(apart, layouts) == {"actor_gen"}
    assert kept_caches(apart, frozenset()) == frozenset()
    config = make_config(GENERATION.config_class, [f"batch_size={BATCH}"])
    problem = make_problem(GENERATION, config, model=SPEC, critic=SPEC, cluster=CLUSTER)
    for offload in (False, True):
        plan = plan_of(replace(allocate(tp=8), offload=offload), problem=problem)
        assert kept_caches(plan, frozenset()) == (frozenset() if offload else {"actor_gen"})


def test_a_plan_that_fits_passes_and_one_that_does_not_is_explained() -> None:
    plan = plan_of(allocate(tp=8, m=16))
    check_memory(plan)
    tight = plan.problem.cluster.with_memory_limit(10 * GIB)
    with pytest.raises(
        InfeasibleError,
        match=r"allocations\.\w+: device 0 needs .* GiB while \w+ runs and has 10\.00 GiB, .* too "
        r"little; most is optimizer with .* \(roles that stay there: actor, reward, ref, critic\); "
        r"use ZeRO 1",
    ):
        check_memory(replace(plan, problem=replace(plan.problem, cluster=tight)))


def test_the_limit_is_sharp() -> None:
    plan = plan_of(allocate(tp=8, m=16))
    need = plan_memory(plan, kept=frozenset())[0].total
    for limit, fits in ((need, True), (need - 1, False)):
        cluster = plan.problem.cluster.with_memory_limit(limit)
        limited = replace(plan, problem=replace(plan.problem, cluster=cluster))
        if fits:
            check_memory(limited)
        else:
            with pytest.raises(InfeasibleError):
                check_memory(limited)


@settings(deadline=None)
@given(
    st.sampled_from(["ref_inf", "actor_train", "actor_gen"]),
    st.sampled_from([1, 2, 3, 5]),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from(["none", "selective", "full"]),
)
def test_bytes_of_all_stages_are_those_of_each(
    name: str, pp: int, tp: int, m: int, recompute: str
) -> None:
    problem, train = ppo(), name == "actor_train"
    options = {"recompute": recompute} if train else {}
    allocation = allocate(pp=pp, tp=tp, m=m, **options)  # type: ignore[arg-type]
    call = problem.graph.call(name)
    each = [running_memory(problem, call, allocation, SPEC, stage).total for stage in range(pp)]
    assert running_bytes(problem, call, allocation, SPEC) == tuple(each)
