"""Small PPO runs for tests: plans written in one line a call, carried out by real workers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from executor.cross_memory import CrossMemory
from executor.dataset import MockData, Prompts
from executor.handover import go_over
from executor.run import Run, functions_of
from executor.text import TextCodec
from executor.trace import TraceWriter
from executor.worker import Worker
from experiments.dpo import graph as dpo
from experiments.generation import graph as generation
from experiments.grpo import graph as grpo
from experiments.ppo.graph import ALGORITHM
from experiments.raft import graph as raft
from experiments.reinforce import graph as reinforce
from experiments.remax import graph as remax
from experiments.reward import graph as reward
from experiments.sft import graph as sft
from planner.algorithm import make_config, make_problem
from planner.mesh import DeviceMesh
from planner.plan import Allocation, ExecutionPlan, Problem, validate_plan
from planner.program import compile_plan
from planner.program_check import check_program
from planner.strategy import Recompute, parse_strategy
from profiles.hardware import ClusterSpec, DeviceSpec, LinkSpec
from profiles.models import ModelSpec
from tests.spawn import spawn

SMALL = ModelSpec(
    name="small", num_layers=4, hidden=32, num_heads=4, num_kv_heads=2, head_dim=8, ffn=64,
    vocab=96, tied_embedding=True, max_positions=64,
)  # fmt: skip
OVERRIDES = [
    "batch_size=8", "prompt_len=8", "response_len=10", "ppo.num_mini_batches=2", "init=random",
    "total_steps=2",
    "actor.lr=1e-3", "critic.lr=1e-3", "generation.top_p=0.9", "generation.top_k=40",
]  # fmt: skip


def cluster(num_devices: int) -> ClusterSpec:
    link = LinkSpec(bytes_per_s=1e9, latency_s=1e-5)
    device = DeviceSpec(
        name="cpu", kind="cpu", peak_flops=1e11, memory_bytes=1 << 33, memory_bytes_per_s=1e10,
        launch_s=1e-6,
    )  # fmt: skip
    return ClusterSpec(
        name="test", device=device, num_nodes=1, devices_per_node=num_devices, intra_link=link,
        inter_link=link, host_link=link,
    )  # fmt: skip


ALGORITHMS = {
    algorithm.name: algorithm
    for algorithm in (
        ALGORITHM,
        sft.ALGORITHM,
        reward.ALGORITHM,
        dpo.ALGORITHM,
        generation.ALGORITHM,
        grpo.ALGORITHM,
        remax.ALGORITHM,
        reinforce.ALGORITHM,
        raft.ALGORITHM,
    )
}


def ppo_problem(num_devices: int, overrides: Sequence[str], spec: ModelSpec = SMALL) -> Problem:
    """PPO with a critic of one layer less than the actor."""
    config = make_config(ALGORITHM.config_class, overrides)
    return make_problem(
        ALGORITHM, config, model=spec, critic=replace(spec, num_layers=spec.num_layers - 1),
        cluster=cluster(num_devices),
    )  # fmt: skip


def make_plan(
    num_devices: int,
    default: str,
    *,
    overrides: Sequence[str] = tuple(OVERRIDES),
    spec: ModelSpec = SMALL,
    algorithm: str = "ppo",
    **calls: str,
) -> ExecutionPlan:
    """Calls as "first:d1p2m1:micro-batches[:FLAG…]"; ``default`` for the rest.

    Flags: ``zero``, ``recompute``, ``selective``, ``sp`` (sequence parallel), ``rows=N`` (the
    generation batch), ``offload``.
    """
    chosen = ALGORITHMS[algorithm]
    if algorithm == "ppo":
        problem = ppo_problem(num_devices, overrides, spec)
    else:
        config = make_config(chosen.config_class, overrides)
        problem = make_problem(
            chosen, config, model=spec, critic=spec, cluster=cluster(num_devices)
        )

    def allocation(text: str) -> Allocation:
        first, layout, micro, *flags = text.split(":")
        recompute: Recompute = "none"
        if "recompute" in flags:
            recompute = "full"
        elif "selective" in flags:
            recompute = "selective"
        strategy = replace(
            parse_strategy(layout),
            zero=int("zero" in flags),
            recompute=recompute,
            sequence_parallel="sp" in flags,
        )
        mesh = DeviceMesh(int(first), strategy.num_devices)
        rows = [int(flag.removeprefix("rows=")) for flag in flags if flag.startswith("rows=")]
        return Allocation(
            mesh=mesh, strategy=strategy, num_micro_batches=int(micro), generation_batch=sum(rows),
            offload="offload" in flags,
        )  # fmt: skip

    allocations = {c.name: allocation(calls.get(c.name, default)) for c in problem.graph.calls}
    plan = ExecutionPlan(problem=problem, allocations=allocations)
    validate_plan(plan)
    check_program(plan, compile_plan(plan))
    return plan


@dataclass(frozen=True)
class Outcome:
    """What one rank saw: its samples' tokens, its metrics, its slices of the trained weights."""

    tokens: dict[tuple[int, int], list[int]]
    metrics: dict[str, dict[str, float]]
    slices: dict[str, dict[tuple[str, tuple[int, ...]], torch.Tensor]]


