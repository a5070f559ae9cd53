"""Protects ``realexec check`` and, through it, the memory model: what a rank's program really
allocates is what the planner says that it holds.

The oracle of the memory model is the executor itself, carried out on tensors without values; the
oracle of that is a rank of one process that runs the same step with values.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from executor.fake import check_rank, rank_kinds
from executor.run import configure
from experiments.generation.graph import ALGORITHM as GENERATION
from experiments.grpo.graph import ALGORITHM as GRPO
from experiments.ppo.graph import ALGORITHM as PPO
from experiments.sft.graph import ALGORITHM as SFT
from planner.algorithm import Algorithm, make_config, make_problem
from planner.memory import cache_memory
from planner.mesh import DeviceMesh
from planner.plan import Allocation, ExecutionPlan, validate_plan
from planner.plan_schema import save_plan
from planner.program import Generate, Program, compile_plan
from planner.strategy import ParallelStrategy
from profiles.catalogue import MODELS
from profiles.clusters import make_cluster
from profiles.models import ModelSpec

# Blocks of their real width, so that no item is a rounding of another; few of them.
DENSE = replace(MODELS["llama-7b"], num_layers=2)
GROUPED = replace(MODELS["llama3-8b"], num_layers=2)
EXPERTS = replace(
    MODELS["llama-7b"], family="mixtral", num_layers=2, num_experts=8, experts_per_token=2
)
# Weights that are little beside what micro-batches under way keep.
THIN = replace(
    GROUPED, num_layers=8, vocab=1024, hidden=1024, num_heads=16, num_kv_heads=4, head_dim=64,
    ffn=2816,
)  # fmt: skip
SIZES = ["batch_size=16", "prompt_len=384", "response_len=64"]


def allocate(
    pp: int = 1, tp: int = 1, dp: int = 1, m: int = 1, first: int = 0, rows: int = 0,
    offload: bool = False, **options: object,
) -> Allocation:  # fmt: skip
    strategy = ParallelStrategy(pp=pp, tp=tp, dp=dp, **options)  # type: ignore[arg-type]
    return Allocation(
        mesh=DeviceMesh(first, strategy.num_devices), strategy=strategy, num_micro_batches=m,
        generation_batch=rows, offload=offload,
    )  # fmt: skip


def plan_of(
    spec: ModelSpec, devices: int, default: Allocation, *, algorithm: Algorithm = PPO,
    device: str = "a100", sizes: list[str] | None = None, **calls: Allocation,
) -> ExecutionPlan:  # fmt: skip
    config = make_config(algorithm.config_class, sizes or SIZES)
    problem = make_problem(
        algorithm, config, model=spec, critic=spec, cluster=make_cluster(device, devices)
    )
    allocations = {c.name: calls.get(c.name, default) for c in problem.graph.calls}
    plan = ExecutionPlan(problem=problem, allocations=allocations)
    validate_plan(plan)
    return plan


def ahead(plan: ExecutionPlan) -> ExecutionPlan:
    graph = replace(plan.problem.graph, max_staleness=1)
    return replace(plan, problem=replace(plan.problem, graph=graph))


PLANS = {
    "one device": plan_of(
        DENSE, 1, allocate(), actor_train=allocate(m=2), critic_train=allocate(m=4)
    ),
    "dp": plan_of(GROUPED, 2, allocate(dp=2, m=2), actor_train=allocate(dp=2, m=2, zero=1)),
    "tp": plan_of(GROUPED, 2, allocate(tp=2, m=2)),
    "sequence parallel": plan_of(
        DENSE, 4, allocate(tp=4, m=2),
        actor_train=allocate(tp=4, m=2, sequence_parallel=True),
        critic_train=allocate(tp=2, dp=2, sequence_parallel=True, recompute="selective"),
    ),
    "pp": plan_of(
        replace(GROUPED, num_layers=4), 4, allocate(pp=4, m=4), actor_gen=allocate(dp=4),
        critic_train=allocate(pp=2, dp=2, m=2, recompute="full"),
    ),
    "waves": plan_of(DENSE, 2, allocate(dp=2, m=2), actor_gen=allocate(dp=2, rows=3)),
    "offloaded": plan_of(
        GROUPED, 2, allocate(tp=2, m=2), ref_inf=allocate(tp=2, m=2, offload=True),
        actor_train=allocate(tp=2, m=2, offload=True),
        critic_train=allocate(dp=2, m=2, zero=1, offload=True),
    ),
    "experts": plan_of(EXPERTS, 2, allocate(tp=2, m=2)),
    "experts over replicas": plan_of(
        EXPERTS, 4, allocate(dp=4, m=2, ep=4), actor_gen=allocate(dp=2, tp=2, ep=2),
        actor_train=allocate(dp=4, ep=2, zero=1),
        critic_train=allocate(dp=4, ep=4, zero=1, recompute="full"),
    ),
    "grpo": plan_of(
        DENSE, 2, allocate(dp=2, m=2), algorithm=GRPO, actor_train=allocate(tp=2, m=1),
        sizes=["batch_size=4", "samples_per_prompt=8", "prompt_len=384", "response_len=64"],
    ),
    # Nothing but weights, the cache and graphs; more rows than enter at once.
    "generation": plan_of(
        replace(GROUPED, num_layers=1), 1, allocate(), algorithm=GENERATION,
        actor_gen=allocate(m=2, rows=48),
        sizes=["batch_size=64", "prompt_len=384", "response_len=96"],
    ),
    "ahead": ahead(
        plan_of(GROUPED, 4, allocate(dp=2, m=2), actor_gen=allocate(tp=2, first=2),
                ref_inf=allocate(tp=2, first=2), rew_inf=allocate(dp=2, m=2, first=2))
    ),
    "ahead on all": ahead(plan_of(GROUPED, 2, allocate(tp=2, m=2), actor_gen=allocate(dp=2))),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
def test_what_a_rank_holds_is_what_the_planner_says(name: str, tmp_path: Path) -> None:
    """Within 10 %, for every kind of rank."""
    run = configure(PLANS[name], ["init=random"])
    program = compile_plan(run.plan)
    reports = [check_rank(run, program, kind, tmp_path) for kind in rank_kinds(run.plan, program)]
    assert sorted(r for report in reports for r in report.ranks) == list(
        range(run.plan.num_devices)
    )
    for report in reports:
        assert abs(report.error) < 0.10, (report.ranks, report.peak_at, report.error, report.by)


@pytest.mark.parametrize("device", ["a100", "cpu"])
def test_what_stays_of_a_generation_is_what_the_planner_says(device: str, tmp_path: Path) -> None:
    """While every later call runs: keys and values, and the memory of a GPU's decode graphs."""
    plan = plan_of(
        THIN, 2, allocate(pp=2, m=2), algorithm=GRPO, device=device,
        sizes=["batch_size=4", "samples_per_prompt=8", "prompt_len=384", "response_len=64"],
    )  # fmt: skip
    run = configure(plan, ["init=random"])
    program = compile_plan(run.plan)
    call, allocation = plan.problem.graph.call("actor_gen"), plan.allocations["actor_gen"]
    for rank in (0, 1):
        kept = check_rank(run, program, (rank,), tmp_path).by
        without = check_rank(run, without_caches(program), (rank,), tmp_path).by
        planned = cache_memory(plan.problem, call, allocation, THIN, stage=rank)
        for name in ("ref_inf", "actor_train"):
            assert kept[name] - without[name] == pytest.approx(planned.total, rel=0.1), name
        assert kept["actor_gen"] == pytest.approx(without["actor_gen"], rel=0.01)


