"""Protects offload: who may, what leaves the device and when it is back, what that takes."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from planner.algorithm import find_algorithm, make_config, make_problem
from planner.cost.offload import swap_cost
from planner.lock import Lock
from planner.mesh import DeviceMesh
from planner.overrides import parse_overrides
from planner.plan import Allocation, ExecutionPlan, Problem, validate_plan
from planner.plan_memory import check_memory, memory_over_time, plan_memory
from planner.plan_schema import plan_from_dict, plan_to_dict
from planner.program import Infer, Offload, Reload, Train, compile_plan
from planner.program_check import check_program
from planner.resolve import make_costs
from planner.search import search
from planner.search.evaluate import Evaluator
from planner.search.options import OptionSpace
from planner.simulate import StepPrices, run_program
from planner.strategy import ParallelStrategy
from profiles.catalogue import MODELS
from profiles.clusters import make_cluster
from profiles.errors import ConfigError, InfeasibleError, PlanError
from profiles.units import GIB
from tests.planner import instances
from tests.planner.plans import make_test_cluster, ppo, random_plan
from tests.planner.test_search import give_memory, random_assignment

H100 = make_cluster("h100", 16)


def offloaded(plan: ExecutionPlan, *calls: str) -> ExecutionPlan:
    allocations = {
        name: replace(allocation, offload=name in calls)
        for name, allocation in plan.allocations.items()
    }
    return replace(plan, allocations=allocations)


@pytest.mark.parametrize("seed", range(10))
def test_what_a_call_needs_is_back_before_it_and_gone_after_it(seed: int) -> None:
    problem = ppo(make_test_cluster(2, 4), ["batch_size=24"])
    plan = offloaded(random_plan(random.Random(seed), problem), "ref_inf", "critic_train")
    program = compile_plan(plan)
    check_program(plan, program)
    for name, kind, what in (
        ("ref_inf", Infer, "weights"),
        ("critic_train", Train, "optimizer"),
    ):
        role = problem.graph.call(name).role
        for rank in plan.allocations[name].mesh.devices:
            swaps = [
                type(i)
                for i in program.step[rank]
                if (isinstance(i, Offload | Reload) and i.role == role)
                or (isinstance(i, kind) and i.call == name)
            ]
            assert swaps == [Reload, kind, Offload]
            assert any(
                isinstance(i, Offload) and (i.role, i.what) == (role, what)
                for i in program.setup[rank]
            )
    lost = {
        rank: tuple(i for i in own if not isinstance(i, Reload))
        for rank, own in program.step.items()
    }
    with pytest.raises(PlanError, match=r"needs what (ref|critic) has offloaded"):
        check_program(plan, replace(program, step=lost))


@pytest.mark.parametrize(
    ("call", "overrides", "message"),
    [
        ("actor_gen", [], "offload of actor, which is trained, applies to its TRAIN call only"),
        ("ref_inf", ["ppo.ref_average=0.1"], "ref is an average over steps"),
        ("rew_inf", ["reward.source=vader"], "offload applies to calls with a model only"),
    ],
)
def test_what_cannot_leave_is_refused(call: str, overrides: list[str], message: str) -> None:
    problem = ppo(make_test_cluster(1, 1), ["batch_size=24", *overrides])
    one = Allocation(mesh=DeviceMesh(0, 1), strategy=ParallelStrategy())
    plan = ExecutionPlan(problem=problem, allocations={c.name: one for c in problem.graph.calls})
    with pytest.raises(PlanError, match=message):
        validate_plan(offloaded(plan, call))


def test_memory_without_what_is_on_the_host() -> None:
    """The reference's weights are there while it runs and at no other time; of the critic the

    weights stay and 16 bytes of a value go. On a CPU nothing is saved.
    """
    problem = ppo(H100, ["batch_size=64"], spec=MODELS["llama-7b"])
    whole = Allocation(mesh=DeviceMesh(0, 8), strategy=ParallelStrategy(tp=8), num_micro_batches=16)
    plan = ExecutionPlan(problem=problem, allocations={c.name: whole for c in problem.graph.calls})
    away = offloaded(plan, "ref_inf", "critic_train")
    for stays, leaves in zip(memory_over_time(plan)[0], memory_over_time(away)[0], strict=True):
        gone = stays.need - leaves.need
        assert gone.weights == (
            0 if stays.call == "ref_inf" else pytest.approx(13.5e9 / 8, rel=0.1)
        )
        critic = problem.models["critic"].num_parameters / 8
        there = stays.call == "critic_train"
        assert gone.gradients == (0 if there else pytest.approx(4 * critic, rel=0.02))
        assert gone.optimizer == (0 if there else pytest.approx(12 * critic, rel=0.02))
        assert gone.total == gone.weights + gone.gradients + gone.optimizer
    cpu = replace(plan, problem=ppo(make_test_cluster(1, 8), ["batch_size=64"]))
    one = replace(whole, strategy=ParallelStrategy(tp=4, dp=2), num_micro_batches=1)
    cpu = replace(cpu, allocations={c.name: one for c in problem.graph.calls})
    assert plan_memory(offloaded(cpu, "ref_inf", "critic_train")) == plan_memory(cpu)


def test_seconds_are_bytes_over_the_host_link() -> None:
    problem = ppo(H100, ["batch_size=64"], spec=MODELS["llama-7b"])
    model, spec = make_costs(H100, None), MODELS["llama-7b"]
    eight = Allocation(mesh=DeviceMesh(0, 8), strategy=ParallelStrategy(tp=8), offload=True)
    weights_s = 2 * spec.num_parameters / 8 / H100.host_link.bytes_per_s
    found = swap_cost(problem, "ref_inf", eight, model)
    assert found.reload_s == pytest.approx(weights_s + H100.host_link.latency_s, rel=0.01)
    assert found.offload_s == 0
    found = swap_cost(problem, "actor_train", eight, model)
    assert found.offload_s == pytest.approx(6 * weights_s, rel=0.01)
    zeros_s = 4 * spec.num_parameters / 8 / H100.device.memory_bytes_per_s
    assert found.reload_s == pytest.approx(6 * weights_s + zeros_s, rel=0.01)
    halves = replace(eight, strategy=ParallelStrategy(tp=4, dp=2, zero=1))
    assert swap_cost(problem, "actor_train", halves, model).offload_s == pytest.approx(
        found.offload_s, rel=0.01
    )
    assert swap_cost(problem, "ref_inf", replace(eight, offload=False), model).reload_s == 0


@pytest.mark.parametrize("algorithm", ["ppo", "remax"])
def test_the_evaluator_knows_offload(algorithm: str) -> None:
    """Seconds and bytes of random assignments as simulator and memory model give them."""
    problem = problem_of(algorithm)
    space = OptionSpace(problem, StepPrices(problem, make_costs(H100, None)), offload=True)
    evaluator, rng = Evaluator(space), random.Random(1)
    give_memory(evaluator, 30e9)
    count = 0
    while count < 60:
        assignment = random_assignment(rng, space)
        plan, score = evaluator.plan(assignment), evaluator.score(assignment)
        refusal = refusal_of(plan)
        if refusal:
            assert "reads the same weights" in refusal
            assert score.overshoot > 0
            continue
        count += 1
        expected_s = run_program(plan, compile_plan(plan), space.prices, num_steps=1).step_s
        assert score.step_s == pytest.approx(expected_s, rel=1e-9)
        fullest = max(need.total for need in plan_memory(plan, kept=frozenset()).values())
        assert score.overshoot == pytest.approx(max(0.0, fullest / 30e9 - 1.0), rel=1e-12)
    assert any(c.offload for by_size in space.choices.values() for cs in by_size.values()
               for c in cs)  # fmt: skip


def refusal_of(plan: ExecutionPlan) -> str:
    try:
        validate_plan(plan)
    except PlanError as error:
        return str(error)
    return ""


def problem_of(algorithm: str) -> Problem:
    found = find_algorithm(algorithm)
    config = make_config(found.config_class, ["batch_size=64"])
    small = MODELS["llama-7b"]
    return make_problem(found, config, model=small, critic=small, cluster=H100)


def test_offload_is_a_field_of_the_file_and_of_a_lock() -> None:
    plan = random_plan(random.Random(1), ppo(make_test_cluster(1, 4), ["batch_size=24"]))
    away = offloaded(plan, "ref_inf")
    data = plan_to_dict(away)
    assert data["version"] == 5
    assert data["allocations"]["ref_inf"]["offload"] is True
    assert plan_from_dict(data) == away
    lock = parse_overrides(["lock.ref_inf.offload=true"]).locks["ref_inf"]
    assert lock == Lock(offload=True)
    assert lock.allows(away.allocations["ref_inf"])
    assert not lock.allows(plan.allocations["ref_inf"])
    with pytest.raises(ConfigError, match="'yes' is not true or false"):
        parse_overrides(["lock.ref_inf.offload=yes"])


def test_a_file_of_version_4_is_read() -> None:
    plan = random_plan(random.Random(1), ppo(make_test_cluster(1, 4), ["batch_size=24"]))
    data = plan_to_dict(plan)
    data["version"] = 4
    with pytest.raises(PlanError, match=r"\.offload: is a field of version 5; set"):
        plan_from_dict(data)
    for allocation in data["allocations"].values():
        del allocation["offload"]
    with pytest.raises(PlanError, match=r"graph\.max_staleness: is a field of version 5"):
        plan_from_dict(data)
    del data["graph"]["max_staleness"]
    assert plan_from_dict(data) == plan
    data["version"] = 5
    with pytest.raises(PlanError, match="missing field"):
        plan_from_dict(data)


def test_offload_is_chosen_where_memory_binds() -> None:
    """7B twice on 8 GPUs of 24 GiB: with everything resident a device lacks a third of it."""
    cluster = make_cluster("h100", 8).with_memory_limit(24 * GIB)
    problem = ppo(cluster, ["batch_size=64"], spec=MODELS["llama-7b"])
    costs = make_costs(cluster, None)
    with pytest.raises(InfeasibleError, match="no plan fits"):
        search(problem, costs, offload=False, max_evaluations=60_000, time_limit_s=3)
    plan = search(problem, costs, max_evaluations=200_000, gap=0.1, time_limit_s=20).plan
    assert plan.allocations["actor_train"].offload
    check_memory(plan)


@pytest.mark.parametrize("seed", range(3))
def test_what_fits_is_no_slower_for_the_choice(seed: int) -> None:
    """Where memory is ample the optimum is the same, and what saves nothing is not offloaded."""
    problem = instances.draw_problem(random.Random(seed))
    device = replace(problem.cluster.device, kind="cuda", memory_bytes=1 << 36)
    cluster = replace(problem.cluster, device=device)
    problem = replace(problem, cluster=cluster)
    costs = make_costs(cluster, None)
    found = [
        search(problem, costs, engine="exact", gap=0.0, offload=offload, time_limit_s=60)
        for offload in (False, True)
    ]
    assert found[1].step_s == pytest.approx(found[0].step_s, rel=1e-9)
    assert not any(a.offload for a in found[1].plan.allocations.values())