def mock_data(plan: ExecutionPlan, config: Any) -> MockData:
    return MockData(
        vocab=min(spec.vocab for spec in plan.problem.models.values()),
        kind=ALGORITHMS[plan.problem.algorithm].data, seed=config.seed,
        prompt_len=config.prompt_len, response_len=config.response_len,
    )  # fmt: skip


def run_rank(
    rank: int, world_size: int, plan: ExecutionPlan, folder: str, data: Prompts | None = None,
    around: AbstractContextManager[Any] | None = None, worker_class: type[Worker] = Worker,
    then: Mapping[int, Sequence[ExecutionPlan]] | None = None,
) -> Outcome:  # fmt: skip
    """Setup and all steps, ``around`` them; before some steps over to other plans."""
    algorithm = ALGORITHMS[plan.problem.algorithm]
    config = make_config(algorithm.config_class, [], base=plan.problem.config)
    run = Run(plan=plan, algorithm=algorithm, config=config)
    functions = functions_of(run)
    store = dist.FileStore(str(Path(folder) / "store"), world_size)
    memory = CrossMemory.between_workers()
    tokens: dict[tuple[int, int], list[int]] = {}
    with TraceWriter(Path(folder) / "trace", rank) as trace:

        def worker_of(plan: ExecutionPlan) -> Worker:
            return worker_class(
                replace(run, plan=plan), compile_plan(plan), rank=rank, device=torch.device("cpu"),
                functions=functions, store=store, trace=trace, text=TextCodec(None),
                data=data or mock_data(plan, config), memory=memory,
            )  # fmt: skip

        worker = worker_of(plan)
        with around or nullcontext():
            worker.setup()
            for step in range(config.total_steps):
                for other in (then or {}).get(step, ()):
                    old, worker = worker, worker_of(other)
                    go_over(old, worker, step)
                keep = worker.samples.clear
                worker.samples.clear = lambda: None  # type: ignore[method-assign]
                worker.run_step(step, last=step + 1 == config.total_steps)
                for sample, ids in worker.samples.values.get("sequences", {}).items():
                    tokens[(step, sample)] = ids.tolist()
                keep()
        dist.barrier()
    metrics = {}
    for step in range(config.total_steps):
        for call in plan.problem.graph.calls:
            _, values = json.loads(store.get(f"metrics/{step}/{call.name}/0"))
            metrics[f"{step}/{call.name}"] = values
    slices: dict[str, dict[tuple[str, tuple[int, ...]], torch.Tensor]] = {}
    for role, trainer in worker.weights.trainers.items():
        buffer = trainer.stage.buffer
        slices[role] = {
            (piece.name, piece.offset): buffer.view(piece.name).clone() for piece in buffer.slices
        }
    return Outcome(tokens=tokens, metrics=metrics, slices=slices)


def run_plan(plan: ExecutionPlan, folder: Path, data: Prompts | None = None) -> list[Outcome]:
    folder.mkdir(parents=True, exist_ok=True)
    return spawn(plan.num_devices, run_rank, plan, str(folder), data)


Runs = dict[str, tuple[ExecutionPlan, Prompts | None]]


def _run_all(rank: int, world_size: int, runs: Runs, folder: str) -> dict[str, Outcome]:
    found = {}
    for name, (plan, data) in runs.items():
        own = Path(folder) / name.replace(" ", "_")
        own.mkdir(parents=True, exist_ok=True)
        found[name] = run_rank(rank, world_size, plan, str(own), data)
    return found


def run_plans(runs: Runs, folder: Path) -> dict[str, list[Outcome]]:
    """Several plans one after another in the same processes: they start once, which is most of
    the time of a small run. A plan's devices are the first of them."""
    by_rank = spawn(
        max(plan.num_devices for plan, _ in runs.values()), _run_all, runs, str(folder),
        timeout_s=270.0,
    )  # fmt: skip
    return {
        name: [outcomes[name] for outcomes in by_rank[: plan.num_devices]]
        for name, (plan, _) in runs.items()
    }