def without_caches(program: Program) -> Program:
    """The same, but no generation keeps anything."""
    step = {
        rank: tuple(replace(i, keeps=False) if isinstance(i, Generate) else i for i in own)
        for rank, own in program.step.items()
    }
    return replace(program, step=step)


def test_a_micro_batch_under_way_keeps_what_its_stage_was_given_and_gave_on(tmp_path: Path) -> None:
    """A block a stage, recomputed: two more under way are two more inputs and two more outputs."""
    plan = plan_of(
        THIN, 8, allocate(pp=8, m=16, recompute="full"), algorithm=SFT,
        sizes=["batch_size=32", "prompt_len=1024", "response_len=1024"],
    )  # fmt: skip
    run = configure(plan, ["init=random"])
    program = compile_plan(run.plan)
    seven, five = (check_rank(run, program, (rank,), tmp_path) for rank in (1, 3))
    hidden_bytes = 2 * 2048 * THIN.hidden * 2  # of two sequences
    assert seven.planned_bytes - five.planned_bytes == 4 * hidden_bytes
    assert seven.peak_bytes - five.peak_bytes == pytest.approx(4 * hidden_bytes, rel=0.2)


def test_ranks_that_do_the_same_are_one_kind() -> None:
    """Of dp and tp nothing is left, of pp its stages."""
    plan = PLANS["pp"]
    assert rank_kinds(plan, compile_plan(plan)) == [(0,), (1,), (2,), (3,)]
    plan = plan_of(DENSE, 8, allocate(dp=4, tp=2))
    assert rank_kinds(plan, compile_plan(plan)) == [tuple(range(8))]


def test_a_check_leaves_no_process_group(tmp_path: Path) -> None:
    run = configure(PLANS["one device"], ["init=random"])
    check_rank(run, compile_plan(run.plan), (0,), tmp_path)
    assert not torch.distributed.is_initialized()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from executor.cli import main

    save_plan(PLANS["dp"], tmp_path / "plan.json")
    assert main(["check", str(tmp_path / "plan.json"), "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["ranks"] == [0, 1]
    assert report["peak_bytes"] > 0

    small = plan_of(
        replace(DENSE, num_layers=8), 1, allocate(), device="l40s",
        sizes=["batch_size=4", "prompt_len=32", "response_len=8"],
    )  # fmt: skip
    save_plan(small, tmp_path / "small.json")
    assert main(["check", str(tmp_path / "small.json")]) == 2
    assert "rank 0 holds" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "plan.json"), "--ranks", "7"]) == 2
    assert "numbers from 0 to 1" in capsys.readouterr().err
